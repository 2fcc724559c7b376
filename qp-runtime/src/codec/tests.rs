//! Encode, decode and multiply, against definitions and brute force.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;
use qp_codegen::cuda::{Device, Target};
use qp_codegen::ir::interpret::Options;
use qp_codegen::kernels::encode::{Plan, Shared};
use qp_codegen::layout::{BLOCKS_PER_TILE, position};
use qp_codegen::metric::Metric;
use qp_codegen::reference::{self, quantize_activations};
use qp_codegen::spec::expr::{Decode, Node, Op, VectorOp, WordOp};
use qp_codegen::spec::{Code, Quantizer, Rotation, ScaleKind, Shape, Table, TableSource, Training, Value};

use super::encode::{close, stream, windows_of};
use super::feedback::{Feedback, Hessian, Pieces};
use super::viterbi::{Scratch, Trellis};
use super::*;
use crate::device::{DeviceTrellis, Executor};

/// `t[h >> shift] ^ signs(h[..])` with `h = window · odd`.
pub(super) fn hashed(shift: u32, signs: &[u32]) -> Decode {
    let mut d = Decode::default();
    let w = d.push(Op::Window);
    let odd = d.push(Op::Const(0x9E37_79B1));
    let h = d.push(Op::Binary(WordOp::Mul, w, odd));
    let shift = d.push(Op::Const(shift));
    let index = d.push(Op::Binary(WordOp::Shr, h, shift));
    let entry = d.push(Op::Lookup { table: 0, index });
    let bits: Vec<Node> = signs.iter().map(|&i| d.push(Op::Bit(h, i))).collect();
    let signs = d.push(Op::Signs(bits));
    d.push(Op::Vector(VectorOp::Xor, entry, signs));
    d
}

/// `t[window]`.
pub(super) fn direct() -> Decode {
    let mut d = Decode::default();
    let index = d.push(Op::Window);
    d.push(Op::Lookup { table: 0, index });
    d
}

/// A code with a table of Gaussian values.
pub(super) fn code(window: u32, steps: &[u32], vector: u32, value: Value, entries: u32, decode: Decode) -> Code {
    let unit = match value {
        Value::I8 => 1.0 / 32.0,
        Value::I16 => 1.0 / 4096.0,
    };
    let (min, max) = value.range();
    let mut random = Gaussian::new(u64::from(window));
    let values = random.samples((entries * vector) as usize);
    let values = values.iter().map(|x| ((x / unit) as i32).clamp(min, max) as i16).collect();
    let block = Shape { rows: 2, cols: 128 };
    let tables = vec![Table { name: "t".into(), entries, values, source: Default::default() }];
    Code { window, steps: steps.to_vec(), vector, block, value, half_offset: value == Value::I8, unit, tables, decode }
}

/// A hashed code with one sign a component and a table of 2^(L − 3) entries.
pub(super) fn trellis(window: u32, steps: &[u32], vector: u32) -> Code {
    let signs: Vec<u32> = (0..vector).map(|i| 20 - i).collect();
    code(window, steps, vector, Value::I8, 1 << (window - 3), hashed(32 - (window - 3), &signs))
}

pub(super) fn quantizer(codes: Vec<Code>) -> Quantizer {
    Quantizer { name: "test".into(), codes, scale: ScaleKind::Row, rotation: Rotation::None }
}

/// One of each kind.
fn quantizers() -> Vec<Quantizer> {
    let mut square = trellis(10, &[6], 2);
    square.block = Shape { rows: 8, cols: 32 };
    let mut pattern = trellis(10, &[4, 5], 2);
    pattern.block = Shape { rows: 4, cols: 128 };
    let mut whole = quantizer(vec![trellis(8, &[4], 2)]);
    whole.scale = ScaleKind::Matrix;
    vec![
        quantizer(vec![trellis(8, &[4], 2)]),
        quantizer(vec![trellis(9, &[3], 1)]),
        quantizer(vec![trellis(12, &[8], 4)]),
        quantizer(vec![pattern]),
        quantizer(vec![trellis(10, &[7], 2)]),
        quantizer(vec![trellis(10, &[3], 2), trellis(10, &[4], 2), trellis(9, &[6], 2)]),
        quantizer(vec![code(3, &[3], 1, Value::I16, 8, direct())]),
        quantizer(vec![code(7, &[7], 2, Value::I16, 128, direct())]),
        quantizer(vec![code(10, &[4], 2, Value::I16, 128, hashed(25, &[19, 18]))]),
        quantizer(vec![square]),
        whole,
    ]
}

/// What errors of `m` as a code for `w` do to the outputs for `inputs`, summed.
fn damage(q: &Quantizer, m: &PackedMatrix, w: &[f32], inputs: &[f32]) -> f64 {
    let columns = m.layout.shape.cols as usize;
    let errors: Vec<f32> = decode_matrix(q, m).iter().zip(w).map(|(a, b)| a - b).collect();
    let outputs = errors.chunks_exact(columns).flat_map(|e| inputs.chunks_exact(columns).map(move |x| (e, x)));
    outputs.map(|(e, x)| e.iter().zip(x).map(|(a, b)| f64::from(a * b)).sum::<f64>().powi(2)).sum()
}

#[test]
fn feedback_lessens_the_damage() {
    let shape = Shape { rows: 21, cols: 300 };
    let w = Gaussian::new(5).samples(shape.len() as usize);
    // Inputs of few directions, one of them strong, and some noise.
    let directions = Gaussian::new(6).samples(40 * 300);
    let mut random = Gaussian::new(7);
    let inputs: Vec<f32> = (0..500)
        .flat_map(|_| {
            let mut x: Vec<f32> = random.samples(300).iter().map(|n| 0.3 * n).collect();
            for (i, (d, a)) in directions.chunks_exact(300).zip(random.samples(40)).enumerate() {
                let a = if i == 0 { 5.0 * a } else { a };
                x.iter_mut().zip(d).for_each(|(x, d)| *x += a * d);
            }
            x
        })
        .collect();
    let mut hessian = Hessian::new(300);
    inputs.chunks(300 * 123).for_each(|some| hessian.add(some));
    for q in quantizers() {
        let (encoder, pieces) = (Encoder::new(&q), Pieces::new(&q.codes[0]));
        let feedback = Feedback::new(&hessian, &pieces).unwrap();
        let (plain, done) = (encoder.encode(shape, &w, &|_| ()).unwrap(), AtomicU64::new(0));
        let count = |n| {
            done.fetch_add(n, Ordering::Relaxed);
        };
        let shaped = encoder.encode_for(shape, &w, &feedback, &count).unwrap();
        assert_eq!(done.into_inner(), shape.len());
        let ratio = damage(&q, &shaped, &w, &inputs) / damage(&q, &plain, &w, &inputs);
        // Small blocks and pieces have more neighbours to make good what they lack.
        let most = match (pieces.parts().len(), q.block().cols) {
            (1, 128..) => 0.4,
            (1, _) => 0.12,
            _ => 0.25,
        };
        assert!(ratio < most, "{:?}: {ratio}", q.codes[0].block);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert!(pool.install(|| encoder.encode_for(shape, &w, &feedback, &|_| ())).unwrap() == shaped);
    }
    assert!(Feedback::new(&Hessian::new(300), &Pieces::new(&quantizers()[0].codes[0])).is_none());
}

/// Entries of a matrix, by the definitions of layout and code alone.
fn entries(q: &Quantizer, m: &PackedMatrix) -> Vec<i16> {
    let l = &m.layout;
    let mut out = vec![0; l.shape.len() as usize];
    let mut words = vec![];
    for rt in 0..l.row_tiles() {
        for ct in 0..l.col_tiles() {
            let code = &q.codes[l.code_of(ct)];
            let mut entry = vec![0; code.vector as usize];
            for g in 0..BLOCKS_PER_TILE {
                l.read_block(&m.words, rt, ct, g, &mut words);
                for p in 0..code.weights() {
                    code.entry(code.window_at(&words, p / code.vector), &mut entry);
                    let (r, c) = position(code.block, g, p);
                    let (r, c) = (rt * l.tile.rows + r, ct * l.tile.cols + c);
                    if r < l.shape.rows && c < l.shape.cols {
                        out[(r * l.shape.cols + c) as usize] = entry[(p % code.vector) as usize];
                    }
                }
            }
        }
    }
    out
}

fn encode(q: &Quantizer, shape: Shape, weights: &[f32]) -> PackedMatrix {
    encode_matrix(q, shape, weights, &|_| ()).expect("finite weights")
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64
}

#[test]
fn matrices_of_every_kind_decode_to_what_the_definitions_say() {
    for q in quantizers() {
        for shape in [Shape { rows: 32, cols: 512 }, Shape { rows: 23, cols: 130 }, Shape { rows: 1, cols: 1 }] {
            let weights = Gaussian::new(5).samples(shape.len() as usize + 1);
            let weights: Vec<f32> = weights[..shape.len() as usize].iter().map(|w| w * 0.02).collect();
            let m = encode(&q, shape, &weights);
            let expect: Vec<f32> = entries(&q, &m)
                .iter()
                .enumerate()
                .map(|(i, &e)| reference::weight(&q.codes[0], e, m.scale(i / shape.cols as usize)))
                .collect();
            let decoded = decode_matrix(&q, &m);
            assert_eq!(decoded, expect, "{:?} {shape:?}", q.codes[0].steps);
            // Codes with random tables are poor, but far better than nothing.
            let power = error(&weights, &vec![0.0; weights.len()]);
            let penalty = if q.codes[0].is_memoryless() { 16.0 } else { 4.0 };
            let bound = if shape.len() > 100 { penalty * 2f64.powf(-2.0 * q.rate()) } else { 1.0 };
            let relative = error(&weights, &decoded) / power;
            assert!(relative < bound.min(1.0), "{:?} {shape:?}: {relative} of {bound}", q.codes[0].steps);
        }
    }
}

#[test]
fn linear_is_the_product_with_the_decoded_matrix() {
    for q in quantizers() {
        let shape = Shape { rows: 21, cols: 1300 };
        let weights = Gaussian::new(6).samples(shape.len() as usize);
        let m = encode(&q, shape, &weights);
        let decoded = decode_matrix(&q, &m);
        let tokens: Vec<_> = (0..3).map(|t| quantize_activations(&Gaussian::new(t).samples(1300))).collect();
        let y = linear(&q, &m, &tokens);
        for (t, a) in tokens.iter().enumerate() {
            let e = entries(&q, &m);
            let factor = reference::output_factor(&q.codes[0], a.scale);
            for r in 0..21 {
                let row = r * 1300..(r + 1) * 1300;
                let float: f64 =
                    decoded[row.clone()].iter().zip(&a.q).map(|(&w, &q)| f64::from(w) * f64::from(q)).sum();
                let float = float * f64::from(a.scale);
                let acc = e[row].iter().zip(&a.q).map(|(&e, &q)| i64::from(e) * i64::from(q)).sum();
                let exact = reference::scale_output(&q.codes[0], acc, a.sum, m.scale(r), factor);
                assert_eq!(y[t * 21 + r], exact);
                assert!((f64::from(exact) - float).abs() < 1e-5 * (1.0 + float.abs()), "{exact} {float}");
            }
        }
        assert_eq!(linear(&q, &m, &tokens[1..2]), y[21..42]);
        assert!(linear(&q, &m, &[]).is_empty());
    }
}

#[test]
fn the_largest_products_do_not_overflow() {
    for value in [Value::I8, Value::I16] {
        let mut c = code(2, &[2], 1, value, 4, direct());
        c.tables[0].values = vec![value.range().0 as i16; 4];
        let q = quantizer(vec![c]);
        let shape = Shape { rows: 1, cols: 4096 };
        let layout = qp_codegen::layout::Packed::new(&q, shape);
        let m = PackedMatrix { words: vec![0; layout.words()].into(), layout, scales: vec![bf16::ONE] };
        for sign in [1.0, -1.0] {
            let a = quantize_activations(&vec![sign; 4096]);
            let decoded: f64 = decode_matrix(&q, &m).iter().map(|&w| f64::from(w)).sum();
            let y = f64::from(linear(&q, &m, &[a])[0]);
            assert!((y / (decoded * f64::from(sign)) - 1.0).abs() < 1e-6, "{y} {decoded}");
        }
    }
}

#[test]
fn zero_rows_have_scale_zero_and_weights_that_are_not_finite_are_refused() {
    let q = quantizer(vec![trellis(8, &[4], 2)]);
    let shape = Shape { rows: 3, cols: 128 };
    let mut weights = Gaussian::new(1).samples(3 * 128);
    weights[128..256].fill(0.0);
    let m = encode(&q, shape, &weights);
    assert_eq!(m.scales[1], bf16::ZERO);
    let decoded = decode_matrix(&q, &m);
    assert!(decoded[128..256].iter().all(|&w| w == 0.0));
    assert!(error(&weights, &decoded) < 0.2);
    // The largest could not be rotated back.
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -3e38, 1e30] {
        weights[300] = bad;
        let e = encode_matrix(&q, shape, &weights, &|_| ()).expect_err("refused");
        assert!(e.to_string().starts_with("the weight in row 2, column 44 is"), "{e}");
    }
}

#[test]
fn extreme_weights_stay_finite() {
    let q = quantizer(vec![trellis(8, &[4], 2)]);
    let shape = Shape { rows: 1, cols: 256 };
    for factor in [1e-45, 1e-38, 1e-30, 1e20, 2e29] {
        let weights: Vec<f32> = Gaussian::new(1).samples(256).iter().map(|w| w * factor).collect();
        let decoded = decode_matrix(&q, &encode(&q, shape, &weights));
        assert!(error(&weights, &decoded).sqrt() <= 1.01 * error(&weights, &[0.0; 256]).sqrt(), "{factor}");
    }
}

#[test]
fn scales_are_the_root_mean_square() {
    let mut q = quantizer(vec![trellis(8, &[4], 2)]);
    let shape = Shape { rows: 2, cols: 4 };
    let weights = [3.0, -3.0, 3.0, 3.0, 4.0, 0.0, 0.0, 0.0];
    assert_eq!(encode(&q, shape, &weights).scales, [3.0, 2.0].map(bf16::from_f32));
    q.scale = ScaleKind::Matrix;
    assert_eq!(encode(&q, shape, &weights).scales, [bf16::from_f32((52f32 / 8.0).sqrt())]);
}

#[test]
fn progress_counts_every_weight_once() {
    let q = quantizer(vec![trellis(8, &[4], 2), trellis(8, &[3], 2)]);
    let shape = Shape { rows: 40, cols: 300 };
    let done = AtomicU64::new(0);
    let weights = Gaussian::new(1).samples(12000);
    encode_matrix(&q, shape, &weights, &|n| _ = done.fetch_add(n, Ordering::Relaxed)).expect("finite");
    assert_eq!(done.into_inner(), 12000);
}

#[test]
fn threads_change_nothing() {
    let q = quantizer(vec![trellis(10, &[3], 2), trellis(10, &[4], 2)]);
    let shape = Shape { rows: 37, cols: 700 };
    let weights = Gaussian::new(2).samples(shape.len() as usize);
    let tokens = [quantize_activations(&Gaussian::new(3).samples(700))];
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let m = encode(&q, shape, &weights);
            let y = linear(&q, &m, &tokens);
            (m, y)
        })
    };
    assert_eq!(run(1), run(5));
}

/// Windows of a cyclic stream of any length, given as the integer `bits`.
fn windows_of_bits(code: &Code, bits: u64, steps: u32) -> Vec<u32> {
    let n = code.step_offset(steps);
    let bit = |i: u32| (bits >> (i % n) & 1) as u32;
    (0..steps).map(|s| (0..code.window).map(|i| bit(code.step_offset(s) + i) << i).sum()).collect()
}

fn squared_error(code: &Code, block: &[f32], windows: &[u32]) -> f64 {
    let v = code.vector as usize;
    let mut entry = vec![0; v];
    let mut sum = 0.0;
    for (&w, x) in windows.iter().zip(block.chunks_exact(v)) {
        code.entry(w, &mut entry);
        sum += x.iter().zip(&entry).map(|(x, &e)| f64::from(x - reference::weight(code, e, 1.0)).powi(2)).sum::<f64>();
    }
    sum
}

/// The sum of metrics along a path.
fn cost(code: &Code, block: &[f32], windows: &[u32]) -> u32 {
    let (m, v) = (Metric::new(code), code.vector as usize);
    let mut entry = vec![0; v];
    let branches = windows.iter().zip(block.chunks_exact(v)).map(|(&w, x)| {
        code.entry(w, &mut entry);
        let points: Vec<f16> = x.iter().map(|&x| m.weight(x)).collect();
        let entry: Vec<f16> = entry.iter().map(|&c| m.entry(c)).collect();
        u32::from(m.branch(&points, &entry))
    });
    branches.sum()
}

#[test]
fn a_search_finds_the_best_path_through_its_seam() {
    // (code, steps): streams of at most 14 bits, all of which are tried.
    let codes = [
        (trellis(4, &[2], 1), 6),
        (trellis(5, &[2], 2), 7),
        (trellis(4, &[3], 1), 4),
        (trellis(6, &[3, 2], 2), 5),
        (trellis(6, &[2, 6], 1), 3),
        (trellis(5, &[1], 1), 12),
    ];
    for (code, steps) in codes {
        let trellis = Trellis::with_length(&code, (steps * code.vector) as usize);
        let mut scratch = Scratch::default();
        for seed in 0..6 {
            let mut block = Gaussian::new(seed).samples(trellis.block_len());
            block.truncate(trellis.block_len());
            let bits = code.step_offset(steps);
            let mut best = vec![u32::MAX; trellis.states(0)];
            for b in 0..1u64 << bits {
                let windows = windows_of_bits(&code, b, steps);
                let seam = windows[0] as usize & (trellis.states(0) - 1);
                best[seam] = best[seam].min(cost(&code, &block, &windows));
            }
            for (seam, &best) in best.iter().enumerate() {
                let path = trellis.encode_from(&block, seam as u32, &mut scratch);
                assert_eq!(cost(&code, &block, &path), best, "{:?} seam {seam}", code.steps);
            }
            let mut windows = vec![0; trellis.steps()];
            trellis.encode(&block, &mut windows, &mut scratch);
            let words = stream(&code, &windows);
            let bits = u64::from(words[0]);
            assert_eq!(windows, windows_of_bits(&code, bits, steps), "the path is cyclic");
        }
    }
}

#[test]
fn two_searches_come_close_to_the_best_of_all_seams() {
    for (code, limit) in [(trellis(8, &[2], 1), 1.004), (trellis(10, &[4], 2), 1.004), (trellis(9, &[3, 4], 2), 1.004)]
    {
        let trellis = Trellis::new(&code);
        let mut scratch = Scratch::default();
        let (mut found, mut optimum) = (0.0, 0.0);
        for seed in 0..8 {
            let block = Gaussian::new(seed).samples(256);
            let mut windows = vec![0; trellis.steps()];
            trellis.encode(&block, &mut windows, &mut scratch);
            found += squared_error(&code, &block, &windows);
            let paths = (0..trellis.states(0) as u32).map(|seam| trellis.encode_from(&block, seam, &mut scratch));
            let path = paths.min_by_key(|path| cost(&code, &block, path)).expect("a seam");
            optimum += squared_error(&code, &block, &path);
        }
        assert!(found < optimum * limit, "{:?}: {} of the optimum", code.steps, found / optimum);
    }
}

#[test]
fn blocks_are_cyclic_and_do_not_depend_on_their_neighbours() {
    for code in [trellis(12, &[4], 2), trellis(10, &[3, 5], 1), trellis(16, &[9], 2)] {
        let trellis = Trellis::new(&code);
        let (len, n) = (trellis.block_len(), trellis.steps());
        let weights = Gaussian::new(9).samples(5 * len);
        let mut scratch = Scratch::default();
        let mut windows = vec![0; 5 * n];
        trellis.encode(&weights, &mut windows, &mut scratch);
        for (block, windows) in weights.chunks_exact(len).zip(windows.chunks_exact(n)) {
            assert_eq!(windows_of(&code, &stream(&code, windows)), windows);
            let mut alone = vec![0; n];
            trellis.encode(block, &mut alone, &mut scratch);
            assert_eq!(alone, windows);
        }
    }
}

#[test]
fn paths_whose_ends_do_not_meet_become_those_of_their_streams() {
    for code in [trellis(12, &[4], 2), trellis(10, &[3, 5], 1), trellis(16, &[9], 2)] {
        let trellis = Trellis::new(&code);
        let mut windows = vec![0; trellis.steps()];
        trellis.encode(&Gaussian::new(9).samples(trellis.block_len()), &mut windows, &mut Scratch::default());
        let closed = windows.clone();
        close(&code, &mut windows);
        assert_eq!(windows, closed);
        // The same stream, read beyond its end as if it went on otherwise.
        *windows.last_mut().expect("a step") ^= 1 << (code.window - 1);
        close(&code, &mut windows);
        assert_eq!(windows, closed);
    }
    let code = code(6, &[6], 2, Value::I16, 64, direct());
    let mut windows: Vec<u32> = (0..128).map(|s| s * 5 % 64).collect();
    let before = windows.clone();
    close(&code, &mut windows);
    assert_eq!(windows, before);
}

#[test]
fn memoryless_codes_take_the_nearest_entry() {
    let code = code(5, &[5], 2, Value::I16, 32, direct());
    let trellis = Trellis::new(&code);
    let weights = Gaussian::new(4).samples(256);
    let mut windows = vec![0; 128];
    trellis.encode(&weights, &mut windows, &mut Scratch::default());
    for (x, &w) in weights.chunks_exact(2).zip(&windows) {
        let best = (0..32).map(|c| squared_error(&code, x, &[c])).fold(f64::INFINITY, f64::min);
        assert!(squared_error(&code, x, &[w]) < best + 1e-5);
    }
}

#[test]
fn the_plain_loop_finds_the_same_windows() {
    let mut long = trellis(8, &[4], 2);
    long.block = Shape { rows: 8, cols: 128 };
    let wide = code(9, &[5], 4, Value::I16, 512, direct());
    let codes = [
        trellis(12, &[4], 2),
        trellis(10, &[3, 5], 1),
        trellis(12, &[9], 4),
        trellis(7, &[7, 3], 2),
        code(6, &[6], 2, Value::I16, 64, direct()),
        wide,
        long,
    ];
    for code in codes {
        let fast = Trellis::new(&code);
        let plain = plain::Plain::with_length(&code, fast.block_len());
        // Outliers too, and blocks whose best paths tie.
        let mut weights = Gaussian::new(3).samples(4 * fast.block_len());
        weights[7] = 1e30;
        weights[2 * fast.block_len()..].iter_mut().step_by(3).for_each(|x| *x *= 40.0);
        weights[3 * fast.block_len()..].fill(0.0);
        let mut windows = vec![0; 4 * fast.steps()];
        fast.encode(&weights, &mut windows, &mut Scratch::default());
        let expected: Vec<u32> = weights.chunks_exact(fast.block_len()).flat_map(|b| plain.encode(b)).collect();
        assert_eq!(windows, expected, "{:?}", code.steps);
    }
}

#[test]
fn little_memory_changes_nothing() {
    // 2^16 states of thirty-two lanes: twelve boundaries fit, of 128.
    let code = trellis(17, &[1], 2);
    let fast = Trellis::with_length(&code, 40);
    let weights = Gaussian::new(8).samples(40);
    let mut windows = vec![0; 20];
    fast.encode(&weights, &mut windows, &mut Scratch::default());
    assert_eq!(windows, plain::Plain::with_length(&code, 40).encode(&weights));
}

/// As `code`, its table untrained.
fn untrained(mut code: Code, rounds: u32, samples: u64) -> Code {
    for t in &mut code.tables {
        t.values.clear();
        t.source = TableSource::Trained { file: "t".into(), training: Training { seed: 1, rounds, samples } };
    }
    code
}

fn trained(code: &Code) -> Code {
    let mut code = code.clone();
    let training = train::training(&code).expect("trained(..)");
    let mut errors = vec![];
    let values = train::train(&code, training, None, &mut |_, error| errors.push(error)).expect("a look-up");
    assert_eq!(errors.len(), training.rounds as usize);
    assert!(errors.windows(2).all(|e| e[1] < e[0] * 1.002), "training goes uphill: {errors:?}");
    code.tables.iter_mut().zip(values).for_each(|(t, v)| t.values = v);
    code
}

#[test]
fn training_reaches_the_known_optimum_of_scalar_quantizers() {
    for (bits, optimum) in [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.009497)] {
        let code = trained(&untrained(code(bits, &[bits], 1, Value::I16, 1 << bits, direct()), 40, 1 << 17));
        let d = distortion::measure_code(&code, 1 << 17, 5);
        assert!((d.mean - optimum).abs() < 4.0 * d.standard_error, "{bits} bits: {d:?} against {optimum}");
        assert!(code.tables[0].values.is_sorted(), "scalar tables are in order");
    }
}

#[test]
fn training_makes_trellis_codes_better_than_scalar_ones() {
    // Bars for so small windows and short training; scalar quantizers reach .1175 and .0345 at 2 and 3 bits.
    for (code, bar) in [
        (trellis(8, &[4], 2), 0.098),
        (trellis(10, &[2], 1), 0.084),
        (trellis(10, &[8], 4), 0.095),
        (trellis(10, &[6], 2), 0.025),
        (trellis(16, &[6], 2), 0.0200),
    ] {
        let code = trained(&untrained(code, 5, 1 << 14));
        let d = distortion::measure_code(&code, 1 << 14, 5);
        assert!(d.mean < bar, "{:?}: {} ± {}", code.steps, d.mean, d.standard_error);
    }
}

#[test]
fn training_is_refused_where_the_expression_is_no_look_up() {
    let fixed = trellis(8, &[4], 2);
    let training = Training { seed: 1, rounds: 1, samples: 512 };
    assert!(matches!(train::train(&fixed, training, None, &mut |_, _| ()), Err(train::TrainError::NoTable)));
    let mut sum = untrained(fixed, 1, 512);
    let entry = sum.decode.result();
    sum.decode.push(Op::Vector(VectorOp::Add, entry, entry));
    let e = train::train(&sum, training, None, &mut |_, _| ()).expect_err("refused");
    assert!(e.to_string().starts_with("component 0 of window 0x0 is neither"), "{e}");
}

#[test]
fn distortion_has_an_honest_standard_error() {
    let code = trained(&untrained(trellis(8, &[4], 2), 3, 1 << 13));
    let runs: Vec<_> = (0..16).map(|seed| distortion::measure_code(&code, 1 << 12, seed)).collect();
    let mean = runs.iter().map(|d| d.mean).sum::<f64>() / 16.0;
    let spread = (runs.iter().map(|d| (d.mean - mean).powi(2)).sum::<f64>() / 15.0).sqrt();
    let claimed = runs.iter().map(|d| d.standard_error).sum::<f64>() / 16.0;
    assert!((0.6..1.6).contains(&(spread / claimed)), "spread {spread}, claimed {claimed}");
    let mix = distortion::measure(&quantizer(vec![code.clone(), code.clone()]), 1 << 13, 0);
    assert_eq!(mix.mean, runs[0].mean);
    assert_eq!(mix.samples, 1 << 13);
}

/// A code of each kind that the kernel treats differently.
fn codes_for_kernels() -> Vec<Code> {
    let short = |mut code: Code, rows, cols| {
        code.block = Shape { rows, cols };
        code
    };
    vec![
        short(trellis(8, &[4], 2), 2, 64),
        short(trellis(9, &[3], 1), 2, 64),
        short(trellis(12, &[8], 4), 2, 64),
        short(trellis(8, &[2, 3], 2), 4, 64),
        short(trellis(7, &[7, 3], 2), 4, 64),
        short(trellis(10, &[1], 2), 2, 64),
        short(code(8, &[4], 2, Value::I16, 32, hashed(27, &[19, 18])), 2, 64),
        short(code(8, &[5], 4, Value::I16, 256, direct()), 2, 64),
        short(trellis(14, &[3], 2), 2, 32),
        short(trellis(10, &[4, 3], 2), 4, 128),
        code(6, &[6], 2, Value::I16, 64, direct()),
        code(5, &[5], 1, Value::I8, 32, direct()),
    ]
}

/// Compares the windows of `count` blocks that a kernel made as `plan` says finds on the interpreter with the CPU's.
fn same_windows(plan: Plan, count: usize) {
    let on = Executor::interpreter_with(Options { races: true, reverse: true });
    let (code, cluster) = (plan.code.clone(), plan.cluster);
    let trellis = Trellis::new(&code);
    let mut weights = Gaussian::new(3).samples(count * trellis.block_len());
    weights[7] = 1e30;
    weights[trellis.block_len()..][..trellis.block_len()].fill(0.0);
    let mut expected = vec![0; count * trellis.steps()];
    trellis.encode(&weights, &mut expected, &mut Scratch::default());
    let device = DeviceTrellis::with(&on, plan).expect("a kernel");
    let (windows, _) = device.encode(&weights).unwrap_or_else(|e| panic!("{:?}: {e}", code.steps));
    assert_eq!(windows, expected, "L = {}, steps {:?}, clusters of {cluster}", code.window, code.steps);
}

#[test]
fn the_kernel_finds_the_same_windows() {
    let device = Executor::interpreter().device();
    for code in codes_for_kernels() {
        same_windows(Plan::new(&code, &device).expect("few states"), 9);
    }
}

#[test]
fn shared_memory_changes_nothing() {
    // Tables of metrics and entries in two or four stages, or one of them; tasks as many as threads, or more.
    let (small, large) = (Target::Sm80.device(), Target::Sm90a.device());
    let tight = Device { shared_per_block: 64 << 10, ..small };
    let cases = [
        (trellis(15, &[3], 1), &large),
        (trellis(15, &[3], 2), &small),
        (trellis(15, &[3], 2), &tight),
        (trellis(15, &[1], 2), &large),
        (trellis(15, &[3], 4), &large),
        (trellis(15, &[4, 3], 1), &tight),
        (trellis(16, &[3], 2), &large),
        (code(15, &[3], 2, Value::I16, 1 << 15, direct()), &large),
    ];
    let mut seen = BTreeSet::new();
    for (mut code, device) in cases {
        code.block = Shape { rows: 1, cols: 32 * code.vector };
        let plan = Plan::new(&code, device).expect("few states");
        seen.insert(plan.shared());
        same_windows(plan, 9);
    }
    let shared = |(tables, stages)| Shared { tables, stages };
    let expected = [(0, 2), (0, 4), (1, 2), (1, 4), (2, 0)].map(shared);
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn clusters_find_the_same_windows() {
    // No cache at all: clusters grow as far as they can.
    let device = |cluster| Device { cluster, l2_bytes: 0, ..Target::Sm90a.device() };
    // Of 2^9 and 2^8 states, those of a task 8 and 16.
    let larger = [trellis(12, &[3, 4], 2), trellis(12, &[4], 2)].map(|mut code| {
        code.block = Shape { rows: 2, cols: 64 };
        code
    });
    let mut clusters = BTreeSet::new();
    for code in codes_for_kernels().into_iter().chain(larger) {
        for most in [2, 4, 8] {
            let plan = Plan::new(&code, &device(most)).expect("few states");
            if plan.cluster == most {
                clusters.insert((code.steps.clone(), most));
                same_windows(plan, 9);
            }
        }
    }
    // Lanes share tasks in all but the last.
    for expected in [(vec![2, 3], 2), (vec![4, 3], 4), (vec![3, 4], 8), (vec![4], 8), (vec![3], 8)] {
        assert!(clusters.contains(&expected), "{clusters:?}");
    }
}

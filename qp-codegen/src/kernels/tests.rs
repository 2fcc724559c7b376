//! Every lowering, run by the interpreter against the reference, for codes of every kind.

use super::decode::pack_tables;
use super::dequantize::{self, Dequantize};
use super::embed_packed::{self, EmbedPacked};
use super::experts::{self, Experts};
use super::gemv::{self, Gemv};
use super::prepare::{self, Gate, Prepare, Spread, Stage};
use super::product::{self, Launch, TOTAL_BITS, Way};
use super::{Span, gemm, rotate};
use crate::ir::interpret::{Arg, Options, run};
use crate::ir::{Elem, Kernel};
use crate::layout::{BLOCKS_PER_TILE, Packed, position};
use crate::reference::{self, Activation, Activations, RmsNorm, Rotator};
use crate::spec::expr::{Decode, Node, Op, VectorOp, WordOp};
use crate::spec::{Code, Quantizer, Rotation, ScaleKind, Shape, Table, Value};

mod preparing;

/// A deterministic stream of random words.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn unit(&mut self) -> f32 {
        self.word() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }
}

fn table(name: &str, entries: u32, vector: u32, value: Value, seed: u64) -> Table {
    let mut r = Random(seed);
    let draw = |_| match value {
        Value::I8 => r.word() as i8 as i16,
        Value::I16 => r.word() as i16,
    };
    let values = (0..entries * vector).map(draw).collect();
    Table { name: name.into(), entries, values, source: Default::default() }
}

fn constant(d: &mut Decode, c: u32) -> Node {
    d.push(Op::Const(c))
}

fn binary(d: &mut Decode, op: WordOp, a: Node, c: u32) -> Node {
    let c = constant(d, c);
    d.push(Op::Binary(op, a, c))
}

/// `t[h >> shift] ^ signs(h[..])` with `h = window · odd`.
fn hashed(shift: u32, signs: &[u32]) -> Decode {
    let mut d = Decode::default();
    let w = d.push(Op::Window);
    let h = binary(&mut d, WordOp::Mul, w, 0x9E37_79B1);
    let index = binary(&mut d, WordOp::Shr, h, shift);
    let entry = d.push(Op::Lookup { table: 0, index });
    let bits: Vec<Node> = signs.iter().map(|&i| d.push(Op::Bit(h, i))).collect();
    let signs = d.push(Op::Signs(bits));
    d.push(Op::Vector(VectorOp::Xor, entry, signs));
    d
}

/// `t[window]`.
fn direct() -> Decode {
    let mut d = Decode::default();
    let index = d.push(Op::Window);
    d.push(Op::Lookup { table: 0, index });
    d
}

fn code(window: u32, steps: &[u32], vector: u32, value: Value, entries: u32, decode: Decode) -> Code {
    let tables = if entries > 0 { vec![table("t", entries, vector, value, u64::from(window))] } else { vec![] };
    let block = Shape { rows: 2, cols: 128 };
    let half_offset = value == Value::I8;
    Code { window, steps: steps.to_vec(), vector, block, value, half_offset, unit: 0.031, tables, decode }
}

/// One of each kind: V, entry type, step patterns, blocks, mixes, no table, sums of look-ups.
fn quantizers() -> Vec<Quantizer> {
    let mut out = Vec::new();
    let mut add = |name: &str, codes: Vec<Code>| {
        let rotation = Rotation::Hadamard { seed: 3, block: None, interleave: None };
        out.push(Quantizer { name: name.into(), codes, scale: ScaleKind::Row, rotation });
    };
    for kv in 3..=10 {
        add(&format!("v2_k{kv}"), vec![code(16, &[kv], 2, Value::I8, 512, hashed(23, &[22, 21]))]);
    }
    add("v4_k8", vec![code(16, &[8], 4, Value::I8, 1024, hashed(6, &[23, 31, 7, 15]))]);
    add("v4_k6_top", vec![code(20, &[6], 4, Value::I8, 1024, hashed(22, &[21, 20, 19, 18]))]);
    add("v1_k3", vec![code(12, &[3], 1, Value::I8, 256, hashed(24, &[23]))]);
    add("v1_k4_i16", vec![code(16, &[4], 1, Value::I16, 256, hashed(24, &[5]))]);
    add("v2_k5_i16", vec![code(16, &[5], 2, Value::I16, 512, hashed(23, &[31, 9]))]);
    add("v4_k8_i16", vec![code(16, &[8], 4, Value::I16, 256, hashed(24, &[1, 2, 3, 31]))]);
    for bits in 2..=8 {
        add(&format!("nuq{bits}"), vec![code(bits, &[bits], 1, Value::I16, 1 << bits, direct())]);
    }
    add("vq2_k11", vec![code(11, &[11], 2, Value::I16, 2048, direct())]);
    let mut pattern = code(18, &[4, 5], 2, Value::I8, 512, hashed(23, &[22, 21]));
    pattern.block = Shape { rows: 4, cols: 128 };
    add("pattern", vec![pattern]);
    let mut square = code(16, &[6], 2, Value::I8, 512, hashed(23, &[22, 21]));
    square.block = Shape { rows: 8, cols: 32 };
    add("square", vec![square]);
    let k = |kv| code(16, &[kv], 2, Value::I8, 512, hashed(23, &[22, 21]));
    add("mix2", vec![k(4), k(5)]);
    add("mix3", vec![k(3), k(4), k(6)]);

    // Computed: no table, bytes of a product summed, and all word operations.
    let mut d = Decode::default();
    let w = d.push(Op::Window);
    let h = binary(&mut d, WordOp::Mul, w, 0x83DC_D12D);
    let n = d.push(Op::Not(h));
    let shifted = binary(&mut d, WordOp::Shl, n, 3);
    let by = binary(&mut d, WordOp::And, h, 63);
    let variable = d.push(Op::Binary(WordOp::Shr, n, by));
    let mixed = d.push(Op::Binary(WordOp::Xor, shifted, variable));
    let sum = d.push(Op::ByteSum(mixed));
    let byte = d.push(Op::Byte(h, 2));
    let sum = d.push(Op::Binary(WordOp::Add, sum, byte));
    let value = binary(&mut d, WordOp::Sub, sum, 638);
    let value = binary(&mut d, WordOp::Or, value, 1);
    d.push(Op::Pack(vec![value]));
    add("computed", vec![code(16, &[4], 1, Value::I16, 0, d)]);

    for value in [Value::I8, Value::I16] {
        let mut d = Decode::default();
        let w = d.push(Op::Window);
        let a = d.push(Op::Lookup { table: 0, index: w });
        let high = binary(&mut d, WordOp::Shr, w, 6);
        let c = d.push(Op::Lookup { table: 0, index: high });
        d.push(Op::Vector(VectorOp::Add, a, c));
        add(&format!("sum_{value:?}"), vec![code(12, &[4], 2, value, 64, d)]);
    }
    out
}

/// One of [`quantizers`].
fn named<'q>(all: &'q [Quantizer], name: &str) -> &'q Quantizer {
    all.iter().find(|q| q.name == name).expect("a quantizer")
}

struct Matrix {
    layout: Packed,
    words: Vec<u32>,
    /// bfloat16 bits, one a padded row.
    scales: Vec<u16>,
}

impl Matrix {
    /// Random bits decode to something under every code.
    fn random(q: &Quantizer, shape: Shape) -> Matrix {
        let layout = Packed::new(q, shape);
        let mut r = Random(7);
        let words = (0..layout.words()).map(|_| r.word()).collect();
        let scales = (0..layout.padded_rows()).map(|_| ((r.unit().abs() + 0.5).to_bits() >> 16) as u16).collect();
        Matrix { layout, words, scales }
    }

    fn scale(&self, row: usize) -> f32 {
        f32::from_bits(u32::from(self.scales[row]) << 16)
    }

    /// Entries of the matrix without padding, by the definition of the layout.
    fn entries(&self, q: &Quantizer) -> Vec<i16> {
        let l = &self.layout;
        let mut out = vec![0; l.shape.len() as usize];
        let mut stream = Vec::new();
        for rt in 0..l.row_tiles() {
            for ct in 0..l.col_tiles() {
                let code = &q.codes[l.code_of(ct)];
                let v = code.vector;
                let mut e = vec![0; v as usize];
                for g in 0..BLOCKS_PER_TILE {
                    l.read_block(&self.words, rt, ct, g, &mut stream);
                    for p in 0..code.weights() {
                        if p % v == 0 {
                            code.entry(code.window_at(&stream, p / v), &mut e);
                        }
                        let (r, c) = position(code.block, g, p);
                        let (r, c) = (rt * l.tile.rows + r, ct * l.tile.cols + c);
                        if r < l.shape.rows && c < l.shape.cols {
                            out[(r * l.shape.cols + c) as usize] = e[(p % v) as usize];
                        }
                    }
                }
            }
        }
        out
    }
}

fn bytes<T: Copy, const N: usize>(v: &[T], f: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    v.iter().flat_map(|&x| f(x)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().expect("four bytes"))).collect()
}

fn launch(kernel: &Kernel, mut args: Vec<Arg>) {
    if let Err(trap) = run(kernel, &mut args, &Options::default()) {
        panic!("{trap}");
    }
}

#[test]
fn dequantize_equals_the_reference() {
    for q in quantizers() {
        for shape in [Shape { rows: 32, cols: 512 }, Shape { rows: 23, cols: 130 }] {
            let m = Matrix::random(&q, shape);
            let tables = bytes(&pack_tables(&q), u32::to_le_bytes);
            let words = bytes(&m.words, u32::to_le_bytes);
            let scales = bytes(&m.scales, u16::to_le_bytes);
            let decoded = |output: Elem| {
                let kernel = dequantize::lower(&Dequantize { quantizer: &q, shape, output }, 2);
                let mut y = vec![0xff; shape.len() as usize * output.bytes() as usize];
                let mut args: Vec<Arg> = [&tables, &words, &scales].map(|b| Arg::ReadOnly(b)).into();
                args.push(Arg::Buffer(&mut y));
                launch(&kernel, args);
                y
            };
            let expect: Vec<f32> = m
                .entries(&q)
                .iter()
                .enumerate()
                .map(|(i, &e)| {
                    let (row, col) = (i as u32 / shape.cols, i as u32 % shape.cols);
                    let code = &q.codes[m.layout.code_of(col / m.layout.tile.cols)];
                    reference::weight(code, e, m.scale(row as usize))
                })
                .collect();
            assert_eq!(floats(&decoded(Elem::F32)), expect, "{} {shape:?}", q.name);
            let halves = bytes(&expect, |v| half::f16::from_f32(v).to_le_bytes());
            assert_eq!(decoded(Elem::F16), halves, "{} {shape:?}", q.name);
        }
    }
}

#[test]
fn embed_packed_equals_the_reference() {
    let all = quantizers();
    let named = |name: &str, rotation| {
        let q = named(&all, name);
        Quantizer { rotation, ..q.clone() }
    };
    let rotations = [Rotation::None, Rotation::Hadamard { seed: 5, block: None, interleave: None }];
    let blocks = |block| Rotation::Hadamard { seed: 5, block: Some(block), interleave: None };
    let interleaved = |block, span| Rotation::Hadamard { seed: 5, block: Some(block), interleave: Some(span) };
    for (name, cols, rotation) in [
        ("v2_k5", 256, rotations[1]),
        ("v4_k8_i16", 576, rotations[1]),
        ("square", 130, rotations[0]),
        ("mix2", 768, rotations[1]),
        ("mix3", 4864, rotations[1]),
        ("mix3", 18944, rotations[1]),
        ("nuq3", 6, rotations[1]),
        ("v2_k5", 300, blocks(128)),
        ("square", 130, blocks(4)),
        ("mix2", 1280, blocks(512)),
        ("v2_k5", 576, interleaved(128, 1024)),
        ("mix2", 1280, interleaved(128, 1024)),
        ("nuq3", 333, interleaved(16, 64)),
        ("v4_k8_i16", 2208, interleaved(64, 256)),
    ] {
        let (q, shape) = (named(name, rotation), Shape { rows: 70, cols });
        let m = Matrix::random(&q, shape);
        let tokens = [69i32, 0, 17, 17];
        let y = Span { first: 3, stride: cols + 5 };
        let op = EmbedPacked { quantizer: &q, shape, batch: 4, y };
        let entries = m.entries(&q);
        let mut expect = vec![0.5f32; (3 + 4 * y.stride) as usize];
        for (t, token) in tokens.iter().map(|t| *t as usize).enumerate() {
            let at = (y.first + t as u32 * y.stride) as usize;
            let row = &mut expect[at..at + cols as usize];
            for (c, (v, e)) in row.iter_mut().zip(&entries[token * cols as usize..]).enumerate() {
                let code = &q.codes[m.layout.code_of(c as u32 / m.layout.tile.cols)];
                *v = reference::weight(code, *e, m.scale(token));
            }
            Rotator::inverse(rotation, cols).apply(row);
        }
        let mut out = bytes(&vec![0.5f32; expect.len()], f32::to_le_bytes);
        let inputs = [
            bytes(&pack_tables(&q), u32::to_le_bytes),
            bytes(&m.words, u32::to_le_bytes),
            bytes(&m.scales, u16::to_le_bytes),
            bytes(&tokens, i32::to_le_bytes),
            bytes(&rotate::flips(rotation, cols), u32::to_le_bytes),
            bytes(&rotate::inverse_base(rotation, cols), u32::to_le_bytes),
        ];
        let mut args: Vec<Arg> = inputs.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.push(Arg::Buffer(&mut out));
        launch(&embed_packed::lower(&op), args);
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&floats(&out)), bits(&expect), "{name}, {cols} columns");
    }
}

fn activations(columns: u32, tokens: u32) -> Vec<Activations> {
    let mut r = Random(11);
    (0..tokens).map(|_| reference::quantize_activations(&(0..columns).map(|_| r.unit()).collect::<Vec<_>>())).collect()
}

/// `x`, `x_scale`, `x_sum` as the kernels take them.
fn inputs(a: &[Activations]) -> [Vec<u8>; 3] {
    let scale = a.iter().flat_map(|a| a.scale.to_le_bytes()).collect();
    let sum = a.iter().flat_map(|a| (a.sum as i32).to_le_bytes()).collect();
    [reference::activation_cells(a).iter().map(|x| *x as u8).collect(), scale, sum]
}

fn check_product(q: &Quantizer, shape: Shape, batch: u32, launches: &[Launch]) {
    let m = Matrix::random(q, shape);
    let entries = m.entries(q);
    let a = activations(shape.cols, batch);
    let rows = m.layout.padded_rows() as usize;
    let mut expect = vec![0.5f32; rows * batch as usize];
    let mut totals = vec![0i64; rows * batch as usize];
    for (token, a) in a.iter().enumerate() {
        let factor = reference::output_factor(&q.codes[0], a.scale);
        for row in 0..shape.rows as usize {
            let w = &entries[row * shape.cols as usize..][..shape.cols as usize];
            let acc = w.iter().zip(&a.q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum();
            expect[token * rows + row] += reference::scale_output(&q.codes[0], acc, a.sum, m.scale(row), factor);
            totals[token * rows + row] = reference::total(&q.codes[0], acc, a.sum);
        }
    }
    let op = Gemv { quantizer: q, shape, batch, accumulate: true };
    let added = launches.iter().map(|l| (l, false));
    // All launches write by one function, so that one of them will do.
    for (l, as_totals) in added.chain(launches.first().map(|l| (l, true))) {
        let kernel = if as_totals { l.lower_totals(&Gemv { accumulate: false, ..op }) } else { l.lower(&op) };
        let tables = bytes(&pack_tables(q), u32::to_le_bytes);
        let words = bytes(&m.words, u32::to_le_bytes);
        let scales = bytes(&m.scales, u16::to_le_bytes);
        let [x, x_scale, x_sum] = inputs(&a);
        let mut y = bytes(&vec![0.5f32; rows * batch as usize], f32::to_le_bytes);
        y.resize(y.len() << u32::from(as_totals), 0);
        let meeting_place = l.meeting_place(&op);
        let (mut partial, mut arrived) = (vec![0u8; meeting_place.0 * 4], vec![0u8; meeting_place.1 * 4]);
        let mut args: Vec<Arg> = [&tables, &words, &scales, &x, &x_scale, &x_sum].map(|b| Arg::ReadOnly(b)).into();
        args.extend([&mut y, &mut partial, &mut arrived].map(|b| Arg::Buffer(b)));
        launch(&kernel, args);
        let numbers: Vec<i64> = y.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect();
        let y = floats(&y);
        for token in 0..batch as usize {
            let real = token * rows..token * rows + shape.rows as usize;
            if as_totals {
                let numbers = &numbers[2 * real.start..2 * real.end];
                let joined = numbers.as_chunks::<2>().0.iter().map(|[high, low]| (high << TOTAL_BITS) + low);
                assert_eq!(joined.collect::<Vec<_>>(), totals[real], "{} {shape:?} batch {batch} {l:?}", q.name);
                assert!(numbers.iter().skip(1).step_by(2).all(|low| (0..1 << TOTAL_BITS).contains(low)));
                continue;
            }
            assert_eq!(y[real.clone()], expect[real], "{} {shape:?} batch {batch} token {token} {l:?}", q.name);
        }
        assert!(partial.iter().chain(&arrived).all(|&b| b == 0), "the meeting place is left clean");
    }
}

#[test]
fn gemv_is_exact_for_every_code() {
    for q in quantizers() {
        let shape = Shape { rows: 48, cols: 1024 };
        let op = Gemv { quantizer: &q, shape, batch: 1, accumulate: true };
        check_product(&q, shape, 1, &[Launch::choose(&op, &crate::cuda::Target::Sm90a.device())]);
    }
}

#[test]
fn gemv_is_exact_for_every_shape_batch_and_launch() {
    let q = &quantizers();
    let named = |name| named(q, name);
    let launch = |warps, split, blocks, ahead| {
        Launch::Gemv(gemv::Launch { warps, split, blocks, ahead, min_blocks: 1, table_bytes: 32 << 10 })
    };
    for name in ["v4_k8", "v2_k5_i16", "square", "mix2"] {
        for (rows, cols) in [(16, 128), (70, 300), (33, 2560)] {
            let shape = Shape { rows, cols };
            for batch in [1, 3, 4, 5, 8] {
                let tiles = Packed::new(named(name), shape).row_tiles();
                let launches = [
                    launch(1, 1, 1, 1),
                    launch(4, 1, tiles, 2),
                    launch(3, 2, 1, 2),
                    launch(2, 3, tiles, 3),
                    // Ten warps of 70 rows have no room for sums of their own.
                    launch(10, 1, 1, 2),
                    launch(10, 2, 1, 2),
                ];
                check_product(named(name), shape, batch, &launches);
            }
        }
    }
}

/// Shared memory of a block on the largest target.
const MAX_SHARED: u32 = 227 << 10;

#[test]
fn gemm_is_exact_for_every_code() {
    for q in quantizers() {
        for (shape, batch) in [(Shape { rows: 40, cols: 600 }, 11), (Shape { rows: 24, cols: 300 }, 64)] {
            let op = Gemv { quantizer: &q, shape, batch, accumulate: true };
            let ranked = Launch::ranked(&op, &crate::cuda::Target::Sm90a.device());
            let groups = ranked.iter().find(|r| r.1.way() == Way::Groups).expect("for every code and batch").1;
            check_product(&q, shape, batch, &[Launch::choose(&op, &crate::cuda::Target::Sm86.device()), groups]);
        }
    }
}

/// A launch of one block that takes the least of everything.
fn small(group: bool, row_warps: u32) -> gemm::Launch {
    gemm::Launch {
        group,
        row_warps,
        col_warps: 1,
        row_tiles: 1,
        chunk: 1,
        token_parts: 1,
        split: 1,
        blocks: 1,
        min_blocks: 1,
        table_bytes: 32 << 10,
    }
}

#[test]
fn gemm_is_exact_for_every_shape_batch_and_launch() {
    let q = &quantizers();
    let named = |name| named(q, name);
    let base = small(false, 2);
    for name in ["v4_k8", "v2_k5_i16", "square", "mix2"] {
        for (rows, cols) in [(16, 128), (70, 300), (100, 1100)] {
            let shape = Shape { rows, cols };
            let tiles = Packed::new(named(name), shape).row_tiles();
            for batch in [2u32, 9, 33, 64, 150] {
                let launches = [
                    // Several rounds of one block; warps and second row tiles without rows.
                    gemm::Launch { row_tiles: 2, chunk: if batch < 64 { 2 } else { 1 }, ..base },
                    gemm::Launch { row_warps: 1, col_warps: 3, blocks: tiles, token_parts: batch.div_ceil(64), ..base },
                    gemm::Launch { row_warps: 2, col_warps: 2, token_parts: 3.min(batch), chunk: 2, ..base },
                    gemm::Launch { row_warps: tiles, split: 2, token_parts: 2, ..base },
                    gemm::Launch { row_tiles: 2, col_warps: 2, split: 3, blocks: tiles.div_ceil(2), ..base },
                ];
                let op = Gemv { quantizer: named(name), shape, batch, accumulate: true };
                let launches: Vec<Launch> = launches.map(Launch::Gemm).into();
                let fit = launches.into_iter().filter(|l| l.lower(&op).shared_bytes() <= MAX_SHARED);
                check_product(named(name), shape, batch, &fit.collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn gemm_in_groups_of_warps_is_exact_for_every_shape_batch_and_launch() {
    let q = &quantizers();
    let named = |name| named(q, name);
    let base = small(true, 4);
    for name in ["v4_k8", "v2_k5_i16", "square", "mix2"] {
        for (rows, cols) in [(70, 300), (100, 1100)] {
            let shape = Shape { rows, cols };
            let tiles = Packed::new(named(name), shape).row_tiles();
            for batch in [5u32, 9, 16, 20, 33, 64, 130, 256] {
                let launches = [
                    // Several rounds of one block; warps and second row tiles without rows.
                    gemm::Launch { row_tiles: 2, ..base },
                    gemm::Launch { row_warps: 8, chunk: 2, blocks: tiles.min(2), ..base },
                    gemm::Launch { col_warps: 2, chunk: 2, token_parts: 2, ..base },
                    gemm::Launch { row_warps: tiles.next_multiple_of(4), split: 2, token_parts: 3, ..base },
                ];
                let op = Gemv { quantizer: named(name), shape, batch, accumulate: true };
                let launches: Vec<Launch> = launches.map(Launch::Gemm).into();
                let part = |l: &Launch| matches!(l, Launch::Gemm(l) if batch.div_ceil(l.token_parts) <= gemm::MAX_PART);
                let fit = launches.into_iter().filter(|l| part(l) && l.lower(&op).shared_bytes() <= MAX_SHARED);
                check_product(named(name), shape, batch, &fit.collect::<Vec<_>>());
            }
        }
    }
}

/// Pairs of `rows` tokens with `chosen` experts each, in units that list them backwards.
fn in_units(experts: &Experts, expert_of: &[i32]) -> (Vec<i32>, Vec<i32>) {
    let (mut units, mut pairs) = (Vec::new(), Vec::new());
    for expert in 0..experts.count as i32 {
        let own: Vec<i32> = (0..experts.pairs as i32).rev().filter(|p| expert_of[*p as usize] == expert).collect();
        for some in own.chunks(experts.most as usize) {
            units.extend([expert, pairs.len() as i32, some.len() as i32, 0]);
            pairs.extend(some);
        }
    }
    units.resize(4 * experts.units() as usize, 0);
    (units, pairs)
}

/// Products of experts, of which the launch has the first `experts.matrices`, against those of each pair alone.
fn check_experts(q: &Quantizer, shape: Shape, experts: Experts, expert_of: &[i32], launches: &[Launch]) {
    let rows = Packed::new(q, shape).padded_rows();
    let m = Matrix::random(q, Shape { rows: rows * experts.matrices, cols: shape.cols });
    let entries = m.entries(q);
    let a = activations(shape.cols, experts.rows);
    let (stride, sharing) = (experts.stride as usize, (experts.pairs / experts.rows) as usize);
    let mut expect = vec![0.5f32; stride * expert_of.len()];
    let has = |expert: i32| (expert as u32) < experts.matrices;
    for (pair, &expert) in expert_of.iter().enumerate().filter(|(_, e)| has(**e)) {
        let a = &a[pair / sharing];
        let factor = reference::output_factor(&q.codes[0], a.scale);
        for row in 0..shape.rows as usize {
            let stored = expert as usize * rows as usize + row;
            let w = &entries[stored * shape.cols as usize..][..shape.cols as usize];
            let acc = w.iter().zip(&a.q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum();
            expect[pair * stride + row] = reference::scale_output(&q.codes[0], acc, a.sum, m.scale(stored), factor);
        }
    }
    let op = Gemv { quantizer: q, shape, batch: experts.most, accumulate: false };
    let (units, pairs) = in_units(&experts, expert_of);
    let units = if experts.most == 1 { expert_of.to_vec() } else { units };
    let places: Vec<i32> = (0..experts.count as i32).map(|e| if has(e) { e } else { -1 }).collect();
    let lists = [&units, &pairs, &places].map(|list| bytes(list, i32::to_le_bytes));
    for l in launches {
        let kernel = l.lower_for_experts(&op, &experts);
        crate::ir::validate(&kernel).unwrap_or_else(|problems| panic!("{problems}"));
        let tables = bytes(&pack_tables(q), u32::to_le_bytes);
        let words = bytes(&m.words, u32::to_le_bytes);
        let scales = bytes(&m.scales, u16::to_le_bytes);
        let [x, x_scale, x_sum] = inputs(&a);
        let mut y = bytes(&vec![0.5f32; expect.len()], f32::to_le_bytes);
        let (mut partial, mut arrived) = ([0u8; 4], [0u8; 4]);
        let mut args: Vec<Arg> = [&tables, &words, &scales, &x, &x_scale, &x_sum].map(|b| Arg::ReadOnly(b)).into();
        args.push(Arg::Buffer(&mut y));
        args.extend([&mut partial, &mut arrived].map(|b| Arg::Buffer(b)));
        args.extend(lists.iter().map(|b| Arg::ReadOnly(b)));
        launch(&kernel, args);
        for (pair, (y, expect)) in floats(&y).chunks(stride).zip(expect.chunks(stride)).enumerate() {
            let real = 0..shape.rows as usize;
            assert_eq!(y[real.clone()], expect[real], "{} {experts:?} pair {pair} {l:?}", q.name);
        }
    }
}

#[test]
fn products_of_experts_are_those_of_each_pair_alone() {
    let all = quantizers();
    let gemv = |warps, blocks, ahead| {
        Launch::Gemv(gemv::Launch { warps, split: 1, blocks, ahead, min_blocks: 1, table_bytes: 32 << 10 })
    };
    for name in ["v4_k8", "v2_k5_i16", "square", "mix2"] {
        let q = named(&all, name);
        for (rows, cols) in [(40, 300), (100, 1100)] {
            let shape = Shape { rows, cols };
            let tiles = Packed::new(q, shape).row_tiles();
            let stride = Packed::new(q, shape).padded_rows() + 8;
            // One token; several that share inputs; pairs with inputs of their own; experts without pairs, and one of all.
            for (tokens, chosen, count, matrices, most) in
                [(1, 3, 5, 5, 1), (6, 2, 4, 4, 4), (6, 2, 4, 3, 8), (11, 1, 3, 3, 32), (5, 1, 9, 9, 4)]
            {
                let pairs = tokens * chosen;
                let lonely = |p: u32| if tokens == 5 { 2 } else { (p * 7 + p / 3) % count };
                let expert_of: Vec<i32> = (0..pairs).map(|p| lonely(p) as i32).collect();
                let mut launches = vec![Launch::Walk(super::walk::Launch { warps: 3, table_bytes: 16 << 10 })];
                if most <= gemv::MAX_BATCH {
                    launches.extend([gemv(1, 1, 1), gemv(4, tiles, 2), gemv(10, 1, 2)]);
                }
                if most > 1 {
                    let (few, groups) = (small(false, 2), small(true, 4));
                    launches.extend([
                        Launch::Gemm(gemm::Launch { row_tiles: 2, ..few }),
                        Launch::Gemm(gemm::Launch { col_warps: 2, blocks: tiles, token_parts: 2, ..few }),
                        Launch::Gemm(gemm::Launch { chunk: 2, ..groups }),
                        Launch::Gemm(gemm::Launch { col_warps: 2, token_parts: 2, ..groups }),
                    ]);
                }
                let experts = Experts { count, matrices, rows: tokens, pairs, most, stride };
                check_experts(q, shape, experts, &expert_of, &launches);
                check_experts(q, shape, Experts { rows: pairs, ..experts }, &expert_of, &launches[..2]);
            }
        }
    }
}

#[test]
fn products_of_experts_have_a_launch_on_every_device() {
    for q in quantizers() {
        let wide = Shape { rows: 4096, cols: 28_672 };
        for (tokens, shape) in [(1, wide), (2, wide), (64, Shape { rows: 1536, cols: 2048 }), (2048, wide)] {
            let most = experts::most_pairs(tokens, 8, 128);
            let e = Experts { count: 128, matrices: 16, rows: tokens, pairs: 8 * tokens, most, stride: shape.rows };
            let op = Gemv { quantizer: &q, shape, batch: most, accumulate: false };
            for target in crate::cuda::Target::ALL {
                let launch = Launch::ranked_for_experts(&op, &e, &target.device())[0];
                let kernel = launch.lower_for_experts(&op, &e);
                crate::cuda::check(&kernel, target)
                    .unwrap_or_else(|problems| panic!("{} {target}: {problems}", q.name));
            }
        }
    }
}

#[test]
fn prepare_equals_the_reference() {
    let whole = Rotation::Hadamard { seed: 5, block: None, interleave: None };
    let blocks = |block| Rotation::Hadamard { seed: 5, block: Some(block), interleave: None };
    let interleaved = |block, span| Rotation::Hadamard { seed: 5, block: Some(block), interleave: Some(span) };
    let norm = |eps, add_one| Some(RmsNorm { eps, add_one });
    let (silu, gelu) = (Some(Activation::Silu), Some(Activation::GeluTanh));
    for (columns, rotation, norm, gate) in [
        (256, whole, None, None),
        (256, Rotation::None, norm(1e-5, false), None),
        (768, whole, norm(1e-5, true), None),
        (576, whole, norm(1e-5, false), None),
        (576, blocks(128), norm(1e-5, false), silu),
        (1536, blocks(128), norm(1e-5, true), None),
        (1536, blocks(512), None, gelu),
        (4096, whole, norm(1e-6, false), None),
        (4096, blocks(128), norm(1e-6, false), None),
        (4096, blocks(256), norm(1e-6, false), None),
        (4096, blocks(1024), None, None),
        (6144, blocks(2048), norm(1e-6, false), None),
        (4864, whole, None, None),
        (4864, blocks(128), None, silu),
        (8192, blocks(128), norm(1e-5, false), None),
        (8192, whole, norm(1e-5, false), None),
        (11008, blocks(128), None, silu),
        (14336, blocks(128), None, silu),
        (14336, whole, None, silu),
        (18944, blocks(256), None, silu),
        (12288, blocks(128), norm(1e-5, false), None),
        (40960, blocks(128), norm(1e-5, false), silu),
        (100, blocks(128), norm(1e-5, false), None),
        (172, blocks(64), None, gelu),
        (300, blocks(4), norm(0.1, false), None),
        (201, blocks(16), norm(0.1, false), None),
        (200, whole, None, None),
        (6, whole, norm(0.1, false), None),
        (2, whole, None, None),
        (2, blocks(128), None, None),
        (1, blocks(128), None, silu),
        (7, blocks(2), norm(0.1, true), silu),
        (7, Rotation::None, norm(0.1, false), None),
        (4096, interleaved(128, 1024), norm(1e-5, false), None),
        (14336, interleaved(128, 1024), None, silu),
        (11008, interleaved(128, 4096), None, silu),
        (576, interleaved(128, 1024), norm(1e-5, false), None),
        (1536, interleaved(512, 1024), norm(1e-5, false), None),
        (333, interleaved(16, 64), None, None),
        (2208, interleaved(64, 256), norm(1e-5, false), silu),
    ] {
        for batch in if columns > 10000 { 1..=2 } else { 1..=3 } {
            check_prepare(columns, batch, rotation, norm, gate);
        }
    }
    // So many tokens that clusters would not pay.
    check_prepare(300, 130, blocks(128), None, None);
    check_prepare(5000, 140, blocks(128), None, None);
}

/// Compares the kernels of GPUs with clusters and without with the reference.
fn check_prepare(columns: u32, batch: u32, rotation: Rotation, norm: Option<RmsNorm>, gate: Option<Activation>) {
    let what = format!("{batch} of {columns}, {rotation:?} {norm:?} {gate:?}");
    // Rows whose fours are aligned, and others.
    let input_span = Span { first: 4 * (batch % 2), stride: columns.next_multiple_of(4) + 8 + (batch + 1) % 2 };
    let up = Span { first: 1, stride: columns + 3 };
    let mut r = Random(u64::from(columns + batch));
    let mut random = |n: u32, size: f32| (0..n).map(|_| r.unit() * size).collect::<Vec<f32>>();
    let input = random(input_span.first + batch * input_span.stride, 20.0);
    let ups = random(up.first + batch * up.stride, 1.0);
    let weight = random(columns, 1.0);
    let rotator = Rotator::new(rotation, columns);
    let rotated: Vec<Vec<f32>> = (0..batch)
        .map(|t| {
            let of = |values: &[f32], span: Span| {
                values[(span.first + t * span.stride) as usize..][..columns as usize].to_vec()
            };
            let mut x = of(&input, input_span);
            if let Some(activation) = gate {
                x.iter_mut().zip(of(&ups, up)).for_each(|(x, up)| *x = activation.apply(*x) * up);
            }
            let mut x = norm.map_or(x.clone(), |norm| norm.apply(&x, &weight));
            rotator.apply(&mut x);
            x
        })
        .collect();
    let tokens: Vec<Activations> = rotated.iter().map(|x| reference::quantize_activations(x)).collect();
    let expect = inputs(&tokens);

    let given = [
        bytes(&input, f32::to_le_bytes),
        bytes(&ups, f32::to_le_bytes),
        bytes(&weight, f32::to_le_bytes),
        bytes(&rotate::flips(rotation, columns), u32::to_le_bytes),
        bytes(&rotate::base(rotation, columns), u32::to_le_bytes),
    ];
    let gate = gate.map(|activation| Gate { activation, up });
    let op = Prepare { columns, batch, input: input_span, gate, norm, rotation, entering: None };
    let chosen = [crate::cuda::Target::Sm80, crate::cuda::Target::Sm90a].map(|t| Spread::choose(&op, &t.device()));
    let all = Spread::all(&op, &crate::cuda::Target::Sm90a.device());
    assert!(all.contains(&chosen[1]), "{what}");
    for spread in if batch == 1 { all } else { chosen.into() } {
        let mut scratch = vec![0xee; 4 * op.scratch(spread)];
        let mut out = expect.each_ref().map(|e| vec![0xee; e.len()]);
        let mut faults = vec![0; 12];
        let mut args: Vec<Arg> = given.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.push(Arg::Buffer(&mut scratch));
        args.extend(out.iter_mut().map(|o| Arg::Buffer(o)));
        args.extend([Arg::Buffer(&mut faults), Arg::I32(1)]);
        launch(&prepare::lower_as(&op, spread), args);
        assert!(out == expect, "{what}, {spread:?}");
        assert_eq!(faults, [0; 12], "{what}");
    }

    // In two stages: the first token by a larger magnitude than its own, the others by a smaller one, which changes nothing.
    let magnitudes: Vec<f32> = rotated.iter().map(|x| reference::largest_magnitude(x)).collect();
    let others: Vec<f32> = (0..).zip(&magnitudes).map(|(t, m)| if t == 0 { 1.5 * m } else { 0.5 * m }).collect();
    let by = |(x, &given): (&Vec<f32>, &f32)| reference::quantize_activations_by(x, given);
    let rounded: Vec<Activations> = rotated.iter().zip(&others).map(by).collect();
    for (stage, expect) in [(Stage::Largest, bytes(&magnitudes, f32::to_le_bytes)), (Stage::Given, Vec::new())] {
        let all = inputs(&rounded);
        let mut scratch = vec![0xee; 4 * op.scratch(chosen[1])];
        let mut out = all.each_ref().map(|e| vec![0xee; e.len()]);
        let mut faults = vec![0; 12];
        let others = bytes(&others, f32::to_le_bytes);
        let mut args: Vec<Arg> = given.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.push(Arg::Buffer(&mut scratch));
        args.extend(out.iter_mut().map(|o| Arg::Buffer(o)));
        args.extend([Arg::Buffer(&mut faults), Arg::I32(1)]);
        if stage == Stage::Given {
            args.push(Arg::ReadOnly(&others));
        }
        launch(&prepare::lower_stage(&op, chosen[1], Elem::F32, stage), args);
        if stage == Stage::Given { assert!(out == all, "{what}") } else { assert_eq!(out[1], expect, "{what}") }
    }
}

#[test]
fn preparing_notices_what_is_not_finite() {
    let columns = 300u32;
    let rotation = Rotation::Hadamard { seed: 5, block: Some(128), interleave: None };
    for (bad, gate) in [(f32::NAN, false), (-f32::NAN, true), (f32::INFINITY, false), (f32::NEG_INFINITY, false)] {
        let mut x = vec![1f32; 2 * columns as usize];
        x[columns as usize + 290] = bad;
        let span = Span::rows(columns);
        let gate = gate.then_some(Gate { activation: Activation::Silu, up: span });
        let op = Prepare { columns, batch: 2, input: span, gate, norm: None, rotation, entering: None };
        let spread = Spread::choose(&op, &crate::cuda::Target::Sm90a.device());
        let input = bytes(&x, f32::to_le_bytes);
        let flips = bytes(&rotate::flips(rotation, columns), u32::to_le_bytes);
        let mut scratch = vec![0; 4 * op.scratch(spread)];
        let (mut planes, mut scale, mut sum) = (vec![0xee; 4 * 512], vec![0; 8], vec![0; 8]);
        let mut faults = vec![0; 12];
        let mut args: Vec<Arg> = [&input, &input, &input, &flips, &flips].map(|b| Arg::ReadOnly(b)).into();
        args.extend([&mut scratch, &mut planes, &mut scale, &mut sum, &mut faults].map(|b| Arg::Buffer(b)));
        args.push(Arg::I32(1));
        launch(&prepare::lower_as(&op, spread), args);
        assert_eq!(faults, bytes(&[0, 1, 0], i32::to_le_bytes), "{bad}");
        let scales = floats(&scale);
        assert!(scales[0].is_finite() && scales[1] == f32::INFINITY, "{bad}: {scales:?}");
        assert_eq!(sum[4..], [0; 4], "{bad}");
    }
}

#[test]
fn many_columns_are_prepared_by_clusters() {
    let of = |columns, batch| {
        let rotation = Rotation::Hadamard { seed: 0, block: Some(128), interleave: None };
        let input = Span::rows(columns);
        let op = Prepare { columns, batch, input, gate: None, norm: None, rotation, entering: None };
        prepare::lower(&op, &crate::cuda::Target::Sm90a.device()).cluster
    };
    assert_eq!([of(4096, 1), of(14336, 1), of(14336, 8), of(14336, 32), of(14336, 64)], [1, 8, 8, 2, 1]);
}

#[test]
fn launches_are_ranked_once_each() {
    let q = crate::palette::get("fast_2").expect("of the palette");
    for (rows, cols) in [(28672, 4096), (24, 300)] {
        let op = Gemv { quantizer: &q, shape: Shape { rows, cols }, batch: 1, accumulate: false };
        let ranked = Launch::ranked(&op, &crate::cuda::Target::Sm90a.device());
        let different: std::collections::HashSet<_> = ranked.iter().map(|r| r.1).collect();
        assert_eq!(different.len(), ranked.len(), "{rows} x {cols}");
        assert!(ranked.is_sorted_by_key(|r| r.0));
    }
}

#[test]
fn only_hopper_multiplies_in_groups_of_warps() {
    let q = crate::palette::get("fast_3").expect("of the palette");
    for target in crate::cuda::Target::ALL {
        for batch in [4, 8, 16, 64] {
            let op = Gemv { quantizer: &q, shape: Shape { rows: 28672, cols: 4096 }, batch, accumulate: false };
            let ranked = Launch::ranked(&op, &target.device());
            let any = ranked.iter().any(|r| r.1.way() == Way::Groups);
            assert_eq!(any, target.has_wgmma() && batch > 4, "{target}, {batch} tokens");
            if batch >= 16 {
                assert_eq!(ranked[0].1.way() == Way::Groups, target.has_wgmma(), "{target}, {batch} tokens");
            }
        }
    }
}

//! Products whose blocks prepare their token themselves.

use super::*;
use crate::kernels::grouped::lower_with;
use crate::kernels::prepare::{Gate, Prepare};
use crate::kernels::product::prepares;
use crate::kernels::rotate;
use crate::reference::{Activation, RmsNorm};
use crate::spec::Rotation;

/// `n` values in −1..1 times `size`.
fn values(seed: u32, n: u32, size: f32) -> Vec<f32> {
    let mut x = seed;
    let mut value = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| value() * size).collect()
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What a product is made of that prepares its token.
struct Given {
    terms: Arc<Terms>,
    matrix: Stored,
    /// Factors of columns, at least one number.
    entering: Vec<f32>,
    /// Values or gates, what gates gate, weights of the norm.
    inputs: [Vec<f32>; 3],
}

impl Given {
    /// Results, added to `before`, and faults.
    fn product(&self, op: &Product, prepare: &Prepare, launch: &Launch, before: &[f32]) -> (Vec<f32>, Vec<u8>) {
        let kernel = lower_with(op, launch, Some(prepare));
        validate(&kernel).unwrap_or_else(|problems| panic!("{problems}"));
        let words = |x: &[u32]| x.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let mut read: Vec<Vec<u8>> = self.inputs.iter().map(|x| bytes(x)).collect();
        read.push(words(&rotate::flips(prepare.rotation, prepare.columns)));
        read.push(words(&rotate::base(prepare.rotation, prepare.columns)));
        let of_matrix = [bytes(&self.entering), words(&self.matrix.words), self.matrix.numbers.clone()];
        let (factors, mut faults, mut y) = (bytes(&self.matrix.factors), vec![0; 8], bytes(before));
        let mut args: Vec<Arg> = read.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.extend([Arg::Buffer(&mut faults), Arg::I32(1)]);
        args.extend(of_matrix.iter().chain([&factors]).map(|b| Arg::ReadOnly(b)));
        args.push(Arg::Buffer(&mut y));
        run(&kernel, &mut args, &Options::default()).unwrap_or_else(|e| panic!("{}: {e}", kernel.name));
        (y.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(), faults)
    }
}

const TWO: few::Launch = few::Launch { warps: 2, depth: 2, blocks: 2, ahead: 2, ..ONE };

#[test]
fn a_product_that_prepares_gives_the_bits_of_the_cpu() {
    let gate = Some(Gate { activation: Activation::Silu, up: Span { first: 1, stride: 900 } });
    let norm = Some(RmsNorm { eps: 1e-5, add_one: false });
    for (name, rows, columns, norm, gate) in [
        ("gptq_int4_g128", 64, 640, None, None),
        ("gptq_int4_g128", 32, 384, norm, None),
        ("q6_k", 40, 768, Some(RmsNorm { eps: 1e-6, add_one: true }), None),
        ("q8_0", 23, 416, None, gate),
        ("int8_channel", 23, 300, norm, None),
        ("nf4", 20, 320, None, None),
        ("mxfp8_e4m3", 24, 288, None, None),
        // Factors, transforms and an order of columns.
        ("exl3_mul1_3", 128, 640, None, None),
        ("exl3_mcg_2", 128, 256, norm, None),
    ] {
        let shape = Shape { rows, cols: columns };
        let (terms, reader, tensors) = matrix(name, shape);
        let slices: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
        let layout = Relaid::new(&terms, shape);
        let input = Span { first: 4 * u32::from(columns != 300), stride: columns + 8 };
        let prepare = Prepare { input, norm, gate, ..Prepare::entering(&terms, columns, 1) };
        let [turned, _] = reader.turned(&slices).expect("of terms");
        let mut entering = turned.factors.clone();
        entering.resize(entering.len().max(1), 1.0);
        let ups = gate.map_or(1, |gate| gate.up.len(1, columns) as u32);
        let inputs = [values(1, input.len(1, columns) as u32, 20.0), values(2, ups, 1.0), values(3, columns, 1.0)];
        // What the CPU makes of them.
        let mut x = inputs[0][input.first as usize..][..columns as usize].to_vec();
        if let Some(Gate { activation, up }) = gate {
            let up = &inputs[1][up.first as usize..];
            x.iter_mut().zip(up).for_each(|(x, up)| *x = activation.apply(*x) * up);
        }
        let x = norm.map_or(x.clone(), |norm| norm.apply(&x, &inputs[2]));
        let expected = reader.product(&slices, &[turned.entered(&x)]);
        let given = Given { matrix: stored(&reader, &slices, &layout), terms, entering, inputs };
        for accumulate in [false, true] {
            let op = Product { terms: &given.terms, shape, batch: 1, y: Span::rows(rows), accumulate };
            let ranked = Launch::ranked_with(&op, Some(&prepare), &Target::Sm90a.device());
            let launches = [
                Launch::Few(ONE),
                Launch::Few(TWO),
                Launch::Few(few::Launch { warps: 3, ..TWO }),
                ranked[0].1,
                ranked[ranked.len() - 1].1,
            ];
            let before = values(4, rows, 1.0);
            let added = expected.iter().zip(&before).map(|(y, before)| if accumulate { before + y } else { *y });
            let added: Vec<u32> = added.map(f32::to_bits).collect();
            for launch in launches.iter().filter(|l| matches!(l, Launch::Few(l) if prepare.within(l.warps).is_some())) {
                let launch = match *launch {
                    Launch::Few(few) => Launch::Few(few::Launch { blocks: few.blocks.min(layout.row_tiles()), ..few }),
                    Launch::Many(_) => unreachable!("it does not prepare"),
                };
                let (found, faults) = given.product(&op, &prepare, &launch, &before);
                let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
                assert_eq!(found, added, "{name}, {rows} x {columns}, {launch:?}");
                assert_eq!(faults, [0; 8]);
            }
        }
    }
}

#[test]
fn a_product_that_prepares_says_what_is_not_finite() {
    let shape = Shape { rows: 32, cols: 384 };
    let (terms, reader, tensors) = matrix("gptq_int4_g128", shape);
    let slices: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
    let prepare = Prepare::entering(&terms, 384, 1);
    let mut inputs = [values(1, 384, 2.0), vec![0.0], vec![0.0]];
    inputs[0][290] = f32::NAN;
    let matrix = stored(&reader, &slices, &Relaid::new(&terms, shape));
    let given = Given { terms, matrix, entering: vec![1.0], inputs };
    let op = Product { terms: &given.terms, shape, batch: 1, y: Span::rows(32), accumulate: false };
    let (found, faults) = given.product(&op, &prepare, &Launch::Few(TWO), &[0.0; 32]);
    assert_eq!(faults, ints(&[0, 1]));
    assert!(found.iter().all(|y| !y.is_finite()));
}

#[test]
fn blocks_prepare_where_it_takes_less_time() {
    let device = Target::Sm90a.device();
    let own = |name: &str, [rows, cols]: [u32; 2], batch, count, gated: bool| {
        let terms = Terms::of(formats::get(name).unwrap()).unwrap();
        let op = Product { terms: &terms, shape: Shape { rows, cols }, batch, y: Span::rows(rows), accumulate: false };
        let gate = gated.then_some(Gate { activation: Activation::Silu, up: Span::rows(cols) });
        let prepare = Prepare { gate, ..Prepare::entering(&terms, cols, batch) };
        prepares(&vec![Launch::expected(&op, &prepare, &device); count], &prepare)
    };
    let int4 = "gptq_int4_g128";
    assert!(own(int4, [4096, 4096], 1, 1, false) && own(int4, [4096, 14336], 1, 1, false));
    assert!(!own(int4, [4096, 4096], 2, 1, false) && !own(int4, [4096, 4096], 1, 1, true));
    // Each of several products that read the same would prepare it.
    assert!(!own(int4, [4096, 4096], 1, 9, false));
    // A transform of all columns goes through shared memory.
    let op = |cols, rotation| {
        let terms = Terms::of(formats::get(int4).unwrap()).unwrap();
        let prepare = Prepare { rotation, ..Prepare::entering(&terms, cols, 1) };
        let y = Span::rows(64);
        let op = Product { terms: &terms, shape: Shape { rows: 64, cols }, batch: 1, y, accumulate: false };
        Launch::ranked_with(&op, Some(&prepare), &device).len()
    };
    assert!(op(4096, Rotation::None) > 0);
    assert_eq!(op(4096, Rotation::Hadamard { seed: 0, block: None, interleave: None }), 0);
}

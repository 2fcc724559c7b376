//! Products whose blocks prepare their token themselves, against a preparation and a product one after the other.

use super::*;
use crate::layout::COLUMN_PAD;

/// `n` values in −1..1 times `size`, as bytes.
fn values(seed: u64, n: u64, size: f32) -> Vec<u8> {
    let mut r = Random(seed);
    bytes(&(0..n).map(|_| r.unit() * size).collect::<Vec<_>>(), f32::to_le_bytes)
}

/// What a step has: a matrix, and what its activations are made of.
struct Given {
    /// Parameters of preparations: values, what gates gate, weights of norms, the rotation.
    inputs: [Vec<u8>; 5],
    /// Tables, words, scales.
    matrix: [Vec<u8>; 3],
}

impl Given {
    fn random(op: &Gemv, prepare: &Prepare) -> Given {
        let m = Matrix::random(op.quantizer, op.shape);
        let n = prepare.columns;
        let up = prepare.gate.map_or(1, |gate| gate.up.len(1, n));
        Given {
            inputs: [
                values(1, prepare.input.len(1, n), 20.0),
                values(2, up, 1.0),
                values(3, n.into(), 1.0),
                bytes(&rotate::flips(prepare.rotation, n), u32::to_le_bytes),
                bytes(&rotate::base(prepare.rotation, n), u32::to_le_bytes),
            ],
            matrix: [
                bytes(&pack_tables(op.quantizer), u32::to_le_bytes),
                bytes(&m.words, u32::to_le_bytes),
                bytes(&m.scales, u16::to_le_bytes),
            ],
        }
    }

    /// Results and faults of a launch of the preparation and one of the product.
    fn apart(&self, op: &Gemv, prepare: &Prepare) -> (Vec<u8>, Vec<u8>) {
        let device = crate::cuda::Target::Sm90a.device();
        let spread = Spread::choose(prepare, &device);
        let (mut scratch, mut faults) = (vec![0; 4 * prepare.scratch(spread)], vec![0; 8]);
        let mut prepared =
            [vec![0xee; 2 * prepare.columns.next_multiple_of(COLUMN_PAD) as usize], vec![0; 4], vec![0; 4]];
        let mut args: Vec<Arg> = self.inputs.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.push(Arg::Buffer(&mut scratch));
        args.extend(prepared.iter_mut().map(|b| Arg::Buffer(b)));
        args.extend([Arg::Buffer(&mut faults), Arg::I32(1)]);
        launch(&prepare::lower_as(prepare, spread), args);
        let product = Launch::choose(op, &device);
        let mut args: Vec<Arg> = self.matrix.iter().chain(&prepared).map(|b| Arg::ReadOnly(b)).collect();
        let (mut y, mut meeting) = written(op, &product);
        args.push(Arg::Buffer(&mut y));
        args.extend(meeting.iter_mut().map(|b| Arg::Buffer(b)));
        launch(&product.lower(op), args);
        (y, faults)
    }

    /// The same of one launch.
    fn together(&self, op: &Gemv, prepare: &Prepare, by: &Launch) -> (Vec<u8>, Vec<u8>) {
        let mut faults = vec![0; 8];
        let mut args: Vec<Arg> = self.inputs.iter().map(|b| Arg::ReadOnly(b)).collect();
        args.extend([Arg::Buffer(&mut faults), Arg::I32(1)]);
        args.extend(self.matrix.iter().map(|b| Arg::ReadOnly(b)));
        let (mut y, mut meeting) = written(op, by);
        args.push(Arg::Buffer(&mut y));
        args.extend(meeting.iter_mut().map(|b| Arg::Buffer(b)));
        launch(&by.lower_with(op, Some(prepare)), args);
        assert!(meeting.iter().flatten().all(|b| *b == 0), "the meeting place is left clean");
        (y, faults)
    }
}

/// What a product writes: results, and where blocks meet.
fn written(op: &Gemv, by: &Launch) -> (Vec<u8>, [Vec<u8>; 2]) {
    let rows = Packed::new(op.quantizer, op.shape).padded_rows();
    let (partial, arrived) = by.meeting_place(op);
    (values(4, rows.into(), 1.0), [vec![0; 4 * partial], vec![0; 4 * arrived]])
}

fn blocks(block: u32) -> Rotation {
    Rotation::Hadamard { seed: 5, block: Some(block), interleave: None }
}

fn norm(add_one: bool) -> Option<RmsNorm> {
    Some(RmsNorm { eps: 1e-5, add_one })
}

#[test]
fn a_product_that_prepares_gives_the_bits_of_two_launches() {
    let all = quantizers();
    let launch = |warps, split, blocks, ahead| {
        Launch::Gemv(gemv::Launch { warps, split, blocks, ahead, min_blocks: 1, table_bytes: 32 << 10 })
    };
    let gate = |up| Some(Gate { activation: Activation::Silu, up });
    for (name, rotation, columns, norm, gate) in [
        ("v4_k8", blocks(128), 2048, norm(false), None),
        ("v4_k8", blocks(128), 300, None, None),
        ("v4_k8", Rotation::Hadamard { seed: 5, block: Some(128), interleave: Some(1024) }, 2304, norm(false), None),
        ("v2_k5_i16", blocks(256), 2560, norm(true), None),
        ("v1_k3", blocks(16), 201, norm(false), gate(Span { first: 1, stride: 300 })),
        ("square", Rotation::None, 300, None, gate(Span::rows(300))),
        ("mix2", Rotation::Hadamard { seed: 2, block: None, interleave: None }, 512, norm(false), None),
    ] {
        let quantizer = &Quantizer { rotation, ..named(&all, name).clone() };
        let input = Span { first: 4 * u32::from(columns == 300), stride: columns + 8 };
        let prepare = Prepare { columns, batch: 1, input, gate, norm, rotation, entering: None };
        for (rows, accumulate) in [(70, true), (33, false)] {
            let op = Gemv { quantizer, shape: Shape { rows, cols: columns }, batch: 1, accumulate };
            let tiles = Packed::new(quantizer, op.shape).row_tiles();
            let given = Given::random(&op, &prepare);
            let expect = given.apart(&op, &prepare);
            assert_eq!(expect.1, [0; 8]);
            let mut launches =
                vec![launch(4, 1, tiles, 2), launch(16, 1, 1, 1), launch(3, 2, 1, 2), launch(10, 2, tiles, 2)];
            // One of those that the cost model would choose.
            launches.push(Launch::ranked_with(&op, Some(&prepare), &crate::cuda::Target::Sm90a.device())[0].1);
            for by in launches.iter().filter(|l| matches!(l, Launch::Gemv(l) if prepare.within(l.warps).is_some())) {
                assert!(given.together(&op, &prepare, by) == expect, "{name}, {rotation:?}, {rows} rows, {by:?}");
            }
        }
    }
}

#[test]
fn a_product_that_prepares_says_what_is_not_finite() {
    let all = quantizers();
    let quantizer = &Quantizer { rotation: blocks(128), ..named(&all, "v4_k8").clone() };
    let op = Gemv { quantizer, shape: Shape { rows: 70, cols: 384 }, batch: 1, accumulate: false };
    let input = Span::rows(384);
    let prepare =
        Prepare { columns: 384, batch: 1, input, gate: None, norm: None, rotation: blocks(128), entering: None };
    let mut given = Given::random(&op, &prepare);
    given.inputs[0][4 * 290..4 * 291].copy_from_slice(&f32::NAN.to_le_bytes());
    let (_, faults) = given.apart(&op, &prepare);
    assert_eq!(faults, bytes(&[0, 1], i32::to_le_bytes));
    let by = Launch::ranked_with(&op, Some(&prepare), &crate::cuda::Target::Sm90a.device())[0].1;
    assert_eq!(given.together(&op, &prepare, &by).1, faults);
}

#[test]
fn blocks_prepare_where_it_takes_less_time() {
    let device = crate::cuda::Target::Sm90a.device();
    let q = crate::palette::get("fast_3").expect("of the palette");
    let own = |count, batch, rotation, gate: Option<Gate>| {
        let columns = 4096;
        let op = Gemv { quantizer: &q, shape: Shape { rows: 4096, cols: columns }, batch, accumulate: false };
        let prepare =
            Prepare { columns, batch, input: Span::rows(columns), gate, norm: norm(false), rotation, entering: None };
        product::prepares(&vec![Launch::expected(&op, &prepare, &device); count], &prepare)
    };
    let gate = Some(Gate { activation: Activation::Silu, up: Span::rows(4096) });
    assert!(own(1, 1, blocks(128), None) && own(1, 1, Rotation::None, None));
    assert!(!own(1, 1, blocks(128), gate) && !own(1, 2, blocks(128), None));
    // Each of several products that read the same would prepare it.
    assert!(!own(3, 1, blocks(128), None));
    // So long that a launch less is within the model's error: it took longer.
    let (output, columns) = (crate::palette::get("tcq_4").expect("of the palette"), 4096);
    let op = Gemv { quantizer: &output, shape: Shape { rows: 128256, cols: columns }, batch: 1, accumulate: false };
    let input = Span::rows(columns);
    let prepare =
        Prepare { columns, batch: 1, input, gate: None, norm: norm(false), rotation: output.rotation, entering: None };
    assert!(!product::prepares(&[Launch::expected(&op, &prepare, &device)], &prepare));
    // Through shared memory.
    assert!(!own(1, 1, Rotation::Hadamard { seed: 0, block: None, interleave: None }, None));
}

//! Products with matrices of formats, run by the interpreter against [`Reader::product`].

use std::sync::Arc;

use super::layout::{ROWS, Relaid, Stored};
use super::{Launch, Product, few, lower, lower_for_experts, many};
use crate::cuda::Target;
use crate::formats;
use crate::ir::interpret::{Arg, Options, run};
use crate::ir::{Kernel, validate};
use crate::kernels::Span;
use crate::kernels::experts::group::{self, Group};
use crate::kernels::experts::{Experts, most_pairs};
use crate::reader::{Book, Reader};
use crate::reference::{Activations, activation_cells, quantize_activations};
use crate::spec::Shape;
use crate::spec::format::Format;
use crate::spec::terms::{Digits, Terms};

mod preparing;

/// A matrix of made-up bits.
fn matrix(name: &str, shape: Shape) -> (Arc<Terms>, Reader, Vec<Vec<u8>>) {
    matrix_of(name, shape, u64::from(shape.rows))
}

/// One of bits that `seed` makes up.
fn matrix_of(name: &str, shape: Shape, seed: u64) -> (Arc<Terms>, Reader, Vec<Vec<u8>>) {
    let format = formats::get(name).unwrap_or_else(|| panic!("there is no {name}"));
    let book = Arc::new(Book::new(format.clone()));
    let reader = Reader::new(&book, &format.layouts[0], shape).unwrap_or_else(|e| panic!("{name}: {e}"));
    let tensors = reader.made(seed);
    (reader.terms().expect(name).clone(), reader, tensors)
}

fn activations(cols: u32, batch: u32) -> Vec<Activations> {
    let mut x = 99u32;
    let mut value = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..batch).map(|_| quantize_activations(&(0..cols).map(|_| value()).collect::<Vec<_>>())).collect()
}

fn stored(reader: &Reader, tensors: &[&[u8]], layout: &Relaid) -> Stored {
    let integers = reader.integers(tensors);
    let mut out = Stored::new(&integers, layout);
    for tile in 0..layout.row_tiles() {
        out.put(layout, tile, &layout.row_tile(&integers, tile * ROWS));
    }
    out
}

/// What the kernel of a launch gives, added to `before`.
fn product(op: &Product, launch: &Launch, matrix: &Stored, tokens: &[Activations], before: &[f32]) -> Vec<f32> {
    given(op, &lower(op, launch), matrix, tokens, before, &[])
}

/// What a kernel gives that begins with `before` and has the parameters `others` behind those of [`lower`].
fn given(
    op: &Product,
    kernel: &Kernel,
    matrix: &Stored,
    tokens: &[Activations],
    before: &[f32],
    others: &[Vec<i32>],
) -> Vec<f32> {
    let scales: Vec<f32> = tokens.iter().map(|t| t.scale).collect();
    let bytes = |x: &[f32]| x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let words: Vec<u8> = matrix.words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let (factors, scales, mut y) = (bytes(&matrix.factors), bytes(&scales), bytes(before));
    let mut x: Vec<u8> = activation_cells(tokens).iter().map(|b| b.cast_unsigned()).collect();
    if let Some(order) = op.terms.order() {
        let cells = x.as_chunks_mut::<16>().0;
        cells.iter_mut().for_each(|cell| *cell = order.map(|column| cell[usize::from(column)]));
    }
    let [words, numbers, factors, x, scales] =
        [&words, &matrix.numbers, &factors, &x, &scales].map(|b| Arg::ReadOnly(b.as_slice()));
    let others: Vec<Vec<u8>> = others.iter().map(|x| ints(x)).collect();
    let mut args = vec![words, numbers, factors, x, scales, Arg::Buffer(&mut y)];
    args.extend(others.iter().map(|bytes| Arg::ReadOnly(bytes)));
    run(kernel, &mut args, &Options::default()).unwrap_or_else(|e| panic!("{}: {e}", kernel.name));
    y.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn ints(x: &[i32]) -> Vec<u8> {
    x.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn check(name: &str, shape: Shape, batches: &[u32], launches: &[Launch]) {
    let (terms, reader, tensors) = matrix(name, shape);
    let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
    // Integers that are rounded differ from the entries, and fewer bits of a slope are left beside wide ones.
    let near = match terms.stream.as_ref().map(|s| &s.digits) {
        // Before the rounding to half precision.
        Some(Digits::Bytes { .. }) => 5e-4,
        _ if terms.is_wide() => 2e-4,
        _ => 2e-6,
    };
    // The weights between what is done to activations and to results.
    let format = Format { input: Vec::new(), output: Vec::new(), ..reader.format().clone() };
    let weights = Reader::new(&Arc::new(Book::new(format)), &reader.format().layouts[0], shape).expect(name);
    let layout = Relaid::new(&terms, shape);
    let matrix = stored(&reader, &tensors, &layout);
    for &batch in batches {
        let tokens = activations(shape.cols, batch);
        let expected = reader.product(&tensors, &tokens);
        // Near the sums of the weights as they are written.
        let mut row = vec![0.0; shape.cols as usize];
        for r in 0..shape.rows {
            weights.read(&tensors, r, 0, &mut row);
            for (t, token) in tokens.iter().enumerate() {
                let terms =
                    row.iter().zip(&token.q).map(|(w, q)| f64::from(*w) * f64::from(*q) * f64::from(token.scale));
                let (sum, size) = terms.fold((0.0, 0.0), |(s, n), x| (s + x, n + x.abs()));
                let found = f64::from(expected[t * shape.rows as usize + r as usize]);
                assert!((found - sum).abs() <= size * near, "{name}: row {r}, token {t} is {found}, not {sum}");
            }
        }
        let op = Product { terms: &terms, shape, batch, y: Span::rows(shape.rows), accumulate: false };
        let chosen = Launch::choose(&op, &Target::Sm90a.device());
        for launch in launches.iter().chain([&chosen]) {
            let most = layout.row_tiles();
            let launch = match *launch {
                Launch::Few(launch) => Launch::Few(few::Launch { blocks: launch.blocks.min(most), ..launch }),
                Launch::Many(launch) => Launch::Many(many::Launch {
                    blocks: launch.blocks.min(most),
                    token_parts: launch.token_parts.max(batch.div_ceil(many::MAX_PART)),
                    ..launch
                }),
            };
            let found = product(&op, &launch, &matrix, &tokens, &vec![0.0; expected.len()]);
            let differs = found.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{name}, {batch} tokens, {launch:?}: {found:?} {expected:?}");
        }
    }
}

const ONE: few::Launch = few::Launch { warps: 1, depth: 1, blocks: 1, ahead: 1, min_blocks: 1, shared_book: true };
const FOUR: many::Launch = many::Launch {
    group: None,
    row_warps: 4,
    col_warps: 1,
    row_tiles: 1,
    chunk: 1,
    ahead: 1,
    token_parts: 1,
    blocks: 1,
    min_blocks: 1,
    shared_book: true,
};

#[test]
fn all_formats_with_terms_are_multiplied_exactly() {
    let mut count = 0;
    for name in formats::names() {
        let format = formats::get(name).unwrap();
        if Terms::of(format).is_err() {
            continue;
        }
        // Three tiles, where the format's groups allow it.
        let cols = if format.name.ends_with("_k")
            || ["iq", "tq", "higgs", "qtip", "qpalette", "e8p"].iter().any(|n| name.starts_with(n))
        {
            1024
        } else {
            384
        };
        // Words of zeros hold whole rows.
        let rows = match name {
            _ if name.starts_with("exl3") => 128,
            _ if name.starts_with("gptq") => 32,
            _ if !format.output.is_empty() || format.trellis.is_some() => 32,
            _ => 40,
        };
        check(name, Shape { rows, cols }, &[1], &[]);
        count += 1;
    }
    assert_eq!(count, 107);
}

#[test]
fn launches_and_batches_do_not_matter() {
    let launches = [
        ONE,
        few::Launch { blocks: 2, ..ONE },
        few::Launch { warps: 2, depth: 1, ahead: 2, ..ONE },
        few::Launch { warps: 3, depth: 2, blocks: 3, ..ONE },
        few::Launch { warps: 2, depth: 4, ahead: 2, blocks: 2, ..ONE },
    ]
    .map(Launch::Few);
    for name in ["gptq_int4_g128", "awq_int4_g32", "q6_k", "q8_0"] {
        let cols = if name == "q6_k" { 768 } else { 640 };
        check(name, Shape { rows: 56, cols }, &[1, 3, 5, 8, 9, 17], &launches);
    }
    check("exl3_mul1_3", Shape { rows: 128, cols: 640 }, &[1, 5, 8], &launches);
    check("int8_channel", Shape { rows: 23, cols: 300 }, &[1, 4, 6], &launches);
    check("q5_1", Shape { rows: 23, cols: 352 }, &[2], &launches);
    check("mxfp4", Shape { rows: 5, cols: 32 }, &[64], &launches[..2]);
}

#[test]
fn tokens_of_a_block_share_decoded_tiles() {
    let launches = [
        FOUR,
        many::Launch { blocks: 2, row_warps: 1, col_warps: 2, ..FOUR },
        many::Launch { row_warps: 2, row_tiles: 2, chunk: 2, token_parts: 2, ..FOUR },
        many::Launch { group: Some(many::Group { planes: 64, sets: 2 }), ..FOUR },
        many::Launch {
            group: Some(many::Group { planes: 16, sets: 2 }),
            col_warps: 2,
            token_parts: 3,
            blocks: 2,
            ..FOUR
        },
        many::Launch { group: Some(many::Group { planes: 32, sets: 1 }), row_warps: 8, chunk: 2, ..FOUR },
        many::Launch { row_warps: 2, chunk: 4, ahead: 2, ..FOUR },
    ]
    .map(Launch::Many);
    check("gptq_int4_g128", Shape { rows: 88, cols: 640 }, &[5, 20, 64, 70], &launches);
    check("packed_int4_g128", Shape { rows: 88, cols: 640 }, &[9, 64], &launches);
    check("awq_int4_g32", Shape { rows: 48, cols: 384 }, &[9, 33], &launches);
    check("q6_k", Shape { rows: 40, cols: 512 }, &[17], &launches);
    check("q8_0", Shape { rows: 88, cols: 416 }, &[9, 40], &launches);
    check("int8_channel", Shape { rows: 23, cols: 300 }, &[11, 24], &launches);
    check("mxfp4", Shape { rows: 5, cols: 32 }, &[65], &launches);
    check("nf4", Shape { rows: 20, cols: 320 }, &[9], &launches);
    check("exl3_mul1_4", Shape { rows: 128, cols: 384 }, &[9, 18], &launches);
    check("exl3_mcg_2", Shape { rows: 128, cols: 256 }, &[9], &launches[..4]);
    check("mxfp8_e4m3", Shape { rows: 24, cols: 288 }, &[18], &launches);
    check("qtip_hyb_3", Shape { rows: 64, cols: 256 }, &[9], &launches[..4]);
    check("qpalette_tcq_2.5", Shape { rows: 32, cols: 512 }, &[9], &launches[..4]);
    check("higgs_4", Shape { rows: 40, cols: 1024 }, &[9], &launches[..4]);
    check("nf4_double", Shape { rows: 20, cols: 320 }, &[9], &launches[..4]);
}

/// The codebooks whose entries are looked up, on each target: in shared memory where a block has room for all 2^16 of them, else in
/// global memory.
#[test]
fn tables_are_looked_up_where_there_is_room() {
    for name in ["exl3_mcg_3", "exl3_3inst_2"] {
        let terms = Terms::of(formats::get(name).unwrap()).unwrap();
        for shape in [Shape { rows: 28672, cols: 4096 }, Shape { rows: 128, cols: 128 }] {
            for (target, batch) in Target::ALL.into_iter().flat_map(|t| [1, 8, 64, 100].map(|batch| (t, batch))) {
                let op = Product { terms: &terms, shape, batch, y: Span::rows(shape.rows), accumulate: false };
                let launch = Launch::choose(&op, &target.device());
                let shared = match launch {
                    Launch::Few(launch) => launch.shared_book,
                    Launch::Many(launch) => launch.shared_book,
                };
                let available = target.device().shared_per_block;
                assert_eq!(shared, available > 1 << 17, "{name}, {batch} tokens on {target}: {launch:?}");
                let needed = lower(&op, &launch).shared_bytes();
                assert!(needed <= available, "{name}, {batch} tokens on {target}: {launch:?} takes {needed} bytes");
            }
        }
    }
}

#[test]
fn tables_in_global_memory_give_the_same_bits() {
    let global = few::Launch { shared_book: false, ..ONE };
    let many = many::Launch { shared_book: false, ..FOUR };
    let launches = [
        Launch::Few(global),
        Launch::Few(few::Launch { warps: 2, depth: 2, ahead: 2, blocks: 3, ..global }),
        Launch::Many(many),
        Launch::Many(many::Launch { row_warps: 2, row_tiles: 2, chunk: 2, ahead: 2, ..many }),
        Launch::Many(many::Launch { group: Some(many::Group { planes: 8, sets: 2 }), blocks: 2, ..many }),
    ];
    check("exl3_mcg_2", Shape { rows: 128, cols: 256 }, &[1, 9], &launches);
    check("exl3_3inst_3", Shape { rows: 128, cols: 384 }, &[1, 6], &launches);
    check("qpalette_tcq_4.5", Shape { rows: 32, cols: 256 }, &[1, 6], &launches);
    check("aqlm_1x16", Shape { rows: 40, cols: 296 }, &[1, 6], &launches);
    check("higgs_4", Shape { rows: 24, cols: 1024 }, &[1], &launches);
}

/// Products of the pairs of `tokens` tokens with `chosen` of four experts, one of which has no pairs, on some launches: those of each pair
/// alone. Pairs share their tokens' inputs or have their own.
fn check_experts(name: &str, shape: Shape, (tokens, chosen): (u32, u32), launches: &[Launch]) {
    let count = 4;
    let made: Vec<_> = (0..count).map(|e| matrix_of(name, shape, e.into())).collect();
    let terms = &made[0].0;
    let layout = Relaid::new(terms, shape);
    let slices = |e: usize| made[e].2.iter().map(Vec::as_slice).collect::<Vec<&[u8]>>();
    let (pairs, most) = (tokens * chosen, most_pairs(tokens, chosen, count));
    let expert_of: Vec<i32> = (0..pairs).map(|p| ((p * 5 + p / 4) % 3) as i32).collect();
    let (mut units, mut sorted) = (expert_of.clone(), vec![0; pairs as usize]);
    let group = Group { count, pairs, most };
    if most > 1 {
        let len = 4 * crate::kernels::experts::units(count, pairs, most);
        let (mut made, mut order) = (ints(&vec![0; len as usize]), ints(&sorted));
        let args = &mut [Arg::ReadOnly(&ints(&expert_of)), Arg::Buffer(&mut order), Arg::Buffer(&mut made)];
        run(&group::lower(&group), args, &Options::default()).unwrap_or_else(|trap| panic!("{trap}"));
        let words = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        (units, sorted) = (words(&made), words(&order));
    }
    // The matrices of all experts in their order; or of some, in another.
    for (inputs, order) in [(tokens, vec![0, 1, 2, 3]), (pairs, vec![3, 0, 2])] {
        let stride = shape.rows + 5;
        let experts = Experts { count, matrices: order.len() as u32, rows: inputs, pairs, most, stride };
        let place = |e: i32| order.iter().position(|o| *o == e as usize).map_or(-1, |place| place as i32);
        let places: Vec<i32> = (0..count as i32).map(place).collect();
        let stack = Relaid::new(terms, Shape { rows: experts.matrices * layout.padded_rows(), ..shape });
        let of_first = slices(0);
        let mut all = Stored::new(&made[0].1.integers(&of_first), &stack);
        for (at, &e) in (0..).zip(&order) {
            let slices = slices(e);
            let integers = made[e].1.integers(&slices);
            for tile in 0..layout.row_tiles() {
                let stored = stack.row_tile(&integers, tile * ROWS);
                all.put(&stack, at * layout.row_tiles() + tile, &stored);
            }
        }
        let x = activations(shape.cols, inputs);
        let y = Span { first: 3, stride };
        let op = Product { terms, shape, batch: most, y, accumulate: false };
        let mut expected = vec![0.5; y.len(pairs, shape.rows) as usize];
        for (pair, &expert) in expert_of.iter().enumerate().filter(|(_, e)| place(**e) >= 0) {
            let row = &x[pair / (pairs / inputs) as usize..][..1];
            let alone = made[expert as usize].1.product(&slices(expert as usize), row);
            expected[3 + pair * stride as usize..][..shape.rows as usize].copy_from_slice(&alone);
        }
        let chosen = Launch::ranked_for_experts(&op, &experts, &Target::Sm90a.device())[0].1;
        for launch in launches.iter().chain([&chosen]) {
            let launch = match *launch {
                Launch::Few(launch) => Launch::Few(launch),
                Launch::Many(launch) => Launch::Many(many::Launch {
                    token_parts: launch.token_parts.max(most.div_ceil(many::MAX_PART)),
                    ..launch
                }),
            };
            let kernel = lower_for_experts(&op, &launch, &experts);
            validate(&kernel).unwrap_or_else(|problems| panic!("{problems}"));
            let others = [units.clone(), sorted.clone(), places.clone()];
            let found = given(&op, &kernel, &all, &x, &vec![0.5; expected.len()], &others);
            let differs = found.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{name}, {experts:?}, {launch:?}");
        }
    }
}

#[test]
fn products_of_experts_are_those_of_each_pair_alone() {
    let launches = [
        Launch::Few(ONE),
        Launch::Few(few::Launch { warps: 2, depth: 2, ahead: 2, blocks: 2, ..ONE }),
        Launch::Many(many::Launch { blocks: 2, row_warps: 1, col_warps: 2, ..FOUR }),
        Launch::Many(many::Launch { group: Some(many::Group { planes: 8, sets: 1 }), token_parts: 2, ..FOUR }),
    ];
    for (name, rows, cols) in [("q4_k", 40, 256), ("mxfp4", 37, 416), ("gptq_int4_g128", 64, 384), ("q8_0", 24, 96)] {
        // Each pair a unit, units of a few pairs, and of more than a block of a few tokens takes.
        for (tokens, chosen) in [(1, 3), (5, 2), (40, 1)] {
            check_experts(name, Shape { rows, cols }, (tokens, chosen), &launches);
        }
    }
    check_experts("fp8_128", Shape { rows: 128, cols: 256 }, (3, 2), &[]);
    check_experts("mxfp4", Shape { rows: 37, cols: 96 }, (300, 2), &[Launch::Few(ONE)]);
}

#[test]
fn outputs_are_added_to_a_part_of_a_buffer() {
    let shape = Shape { rows: 24, cols: 256 };
    let (terms, reader, tensors) = matrix("q4_1", shape);
    let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
    let layout = Relaid::new(&terms, shape);
    let tokens = activations(256, 2);
    let y = Span { first: 7, stride: 40 };
    let op = Product { terms: &terms, shape, batch: 2, y, accumulate: true };
    let before: Vec<f32> = (0..80).map(|i| i as f32).collect();
    let expected = reader.product(&tensors, &tokens);
    for launch in [Launch::Few(ONE), Launch::Many(FOUR)] {
        let found = product(&op, &launch, &stored(&reader, &tensors, &layout), &tokens, &before);
        for (i, (found, before)) in found.iter().zip(&before).enumerate() {
            let (token, row) = (i / 40, (i % 40).wrapping_sub(7));
            let add = if row < 24 { expected[token * 24 + row] } else { 0.0 };
            assert_eq!(*found, before + add, "{i}");
        }
    }
}

#[test]
fn four_bits_take_four_bits() {
    let terms = Terms::of(formats::get("gptq_int4_g128").unwrap()).unwrap();
    let layout = Relaid::new(&terms, Shape { rows: 4096, cols: 4096 });
    let bits = layout.bytes() as f64 * 8.0 / 4096.0 / 4096.0;
    // A scale of 16 bits and a byte for 128 columns; a byte and a number of 32 bits for a row.
    assert!((bits - (4.0 + 24.0 / 128.0 + 40.0 / 4096.0)).abs() < 1e-9, "{bits}");
}

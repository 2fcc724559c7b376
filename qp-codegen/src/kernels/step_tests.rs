//! The kernels between a model's matrices, run by the interpreter against plain Rust.

use super::add::{self, Add};
use super::argmax::{self, Argmax};
use super::dense::{self, Dense};
use super::embed::{self, Embed};
use super::glu::{self, Glu};
use super::map;
use super::norm::{self, Norm};
use super::read::{self, Read};
use super::span::Span;
use crate::cuda::Target;
use crate::ir::interpret::{Arg, Options, run};
use crate::ir::{Elem, Kernel, validate};
use crate::reference::{Activation, Map, RmsNorm};

/// `n` values in −1..1.
fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn ints(v: &[i32]) -> Vec<u8> {
    v.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(v: &[u8]) -> Vec<f32> {
    v.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// bfloat16 values that are exact in it.
fn halves(v: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let bits: Vec<u16> = v.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    let exact = bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect();
    (bits.iter().flat_map(|b| b.to_le_bytes()).collect(), exact)
}

fn launch(kernel: &Kernel, args: &mut [Arg<'_>]) {
    validate(kernel).unwrap_or_else(|problems| panic!("{problems}"));
    run(kernel, args, &Options::default()).unwrap_or_else(|trap| panic!("{trap}"));
}

#[test]
fn embed_copies_rows() {
    let (columns, batch) = (300, 3);
    let (table, exact) = halves(&random(1, 10 * columns));
    let op = Embed { columns: columns as u32, elem: Elem::BF16, batch, y: Span::rows(304) };
    let mut y = vec![0u8; 4 * 304 * 3];
    launch(&embed::lower(&op), &mut [Arg::ReadOnly(&ints(&[9, 0, 4])), Arg::ReadOnly(&table), Arg::Buffer(&mut y)]);
    for (row, token) in floats(&y).chunks(304).zip([9, 0, 4]) {
        assert_eq!(row[..columns], exact[token * columns..(token + 1) * columns]);
        assert_eq!(row[columns..], [0.0; 4]);
    }
}

#[test]
fn read_reads_every_word_once() {
    let op = Read { blocks: 2, rounds: 2 };
    let words: Vec<i32> = (0..op.words()).map(|i| (i * i).cast_signed()).collect();
    let mut y = vec![0u8; 4 * op.threads() as usize];
    launch(&read::lower(&op), &mut [Arg::ReadOnly(&ints(&words)), Arg::Buffer(&mut y)]);
    let sums = y.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b));
    let sum = |of: &mut dyn Iterator<Item = i32>| of.fold(0i32, i32::wrapping_add);
    assert_eq!(sum(&mut sums.into_iter()), sum(&mut words.into_iter()));
}

#[test]
fn norm_equals_the_reference() {
    for (columns, add_one) in [(1, false), (64, false), (256, true), (701, false), (4200, true)] {
        let norm = RmsNorm { eps: 1e-5, add_one };
        let op = Norm { columns: columns as u32, batch: 2, x: Span { first: 3, stride: 4210 }, norm };
        let (x, w) = (random(2, 3 + 2 * 4210), random(3, columns));
        let mut y = vec![0u8; 8 * columns];
        launch(&norm::lower(&op), &mut [Arg::ReadOnly(&bytes(&x)), Arg::ReadOnly(&bytes(&w)), Arg::Buffer(&mut y)]);
        for (t, row) in floats(&y).chunks(columns).enumerate() {
            assert_eq!(row, norm.apply(&x[3 + t * 4210..][..columns], &w));
        }
    }
}

#[test]
fn glu_equals_the_reference() {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        glu_of(activation);
    }
}

fn glu_of(activation: Activation) {
    let (gate, up) = (Span { first: 0, stride: 600 }, Span { first: 288, stride: 600 });
    let op = Glu { columns: 270, batch: 2, activation, gate, up };
    let x: Vec<f32> = random(4, 1200).iter().map(|v| v * 20.0).collect();
    let mut y = vec![0u8; 4 * 540];
    let input = bytes(&x);
    launch(&glu::lower(&op), &mut [Arg::ReadOnly(&input), Arg::ReadOnly(&input), Arg::Buffer(&mut y)]);
    for (t, row) in floats(&y).chunks(270).enumerate() {
        for (i, y) in row.iter().enumerate() {
            assert_eq!(*y, activation.apply(x[t * 600 + i]) * x[t * 600 + 288 + i]);
        }
    }
}

#[test]
fn maps_equal_the_reference() {
    let functions = [
        Map::Scale(0.3),
        Map::SoftCap(7.0),
        Map::Center,
        Map::Activate(Activation::GeluTanh),
        Map::Activate(Activation::Silu),
    ];
    for (function, columns) in functions.into_iter().flat_map(|f| [1, 64, 256, 701, 4200].map(|n| (f, n))) {
        let (from, to) = (Span { first: 3, stride: 4210 }, Span { first: 1, stride: 4220 });
        let op = map::Map { columns, batch: 2, x: from, y: to, function };
        let x: Vec<f32> = random(12, 3 + 2 * 4210).iter().map(|v| v * 30.0).collect();
        let mut y = bytes(&vec![9.0; 2 * 4221]);
        launch(&map::lower(&op), &mut [Arg::ReadOnly(&bytes(&x)), Arg::Buffer(&mut y)]);
        let y = floats(&y);
        for t in 0..2 {
            let mut row = x[3 + t * 4210..][..columns as usize].to_vec();
            function.apply(&mut row);
            assert_eq!(y[1 + t * 4220..][..columns as usize], row, "{function:?} {columns}");
            assert_eq!(y[1 + t * 4220 + columns as usize], 9.0);
        }
    }
}

#[test]
fn add_takes_rows_or_one_for_all() {
    for stride in [0, 500] {
        let op = Add { columns: 300, batch: 3, x: Span { first: 1, stride }, y: Span::rows(320) };
        let (x, old) = (random(5, 1501), random(6, 960));
        let mut y = bytes(&old);
        launch(&add::lower(&op), &mut [Arg::ReadOnly(&bytes(&x)), Arg::Buffer(&mut y)]);
        let y = floats(&y);
        for t in 0..3 {
            for i in 0..320 {
                let new = if i < 300 { old[t * 320 + i] + x[1 + t * stride as usize + i] } else { old[t * 320 + i] };
                assert_eq!(y[t * 320 + i], new);
            }
        }
    }
}

#[test]
fn dense_equals_the_reference_and_is_near_the_exact_product() {
    // Rows that do not fill a block, columns that do not fill a warp or a vector.
    for (rows, cols, batch, accumulate) in
        [(20, 256, 1, false), (9, 130, 3, true), (3, 37, 8, false), (3, 40, 16, true), (9, 33, 19, false)]
    {
        let x = random(7, cols * batch);
        let (w, exact) = halves(&random(8, rows * cols));
        let old = random(9, rows * batch);
        let op = Dense {
            rows: rows as u32,
            cols: cols as u32,
            elem: Elem::BF16,
            batch: batch as u32,
            x: Span::rows(cols as u32),
            y: Span::rows(rows as u32),
            accumulate,
        };
        let mut y = bytes(&old);
        launch(&dense::lower(&op), &mut [Arg::ReadOnly(&w), Arg::ReadOnly(&bytes(&x)), Arg::Buffer(&mut y)]);
        for (i, y) in floats(&y).into_iter().enumerate() {
            let (t, r) = (i / rows, i % rows);
            let row = exact[r * cols..].iter().zip(&x[t * cols..(t + 1) * cols]);
            let sum: f64 = row.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let sum = sum + if accumulate { f64::from(old[i]) } else { 0.0 };
            assert!((f64::from(y) - sum).abs() < 2e-5, "{rows} × {cols}, token {t}, row {r}: {y} and {sum}");
            let twin = dense::reference(&exact[r * cols..(r + 1) * cols], &x[t * cols..(t + 1) * cols]);
            assert_eq!(y, if accumulate { old[i] + twin } else { twin });
        }
    }
}

#[test]
fn argmax_finds_the_first_of_the_largest() {
    // Rows whose fours are aligned, and others; one that no thread has to itself.
    for (columns, first, stride) in [(2500, 0, 2500), (2500, 3, 2501), (2501, 0, 2501), (40_000, 4, 40_004)] {
        argmax_of(columns, Span { first, stride });
    }
}

fn argmax_of(columns: usize, span: Span) {
    let mut logits = random(10, 6 * columns);
    for at in [2300, 700, 1724] {
        logits[at] = 5.0;
    }
    logits[columns] = 7.0;
    logits[columns + 9] = f32::INFINITY;
    logits[2 * columns..3 * columns].fill(f32::NEG_INFINITY);
    logits[2 * columns + 99] = -1e9;
    logits[3 * columns + 1024] = f32::NAN;
    logits[4 * columns..5 * columns].fill(f32::INFINITY);
    logits[5 * columns..].fill(-1.0);
    logits[5 * columns + 2400] = -0.0;
    logits[5 * columns + 2499] = 0.0;
    let mut memory = vec![f32::NAN; (span.first + 6 * span.stride) as usize];
    for (t, row) in logits.chunks(columns).enumerate() {
        memory[(span.first + t as u32 * span.stride) as usize..][..columns].copy_from_slice(row);
    }
    let op = Argmax { columns: columns as u32, batch: 6, logits: span };
    // A block a row, and a cluster.
    for target in [Target::Sm80, Target::Sm90a] {
        let device = target.device();
        let (mut best, mut scratch) = (ints(&[-7; 6]), vec![0xee; 4 * op.scratch(&device)]);
        let mut args = [Arg::ReadOnly(&bytes(&memory)), Arg::Buffer(&mut scratch), Arg::Buffer(&mut best)];
        launch(&argmax::lower(&op, &device), &mut args);
        assert_eq!(best, ints(&[700, 0, 99, -1, -1, 2400]), "{columns} {span:?} {target}");
    }
}

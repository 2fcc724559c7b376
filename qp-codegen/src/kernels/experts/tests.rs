//! The kernels of mixtures of experts, run by the interpreter against plain Rust.

use super::combine::{self, Combine};
use super::group::{self, Group};
use super::route::{self, Route};
use super::unit::{self, GateExperts};
use super::{Experts, most_pairs, units};
use crate::ir::interpret::{Arg, Options, run};
use crate::ir::{Elem, Kernel, validate};
use crate::kernels::Span;
use crate::kernels::dense::{self, Dense};
use crate::reference::Activation;
use crate::reference::routing::{Routing, Score, Unit};

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

fn to_ints(v: &[u8]) -> Vec<i32> {
    v.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

fn launch(kernel: &Kernel, args: &mut [Arg<'_>]) {
    validate(kernel).unwrap_or_else(|problems| panic!("{problems}"));
    run(kernel, args, &Options { races: true, reverse: true }).unwrap_or_else(|trap| panic!("{trap}"));
}

/// Experts, weights and the fault that the kernel gives.
fn routed(op: &Route, scores: &[f32], correction: Option<&[f32]>) -> (Vec<i32>, Vec<f32>, i32) {
    let pairs = op.batch as usize * op.routing.chosen;
    let (mut experts, mut weights) = (ints(&vec![-1; pairs]), bytes(&vec![-1.0; pairs]));
    let mut faults = ints(&[0; 3]);
    let args = &mut [
        Arg::ReadOnly(&bytes(scores)),
        Arg::ReadOnly(&bytes(correction.unwrap_or(&[0.0]))),
        Arg::Buffer(&mut experts),
        Arg::Buffer(&mut weights),
        Arg::Buffer(&mut faults),
        Arg::I32(1),
    ];
    launch(&route::lower(op), args);
    let faults = to_ints(&faults);
    assert_eq!((faults[0], faults[2]), (0, 0));
    (to_ints(&experts), floats(&weights), faults[1])
}

#[test]
fn routes_are_those_of_the_reference() {
    for (count, chosen) in [(1, 1), (6, 2), (8, 8), (33, 4), (128, 8), (260, 7)] {
        for (score, normalise, scale, corrected) in [
            (Score::Softmax, true, 1.0, false),
            (Score::Softmax, false, 1.0, false),
            (Score::Sigmoid, true, 2.5, true),
            (Score::Sigmoid, false, 0.3, false),
        ] {
            let routing = Routing { chosen, score, normalise, scale };
            let span = Span { first: 2, stride: count as u32 + 3 };
            let op = Route { experts: count as u32, batch: 3, scores: span, routing, corrected };
            let mut scores: Vec<f32> = random(1, 2 + 3 * (count + 3)).iter().map(|v| v * 30.0).collect();
            // Equal ones, and one that is far above the others.
            scores[2..2 + count].fill(0.25);
            scores[2 + count + 3] = 1e30;
            let correction = corrected.then(|| random(2, count));
            let (experts, weights, fault) = routed(&op, &scores, correction.as_deref());
            let chosen =
                (0..3).flat_map(|t| routing.choose(&scores[2 + t * (count + 3)..][..count], correction.as_deref()));
            let expected: Vec<(i32, f32)> = chosen.map(|(e, w)| (e as i32, w)).collect();
            let found: Vec<(i32, f32)> = experts.into_iter().zip(weights).collect();
            assert_eq!((found, fault), (expected, 0), "{op:?}");
        }
    }
}

#[test]
fn scores_that_are_no_numbers_are_a_fault_and_choose_some_experts_all_the_same() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let routing = Routing { chosen: 3, score: Score::Softmax, normalise: true, scale: 1.0 };
        let op = Route { experts: 5, batch: 2, scores: Span::rows(5), routing, corrected: false };
        let mut scores = random(3, 10);
        scores[7] = bad;
        let (experts, _, fault) = routed(&op, &scores, None);
        assert_eq!(fault, 1, "{bad}");
        for of_token in experts.chunks(3) {
            assert!(of_token.is_sorted_by(|a, b| a < b) && (0..5).contains(&of_token[0]) && of_token[2] < 5, "{bad}");
        }
    }
}

#[test]
fn units_hold_every_pair_once() {
    let all_to_one: fn(usize, usize) -> usize = |_, _| 2;
    let spread: fn(usize, usize) -> usize = |p, count| (p * p + 3 * p) % count;
    for (count, pairs, most) in [(3, 1, 2), (5, 40, 4), (128, 4096, 64), (7, 2000, 128), (200, 64, 4), (1500, 33, 8)] {
        for expert_of in [all_to_one, spread] {
            let experts: Vec<i32> = (0..pairs).map(|p| expert_of(p, count) as i32).collect();
            let op = Group { count: count as u32, pairs: pairs as u32, most };
            let len = units(op.count, op.pairs, most) as usize;
            let (mut sorted, mut made) = (ints(&vec![-1; pairs]), ints(&vec![-1; 4 * len]));
            let args = &mut [Arg::ReadOnly(&ints(&experts)), Arg::Buffer(&mut sorted), Arg::Buffer(&mut made)];
            launch(&group::lower(&op), args);
            let (sorted, mut seen) = (to_ints(&sorted), vec![0; pairs]);
            let mut full = true;
            for unit in to_ints(&made).chunks(4) {
                let [expert, first, n, 0] = *unit else { panic!("{unit:?}") };
                assert!((0..=most as i32).contains(&n) && (full || n == 0), "{op:?}: {unit:?}");
                full = n > 0;
                for &pair in &sorted[first as usize..(first + n) as usize] {
                    assert_eq!(experts[pair as usize], expert, "{op:?}");
                    seen[pair as usize] += 1;
                }
            }
            assert_eq!(seen, vec![1; pairs], "{op:?}");
        }
    }
}

#[test]
fn units_are_of_about_as_many_pairs_as_an_expert_has() {
    let most = |tokens| [(2, 8), (8, 128)].map(|(chosen, count)| most_pairs(tokens, chosen, count));
    assert_eq!((most(1), most(2), most(8), most(64)), ([1, 1], [2, 2], [4, 4], [32, 8]));
    assert_eq!(most(2048), [128, 128]);
    assert_eq!((units(128, 8, 1), units(128, 64, 4), units(8, 4096, 128)), (8, 64, 40));
}

#[test]
fn gated_units_of_experts_equal_the_reference() {
    let clamped = Unit::Clamped { alpha: 1.702, limit: 7.0 };
    for (unit, biased) in [(Unit::Plain(Activation::Silu), false), (clamped, true), (clamped, false)] {
        let (gate, up) = (Span { first: 0, stride: 600 }, Span { first: 288, stride: 600 });
        let op = GateExperts { columns: 270, pairs: 3, count: 4, unit, gate, up, biased };
        let x: Vec<f32> = random(4, 1800).iter().map(|v| v * 20.0).collect();
        let biases = [random(5, 4 * 270), random(6, 4 * 270)];
        let experts = [3, 0, 3];
        let mut y = vec![0u8; 4 * 3 * 270];
        let input = bytes(&x);
        let args = &mut [
            Arg::ReadOnly(&input),
            Arg::ReadOnly(&input),
            Arg::ReadOnly(&bytes(&biases[0])),
            Arg::ReadOnly(&bytes(&biases[1])),
            Arg::ReadOnly(&ints(&experts)),
            Arg::Buffer(&mut y),
        ];
        launch(&unit::lower(&op), args);
        for (p, row) in floats(&y).chunks(270).enumerate() {
            for (i, y) in row.iter().enumerate() {
                let bias = |which: usize| biases[which][experts[p] as usize * 270 + i];
                let add = |v: f32, which| if biased { v + bias(which) } else { v };
                let expected = unit.apply(add(x[p * 600 + i], 0), add(x[p * 600 + 288 + i], 1));
                assert_eq!(*y, expected, "{op:?}");
            }
        }
    }
}

#[test]
fn sums_of_experts_are_in_their_order() {
    for (biased, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
        let (x, y) = (Span { first: 1, stride: 310 }, Span { first: 2, stride: 305 });
        let op = Combine { columns: 300, batch: 2, chosen: 3, count: 4, x, y, biased, accumulate };
        let (values, old, bias) = (random(7, 6 * 310 + 1), random(8, 612), random(9, 1200));
        let (experts, weights) = ([0, 2, 3, 0, 1, 2], random(10, 6));
        let mut out = bytes(&old);
        let args = &mut [
            Arg::ReadOnly(&bytes(&values)),
            Arg::ReadOnly(&bytes(&bias)),
            Arg::ReadOnly(&ints(&experts)),
            Arg::ReadOnly(&bytes(&weights)),
            Arg::Buffer(&mut out),
        ];
        launch(&combine::lower(&op), args);
        let out = floats(&out);
        for (t, i) in (0..2).flat_map(|t| (0..300).map(move |i| (t, i))) {
            let mut sum = 0.0;
            for p in 3 * t..3 * t + 3 {
                let v = values[1 + p * 310 + i];
                sum += weights[p] * if biased { v + bias[experts[p] as usize * 300 + i] } else { v };
            }
            let at = 2 + t * 305 + i;
            assert_eq!(out[at], if accumulate { old[at] + sum } else { sum }, "{op:?}");
        }
    }
}

#[test]
fn unquantized_products_of_experts_are_those_of_each_pair_alone() {
    for (rows, cols, tokens, chosen, most) in [(20, 96, 1, 3, 1), (9, 130, 6, 2, 4), (12, 37, 15, 1, 16)] {
        for (shared, matrices) in [(true, 4), (false, 3)] {
            let (count, pairs) = (4u32, tokens * chosen);
            let expert_of: Vec<i32> = (0..pairs).map(|p| ((p * 5 + p / 4) % 3) as i32).collect();
            let inputs = if shared { tokens } else { pairs };
            let experts = Experts { count, matrices, rows: inputs, pairs, most, stride: 24 };
            let (w, x) = (random(11, (matrices * rows * cols) as usize), random(12, (inputs * cols) as usize));
            let op = Dense {
                rows,
                cols,
                elem: Elem::F32,
                batch: most,
                x: Span::rows(cols),
                y: Span::rows(24),
                accumulate: false,
            };
            let group = Group { count, pairs, most };
            let (mut sorted, mut made) = (ints(&vec![0; pairs as usize]), ints(&vec![0; 4 * experts.units() as usize]));
            if most > 1 {
                let args = &mut [Arg::ReadOnly(&ints(&expert_of)), Arg::Buffer(&mut sorted), Arg::Buffer(&mut made)];
                launch(&group::lower(&group), args);
            } else {
                made = ints(&expert_of);
            }
            // Of the experts that there are the last is not among the launch's, if it has not all.
            let places = [2, -1, 0, 1];
            let place = |expert: i32| if matrices < count { places[expert as usize] } else { expert };
            let mut y = bytes(&vec![0.5; (pairs * 24) as usize]);
            let args = &mut [
                Arg::ReadOnly(&bytes(&w)),
                Arg::ReadOnly(&bytes(&x)),
                Arg::Buffer(&mut y),
                Arg::ReadOnly(&made),
                Arg::ReadOnly(&sorted),
                Arg::ReadOnly(&ints(&places)),
            ];
            launch(&dense::lower_for_experts(&op, &experts), args);
            for (p, row) in floats(&y).chunks(24).enumerate() {
                let x = &x[p / (pairs / inputs) as usize * cols as usize..][..cols as usize];
                for (r, y) in row.iter().enumerate() {
                    let place = place(expert_of[p]);
                    let twin = || {
                        let stored = place as usize * rows as usize + r;
                        dense::reference(&w[stored * cols as usize..][..cols as usize], x)
                    };
                    let written = place >= 0 && r < rows as usize;
                    assert_eq!(*y, if written { twin() } else { 0.5 }, "{experts:?} pair {p} row {r}");
                }
            }
        }
    }
}

//! The choice of each token's experts from the router's scores.

use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V};
use crate::kernels::Span;
use crate::kernels::math::exp;
use crate::reference::INFINITY_BITS;
use crate::reference::routing::{Routing, Score};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// Experts, at most [`MOST`].
    pub experts: u32,
    /// Tokens.
    pub batch: u32,
    /// Where a token's scores lie.
    pub scores: Span,
    /// How its experts follow from them.
    pub routing: Routing,
    /// Whether something is added to what scores become, for choosing.
    pub corrected: bool,
}

/// Most experts of a mixture: each has a thread.
pub const MOST: u32 = 1024;

/// Makes the kernel, the twin of [`Routing::choose`]. A block takes a token, a thread an expert. Its parameters, in order:
///
/// * `scores`: `f32`;
/// * `correction`: `f32`, one an expert; read only if there is one;
/// * `experts`: `i32`, `batch × chosen`, in ascending order for each token, whatever the scores are;
/// * `weights`: `f32`, of each of them;
/// * `faults`: `i32`, one a layer of the model: that of `layer` becomes 1 if a score is not finite;
/// * `layer`: `i32`, the place in `faults`.
pub fn lower(op: &Route) -> Kernel {
    let (count, chosen) = (op.experts, op.routing.chosen as u32);
    assert!((1..=MOST).contains(&count) && (1..=count).contains(&chosen), "experts");
    let name = format!("route_{chosen}_of_{count}_b{}", op.batch);
    let b = Builder::new(&name, [op.batch, 1], count.next_multiple_of(32));
    b.doc(format!("The {chosen} experts, of {count}, of {} token(s).", op.batch));
    b.dependent_launch();
    let scores = b.sized("scores", Elem::F32, false, op.scores.len(op.batch, count));
    let correction = b.sized("correction", Elem::F32, false, if op.corrected { count.into() } else { 0 });
    let pairs = u64::from(op.batch) * u64::from(chosen);
    let experts = b.sized("experts", Elem::I32, true, pairs);
    let weights = b.sized("weights", Elem::F32, true, pairs);
    let faults = b.buffer("faults", Elem::I32, true);
    let layer = b.scalar("layer", Scalar::I32);
    let raw = b.shared("raw", Elem::F32, count);
    let values = b.shared("values", Elem::F32, count);
    let ranks = b.shared("ranks", Elem::I32, count);
    let taken = b.shared("taken", Elem::I32, count);
    let (token, thread) = (b.special(Special::BlockX), b.special(Special::Thread));
    b.grid_wait();
    b.grid_launch();
    // Threads beyond the last expert repeat it, and write nothing.
    let (own, exists) = (thread.min(count - 1), thread.lt(count));
    let keep = |mem: Mem, v: V<'_>, elem: Elem| {
        if count.is_multiple_of(32) {
            b.store(mem, thread, v, elem)
        } else {
            b.if_(exists, || b.store(mem, thread, v, elem))
        }
    };
    let score = b.load_as(scores, op.scores.at(token) + own, Elem::F32, 1, Cache::ReadOnly);
    keep(raw, score, Elem::F32);
    b.barrier();
    let (largest, magnitude) = (b.var(b.f32(f32::NEG_INFINITY)), b.var(b.u32(0)));
    each(&b, raw, Elem::F32, count, |_, v| {
        b.set(largest, b.get(largest).max(v));
        b.set(magnitude, b.get(magnitude).max(v.bits(Scalar::U32) & (i32::MAX as u32)));
    });
    b.if_(thread.eq(0) & b.get(magnitude).ge(INFINITY_BITS), || b.store(faults, layer, b.i32(1), Elem::I32));
    let value = match op.routing.score {
        Score::Softmax => {
            let power = exp(&b, score - b.get(largest));
            keep(values, power, Elem::F32);
            b.barrier();
            let sum = b.var(b.f32(0.0));
            each(&b, values, Elem::F32, count, |_, v| b.set(sum, b.get(sum) + v));
            let value = power / b.get(sum);
            // All have read before a value takes the place of a power.
            b.barrier();
            value
        }
        Score::Sigmoid => b.f32(1.0) / (exp(&b, -score) + 1.0),
    };
    keep(values, value, Elem::F32);
    let added = if op.corrected { b.load_as(correction, own, Elem::F32, 1, Cache::ReadOnly) } else { b.f32(0.0) };
    let rank = ordered(value + added);
    keep(ranks, rank, Elem::I32);
    b.barrier();
    let better = b.var(b.i32(0));
    each(&b, ranks, Elem::I32, count, |i, v| {
        let before = v.gt(rank) | (v.eq(rank) & i.lt(own));
        b.set(better, b.get(better) + before.select(b.i32(1), 0));
    });
    let is_chosen = b.get(better).lt(chosen);
    keep(taken, is_chosen.select(b.i32(1), 0), Elem::I32);
    b.barrier();
    let (place, sum) = (b.var(b.i32(0)), b.var(b.f32(0.0)));
    each(&b, taken, Elem::I32, count, |i, v| {
        b.set(place, b.get(place) + i.lt(own).select(v, 0));
        if op.routing.normalise {
            b.if_(v.eq(1), || b.set(sum, b.get(sum) + b.load(values, i, Elem::F32)));
        }
    });
    b.if_(exists & is_chosen, || {
        let at = token * chosen + b.get(place);
        let share = if op.routing.normalise { value / b.get(sum) } else { value };
        b.store(experts, at, own, Elem::I32);
        b.store(weights, at, share * op.routing.scale, Elem::F32);
    });
    b.finish()
}

/// For each of `len` elements of a shared array, in order: `f` of its index and value.
fn each<'b>(b: &'b Builder, mem: Mem, elem: Elem, len: u32, f: impl Fn(V<'b>, V<'b>)) {
    let wide = if len.is_multiple_of(4) { 4 } else { 1 };
    b.for_(0, len, wide, |first| {
        let all = b.load_as(mem, first, elem, wide, Cache::Default).lanes();
        all.into_iter().zip(0u32..).for_each(|(v, i)| f(first + i, v));
    });
}

/// An integer that is larger for a larger number, in the order of `f32::total_cmp`.
fn ordered(v: V<'_>) -> V<'_> {
    let bits = v.bits(Scalar::I32);
    bits ^ ((bits >> 31) & i32::MAX)
}

//! The likeliest token of each row of logits.

use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Scalar, Special, V};
use crate::reference::INFINITY_BITS;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Argmax {
    /// Logits of a row.
    pub columns: u32,
    /// Rows.
    pub batch: u32,
    /// Where they lie.
    pub logits: Span,
}

const THREADS: u32 = 1024;
/// Loads that a thread has in flight.
const AHEAD: u32 = 4;

/// Makes the kernel. Its parameters, in order:
///
/// * `logits`: `f32`;
/// * `best`: `i32`, one a row: the first of the largest finite logits; −1 if one is not a number, or none is finite.
pub fn lower(op: &Argmax) -> Kernel {
    let b = Builder::new(&format!("argmax_{}_b{}", op.columns, op.batch), [op.batch, 1], THREADS);
    b.doc(format!("First of the largest of {} logits, {} row(s).", op.columns, op.batch));
    b.dependent_launch();
    let logits = b.sized("logits", Elem::F32, false, op.logits.len(op.batch, op.columns));
    let best = b.sized("best", Elem::I32, true, op.batch.into());
    let (of_warps, where_) = (b.shared("of_warps", Elem::U32, 32), b.shared("where", Elem::I32, 32));
    let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
    let row = b.special(Special::BlockX);
    b.grid_wait();
    b.grid_launch();
    let from = op.logits.at(row);
    let aligned = op.logits.first.is_multiple_of(4) && (op.batch == 1 || op.logits.stride.is_multiple_of(4));
    let width = if aligned && op.columns.is_multiple_of(4) { 4 } else { 1 };
    let (most, at) = (b.var(b.u32(0)), b.var(b.i32(0)));
    b.for_(thread * width, op.columns, AHEAD * THREADS * width, |first| {
        // Past the last the last are read again, which changes nothing.
        let at_of = |k: u32| (first + k * THREADS * width).min(op.columns - width);
        let starts: Vec<V> = (0..AHEAD).map(at_of).collect();
        let loaded: Vec<V> =
            starts.iter().map(|&i| b.load_as(logits, from + i, Elem::F32, width, Cache::Default)).collect();
        for (&start, v) in starts.iter().zip(&loaded) {
            for j in 0..width {
                let key = ordered(&b, v.lane(j));
                b.if_(key.gt(b.get(most)), || {
                    b.set(most, key);
                    b.set(at, start + j);
                });
            }
        }
    });
    let (v, i) = first_largest(b.get(most), b.get(at));
    b.if_(lane.eq(0), || {
        b.store(of_warps, warp, v, Elem::U32);
        b.store(where_, warp, i, Elem::I32);
    });
    b.barrier();
    b.if_(warp.eq(0), || {
        let (v, i) = first_largest(b.load(of_warps, lane, Elem::U32), b.load(where_, lane, Elem::I32));
        let none = v.eq(0) | v.eq(u32::MAX);
        b.if_(lane.eq(0), || b.store(best, row, none.select(b.i32(-1), i), Elem::I32));
    });
    b.finish()
}

/// A word that is larger for a larger finite logit: 0 for infinite ones, more than any for what is not a number.
pub(super) fn ordered<'b>(b: &'b Builder, v: V<'b>) -> V<'b> {
    let bits = v.bits(Scalar::U32);
    let magnitude = bits & (i32::MAX as u32);
    let flip = bits.ge(1u32 << 31).select(b.u32(u32::MAX), 1u32 << 31);
    // Zeros are equal.
    let word = magnitude.eq(0).select(b.u32(1 << 31), bits ^ flip);
    let finite = magnitude.lt(INFINITY_BITS).select(word, 0u32);
    magnitude.gt(INFINITY_BITS).select(b.u32(u32::MAX), finite)
}

/// The largest of the lanes' words and the smallest index that has it.
fn first_largest<'b>(v: V<'b>, i: V<'b>) -> (V<'b>, V<'b>) {
    let most = v.max_across();
    let index = !v.eq(most).select(!i.bits(Scalar::U32), 0u32).max_across();
    (most, index.bits(Scalar::I32))
}

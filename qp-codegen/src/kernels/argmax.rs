//! The likeliest token of each row of logits.

use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Scalar, Special, V};

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
/// Bits of an infinity.
const INFINITY: u32 = 0x7f80_0000;

/// Makes the kernel. Its parameters, in order:
///
/// * `logits`: `f32`;
/// * `best`: `i32`, one a row: the first of the largest finite logits; −1 if one is not a number, or none is finite.
pub fn lower(op: &Argmax) -> Kernel {
    let b = Builder::new(&format!("argmax_{}_b{}", op.columns, op.batch), [op.batch, 1], THREADS);
    b.doc(format!("First of the largest of {} logits, {} row(s).", op.columns, op.batch));
    b.dependent_launch();
    let logits = b.buffer("logits", Elem::F32, false);
    let best = b.buffer("best", Elem::I32, true);
    let (of_warps, where_) = (b.shared("of_warps", Elem::F32, 32), b.shared("where", Elem::I32, 32));
    let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
    let row = b.special(Special::BlockX);
    b.grid_wait();
    b.grid_launch();
    let (most, at) = (b.var(b.f32(f32::MIN)), b.var(b.i32(-1)));
    b.for_(thread, op.columns, THREADS, |i| {
        let v = b.load(logits, op.logits.at(row) + i, Elem::F32);
        let magnitude = v.bits(Scalar::U32) & 0x7fff_ffff;
        b.if_(magnitude.lt(INFINITY) & v.gt(b.get(most)), || {
            b.set(most, v);
            b.set(at, i);
        });
        // What is not a number beats all numbers, at the first index.
        b.if_(magnitude.gt(INFINITY), || {
            b.set(most, b.f32(f32::MAX));
            b.set(at, b.i32(-1));
        });
    });
    let (v, i) = first_largest(b.get(most), b.get(at));
    b.if_(lane.eq(0), || {
        b.store(of_warps, warp, v, Elem::F32);
        b.store(where_, warp, i, Elem::I32);
    });
    b.barrier();
    b.if_(warp.eq(0), || {
        let (_, i) = first_largest(b.load(of_warps, lane, Elem::F32), b.load(where_, lane, Elem::I32));
        b.if_(lane.eq(0), || b.store(best, row, i, Elem::I32));
    });
    b.finish()
}

/// The largest of the lanes' values and the smallest index that has it.
fn first_largest<'b>(mut v: V<'b>, mut i: V<'b>) -> (V<'b>, V<'b>) {
    for mask in [16, 8, 4, 2, 1] {
        let (other, j) = (v.shuffle_xor(mask), i.shuffle_xor(mask));
        let take = other.gt(v) | (other.eq(v) & j.lt(i));
        (v, i) = (take.select(other, v), take.select(j, i));
    }
    (v, i)
}

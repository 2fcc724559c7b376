//! The likeliest token of each row of logits.

use super::span::Span;
use crate::cuda::Device;
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

impl Argmax {
    /// Blocks of the cluster that shares a row; 1 where there are no clusters.
    fn blocks(&self, device: &Device) -> u32 {
        device.cluster.min(self.columns.div_ceil(AHEAD * THREADS * 4).next_power_of_two())
    }

    /// Words of the buffer `scratch`, at least one.
    pub fn scratch(&self, device: &Device) -> usize {
        match self.blocks(device) {
            1 => 1,
            blocks => (2 * self.batch * blocks) as usize,
        }
    }
}

/// Makes the kernel. Its parameters, in order:
///
/// * `logits`: `f32`;
/// * `scratch`: 32-bit words, [`Argmax::scratch`] of them, of any contents;
/// * `best`: `i32`, one a row: the first of the largest finite logits; −1 if one is not a number, or none is finite.
pub fn lower(op: &Argmax, device: &Device) -> Kernel {
    let blocks = op.blocks(device);
    let name = format!("argmax_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.batch * blocks, 1], THREADS);
    b.doc(format!("First of the largest of {} logits, {} row(s).", op.columns, op.batch));
    b.cluster(blocks);
    b.dependent_launch();
    let logits = b.sized("logits", Elem::F32, false, op.logits.len(op.batch, op.columns));
    let scratch = b.sized("scratch", Elem::U32, true, op.scratch(device) as u64);
    let best = b.sized("best", Elem::I32, true, op.batch.into());
    let (of_warps, where_) = (b.shared("of_warps", Elem::U32, 32), b.shared("where", Elem::I32, 32));
    let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
    let (row, rank) = match blocks {
        1 => (b.special(Special::BlockX), b.i32(0)),
        _ => (b.special(Special::Cluster), b.special(Special::Rank)),
    };
    b.grid_wait();
    b.grid_launch();
    let from = op.logits.at(row);
    let aligned = op.logits.first.is_multiple_of(4) && (op.batch == 1 || op.logits.stride.is_multiple_of(4));
    let width = if aligned && op.columns.is_multiple_of(4) { 4 } else { 1 };
    let (most, at) = (b.var(b.u32(0)), b.var(b.i32(0)));
    let apart = blocks * THREADS * width;
    b.for_((rank * THREADS + thread) * width, op.columns, AHEAD * apart, |first| {
        // Past the last the last are read again, which changes nothing.
        let at_of = |k: u32| (first + k * apart).min(op.columns - width);
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
    let of_block = || first_largest(b.load(of_warps, lane, Elem::U32), b.load(where_, lane, Elem::I32));
    let write = |(v, i): (V, V)| {
        let none = v.eq(0) | v.eq(u32::MAX);
        b.if_(lane.eq(0), || b.store(best, row, none.select(b.i32(-1), i), Elem::I32));
    };
    if blocks == 1 {
        b.if_(warp.eq(0), || write(of_block()));
        return b.finish();
    }
    let place = row * blocks * 2;
    b.if_(warp.eq(0), || {
        let (v, i) = of_block();
        b.if_(lane.eq(0), || b.store(scratch, place + rank * 2, b.vector(&[v, i.bits(Scalar::U32)]), Elem::U32));
    });
    b.cluster_barrier();
    b.if_(rank.eq(0) & warp.eq(0), || {
        let two = b.load_as(scratch, place + lane.min(blocks - 1) * 2, Elem::U32, 2, Cache::Default).lanes();
        write(first_largest(two[0], two[1].bits(Scalar::I32)));
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

//! The mean of a row, summed in the order of [`crate::reference::mean`] and [`crate::reference::mean_square`]: four values a lane,
//! then the lanes of a group, then the groups.

use super::math::across_lanes;
use super::rotate::GROUP;
use crate::ir::{Builder, Elem, Mem, Special, V};

/// Groups of a row of `columns` values.
pub(super) fn groups(columns: u32) -> u32 {
    columns.div_ceil(GROUP)
}

/// Threads of a block that sums a row: a warp for each of its groups, as far as a block has warps.
pub(super) fn threads(columns: u32) -> u32 {
    groups(columns).min(32) * 32
}

/// Writes the sum of each group of `columns` values to `sums`, with [`threads`] threads; `value` is a column's. All threads see
/// them afterwards.
pub(super) fn sum_groups<'b>(b: &'b Builder, columns: u32, sums: Mem, value: impl Fn(V<'b>) -> V<'b>) {
    let lane = b.special(Special::Lane);
    b.for_(b.special(Special::Warp), groups(columns), threads(columns) / 32, |group| {
        let column = group * GROUP + lane * 4;
        let [p, q, r, s] = [0, 1, 2, 3].map(|j| {
            let v = b.var(b.f32(0.0));
            let set = || b.set(v, value(column + j));
            if columns.is_multiple_of(GROUP) {
                set()
            } else {
                b.if_((column + j).lt(columns), set)
            }
            b.get(v)
        });
        let sum = across_lanes((p + q) + (r + s), |a, b| a + b);
        b.if_(lane.eq(0), || b.store(sums, group, sum, Elem::F32));
    });
    b.barrier();
}

/// The mean of `columns` values whose groups' sums lie in `sums` from `first` on. Each warp computes it for itself.
pub(super) fn of_groups<'b>(b: &'b Builder, columns: u32, sums: Mem, first: V<'b>) -> V<'b> {
    let (lane, groups) = (b.special(Special::Lane), groups(columns));
    let sum = b.var(b.f32(0.0));
    for i in 0..groups.div_ceil(32) {
        let at = lane + i * 32;
        let add = || b.set(sum, b.get(sum) + b.load(sums, first + at, Elem::F32));
        if (i + 1) * 32 <= groups { add() } else { b.if_(at.lt(groups), add) }
    }
    across_lanes(b.get(sum), |a, b| a + b) / columns as f32
}

//! The frame of kernels in which each thread computes one value.

use crate::ir::{Builder, Special, V};

const THREADS: u32 = 256;

/// Begins a kernel with a thread for each of `columns` values of `batch` rows. Its name tells both; its buffers come next, then
/// [`compute`].
pub(super) fn begin(name: &str, columns: u32, batch: u32) -> Builder {
    let b = Builder::new(&format!("{name}_{columns}_b{batch}"), [columns.div_ceil(THREADS), batch], THREADS);
    b.dependent_launch();
    b
}

/// Computes each value by `one`, which is given its row and column.
pub(super) fn compute<'b>(b: &'b Builder, columns: u32, one: impl FnOnce(V<'b>, V<'b>)) {
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let row = b.special(Special::BlockY);
    b.if_(i.lt(columns), || one(row, i));
}

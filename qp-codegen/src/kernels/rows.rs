//! Chosen rows of a buffer: the tokens of a step whose logits are wanted.

use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Special};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows {
    /// Values of a row.
    pub columns: u32,
    /// Rows that are chosen.
    pub batch: u32,
    /// Where the rows lie from which they are chosen.
    pub x: Span,
    /// Where they go.
    pub y: Span,
}

const THREADS: u32 = 256;

/// Makes the kernel. Its parameters, in order:
///
/// * `rows`: `i32`, which rows, `batch` of them;
/// * `x`, `y`: `f32`.
pub fn lower(op: &Rows) -> Kernel {
    let name = format!("rows_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("{} chosen row(s) of {} columns.", op.batch, op.columns));
    b.dependent_launch();
    let rows = b.sized("rows", Elem::I32, false, op.batch.into());
    // How many rows there are to choose from is the caller's business.
    let x = b.buffer("x", Elem::F32, false);
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let row = b.load(rows, t, Elem::I32);
        b.store(y, op.y.at(t) + i, b.load(x, op.x.at(row) + i, Elem::F32), Elem::F32);
    });
    b.finish()
}

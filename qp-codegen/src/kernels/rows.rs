//! Chosen rows of a buffer: the tokens of a step whose logits are wanted.

use super::each;
use super::span::Span;
use crate::ir::{Elem, Kernel};

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

/// Makes the kernel. Its parameters, in order:
///
/// * `rows`: `i32`, which rows, `batch` of them;
/// * `x`, `y`: `f32`.
pub fn lower(op: &Rows) -> Kernel {
    let b = each::begin("rows", op.columns, op.batch);
    b.doc(format!("{} chosen row(s) of {} columns.", op.batch, op.columns));
    let rows = b.sized("rows", Elem::I32, false, op.batch.into());
    // How many rows there are to choose from is the caller's business.
    let x = b.buffer("x", Elem::F32, false);
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    each::compute(&b, op.columns, |place, i| {
        let row = b.load(rows, place, Elem::I32);
        b.store(y, op.y.at(place) + i, b.load(x, op.x.at(row) + i, Elem::F32), Elem::F32);
    });
    b.finish()
}

//! Embedding: a row of a table for each token.

use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Special};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embed {
    /// Values of a row.
    pub columns: u32,
    /// Element type of the table: `F16`, `BF16` or `F32`.
    pub elem: Elem,
    /// Tokens.
    pub batch: u32,
    /// Rows of the result.
    pub y: Span,
}

const THREADS: u32 = 256;

/// Makes the kernel. Its parameters, in order:
///
/// * `tokens`: `i32`, one a token; negative ones (no likeliest token was found) count as 0;
/// * `table`: `vocabulary × columns`;
/// * `y`: `f32`.
pub fn lower(op: &Embed) -> Kernel {
    let name = format!("embed_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("Embedding of {} token(s), {} columns.", op.batch, op.columns));
    b.dependent_launch();
    let tokens = b.sized("tokens", Elem::I32, false, op.batch.into());
    let table = b.buffer("table", op.elem, false);
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let row = b.load(tokens, t, Elem::I32).max(0);
        b.store(y, op.y.at(t) + i, b.load(table, row * op.columns + i, op.elem), Elem::F32);
    });
    b.finish()
}

//! Adds to a buffer what lies in another: a bias, or a layer's output to the residual stream.

use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Special};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Add {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// What is added; a stride of 0 adds the same to every token.
    pub x: Span,
    /// To what.
    pub y: Span,
}

const THREADS: u32 = 256;

/// Makes the kernel. Its parameters, in order: `x` and `y`, both `f32`.
pub fn lower(op: &Add) -> Kernel {
    let name = format!("add_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("y += x, {} columns of {} token(s).", op.columns, op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let at = op.y.at(t) + i;
        b.store(y, at, b.load(y, at, Elem::F32) + b.load(x, op.x.at(t) + i, Elem::F32), Elem::F32);
    });
    b.finish()
}

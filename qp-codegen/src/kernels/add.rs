//! Adds to a buffer what lies in another: a bias, or a layer's output to the residual stream.

use super::each;
use super::span::Span;
use crate::ir::{Elem, Kernel};

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

/// Makes the kernel. Its parameters, in order: `x` and `y`, both `f32`.
pub fn lower(op: &Add) -> Kernel {
    let b = each::begin("add", op.columns, op.batch);
    b.doc(format!("y += x, {} columns of {} token(s).", op.columns, op.batch));
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    each::compute(&b, op.columns, |token, i| {
        let at = op.y.at(token) + i;
        b.store(y, at, b.load(y, at, Elem::F32) + b.load(x, op.x.at(token) + i, Elem::F32), Elem::F32);
    });
    b.finish()
}

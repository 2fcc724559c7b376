//! Root-mean-square norm, for inputs that no quantized layer takes (before those it is part of [`super::prepare`]).

use super::prepare::inverse_norm;
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Special};
use crate::reference::MEAN_LANES;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// Where they lie.
    pub x: Span,
    /// Added to the mean square.
    pub eps: f32,
}

/// Makes the kernel, the twin of [`crate::reference::rms_norm`]. Its parameters, in order:
///
/// * `x`: `f32`;
/// * `norm`: `f32`, `columns` weights;
/// * `y`: `f32`, `batch × columns`.
pub fn lower(op: &Norm) -> Kernel {
    let threads = MEAN_LANES as u32;
    let b = Builder::new(&format!("norm_{}_b{}", op.columns, op.batch), [op.batch, 1], threads);
    b.doc(format!("Norm of {} columns of {} token(s).", op.columns, op.batch));
    b.dependent_launch();
    let x = b.buffer("x", Elem::F32, false);
    let norm = b.buffer("norm", Elem::F32, false);
    let y = b.buffer("y", Elem::F32, true);
    let (thread, token) = (b.special(Special::Thread), b.special(Special::BlockX));
    b.grid_wait();
    b.grid_launch();
    let from = op.x.at(token);
    let inverse = inverse_norm(&b, op.columns, x, from, op.eps);
    b.for_(thread, op.columns, threads, |i| {
        let v = b.load(x, from + i, Elem::F32) * inverse * b.load_as(norm, i, Elem::F32, 1, Cache::ReadOnly);
        b.store(y, token * op.columns + i, v, Elem::F32);
    });
    b.finish()
}

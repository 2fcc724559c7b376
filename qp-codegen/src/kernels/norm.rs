//! Root-mean-square norm, for inputs that no quantized layer takes (before those it is part of [`super::prepare`]).

use super::mean;
use super::prepare::inverse_norm;
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Special};
use crate::reference::RmsNorm;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// Where they lie.
    pub x: Span,
    /// The norm.
    pub norm: RmsNorm,
}

/// Makes the kernel, the twin of [`RmsNorm::apply`]. Its parameters, in order:
///
/// * `x`: `f32`;
/// * `norm`: `f32`, `columns` weights;
/// * `y`: `f32`, `batch × columns`.
pub fn lower(op: &Norm) -> Kernel {
    let (n, threads) = (op.columns, mean::threads(op.columns));
    let b = Builder::new(&format!("norm_{n}_b{}", op.batch), [op.batch, 1], threads);
    b.doc(format!("Norm of {n} columns of {} token(s).", op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, n));
    let norm = b.sized("norm", Elem::F32, false, n.into());
    let y = b.sized("y", Elem::F32, true, u64::from(op.batch) * u64::from(n));
    let sums = b.shared("squares", Elem::F32, mean::groups(n));
    let token = b.special(Special::BlockX);
    b.grid_wait();
    b.grid_launch();
    let from = op.x.at(token);
    mean::sum_groups(&b, n, sums, |column| {
        let v = b.load(x, from + column, Elem::F32);
        v * v
    });
    let inverse = inverse_norm(&b, mean::of_groups(&b, n, sums, b.i32(0)), op.norm.eps);
    b.for_(b.special(Special::Thread), n, threads, |i| {
        let weight = b.load_as(norm, i, Elem::F32, 1, Cache::ReadOnly);
        let weight = if op.norm.add_one { weight + 1.0 } else { weight };
        let v = b.load(x, from + i, Elem::F32) * inverse * weight;
        b.store(y, token * n + i, v, Elem::F32);
    });
    b.finish()
}

//! Root-mean-square norm, for inputs that no quantized layer takes (before those it is part of [`super::prepare`]).

use super::math::across_lanes;
use super::prepare::inverse_norm;
use super::rotate::GROUP;
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
    let (n, groups) = (op.columns, op.columns.div_ceil(GROUP));
    let threads = groups.min(32) * 32;
    let b = Builder::new(&format!("norm_{n}_b{}", op.batch), [op.batch, 1], threads);
    b.doc(format!("Norm of {n} columns of {} token(s).", op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, n));
    let norm = b.sized("norm", Elem::F32, false, n.into());
    let y = b.sized("y", Elem::F32, true, u64::from(op.batch) * u64::from(n));
    let sums = b.shared("squares", Elem::F32, groups);
    let (lane, token) = (b.special(Special::Lane), b.special(Special::BlockX));
    b.grid_wait();
    b.grid_launch();
    let from = op.x.at(token);
    b.for_(b.special(Special::Warp), groups, threads / 32, |group| {
        let column = group * GROUP + lane * 4;
        let [p, q, r, s] = [0, 1, 2, 3].map(|j| {
            let square = b.var(b.f32(0.0));
            let set = || {
                let v = b.load(x, from + column + j, Elem::F32);
                b.set(square, v * v);
            };
            if n.is_multiple_of(GROUP) {
                set()
            } else {
                b.if_((column + j).lt(n), set)
            }
            b.get(square)
        });
        let sum = across_lanes((p + q) + (r + s), |a, b| a + b);
        b.if_(lane.eq(0), || b.store(sums, group, sum, Elem::F32));
    });
    b.barrier();
    let inverse = inverse_norm(&b, sums, b.i32(0), [n, groups], op.norm.eps);
    b.for_(b.special(Special::Thread), n, threads, |i| {
        let weight = b.load_as(norm, i, Elem::F32, 1, Cache::ReadOnly);
        let weight = if op.norm.add_one { weight + 1.0 } else { weight };
        let v = b.load(x, from + i, Elem::F32) * inverse * weight;
        b.store(y, token * n + i, v, Elem::F32);
    });
    b.finish()
}

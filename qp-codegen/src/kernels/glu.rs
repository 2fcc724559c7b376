//! The gated unit before layers that are not quantized: `activation(gate) · up`. Before quantized ones it is part of
//! [`super::prepare`].

use super::each;
use super::math::activation;
use super::span::Span;
use crate::ir::{Elem, Kernel};
use crate::reference::Activation;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Glu {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// Applied to the gates.
    pub activation: Activation,
    /// Where a token's gates lie.
    pub gate: Span,
    /// Where the values lie that they gate.
    pub up: Span,
}

/// Makes the kernel. Its parameters, in order:
///
/// * `gate`, `up`: `f32`;
/// * `y`: `f32`, `batch × columns`.
pub fn lower(op: &Glu) -> Kernel {
    let b = each::begin("glu", op.columns, op.batch);
    b.doc(format!("Gated unit, {} columns of {} token(s).", op.columns, op.batch));
    let gate = b.sized("gate", Elem::F32, false, op.gate.len(op.batch, op.columns));
    let up = b.sized("up", Elem::F32, false, op.up.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, u64::from(op.batch) * u64::from(op.columns));
    each::compute(&b, op.columns, |token, i| {
        let g = activation(&b, op.activation, b.load(gate, op.gate.at(token) + i, Elem::F32));
        let v = g * b.load(up, op.up.at(token) + i, Elem::F32);
        b.store(y, token * op.columns + i, v, Elem::F32);
    });
    b.finish()
}

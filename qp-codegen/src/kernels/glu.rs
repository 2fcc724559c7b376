//! The gated unit before layers that are not quantized: `activation(gate) · up`. Before quantized ones it is part of
//! [`super::prepare`].

use super::math::activation;
use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Special};
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

const THREADS: u32 = 256;

/// Makes the kernel. Its parameters, in order:
///
/// * `gate`, `up`: `f32`;
/// * `y`: `f32`, `batch × columns`.
pub fn lower(op: &Glu) -> Kernel {
    let name = format!("glu_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("Gated unit, {} columns of {} token(s).", op.columns, op.batch));
    b.dependent_launch();
    let gate = b.sized("gate", Elem::F32, false, op.gate.len(op.batch, op.columns));
    let up = b.sized("up", Elem::F32, false, op.up.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, u64::from(op.batch) * u64::from(op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let g = activation(&b, op.activation, b.load(gate, op.gate.at(t) + i, Elem::F32));
        let v = g * b.load(up, op.up.at(t) + i, Elem::F32);
        b.store(y, t * op.columns + i, v, Elem::F32);
    });
    b.finish()
}

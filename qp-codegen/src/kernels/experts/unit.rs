//! The gated unit of experts, where it is not part of [`crate::kernels::prepare`]: units with limits, biases of experts, and
//! layers behind it that are not quantized.

use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Special, V};
use crate::kernels::Span;
use crate::kernels::math::{activation, exp};
use crate::reference::routing::Unit;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateExperts {
    /// Values of a pair.
    pub columns: u32,
    /// Pairs.
    pub pairs: u32,
    /// Experts of the mixture.
    pub count: u32,
    /// The unit.
    pub unit: Unit,
    /// Where a pair's gates lie.
    pub gate: Span,
    /// Where the values lie that they gate.
    pub up: Span,
    /// Whether experts' biases are added to both before.
    pub biased: bool,
}

const THREADS: u32 = 256;

/// Makes the kernel, the twin of [`Unit::apply`]. Its parameters, in order:
///
/// * `gate`, `up`: `f32`;
/// * `gate_bias`, `up_bias`: `f32`, experts × columns; read only if there are biases;
/// * `experts`: `i32`, the expert of each pair; read only then;
/// * `y`: `f32`, pairs × columns.
pub fn lower(op: &GateExperts) -> Kernel {
    let name = format!("gate_experts_{}_b{}", op.columns, op.pairs);
    let b = Builder::new(&name, [op.pairs, op.columns.div_ceil(THREADS)], THREADS);
    b.doc(format!("Gated unit of experts, {} columns of {} pair(s).", op.columns, op.pairs));
    b.dependent_launch();
    let gate = b.sized("gate", Elem::F32, false, op.gate.len(op.pairs, op.columns));
    let up = b.sized("up", Elem::F32, false, op.up.len(op.pairs, op.columns));
    let biases = u64::from(op.biased) * u64::from(op.count) * u64::from(op.columns);
    let gate_bias = b.sized("gate_bias", Elem::F32, false, biases);
    let up_bias = b.sized("up_bias", Elem::F32, false, biases);
    let experts = b.sized("experts", Elem::I32, false, u64::from(op.biased) * u64::from(op.pairs));
    let y = b.sized("y", Elem::F32, true, u64::from(op.pairs) * u64::from(op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockY) * THREADS + b.special(Special::Thread);
    let pair = b.special(Special::BlockX);
    b.if_(i.lt(op.columns), || {
        let of = |mem: Mem, span: Span, bias: Mem| {
            let v = b.load(mem, span.at(pair) + i, Elem::F32);
            if !op.biased {
                return v;
            }
            let expert = b.load_as(experts, pair, Elem::I32, 1, Cache::ReadOnly);
            v + b.load_as(bias, expert * op.columns + i, Elem::F32, 1, Cache::ReadOnly)
        };
        let (gate, up) = (of(gate, op.gate, gate_bias), of(up, op.up, up_bias));
        b.store(y, pair * op.columns + i, gated(&b, op.unit, gate, up), Elem::F32);
    });
    b.finish()
}

fn gated<'b>(b: &'b Builder, unit: Unit, gate: V<'b>, up: V<'b>) -> V<'b> {
    match unit {
        Unit::Plain(f) => activation(b, f, gate) * up,
        Unit::Clamped { alpha, limit } => {
            let gate = gate.gt(limit).select(b.f32(limit), gate);
            let up = up.gt(limit).select(b.f32(limit), up);
            let up = up.lt(-limit).select(b.f32(-limit), up);
            gate / (exp(b, gate * -alpha) + 1.0) * (up + 1.0)
        }
    }
}

//! The weighted sum of what a token's experts give.

use crate::ir::{Builder, Cache, Elem, Kernel, Special};
use crate::kernels::Span;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Combine {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// Experts that a token goes through.
    pub chosen: u32,
    /// Experts of the mixture.
    pub count: u32,
    /// Where a pair's values lie.
    pub x: Span,
    /// Where a token's sum goes.
    pub y: Span,
    /// Whether experts' biases are added to the values first.
    pub biased: bool,
    /// Add the sum to what is there instead of overwriting it.
    pub accumulate: bool,
}

const THREADS: u32 = 256;

/// Makes the kernel. The sum begins with 0 and is in the order of the experts. Its parameters, in order:
///
/// * `x`: `f32`, a row a pair;
/// * `bias`: `f32`, experts × columns; read only if there are biases;
/// * `experts`: `i32`, the expert of each pair; read only then;
/// * `weights`: `f32`, the weight of each pair;
/// * `y`: `f32`, a row a token.
pub fn lower(op: &Combine) -> Kernel {
    let name = format!("combine_{}x{}_b{}", op.chosen, op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    let add = if op.accumulate { "+" } else { "" };
    b.doc(format!("y {add}= what {} experts give, {} columns of {} token(s).", op.chosen, op.columns, op.batch));
    b.dependent_launch();
    let pairs = op.batch * op.chosen;
    let x = b.sized("x", Elem::F32, false, op.x.len(pairs, op.columns));
    let biases = u64::from(op.biased) * u64::from(op.count) * u64::from(op.columns);
    let bias = b.sized("bias", Elem::F32, false, biases);
    let experts = b.sized("experts", Elem::I32, false, u64::from(op.biased) * u64::from(pairs));
    let weights = b.sized("weights", Elem::F32, false, pairs.into());
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let token = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let sum = b.var(b.f32(0.0));
        b.for_(token * op.chosen, (token + 1) * op.chosen, 1, |pair| {
            let v = b.load(x, op.x.at(pair) + i, Elem::F32);
            let v = if op.biased {
                let expert = b.load_as(experts, pair, Elem::I32, 1, Cache::ReadOnly);
                v + b.load_as(bias, expert * op.columns + i, Elem::F32, 1, Cache::ReadOnly)
            } else {
                v
            };
            b.set(sum, b.get(sum) + b.load_as(weights, pair, Elem::F32, 1, Cache::ReadOnly) * v);
        });
        let at = op.y.at(token) + i;
        let sum = b.get(sum);
        b.store(y, at, if op.accumulate { b.load(y, at, Elem::F32) + sum } else { sum }, Elem::F32);
    });
    b.finish()
}

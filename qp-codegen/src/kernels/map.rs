//! Functions of rows of values: products with a number, soft caps, activations, and the subtraction of a row's mean.

use super::math::{across_lanes, activation, soft_cap};
use super::rotate::GROUP;
use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Special, V};
use crate::reference::Map as Function;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Map {
    /// Values of a row.
    pub columns: u32,
    /// Rows.
    pub batch: u32,
    /// Where they lie.
    pub x: Span,
    /// Where results go.
    pub y: Span,
    /// The function.
    pub function: Function,
}

const THREADS: u32 = 256;

/// Makes the kernel, the twin of [`Function::apply`]. Its parameters, in order: `x` and `y`, both `f32`.
pub fn lower(op: &Map) -> Kernel {
    match op.function {
        Function::Scale(by) => each(op, |_, v| v * by),
        Function::SoftCap(cap) => each(op, |b, v| soft_cap(b, v, cap)),
        Function::Activate(f) => each(op, |b, v| activation(b, f, v)),
        Function::Center => center(op),
    }
}

/// A function of each value by itself.
fn each(op: &Map, f: impl for<'b> Fn(&'b Builder, V<'b>) -> V<'b>) -> Kernel {
    let name = format!("map_{}_b{}", op.columns, op.batch);
    let b = Builder::new(&name, [op.columns.div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("{:?} of {} columns of {} row(s).", op.function, op.columns, op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    b.if_(i.lt(op.columns), || {
        let v = f(&b, b.load(x, op.x.at(t) + i, Elem::F32));
        b.store(y, op.y.at(t) + i, v, Elem::F32);
    });
    b.finish()
}

/// Subtracts each row's mean, which is summed in the order of [`crate::reference::mean`].
fn center(op: &Map) -> Kernel {
    let (n, groups) = (op.columns, op.columns.div_ceil(GROUP));
    let threads = groups.min(32) * 32;
    let b = Builder::new(&format!("center_{n}_b{}", op.batch), [op.batch, 1], threads);
    b.doc(format!("{n} columns of {} row(s) without their mean.", op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    let sums = b.shared("sums", Elem::F32, groups);
    let (lane, row) = (b.special(Special::Lane), b.special(Special::BlockX));
    b.grid_wait();
    b.grid_launch();
    let (from, to) = (op.x.at(row), op.y.at(row));
    b.for_(b.special(Special::Warp), groups, threads / 32, |group| {
        let column = group * GROUP + lane * 4;
        let [p, q, r, s] = [0, 1, 2, 3].map(|j| {
            let value = b.var(b.f32(0.0));
            let set = || b.set(value, b.load(x, from + column + j, Elem::F32));
            if n.is_multiple_of(GROUP) {
                set()
            } else {
                b.if_((column + j).lt(n), set)
            }
            b.get(value)
        });
        let sum = across_lanes((p + q) + (r + s), |a, b| a + b);
        b.if_(lane.eq(0), || b.store(sums, group, sum, Elem::F32));
    });
    b.barrier();
    let sum = b.var(b.f32(0.0));
    for i in 0..groups.div_ceil(32) {
        let at = lane + i * 32;
        let add = || b.set(sum, b.get(sum) + b.load(sums, at, Elem::F32));
        if (i + 1) * 32 <= groups { add() } else { b.if_(at.lt(groups), add) }
    }
    let mean = across_lanes(b.get(sum), |a, b| a + b) / n as f32;
    b.for_(b.special(Special::Thread), n, threads, |i| {
        b.store(y, to + i, b.load(x, from + i, Elem::F32) - mean, Elem::F32);
    });
    b.finish()
}

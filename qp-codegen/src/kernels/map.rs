//! Functions of rows of values: products with a number, soft caps, activations, and the subtraction of a row's mean.

use super::math::{activation, soft_cap};
use super::span::Span;
use super::{each, mean};
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
    let b = each::begin("map", op.columns, op.batch);
    b.doc(format!("{:?} of {} columns of {} row(s).", op.function, op.columns, op.batch));
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    each::compute(&b, op.columns, |row, i| {
        let v = f(&b, b.load(x, op.x.at(row) + i, Elem::F32));
        b.store(y, op.y.at(row) + i, v, Elem::F32);
    });
    b.finish()
}

/// Subtracts each row's mean.
fn center(op: &Map) -> Kernel {
    let (n, threads) = (op.columns, mean::threads(op.columns));
    let b = Builder::new(&format!("center_{n}_b{}", op.batch), [op.batch, 1], threads);
    b.doc(format!("{n} columns of {} row(s) without their mean.", op.batch));
    b.dependent_launch();
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.columns));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.columns));
    let sums = b.shared("sums", Elem::F32, mean::groups(n));
    let row = b.special(Special::BlockX);
    b.grid_wait();
    b.grid_launch();
    let (from, to) = (op.x.at(row), op.y.at(row));
    mean::sum_groups(&b, n, sums, |column| b.load(x, from + column, Elem::F32));
    let mean = mean::of_groups(&b, n, sums, b.i32(0));
    b.for_(b.special(Special::Thread), n, threads, |i| {
        b.store(y, to + i, b.load(x, from + i, Elem::F32) - mean, Elem::F32);
    });
    b.finish()
}

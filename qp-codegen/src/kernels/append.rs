//! The keys and values of new tokens: keys turned by their position (rotary embedding), both put into the cache.

use super::span::Span;
use crate::ir::{Builder, Elem, Kernel, Mem, Special, V};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Append {
    /// Heads of keys and values.
    pub heads: u32,
    /// Values of a head; even.
    pub head_dim: u32,
    /// Tokens.
    pub batch: u32,
    /// Where a token's keys lie, head after head.
    pub k: Span,
    /// Where its values lie.
    pub v: Span,
    /// Element type of the cache: `F16`, `BF16` or `F32`.
    pub cache: Elem,
}

/// Positions of a page of the cache.
pub const PAGE: u32 = 64;

const THREADS: u32 = 128;

/// Makes the kernel. Its parameters, in order:
///
/// * `k`, `v`: `f32`;
/// * `cos`, `sin`: `f32`, `positions × head_dim / 2`;
/// * `positions`: `i32`, one a token;
/// * `slots`: `i32`, where each goes: page · [`PAGE`] + offset; nowhere if negative;
/// * `keys`, `values`: the cache, `pages × heads × PAGE × head_dim`.
pub fn lower(op: &Append) -> Kernel {
    let d = op.head_dim;
    let half = d / 2;
    let name = format!("append_{}x{d}_b{}", op.heads, op.batch);
    let b = Builder::new(&name, [(op.heads * half).div_ceil(THREADS), op.batch], THREADS);
    b.doc(format!("Keys and values of {} token(s), {} heads of {d}, into pages.", op.batch, op.heads));
    b.dependent_launch();
    let (k, v) = (b.buffer("k", Elem::F32, false), b.buffer("v", Elem::F32, false));
    let (cos, sin) = (b.buffer("cos", Elem::F32, false), b.buffer("sin", Elem::F32, false));
    let (positions, slots) = (b.buffer("positions", Elem::I32, false), b.buffer("slots", Elem::I32, false));
    let (keys, values) = (b.buffer("keys", op.cache, true), b.buffer("values", op.cache, true));
    b.grid_wait();
    b.grid_launch();
    let i = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let t = b.special(Special::BlockY);
    let slot = b.load(slots, t, Elem::I32);
    b.if_(i.lt(op.heads * half) & slot.ge(0), || {
        let (head, pair) = (i / half, i % half);
        let at = b.load(positions, t, Elem::I32);
        let to = ((slot / PAGE * op.heads + head) * PAGE + slot % PAGE) * d + pair;
        let from = op.k.at(t) + head * d + pair;
        let turned = turn(&b, k, from, cos, sin, at * half + pair, half);
        b.store(keys, to, turned.0, op.cache);
        b.store(keys, to + half, turned.1, op.cache);
        let from = op.v.at(t) + head * d + pair;
        b.store(values, to, b.load(v, from, Elem::F32), op.cache);
        b.store(values, to + half, b.load(v, from + half, Elem::F32), op.cache);
    });
    b.finish()
}

/// The pair at `from` and `from + half` of `x`, turned by the angle at `angle` of the tables.
pub(super) fn turn<'b>(
    b: &'b Builder,
    x: Mem,
    from: V<'b>,
    cos: Mem,
    sin: Mem,
    angle: V<'b>,
    half: u32,
) -> (V<'b>, V<'b>) {
    let (x0, x1) = (b.load(x, from, Elem::F32), b.load(x, from + half, Elem::F32));
    let (c, s) = (b.load(cos, angle, Elem::F32), b.load(sin, angle, Elem::F32));
    (x0 * c - x1 * s, x1 * c + x0 * s)
}

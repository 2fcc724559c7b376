//! Attention of 1 to 8 new tokens against the cache of keys and values, their own included.
//!
//! A block takes one head of one token. Its warps take the positions 32 at a time in turn; a lane computes the score of
//! one position, then the warp adds up the weighted values, each lane some columns. Each warp keeps the largest score so
//! far and rescales what it has when that grows (online softmax); at the end the warps' parts are merged in order. So
//! the order of operations is fixed ([`reference`]), and results are equal to the bit on every device.

use super::append::{PAGE, turn};
use super::math::{across_lanes, across_lanes_reference, exp, exp_reference};
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Scalar, Special, V};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Heads of queries.
    pub heads: u32,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: u32,
    /// Values of a head; even.
    pub head_dim: u32,
    /// New tokens. Each sees the positions of its sequence up to its own.
    pub batch: u32,
    /// Where a token's queries lie, head after head, not yet turned.
    pub q: Span,
    /// Element type of the cache.
    pub cache: Elem,
}

/// Warps of a block, part of the order of operations.
const WARPS: usize = 8;
/// Positions that a warp takes at once: one a lane.
const LANES: usize = 32;
/// Less than any score.
const LOWEST: f32 = f32::MIN;

/// Makes the kernel. Its parameters, in order:
///
/// * `q`: `f32`;
/// * `cos`, `sin`: `f32`, `positions × head_dim / 2`;
/// * `positions`, `sequence`: `i32`, one a token: its position, and its row of `table`;
/// * `table`: `i32`, rows of `stride` pages: page `i` of a row holds positions `64·i` and up of a sequence;
/// * `keys`, `values`: the cache, `pages × kv_heads × 64 × head_dim`;
/// * `y`: `f32`, `batch × heads · head_dim`;
/// * `stride`: `i32` scalar.
pub fn lower(op: &Attention) -> Kernel {
    let (d, warps) = (op.head_dim, WARPS as u32);
    let half = d / 2;
    let threads = warps * 32;
    let b = Builder::new(&format!("attention_{}x{d}_b{}", op.heads, op.batch), [op.heads, op.batch], threads);
    b.doc(format!(
        "Attention of {} token(s), {} heads of {d} on {} of keys and values.",
        op.batch, op.heads, op.kv_heads
    ));
    b.dependent_launch();
    let q = b.buffer("q", Elem::F32, false);
    let (cos, sin) = (b.buffer("cos", Elem::F32, false), b.buffer("sin", Elem::F32, false));
    let (positions, sequence) = (b.buffer("positions", Elem::I32, false), b.buffer("sequence", Elem::I32, false));
    let table = b.buffer("table", Elem::I32, false);
    let (keys, values) = (b.buffer("keys", op.cache, false), b.buffer("values", op.cache, false));
    let y = b.buffer("y", Elem::F32, true);
    let stride = b.scalar("stride", Scalar::I32);
    let query = b.shared("query", Elem::F32, d);
    let (highs, totals) = (b.shared("highs", Elem::F32, warps), b.shared("totals", Elem::F32, warps));
    let parts = b.shared("parts", Elem::F32, warps * d);
    let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
    let (head, token) = (b.special(Special::BlockX), b.special(Special::BlockY));
    b.grid_wait();
    b.grid_launch();

    let at = b.load(positions, token, Elem::I32);
    let pages = b.load(sequence, token, Elem::I32) * stride;
    b.for_(thread, half, threads, |pair| {
        let from = op.q.at(token) + head * d + pair;
        let turned = turn(&b, q, from, cos, sin, at * half + pair, half);
        b.store(query, pair, turned.0, Elem::F32);
        b.store(query, pair + half, turned.1, Elem::F32);
    });
    b.barrier();

    // A lane's columns of the values: runs of `width` at `32 · width · r + width · lane`.
    let width = [4, 2, 1].into_iter().find(|w| d.is_multiple_of(32 * w)).unwrap_or(1);
    let runs = d.div_ceil(32 * width);
    let column = |r: u32| lane * width + 32 * width * r;
    let sums: Vec<_> = (0..runs * width).map(|_| b.var(b.f32(0.0))).collect();
    let (high, total) = (b.var(b.f32(LOWEST)), b.var(b.f32(0.0)));
    let kv_head = head / (op.heads / op.kv_heads);
    b.for_(warp, (at >> 5) + 1, warps, |chunk| {
        let page = b.load(table, pages + (chunk >> 1), Elem::I32);
        let first = (page * op.kv_heads + kv_head) * PAGE + (chunk & 1) * 32;
        let last = at - chunk * 32;
        let row = (first + lane.min(last)) * d;
        let seen = lane.le(last);
        let step = if d.is_multiple_of(4) { 4 } else { 2 };
        let partial: Vec<_> = (0..step).map(|_| b.var(b.f32(0.0))).collect();
        b.unrolled(0, d, step, |i| {
            let k = b.load_as(keys, row + i, op.cache, step, Cache::Default).lanes();
            let x = b.load_as(query, i, Elem::F32, step, Cache::Default).lanes();
            for (sum, (k, x)) in partial.iter().zip(k.into_iter().zip(x)) {
                b.set(*sum, b.get(*sum) + k * x);
            }
        });
        let partial: Vec<V> = partial.into_iter().map(|s| b.get(s)).collect();
        let dot = partial.chunks(2).map(|p| p[0] + p[1]).reduce(|a, b| a + b).expect("two or four sums");
        let score = seen.select(dot * scale(d), LOWEST);
        let before = b.get(high);
        let now = before.max(across_lanes(score, V::max));
        let fade = exp(&b, before - now);
        let weight = seen.select(exp(&b, score - now), 0.0);
        b.set(high, now);
        b.set(total, b.get(total) * fade + across_lanes(weight, |a, b| a + b));
        for s in &sums {
            b.set(*s, b.get(*s) * fade);
        }
        b.unrolled(0, 32, 1, |j| {
            let weight = weight.shuffle(j);
            let row = (first + last.min(j)) * d;
            for r in 0..runs {
                let at = column(r).min(d - width);
                let v = b.load_as(values, row + at, op.cache, width, Cache::Default).lanes();
                for (s, v) in sums[(r * width) as usize..].iter().zip(v) {
                    b.set(*s, b.get(*s) + weight * v);
                }
            }
        });
    });
    b.if_(lane.eq(0), || {
        b.store(highs, warp, b.get(high), Elem::F32);
        b.store(totals, warp, b.get(total), Elem::F32);
    });
    for r in 0..runs {
        b.if_(column(r).lt(d), || {
            for j in 0..width {
                b.store(parts, warp * d + column(r) + j, b.get(sums[(r * width + j) as usize]), Elem::F32);
            }
        });
    }
    b.barrier();
    let of_warp = |mem, w: u32| b.load(mem, b.i32(w as i32), Elem::F32);
    b.for_(thread, d, threads, |i| {
        let high: Vec<V> = (0..warps).map(|w| of_warp(highs, w)).collect();
        let most = high.iter().copied().reduce(V::max).expect("warps");
        let (mut total, mut sum) = (b.f32(0.0), b.f32(0.0));
        for (w, high) in (0..warps).zip(high) {
            let share = exp(&b, high - most);
            total = total + share * of_warp(totals, w);
            sum = sum + share * b.load(parts, i + w * d, Elem::F32);
        }
        b.store(y, (token * op.heads + head) * d + i, sum / total, Elem::F32);
    });
    b.finish()
}

fn scale(head_dim: u32) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// The twin of the kernel for one head of one token: `q` is its query, turned; `keys` and `values` hold the positions
/// that it sees, `q.len()` values each. Writes `softmax(q·kᵀ / √d)·v` to `out`.
pub fn reference(q: &[f32], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let d = q.len();
    let step = if d.is_multiple_of(4) { 4 } else { 2 };
    let score = |k: &[f32]| {
        let mut s = [0f32; 4];
        for (k, q) in k.chunks_exact(step).zip(q.chunks_exact(step)) {
            for (s, (k, q)) in s.iter_mut().zip(k.iter().zip(q)) {
                *s += k * q;
            }
        }
        let sum = if step == 4 { (s[0] + s[1]) + (s[2] + s[3]) } else { s[0] + s[1] };
        sum * scale(d as u32)
    };
    let (mut high, mut total) = ([LOWEST; WARPS], [0f32; WARPS]);
    let mut parts = vec![0f32; WARPS * d];
    let chunks = keys.chunks(LANES * d).zip(values.chunks(LANES * d));
    for (chunk, (keys, values)) in chunks.enumerate() {
        let warp = chunk % WARPS;
        let seen = keys.len() / d;
        let mut scores = [LOWEST; LANES];
        for (s, k) in scores.iter_mut().zip(keys.chunks_exact(d)) {
            *s = score(k);
        }
        let now = scores.iter().copied().fold(high[warp], f32::max);
        let fade = exp_reference(high[warp] - now);
        let mut weights = [0f32; LANES];
        for (w, s) in weights.iter_mut().zip(scores).take(seen) {
            *w = exp_reference(s - now);
        }
        high[warp] = now;
        total[warp] = total[warp] * fade + across_lanes_reference(weights, |a, b| a + b);
        let part = &mut parts[warp * d..(warp + 1) * d];
        part.iter_mut().for_each(|p| *p *= fade);
        for (w, v) in weights.iter().zip(values.chunks_exact(d)) {
            for (p, v) in part.iter_mut().zip(v) {
                *p += w * v;
            }
        }
    }
    let most = high.iter().copied().fold(LOWEST, f32::max);
    let shares = high.map(|h| exp_reference(h - most));
    let all = shares.iter().zip(total).fold(0f32, |sum, (share, t)| sum + share * t);
    for (i, o) in out.iter_mut().enumerate() {
        let sum = shares.iter().zip(parts.chunks_exact(d)).fold(0f32, |sum, (share, part)| sum + share * part[i]);
        *o = sum / all;
    }
}

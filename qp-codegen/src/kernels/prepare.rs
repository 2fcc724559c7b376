//! Preparing activations for a quantized layer: (norm), rotation, rounding to two planes of signed bytes.
//!
//! One block a token. The rotation is that of [`super::rotate`].

use super::rotate::{self, RADIX_BITS, Values};
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V};
use crate::layout::COLUMN_PAD;
use crate::reference::{ACTIVATION_MAX, Hadamard, MEAN_LANES};
use crate::spec::Rotation;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prepare {
    /// Length of a token's input.
    pub columns: u32,
    /// Distance from one token's input to the next.
    pub stride: u32,
    /// Tokens.
    pub batch: u32,
    /// The rotation of the layer's weights.
    pub rotation: Rotation,
    /// Root-mean-square norm before the rotation: its epsilon.
    pub norm: Option<f32>,
}

/// Makes the kernel. Its parameters, in order:
///
/// * `input`: `f32`, `batch × stride`;
/// * `norm`: `f32`, `columns` weights (read with a norm only);
/// * `flips`: 32-bit words, bit `i` set if column `i` is negated; see [`rotate::flips`];
/// * `base`: the dense part's signs, if larger than the program may unroll; see [`rotate::base`];
/// * `x`, `x_scale`, `x_sum`: see [`super::gemv::lower`].
pub fn lower(op: &Prepare) -> Kernel {
    let threads = (op.columns >> RADIX_BITS).next_power_of_two().clamp(MEAN_LANES as u32, 1024);
    let b = Builder::new(&format!("prepare_{}_b{}", op.columns, op.batch), [op.batch, 1], threads);
    b.doc(format!(
        "{} columns of {} token(s){}{}, as signed bytes.",
        op.columns,
        op.batch,
        if op.norm.is_some() { ", normed" } else { "" },
        if op.rotation == Rotation::None { "" } else { ", rotated" },
    ));
    b.dependent_launch();
    planes(&b, op, threads);
    b.finish()
}

/// What is read.
struct Inputs {
    input: Mem,
    weights: Mem,
    flips: Mem,
    base: Mem,
}

impl Inputs {
    /// Declares them.
    fn new(b: &Builder) -> Inputs {
        Inputs {
            input: b.buffer("input", Elem::F32, false),
            weights: b.buffer("norm", Elem::F32, false),
            flips: b.buffer("flips", Elem::U32, false),
            base: b.buffer("base", Elem::U32, false),
        }
    }

    /// The values of the block's token, normed and transformed, still to be multiplied with [`factor`]. A barrier stands
    /// behind the last that was set.
    fn transformed<'b>(&self, b: &'b Builder, op: &Prepare, threads: u32) -> Values<'b> {
        let n = op.columns;
        let rotated = op.rotation != Rotation::None;
        let values = Values::new(b, "values", n);
        let (thread, token) = (b.special(Special::Thread), b.special(Special::BlockX));
        b.grid_wait();
        b.grid_launch();

        let inverse = op.norm.map(|eps| inverse_norm(b, n, self.input, token * op.stride, eps));
        b.for_(thread, n, threads, |i| {
            let v = b.load(self.input, token * op.stride + i, Elem::F32);
            let v = match inverse {
                None => v,
                Some(inverse) => v * inverse * b.load_as(self.weights, i, Elem::F32, 1, Cache::ReadOnly),
            };
            let v = if rotated { rotate::flip(b, self.flips, i, v) } else { v };
            values.set(i, v);
        });
        b.barrier();
        if rotated {
            rotate::transform(&values, &Hadamard::new(n), self.base, threads);
        }
        values
    }
}

/// What transformed values are multiplied with, if anything.
fn factor(op: &Prepare) -> Option<f32> {
    (op.rotation != Rotation::None).then(|| Hadamard::new(op.columns).norm())
}

fn planes(b: &Builder, op: &Prepare, threads: u32) {
    let (n, inputs) = (op.columns, Inputs::new(b));
    let x = b.buffer("x", Elem::I8, true);
    let x_scale = b.buffer("x_scale", Elem::F32, true);
    let x_sum = b.buffer("x_sum", Elem::I32, true);
    let values = inputs.transformed(b, op, threads);
    let (thread, token) = (b.special(Special::Thread), b.special(Special::BlockX));
    let warps = threads / 32;

    b.comment("Largest magnitude, then whole numbers.");
    let largest = b.var(b.f32(0.0));
    b.for_(thread, n, threads, |i| {
        let v = values.get(i);
        let scaled = factor(op).map(|factor| v * factor);
        b.set(largest, b.get(largest).max(scaled.unwrap_or(v).abs()));
        if let Some(v) = scaled {
            values.set(i, v);
        }
    });
    let of_warps = b.shared("of_warps", Elem::F32, 32);
    let mut most = b.get(largest);
    for mask in [16, 8, 4, 2, 1] {
        most = most.max(most.shuffle_xor(mask));
    }
    let (lane, warp) = (b.special(Special::Lane), b.special(Special::Warp));
    let total = b.shared("total", Elem::I32, 1);
    let zero = b.i32(0);
    b.if_(lane.eq(0), || b.store(of_warps, warp, most, Elem::F32));
    b.if_(thread.eq(0), || b.store(total, zero, zero, Elem::I32));
    b.barrier();
    let mut most = b.load(of_warps, lane.min(warps - 1), Elem::F32);
    for mask in [16, 8, 4, 2, 1] {
        most = most.max(most.shuffle_xor(mask));
    }
    let inverse = most.gt(0.0).select(b.f32(ACTIVATION_MAX) / most, 0.0);
    let stride = n.next_multiple_of(COLUMN_PAD);
    let sum = b.var(zero);
    b.for_(thread, stride / 4, threads, |quad| {
        let part = |k: u32| {
            let i = quad * 4 + k;
            let q = b.var(zero);
            let set = || b.set(q, (values.get(i) * inverse).to(Scalar::I32));
            if n == stride {
                set()
            } else {
                b.if_(i.lt(n), set)
            }
            b.get(q)
        };
        let q = [part(0), part(1), part(2), part(3)];
        let high = q.map(|q| (q + 64) >> 7);
        let low = [0, 1, 2, 3].map(|k| q[k] - (high[k] << 7));
        // Four quads a cell; the planes of a token are neighbours.
        let at = (quad / 4 * (2 * op.batch) + token * 2) * 4 + quad % 4;
        b.store(x, at, bytes(high), Elem::U32);
        b.store(x, at + 4, bytes(low), Elem::U32);
        b.set(sum, b.get(sum) + q[0] + q[1] + q[2] + q[3]);
    });
    let mut all = b.get(sum);
    for mask in [16, 8, 4, 2, 1] {
        all = all + all.shuffle_xor(mask);
    }
    b.if_(lane.eq(0), || {
        b.atomic_add(total, zero, all);
    });
    b.barrier();
    b.if_(thread.eq(0), || {
        b.store(x_scale, token, most / ACTIVATION_MAX, Elem::F32);
        b.store(x_sum, token, b.load(total, zero, Elem::I32), Elem::I32);
    });
}

/// The low bytes of four values, the first lowest.
fn bytes(v: [V<'_>; 4]) -> V<'_> {
    let [a, b, c, d] = v.map(|v| (v & 0xff).bits(Scalar::U32));
    a | (b << 8) | (c << 16) | (d << 24)
}

/// `1 / √(mean(x²) + eps)` of the `columns` values from `first`, in the order of [`crate::reference::mean_square`].
pub(super) fn inverse_norm<'b>(b: &'b Builder, columns: u32, input: Mem, first: V<'b>, eps: f32) -> V<'b> {
    let lanes = MEAN_LANES as u32;
    let partial = b.shared("partial", Elem::F32, lanes);
    let thread = b.special(Special::Thread);
    b.if_(thread.lt(lanes), || {
        let sum = b.var(b.f32(0.0));
        b.for_(thread, columns, lanes, |i| {
            let v = b.load(input, first + i, Elem::F32);
            b.set(sum, b.get(sum) + v * v);
        });
        b.store(partial, thread, b.get(sum), Elem::F32);
    });
    let mut half = lanes / 2;
    while half > 0 {
        b.barrier();
        b.if_(thread.lt(half), || {
            let sum = b.load(partial, thread, Elem::F32) + b.load(partial, thread + half, Elem::F32);
            b.store(partial, thread, sum, Elem::F32);
        });
        half /= 2;
    }
    b.barrier();
    let mean = b.load(partial, b.i32(0), Elem::F32) / columns as f32;
    b.f32(1.0) / (mean + eps).sqrt()
}

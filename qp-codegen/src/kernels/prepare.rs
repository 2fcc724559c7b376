//! Preparing activations for a quantized layer: (norm), rotation, rounding to two planes of signed bytes.
//!
//! One block a token. Butterflies run in registers, eight elements a thread and pass, in the order that
//! [`crate::reference`] fixes, so that every device gives the same bits.

use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V};
use crate::layout::{self, COLUMN_PAD};
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

/// Elements a thread transforms at once.
const RADIX_BITS: u32 = 3;
/// Larger dense parts read their signs from memory rather than from the program.
const MAX_UNROLLED_BASE: u32 = 60;

/// Makes the kernel. Its parameters, in order:
///
/// * `input`: `f32`, `batch × stride`;
/// * `norm`: `f32`, `columns` weights (read with a norm only);
/// * `flips`: 32-bit words, bit `i` set if column `i` is negated; see [`flips`];
/// * `base`: the dense part's signs, if larger than the program may unroll; see [`base`];
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
    emit(&b, op, threads);
    b.finish()
}

/// The signs of a rotation as the kernel takes them; one word that is not read without a rotation.
pub fn flips(rotation: Rotation, columns: u32) -> Vec<u32> {
    match rotation {
        Rotation::None => vec![0],
        Rotation::Hadamard { seed } => pack_bits(&layout::signs(seed, columns)),
    }
}

/// The dense part's signs as the kernel takes them, each row padded to whole words; one word that is not read if the
/// program holds them.
pub fn base(columns: u32) -> Vec<u32> {
    let h = Hadamard::new(columns);
    if h.m <= MAX_UNROLLED_BASE { vec![0] } else { h.base.chunks_exact(h.m as usize).flat_map(pack_bits).collect() }
}

fn pack_bits(bits: &[bool]) -> Vec<u32> {
    bits.chunks(32).map(|c| c.iter().enumerate().fold(0, |w, (i, &bit)| w | u32::from(bit) << i)).collect()
}

fn emit(b: &Builder, op: &Prepare, threads: u32) {
    let n = op.columns;
    let rotated = op.rotation != Rotation::None;
    let h = Hadamard::new(n);
    let input = b.buffer("input", Elem::F32, false);
    let weights = b.buffer("norm", Elem::F32, false);
    let flips = b.buffer("flips", Elem::U32, false);
    let base = b.buffer("base", Elem::U32, false);
    let x = b.buffer("x", Elem::I8, true);
    let x_scale = b.buffer("x_scale", Elem::F32, true);
    let x_sum = b.buffer("x_sum", Elem::I32, true);
    let values = Values { b, mem: b.shared("values", Elem::F32, n + n / 32) };
    let thread = b.special(Special::Thread);
    let token = b.special(Special::BlockX);
    let warps = threads / 32;
    b.grid_wait();
    b.grid_launch();

    let inverse = op.norm.map(|eps| inverse_norm(b, n, input, token * op.stride, eps));
    b.for_(thread, n, threads, |i| {
        let v = b.load(input, token * op.stride + i, Elem::F32);
        let v = match inverse {
            None => v,
            Some(inverse) => v * inverse * b.load_as(weights, i, Elem::F32, 1, Cache::ReadOnly),
        };
        let v = if rotated {
            let word = b.load_as(flips, i >> 5, Elem::U32, 1, Cache::ReadOnly);
            let sign = (word >> (i & 31).bits(Scalar::U32)) << 31;
            (v.bits(Scalar::U32) ^ sign).bits(Scalar::F32)
        } else {
            v
        };
        values.set(i, v);
    });
    b.barrier();
    if rotated {
        butterflies(&values, &h, threads);
        dense(&values, &h, base, threads);
    }

    b.comment("Largest magnitude, then whole numbers.");
    let norm = if rotated { h.norm() } else { 1.0 };
    let largest = b.var(b.f32(0.0));
    b.for_(thread, n, threads, |i| {
        let v = values.get(i);
        let v = if rotated { v * norm } else { v };
        b.set(largest, b.get(largest).max(v.abs()));
        if rotated {
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
        let at = token * (stride / 2) + quad;
        b.store(x, at, bytes(high), Elem::U32);
        b.store(x, at + stride / 4, bytes(low), Elem::U32);
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

/// A token's values in shared memory, a word of padding after every 32 so that strided accesses spread over banks.
struct Values<'b> {
    b: &'b Builder,
    mem: Mem,
}

impl<'b> Values<'b> {
    fn get(&self, i: V<'b>) -> V<'b> {
        self.b.load(self.mem, i + (i >> 5), Elem::F32)
    }

    fn set(&self, i: V<'b>, v: V<'b>) {
        self.b.store(self.mem, i + (i >> 5), v, Elem::F32);
    }
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

/// Butterflies of stride 1, 2, 4, … 2^(log2 − 1).
fn butterflies(values: &Values, h: &Hadamard, threads: u32) {
    let b = values.b;
    let thread = b.special(Special::Thread);
    let mut done = 0;
    while done < h.log2 {
        let bits = (h.log2 - done).min(RADIX_BITS);
        let (stride, radix) = (1u32 << done, 1u32 << bits);
        b.for_(thread, h.columns / radix, threads, |i| {
            let first = (i >> done) * (stride * radix) + (i & (stride as i32 - 1));
            let at: Vec<V> = (0..radix).map(|j| first + j * stride).collect();
            let mut v: Vec<V> = at.iter().map(|&i| values.get(i)).collect();
            for bit in 0..bits {
                for j in (0..radix as usize).filter(|j| j >> bit & 1 == 0) {
                    let k = j + (1 << bit);
                    (v[j], v[k]) = (v[j] + v[k], v[j] - v[k]);
                }
            }
            at.iter().zip(v).for_each(|(&i, v)| values.set(i, v));
        });
        b.barrier();
        done += bits;
    }
}

/// The dense `m × m` part across the power-of-two parts.
fn dense(values: &Values, h: &Hadamard, base: Mem, threads: u32) {
    let b = values.b;
    let (m, two) = (h.m, 1u32 << h.log2);
    if m == 1 {
        return;
    }
    let thread = b.special(Special::Thread);
    if m <= MAX_UNROLLED_BASE {
        b.for_(thread, two, threads, |i| {
            let v: Vec<V> = (0..m).map(|j| values.get(i + j * two)).collect();
            for (r, row) in h.base.chunks_exact(m as usize).enumerate() {
                let first = if row[0] { -v[0] } else { v[0] };
                let sum = v.iter().zip(row).skip(1).fold(first, |s, (&v, &neg)| if neg { s - v } else { s + v });
                values.set(i + r as u32 * two, sum);
            }
        });
        b.barrier();
        return;
    }
    let out = Values { b, mem: b.shared("mixed", Elem::F32, h.columns + h.columns / 32) };
    b.for_(thread, h.columns, threads, |i| {
        let (row, col) = (i >> h.log2, i & (two as i32 - 1));
        let sum = b.var(b.f32(-0.0));
        b.for_(0, m, 1, |j| {
            let word = b.load_as(base, row * m.div_ceil(32) + (j >> 5), Elem::U32, 1, Cache::ReadOnly);
            let sign = (word >> (j & 31).bits(Scalar::U32)) << 31;
            let v = values.get(col + j * two).bits(Scalar::U32) ^ sign;
            b.set(sum, b.get(sum) + v.bits(Scalar::F32));
        });
        out.set(i, b.get(sum));
    });
    b.barrier();
    b.for_(thread, h.columns, threads, |i| values.set(i, out.get(i)));
    b.barrier();
}

//! The rotation of a token's values within a kernel: what preparing activations and looking up a packed row share.
//!
//! Butterflies run in registers, eight elements a thread and pass, in the order that [`crate::reference`] fixes, so that
//! every device gives the same bits.

use crate::ir::{Builder, Cache, Elem, Mem, Scalar, Special, V};
use crate::layout;
use crate::reference::Hadamard;
use crate::spec::Rotation;

/// Elements a thread transforms at once.
pub(super) const RADIX_BITS: u32 = 3;
/// Larger dense parts read their signs from memory rather than from the program.
const MAX_UNROLLED_BASE: u32 = 60;

/// The signs of a rotation as the kernel takes them; one word that is not read without a rotation.
pub fn flips(rotation: Rotation, columns: u32) -> Vec<u32> {
    match rotation {
        Rotation::None => vec![0],
        Rotation::Hadamard { seed } => pack_bits(&layout::signs(seed, columns)),
    }
}

/// The dense part's signs as the kernel takes them, each row padded to whole words; one word that is not read if the
/// program holds them.
pub fn base(h: &Hadamard) -> Vec<u32> {
    if h.m <= MAX_UNROLLED_BASE { vec![0] } else { h.base.chunks_exact(h.m as usize).flat_map(pack_bits).collect() }
}

fn pack_bits(bits: &[bool]) -> Vec<u32> {
    bits.chunks(32).map(|c| c.iter().enumerate().fold(0, |w, (i, &bit)| w | u32::from(bit) << i)).collect()
}

/// A token's values in shared memory, a word of padding after every 32 so that strided accesses spread over banks.
pub(super) struct Values<'b> {
    b: &'b Builder,
    mem: Mem,
}

impl<'b> Values<'b> {
    /// Room for `n` of them.
    pub fn new(b: &'b Builder, name: &str, n: u32) -> Self {
        Values { b, mem: b.shared(name, Elem::F32, n + n / 32) }
    }

    /// Value `i`.
    pub fn get(&self, i: V<'b>) -> V<'b> {
        self.b.load(self.mem, i + (i >> 5), Elem::F32)
    }

    /// Sets value `i`.
    pub fn set(&self, i: V<'b>, v: V<'b>) {
        self.b.store(self.mem, i + (i >> 5), v, Elem::F32);
    }
}

/// `v`, negated if the rotation negates column `i`.
pub(super) fn flip<'b>(b: &'b Builder, flips: Mem, i: V<'b>, v: V<'b>) -> V<'b> {
    let word = b.load_as(flips, i >> 5, Elem::U32, 1, Cache::ReadOnly);
    let sign = (word >> (i & 31).bits(Scalar::U32)) << 31;
    (v.bits(Scalar::U32) ^ sign).bits(Scalar::F32)
}

/// The transform of `values` without its norm, all threads of the block together. A barrier stands before and after.
pub(super) fn transform(values: &Values, h: &Hadamard, base: Mem, threads: u32) {
    butterflies(values, h, threads);
    dense(values, h, base, threads);
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
    let out = Values::new(b, "mixed", h.columns);
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

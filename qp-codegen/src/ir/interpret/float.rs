//! Float arithmetic as GPUs do it: results that are NaN have one bit pattern, conversions saturate.

/// The NaN that arithmetic gives on a GPU.
const NAN: u32 = 0x7fff_ffff;

fn canonical(x: f32) -> u32 {
    if x.is_nan() { NAN } else { x.to_bits() }
}

/// A function of two floats, on their bits.
pub(super) fn binary(f: impl Fn(f32, f32) -> f32) -> impl Fn(u32, u32) -> u32 {
    move |a, b| canonical(f(f32::from_bits(a), f32::from_bits(b)))
}

pub(super) fn sqrt(a: u32) -> u32 {
    canonical(f32::from_bits(a).sqrt())
}

pub(super) fn fma(a: u32, b: u32, c: u32) -> u32 {
    canonical(f32::from_bits(a).mul_add(f32::from_bits(b), f32::from_bits(c)))
}

/// PTX's `min.f32`: the other operand if one is NaN, and −0 below +0.
pub(super) fn min(a: f32, b: f32) -> f32 {
    if b.is_nan() || a < b || (a == b && a.is_sign_negative()) { a } else { b }
}

/// PTX's `max.f32`: the other operand if one is NaN, and +0 above −0.
pub(super) fn max(a: f32, b: f32) -> f32 {
    if b.is_nan() || a > b || (a == b && a.is_sign_positive()) { a } else { b }
}

/// Nearest half, even on ties, infinity beyond the range.
pub(super) fn to_f16(bits: u32) -> u16 {
    let x = f32::from_bits(bits);
    if x.is_nan() { 0x7fff } else { half::f16::from_f32(x).to_bits() }
}

pub(super) fn from_f16(bits: u16) -> u32 {
    canonical(half::f16::from_bits(bits).to_f32())
}

/// Nearest bfloat16, even on ties.
pub(super) fn to_bf16(bits: u32) -> u16 {
    let x = f32::from_bits(bits);
    if x.is_nan() { 0x7fff } else { half::bf16::from_f32(x).to_bits() }
}

/// Exact: bfloat16 is the upper half of a float, NaNs included.
pub(super) fn from_bf16(bits: u16) -> u32 {
    u32::from(bits) << 16
}

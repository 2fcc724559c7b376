//! Functions that the IR lacks, built from its exact operations, each with a twin in Rust that gives the same bits.

use crate::ir::{Builder, Scalar, V};
pub use crate::reference::exp as exp_reference;
use crate::reference::{Activation, EXP_RANGE, EXP_SERIES, GELU, LN_2};

/// The twin of [`exp_reference`].
pub fn exp<'b>(b: &'b Builder, x: V<'b>) -> V<'b> {
    let x = x.max(EXP_RANGE.0).min(EXP_RANGE.1);
    let n = (x * std::f32::consts::LOG2_E).to(Scalar::I32);
    let whole = n.to(Scalar::F32);
    let r = x - whole * LN_2.0;
    let r = r - whole * LN_2.1;
    let [rest @ .., last] = EXP_SERIES;
    let series = rest.iter().rev().fold(b.f32(last), |p, &c| p * r + c);
    series * ((n + 127) << 23).bits(Scalar::F32)
}

/// The twin of [`Activation::apply`].
pub fn activation<'b>(b: &'b Builder, activation: Activation, x: V<'b>) -> V<'b> {
    let power = match activation {
        Activation::Silu => -x,
        Activation::GeluTanh => x * (b.f32(GELU.0) + (x * x) * GELU.1),
    };
    x / (exp(b, power) + 1.0)
}

/// The twin of [`crate::reference::soft_cap`].
pub fn soft_cap<'b>(b: &'b Builder, x: V<'b>, cap: f32) -> V<'b> {
    b.f32(cap) - b.f32(cap + cap) / (exp(b, x * (2.0 / cap)) + 1.0)
}

/// Adding this rounds a number of magnitude below 2^22 to a whole one, which is then in the low bits.
const WHOLE: f32 = 12_582_912.0;

/// `2^x` on −½..½ as a polynomial, lowest power first; relative error 2.7e-6.
const EXP2_SERIES: [f32; 5] = [0.999_999_3, 0.693_121_8, 0.240_247_44, 0.055_917_86, 0.009_570_102];

/// `x`, of magnitude below 2^22, rounded to the nearest whole number, ties to even.
pub fn whole<'b>(x: V<'b>) -> V<'b> {
    x + WHOLE - WHOLE
}

/// The twin of [`whole`].
#[inline(always)]
pub fn whole_reference(x: f32) -> f32 {
    x + WHOLE - WHOLE
}

/// `2^x` of `x` between −126 and 127, with a relative error of 2.7e-6.
pub fn exp2<'b>(b: &'b Builder, x: V<'b>) -> V<'b> {
    let n = x + WHOLE;
    let f = x - (n - WHOLE);
    let [rest @ .., last] = EXP2_SERIES;
    let series = rest.iter().rev().fold(b.f32(last), |p, &c| p.fma(f, c));
    (series.bits(Scalar::U32) + (n.bits(Scalar::U32) << 23)).bits(Scalar::F32)
}

/// The twin of [`exp2`].
#[inline(always)]
pub fn exp2_reference(x: f32) -> f32 {
    let n = x + WHOLE;
    let f = x - (n - WHOLE);
    let [rest @ .., last] = EXP2_SERIES;
    let series = rest.iter().rev().fold(last, |p, &c| p.mul_add(f, c));
    f32::from_bits(series.to_bits().wrapping_add(n.to_bits() << 23))
}

/// `2^x` of `x` up to 0, and 0 of an `x` below `smallest`, which is −126 or more.
pub fn weight<'b>(b: &'b Builder, x: V<'b>, smallest: f32) -> V<'b> {
    // A value by itself: what a choice computes is branched around, and then powers wait for each other.
    x.ge(smallest).select(exp2(b, x).named("power"), 0.0)
}

/// The twin of [`weight`].
#[inline(always)]
pub fn weight_reference(x: f32, smallest: f32) -> f32 {
    if x >= smallest { exp2_reference(x) } else { 0.0 }
}

/// `2^x` of a whole number `x` up to 127, exact; of one below −126, `2^−126`.
pub fn power<'b>(x: V<'b>) -> V<'b> {
    (((x.max(-126.0) + WHOLE).bits(Scalar::U32) << 23) + 0x3f80_0000u32).bits(Scalar::F32)
}

/// The twin of [`power`].
#[inline(always)]
pub fn power_reference(x: f32) -> f32 {
    f32::from_bits(((x.max(-126.0) + WHOLE).to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// Folds the 32 lanes' values with `op` in a tree, lane distances 16, 8, 4, 2, 1; every lane gets the result.
pub fn across_lanes<'b>(v: V<'b>, op: impl Fn(V<'b>, V<'b>) -> V<'b>) -> V<'b> {
    [16, 8, 4, 2, 1].into_iter().fold(v, |v, mask| op(v, v.shuffle_xor(mask)))
}

/// The twin of [`across_lanes`] for an operation that commutes.
#[inline(always)]
pub fn across_lanes_reference(mut v: [f32; 32], op: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            v[i] = op(v[i], v[i + half]);
        }
    }
    v[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::interpret::{Arg, Options, run};
    use crate::ir::{Elem, Special};

    #[test]
    fn powers_of_two_are_near() {
        let mut worst = 0f64;
        for i in -12000..=0 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(exp2_reference(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2.8e-6, "{worst:e}");
        assert_eq!((weight_reference(-100.5, -100.0), weight_reference(f32::MIN, -100.0)), (0.0, 0.0));
        for i in -126..=127 {
            assert_eq!(f64::from(power_reference(i as f32)), f64::from(i).exp2());
        }
        assert_eq!(power_reference(-1e6), f32::MIN_POSITIVE);
        for (x, rounded) in [(2.5, 2.0), (3.5, 4.0), (-0.2, 0.0), (-1.7, -2.0), (2e6 + 0.5, 2e6)] {
            assert_eq!(whole_reference(x), rounded);
        }
    }

    #[test]
    fn exp_is_near_and_its_twin_equal() {
        let n = 1 << 12;
        let b = Builder::new("exp", [n / 64, 1], 64);
        let (x, y) = (b.buffer("x", Elem::F32, false), b.buffer("y", Elem::F32, true));
        let i = b.special(Special::BlockX) * 64 + b.special(Special::Thread);
        b.store(y, i, exp(&b, b.load(x, i, Elem::F32)), Elem::F32);
        let kernel = b.finish();
        let mut inputs: Vec<f32> = (0..n).map(|i| (i as f32 / n as f32 - 0.5) * 180.0).collect();
        inputs[..8].copy_from_slice(&[0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-30, -1e-30]);
        let mut outputs = vec![0u8; inputs.len() * 4];
        let bytes: Vec<u8> = inputs.iter().flat_map(|v| v.to_le_bytes()).collect();
        run(&kernel, &mut [Arg::ReadOnly(&bytes), Arg::Buffer(&mut outputs)], &Options::default()).unwrap();
        let mut worst = 0f64;
        for (x, y) in inputs.iter().zip(outputs.as_chunks::<4>().0) {
            let y = f32::from_le_bytes(*y);
            assert_eq!(y.to_bits(), exp_reference(*x).to_bits(), "exp({x})");
            if (-87.0..88.0).contains(x) {
                let exact = f64::from(*x).exp();
                worst = worst.max((f64::from(y) / exact - 1.0).abs());
            }
        }
        assert!(worst < 2f64.powi(-22), "relative error {worst:e}");
        assert_eq!(exp_reference(0.0), 1.0);
    }
}

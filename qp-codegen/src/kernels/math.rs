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

//! What a quantized linear layer computes, operation by operation: the arithmetic that the CPU engine, the
//! interpreted kernels and the GPU share bit for bit.
//!
//! For a token's input `x` (`columns` values) and a layer with quantizer `q`:
//!
//! 1. [`rotate`]: signs and Hadamard transforms, in `f32`, in a fixed order of operations.
//! 2. [`quantize_activations`]: to 15-bit integers with one scale.
//! 3. An exact integer product with the decoded entries, padding being zero.
//! 4. [`scale_output`]: one conversion and two products in `f32`.

mod rotation;
pub mod routing;
pub mod sampling;

pub use rotation::{Hadamard, INTERLEAVED, Interleave, Rotator, rotate, transforms};

use crate::layout;
use crate::spec::Code;

/// Largest magnitude of a quantized activation: `127·128`, so that it splits into two signed bytes.
pub const ACTIVATION_MAX: f32 = 16256.0;

/// One token's activations as integers: `x ≈ q · scale`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activations {
    /// `columns` integers of magnitude at most 16256.
    pub q: Vec<i16>,
    /// Largest magnitude of `x`, over 16256. Infinite, and all integers 0, if a value is not finite.
    pub scale: f32,
    /// Sum of `q`.
    pub sum: i64,
}

/// Bits of an infinity: larger ones, signs apart, are those of what is not a number.
pub const INFINITY_BITS: u32 = 0x7f80_0000;

/// Rounds one token's (rotated) activations to 15-bit integers. It is inlined into its callers, so that those compiled for vector
/// instructions use them.
#[inline(always)]
pub fn quantize_activations(x: &[f32]) -> Activations {
    quantize_activations_by(x, 0.0)
}

/// The largest magnitude of some numbers; infinite if one is not finite.
#[inline(always)]
pub fn largest_magnitude(x: &[f32]) -> f32 {
    // Magnitudes are ordered as their bits are; what is not a number lies above an infinity.
    f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & i32::MAX as u32)).min(INFINITY_BITS))
}

/// As [`quantize_activations`], as if one of the magnitudes were `given`: that of columns which lie elsewhere.
#[inline(always)]
pub fn quantize_activations_by(x: &[f32], given: f32) -> Activations {
    let largest = largest_magnitude(x).to_bits().max(largest_magnitude(&[given]).to_bits());
    if largest >= INFINITY_BITS {
        return Activations { q: vec![0; x.len()], scale: f32::INFINITY, sum: 0 };
    }
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 { ACTIVATION_MAX / largest } else { 0.0 };
    let q: Vec<i16> = x.iter().map(|v| round(v * inverse) as i16).collect();
    let sum = q.iter().map(|&v| i64::from(v)).sum();
    Activations { q, scale: largest / ACTIVATION_MAX, sum }
}

/// Splits an activation into signed bytes: `q = 128·high + low`, `low` in −64..64.
#[inline]
pub fn split_activation(q: i16) -> (i8, i8) {
    let high = (q + 64) >> 7;
    (high as i8, (q - (high << 7)) as i8)
}

/// Tokens' activations as products take them: a plane of high and one of low bytes a token, the columns padded with zeros,
/// in the order of [`layout::activation_at`].
pub fn activation_cells(tokens: &[Activations]) -> Vec<i8> {
    let (columns, planes) = (tokens.first().map_or(0, |t| t.q.len()), 2 * tokens.len());
    let mut x = vec![0; columns.next_multiple_of(layout::COLUMN_PAD as usize) * planes];
    for (t, token) in tokens.iter().enumerate() {
        for (column, &q) in token.q.iter().enumerate() {
            let at = |plane| layout::activation_at(column, plane, planes);
            (x[at(2 * t)], x[at(2 * t + 1)]) = split_activation(q);
        }
    }
    x
}

/// A weight: its entry (+ ½), times the row's scale and the grid's unit, in this order of operations.
pub fn weight(code: &Code, entry: i16, row_scale: f32) -> f32 {
    let entry = i32::from(entry);
    if code.half_offset {
        (2 * entry + 1) as f32 * (row_scale * (code.unit * 0.5))
    } else {
        entry as f32 * (row_scale * code.unit)
    }
}

/// Mean of the squares of `x`, summed in a fixed order: four neighbours `(a² + b²) + (c² + d²)`, the 32 fours of each
/// [`MEAN_GROUP`] columns in a tree, and the groups' sums, group `g` onto partial sum `g mod 32`, then those in a tree.
/// A tree of 32 adds those that lie 16, 8, 4, 2 and 1 apart.
#[inline(always)]
pub fn mean_square(x: &[f32]) -> f32 {
    sum_in_order(x, |v| v * v) / x.len() as f32
}

/// The sum of `f` of each value, in the order of [`mean_square`].
#[inline(always)]
fn sum_in_order(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let tree = |mut v: [f32; 32]| {
        for half in [16, 8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    };
    let four = |v: &[f32; 4]| (f(v[0]) + f(v[1])) + (f(v[2]) + f(v[3]));
    let mut groups = [0f32; 32];
    for (g, group) in x.chunks(MEAN_GROUP).enumerate() {
        let mut fours = [0f32; 32];
        let (whole, rest) = group.as_chunks::<4>();
        for (sum, v) in fours.iter_mut().zip(whole) {
            *sum = four(v);
        }
        if !rest.is_empty() {
            let mut last = [0f32; 4];
            last[..rest.len()].copy_from_slice(rest);
            fours[whole.len()] = four(&last);
        }
        groups[g % 32] += tree(fours);
    }
    tree(groups)
}

/// Columns whose squares [`mean_square`] sums by themselves: four for each lane of a warp.
pub const MEAN_GROUP: usize = 128;

/// Mean of `x`, summed in the order of [`mean_square`].
pub fn mean(x: &[f32]) -> f32 {
    sum_in_order(x, |v| v) / x.len() as f32
}

/// What a value of a row becomes, or all of them together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    /// A product with a number.
    Scale(f32),
    /// `cap · tanh(x / cap)`, see [`soft_cap`].
    SoftCap(f32),
    /// The row's mean is subtracted: what a layer norm does before it is a root-mean-square norm.
    Center,
    /// An activation by itself.
    Activate(Activation),
}

impl Map {
    /// Maps one row.
    pub fn apply(self, x: &mut [f32]) {
        match self {
            Map::Scale(by) => x.iter_mut().for_each(|v| *v *= by),
            Map::SoftCap(cap) => x.iter_mut().for_each(|v| *v = soft_cap(*v, cap)),
            Map::Center => {
                let mean = mean(x);
                x.iter_mut().for_each(|v| *v -= mean);
            }
            Map::Activate(activation) => x.iter_mut().for_each(|v| *v = activation.apply(*v)),
        }
    }
}

/// `cap · tanh(x / cap)` for a positive cap, computed as `cap − 2 cap / (e^(2x / cap) + 1)`; its absolute error is a few
/// units in the last place of `cap`.
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    cap - (cap + cap) / (exp(x * (2.0 / cap)) + 1.0)
}

/// A root-mean-square norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// Whether 1 is added to the weights as they are stored (Gemma).
    pub add_one: bool,
}

impl RmsNorm {
    /// `x / √(mean(x²) + eps) · weight`, in this order of operations.
    #[inline(always)]
    pub fn apply(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let inverse = 1.0 / (mean_square(x) + self.eps).sqrt();
        let weight = weight.iter().map(|w| if self.add_one { w + 1.0 } else { *w });
        x.iter().zip(weight).map(|(v, w)| v * inverse * w).collect()
    }
}

/// The activation of a gated unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// [`silu`].
    Silu,
    /// [`gelu_tanh`].
    GeluTanh,
}

impl Activation {
    /// Its value at `x`.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => silu(x),
            Activation::GeluTanh => gelu_tanh(x),
        }
    }
}

/// The nearest whole number, ties to even, of a magnitude below 2^22: `round_ties_even`, which without SSE 4.1 is a call.
#[inline(always)]
fn round(x: f32) -> f32 {
    const WHOLE: f32 = 12_582_912.0; // 1.5 · 2^23: its neighbours are whole
    (x + WHOLE) - WHOLE
}

/// `eˣ` within 2 units in the last place, for `x` in [`EXP_RANGE`]; beyond, the value at that end. Made of additions
/// and products in this order, none of them fused: the same everywhere, as a library's is not, and fast on any CPU.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.max(EXP_RANGE.0).min(EXP_RANGE.1);
    let n = round(x * std::f32::consts::LOG2_E);
    let r = x - n * LN_2.0;
    let r = r - n * LN_2.1;
    let [rest @ .., last] = EXP_SERIES;
    let series = rest.iter().rev().fold(last, |p, c| p * r + c);
    series * f32::from_bits(((n as i32 + 127) << 23).cast_unsigned())
}

/// Arguments of [`exp`] whose results are neither subnormal nor infinite.
pub const EXP_RANGE: (f32, f32) = (-87.0, 88.0);
/// ln 2 in two parts, the first of so few bits that small whole multiples of it are exact.
pub const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
/// Taylor's coefficients of [`exp`], of the power 0 first.
pub const EXP_SERIES: [f32; 8] = [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];

/// `x / (1 + e⁻ˣ)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU by its approximation with a hyperbolic tangent, `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, computed as
/// `x / (1 + e^(x (a + b x²)))` with [`GELU`]'s `a` and `b`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    x / (1.0 + exp(x * (GELU.0 + GELU.1 * (x * x))))
}

/// `−2 √(2/π)` and 0.044715 times that.
pub const GELU: (f32, f32) = (-1.595_769, -0.071_354_82);

/// The factor of a token that [`scale_output`] takes: activation scale × grid unit (halved for half offsets).
pub fn output_factor(code: &Code, activation_scale: f32) -> f32 {
    activation_scale * if code.half_offset { code.unit * 0.5 } else { code.unit }
}

/// The integer that becomes an output: `acc = Σ entry·q`, of codes with an offset twice that and the activations' sum.
pub fn total(code: &Code, acc: i64, sum: i64) -> i64 {
    if code.half_offset { 2 * acc + sum } else { acc }
}

/// An output: [`total`], scaled by the row's scale and [`output_factor`].
pub fn scale_output(code: &Code, acc: i64, sum: i64, row_scale: f32, factor: f32) -> f32 {
    total(code, acc, sum) as f32 * row_scale * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let expect = f64::from(x).exp();
            let error = (f64::from(exp(x)) / expect - 1.0).abs();
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error:e}");
        }
        assert_eq!((exp(0.0), exp(-1000.0), exp(1000.0)), (1.0, exp(-87.0), exp(88.0)));
        assert_eq!((silu(0.0), silu(100.0)), (0.0, 100.0));
        assert!(silu(-1000.0).abs() < 1e-30);
        for i in -4000..=4000 {
            let x = i as f32 / 200.0;
            let wide = f64::from(x);
            let exact =
                wide / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3))).tanh());
            assert!((f64::from(gelu_tanh(x)) - exact).abs() < 1e-6 * exact.abs().max(1e-3), "{x}: {exact}");
        }
        assert_eq!((gelu_tanh(0.0), gelu_tanh(100.0)), (0.0, 100.0));
    }

    #[test]
    fn activations_split_into_bytes() {
        for q in -16256..=16256i16 {
            let (h, l) = split_activation(q);
            assert_eq!(i32::from(q), i32::from(h) * 128 + i32::from(l));
            assert!((-64..64).contains(&l));
        }
        for i in -4 * 16256..=4 * 16256 {
            let x = i as f32 / 4.0;
            assert_eq!(round(x), x.round_ties_even());
        }
        let a = quantize_activations(&[0.0, -2.0, 1.0]);
        assert_eq!((a.q, a.sum), (vec![0, -16256, 8128], -8128));
        assert_eq!(quantize_activations(&[0.0; 4]).scale, 0.0);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let a = quantize_activations(&[1.0, bad, f32::MAX]);
            assert_eq!((a.q, a.scale, a.sum), (vec![0; 3], f32::INFINITY, 0), "{bad}");
        }
    }

    #[test]
    fn mean_squares_are_near_for_every_length() {
        for n in [1, 3, 4, 127, 128, 129, 700, 4096, 4097, 5000] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin() + 0.5).collect();
            let exact = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            assert!((f64::from(mean_square(&x)) / exact - 1.0).abs() < 1e-6, "{n}");
        }
    }
}

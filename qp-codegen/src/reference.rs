//! What a quantized linear layer computes, operation by operation: the arithmetic that the CPU engine, the
//! interpreted kernels and the GPU share bit for bit.
//!
//! For a token's input `x` (`columns` values) and a layer with quantizer `q`:
//!
//! 1. [`rotate`]: signs and Hadamard transform, in `f32`, in a fixed order of operations.
//! 2. [`quantize_activations`]: to 15-bit integers with one scale.
//! 3. An exact integer product with the decoded entries, padding being zero.
//! 4. [`scale_output`]: one conversion and two products in `f32`.

use crate::layout;
use crate::spec::{Code, Rotation};

/// Largest magnitude of a quantized activation: `127·128`, so that it splits into two signed bytes.
pub const ACTIVATION_MAX: f32 = 16256.0;

/// An orthonormal Hadamard transform of any even length.
///
/// `columns = blocks · m · 2^log2` where an `m × m` Hadamard matrix (Paley's constructions over a prime field) takes up
/// the odd part. If no such `m` exists, `blocks > 1` separate power-of-two transforms run side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hadamard {
    /// Length of the transform.
    pub columns: u32,
    /// Independent transforms side by side; 1 unless the odd part has no known matrix.
    pub blocks: u32,
    /// log2 of the butterfly part.
    pub log2: u32,
    /// The `m × m` matrix, row-major, true for −1. Just `[false]` for powers of two.
    pub base: Vec<bool>,
    /// Order of `base`.
    pub m: u32,
}

impl Hadamard {
    /// The transform of `columns` > 0 values.
    pub fn new(columns: u32) -> Self {
        let odd = columns >> columns.trailing_zeros();
        let two = columns.trailing_zeros();
        if odd == 1 {
            return Hadamard { columns, blocks: 1, log2: two, base: vec![false], m: 1 };
        }
        // Orders are multiples of 4; beyond 512 the dense part would cost more than it mixes.
        for e in 2..=two {
            let m = odd << e;
            if m > 512 {
                break;
            }
            if let Some(base) = paley(m) {
                return Hadamard { columns, blocks: 1, log2: two - e, base, m };
            }
        }
        Hadamard { columns, blocks: odd, log2: two, base: vec![false], m: 1 }
    }

    /// The transform's inverse, which is its transpose: `base` is transposed, butterflies are symmetric.
    pub fn transposed(mut self) -> Self {
        let m = self.m as usize;
        self.base = (0..m * m).map(|i| self.base[i % m * m + i / m]).collect();
        self
    }

    /// `1 / √(columns / blocks)`, which makes the transform orthonormal.
    pub fn norm(&self) -> f32 {
        (1.0 / f64::from(self.columns / self.blocks).sqrt()) as f32
    }

    /// `x ← H·x / √n`: butterflies of stride 1, 2, 4, …, then the dense part in order of its columns, then the norm.
    pub fn apply(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.columns as usize, "length of the transform");
        let two = 1usize << self.log2;
        for group in x.chunks_exact_mut(two) {
            let mut stride = 1;
            while stride < two {
                for pair in group.chunks_exact_mut(2 * stride) {
                    let (lo, hi) = pair.split_at_mut(stride);
                    for (u, v) in lo.iter_mut().zip(hi) {
                        (*u, *v) = (*u + *v, *u - *v);
                    }
                }
                stride *= 2;
            }
        }
        let m = self.m as usize;
        if m > 1 {
            let mut out = vec![0f32; two];
            let input = x.to_vec();
            for (row, dst) in self.base.chunks_exact(m).zip(x.chunks_exact_mut(two)) {
                for (j, (&neg, src)) in row.iter().zip(input.chunks_exact(two)).enumerate() {
                    for (o, &s) in out.iter_mut().zip(src) {
                        let s = if neg { -s } else { s };
                        *o = if j == 0 { s } else { *o + s };
                    }
                }
                dst.copy_from_slice(&out);
            }
        }
        let norm = self.norm();
        x.iter_mut().for_each(|v| *v *= norm);
    }
}

/// An `m × m` Hadamard matrix by Paley's first or second construction over a prime field, true for −1.
fn paley(m: u32) -> Option<Vec<bool>> {
    let prime = |q: u32| q > 2 && (2..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d));
    // Quadratic character: 0, 1 or −1.
    let chi = |q: u32, a: u32| {
        if a == 0 {
            0
        } else if (1..q).any(|b| b * b % q == a) {
            1
        } else {
            -1
        }
    };
    let size = m as usize;
    let mut h = vec![0i32; size * size];
    if prime(m - 1) && (m - 1) % 4 == 3 {
        let q = m - 1;
        let row: Vec<i32> = (0..q).map(|a| chi(q, a)).collect();
        for i in 0..m {
            for j in 0..m {
                let s = match (i, j) {
                    (0, 0) => 0,
                    (0, _) => 1,
                    (_, 0) => -1,
                    _ => row[((i + q - j) % q) as usize],
                };
                h[(i * m + j) as usize] = s + i32::from(i == j);
            }
        }
    } else if m.is_multiple_of(4) && prime(m / 2 - 1) && (m / 2 - 1) % 4 == 1 {
        let q = m / 2 - 1;
        let row: Vec<i32> = (0..q).map(|a| chi(q, a)).collect();
        for i in 0..q + 1 {
            for j in 0..q + 1 {
                let s = match (i, j) {
                    (0, 0) => 0,
                    (0, _) | (_, 0) => 1,
                    _ => row[((i + q - j) % q) as usize],
                };
                let d = i32::from(i == j);
                let cell = [[s + d, s - d], [s - d, -s - d]];
                for (a, r) in cell.iter().enumerate() {
                    for (b, &v) in r.iter().enumerate() {
                        h[(2 * i as usize + a) * size + 2 * j as usize + b] = v;
                    }
                }
            }
        }
    } else {
        return None;
    }
    Some(h.into_iter().map(|v| v < 0).collect())
}

/// A [`Rotation`], or its inverse, made ready for rows of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotator(Option<Turn>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Turn {
    signs: Vec<bool>,
    hadamard: Hadamard,
    back: bool,
}

impl Rotator {
    /// Prepares `rotation` for rows of `columns` > 0 values.
    pub fn new(rotation: Rotation, columns: u32) -> Self {
        match rotation {
            Rotation::None => Rotator(None),
            Rotation::Hadamard { seed } => Rotator(Some(Turn {
                signs: layout::signs(seed, columns),
                hadamard: Hadamard::new(columns),
                back: false,
            })),
        }
    }

    /// Prepares the inverse of `rotation`: the transposed transform, then the signs.
    pub fn inverse(rotation: Rotation, columns: u32) -> Self {
        let turn = Rotator::new(rotation, columns).0;
        Rotator(turn.map(|t| Turn { hadamard: t.hadamard.transposed(), back: true, ..t }))
    }

    /// Rotates one row of weights or one token's activations, in place.
    pub fn apply(&self, x: &mut [f32]) {
        let Some(Turn { signs, hadamard, back }) = &self.0 else { return };
        if *back {
            hadamard.apply(x);
        }
        for (v, neg) in x.iter_mut().zip(signs) {
            if *neg {
                *v = -*v;
            }
        }
        if !*back {
            hadamard.apply(x);
        }
    }
}

/// Applies `rotation` to one row of weights or one token's activations, in place. For many rows, see [`Rotator`].
pub fn rotate(rotation: Rotation, x: &mut [f32]) {
    Rotator::new(rotation, u32::try_from(x.len()).expect("columns fit u32")).apply(x);
}

/// One token's activations as integers: `x ≈ q · scale`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activations {
    /// `columns` integers of magnitude at most 16256.
    pub q: Vec<i16>,
    /// Largest magnitude of `x`, over 16256.
    pub scale: f32,
    /// Sum of `q`.
    pub sum: i64,
}

/// Rounds one token's (rotated) activations to 15-bit integers.
pub fn quantize_activations(x: &[f32]) -> Activations {
    let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let inverse = if amax > 0.0 { ACTIVATION_MAX / amax } else { 0.0 };
    let q: Vec<i16> = x.iter().map(|v| round(v * inverse) as i16).collect();
    let sum = q.iter().map(|&v| i64::from(v)).sum();
    Activations { q, scale: amax / ACTIVATION_MAX, sum }
}

/// Splits an activation into signed bytes: `q = 128·high + low`, `low` in −64..64.
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

/// Mean of the squares of `x`, summed in a fixed order: 256 strided partial sums, then a tree.
pub fn mean_square(x: &[f32]) -> f32 {
    let mut partial = [0f32; MEAN_LANES];
    for chunk in x.chunks(MEAN_LANES) {
        for (p, v) in partial.iter_mut().zip(chunk) {
            *p += v * v;
        }
    }
    let mut half = MEAN_LANES / 2;
    while half > 0 {
        for j in 0..half {
            partial[j] += partial[j + half];
        }
        half /= 2;
    }
    partial[0] / x.len() as f32
}

/// Partial sums of [`mean_square`].
pub const MEAN_LANES: usize = 256;

/// Root-mean-square norm: `x / √(mean(x²) + eps) · weight`, in this order of operations.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let inverse = 1.0 / (mean_square(x) + eps).sqrt();
    x.iter().zip(weight).map(|(v, w)| v * inverse * w).collect()
}

/// The nearest whole number, ties to even, of a magnitude below 2^22: `round_ties_even`, which without SSE 4.1 is a call.
fn round(x: f32) -> f32 {
    const WHOLE: f32 = 12_582_912.0; // 1.5 · 2^23: its neighbours are whole
    (x + WHOLE) - WHOLE
}

/// `eˣ` within 2 units in the last place, for `x` in [`EXP_RANGE`]; beyond, the value at that end. Made of additions
/// and products in this order, none of them fused: the same everywhere, as a library's is not, and fast on any CPU.
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
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The factor of a token that [`scale_output`] takes: activation scale × grid unit (halved for half offsets).
pub fn output_factor(code: &Code, activation_scale: f32) -> f32 {
    activation_scale * if code.half_offset { code.unit * 0.5 } else { code.unit }
}

/// An output: `acc = Σ entry·q` and the activations' sum, scaled by the row's scale and [`output_factor`].
pub fn scale_output(code: &Code, acc: i64, sum: i64, row_scale: f32, factor: f32) -> f32 {
    let acc = if code.half_offset { 2 * acc + sum } else { acc };
    acc as f32 * row_scale * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hadamard_is_orthonormal_and_mixes() {
        for (n, m, blocks) in [
            (2, 1, 1),
            (256, 1, 1),
            (768, 12, 1),
            (576, 36, 1),
            (1536, 12, 1),
            (3584, 28, 1),
            (18944, 148, 1),
            (160, 20, 1),
            (344, 1, 43),
            (6, 1, 3),
        ] {
            let h = Hadamard::new(n);
            assert_eq!((h.m, h.blocks), (m, blocks), "order of {n}");
            let dense = |j: u32| {
                let mut x = vec![0f32; n as usize];
                x[j as usize] = 1.0;
                h.apply(&mut x);
                x
            };
            let a = dense(0);
            for j in [0, 1, n / 3, n - 1] {
                let b = dense(j);
                let dot: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                let expect = if j == 0 { 1.0 } else { 0.0 };
                assert!((dot - expect).abs() < 1e-5, "{n} column {j}: {dot}");
            }
        }
    }

    #[test]
    fn every_pair_of_rows_of_a_paley_matrix_is_orthogonal() {
        for m in [4, 12, 20, 28, 36, 44, 60, 76, 108, 140, 148] {
            let h = paley(m).unwrap_or_else(|| panic!("order {m}"));
            let row = |i: usize| &h[i * m as usize..(i + 1) * m as usize];
            for i in 0..m as usize {
                for j in 0..i {
                    let equal = row(i).iter().zip(row(j)).filter(|(a, b)| a == b).count();
                    assert_eq!(equal * 2, m as usize, "order {m}, rows {i} {j}");
                }
            }
        }
    }

    #[test]
    fn rotation_keeps_products() {
        let mut a: Vec<f32> = (0..768).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut b: Vec<f32> = (0..768).map(|i| (i as f32 * 0.11).cos()).collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let before = dot(&a, &b);
        let r = Rotation::Hadamard { seed: 7 };
        rotate(r, &mut a);
        rotate(r, &mut b);
        assert!((dot(&a, &b) - before).abs() < 1e-3, "{} {before}", dot(&a, &b));
    }

    #[test]
    fn rotations_are_undone() {
        for columns in [6, 256, 344, 576, 768, 4864] {
            let x: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.37).sin()).collect();
            let rotation = Rotation::Hadamard { seed: 7 };
            let mut y = x.clone();
            rotate(rotation, &mut y);
            Rotator::inverse(rotation, columns).apply(&mut y);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5), "{columns}");
        }
    }

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
    }
}

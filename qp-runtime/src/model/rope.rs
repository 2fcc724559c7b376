//! Rotary position embedding: which columns of a head turn, how fast, and the tables of it.
//!
//! Frequencies follow the rules of transformers' `modeling_rope_utils.py`, computed in `f64`.

use std::f64::consts::TAU;

/// How frequencies are stretched for long contexts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Every position divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths over `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths under `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original: f64,
    },
    /// YaRN: a ramp over the frequencies' numbers, and larger scores.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Context length before stretching.
        original: f64,
        /// Frequencies that turn more often in the original context are kept.
        beta_fast: f64,
        /// Frequencies that turn less often are divided.
        beta_slow: f64,
        /// Whether the ramp begins and ends at whole numbers of frequencies.
        truncate: bool,
        /// What cosines and sines are multiplied with.
        attention: f64,
    },
    /// LongRoPE: a divisor for each frequency, others in contexts longer than the original one.
    Long {
        /// Divisors in contexts up to `original`.
        short: Vec<f64>,
        /// Divisors in longer ones.
        long: Vec<f64>,
        /// Context length before stretching.
        original: usize,
        /// What cosines and sines are multiplied with.
        attention: f64,
    },
}

/// What YaRN multiplies cosines and sines with where nothing else is said, for a context that is longer by `factor`; `by` weighs
/// its logarithm, and is 1 then.
pub fn yarn_attention(factor: f64, by: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 }
}

/// What LongRoPE multiplies cosines and sines with where nothing else is said: the context is longer by `factor` than the
/// `original` one, in tokens.
pub fn long_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

/// Rotary position embedding of heads: their first `2 · frequencies.len()` columns turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angles a position, in radians.
    pub frequencies: Vec<f64>,
    /// Those of an engine whose context is longer than so many tokens.
    pub long: Option<(usize, Vec<f64>)>,
    /// What cosines and sines are multiplied with.
    pub factor: f64,
    /// True if column `2i` turns with column `2i + 1`; otherwise `i` turns with `i + frequencies.len()`.
    pub interleaved: bool,
}

impl Rope {
    /// The rule of `scaling` for `columns` columns, an even number, and the base `theta`.
    pub fn new(theta: f64, columns: usize, scaling: &RopeScaling) -> Rope {
        let dim = columns as f64;
        let plain: Vec<f64> = (0..columns / 2).map(|i| theta.powf(-2.0 * i as f64 / dim)).collect();
        let (mut long, mut factor) = (None, 1.0);
        let frequencies = match scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let stretched = |f: &f64| {
                    // Turns in the original context: few means a low frequency.
                    let turns = original * f / TAU;
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                };
                plain.iter().map(stretched).collect()
            }
            RopeScaling::Yarn { factor: by, original, beta_fast, beta_slow, truncate, attention } => {
                factor = *attention;
                // The number of the frequency that turns so often in the original context.
                let number = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
                let (low, high) = (number(*beta_fast), number(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let stretched = |(i, f): (usize, &f64)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    divided * f / by + (1.0 - divided) * f
                };
                plain.iter().enumerate().map(stretched).collect()
            }
            RopeScaling::Long { short, long: divisors, original, attention } => {
                factor = *attention;
                let divided = |by: &[f64]| plain.iter().zip(by).map(|(f, by)| f / by).collect();
                long = Some((*original, divided(divisors)));
                divided(short)
            }
        };
        Rope { frequencies, long, factor, interleaved: false }
    }
}

/// Cosines and sines of every position and frequency: `positions × half`, position-major.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// The number of frequencies.
    pub half: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl RopeTables {
    /// Cosines and sines of `position`, `half` of each.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// The tables of positions `0..positions`, computed in `f64` and rounded to `f32`: the same for every engine with so many.
pub fn rope_tables(rope: &Rope, positions: usize) -> RopeTables {
    let frequencies = match &rope.long {
        Some((beyond, long)) if positions > *beyond => long,
        _ => &rope.frequencies,
    };
    let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    RopeTables {
        half: frequencies.len(),
        cos: angles().map(|a| (a.cos() * rope.factor) as f32).collect(),
        sin: angles().map(|a| (a.sin() * rope.factor) as f32).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THETA: f64 = 500_000.0;

    fn of(scaling: RopeScaling) -> Rope {
        Rope::new(THETA, 128, &scaling)
    }

    #[test]
    fn tables_hold_unit_turns() {
        let t = rope_tables(&of(RopeScaling::None), 5);
        assert_eq!((t.half, t.cos.len()), (64, 320));
        assert_eq!(t.at(0), (&[1.0; 64][..], &[0.0; 64][..]));
        let (c, s) = t.at(3);
        assert_eq!((c[0], s[0]), (3f64.cos() as f32, 3f64.sin() as f32));
        assert!(c.iter().zip(s).all(|(c, s)| (c * c + s * s - 1.0).abs() < 1e-6));
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let plain = of(RopeScaling::None).frequencies;
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192.0 };
        let scaled = of(llama3).frequencies;
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        // Wavelength 2π/f lies between 8192/4 and 8192 exactly for the frequencies in between.
        for (p, s) in plain.iter().zip(&scaled) {
            let wave = TAU / p;
            let between = wave > 2048.0 && wave < 8192.0;
            assert_eq!(between, *s < *p && *s > p / 8.0, "wavelength {wave}");
        }
        let linear = of(RopeScaling::Linear { factor: 4.0 }).frequencies;
        assert!(linear.iter().zip(&plain).all(|(a, b)| *a == b / 4.0));
    }

    #[test]
    fn long_contexts_have_divisors_of_their_own() {
        let scaling = RopeScaling::Long { short: vec![1.0; 2], long: vec![2.0, 4.0], original: 10, attention: 1.25 };
        let rope = Rope::new(100.0, 4, &scaling);
        let (short, long) = (rope_tables(&rope, 10), rope_tables(&rope, 11));
        assert_eq!(short.at(3).1, [(3f64.sin() * 1.25) as f32, (0.3f64.sin() * 1.25) as f32]);
        assert_eq!(long.at(3).1, [(1.5f64.sin() * 1.25) as f32, (0.075f64.sin() * 1.25) as f32]);
    }
}

//! Choosing the next token from logits, exactly: the CPU and the kernel [`crate::kernels::sample`] choose the same token.
//!
//! 1. **Penalty.** A positive logit of a token that was seen before is divided by the repetition penalty, a negative one is
//!    multiplied with it. A penalty of 0 forbids those tokens: their logits are −∞.
//! 2. **Order.** Tokens are ordered by how far, as a rounded `f32`, their logits lie below the largest finite one, then by
//!    number. Logits that are infinite lie infinitely far below. One that is not a number is an error.
//! 3. **Weights.** `e^(−distance / temperature)` by [`exp`], times 2^26, rounded to a whole number. Sums of
//!    them are exact.
//! 4. **Limits.** `top_k` keeps the first so many tokens. `top_p` keeps of these the first ones, at least one, whose weights
//!    sum up to that share of the weight of all that `top_k` keeps. `min_p` keeps tokens whose weight is at least that share
//!    of the largest.
//! 5. **Draw.** Of the kept tokens, in order of their numbers, the first up to which the weights sum up to more than
//!    [`random`]` / 2^31` of all.
//!
//! Without a temperature the first token of the order is taken.

use super::exp;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest logit (greedy).
    pub temperature: f32,
    /// Only the so many largest logits are drawn from; 0 for no limit.
    pub top_k: usize,
    /// Only the fewest tokens are drawn from whose probabilities reach this sum; 1 for no limit.
    pub top_p: f32,
    /// Only tokens are drawn from whose probability is at least this share of the largest; 0 for no limit.
    pub min_p: f32,
    /// Equal seeds draw equal tokens from equal logits.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// log2 of the largest weight.
pub const WEIGHT_BITS: u32 = 26;
/// log2 of what `top_p` is rounded to parts of.
pub const SHARE_BITS: u32 = 24;
/// Bits of [`random`].
pub const RANDOM_BITS: u32 = 31;
/// Most tokens of a vocabulary: the kernel's partial sums of weights fit 32 bits.
pub const MOST_TOKENS: usize = 1 << 18;
/// Numbers of a row's settings as the kernel takes them: see [`Sampling::words`].
pub const WORDS: usize = 8;

impl Sampling {
    /// True if the first of the largest logits is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_k == 1
    }

    /// The settings as the kernel takes them: bits of the temperature; tokens of the first limit, 0 for none; the second in
    /// parts of 2^24; the least weight; bits of the repetition penalty; the seed, low and high half; `slot`, the row of the
    /// mask of seen tokens (see [`crate::kernels::sample`]).
    pub fn words(&self, penalty: f32, slot: u32) -> [u32; WORDS] {
        let share = |p: f32, bits: u32| (p.clamp(0.0, 1.0) * (1u64 << bits) as f32).round_ties_even() as u32;
        let greedy = self.temperature <= 0.0;
        [
            if greedy { 1.0f32.to_bits() } else { self.temperature.to_bits() },
            if greedy { 1 } else { u32::try_from(self.top_k).unwrap_or(0) },
            share(self.top_p, SHARE_BITS),
            share(self.min_p, WEIGHT_BITS),
            penalty.to_bits(),
            self.seed as u32,
            (self.seed >> 32) as u32,
            slot,
        ]
    }

    /// The next token by its logits, or nothing if one is not a number or none is finite. `seen` says whether a token was seen
    /// before, for which the repetition penalty is; it is not asked if that is 1. `draw` numbers the draws of the seed.
    pub fn choose(&self, logits: &[f32], penalty: f32, seen: impl Fn(usize) -> bool, draw: u32) -> Option<u32> {
        let [temperature, top_k, top_p, least, ..] = self.words(penalty, 0);
        let temperature = f32::from_bits(temperature);
        let penalized = |(i, &v): (usize, &f32)| match penalty != 1.0 && seen(i) {
            true if penalty == 0.0 => v - f32::INFINITY,
            true if v > 0.0 => v / penalty,
            true => v * penalty,
            false => v,
        };
        let logits: Vec<f32> = logits.iter().enumerate().map(penalized).collect();
        if logits.iter().any(|v| v.is_nan()) {
            return None;
        }
        let largest = logits.iter().copied().filter(|v| v.is_finite()).reduce(f32::max)?;
        // Bits of numbers that are not negative are ordered as the numbers are.
        let distance = |v: f32| if v.is_finite() { largest - v } else { f32::INFINITY };
        let keys: Vec<u32> = logits.iter().map(|&v| distance(v).to_bits() & i32::MAX as u32).collect();
        if top_k == 1 {
            return keys.iter().position(|key| *key == 0).map(|i| i as u32);
        }
        let weight = |i: u32| weight(keys[i as usize], temperature);
        let order = |a: &u32, b: &u32| (keys[*a as usize], *a).cmp(&(keys[*b as usize], *b));
        let mut kept: Vec<u32> = (0..keys.len() as u32).collect();
        if top_k > 0 && (top_k as usize) < kept.len() {
            kept.select_nth_unstable_by(top_k as usize, order);
            kept.truncate(top_k as usize);
        }
        kept.retain(|i| weight(*i) > 0);
        if top_p < 1 << SHARE_BITS {
            let all: u64 = kept.iter().map(|i| u64::from(weight(*i))).sum();
            let target = ((u128::from(all) * u128::from(top_p)) >> SHARE_BITS) as u64;
            kept.sort_unstable_by(order);
            let mut sum = 0;
            let before = kept.iter().take_while(|i| {
                sum += u64::from(weight(**i));
                sum < target
            });
            let count = before.count() + 1;
            kept.truncate(count);
        }
        kept.retain(|i| weight(*i) >= least);
        kept.sort_unstable();
        let all: u64 = kept.iter().map(|i| u64::from(weight(*i))).sum();
        let target = ((u128::from(all) * u128::from(random(self.seed, draw))) >> RANDOM_BITS) as u64;
        let mut sum = 0;
        kept.into_iter().find(|i| {
            sum += u64::from(weight(*i));
            sum > target
        })
    }
}

/// The weight of a token whose distance has the bits `key`.
fn weight(key: u32, temperature: f32) -> u32 {
    (exp(-f32::from_bits(key) / temperature) * (1u32 << WEIGHT_BITS) as f32).round_ties_even() as u32
}

/// Draw number `draw` of a seed: 31 random bits.
pub fn random(seed: u64, draw: u32) -> u32 {
    mix(mix(mix(draw) ^ seed as u32) ^ (seed >> 32) as u32) >> (32 - RANDOM_BITS)
}

/// Multipliers of [`mix`].
pub const MIX: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

/// A bijection of words that changes half of all bits where one differs.
fn mix(mut x: u32) -> u32 {
    x = x.wrapping_add(0x9E37_79B9);
    x = (x ^ (x >> 16)).wrapping_mul(MIX[0]);
    x = (x ^ (x >> 15)).wrapping_mul(MIX[1]);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: fn(usize) -> bool = |_| false;

    fn draws(sampling: Sampling, logits: &[f32], n: u32) -> Vec<u32> {
        (0..n).map(|draw| sampling.choose(logits, 1.0, NONE, draw).unwrap()).collect()
    }

    #[test]
    fn without_a_temperature_the_first_of_the_largest_is_taken() {
        let greedy = Sampling::default();
        assert!(greedy.is_greedy());
        assert_eq!(greedy.choose(&[0.0, 2.0, 2.0, f32::NEG_INFINITY, f32::INFINITY], 1.0, NONE, 3), Some(1));
        assert_eq!(greedy.choose(&[-0.0, 0.0], 1.0, NONE, 0), Some(0));
        assert_eq!(greedy.choose(&[0.0, f32::NAN], 1.0, NONE, 0), None);
        assert_eq!(greedy.choose(&[f32::NEG_INFINITY], 1.0, NONE, 0), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32.ln(), 0.125f32.ln(), 0.375f32.ln()];
        let base = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        let tokens = draws(base, &logits, 20_000);
        for (token, p) in [0.5, 0.125, 0.375].into_iter().enumerate() {
            let share = tokens.iter().filter(|&&t| t == token as u32).count() as f64 / 20_000.0;
            assert!((share - p).abs() < 0.015, "token {token}: {share}");
        }
        // At temperature ½ probabilities are squared: 0.25, 0.0156, 0.1406 of 0.4062.
        let tokens = draws(Sampling { temperature: 0.5, ..base }, &logits, 20_000);
        let share = tokens.iter().filter(|&&t| t == 0).count() as f64 / 20_000.0;
        assert!((share - 0.615).abs() < 0.015, "{share}");
    }

    #[test]
    fn limits() {
        let logits = [0.5f32.ln(), 0.125f32.ln(), 0.375f32.ln()];
        let base = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        let seen = |s| (0..3u32).filter(|t| draws(s, &logits, 500).contains(t)).collect::<Vec<_>>();
        assert_eq!(seen(base), [0, 1, 2]);
        assert_eq!(seen(Sampling { top_k: 2, ..base }), [0, 2]);
        assert_eq!(seen(Sampling { top_k: 1, ..base }), [0]);
        assert_eq!(seen(Sampling { top_p: 0.8, ..base }), [0, 2]);
        assert_eq!(seen(Sampling { top_p: 0.4, ..base }), [0]);
        assert_eq!(seen(Sampling { top_p: 0.0, ..base }), [0]);
        assert_eq!(seen(Sampling { min_p: 0.5, ..base }), [0, 2]);
        assert_eq!(seen(Sampling { min_p: 0.8, ..base }), [0]);
        assert_eq!(seen(Sampling { min_p: 1.0, ..base }), [0]);
        // Shares are of what the first limit keeps: ⅘ · ⅞ = 0.7.
        assert_eq!(seen(Sampling { top_k: 2, top_p: 0.55, ..base }), [0]);
        assert_eq!(seen(Sampling { top_p: 0.55, ..base }), [0, 2]);
    }

    #[test]
    fn a_penalty_is_for_what_was_seen() {
        let choose = |logits: &[f32], seen: fn(usize) -> bool| Sampling::default().choose(logits, 2.0, seen, 0);
        assert_eq!(choose(&[3.0, 2.0, -4.0], NONE), Some(0));
        assert_eq!(choose(&[3.0, 2.0, -4.0], |i| i == 0), Some(1));
        assert_eq!(choose(&[-3.0, -4.0], |i| i == 0), Some(1));
        assert_eq!(choose(&[-3.0, -7.0], |i| i == 0), Some(0));
    }

    #[test]
    fn seeds_and_draws_differ_and_repeat() {
        let logits = vec![0.0; 1000];
        let s = |seed| draws(Sampling { temperature: 1.0, seed, ..Sampling::default() }, &logits, 20);
        assert_eq!(s(5), s(5));
        assert_ne!(s(5), s(6));
        assert_ne!(s(5), s(5 | 1 << 40));
        // Each bit is set in about half of the draws.
        for bit in 0..RANDOM_BITS {
            let set = (0..4000).filter(|draw| random(9, *draw) >> bit & 1 == 1).count();
            assert!((1800..2200).contains(&set), "bit {bit}: {set}");
        }
    }
}

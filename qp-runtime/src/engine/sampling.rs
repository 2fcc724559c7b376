//! Choosing the next token from logits.

use super::Error;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest logit (greedy).
    pub temperature: f32,
    /// Only the so many largest logits are drawn from; 0 for no limit.
    pub top_k: usize,
    /// Only the fewest tokens are drawn from whose probabilities reach this sum; 1 for no limit.
    pub top_p: f32,
    /// Equal seeds draw equal tokens from equal logits.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens one after another.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// State of SplitMix64.
    state: u64,
}

impl Sampler {
    /// A sampler at the beginning of its seed's sequence.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, state: sampling.seed }
    }

    /// True if always the first of the largest logits is taken, so that [`super::Engine::greedy`] can do it.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature <= 0.0 || self.sampling.top_k == 1
    }

    /// The next token by its `logits`. Of equal logits, the one with the smaller number comes first.
    ///
    /// # Errors
    /// If a logit is not a number, or none is finite.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let largest = argmax(logits).ok_or(Error::NotANumber)?;
        if self.is_greedy() {
            return Ok(largest);
        }
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k, by_logit);
            order.truncate(top_k);
        }
        order.sort_unstable_by(by_logit);
        let max = f64::from(logits[largest as usize]);
        let mut weights: Vec<f64> =
            order.iter().map(|&t| ((f64::from(logits[t as usize]) - max) / f64::from(temperature)).exp()).collect();
        let mut total: f64 = weights.iter().sum();
        if top_p < 1.0 {
            let target = total * f64::from(top_p);
            let mut sum = 0.0;
            let below = weights.iter().take_while(|&&w| {
                sum += w;
                sum < target
            });
            let keep = below.count() + 1;
            weights.truncate(keep);
            total = weights.iter().sum();
        }
        let mut left = self.uniform() * total;
        for (&token, &weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        // Rounding may leave a trace of `left` after the last.
        Ok(order[weights.len() - 1])
    }

    /// Uniform in 0..1, by 53 bits of SplitMix64.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The first of the largest logits; `None` if one is not a number or none is finite.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (i, &v) in logits.iter().enumerate() {
        if v.is_nan() {
            return None;
        }
        if v.is_finite() && best.is_none_or(|(_, b)| v > b) {
            best = Some((i as u32, v));
        }
    }
    best.map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut s = Sampler::new(sampling);
        (0..n).map(|_| s.next(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(draw(Sampling::default(), &[0.0, 2.0, 2.0, f32::NEG_INFINITY], 2), [1, 1]);
        assert!(Sampler::new(Sampling::default()).next(&[0.0, f32::NAN]).is_err());
        assert!(Sampler::new(Sampling::default()).next(&[f32::NEG_INFINITY]).is_err());
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32.ln(), 0.125f32.ln(), 0.375f32.ln()];
        let tokens = draw(Sampling { temperature: 1.0, seed: 3, ..Sampling::default() }, &logits, 20_000);
        for (token, p) in [0.5, 0.125, 0.375].into_iter().enumerate() {
            let share = tokens.iter().filter(|&&t| t == token as u32).count() as f64 / 20_000.0;
            assert!((share - p).abs() < 0.015, "token {token}: {share}");
        }
        // At temperature ½ probabilities are squared: 0.25, 0.0156, 0.1406 of 0.4062.
        let tokens = draw(Sampling { temperature: 0.5, seed: 3, ..Sampling::default() }, &logits, 20_000);
        let share = tokens.iter().filter(|&&t| t == 0).count() as f64 / 20_000.0;
        assert!((share - 0.615).abs() < 0.015, "{share}");
    }

    #[test]
    fn limits() {
        let logits = [0.5f32.ln(), 0.125f32.ln(), 0.375f32.ln()];
        let base = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        let seen = |s| (0..3u32).filter(|t| draw(s, &logits, 500).contains(t)).collect::<Vec<_>>();
        assert_eq!(seen(base), [0, 1, 2]);
        assert_eq!(seen(Sampling { top_k: 2, ..base }), [0, 2]);
        assert_eq!(seen(Sampling { top_k: 1, ..base }), [0]);
        assert_eq!(seen(Sampling { top_p: 0.8, ..base }), [0, 2]);
        assert_eq!(seen(Sampling { top_p: 0.4, ..base }), [0]);
        assert_eq!(seen(Sampling { top_p: 0.0, ..base }), [0]);
    }

    #[test]
    fn seeds_repeat() {
        let logits = vec![0.0; 1000];
        let s = |seed| draw(Sampling { temperature: 1.0, seed, ..Sampling::default() }, &logits, 20);
        assert_eq!(s(5), s(5));
        assert_ne!(s(5), s(6));
    }
}

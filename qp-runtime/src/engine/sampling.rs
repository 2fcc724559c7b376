//! Choosing the next token from logits.

pub use qp_codegen::reference::sampling::Sampling;

use super::{Choice, Error};

/// Draws the tokens of a text one after another.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// Repetition penalty; 1 for none.
    penalty: f32,
    /// A bit a token: set if it was seen before.
    seen: Vec<u32>,
    /// Tokens drawn.
    draws: u32,
}

impl Sampler {
    /// A sampler at the beginning of its seed's draws.
    pub fn new(sampling: Sampling) -> Self {
        Sampler::with_penalty(sampling, 1.0)
    }

    /// One that divides positive logits of tokens that were seen before by `penalty`, and multiplies negative ones with it.
    pub fn with_penalty(sampling: Sampling, penalty: f32) -> Self {
        Sampler { sampling, penalty, seen: Vec::new(), draws: 0 }
    }

    /// The next choice, which is counted, for an engine to make: there is none if it depends on the tokens that were seen.
    pub fn choice(&mut self) -> Option<Choice> {
        let choice = self.choices(1)?.pop();
        self.took(1);
        choice
    }

    /// The next `count` choices, for an engine to make: there are none if they depend on the tokens that were seen. Those
    /// whose tokens are taken are counted by [`Sampler::took`].
    pub fn choices(&self, count: usize) -> Option<Vec<Choice>> {
        (self.penalty == 1.0).then(|| self.rough_choices(count))
    }

    /// As [`Sampler::choices`], but as if the tokens that were seen did not count: good enough for guesses.
    pub fn rough_choices(&self, count: usize) -> Vec<Choice> {
        let choice = |i| Choice { sampling: self.sampling, draw: self.draws.wrapping_add(i as u32) };
        (0..count).map(choice).collect()
    }

    /// Counts choices whose tokens are taken.
    pub fn took(&mut self, count: usize) {
        self.draws = self.draws.wrapping_add(count as u32);
    }

    /// Notes tokens of the text that were not drawn, such as those of the prompt.
    pub fn saw(&mut self, tokens: &[u32]) {
        for &token in tokens {
            let word = token as usize / 32;
            if self.seen.len() <= word {
                self.seen.resize(word + 1, 0);
            }
            self.seen[word] |= 1 << (token % 32);
        }
    }

    /// The next token by its `logits`: see [`qp_codegen::reference::sampling`].
    ///
    /// # Errors
    /// If a logit is not a number, or none is finite.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let seen = |i: usize| self.seen.get(i / 32).is_some_and(|word| word >> (i % 32) & 1 == 1);
        let token = self.sampling.choose(logits, self.penalty, seen, self.draws).ok_or(Error::NotANumber)?;
        self.draws = self.draws.wrapping_add(1);
        self.saw(&[token]);
        Ok(token)
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
        let logits = [0.0, 2.0, 2.0, f32::NEG_INFINITY];
        assert_eq!(draw(Sampling::default(), &logits, 2), [1, 1]);
        assert_eq!(argmax(&logits), Some(1));
        for bad in [&[0.0, f32::NAN][..], &[f32::NEG_INFINITY]] {
            assert!(Sampler::new(Sampling::default()).next(bad).is_err());
            assert_eq!(argmax(bad), None);
        }
    }

    #[test]
    fn seeds_repeat() {
        let logits = vec![0.0; 1000];
        let s = |seed| draw(Sampling { temperature: 1.0, seed, ..Sampling::default() }, &logits, 20);
        assert_eq!(s(5), s(5));
        assert_ne!(s(5), s(6));
    }

    #[test]
    fn a_penalty_is_for_the_prompt_and_for_what_was_drawn() {
        let mut s = Sampler::with_penalty(Sampling::default(), 2.0);
        assert!(s.choice().is_none(), "it depends on what was seen");
        s.saw(&[1]);
        let logits = [3.0, 4.0, 2.5, -1.0];
        let tokens: Vec<u32> = (0..4).map(|_| s.next(&logits).unwrap()).collect();
        assert_eq!(tokens, [0, 2, 1, 1]);
    }
}

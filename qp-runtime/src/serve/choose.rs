//! Choosing a sequence's next token from its logits, as a request asks for it.
//!
//! Where a request wants no more than drawing, of all tokens or of those that a grammar allows, the engine draws
//! ([`Chooser::choices`]). Otherwise, in this order: the grammar's mask, `logit_bias`, penalties, then the [`Sampler`] with
//! the repetition penalty. Probabilities that are reported
//! are those of the model itself, before all of these.

use std::collections::BTreeMap;

use crate::engine::sampling::argmax;
use crate::engine::{Choice, Error, Sampler, Sampling, Wish};

/// What a grammar allows next. See [`super::grammar`].
pub trait Grammar: Send {
    /// Which of `vocab` tokens may not come next, as a [`Wish`] says it.
    ///
    /// # Errors
    /// If the grammar is too complex to go on.
    fn forbidden(&mut self, vocab: usize) -> Result<Vec<u32>, String>;

    /// The token was chosen.
    ///
    /// # Errors
    /// If the grammar does not allow it.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// True if nothing can follow.
    fn is_done(&self) -> bool;
}

/// How the tokens of a sequence are chosen.
#[derive(Default)]
pub struct Choosing {
    /// Drawing.
    pub sampling: Sampling,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Taken from the logit of a token that was generated before.
    pub presence: f32,
    /// Taken from a token's logit for each time it was generated.
    pub frequency: f32,
    /// Divides positive logits of tokens that occurred before, prompt included, and multiplies negative ones; 1 for none.
    pub repetition: Option<f32>,
    /// How many of the likeliest tokens to report beside the chosen one; nothing is reported without it.
    pub logprobs: Option<usize>,
    /// What the text must be like.
    pub grammar: Option<Box<dyn Grammar>>,
}

/// A token's probability, as natural logarithm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogProb {
    /// The token.
    pub token: u32,
    /// ln of its probability.
    pub logprob: f32,
}

/// The probabilities that were asked for with a token.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// ln of the chosen token's probability.
    pub chosen: f32,
    /// The likeliest tokens, from the likeliest down.
    pub top: Vec<LogProb>,
}

/// Why a token could not be chosen.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The logits are unusable.
    #[error(transparent)]
    Engine(#[from] Error),
    /// The grammar failed.
    #[error("the grammar of the request cannot go on: {0}")]
    Grammar(String),
}

/// Chooses one sequence's tokens.
pub struct Chooser {
    choosing: Choosing,
    sampler: Sampler,
    /// What the grammar forbids next, once it was asked.
    forbidden: Option<Vec<u32>>,
    /// Generated tokens and how often; ordered, so that sums are always formed in one order.
    counts: BTreeMap<u32, u32>,
}

impl Chooser {
    /// A chooser for a sequence that begins with `prompt`.
    pub fn new(choosing: Choosing, prompt: &[u32]) -> Self {
        let mut sampler = Sampler::with_penalty(choosing.sampling, choosing.repetition.unwrap_or(1.0));
        if choosing.repetition.is_some() {
            sampler.saw(prompt);
        }
        Chooser { sampler, choosing, forbidden: None, counts: BTreeMap::new() }
    }

    /// Finds out which of `vocab` tokens may come next; to be called before a token is chosen.
    ///
    /// # Errors
    /// If the grammar fails.
    pub fn prepare(&mut self, vocab: usize) -> Result<(), Failure> {
        if let (Some(grammar), None) = (&mut self.choosing.grammar, &self.forbidden) {
            self.forbidden = Some(grammar.forbidden(vocab).map_err(Failure::Grammar)?);
        }
        Ok(())
    }

    /// The tokens that may not come next, if some may not: see [`Chooser::prepare`].
    pub fn forbidden(&self) -> &[u32] {
        self.forbidden.as_deref().unwrap_or_default()
    }

    /// The next `count` choices, of the tokens that are not [`Chooser::forbidden`], if an engine can make them: then
    /// [`Chooser::took`] is to be told what came out. With a grammar, what is forbidden is known of the first only.
    pub fn choices(&self, count: usize) -> Option<Vec<Choice>> {
        let c = &self.choosing;
        let simple = c.bias.is_empty()
            && c.presence == 0.0
            && c.frequency == 0.0
            && c.repetition.is_none()
            && c.logprobs.is_none();
        // Draws count only once a token has come out.
        if simple { self.sampler.choices(count) } else { None }
    }

    /// What an engine is to give for the next `count` tokens: the tokens, if it can choose them, else the logits.
    pub fn wishes(&self, count: usize) -> Vec<Wish<'_>> {
        match self.choices(count) {
            Some(choices) => choices.into_iter().map(|choice| Wish::Token(choice, self.forbidden())).collect(),
            None => vec![Wish::Logits; count],
        }
    }

    /// True if the next token is chosen here, from logits.
    pub fn needs_logits(&self) -> bool {
        self.choices(0).is_none()
    }

    /// By which the next `count` tokens may be guessed. There are none under a grammar, which forbids most guesses.
    pub fn guessing(&self, count: usize) -> Vec<Choice> {
        let count = if self.choosing.grammar.is_some() { 0 } else { count };
        self.sampler.rough_choices(count)
    }

    /// The engine made the next choice.
    ///
    /// # Errors
    /// If the grammar fails.
    pub fn took(&mut self, token: u32) -> Result<(), Failure> {
        self.sampler.took(1);
        self.accept(token)
    }

    /// The next token by `logits`, which are changed.
    ///
    /// # Errors
    /// If the logits are not numbers or the grammar fails.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<(u32, Option<LogProbs>), Failure> {
        if argmax(logits).is_none() {
            return Err(Error::NotANumber.into());
        }
        let original = self.choosing.logprobs.map(|top| (top, logits.to_vec()));
        self.prepare(logits.len())?;
        if self.forbidden.is_some() {
            for (token, logit) in logits.iter_mut().enumerate() {
                if self.forbidden()[token / 32] >> (token % 32) & 1 == 1 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        for &(token, bias) in &self.choosing.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        self.penalise(logits);
        let token = self.sampler.next(logits)?;
        let report = original.map(|(top, logits)| logprobs(&logits, token, top));
        self.accept(token)?;
        *self.counts.entry(token).or_default() += 1;
        Ok((token, report))
    }

    /// Tells the grammar that `token` was chosen.
    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        self.forbidden = None;
        match &mut self.choosing.grammar {
            Some(grammar) => grammar.accept(token).map_err(Failure::Grammar),
            None => Ok(()),
        }
    }

    /// True if the grammar allows nothing more.
    pub fn is_done(&self) -> bool {
        self.choosing.grammar.as_ref().is_some_and(|g| g.is_done())
    }

    fn penalise(&self, logits: &mut [f32]) {
        let Choosing { presence, frequency, .. } = self.choosing;
        if presence != 0.0 || frequency != 0.0 {
            for (&token, &count) in &self.counts {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit -= presence + frequency * count as f32;
                }
            }
        }
    }
}

/// Probabilities of `token` and of the `top` likeliest tokens by `logits`.
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> LogProbs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let log = |t: u32| (f64::from(logits[t as usize] - max) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if top < order.len() {
        order.select_nth_unstable_by(top, by_logit);
        order.truncate(top);
    }
    order.sort_unstable_by(by_logit);
    LogProbs {
        chosen: log(token),
        top: order.into_iter().map(|token| LogProb { token, logprob: log(token) }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Only(Vec<u32>);

    impl Grammar for Only {
        fn forbidden(&mut self, vocab: usize) -> Result<Vec<u32>, String> {
            assert!(vocab <= 32);
            Ok(vec![self.0.iter().fold(u32::MAX, |mask, token| mask & !(1 << token))])
        }
        fn accept(&mut self, token: u32) -> Result<(), String> {
            self.0.contains(&token).then_some(()).ok_or_else(|| "not allowed".to_owned())
        }
        fn is_done(&self) -> bool {
            false
        }
    }

    fn run(choosing: Choosing, prompt: &[u32], logits: &[f32], n: usize) -> Vec<u32> {
        let mut chooser = Chooser::new(choosing, prompt);
        (0..n).map(|_| chooser.choose(&mut logits.to_vec()).unwrap().0).collect()
    }

    #[test]
    fn bias_and_penalties_change_the_order() {
        let logits = [3.0, 2.5, 2.0, -1.0];
        assert_eq!(run(Choosing::default(), &[], &logits, 2), [0, 0]);
        assert_eq!(
            run(Choosing { bias: vec![(3, 5.0), (0, -100.0), (9, 1.0)], ..Choosing::default() }, &[], &logits, 1),
            [3]
        );
        // 3 − .6 < 2.5, then 2.5 − .6 < 2.4.
        assert_eq!(run(Choosing { presence: 0.6, ..Choosing::default() }, &[], &logits, 4), [0, 1, 0, 0]);
        assert_eq!(run(Choosing { frequency: 0.6, ..Choosing::default() }, &[], &logits, 5), [0, 1, 0, 2, 1]);
        assert_eq!(run(Choosing { repetition: Some(2.0), ..Choosing::default() }, &[0], &logits, 3), [1, 2, 0]);
    }

    #[test]
    fn a_grammar_is_obeyed_and_bias_does_not_undo_it() {
        let choosing = || Choosing { grammar: Some(Box::new(Only(vec![2, 3]))), ..Choosing::default() };
        assert_eq!(run(choosing(), &[], &[3.0, 2.5, 2.0, -1.0], 2), [2, 2]);
        assert_eq!(
            run(Choosing { bias: vec![(0, 100.0), (3, 4.0)], ..choosing() }, &[], &[3.0, 2.5, 2.0, -1.0], 1),
            [3]
        );
        let mut chooser = Chooser::new(choosing(), &[]);
        // An engine makes the same choice by the mask.
        assert!(!chooser.needs_logits());
        chooser.prepare(4).unwrap();
        assert_eq!(chooser.forbidden(), [!0b1100]);
        chooser.took(2).unwrap();
        assert!(chooser.forbidden().is_empty());
        assert!(matches!(chooser.took(1), Err(Failure::Grammar(_))));
    }

    #[test]
    fn probabilities_are_those_of_the_model() {
        let logits = [0.5f32.ln(), 0.125f32.ln(), 0.375f32.ln()];
        let mut chooser =
            Chooser::new(Choosing { bias: vec![(1, 50.0)], logprobs: Some(2), ..Choosing::default() }, &[]);
        let (token, report) = chooser.choose(&mut logits.to_vec()).unwrap();
        let report = report.unwrap();
        assert_eq!((token, report.top.iter().map(|t| t.token).collect::<Vec<_>>()), (1, vec![0, 2]));
        assert!((report.chosen - 0.125f32.ln()).abs() < 1e-6 && (report.top[1].logprob - 0.375f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn an_engine_draws_the_same() {
        let logits: Vec<f32> = (0..50).map(|i| (i * 7 % 13) as f32 / 3.0).collect();
        let sampling = Sampling { temperature: 0.9, top_p: 0.9, seed: 5, ..Sampling::default() };
        let here = run(Choosing { sampling, ..Choosing::default() }, &[], &logits, 20);
        let mut chooser = Chooser::new(Choosing { sampling, ..Choosing::default() }, &[]);
        for token in here {
            // Asking twice changes nothing: a step may fail and be tried again.
            assert_eq!(chooser.choices(1), chooser.choices(1));
            let choice = chooser.choices(1).unwrap()[0];
            assert_eq!(choice.sampling.choose(&logits, 1.0, |_| false, choice.draw), Some(token));
            chooser.took(token).unwrap();
        }
    }

    #[test]
    fn useless_logits_are_an_error() {
        let mut chooser = Chooser::new(Choosing::default(), &[]);
        assert!(matches!(chooser.choose(&mut [0.0, f32::NAN]), Err(Failure::Engine(Error::NotANumber))));
    }
}

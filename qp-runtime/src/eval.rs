//! How well a model predicts: perplexity of a text, divergence from another model, questions with choices.

pub mod questions;

use rayon::prelude::*;

use crate::engine::{Error, Logits, Session, check_tokens};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens scored: all but the first of each whole window.
    pub scored: usize,
    /// Mean negative log-likelihood of a scored token, in nats.
    pub loss: f64,
}

impl Perplexity {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Scores `tokens`, cut into windows of `window` tokens, the rest dropped: tokens 2.. of each window from that
/// window's earlier tokens alone. `progress` sees the tokens done, out of windows × `window`.
///
/// # Errors
/// If there is no whole window, a window exceeds the context, a token is unknown, or the engine fails.
pub fn perplexity(
    session: &mut Session,
    tokens: &[u32],
    window: usize,
    mut progress: impl FnMut(usize),
) -> Result<Perplexity, Error> {
    check(session, tokens, window)?;
    let mut total = 0.0;
    let mut logits = Vec::new();
    let windows = tokens.chunks_exact(window);
    let count = windows.len();
    for (i, window_tokens) in windows.enumerate() {
        session.truncate(0);
        let (inputs, targets) = (&window_tokens[..window - 1], &window_tokens[1..]);
        let most = tokens_at_once(session);
        for (inputs, targets) in inputs.chunks(most).zip(targets.chunks(most)) {
            session.forward(inputs, Logits::All, &mut logits)?;
            let rows = logits.par_chunks_exact(session.vocab()).zip(targets);
            let losses: Vec<f64> = rows.map(|(row, &target)| nll(row, target)).collect();
            total += losses.iter().sum::<f64>();
        }
        progress((i + 1) * window);
    }
    let scored = count * (window - 1);
    let loss = total / scored as f64;
    if loss.is_nan() {
        return Err(Error::NotANumber);
    }
    Ok(Perplexity { tokens: tokens.len(), window, scored, loss })
}

/// How many tokens' logits are held at once: those of a step, and 256 MB.
fn tokens_at_once(session: &Session) -> usize {
    session.most_tokens().min((64 << 20) / session.vocab()).max(1)
}

fn check(session: &Session, tokens: &[u32], window: usize) -> Result<(), Error> {
    if window < 2 {
        return Err(Error::Window(window));
    }
    if tokens.len() < window {
        return Err(Error::ShortText { tokens: tokens.len(), window });
    }
    check_tokens(tokens, 0, tokens.len(), session.vocab())?;
    Ok(())
}

/// How far a model's predictions are from another's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Tokens of a window.
    pub window: usize,
    /// Positions compared: all but the last of each whole window.
    pub scored: usize,
    /// Mean Kullback-Leibler divergence of the model from the reference, in nats: how many more the model needs for what
    /// the reference predicts.
    pub mean: f64,
    /// Largest of a position.
    pub largest: f64,
    /// Share of positions where both have the same likeliest token.
    pub agreement: f64,
}

/// Compares what `session` predicts in windows of a text, as in [`perplexity`], with what `reference` does. `progress` sees
/// the tokens done, out of windows × `window`.
///
/// # Errors
/// As [`perplexity`], and if the models' vocabularies differ in size.
pub fn divergence(
    session: &mut Session,
    reference: &mut Session,
    tokens: &[u32],
    window: usize,
    mut progress: impl FnMut(usize),
) -> Result<Divergence, Error> {
    check(session, tokens, window)?;
    let vocab = session.vocab();
    if reference.vocab() != vocab {
        return Err(Error::Vocabulary { found: vocab, expected: reference.vocab() });
    }
    let (mut total, mut largest, mut same) = (0.0, 0f64, 0);
    let (mut own, mut expected) = (Vec::new(), Vec::new());
    let windows = tokens.chunks_exact(window);
    let scored = windows.len() * (window - 1);
    for (i, window_tokens) in windows.enumerate() {
        session.truncate(0);
        reference.truncate(0);
        let most = tokens_at_once(session).min(tokens_at_once(reference));
        for inputs in window_tokens[..window - 1].chunks(most) {
            session.forward(inputs, Logits::All, &mut own)?;
            reference.forward(inputs, Logits::All, &mut expected)?;
            let rows = own.par_chunks_exact(vocab).zip(expected.par_chunks_exact(vocab));
            let of_rows: Vec<(f64, bool)> = rows
                .map(|(q, p)| (kl(p, q), crate::engine::sampling::argmax(p) == crate::engine::sampling::argmax(q)))
                .collect();
            for (divergence, agrees) in of_rows {
                total += divergence;
                largest = largest.max(divergence);
                same += usize::from(agrees);
            }
        }
        progress((i + 1) * window);
    }
    if total.is_nan() {
        return Err(Error::NotANumber);
    }
    let (mean, agreement) = (total / scored as f64, same as f64 / scored as f64);
    Ok(Divergence { window, scored, mean, largest, agreement })
}

/// Kullback-Leibler divergence of `softmax(q)` from `softmax(p)`, in nats. Not a number if a logit is not.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + x.iter().map(|&v| f64::from(v - most).exp()).sum::<f64>().ln()
    };
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let log_p = f64::from(p) - of_p;
        log_p.exp() * (log_p - (f64::from(q) - of_q))
    });
    terms.sum::<f64>()
}

/// Negative log-likelihood of `target` under `softmax(logits)`, in nats. Not a number if a logit is not.
pub fn nll(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    sum.ln() - f64::from(logits[target as usize] - max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Chunk, Engine, check_chunks};

    /// Logits depend on the position in the window alone: token `p` has the logit ln 3 at position `p`, others 0.
    struct Positions;

    impl Engine for Positions {
        fn vocab(&self) -> usize {
            5
        }
        fn context(&self) -> usize {
            1000
        }
        fn pages(&self) -> usize {
            16
        }
        fn most_tokens(&self) -> usize {
            256
        }
        fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
            check_chunks(self, chunks)?;
            out.clear();
            for p in chunks.iter().flat_map(|c| c.position..c.position + c.tokens.len()) {
                out.extend((0..5).map(|t| if t == p { 3f32.ln() } else { 0.0 }));
            }
            Ok(())
        }
        fn copy_page(&mut self, _: u32, _: u32) -> Result<(), Error> {
            unreachable!("nothing is shared")
        }
    }

    fn positions() -> Session {
        Session::new(Box::new(Positions))
    }

    #[test]
    fn divergences() {
        let (even, third) = ([0f32, 0.0], [0f32, 2f32.ln()]);
        assert_eq!(kl(&even, &even), 0.0);
        let exact = 0.5 * (0.5f64 / (1.0 / 3.0)).ln() + 0.5 * (0.5f64 / (2.0 / 3.0)).ln();
        assert!((kl(&even, &third) - exact).abs() < 1e-7);
        // What is added to all logits changes nothing.
        assert!((kl(&[5.0, 5.0], &[-1.0, 2f32.ln() - 1.0]) - exact).abs() < 1e-6);
        let d = divergence(&mut positions(), &mut positions(), &[4, 0, 1, 4, 0, 4, 4], 3, |_| ()).unwrap();
        assert_eq!((d.scored, d.mean, d.largest, d.agreement), (4, 0.0, 0.0, 1.0));
    }

    #[test]
    fn windows_are_scored_apart_and_the_rest_dropped() {
        let mut seen = Vec::new();
        // Position 0 predicts the second token: 0 has probability 3/7, others 1/7.
        let p = perplexity(&mut positions(), &[4, 0, 1, 4, 0, 4, 4], 3, |n| seen.push(n)).unwrap();
        assert_eq!((p.tokens, p.scored, seen), (7, 4, vec![3, 6]));
        let expect = (3.0 * (7f64 / 3.0).ln() + 7f64.ln()) / 4.0;
        assert!((p.loss - expect).abs() < 1e-6, "{} {expect}", p.loss);
    }

    #[test]
    fn long_windows_come_in_batches() {
        let tokens = vec![0; 600];
        let p = perplexity(&mut positions(), &tokens, 600, |_| ()).unwrap();
        assert_eq!(p.scored, 599);
        let expect = ((7f64 / 3.0).ln() + 4.0 * 7f64.ln() + 594.0 * 5f64.ln()) / 599.0;
        assert!((p.loss - expect).abs() < 1e-6, "{} {expect}", p.loss);
    }

    #[test]
    fn bad_windows() {
        assert!(matches!(perplexity(&mut positions(), &[1; 5], 1, |_| ()), Err(Error::Window(1))));
        let short = perplexity(&mut positions(), &[1; 5], 6, |_| ());
        assert!(matches!(short, Err(Error::ShortText { tokens: 5, window: 6 })));
        let unknown = perplexity(&mut positions(), &[1, 5], 2, |_| ());
        assert!(matches!(unknown, Err(Error::Token { token: 5, vocab: 5 })));
    }

    #[test]
    fn likelihoods() {
        assert!((nll(&[0.0, 0.0], 1) - 2f64.ln()).abs() < 1e-12);
        assert_eq!(nll(&[1e30, 0.0], 0), 0.0);
        assert!(nll(&[f32::NAN, 0.0], 0).is_nan());
    }
}

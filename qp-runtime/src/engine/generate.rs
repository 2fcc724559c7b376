//! Continuing a prompt.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Engine, Error, Logits, PREFILL, Sampler};

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many tokens as were asked for.
    Count,
    /// A token that ends a text.
    End,
    /// The callback asked for it.
    Caller,
}

/// What [`generate()`] did.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The tokens after the prompt, without the one that ends a text.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
    /// Time from the beginning to the first token.
    pub prefill: Duration,
    /// Time from the first token to the last.
    pub decode: Duration,
}

impl Generated {
    /// Tokens a second after the first; 0 if there are none.
    pub fn rate(&self) -> f64 {
        match self.tokens.len() {
            0 | 1 => 0.0,
            n => (n - 1) as f64 / self.decode.as_secs_f64(),
        }
    }
}

/// Starts a new sequence with `prompt` and appends up to `count` tokens; `on_token` sees each as it is chosen.
/// A token of `end` ends the text and is not given to `on_token`.
///
/// # Errors
/// If the prompt is empty, prompt and `count` tokens do not fit the context, or the engine fails.
pub fn generate<E: From<Error>>(
    engine: &mut dyn Engine,
    prompt: &[u32],
    count: usize,
    end: &[u32],
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32) -> Result<ControlFlow<()>, E>,
) -> Result<Generated, E> {
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt.into());
    }
    // The last token is chosen but never fed back.
    let wanted = prompt.len() + count.saturating_sub(1);
    if wanted > engine.context() {
        return Err(Error::Context { wanted, context: engine.context() }.into());
    }
    let start = Instant::now();
    let mut out = Generated { tokens: Vec::new(), stop: Stop::Count, prefill: Duration::ZERO, decode: Duration::ZERO };
    let mut logits = Vec::new();
    engine.truncate(0);
    let (first, last) = prompt.split_at((prompt.len() - 1) / PREFILL * PREFILL);
    for chunk in first.chunks(PREFILL) {
        engine.forward(chunk, Logits::None, &mut logits)?;
    }
    let mut next = |engine: &mut dyn Engine, tokens: &[u32]| {
        if sampler.is_greedy() {
            return engine.greedy(tokens);
        }
        engine.forward(tokens, Logits::Last, &mut logits)?;
        sampler.next(&logits)
    };
    let mut token = next(engine, last)?;
    while out.tokens.len() < count {
        if out.tokens.is_empty() {
            out.prefill = start.elapsed();
        }
        if end.contains(&token) {
            out.stop = Stop::End;
            break;
        }
        out.tokens.push(token);
        out.decode = start.elapsed() - out.prefill;
        if on_token(token)?.is_break() {
            out.stop = Stop::Caller;
            break;
        }
        if out.tokens.len() < count {
            token = next(engine, &[token])?;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::{Sampling, check_tokens};
    use super::*;

    /// Counts upwards: after token `t` comes `t + 1`. Remembers the sizes of its calls.
    struct Counter {
        sequence: Vec<u32>,
        calls: Vec<usize>,
    }

    impl Engine for Counter {
        fn vocab(&self) -> usize {
            1000
        }
        fn context(&self) -> usize {
            700
        }
        fn position(&self) -> usize {
            self.sequence.len()
        }
        fn truncate(&mut self, position: usize) {
            self.sequence.truncate(position);
        }
        fn forward(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) -> Result<(), Error> {
            check_tokens(tokens, self.position(), self.context(), self.vocab())?;
            self.sequence.extend(tokens);
            self.calls.push(tokens.len());
            let rows = logits.rows(tokens.len());
            out.clear();
            for t in &tokens[tokens.len() - rows..] {
                out.extend((0..1000).map(|i| if i == *t + 1 { 1.0 } else { 0.0 }));
            }
            Ok(())
        }
    }

    fn run(prompt: &[u32], count: usize, end: &[u32], until: u32) -> Result<(Generated, Counter), Error> {
        let mut engine = Counter { sequence: vec![1, 2, 3], calls: Vec::new() };
        let mut sampler = Sampler::new(Sampling::default());
        let g = generate(&mut engine, prompt, count, end, &mut sampler, |t| {
            Ok::<_, Error>(if t >= until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok((g, engine))
    }

    #[test]
    fn ways_to_stop() {
        let (g, e) = run(&[7], 3, &[], 999).unwrap();
        assert_eq!((g.tokens, g.stop, e.sequence), (vec![8, 9, 10], Stop::Count, vec![7, 8, 9]));
        let (g, _) = run(&[7], 30, &[11, 10], 999).unwrap();
        assert_eq!((g.tokens, g.stop), (vec![8, 9], Stop::End));
        let (g, _) = run(&[7], 30, &[], 9).unwrap();
        assert_eq!((g.tokens, g.stop), (vec![8, 9], Stop::Caller));
        let (g, _) = run(&[7], 0, &[], 9).unwrap();
        assert_eq!((g.tokens.len(), g.stop), (0, Stop::Count));
    }

    #[test]
    fn long_prompts_come_in_batches() {
        for (n, calls) in
            [(1, vec![1]), (256, vec![256]), (257, vec![256, 1]), (512, vec![256, 256]), (700, vec![256, 256, 188])]
        {
            let prompt: Vec<u32> = (0..n).collect();
            let (g, e) = run(&prompt, 1, &[], 999).unwrap();
            assert_eq!((g.tokens, e.calls), (vec![n], calls));
        }
    }

    #[test]
    fn bad_prompts() {
        assert!(matches!(run(&[], 1, &[], 9), Err(Error::EmptyPrompt)));
        assert!(matches!(run(&[1; 700], 2, &[], 9), Err(Error::Context { wanted: 701, context: 700 })));
        assert!(matches!(run(&[1, 1000], 2, &[], 9), Err(Error::Token { token: 1000, vocab: 1000 })));
    }
}

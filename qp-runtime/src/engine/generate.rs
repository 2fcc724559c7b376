//! Continuing a prompt.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Error, Logits, Sampler, Session};

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
    /// Tokens that were guessed, and how many of them were right; see [`Session::set_drafts`].
    pub drafted: (usize, usize),
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

/// Begins with `prompt`, of which the session may have computed a part already, and appends up to `count` tokens; `on_token` sees each as it is chosen.
/// A token of `end` ends the text and is not given to `on_token`.
///
/// # Errors
/// If the prompt is empty, prompt and `count` tokens do not fit the context, or the engine fails.
pub fn generate<E: From<Error>>(
    session: &mut Session,
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
    if wanted > session.context() {
        return Err(Error::Context { wanted, context: session.context() }.into());
    }
    let start = Instant::now();
    let mut out = Generated {
        tokens: Vec::new(),
        stop: Stop::Count,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
        drafted: (0, 0),
    };
    sampler.saw(prompt);
    let mut text = prompt.to_vec();
    let rest = session.keep_common(prompt);
    let mut chosen = verify(session, sampler, rest, &[])?;
    'text: while out.tokens.len() < count {
        for token in chosen.drain(..) {
            if out.tokens.is_empty() {
                out.prefill = start.elapsed();
            }
            if end.contains(&token) {
                out.stop = Stop::End;
                break 'text;
            }
            out.tokens.push(token);
            text.push(token);
            out.decode = start.elapsed() - out.prefill;
            if on_token(token)?.is_break() {
                out.stop = Stop::Caller;
                break 'text;
            }
        }
        let left = count - out.tokens.len();
        if left > 0 {
            let most = session.most_drafts().min(left - 1);
            let guesses = session.guess(&text, sampler.rough_choices(most))?;
            // The last token is not in the sequence yet.
            chosen = verify(session, sampler, &text[text.len() - 1..], &guesses)?;
            out.drafted = (out.drafted.0 + guesses.len(), out.drafted.1 + chosen.len() - 1);
        }
    }
    Ok(out)
}

/// Appends `tokens` and those of the `guesses` that are right, and gives the tokens that are chosen behind them: the right
/// guesses and one more.
///
/// # Errors
/// If the engine fails; wrong guesses are no reason.
fn verify(session: &mut Session, sampler: &mut Sampler, tokens: &[u32], guesses: &[u32]) -> Result<Vec<u32>, Error> {
    let (begin, before) = (session.position(), sampler.clone());
    match choose(session, sampler, &[tokens, guesses].concat(), guesses) {
        Ok(chosen) => {
            session.truncate(begin + tokens.len() + chosen.len() - 1);
            Ok(chosen)
        }
        Err(e) if guesses.is_empty() => Err(e),
        // What follows a wrong guess may not be computable: without guesses it is not computed.
        Err(_) => {
            session.truncate(begin);
            *sampler = before;
            choose(session, sampler, tokens, &[])
        }
    }
}

/// Appends `tokens`, which end with `guesses`, and chooses what follows the token before these, and each of them that is right.
fn choose(session: &mut Session, sampler: &mut Sampler, tokens: &[u32], guesses: &[u32]) -> Result<Vec<u32>, Error> {
    if let Some(choices) = sampler.choices(guesses.len() + 1) {
        let mut chosen = session.choose(tokens, &choices)?;
        // A guess is right if it is what was chosen behind the token before it.
        let right = guesses.iter().zip(&chosen).take_while(|(guess, token)| guess == token).count();
        chosen.truncate(right + 1);
        sampler.took(chosen.len());
        return Ok(chosen);
    }
    // Choices that depend on each other are made one by one.
    let mut logits = Vec::new();
    session.forward(tokens, if guesses.is_empty() { Logits::Last } else { Logits::All }, &mut logits)?;
    let rows: Vec<&[f32]> = logits.chunks_exact(session.vocab()).collect();
    let mut chosen = Vec::new();
    for (i, row) in rows[rows.len() - guesses.len() - 1..].iter().enumerate() {
        let token = sampler.next(row)?;
        chosen.push(token);
        if guesses.get(i) != Some(&token) {
            break;
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::{Chunk, Drafts, Engine, Sampling, check_chunks};
    use super::*;

    /// Counts upwards: after token `t` comes `t + 1`. Remembers its sequence.
    struct Counter(Arc<Mutex<Vec<u32>>>);

    impl Engine for Counter {
        fn vocab(&self) -> usize {
            1000
        }
        fn context(&self) -> usize {
            700
        }
        fn pages(&self) -> usize {
            11
        }
        fn most_tokens(&self) -> usize {
            1000
        }
        fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
            check_chunks(self, chunks)?;
            let [Chunk { tokens, position, logits, .. }] = chunks else { panic!("one sequence") };
            let mut sequence = self.0.lock().unwrap();
            sequence.truncate(*position);
            sequence.extend(*tokens);
            out.clear();
            for t in &tokens[tokens.len() - logits.rows(tokens.len())..] {
                out.extend((0..1000).map(|i| if i == *t + 1 { 1.0 } else { f32::from(i == *t + 2) / 2.0 }));
            }
            Ok(())
        }
        fn copy_page(&mut self, _: u32, _: u32) -> Result<(), Error> {
            unreachable!("nothing is shared")
        }
    }

    fn run(prompt: &[u32], count: usize, end: &[u32], until: u32) -> Result<(Generated, Vec<u32>), Error> {
        let sequence = Arc::new(Mutex::new(vec![1, 2, 3]));
        let mut session = Session::new(Box::new(Counter(sequence.clone())));
        let mut sampler = Sampler::new(Sampling::default());
        let g = generate(&mut session, prompt, count, end, &mut sampler, |t| {
            Ok::<_, Error>(if t >= until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let sequence = sequence.lock().unwrap().clone();
        Ok((g, sequence))
    }

    #[test]
    fn ways_to_stop() {
        let (g, sequence) = run(&[7], 3, &[], 999).unwrap();
        assert_eq!((g.tokens, g.stop, sequence), (vec![8, 9, 10], Stop::Count, vec![7, 8, 9]));
        let (g, _) = run(&[7], 30, &[11, 10], 999).unwrap();
        assert_eq!((g.tokens, g.stop), (vec![8, 9], Stop::End));
        let (g, _) = run(&[7], 30, &[], 9).unwrap();
        assert_eq!((g.tokens, g.stop), (vec![8, 9], Stop::Caller));
        let (g, _) = run(&[7], 0, &[], 9).unwrap();
        assert_eq!((g.tokens.len(), g.stop), (0, Stop::Count));
    }

    #[test]
    fn guesses_do_not_change_the_text() {
        let sequence = Arc::new(Mutex::new(Vec::new()));
        let run = |drafts: usize| {
            let mut session = Session::new(Box::new(Counter(sequence.clone())));
            session.set_drafts(Some(Drafts::look_up(drafts)));
            let mut sampler = Sampler::new(Sampling::default());
            let go = |_| Ok::<_, Error>(ControlFlow::Continue(()));
            // The text said 7, 8, 9, 10 before, then went elsewhere.
            let g = generate(&mut session, &[7, 8, 9, 10, 3, 7, 8], 6, &[], &mut sampler, go).unwrap();
            (g.tokens, g.drafted, session.position())
        };
        assert_eq!(run(0), (vec![9, 10, 11, 12, 13, 14], (0, 0), 12));
        // Behind 8, 9 the text said 10 and then 3: one guess is right.
        assert_eq!(run(3), (vec![9, 10, 11, 12, 13, 14], (3, 1), 12));
        assert_eq!(*sequence.lock().unwrap(), [7, 8, 9, 10, 3, 7, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn guesses_under_a_penalty_are_verified_one_by_one() {
        let run = |drafts: usize, penalty: f32| {
            let mut session = Session::new(Box::new(Counter(Arc::default())));
            session.set_drafts(Some(Drafts::look_up(drafts)));
            let mut sampler = Sampler::with_penalty(Sampling::default(), penalty);
            let go = |_| Ok::<_, Error>(ControlFlow::Continue(()));
            let g = generate(&mut session, &[7, 8, 9, 10, 3, 7, 8], 6, &[], &mut sampler, go).unwrap();
            (g.tokens, g.drafted)
        };
        assert_eq!(run(0, 1.5), (vec![9, 10, 11, 12, 13, 14], (0, 0)));
        assert_eq!(run(3, 1.5), (vec![9, 10, 11, 12, 13, 14], (3, 1)));
        // 10 was seen, so that 11 is likelier behind 9.
        assert_eq!(run(0, 4.0), (vec![9, 11, 12, 13, 14, 15], (0, 0)));
        assert_eq!(run(3, 4.0), (vec![9, 11, 12, 13, 14, 15], (3, 0)));
    }

    #[test]
    fn bad_prompts() {
        assert!(matches!(run(&[], 1, &[], 9), Err(Error::EmptyPrompt)));
        assert!(matches!(run(&[1; 700], 2, &[], 9), Err(Error::Context { wanted: 701, context: 700 })));
        assert!(matches!(run(&[1, 1000], 2, &[], 9), Err(Error::Token { token: 1000, vocab: 1000 })));
    }
}

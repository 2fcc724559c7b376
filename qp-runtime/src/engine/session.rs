//! One sequence with an engine of its own.

use super::drafts::{Drafts, Wanted};
use super::{Choice, Chunk, Engine, Error, Logits, PAGE, Pool};

/// An engine and the sequence that it computes.
pub struct Session {
    engine: Box<dyn Engine>,
    pool: Pool,
    pages: Vec<u32>,
    tokens: Vec<u32>,
    drafts: Option<Drafts>,
}

impl Session {
    /// An empty sequence, which may take all pages of `engine`.
    pub fn new(engine: Box<dyn Engine>) -> Self {
        let pool = Pool::new(engine.pages());
        Session { engine, pool, pages: Vec::new(), tokens: Vec::new(), drafts: None }
    }

    /// Tokens are guessed while a text is generated, and the engine verifies them together. The text is the same with and
    /// without.
    pub fn set_drafts(&mut self, drafts: Option<Drafts>) {
        self.drafts = drafts;
    }

    /// Tokens that are guessed at once; see [`Session::set_drafts`].
    pub fn most_drafts(&self) -> usize {
        self.drafts.as_ref().map_or(0, Drafts::most)
    }

    /// Guesses of what follows `text`, at most one for each of the choices by which its tokens are chosen.
    ///
    /// # Errors
    /// If a draft model fails.
    pub fn guess(&mut self, text: &[u32], choices: Vec<Choice>) -> Result<Vec<u32>, Error> {
        let Some(drafts) = self.drafts.as_mut().filter(|_| !choices.is_empty()) else { return Ok(Vec::new()) };
        let guesses = drafts.guess(&[Wanted { id: 0, text, choices }], usize::MAX)?;
        Ok(guesses.into_iter().next().unwrap_or_default())
    }

    /// Tokens that the model knows: the length of a row of logits.
    pub fn vocab(&self) -> usize {
        self.engine.vocab()
    }

    /// Longest sequence, in tokens.
    pub fn context(&self) -> usize {
        self.engine.context().min(self.engine.pages() * PAGE)
    }

    /// Tokens that the engine computes at once.
    pub fn most_tokens(&self) -> usize {
        self.engine.most_tokens()
    }

    /// Tokens of the sequence so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// Shortens the sequence to its first `position` tokens; no effect if it is not longer.
    pub fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
        for page in self.pages.drain(self.tokens.len().div_ceil(PAGE)..) {
            self.pool.release(page);
        }
    }

    /// Shortens the sequence to what it has in common with the beginning of `tokens`, and gives the rest of these: what
    /// is to be appended so that the sequence is `tokens`. The last token is always among the rest.
    pub fn keep_common<'t>(&mut self, tokens: &'t [u32]) -> &'t [u32] {
        let same = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let same = same.min(tokens.len().saturating_sub(1));
        self.truncate(same);
        &tokens[same..]
    }

    /// Appends `tokens` to the sequence and writes the wanted logits to `out`, replacing what it held:
    /// `logits.rows(tokens.len()) × vocab`, row-major.
    ///
    /// # Errors
    /// If the sequence would exceed the context, a token is unknown or the device fails. Nothing is appended then.
    pub fn forward(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) -> Result<(), Error> {
        self.append(tokens, logits, |engine, chunk| engine.step(&[chunk], out))
    }

    /// Appends `tokens` to the sequence and gives the first of the likeliest next ones.
    ///
    /// # Errors
    /// As [`Session::forward`], and if a logit is not a number or none is finite.
    pub fn greedy(&mut self, tokens: &[u32]) -> Result<u32, Error> {
        let mut best = Vec::new();
        self.append(tokens, Logits::Last, |engine, chunk| engine.best(&[chunk], &mut best))?;
        best.first().copied().ok_or(Error::EmptyPrompt)
    }

    /// Appends `tokens` to the sequence and chooses what follows each of the last `choices.len()` of them. One of several
    /// choices is what it would be if the tokens behind it were not there.
    ///
    /// # Errors
    /// As [`Session::greedy`].
    pub fn choose(&mut self, tokens: &[u32], choices: &[Choice]) -> Result<Vec<u32>, Error> {
        let mut chosen = Vec::new();
        let (first, last) = tokens.split_at(tokens.len().saturating_sub(choices.len()));
        if choices.len() > 1 && !first.is_empty() {
            self.append(first, Logits::None, |engine, chunk| engine.step(&[chunk], &mut Vec::new()))?;
        }
        let (tokens, logits) = if choices.len() > 1 { (last, Logits::All) } else { (tokens, Logits::Last) };
        self.append(tokens, logits, |engine, chunk| engine.choose(&[chunk], choices, &mut chosen))?;
        if chosen.len() == choices.len() { Ok(chosen) } else { Err(Error::EmptyPrompt) }
    }

    fn append(
        &mut self,
        tokens: &[u32],
        logits: Logits,
        run: impl FnOnce(&mut dyn Engine, Chunk<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (end, context) = (self.tokens.len() + tokens.len(), self.context());
        if end > context {
            return Err(Error::Context { wanted: end, context });
        }
        while self.pages.len() * PAGE < end {
            // There are as many as the context takes.
            self.pages.extend(self.pool.take());
        }
        let chunk = Chunk { tokens, position: self.tokens.len(), pages: &self.pages, logits };
        run(self.engine.as_mut(), chunk)?;
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }
}

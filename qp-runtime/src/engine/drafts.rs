//! Guesses of what follows a text, which an engine verifies together: a step of several tokens takes hardly longer than
//! one of a single token.
//!
//! A guess is right if it is the token that the model chooses behind the tokens before it; what follows the first wrong one
//! is thrown away. So guesses make a text come sooner, and never change it. They come from what the text said before
//! ([`lookup`](super::lookup)), or from a smaller model that knows the same tokens and draws by the same numbers.

use std::collections::BTreeMap;

use super::{Choice, Chunk, Engine, Error, Logits, PAGE, Pool, lookup};

/// Where guesses come from, and how many there are.
pub struct Drafts {
    most: usize,
    source: Source,
}

enum Source {
    LookUp,
    Model(DraftModel),
}

/// A text whose next tokens are to be guessed.
pub struct Wanted<'a> {
    /// Its number among the texts that are written at once.
    pub id: u64,
    /// All its tokens.
    pub text: &'a [u32],
    /// How the tokens that follow are chosen: there are at most as many guesses.
    pub choices: Vec<Choice>,
}

impl Drafts {
    /// Up to `most` guesses at once, by what a text said before.
    pub fn look_up(most: usize) -> Self {
        Drafts { most, source: Source::LookUp }
    }

    /// Up to `most` guesses at once by the model on `engine`, for a model that knows `vocab` tokens, which are the same as far
    /// as both know them ([`Tokenizer::same_tokens`](crate::model::Tokenizer::same_tokens)).
    pub fn of_model(engine: Box<dyn Engine>, vocab: usize, most: usize) -> Self {
        let pool = Pool::new(engine.pages());
        let model = DraftModel { engine, vocab, pool, texts: BTreeMap::new(), ended: Vec::new() };
        Drafts { most, source: Source::Model(model) }
    }

    /// Guesses at once for a text.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Guesses for some texts, which may be none for any of them. Of texts that it has not read yet, a draft model reads `room`
    /// tokens at most, all together; there are no guesses for those that it has not read to their end.
    ///
    /// # Errors
    /// If the draft model fails.
    pub fn guess(&mut self, wanted: &[Wanted<'_>], room: usize) -> Result<Vec<Vec<u32>>, Error> {
        match &mut self.source {
            Source::LookUp => {
                let guess = |w: &Wanted<'_>| lookup::draft(w.text, w.choices.len().min(self.most)).to_vec();
                Ok(wanted.iter().map(guess).collect())
            }
            Source::Model(model) => model.guess(wanted, room).map_err(|e| Error::Draft(Box::new(e))),
        }
    }

    /// Forgets the texts whose numbers are not wanted any more. What was computed of them serves others that begin alike, until
    /// its pages are needed.
    pub fn keep(&mut self, wanted: impl Fn(u64) -> bool) {
        if let Source::Model(model) = &mut self.source {
            let gone: Vec<u64> = model.texts.keys().copied().filter(|id| !wanted(*id)).collect();
            model.ended.extend(gone.into_iter().filter_map(|id| model.texts.remove(&id)));
        }
    }
}

/// A model that guesses.
struct DraftModel {
    engine: Box<dyn Engine>,
    /// Tokens that the other model knows.
    vocab: usize,
    pool: Pool,
    texts: BTreeMap<u64, Known>,
    /// Those that have ended, the oldest first.
    ended: Vec<Known>,
}

/// What the draft model has computed of a text, guesses included.
#[derive(Default)]
struct Known {
    tokens: Vec<u32>,
    pages: Vec<u32>,
}

/// A text for which guesses are being made.
struct Pending<'a> {
    /// Its place among those that are wanted.
    at: usize,
    id: u64,
    /// Tokens that are to be read.
    rest: &'a [u32],
    choices: &'a [Choice],
}

impl DraftModel {
    fn guess(&mut self, wanted: &[Wanted<'_>], mut room: usize) -> Result<Vec<Vec<u32>>, Error> {
        let mut guesses = vec![Vec::new(); wanted.len()];
        let mut pending = Vec::new();
        for (at, w) in wanted.iter().enumerate() {
            let rest = self.read_on(w.id, w.text);
            let rest = &rest[..rest.len().min(room)];
            // What this model does not know cannot be read.
            if rest.is_empty() || rest.iter().any(|&t| t as usize >= self.engine.vocab()) {
                continue;
            }
            let begin = self.texts.get(&w.id).map_or(0, |k| k.tokens.len());
            let whole = begin + rest.len() == w.text.len();
            // The last guess is not read.
            let wish = if whole { rest.len() + w.choices.len().saturating_sub(1) } else { rest.len() };
            let has = self.reserve(w.id, begin + wish).saturating_sub(begin);
            if has < rest.len() || w.choices.is_empty() {
                continue;
            }
            room -= rest.len();
            let choices = if whole { &w.choices[..w.choices.len().min(has - rest.len() + 1)] } else { &[] };
            pending.push(Pending { at, id: w.id, rest, choices });
        }
        self.advance(&pending, &mut guesses)?;
        for i in 1.. {
            let fed: Vec<(Pending<'_>, [u32; 1])> = pending
                .iter()
                .filter(|p| i < p.choices.len())
                .filter_map(|p| Some((p, *guesses[p.at].get(i - 1)?)))
                .map(|(p, last)| (Pending { choices: &p.choices[i..], rest: &[], ..*p }, [last]))
                .collect();
            if fed.is_empty() {
                break;
            }
            let next: Vec<Pending<'_>> = fed.iter().map(|(p, last)| Pending { rest: last, ..*p }).collect();
            self.advance(&next, &mut guesses)?;
        }
        Ok(guesses)
    }

    /// Keeps of a text's tokens what it begins with, and gives the rest, which has the last token always.
    fn read_on<'t>(&mut self, id: u64, text: &'t [u32]) -> &'t [u32] {
        let common = |known: &Known| known.tokens.iter().zip(text).take_while(|(a, b)| a == b).count();
        if !self.texts.contains_key(&id) {
            let best = (0..self.ended.len()).max_by_key(|&i| common(&self.ended[i]));
            let known = best.filter(|&i| common(&self.ended[i]) >= PAGE).map(|i| self.ended.remove(i));
            self.texts.insert(id, known.unwrap_or_default());
        }
        let known = self.texts.entry(id).or_default();
        let same = common(known).min(text.len().saturating_sub(1));
        known.tokens.truncate(same);
        &text[same..]
    }

    /// Takes pages for `wish` tokens of a text, as far as there are any: for how many tokens there are.
    fn reserve(&mut self, id: u64, wish: usize) -> usize {
        let known = self.texts.entry(id).or_default();
        let wish = wish.min(self.engine.context());
        while known.pages.len() * PAGE < wish {
            match self.pool.take() {
                Some(page) => known.pages.push(page),
                None if self.ended.is_empty() => break,
                None => self.ended.remove(0).pages.into_iter().for_each(|p| self.pool.release(p)),
            }
        }
        wish.min(known.pages.len() * PAGE)
    }

    /// Reads the rest of each text, and guesses the token behind those for which there are choices, by the first of these.
    fn advance(&mut self, pending: &[Pending<'_>], guesses: &mut [Vec<u32>]) -> Result<(), Error> {
        if pending.is_empty() {
            return Ok(());
        }
        let mut chunks = Vec::with_capacity(pending.len());
        for p in pending {
            let Some(known) = self.texts.get(&p.id) else { continue };
            let logits = if p.choices.is_empty() { Logits::None } else { Logits::Last };
            chunks.push(Chunk { tokens: p.rest, position: known.tokens.len(), pages: &known.pages, logits });
        }
        let choices: Vec<Choice> = pending.iter().filter_map(|p| p.choices.first().copied()).collect();
        let mut chosen = Vec::new();
        self.engine.choose(&chunks, &choices, &mut chosen)?;
        for p in pending {
            self.texts.entry(p.id).or_default().tokens.extend_from_slice(p.rest);
        }
        for (p, token) in pending.iter().filter(|p| !p.choices.is_empty()).zip(chosen) {
            // What the other model does not know is no guess, and nothing follows it.
            if (token as usize) < self.vocab {
                guesses[p.at].push(token);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sampling;
    use super::*;

    /// Counts upwards to its last token and begins again; checks that what the pages hold is the sequence.
    struct Counter {
        vocab: usize,
        pages: Vec<[u32; PAGE]>,
        context: usize,
    }

    impl Engine for Counter {
        fn vocab(&self) -> usize {
            self.vocab
        }
        fn context(&self) -> usize {
            self.context
        }
        fn pages(&self) -> usize {
            self.pages.len()
        }
        fn most_tokens(&self) -> usize {
            1000
        }
        fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
            super::super::check_chunks(self, chunks)?;
            out.clear();
            for c in chunks {
                for (i, &token) in c.tokens.iter().enumerate() {
                    let at = c.position + i;
                    self.pages[c.pages[at / PAGE] as usize][at % PAGE] = token;
                }
                let last = c.position + c.tokens.len() - 1;
                let sum: u32 = (0..=last).map(|at| self.pages[c.pages[at / PAGE] as usize][at % PAGE]).sum();
                let next = sum as usize % self.vocab;
                for _ in 0..c.logits.rows(c.tokens.len()) {
                    out.extend((0..self.vocab).map(|i| if i == next { 1.0 } else { 0.0 }));
                }
            }
            Ok(())
        }
        fn copy_page(&mut self, _: u32, _: u32) -> Result<(), Error> {
            unreachable!("nothing is shared")
        }
    }

    fn drafts(pages: usize, vocab: usize, most: usize) -> Drafts {
        let engine = Counter { vocab: 100, pages: vec![[7777; PAGE]; pages], context: 400 };
        Drafts::of_model(Box::new(engine), vocab, most)
    }

    fn wanted(id: u64, text: &[u32], count: usize) -> Wanted<'_> {
        Wanted { id, text, choices: vec![Choice { sampling: Sampling::default(), draw: 0 }; count] }
    }

    /// What the model says behind `text`.
    fn behind(text: &[u32], count: usize) -> Vec<u32> {
        let mut text = text.to_vec();
        let begin = text.len();
        (0..count).for_each(|_| text.push(text.iter().sum::<u32>() % 100));
        text.split_off(begin)
    }

    #[test]
    fn several_texts_are_guessed_together() {
        let mut d = drafts(20, 100, 4);
        let (a, b): (Vec<u32>, Vec<u32>) = ((1..90).collect(), vec![3, 5]);
        let got = d.guess(&[wanted(1, &a, 4), wanted(2, &b, 2)], 1000).unwrap();
        assert_eq!(got, [behind(&a, 4), behind(&b, 2)]);
        // One goes on as was guessed, the other does not.
        let (a, b) = ([&a[..], &got[0], &[9]].concat(), [&b[..], &[got[1][0], 50]].concat());
        let got = d.guess(&[wanted(2, &b, 3), wanted(1, &a, 1)], 3).unwrap();
        assert_eq!(got, [behind(&b, 3), behind(&a, 1)]);
    }

    #[test]
    fn a_long_text_is_read_in_parts_and_once() {
        let mut d = drafts(20, 100, 4);
        let long: Vec<u32> = (0..300).map(|i| i % 90).collect();
        let rounds: Vec<usize> = (0..4).map(|_| d.guess(&[wanted(1, &long, 2)], 100).unwrap()[0].len()).collect();
        assert_eq!(rounds, [0, 0, 2, 2]);
        // Another that begins alike goes on where it ended.
        d.keep(|_| false);
        let next = [&long[..], &[1, 2, 3]].concat();
        assert_eq!(d.guess(&[wanted(2, &next, 2)], 3).unwrap(), [behind(&next, 2)]);
    }

    #[test]
    fn what_does_not_fit_is_not_guessed() {
        // Two pages: the second text has to wait until the first has ended.
        let mut d = drafts(2, 100, 8);
        let (a, b): (Vec<u32>, Vec<u32>) = ((0..70).collect(), (1..80).collect());
        let got = d.guess(&[wanted(1, &a, 3), wanted(2, &b, 3)], 1000).unwrap();
        assert_eq!(got, [behind(&a, 3), vec![]]);
        d.keep(|id| id == 2);
        assert_eq!(d.guess(&[wanted(2, &b, 3)], 1000).unwrap(), [behind(&b, 3)]);
        // At the end of the pages, and of the context, fewer.
        let full: Vec<u32> = (0..127).map(|i| i % 50).collect();
        d.keep(|_| false);
        assert_eq!(d.guess(&[wanted(3, &full, 8)], 1000).unwrap(), [behind(&full, 2)]);
        let mut d = drafts(20, 100, 8);
        let full: Vec<u32> = (0..399).map(|i| i % 50).collect();
        assert_eq!(d.guess(&[wanted(1, &full, 8)], 1000).unwrap(), [behind(&full, 2)]);
        let full: Vec<u32> = (0..401).map(|i| i % 50).collect();
        assert_eq!(d.guess(&[wanted(1, &full, 8)], 1000).unwrap(), [[0u32; 0]]);
    }

    #[test]
    fn tokens_that_one_of_the_models_does_not_know_end_the_guesses() {
        // Behind 40 and 15 the draft model says 55 and 10, then 20.
        let mut d = drafts(20, 55, 4);
        assert_eq!(d.guess(&[wanted(1, &[40, 15], 4)], 1000).unwrap(), [[0u32; 0]]);
        let mut d = drafts(20, 56, 4);
        assert_eq!(d.guess(&[wanted(1, &[40, 15], 4)], 1000).unwrap(), [vec![55, 10, 20, 40]]);
        assert_eq!(d.guess(&[wanted(1, &[40, 100], 4)], 1000).unwrap(), [[0u32; 0]]);
    }
}

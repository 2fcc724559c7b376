//! Many requests on one engine: which tokens of which sequences a step computes, and in which pages.
//!
//! A step holds one token of every sequence that is generating and, in the room left, parts of prompts (continuous
//! batching). Half of that room is the longest waiting prompt's, the rest goes to the prompts that are nearest their
//! end, so that neither a long prompt nor many short ones keep others waiting for ever.
//!
//! Sequences hold pages only for the tokens they have. Whole pages are shared with those that begin alike
//! ([`super::prefix`]) and never written to again: what follows the last whole page lies in pages of the sequence's own,
//! so nothing ever needs to be copied. When pages run out, the youngest sequence gives its own up and is computed again
//! later. A sequence may have guesses of what follows its tokens, which a step verifies: the right ones count as tokens that
//! were generated, and no others are ever seen. None of this can be seen in an answer, because an engine's bits depend on the sequence alone.
//!
//! All of it is plain code without threads or clocks. [`Scheduler::step`] does one step; events go to each request's
//! [`Sink`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use rayon::prelude::*;

use super::choose::{Chooser, Choosing, Failure, LogProbs};
use super::prefix::{PrefixCache, ROOT};
use super::stats::Stats;
use crate::engine::drafts::{Drafts, Wanted};
use crate::engine::{Chunk, Engine, Error, Logits, MOST_ROWS, PAGE, Pool, Wish};

/// Bounds of a scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences computed together.
    pub sequences: usize,
    /// Tokens of prompts in a step while others generate: bounds how long these wait for their next token.
    pub chunk: usize,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A token that ends a text, or the end of the grammar.
    End,
    /// As many tokens as were asked for.
    Count,
    /// The engine failed.
    Failed(String),
    /// The form that was asked for is too complex to go on with.
    Form(String),
    /// The server is stopping.
    Stopped,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It was taken up; so many tokens of its prompt were in the cache.
    Started {
        /// Tokens that need not be computed.
        cached: usize,
    },
    /// Tokens were guessed.
    Guessed {
        /// Guesses that were right: their tokens follow.
        right: usize,
        /// Guesses that were wrong, and those behind them.
        wrong: usize,
    },
    /// A token was generated.
    Token {
        /// The token.
        token: u32,
        /// Its probability, if it was asked for.
        logprobs: Option<Box<LogProbs>>,
    },
    /// The answer has ended; nothing follows.
    Done(Reason),
}

/// Where a request's events go.
pub trait Sink: Send {
    /// Takes an event; never waits.
    fn send(&mut self, event: Event);
    /// True if nobody listens any more: the request is given up then.
    fn is_closed(&self) -> bool;
}

/// A text to be continued.
pub struct Request {
    /// Its tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most.
    pub most: usize,
    /// Tokens that end the answer and are no part of it.
    pub end: Arc<[u32]>,
    /// How tokens are chosen.
    pub choosing: Choosing,
    /// Where events go.
    pub sink: Box<dyn Sink>,
}

/// A request with what was computed of it.
struct Sequence {
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    /// What may follow, in the present step.
    guesses: Vec<u32>,
    prompt: usize,
    most: usize,
    end: Arc<[u32]>,
    chooser: Chooser,
    sink: Box<dyn Sink>,
    started: bool,
    /// Tokens whose keys and values are there.
    computed: usize,
    pages: Vec<u32>,
    /// Pages of it that are in the prefix cache, and the number there of the last.
    shared: usize,
    parent: u64,
}

impl Sequence {
    /// Tokens that are to be computed before the next one can be chosen; at least one.
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The tokens of a step, the guesses that it verifies behind them.
    fn tokens_of(&self, part: &Part) -> Cow<'_, [u32]> {
        let tokens = &self.tokens[self.computed..self.computed + part.count];
        match &self.guesses[..part.guesses] {
            [] => Cow::Borrowed(tokens),
            guesses => Cow::Owned([tokens, guesses].concat()),
        }
    }

    /// The right guesses and the token behind these, but nothing that follows the end of the text.
    fn choose(&mut self, mut rows: Rows<'_>, vocab: usize) -> Vec<Chosen> {
        let count = match &rows {
            Rows::Tokens(tokens) => tokens.len(),
            Rows::Logits(logits) => logits.len() / vocab,
        };
        let mut all = Vec::new();
        for i in 0..count {
            let chosen = match &mut rows {
                Rows::Tokens(tokens) => self.chooser.took(tokens[i]).map(|()| (tokens[i], None)),
                Rows::Logits(logits) => self.chooser.choose(&mut logits[i * vocab..(i + 1) * vocab]),
            };
            let right = |token| self.guesses.get(i) == Some(token) && !self.end.contains(token);
            let goes_on = chosen.as_ref().is_ok_and(|(token, _)| right(token));
            all.push(chosen);
            if !goes_on {
                break;
            }
        }
        all
    }
}

/// What an engine gave for a sequence: for each row of logits the chosen token, or the logits.
enum Rows<'a> {
    Tokens(&'a [u32]),
    Logits(&'a mut [f32]),
}

/// A token with its probabilities, if they were asked for, or why there is none.
type Chosen = Result<(u32, Option<LogProbs>), Failure>;

/// Requests and the engine that computes them.
pub struct Scheduler {
    engine: Box<dyn Engine>,
    drafts: Option<Drafts>,
    limits: Limits,
    pool: Pool,
    cache: PrefixCache,
    /// By arrival: the smallest number came first, and is looked after first.
    running: BTreeMap<u64, Sequence>,
    waiting: BTreeMap<u64, Sequence>,
    arrivals: u64,
    stats: Arc<Stats>,
    logits: Vec<f32>,
    best: Vec<u32>,
}

/// Tokens of a sequence that a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    id: u64,
    count: usize,
    /// Whether the next token is chosen after it.
    last: bool,
    /// Guesses behind these tokens: a token is chosen after each of them, too.
    guesses: usize,
}

impl Part {
    fn new(id: u64, count: usize, last: bool) -> Self {
        Part { id, count, last, guesses: 0 }
    }

    /// Tokens that are chosen, if all guesses are right.
    fn rows(&self) -> usize {
        if self.last { 1 + self.guesses } else { 0 }
    }
}

impl Scheduler {
    /// A scheduler without requests.
    pub fn new(engine: Box<dyn Engine>, drafts: Option<Drafts>, limits: Limits, stats: Arc<Stats>) -> Self {
        let pool = Pool::new(engine.pages());
        stats.pages.set(engine.pages() as u64);
        Scheduler {
            engine,
            drafts,
            limits,
            pool,
            cache: PrefixCache::default(),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            arrivals: 0,
            stats,
            logits: Vec::new(),
            best: Vec::new(),
        }
    }

    /// The longest prompt with its answer, in tokens, that can ever be computed.
    pub fn context(engine: &dyn Engine) -> usize {
        engine.context().min(engine.pages() * PAGE)
    }

    /// Takes a request. One that can never be computed ends at once with a failure.
    pub fn submit(&mut self, request: Request) {
        let Request { prompt, most, end, choosing, mut sink } = request;
        let wanted = prompt.len().saturating_add(most.saturating_sub(1));
        let context = Self::context(self.engine.as_ref());
        let vocab = self.engine.vocab();
        let refusal = match prompt.iter().find(|&&t| t as usize >= vocab) {
            _ if prompt.is_empty() => Some(Error::EmptyPrompt),
            _ if wanted > context => Some(Error::Context { wanted, context }),
            Some(&token) => Some(Error::Token { token, vocab }),
            None => None,
        };
        if let Some(e) = refusal {
            sink.send(Event::Done(Reason::Failed(e.to_string())));
            return;
        }
        if most == 0 {
            sink.send(Event::Done(Reason::Count));
            return;
        }
        self.arrivals += 1;
        let sequence = Sequence {
            chooser: Chooser::new(choosing, &prompt),
            prompt: prompt.len(),
            tokens: prompt,
            guesses: Vec::new(),
            most,
            end,
            sink,
            started: false,
            computed: 0,
            pages: Vec::new(),
            shared: 0,
            parent: ROOT,
        };
        self.waiting.insert(self.arrivals, sequence);
        self.count();
    }

    /// True if there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Computes one step: forgets requests that nobody waits for, takes up new ones, runs the engine, and tells
    /// everybody what came out. A step that fails as a whole is tried sequence by sequence, so that only those end that
    /// cannot be computed. True if the engine computed something.
    pub fn step(&mut self) -> bool {
        self.forget_closed();
        self.admit();
        let mut parts = self.share_out();
        self.reserve(&mut parts);
        self.prepare(&mut parts);
        self.guess(&mut parts);
        if !parts.is_empty() {
            self.run(&parts);
        }
        self.count();
        !parts.is_empty()
    }

    /// Ends all requests.
    pub fn stop(&mut self) {
        for mut sequence in
            std::mem::take(&mut self.running).into_values().chain(std::mem::take(&mut self.waiting).into_values())
        {
            sequence.sink.send(Event::Done(Reason::Stopped));
            release(&mut sequence, &mut self.pool);
        }
        self.count();
    }

    fn forget_closed(&mut self) {
        let (pool, stats) = (&mut self.pool, &self.stats);
        for sequences in [&mut self.running, &mut self.waiting] {
            sequences.retain(|_, sequence| {
                let closed = sequence.sink.is_closed();
                if closed {
                    stats.cancelled.add(1);
                    release(sequence, pool);
                }
                !closed
            });
        }
    }

    /// Takes up waiting requests in their order while there is room.
    fn admit(&mut self) {
        let ids: Vec<u64> = self.waiting.keys().copied().collect();
        for id in ids {
            if self.running.len() >= self.limits.sequences {
                return;
            }
            let Some(sequence) = self.waiting.get(&id) else { continue };
            // The last token is always computed, for its logits.
            let known = &sequence.tokens[..sequence.tokens.len() - 1];
            let (pages, parent) = self.cache.find(known, &mut self.pool);
            // What a running sequence is about to compute anyway is waited for.
            let wait = self.running.values().any(|r| begins_alike(r, known, pages.len()));
            // The step after the prompt may want a page, and so may each running sequence.
            let needed = (sequence.tokens.len() + 1).div_ceil(PAGE) - pages.len() + self.running.len();
            let free = self.pool.free();
            let fits = self.running.is_empty() || free >= needed || free + self.cache.idle(&self.pool) >= needed;
            if wait || !fits {
                pages.iter().for_each(|&p| self.pool.release(p));
                match wait {
                    true => continue,
                    false => return,
                }
            }
            let Some(mut sequence) = self.waiting.remove(&id) else { continue };
            let computed = pages.len() * PAGE;
            sequence.shared = pages.len();
            sequence.pages = pages;
            sequence.parent = parent;
            sequence.computed = computed;
            if !sequence.started {
                sequence.started = true;
                sequence.sink.send(Event::Started { cached: computed });
                self.stats.prompt_tokens.add(sequence.prompt as u64);
                self.stats.cached_tokens.add(computed as u64);
            }
            self.running.insert(id, sequence);
        }
    }

    /// Which tokens the next step computes.
    fn share_out(&self) -> Vec<Part> {
        let mut room = self.engine.most_tokens();
        let mut parts = Vec::new();
        for (&id, _) in self.running.iter().filter(|(_, s)| s.left() == 1) {
            if room == 0 {
                break;
            }
            parts.push(Part::new(id, 1, true));
            room -= 1;
        }
        if !parts.is_empty() {
            room = room.min(self.limits.chunk);
        }
        let mut prompts: Vec<(u64, usize)> =
            self.running.iter().map(|(&id, s)| (id, s.left())).filter(|&(_, left)| left > 1).collect();
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        if let Some(&(oldest, left)) = prompts.first() {
            let count = left.min(room.div_ceil(2));
            counts.insert(oldest, count);
            room -= count;
            prompts[1..].sort_by_key(|&(id, left)| (left, id));
            for &(id, left) in &prompts[1..] {
                let count = left.min(room);
                counts.insert(id, count);
                room -= count;
            }
            let more = (left - count).min(room);
            *counts.entry(oldest).or_default() += more;
        }
        for (id, count) in counts.into_iter().filter(|&(_, count)| count > 0) {
            let last = self.running.get(&id).is_some_and(|s| s.left() == count);
            parts.push(Part::new(id, count, last));
        }
        parts
    }

    /// Makes sure that the sequences of a step have pages of their own to write to. Where there are none left, the
    /// youngest sequences give theirs up and wait again.
    fn reserve(&mut self, parts: &mut Vec<Part>) {
        let mut ids: Vec<u64> = parts.iter().map(|p| p.id).collect();
        ids.sort_unstable();
        for id in ids {
            while let Some(part) = parts.iter().find(|p| p.id == id).copied() {
                if self.reserve_one(part) {
                    break;
                }
                // The youngest of all, perhaps this one itself.
                let Some(youngest) = self.running.last_key_value().map(|(&id, _)| id) else { break };
                self.preempt(youngest);
                parts.retain(|p| p.id != youngest);
            }
        }
    }

    /// Pages for one part of a step; false if there are none left.
    fn reserve_one(&mut self, part: Part) -> bool {
        let Some(sequence) = self.running.get_mut(&part.id) else { return false };
        while sequence.pages.len() * PAGE < sequence.computed + part.count + part.guesses {
            let page = self.pool.take().or_else(|| {
                // One that only the cache owns.
                self.cache.evict(&mut self.pool).then(|| self.pool.take()).flatten()
            });
            let Some(page) = page else { return false };
            sequence.pages.push(page);
        }
        true
    }

    /// Puts a sequence back among the waiting ones, without its pages.
    fn preempt(&mut self, id: u64) {
        if let Some(mut sequence) = self.running.remove(&id) {
            release(&mut sequence, &mut self.pool);
            self.stats.preemptions.add(1);
            self.waiting.insert(id, sequence);
        }
    }

    /// Finds out which tokens the grammars of those sequences allow that are given one; without those whose grammars fail.
    fn prepare(&mut self, parts: &mut Vec<Part>) {
        let vocab = self.engine.vocab();
        let chosen = |id: &u64| parts.iter().any(|p| p.last && p.id == *id);
        let choosers: Vec<(u64, &mut Chooser)> =
            self.running.iter_mut().filter(|(id, _)| chosen(id)).map(|(&id, s)| (id, &mut s.chooser)).collect();
        let prepare = |(id, chooser): (u64, &mut Chooser)| Some((id, chooser.prepare(vocab).err()?));
        let failed: Vec<(u64, Failure)> = choosers.into_par_iter().filter_map(prepare).collect();
        for (id, failure) in failed {
            parts.retain(|p| p.id != id);
            self.refuse(id, failure);
        }
    }

    /// Guesses what follows the sequences that are generating, where the step has room for it and there are pages.
    fn guess(&mut self, parts: &mut [Part]) {
        let Some(drafts) = &mut self.drafts else { return };
        drafts.keep(|id| self.running.contains_key(&id));
        let generating = parts.iter().filter(|p| p.last && p.count == 1).count().max(1);
        let (tokens, rows) = parts.iter().fold((0, 0), |(t, r), p| (t + p.count, r + p.rows()));
        let room = self.engine.most_tokens().saturating_sub(tokens).min(MOST_ROWS.saturating_sub(rows));
        let most = drafts.most().min(room / generating);
        let mut wanted = Vec::new();
        for part in parts.iter().filter(|p| p.last && p.count == 1) {
            let Some(s) = self.running.get(&part.id) else { continue };
            // One more token is chosen behind the last guess.
            let count = most.min((s.prompt + s.most - s.tokens.len()).saturating_sub(1));
            let choices = s.chooser.guessing(count);
            if !choices.is_empty() {
                wanted.push(Wanted { id: part.id, text: &s.tokens, choices });
            }
        }
        if wanted.is_empty() {
            return;
        }
        let guesses = match drafts.guess(&wanted, self.limits.chunk) {
            Ok(guesses) => guesses,
            Err(e) => {
                writeln!(io::stderr(), "nothing is guessed from now on: {e}").unwrap_or_default();
                self.drafts = None;
                return;
            }
        };
        let ids: Vec<u64> = wanted.iter().map(|w| w.id).collect();
        for (id, guesses) in ids.into_iter().zip(guesses) {
            let Some(part) = parts.iter_mut().find(|p| p.id == id) else { continue };
            part.guesses = guesses.len();
            if let Some(sequence) = self.running.get_mut(&id) {
                sequence.guesses = guesses;
            }
            self.reserve_one(*part);
            // No other sequence gives up pages for guesses.
            let room = self.running.get(&id).map_or(0, |s| s.pages.len() * PAGE - s.computed - part.count);
            part.guesses = part.guesses.min(room);
        }
    }

    fn run(&mut self, parts: &[Part]) {
        self.stats.steps.add(1);
        match self.compute(parts) {
            Ok(()) => {
                self.stats.failing.set(0);
                self.advance(parts);
            }
            Err(e) if parts.len() == 1 && parts[0].guesses == 0 => {
                self.stats.failing.add(1);
                self.fail(parts[0].id, &e);
            }
            // A wrong guess may be what cannot be computed.
            Err(_) => {
                for part in parts {
                    self.run(&[Part { guesses: 0, ..*part }]);
                }
            }
        }
    }

    /// Runs the engine: logits or tokens of the parts that want them are in `logits` or `best`.
    fn compute(&mut self, parts: &[Part]) -> Result<(), Error> {
        let sequences = || parts.iter().filter_map(|p| Some((p, self.running.get(&p.id)?)));
        let texts: Vec<Cow<'_, [u32]>> = sequences().map(|(p, s)| s.tokens_of(p)).collect();
        let mut chunks = Vec::with_capacity(texts.len());
        for ((part, s), tokens) in sequences().zip(&texts) {
            let logits = match part {
                Part { last: false, .. } => Logits::None,
                Part { guesses: 0, .. } => Logits::Last,
                // Only sequences with one token to be computed have guesses.
                _ => Logits::All,
            };
            chunks.push(Chunk { tokens, position: s.computed, pages: &s.pages, logits });
        }
        // Where something is forbidden there are no guesses, so what is wished of all rows of a sequence is alike.
        let wishes: Vec<Wish<'_>> =
            sequences().filter(|(p, _)| p.last).flat_map(|(p, s)| s.chooser.wishes(p.rows())).collect();
        self.engine.answer(&chunks, &wishes, &mut self.best, &mut self.logits)
    }

    /// Notes what was computed and chooses tokens.
    fn advance(&mut self, parts: &[Part]) {
        for part in parts {
            if let Some(sequence) = self.running.get_mut(&part.id) {
                sequence.computed += part.count;
                cache_pages(sequence, &mut self.cache, &mut self.pool);
                self.stats.computed.add((part.count + part.guesses) as u64);
            }
        }
        // Tokens and logits lie in the order of the parts that wish them.
        let vocab = self.engine.vocab();
        let (mut best, mut logits) = (self.best.as_slice(), self.logits.as_mut_slice());
        let mut rows: BTreeMap<u64, Rows<'_>> = BTreeMap::new();
        for part in parts.iter().filter(|p| p.last) {
            let Some(sequence) = self.running.get(&part.id) else { continue };
            let of = if sequence.chooser.needs_logits() {
                let (own, rest) = logits.split_at_mut((part.rows() * vocab).min(logits.len()));
                logits = rest;
                Rows::Logits(own)
            } else {
                let (own, rest) = best.split_at(part.rows().min(best.len()));
                best = rest;
                Rows::Tokens(own)
            };
            rows.insert(part.id, of);
        }
        let jobs: Vec<(u64, &mut Sequence, Rows<'_>)> =
            self.running.iter_mut().filter_map(|(&id, s)| Some((id, s, rows.remove(&id)?))).collect();
        let choose = |(id, sequence, rows): (u64, &mut Sequence, Rows<'_>)| (id, sequence.choose(rows, vocab));
        let chosen: Vec<(u64, Vec<Chosen>)> = jobs.into_par_iter().map(choose).collect();
        for part in parts.iter().filter(|p| p.guesses > 0) {
            let right = chosen.iter().find(|(id, _)| *id == part.id).map_or(0, |(_, all)| all.len().saturating_sub(1));
            self.stats.guessed.add(part.guesses as u64);
            self.stats.right.add(right as u64);
            if let Some(sequence) = self.running.get_mut(&part.id) {
                sequence.sink.send(Event::Guessed { right, wrong: part.guesses - right });
            }
        }
        for (id, chosen) in chosen {
            let last = chosen.len().saturating_sub(1);
            for (i, result) in chosen.into_iter().enumerate() {
                match result {
                    Ok((token, logprobs)) => self.give(id, token, logprobs.map(Box::new), i < last),
                    Err(failure) => self.refuse(id, failure),
                }
            }
        }
    }

    /// A token was chosen for a sequence; if it was guessed, it is computed already.
    fn give(&mut self, id: u64, token: u32, logprobs: Option<Box<LogProbs>>, guessed: bool) {
        let Some(sequence) = self.running.get_mut(&id) else { return };
        if sequence.end.contains(&token) {
            return self.end(id, Reason::End);
        }
        sequence.tokens.push(token);
        if guessed {
            sequence.computed += 1;
        }
        self.stats.generated.add(1);
        sequence.sink.send(Event::Token { token, logprobs });
        if sequence.chooser.is_done() {
            self.end(id, Reason::End);
        } else if sequence.tokens.len() - sequence.prompt >= sequence.most {
            self.end(id, Reason::Count);
        }
    }

    /// A token could not be chosen for a sequence.
    fn refuse(&mut self, id: u64, failure: Failure) {
        match failure {
            Failure::Grammar(what) => self.end(id, Reason::Form(what)),
            Failure::Engine(e) => self.fail(id, &e),
        }
    }

    fn fail(&mut self, id: u64, error: &dyn std::error::Error) {
        self.stats.failures.add(1);
        self.end(id, Reason::Failed(error.to_string()));
    }

    fn end(&mut self, id: u64, reason: Reason) {
        if let Some(mut sequence) = self.running.remove(&id) {
            sequence.sink.send(Event::Done(reason));
            cache_pages(&mut sequence, &mut self.cache, &mut self.pool);
            release(&mut sequence, &mut self.pool);
        }
    }

    fn count(&self) {
        self.stats.running.set(self.running.len() as u64);
        self.stats.waiting.set(self.waiting.len() as u64);
        self.stats.free_pages.set(self.pool.free() as u64);
        self.stats.cached_pages.set(self.cache.len() as u64);
    }
}

/// True if `running` will, before it generates, have computed a page that `tokens` begin with beyond `have` pages.
fn begins_alike(running: &Sequence, tokens: &[u32], have: usize) -> bool {
    let end = (have + 1) * PAGE;
    running.computed < end
        && end <= running.tokens.len()
        && end <= tokens.len()
        && running.tokens[..end] == tokens[..end]
}

/// Gives up a sequence's pages.
fn release(sequence: &mut Sequence, pool: &mut Pool) {
    for page in sequence.pages.drain(..) {
        pool.release(page);
    }
    sequence.computed = 0;
    sequence.shared = 0;
    sequence.parent = ROOT;
}

/// Puts the pages that have become whole into the cache.
fn cache_pages(sequence: &mut Sequence, cache: &mut PrefixCache, pool: &mut Pool) {
    while sequence.shared < sequence.computed / PAGE {
        let i = sequence.shared;
        let tokens = &sequence.tokens[i * PAGE..(i + 1) * PAGE];
        sequence.parent = cache.add(sequence.parent, tokens, sequence.pages[i], pool);
        sequence.shared += 1;
    }
}

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;
use crate::engine::{Sampling, check_chunks, mask_words};
use crate::serve::choose::Grammar;

const VOCAB: usize = 50;

/// An engine whose next token is a function of the whole sequence, which it reads from the pages: what is in a page that
/// it should not be, or is not there, changes every answer.
struct Mirror {
    pages: Vec<[u32; PAGE]>,
    context: usize,
    most: usize,
    /// Tokens and logits' rows of each step.
    steps: Arc<Mutex<Vec<(usize, usize)>>>,
    /// Fails steps that want what follows this token.
    poison: Option<u32>,
    /// Says another thing about half of the time.
    differs: bool,
}

/// The logits after a sequence.
fn logits(sequence: &[u32]) -> Vec<f32> {
    let mut h = 0x9E37_79B9_7F4A_7C15u64;
    for &t in sequence {
        h = (h ^ u64::from(t)).wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(23);
    }
    let value = |i: usize| {
        ((h ^ (i as u64).wrapping_mul(0x94D0_49BB_1331_11EB)).wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32
    };
    (0..VOCAB).map(|i| value(i) / 4e6).collect()
}

impl Engine for Mirror {
    fn vocab(&self) -> usize {
        VOCAB
    }
    fn context(&self) -> usize {
        self.context
    }
    fn pages(&self) -> usize {
        self.pages.len()
    }
    fn most_tokens(&self) -> usize {
        self.most
    }
    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        check_chunks(self, chunks)?;
        out.clear();
        let tokens = chunks.iter().map(|c| c.tokens.len()).sum();
        assert!(tokens <= self.most, "{tokens} tokens in a step");
        for chunk in chunks {
            for (i, &token) in chunk.tokens.iter().enumerate() {
                let at = chunk.position + i;
                self.pages[chunk.pages[at / PAGE] as usize][at % PAGE] = token;
            }
        }
        for chunk in chunks {
            let end = chunk.position + chunk.tokens.len();
            let sequence: Vec<u32> =
                (0..end).map(|at| self.pages[chunk.pages[at / PAGE] as usize][at % PAGE]).collect();
            for at in end - chunk.logits.rows(chunk.tokens.len())..end {
                if Some(sequence[at]) == self.poison {
                    return Err(Error::NotANumber);
                }
                let mut row = logits(&sequence[..=at]);
                if self.differs && row[0] < row[1] {
                    row.reverse();
                }
                out.extend(row);
            }
        }
        self.steps.lock().unwrap().push((tokens, out.len() / VOCAB));
        Ok(())
    }
    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), Error> {
        self.pages[to as usize] = self.pages[from as usize];
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Ear(Arc<Mutex<(Vec<Event>, bool)>>);

impl Sink for Ear {
    fn send(&mut self, event: Event) {
        self.0.lock().unwrap().0.push(event);
    }
    fn is_closed(&self) -> bool {
        self.0.lock().unwrap().1
    }
}

impl Ear {
    fn close(&self) {
        self.0.lock().unwrap().1 = true;
    }
    fn tokens(&self) -> Vec<u32> {
        let token = |e: &Event| if let Event::Token { token, .. } = e { Some(*token) } else { None };
        self.0.lock().unwrap().0.iter().filter_map(token).collect()
    }
    fn done(&self) -> Option<Reason> {
        match self.0.lock().unwrap().0.last() {
            Some(Event::Done(reason)) => Some(reason.clone()),
            _ => None,
        }
    }
    /// Guesses that were right, and that were wrong.
    fn guesses(&self) -> (usize, usize) {
        let add = |(r, w), e: &Event| match e {
            Event::Guessed { right, wrong } => (r + right, w + wrong),
            _ => (r, w),
        };
        self.0.lock().unwrap().0.iter().fold((0, 0), add)
    }
    fn cached(&self) -> Option<usize> {
        match self.0.lock().unwrap().0.first() {
            Some(Event::Started { cached }) => Some(*cached),
            _ => None,
        }
    }
}

struct Bench {
    scheduler: Scheduler,
    stats: Arc<Stats>,
    steps: Arc<Mutex<Vec<(usize, usize)>>>,
}

fn bench(pages: usize, most: usize, limits: Limits) -> Bench {
    poisoned(pages, most, limits, None)
}

fn poisoned(pages: usize, most: usize, limits: Limits, poison: Option<u32>) -> Bench {
    drafting(pages, most, limits, poison, None)
}

fn drafting(pages: usize, most: usize, limits: Limits, poison: Option<u32>, drafts: Option<Drafts>) -> Bench {
    let (stats, steps) = (Arc::new(Stats::default()), Arc::new(Mutex::new(Vec::new())));
    let pages = vec![[u32::MAX; PAGE]; pages];
    let engine = Mirror { pages, context: 4096, most, steps: steps.clone(), poison, differs: false };
    Bench { scheduler: Scheduler::new(Box::new(engine), drafts, limits, stats.clone()), stats, steps }
}

/// Guesses by a model that says the same, or differs about half of the time.
fn by_model(pages: usize, most: usize, differs: bool) -> Drafts {
    let pages = vec![[u32::MAX; PAGE]; pages];
    let engine = Mirror { pages, context: 4096, most: 4096, steps: Arc::default(), poison: None, differs };
    Drafts::of_model(Box::new(engine), VOCAB, most)
}

const LIMITS: Limits = Limits { sequences: 16, chunk: 64 };

/// Forbids every third token, counted from the last one; goes on for so many tokens.
struct Thirds {
    last: u32,
    left: usize,
}

impl Grammar for Thirds {
    fn forbidden(&mut self, vocab: usize) -> Result<Vec<u32>, String> {
        if self.left == 0 {
            return Err("nothing more".to_owned());
        }
        let mut words = vec![0; mask_words(vocab as u32) as usize];
        (0..vocab as u32)
            .filter(|t| (t + self.last).is_multiple_of(3))
            .for_each(|t| words[t as usize / 32] |= 1 << (t % 32));
        Ok(words)
    }
    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert!(!(token + self.last).is_multiple_of(3), "{token} is forbidden after {}", self.last);
        (self.last, self.left) = (token, self.left - 1);
        Ok(())
    }
    fn is_done(&self) -> bool {
        false
    }
}

fn choosing(seed: u64) -> Choosing {
    let thirds = |left| Some(Box::new(Thirds { last: 0, left }) as Box<dyn Grammar>);
    match seed % 5 {
        0 => Choosing::default(),
        3 => Choosing { grammar: thirds(usize::MAX), ..Choosing::default() },
        4 => Choosing {
            sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
            grammar: thirds(usize::MAX),
            ..Choosing::default()
        },
        1 => Choosing { sampling: Sampling { temperature: 0.8, seed, ..Sampling::default() }, ..Choosing::default() },
        _ => Choosing {
            sampling: Sampling { temperature: 1.0, top_p: 0.9, seed, ..Sampling::default() },
            frequency: 0.3,
            logprobs: Some(2),
            ..Choosing::default()
        },
    }
}

impl Bench {
    fn submit(&mut self, prompt: &[u32], most: usize, seed: u64, end: &[u32]) -> Ear {
        let ear = Ear::default();
        let (prompt, end) = (prompt.to_vec(), Arc::from(end));
        self.scheduler.submit(Request { prompt, most, end, choosing: choosing(seed), sink: Box::new(ear.clone()) });
        ear
    }

    fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.scheduler.is_idle() {
                return;
            }
            assert!(self.scheduler.step(), "a step without work");
        }
        panic!("requests never end");
    }

    /// No request holds a page: all are free or only the cache's.
    fn assert_clean(&self) {
        let (pool, cache) = (&self.scheduler.pool, &self.scheduler.cache);
        assert_eq!(pool.free() + cache.idle(pool), self.scheduler.engine.pages());
        assert_eq!(cache.idle(pool), cache.len());
    }
}

/// What the request gets when it is the only one: computed here without pages or steps.
fn alone(prompt: &[u32], most: usize, seed: u64, end: &[u32]) -> Vec<u32> {
    let mut chooser = Chooser::new(choosing(seed), prompt);
    let mut sequence = prompt.to_vec();
    while sequence.len() < prompt.len() + most {
        let (token, _) = chooser.choose(&mut logits(&sequence)).unwrap();
        if end.contains(&token) {
            break;
        }
        sequence.push(token);
    }
    sequence.split_off(prompt.len())
}

fn random(state: &mut u64, n: usize) -> usize {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) as usize % n
}

/// Prompts of which many begin alike.
fn prompt(state: &mut u64) -> Vec<u32> {
    let (family, len) = (random(state, 3) as u32, 1 + random(state, 300));
    let cut = random(state, 400);
    let mut tail = random(state, 1 << 30) as u64;
    (0..len)
        .map(|i| if i < cut { (i as u32 * 7 + family) % VOCAB as u32 } else { random(&mut tail, VOCAB) as u32 })
        .collect()
}

#[test]
fn answers_under_load_are_those_alone() {
    let mut state = 7;
    let mut preempted = 0;
    // Few pages and many; few sequences and many; small steps and large.
    for (pages, most, sequences, chunk) in
        [(200, 256, 32, 64), (12, 64, 16, 32), (8, 16, 3, 16), (7, 512, 64, 512), (30, 7, 64, 3), (64, 33, 1, 8)]
    {
        let mut b = bench(pages, most, Limits { sequences, chunk });
        let mut all = Vec::new();
        for i in 0..60 {
            let (prompt, count) = (prompt(&mut state), 1 + random(&mut state, 90));
            let end = [random(&mut state, 2000) as u32];
            let ear = b.submit(&prompt, count, i, &end);
            all.push((prompt, count, i, end, ear));
            for _ in 0..random(&mut state, 4) {
                b.scheduler.step();
            }
        }
        b.finish();
        for (prompt, count, seed, end, ear) in &all {
            let expected = alone(prompt, *count, *seed, end);
            assert_eq!(ear.tokens(), expected, "pages {pages}, request {seed}");
            let reason = if expected.len() < *count { Reason::End } else { Reason::Count };
            assert_eq!(ear.done(), Some(reason));
        }
        b.assert_clean();
        assert!(b.steps.lock().unwrap().iter().all(|&(tokens, rows)| tokens <= most && rows <= sequences));
        preempted += b.stats.preemptions.get();
        assert_eq!((b.stats.running.get(), b.stats.waiting.get()), (0, 0));
    }
    assert!(preempted > 0, "no case ran out of pages");
}

#[test]
fn guesses_do_not_change_answers() {
    let mut state = 11;
    type Source = fn() -> Drafts;
    let sources: [(Source, bool); 4] = [
        (|| by_model(200, 5, false), true),
        (|| by_model(200, 5, true), false),
        // Not enough pages for all.
        (|| by_model(9, 3, true), false),
        (|| Drafts::look_up(4), false),
    ];
    for (source, same) in sources {
        let mut preempted = 0;
        for (pages, most, sequences, chunk) in [(200, 256, 32, 64), (12, 64, 16, 32), (30, 7, 64, 100), (64, 33, 1, 8)]
        {
            let mut b = drafting(pages, most, Limits { sequences, chunk }, None, Some(source()));
            let mut all = Vec::new();
            for i in 0..40 {
                let (prompt, count) = (prompt(&mut state), 1 + random(&mut state, 90));
                let end = [random(&mut state, 200) as u32];
                let ear = b.submit(&prompt, count, i, &end);
                all.push((prompt, count, i, end, ear));
                for _ in 0..random(&mut state, 4) {
                    b.scheduler.step();
                }
            }
            b.finish();
            let mut sum = (0, 0);
            for (prompt, count, seed, end, ear) in &all {
                let expected = alone(prompt, *count, *seed, end);
                assert_eq!(ear.tokens(), expected, "pages {pages}, request {seed}");
                let reason = if expected.len() < *count { Reason::End } else { Reason::Count };
                assert_eq!(ear.done(), Some(reason));
                let (right, wrong) = ear.guesses();
                // Penalties and forms are not known to the draft model, which draws as the model does.
                if same && seed % 5 < 2 {
                    assert!(wrong <= 5 && (wrong == 0 || ear.done() == Some(Reason::End)), "{wrong} of {right} wrong");
                }
                sum = (sum.0 + right, sum.1 + wrong);
            }
            b.assert_clean();
            assert!(b.steps.lock().unwrap().iter().all(|&(tokens, rows)| tokens <= most && rows <= MOST_ROWS));
            assert_eq!((b.stats.right.get(), b.stats.guessed.get()), (sum.0 as u64, (sum.0 + sum.1) as u64));
            preempted += b.stats.preemptions.get();
            if most > 7 && pages > 12 {
                assert!(sum.0 > 0, "no guess was right");
            }
        }
        assert!(preempted > 0, "no case ran out of pages");
    }
}

#[test]
fn right_guesses_save_steps_and_are_cached() {
    let steps = |drafts: Option<Drafts>| {
        let mut b = drafting(64, 256, LIMITS, None, drafts);
        let ear = b.submit(&[1, 2, 3], 200, 0, &[]);
        b.finish();
        // What follows the last whole page of the answer is computed again.
        let next = b.submit(&[&[1, 2, 3], &ear.tokens()[..]].concat(), 1, 0, &[]);
        b.finish();
        assert_eq!(next.cached(), Some(192));
        (b.stats.steps.get(), ear.guesses())
    };
    assert_eq!(steps(None), (201, (0, 0)));
    // One token, then five a step, and four at the end.
    assert_eq!(steps(Some(by_model(10, 4, false))), (42, (159, 0)));
    let (n, (right, wrong)) = steps(Some(by_model(10, 4, true)));
    assert!(n < 190 && right > 10 && wrong > 10, "{n} steps, {right} right, {wrong} wrong");
}

#[test]
fn a_wrong_guess_that_cannot_be_computed_is_no_failure() {
    let (prompt, said) =
        (0..).map(|p| ([p, 1], alone(&[p, 1], 8, 0, &[]))).find(|(_, said)| !said.contains(&49)).unwrap();
    let mut b = drafting(20, 64, LIMITS, Some(49), Some(Drafts::of_model(Box::new(Poisonous), VOCAB, 3)));
    let ear = b.submit(&prompt, 8, 0, &[]);
    b.finish();
    assert_eq!((ear.tokens(), ear.done()), (said, Some(Reason::Count)));
    assert_eq!((b.stats.failures.get(), b.stats.failing.get()), (0, 0));
}

/// A draft model that says 49 always.
struct Poisonous;

impl Engine for Poisonous {
    fn vocab(&self) -> usize {
        VOCAB
    }
    fn context(&self) -> usize {
        4096
    }
    fn pages(&self) -> usize {
        64
    }
    fn most_tokens(&self) -> usize {
        4096
    }
    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        let rows: usize = chunks.iter().map(|c| c.logits.rows(c.tokens.len())).sum();
        *out = (0..rows * VOCAB).map(|i| if i % VOCAB == 49 { 1.0 } else { 0.0 }).collect();
        Ok(())
    }
    fn copy_page(&mut self, _: u32, _: u32) -> Result<(), Error> {
        unreachable!("nothing is copied")
    }
}

#[test]
fn what_is_cached_is_not_computed_again() {
    let mut b = bench(64, 256, LIMITS);
    let long: Vec<u32> = (0..256).map(|i| i % 50).collect();
    let first = b.submit(&long, 70, 0, &[]);
    b.finish();
    assert_eq!((first.cached(), b.stats.computed.get()), (Some(0), 256 + 69));
    // The whole prompt is cached, but for its last page, in which the last token must be computed.
    let again = b.submit(&long, 1, 0, &[]);
    b.finish();
    assert_eq!((again.cached(), again.tokens()), (Some(192), first.tokens()[..1].to_vec()));
    // The answer is cached too, as the next turn of a conversation needs it.
    let mut turn = long.clone();
    turn.extend(first.tokens());
    let next = b.submit(&turn, 5, 0, &[]);
    b.finish();
    assert_eq!((next.cached(), next.tokens()), (Some(320), alone(&turn, 5, 0, &[])));
    // Equal prompts at once are computed once.
    let before = b.stats.computed.get();
    let fresh: Vec<u32> = (0..200).map(|i| (i * 3 + 1) % 50).collect();
    let ears: Vec<Ear> = (0..8).map(|seed| b.submit(&fresh, 4, seed, &[])).collect();
    b.finish();
    assert_eq!(b.stats.computed.get() - before, 200 + 7 * 8 + 8 * 3);
    for (seed, ear) in ears.iter().enumerate() {
        assert_eq!(ear.tokens(), alone(&fresh, 4, seed as u64, &[]));
    }
    b.assert_clean();
}

#[test]
fn closing_frees_pages_within_a_step() {
    let mut b = bench(64, 64, LIMITS);
    let ears: Vec<Ear> = (0..4).map(|i| b.submit(&vec![i; 200], 500, 0, &[])).collect();
    for _ in 0..20 {
        b.scheduler.step();
    }
    let waiting = b.submit(&[1], 10, 0, &[]);
    ears.iter().chain([&waiting]).for_each(Ear::close);
    b.scheduler.step();
    assert!(b.scheduler.is_idle());
    b.assert_clean();
    assert_eq!(b.stats.cancelled.get(), 5);
}

#[test]
fn tokens_flow_while_long_prompts_are_read() {
    let mut b = bench(200, 1024, Limits { sequences: 16, chunk: 32 });
    let quick = b.submit(&[1, 2, 3], 60, 0, &[]);
    b.scheduler.step();
    let long = b.submit(&vec![5; 2000], 1, 0, &[]);
    let short = b.submit(&[4; 20], 1, 1, &[]);
    for i in 0..40 {
        b.scheduler.step();
        assert_eq!(quick.tokens().len(), 2 + i);
        // The short prompt does not wait for the long one.
        assert!(i < 2 || short.done().is_some());
    }
    assert!(long.done().is_none());
    // The long one does not wait for short ones that keep coming.
    let mut others = Vec::new();
    for i in 0..130 {
        others.push(b.submit(&vec![6 + i % 40; 30 + i as usize % 7], 1, 0, &[]));
        b.scheduler.step();
    }
    assert!(long.done().is_some());
    let steps = b.steps.lock().unwrap();
    assert!(steps[1..60].iter().all(|&(tokens, _)| tokens <= 33), "{steps:?}");
}

#[test]
fn what_cannot_be_computed_ends_alone() {
    let mut b = poisoned(8, 64, LIMITS, Some(49));
    let mut others = Vec::new();
    for i in 0..5 {
        others.push((i, b.submit(&[i, 1], 3, 3, &[])));
    }
    let bad = b.submit(&[3, 49], 3, 0, &[]);
    b.finish();
    assert!(matches!(bad.done(), Some(Reason::Failed(text)) if text.contains("not numbers")));
    for (i, ear) in others {
        // An answer that comes to the poisoned token ends there too.
        let expected = alone(&[i, 1], 3, 3, &[]);
        let reach = expected.iter().position(|&t| t == 49).map_or(3, |p| p + 1);
        assert_eq!(ear.tokens(), expected[..reach]);
    }
    b.assert_clean();

    let refused = |b: &mut Bench, prompt: &[u32], most: usize, text: &str| {
        let done = b.submit(prompt, most, 0, &[]).done();
        assert!(matches!(&done, Some(Reason::Failed(t)) if t.contains(text)), "{done:?}");
    };
    refused(&mut b, &[], 1, "prompt is empty");
    refused(&mut b, &[50], 1, "token 50");
    refused(&mut b, &[1; 500], 14, "513 tokens do not fit the context of 512");
    assert_eq!(b.submit(&[1], 0, 0, &[]).done(), Some(Reason::Count));
    assert!(b.scheduler.is_idle());
    // The longest that fits is computed, though it needs every page.
    let most = b.submit(&[1; 500], 13, 0, &[]);
    b.finish();
    assert_eq!(most.done(), Some(Reason::Count));
}

#[test]
fn stopping_tells_everybody() {
    let mut b = bench(4, 64, Limits { sequences: 1, chunk: 64 });
    let ears: BTreeMap<u32, Ear> = (0..3).map(|i| (i, b.submit(&[i], 100, 0, &[]))).collect();
    b.scheduler.step();
    b.scheduler.stop();
    assert!(ears.values().all(|e| e.done() == Some(Reason::Stopped)));
    b.assert_clean();
}

#[test]
fn a_form_that_cannot_go_on_ends_its_request_alone() {
    let mut bench = bench(10, 64, LIMITS);
    let (ear, other) = (Ear::default(), bench.submit(&[1, 2, 3], 6, 0, &[]));
    let grammar: Option<Box<dyn Grammar>> = Some(Box::new(Thirds { last: 0, left: 2 }));
    let choosing = Choosing { grammar, ..Choosing::default() };
    let sink = Box::new(ear.clone());
    bench.scheduler.submit(Request { prompt: vec![5], most: 9, end: Arc::from([]), choosing, sink });
    while !bench.scheduler.is_idle() {
        bench.scheduler.step();
    }
    assert_eq!((ear.tokens().len(), ear.done()), (2, Some(Reason::Form("nothing more".to_owned()))));
    assert_eq!((other.tokens(), other.done()), (alone(&[1, 2, 3], 6, 0, &[]), Some(Reason::Count)));
    assert_eq!(bench.stats.failures.get(), 0);
    bench.assert_clean();
}

//! Encoding: weights → windows, by the Viterbi algorithm over a code's trellis.
//!
//! # The search
//!
//! As on the CPU (`qp-runtime`'s `codec::viterbi`, which explains trellis, states and tail-biting), with the same
//! integers ([`crate::metric`]) and the same rule for ties, so the windows are the same. A block of threads, or a cluster
//! of them, searches `lanes` blocks of weights at once, which share every entry of the codebook that is read:
//!
//! * Costs of all states at all boundaries lie in the *history*, in global memory, `lanes` side by side; those of the
//!   last boundary are still in the caches when they are read. A thread takes the 2^α states that differ in their
//!   highest α bits only: they have the same predecessors, so a cost that is loaded serves 2^α · `lanes` transitions, each
//!   an addition onto a dot product and a minimum.
//! * Where states are few, several lanes of a warp share one such task; each takes a part of its predecessors.
//! * Where the states are so many that the costs of all searches in flight leave the L2 cache, the blocks of a cluster
//!   share one search, so that fewer are in flight: each takes its part of the tasks of a step, and they meet after it.
//! * On the way back a warp for each block of weights finds the best of a state's 2^KV predecessors again, so no
//!   decision is kept.
//!
//! # The book
//!
//! Entries are read from a table in global memory, a few megabytes that stay in the L2 cache, in the order in which
//! threads take them: see [`Plan::book`]. So any decode expression costs the same.

use std::cmp::Ordering;

use super::c_name;
use crate::cuda::Device;
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V, Var};
use crate::metric::{LARGEST_COST, Metric, UNREACHABLE};
use crate::spec::{Code, Value, mask};

/// Blocks of weights that are searched together.
const LANES: u32 = 4;
/// Most that α can be.
const ALPHA: u32 = 3;
/// The same in a cluster, where loads of costs from the L2 cache are what is scarce.
const CLUSTER_ALPHA: u32 = 4;
/// Most threads of a block.
const THREADS: u32 = 512;
/// Threads of one multiprocessor: each may have its part of the registers.
const RESIDENT: u32 = 512;
/// Predecessors that a thread looks at in one round of its loop, if α is at most [`ALPHA`].
const AHEAD: u32 = 4;
/// log2 of the most states that are worth it.
const MOST_STATES: u32 = 18;
/// Steps that a thread of a code without memory encodes at once.
const STEPS: u32 = 4;

/// Why a code cannot be encoded on a GPU.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    /// No memory would be enough.
    #[error(
        "windows of {window} bits have more states than a GPU's encoder can keep: encode on the CPU (--device cpu)"
    )]
    Window {
        /// L.
        window: u32,
    },
}

/// How a code is encoded on a device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The code.
    pub code: Code,
    /// Its metric.
    pub metric: Metric,
    /// Steps on each side of the seam in the first search.
    reach: u32,
    /// Blocks of weights at once; one for a code without memory.
    pub lanes: u32,
    /// Threads of a block.
    pub threads: u32,
    /// α.
    alpha: u32,
    /// Blocks of threads that fit on one multiprocessor at once.
    pub resident: u32,
    /// Blocks of threads that share a search.
    pub cluster: u32,
}

/// One step of the pattern.
#[derive(Clone, Copy)]
struct Phase {
    /// log2 of the states before the step.
    before: u32,
    /// KV.
    bits: u32,
    /// Sets of 2^α states.
    tasks: u32,
    /// Lanes that share a task.
    split: u32,
    /// First word of its part of the book.
    book: u32,
}

impl Plan {
    /// Chooses how to encode `code` on `device`; of its tables only what [`Metric::new`] looks at matters.
    ///
    /// # Errors
    /// A code with too many states.
    pub fn new(code: &Code, device: &Device) -> Result<Plan, Refused> {
        let steps = code.steps_per_block();
        let metric = Metric::new(code, steps);
        let (most, least) = (*code.steps.iter().max().expect("a step"), *code.steps.iter().min().expect("a step"));
        let states = code.window - least;
        if code.is_memoryless() {
            let resident = RESIDENT / 256;
            let code = code.clone();
            return Ok(Plan { code, metric, reach: 0, lanes: 1, threads: 256, alpha: 0, resident, cluster: 1 });
        }
        if states > MOST_STATES {
            return Err(Refused::Window { window: code.window });
        }
        let alpha = ALPHA.min(least).min(code.window - most);
        let threads = (1u32 << (states - alpha)).clamp(32, THREADS);
        let resident = (RESIDENT / threads).clamp(1, device.blocks_per_sm);
        let (code, reach) = (code.clone(), code.reach(steps));
        let mut plan = Plan { code, metric, reach, lanes: LANES, threads, alpha, resident, cluster: 1 };
        let larger = |plan: &Plan| Plan { cluster: 2 * plan.cluster, ..plan.clone() };
        while !plan.fits(device) && 2 * plan.cluster <= device.cluster && larger(&plan).is_busy() {
            plan = larger(&plan);
        }
        if plan.cluster > 1 {
            let more = Plan { alpha: CLUSTER_ALPHA.min(least).min(plan.code.window - most), ..plan.clone() };
            plan = if more.is_busy() { more } else { plan };
        }
        Ok(plan)
    }

    /// Whether the costs that a step of all searches in flight reads and writes stay in the L2 cache, beside the book.
    fn fits(&self, device: &Device) -> bool {
        let book = self.phases().iter().map(|p| p.book).max().expect("a step") + self.book_words();
        let costs = u64::from(self.searches(device)) * 2 * u64::from(self.stride());
        4 * (costs + u64::from(book)) <= device.l2_bytes
    }

    /// Whether every step has work for all threads.
    fn is_busy(&self) -> bool {
        self.phases().iter().all(|p| p.tasks << p.bits.min(5) >= self.team())
    }

    /// Threads that share a search.
    fn team(&self) -> u32 {
        self.threads * self.cluster
    }

    /// Searches that `device` runs at once.
    pub fn searches(&self, device: &Device) -> u32 {
        device.sms * self.resident / self.cluster
    }

    /// Steps of a block of weights.
    pub fn steps(&self) -> u32 {
        self.code.steps_per_block()
    }

    /// Whether the history holds costs doubled. A metric's shift by one bit then waits for the minimum, which saves an
    /// instruction a transition: `min(old + (d >> 1)) = min(2 old + d) >> 1`. Sums do not overflow: on any path 2 old is
    /// within 2^30, and from a state that is [`UNREACHABLE`], which counts half as much now, no path is much longer than a
    /// window, since then all states are reached.
    fn doubles(&self) -> bool {
        let fewest = *self.code.steps.iter().min().expect("a step");
        self.metric.shift == 1 && 4 * (self.code.window.div_ceil(fewest) + 1) <= self.steps()
    }

    /// Words that the weights of a step take.
    pub fn weight_words(&self) -> u32 {
        self.code.vector.div_ceil(2)
    }

    /// Costs of a search's history: boundaries × states × lanes.
    pub fn history(&self) -> u64 {
        if self.code.is_memoryless() { 1 } else { u64::from(self.boundaries()) * u64::from(self.stride()) }
    }

    /// Boundaries that have costs: all, or all but the last. That is not looked at when a path starts and ends at a known
    /// state; without it, histories of as many large searches as a GPU can run at once just fit the index.
    fn boundaries(&self) -> u32 {
        let to_spare = self.cluster > 1 && 2 * self.reach < self.steps();
        self.steps() + u32::from(!to_spare)
    }

    /// The costs of one boundary.
    fn stride(&self) -> u32 {
        self.lanes << (self.code.window - self.code.steps.iter().min().expect("a step"))
    }

    /// The weights of `lanes` blocks as the kernel takes them, `steps × lanes ×` [`Plan::weight_words`] words: two
    /// numbers of [`Metric::weight`] a word. `blocks` holds whole blocks, `lanes` at most.
    pub fn weights(&self, blocks: &[f32], words: &mut [u32]) {
        let (v, per) = (self.code.vector as usize, self.weight_words() as usize);
        words.fill(0);
        for (lane, block) in blocks.chunks_exact(self.code.block.len() as usize).enumerate() {
            for (s, x) in block.chunks_exact(v).enumerate() {
                let at = (s * self.lanes as usize + lane) * per;
                for (word, x) in words[at..at + per].iter_mut().zip(x.chunks(2)) {
                    let half = |i: usize| x.get(i).map_or(0, |&x| u32::from(self.metric.weight(x).cast_unsigned()));
                    *word = half(0) | half(1) << 16;
                }
            }
        }
    }

    /// Bits of an entry: with its energy if entries have 16 bits.
    fn entry_bits(&self) -> u32 {
        match (self.code.value, self.code.vector) {
            (Value::I8, 1 | 2) => 16,
            (Value::I8, _) => 32,
            (Value::I16, 1 | 2) => 64,
            (Value::I16, _) => 128,
        }
    }

    /// Words of a book of all windows.
    fn book_words(&self) -> u32 {
        ((self.entry_bits() as usize) << self.code.window).div_ceil(32) as u32
    }

    /// The phases of the pattern.
    fn phases(&self) -> Vec<Phase> {
        let (c, n) = (&self.code, self.code.steps.len());
        let mut kinds: Vec<u32> = vec![];
        let phase = |i: usize| {
            let bits = c.steps[i];
            let tasks = 1 << (c.window - bits - self.alpha);
            let split = (self.team() / tasks).clamp(1, 32.min(1 << bits));
            let kind = kinds.iter().position(|&k| k == bits).unwrap_or_else(|| {
                kinds.push(bits);
                kinds.len() - 1
            });
            let before = c.window - c.steps[(i + n - 1) % n];
            Phase { before, bits, tasks, split, book: kind as u32 * self.book_words() }
        };
        (0..n).map(phase).collect()
    }

    /// The codebook, whose tables must be filled, as the kernel reads it: for each KV of the pattern all windows, in the order of its threads.
    pub fn book(&self) -> Vec<u32> {
        let mut halves: Vec<u16> = vec![];
        let per = self.entry_bits() as usize / 16;
        let (v, entries) = (self.code.vector as usize, self.code.codebook());
        let mut done = 0;
        let phases = if self.code.is_memoryless() { vec![None] } else { self.phases().into_iter().map(Some).collect() };
        for phase in phases {
            if phase.is_some_and(|p| p.book < done) {
                continue;
            }
            done += self.book_words();
            let first = halves.len();
            halves.resize(first + self.book_words() as usize * 2, 0);
            for (w, entry) in entries.chunks_exact(v).enumerate() {
                let at = phase.map_or(w as u32, |p| self.place(&p, w as u32));
                let out = &mut halves[first + at as usize * per..][..per];
                match self.code.value {
                    Value::I8 => {
                        let byte = |i: usize| entry.get(i).map_or(0, |&c| u16::from(c as i8 as u8));
                        out.iter_mut().enumerate().for_each(|(i, o)| *o = byte(2 * i) | byte(2 * i + 1) << 8);
                    }
                    Value::I16 => {
                        out.iter_mut().zip(entry).for_each(|(o, &c)| *o = c.cast_unsigned());
                        let energy = self.metric.energy(entry).cast_unsigned();
                        let at = if per == 4 { 2 } else { 4 };
                        (out[at], out[at + 1]) = (energy as u16, (energy >> 16) as u16);
                    }
                }
            }
        }
        halves.chunks_exact(2).map(|h| u32::from(h[0]) | u32::from(h[1]) << 16).collect()
    }

    /// Where window `w` lies in the book of a phase.
    fn place(&self, p: &Phase, w: u32) -> u32 {
        let (o, b) = (w >> p.bits, w & mask(p.bits));
        let (set, task) = (o / p.tasks, o % p.tasks);
        (((b / p.split * p.tasks + task) * p.split + b % p.split) << self.alpha) + set
    }

    /// Makes the kernel, for `searches` at once. Its parameters, in order:
    ///
    /// * `weights`: `u32`, groups of blocks as [`Plan::weights`] makes them (of a code without memory, steps);
    /// * `book`: `u32`, [`Plan::book`];
    /// * `history`: `i32`, `searches` × [`Plan::history`], for the kernel's own use;
    /// * `windows`: `u32`, blocks × steps;
    /// * `groups`: `i32`, the number of groups.
    pub fn lower(&self, searches: u32) -> Kernel {
        let c = &self.code;
        let kind = if c.is_memoryless() { "nearest" } else { "encode" };
        let steps: Vec<String> = c.steps.iter().map(u32::to_string).collect();
        let name = format!("{kind}_l{}_k{}_v{}", c.window, steps.join("_"), c.vector);
        let b = Builder::new(&c_name(&name), [searches * self.cluster, 1], self.threads);
        b.cluster(self.cluster);
        let steps = steps.join(", ");
        b.doc(format!("Windows of {} bits for vectors of {}, steps of {steps} bits.", c.window, c.vector));
        b.min_blocks(self.resident);
        let weights = b.buffer("weights", Elem::U32, false);
        let book = b.buffer("book", Elem::U32, false);
        let history = b.buffer("history", Elem::I32, true);
        let windows = b.buffer("windows", Elem::U32, true);
        let groups = b.scalar("groups", Scalar::I32);
        let e = Emit { b: &b, plan: self, weights, book, history, windows };
        if c.is_memoryless() {
            e.nearest(groups, searches)
        } else {
            e.search(groups, searches)
        }
        b.finish()
    }
}

struct Emit<'b> {
    b: &'b Builder,
    plan: &'b Plan,
    weights: Mem,
    book: Mem,
    history: Mem,
    windows: Mem,
}

/// An entry in registers.
struct Entry<'b> {
    /// For 8-bit entries, where the bytes lie; for 16-bit entries, components.
    parts: Vec<V<'b>>,
    /// In the high half of its word.
    high: bool,
    energy: V<'b>,
}

/// What the threads that search together know.
#[derive(Clone, Copy)]
struct Search<'b> {
    /// Among them.
    thread: V<'b>,
    /// First cost of theirs in the history.
    history: V<'b>,
    /// Index of the group's first word of weights.
    weights: V<'b>,
}

impl<'b> Emit<'b> {
    /// Reads set `at` of `count` entries that lie side by side in a book.
    fn entries(&self, book: u32, at: V<'b>, count: u32) -> Vec<Entry<'b>> {
        let (b, bits) = (self.b, self.plan.entry_bits());
        if bits * count == 16 {
            let word = b.load_as(self.book, at + book * 2, Elem::U16, 1, Cache::ReadOnly);
            return vec![self.entry(&[word], false)];
        }
        let words = bits * count / 32;
        let chunk = words.min(4);
        let load = |i| b.load_as(self.book, at * words + (book + i), Elem::U32, chunk, Cache::ReadOnly).lanes();
        let loaded: Vec<V<'b>> = (0..words).step_by(chunk as usize).flat_map(load).collect();
        if bits < 32 {
            return (0..count as usize).map(|i| self.entry(&loaded[i / 2..=i / 2], i % 2 == 1)).collect();
        }
        loaded.chunks_exact(bits as usize / 32).map(|w| self.entry(w, false)).collect()
    }

    fn entry(&self, words: &[V<'b>], high: bool) -> Entry<'b> {
        let b = self.b;
        match self.plan.code.value {
            Value::I8 => {
                let word = words[0];
                let only = match (self.plan.entry_bits(), high) {
                    (16, false) => word & 0xffff_u32,
                    (16, true) => word & 0xffff_0000_u32,
                    _ => word,
                };
                let energy = word.dot4(only, b.i32(0)) << self.plan.metric.fraction;
                Entry { parts: vec![word], high, energy }
            }
            Value::I16 => {
                let packed = self.plan.weight_words() as usize;
                let parts = words[..packed].iter().flat_map(|&w| halves(w)).take(self.plan.code.vector as usize);
                Entry { parts: parts.collect(), high, energy: words[packed].bits(Scalar::I32) }
            }
        }
    }

    /// The weights of a step and a lane, as [`Emit::metric`] takes them.
    fn operands(&self, words: &[V<'b>]) -> Vec<V<'b>> {
        match self.plan.code.value {
            Value::I8 => words.to_vec(),
            Value::I16 => words.iter().flat_map(|&w| halves(w)).take(self.plan.code.vector as usize).collect(),
        }
    }

    fn metric(&self, weights: &[V<'b>], entry: &Entry<'b>) -> V<'b> {
        let d = self.unshifted(weights, entry);
        if self.plan.metric.shift > 0 { d >> self.plan.metric.shift as i32 } else { d }
    }

    fn unshifted(&self, weights: &[V<'b>], entry: &Entry<'b>) -> V<'b> {
        let mut d = entry.energy;
        for (i, &x) in weights.iter().enumerate() {
            d = match self.plan.code.value {
                Value::I8 => x.dot2(entry.parts[0], entry.high || i == 1, d),
                Value::I16 => d + x * entry.parts[i],
            };
        }
        d
    }

    /// The weights of `lanes` blocks from word `at` on.
    fn load_weights(&self, at: V<'b>) -> Vec<Vec<V<'b>>> {
        let (b, per) = (self.b, self.plan.weight_words());
        let total = self.plan.lanes * per;
        let chunk = total.min(4);
        let words: Vec<V<'b>> = (0..total / chunk)
            .flat_map(|i| b.load_as(self.weights, at + i * chunk, Elem::U32, chunk, Cache::ReadOnly).lanes())
            .collect();
        words.chunks_exact(per as usize).map(|w| self.operands(w)).collect()
    }

    /// Emits `body` for each phase where it is due: `i` counts steps from one of phase 0.
    fn each_phase(&self, i: V<'b>, body: impl Fn(&Phase)) {
        let phases = self.plan.phases();
        if let [only] = &phases[..] {
            return body(only);
        }
        let at = i % phases.len() as u32;
        for (k, p) in phases.iter().enumerate() {
            self.b.if_(at.eq(k as u32), || body(p));
        }
    }

    /// The threads of a search meet.
    fn meet(&self) {
        if self.plan.cluster > 1 { self.b.cluster_barrier() } else { self.b.barrier() }
    }

    fn search(&self, groups: V<'b>, searches: u32) {
        let (b, plan) = (self.b, self.plan);
        let (steps, reach, lanes) = (plan.steps(), plan.reach, plan.lanes);
        let first_phase = plan.phases()[0];
        let alone = plan.cluster == 1;
        let shared = alone.then(|| b.shared("seams", Elem::I32, lanes));
        let (thread, rank) = (b.special(Special::Thread), if alone { b.i32(0) } else { b.special(Special::Rank) });
        let thread = rank * plan.threads + thread;
        let first = b.special(if alone { Special::BlockX } else { Special::Cluster });
        let history = first * plan.history() as u32;
        b.for_(first, groups, searches, |group| {
            // Other blocks must see it: where the first window will lie.
            let seam = |m: V<'b>| match shared {
                Some(seams) => (seams, m),
                None => (self.windows, (group * lanes + m) * steps),
            };
            let load_seam = |m| {
                let (seams, at) = seam(m);
                b.load(seams, at, Elem::I32)
            };
            let search = Search { thread, history, weights: group * (steps * lanes * plan.weight_words()) };
            b.comment("First freely across the seam, to find the state there; then from it to it.");
            b.for_(0, 2, 1, |pass| {
                let free = pass.eq(0);
                let choose = |a: u32, c: u32| free.select(b.i32(a as i32), c as i32);
                let (first, count) = (choose(steps - reach, 0), choose(steps.min(2 * reach), steps));
                let step_of = |i: V<'b>| {
                    let s = first + i;
                    s.lt(steps).select(s, s - steps)
                };
                let end = b.var(b.i32(-1));
                b.if_(pass.eq(1), || b.set(end, load_seam(thread % lanes)));
                b.for_(thread, lanes << first_phase.before, plan.team(), |i| {
                    let state = i / lanes;
                    let reachable = free | state.eq(b.get(end));
                    let cost = reachable.select(b.i32(0), UNREACHABLE);
                    b.store(self.history, history + i, cost, Elem::I32);
                });
                self.meet();
                let forward = if plan.boundaries() > steps { count } else { choose(2 * reach, steps - 1) };
                b.for_(0, forward, 1, |i| {
                    let s = step_of(i);
                    self.each_phase(i, |p| self.forward(p, search, i, s));
                });
                b.comment("Back: a warp for each block of weights.");
                let warp = b.special(Special::Warp) * plan.cluster + rank;
                b.for_(warp, lanes, plan.team() / 32, |m| {
                    let state = b.var(b.i32(0));
                    let at_seam = || b.set(state, load_seam(m));
                    b.if_else(free, || self.best_end(search, m, count, state), at_seam);
                    let back = count - free.select(b.i32(reach as i32), 0);
                    b.for_(0, back, 1, |j| {
                        let i = count - 1 - j;
                        let s = step_of(i);
                        self.each_phase(i, |p| {
                            let window = self.back(p, search, m, i, s, b.get(state));
                            b.set(state, window & mask(p.before) as i32);
                            b.if_(pass.eq(1) & b.special(Special::Lane).eq(0), || {
                                let at = (group * lanes + m) * steps + s;
                                b.store(self.windows, at, window.bits(Scalar::U32), Elem::U32);
                            });
                        });
                    });
                    b.if_(free & b.special(Special::Lane).eq(0), || {
                        let (seams, at) = seam(m);
                        b.store(seams, at, b.get(state), Elem::I32);
                    });
                });
                self.meet();
            });
        });
    }

    /// Costs after step `s`, the `i`-th of the search, from those before it.
    fn forward(&self, p: &Phase, search: Search<'b>, i: V<'b>, s: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let lanes = plan.lanes;
        let stride = plan.stride();
        let from = search.history + i * stride;
        let weights = self.load_weights(search.weights + s * (lanes * plan.weight_words()));
        let thread = search.thread;
        let (share, index) = (thread % p.split, thread / p.split);
        let run = |task: V<'b>, here: Option<V<'b>>| {
            let best = self.best(p, &weights, from, task, share);
            for (set, costs) in best.iter().enumerate() {
                let put = || {
                    let state = task + set as u32 * p.tasks;
                    b.store(self.history, from + stride + state * lanes, b.vector(costs), Elem::I32);
                };
                // Lanes that share a task share the work of writing, too.
                let mine = (p.split > 1).then(|| share.eq(set as u32 % p.split));
                match (here, mine) {
                    (Some(here), Some(mine)) => b.if_(here & mine, put),
                    (Some(only), None) | (None, Some(only)) => b.if_(only, put),
                    (None, None) => put(),
                }
            }
        };
        let busy = p.tasks * p.split;
        match busy.cmp(&plan.team()) {
            // All lanes must be there for the shuffles: the others do what is done already.
            Ordering::Less => run(index % p.tasks, Some(thread.lt(busy))),
            Ordering::Equal => run(index, None),
            Ordering::Greater => b.for_(index, p.tasks, plan.team(), |task| run(task, None)),
        }
        self.meet();
    }

    /// The least costs of a task's states, by state and lane.
    fn best(&self, p: &Phase, weights: &[Vec<V<'b>>], from: V<'b>, task: V<'b>, share: V<'b>) -> Vec<Vec<V<'b>>> {
        let (b, plan) = (self.b, self.plan);
        let (lanes, sets) = (plan.lanes, 1u32 << plan.alpha);
        let doubled = plan.doubles();
        let new = |_| (0..lanes).map(|_| b.var(b.i32(UNREACHABLE + LARGEST_COST))).collect::<Vec<Var>>();
        let best: Vec<Vec<Var>> = (0..sets).map(new).collect();
        let rounds = (1 << p.bits) / p.split;
        let ahead = (AHEAD >> plan.alpha.saturating_sub(ALPHA)).min(rounds);
        let slot = task * p.split + share;
        b.for_(0, rounds, ahead, |round| {
            let load = |k: u32| {
                let round = round + k;
                let window = (task << p.bits as i32) + round * p.split + share;
                let state = window & mask(p.before) as i32;
                let old = b.load_as(self.history, from + state * lanes, Elem::I32, lanes, Cache::Default);
                (old, self.entries(p.book, round * (p.tasks * p.split) + slot, sets))
            };
            let loaded: Vec<_> = (0..ahead).map(load).collect();
            for (old, entries) in loaded {
                for (entry, best) in entries.iter().zip(&best) {
                    for (m, (&best, weights)) in best.iter().zip(weights).enumerate() {
                        let d = if doubled { self.unshifted(weights, entry) } else { self.metric(weights, entry) };
                        b.set(best, b.get(best).min(d + old.lane(m as u32)));
                    }
                }
            }
        });
        let joined = |&v: &Var| {
            let mut cost = b.get(v);
            let mut apart = 1;
            while apart < p.split {
                cost = cost.min(cost.shuffle_xor(apart as i32));
                apart *= 2;
            }
            if doubled { cost & -2 } else { cost }
        };
        best.iter().map(|lanes| lanes.iter().map(joined).collect()).collect()
    }

    /// The best end of lane `m`'s paths of `count` steps.
    fn best_end(&self, search: Search<'b>, m: V<'b>, count: V<'b>, state: Var) {
        let (b, plan) = (self.b, self.plan);
        let lane = b.special(Special::Lane);
        let first = search.history + count * plan.stride() + m;
        let best = b.var(b.i32(UNREACHABLE));
        let states = |p: &Phase| {
            b.for_(lane, 1u32 << p.before, 32, |o| {
                let cost = b.load(self.history, first + o * plan.lanes, Elem::I32);
                b.if_(cost.lt(b.get(best)), || {
                    b.set(best, cost);
                    b.set(state, o);
                });
            });
        };
        self.each_phase(count, states);
        let (_, o) = least(b.get(best), b.get(state));
        b.set(state, o);
    }

    /// The window by which lane `m`'s best path to `state` came through step `s`, the `i`-th of the search.
    fn back(&self, p: &Phase, search: Search<'b>, m: V<'b>, i: V<'b>, s: V<'b>, state: V<'b>) -> V<'b> {
        let (b, plan) = (self.b, self.plan);
        let per = plan.weight_words();
        let at = search.weights + (s * plan.lanes + m) * per;
        let words: Vec<V<'b>> =
            (0..per).map(|k| b.load_as(self.weights, at + k, Elem::U32, 1, Cache::ReadOnly)).collect();
        let weights = self.operands(&words);
        let from = search.history + i * plan.stride() + m;
        let lane = b.special(Special::Lane) & mask(p.bits.min(5)) as i32;
        let (best, found) = (b.var(b.i32(i32::MAX)), b.var(b.i32(0)));
        let (task, set) = (state % p.tasks, state / p.tasks);
        let candidates = 1u32 << p.bits;
        let at_once = candidates.div_ceil(32).min(8);
        b.for_(0, candidates, 32 * at_once, |round| {
            let metric = |k: u32| {
                let low = round + lane + 32 * k;
                let place = (((low / p.split * p.tasks + task) * p.split + low % p.split) << plan.alpha as i32) + set;
                let entry = self.entries(p.book, place, 1).remove(0);
                let window = (state << p.bits as i32) + low;
                let old = b.load(self.history, from + (window & mask(p.before) as i32) * plan.lanes, Elem::I32);
                let old = if plan.doubles() { old >> 1 } else { old };
                (self.metric(&weights, &entry) + old, window)
            };
            let all: Vec<_> = (0..at_once).map(metric).collect();
            for (cost, window) in all {
                b.if_(cost.lt(b.get(best)), || {
                    b.set(best, cost);
                    b.set(found, window);
                });
            }
        });
        least(b.get(best), b.get(found)).1
    }

    /// Codes without memory: every step alone.
    fn nearest(&self, groups: V<'b>, blocks: u32) {
        let (b, plan) = (self.b, self.plan);
        let (per, all) = (plan.weight_words(), groups * plan.steps());
        let first = (b.special(Special::BlockX) * plan.threads + b.special(Special::Thread)) * STEPS;
        b.for_(first, all, blocks * plan.threads * STEPS, |first| {
            // Steps come in multiples of 32.
            let weights: Vec<Vec<V<'b>>> = (0..STEPS)
                .map(|k| {
                    let load = |i| b.load_as(self.weights, (first + k) * per + i, Elem::U32, 1, Cache::ReadOnly);
                    self.operands(&(0..per).map(load).collect::<Vec<_>>())
                })
                .collect();
            let best: Vec<(Var, Var)> = weights.iter().map(|_| (b.var(b.i32(i32::MAX)), b.var(b.i32(0)))).collect();
            b.for_(0, 1u32 << plan.code.window, 1, |window| {
                let entry = self.entries(0, window, 1).remove(0);
                for (weights, &(best, found)) in weights.iter().zip(&best) {
                    let metric = self.metric(weights, &entry);
                    b.if_(metric.lt(b.get(best)), || {
                        b.set(best, metric);
                        b.set(found, window);
                    });
                }
            });
            let found: Vec<V<'b>> = best.iter().map(|(_, found)| b.get(*found).bits(Scalar::U32)).collect();
            b.store(self.windows, first, b.vector(&found), Elem::U32);
        });
    }
}

/// The two signed halves of a word.
fn halves(word: V<'_>) -> [V<'_>; 2] {
    let word = word.bits(Scalar::I32);
    [(word.bits(Scalar::U32) << 16_u32).bits(Scalar::I32) >> 16, word >> 16]
}

/// The least of the lanes' values, and the smallest index that has it.
fn least<'b>(mut v: V<'b>, mut i: V<'b>) -> (V<'b>, V<'b>) {
    for mask in [16, 8, 4, 2, 1] {
        let (other, j) = (v.shuffle_xor(mask), i.shuffle_xor(mask));
        let take = other.lt(v) | (other.eq(v) & j.lt(i));
        (v, i) = (take.select(other, v), take.select(j, i));
    }
    (v, i)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Target;
    use crate::palette;

    #[test]
    fn costs_of_512_weights_are_doubled() {
        let doubles = |name: &str| {
            let code = &palette::get(name).expect("of the palette").codes[0];
            Plan::new(code, &Target::Sm90a.device()).expect("few states").doubles()
        };
        assert_eq!(
            ["fine_1.75", "fine_2", "fine_3", "fine_4", "tcq_2", "fast_2"].map(doubles),
            [true, true, true, false, false, false]
        );
    }

    #[test]
    fn clusters_are_as_small_as_the_cache_allows() {
        let cluster = |name: &str, device: &Device| {
            let code = &palette::get(name).expect("of the palette").codes[0];
            Plan::new(code, device).expect("few states").cluster
        };
        let hopper = Target::Sm90a.device();
        let chosen = ["tcq_2", "fast_2", "fine_5", "fine_4", "fine_2"].map(|name| cluster(name, &hopper));
        assert_eq!(chosen, [1, 1, 4, 8, 8]);
        // In clusters a cost serves 2^4 states where a step has the bits for it; costs of 2^17 states just fit the index.
        for (name, alpha) in [("fine_1.75", 3), ("fine_2", 4), ("fine_4", 4)] {
            let plan = Plan::new(&palette::get(name).expect("of the palette").codes[0], &hopper).expect("few states");
            assert_eq!((plan.alpha, plan.searches(&hopper)), (alpha, 16), "{name}");
            assert!(16 * plan.history() <= 1 << 31, "{name}");
        }
        // 2^16 states: a MiB for each boundary.
        assert_eq!(cluster("fine_4", &Device { l2_bytes: 1 << 28, ..hopper }), 2);
        assert_eq!(cluster("fine_4", &Device { cluster: 4, ..hopper }), 4);
        assert_eq!(cluster("fine_4", &Target::Sm80.device()), 1);
    }
}

//! Encoding: weights → windows, by the Viterbi algorithm over a code's trellis.
//!
//! # The search
//!
//! As on the CPU (`qp-runtime`'s `codec::viterbi`, which explains trellis, states and tail-biting), with the same
//! integers ([`crate::metric`]) and the same rule for ties, so the windows are the same. A block of threads, or a cluster
//! of them, searches `lanes` blocks of weights at once, which share every entry of the codebook that is read. Costs have 16
//! bits, two lanes of neighbours in a word:
//!
//! * Costs of all states at all boundaries lie in the *history*, in global memory, `lanes` side by side; those of the
//!   last boundary are still in the caches when they are read. A thread takes the 2^α states that differ in their
//!   highest α bits only: they have the same predecessors, so a cost that is loaded serves 2^α transitions, each a difference
//!   and a square of half-precision numbers and an addition with minimum, for two blocks of weights at once.
//! * Where states are few, several lanes of a warp share one such task; each takes a part of its predecessors.
//! * Where the states are so many that the costs of all searches in flight leave the L2 cache, the blocks of a cluster
//!   share one search, so that fewer are in flight: each takes its part of the tasks of a step, and they meet after it.
//! * On the way back a warp for each block of weights finds the best of a state's 2^KV predecessors again, so no
//!   decision is kept.
//!
//! # Tables of metrics
//!
//! Components of 8-bit entries have 256 values, so a thread may look up a component's metrics in shared memory instead of
//! computing them. Neither shared memory nor arithmetic alone would be as fast as both; three components of eight are looked
//! up ([`LOOKED_UP`]).
//!
//! # The book
//!
//! Entries are read from a table in global memory, a few megabytes that stay in the L2 cache, in the order in which
//! threads take them: see [`Plan::book`]. So any decode expression costs the same.

mod nearest;
mod search;

use std::ops::{Add, Div, Mul, Rem};

use super::c_name;
use crate::cuda::Device;
use crate::ir::{Builder, Elem, Kernel, Mem, Scalar};
use crate::metric::{Metric, Nearest};
use crate::spec::{Code, Value, mask};

/// Blocks of weights that are searched together.
const LANES: u32 = 8;
/// Words that one cost of each takes.
const PAIRS: u32 = LANES / 2;
/// Most that α can be.
const ALPHA: u32 = 3;
/// The same in a cluster, where loads of costs from the L2 cache are what is scarce.
const CLUSTER_ALPHA: u32 = 4;
/// Most threads of a block.
const THREADS: u32 = 512;
/// Threads of one multiprocessor: each may have its part of the registers.
const RESIDENT: u32 = 512;
/// log2 of the most states that are worth it.
const MOST_STATES: u32 = 18;
/// Most bits of a step, which share a word with a cost.
const MOST_BITS: u32 = 16;
/// Values that a component of an 8-bit entry may have.
const ROWS: u32 = 256;
/// Words of a row of a table of metrics: one for each bank of shared memory.
const ROW: u32 = 32;

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
    /// A window's low bits do not fit beside a cost.
    #[error("steps of {bits} bits are more than a GPU's encoder can search: encode on the CPU (--device cpu)")]
    Step {
        /// KV.
        bits: u32,
    },
}

/// How a code is encoded on a device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The code.
    pub code: Code,
    metric: Metric,
    /// Instead, for a code without memory.
    nearest: Nearest,
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
    /// What passes through shared memory.
    shared: Shared,
}

/// What lies in shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shared {
    /// Components of a vector that have tables of metrics: those with an even number.
    pub tables: u32,
    /// Predecessors whose entries a thread has there, half of them on their way; 0: they are read from global memory.
    pub stages: u32,
}

/// Which of each eight of a thread's components are looked up, if any are: a bit for each.
const LOOKED_UP: u32 = 0b1_0101;

/// One step of the pattern.
#[derive(Clone, Copy)]
struct Phase {
    /// log2 of the states before the step.
    before: u32,
    /// The same of the step before it.
    earlier: u32,
    /// KV.
    bits: u32,
    /// Sets of 2^α states.
    tasks: u32,
    /// Lanes that share a task.
    split: u32,
    /// First word of its part of the book.
    book: u32,
}

impl Phase {
    /// Threads that take a predecessor each at once.
    fn slots(&self) -> u32 {
        self.tasks * self.split
    }

    /// Predecessors that each of them takes.
    fn rounds(&self) -> u32 {
        (1 << self.bits) / self.split
    }
}

impl Plan {
    /// Chooses how to encode `code` on `device`; of its tables only what [`Metric::new`] looks at matters.
    ///
    /// # Errors
    /// A code with too many states, or of too long steps.
    pub fn new(code: &Code, device: &Device) -> Result<Plan, Refused> {
        let (most, least) = (*code.steps.iter().max().expect("a step"), *code.steps.iter().min().expect("a step"));
        let states = code.window - least;
        let mut plan = Plan {
            code: code.clone(),
            metric: Metric::new(code),
            nearest: Nearest::new(code),
            reach: code.reach(code.steps_per_block()),
            lanes: LANES,
            threads: 256,
            alpha: ALPHA.min(least).min(code.window - most),
            resident: RESIDENT / 256,
            cluster: 1,
            shared: Shared::default(),
        };
        if code.is_memoryless() {
            return Ok(Plan { reach: 0, lanes: 1, ..plan });
        }
        if states > MOST_STATES {
            return Err(Refused::Window { window: code.window });
        }
        if most > MOST_BITS {
            return Err(Refused::Step { bits: most });
        }
        plan.threads = (1u32 << (states - plan.alpha)).clamp(32, THREADS);
        plan.resident = (RESIDENT / plan.threads).clamp(1, device.blocks_per_sm);
        let larger = |plan: &Plan| Plan { cluster: 2 * plan.cluster, ..plan.clone() };
        while !plan.fits(device) && 2 * plan.cluster <= device.cluster && larger(&plan).is_busy() {
            plan = larger(&plan);
        }
        if plan.cluster > 1 {
            // More registers are not to be had where entries take many.
            let most_alpha = if code.vector > 2 { ALPHA } else { CLUSTER_ALPHA };
            let more = Plan { alpha: most_alpha.min(least).min(code.window - most), ..plan.clone() };
            plan = if more.is_busy() { more } else { plan };
        }
        if plan.threads == THREADS {
            plan.share(device);
        }
        Ok(plan)
    }

    /// Decides what lies in shared memory.
    fn share(&mut self, device: &Device) {
        // A table has a copy for the next step.
        let tabled = self.code.value == Value::I8 && self.alpha > 0;
        let tables = if tabled { self.code.vector.div_ceil(2) } else { 0 };
        // Costs that come with the entries take registers, of which a thread with many states or long entries has none left.
        let most = match (self.alpha, self.code.vector) {
            (_, 3..) => 0,
            (0..=ALPHA, _) => 4,
            _ => 2,
        };
        let rounds = self.phases().iter().map(Phase::rounds).min().expect("a step");
        let fits = |shared: &Shared| {
            let tables = 2 * (shared.tables * ROWS * ROW + self.weight_words());
            let words = tables + shared.stages * self.slot_words() * self.threads;
            shared.stages <= most.min(rounds) && 4 * words <= device.shared_per_block
        };
        let of = |tables: u32| [4, 2, 0].map(|stages| Shared { tables, stages });
        self.shared = of(tables).into_iter().chain(of(0)).find(fits).unwrap_or_default();
    }

    /// What lies in shared memory.
    pub fn shared(&self) -> Shared {
        self.shared
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

    /// Words that the weights of a step take, of all `lanes` blocks.
    pub fn weight_words(&self) -> u32 {
        if self.code.is_memoryless() { self.code.vector.div_ceil(2) } else { self.code.vector * PAIRS }
    }

    /// Words of a search's history: boundaries × states × pairs of lanes.
    pub fn history(&self) -> u64 {
        if self.code.is_memoryless() { 1 } else { u64::from(self.boundaries()) * u64::from(self.stride()) }
    }

    /// Words of a search's least costs, by warp and pair of lanes.
    pub fn floors(&self) -> u32 {
        self.team() / 32 * PAIRS
    }

    /// Boundaries that have costs: all, or all but the last. That is not looked at when a path starts and ends at a known
    /// state; without it, histories of as many large searches as a GPU can run at once just fit the index.
    fn boundaries(&self) -> u32 {
        let to_spare = self.cluster > 1 && 2 * self.reach < self.steps();
        self.steps() + u32::from(!to_spare)
    }

    /// Words of the costs of one boundary.
    fn stride(&self) -> u32 {
        PAIRS * self.states()
    }

    /// Most states at a boundary.
    fn states(&self) -> u32 {
        1 << (self.code.window - self.code.steps.iter().min().expect("a step"))
    }

    /// The weights of `lanes` blocks as the kernel takes them, `steps ×` [`Plan::weight_words`] words. Of a trellis: for each
    /// component of a step a point of each block ([`Metric::weight`]), two in a word. `blocks` holds whole blocks, `lanes` at
    /// most.
    pub fn weights(&self, blocks: &[f32], words: &mut [u32]) {
        if self.code.is_memoryless() {
            return self.nearest_weights(blocks, words);
        }
        words.fill(0);
        for (lane, block) in blocks.chunks_exact(self.code.block.len() as usize).enumerate() {
            for (words, &x) in words.chunks_exact_mut(PAIRS as usize).zip(block) {
                words[lane / 2] |= u32::from(self.metric.weight(x).to_bits()) << (16 * (lane % 2));
            }
        }
    }

    /// The codebook, whose tables must be filled, as the kernel reads it. Of a trellis: for each KV of the pattern all windows,
    /// in the order of its threads, see [`Plan::place`]; components as half-precision numbers ([`Metric::entry`]), or the byte
    /// in a table of metrics where the row of their value begins.
    pub fn book(&self) -> Vec<u32> {
        if self.code.is_memoryless() {
            return self.nearest_book();
        }
        let (v, entries) = (self.code.vector as usize, self.code.codebook());
        let mut words = vec![];
        for phase in self.phases() {
            if (phase.book as usize) < words.len() {
                continue;
            }
            words.resize(words.len() + self.book_words() as usize, 0u32);
            for (w, entry) in entries.chunks_exact(v).enumerate() {
                let (o, low) = (w as u32 >> phase.bits, w as u32 & mask(phase.bits));
                let (set, task) = (o / phase.tasks, o % phase.tasks);
                for (half, &c) in (set * self.code.vector..).zip(entry) {
                    let at = self.place(&phase, task, low, half) as usize;
                    let looked_up = self.shared.tables > 0 && LOOKED_UP >> (half % 8) & 1 == 1;
                    let row = || (i32::from(c) + ROWS as i32 / 2) as u32 * ROW * 4;
                    let half = if looked_up { row() } else { self.metric.entry(c).to_bits().into() };
                    words[at / 2] |= half << (16 * (at % 2));
                }
            }
        }
        words
    }

    /// Words of the entries that a thread takes at once: those of the 2^α windows of one predecessor.
    fn slot_words(&self) -> u32 {
        (self.code.vector << self.alpha).div_ceil(2)
    }

    /// Of these, how many lie side by side, so that each access of a warp is to neighbours.
    fn chunk(&self) -> u32 {
        1 << self.slot_words().trailing_zeros().min(2)
    }

    /// Words of a book of all windows.
    fn book_words(&self) -> u32 {
        self.slot_words() << (self.code.window - self.alpha)
    }

    /// Which half word of a phase's book belongs to a task, its predecessor of low bits `low`, and this one of the thread's
    /// components in a round: for each round of predecessors, for each chunk of a thread's words, for each thread. Of numbers,
    /// and of values of a kernel.
    fn place<T>(&self, p: &Phase, task: T, low: T, half: T) -> T
    where
        T: Copy + Add<Output = T> + Add<u32, Output = T> + Mul<u32, Output = T>,
        T: Div<u32, Output = T> + Rem<u32, Output = T>,
    {
        let (chunk, chunks) = (self.chunk(), self.slot_words() / self.chunk());
        let slot = task * p.split + low % p.split;
        let word = (low / p.split * chunks + half / (2 * chunk)) * p.slots() + slot;
        word * (2 * chunk) + half % (2 * chunk) + 2 * p.book
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
            let [before, earlier] = [1, 2].map(|back| c.window - c.steps[(i + n * back - back) % n]);
            Phase { before, earlier, bits, tasks, split, book: kind as u32 * self.book_words() }
        };
        (0..n).map(phase).collect()
    }

    /// Makes the kernel, for `searches` at once. Its parameters, in order:
    ///
    /// * `weights`: `u32`, groups of blocks as [`Plan::weights`] makes them (of a code without memory, steps);
    /// * `book`: `u32`, [`Plan::book`];
    /// * `history`: `u32`, `searches` × [`Plan::history`], for the kernel's own use;
    /// * `floors`: `u32`, `searches` × [`Plan::floors`], too;
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
        let history = b.buffer("history", Elem::U32, true);
        let floors = b.buffer("floors", Elem::U32, true);
        let windows = b.buffer("windows", Elem::U32, true);
        let groups = b.scalar("groups", Scalar::I32);
        let e = Emit { b: &b, plan: self, weights, book, history, floors, windows };
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
    floors: Mem,
    windows: Mem,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Target;
    use crate::palette;

    #[test]
    fn what_a_word_or_a_memory_cannot_hold_is_refused() {
        let code = &palette::get("fine_4").expect("of the palette").codes[0];
        let plan = |steps: u32, window: u32| {
            let code = Code { steps: vec![steps], window, ..code.clone() };
            Plan::new(&code, &Target::Sm90a.device()).map(|_| ())
        };
        assert_eq!(plan(16, 20), Ok(()));
        assert_eq!(plan(17, 20), Err(Refused::Step { bits: 17 }));
        assert_eq!(plan(1, 20), Err(Refused::Window { window: 20 }));
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

//! The search for the windows that lie closest to a block of weights.
//!
//! # The trellis
//!
//! The windows of steps `s` and `s + 1` overlap in L − KV(s) bits: they are the high bits of the first and the low bits
//! of the second. So a path through the trellis is known by its **state** at each boundary between steps, the
//! overlap, and of the 2^L paths that end in a window only the best of each state, 2^(L−KV), can go on:
//!
//! ```text
//! cost(s+1, o) = min over b < 2^KV(s) of  metric(x_s, entry(w)) + cost(s, w mod 2^(L−KV(s−1))),   w = o·2^KV(s) + b
//! ```
//!
//! The metric is an integer, see [`qp_codegen::metric`]. Costs of states are kept for a whole block; the best `b` is
//! found again on the way back. Among equal costs the smallest window wins.
//!
//! # Tail-biting
//!
//! The stream is cyclic: the state after the last step is the state before the first. The best path for every such
//! state would take 2^(L−KV) searches; two come within a fraction of a percent. The first search runs freely across the
//! seam, from some steps before the block's end to some steps after its beginning, and finds a good state there; the
//! second runs over the block with that state fixed at both ends.
//!
//! # Speed
//!
//! Sixteen blocks are searched side by side, one in each lane of a vector register, so the inner loop is the same
//! for every L, KV and pattern: one entry of the codebook is broadcast to all lanes, costs are loaded and stored whole.
//! [`super::plain`] is the same search without any of this, to be compared with.

use qp_codegen::metric::{LARGEST_COST, Metric, UNREACHABLE};
use qp_codegen::spec::Code;

use super::simd::{LANES, Lanes, Register, dot, for_each_instruction_set};

/// More than any cost that a state can have.
const INFINITE: Lanes = Lanes([UNREACHABLE + LARGEST_COST; LANES]);

/// Costs that are kept for the way back, in bytes a thread, unless [`Trellis::with_history`] says otherwise. Where a
/// search needs more, only some boundaries are kept and the steps between them are run again.
const HISTORY_BYTES: usize = 48 << 20;

/// A code made ready to encode.
#[derive(Clone, Debug)]
pub struct Trellis {
    window: u32,
    vector: usize,
    /// KV of every step of a block.
    bits: Vec<u32>,
    metric: Metric,
    /// For each window its V entries, two in a word, then their energy.
    book: Vec<i32>,
    memoryless: bool,
    /// Steps on each side of the seam in the first search.
    reach: usize,
    /// Bytes of costs that a thread keeps.
    history: usize,
}

/// Memory of one search, to be used again by the next.
#[derive(Debug, Default)]
pub struct Scratch {
    input: Vec<Input>,
    history: Vec<Vec<Lanes>>,
}

/// The weights of a step as the metric takes them, two in a word.
type Input = [Lanes; 2];

/// Where a path may begin or end.
#[derive(Clone, Copy)]
enum End<'a> {
    /// In any state.
    Free,
    /// In this state of each lane.
    At(&'a [u32; LANES]),
}

/// The KVs around one step.
#[derive(Clone, Copy)]
struct Step {
    /// L − KV of the step before: log2 of the number of states before the step.
    before: u32,
    /// KV.
    bits: u32,
    window: u32,
    /// Of metrics.
    shift: u32,
}

/// Two 16-bit numbers in a word, low one first; one alone has 0 beside it.
fn pair(of: &[i16]) -> i32 {
    i32::from(of[0]) & 0xffff | i32::from(of.get(1).copied().unwrap_or(0)) << 16
}

impl Trellis {
    /// Prepares `code`, whose tables must be filled, for blocks of `code.block.len()` weights.
    pub fn new(code: &Code) -> Self {
        Self::with_length(code, code.block.len() as usize)
    }

    /// Prepares `code` for streams of `weights` weights, whatever its block.
    pub fn with_length(code: &Code, weights: usize) -> Self {
        let vector = code.vector as usize;
        assert!(weights > 0 && weights.is_multiple_of(vector), "whole steps");
        let bits: Vec<u32> = (0..(weights / vector) as u32).map(|s| code.step_bits(s)).collect();
        assert!(bits.iter().all(|&k| k >= 1 && k <= code.window), "KV of 1..=L");
        let entries = code.codebook();
        let metric = Metric::new(code, bits.len() as u32);
        let mut book = Vec::with_capacity((vector.div_ceil(2) + 1) << code.window);
        for entry in entries.chunks_exact(vector) {
            book.extend(entry.chunks(2).map(pair));
            book.push(metric.energy(entry));
        }
        let reach = code.reach(bits.len() as u32) as usize;
        Trellis {
            window: code.window,
            vector,
            bits,
            metric,
            book,
            memoryless: code.is_memoryless(),
            reach,
            history: HISTORY_BYTES,
        }
    }

    /// Keeps up to `bytes` of costs a thread: the more, the fewer steps of codes of large windows are run again.
    pub fn with_history(self, bytes: usize) -> Self {
        Trellis { history: bytes, ..self }
    }

    /// Weights of a block.
    pub fn block_len(&self) -> usize {
        self.bits.len() * self.vector
    }

    /// Steps of a block.
    pub fn steps(&self) -> usize {
        self.bits.len()
    }

    /// The metric of weights and entries.
    pub fn metric(&self) -> &Metric {
        &self.metric
    }

    /// Number of blocks [`Trellis::encode`] takes at once; fewer cost as much.
    pub fn blocks_at_once(&self) -> usize {
        LANES
    }

    /// Words of an entry in the book.
    fn words(&self) -> usize {
        self.vector.div_ceil(2) + 1
    }

    /// Encodes up to [`Trellis::blocks_at_once`] blocks: `blocks` holds [`Trellis::block_len`] finite weights of each, `windows` receives
    /// [`Trellis::steps`] windows of each.
    pub fn encode(&self, blocks: &[f32], windows: &mut [u32], scratch: &mut Scratch) {
        self.load(blocks, scratch);
        if self.memoryless {
            return self.encode_memoryless(windows, scratch);
        }
        let n = self.steps();
        let mut path = vec![[0; LANES]; n];
        let around = &mut path[..(2 * self.reach).min(n)];
        let first = n - self.reach;
        self.search(first, End::Free, End::Free, around, scratch);
        // The window of step 0, for its low bits are the state at the seam.
        let seam = around[self.reach % n].map(|w| w & (self.states(0) - 1) as u32);
        self.search(0, End::At(&seam), End::At(&seam), &mut path, scratch);
        for (lane, windows) in windows.chunks_exact_mut(n).enumerate() {
            windows.iter_mut().zip(&path).for_each(|(w, p)| *w = p[lane]);
        }
    }

    /// The best path whose state at the seam is `seam`, and its cost; for one block.
    pub fn encode_from(&self, block: &[f32], seam: u32, scratch: &mut Scratch) -> (Vec<u32>, i32) {
        self.load(block, scratch);
        let mut path = vec![[0; LANES]; self.steps()];
        let seams = [seam; LANES];
        let cost = self.search(0, End::At(&seams), End::At(&seams), &mut path, scratch);
        (path.iter().map(|p| p[0]).collect(), cost.0[0])
    }

    /// Number of states before step `s`.
    pub fn states(&self, s: usize) -> usize {
        let n = self.steps();
        1 << (self.window - self.bits[(s + n - 1) % n])
    }

    fn step(&self, s: usize) -> Step {
        let n = self.steps();
        let before = self.window - self.bits[(s + n - 1) % n];
        Step { before, bits: self.bits[s], window: self.window, shift: self.metric.shift }
    }

    fn load(&self, blocks: &[f32], scratch: &mut Scratch) {
        let (v, len) = (self.vector, self.block_len());
        assert!(blocks.len().is_multiple_of(len) && blocks.len() <= LANES * len, "up to {LANES} whole blocks");
        scratch.input.clear();
        scratch.input.extend((0..self.steps()).map(|s| {
            let mut input = [Lanes([0; LANES]); 2];
            for (lane, block) in blocks.chunks_exact(len).enumerate() {
                for (word, x) in input.iter_mut().zip(block[s * v..(s + 1) * v].chunks(2)) {
                    let n: [i16; 2] = std::array::from_fn(|i| x.get(i).map_or(0, |&x| self.metric.weight(x)));
                    word.0[lane] = pair(&n);
                }
            }
            input
        }));
    }

    /// Searches `path.len()` steps from step `first` on (cyclically), from states `begin` to states `end`; writes the
    /// windows of the best path to `path` and returns its cost.
    fn search(
        &self,
        first: usize,
        begin: End<'_>,
        end: End<'_>,
        path: &mut [[u32; LANES]],
        scratch: &mut Scratch,
    ) -> Lanes {
        let boundary = size_of::<Lanes>() << (self.window - self.bits.iter().min().expect("at least one step"));
        // Halving the path needs a boundary each time, and two to work with.
        let least = path.len().ilog2() as usize + 3;
        let count = (self.history / boundary).max(least).min(path.len() + 1);
        let history = &mut scratch.history;
        history.resize_with(history.len().max(count), Vec::new);
        let costs = &mut history[0];
        costs.clear();
        match begin {
            End::Free => costs.resize(self.states(first), Lanes([0; LANES])),
            End::At(state) => {
                costs.resize(self.states(first), Lanes([UNREACHABLE; LANES]));
                state.iter().enumerate().for_each(|(lane, &o)| costs[o as usize].0[lane] = 0);
            }
        }
        self.trace(first, end, path, &scratch.input, &mut history[..count]).1
    }

    /// As [`Trellis::search`], from the costs of `history[0]`, with no other memory than `history`; returns the state
    /// before the first step too.
    fn trace(
        &self,
        first: usize,
        end: End<'_>,
        path: &mut [[u32; LANES]],
        input: &[Input],
        history: &mut [Vec<Lanes>],
    ) -> ([u32; LANES], Lanes) {
        let at = |i: usize| (first + i) % self.steps();
        if path.len() < history.len() {
            for i in 0..path.len() {
                let (done, next) = history.split_at_mut(i + 1);
                self.forward(at(i), &input[at(i)], &done[i], &mut next[0]);
            }
            let (mut state, cost) = best_end(&history[path.len()], end);
            for (i, windows) in path.iter_mut().enumerate().rev() {
                self.back(at(i), &input[at(i)], &history[i], &mut state, windows);
            }
            return (state, cost);
        }
        // The second half, from costs in its middle; then the first half, to the state found there.
        let middle = path.len() / 2;
        let [start, half, spare, ..] = &mut *history else { unreachable!("least is enough") };
        half.clone_from(start);
        for i in 0..middle {
            self.forward(at(i), &input[at(i)], half, spare);
            std::mem::swap(half, spare);
        }
        let (before, after) = path.split_at_mut(middle);
        let (state, cost) = self.trace(at(middle), end, after, input, &mut history[1..]);
        (self.trace(first, End::At(&state), before, input, history).0, cost)
    }

    /// Costs after step `s` from those before it.
    fn forward(&self, s: usize, input: &Input, from: &[Lanes], to: &mut Vec<Lanes>) {
        let step = self.step(s);
        to.resize(1 << (self.window - step.bits), INFINITE);
        let run = match (self.vector > 2, step.shift > 0) {
            (false, false) => forward::<2, false>,
            (false, true) => forward::<2, true>,
            (true, false) => forward::<3, false>,
            (true, true) => forward::<3, true>,
        };
        run(step, &self.book, input, from, to);
    }

    /// One step back: from the state after step `s` to the window of the step and the state before it.
    fn back(&self, s: usize, input: &Input, from: &[Lanes], state: &mut [u32; LANES], path: &mut [u32; LANES]) {
        let (step, words) = (self.step(s), self.words());
        let mask = (1usize << step.before) - 1;
        for lane in 0..LANES {
            let first = (state[lane] as usize) << step.bits;
            let book = &self.book[first * words..][..words << step.bits];
            let mut best = (i32::MAX, first);
            for (b, entry) in book.chunks_exact(words).enumerate() {
                let products = input.iter().zip(&entry[..words - 1]).map(|(x, &c)| dot(x.0[lane], c));
                let metric = (entry[words - 1] + products.sum::<i32>()) >> step.shift;
                let cost = metric + from[(first + b) & mask].0[lane];
                if cost < best.0 {
                    best = (cost, first + b);
                }
            }
            path[lane] = best.1 as u32;
            state[lane] = (best.1 & mask) as u32;
        }
    }

    fn encode_memoryless(&self, windows: &mut [u32], scratch: &mut Scratch) {
        let n = self.steps();
        let run = if self.vector > 2 { nearest::<3> } else { nearest::<2> };
        for (s, input) in scratch.input.iter().enumerate() {
            let best = run(&self.book, input);
            windows.chunks_exact_mut(n).zip(best).for_each(|(w, b)| w[s] = b);
        }
    }
}

/// The end of the best path in each lane, and its cost.
fn best_end(costs: &[Lanes], end: End<'_>) -> ([u32; LANES], Lanes) {
    let mut best = ([0; LANES], INFINITE);
    match end {
        End::Free => {
            for (o, cost) in costs.iter().enumerate() {
                for lane in 0..LANES {
                    if cost.0[lane] < best.1.0[lane] {
                        best.0[lane] = o as u32;
                        best.1.0[lane] = cost.0[lane];
                    }
                }
            }
        }
        End::At(state) => {
            best.0 = *state;
            best.1.0 = std::array::from_fn(|lane| costs[state[lane] as usize].0[lane]);
        }
    }
    best
}

/// The metric of an entry of `N` words for the weights of all lanes, not yet shifted.
///
/// # Safety
/// As [`Register`].
#[inline(always)]
unsafe fn metric<R: Register, const N: usize>(entry: &[i32], weights: &[R; 2]) -> R {
    // SAFETY: the contract of this function.
    unsafe {
        let mut d = R::splat(entry[N - 1]);
        for (x, &c) in weights[..N - 1].iter().zip(entry) {
            d = d.add(x.dot(R::splat(c)));
        }
        d
    }
}

for_each_instruction_set! {
    /// The recursion at the top of this file, for all states after a step.
    fn forward[R, const N: usize, const SHIFTED: bool](
        step: Step, book: &[i32], input: &Input, from: &[Lanes], to: &mut [Lanes],
    ) {
        let Step { before, bits, window, shift } = step;
        // A run of windows whose states before the step are neighbours and whose state after it is the same.
        let run = 1usize << bits.min(before);
        // A state after the step has one run, or each of several.
        let several = bits > before;
        if several {
            to.fill(INFINITE);
        }
        // Two windows that differ in the highest bit share their costs so far.
        let half = 1usize << (window - 1);
        let (lower, upper) = book.split_at(half * N);
        // SAFETY: the contract of this function.
        unsafe {
            let weights: [R; 2] = [R::load(&input[0]), R::load(&input[1])];
            let metric = |entry: &[i32]| {
                let d = metric::<R, N>(entry, &weights);
                if SHIFTED { d.shift(shift) } else { d }
            };
            for low in (0..1usize << before).step_by(run) {
                let from = &from[low..low + run];
                for high in 0..1usize << (window - before - 1) {
                    let window = high << before | low;
                    let (mut a, mut b) = (R::load(&INFINITE), R::load(&INFINITE));
                    let at = window * N..(window + run) * N;
                    let entries = lower[at.clone()].chunks_exact(N).zip(upper[at].chunks_exact(N));
                    for ((p, q), cost) in entries.zip(from) {
                        let cost = R::load(cost);
                        a = a.min(metric(p).add(cost));
                        b = b.min(metric(q).add(cost));
                    }
                    for (window, best) in [(window, a), (window + half, b)] {
                        let to = &mut to[window >> bits];
                        let best = if several { R::load(to).min(best) } else { best };
                        best.store(to);
                    }
                }
            }
        }
    }
}

for_each_instruction_set! {
    /// For each lane the entry nearest to the weights of a step.
    fn nearest[R, const N: usize](book: &[i32], input: &Input) -> [u32; LANES] {
        let mut found = Lanes([0; LANES]);
        // SAFETY: the contract of this function.
        unsafe {
            let weights: [R; 2] = [R::load(&input[0]), R::load(&input[1])];
            let (mut best, mut index) = (R::splat(i32::MAX), R::splat(0));
            for (w, entry) in book.chunks_exact(N).enumerate() {
                let d = metric::<R, N>(entry, &weights);
                index = index.replace_if_less(d, best, R::splat(w as i32));
                best = best.min(d);
            }
            index.store(&mut found);
        }
        found.0.map(|w| w as u32)
    }
}

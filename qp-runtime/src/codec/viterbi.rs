//! The search for the windows that lie closest to a block of weights.
//!
//! # The trellis
//!
//! The windows of steps `s` and `s + 1` overlap in L − KV(s) bits: they are the high bits of the first and the low bits
//! of the second. So a path through the trellis is known by its **state** at each boundary between steps, the
//! overlap, and of the 2^L paths that end in a window only the best of each state, 2^(L−KV), can go on:
//!
//! ```text
//! cost(s+1, o) = min over b < 2^KV(s) of  |x_s − entry(w)|² + cost(s, w mod 2^(L−KV(s−1))),   w = o·2^KV(s) + b
//! ```
//!
//! Costs of states are kept for a whole block; the best `b` is found again on the way back. Among equal costs the
//! smallest window wins.
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
//! Costs are sums, differences and products in a fixed order, without fused operations, so every machine finds the
//! same path.

use qp_codegen::spec::Code;

use super::simd::{LANES, Lanes, Register, for_each_instruction_set};

const INFINITE: Lanes = Lanes([f32::INFINITY; LANES]);

/// Costs that are kept for the way back, in bytes a thread. Where a block needs more, only some boundaries are kept
/// and the steps between them are run again.
const HISTORY_BYTES: usize = 192 << 20;

/// A code made ready to encode.
#[derive(Clone, Debug)]
pub struct Trellis {
    window: u32,
    vector: usize,
    /// KV of every step of a block.
    bits: Vec<u32>,
    /// For each window its V entries in units of the source, then the sum of their squares.
    book: Vec<f32>,
    memoryless: bool,
    /// Steps on each side of the seam in the first search.
    reach: usize,
}

/// Memory of one search, to be used again by the next.
#[derive(Debug, Default)]
pub struct Scratch {
    input: Vec<Input>,
    kept: Vec<Vec<Lanes>>,
    history: Vec<Vec<Lanes>>,
}

/// The weights of a step, −2 × each, and the sum of their squares.
#[derive(Clone, Copy, Debug)]
struct Input {
    weights: [Lanes; 4],
    energy: Lanes,
}

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
        let offset = if code.half_offset { 0.5 } else { 0.0 };
        let mut book = Vec::with_capacity((vector + 1) << code.window);
        for entry in code.codebook().chunks_exact(vector) {
            let from = book.len();
            book.extend(entry.iter().map(|&e| (f32::from(e) + offset) * code.unit));
            book.push(book[from..].iter().map(|c| c * c).sum());
        }
        // Paths that differ in the past have nearly always met after a few windows' worth of bits.
        let fewest = *bits.iter().min().expect("at least one step") as usize;
        let reach = (5 * code.window as usize).div_ceil(fewest).min(bits.len().div_ceil(2));
        Trellis { window: code.window, vector, bits, book, memoryless: code.is_memoryless(), reach }
    }

    /// Weights of a block.
    pub fn block_len(&self) -> usize {
        self.bits.len() * self.vector
    }

    /// Steps of a block.
    pub fn steps(&self) -> usize {
        self.bits.len()
    }

    /// Number of blocks [`Trellis::encode`] takes at once; fewer cost as much.
    pub fn blocks_at_once(&self) -> usize {
        LANES
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

    /// The best path whose state at the seam is `seam`, and its squared error; for one block.
    pub fn encode_from(&self, block: &[f32], seam: u32, scratch: &mut Scratch) -> (Vec<u32>, f32) {
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
        Step { before: self.window - self.bits[(s + n - 1) % n], bits: self.bits[s], window: self.window }
    }

    fn load(&self, blocks: &[f32], scratch: &mut Scratch) {
        let (v, len) = (self.vector, self.block_len());
        assert!(blocks.len().is_multiple_of(len) && blocks.len() <= LANES * len, "up to {LANES} whole blocks");
        let zero = Lanes([0.0; LANES]);
        scratch.input.clear();
        scratch.input.extend((0..self.steps()).map(|s| {
            let mut input = Input { weights: [zero; 4], energy: zero };
            for (lane, block) in blocks.chunks_exact(len).enumerate() {
                for (i, x) in block[s * v..(s + 1) * v].iter().enumerate() {
                    input.weights[i].0[lane] = -2.0 * x;
                    input.energy.0[lane] += x * x;
                }
            }
            input
        }));
    }

    /// Searches `path.len()` steps from step `first` on (cyclically), from states `begin` to states `end`; writes the
    /// windows of the best path to `path` and returns its cost.
    fn search(&self, first: usize, begin: End, end: End, path: &mut [[u32; LANES]], scratch: &mut Scratch) -> Lanes {
        let n = self.steps();
        let at = |i: usize| (first + i) % n;
        let Scratch { input, kept, history } = scratch;

        // Boundaries between segments are kept; the last segment's costs, then each earlier one's, are written out.
        let bytes: usize = (0..path.len()).map(|i| self.states(at(i)) * size_of::<Lanes>()).sum();
        let segments = if bytes <= HISTORY_BYTES { 1 } else { path.len().isqrt() };
        let segment = path.len().div_ceil(segments);
        let segments = path.len().div_ceil(segment);
        kept.resize_with(kept.len().max(segments), Vec::new);
        history.resize_with(history.len().max(segment + 1), Vec::new);

        kept[0].clear();
        match begin {
            End::Free => kept[0].resize(self.states(first), Lanes([0.0; LANES])),
            End::At(state) => {
                kept[0].resize(self.states(first), INFINITE);
                state.iter().enumerate().for_each(|(lane, &o)| kept[0][o as usize].0[lane] = 0.0);
            }
        }
        for k in 1..segments {
            let [a, b, ..] = &mut history[..] else { unreachable!("more than one segment means several steps") };
            a.clone_from(&kept[k - 1]);
            for i in (k - 1) * segment..k * segment {
                self.forward(at(i), &input[at(i)], a, b);
                std::mem::swap(a, b);
            }
            kept[k].clone_from(a);
        }
        let mut state = [0u32; LANES];
        let mut cost = INFINITE;
        for k in (0..segments).rev() {
            let steps = k * segment..path.len().min((k + 1) * segment);
            history[0].clone_from(&kept[k]);
            for (j, i) in steps.clone().enumerate() {
                let (done, next) = history.split_at_mut(j + 1);
                self.forward(at(i), &input[at(i)], &done[j], &mut next[0]);
            }
            if k == segments - 1 {
                (state, cost) = best_end(&history[steps.len()], end);
            }
            for (j, i) in steps.enumerate().rev() {
                self.back(at(i), &input[at(i)], &history[j], &mut state, &mut path[i]);
            }
        }
        cost
    }

    /// Costs after step `s` from those before it.
    fn forward(&self, s: usize, input: &Input, from: &[Lanes], to: &mut Vec<Lanes>) {
        let step = self.step(s);
        to.resize(1 << (self.window - step.bits), INFINITE);
        match self.vector {
            1 => forward::<1>(step, &self.book, input, from, to),
            2 => forward::<2>(step, &self.book, input, from, to),
            4 => forward::<4>(step, &self.book, input, from, to),
            v => unreachable!("vectors of {v} are refused by the checker"),
        }
    }

    /// One step back: from the state after step `s` to the window of the step and the state before it.
    fn back(&self, s: usize, input: &Input, from: &[Lanes], state: &mut [u32; LANES], path: &mut [u32; LANES]) {
        let (step, v) = (self.step(s), self.vector);
        let mask = (1usize << step.before) - 1;
        for lane in 0..LANES {
            let weights: [f32; 4] = std::array::from_fn(|i| input.weights[i].0[lane]);
            let first = (state[lane] as usize) << step.bits;
            let mut best = (f32::INFINITY, first);
            let book = &self.book[first * (v + 1)..][..(v + 1) << step.bits];
            for (b, entry) in book.chunks_exact(v + 1).enumerate() {
                // The same operations as on the way forth.
                let mut d = entry[v];
                for (x, c) in weights.iter().zip(&entry[..v]) {
                    d += x * c;
                }
                d += from[(first + b) & mask].0[lane];
                if d < best.0 {
                    best = (d, first + b);
                }
            }
            path[lane] = best.1 as u32;
            state[lane] = (best.1 & mask) as u32;
        }
    }

    fn encode_memoryless(&self, windows: &mut [u32], scratch: &mut Scratch) {
        let n = self.steps();
        for s in 0..n {
            let best = match self.vector {
                1 => nearest::<1>(&self.book, &scratch.input[s]),
                2 => nearest::<2>(&self.book, &scratch.input[s]),
                4 => nearest::<4>(&self.book, &scratch.input[s]),
                v => unreachable!("vectors of {v} are refused by the checker"),
            };
            windows.chunks_exact_mut(n).zip(best).for_each(|(w, b)| w[s] = b);
        }
    }
}

/// The end of the best path in each lane, and its cost.
fn best_end(costs: &[Lanes], end: End) -> ([u32; LANES], Lanes) {
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

/// The distance of an entry to the weights of all lanes, without the weights' energy.
///
/// # Safety
/// As [`Register`].
#[inline(always)]
unsafe fn metric<R: Register, const V: usize>(entry: &[f32], weights: &[R; V]) -> R {
    // SAFETY: the contract of this function.
    unsafe {
        let mut d = R::splat(entry[V]);
        for (x, &c) in weights.iter().zip(entry) {
            d = d.add(x.mul(R::splat(c)));
        }
        d
    }
}

for_each_instruction_set! {
    /// The recursion at the top of this file, for all states after a step.
    fn forward[R, const V: usize](step: Step, book: &[f32], input: &Input, from: &[Lanes], to: &mut [Lanes]) {
        let Step { before, bits, window } = step;
        // A run of windows whose states before the step are neighbours and whose state after it is the same.
        let run = 1usize << bits.min(before);
        // A state after the step has one run, or each of several.
        let several = bits > before;
        if several {
            to.fill(INFINITE);
        }
        // Two windows that differ in the highest bit share their costs so far.
        let half = 1usize << (window - 1);
        let (lower, upper) = book.split_at(half * (V + 1));
        // SAFETY: the contract of this function.
        unsafe {
            let weights: [R; V] = std::array::from_fn(|v| R::load(&input.weights[v]));
            let energy = R::load(&input.energy);
            for low in (0..1usize << before).step_by(run) {
                let from = &from[low..low + run];
                for high in 0..1usize << (window - before - 1) {
                    let window = high << before | low;
                    let (mut a, mut b) = (R::splat(f32::INFINITY), R::splat(f32::INFINITY));
                    let at = window * (V + 1)..(window + run) * (V + 1);
                    let entries = lower[at.clone()].chunks_exact(V + 1).zip(upper[at].chunks_exact(V + 1));
                    for ((p, q), cost) in entries.zip(from) {
                        let cost = R::load(cost);
                        a = a.min(metric(p, &weights).add(cost));
                        b = b.min(metric(q, &weights).add(cost));
                    }
                    for (window, best) in [(window, a), (window + half, b)] {
                        let to = &mut to[window >> bits];
                        let best = best.add(energy);
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
    fn nearest[R, const V: usize](book: &[f32], input: &Input) -> [u32; LANES] {
        let mut found = Lanes([0.0; LANES]);
        // SAFETY: the contract of this function.
        unsafe {
            let weights: [R; V] = std::array::from_fn(|v| R::load(&input.weights[v]));
            let (mut best, mut index) = (R::splat(f32::INFINITY), R::splat(0.0));
            for (w, entry) in book.chunks_exact(V + 1).enumerate() {
                let d = metric(entry, &weights);
                // Windows have at most 24 bits: an f32 holds them.
                index = index.replace_if_less(d, best, R::splat(w as f32));
                best = best.min(d);
            }
            index.store(&mut found);
        }
        found.0.map(|w| w as u32)
    }
}

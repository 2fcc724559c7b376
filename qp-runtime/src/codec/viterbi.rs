//! The search for the windows that lie closest to a block of weights.
//!
//! # The trellis
//!
//! The windows of steps `s` and `s + 1` overlap in L − KV(s) bits: they are the high bits of the first and the low bits
//! of the second. So a path through the trellis is known by its **state** at each boundary between steps, the
//! overlap, and of the 2^L paths that end in a window only the best of each state, 2^(L−KV), can go on:
//!
//! ```text
//! cost(s+1, o) = min over b < 2^KV(s) of  cost(s, w mod 2^(L−KV(s−1))) + metric(x_s, entry(w)),   w = o·2^KV(s) + b
//! ```
//!
//! Costs are 16-bit integers that are kept small, see [`Metric`]: none exceeds the metric's limit, and the least one
//! before a step whose number in the block is a multiple of [`REBASE`] is taken off all those after it. Costs of states
//! are kept for a whole block; the best `b` is found again on the way back. Among equal costs the smallest window wins,
//! among equal ends the smallest state.
//!
//! # Tail-biting
//!
//! The stream is cyclic: the state after the last step is the state before the first. The best path for every such
//! state would take 2^(L−KV) searches; two come within a fraction of a percent. The first search runs freely across the
//! seam, from some steps before the block's end to some steps after its beginning, and finds a good state there; the
//! second runs over the block with that state fixed at both ends. Only where weights lie so far from all entries that
//! every cost reaches the limit may a path begin elsewhere; [`super::search::Search`] then mends it.
//!
//! # Speed
//!
//! Thirty-two blocks are searched side by side, one in each lane of a vector register, so the inner loop is the same
//! for every L, KV and pattern. Entries have few different components: for each of them and each weight of a step, the
//! metrics of all lanes are written to a table first. A window then loads and adds its V rows of the table and a
//! row of costs. [`super::plain`] is the same search without any of this, to be compared with.

use half::f16;
use half::slice::HalfFloatSliceExt;
use qp_codegen::metric::{self, Metric, Nearest, REBASE};
use qp_codegen::spec::Code;

use super::simd::{LANES, Lanes, for_each_instruction_set};

/// Costs that are kept for the way back, in bytes a thread, unless [`Trellis::with_history`] says otherwise. Where a
/// search needs more, only some boundaries are kept and the steps between them are run again.
const HISTORY_BYTES: usize = metric::HISTORY_BYTES as usize;

/// A code made ready to encode.
#[derive(Clone, Debug)]
pub struct Trellis {
    window: u32,
    vector: usize,
    /// KV of every step of a block.
    bits: Vec<u32>,
    book: Book,
    /// Steps on each side of the seam in the first search.
    reach: usize,
    /// Bytes of costs that a thread keeps.
    history: usize,
}

/// The codebook as weights are compared with it.
#[derive(Clone, Debug)]
enum Book {
    /// Of a trellis code.
    Rows(Rows),
    /// Of a code without memory.
    Entries(Entries),
}

/// Entries as rows of a table of metrics.
#[derive(Clone, Debug)]
struct Rows {
    metric: Metric,
    /// What components of entries there are; a row of the table for each.
    values: Vec<f32>,
    /// For each window the rows of its V components.
    rows: Vec<u16>,
}

/// Entries as they are.
#[derive(Clone, Debug)]
struct Entries {
    nearest: Nearest,
    /// For each window its V components.
    components: Vec<i16>,
    /// For each window its energy.
    energies: Vec<i32>,
}

/// Memory of one search, to be used again by the next.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The metrics of a step: for each of the V components, a row for each value.
    table: Vec<Lanes>,
    history: Vec<Vec<Lanes>>,
}

/// Where a path may begin or end.
#[derive(Clone, Copy)]
enum End<'a> {
    /// In any state.
    Free,
    /// In this state of each lane.
    At(&'a [u32; LANES]),
}

/// What a step needs besides weights and entries.
#[derive(Clone, Copy)]
struct Step {
    /// L − KV of the step before: log2 of the number of states before the step.
    before: u32,
    /// KV.
    bits: u32,
    window: u32,
    /// No cost is larger.
    limit: u16,
    /// True if the least cost before the step is taken off those after it.
    rebase: bool,
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
        let book = if code.is_memoryless() { Book::Entries(Entries::new(code)) } else { Book::Rows(Rows::new(code)) };
        let reach = code.reach(bits.len() as u32) as usize;
        Trellis { window: code.window, vector, bits, book, reach, history: HISTORY_BYTES }
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

    /// Number of blocks [`Trellis::encode`] takes at once; fewer cost as much.
    pub fn blocks_at_once(&self) -> usize {
        LANES
    }

    /// Encodes up to [`Trellis::blocks_at_once`] blocks: `blocks` holds [`Trellis::block_len`] finite weights of each,
    /// `windows` receives [`Trellis::steps`] windows of each.
    pub fn encode(&self, blocks: &[f32], windows: &mut [u32], scratch: &mut Scratch) {
        let n = self.steps();
        let mut path = vec![[0; LANES]; n];
        match &self.book {
            Book::Rows(rows) => {
                let (mut paths, history) = self.paths(rows, blocks, scratch);
                let around = &mut path[..(2 * self.reach).min(n)];
                paths.search(n - self.reach, End::Free, End::Free, around, history);
                // The window of step 0, for its low bits are the state at the seam.
                let seam = around[self.reach % n].map(|w| w & (self.states(0) - 1) as u32);
                paths.search(0, End::At(&seam), End::At(&seam), &mut path, history);
            }
            Book::Entries(entries) => {
                let run = match self.vector {
                    1 => nearest::<1>,
                    2 => nearest::<2>,
                    4 => nearest::<4>,
                    v => unreachable!("V of {v}"),
                };
                let n = self.load(blocks, |x| i32::from(entries.nearest.weight(x)));
                let steps = n.chunks_exact(self.vector);
                path.iter_mut().zip(steps).for_each(|(p, n)| run(&entries.components, &entries.energies, n, p));
            }
        }
        for (lane, windows) in windows.chunks_exact_mut(n).enumerate() {
            windows.iter_mut().zip(&path).for_each(|(w, p)| *w = p[lane]);
        }
    }

    /// The best path of a trellis code whose state at the seam is `seam`, for one block.
    pub fn encode_from(&self, block: &[f32], seam: u32, scratch: &mut Scratch) -> Vec<u32> {
        let Book::Rows(rows) = &self.book else { unreachable!("steps of a code without memory have no states") };
        let mut path = vec![[0; LANES]; self.steps()];
        let seams = [seam; LANES];
        let (mut paths, history) = self.paths(rows, block, scratch);
        paths.search(0, End::At(&seams), End::At(&seams), &mut path, history);
        path.iter().map(|p| p[0]).collect()
    }

    /// Number of states before step `s`.
    pub fn states(&self, s: usize) -> usize {
        1 << (self.window - self.bits[(s + self.steps() - 1) % self.steps()])
    }

    /// For each weight of a block `of(weight)` of each lane's block, or of 0 where there is none.
    fn load<T: Copy>(&self, blocks: &[f32], of: impl Fn(f32) -> T) -> Vec<[T; LANES]> {
        let len = self.block_len();
        assert!(blocks.len().is_multiple_of(len) && blocks.len() <= LANES * len, "up to {LANES} whole blocks");
        let mut out = vec![[of(0.0); LANES]; len];
        for (lane, block) in blocks.chunks_exact(len).enumerate() {
            out.iter_mut().zip(block).for_each(|(out, &x)| out[lane] = of(x));
        }
        out
    }

    /// The searches of `blocks`, and the memory for their costs.
    fn paths<'a>(
        &'a self,
        rows: &'a Rows,
        blocks: &[f32],
        scratch: &'a mut Scratch,
    ) -> (Paths<'a>, &'a mut Vec<Vec<Lanes>>) {
        let points = self.load(blocks, |x| rows.metric.weight(x).to_f32());
        let Scratch { table, history } = scratch;
        table.resize(self.vector * rows.values.len(), Lanes([0; LANES]));
        (Paths { trellis: self, rows, points, table }, history)
    }
}

impl Rows {
    fn new(code: &Code) -> Rows {
        let (metric, components) = (Metric::new(code), code.codebook());
        let mut row_of = vec![None; 1 << 16];
        components.iter().for_each(|&c| row_of[usize::from(c.cast_unsigned())] = Some(0));
        let mut values: Vec<f32> = vec![];
        for c in i16::MIN..=i16::MAX {
            if let Some(row) = &mut row_of[usize::from(c.cast_unsigned())] {
                let value = metric.entry(c).to_f32();
                // Large components may round to the same number.
                if values.last() != Some(&value) {
                    values.push(value);
                }
                *row = (values.len() - 1) as u16;
            }
        }
        let rows = components.iter().map(|&c| row_of[usize::from(c.cast_unsigned())].expect("a row")).collect();
        Rows { metric, values, rows }
    }
}

impl Entries {
    fn new(code: &Code) -> Entries {
        let (nearest, components) = (Nearest::new(code), code.codebook());
        let energies = components.chunks_exact(code.vector as usize).map(|e| nearest.energy(e)).collect();
        Entries { nearest, components, energies }
    }
}

/// The searches of some blocks.
struct Paths<'a> {
    trellis: &'a Trellis,
    rows: &'a Rows,
    /// For each weight of a block the points of all lanes.
    points: Vec<[f32; LANES]>,
    /// As in [`Scratch`].
    table: &'a mut [Lanes],
}

impl Paths<'_> {
    /// Searches `path.len()` steps from step `first` on (cyclically), from states `begin` to states `end`, and writes the
    /// windows of the best path to `path`.
    fn search(
        &mut self,
        first: usize,
        begin: End<'_>,
        end: End<'_>,
        path: &mut [[u32; LANES]],
        history: &mut Vec<Vec<Lanes>>,
    ) {
        let t = self.trellis;
        let boundary = size_of::<Lanes>() << (t.window - t.bits.iter().min().expect("at least one step"));
        // Halving the path needs a boundary each time, and two to work with.
        let least = path.len().ilog2() as usize + 3;
        let count = (t.history / boundary).max(least).min(path.len() + 1);
        history.resize_with(history.len().max(count), Vec::new);
        let costs = &mut history[0];
        costs.clear();
        match begin {
            End::Free => costs.resize(t.states(first), Lanes([0; LANES])),
            End::At(state) => {
                costs.resize(t.states(first), Lanes([self.rows.metric.limit; LANES]));
                state.iter().enumerate().for_each(|(lane, &o)| costs[o as usize].0[lane] = 0);
            }
        }
        self.trace(first, end, path, &mut history[..count]);
    }

    /// As [`Paths::search`], from the costs of `history[0]`, with no other memory than `history`; returns the state before
    /// the first step.
    fn trace(
        &mut self,
        first: usize,
        end: End<'_>,
        path: &mut [[u32; LANES]],
        history: &mut [Vec<Lanes>],
    ) -> [u32; LANES] {
        let steps = self.trellis.steps();
        let at = |i: usize| (first + i) % steps;
        if path.len() < history.len() {
            for i in 0..path.len() {
                let (done, next) = history.split_at_mut(i + 1);
                self.forward(at(i), &done[i], &mut next[0]);
            }
            let mut state = best_end(&history[path.len()], end);
            for (i, windows) in path.iter_mut().enumerate().rev() {
                self.back(at(i), &history[i], &mut state, windows);
            }
            return state;
        }
        // The second half, from costs in its middle; then the first half, to the state found there.
        let middle = path.len() / 2;
        let [start, half, spare, ..] = &mut *history else { unreachable!("least is enough") };
        half.clone_from(start);
        for i in 0..middle {
            self.forward(at(i), half, spare);
            std::mem::swap(half, spare);
        }
        let (before, after) = path.split_at_mut(middle);
        let state = self.trace(at(middle), end, after, &mut history[1..]);
        self.trace(first, End::At(&state), before, history)
    }

    /// Costs after step `s` from those before it.
    fn forward(&mut self, s: usize, from: &[Lanes], to: &mut Vec<Lanes>) {
        self.measure(s);
        let step = self.step(s);
        to.resize(1 << (step.window - step.bits), Lanes([0; LANES]));
        let run = match self.trellis.vector {
            1 => forward::<1>,
            2 => forward::<2>,
            4 => forward::<4>,
            v => unreachable!("V of {v}"),
        };
        run(step, &self.rows.rows, self.table, from, to);
    }

    /// One step back: from the state after step `s` to the window of the step and the state before it.
    fn back(&mut self, s: usize, from: &[Lanes], state: &mut [u32; LANES], path: &mut [u32; LANES]) {
        self.measure(s);
        let (step, v, rows) = (self.step(s), self.trellis.vector, self.rows.values.len());
        let mask = (1usize << step.before) - 1;
        for lane in 0..LANES {
            let first = (state[lane] as usize) << step.bits;
            let book = &self.rows.rows[first * v..][..v << step.bits];
            let mut best = (u16::MAX, first);
            for (b, entry) in book.chunks_exact(v).enumerate() {
                let mut cost = from[(first + b) & mask].0[lane];
                for (i, &row) in entry.iter().enumerate() {
                    cost += self.table[i * rows + usize::from(row)].0[lane];
                }
                if cost < best.0 {
                    best = (cost, first + b);
                }
            }
            path[lane] = best.1 as u32;
            state[lane] = (best.1 & mask) as u32;
        }
    }

    fn step(&self, s: usize) -> Step {
        let t = self.trellis;
        Step {
            before: t.window - t.bits[(s + t.steps() - 1) % t.steps()],
            bits: t.bits[s],
            window: t.window,
            limit: self.rows.metric.limit,
            rebase: (s as u32).is_multiple_of(REBASE),
        }
    }

    /// Writes the metrics of step `s` to the table.
    fn measure(&mut self, s: usize) {
        let (v, values) = (self.trellis.vector, &self.rows.values);
        let components = self.table.chunks_exact_mut(values.len());
        components.zip(&self.points[s * v..][..v]).for_each(|(table, points)| metrics(points, values, table));
    }
}

/// [`Metric::component`] of each of `values` for the points of all lanes.
fn metrics(points: &[f32; LANES], values: &[f32], to: &mut [Lanes]) {
    // So many that converting them is not all calls, and so few that they stay near.
    const ROWS: usize = 8;
    let (mut floats, mut halves) = ([[0f32; LANES]; ROWS], [[f16::ZERO; LANES]; ROWS]);
    for (values, to) in values.chunks(ROWS).zip(to.chunks_mut(ROWS)) {
        for (apart, value) in floats.iter_mut().zip(values) {
            apart.iter_mut().zip(points).for_each(|(apart, point)| *apart = point - value);
        }
        halves.as_flattened_mut().convert_from_f32_slice(floats.as_flattened());
        halves.as_flattened().convert_to_f32_slice(floats.as_flattened_mut());
        floats.as_flattened_mut().iter_mut().for_each(|apart| *apart *= *apart);
        halves.as_flattened_mut().convert_from_f32_slice(floats.as_flattened());
        to.iter_mut().zip(&halves).for_each(|(to, squares)| to.0 = squares.map(f16::to_bits));
    }
}

/// The end of the best path in each lane.
fn best_end(costs: &[Lanes], end: End<'_>) -> [u32; LANES] {
    let mut best = (Lanes([u16::MAX; LANES]), [0; LANES]);
    match end {
        End::Free => {
            for (o, cost) in costs.iter().enumerate() {
                for lane in 0..LANES {
                    if cost.0[lane] < best.0.0[lane] {
                        best.0.0[lane] = cost.0[lane];
                        best.1[lane] = o as u32;
                    }
                }
            }
            best.1
        }
        End::At(state) => *state,
    }
}

for_each_instruction_set! {
    /// The recursion at the top of this file, for all states after a step. `book` holds V rows of a component in `table` for
    /// each window.
    fn forward[R, const V: usize](step: Step, book: &[u16], table: &[Lanes], from: &[Lanes], to: &mut [Lanes]) {
        let Step { before, bits, window, limit, rebase } = step;
        // A run of windows whose states before the step are neighbours and whose state after it is the same.
        let run = 1usize << bits.min(before);
        // A state after the step has one run, or each of several.
        let several = bits > before;
        // Two windows that differ in the highest bit share their costs so far.
        let half = 1usize << (window - 1);
        let (book, rows) = (book.as_chunks::<V>().0, table.len() / V);
        let (lower, upper) = book.split_at(half);
        // SAFETY: the contract of this function; every row of the book is one of a component's.
        unsafe {
            let limit = R::splat(limit);
            let mut less = R::splat(0);
            if rebase {
                less = limit;
                for cost in from {
                    less = less.min(R::load(cost));
                }
            }
            if several {
                let mut most = Lanes([0; LANES]);
                limit.sub(less).store(&mut most);
                to.fill(most);
            }
            let metric = |entry: &[u16; V]| {
                let row = |i: usize| {
                    let at = i * rows + usize::from(entry[i]);
                    debug_assert!(usize::from(entry[i]) < rows && at < table.len());
                    R::load(table.get_unchecked(at))
                };
                let mut d = row(0);
                for i in 1..V {
                    d = d.add(row(i));
                }
                d
            };
            for low in (0..1usize << before).step_by(run) {
                let from = &from[low..low + run];
                for high in 0..1usize << (window - before - 1) {
                    let window = high << before | low;
                    let (mut a, mut b) = (limit, limit);
                    let entries = lower[window..window + run].iter().zip(&upper[window..window + run]);
                    for ((p, q), cost) in entries.zip(from) {
                        let cost = R::load(cost);
                        a = a.min(metric(p).add(cost));
                        b = b.min(metric(q).add(cost));
                    }
                    for (window, best) in [(window, a), (window + half, b)] {
                        let to = &mut to[window >> bits];
                        let best = best.sub(less);
                        let best = if several { R::load(to).min(best) } else { best };
                        best.store(to);
                    }
                }
            }
        }
    }
}

for_each_instruction_set! {
    /// For each lane the entry, of V components each, nearest to the weights of a step.
    fn nearest[R, const V: usize](components: &[i16], energies: &[i32], n: &[[i32; LANES]], found: &mut [u32; LANES]) {
        /// Lanes whose best entries stay in registers.
        const PART: usize = LANES / 2;
        let entries = components.as_chunks::<V>().0;
        for (part, found) in found.as_chunks_mut::<PART>().0.iter_mut().enumerate() {
            let n: [&[i32; PART]; V] = std::array::from_fn(|i| &n[i].as_chunks().0[part]);
            let mut best = [i32::MAX; PART];
            for (w, (entry, &energy)) in entries.iter().zip(energies).enumerate() {
                for lane in 0..PART {
                    let mut d = energy;
                    for i in 0..V {
                        d += n[i][lane] * i32::from(entry[i]);
                    }
                    found[lane] = if d < best[lane] { w as u32 } else { found[lane] };
                    best[lane] = d.min(best[lane]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_metrics() {
        for name in ["tcq_2", "fine_5", "fast_3.5"] {
            let code = &qp_codegen::spec::resolve(name).expect("of the palette").codes[0];
            let trellis = Trellis::new(code);
            let Book::Rows(rows) = &trellis.book else { unreachable!("a trellis code") };
            let m = &rows.metric;
            let mut weights = super::super::Gaussian::new(2).samples(LANES * trellis.block_len());
            weights[..2].copy_from_slice(&[0.0, 1e30]);
            let mut scratch = Scratch::default();
            let (mut paths, _) = trellis.paths(rows, &weights, &mut scratch);
            for s in 0..trellis.steps() {
                paths.measure(s);
                let components = paths.table.chunks_exact(rows.values.len()).enumerate();
                for (at, table) in components.map(|(i, table)| (s * trellis.vector + i, table)) {
                    for (metrics, &value) in table.iter().zip(&rows.values) {
                        for (lane, block) in weights.chunks_exact(trellis.block_len()).enumerate() {
                            let expected = m.component(m.weight(block[at]), f16::from_f32(value));
                            assert_eq!(metrics.0[lane], expected);
                        }
                    }
                }
            }
            for (w, rows_of) in rows.rows.chunks_exact(trellis.vector).enumerate() {
                let mut entry = vec![0; trellis.vector];
                code.entry(w as u32, &mut entry);
                let values: Vec<f32> = rows_of.iter().map(|&row| rows.values[usize::from(row)]).collect();
                assert_eq!(values, entry.iter().map(|&c| m.entry(c).to_f32()).collect::<Vec<f32>>());
            }
        }
    }
}

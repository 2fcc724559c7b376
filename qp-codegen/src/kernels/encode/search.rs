//! The search along a trellis.

use std::cmp::Ordering;

use half::f16;

use super::super::math::across_lanes;
use super::{Emit, LOOKED_UP, PAIRS, Phase, ROW, ROWS};
use crate::ir::{Cache, Elem, Mem, Scalar, Special, V, Var};
use crate::metric::REBASE;
use crate::spec::mask;

/// Registers that costs and entries may take which a thread loads before it needs them.
const AHEAD: u32 = 32;

/// States whose costs share a line of the cache.
const LINE: u32 = 128 / (4 * PAIRS);
/// Most states whose costs are asked for in advance at each step of the way back.
const MOST_ASKED: u32 = 1 << 12;

/// What the threads that search together know.
#[derive(Clone, Copy)]
struct Search<'b> {
    /// Among them.
    thread: V<'b>,
    /// Their first state in the history.
    history: V<'b>,
    /// First word of theirs among the least costs.
    floors: V<'b>,
    /// Index of the group's first word of weights.
    weights: V<'b>,
    /// What lies in shared memory.
    shared: Arrays,
}

/// Arrays in shared memory.
#[derive(Clone, Copy)]
struct Arrays {
    /// Metrics for this step and the next, by component, row and copy, [`PAIRS`] words each. Copies lie in banks of their own,
    /// and neighbours read different ones.
    tables: Option<Mem>,
    /// Entries on their way, by stage, chunk and thread.
    stages: Option<Mem>,
    /// The weights of this step and the next. From here they come sooner than from global memory, and no later load is waited
    /// for with them.
    points: Mem,
}

/// Of a row.
const COPIES: u32 = ROW / PAIRS;
/// Bytes of a table.
const TABLE: u32 = ROWS * ROW * 4;

/// A step of a search.
#[derive(Clone, Copy)]
struct At<'b> {
    /// Its number in the search.
    i: V<'b>,
    /// In the block of weights.
    s: V<'b>,
    /// The same of the step after it.
    next: V<'b>,
}

/// The costs of a state: for each two lanes a word.
type Costs = Vec<Var>;

impl<'b> Emit<'b> {
    /// Where the chunks of a slot's entries in a round of predecessors lie in the book, in units of chunks.
    fn chunks(&self, p: &Phase, round: V<'b>, slot: V<'b>) -> Vec<V<'b>> {
        let (chunk, chunks) = (self.plan.chunk(), self.plan.slot_words() / self.plan.chunk());
        let first = round * (chunks * p.slots()) + slot;
        (0..chunks).map(|i| first + (i * p.slots() + p.book / chunk)).collect()
    }

    /// Where those of a stage lie in shared memory.
    fn staged(&self, stage: u32) -> Vec<V<'b>> {
        let (plan, chunks) = (self.plan, self.plan.slot_words() / self.plan.chunk());
        let at = |i| self.b.special(Special::Thread) + (stage * chunks + i) * plan.threads;
        (0..chunks).map(at).collect()
    }

    /// The words of chunks.
    fn words(&self, mem: Mem, chunks: Vec<V<'b>>, cache: Cache) -> Vec<V<'b>> {
        let chunk = self.plan.chunk();
        let load = |at: V<'b>| self.b.load_as(mem, at * chunk, Elem::U32, chunk, cache).lanes();
        chunks.into_iter().flat_map(load).collect()
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

    pub(super) fn search(&self, groups: V<'b>, searches: u32) {
        let (b, plan) = (self.b, self.plan);
        let (steps, reach, lanes) = (plan.steps(), plan.reach, plan.lanes);
        let first_phase = plan.phases()[0];
        let alone = plan.cluster == 1;
        let seams = alone.then(|| b.shared("seams", Elem::I32, lanes));
        let (thread, rank) = (b.special(Special::Thread), if alone { b.i32(0) } else { b.special(Special::Rank) });
        let thread = rank * plan.threads + thread;
        let first = b.special(if alone { Special::BlockX } else { Special::Cluster });
        let (history, floors) = (first * (plan.history() as u32 / PAIRS), first * plan.floors());
        let shared = self.arrays();
        b.for_(first, groups, searches, |group| {
            // Other blocks must see it: where the first window will lie.
            let seam = |m: V<'b>| match seams {
                Some(seams) => (seams, m),
                None => (self.windows, (group * lanes + m) * steps),
            };
            let load_seam = |m| {
                let (seams, at) = seam(m);
                b.load(seams, at, Elem::I32)
            };
            let search = Search { thread, history, floors, weights: group * (steps * plan.weight_words()), shared };
            b.comment("First freely across the seam, to find the state there; then from it to it.");
            b.for_(0, 2, 1, |pass| {
                let free = pass.eq(0);
                let choose = |a: u32, c: u32| free.select(b.i32(a as i32), c as i32);
                let (first, count) = (choose(steps - reach, 0), choose(steps.min(2 * reach), steps));
                let at = |i: V<'b>| {
                    let around = |s: V<'b>| s.lt(steps).select(s, s - steps);
                    let s = around(first + i);
                    At { i, s, next: around(s + 1) }
                };
                let pair = thread % PAIRS;
                let ends = [0, 1].map(|_| b.var(b.i32(-1)));
                b.if_(pass.eq(1), || {
                    ends.iter().zip(0u32..).for_each(|(&end, m)| b.set(end, load_seam(pair * 2 + m)));
                });
                b.for_(thread, PAIRS << first_phase.before, plan.team(), |i| {
                    let state = i / PAIRS;
                    let cost = |end: Var, shift: u32| {
                        let reachable = free | state.eq(b.get(end));
                        reachable.select(b.u32(0), u32::from(plan.metric.limit) << shift)
                    };
                    b.store(self.history, history * PAIRS + i, cost(ends[0], 0) | cost(ends[1], 16), Elem::U32);
                });
                let start = b.i32(0);
                self.prepare(search, start, at(start).s);
                self.meet();
                let forward = if plan.boundaries() > steps { count } else { choose(2 * reach, steps - 1) };
                b.for_(0, forward, 1, |i| {
                    let at = at(i);
                    self.each_phase(i, |p| self.forward(p, search, at));
                    self.prepare(search, i + 1, at.next);
                    self.meet();
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
                        let s = at(i).s;
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

    /// The value of a row, as half-precision number, twice.
    fn value(&self, row: V<'b>) -> V<'b> {
        let twice = |x: f32| u32::from(f16::from_f32(x).to_bits()) * 0x1_0001;
        // 1024 and a small number: its low bits are the number's.
        let whole = ((row.bits(Scalar::U32) * 0x1_0001_u32) | twice(1024.0)).sub_halves(self.b.u32(twice(1152.0)));
        whole.mul_halves(self.b.u32(twice((self.plan.metric.exponent as f32).exp2())))
    }

    /// Declares what lies in shared memory.
    fn arrays(&self) -> Arrays {
        let (b, plan) = (self.b, self.plan);
        let array = |name: &str, len: u32| (len > 0).then(|| b.shared(name, Elem::U32, len));
        Arrays {
            tables: array("metrics", 2 * plan.shared.tables * TABLE / 4),
            stages: array("entries", plan.shared.stages * plan.slot_words() * plan.threads),
            points: b.shared("points", Elem::U32, 2 * plan.weight_words()),
        }
    }

    /// Brings weights, and metrics that are looked up, of step `s`, the `i`-th of the search, to shared memory.
    fn prepare(&self, search: Search<'b>, i: V<'b>, s: V<'b>) {
        let (b, plan, thread) = (self.b, self.plan, self.b.special(Special::Thread));
        let (words, first) = (plan.weight_words(), search.weights + s * plan.weight_words());
        b.if_(thread.lt(words), || {
            let word = b.load_as(self.weights, first + thread, Elem::U32, 1, Cache::ReadOnly);
            b.store(search.shared.points, (i % 2) * words + thread, word, Elem::U32);
        });
        let Some(tables) = search.shared.tables else { return };
        // Threads that fill the same row.
        let each = plan.threads / ROWS;
        let (row, copies) = (thread / each, thread % each * (COPIES / each));
        let value = self.value(row);
        for (k, v) in (0..plan.code.vector).step_by(2).enumerate() {
            let points = b.load_as(self.weights, first + v * PAIRS, Elem::U32, PAIRS, Cache::ReadOnly).lanes();
            let metrics: Vec<V<'b>> = points.iter().map(|&p| squared(p, value)).collect();
            let table = (i % 2) * plan.shared.tables + k as u32;
            for copy in 0..COPIES / each {
                let copy = (copies + copy + row) % COPIES;
                let at = (table * ROWS + row) * ROW + copy * PAIRS;
                b.store(tables, at, b.vector(&metrics), Elem::U32);
            }
        }
    }

    /// The weights of the `i`-th step: for each component a word for each two lanes.
    fn points(&self, search: Search<'b>, i: V<'b>) -> Vec<Vec<V<'b>>> {
        let first = (i % 2) * self.plan.weight_words();
        let load =
            |v| self.b.load_as(search.shared.points, first + v * PAIRS, Elem::U32, PAIRS, Cache::Default).lanes();
        (0..self.plan.code.vector).map(load).collect()
    }

    /// Costs after a step from those before it.
    fn forward(&self, p: &Phase, search: Search<'b>, at: At<'b>) {
        let (b, plan) = (self.b, self.plan);
        let to = search.history + (at.i + 1) * plan.states();
        let points = self.points(search, at.i);
        let rebases = (at.s % REBASE).eq(0) & at.i.gt(0);
        let least: Costs = (0..PAIRS).map(|_| b.var(b.u32(u32::MAX))).collect();
        let (share, index) = (search.thread % p.split, search.thread / p.split);
        let run = |task: V<'b>, here: Option<V<'b>>| {
            let best = self.best(p, &points, search, at.i, task, share);
            b.if_(rebases, || {
                let floor = self.floor(search);
                for costs in &best {
                    costs.iter().zip(&floor).for_each(|(&c, &floor)| b.set(c, b.get(c) - floor));
                }
            });
            for (set, costs) in best.iter().enumerate() {
                let costs: Vec<V<'b>> = costs.iter().map(|&c| b.get(c)).collect();
                let put = || {
                    let state = task + set as u32 * p.tasks;
                    b.store(self.history, (to + state) * PAIRS, b.vector(&costs), Elem::U32);
                };
                // Lanes that share a task share the work of writing, too.
                let mine = (p.split > 1).then(|| share.eq(set as u32 % p.split));
                match (here, mine) {
                    (Some(here), Some(mine)) => b.if_(here & mine, put),
                    (Some(only), None) | (None, Some(only)) => b.if_(only, put),
                    (None, None) => put(),
                }
                costs.iter().zip(&least).for_each(|(&c, &least)| b.set(least, self.smaller(c, b.get(least))));
            }
        };
        match p.slots().cmp(&plan.team()) {
            // All lanes must be there for the shuffles: the others do what is done already.
            Ordering::Less => run(index % p.tasks, Some(search.thread.lt(p.slots()))),
            Ordering::Equal => run(index, None),
            Ordering::Greater => {
                b.for_(0, p.slots() / plan.team(), 1, |k| run(index + k * (plan.team() / p.split), None))
            }
        }
        b.if_((at.next % REBASE).eq(0), || {
            let least: Vec<V<'b>> = least.iter().map(|&c| self.in_warp(b.get(c))).collect();
            b.if_(b.special(Special::Lane).eq(0), || {
                let at = search.floors + search.thread / 32 * PAIRS;
                b.store(self.floors, at, b.vector(&least), Elem::U32);
            });
        });
    }

    /// The least costs before a step that takes them off.
    fn floor(&self, search: Search<'b>) -> Vec<V<'b>> {
        let b = self.b;
        let warps = self.plan.team() / 32;
        let lane = b.special(Special::Lane) % warps.min(32);
        let of_warp = |first: u32| {
            let at = search.floors + (lane + first) * PAIRS;
            b.load_as(self.floors, at, Elem::U32, PAIRS, Cache::Default).lanes()
        };
        let both = |a: Vec<V<'b>>, b: Vec<V<'b>>| a.into_iter().zip(b).map(|(a, b)| self.smaller(a, b)).collect();
        let least = (0..warps).step_by(32).map(of_warp).reduce(both).expect("a warp");
        least.into_iter().map(|c| self.in_warp(c)).collect()
    }

    /// The least costs of a task's states.
    fn best(
        &self,
        p: &Phase,
        points: &[Vec<V<'b>>],
        search: Search<'b>,
        i: V<'b>,
        task: V<'b>,
        share: V<'b>,
    ) -> Vec<Costs> {
        let (b, plan) = (self.b, self.plan);
        let copy = b.special(Special::Thread) % COPIES * (PAIRS * 4);
        let tables = ((i % 2) * (plan.shared.tables * TABLE) + copy).bits(Scalar::U32);
        let limit = u32::from(plan.metric.limit);
        let new = |_| (0..PAIRS).map(|_| b.var(b.u32(limit | limit << 16))).collect::<Costs>();
        let best: Vec<Costs> = (0..1 << plan.alpha).map(new).collect();
        self.each_round(p, search, i, [task, share], |old, entries| {
            for (set, costs) in best.iter().enumerate() {
                let component = |(v, points): (usize, &Vec<V<'b>>)| -> Vec<V<'b>> {
                    let half = set * plan.code.vector as usize + v;
                    let word = entries[half / 2];
                    match search.shared.tables {
                        Some(mem) if LOOKED_UP >> (half % 8) & 1 == 1 => {
                            let at = word & 0xffff_u32 | (tables + v as u32 / 2 * TABLE);
                            b.load_as(mem, at, Elem::U32, PAIRS, Cache::Default).lanes()
                        }
                        Some(_) | None => {
                            let entry = word.permute(word, if half.is_multiple_of(2) { 0x1010 } else { 0x3232 });
                            points.iter().map(|&p| squared(p, entry)).collect()
                        }
                    }
                };
                let add = |a: Vec<V<'b>>, b: Vec<V<'b>>| a.into_iter().zip(b).map(|(a, b)| a + b).collect();
                let metrics = points.iter().enumerate().map(component).reduce(add).expect("a component");
                for ((&best, &old), metric) in costs.iter().zip(old).zip(metrics) {
                    b.set(best, old.add_min(metric, b.get(best)));
                }
            }
        });
        let mut apart = 1;
        while apart < p.split {
            for &c in best.iter().flatten() {
                b.set(c, self.smaller(b.get(c), b.get(c).shuffle_xor(apart as i32)));
            }
            apart *= 2;
        }
        best
    }

    /// Where the state lies before step `i` from which a task comes in a round, in units of its costs.
    fn state(&self, p: &Phase, search: Search<'b>, i: V<'b>, task: V<'b>, low: V<'b>) -> V<'b> {
        let window = (task << p.bits as i32) + low;
        search.history + i * self.plan.states() + (window & mask(p.before) as i32)
    }

    /// Emits `body` for each predecessor that a lane of a task takes, with its costs and entries.
    fn each_round(
        &self,
        p: &Phase,
        search: Search<'b>,
        i: V<'b>,
        [task, share]: [V<'b>; 2],
        body: impl Fn(&[V<'b>], &[V<'b>]),
    ) {
        let (b, plan, rounds) = (self.b, self.plan, p.rounds());
        let slot = task * p.split + share;
        let old = |round: V<'b>| {
            let at = self.state(p, search, i, task, round * p.split + share) * PAIRS;
            b.load_as(self.history, at, Elem::U32, PAIRS, Cache::Default).lanes()
        };
        let Some(stages) = search.shared.stages else {
            let ahead = (AHEAD / (PAIRS + plan.slot_words())).max(1).min(rounds);
            let ahead = 1 << ahead.ilog2();
            b.for_(0, rounds, ahead, |round| {
                let entries = |round| self.words(self.book, self.chunks(p, round, slot), Cache::ReadOnly);
                let loaded: Vec<_> = (0..ahead).map(|k| (old(round + k), entries(round + k))).collect();
                loaded.iter().for_each(|(old, entries)| body(old, entries));
            });
            return;
        };
        // Entries and costs of the next rounds are on their way while these are worked on. Two halves take turns, so that no
        // register waits for the load after its own.
        let unit = plan.shared.stages / 2;
        let fetch = |first: V<'b>, half: u32| -> Vec<Vec<V<'b>>> {
            for k in 0..unit {
                for (to, from) in self.staged(half * unit + k).into_iter().zip(self.chunks(p, first + k, slot)) {
                    b.async_copy(stages, to, self.book, from, 4 * plan.chunk());
                }
            }
            b.async_commit();
            (0..unit).map(|k| old(first + k)).collect()
        };
        let work = |costs: &[Vec<V<'b>>], half: u32| {
            for (old, k) in costs.iter().zip(half * unit..) {
                body(old, &self.words(stages, self.staged(k), Cache::Default));
            }
        };
        let first: Vec<Costs> =
            fetch(b.i32(0), 0).into_iter().map(|c| c.into_iter().map(|c| b.var(c)).collect()).collect();
        b.for_(0, rounds, 2 * unit, |round| {
            let second = fetch(round + unit, 1);
            b.async_wait(1);
            let costs: Vec<Vec<V<'b>>> = first.iter().map(|c| c.iter().map(|&c| b.get(c)).collect()).collect();
            work(&costs, 0);
            let more = || {
                let costs = fetch(round + 2 * unit, 0);
                first.iter().flatten().zip(costs.into_iter().flatten()).for_each(|(&first, c)| b.set(first, c));
                b.async_wait(1);
            };
            b.if_else((round + 2 * unit).lt(rounds), more, || b.async_wait(0));
            work(&second, 1);
        });
    }

    /// The smaller costs of two lanes.
    fn smaller(&self, a: V<'b>, b: V<'b>) -> V<'b> {
        a.add_min(self.b.u32(0), b)
    }

    /// The least costs of two lanes in a warp.
    fn in_warp(&self, costs: V<'b>) -> V<'b> {
        across_lanes(costs, |a, b| self.smaller(a, b))
    }

    /// The best end of lane `m`'s paths of `count` steps.
    fn best_end(&self, search: Search<'b>, m: V<'b>, count: V<'b>, state: Var) {
        let (b, plan) = (self.b, self.plan);
        let lane = b.special(Special::Lane);
        let from = search.history + count * plan.states();
        let best = b.var(b.i32(i32::MAX));
        let states = |p: &Phase| {
            let at_once = ((1u32 << p.before) / 32).clamp(1, 16);
            b.for_(lane, 1u32 << p.before, 32 * at_once, |first| {
                let costs: Vec<_> = (0..at_once).map(|k| first + 32 * k).map(|o| (self.cost(from, o, m), o)).collect();
                for (cost, o) in costs {
                    b.if_(cost.lt(b.get(best)), || {
                        b.set(best, cost);
                        b.set(state, o);
                    });
                }
            });
        };
        self.each_phase(count, states);
        // Each lane has the smallest of its own.
        let cost = across_lanes(b.get(best), V::min);
        let candidate = b.get(best).eq(cost).select(b.get(state), i32::MAX);
        b.set(state, across_lanes(candidate, V::min));
    }

    /// The cost of lane `m` in a state.
    fn cost(&self, from: V<'b>, state: V<'b>, m: V<'b>) -> V<'b> {
        let word = self.b.load_as(self.history, (from + state) * PAIRS + m / 2, Elem::U32, 1, Cache::Default);
        (word >> ((m % 2) * 16).bits(Scalar::U32) & 0xffff_u32).bits(Scalar::I32)
    }

    /// On the way back at `state` after step `i`, asks for all costs that the step before may need: by now they have left the L2
    /// cache.
    fn ask_for(&self, p: &Phase, search: Search<'b>, i: V<'b>, state: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let bits = p.bits + plan.code.window - p.before;
        let states = 1u32 << bits.min(p.earlier);
        if states > MOST_ASKED {
            return;
        }
        let first = (state << bits as i32) & mask(p.earlier) as i32;
        let from = search.history + (i - 1) * plan.states() + first;
        b.if_(i.gt(0), || {
            for at in (0..states).step_by(32 * LINE as usize) {
                let lane = b.special(Special::Lane) % (states / LINE).clamp(1, 32);
                b.prefetch(self.history, (from + (lane * LINE + at)) * PAIRS);
            }
        });
    }

    /// The window by which lane `m`'s best path to `state` came through step `s`, the `i`-th of the search.
    fn back(&self, p: &Phase, search: Search<'b>, m: V<'b>, i: V<'b>, s: V<'b>, state: V<'b>) -> V<'b> {
        let (b, plan) = (self.b, self.plan);
        let first = (search.weights + s * plan.weight_words()) * 2 + m;
        let point = |v| b.load_as(self.weights, first + v * plan.lanes, Elem::U16, 1, Cache::ReadOnly);
        let points: Vec<V<'b>> = (0..plan.code.vector).map(point).collect();
        let from = search.history + i * plan.states();
        let lane = b.special(Special::Lane) & mask(p.bits.min(5)) as i32;
        self.ask_for(p, search, i, state);
        // The cost, then the low bits of the window: the least of them is the smallest window among those of least cost.
        let best = b.var(b.u32(u32::MAX));
        let (task, set) = (state % p.tasks, state / p.tasks);
        let candidates = 1u32 << p.bits;
        let at_once = candidates.div_ceil(32).min(8);
        b.for_(0, candidates, 32 * at_once, |round| {
            let candidate = |k: u32| {
                let low = round + lane + 32 * k;
                let window = (state << p.bits as i32) + low;
                let old = self.cost(from, window & mask(p.before) as i32, m);
                let component = |(v, &point): (u32, &V<'b>)| {
                    let half = set * plan.code.vector + v;
                    let c = b.load_as(self.book, plan.place(p, task, low, half), Elem::U16, 1, Cache::ReadOnly);
                    let row = (b.u32(LOOKED_UP) >> (half % 8).bits(Scalar::U32) & 1_u32).eq(1_u32);
                    let of_row = || row.select(self.value((c / (ROW * 4)).bits(Scalar::I32)), c);
                    squared(point, if plan.shared.tables > 0 { of_row() } else { c }) & 0xffff_u32
                };
                let metric = (0..).zip(&points).map(component).reduce(|a, b| a + b).expect("a component");
                (metric + old.bits(Scalar::U32)) << 16_u32 | low.bits(Scalar::U32)
            };
            let all: Vec<_> = (0..at_once).map(candidate).collect();
            all.into_iter().for_each(|c| b.set(best, b.get(best).min(c)));
        });
        let least = across_lanes(b.get(best), V::min);
        (state << p.bits as i32) + (least & 0xffff_u32).bits(Scalar::I32)
    }
}

/// The metrics of components, of two lanes: [`crate::metric::Metric::component`].
fn squared<'b>(points: V<'b>, entries: V<'b>) -> V<'b> {
    let apart = points.sub_halves(entries);
    apart.mul_halves(apart)
}

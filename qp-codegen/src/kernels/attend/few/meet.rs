//! Where the parts of a token's head meet: the block that comes last folds them.

use super::super::emit::{Factors, Part};
use super::super::{CHUNK, LOWEST, SPAN};
use super::{Few, Place, ROWS, THREADS, Units};
use crate::ir::{Cache as Caching, Elem, Scalar, V, Var};
use crate::kernels::math::power;

/// Parts that are on their way at once where the last block folds them: whole chunks of tiles.
const PARTS: u32 = 4 * CHUNK;
/// Columns that a thread folds.
const QUAD: u32 = 4;

/// Four columns of a row that a thread folds from parts.
struct Fold<'b> {
    row: V<'b>,
    column: V<'b>,
    /// Sums of the columns of a chunk, then its total.
    chunk: Vec<Var>,
    /// The same of all that was folded.
    all: Vec<Var>,
}

impl<'b> Few<'b, '_> {
    /// Counts the block as arrived at counter `at`, where `count` meet, and runs `last` in the last.
    fn when_all_arrived(&self, at: V<'b>, count: V<'b>, last: impl FnOnce()) {
        let (b, e) = (self.b, &self.e);
        let flag = b.i32(e.op.tokens as i32 + 2);
        b.fence();
        b.barrier();
        b.if_(e.thread.eq(0), || {
            let before = b.atomic_add(e.p.arrived, at, b.i32(1));
            b.store(self.starts, flag, (before + 1).eq(count).select(b.i32(1), 0), Elem::I32);
        });
        b.barrier();
        b.if_(b.load(self.starts, flag, Elem::I32).eq(1), || {
            b.fence();
            b.if_(e.thread.eq(0), || b.store(e.p.arrived, at, b.i32(0), Elem::I32));
            last();
        });
    }

    /// Folds the units of the span, if the block is the last, and then the spans, if it is the last of those.
    pub(super) fn meet(&self, units: &Units<'b>, place: &Place<'b>, unit: V<'b>) {
        let (b, e) = (self.b, &self.e);
        let kv_heads = e.op.cache.kv_heads;
        let [first, last] = place.tiles.map(|t| t >> units.shift);
        let index = first + (unit - place.start) / kv_heads;
        let shift = b.i32(SPAN.ilog2() as i32) - units.shift;
        let span = index >> shift;
        let spans = place.tiles.map(|t| t / SPAN);
        let of_span = [first.max(span << shift), last.min(((span + 1) << shift) - 1)];
        let goes_on = b.var(b.i32(1));
        // The first time units, the second time spans: one stretch of code, since much of it is long.
        b.for_(b.i32(0), 2, 1, |time| {
            let of_units = time.eq(0);
            let [from, to] = [0, 1].map(|i| of_units.select(of_span[i], spans[i]));
            // Where a part lies follows from the place of its first unit among those of the token.
            let shift = of_units.select(b.i32(0), shift);
            let number = |index: V<'b>| place.start + (first.max(index << shift) - first) * kv_heads + place.head;
            b.if_(b.get(goes_on).eq(1) & from.ne(to), || {
                let head = (place.token * kv_heads + place.head) + self.plan.capacity;
                let at = of_units.select(number(from), head);
                b.set(goes_on, b.i32(0));
                self.when_all_arrived(at, to - from + 1, || {
                    b.set(goes_on, b.i32(1));
                    let in_order = of_units & units.shift.eq(0);
                    let is_all = !of_units | spans[0].eq(spans[1]);
                    self.merge(place, [from, to], number, in_order, is_all);
                });
            });
        });
    }

    /// Folds the parts of units (or spans) `from` to `to`, whose numbers `number` gives: four at a time to a chunk first
    /// where `in_order` holds. Writes the result if `is_all`, else what they give in the place of the first.
    ///
    /// What sums are multiplied with depends on the highs alone, so it is computed for [`PARTS`] parts at once, a lane each, and
    /// read by the threads that fold.
    fn merge(
        &self,
        place: &Place<'b>,
        [from, to]: [V<'b>; 2],
        number: impl Fn(V<'b>) -> V<'b>,
        in_order: V<'b>,
        is_all: V<'b>,
    ) {
        let (b, e, plan) = (self.b, &self.e, self.plan);
        let quads = plan.columns / QUAD;
        let all = plan.group * quads;
        let rounds: Vec<Fold> = (0..all.div_ceil(THREADS))
            .map(|round| {
                let item = (e.thread + round * THREADS).min(all as i32 - 1);
                let sums = || (0..=QUAD).map(|_| b.var(b.f32(0.0))).collect();
                Fold { row: item / quads, column: item % quads * QUAD, chunk: sums(), all: sums() }
            })
            .collect();
        let highs: Vec<Var> = (0..self.row_tiles()).map(|_| b.var(b.f32(LOWEST))).collect();
        let seen = |index: V<'b>| index.ge(from) & index.le(to);
        let within = |index: V<'b>| number(index.max(from).min(to)) * plan.unit_words();
        b.for_(from / PARTS * PARTS, to + 1, PARTS, |base| {
            // On their way while factors are computed.
            let load = |fold: &Fold<'b>, j: u32| {
                let at = within(base + j) + fold.row * plan.columns + fold.column;
                b.load_as(e.p.partial, at, Elem::F32, QUAD, Caching::Default).lanes()
            };
            let parts: Vec<Vec<_>> = rounds.iter().map(|f| (0..PARTS).map(|j| load(f, j)).collect()).collect();
            for (m, high) in (0..).zip(&highs) {
                let row = e.thread / PARTS + m * ROWS;
                let index = base + e.thread % PARTS;
                let at = within(index) + plan.group * plan.columns + row.min(plan.group as i32 - 1) * 2;
                let part = b.load_as(e.p.partial, at, Elem::F32, 2, Caching::Default).lanes();
                let part = Part { high: seen(index).select(part[0], LOWEST), total: part[1] };
                let write = |factors: [V<'b>; 4]| {
                    let words = factors.map(|f| f.bits(Scalar::U32));
                    b.store(self.exchanged, (e.thread + m * THREADS) * 4, b.vector(&words), Elem::U32);
                };
                b.if_else(in_order, || write(self.factors_by_chunk(part, *high)), || write(self.factors(part, *high)));
                b.if_((e.thread % PARTS).eq(0), || b.store(self.highest, row, b.get(*high), Elem::F32));
            }
            b.barrier();
            let factors = |fold: &Fold<'b>, j: u32| {
                let words =
                    b.load_as(self.exchanged, (fold.row * PARTS + j) * 4, Elem::U32, 4, Caching::Default).lanes();
                words.into_iter().map(|w| w.bits(Scalar::F32)).collect::<Vec<V>>()
            };
            // Folds sums and a total into `to`.
            let add = |to: &[Var], factors: Factors<'b>, sums: &[V<'b>]| {
                for (own, sum) in to.iter().zip(sums) {
                    b.set(*own, factors.fold(b.get(*own), *sum));
                }
            };
            let with_total = |sums: &[V<'b>], total: V<'b>| [sums, &[total]].concat();
            let one_by_one = || {
                for (fold, parts) in rounds.iter().zip(&parts) {
                    for (j, sums) in (0..).zip(parts) {
                        b.if_(seen(base + j), || {
                            let f = factors(fold, j);
                            let zero = b.f32(0.0);
                            let sums: Vec<V> = with_total(sums, f[2]).iter().map(|s| *s + zero).collect();
                            add(&fold.all, Factors { own: f[0], other: f[1] }, &sums);
                        });
                    }
                }
            };
            let by_chunk = || {
                for (fold, parts) in rounds.iter().zip(&parts) {
                    for (first, four) in (0..).step_by(CHUNK as usize).zip(parts.chunks(CHUNK as usize)) {
                        let (begin, last) = (base + first, base + (first + CHUNK - 1));
                        b.if_(begin.le(to) & last.ge(from), || {
                            let zero = b.f32(0.0);
                            fold.chunk.iter().for_each(|v| b.set(*v, zero));
                            let f: Vec<_> = (0..CHUNK).map(|i| factors(fold, first + i)).collect();
                            for ((i, sums), f) in (0..).zip(four).zip(&f) {
                                b.if_(seen(begin + i), || {
                                    add(&fold.chunk, Factors { own: f[0], other: f[1] }, &with_total(sums, f[2]));
                                });
                            }
                            let sums: Vec<V> = fold.chunk.iter().map(|v| b.get(*v)).collect();
                            add(&fold.all, Factors { own: f[0][3], other: f[1][3] }, &sums);
                        });
                    }
                }
            };
            b.if_else(in_order, by_chunk, one_by_one);
            b.barrier();
        });
        let part = |fold: &Fold<'b>| {
            let high = b.load(self.highest, fold.row, Elem::F32);
            Part { high, total: b.get(fold.all[QUAD as usize]) }
        };
        let sums = |fold: &Fold<'b>| fold.all[..QUAD as usize].iter().map(|v| b.get(*v)).collect::<Vec<V>>();
        let each = |store: &dyn Fn(&Fold<'b>)| {
            for (round, fold) in (0..).zip(&rounds) {
                let store = || store(fold);
                if (round + 1) * THREADS <= all { store() } else { b.if_((e.thread + round * THREADS).lt(all), store) }
            }
        };
        let d = e.op.cache.head_dim;
        let result = |fold: &Fold<'b>| {
            let head = self.head(place, fold.row);
            let (factors, divisor) = self.closing(part(fold), head);
            let first = (place.token * e.op.heads + head) * d + fold.column;
            let sums: Vec<V> = sums(fold).into_iter().map(|sum| self.closed(factors, sum) / divisor).collect();
            for (i, two) in (0..).zip(sums.chunks_exact(2)) {
                let write = || b.store(e.p.y, first + 2 * i, b.vector(two), Elem::F32);
                if d == plan.columns { write() } else { b.if_((fold.column + 2 * i).lt(d), write) }
            }
        };
        let into = number(from) * plan.unit_words();
        let hand_on = |fold: &Fold<'b>| {
            b.store(e.p.partial, into + fold.row * plan.columns + fold.column, b.vector(&sums(fold)), Elem::F32);
            b.if_(fold.column.eq(0), || {
                let Part { high, total } = part(fold);
                let at = into + plan.group * plan.columns + fold.row * 2;
                b.store(e.p.partial, at, b.vector(&[high, total]), Elem::F32);
            });
        };
        b.if_else(is_all, || each(&result), || each(&hand_on));
    }

    /// The lane whose value is `distance` parts before the lane's own, and whether there is one among `of` parts.
    fn before(&self, distance: u32, of: u32) -> (V<'b>, V<'b>) {
        ((self.e.lane - distance as i32).max(0), (self.e.lane % of).ge(distance))
    }

    /// The largest of the lane's high and of those before it, among `of` parts, the first of distances being `step`.
    fn highest_so_far(&self, high: V<'b>, step: u32, of: u32) -> V<'b> {
        let distances = std::iter::successors(Some(step), |d| Some(2 * d)).take_while(|d| *d < of);
        distances.fold(high, |high, distance| {
            let (lane, exists) = self.before(distance, of);
            high.max(exists.select(high.shuffle(lane), LOWEST))
        })
    }

    /// What all that was folded before a part and the part are multiplied with, the part's total, and nothing; a lane
    /// each. `high` is that of all parts before these, and afterwards with these.
    fn factors(&self, part: Part<'b>, high: Var) -> [V<'b>; 4] {
        let b = self.b;
        let own = b.get(high);
        let after = own.max(self.highest_so_far(part.high, 1, PARTS));
        let (lane, exists) = self.before(1, PARTS);
        let before = exists.select(after.shuffle(lane), own);
        b.set(high, after.shuffle(self.e.lane | (PARTS as i32 - 1)));
        [power(before - after), power(part.high - after), part.total, b.f32(0.0)]
    }

    /// What a chunk and the part are multiplied with, the part's total, and, with the chunk's first part, what all before the
    /// chunk, with its second, what the chunk is multiplied with; a lane each. `high` as in [`Few::factors`].
    fn factors_by_chunk(&self, part: Part<'b>, high: Var) -> [V<'b>; 4] {
        let (b, lane) = (self.b, self.e.lane);
        let after = self.highest_so_far(part.high, 1, CHUNK);
        let (one, exists) = self.before(1, CHUNK);
        let before = exists.select(after.shuffle(one), LOWEST);
        let chunk = after.shuffle(lane | (CHUNK as i32 - 1));
        let own = b.get(high);
        let all_after = own.max(self.highest_so_far(chunk, CHUNK, PARTS));
        let (four, exists) = self.before(CHUNK, PARTS);
        let all_before = exists.select(all_after.shuffle(four), own);
        b.set(high, all_after.shuffle(lane | (PARTS as i32 - 1)));
        let of_chunk = (lane % CHUNK).eq(0).select(all_before, chunk) - all_after;
        [power(before - after), power(part.high - after), part.total, power(of_chunk)]
    }
}

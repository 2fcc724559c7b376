//! Attention of few tokens, each with tiles of its own.
//!
//! # How it works
//!
//! The tiles of a token and a head of keys and values are cut into *units*: tiles, chunks, spans, or all of them, whichever
//! is the largest that still fills the GPU; the blocks derive it from the positions, alike. Blocks take units in turn, with
//! the pieces of the next pages, of the next unit too, on their way to shared memory. A block has four warps: each computes
//! the scores of 16 of the tile's positions for the heads that share the keys, and sums a quarter of the values' columns for all
//! positions; between the two, warps exchange their largest scores, then their weights.
//!
//! What a unit gives, if it is not all, goes to global memory. The block that comes last to a span folds its units, the
//! one that comes last to a token's head its spans, in the order of the positions. So the way of cutting does not show.

mod meet;

use super::emit::{Emit, Factors, Part, Row, Weights};
use super::{Attend, CHUNK, PAGE, SPAN};
use crate::cuda::Device;
use crate::ir::{Builder, Cache as Caching, Elem, Kernel, Mem, Scalar, V, Var};
use crate::kernels::math::across_lanes;

/// Most tokens of a launch.
pub const MAX_TOKENS: u32 = 128;

/// Warps of a block.
const WARPS: u32 = 4;
/// Threads of a block.
const THREADS: u32 = WARPS * 32;
/// Pieces in shared memory, at most.
const STAGES: u32 = 3;
/// Base-2 logarithms of the tiles of a unit; the last stands for all.
const SHIFTS: [u32; 4] = [0, CHUNK.ilog2(), SPAN.ilog2(), 25];
/// Heads that the rows of a tensor-core operand hold: two planes each.
const ROWS: u32 = 8;
/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Blocks of the grid.
    pub blocks: u32,
    /// Pieces of the cache in shared memory.
    pub stages: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
    /// Units are chunks rather than tiles where there are at least so many.
    pub chunks: u32,
    /// Units are spans rather than chunks where there are at least so many.
    pub spans: u32,
    /// Units are whole contexts where there would be more spans.
    pub most: u32,
}

impl Launch {
    /// The launch for a GPU.
    pub fn choose(op: &Attend, device: &Device) -> Launch {
        let piece = op.cache.piece_bytes();
        let fits = |stages: u32, blocks: u32| {
            let bytes = stages * piece + EXTRA_BYTES;
            bytes <= device.shared_per_block && blocks * (bytes + 1024) <= device.shared_per_sm
        };
        let shapes = [(STAGES, 3), (2, 3), (STAGES, 2), (2, 2), (STAGES, 1), (2, 1), (1, 1)];
        let (stages, resident) = shapes.into_iter().find(|&(s, n)| fits(s, n)).unwrap_or((1, 1));
        // Registers for three blocks only where the sums of heads are few.
        let large = op.group() > ROWS || op.cache.columns() > 128;
        let resident = if large { resident.min(2) } else { resident };
        let blocks = device.sms * resident;
        Launch {
            blocks,
            stages,
            min_blocks: resident,
            chunks: device.sms * 3 / 2,
            spans: device.sms * 9 / 4,
            most: 16 * blocks,
        }
    }
}

/// Shared memory beside the pieces, at most.
const EXTRA_BYTES: u32 = 4 * (MAX_TOKENS + 16) + 4 * 4 * THREADS + 4 * WARPS * ROWS;

/// Elements of `partial` and `arrived` that a launch needs.
pub fn meeting_place(op: &Attend, launch: &Launch) -> (usize, usize) {
    let plan = Plan::new(op, launch);
    ((plan.capacity * plan.unit_words()) as usize, (plan.capacity + op.tokens * op.cache.kv_heads) as usize)
}

/// Sizes that follow from the operation.
struct Plan {
    /// Heads that share keys.
    group: u32,
    columns: u32,
    /// Units, at most, of which parts meet.
    capacity: u32,
}

impl Plan {
    fn new(op: &Attend, launch: &Launch) -> Plan {
        // Tiles are units only if there are few chunks, chunks only if there are few spans.
        let capacity = launch.most.max(CHUNK * launch.chunks).max(SPAN / CHUNK * launch.spans);
        Plan { group: op.group(), columns: op.cache.columns(), capacity }
    }

    /// Words of what a unit gives: sums, then highs and totals.
    fn unit_words(&self) -> u32 {
        self.group * self.columns + (2 * self.group).next_multiple_of(4)
    }
}

/// Makes the kernel; its parameters are those of [`Attend`].
///
/// # Panics
/// If there are more than [`MAX_TOKENS`] tokens, or heads that do not divide.
pub fn lower(op: &Attend, launch: &Launch) -> Kernel {
    assert!((1..=MAX_TOKENS).contains(&op.tokens), "tokens");
    assert!(op.heads.is_multiple_of(op.cache.kv_heads) && op.cache.head_dim.is_multiple_of(2), "heads");
    let cache = op.cache;
    let name =
        format!("attend_few_{}_{}x{}_p{}_b{}", op.heads, cache.kv_heads, cache.head_dim, cache.planes, op.tokens);
    let b = Builder::new(&name, [launch.blocks, 1], THREADS);
    b.doc(format!(
        "Attention of {} token(s), {} heads of {} on {} of keys and values of {} bits.",
        op.tokens,
        op.heads,
        cache.head_dim,
        cache.kv_heads,
        8 * cache.planes
    ));
    b.min_blocks(launch.min_blocks);
    b.dependent_launch();
    let plan = Plan::new(op, launch);
    let e = Emit::new(&b, op, launch.stages, THREADS, meeting_place(op, launch));
    let row_tiles = plan.group.div_ceil(ROWS);
    let few = Few {
        b: &b,
        launch,
        plan: &plan,
        starts: b.shared("starts", Elem::I32, op.tokens + 3),
        highest: b.shared("highest", Elem::F32, row_tiles * WARPS * ROWS),
        exchanged: b.shared("exchanged", Elem::U32, row_tiles * THREADS * 4),
        e,
    };
    few.kernel();
    b.finish()
}

struct Few<'b, 'a> {
    b: &'b Builder,
    e: Emit<'b, 'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    /// The first unit of each token, the number of all, the shift of units, and whether the block is the last to arrive.
    starts: Mem,
    /// Each warp's largest scores, by row tile, warp and row; where parts meet, the highs of rows.
    highest: Mem,
    /// Each warp's weights, by row tile and thread: operand words of both planes, and the total; where parts meet, factors
    /// of a row's parts.
    exchanged: Mem,
}

/// The units of a step.
struct Units<'b> {
    all: V<'b>,
    /// Base-2 logarithm of a unit's tiles.
    shift: V<'b>,
}

/// A token's head: where its units begin, and the tiles that it sees.
#[derive(Clone, Copy)]
struct Place<'b> {
    token: V<'b>,
    head: V<'b>,
    /// The first unit of the token, of head 0.
    start: V<'b>,
    /// First and last tile.
    tiles: [V<'b>; 2],
    position: V<'b>,
}

/// A unit.
struct Unit<'b> {
    place: Place<'b>,
    /// First tile, and past the last.
    tiles: [V<'b>; 2],
}

/// Where the next piece to be copied lies.
struct Next {
    unit: Var,
    tile: Var,
    /// Past the last tile that no kernel of the step writes to.
    old: Var,
    end: Var,
    head: Var,
    /// The first word of the sequence's row of the table.
    row: Var,
    page: Var,
}

/// Sums of rows in registers, by row tile.
struct Sums {
    rows: Vec<Row>,
    /// By row tile, then two for each eight columns.
    sums: Vec<Vec<Var>>,
}

impl<'b> Few<'b, '_> {
    fn kernel(&self) {
        let (b, e) = (self.b, &self.e);
        b.comment("What the step is cut into, and the first pieces, as far as no kernel of the step writes to them.");
        let block = b.special(crate::ir::Special::BlockX);
        let units = self.units();
        let next = self.begin(block, &units);
        let stages = self.launch.stages;
        let copied = b.var(b.i32(0));
        for i in 0..stages - 1 {
            b.if_(b.get(copied).eq(i as i32) & b.get(next.tile).lt(b.get(next.old)), || {
                self.copy(&next, b.i32(i as i32), &units);
                b.set(copied, b.i32(i as i32 + 1));
            });
        }
        b.grid_wait();
        b.grid_launch();
        let slot = b.var(b.i32(0));
        for i in 0..stages - 1 {
            b.if_(b.get(copied).le(i as i32), || self.copy(&next, b.i32(i as i32), &units));
            b.async_commit();
        }
        let sums: Vec<Sums> = (0..3).map(|_| self.sums()).collect();
        let [all, span, chunk] = &sums[..] else { unreachable!("three") };
        b.for_(block, units.all, self.launch.blocks, |unit| {
            let at = self.unit(unit, &units);
            let queries = self.queries(&at.place);
            sums.iter().for_each(|s| self.clear(s));
            b.for_(at.tiles[0], at.tiles[1], 1, |tile| {
                let now = b.get(slot);
                if stages == 1 {
                    b.barrier();
                    self.produce(&next, b.i32(0), &units);
                    b.async_wait(0);
                    b.barrier();
                } else {
                    b.async_wait(stages - 2);
                    b.barrier();
                    let free = now + (stages - 1);
                    self.produce(&next, free.ge(stages).select(free - stages, free), &units);
                    b.set(slot, now.eq(stages - 1).select(b.i32(0), now + 1));
                }
                self.tile(now * e.piece_words(), tile, &at.place, &queries, chunk);
                let end = (tile + 1).eq(at.tiles[1]);
                b.if_(((tile + 1) % CHUNK).eq(0) | end, || {
                    self.add(span, chunk);
                    self.clear(chunk);
                });
                b.if_(((tile + 1) % SPAN).eq(0) | end, || {
                    self.add(all, span);
                    self.clear(span);
                });
            });
            self.finish(unit, &units, &at.place, all);
        });
        e.fill_up(block, self.launch.blocks);
    }

    /// The first and the last tile of a token.
    fn tiles(&self, position: V<'b>) -> [V<'b>; 2] {
        let first = self.e.first(position).map_or(self.b.i32(0), |p| p / PAGE);
        [first, position / PAGE]
    }

    /// How the step is cut, the same in each block.
    fn units(&self) -> Units<'b> {
        let (b, e, tokens) = (self.b, &self.e, self.e.op.tokens);
        let kv_heads = e.op.cache.kv_heads;
        let count = |[first, last]: [V<'b>; 2], shift: V<'b>| ((last >> shift) - (first >> shift) + 1) * kv_heads;
        let shifts = SHIFTS.map(|s| b.i32(s as i32));
        // Of the numbers of chunks and of spans.
        let choose = |chunks: V<'b>, spans: V<'b>| {
            let small = chunks.ge(self.launch.chunks).select(shifts[1], shifts[0]);
            let large = spans.gt(self.launch.most).select(shifts[3], shifts[2]);
            spans.ge(self.launch.spans).select(large, small)
        };
        if tokens == 1 {
            let zero = b.i32(0);
            let live = e.int(e.p.slots, zero).ge(0);
            let tiles = self.tiles(e.int(e.p.positions, zero));
            let shift = choose(count(tiles, shifts[1]), count(tiles, shifts[2]));
            return Units { all: live.select(count(tiles, shift), 0), shift };
        }
        let groups = tokens.div_ceil(32);
        b.if_(e.warp.eq(0), || {
            let of_group = |g: u32| {
                let token = e.lane + g * 32;
                let within = token.min(tokens as i32 - 1);
                let live = e.int(e.p.slots, within).ge(0) & token.lt(tokens);
                (live, self.tiles(e.int(e.p.positions, within)))
            };
            let all: Vec<_> = (0..groups).map(of_group).collect();
            let total = |shift: V<'b>| {
                let own = all.iter().map(|(live, tiles)| live.select(count(*tiles, shift), 0));
                across_lanes(own.reduce(|a, b| a + b).expect("groups"), |a, b| a + b)
            };
            let shift = choose(total(shifts[1]), total(shifts[2]));
            let mut before = b.i32(0);
            for (g, (live, tiles)) in (0..).zip(&all) {
                let own = live.select(count(*tiles, shift), 0);
                let mut sum = own;
                for step in [1, 2, 4, 8, 16] {
                    let lower = sum.shuffle((e.lane - step).max(0));
                    sum = sum + e.lane.ge(step).select(lower, 0);
                }
                let token = e.lane + g * 32;
                b.if_(token.lt(tokens), || b.store(self.starts, token, before + sum - own, Elem::I32));
                before = before + sum.shuffle(b.i32(31));
            }
            b.if_(e.lane.eq(0), || {
                b.store(self.starts, b.i32(tokens as i32), before, Elem::I32);
                b.store(self.starts, b.i32(tokens as i32 + 1), shift, Elem::I32);
            });
        });
        b.barrier();
        let load = |i: u32| b.load(self.starts, b.i32(i as i32), Elem::I32);
        Units { all: load(tokens), shift: load(tokens + 1) }
    }

    /// Unit number `unit`, which exists.
    fn unit(&self, unit: V<'b>, units: &Units<'b>) -> Unit<'b> {
        let (b, e, tokens) = (self.b, &self.e, self.e.op.tokens);
        let (token, start) = if tokens == 1 {
            (b.i32(0), b.i32(0))
        } else {
            // The last token that begins at the unit or before.
            let at = b.var(b.i32(0));
            let mut step = tokens.next_power_of_two() / 2;
            while step > 0 {
                let to = b.get(at) + step;
                let begins = b.load(self.starts, to.min(tokens as i32 - 1), Elem::I32);
                let further = to.lt(tokens) & begins.le(unit);
                b.set(at, further.select(to, b.get(at)));
                step /= 2;
            }
            let at = b.get(at);
            (at, b.load(self.starts, at, Elem::I32))
        };
        let position = e.int(e.p.positions, token);
        let [first, last] = self.tiles(position);
        let within = unit - start;
        let (index, head) = (within / e.op.cache.kv_heads, within % e.op.cache.kv_heads);
        let index = (first >> units.shift) + index;
        let begin = first.max(index << units.shift);
        let end = (last + 1).min((index + 1) << units.shift);
        Unit { place: Place { token, head, start, tiles: [first, last], position }, tiles: [begin, end] }
    }

    /// Where the block's first piece lies.
    fn begin(&self, block: V<'b>, units: &Units<'b>) -> Next {
        let b = self.b;
        let var = || b.var(b.i32(0));
        let next =
            Next { unit: b.var(block), tile: var(), old: var(), end: var(), head: var(), row: var(), page: var() };
        b.if_(block.lt(units.all), || self.go_to(&next, block, units));
        next
    }

    fn go_to(&self, next: &Next, unit: V<'b>, units: &Units<'b>) {
        let (b, e) = (self.b, &self.e);
        let Unit { place, tiles: [first, end] } = self.unit(unit, units);
        let row = e.int(e.p.sequence, place.token) * e.p.stride;
        // Of the token's sequence the step writes positions that go on from each other, the token's among them.
        let first_written = (place.position - (e.op.tokens as i32 - 1)).max(0);
        b.set(next.tile, first);
        b.set(next.old, first_written / PAGE);
        b.set(next.end, end);
        b.set(next.head, place.head);
        b.set(next.row, row);
        b.set(next.page, e.int(e.p.table, row + first));
    }

    /// Starts copying the next piece, if there is one, into place `slot` of the ring: a group of copies.
    fn produce(&self, next: &Next, slot: V<'b>, units: &Units<'b>) {
        self.copy(next, slot, units);
        self.b.async_commit();
    }

    /// The same without ending the group.
    fn copy(&self, next: &Next, slot: V<'b>, units: &Units<'b>) {
        let (b, e) = (self.b, &self.e);
        b.if_(b.get(next.unit).lt(units.all), || {
            e.copy_piece(slot, b.get(next.page), b.get(next.head));
            let tile = b.get(next.tile) + 1;
            b.set(next.tile, tile);
            b.if_else(
                tile.lt(b.get(next.end)),
                || b.set(next.page, e.int(e.p.table, b.get(next.row) + tile)),
                || {
                    let unit = b.get(next.unit) + self.launch.blocks;
                    b.set(next.unit, unit);
                    b.if_(unit.lt(units.all), || self.go_to(next, unit, units));
                },
            );
        });
    }

    /// Row tiles, of [`ROWS`] heads each.
    fn row_tiles(&self) -> u32 {
        self.plan.group.div_ceil(ROWS)
    }

    /// Groups of eight columns that a warp sums.
    fn column_tiles(&self) -> u32 {
        self.plan.columns / 8 / WARPS
    }

    /// The lane's row of a row tile within the group; those beyond the last repeat it.
    fn row(&self, m: u32) -> V<'b> {
        let row = (self.e.lane >> 2) + m * ROWS;
        if self.plan.group.is_multiple_of(ROWS) { row } else { row.min(self.plan.group as i32 - 1) }
    }

    /// The head of queries that a row is of.
    fn head(&self, place: &Place<'b>, row: V<'b>) -> V<'b> {
        place.head * self.plan.group + row
    }

    /// The operands of the queries, by row tile and 32 columns, and the rows' scales.
    fn queries(&self, place: &Place<'b>) -> Vec<(Vec<[V<'b>; 4]>, V<'b>)> {
        let (b, e) = (self.b, &self.e);
        let of_tile = |m: u32| {
            let row = place.token * e.op.heads + self.head(place, self.row(m));
            let words = self.plan.columns / 4;
            let word = |plane: u32, i: u32| {
                let at = row * (2 * words) + (plane * words + i) + (e.lane & 3);
                b.load_as(e.p.queries, at, Elem::U32, 1, Caching::ReadOnly)
            };
            let operand = |s: u32| [word(0, s * 8), word(1, s * 8), word(0, s * 8 + 4), word(1, s * 8 + 4)];
            let scale = b.load_as(e.p.query_scale, row, Elem::F32, 1, Caching::ReadOnly);
            ((0..self.plan.columns / 32).map(operand).collect(), scale)
        };
        (0..self.row_tiles()).map(of_tile).collect()
    }

    fn sums(&self) -> Sums {
        let b = self.b;
        let of_tile = |_| (0..2 * self.column_tiles()).map(|_| b.var(b.f32(0.0))).collect();
        let rows = (0..self.row_tiles()).map(|_| self.e.row()).collect();
        Sums { rows, sums: (0..self.row_tiles()).map(of_tile).collect() }
    }

    fn clear(&self, sums: &Sums) {
        sums.rows.iter().for_each(|row| self.e.clear(*row));
        sums.sums.iter().flatten().for_each(|v| self.b.set(*v, self.b.f32(0.0)));
    }

    /// Folds `other` into `sums`.
    fn add(&self, sums: &Sums, other: &Sums) {
        for (m, row) in sums.rows.iter().enumerate() {
            let factors = self.e.fold(*row, self.e.part(other.rows[m]));
            for (own, other) in sums.sums[m].iter().zip(&other.sums[m]) {
                self.b.set(*own, factors.fold(self.b.get(*own), self.b.get(*other)));
            }
        }
    }

    /// Folds what the tile whose piece lies at word `piece` of the ring gives into `chunk`.
    fn tile(&self, piece: V<'b>, tile: V<'b>, place: &Place<'b>, queries: &[(Vec<[V<'b>; 4]>, V<'b>)], chunk: &Sums) {
        let (b, e) = (self.b, &self.e);
        let layout = &e.op.cache;
        let plane_words = layout.plane_bytes() / 4;
        // Positions of the warp's 16, for lane t counted from its own first.
        let warp_first = e.warp * 16;
        let lane_first = tile * PAGE + warp_first + (e.lane & 3) * 2;
        let last = place.position - lane_first;
        let first = e.first(place.position).map(|p| p - lane_first);
        let mut scores: Vec<Vec<V>> = vec![Vec::new(); queries.len()];
        let [two, four] = [2, 4].map(|count| e.cells(piece, count, warp_first, PAGE));
        for j in 0..2 {
            let mut high: Vec<V> = queries.iter().map(|_| self.high(true)).collect();
            let mut low: Vec<V> = queries.iter().map(|_| self.low(true)).collect();
            let row = warp_first + 8 * j;
            let units = layout.columns() / 16;
            for unit in (0..units).step_by(4) {
                let count = (units - unit).min(4);
                let cells = if count == 4 { four } else { two };
                for plane in 0..layout.planes {
                    let k = e.operand(cells, plane * plane_words + (unit * PAGE + 8 * j) * 4, count);
                    for (i, k) in (0..).zip(k.chunks_exact(2)) {
                        for (m, (q, _)) in queries.iter().enumerate() {
                            let sum = if plane == 0 { &mut high[m] } else { &mut low[m] };
                            *sum = b.mma_i8(true, q[(unit / 2 + i) as usize], [k[0], k[1]], *sum);
                        }
                    }
                }
            }
            let [key_scales, logarithms] = [0, 1].map(|i| e.numbers_at(piece, i, row));
            for (m, (_, scale)) in queries.iter().enumerate() {
                for i in 0..2 {
                    let sum = self.joined(high[m], low[m], i, true);
                    let score = e.score(sum, key_scales[i as usize], *scale, logarithms[i as usize]);
                    let position = (8 * j + i) as i32;
                    let score = e.seen(last.ge(position), score);
                    scores[m].push(first.map_or(score, |first| e.seen(first.le(position), score)));
                }
            }
        }
        let row_of_lane = e.lane >> 2;
        for (m, scores) in (0..).zip(&scores) {
            let most = e.largest(scores);
            b.if_((e.lane & 3).eq(0), || {
                b.store(self.highest, (e.warp + m * WARPS) * ROWS + row_of_lane, most, Elem::F32);
            });
        }
        b.barrier();
        let highs: Vec<V> = (0..queries.len() as u32)
            .map(|m| {
                let of_warp = |w: u32| b.load(self.highest, row_of_lane + (m * WARPS + w) * ROWS, Elem::F32);
                let high = e.high((0..WARPS).map(of_warp).reduce(V::max).expect("warps"));
                e.check(high);
                high
            })
            .collect();
        let inverses = [0, 8].map(|j| e.numbers_at(piece, 2, warp_first + j)).concat();
        for (m, (scores, high)) in (0..).zip(scores.iter().zip(&highs)) {
            let Weights { total, high, low } = e.weights(scores, *high, &inverses);
            let four = b.vector(&[high, low, total.bits(Scalar::U32), b.u32(0)]);
            b.store(self.exchanged, (e.thread + m * THREADS) * 4, four, Elem::U32);
        }
        b.barrier();
        let fold = |(m, (row, high)): (u32, (&Row, &V<'b>))| {
            let of_warp = |w: u32| {
                let at = (e.lane + (m * THREADS + w * 32)) * 4;
                b.load_as(self.exchanged, at, Elem::U32, 4, Caching::Default).lanes()
            };
            let warps: Vec<Vec<V>> = (0..WARPS).map(of_warp).collect();
            let total = e.total(warps.iter().map(|w| w[2].bits(Scalar::F32)));
            let factors = e.fold(*row, Part { high: *high, total });
            (factors, [0, 2].map(|s| [warps[s][0], warps[s][1], warps[s + 1][0], warps[s + 1][1]]))
        };
        let weights: Vec<(Factors, [[V; 4]; 2])> = (0..).zip(chunk.rows.iter().zip(&highs)).map(fold).collect();
        let (columns, tiles) = (self.plan.columns, self.column_tiles());
        let values = e.cells(piece + layout.values() / 4, 4, e.warp * (tiles * 8), columns);
        for c in 0..tiles {
            let mut high: Vec<V> = queries.iter().map(|_| self.high(false)).collect();
            let mut low: Vec<V> = queries.iter().map(|_| self.low(false)).collect();
            for plane in 0..layout.planes {
                let v = e.operand(values, plane * plane_words + 8 * c * 4, 4);
                for (m, (_, p)) in weights.iter().enumerate() {
                    let sum = if plane == 0 { &mut high[m] } else { &mut low[m] };
                    for (p, v) in p.iter().zip(v.chunks_exact(2)) {
                        *sum = b.mma_i8(false, *p, [v[0], v[1]], *sum);
                    }
                }
            }
            for (m, (factors, _)) in weights.iter().enumerate() {
                for i in 0..2 {
                    let sum = chunk.sums[m][(2 * c + i) as usize];
                    b.set(sum, factors.fold(b.get(sum), self.joined(high[m], low[m], i, false)));
                }
            }
            if c % 2 == 1 {
                e.settle();
            }
        }
    }

    /// An accumulator of products with high planes: rows of high planes start as their sums do, those of low planes as the
    /// first part of sums of a high and a low plane.
    fn high(&self, keys: bool) -> V<'b> {
        let (e, b) = (&self.e, self.b);
        let (high, none) = (e.of_high().lane(0), b.i32(0));
        let both = if e.op.cache.planes == 1 { e.of_both(keys).lane(0) } else { none };
        b.vector(&[high, high, both, both])
    }

    /// An accumulator of products with low planes; those of two low planes are left out.
    fn low(&self, keys: bool) -> V<'b> {
        self.e.of_both(keys)
    }

    /// The sum of component `i` of a row of high planes, and of what lies eight rows below.
    fn joined(&self, high: V<'b>, low: V<'b>, i: u32, keys: bool) -> V<'b> {
        let both = high.lane(i + 2);
        let both = if self.e.op.cache.planes == 2 { both + low.lane(i) } else { both };
        self.e.joined(high.lane(i), both, keys)
    }

    /// Writes what a unit gives: the result if it is all, or a part, which the last to come folds.
    fn finish(&self, unit: V<'b>, units: &Units<'b>, place: &Place<'b>, all: &Sums) {
        let (b, e) = (self.b, &self.e);
        let [first, last] = place.tiles.map(|t| t >> units.shift);
        b.if_else(
            first.eq(last),
            || {
                for (m, sums) in (0..).zip(&all.sums) {
                    let row = self.row(m);
                    let head = self.head(place, row);
                    let (factors, divisor) = self.closing(e.part(all.rows[m as usize]), head);
                    self.write(m, place, |c, i| {
                        let sum = self.closed(factors, b.get(sums[(2 * c + i) as usize]));
                        sum / divisor
                    });
                }
            },
            || {
                let at = unit * self.plan.unit_words();
                for (m, sums) in (0..).zip(&all.sums) {
                    let row = (e.lane >> 2) + m * ROWS;
                    let exists = row.lt(self.plan.group);
                    b.if_(exists, || {
                        for c in 0..self.column_tiles() {
                            let column = (e.warp * self.column_tiles() + c) * 8 + (e.lane & 3) * 2;
                            let two = [0, 1].map(|i| b.get(sums[(2 * c + i) as usize]));
                            b.store(e.p.partial, at + row * self.plan.columns + column, b.vector(&two), Elem::F32);
                        }
                        b.if_((e.lane & 3).eq(0) & e.warp.eq(0), || {
                            let Part { high, total } = e.part(all.rows[m as usize]);
                            let at = at + self.plan.group * self.plan.columns + row * 2;
                            b.store(e.p.partial, at, b.vector(&[high, total]), Elem::F32);
                        });
                    });
                }
                self.meet(units, place, unit);
            },
        );
    }

    /// The fold of a row's sink, and what its sums are divided by then.
    fn closing(&self, part: Part<'b>, head: V<'b>) -> (Option<Factors<'b>>, V<'b>) {
        let (b, e) = (self.b, &self.e);
        if !e.op.sinks {
            return (None, e.divisor(part.total));
        }
        let row = Row { high: b.var(part.high), total: b.var(part.total) };
        let factors = e.fold(row, e.sink(head));
        (Some(factors), e.divisor(b.get(row.total)))
    }

    fn closed(&self, factors: Option<Factors<'b>>, sum: V<'b>) -> V<'b> {
        factors.map_or(sum, |f| f.fold(sum, self.b.f32(0.0)))
    }

    /// Writes results of a row tile that the warp holds.
    fn write(&self, m: u32, place: &Place<'b>, result: impl Fn(u32, u32) -> V<'b>) {
        let (b, e, d) = (self.b, &self.e, self.e.op.cache.head_dim);
        let row = (e.lane >> 2) + m * ROWS;
        let first = (place.token * e.op.heads + self.head(place, row)) * d;
        b.if_(row.lt(self.plan.group), || {
            for c in 0..self.column_tiles() {
                let column = (e.warp * self.column_tiles() + c) * 8 + (e.lane & 3) * 2;
                let write = || b.store(e.p.y, first + column, b.vector(&[result(c, 0), result(c, 1)]), Elem::F32);
                if d == self.plan.columns { write() } else { b.if_(column.lt(d), write) }
            }
        });
    }
}

//! Attention of many tokens: tiles of queries that share keys.
//!
//! # How it works
//!
//! A block takes consecutive tokens of one sequence with the heads that share a head of keys and values: up to 16 rows of
//! queries a warp. It walks over the pages that they see, the next pieces being on their way to shared memory, with one
//! barrier a page. A warp computes the scores of its rows and all positions of the page, makes weights of them in the
//! registers that they lie in, which are the operand of the product with the values, and folds the sums to those of the
//! chunk in registers; chunks fold to spans in shared memory, spans where the results will be. So the order is that of the
//! positions, whatever tokens share a block.
//!
//! Which tokens share a block, the host says ([`tiles`]): those with most to see come first.

use super::emit::{Emit, Factors, Part, Row, Weights};
use super::{Attend, CHUNK, PAGE, SPAN};
use crate::cuda::Device;
use crate::ir::{Builder, Cache as Caching, Elem, Kernel, Mem, Special, V, Var};

/// Rows of queries of a warp.
const ROWS: u32 = 16;
/// Most columns of which a warp keeps its queries in registers.
const KEPT: u32 = 128;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Warps of a block.
    pub warps: u32,
    /// Pieces of the cache in shared memory.
    pub stages: u32,
}

impl Launch {
    /// The launch for a GPU.
    pub fn choose(op: &Attend, device: &Device) -> Launch {
        let wide = op.cache.columns() > KEPT;
        let bytes = |l: &Launch| l.stages * op.cache.piece_bytes() + l.warps * ROWS * op.cache.columns() * 4;
        let fits = |l: &Launch| bytes(l) <= device.shared_per_block && !(wide && l.warps > 4);
        let shapes = [(8, 3), (8, 2), (4, 3), (4, 2), (8, 1), (4, 1), (2, 1), (1, 1)];
        let shapes = shapes.map(|(warps, stages)| Launch { warps, stages });
        shapes.into_iter().find(fits).unwrap_or(Launch { warps: 1, stages: 1 })
    }

    /// Tokens of a tile, at most.
    pub fn tile_tokens(&self, op: &Attend) -> u32 {
        self.warps * ROWS / op.group()
    }

    /// Tiles of a step in which up to `chunks` sequences have tokens, at most.
    pub fn most_tiles(&self, op: &Attend, chunks: u32) -> u32 {
        op.tokens / self.tile_tokens(op) + chunks.min(op.tokens)
    }
}

/// Consecutive tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first of its tokens in the step.
    pub first: u32,
    /// How many they are.
    pub tokens: u32,
    /// The position of the first.
    pub position: u32,
}

/// The parameter `tiles`: pairs of a first token and a number of tokens, of up to `most` tokens each, those that see most
/// first; filled up with zeros to `len` pairs. `None` if there are more than `len`.
pub fn tiles(runs: &[Run], most: u32, len: u32) -> Option<Vec<i32>> {
    let mut tiles = Vec::new();
    for run in runs {
        for at in (0..run.tokens).step_by(most as usize) {
            let tokens = most.min(run.tokens - at);
            tiles.push((run.position + at + tokens, run.first + at, tokens));
        }
    }
    tiles.sort_unstable_by(|a, b| b.cmp(a));
    if tiles.len() > len as usize {
        return None;
    }
    let mut out: Vec<i32> =
        tiles.into_iter().flat_map(|(_, first, tokens)| [first.cast_signed(), tokens.cast_signed()]).collect();
    out.resize(2 * len as usize, 0);
    Some(out)
}

/// Makes the kernel, of `tiles` tiles; its parameters are those of [`Attend`].
///
/// # Panics
/// If heads do not divide, or more heads share keys than a block has rows.
pub fn lower(op: &Attend, launch: &Launch, tiles: u32) -> Kernel {
    assert!(op.heads.is_multiple_of(op.cache.kv_heads) && op.cache.head_dim.is_multiple_of(2), "heads");
    assert!(launch.tile_tokens(op) > 0, "a block without tokens");
    let cache = op.cache;
    let name =
        format!("attend_many_{}_{}x{}_p{}_b{}", op.heads, cache.kv_heads, cache.head_dim, cache.planes, op.tokens);
    let b = Builder::new(&name, [cache.kv_heads, tiles], launch.warps * 32);
    b.doc(format!(
        "Attention of {} token(s), {} heads of {} on {} of keys and values of {} bits, in {tiles} tile(s).",
        op.tokens,
        op.heads,
        cache.head_dim,
        cache.kv_heads,
        8 * cache.planes
    ));
    b.dependent_launch();
    let e = Emit::new(&b, op, launch.stages, launch.warps * 32, (0, 0));
    let kept = b.shared("spans", Elem::F32, launch.warps * 32 * sums_of(op) * 4);
    Many { b: &b, e, launch, kept, tiles }.kernel();
    b.finish()
}

/// Groups of eight columns, each four sums of a lane.
fn sums_of(op: &Attend) -> u32 {
    op.cache.head_dim.div_ceil(8)
}

struct Many<'b, 'a> {
    b: &'b Builder,
    e: Emit<'b, 'a>,
    launch: &'a Launch,
    /// Sums of spans: four words for each eight columns and thread.
    kept: Mem,
    tiles: u32,
}

/// A lane's two rows, eight apart.
struct Rows<'b> {
    /// Whether there is such a row.
    exist: [V<'b>; 2],
    token: [V<'b>; 2],
    head: [V<'b>; 2],
    position: [V<'b>; 2],
    scale: [V<'b>; 2],
}

/// The positions that a warp's rows have.
struct Reach<'b> {
    /// Whether it has rows.
    any: V<'b>,
    /// The lowest and the highest position of its tokens.
    positions: [V<'b>; 2],
}

/// The operands of a warp's queries of 32 columns: high plane, low plane.
type Queries<'b> = [[V<'b>; 4]; 2];

impl<'b> Many<'b, '_> {
    fn kernel(&self) {
        let (b, e) = (self.b, &self.e);
        b.grid_wait();
        b.grid_launch();
        let (head, tile) = (b.special(Special::BlockX), b.special(Special::BlockY));
        let kv_heads = e.op.cache.kv_heads;
        e.fill_up(tile * kv_heads + head, kv_heads * self.tiles);
        let (first, tokens) = (e.int(e.p.tiles, tile * 2), e.int(e.p.tiles, tile * 2 + 1));
        b.if_(tokens.gt(0), || self.walk(head, first, tokens));
    }

    /// The heads that share keys.
    fn group(&self) -> u32 {
        self.e.op.group()
    }

    fn rows(&self, head: V<'b>, first: V<'b>, tokens: V<'b>) -> Rows<'b> {
        let (b, e, group) = (self.b, &self.e, self.group());
        let row = [0, 8].map(|i| e.warp * ROWS + (e.lane >> 2) + i);
        let within = row.map(|r| r / group);
        let exist = within.map(|t| t.lt(tokens));
        let token = within.map(|t| first + t.min(tokens - 1));
        let heads = row.map(|r| head * group + r % group);
        let position = token.map(|t| e.int(e.p.positions, t));
        let scale = [0, 1]
            .map(|i| b.load_as(e.p.query_scale, token[i] * e.op.heads + heads[i], Elem::F32, 1, Caching::ReadOnly));
        Rows { exist, token, head: heads, position, scale }
    }

    fn reach(&self, first: V<'b>, tokens: V<'b>) -> Reach<'b> {
        let (e, group) = (&self.e, self.group());
        let of_row = |r: V<'b>| e.int(e.p.positions, first + (r / group).min(tokens - 1));
        let row = e.warp * ROWS;
        Reach { any: (row / group).lt(tokens), positions: [of_row(row), of_row(row + (ROWS - 1))] }
    }

    /// The queries of columns `32·s` and up.
    fn queries(&self, rows: &Rows<'b>, s: u32) -> Queries<'b> {
        let (b, e) = (self.b, &self.e);
        let words = e.op.cache.columns() / 4;
        let word = |row: usize, plane: u32, i: u32| {
            let at = (rows.token[row] * e.op.heads + rows.head[row]) * (2 * words);
            let at = at + (plane * words + s * 8 + i) + (e.lane & 3);
            b.load_as(e.p.queries, at, Elem::U32, 1, Caching::ReadOnly)
        };
        [0, 1].map(|plane| [word(0, plane, 0), word(1, plane, 0), word(0, plane, 4), word(1, plane, 4)])
    }

    fn walk(&self, head: V<'b>, first: V<'b>, tokens: V<'b>) {
        let (b, e, stages) = (self.b, &self.e, self.launch.stages);
        let none = b.f32(0.0);
        let [lowest, highest] = [first, first + tokens - 1].map(|t| e.int(e.p.positions, t));
        let from = e.first(lowest).map_or(b.i32(0), |p| p / PAGE);
        let to = highest / PAGE + 1;
        let table = e.int(e.p.sequence, first) * e.p.stride;
        let page = b.var(e.int(e.p.table, table + from));
        let produce = |slot: V<'b>, tile: V<'b>| {
            b.if_(tile.lt(to), || {
                e.copy_piece(slot, b.get(page), head);
                b.if_((tile + 1).lt(to), || b.set(page, e.int(e.p.table, table + tile + 1)));
            });
            b.async_commit();
        };
        (1..stages).for_each(|i| produce(b.i32(i as i32 - 1), from + (i - 1)));

        let rows = self.rows(head, first, tokens);
        let reach = self.reach(first, tokens);
        let columns = e.op.cache.columns();
        let kept = columns <= KEPT;
        let queries: Vec<Queries> =
            if kept { (0..columns / 32).map(|s| self.queries(&rows, s)).collect() } else { vec![] };
        let [all, span, chunk] = [0, 1, 2].map(|_| [e.row(), e.row()]);
        let sums: Vec<Var> = (0..4 * sums_of(e.op)).map(|_| b.var(none)).collect();
        let slot = b.var(b.i32(0));
        b.for_(from, to, 1, |tile| {
            let now = b.get(slot);
            if stages == 1 {
                b.barrier();
                produce(b.i32(0), tile);
                b.async_wait(0);
                b.barrier();
            } else {
                b.async_wait(stages - 2);
                b.barrier();
                let free = now + (stages - 1);
                produce(free.ge(stages).select(free - stages, free), tile + (stages - 1));
                b.set(slot, now.eq(stages - 1).select(b.i32(0), now + 1));
            }
            let position = tile * PAGE;
            let reached = reach.any & reach.positions[1].ge(position);
            let reached = match e.first(reach.positions[0]) {
                None => reached,
                Some(first) => reached & first.lt(position + PAGE as i32),
            };
            b.if_(reached, || {
                let piece = now * e.piece_words();
                self.tile(piece, position, &rows, &reach, &queries, &chunk, &sums);
            });
            let last = (tile + 1).eq(to);
            b.if_(((tile + 1) % CHUNK).eq(0) | last, || {
                let begins = (tile / CHUNK).eq((tile / SPAN * SPAN).max(from) / CHUNK);
                self.add_chunk(begins, &span, &chunk, &sums);
            });
            b.if_(((tile + 1) % SPAN).eq(0) | last, || {
                let begins = (tile / SPAN).eq(from / SPAN);
                self.add_span(begins, last, &rows, &all, &span);
            });
        });
    }

    /// Folds what a tile gives, whose piece lies at word `piece` of the ring and whose first position is `position`, into a
    /// chunk.
    #[expect(clippy::too_many_arguments, reason = "all that the loop over tiles keeps")]
    fn tile(
        &self,
        piece: V<'b>,
        position: V<'b>,
        rows: &Rows<'b>,
        reach: &Reach<'b>,
        kept: &[Queries<'b>],
        chunk: &[Row; 2],
        sums: &[Var],
    ) {
        let (b, e) = (self.b, &self.e);
        let layout = &e.op.cache;
        let plane_words = layout.plane_bytes() / 4;
        let units = layout.columns() / 16;
        // By row, two of each eight positions.
        let scores: [Vec<Var>; 2] = [0, 1].map(|_| (0..PAGE / 4).map(|_| b.var(b.f32(0.0))).collect());
        let [two, four] = [2, 4].map(|count| e.cells(piece, count, b.i32(0), PAGE));
        for j in 0..PAGE / 8 {
            let (mut high, mut both) = (e.of_high(), e.of_both(true));
            for unit in (0..units).step_by(4) {
                let count = (units - unit).min(4);
                let cells = if count == 4 { four } else { two };
                let operand = |plane: u32| e.operand(cells, plane * plane_words + (unit * PAGE + 8 * j) * 4, count);
                let planes: Vec<Vec<V>> = (0..layout.planes).map(operand).collect();
                for i in 0..count / 2 {
                    let s = unit / 2 + i;
                    let q = kept.get(s as usize).copied().unwrap_or_else(|| self.queries(rows, s));
                    let k = |plane: usize| [planes[plane][2 * i as usize], planes[plane][2 * i as usize + 1]];
                    high = b.mma_i8(true, q[0], k(0), high);
                    both = b.mma_i8(true, q[1], k(0), both);
                    if layout.planes == 2 {
                        both = b.mma_i8(true, q[0], k(1), both);
                    }
                }
            }
            let [key_scales, logarithms] = [0, 1].map(|i| e.numbers(piece, i, j));
            for (c, both) in both.lanes().into_iter().enumerate() {
                let (row, i) = (c / 2, c % 2);
                let sum = e.joined(high.lane(c as u32), both, true);
                let score = e.score(sum, key_scales[i], rows.scale[row], logarithms[i]);
                b.set(scores[row][2 * j as usize + i], score);
            }
            if j % 2 == 1 {
                e.settle();
            }
        }
        // Tiles of which a row does not see all.
        let edge = reach.positions[0].lt(position + (PAGE as i32 - 1));
        let edge = match e.first(reach.positions[1]) {
            None => edge,
            Some(first) => edge | first.gt(position),
        };
        b.if_(edge, || {
            for (row, scores) in scores.iter().enumerate() {
                let lane_first = position + (e.lane & 3) * 2;
                let last = rows.position[row] - lane_first;
                let first = e.first(rows.position[row]).map(|p| p - lane_first);
                for (k, score) in (0i32..).zip(scores) {
                    let at = k / 2 * 8 + k % 2;
                    let seen = e.seen(last.ge(at), b.get(*score));
                    b.set(*score, first.map_or(seen, |first| e.seen(first.le(at), seen)));
                }
            }
        });
        let highs = scores.each_ref().map(|scores| {
            let high = e.high(e.largest(&scores.iter().map(|s| b.get(*s)).collect::<Vec<_>>()));
            e.check(high);
            high
        });
        let mut weights: [Vec<Weights>; 2] = [Vec::new(), Vec::new()];
        for i in 0..PAGE as usize / 16 {
            let inverses = [0, 1].map(|j| e.numbers(piece, 2, 2 * i as u32 + j)).concat();
            for (row, weights) in weights.iter_mut().enumerate() {
                let scores: Vec<V> = scores[row][4 * i..][..4].iter().map(|s| b.get(*s)).collect();
                weights.push(e.weights(&scores, highs[row], &inverses));
            }
            e.settle();
        }
        let factors = [0, 1].map(|row: usize| {
            let total = e.total(weights[row].iter().map(|w| w.total));
            e.fold(chunk[row], Part { high: highs[row], total })
        });
        let operand = |low: bool, s: usize| {
            let word = |row: usize, i: usize| if low { weights[row][i].low } else { weights[row][i].high };
            [word(0, 2 * s), word(1, 2 * s), word(0, 2 * s + 1), word(1, 2 * s + 1)]
        };
        let values = e.cells(piece + layout.values() / 4, 4, b.i32(0), layout.columns());
        for c in 0..sums_of(e.op) {
            let (mut high, mut both) = (e.of_high(), e.of_both(false));
            let planes: Vec<Vec<V>> =
                (0..layout.planes).map(|plane| e.operand(values, plane * plane_words + 8 * c * 4, 4)).collect();
            for s in 0..2 {
                let v = |plane: usize| [planes[plane][2 * s], planes[plane][2 * s + 1]];
                high = b.mma_i8(false, operand(false, s), v(0), high);
                both = b.mma_i8(false, operand(true, s), v(0), both);
                if layout.planes == 2 {
                    both = b.mma_i8(false, operand(false, s), v(1), both);
                }
            }
            for (i, both) in both.lanes().into_iter().enumerate() {
                let var = sums[4 * c as usize + i];
                let sum = e.joined(high.lane(i as u32), both, false);
                b.set(var, factors[i / 2].fold(b.get(var), sum));
            }
            if c % 2 == 1 {
                e.settle();
            }
        }
    }

    /// Where the four span sums of group `c` of columns of this thread lie.
    fn place(&self, c: u32) -> V<'b> {
        (self.e.thread + c * (self.launch.warps * 32)) * 4
    }

    /// Folds the chunk into the span, which is nothing yet if it `begins`, and makes the chunk nothing.
    fn add_chunk(&self, begins: V<'b>, span: &[Row; 2], chunk: &[Row; 2], sums: &[Var]) {
        let (b, e) = (self.b, &self.e);
        let none = b.f32(0.0);
        let factors = [0, 1].map(|row| e.fold(span[row], e.part(chunk[row])));
        for (c, sums) in (0..).zip(sums.chunks_exact(4)) {
            let before: Vec<Var> = sums.iter().map(|_| b.var(none)).collect();
            b.if_(!begins, || {
                let loaded = b.load_as(self.kept, self.place(c), Elem::F32, 4, Caching::Default);
                before.iter().zip(loaded.lanes()).for_each(|(v, x)| b.set(*v, x));
            });
            let folded: Vec<V> = (0..4).map(|i| factors[i / 2].fold(b.get(before[i]), b.get(sums[i]))).collect();
            b.store(self.kept, self.place(c), b.vector(&folded), Elem::F32);
            sums.iter().for_each(|v| b.set(*v, none));
            e.settle();
        }
        chunk.iter().for_each(|row| e.clear(*row));
    }

    /// Folds the span into all, which is nothing yet if it `begins`, and makes the span nothing; the `last` gives results.
    fn add_span(&self, begins: V<'b>, last: V<'b>, rows: &Rows<'b>, all: &[Row; 2], span: &[Row; 2]) {
        let (b, e, d) = (self.b, &self.e, self.e.op.cache.head_dim);
        let none = b.f32(0.0);
        let factors = [0, 1].map(|row| e.fold(all[row], e.part(span[row])));
        span.iter().for_each(|row| e.clear(*row));
        // What sums and sinks are multiplied with in the end, and what divides them.
        let closing = [0, 1].map(|row| {
            let part = e.part(all[row]);
            if !e.op.sinks {
                return (None, e.divisor(part.total));
            }
            let with_sink = Row { high: b.var(part.high), total: b.var(part.total) };
            let factors: Factors = e.fold(with_sink, e.sink(rows.head[row]));
            (Some(factors), e.divisor(b.get(with_sink.total)))
        });
        for c in 0..sums_of(e.op) {
            let sums = b.load_as(self.kept, self.place(c), Elem::F32, 4, Caching::Default).lanes();
            for row in 0..2 {
                let column = (e.lane & 3) * 2 + 8 * c;
                let exists = if (c + 1) * 8 <= d { rows.exist[row] } else { rows.exist[row] & column.lt(d) };
                b.if_(exists, || {
                    let at = (rows.token[row] * e.op.heads + rows.head[row]) * d + column;
                    let before = [b.var(none), b.var(none)];
                    b.if_(!begins, || {
                        let loaded = b.load_as(e.p.y, at, Elem::F32, 2, Caching::Default);
                        before.iter().zip(loaded.lanes()).for_each(|(v, x)| b.set(*v, x));
                    });
                    let folded = [0, 1].map(|i| b.var(factors[row].fold(b.get(before[i]), sums[2 * row + i])));
                    b.if_(last, || {
                        let (sink, divisor) = closing[row];
                        for v in folded {
                            let sum = sink.map_or(b.get(v), |f| f.fold(b.get(v), none));
                            b.set(v, sum / divisor);
                        }
                    });
                    b.store(e.p.y, at, b.vector(&folded.map(|v| b.get(v))), Elem::F32);
                });
            }
            e.settle();
        }
    }
}

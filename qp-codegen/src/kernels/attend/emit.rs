//! What both kernels are made of: parameters, scores, weights, sums of tiles and how they fold.

use super::{Attend, HIGHEST, LOWEST, PAGE, SMALLEST, UNSEEN, WEIGHT_ONE};
use crate::ir::{Builder, Cache as Caching, Elem, Mem, Scalar, Special, V, Var};
use crate::kernels::math::{exp2, power, weight, whole};

/// Sums of bytes' products start here where they are read as floats: 1.5 · 2^23, whose last 22 bits count.
pub(super) const BIAS: f32 = 12_582_912.0;

/// Largest sum that [`BIAS`] leaves room for.
const MOST: u32 = 1 << 22;

/// The kernels' parameters.
pub(super) struct Params<'b> {
    pub queries: Mem,
    pub query_scale: Mem,
    pub sinks: Mem,
    pub positions: Mem,
    pub sequence: Mem,
    pub slots: Mem,
    pub table: Mem,
    pub tiles: Mem,
    pub stride: V<'b>,
    pub cache: Mem,
    pub y: Mem,
    pub partial: Mem,
    pub arrived: Mem,
    pub faults: Mem,
    pub layer: V<'b>,
}

/// What a lowering in progress knows.
pub(super) struct Emit<'b, 'a> {
    pub b: &'b Builder,
    pub op: &'a Attend,
    pub p: Params<'b>,
    /// Pieces of the cache in shared memory.
    pub ring: Mem,
    pub thread: V<'b>,
    pub lane: V<'b>,
    pub warp: V<'b>,
    threads: u32,
}

/// The high and the total of a row of queries.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub high: Var,
    pub total: Var,
}

/// What a tile gives a row, or what a fold takes.
#[derive(Clone, Copy)]
pub(super) struct Part<'b> {
    pub high: V<'b>,
    pub total: V<'b>,
}

/// The weights of 16 positions of a row.
pub(super) struct Weights<'b> {
    /// The lane's part of the total.
    pub total: V<'b>,
    /// Operand words of the planes.
    pub high: V<'b>,
    pub low: V<'b>,
}

/// What sums are multiplied with when they fold: those that were, and those that come.
#[derive(Clone, Copy)]
pub(super) struct Factors<'b> {
    pub own: V<'b>,
    pub other: V<'b>,
}

impl<'b> Factors<'b> {
    /// A sum and one that comes, folded.
    pub fn fold(self, own: V<'b>, other: V<'b>) -> V<'b> {
        other.fma(self.other, own * self.own)
    }
}

impl<'b, 'a> Emit<'b, 'a> {
    /// Declares parameters and `stages` pieces in shared memory. `meeting_place` is how many elements of `partial` and
    /// `arrived` the kernel uses.
    pub fn new(b: &'b Builder, op: &'a Attend, stages: u32, threads: u32, meeting_place: (usize, usize)) -> Self {
        let rows = u64::from(op.tokens) * u64::from(op.heads);
        let p = Params {
            queries: b.sized("queries", Elem::I8, false, rows * 2 * u64::from(op.cache.columns())),
            query_scale: b.sized("query_scale", Elem::F32, false, rows),
            sinks: b.sized("sinks", Elem::F32, false, if op.sinks { op.heads.into() } else { 0 }),
            positions: b.sized("positions", Elem::I32, false, op.tokens.into()),
            sequence: b.sized("sequence", Elem::I32, false, op.tokens.into()),
            slots: b.sized("slots", Elem::I32, false, op.tokens.into()),
            table: b.buffer("table", Elem::I32, false),
            tiles: b.buffer("tiles", Elem::I32, false),
            stride: b.scalar("stride", Scalar::I32),
            cache: b.buffer("cache", Elem::U8, false),
            y: b.sized("y", Elem::F32, true, rows * u64::from(op.cache.head_dim)),
            partial: b.sized("partial", Elem::F32, true, meeting_place.0 as u64),
            arrived: b.sized("arrived", Elem::I32, true, meeting_place.1 as u64),
            faults: b.buffer("faults", Elem::I32, true),
            layer: b.scalar("layer", Scalar::I32),
        };
        let ring = b.shared("ring", Elem::U32, stages * op.cache.piece_bytes() / 4);
        let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
        Emit { b, op, p, ring, thread, lane, warp, threads }
    }

    /// Words of a piece.
    pub fn piece_words(&self) -> u32 {
        self.op.cache.piece_bytes() / 4
    }

    /// Reads an `i32` that nobody writes.
    pub fn int(&self, mem: Mem, at: V<'b>) -> V<'b> {
        self.b.load_as(mem, at, Elem::I32, 1, Caching::ReadOnly)
    }

    /// Starts copying a page's piece of a head into place `slot` of the ring.
    pub fn copy_piece(&self, slot: V<'b>, page: V<'b>, head: V<'b>) {
        let (b, threads) = (self.b, self.threads);
        let cells = self.op.cache.piece_bytes() / 16;
        let from = (page * self.op.cache.kv_heads + head) * cells + self.thread;
        let to = slot * cells + self.thread;
        let (whole, rest) = (cells / threads, cells % threads);
        let copy = |i: u32| b.async_copy(self.ring, to + i * threads, self.p.cache, from + i * threads, 16);
        (0..whole).for_each(copy);
        if rest > 0 {
            b.if_(self.thread.lt(rest), || copy(whole));
        }
    }

    /// Zeros for the tokens that fill up the step, shared among the blocks, of which this is number `block` of `blocks`.
    pub fn fill_up(&self, block: V<'b>, blocks: u32) {
        let (b, row) = (self.b, self.op.heads * self.op.cache.head_dim);
        b.for_(block, self.op.tokens, blocks, |token| {
            b.if_(self.int(self.p.slots, token).lt(0), || {
                b.for_(self.thread, row, self.threads, |i| {
                    b.store(self.p.y, token * row + i, b.f32(0.0), Elem::F32);
                });
            });
        });
    }

    /// Whether sums of high and low planes leave [`BIAS`]'s room: then they start at 0 and are converted.
    fn wide(&self) -> bool {
        2 * 127 * 128 * self.op.cache.columns() > MOST
    }

    /// What an accumulator of products of high planes starts with.
    pub fn of_high(&self) -> V<'b> {
        let bias = self.b.i32(BIAS.to_bits() as i32);
        self.b.vector(&[bias; 4])
    }

    /// What accumulators of products of a high and a low plane start with: of keys, or of values.
    pub fn of_both(&self, keys: bool) -> V<'b> {
        if keys && self.wide() { self.b.vector(&[self.b.i32(0); 4]) } else { self.of_high() }
    }

    /// The sum `256·high + both`, rounded once, of what [`Emit::of_high`] and [`Emit::of_both`] began.
    pub fn joined(&self, high: V<'b>, both: V<'b>, keys: bool) -> V<'b> {
        let high = high.bits(Scalar::F32).fma(256.0, -256.0 * BIAS);
        let both = if keys && self.wide() { both.to(Scalar::F32) } else { both.bits(Scalar::F32) - BIAS };
        high + both
    }

    /// Numbers `i` of the two positions `2t`, `2t + 1` from `position` on, of the piece at word `piece`: scale of the key,
    /// logarithm of the value's scale, its inverse.
    pub fn numbers_at(&self, piece: V<'b>, i: u32, position: V<'b>) -> Vec<V<'b>> {
        let at = piece + (self.op.cache.scales() / 4 + i * PAGE) + position + (self.lane & 3) * 2;
        self.b.load_as(self.ring, at, Elem::F32, 2, Caching::Default).lanes()
    }

    /// The same of eight positions `j`.
    pub fn numbers(&self, piece: V<'b>, i: u32, j: u32) -> Vec<V<'b>> {
        self.numbers_at(piece, i, self.b.i32(8 * j as i32))
    }

    /// The score of an integer sum.
    pub fn score(&self, sum: V<'b>, key_scale: V<'b>, scale: V<'b>, logarithm: V<'b>) -> V<'b> {
        let scaled = sum * key_scale;
        match self.op.soft_cap {
            None => scaled.fma(scale, logarithm),
            Some(cap) => {
                let (factor, cap) = super::reference::soft_cap_constants(cap);
                let e = exp2(self.b, (scaled * scale * factor).max(-100.0).min(100.0));
                self.b.f32(cap) - self.b.f32(cap + cap) / (e + 1.0) + logarithm
            }
        }
    }

    /// The word of the ring that a lane names for [`Emit::operand`]: of `count` (2 or 4) units of 16 bytes of 8 rows from `row`
    /// on, in a plane at word `plane` whose units are `rows` rows. Operands at constant distances have it in common, so that
    /// their places cost nothing.
    pub fn cells(&self, plane: V<'b>, count: u32, row: V<'b>, rows: u32) -> V<'b> {
        let matrix = (self.lane >> 3) & (count as i32 - 1);
        (plane + (matrix * rows + (self.lane & 7) + row) * 4).named("cells")
    }

    /// The operand that `ldmatrix` makes of `count` units, `words` behind those that `cells` names.
    pub fn operand(&self, cells: V<'b>, words: u32, count: u32) -> Vec<V<'b>> {
        self.b.load_matrix(self.ring, cells + words, count).lanes()
    }

    /// The largest of a row's scores, of which four lanes have some each.
    pub fn largest(&self, scores: &[V<'b>]) -> V<'b> {
        let most = scores.iter().copied().reduce(V::max).expect("scores");
        let most = most.max(most.shuffle_xor(1));
        most.max(most.shuffle_xor(2))
    }

    /// The high of a tile whose largest score is `most`.
    pub fn high(&self, most: V<'b>) -> V<'b> {
        whole(most + 0.5).max(LOWEST)
    }

    /// Notes a fault unless a high is one that numbers have; that of a tile of which nothing is seen is none.
    pub fn check(&self, high: V<'b>) {
        let b = self.b;
        let fine = high.abs().lt(HIGHEST) | high.eq(LOWEST);
        b.if_(!fine, || b.store(self.p.faults, self.p.layer, b.i32(1), Elem::I32));
    }

    /// The weights of four scores of a row, the lane's of 16 positions, of which `inverses` are those of the values' scales:
    /// what they add to the total, and the operand words of the two planes.
    pub fn weights(&self, scores: &[V<'b>], high: V<'b>, inverses: &[V<'b>]) -> Weights<'b> {
        let b = self.b;
        let weights = [0, 1, 2, 3].map(|k| weight(b, scores[k] - high, SMALLEST));
        let total = weights.iter().zip(inverses).fold(b.f32(0.0), |sum, (w, inverse)| w.fma(*inverse, sum));
        let [w, x, y, z] = weights.map(|w| w.fma(WEIGHT_ONE, BIAS).bits(Scalar::U32));
        let (first, second) = (w.permute(x, 0x5410), y.permute(z, 0x5410));
        Weights { total, high: first.permute(second, 0x7531), low: first.permute(second, 0x6420) }
    }

    /// A row's total of a tile, from what each 16 positions of the lane give.
    pub fn total(&self, sixteens: impl IntoIterator<Item = V<'b>>) -> V<'b> {
        let own = sixteens.into_iter().reduce(|a, b| a + b).expect("positions");
        let pair = own + own.shuffle_xor(1);
        pair + pair.shuffle_xor(2)
    }

    /// Keeps the compiler from loading far ahead, for which there are no registers.
    pub fn settle(&self) {
        self.b.warp_sync();
    }

    /// A row of nothing.
    pub fn row(&self) -> Row {
        Row { high: self.b.var(self.b.f32(LOWEST)), total: self.b.var(self.b.f32(0.0)) }
    }

    /// Makes it nothing again.
    pub fn clear(&self, row: Row) {
        self.b.set(row.high, self.b.f32(LOWEST));
        self.b.set(row.total, self.b.f32(0.0));
    }

    /// What the row holds.
    pub fn part(&self, row: Row) -> Part<'b> {
        Part { high: self.b.get(row.high), total: self.b.get(row.total) }
    }

    /// Folds a part into a row; gives what sums are multiplied with.
    pub fn fold(&self, row: Row, part: Part<'b>) -> Factors<'b> {
        let b = self.b;
        let own = self.part(row);
        let high = own.high.max(part.high);
        let factors = Factors { own: power(own.high - high), other: power(part.high - high) };
        b.set(row.high, high);
        b.set(row.total, factors.fold(own.total, part.total));
        factors
    }

    /// The part that the sink of a head gives.
    pub fn sink(&self, head: V<'b>) -> Part<'b> {
        let score = self.b.load_as(self.p.sinks, head, Elem::F32, 1, Caching::ReadOnly) * std::f32::consts::LOG2_E;
        let high = whole(score + 0.5).max(LOWEST);
        self.check(high);
        Part { high, total: weight(self.b, score - high, SMALLEST) }
    }

    /// What the sums of a row are divided by in the end.
    pub fn divisor(&self, total: V<'b>) -> V<'b> {
        total * self.op.one()
    }

    /// `score` where the position is seen.
    pub fn seen(&self, seen: V<'b>, score: V<'b>) -> V<'b> {
        seen.select(score, UNSEEN)
    }

    /// The first position that a token at `position` sees, if not all.
    pub fn first(&self, position: V<'b>) -> Option<V<'b>> {
        self.op.window.map(|w| (position + (1 - w as i32)).max(0))
    }
}

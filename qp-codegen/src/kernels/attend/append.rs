//! The keys and values of a step's tokens, turned by their positions and rounded, put into the cache; their queries,
//! turned and rounded.

use super::{Cache, INVERSE_QUARTERS, LARGEST_OF_TWO_PLANES, PAGE, QUARTERS, SCALE_RANGE};
use crate::ir::{Builder, Cache as Caching, Elem, Kernel, Mem, Scalar, Special, V};
use crate::kernels::Span;
use crate::kernels::math::across_lanes;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Append {
    /// The cache.
    pub cache: Cache,
    /// Heads of queries.
    pub heads: u32,
    /// Tokens of the step, those that fill it up included.
    pub tokens: u32,
    /// Where a token's queries lie, head after head.
    pub q: Span,
    /// Where its keys lie.
    pub k: Span,
    /// Where its values lie.
    pub v: Span,
    /// Columns of a head, from the first on, that are turned; column `i` with `i + rotary / 2`.
    pub rotary: u32,
    /// True if neighbours turn together instead: column `2i` with `2i + 1`.
    pub interleaved: bool,
    /// Root-mean-square norm of each head of queries and keys before it is turned: its epsilon.
    pub norm: Option<f32>,
    /// What scores are multiplied with, often `1 / √head_dim`.
    pub scale: f32,
}

impl Append {
    /// What the scale of a query is multiplied with: scores are in base 2, and integer sums of two planes are over 256.
    pub(super) fn query_factor(&self) -> f32 {
        let factor = self.scale * std::f32::consts::LOG2_E;
        if self.cache.planes == 2 { factor * 256.0 } else { factor }
    }
}

/// Warps of a block, each with one head of queries, keys or values of a token.
const WARPS: u32 = 4;

/// Makes the kernel. Its parameters, in order:
///
/// * `q`, `k`, `v`: `f32`, often one buffer;
/// * `q_norm`, `k_norm`: `f32`, `head_dim` weights of the norms; read only if there is a norm;
/// * `cos`, `sin`: `f32`, positions × `rotary / 2`;
/// * `positions`: `i32`, one a token;
/// * `slots`: `i32`, one a token: `64 · page + offset` of its key and value; a token with a negative slot is left out;
/// * `cache`: `u8`, see [`Cache`];
/// * `queries`: `i8`, `tokens × heads × 2 × columns`, and `query_scale`: `f32`, `tokens × heads`;
/// * `faults`: `i32`, one a layer, set to 1 if a number is not finite (it counts as zero then);
/// * `layer`: `i32` scalar, which of `faults` is this layer's.
pub fn lower(op: &Append) -> Kernel {
    let Cache { kv_heads, head_dim, planes } = op.cache;
    assert!(op.rotary.is_multiple_of(2) && op.rotary <= head_dim && head_dim <= 256, "columns of a head");
    let vectors = op.heads + 2 * kv_heads;
    let name = format!("append_{}_{kv_heads}x{head_dim}_p{planes}_b{}", op.heads, op.tokens);
    let b = Builder::new(&name, [vectors.div_ceil(WARPS), op.tokens], WARPS * 32);
    b.doc(format!(
        "Queries, keys and values of {} token(s), {} and {kv_heads} heads of {head_dim}{}: turned, rounded, the latter two into a \
         cache of {} bits.",
        op.tokens,
        op.heads,
        if op.norm.is_some() { ", normed" } else { "" },
        8 * planes
    ));
    b.dependent_launch();
    let inputs = [("q", op.q, op.heads), ("k", op.k, kv_heads), ("v", op.v, kv_heads)];
    let [q, k, v] =
        inputs.map(|(name, span, heads)| b.sized(name, Elem::F32, false, span.len(op.tokens, heads * head_dim)));
    let weights = op.norm.map_or(0, |_| head_dim.into());
    let [q_norm, k_norm] = ["q_norm", "k_norm"].map(|name| b.sized(name, Elem::F32, false, weights));
    let [cos, sin] = ["cos", "sin"].map(|name| b.buffer(name, Elem::F32, false));
    let [positions, slots] = ["positions", "slots"].map(|name| b.sized(name, Elem::I32, false, op.tokens.into()));
    let cache = b.buffer("cache", Elem::U8, true);
    let rows = u64::from(op.tokens) * u64::from(op.heads);
    let queries = b.sized("queries", Elem::I8, true, rows * 2 * u64::from(op.cache.columns()));
    let query_scale = b.sized("query_scale", Elem::F32, true, rows);
    let faults = b.buffer("faults", Elem::I32, true);
    let layer = b.scalar("layer", Scalar::I32);
    let token = b.special(Special::BlockY);
    let lane = b.special(Special::Lane);
    let vector = b.special(Special::BlockX) * WARPS + b.special(Special::Warp);
    b.comment("Where the token belongs and how its columns turn: nothing of this is written by kernels before.");
    let slot = b.load_as(slots, token, Elem::I32, 1, Caching::ReadOnly);
    let position = b.load_as(positions, token, Elem::I32, 1, Caching::ReadOnly);
    let turns = turns(&b, op, lane, position, [cos, sin]);
    // The attention that follows finds out what there is to do, and copies old pieces, meanwhile.
    b.grid_launch();
    b.grid_wait();
    let emit = Emit { b: &b, op, lane, turns, faults, layer };
    b.if_(slot.ge(0) & vector.lt(vectors), || {
        let page = slot / PAGE;
        let piece = |head| page * kv_heads + head;
        let offset = slot % PAGE;
        b.if_else(
            vector.lt(op.heads),
            || {
                let x = emit.turned(q, op.q.at(token) + vector * head_dim, q_norm);
                let (most, inverse) = emit.scale(&x, LARGEST_OF_TWO_PLANES);
                let columns = op.cache.columns();
                let row = token * op.heads + vector;
                emit.rounded(&x, inverse, 2, |plane, i, byte| {
                    b.store(queries, (row * 2 + plane) * columns + i, byte, Elem::I8);
                });
                let scale = most / LARGEST_OF_TWO_PLANES * op.query_factor();
                b.if_(lane.eq(0), || b.store(query_scale, row, scale, Elem::F32));
            },
            || {
                b.if_else(
                    vector.lt(op.heads + kv_heads),
                    || {
                        let head = vector - op.heads;
                        let first = piece(head) * op.cache.piece_bytes();
                        let x = emit.turned(k, op.k.at(token) + head * head_dim, k_norm);
                        let (most, inverse) = emit.scale(&x, op.cache.largest());
                        let at = first + offset * 16;
                        emit.rounded(&x, inverse, planes, |plane, i, byte| {
                            let at = at + plane * op.cache.plane_bytes() + (i / 16 * (PAGE * 16) + i % 16);
                            b.store(cache, at, byte.bits(Scalar::U32), Elem::U8);
                        });
                        emit.number(cache, first, offset, 0, most / op.cache.largest());
                    },
                    || {
                        let head = vector - (op.heads + kv_heads);
                        let first = piece(head) * op.cache.piece_bytes();
                        let x = emit.values(v, op.v.at(token) + head * head_dim);
                        let (most, _) = emit.scale(&x, op.cache.largest());
                        let (logarithm, inverse) = value_scale(&b, most / op.cache.largest());
                        let within = offset % 16;
                        let place = within / 2 % 4 * 4 + within / 8 * 2 + within % 2;
                        let at = first + op.cache.values() + offset / 16 * (op.cache.columns() * 16) + place;
                        emit.rounded(&x, inverse, planes, |plane, i, byte| {
                            let at = at + plane * op.cache.plane_bytes() + i * 16;
                            b.store(cache, at, byte.bits(Scalar::U32), Elem::U8);
                        });
                        emit.number(cache, first, offset, 1, logarithm);
                        emit.number(cache, first, offset, 2, inverse);
                    },
                );
            },
        );
    });
    b.finish()
}

/// A lowering in progress: what all heads of a token share.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Append,
    lane: V<'b>,
    /// Of the lane's columns, from the first on, those among which some turn.
    turns: Vec<Turn<'b>>,
    faults: Mem,
    layer: V<'b>,
}

/// How a column turns.
struct Turn<'b> {
    /// Whether it does.
    rotates: V<'b>,
    /// Whether it is the first of its pair.
    low: V<'b>,
    /// The other column of the pair.
    partner: V<'b>,
    cos: V<'b>,
    sin: V<'b>,
}

/// The lane's columns of a head, 32 apart, with what each is (`None`: surely a column of the head).
fn columns<'b>(op: &Append, lane: V<'b>) -> Vec<(V<'b>, Option<V<'b>>)> {
    let d = op.cache.head_dim;
    let column = |r: u32| {
        let i = lane + 32 * r;
        (i, ((r + 1) * 32 > d).then(|| i.lt(d)))
    };
    (0..op.cache.columns() / 32).map(column).collect()
}

/// How the lane's columns turn at `position`. Column `i` turns with `i + half`, or with `i − half`; or with its neighbour.
fn turns<'b>(b: &'b Builder, op: &Append, lane: V<'b>, position: V<'b>, [cos, sin]: [Mem; 2]) -> Vec<Turn<'b>> {
    let (half, last) = (op.rotary / 2, op.cache.head_dim as i32 - 1);
    let turn = |(i, _): (V<'b>, Option<V<'b>>)| {
        let (low, pair, partner) = if op.interleaved {
            ((i & 1).eq(0), (i >> 1).min(half as i32 - 1), (i ^ 1).min(last))
        } else {
            let low = i.lt(half);
            (low, low.select(i, i - half).min(half as i32 - 1), low.select(i + half, i - half).min(last))
        };
        let angle = position * half + pair;
        let [cos, sin] = [cos, sin].map(|table| b.load_as(table, angle, Elem::F32, 1, Caching::ReadOnly));
        Turn { rotates: i.lt(op.rotary), low, partner, cos, sin }
    };
    columns(op, lane).into_iter().take(op.rotary.div_ceil(32) as usize).map(turn).collect()
}

impl<'b> Emit<'b, '_> {
    /// The lane's values of a head that begins at `first`; zero beyond its last column.
    fn values(&self, x: Mem, first: V<'b>) -> Vec<V<'b>> {
        let last = self.op.cache.head_dim as i32 - 1;
        let load = |(i, exists): (V<'b>, Option<V<'b>>)| match exists {
            None => self.b.load(x, first + i, Elem::F32),
            Some(exists) => exists.select(self.b.load(x, first + i.min(last), Elem::F32), 0.0),
        };
        columns(self.op, self.lane).into_iter().map(load).collect()
    }

    /// The same, normed and turned.
    fn turned(&self, x: Mem, first: V<'b>, norm: Mem) -> Vec<V<'b>> {
        let (b, op) = (self.b, self.op);
        let own = self.values(x, first);
        let factor = op.norm.map(|eps| {
            let sum = own.iter().fold(b.f32(0.0), |sum, &x| sum + x * x);
            let mean = across_lanes(sum, |a, b| a + b) / op.cache.head_dim as f32;
            b.f32(1.0) / (mean + eps).sqrt()
        });
        let normed = |x: V<'b>, i: V<'b>| match factor {
            None => x,
            Some(factor) => x * factor * b.load_as(norm, i, Elem::F32, 1, Caching::ReadOnly),
        };
        let last = op.cache.head_dim as i32 - 1;
        let turned = |(r, (i, exists)): (usize, (V<'b>, Option<V<'b>>))| {
            let own = normed(own[r], if exists.is_some() { i.min(last) } else { i });
            let Some(Turn { rotates, low, partner, cos, sin }) = self.turns.get(r) else { return own };
            let other = normed(b.load(x, first + *partner, Elem::F32), *partner);
            let (along, across) = (own * *cos, other * *sin);
            rotates.select(low.select(along - across, along + across), own)
        };
        (0..).zip(columns(self.op, self.lane)).map(turned).collect()
    }

    /// The largest magnitude of a head, and what its values are multiplied with to have `largest` as theirs. Numbers that are
    /// not finite are noted, and then all count as zero.
    fn scale(&self, x: &[V<'b>], largest: f32) -> (V<'b>, V<'b>) {
        let b = self.b;
        let bits = x.iter().map(|x| x.abs().bits(Scalar::I32)).reduce(V::max).expect("columns");
        let bits = across_lanes(bits, V::max);
        let finite = bits.lt(f32::INFINITY.to_bits() as i32);
        b.if_(self.lane.eq(0) & !finite, || b.store(self.faults, self.layer, b.i32(1), Elem::I32));
        let most = finite.select(bits.bits(Scalar::F32), 0.0);
        (most, most.gt(0.0).select((b.f32(largest) / most).min(f32::MAX), 0.0))
    }

    /// Hands the bytes of the rounded values to `store`: plane, column, byte.
    fn rounded(&self, x: &[V<'b>], inverse: V<'b>, planes: u32, store: impl Fn(u32, V<'b>, V<'b>)) {
        for (&x, (i, _)) in x.iter().zip(columns(self.op, self.lane)) {
            let q = (x * inverse).to(Scalar::I32);
            if planes == 2 {
                store(0, i, (q + 128) >> 8);
                store(1, i, q);
            } else {
                store(0, i, q);
            }
        }
    }

    /// Stores number `i` of a position of the piece at byte `first`.
    fn number(&self, cache: Mem, first: V<'b>, offset: V<'b>, i: u32, number: V<'b>) {
        let at = (first + (self.op.cache.scales() + i * PAGE * 4)) / 4 + offset;
        self.b.if_(self.lane.eq(0), || self.b.store(cache, at, number, Elem::F32));
    }
}

/// The twin of [`super::reference`]'s.
fn value_scale<'b>(b: &'b Builder, scale: V<'b>) -> (V<'b>, V<'b>) {
    let bits = scale.bits(Scalar::I32);
    let exponent = (bits >> 23) - 127;
    let mantissa = ((bits & 0x7f_ffff) | 0x3f80_0000).bits(Scalar::F32);
    let one = |q: &f32| mantissa.gt(*q).select(b.i32(1), 0);
    let quarters = QUARTERS.iter().map(one).reduce(|a, b| a + b).expect("four");
    let (exponent, quarter) = (exponent + quarters / 4, quarters % 4);
    let clamped = exponent.max(SCALE_RANGE.0).min(SCALE_RANGE.1);
    let quarter = clamped.eq(exponent).select(quarter, 0);
    let [rest @ .., last] = INVERSE_QUARTERS;
    let factor = (0..).zip(rest).fold(b.f32(last), |f, (i, inverse)| quarter.eq(i).select(b.f32(inverse), f));
    let inverse = factor * ((b.i32(127) - clamped) << 23).bits(Scalar::F32);
    (clamped.to(Scalar::F32) + quarter.to(Scalar::F32) * 0.25, inverse)
}

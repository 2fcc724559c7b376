//! A single token whose queries, keys and values the blocks turn and round themselves: a launch less.
//!
//! Each block rounds the queries of the heads whose unit it takes. The tile with the token's own position belongs to one unit of a
//! head: the block that takes it puts key and value into the piece in shared memory, and into the cache for the steps to come. So
//! all pieces may be copied before the kernel waits for the one before it.

use super::super::Append;
use super::super::LARGEST_OF_TWO_PLANES;
use super::super::append::{Heads, key_at, turns, value_at, value_scale};
use super::{Few, PAGE, Place, WARPS};
use crate::ir::{Builder, Elem, Mem, Scalar, V};

/// What is rounded, and how it turns: parameters.
pub(super) struct Inputs {
    q: Mem,
    k: Mem,
    v: Mem,
    norms: [Mem; 2],
    turns: [Mem; 2],
}

impl Inputs {
    pub fn declare(b: &Builder, op: &Append) -> Self {
        let (d, kv_heads) = (op.cache.head_dim, op.cache.kv_heads);
        let inputs = [("q", op.q, op.heads), ("k", op.k, kv_heads), ("v", op.v, kv_heads)];
        let [q, k, v] = inputs.map(|(name, span, heads)| b.sized(name, Elem::F32, false, span.len(1, heads * d)));
        let weights = op.norm.map_or(0, |_| d.into());
        let norms = ["q_norm", "k_norm"].map(|name| b.sized(name, Elem::F32, false, weights));
        Inputs { q, k, v, norms, turns: ["cos", "sin"].map(|name| b.buffer(name, Elem::F32, false)) }
    }
}

/// A token that the launch puts into the cache itself.
pub(super) struct Own<'b, 'a> {
    few: &'a Few<'b, 'a>,
    heads: Heads<'b, 'a>,
    inputs: Inputs,
    /// Where in its page the token lies, and which page that is.
    offset: V<'b>,
    page: V<'b>,
}

impl<'b, 'a> Own<'b, 'a> {
    /// Reads where the token belongs and how it turns, which no kernel before writes.
    pub fn new(few: &'a Few<'b, 'a>, op: &'a Append, inputs: Inputs) -> Self {
        let (b, e) = (few.b, &few.e);
        let zero = b.i32(0);
        // A token that only fills the step up has no unit.
        let slot = e.int(e.p.slots, zero).max(0);
        let turns = turns(b, op, e.lane, e.int(e.p.positions, zero), inputs.turns);
        let heads = Heads { b, op, lane: e.lane, turns, faults: e.p.faults, layer: e.p.layer };
        Own { few, heads, inputs, offset: slot % PAGE, page: slot / PAGE }
    }

    /// Rounds the queries of the heads that share a unit's keys into shared memory. A barrier must follow.
    pub fn queries(&self, place: &Place<'b>) {
        let (b, e, op) = (self.few.b, &self.few.e, self.heads.op);
        let (d, columns, group) = (op.cache.head_dim, op.cache.columns(), e.op.group());
        b.for_(e.warp, group, WARPS, |row| {
            let head = place.head * group + row;
            let x = self.heads.turned(self.inputs.q, head * d + op.q.first, self.inputs.norms[0]);
            let (most, inverse) = self.heads.scale(&x, LARGEST_OF_TWO_PLANES);
            self.heads.rounded(&x, inverse, 2, |plane, i, byte| {
                b.store(e.p.queries, (row * 2 + plane) * columns + i, byte, Elem::I8);
            });
            let scale = most / LARGEST_OF_TWO_PLANES * op.query_factor();
            b.if_(e.lane.eq(0), || b.store(e.p.query_scale, row, scale, Elem::F32));
        });
    }

    /// Puts the key and the value of a head into the cache, and into place `slot` of the ring, which holds the rest of the page. A
    /// barrier stands before and must follow.
    pub fn put(&self, slot: V<'b>, place: &Place<'b>) {
        let (b, e, op) = (self.few.b, &self.few.e, self.heads.op);
        let (cache, d) = (&op.cache, op.cache.head_dim);
        let places = [
            (e.p.cache, (self.page * cache.kv_heads + place.head) * cache.piece_bytes()),
            (e.ring, slot * cache.piece_bytes()),
        ];
        let byte = |at: V<'b>, byte: V<'b>| {
            for (mem, first) in places {
                b.store(mem, first + at, byte.bits(Scalar::U32), Elem::U8);
            }
        };
        let number = |i: u32, number: V<'b>| {
            places.into_iter().for_each(|(mem, first)| self.heads.number(mem, first, self.offset, i, number));
        };
        b.if_(e.warp.eq(0), || {
            let x = self.heads.turned(self.inputs.k, place.head * d + op.k.first, self.inputs.norms[1]);
            let (most, inverse) = self.heads.scale(&x, cache.largest());
            self.heads.rounded(&x, inverse, cache.planes, |plane, i, v| byte(key_at(cache, self.offset, plane, i), v));
            number(0, most / cache.largest());
        });
        b.if_(e.warp.eq(1), || {
            let x = self.heads.values(self.inputs.v, place.head * d + op.v.first);
            let (most, _) = self.heads.scale(&x, cache.largest());
            let (logarithm, inverse) = value_scale(b, most / cache.largest());
            self.heads
                .rounded(&x, inverse, cache.planes, |plane, i, v| byte(value_at(cache, self.offset, plane, i), v));
            number(1, logarithm);
            number(2, inverse);
        });
    }
}

//! Mixtures of experts: several feed-forward layers, of which each token goes through a few.
//!
//! A token and one of its experts are a **pair**: pair `t · chosen + j` is token `t` with the `j`-th of its experts, which are
//! in ascending order. Whatever experts compute has a row a pair, at the pair's own place.
//!
//! * [`route`] writes the experts and weights of each token.
//! * [`group`] sorts the pairs by their experts into **units**: up to so many pairs of one expert. A step of one token needs
//!   none, since each of its pairs is a unit.
//! * Products ([`super::product`], [`super::dense`]) take one unit along the second axis of their grid, of which there are as
//!   many as there could be; those that nothing is left for end at once. So nothing of a launch depends on the choice.
//! * [`unit`] is the gated unit where it cannot be part of [`super::prepare`], which takes pairs as it takes tokens.
//! * [`combine`] adds up what the experts of each token give.
//!
//! The matrices of experts with one quantizer lie one below the other, so that an expert is a distance. Experts of several
//! quantizers are several launches over the same units, of which each leaves out those of the others.
//!
//! Every result is that of its pair alone, so it depends neither on the units nor on the order in which they list pairs.

pub mod combine;
pub mod group;
pub mod route;
#[cfg(test)]
mod tests;
pub mod unit;

use crate::ir::{Builder, Cache, Elem, Mem, V};

/// Products of the experts of a mixture that one launch computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Experts {
    /// Experts of the mixture.
    pub count: u32,
    /// Those whose matrices the launch has, one below the other.
    pub matrices: u32,
    /// Rows of the inputs: tokens, which several pairs share, or the pairs themselves.
    pub rows: u32,
    /// Pairs, a multiple of the rows.
    pub pairs: u32,
    /// Most pairs of a unit. If it is 1, each pair is a unit.
    pub most: u32,
    /// Distance from one pair's outputs to the next one's.
    pub stride: u32,
}

/// Most pairs of a unit where there are many.
const MOST: u32 = 128;
/// Shared memory that a unit's pairs take, at most.
pub(super) const UNIT_BYTES: u32 = 4 * MOST;
/// Pairs of a unit that cost no more than one: their planes fill a tensor-core product.
const FEW: u32 = 4;

/// Pairs of a unit that suit a step of `tokens` tokens, each of which goes through `chosen` of `count` experts: twice as many
/// as an expert has on average.
pub fn most_pairs(tokens: u32, chosen: u32, count: u32) -> u32 {
    let average = (u64::from(tokens) * u64::from(chosen)).div_ceil(u64::from(count));
    // Of one token no expert is chosen twice.
    (2 * average as u32).next_power_of_two().clamp(FEW, MOST).min(tokens)
}

/// Units that there may be, whatever is chosen.
pub fn units(count: u32, pairs: u32, most: u32) -> u32 {
    if most == 1 { pairs } else { pairs.min(count.min(pairs) + pairs / most) }
}

impl Experts {
    /// Units of a launch.
    pub fn units(&self) -> u32 {
        units(self.count, self.pairs, self.most)
    }

    /// Units that are not empty, about.
    pub fn busy(&self) -> u32 {
        self.units().min((self.pairs / self.most).max(self.count.min(self.pairs)))
    }
}

/// The parameters by which a product's kernel knows its unit.
#[derive(Clone, Copy)]
pub(super) struct Units {
    experts: Experts,
    units: Mem,
    pairs: Mem,
    places: Mem,
}

/// The unit that a block of the grid computes.
pub(super) struct Unit<'b> {
    b: &'b Builder,
    /// Place of the expert's matrix among those of the launch.
    pub(super) matrix: V<'b>,
    /// How many pairs there are, unless there is one.
    pub(super) count: Option<V<'b>>,
    pairs: Pairs<'b>,
    /// Pairs that share an input.
    sharing: u32,
}

enum Pairs<'b> {
    One(V<'b>),
    /// In shared memory; behind the last that last again.
    Several(Mem),
}

impl Units {
    /// Declares the parameters, in order:
    ///
    /// * `units`: `i32`, four a unit ([`group`]); where each pair is a unit, the pairs' experts ([`route`]);
    /// * `pairs`: `i32`, the units' pairs; not read where each pair is a unit;
    /// * `places`: `i32`, for each expert the place of its matrix in the launch, or −1; not read if the launch has all.
    pub(super) fn declare(b: &Builder, experts: &Experts) -> Units {
        let grouped = u64::from(experts.most > 1);
        let some = u64::from(experts.matrices < experts.count);
        let units = if experts.most > 1 { 4 * u64::from(experts.units()) } else { experts.pairs.into() };
        Units {
            experts: *experts,
            units: b.sized("units", Elem::I32, false, units),
            pairs: b.sized("pairs", Elem::I32, false, grouped * u64::from(experts.pairs)),
            places: b.sized("places", Elem::I32, false, some * u64::from(experts.count)),
        }
    }

    /// Runs `body` in the blocks of unit number `unit` if it has pairs and the launch has their expert's matrix. All `threads`
    /// of the block, of which this is number `thread`, meet before.
    pub(super) fn run<'b>(
        &self,
        b: &'b Builder,
        unit: V<'b>,
        thread: V<'b>,
        threads: u32,
        body: impl FnOnce(Unit<'b>),
    ) {
        let Experts { count, matrices, rows, pairs, most, stride: _ } = self.experts;
        let load = |mem: Mem, at: V<'b>| b.load_as(mem, at, Elem::I32, 1, Cache::ReadOnly);
        let (expert, list) = if most == 1 {
            (load(self.units, unit), None)
        } else {
            let all = b.load_as(self.units, unit * 4, Elem::I32, 4, Cache::ReadOnly);
            (all.lane(0), Some((all.lane(1), all.lane(2))))
        };
        let is_there = list.map(|(_, len)| len.gt(0));
        let (matrix, is_there) = if matrices < count {
            let place = load(self.places, expert);
            let has = place.ge(0);
            (place, Some(is_there.map_or(has, |there| there & has)))
        } else {
            (expert, is_there)
        };
        let listed = list.map(|(first, len)| (b.shared("unit", Elem::I32, most), first, len));
        let run = || {
            if let Some((shared, first, len)) = listed {
                b.for_(thread, most, threads, |i| {
                    b.store(shared, i, load(self.pairs, first + i.min(len - 1)), Elem::I32);
                });
            }
            b.barrier();
            let list = listed.map_or(Pairs::One(unit), |(shared, ..)| Pairs::Several(shared));
            body(Unit { b, matrix, count: listed.map(|l| l.2), pairs: list, sharing: pairs / rows });
        };
        match is_there {
            Some(is_there) => b.if_(is_there, run),
            None => run(),
        }
    }
}

impl<'b> Unit<'b> {
    /// Pair `i` of the unit, or its last one if it has fewer.
    pub(super) fn pair(&self, i: V<'b>) -> V<'b> {
        match self.pairs {
            Pairs::One(pair) => pair,
            Pairs::Several(shared) => self.b.load(shared, i, Elem::I32),
        }
    }

    /// The row of the inputs of pair `i`.
    pub(super) fn row(&self, i: V<'b>) -> V<'b> {
        self.pair(i) / self.sharing
    }
}

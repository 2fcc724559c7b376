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

use std::cell::OnceCell;

use crate::cuda::Device;
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
const UNIT_BYTES: u32 = 4 * MOST;
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

    /// The part of a GPU that a unit has: units run side by side, so cost models choose its launch as for this device.
    pub(super) fn share(&self, device: &Device) -> Device {
        let sms = (device.sms / self.busy()).max(1);
        let bandwidth = device.bandwidth * f64::from(sms) / f64::from(device.sms);
        let shared_per_block = device.shared_per_block - UNIT_BYTES;
        // Where a unit's weights and results begin takes some registers.
        let registers_per_sm = device.registers_per_sm / 16 * 15;
        Device { sms, bandwidth, shared_per_block, registers_per_sm, ..*device }
    }
}

/// The tokens that a block of a product computes, and where what belongs to them lies: those of the launch, in their order, or of
/// experts the pairs of the block's unit.
pub(super) struct Tokens<'b> {
    /// Tokens of the launch, or most pairs of a unit.
    batch: u32,
    mixture: Option<Mixture<'b>>,
}

/// What a product of experts has beside.
struct Mixture<'b> {
    units: Units,
    /// The block's unit, once it is known.
    unit: OnceCell<Unit<'b>>,
}

impl<'b> Tokens<'b> {
    /// `batch` tokens, or of experts up to so many pairs, whose parameters are declared ([`Units::declare`]).
    pub(super) fn declare(b: &'b Builder, batch: u32, experts: Option<&Experts>) -> Self {
        let mixture = experts.map(|experts| Mixture { units: Units::declare(b, experts), unit: OnceCell::new() });
        Tokens { batch, mixture }
    }

    /// True of a product of experts.
    pub(super) fn are_pairs(&self) -> bool {
        self.mixture.is_some()
    }

    /// Of a product of experts: runs `body` in the blocks of unit number `unit`, if there is something for them to do
    /// ([`Units::run`]).
    pub(super) fn in_unit(&self, b: &'b Builder, unit: V<'b>, thread: V<'b>, threads: u32, body: impl FnOnce()) {
        let mixture = self.mixture.as_ref().expect("of experts");
        mixture.units.run(b, unit, thread, threads, |unit| {
            assert!(mixture.unit.set(unit).is_ok(), "a block has one unit");
            body();
        });
    }

    fn unit(&self) -> Option<&Unit<'b>> {
        self.mixture.as_ref().map(|m| m.unit.get().expect("within a unit"))
    }

    /// Planes of all inputs.
    pub(super) fn planes(&self) -> u32 {
        2 * self.mixture.as_ref().map_or(self.batch, |m| m.units.experts.rows)
    }

    /// Which plane of the inputs is plane `plane` of the block's tokens.
    pub(super) fn plane(&self, plane: V<'b>) -> V<'b> {
        self.unit().map_or(plane, |unit| unit.row(plane >> 1) * 2 + (plane & 1))
    }

    /// Whether there is such a token, which is below the most there may be; `None`: surely.
    pub(super) fn exists(&self, token: V<'b>) -> Option<V<'b>> {
        self.unit()?.count.map(|count| token.lt(count))
    }

    /// The row of the inputs of a token.
    pub(super) fn input(&self, token: V<'b>) -> V<'b> {
        self.unit().map_or(token, |unit| unit.row(token))
    }

    /// The row of the outputs of a token.
    pub(super) fn output(&self, token: V<'b>) -> V<'b> {
        self.unit().map_or(token, |unit| unit.pair(token))
    }

    /// A place of the tokens' matrix in a buffer of all, where each has `len` elements and the place is `at` of the first.
    pub(super) fn in_matrix(&self, at: V<'b>, len: u32) -> V<'b> {
        self.unit().map_or(at, |unit| at + unit.matrix * len)
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

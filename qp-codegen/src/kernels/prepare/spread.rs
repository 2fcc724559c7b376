//! How a token's columns are spread over a GPU.

use super::Prepare;
use crate::cuda::Device;
use crate::kernels::rotate::{GROUP, GROUP_LEVELS, Transforms};
use crate::layout::COLUMN_PAD;

/// Most groups of columns that a thread holds in registers; those of longer rows lie in shared memory.
const MOST_IN_REGISTERS: u32 = 8;
/// Most warps of a block.
const MOST_WARPS: u32 = 32;
/// Tokens from which on a warp takes [`MANY_PER_WARP`] groups of columns.
const MANY: u32 = 32;
/// See [`MANY`].
const MANY_PER_WARP: u32 = 4;
/// Warps of a block beyond which they take as many as registers hold.
const MANY_WARPS: u32 = 16;

/// How a token's columns are spread over a GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spread {
    /// Blocks of the cluster that takes a token.
    pub blocks: u32,
    /// Groups of 128 columns that a warp takes.
    pub per_warp: u32,
}

impl Spread {
    /// That of an engine.
    pub fn choose(op: &Prepare, device: &Device) -> Spread {
        let form = Groups::new(op);
        // Meeting in a cluster takes longer than in a block: twice with a norm.
        let worth = if op.norm.is_some() { 2 * MOST_WARPS } else { MOST_WARPS };
        let mut blocks = 1;
        if form.count > worth && !form.across {
            blocks = device.cluster;
            // What a gated unit computes takes all SMs; without one, more blocks meet longer than they read less.
            let room = if op.gate.is_some() { device.sms } else { device.sms / 2 };
            while blocks > 1 && op.batch * blocks > room {
                blocks /= 2;
            }
        }
        let fewest = form.count.div_ceil(blocks * MOST_WARPS).next_multiple_of(form.together);
        // More at once in a thread where many tokens make throughput count, and where the warps of a block meet twice; two, whose bytes
        // are stored together, in a cluster of several tokens.
        let wanted = match () {
            () if op.batch == 1 => 1,
            () if form.across => {
                if op.batch >= MANY {
                    MANY_PER_WARP
                } else {
                    1
                }
            }
            () if op.batch >= MANY && op.gate.is_none() && form.count > MANY_WARPS * MANY_PER_WARP => MOST_IN_REGISTERS,
            () if op.batch >= MANY || op.norm.is_some() && blocks == 1 => MANY_PER_WARP,
            () if blocks > 1 => 2,
            () => 1,
        };
        let several = fewest.max(wanted.next_multiple_of(form.together));
        let per_warp = if several <= MOST_IN_REGISTERS { several } else { fewest };
        Spread { blocks, per_warp }
    }

    /// All that a GPU can run, [`Spread::choose`]'s among them: to be measured.
    pub fn all(op: &Prepare, device: &Device) -> Vec<Spread> {
        let form = Groups::new(op);
        let clusters = [1, 2, 4, 8].into_iter().filter(|n| *n <= device.cluster && (*n == 1 || !form.across));
        let mut all: Vec<Spread> = clusters
            .flat_map(|blocks| {
                let fewest = form.count.div_ceil(blocks * MOST_WARPS).next_multiple_of(form.together);
                [1, 2, 4].map(|times| Spread { blocks, per_warp: fewest * times })
            })
            // Every block has work.
            .filter(|s| (s.blocks - 1) * s.per_warp < form.count && (s.blocks == 1 || s.per_warp <= MOST_IN_REGISTERS))
            .collect();
        let chosen = Spread::choose(op, device);
        all.retain(|s| *s != chosen && s.per_warp <= MOST_IN_REGISTERS);
        all.push(chosen);
        all
    }
}

/// A token's groups of columns.
pub(super) struct Groups {
    pub(super) count: u32,
    /// A warp takes a multiple of so many, since the rotation mixes them.
    together: u32,
    /// Whether a part of the rotation goes through shared memory.
    across: bool,
}

impl Groups {
    pub(super) fn new(op: &Prepare) -> Self {
        let transforms = Transforms::of(op.rotation, op.columns);
        let levels = transforms.levels();
        // Butterflies between a thread's own values reach as far as what it holds.
        let across = transforms.has_dense() || levels > GROUP_LEVELS + MOST_IN_REGISTERS.ilog2();
        let together = if across { 1 } else { 1 << levels.saturating_sub(GROUP_LEVELS) };
        Groups { count: op.columns.next_multiple_of(COLUMN_PAD) / GROUP, together, across }
    }
}

/// How a token's groups are spread: group `(block · warps + warp) · per_warp + k` is the `k`-th of a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) groups: u32,
    pub(super) per_warp: u32,
    pub(super) warps: u32,
    /// Blocks of a cluster.
    pub(super) blocks: u32,
    /// Whether a part of the rotation goes through shared memory.
    pub(super) across: bool,
}

impl Geometry {
    pub(super) fn new(op: &Prepare, Spread { blocks, per_warp }: Spread) -> Self {
        let Groups { count, together: _, across } = Groups::new(op);
        Geometry { groups: count, per_warp, warps: count.div_ceil(blocks * per_warp), blocks, across }
    }

    /// Whether no warp has groups past the last one.
    pub(super) fn is_exact(&self) -> bool {
        self.blocks * self.warps * self.per_warp == self.groups
    }

    pub(super) fn in_registers(&self) -> bool {
        self.per_warp <= MOST_IN_REGISTERS
    }

    /// That of a block of `warps` which prepares for itself, if all of it can stay in registers.
    pub(super) fn within(op: &Prepare, warps: u32) -> Option<Self> {
        let Groups { count, together, across } = Groups::new(op);
        let per_warp = count.div_ceil(warps).next_multiple_of(together);
        let fits = op.batch == 1 && !across && per_warp <= MOST_IN_REGISTERS;
        fits.then_some(Geometry { groups: count, per_warp, warps, blocks: 1, across })
    }
}

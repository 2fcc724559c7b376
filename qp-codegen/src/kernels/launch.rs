//! How a matrix-vector product is laid over a GPU: a cost model that knows the target, and what fits it.

use super::decode;
use super::gemv::{Gemv, Plan};
use crate::cuda::Device;
use crate::layout::Packed;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Warps of a block; they share the columns.
    pub warps: u32,
    /// Parts of the columns, each with blocks of its own.
    pub split: u32,
    /// Blocks that share the row tiles (the grid has `blocks · split`).
    pub blocks: u32,
    /// Groups of tiles that a warp keeps in flight.
    pub ahead: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
}

/// Registers that a thread needs beside prefetched words, activations and sums: addresses, and a tile being decoded.
const WORKING_REGISTERS: u32 = 36;
/// Seconds from one launch to the next in a chain of dependent kernels.
const LAUNCH: f64 = 2.0e-6;
/// Seconds that meeting in global memory takes.
const MEETING: f64 = 0.8e-6;
/// Seconds from asking for a word to having it, under load.
const LATENCY: f64 = 0.9e-6;
/// Share of an SM's issue slots that 16 resident warps can fill, and that many can.
const ISSUE: (f64, f64) = (0.60, 0.80);
/// SM clock, Hz.
const CLOCK: f64 = 1.7e9;
/// Share of the peak bandwidth that reading can reach.
const BANDWIDTH: f64 = 0.9;

impl Launch {
    /// The launch that the cost model likes best on `device`.
    ///
    /// # Panics
    /// If no launch fits, which no checked code and no device of [`crate::cuda::Target`] brings about.
    pub fn choose(op: &Gemv, device: &Device) -> Launch {
        Launch::ranked(op, device).first().expect("some launch fits every device").1
    }

    /// All launches worth trying, with the seconds that the model expects, best first.
    pub fn ranked(op: &Gemv, device: &Device) -> Vec<(f64, Launch)> {
        let layout = Packed::new(op.quantizer, op.shape);
        let codes = op.quantizer.codes.len() as u32;
        let (rows, cols) = (layout.row_tiles(), layout.col_tiles());
        let tables = decode::table_bytes(op.quantizer);
        let cost = (0..codes as usize).map(|c| decode::tile_cost(op.quantizer, c)).sum::<u32>() / codes;
        let mut out = Vec::new();
        for split in (1..=16).filter(|s| *s == 1 || s * 2 * codes <= cols) {
            let share = cols.div_ceil(split).next_multiple_of(codes);
            for most in [4, 8, 16] {
                let per_warp = share.div_ceil(most).next_multiple_of(codes);
                let warps = share.div_ceil(per_warp);
                for min_blocks in [1, 2, 3, 4] {
                    for ahead in [1, 2, 4] {
                        let blocks = rows.min((device.sms * min_blocks / split).max(1));
                        let launch = Launch { warps, split, blocks, ahead, min_blocks };
                        if let Some(t) = estimate(op, &launch, device, tables, cost) {
                            out.push((t, launch));
                        }
                    }
                }
            }
        }
        // Equal estimates keep the order above, so the choice is a function of the input alone.
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        out.dedup_by_key(|x| x.1);
        out
    }
}

/// Seconds of a launch; `None` if it does not fit the device.
fn estimate(op: &Gemv, launch: &Launch, device: &Device, tables: u32, cost: u32) -> Option<f64> {
    let plan = Plan::new(op, launch);
    // Of a tile, on average: a group of tiles holds each code of a mix equally often.
    let lane_words = f64::from(plan.layout.lane_words.iter().sum::<u32>()) / plan.layout.lane_words.len() as f64;
    let threads = launch.warps * 32;

    // What fits.
    let shared = tables + plan.shared_bytes(launch);
    let resident = launch.min_blocks * (shared + 1024) <= device.shared_per_sm && shared <= device.shared_per_block;
    let fragments =
        if plan.resident { plan.depth * plan.layout.tile.cols / 32 * 2 * plan.groups } else { 4 * plan.groups };
    let prefetched = (f64::from(launch.ahead * plan.depth) * lane_words) as u32;
    // Each further code of a mix keeps masks and addresses of its own alive.
    let working = WORKING_REGISTERS * plan.products.min(2) + 8 * (op.quantizer.codes.len() as u32 - 1);
    let sums = 4 * plan.row_parts() * plan.groups * plan.products;
    let registers = prefetched + fragments + sums + working;
    let available = device.registers_per_sm / (threads.next_multiple_of(128) * launch.min_blocks);
    // They are given out in eights.
    let available = (available / 8 * 8).min(255);
    if !resident || registers > available || threads * launch.min_blocks > device.threads_per_sm {
        return None;
    }

    // The busiest SM.
    let grid = launch.blocks * launch.split;
    let blocks = grid.div_ceil(device.sms);
    let tiles = f64::from(blocks * plan.layout.row_tiles().div_ceil(launch.blocks) * plan.per_warp * launch.warps);
    let warps = f64::from(blocks.min(launch.min_blocks) * launch.warps);
    let bytes = tiles * lane_words * 128.0;
    let in_flight = warps * f64::from(prefetched * 128);
    let bandwidth = (device.bandwidth * BANDWIDTH / f64::from(device.sms)).min(in_flight / LATENCY);
    let products = f64::from(plan.layout.tile.cols / 32 * plan.row_parts() * plan.groups * plan.products);
    let staged = if plan.resident { 0.0 } else { products * 3.0 };
    let instructions = tiles * (f64::from(cost) + products + staged + 24.0);
    let share = ISSUE.0 + (ISSUE.1 - ISSUE.0) * ((warps - 16.0) / 16.0).clamp(-1.0, 1.0);
    let issue = instructions / (4.0 * share * CLOCK);
    let memory = bytes / bandwidth;
    let fill = f64::from(blocks.min(launch.min_blocks) * shared) / 128.0 / CLOCK;
    let meeting = if launch.split > 1 { MEETING } else { 0.0 };
    Some(LAUNCH + fill * 0.5 + meeting + memory.max(issue) + 0.2 * memory.min(issue))
}

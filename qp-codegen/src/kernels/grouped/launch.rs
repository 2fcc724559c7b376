//! How a product with a matrix of a format is laid over a GPU.

use super::{Plan, Product};
use crate::cuda::Device;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Warps of a block; they share the columns.
    pub warps: u32,
    /// Tiles, side by side, that a warp takes in a step.
    pub depth: u32,
    /// Blocks that share the rows of tiles.
    pub blocks: u32,
    /// Steps whose words are on their way.
    pub ahead: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
}

/// Registers of a thread for addresses, sums and what is being computed.
const WORKING: u32 = 44;
/// Shared memory that the sums of all blocks of an SM may take.
const SHARED: u32 = 96 << 10;
/// Seconds from asking for a word to having it, under load.
const LATENCY: f64 = 0.8e-6;
/// Seconds from one launch to the next.
const START: f64 = 1.4e-6;
/// Seconds that a warp takes at the beginning and at the end of a block.
const WARP: f64 = 0.02e-6;
/// Seconds until a pass has its activations.
const PASS: f64 = 0.7e-6;
/// Share of the memory's bandwidth that reading reaches.
const BANDWIDTH: f64 = 0.9;
/// Instructions of a warp for a tile, beside those for each run and row.
const TILE_WORK: f64 = 60.0;
/// Instructions for a run and two rows.
const RUN_WORK: f64 = 34.0;
/// Share of an SM's issue slots that are filled.
const ISSUE: f64 = 0.7;

impl Launch {
    /// The launch that seems best on `device`.
    pub fn choose(op: &Product, device: &Device) -> Launch {
        Launch::ranked(op, device)[0].1
    }

    /// Launches worth trying, with the seconds that are expected, best first: at least one.
    pub fn ranked(op: &Product, device: &Device) -> Vec<(f64, Launch)> {
        let mut out: Vec<(f64, Launch)> = Vec::new();
        for warps in [1, 2, 4, 6, 7, 8, 12, 14, 16] {
            for depth in [1, 2, 3, 4] {
                for of_sm in [1, 2, 3, 4] {
                    for ahead in [1, 2] {
                        let parts = op.parts();
                        let rows = op.layout().row_tiles();
                        let blocks = rows.min((device.sms * of_sm / parts).max(1));
                        // No more rows than sums have room for.
                        let launch = Launch { warps, depth, blocks, ahead, min_blocks: of_sm };
                        let of_tile = Plan::new(op, &launch).sum_bytes_of_tile(&launch);
                        let most = (SHARED / of_sm / of_tile).max(1);
                        let launch = Launch { blocks: blocks.max(rows.div_ceil(most)), ..launch };
                        if let Some(seconds) = estimate(op, &launch, device) {
                            out.push((seconds, launch));
                        }
                    }
                }
            }
        }
        if out.is_empty() {
            // One warp and one tile fit everything.
            let blocks = op.layout().row_tiles();
            out.push((1.0, Launch { warps: 1, depth: 1, blocks, ahead: 1, min_blocks: 1 }));
        }
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        out.dedup_by_key(|x| x.1);
        out
    }
}

/// Seconds of a launch; `None` if it does not fit.
fn estimate(op: &Product, launch: &Launch, device: &Device) -> Option<f64> {
    let (plan, layout) = (Plan::new(op, launch), op.layout());
    let threads = launch.warps * 32;
    let fragments = launch.depth * plan.groups * (8 + plan.kept_sums());
    let of_step = launch.depth * (layout.lane_words() + plan.number_registers()) + 1;
    // The more runs, the more of their numbers are made at once.
    let of_runs = (plan.runs - 1) * launch.depth * (4 + 4 * plan.groups);
    let registers = WORKING + fragments + launch.ahead * of_step + of_runs + 16;
    let available = (device.registers_per_sm / (threads.next_multiple_of(128) * launch.min_blocks) / 8 * 8).min(255);
    let shared = plan.sum_bytes_of_tile(launch) * plan.most_rows;
    if registers > available
        || threads * launch.min_blocks > device.threads_per_sm
        || launch.min_blocks * (shared + 1024) > device.shared_per_sm
        || shared > device.shared_per_block
    {
        return None;
    }
    // No warp without columns, no step without need.
    let columns = plan.passes * launch.warps * launch.depth;
    if launch.warps > 1 && columns >= 2 * layout.col_tiles() && launch.depth > 1 {
        return None;
    }
    let grid = launch.blocks * plan.parts;
    let of_sm = grid.div_ceil(device.sms);
    let rounds = of_sm.div_ceil(launch.min_blocks);
    let tiles = f64::from(of_sm * plan.most_rows * columns);
    let real = f64::from(of_sm * plan.most_rows * layout.col_tiles());
    let bytes = real * layout.bytes() as f64 / f64::from(layout.row_tiles() * layout.col_tiles());
    let warps = f64::from(of_sm.min(launch.min_blocks) * launch.warps);
    let in_flight = warps * f64::from(launch.ahead * of_step * 128);
    // Words that several parts of the tokens take come from memory once.
    let bandwidth = device.bandwidth * BANDWIDTH * f64::from(plan.parts.min(2)) / f64::from(device.sms);
    let memory = bytes / bandwidth.min(in_flight / LATENCY);
    let work = TILE_WORK + f64::from(op.terms.run.map_or(1, |_| plan.runs)) * RUN_WORK * f64::from(plan.groups);
    let issue = tiles * work / 4.0 / (ISSUE * (1.0 - (-warps / 4.0).exp()) * device.clock);
    let passes = f64::from(plan.passes) * PASS + f64::from(rounds - 1) * LATENCY;
    let blocks = WARP * f64::from(of_sm * launch.warps);
    Some(START + passes + blocks + (memory.powi(3) + issue.powi(3)).cbrt())
}

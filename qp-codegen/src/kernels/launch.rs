//! How a matrix-vector product is laid over a GPU: a cost model that knows the target, and what fits it.

use std::collections::HashSet;

use super::decode;
use super::gemv::{Gemv, Plan};
use crate::cuda::Device;
use crate::layout::Packed;
use crate::spec::Quantizer;

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
    /// Shared memory that the copies of tables may take, in bytes.
    pub table_bytes: u32,
}

/// Registers that a thread needs beside prefetched words, activations and sums: addresses, and a tile being decoded.
const WORKING_REGISTERS: u32 = 36;
/// Seconds from one launch to the next in a chain of dependent kernels.
const LAUNCH: f64 = 1.7e-6;
/// Seconds that meeting in global memory takes.
const MEETING: f64 = 2.0e-6;
/// Seconds that each group of tiles in flight beyond the first costs: a longer beginning, more registers.
const AHEAD: f64 = 0.1e-6;
/// Seconds from asking for a word to having it, under load.
const LATENCY: f64 = 0.9e-6;
/// Share of an SM's issue slots that 16 resident warps can fill, and that many can.
const ISSUE: (f64, f64) = (0.72, 0.77);
/// Bytes of tables that an SM writes in a cycle at the start, when all wait for it.
const FILL: f64 = 40.0;
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
        let mut tables: Vec<Tables> = TABLES.map(|bytes| Tables::new(op.quantizer, bytes)).into();
        tables.dedup_by_key(|t| t.shared);
        let mut out = Vec::new();
        for split in (1..=16).filter(|s| *s == 1 || s * 2 * codes <= cols) {
            let share = cols.div_ceil(split).next_multiple_of(codes);
            for most in [4, 8, 16] {
                let per_warp = share.div_ceil(most).next_multiple_of(codes);
                let warps = share.div_ceil(per_warp);
                for min_blocks in [1, 2, 3, 4] {
                    for ahead in [1, 2, 4] {
                        for tables in &tables {
                            let blocks = rows.min((device.sms * min_blocks / split).max(1));
                            let table_bytes = tables.budget;
                            let launch = Launch { warps, split, blocks, ahead, min_blocks, table_bytes };
                            if let Some(t) = estimate(op, &launch, device, tables) {
                                out.push((t, launch));
                            }
                        }
                    }
                }
            }
        }
        // Equal estimates keep the order above, so the choice is a function of the input alone.
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut seen = HashSet::new();
        out.retain(|x| seen.insert(x.1));
        out
    }
}

/// Sizes of tables to try: the more copies, the fewer lanes meet in a bank.
const TABLES: [u32; 3] = [32 << 10, 64 << 10, 128 << 10];

/// The tables of a quantizer within some shared memory, and the work of decoding a tile with them.
struct Tables {
    budget: u32,
    /// Bytes they take.
    shared: u32,
    cost: TileCost,
}

/// [`decode::Cost`] on average over the codes of a mix.
#[derive(Clone, Copy)]
struct TileCost {
    alu: f64,
    multiply: f64,
    lookup: f64,
}

impl Tables {
    fn new(q: &Quantizer, budget: u32) -> Tables {
        let costs: Vec<_> = (0..q.codes.len()).map(|c| decode::tile_cost(q, c, budget)).collect();
        let mean = |f: &dyn Fn(&decode::Cost) -> f64| costs.iter().map(f).sum::<f64>() / costs.len() as f64;
        let (alu, multiply) = (mean(&|c| c.alu.into()), mean(&|c| c.multiply.into()));
        let cost = TileCost { alu, multiply, lookup: mean(&|c| c.lookup) };
        Tables { budget, shared: decode::shared_bytes(q, budget), cost }
    }
}

/// Seconds of a launch; `None` if it does not fit the device.
fn estimate(op: &Gemv, launch: &Launch, device: &Device, tables: &Tables) -> Option<f64> {
    let plan = Plan::new(op, launch);
    // Of a tile, on average: a group of tiles holds each code of a mix equally often.
    let lane_words = f64::from(plan.layout.lane_words.iter().sum::<u32>()) / plan.layout.lane_words.len() as f64;
    let threads = launch.warps * 32;

    // What fits.
    let shared = tables.shared + plan.shared_bytes(launch);
    let resident = launch.min_blocks * (shared + 1024) <= device.shared_per_sm && shared <= device.shared_per_block;
    let fragments =
        if plan.resident { plan.depth * plan.layout.tile.cols / 32 * 2 * plan.groups } else { 4 * plan.groups };
    let prefetched = (f64::from(launch.ahead * plan.depth) * lane_words) as u32;
    // Each further code of a mix keeps masks and addresses of its own alive, each further hash its products.
    let hashes = op.quantizer.codes.iter().map(|c| c.decode.multiplications()).max().unwrap_or(0);
    let working = WORKING_REGISTERS * plan.products.min(2)
        + 8 * (op.quantizer.codes.len() as u32 - 1)
        + 4 * hashes.saturating_sub(1);
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
    let cost = tables.cost;
    let share = ISSUE.0 + (ISSUE.1 - ISSUE.0) * ((warps - 16.0) / 16.0).clamp(-1.0, 1.0);
    // Four schedulers; the pipe of integer operations takes one every other cycle of each.
    let alu = tiles * (cost.alu + 20.0) / 2.0;
    let slots = tiles * (cost.alu + cost.multiply + cost.lookup + products + staged + 30.0) / 4.0;
    let lookups = tiles * cost.lookup;
    let issue = alu.max(slots).max(lookups) / (share * device.clock);
    let memory = bytes / bandwidth;
    let fill = f64::from(blocks.min(launch.min_blocks) * tables.shared) / FILL / device.clock;
    let meeting = if launch.split > 1 { MEETING } else { 0.0 };
    let ahead = AHEAD * f64::from(launch.ahead - 1);
    Some(LAUNCH + fill + meeting + ahead + memory.max(issue) + 0.1 * memory.min(issue))
}

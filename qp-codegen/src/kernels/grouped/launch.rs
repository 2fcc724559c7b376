//! How a product with a matrix of a format is laid over a GPU: a cost model that knows the target, and what fits it.

use super::{Product, few, many};
use crate::cuda::Device;

/// Which kernel computes a product, and how it is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launch {
    /// Warps share the columns.
    Few(few::Launch),
    /// Warps have rows of their own.
    Many(many::Launch),
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

/// Most tokens that [`few`] is tried for.
const FEW: u32 = 32;
/// Tokens beyond which [`many`] is tried: the planes of these fill one tensor-core product.
const MANY: u32 = 4;

impl Launch {
    /// The launch that seems best on `device`.
    pub fn choose(op: &Product, device: &Device) -> Launch {
        Launch::ranked(op, device)[0].1
    }

    /// Launches worth trying, with the seconds that are expected, best first: at least one.
    pub fn ranked(op: &Product, device: &Device) -> Vec<(f64, Launch)> {
        let mut out: Vec<(f64, Launch)> = Vec::new();
        if op.batch <= FEW {
            out.extend(few::Launch::estimated(op, device).into_iter().map(|(t, l)| (t, Launch::Few(l))));
        }
        if op.batch > MANY {
            out.extend(many::Launch::estimated(op, device).into_iter().map(|(t, l)| (t, Launch::Many(l))));
        }
        if out.is_empty() {
            // One warp and one tile fit everything.
            let blocks = op.layout().row_tiles();
            out.push((1.0, Launch::Few(few::Launch { warps: 1, depth: 1, blocks, ahead: 1, min_blocks: 1 })));
        }
        // Equal estimates keep the order above, so the choice is a function of the input alone.
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        out.dedup_by_key(|x| x.1);
        out
    }

    /// Its name and numbers, for those who read measurements.
    pub fn fields(&self) -> (&'static str, Vec<(&'static str, u32)>) {
        match *self {
            Launch::Few(few::Launch { warps, depth, blocks, ahead, min_blocks }) => {
                let fields = [
                    ("warps", warps),
                    ("depth", depth),
                    ("blocks", blocks),
                    ("ahead", ahead),
                    ("min_blocks", min_blocks),
                ];
                ("few", fields.into())
            }
            Launch::Many(many::Launch {
                group,
                row_warps,
                col_warps,
                row_tiles,
                chunk,
                token_parts,
                blocks,
                min_blocks,
            }) => {
                let fields = [
                    ("row_warps", row_warps),
                    ("col_warps", col_warps),
                    ("row_tiles", row_tiles),
                    ("chunk", chunk),
                    ("token_parts", token_parts),
                    ("blocks", blocks),
                    ("min_blocks", min_blocks),
                ];
                (if group { "groups" } else { "many" }, fields.into())
            }
        }
    }
}

impl few::Launch {
    /// Launches worth trying, with the seconds that are expected, in no order.
    fn estimated(op: &Product, device: &Device) -> Vec<(f64, few::Launch)> {
        let mut out = Vec::new();
        for warps in [1, 2, 4, 6, 7, 8, 12, 14, 16] {
            for depth in [1, 2, 3, 4] {
                for of_sm in [1, 2, 3, 4] {
                    for ahead in [1, 2] {
                        let parts = few::parts(op);
                        let rows = op.layout().row_tiles();
                        let blocks = rows.min((device.sms * of_sm / parts).max(1));
                        // No more rows than sums have room for.
                        let launch = few::Launch { warps, depth, blocks, ahead, min_blocks: of_sm };
                        let of_tile = few::Plan::new(op, &launch).sum_bytes_of_tile(&launch);
                        let most = (SHARED / of_sm / of_tile).max(1);
                        let launch = few::Launch { blocks: blocks.max(rows.div_ceil(most)), ..launch };
                        if let Some(seconds) = estimate(op, &launch, device) {
                            out.push((seconds, launch));
                        }
                    }
                }
            }
        }
        out
    }
}

/// Seconds of a launch of [`few`]; `None` if it does not fit.
fn estimate(op: &Product, launch: &few::Launch, device: &Device) -> Option<f64> {
    let (plan, layout) = (few::Plan::new(op, launch), op.layout());
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

/// Warps of a block of [`many`].
const WARPS: [u32; 3] = [4, 8, 16];
/// Rows of tiles of a warp, tiles of a chunk, and blocks on an SM to try.
const CHOICES: [(u32, u32, u32); 7] = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)];
/// The same for groups of warps.
const GROUP_CHOICES: [(u32, u32, u32); 5] = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (1, 1, 3)];
/// Registers of a thread of [`many`] for addresses and for what is being computed.
const MANY_WORKING: u32 = 56;
/// Instructions of a warp for a tile, beside those for its bytes, runs and products.
const MANY_TILE: f64 = 50.0;
/// Instructions for the numbers of a run and two rows, for each expression of fields.
const MANY_RUN: f64 = 14.0;
/// Issue slots of a product of 32 bits added to 64.
const WIDE: f64 = 2.5;
/// Cycles that warps wait for each other at a chunk of activations.
const CHUNK: f64 = 300.0;
/// Cycles that scaling and storing a row of 32 results takes an SM.
const RESULTS: f64 = 10.0;
/// Bytes that an SM reads from the L2 cache in a cycle.
const L2: f64 = 40.0;
/// Share of the shorter of computing and multiplying that is not hidden behind the longer.
const REST: f64 = 0.5;

impl many::Launch {
    /// Launches worth trying, with the seconds that are expected, in no order.
    fn estimated(op: &Product, device: &Device) -> Vec<(f64, many::Launch)> {
        let (layout, mut out) = (op.layout(), Vec::new());
        let least = op.batch.div_ceil(many::MAX_PART);
        let parts = [1, 2, 4].map(|n| n * least).into_iter().filter(|&p| p == least || op.batch.div_ceil(p) >= 4);
        for token_parts in parts {
            for (warps, col_warps) in WARPS.into_iter().flat_map(|w| [1, 2, 4, 8].map(|c| (w, c))) {
                let in_warps = CHOICES.into_iter().map(|c| (false, c));
                let in_groups = GROUP_CHOICES.into_iter().map(|c| (true, c));
                let groups_fit = device.group_products > 0.0 && (warps / col_warps).is_multiple_of(4);
                for (group, choice) in in_warps.chain(in_groups.filter(|_| groups_fit)) {
                    let (row_tiles, chunk, min_blocks) = choice;
                    let row_warps = warps / col_warps;
                    if row_warps == 0 || col_warps * chunk > layout.col_tiles() {
                        continue;
                    }
                    let most = (device.sms * min_blocks / token_parts).max(1);
                    let blocks = layout.row_tiles().div_ceil(row_warps * row_tiles).min(most);
                    let launch =
                        many::Launch { group, row_warps, col_warps, row_tiles, chunk, token_parts, blocks, min_blocks };
                    out.extend(estimate_many(op, &launch, device).map(|seconds| (seconds, launch)));
                }
            }
        }
        out
    }
}

/// Seconds of a launch of [`many`]; `None` if it does not fit.
fn estimate_many(op: &Product, launch: &many::Launch, device: &Device) -> Option<f64> {
    let (plan, terms) = (many::Plan::new(op, launch), op.terms);
    let threads = launch.warps() * 32;
    let fields = op.layout().sections.iter().map(|s| s.lane_bytes().div_ceil(4)).sum::<u32>();
    let of_tile = plan.layout.lane_words() + fields + 16 + 4 * plan.runs.min(2);
    let products = if launch.group { 4 * plan.groups } else { 8 + 8 * launch.row_tiles };
    let registers = MANY_WORKING + launch.row_tiles * (4 * plan.groups + of_tile) + products;
    let available = (device.registers_per_sm / (threads.next_multiple_of(128) * launch.min_blocks) / 8 * 8).min(255);
    let shared = plan.shared_bytes(launch);
    if registers > available
        || threads * launch.min_blocks > device.threads_per_sm
        || launch.min_blocks * (shared + 1024) > device.shared_per_sm
        || shared > device.shared_per_block
    {
        return None;
    }

    // The busiest SM, and of its schedulers the one that has most warps.
    let per_sm = (launch.blocks * launch.token_parts).div_ceil(device.sms);
    let resident = per_sm.min(launch.min_blocks);
    let rows = plan.layout.row_tiles().div_ceil(launch.blocks);
    let takers = rows.div_ceil(launch.row_tiles);
    let takers = if launch.group { takers.next_multiple_of(launch.row_warps) } else { takers };
    let schedule = |row_warps: u32| (resident * row_warps * launch.col_warps).div_ceil(4);
    let last = schedule(takers % launch.row_warps);
    let of_scheduler = takers / launch.row_warps * schedule(launch.row_warps) + last;
    let steps = plan.steps(launch) * per_sm.div_ceil(resident) * launch.row_tiles;
    let of_scheduler = f64::from(of_scheduler * steps);
    let tiles = f64::from(per_sm * takers * plan.steps(launch) * launch.col_warps * launch.row_tiles);

    let (groups, runs) = (f64::from(plan.groups), f64::from(plan.runs));
    let bytes = 32.0 * plan.layout.parts().len() as f64;
    let expressions = 1.0 + f64::from(u8::from(terms.rest.is_some()));
    let numbers = if terms.run.is_some() { runs * expressions * MANY_RUN } else { 0.0 };
    let wide = if terms.run.is_some() { WIDE * expressions } else { 2.0 };
    let sum = 2.0 * (1.0 + f64::from(u8::from(terms.lowest != 0)) + wide);
    // A run of half a product takes a whole one.
    let across = runs.max(4.0);
    let issued = if launch.group { 4.0 + 2.0 * groups * runs } else { groups * across * 1.5 };
    let offsets = groups * runs / f64::from(launch.row_tiles);
    let slots = MANY_TILE + bytes + numbers + groups * runs * sum + issued + offsets;
    let warps = f64::from(resident * launch.warps());
    let issue = of_scheduler * slots / (ISSUE * (1.0 - (-warps / 4.0).exp()));
    let planes = groups * 8.0;
    let tensor = if launch.group {
        tiles * across * planes.max(32.0) * 16.0 * 32.0 / device.group_products
    } else {
        of_scheduler * groups * across * 4096.0 * 4.0 / device.int8_products
    };
    let banks = if launch.group {
        tiles * across * planes / 16.0
    } else {
        tiles * groups * across * 2.0 / f64::from(launch.row_tiles)
    };
    let staged = f64::from(per_sm * plan.rounds * plan.chunks) * f64::from(plan.stage_cells() * 16);
    let layout = &plan.layout;
    let of_tile = layout.bytes() as f64 / f64::from(layout.row_tiles() * layout.col_tiles());
    let memory = tiles * of_tile / (device.bandwidth * BANDWIDTH) * f64::from(device.sms) * device.clock
        / f64::from(launch.token_parts);
    let multiply = tensor.max(banks);
    let work = memory.max(staged / L2).max(issue.max(multiply) + REST * issue.min(multiply));
    let chunks = f64::from(plan.rounds * plan.chunks * per_sm.div_ceil(resident)) * CHUNK;
    let results = f64::from(per_sm * rows * 16 * plan.tokens) / 32.0 * RESULTS;
    Some(START + LATENCY + (work + chunks + results) / device.clock)
}

//! How a product is laid over a GPU: a cost model that knows the target, and what fits it.

use super::gemv::Plan;
use super::operands::{self, Gemv};
use super::prepare::Prepare;
use super::rotate::GROUP;
use super::{decode, gemm, walk};
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
    /// Steps of a warp whose words are in flight; where activations are staged, groups of tiles.
    pub ahead: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
    /// Shared memory that the copies of tables may take, in bytes.
    pub table_bytes: u32,
}

/// Registers that a thread needs beside prefetched words, activations and sums: addresses, and a tile being decoded.
const WORKING_REGISTERS: u32 = 36;
/// Of them, for the operands of one tile; and as many for whatever else a second tile needs while it is decoded.
const TILE_REGISTERS: u32 = 16;
/// Registers of [`gemm`] for operands of activations on their way from shared memory, and for where they lie.
const FRAGMENT_REGISTERS: u32 = 42;
/// Registers of [`gemm`] for the descriptors of a group's products.
const GROUP_REGISTERS: u32 = 12;
/// Registers of [`gemm`] for each further code of a mix, whose row tiles are decoded while the words of the next wait.
const CODE_REGISTERS: u32 = 36;
/// Seconds from one launch to the next in a chain of dependent kernels.
const LAUNCH: f64 = 1.37e-6;
/// Seconds that meeting in global memory takes.
const MEETING: f64 = 1.33e-6;
/// Seconds until activations are in shared memory, where they do not go to registers.
const STAGING: f64 = 0.65e-6;
/// Seconds from asking for a word to having it, under load.
const LATENCY: f64 = 0.6e-6;
/// Share of an SM's issue slots that many warps can fill; and the number of warps that fill 1 - 1/e of that, if each decodes
/// one tile at a time.
const ISSUE: (f64, f64) = (0.903, 3.63);
/// Seconds that each warp of an SM takes at the beginning and at the end.
const WARP: f64 = 0.022e-6;
/// Seconds that each doubling of the steps in flight takes at the beginning.
const AHEAD: f64 = 0.021e-6;
/// Seconds that an instruction of a step takes to come in, which is straight-line code.
const CODE: f64 = 0.4e-9;
/// Most instructions of a program that is worth compiling.
const MOST_CODE: f64 = 24e3;
/// Seconds of a beginning that a kernel saves whose blocks all find idle SMs while the one before runs.
const ROOM: f64 = 0.83e-6;
/// How much longer decoding takes with more than two steps in flight: their code and registers are many.
const CROWDED: f64 = 1.055;
/// How much longer it takes where only the words of the next step are in flight, and there are several.
const HASTY: f64 = 1.035;
/// Cycles that a warp's addition to shared memory takes an SM.
const ATOMIC: f64 = 1.5;
/// Bytes of tables that an SM writes in a cycle at the start.
const FILL: f64 = 148.0;
/// Seconds of each further round of loads of tables.
const FILL_ROUND: f64 = 0.087e-6;
/// Registers for addresses of a preparation and a group of columns being prepared.
pub(super) const PREPARING_REGISTERS: u32 = 24;
/// Seconds that a product takes longer whose blocks do the preparation themselves: at least, and for each 128 columns.
const PREPARING: (f64, f64) = (0.4e-6, 0.022e-6);
/// Seconds of a launch that prepares a token.
pub(super) const PREPARATION: f64 = 2.2e-6;
/// Decoding and reading take longer than the longer of both, as sums with this exponent do.
const TOGETHER: f64 = 3.71;
/// Share of the peak bandwidth that reading can reach.
const BANDWIDTH: f64 = 0.9;

impl Launch {
    /// All launches worth trying, with the seconds that the model expects, in no order; those of blocks that do a preparation
    /// themselves, if one is given.
    pub(super) fn estimated(op: &Gemv, prepare: Option<&Prepare>, device: &Device) -> Vec<(f64, Launch)> {
        let layout = Packed::new(op.quantizer, op.shape);
        let codes = op.quantizer.codes.len() as u32;
        let (rows, cols) = (layout.row_tiles(), layout.col_tiles());
        let tables = Tables::candidates(op.quantizer);
        let mut out = Vec::new();
        for split in (1..=16).filter(|s| *s == 1 || s * 2 * codes <= cols) {
            let share = cols.div_ceil(split).next_multiple_of(codes);
            for most in [4, 8, 16] {
                let per_warp = share.div_ceil(most).next_multiple_of(codes);
                let warps = share.div_ceil(per_warp);
                for (of_sm, min_blocks) in BLOCKS.into_iter().filter(|b| b.0 == b.1 || warps >= MANY) {
                    for ahead in [1, 2, 4] {
                        for tables in &tables {
                            let blocks = rows.min((device.sms * of_sm / split).max(1));
                            let table_bytes = tables.budget;
                            let launch = Launch { warps, split, blocks, ahead, min_blocks, table_bytes };
                            if let Some(t) = estimate(op, &launch, prepare, device, tables) {
                                out.push((t, launch));
                            }
                        }
                    }
                }
            }
        }
        out
    }
}

/// Blocks of an SM, and blocks that fit it at once, to try. Where more fit, those of the next kernel begin while the last of
/// this one end.
const BLOCKS: [(u32, u32); 5] = [(1, 1), (2, 2), (3, 3), (4, 4), (1, 2)];
/// Warps that keep an SM busy alone.
const MANY: u32 = 12;

/// Sizes of tables to try: the more copies, the fewer lanes meet in a bank.
const TABLES: [u32; 3] = [32 << 10, 64 << 10, 128 << 10];

/// The tables of a quantizer within some shared memory, and the work of decoding a tile with them.
struct Tables {
    budget: u32,
    /// Bytes they take.
    shared: u32,
    /// Stores that fill each of them.
    stores: Vec<u32>,
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
    /// Those of different sizes.
    fn candidates(q: &Quantizer) -> Vec<Tables> {
        let mut tables: Vec<Tables> = TABLES.map(|bytes| Tables::new(q, bytes)).into();
        tables.dedup_by_key(|t| t.shared);
        tables
    }

    fn new(q: &Quantizer, budget: u32) -> Tables {
        let costs: Vec<_> = (0..q.codes.len()).map(|c| decode::tile_cost(q, c, budget)).collect();
        let mean = |f: &dyn Fn(&decode::Cost) -> f64| costs.iter().map(f).sum::<f64>() / costs.len() as f64;
        let (alu, multiply) = (mean(&|c| c.alu.into()), mean(&|c| c.multiply.into()));
        let cost = TileCost { alu, multiply, lookup: mean(&|c| c.lookup) };
        let (shared, stores) = decode::shared_tables(q, budget);
        Tables { budget, shared, stores, cost }
    }
}

/// Seconds of a launch; `None` if it does not fit the device.
fn estimate(op: &Gemv, launch: &Launch, prepare: Option<&Prepare>, device: &Device, tables: &Tables) -> Option<f64> {
    let plan = Plan::new(op, launch);
    // Of a tile, on average: a group of tiles holds each code of a mix equally often.
    let lane_words = f64::from(plan.layout.lane_words.iter().sum::<u32>()) / plan.layout.lane_words.len() as f64;
    let threads = launch.warps * 32;

    // Half as many in flight would be all that there are.
    let rows = plan.layout.row_tiles().div_ceil(launch.blocks);
    let (all, half) = if plan.resident {
        (rows * plan.per_warp / plan.depth, launch.ahead / 2)
    } else {
        (plan.depth, launch.ahead / 2 * op.quantizer.codes.len() as u32)
    };
    if half >= all {
        return None;
    }

    // What fits.
    let shared = tables.shared + plan.shared_bytes(launch, prepare);
    let resident = launch.min_blocks * (shared + 1024) <= device.shared_per_sm && shared <= device.shared_per_block;
    let fragments = plan.layout.tile.cols / 32 * 2 * if plan.resident { plan.depth * plan.groups } else { 1 };
    let waiting = plan.buffers * plan.early + u32::from(plan.early < plan.depth);
    let prefetched = (f64::from(waiting) * lane_words) as u32;
    let working = working_registers(op.quantizer);
    let sums = 4 * plan.sums();
    // Larger tiles are decoded in one go, too; a single result's scales are loaded early.
    let tile = (TILE_REGISTERS + 8) * (plan.layout.row_parts() - 1) + if plan.results == 1 { 8 } else { 0 };
    let registers = prefetched + fragments + sums + working + tile;
    // Values, weights of norms and signs are in registers before activations are.
    let (registers, preparing) = match prepare {
        None => (registers, 0.0),
        Some(_) if !plan.resident => return None,
        Some(prepare) => {
            let groups = prepare.within(launch.warps)?;
            // Each block of an SM would do it.
            if (launch.blocks * launch.split).div_ceil(device.sms) > 1 || launch.min_blocks > 1 {
                return None;
            }
            let all = f64::from(op.shape.cols) / f64::from(GROUP);
            (registers.max(prefetched + 9 * groups + PREPARING_REGISTERS), PREPARING.0 + PREPARING.1 * all)
        }
    };
    if !resident
        || registers > available_registers(device, threads, launch.min_blocks)
        || threads * launch.min_blocks > device.threads_per_sm
    {
        return None;
    }

    // The busiest SM.
    let grid = launch.blocks * launch.split;
    let blocks = grid.div_ceil(device.sms);
    let tiles = f64::from(blocks * rows * plan.per_warp * launch.warps);
    let warps = f64::from(blocks.min(launch.min_blocks) * launch.warps);
    let bytes = tiles * lane_words * 128.0;
    let in_flight = warps * f64::from(prefetched * 128);
    let bandwidth = (device.bandwidth * BANDWIDTH / f64::from(device.sms)).min(in_flight / LATENCY);
    let products = f64::from(plan.layout.tile.cols / 32 * plan.sums());
    let (staged, staging) = if plan.resident { (0.0, 0.0) } else { (products * 0.5, STAGING) };
    let cost = tables.cost;
    let share = issue_share(warps);
    // Four schedulers; the pipe of integer operations takes one every other cycle of each.
    let alu = tiles * (cost.alu + 8.0) / 2.0;
    let slots = tiles * (cost.alu + cost.multiply + cost.lookup + products + staged + 12.0) / 4.0;
    let lookups = tiles * cost.lookup;
    // A scheduler has one of every four warps; the one that has most is the last.
    let uneven = f64::from(launch.warps.next_multiple_of(4)) / f64::from(launch.warps);
    let pace = match launch.ahead {
        1 if plan.resident && all >= 3 => HASTY,
        1 | 2 => 1.0,
        _ => CROWDED,
    };
    let issue = pace * (alu.max(slots) * uneven).max(lookups) / (share * device.clock);
    let memory = bytes / bandwidth;
    let rounds: u32 = tables.stores.iter().map(|s| s.div_ceil(threads).div_ceil(decode::FILL)).sum();
    let rounds = f64::from(rounds.saturating_sub(1));
    let fill = f64::from(blocks.min(launch.min_blocks) * tables.shared) / FILL / device.clock + rounds * FILL_ROUND;
    // Sums that are added to the block's.
    let row_tiles = f64::from(blocks * rows * launch.warps);
    let adds = row_tiles * f64::from(4 * plan.sums());
    let sums = if plan.own_sums { 0.0 } else { adds * ATOMIC / device.clock };
    let meeting = if launch.split > 1 { MEETING } else { 0.0 };
    let work = (memory.powf(TOGETHER) + issue.powf(TOGETHER)).powf(1.0 / TOGETHER);
    let warps = WARP * f64::from(blocks * launch.warps);
    let ahead = AHEAD * f64::from(launch.ahead).log2();
    let copies = if plan.resident { plan.buffers.min(all) } else { 1 };
    let of_tile = cost.alu + cost.multiply + cost.lookup / 2.5 + products + 12.0;
    let program = f64::from(copies * plan.depth) * of_tile;
    if program > MOST_CODE {
        return None;
    }
    let code = CODE * program;
    let room = ROOM * (f64::from(device.sms.saturating_sub(grid)) / f64::from(grid)).min(1.0);
    Some(LAUNCH - room + warps + ahead + code + fill + staging + sums + meeting + preparing + work)
}

/// Share of the issue slots that resident warps can fill.
fn issue_share(warps: f64) -> f64 {
    ISSUE.0 * (1.0 - (-warps / ISSUE.1).exp())
}

/// Registers for addresses and for a tile being decoded.
fn working_registers(q: &Quantizer) -> u32 {
    // Each further code of a mix keeps masks and addresses of its own alive, each further hash its products.
    let hashes = q.codes.iter().map(|c| c.decode.multiplications()).max().unwrap_or(0);
    WORKING_REGISTERS * operands::products(q) + 8 * (q.codes.len() as u32 - 1) + 4 * hashes.saturating_sub(1)
}

/// Registers that a thread may have.
fn available_registers(device: &Device, threads: u32, min_blocks: u32) -> u32 {
    // They are given out in eights.
    let share = device.registers_per_sm / (threads.next_multiple_of(128) * min_blocks);
    (share / 8 * 8).min(255)
}

/// Warps of a block of [`gemm`].
const GEMM_WARPS: [u32; 6] = [4, 6, 8, 10, 12, 16];
/// Row tiles of a warp, groups of tiles of a chunk, and blocks on an SM to try.
const GEMM_CHOICES: [(u32, u32, u32); 9] =
    [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 8, 1), (1, 2, 2), (2, 2, 2)];
/// The same for groups of warps.
const GROUP_CHOICES: [(u32, u32, u32); 12] = [
    (1, 1, 1),
    (1, 2, 1),
    (1, 4, 1),
    (1, 8, 1),
    (1, 2, 2),
    (1, 4, 2),
    (1, 8, 2),
    (1, 4, 3),
    (2, 1, 1),
    (2, 2, 1),
    (2, 4, 1),
    (2, 8, 1),
];
/// Up to so many tokens may be taken by one part or by several; of more, parts have about as many as one of [`PARTS`].
const MANY_TOKENS: u32 = 64;
/// Tokens of a part to try.
const PARTS: [u32; 4] = [32, 64, 96, gemm::MAX_PART];
/// Seconds that set launches whose registers spill behind all others: they are for codes of which nothing else fits.
const SPILLS: f64 = 1e3;
/// Share of the shorter of decoding and multiplying that groups of warps do not hide behind the longer.
const GROUP_REST: f64 = 0.65;
/// Cycles from the beginning of a group's product to its end, beyond the tensor cores' time.
const GROUP_LATENCY: f64 = 10.0;
/// Bytes that an SM reads from the L2 cache in a cycle.
const L2: f64 = 40.0;
/// Cycles that warps wait for each other at a chunk of activations.
const CHUNK: f64 = 350.0;
/// Cycles that scaling and storing a row of 32 results takes an SM.
const RESULTS: f64 = 8.0;
/// Bytes a second that all blocks together add in global memory.
const ATOMICS: f64 = 2.0e12;

impl gemm::Launch {
    /// All launches worth trying, with the seconds that the model expects, in no order.
    pub fn estimated(op: &Gemv, device: &Device) -> Vec<(f64, gemm::Launch)> {
        let layout = Packed::new(op.quantizer, op.shape);
        let groups = layout.col_tiles().div_ceil(op.quantizer.codes.len() as u32);
        let tables = Tables::candidates(op.quantizer);
        let warps = GEMM_WARPS.into_iter().flat_map(|w| [1, 2, 4, 8, 16].map(|c| (w, c)));
        let warps: Vec<_> = warps.filter(|(w, c)| w.is_multiple_of(*c) && *c <= groups).collect();
        let mut out = Vec::new();
        for token_parts in token_parts(op.batch) {
            for &(warps, col_warps) in &warps {
                let in_warps = GEMM_CHOICES.into_iter().map(|c| (false, c));
                let in_groups = GROUP_CHOICES.into_iter().map(|c| (true, c));
                let groups_fit = device.group_products > 0.0 && (warps / col_warps).is_multiple_of(4);
                for (group, choice) in in_warps.chain(in_groups.filter(|_| groups_fit)) {
                    let (row_tiles, chunk, min_blocks) = choice;
                    for split in [1, 2, 4, 8].into_iter().filter(|s| *s == 1 || s * chunk * col_warps <= groups) {
                        let row_warps = warps / col_warps;
                        let most = (device.sms * min_blocks / (token_parts * split)).max(1);
                        let blocks = layout.row_tiles().div_ceil(row_tiles).min(most);
                        if split > 1 && layout.row_tiles().div_ceil(blocks) > row_warps * row_tiles {
                            continue;
                        }
                        for tables in &tables {
                            let table_bytes = tables.budget;
                            let launch = gemm::Launch {
                                group,
                                row_warps,
                                col_warps,
                                row_tiles,
                                chunk,
                                token_parts,
                                split,
                                blocks,
                                min_blocks,
                                table_bytes,
                            };
                            out.extend(estimate_gemm(op, &launch, device, tables).map(|t| (t, launch)));
                        }
                    }
                }
            }
        }
        // Of those whose registers spill, at most the best, and only if nothing else fits.
        let (fit, spill): (Vec<_>, Vec<_>) = out.into_iter().partition(|(t, _)| *t < SPILLS);
        if fit.is_empty() { spill.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).into_iter().collect() } else { fit }
    }
}

/// Numbers of parts to try that some tokens are cut into.
fn token_parts(batch: u32) -> Vec<u32> {
    let few = [1, 2, 4, 8, 16].into_iter().filter(|p| *p <= batch.div_ceil(4) && batch.div_ceil(*p) <= MANY_TOKENS);
    let mut parts: Vec<u32> = few.collect();
    if batch > MANY_TOKENS {
        parts.extend(PARTS.map(|tokens| batch.div_ceil(tokens)));
        parts.sort_unstable();
        parts.dedup();
    }
    parts
}

/// Of the busiest SM of a product, the scheduler that has most warps.
pub(super) struct Busiest {
    /// Warps one below the other that take rows, those of all rounds.
    pub(super) takers: u32,
    /// Warps that it runs, in all rounds.
    pub(super) of_scheduler: u32,
    /// Of these, in a round.
    pub(super) at_once: u32,
}

impl Busiest {
    /// Of `resident` blocks at once, in each of which `takers` warps one below the other, `row_warps` a round, have rows to take,
    /// and `col_warps` share the columns of each. Of a `group` all warps decode, whether they have rows or not.
    pub(super) fn of(resident: u32, takers: u32, group: bool, row_warps: u32, col_warps: u32) -> Busiest {
        let takers = if group { takers.next_multiple_of(row_warps) } else { takers };
        let schedule = |row_warps: u32| (resident * row_warps * col_warps).div_ceil(4);
        let last = schedule(takers % row_warps);
        let of_scheduler = takers / row_warps * schedule(row_warps) + last;
        Busiest { takers, of_scheduler, at_once: if takers < row_warps { last } else { schedule(row_warps) } }
    }
}

/// Seconds of a launch for many tokens; `None` if it does not fit the device.
fn estimate_gemm(op: &Gemv, launch: &gemm::Launch, device: &Device, tables: &Tables) -> Option<f64> {
    let plan = gemm::Plan::new(op, launch);
    let tile = plan.layout.tile;
    let codes = plan.layout.lane_words.len() as u32;
    let period = plan.layout.lane_words.iter().sum::<u32>();
    let threads = launch.warps() * 32;

    // What fits.
    let shared = tables.shared + plan.shared_bytes(launch);
    let resident = launch.min_blocks * (shared + 1024) <= device.shared_per_sm && shared <= device.shared_per_block;
    let operands = tile.rows * tile.cols / 128 * plan.products;
    // Warps decode all their row tiles and then multiply, groups tile by tile.
    let decoded = if launch.group { 1 } else { launch.row_tiles };
    let registers = 4 * plan.accumulators(launch)
        + launch.row_tiles * period * launch.ahead()
        + (decoded * operands).saturating_sub(TILE_REGISTERS)
        + (decoded - 1) * TILE_REGISTERS
        + working_registers(op.quantizer)
        + (codes - 1) * CODE_REGISTERS
        + if launch.group { GROUP_REGISTERS } else { FRAGMENT_REGISTERS };
    let spills = registers > available_registers(device, threads, launch.min_blocks);
    if !resident || threads * launch.min_blocks > device.threads_per_sm {
        return None;
    }

    let per_sm = (launch.blocks * launch.split * launch.token_parts).div_ceil(device.sms);
    let resident = per_sm.min(launch.min_blocks);
    let rows = plan.layout.row_tiles().div_ceil(launch.blocks);
    let Busiest { takers, of_scheduler, at_once } =
        Busiest::of(resident, rows.div_ceil(launch.row_tiles), launch.group, launch.row_warps, launch.col_warps);
    let at_once = f64::from(at_once);
    let steps = plan.steps(launch) * codes * per_sm.div_ceil(resident);
    let of_scheduler = f64::from(of_scheduler * steps * launch.row_tiles);
    let taken = if launch.group { takers * launch.row_tiles } else { rows };
    let tiles = f64::from(per_sm * taken * plan.steps(launch) * launch.col_warps * codes);

    let cost = tables.cost;
    let kt = f64::from(tile.cols / 32 * plan.groups);
    let products = kt * f64::from(plan.layout.row_parts() * plan.products);
    // An operand of activations is two passes through shared memory, and half an instruction.
    let fragments = if launch.group { 0.0 } else { kt / f64::from(launch.row_tiles) };
    let staged = f64::from(per_sm * plan.rounds * plan.chunks) * f64::from(plan.stage_cells() * 16);
    // What a product of four warps takes the tensor cores does not fall below that of 32 planes.
    let (issued, tensor, read) = if launch.group {
        let steps = products / f64::from(plan.groups);
        let planes = f64::from(plan.planes());
        let tensor = tiles / 4.0 * steps * planes.max(32.0) * 64.0 * 32.0 / device.group_products;
        (steps, tensor, tiles / 4.0 * steps * planes / 4.0)
    } else {
        (products, of_scheduler * products * 4096.0 * 4.0 / device.int8_products, 0.0)
    };
    let alu = of_scheduler * (cost.alu + 12.0) * 2.0;
    let slots = of_scheduler * (cost.alu + cost.multiply + cost.lookup + issued + fragments / 2.0 + 25.0)
        + staged / 512.0 * 3.0 / 4.0;
    let banks = tiles * (cost.lookup + fragments * 2.0) + read + staged / 128.0;
    let memory = tiles * f64::from(period) / f64::from(codes) * 128.0 / (device.bandwidth * BANDWIDTH)
        * f64::from(device.sms)
        * device.clock
        / f64::from(launch.token_parts);
    let pipes = [tensor, alu, slots, banks, memory, staged / L2];
    let fullest = pipes.into_iter().fold(0.0, f64::max);
    // The fewer warps a scheduler has, the less of the other pipes' time is hidden; one warp decodes or multiplies.
    let rest = tensor + alu + banks - tensor.max(alu).max(banks);
    let work = if launch.group {
        // A scheduler has a warp of each group.
        let decode = [alu, slots, banks].into_iter().fold(0.0, f64::max) / issue_share(4.0 * at_once);
        let words = if launch.ahead() > 1 { 0.0 } else { LATENCY * device.clock / f64::from(launch.row_tiles) };
        let product = f64::from(plan.layout.row_parts() * plan.products) * GROUP_LATENCY;
        let multiply = tensor + of_scheduler * (words + product) / at_once;
        let rest = if at_once < 2.0 { 1.0 } else { GROUP_REST };
        memory.max(staged / L2).max(decode.max(multiply) + rest * decode.min(multiply))
    } else {
        (fullest + rest / at_once.powf(1.5)) / issue_share(4.0 * at_once)
    };
    // When warps have waited for each other they all decode, and at the end all multiply.
    let apart = alu.min(tensor) / of_scheduler * f64::from(launch.row_tiles);
    let chunks = f64::from(plan.rounds * plan.chunks * per_sm.div_ceil(resident)) * (CHUNK + apart);
    let results = f64::from(per_sm * rows * tile.rows * plan.tokens) / 32.0 * RESULTS;
    let sums = f64::from(plan.accumulators(launch) * launch.warps() * 128 * per_sm * plan.rounds);
    let meeting = match (launch.split, launch.col_warps) {
        (1, 1) => 0.0,
        (1, _) => sums / 32.0 * 2.0 * ATOMIC / device.clock,
        _ => MEETING + sums * 4.0 * f64::from(device.sms) / ATOMICS,
    };
    let fill = f64::from(resident * tables.shared) / FILL;
    let spills = if spills { SPILLS } else { 0.0 };
    Some(LAUNCH + meeting + (fill + work + chunks + results) / device.clock + spills)
}

/// Warps of a block of [`walk`].
const WALK_WARPS: u32 = 8;
/// How much longer decoding takes than the tables' [`TileCost`] says where words and activations come straight from memory.
const WALK: f64 = 3.0;

impl walk::Launch {
    /// The launch, with a rough guess at its seconds.
    pub fn estimated(op: &Gemv, device: &Device) -> (f64, walk::Launch) {
        let q = op.quantizer;
        let plan = walk::Plan::new(op);
        // As many copies of the tables as leave room for two blocks on an SM, or none in shared memory at all.
        let table_bytes = (device.shared_per_block / 2).saturating_sub(plan.shared_bytes() + 1024).min(64 << 10);
        let operations = q.codes.iter().map(|c| c.decode.nodes.len() as f64 / f64::from(c.vector)).sum::<f64>();
        let weights = op.shape.rows as f64 * op.shape.cols as f64 * f64::from(op.batch.div_ceil(4));
        let lanes = 64.0 * f64::from(device.sms) * device.clock;
        let seconds = LAUNCH + STAGING + WALK * weights * (operations / q.codes.len() as f64 + 1.0) / lanes;
        (seconds, walk::Launch { warps: WALK_WARPS, table_bytes })
    }
}

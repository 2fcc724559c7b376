//! How a product with a matrix of a format is laid over a GPU: a cost model that knows the target, and what fits it.

use super::super::experts::Experts;
use super::super::launch::{Busiest, PREPARING_REGISTERS};
use super::super::prepare::Prepare;
use super::super::product::Expected;
use super::super::rotate::GROUP;
use super::{Product, few, many};
use crate::cuda::Device;
use crate::spec::expr::Op;
use crate::spec::terms::{Digits, Stream};

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
/// Of these, for several groups of planes, those that are not needed where a tile is one run without a rest.
const SPARE: u32 = 36;
/// Seconds from asking for a word to having it, under load.
const LATENCY: f64 = 1.1e-6;
/// Seconds from one launch to the next.
const START: f64 = 1.8e-6;
/// Seconds until a pass has its activations.
const PASS: f64 = 0.456e-6;
/// Seconds that a product takes longer whose blocks do the preparation themselves: at least, and for each 128 columns that the blocks of
/// an SM prepare.
const PREPARING: (f64, f64) = (0.09e-6, 0.007e-6);
/// Instructions of a warp for a tile, beside those for its bytes and its runs.
const TILE_WORK: f64 = 44.5;
/// Instructions for a run and two rows, for each expression of fields.
const RUN_WORK: f64 = 14.8;
/// Instructions of a warp for a step; and for a group of planes where it is one of several passes.
const STEP_WORK: (f64, f64) = (38.9, 26.0);
/// Share of an SM's issue slots that many warps fill; and the number of warps that fill 1 - 1/e of that.
const ISSUE: (f64, f64) = (0.69, 6.64);
/// The same where windows are decoded: there is more to issue at a time in each warp.
const STREAM_ISSUE: (f64, f64) = (0.74, 2.0);
/// Issue slots that looking up a window of each lane in global memory takes beside: of 32 lines the first-level cache gives one a cycle,
/// in which an SM has four. That is reckoned, not measured.
const GATHER: f64 = 4.0 * 32.0;
/// How much longer it takes where columns are no whole passes.
const INEXACT: f64 = 1.11;
/// Computing and reading take longer than the longer of both, as sums with this exponent do.
const TOGETHER: f64 = 6.0;
/// Most tokens that [`few`] is tried for.
const FEW: u32 = 32;
/// Tokens beyond which [`many`] is tried: the planes of these fill one tensor-core product.
const MANY: u32 = 4;

impl Launch {
    /// The launch that seems best on `device`.
    pub fn choose(op: &Product, device: &Device) -> Launch {
        Launch::ranked(op, device)[0].1
    }

    /// [`Launch::ranked`] of products of experts; `op` is that of one of them with the pairs of a unit.
    pub fn ranked_for_experts(op: &Product, experts: &Experts, device: &Device) -> Vec<(f64, Launch)> {
        Launch::ranked(op, &experts.share(device))
    }

    /// [`Launch::ranked`]; with a preparation, the launches whose blocks do that themselves: none where they cannot, of several tokens,
    /// of rotations or columns that take more than registers.
    pub fn ranked_with(op: &Product, prepare: Option<&Prepare>, device: &Device) -> Vec<(f64, Launch)> {
        let Some(prepare) = prepare else { return Launch::ranked(op, device) };
        if op.batch != 1 {
            return Vec::new();
        }
        let few = few::Launch::estimated(op, Some(prepare), device, true).into_iter();
        sorted(few.map(|(t, l)| (t, Launch::Few(l))).collect())
    }

    /// What the product is expected to take with `prepare` done by its blocks, and by a launch before it.
    pub fn expected(op: &Product, prepare: &Prepare, device: &Device) -> Expected {
        let own = Launch::ranked_with(op, Some(prepare), device).first().map(|r| r.0);
        Expected { own, apart: Launch::ranked(op, device)[0].0 }
    }

    /// Launches worth trying, with the seconds that are expected, best first: at least one.
    pub fn ranked(op: &Product, device: &Device) -> Vec<(f64, Launch)> {
        // A table of digits is looked up in global memory where no launch has room for it in shared memory, which is many times faster.
        let mut out = Launch::estimated(op, device, true);
        if out.is_empty() && op.layout().book.is_some() {
            out = Launch::estimated(op, device, false);
        }
        if out.is_empty() {
            // One warp and one tile fit everything.
            let blocks = op.layout().row_tiles();
            let launch = few::Launch { warps: 1, depth: 1, blocks, ahead: 1, min_blocks: 1, shared_book: false };
            out.push((1.0, Launch::Few(launch)));
        }
        sorted(out)
    }

    /// Launches worth trying that have a table of digits in shared memory or not, with the seconds that are expected, in no order.
    fn estimated(op: &Product, device: &Device, shared_book: bool) -> Vec<(f64, Launch)> {
        let mut out: Vec<(f64, Launch)> = Vec::new();
        if op.batch <= FEW {
            let few = few::Launch::estimated(op, None, device, shared_book);
            out.extend(few.into_iter().map(|(t, l)| (t, Launch::Few(l))));
        }
        if op.batch > MANY {
            let many = many::Launch::estimated(op, device, shared_book);
            out.extend(many.into_iter().map(|(t, l)| (t, Launch::Many(l))));
        }
        out
    }

    /// Its name and numbers, for those who read measurements.
    pub fn fields(&self) -> (&'static str, Vec<(&'static str, u32)>) {
        match *self {
            Launch::Few(few::Launch { warps, depth, blocks, ahead, min_blocks, shared_book }) => {
                let fields = [
                    ("warps", warps),
                    ("depth", depth),
                    ("blocks", blocks),
                    ("ahead", ahead),
                    ("min_blocks", min_blocks),
                    ("shared_book", shared_book.into()),
                ];
                ("few", fields.into())
            }
            Launch::Many(many::Launch {
                group,
                row_warps,
                col_warps,
                row_tiles,
                chunk,
                ahead,
                token_parts,
                blocks,
                min_blocks,
                shared_book,
            }) => {
                let many::Group { planes, sets } = group.unwrap_or(many::Group { planes: 0, sets: 0 });
                let fields = [
                    ("planes", planes),
                    ("sets", sets),
                    ("row_warps", row_warps),
                    ("col_warps", col_warps),
                    ("row_tiles", row_tiles),
                    ("chunk", chunk),
                    ("ahead", ahead),
                    ("token_parts", token_parts),
                    ("blocks", blocks),
                    ("min_blocks", min_blocks),
                    ("shared_book", shared_book.into()),
                ];
                (if group.is_some() { "groups" } else { "many" }, fields.into())
            }
        }
    }
}

/// The best first. Equal estimates keep their order, so the choice is a function of the input alone.
fn sorted(mut launches: Vec<(f64, Launch)>) -> Vec<(f64, Launch)> {
    launches.sort_by(|a, b| a.0.total_cmp(&b.0));
    launches.dedup_by_key(|x| x.1);
    launches
}

impl few::Launch {
    /// Launches worth trying, with the seconds that are expected, in no order; those of blocks that do a preparation themselves, if one
    /// is given.
    fn estimated(
        op: &Product,
        prepare: Option<&Prepare>,
        device: &Device,
        shared_book: bool,
    ) -> Vec<(f64, few::Launch)> {
        let planes = |warps| prepare.map_or(0, |p| p.shared_within(warps));
        let mut out = Vec::new();
        for warps in [1, 2, 4, 6, 7, 8, 12, 14, 16] {
            for depth in [1, 2, 3, 4] {
                for of_sm in [1, 2, 3, 4] {
                    for ahead in [1, 2] {
                        let parts = few::parts(op);
                        let rows = op.layout().row_tiles();
                        let blocks = rows.min((device.sms * of_sm / parts).max(1));
                        // No more rows than sums have room for.
                        let launch = few::Launch { warps, depth, blocks, ahead, min_blocks: of_sm, shared_book };
                        let of_tile = few::Plan::new(op, &launch).row_bytes(&launch);
                        let room = (device.shared_per_sm / of_sm - 1024).min(device.shared_per_block);
                        let most = (room.saturating_sub(planes(warps)) / of_tile).max(1);
                        let launch = few::Launch { blocks: blocks.max(rows.div_ceil(most)), ..launch };
                        if let Some(seconds) = estimate(op, &launch, prepare, device) {
                            out.push((seconds, launch));
                        }
                    }
                }
            }
        }
        out
    }
}

/// Instructions of a warp for the bytes of a tile.
fn decode_work(op: &Product, shared_book: bool) -> f64 {
    let (layout, planes) = (op.layout(), f64::from(op.terms.planes()));
    if layout.codes {
        return 8.0 * (5.0 + 6.0 * planes);
    }
    if let Some(stream) = &op.terms.stream {
        return 64.0 / f64::from(stream.vector) * of_window(stream, shared_book);
    }
    // Whole bytes are there; of others each part is shifted and masked, and joined to the one before.
    let parts = (0..layout.planes()).map(|p| layout.parts(p));
    parts.filter(|p| p[0].1 < 8).map(|p| 40.0 * p.len() as f64 - 16.0).sum()
}

/// Instructions for a window and what is multiplied of it.
fn of_window(stream: &Stream, shared_book: bool) -> f64 {
    match &stream.digits {
        // A cut, and what makes the word.
        Digits::Bytes { decode, .. } => 2.5 + decode.nodes.len() as f64 / 2.0,
        Digits::Book(book) => {
            let place =
                if book.decode.op(book.word) == &Op::Window { 0.0 } else { book.decode.nodes.len() as f64 / 2.0 };
            12.0 + place + if shared_book { 0.0 } else { GATHER }
        }
    }
}

/// Seconds of a launch of [`few`], with a preparation that its blocks do themselves; `None` if it does not fit.
fn estimate(op: &Product, launch: &few::Launch, prepare: Option<&Prepare>, device: &Device) -> Option<f64> {
    let (plan, layout) = (few::Plan::new(op, launch), op.layout());
    let threads = launch.warps * 32;
    let (planes, several) = (op.terms.planes(), plan.groups > 1);
    let fragments = launch.depth * plan.groups * (2 * plan.across + plan.kept_sums() + if several { 4 } else { 0 });
    let of_step = launch.depth * (layout.lane_words() + plan.number_registers()) + 1;
    let of_steps = launch.ahead * of_step + if several { 12 * (launch.ahead - 1) } else { 0 };
    // The more runs, the more of their numbers are made at once.
    let of_runs = (plan.sets - 1) * launch.depth * (4 + 4 * plan.groups);
    let of_planes = 16 * planes + 8 * (planes - 1) * plan.groups;
    // One run a tile and no rests: less is computed at once.
    let spare = if several && plan.sets == 1 && op.terms.rest.is_none() { SPARE } else { 0 };
    let registers = WORKING + fragments + of_steps + of_runs + of_planes - spare;
    let available = (device.registers_per_sm / (threads.next_multiple_of(128) * launch.min_blocks) / 8 * 8).min(255);
    let shared = plan.shared_bytes(launch, prepare);
    let grid = launch.blocks * plan.parts;
    let of_sm = grid.div_ceil(device.sms);
    // Values, weights of norms and signs are in registers before activations are.
    let (registers, preparing) = match prepare {
        None => (registers, 0.0),
        Some(prepare) => {
            let groups = prepare.within(launch.warps)?;
            let all = f64::from(of_sm * op.shape.cols) / f64::from(GROUP);
            let held = 4 + if prepare.norm.is_some() { 4 } else { 0 };
            (registers.max(of_steps + held * groups + PREPARING_REGISTERS), PREPARING.0 + PREPARING.1 * all)
        }
    };
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
    let rounds = of_sm.div_ceil(launch.min_blocks);
    let tiles = f64::from(of_sm * plan.most_rows * columns);
    let real = f64::from(of_sm * plan.most_rows * layout.col_tiles());
    let bytes = real * layout.bytes() as f64 / f64::from(layout.row_tiles() * layout.col_tiles());
    let warps = f64::from(of_sm.min(launch.min_blocks) * launch.warps);
    let in_flight = warps * f64::from(launch.ahead * of_step * 128);
    // Words that several parts of the tokens take come from memory once.
    let bandwidth = device.bandwidth * f64::from(plan.parts.min(2)) / f64::from(device.sms);
    let memory = bytes / bandwidth.min(in_flight / LATENCY);
    let groups = f64::from(plan.groups);
    let runs = f64::from(op.terms.run.map_or(1, |_| plan.sets)) * expressions(op);
    let of_step = STEP_WORK.0 + if plan.passes > 1 { STEP_WORK.1 * groups } else { 0.0 };
    let work = TILE_WORK
        + decode_work(op, launch.shared_book)
        + runs * groups * f64::from(planes) * RUN_WORK
        + of_step / f64::from(launch.depth);
    let share = issue_share(if op.terms.stream.is_some() { STREAM_ISSUE } else { ISSUE }, warps);
    let issue = tiles * work / 4.0 / (share * device.clock);
    let passes = f64::from(plan.passes) * PASS + f64::from(rounds - 1) * LATENCY;
    let inexact = if columns == layout.col_tiles() { 1.0 } else { INEXACT };
    Some(START + preparing + passes + inexact * (memory.powf(TOGETHER) + issue.powf(TOGETHER)).powf(1.0 / TOGETHER))
}

/// Share of the issue slots that `warps` warps of an SM fill, by how many fill most of them.
fn issue_share((most, many): (f64, f64), warps: f64) -> f64 {
    most * (1.0 - (-warps / many).exp())
}

/// Expressions of fields of a run: slope, and rest if there is one.
fn expressions(op: &Product) -> f64 {
    1.0 + f64::from(u8::from(op.terms.rest.is_some()))
}

/// Warps of a block of [`many`].
const WARPS: [u32; 3] = [4, 8, 16];
/// Rows of tiles of a warp, and blocks on an SM to try.
const CHOICES: [(u32, u32); 5] = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)];
/// Tiles of a chunk, and of them on their way, to try.
const CHUNKS: [(u32, u32); 7] = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)];
/// Warps of an SM from which groups that multiply a few planes at a time keep its tensor cores busy.
const NARROW_WARPS: u32 = 16;
/// Registers of a thread of [`many`] for addresses and for what is being computed.
const MANY_WORKING: u32 = 88;
/// The same, where groups of warps multiply tiles of one run whose integers are operands as they are, by the sets of registers that their
/// products take in turn.
const GROUP_WORKING: [u32; 2] = [17, 36];
/// Instructions of a warp for a tile, beside those for its bytes, runs and products.
const MANY_TILE: f64 = 92.6;
/// Instructions for the numbers of a run and two rows, for each expression of fields.
const MANY_RUN: f64 = 13.2;
/// Issue slots of a product of 32 bits added to 64.
const WIDE: f64 = 3.42;
/// Issue slots of a product of a warp by itself, and of its operands' way from shared memory.
const FRAGMENT: f64 = 2.82;
/// Share of an SM's issue slots that many warps fill; and the number of warps that fill 1 - 1/e of that.
const MANY_ISSUE: (f64, f64) = (0.773, 5.2);
/// Share of the tensor cores' time, as it is known, that products of groups of warps take, and of warps by themselves.
const TENSOR: (f64, f64) = (0.8, 1.11);
/// Cycles that warps wait for each other at a chunk of activations, and cycles for copying and adding up a group of planes.
const CHUNK: (f64, f64) = (460.0, 277.0);
/// Share of the memory's bandwidth that reading reaches.
const BANDWIDTH: f64 = 0.89;
/// Seconds from asking for a word to having it.
const MANY_LATENCY: f64 = 0.4e-6;
/// Seconds from one launch to the next.
const MANY_START: f64 = 1.03e-6;
/// Cycles that scaling and storing a row of 32 results takes an SM.
const RESULTS: f64 = 8.8;
/// Bytes that an SM reads from the L2 cache in a cycle.
const L2: f64 = 71.0;
/// Share of the shorter of computing and multiplying that is not hidden behind the longer; and of reading and those.
const REST: (f64, f64) = (0.31, 0.32);

impl many::Launch {
    /// Launches worth trying, with the seconds that are expected, in no order.
    fn estimated(op: &Product, device: &Device, shared_book: bool) -> Vec<(f64, many::Launch)> {
        let (layout, mut out) = (op.layout(), Vec::new());
        let least = op.batch.div_ceil(many::MAX_PART);
        let parts = [1, 2, 4].map(|n| n * least).into_iter().filter(|&p| p == least || op.batch.div_ceil(p) >= 4);
        for token_parts in parts {
            for (warps, col_warps) in WARPS.into_iter().flat_map(|w| [1, 2, 4, 8].map(|c| (w, c))) {
                let ways = CHOICES.into_iter().flat_map(|c| CHUNKS.map(|chunk| (c, chunk)));
                let groups_fit = device.group_products > 0.0 && (warps / col_warps).is_multiple_of(4);
                let tokens = op.batch.div_ceil(token_parts);
                let (halves, narrow) = (Some(many::Group::halves(tokens)), Some(many::Group::narrow(tokens)));
                for (((row_tiles, min_blocks), (chunk, ahead)), group) in
                    ways.flat_map(|w| [None, halves, narrow].map(|g| (w, g)))
                {
                    let row_warps = warps / col_warps;
                    let fits = row_warps > 0 && col_warps * chunk <= layout.col_tiles();
                    if !fits || group.is_some() && (!groups_fit || row_tiles > 1) {
                        continue;
                    }
                    let most = (device.sms * min_blocks / token_parts).max(1);
                    let blocks = layout.row_tiles().div_ceil(row_warps * row_tiles).min(most);
                    let launch = many::Launch {
                        group,
                        row_warps,
                        col_warps,
                        row_tiles,
                        chunk,
                        ahead,
                        token_parts,
                        blocks,
                        min_blocks,
                        shared_book,
                    };
                    if group == narrow {
                        // The numbers of several runs have no room in few registers, and many sums take long to meet.
                        let meets = col_warps > 1 && tokens > many::MAX_PART / 2;
                        // Few groups in turn are no better than halves, if these fit.
                        let halves = many::Launch { group: halves, ..launch };
                        let few = warps * min_blocks < NARROW_WARPS;
                        let other = || group == halves.group || estimate_many(op, &halves, device).is_some();
                        if op.runs() > 1 || meets || few && other() {
                            continue;
                        }
                    }
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
    let of_words = plan.layout.lane_words() + fields;
    let of_windows = if terms.stream.is_some() { 32 } else { 0 };
    let of_tile = launch.ahead * of_words + 16 * terms.planes() + 2 * plan.runs + of_windows;
    let products = if let Some(group) = launch.group {
        // At least 32 planes of the past.
        (group.planes / 2).max(16) * group.sets + 2 * (launch.ahead - 1)
    } else {
        // Warps by themselves begin several runs at once.
        let of_runs = if plan.runs > 1 { 20 + 10 * plan.runs } else { 0 };
        8 + 8 * launch.row_tiles + of_runs.min(80) + 16 * (terms.planes() - 1)
    };
    let working = match launch.group {
        Some(group) if plan.runs == 1 && !plan.offsets => GROUP_WORKING[(group.sets - 1) as usize],
        _ => MANY_WORKING,
    };
    let registers = working + launch.row_tiles * (4 * plan.groups + of_tile) + products;
    let available = (device.registers_per_sm / (threads.next_multiple_of(128) * launch.min_blocks) / 8 * 8).min(255);
    let shared = plan.shared_bytes(launch);
    // Beside the sums of more than 32 tokens the words of two tiles do not fit, whatever the sum of registers is.
    let spills = launch.group.is_some() && launch.ahead > 1 && plan.groups > 8;
    if registers > available
        || spills
        || threads * launch.min_blocks > device.threads_per_sm
        || launch.min_blocks * (shared + 1024) > device.shared_per_sm
        || shared > device.shared_per_block
    {
        return None;
    }

    let per_sm = (launch.blocks * launch.token_parts).div_ceil(device.sms);
    let resident = per_sm.min(launch.min_blocks);
    let rows = plan.layout.row_tiles().div_ceil(launch.blocks);
    let Busiest { takers, of_scheduler, at_once: _ } = Busiest::of(
        resident,
        rows.div_ceil(launch.row_tiles),
        launch.group.is_some(),
        launch.row_warps,
        launch.col_warps,
    );
    let steps = plan.steps(launch) * per_sm.div_ceil(resident) * launch.row_tiles;
    let of_scheduler = f64::from(of_scheduler * steps);
    let tiles = f64::from(per_sm * takers * plan.steps(launch) * launch.col_warps * launch.row_tiles);

    let (groups, runs) = (f64::from(plan.groups), f64::from(plan.runs));
    let bytes = decode_work(op, launch.shared_book);
    let (expressions, of_planes) = (expressions(op), f64::from(terms.planes()));
    let numbers = if terms.run.is_some() { runs * expressions * MANY_RUN } else { 0.0 };
    let wide = if terms.run.is_some() { WIDE * expressions } else { 2.0 };
    let beside = plan.offsets && (terms.lowest != 0 || terms.zero.is_some());
    let sum = 2.0 * (1.0 + f64::from(u8::from(beside)) + wide);
    // A run of half a product takes a whole one.
    let across = runs.max(4.0) * of_planes;
    let issued =
        if launch.group.is_some() { of_planes * (4.0 + 2.0 * groups * runs) } else { groups * across * FRAGMENT };
    let offsets = if plan.offsets { groups * runs / f64::from(launch.row_tiles) } else { 0.0 };
    let slots = MANY_TILE + bytes + numbers + groups * runs * sum * of_planes + issued + offsets;
    let warps = f64::from(resident * launch.warps());
    let issue = of_scheduler * slots / issue_share(MANY_ISSUE, warps);
    let planes = groups * 8.0;
    let tensor = if launch.group.is_some() {
        TENSOR.0 * tiles * across * planes.max(32.0) * 16.0 * 32.0 / device.group_products
    } else {
        TENSOR.1 * of_scheduler * groups * across * 4096.0 * 4.0 / device.int8_products
    };
    let banks = if launch.group.is_some() {
        tiles * across * planes / 16.0
    } else {
        tiles * groups * across * 2.0 / f64::from(launch.row_tiles)
    };
    let staged = f64::from(per_sm * plan.rounds * plan.chunks) * f64::from(plan.stage_cells() * 16);
    let layout = &plan.layout;
    let of_tile = layout.bytes() as f64 / f64::from(layout.row_tiles() * layout.col_tiles());
    let in_flight = warps * f64::from(launch.row_tiles * launch.ahead * of_words * 128);
    let bandwidth = (device.bandwidth * BANDWIDTH / f64::from(device.sms)).min(in_flight / MANY_LATENCY);
    let memory = tiles * of_tile / bandwidth * device.clock / f64::from(launch.token_parts);
    let multiply = tensor.max(banks);
    let compute = issue.max(multiply);
    let work = memory.max(staged / L2).max(compute + REST.0 * issue.min(multiply)) + REST.1 * memory.min(compute);
    let items = (plan.stage_cells() / 64).div_ceil(launch.warps());
    let of_chunk = CHUNK.0 + if plan.offsets { f64::from(items) * CHUNK.1 } else { 0.0 };
    let chunks = f64::from(plan.rounds * plan.chunks * per_sm.div_ceil(resident)) * of_chunk;
    let results = f64::from(per_sm * rows * 16 * plan.tokens) / 32.0 * RESULTS;
    Some(MANY_START + (work + chunks + results) / device.clock)
}

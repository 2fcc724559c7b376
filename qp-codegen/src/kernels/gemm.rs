//! Products of packed weights with the activations of many tokens, up to [`MAX_BATCH`] in one launch.
//!
//! # How it works
//!
//! A block takes a run of row tiles, and its warps have row tiles of their own, [`Launch::row_tiles`] each. Together
//! they go over the columns in *chunks*: the planes of a chunk (`reference::split_activation`, two a token) pass by in
//! shared memory, brought by asynchronous copies a chunk ahead, with one barrier a chunk. A warp decodes a column of
//! its tiles into tensor-core operands, once, and multiplies them with all planes, eight a product; sums stay in
//! registers until the last column. Each operand of activations that is read from shared memory serves all row tiles
//! of the warp, for reading them is what fills shared memory's time.
//!
//! On Hopper, groups of four warps can multiply together ([`Launch::group`], `wgmma`): at its full rate, and without
//! reading the activations through the warps, which only decode. A group decodes a piece of a tile while the piece
//! before is multiplied. All warps of a block go through all steps; those that have no row tile of their own take the
//! block's last, and write nothing.
//!
//! Either way a chunk lies in shared memory as in global memory, in cells ([`crate::layout::activation_at`]), but for planes
//! that fill up the last product.
//!
//! A matrix with few row tiles leaves warps without work. Then the columns are shared, by [`Launch::col_warps`] warps
//! of a block, whose sums meet in shared memory, or by [`Launch::split`] blocks, whose sums meet in global memory; or
//! the tokens are, by [`Launch::token_parts`] blocks that each decode all weights. The last is also for sums that would
//! not fit the registers: a prompt is cut into parts of up to [`MAX_PART`] tokens, and the blocks that take the parts with
//! the same weights are neighbours, so that the weights come from memory once.
//!
//! All sums are exact integers, so nothing of this changes the result, which is that of [`super::gemv`] to the bit.

use super::c_name;
use super::decode::{Register, Steps, flatten};
use super::experts::Experts;
use super::operands::{self, Form, Gemv, Operands, TokenScale, Words, divide};
use crate::ir::{Builder, Cache, Elem, Kernel, MAX_GROUP_COLUMNS, Mem, Special, V, Var, group_columns};
use crate::layout::{CELL, COLUMN_PAD, Packed};

/// Most tokens of one launch.
pub const MAX_BATCH: u32 = 2048;

/// Most tokens of a part ([`Launch::token_parts`]): two planes a token are the columns of a product of warp groups.
pub const MAX_PART: u32 = MAX_GROUP_COLUMNS / 2;

/// Chunks of activations in shared memory: one is read while the next arrives.
const STAGES: u32 = 2;

/// Groups of four tokens whose scales are on their way at once.
const SCALES: usize = 4;

/// Products of 32 columns that a group of warps starts at once, while it goes on decoding.
const PIECE: u32 = 2;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Groups of four warps, one below the other, multiply together: only where there is `wgmma`.
    pub group: bool,
    /// Warps one below the other, each with row tiles of its own.
    pub row_warps: u32,
    /// Warps that share the columns of the same row tiles.
    pub col_warps: u32,
    /// Row tiles that a warp takes at once.
    pub row_tiles: u32,
    /// Groups of tiles (one of each code of a mix) that a warp takes of a chunk.
    pub chunk: u32,
    /// Parts of the tokens, each with blocks of its own.
    pub token_parts: u32,
    /// Parts of the columns, each with blocks of its own.
    pub split: u32,
    /// Blocks that share the row tiles (the grid has `blocks · split · token_parts`).
    pub blocks: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
    /// Shared memory that the copies of tables may take, in bytes.
    pub table_bytes: u32,
}

impl Launch {
    /// Warps of a block.
    pub fn warps(&self) -> u32 {
        self.row_warps * self.col_warps
    }

    /// Steps whose words a warp has on their way: groups, which decode and multiply in turn, wait for none; the steps of a
    /// chunk take the registers for them in turn.
    pub(super) fn ahead(&self) -> u32 {
        if self.group && self.chunk.is_multiple_of(2) { 2 } else { 1 }
    }

    /// True if warps add their sums up.
    fn meets(&self) -> bool {
        self.col_warps * self.split > 1
    }
}

/// Sizes that follow from the operation and its launch.
pub(super) struct Plan {
    pub(super) layout: Packed,
    /// Tokens of a part; the last may have fewer.
    pub(super) tokens: u32,
    /// Tensor-core products side by side, of 8 planes each, to hold all planes of a part.
    pub(super) groups: u32,
    /// Products a register: 2 for 16-bit entries.
    pub(super) products: u32,
    /// Chunks of a part of the columns.
    pub(super) chunks: u32,
    /// Times that the warps take row tiles, in the block that has most.
    pub(super) rounds: u32,
    /// Columns of a chunk, in units of a cell's.
    chunk_units: u32,
}

impl Plan {
    pub(super) fn new(op: &Gemv, launch: &Launch) -> Plan {
        let layout = Packed::new(op.quantizer, op.shape);
        let codes = layout.lane_words.len() as u32;
        let tokens = op.batch.div_ceil(launch.token_parts);
        let tiles = launch.col_warps * launch.chunk * codes;
        let chunk_units = tiles * layout.tile.cols / CELL;
        let planes = if launch.group { group_columns(2 * tokens) } else { (2 * tokens).next_multiple_of(8) };
        Plan {
            tokens,
            groups: planes / 8,
            products: operands::products(op.quantizer),
            chunks: layout.col_tiles().div_ceil(tiles).div_ceil(launch.split),
            rounds: layout.row_tiles().div_ceil(launch.blocks).div_ceil(launch.row_warps * launch.row_tiles),
            chunk_units,
            layout,
        }
    }

    /// Steps of a warp through the columns: groups of tiles.
    pub(super) fn steps(&self, launch: &Launch) -> u32 {
        self.chunks * launch.chunk
    }

    /// Accumulators of a warp, each of 16 rows and 8 planes.
    pub(super) fn accumulators(&self, launch: &Launch) -> u32 {
        launch.row_tiles * self.layout.row_parts() * self.groups * self.products
    }

    /// Sums of a block's row tiles.
    fn block_sums(&self, launch: &Launch) -> u32 {
        self.accumulators(launch) * launch.row_warps * 128
    }

    /// Cells of the same columns in shared memory: planes, and what fills up the last product.
    pub(super) fn planes(&self) -> u32 {
        self.groups * 8
    }

    /// Cells of a staged chunk.
    pub(super) fn stage_cells(&self) -> u32 {
        self.chunk_units * self.planes()
    }

    /// Bytes of shared memory beside the tables.
    pub(super) fn shared_bytes(&self, launch: &Launch) -> u32 {
        let sums = if launch.meets() && launch.split == 1 { self.block_sums(launch) * 4 } else { 16 };
        STAGES * self.stage_cells() * 16 + sums
    }
}

/// Makes the kernel; its parameters are those of [`super::gemv::lower`].
///
/// # Panics
/// For launches that are none: groups of other than whole four warps or for more than [`MAX_PART`] tokens, columns split
/// over blocks whose warps take row tiles several times, more blocks than row tiles.
pub fn lower(op: &Gemv, launch: &Launch) -> Kernel {
    lower_for(op, launch, Form::Results)
}

/// The same in another form: see [`super::gemv::lower_for`].
pub(super) fn lower_for(op: &Gemv, launch: &Launch, form: Form) -> Kernel {
    let experts = form.experts();
    assert!((1..=MAX_BATCH).contains(&op.batch), "batch");
    let plan = Plan::new(op, launch);
    assert!(!launch.group || launch.row_warps.is_multiple_of(4), "groups of four warps");
    assert!(!launch.group || plan.tokens <= MAX_PART, "more tokens than a product of warp groups has columns for");
    assert!(launch.split == 1 || plan.rounds == 1, "sums of several rounds have no place to meet");
    assert!(launch.blocks <= plan.layout.row_tiles(), "a block without rows");
    let name = format!("gemm_{}_{}x{}_b{}", c_name(&op.quantizer.name), op.shape.rows, op.shape.cols, op.batch);
    assert!(launch.split == 1 || experts.is_none(), "units have no place to meet");
    let grid = [launch.blocks * launch.split * launch.token_parts, experts.map_or(1, Experts::units)];
    let b = Builder::new(&name, grid, launch.warps() * 32);
    b.doc(operands::doc(op, form));
    b.min_blocks(launch.min_blocks);
    b.dependent_launch();
    if experts.is_none() {
        b.apart();
    }
    Emit::new(&b, op, launch, &plan, form).kernel();
    b.finish()
}

/// Elements of `partial` and `arrived` that a launch needs, at least 1 each.
pub fn meeting_place(op: &Gemv, launch: &Launch) -> (usize, usize) {
    if launch.split == 1 {
        return (1, 1);
    }
    let places = (launch.blocks * launch.token_parts) as usize;
    (Plan::new(op, launch).block_sums(launch) as usize * places, places)
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Gemv<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    operands: Operands<'b, 'a>,
    /// Activations: [`STAGES`] chunks of all planes.
    staged: Mem,
    /// Where sums meet, and where in it those of this block begin.
    sums: Option<(Mem, V<'b>)>,
    thread: V<'b>,
    lane: V<'b>,
    row_warp: V<'b>,
    col_warp: V<'b>,
    /// Which of the places where blocks meet is this block's.
    place: V<'b>,
    /// First row tile, and how many, of this block.
    first_row: V<'b>,
    rows: V<'b>,
    /// First chunk, first token.
    first_chunk: V<'b>,
    first_token: V<'b>,
    rounds: V<'b>,
}

/// Two rows of results, eight apart.
struct Rows<'b> {
    exist: V<'b>,
    /// Each with its scale.
    rows: [(V<'b>, V<'b>); 2],
}

/// A token of results.
struct Token<'b> {
    /// `None`: surely.
    exists: Option<V<'b>>,
    token: V<'b>,
    scale: TokenScale<'b>,
}

impl<'b, 'a> Emit<'b, 'a> {
    fn new(b: &'b Builder, op: &'a Gemv<'a>, launch: &'a Launch, plan: &'a Plan, form: Form<'a>) -> Self {
        let operands = Operands::new(b, op, &plan.layout, launch.table_bytes, meeting_place(op, launch), form, None);
        let staged = b.shared("staged", Elem::U32, STAGES * plan.stage_cells() * 4);
        let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
        // The blocks of the same weights are neighbours, so that those are read from memory once.
        let id = b.special(Special::BlockX);
        let (place, token_part) = divide(b, id, launch.token_parts);
        let (block, part) = divide(b, place, launch.split);
        let place = block * launch.token_parts + token_part;
        let sums = if !launch.meets() {
            None
        } else if launch.split == 1 {
            Some((b.shared("sums", Elem::I32, plan.block_sums(launch)), b.i32(0)))
        } else {
            Some((operands.partial, place * plan.block_sums(launch)))
        };
        let (row_warp, col_warp) = if launch.group && launch.col_warps > 1 {
            // Warps of a group have the same columns.
            let (col_warp, row_warp) = divide(b, warp, launch.row_warps);
            (row_warp, col_warp)
        } else {
            divide(b, warp, launch.col_warps)
        };
        let row_tiles = plan.layout.row_tiles();
        let first_row = block * row_tiles / launch.blocks;
        let rows = (block + 1) * row_tiles / launch.blocks - first_row;
        let at_once = launch.row_warps * launch.row_tiles;
        let rounds = if plan.rounds == 1 { b.i32(1) } else { (rows + (at_once - 1)) / at_once };
        let first_chunk = part * plan.chunks;
        let first_token = token_part * plan.tokens;
        Emit {
            b,
            op,
            launch,
            plan,
            operands,
            staged,
            sums,
            thread,
            lane,
            row_warp,
            col_warp,
            place,
            first_row,
            rows,
            first_chunk,
            first_token,
            rounds,
        }
    }

    fn kernel(&self) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let of_tile = || self.operands.words(0..plan.layout.lane_words.len() as u32);
        let of_step = || (0..launch.row_tiles).map(|_| of_tile()).collect();
        let words = || (0..launch.ahead()).map(|_| of_step()).collect::<Vec<Vec<Words>>>();
        let first_words = |words: &[Vec<Words>]| {
            (0..).zip(words).for_each(|(step, words)| self.fetch(b.i32(step), 0, words));
        };
        let tables = |zero: V<'b>| {
            b.comment("Tables into shared memory.");
            self.operands.decoder.fill(launch.warps() * 32);
            if let (Some((sums, _)), 1) = (self.sums, launch.split) {
                b.for_(self.thread, plan.block_sums(launch), launch.warps() * 32, |i| {
                    b.store(sums, i, zero, Elem::I32);
                });
            }
        };
        let first_chunks = || {
            for ahead in 0..STAGES - 1 {
                self.stage(b.i32(ahead as i32));
            }
        };
        if self.operands.tokens.are_pairs() {
            let zero = b.i32(0);
            tables(zero);
            b.grid_wait();
            b.grid_launch();
            return self.operands.tokens.in_unit(
                b,
                b.special(Special::BlockY),
                self.thread,
                launch.warps() * 32,
                || {
                    let words = words();
                    first_words(&words);
                    first_chunks();
                    self.products(&words, zero);
                },
            );
        }
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let words = words();
        let zero = b.i32(0);
        first_words(&words);
        tables(zero);
        b.grid_wait();
        first_chunks();
        b.grid_launch();

        self.products(&words, zero);
    }

    /// All behind the first words and chunks, which are on their way.
    fn products(&self, words: &[Vec<Words>], zero: V<'b>) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        b.comment("Row tiles, chunks of columns, groups of tiles.");
        let none = b.vector(&[zero; 4]);
        let acc: Vec<Var> = (0..plan.accumulators(launch)).map(|_| b.var(none)).collect();
        b.for_(0, self.rounds, 1, |round| {
            b.for_(0, plan.chunks, 1, |chunk| {
                let chunk = round * plan.chunks + chunk;
                b.async_wait(STAGES - 2);
                if launch.group {
                    b.group_fence();
                }
                b.barrier();
                self.stage(chunk + (STAGES - 1));
                let slot = chunk % STAGES * plan.stage_cells();
                let steps = |first: V<'b>| {
                    for (i, words) in (0..).zip(words) {
                        let i = first + i;
                        let next = chunk * launch.chunk + i + launch.ahead();
                        let step = || self.step(slot, i, next, words, &acc);
                        if launch.group { step() } else { self.busy(round, step) }
                    }
                };
                let ahead = launch.ahead();
                if launch.chunk == ahead {
                    steps(zero)
                } else {
                    b.for_(0, launch.chunk, ahead, steps)
                }
                if launch.group {
                    b.group_wait(0);
                }
            });
            self.finish(round, &acc);
        });
    }

    /// Runs `work` in the warps that have row tiles in this round.
    fn busy(&self, round: V<'b>, work: impl FnOnce()) {
        let at_once = self.launch.row_warps * self.launch.row_tiles;
        let all = self.plan.layout.row_tiles() == self.launch.blocks * self.plan.rounds * at_once;
        if all { work() } else { self.b.if_(self.row_tile(round, 0).lt(self.rows), work) }
    }

    /// Row tile `m` of the warp in a round, within the block.
    fn row_tile(&self, round: V<'b>, m: u32) -> V<'b> {
        (round * self.launch.row_warps + self.row_warp) * self.launch.row_tiles + m
    }

    /// Starts loading the words of step `step` (steps of all rounds count on), if there is one, for row tiles from
    /// `first_tile` on.
    fn fetch(&self, step: V<'b>, first_tile: u32, words: &[Words]) {
        let (b, plan) = (self.b, self.plan);
        let per_round = plan.steps(self.launch);
        let (round, within) = if plan.rounds == 1 { (b.i32(0), step) } else { divide(b, step, per_round) };
        let group = (self.first_chunk * self.launch.chunk + within) * self.launch.col_warps + self.col_warp;
        let codes = plan.layout.lane_words.len() as u32;
        let covered = self.launch.split * per_round * self.launch.col_warps * codes;
        let load = || {
            for (m, words) in (first_tile..).zip(words) {
                // A warp's last row tiles may lie beyond the block's: their sums are not written.
                let row = self.first_row + self.row_tile(round, m).min(self.rows - 1);
                let first = row * self.operands.row_words() + group * self.operands.period();
                self.operands.fetch(first, group * codes, 0, words, covered != plan.layout.col_tiles(), self.lane);
            }
        };
        if step.as_const().is_some() { load() } else { b.if_(step.lt(self.rounds * per_round), load) }
    }

    /// Starts copying the activations of a chunk (chunks of all rounds count on), if there is one.
    fn stage(&self, chunk: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let units = self.op.shape.cols.next_multiple_of(COLUMN_PAD) / CELL;
        let covered = plan.chunks * self.launch.split * plan.chunk_units <= units;
        let slot = chunk % STAGES * plan.stage_cells();
        let within = if plan.rounds == 1 { chunk } else { chunk % plan.chunks };
        let first = (self.first_chunk + within) * plan.chunk_units;
        let all = 2 * self.op.batch;
        let (cells, threads) = (plan.stage_cells(), self.launch.warps() * 32);
        b.if_(chunk.lt(self.rounds * plan.chunks), || {
            for round in 0..cells.div_ceil(threads) {
                let cell = self.thread + round * threads;
                let copy = || {
                    let (unit, plane) = divide(b, cell, plan.planes());
                    // Planes that fill up the last product repeat the last token's; their sums are not read.
                    let plane = self.first_token * 2 + plane;
                    let whole =
                        plan.planes() == 2 * plan.tokens && plan.tokens * self.launch.token_parts == self.op.batch;
                    let plane = if whole { plane } else { plane.min(all - 1) };
                    let unit = first + unit;
                    let from = unit * self.operands.tokens.planes() + self.operands.tokens.plane(plane);
                    let copy = || b.async_copy(self.staged, slot + cell, self.operands.x, from, 16);
                    if covered {
                        copy();
                    } else {
                        let zeros = b.vector(&[b.u32(0); 4]);
                        b.if_else(unit.lt(units), copy, || b.store(self.staged, (slot + cell) * 4, zeros, Elem::U32));
                    }
                };
                if (round + 1) * threads <= cells { copy() } else { b.if_(cell.lt(cells), copy) }
            }
        });
        b.async_commit();
    }

    /// Decodes and multiplies group `i` of a chunk that lies at `slot`, and fetches the words of step `next`.
    fn step(&self, slot: V<'b>, i: V<'b>, next: V<'b>, words: &[Words], acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let current: Vec<Vec<Vec<V>>> = words
            .iter()
            .map(|tiles| tiles.iter().map(|t| flatten(&t.iter().map(|&v| b.get(v)).collect::<Vec<_>>())).collect())
            .collect();
        let codes = plan.layout.lane_words.len();
        let tile_units = plan.layout.tile.cols / CELL;
        let group = i * self.launch.col_warps + self.col_warp;
        let first = slot + group * (codes as u32 * tile_units * plan.planes());
        if !self.launch.group {
            self.fetch(next, 0, words);
            return self.multiply_by_warps(&current, first, acc);
        }
        for code in 0..codes {
            for (m, current) in current.iter().enumerate() {
                let tile = self.operands.decoder.begin(code, &current[code]);
                let decoded = || {
                    if code + 1 == codes {
                        self.fetch(next, m as u32, &words[m..=m]);
                        // The assembler would put the loads off, but not beyond this.
                        b.warp_sync();
                    }
                };
                self.multiply_by_groups(tile, m as u32, first + code as u32 * tile_units * plan.planes(), acc, decoded);
            }
        }
    }

    /// Decodes row tiles from their words, by row tile and code, and multiplies them with all planes, which lie at `first`.
    fn multiply_by_warps(&self, words: &[Vec<Vec<V<'b>>>], first: V<'b>, acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let mut sums: Vec<V> = acc.iter().map(|&v| b.get(v)).collect();
        let tile_units = plan.layout.tile.cols / CELL;
        // Lane 8j + i names row i of matrix j: of planes 0 to 8 the first 16 columns, the second, of planes 8 to 16 …
        let plane = (self.lane & 7) + (self.lane >> 4) * 8;
        let first = (first + plane + ((self.lane >> 3) & 1) * plan.planes()) * 4;
        for code in 0..plan.layout.lane_words.len() as u32 {
            let decoder = &self.operands.decoder;
            let tiles: Vec<Vec<Register>> =
                words.iter().map(|words| decoder.tile(code as usize, &words[code as usize])).collect();
            for kt in 0..tile_units / 2 {
                for pair in (0..plan.groups).step_by(2) {
                    let two = pair + 1 < plan.groups;
                    let at = first + 4 * ((code * tile_units + kt * 2) * plan.planes() + pair * 8);
                    let x = b.load_matrix(self.staged, at, if two { 4 } else { 2 }).lanes();
                    for (group, x) in (pair..).zip(x.chunks_exact(2)) {
                        self.multiply(&tiles, kt, group, [x[0], x[1]], &mut sums);
                    }
                }
            }
        }
        for (&var, &sum) in acc.iter().zip(&sums) {
            b.set(var, sum);
        }
    }

    /// Decodes row tile `m` piece by piece, and multiplies each with all planes, which lie at `first`, while the next is
    /// decoded. After the last has been, does `decoded`.
    fn multiply_by_groups(&self, mut tile: Steps<'_, 'b, '_>, m: u32, first: V<'b>, acc: &[Var], decoded: impl Fn()) {
        let (b, plan) = (self.b, self.plan);
        let (parts, across) = (plan.layout.row_parts(), plan.layout.tile.cols / 32);
        for (part, kt) in (0..parts).flat_map(|part| (0..across).step_by(PIECE as usize).map(move |kt| (part, kt))) {
            let end = (kt + PIECE).min(across);
            let mut operands = |kt: u32| {
                let first = (part * across + kt) * 4;
                operands::operands(&[0, 1, 2, 3].map(|i| tile.register(first + i)))
            };
            let steps: Vec<_> = (kt..end).map(&mut operands).collect();
            if (part + 1, end) == (parts, across) {
                decoded();
            }
            for product in 0..plan.products as usize {
                let a: Vec<[V; 4]> = steps.iter().map(|s| s[product].1).collect();
                let sums: Vec<Var> = (0..plan.groups).map(|group| acc[self.slot(m, part, group) + product]).collect();
                let at = first + kt * 2 * plan.planes();
                b.mma_group(steps[0][product].0, &a, &sums, self.staged, at, plan.planes());
            }
            // Of the piece before, the registers are free.
            b.group_wait(plan.products);
        }
    }

    /// Multiplies 32 columns of the warp's tiles with a group of planes.
    fn multiply(&self, tiles: &[Vec<Register<'b>>], kt: u32, group: u32, x: [V<'b>; 2], sums: &mut [V<'b>]) {
        let plan = self.plan;
        for (m, registers) in (0..).zip(tiles) {
            for part in 0..plan.layout.row_parts() {
                let first = ((part * plan.layout.tile.cols / 32 + kt) * 4) as usize;
                let slot = self.slot(m, part, group);
                operands::multiply(self.b, &registers[first..first + 4], x, &mut sums[slot..]);
            }
        }
    }

    /// The first accumulator of a part of a row tile and a group of planes.
    fn slot(&self, m: u32, part: u32, group: u32) -> usize {
        (((m * self.plan.layout.row_parts() + part) * self.plan.groups + group) * self.plan.products) as usize
    }

    /// Writes the results of a round's row tiles and clears the sums.
    fn finish(&self, round: V<'b>, acc: &[Var]) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let Some((sums, first)) = self.sums else {
            self.busy(round, || self.write_own(round, acc));
            return self.clear(acc);
        };
        // An accumulator's components lie apart, the lanes side by side.
        let place = |accumulator: V<'b>, component: u32| first + (accumulator * 4 + component) * 32 + self.lane;
        self.busy(round, || {
            for (k, &var) in (0..).zip(acc) {
                for (i, value) in (0..).zip(b.get(var).lanes()) {
                    let accumulator = self.row_warp * plan.accumulators(launch) + k;
                    b.atomic_add(sums, place(accumulator, i), value);
                }
            }
        });
        self.clear(acc);
        let write = || {
            let warps = launch.warps();
            let items = launch.row_warps * plan.accumulators(launch) / plan.products;
            b.for_(b.special(Special::Warp), items, warps, |item| {
                let load = |product: u32| {
                    let load = |i: u32| {
                        let at = place(item * plan.products + product, i);
                        let sum = b.load_as(sums, at, Elem::I32, 1, Cache::Default);
                        b.store(sums, at, b.i32(0), Elem::I32);
                        sum
                    };
                    (0..4).map(load).collect::<Vec<_>>()
                };
                let of_item: Vec<_> = (0..plan.products).map(load).collect();
                let (tile, group) = divide(b, item, plan.groups);
                let (tile, part) = divide(b, tile, plan.layout.row_parts());
                let tile = round * (launch.row_warps * launch.row_tiles) + tile;
                let (rows, token) = (self.rows_of(tile, part), self.token_of(group));
                let before = self.before(&rows, &token);
                self.write(&rows, &token, before, &of_item);
            });
        };
        if launch.split == 1 {
            b.barrier();
            write();
        } else {
            self.operands.when_all_arrived(self.place, launch.split, self.thread, write);
        }
    }

    /// Writes the results of the warp's row tiles of a round from its own sums.
    fn write_own(&self, round: V<'b>, acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let parts = (0..self.launch.row_tiles).flat_map(|m| (0..plan.layout.row_parts()).map(move |part| (m, part)));
        let rows: Vec<(u32, u32, Rows)> =
            parts.map(|(m, part)| (m, part, self.rows_of(self.row_tile(round, m), b.i32(part as i32)))).collect();
        let groups: Vec<u32> = (0..plan.tokens.div_ceil(4)).collect();
        for groups in groups.chunks(SCALES) {
            let load = |&group: &u32| {
                let token = self.token_of(b.i32(group as i32));
                let before: Vec<_> = rows.iter().map(|(_, _, rows)| self.before(rows, &token)).collect();
                (group, token, before)
            };
            for (group, token, before) in groups.iter().map(load).collect::<Vec<_>>() {
                for ((m, part, rows), before) in rows.iter().zip(before) {
                    let slot = self.slot(*m, *part, group);
                    let sums = acc[slot..][..plan.products as usize].iter().map(|&v| b.get(v).lanes());
                    self.write(rows, &token, before, &sums.collect::<Vec<_>>());
                }
            }
        }
    }

    fn clear(&self, acc: &[Var]) {
        let none = self.b.vector(&[self.b.i32(0); 4]);
        acc.iter().for_each(|&v| self.b.set(v, none));
    }

    /// The two rows that the lane holds of 16, of the block's row tile `tile`, if it has that.
    fn rows_of(&self, tile: V<'b>, part: V<'b>) -> Rows<'b> {
        let exist = tile.lt(self.rows);
        let first = (self.first_row + tile.min(self.rows - 1)) * self.plan.layout.tile.rows + part * 16;
        let row = |half: u32| first + (self.lane >> 2) + half * 8;
        Rows { exist, rows: [row(0), row(1)].map(|row| (row, self.operands.row_scale(row))) }
    }

    /// The token whose planes of a group the lane holds, 2t and 2t + 1, if there is one.
    fn token_of(&self, group: V<'b>) -> Token<'b> {
        let within = group * 4 + (self.lane & 3);
        let token = self.first_token + within;
        let (tokens, batch) = (self.plan.tokens, self.op.batch);
        let (exists, token) = if tokens == self.plan.groups * 4 && tokens * self.launch.token_parts == batch {
            (None, token)
        } else {
            (Some(within.lt(tokens) & token.lt(batch)), token.min(batch - 1))
        };
        let exists = match (exists, self.operands.tokens.exists(token)) {
            (Some(exists), Some(there)) => Some(exists & there),
            (exists, there) => exists.or(there),
        };
        Token { exists, token, scale: self.operands.token_scale(token) }
    }

    /// Whether there are results of these rows and this token.
    fn exist(&self, rows: &Rows<'b>, token: &Token<'b>) -> V<'b> {
        token.exists.map_or(rows.exist, |token| rows.exist & token)
    }

    /// What the results of the rows are added to, if to anything.
    fn before(&self, rows: &Rows<'b>, token: &Token<'b>) -> [Option<V<'b>>; 2] {
        let exist = self.exist(rows, token);
        rows.rows.map(|(row, _)| self.operands.before(row, token.token, exist))
    }

    /// Writes the results of the rows, if they exist.
    fn write(&self, rows: &Rows<'b>, token: &Token<'b>, before: [Option<V<'b>>; 2], sums: &[Vec<V<'b>>]) {
        self.b.if_(self.exist(rows, token), || {
            for (half, ((row, scale), before)) in rows.rows.into_iter().zip(before).enumerate() {
                // Component 2·half is of the high plane, the next of the low.
                let of_plane = |low: usize| sums.iter().map(move |s| s[2 * half + low]);
                let sums: Vec<V> = of_plane(0).chain(of_plane(1)).collect();
                self.operands.write(row, token.token, &sums, scale, token.scale, before);
            }
        });
    }
}

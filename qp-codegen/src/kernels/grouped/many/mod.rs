//! Products of many tokens with matrices of formats.
//!
//! # How it works
//!
//! A block takes a run of rows of tiles and a part of the tokens, and its warps have tiles of their own, [`Launch::row_tiles`] one
//! below the other. Together they go over the columns in *chunks*: the planes of a chunk pass by in shared memory, brought by
//! asynchronous copies two chunks ahead, with one barrier a chunk. Of the chunk that follows, the warps add up the activations
//! of each run and token, which offsets need: a tensor-core product with ones, the work shared among them.
//!
//! A warp decodes a tile into tensor-core operands, once, and multiplies each run with all planes, eight a product. The sums
//! of a run and a group of planes need registers only until the planes of a token are joined, multiplied with the run's
//! slope and added to a sum of 64 bits. On Hopper, groups of four warps can multiply together ([`Launch::group`], `wgmma`),
//! the planes in two halves, one of which is added while the other is multiplied, from tile to tile; or a few at a time, with more
//! groups that take turns.
//!
//! Integers that are bytes with their zeros and signs need no sums of activations ([`are_operands`]).
//!
//! A matrix with few rows of tiles leaves warps without work. Then the columns are shared, by [`Launch::col_warps`] warps whose
//! sums meet in shared memory, or the tokens, by [`Launch::token_parts`] blocks that each decode all weights and are
//! neighbours, so that the weights come from memory once.

mod plan;

use std::collections::HashMap;
use std::ops::Range;

pub(super) use self::plan::Plan;
pub use self::plan::{Group, Launch, MAX_PART};
use self::plan::{STAGES, SUMMED};
use super::Product;
use super::layout::ROWS;
use super::operands::{
    ACROSS, Arrived, Factors, OF_PRODUCT, OperandBytes, Operands, Runs, Tile, are_operands, put, taken,
};
use crate::ir::{Builder, Cache, Const, Elem, Kernel, Mem, Special, V, Var};
use crate::kernels::experts::Experts;
use crate::kernels::operands::{Form, divide};
use crate::layout::{CELL, COLUMN_PAD};
use crate::spec::terms::TILE;

/// Groups of four tokens whose scales are on their way at once.
const SCALES: usize = 4;
/// Four bytes of one.
const ONES: u32 = 0x0101_0101;

/// Makes the kernel; its parameters are those of [`super::lower`], of experts those of [`super::lower_for_experts`].
///
/// # Panics
/// For launches that are none: groups of other than whole four warps or of several rows of tiles a warp, more than [`MAX_PART`]
/// tokens of a part, more blocks than rows of tiles.
pub(super) fn lower(op: &Product, launch: &Launch, form: Form) -> Kernel {
    let plan = Plan::new(op, launch);
    assert!(launch.group.is_none() || launch.row_warps.is_multiple_of(4), "groups of four warps");
    assert!(launch.group.is_none() || launch.row_tiles == 1, "a group has 64 rows");
    assert!(plan.tokens <= MAX_PART, "more tokens than sums have registers");
    assert!(launch.blocks <= plan.layout.row_tiles(), "a block without rows");
    let blocks = launch.blocks * launch.token_parts;
    let kind = if launch.group.is_some() { "groups" } else { "many" };
    let b = op.builder(kind, blocks, launch.warps() * 32, launch.min_blocks, form);
    Emit::new(&b, op, launch, &plan, form.experts()).kernel();
    b.finish()
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Product<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    operands: Operands<'b, 'a>,
    /// Activations: [`STAGES`] chunks of all planes.
    staged: Mem,
    /// Sums of activations over runs: [`SUMMED`] chunks, by tile, run and token.
    offsets: Mem,
    /// Where sums of several warps meet.
    meeting: Mem,
    thread: V<'b>,
    lane: V<'b>,
    warp: V<'b>,
    row_warp: V<'b>,
    col_warp: V<'b>,
    /// First row of tiles, and how many, of this block.
    first_row: V<'b>,
    rows: V<'b>,
    first_token: V<'b>,
    rounds: V<'b>,
}

/// What the warps keep through the columns.
struct Kept {
    /// Registers for the tiles that are on their way: by step, one below the other.
    tiles: Vec<Vec<Tile>>,
    /// Sums of 64 bits: by tile, group of planes and half of the tile's rows.
    sums: Vec<Var>,
    /// Sums of products of groups of warps, in turn: by group of planes.
    products: Vec<Vec<Var>>,
    /// What belongs to a tile's last product, which is added while the next tile's first is computed.
    late: Option<Late>,
}

/// What is added later, in registers that go through the columns.
struct Late {
    /// By row: slope, rest, zero.
    factors: Option<[[Option<Var>; 3]; 2]>,
    /// Sums of the activations over the run: by group of planes.
    offsets: Vec<Option<Var>>,
}

/// A product of groups of warps that was started: of a run and a plane of the weights with a part of the planes of the activations.
struct Started<'b> {
    /// In which registers its sums are.
    turn: usize,
    /// Groups of planes.
    groups: Range<u32>,
    plane: u32,
    /// Sums of the activations over the run, where they are needed: by group of planes.
    offsets: Vec<Option<V<'b>>>,
    factors: Option<[Factors<'b>; 2]>,
}

/// A tile that is being multiplied.
struct Decoded<'b> {
    /// By plane.
    planes: Vec<Vec<V<'b>>>,
    /// By run, for two rows.
    factors: Vec<Option<[Factors<'b>; 2]>>,
}

impl<'b, 'a> Emit<'b, 'a> {
    fn new(b: &'b Builder, op: &'a Product<'a>, launch: &'a Launch, plan: &'a Plan, experts: Option<&Experts>) -> Self {
        let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
        let form = match OperandBytes::of_many(op) {
            // Beside the sums of many tokens there are no registers for operands that are decoded so early.
            OperandBytes::UpperHalves if launch.group.is_some_and(|g| g.sets == 1) && plan.groups > 8 => {
                OperandBytes::Integers
            }
            form => form,
        };
        let operands = Operands::new(b, op, lane, form, launch.shared_book, experts);
        let staged = b.shared("staged", Elem::U32, STAGES * plan.stage_cells() * 4);
        let offsets = b.shared("offsets", Elem::I32, SUMMED * plan.chunk_offsets());
        let meeting = b.shared("meeting", Elem::I32, plan.meeting_sums(launch) * 2);
        // The blocks of the same weights are neighbours, so that those are read from memory once.
        let (block, part) = divide(b, b.special(Special::BlockX), launch.token_parts);
        // Warps of a group have the same columns.
        let (col_warp, row_warp) =
            if launch.col_warps == 1 { (b.i32(0), warp) } else { divide(b, warp, launch.row_warps) };
        let row_tiles = plan.layout.row_tiles();
        let first_row = block * row_tiles / launch.blocks;
        let rows = (block + 1) * row_tiles / launch.blocks - first_row;
        let at_once = launch.row_warps * launch.row_tiles;
        let rounds = if plan.rounds == 1 { b.i32(1) } else { (rows + (at_once - 1)) / at_once };
        let first_token = part * plan.tokens;
        Emit {
            b,
            op,
            launch,
            plan,
            operands,
            staged,
            offsets,
            meeting,
            thread,
            lane,
            warp,
            row_warp,
            col_warp,
            first_row,
            rows,
            first_token,
            rounds,
        }
    }

    fn kernel(&self) {
        let (b, tokens, threads) = (self.b, &self.operands.tokens, self.launch.warps() * 32);
        let first_chunks = || [0, 1].into_iter().for_each(|chunk| self.stage(b.i32(chunk)));
        if tokens.are_pairs() {
            self.operands.fill(threads);
            b.grid_wait();
            b.grid_launch();
            return tokens.in_unit(b, b.special(Special::BlockY), self.thread, threads, || {
                let work = || {
                    let tiles = self.first_tiles();
                    first_chunks();
                    self.products(tiles);
                };
                match tokens.exists(self.first_token) {
                    Some(exists) if self.launch.token_parts > 1 => b.if_(exists, work),
                    _ => work(),
                }
            });
        }
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let tiles = self.first_tiles();
        self.operands.fill(threads);
        b.grid_wait();
        first_chunks();
        b.grid_launch();
        self.products(tiles);
    }

    /// The tiles of the first steps, on their way.
    fn first_tiles(&self) -> Vec<Vec<Tile>> {
        let (b, launch) = (self.b, self.launch);
        let of_step = || (0..launch.row_tiles).map(|_| self.operands.tile()).collect();
        let tiles: Vec<Vec<Tile>> = (0..launch.ahead).map(|_| of_step()).collect();
        (0..).zip(&tiles).for_each(|(step, tiles)| self.fetch(b.i32(step), tiles));
        tiles
    }

    /// All behind the first tiles and chunks, which are on their way.
    fn products(&self, tiles: Vec<Vec<Tile>>) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let zero = b.constant(Const::I64(0));
        let sums = (0..launch.row_tiles * plan.groups * 2).map(|_| b.var(zero)).collect();
        let none = b.vector(&[b.i32(0); 4]);
        let Group { planes, sets } = launch.group.unwrap_or(Group { planes: 0, sets: 0 });
        let products = (0..sets).map(|_| (0..planes / 8).map(|_| b.var(none)).collect()).collect();
        let late = launch.group.and_then(|_| self.late());
        let kept = Kept { tiles, sums, products, late };
        if plan.offsets {
            b.comment("Sums over the runs of the first chunk.");
            b.async_wait(1);
            b.barrier();
            self.add_up(b.i32(0));
        }
        b.comment("Rows of tiles, chunks of columns, tiles.");
        b.for_(0, self.rounds, 1, |round| {
            kept.sums.iter().for_each(|&v| b.set(v, zero));
            if let Some(late) = &kept.late {
                // Nothing was multiplied so far.
                kept.products[1].iter().for_each(|&v| b.set(v, none));
                late.offsets.iter().flatten().for_each(|&v| b.set(v, b.i32(0)));
            }
            let inverses: Vec<Option<[V; 2]>> = (0..launch.row_tiles)
                .map(|m| self.operands.grid(self.row(round, m)).map(|grid| self.operands.inverses(grid)))
                .collect();
            b.for_(0, plan.chunks, 1, |chunk| {
                let chunk = round * plan.chunks + chunk;
                b.async_wait(if plan.offsets { 0 } else { 1 });
                if launch.group.is_some() {
                    b.group_fence();
                }
                b.barrier();
                self.stage(chunk + 2);
                if plan.offsets {
                    self.add_up(chunk + 1);
                }
                let in_turn = |first: V<'b>| {
                    for p in 0..launch.ahead {
                        if launch.group.is_some() {
                            self.step_of_group(chunk, (first + p, p), &kept, &inverses);
                        } else {
                            self.step(chunk, (first + p, p), &kept, &inverses);
                        }
                    }
                };
                let steps = || {
                    if launch.chunk == launch.ahead {
                        in_turn(b.i32(0));
                    } else {
                        b.for_(0, launch.chunk, launch.ahead, in_turn);
                    }
                };
                if launch.group.is_some() {
                    steps();
                    b.group_wait(0);
                } else {
                    self.busy(round, steps);
                }
            });
            if let Some(late) = &kept.late {
                self.add_started(&kept, &self.last(late));
            }
            self.finish(round, &kept.sums);
        });
    }

    /// Runs `work` in the warps that have rows in this round.
    fn busy(&self, round: V<'b>, work: impl FnOnce()) {
        let at_once = self.launch.row_warps * self.launch.row_tiles;
        let all = self.plan.layout.row_tiles() == self.launch.blocks * self.plan.rounds * at_once;
        if all { work() } else { self.b.if_(self.row_tile(round, 0).lt(self.rows), work) }
    }

    /// Row of tiles `m` of the warp in a round, within the block.
    fn row_tile(&self, round: V<'b>, m: u32) -> V<'b> {
        (round * self.launch.row_warps + self.row_warp) * self.launch.row_tiles + m
    }

    /// Row of tiles `m` of the warp in a round, or the block's last, if there is none: its sums are not written.
    fn row(&self, round: V<'b>, m: u32) -> V<'b> {
        self.first_row + self.row_tile(round, m).min(self.rows - 1)
    }

    /// Starts loading the tiles of step `step` (steps of all rounds count on), if there is one.
    fn fetch(&self, step: V<'b>, tiles: &[Tile]) {
        let (b, plan) = (self.b, self.plan);
        let per_round = plan.steps(self.launch);
        let (round, within) = if plan.rounds == 1 { (b.i32(0), step) } else { divide(b, step, per_round) };
        let col = within * self.launch.col_warps + self.col_warp;
        let load = || {
            for (m, tile) in (0..).zip(tiles) {
                let load = || self.operands.fetch(self.row(round, m), col, tile);
                if per_round * self.launch.col_warps == plan.layout.col_tiles() {
                    load();
                } else {
                    // Activations beyond the last column are 0: it does not matter what is multiplied with them.
                    b.if_(col.lt(plan.layout.col_tiles()), load);
                }
            }
        };
        if step.as_const().is_some() { load() } else { b.if_(step.lt(self.rounds * per_round), load) }
    }

    /// Where in shared memory a chunk lies, in cells.
    fn slot(&self, chunk: V<'b>) -> V<'b> {
        chunk % STAGES * self.plan.stage_cells()
    }

    /// Starts copying the activations of a chunk (chunks of all rounds count on), if there is one.
    fn stage(&self, chunk: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let units = self.op.shape.cols.next_multiple_of(COLUMN_PAD) / CELL;
        let chunk_units = plan.chunk_tiles * (TILE / CELL);
        let slot = self.slot(chunk);
        let within = if plan.rounds == 1 { chunk } else { chunk % plan.chunks };
        let all = 2 * self.op.batch;
        let (cells, threads) = (plan.stage_cells(), self.launch.warps() * 32);
        b.if_(chunk.lt(self.rounds * plan.chunks), || {
            // Where the threads take whole units at once, each keeps its plane.
            let units_at_once = threads.is_multiple_of(plan.planes()).then(|| threads / plan.planes());
            let first = divide(b, self.thread, plan.planes());
            for round in 0..cells.div_ceil(threads) {
                let cell = self.thread + round * threads;
                let copy = || {
                    let (unit, plane) = match units_at_once {
                        Some(units) => (first.0 + round * units, first.1),
                        None => divide(b, cell, plan.planes()),
                    };
                    // Planes that fill up the last product repeat the last token's; their sums are not read.
                    let plane = self.first_token * 2 + plane;
                    let whole =
                        plan.planes() == 2 * plan.tokens && plan.tokens * self.launch.token_parts == self.op.batch;
                    let plane = if whole { plane } else { plane.min(all as i32 - 1) };
                    let unit = within * chunk_units + unit;
                    let from = unit * self.operands.tokens.planes() + self.operands.tokens.plane(plane);
                    let copy = || b.async_copy(self.staged, slot + cell, self.operands.x, from, 16);
                    if plan.chunks * chunk_units <= units {
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

    /// Where the sums over runs of a chunk lie.
    fn offsets_slot(&self, chunk: V<'b>) -> V<'b> {
        chunk % SUMMED * self.plan.chunk_offsets()
    }

    /// Adds up the activations of each run of a chunk (chunks of all rounds count on), if there is one: a group of planes and a
    /// tile a warp at a time, in straight-line code, for nothing of it waits for anything else.
    fn add_up(&self, chunk: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let (from, to) = (self.slot(chunk), self.offsets_slot(chunk));
        let (items, warps) = (plan.chunk_tiles * plan.groups, self.launch.warps());
        b.if_(chunk.lt(self.rounds * plan.chunks), || {
            for round in 0..items.div_ceil(warps) {
                // Warps without an item take the last, and store nothing: where threads part, the assembler would not let groups
                // of warps multiply on.
                let all = (round + 1) * warps <= items;
                let item = self.warp + round * warps;
                let (tile, group) = divide(b, if all { item } else { item.min(items as i32 - 1) }, plan.groups);
                let sums = self.add_up_tile(from + tile * plan.tile_cells() + group * 8);
                let stores = self.lane.lt(OF_PRODUCT);
                b.if_(if all { stores } else { stores & item.lt(items) }, || {
                    let at = to + tile * plan.tile_offsets() + group * OF_PRODUCT + self.lane;
                    for (run, sum) in (0..).zip(sums) {
                        b.store(self.offsets, at + run * plan.groups * OF_PRODUCT, sum, Elem::I32);
                    }
                });
            }
        });
    }

    /// The sums over the runs of a tile of the lane's token of a group, whose planes lie at `first`: products with ones.
    fn add_up_tile(&self, first: V<'b>) -> Vec<V<'b>> {
        let (b, plan) = (self.b, self.plan);
        // Lane 8j + i names row i of matrix j: of 16 columns.
        let first = first + (self.lane & 7) + (self.lane >> 3) * plan.planes();
        let x: Vec<V> = (0..ACROSS / 2)
            .flat_map(|pair| b.load_matrix(self.staged, (first + pair * 4 * plan.planes()) * 4, 4).lanes())
            .collect();
        let ones = [b.u32(ONES); 4];
        let none = b.vector(&[b.i32(0); 4]);
        let of_run = |run: u32| {
            let products = self.operands_of(run, &|_| ones).into_iter().map(|(kt, a)| {
                let at = 2 * kt as usize;
                b.mma_i8(false, a, [x[at], x[at + 1]], none)
            });
            let sums = products.map(|sum| sum.lane(0) * 128 + sum.lane(1));
            sums.reduce(|sum, x| sum + x).expect("a run has columns")
        };
        (0..plan.runs).map(of_run).collect()
    }

    /// The operands of the products of a run: of which 32 columns, and the registers, zeros for columns of another run.
    fn operands_of(&self, run: u32, of: &dyn Fn(u32) -> [V<'b>; 4]) -> Vec<(u32, [V<'b>; 4])> {
        let columns = TILE / self.plan.runs;
        if columns < 32 {
            let ([a0, a1, a2, a3], zero) = (of(run / 2), self.b.u32(0));
            let half = if run.is_multiple_of(2) { [a0, a1, zero, zero] } else { [zero, zero, a2, a3] };
            return vec![(run / 2, half)];
        }
        (run * columns / 32..(run + 1) * columns / 32).map(|kt| (kt, of(kt))).collect()
    }

    /// Decodes and multiplies tile `i` of the warp's of a chunk, by itself. Where its words were, which registers `p` held, those of a
    /// later step are on their way meanwhile.
    fn step(&self, chunk: V<'b>, (i, p): (V<'b>, u32), kept: &Kept, inverses: &[Option<[V<'b>; 2]>]) {
        let (decoded, first, offsets) = self.decoded(chunk, (i, p), kept, inverses);
        for run in 0..self.plan.runs {
            for plane in 0..self.op.terms.planes() {
                self.multiply_by_warps((run, plane), &decoded, first, offsets, kept);
            }
        }
    }

    /// What tile `i` of a chunk is decoded to, and where its activations and their sums lie.
    fn decoded(
        &self,
        chunk: V<'b>,
        (i, p): (V<'b>, u32),
        kept: &Kept,
        inverses: &[Option<[V<'b>; 2]>],
    ) -> (Vec<Decoded<'b>>, V<'b>, V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let tiles = &kept.tiles[p as usize];
        let arrived: Vec<Arrived> = tiles.iter().map(|t| self.operands.arrived(t)).collect();
        self.fetch(chunk * self.launch.chunk + i + self.launch.ahead, tiles);
        if self.launch.group.is_some() {
            // The assembler would put the loads off, but not beyond this.
            b.warp_sync();
        }
        let tile = i * self.launch.col_warps + self.col_warp;
        let first = self.slot(chunk) + tile * plan.tile_cells();
        let offsets = self.offsets_slot(chunk) + tile * plan.tile_offsets() + (self.lane & 3);
        let decode = |(tile, inverses): (&Arrived<'b>, &Option<[V<'b>; 2]>)| {
            let mut known = HashMap::new();
            let planes = self.operands.registers(tile);
            let factors =
                (0..plan.runs).map(|run| self.operands.factors(tile, Runs::one(run), *inverses, &mut known)).collect();
            Decoded { planes, factors }
        };
        (arrived.iter().zip(inverses).map(decode).collect(), first, offsets)
    }

    /// The products of a group with a tile: run and plane of the weights, groups of planes of the activations.
    fn of_group(&self) -> Vec<(u32, u32, Range<u32>)> {
        let (plan, part) = (self.plan, self.group().planes / 8);
        let parts = (0..plan.groups).step_by(part as usize).map(|from| from..plan.groups.min(from + part));
        let of = |run| {
            let parts = parts.clone();
            (0..self.op.terms.planes()).flat_map(move |plane| parts.clone().map(move |part| (run, plane, part)))
        };
        (0..plan.runs).flat_map(of).collect()
    }

    fn group(&self) -> Group {
        self.launch.group.expect("of groups of warps")
    }

    /// Registers for what is added late, if the last of a tile's products is in other registers than the first.
    fn late(&self) -> Option<Late> {
        let (b, products) = (self.b, self.of_group());
        let late = self.group().sets == 2 && products.len().is_multiple_of(2);
        let (_, plane, groups) = products.last().filter(|_| late)?;
        let word = || b.var(b.i32(0));
        let terms = self.op.terms;
        let of_row = || [true, terms.rest.is_some(), terms.zero.is_some() && !are_operands(self.op)];
        let factors = terms.run.map(|_| [(); 2].map(|()| of_row().map(|is| is.then(word))));
        let offsets = self.plan.offsets && *plane == 0;
        Some(Late { factors, offsets: groups.clone().map(|_| offsets.then(word)).collect() })
    }

    /// The product that is added late.
    fn last(&self, late: &Late) -> Started<'b> {
        let b = self.b;
        let (_, plane, groups) = self.of_group().pop().expect("a tile has products");
        let factors = late.factors.map(|rows| {
            rows.map(|of| {
                let [slope, rest, zero] = of.map(|var| var.map(|var| b.get(var)));
                Factors { slope: slope.expect("there always is one"), rest, zero }
            })
        });
        let offsets = late.offsets.iter().map(|var| var.map(|var| b.get(var))).collect();
        Started { turn: 1, groups, plane, offsets, factors }
    }

    /// Decodes and multiplies tile `i` of the group's of a chunk, as [`Emit::step`]. While a product runs, the one before it is added, the
    /// tile's last while the next tile's first runs. Products read their operands' registers until they end, so all have ended before
    /// the next tile is decoded; other groups multiply meanwhile.
    ///
    /// That the tiles are a loop keeps the assembler from putting off all adding until the chunk's end.
    fn step_of_group(&self, chunk: V<'b>, at: (V<'b>, u32), kept: &Kept, inverses: &[Option<[V<'b>; 2]>]) {
        let (b, plan) = (self.b, self.plan);
        b.group_wait(0);
        let (tile, first, offsets) = self.decoded(chunk, at, kept, inverses);
        let mut before = kept.late.as_ref().map(|late| self.last(late));
        for (n, (run, plane, groups)) in self.of_group().into_iter().enumerate() {
            let registers = &tile[0].planes[plane as usize];
            let steps = self.operands_of(run, &|kt| std::array::from_fn(|a| registers[(kt * 4) as usize + a]));
            let a: Vec<[V; 4]> = steps.iter().map(|s| s.1).collect();
            let at = first + (steps[0].0 * 2 * plan.planes() + groups.start * 8);
            let turn = n % kept.products.len();
            let sums = &kept.products[turn][..groups.len()];
            b.mma_group_fresh(self.operands.is_signed(plane), &a, sums, self.staged, at, plan.planes());
            let offsets = groups.clone().map(|g| self.offset(offsets, (run, plane), g)).collect();
            let started = Started { turn, groups, plane, offsets, factors: tile[0].factors[run as usize] };
            if self.group().sets == 1 {
                b.group_wait(0);
                self.add_started(kept, &started);
            } else if let Some(before) = before.replace(started) {
                if n > 0 {
                    b.group_wait(1);
                }
                self.add_started(kept, &before);
            }
        }
        let Some(last) = before else { return };
        let Some(late) = &kept.late else {
            b.group_wait(0);
            return self.add_started(kept, &last);
        };
        for (of_row, factors) in late.factors.iter().flatten().zip(last.factors.iter().flatten()) {
            let values = [Some(factors.slope), factors.rest, factors.zero];
            of_row.iter().zip(values).for_each(|(var, value)| {
                if let (&Some(var), Some(value)) = (var, value) {
                    b.set(var, value);
                }
            });
        }
        for (var, value) in late.offsets.iter().zip(last.offsets) {
            if let (&Some(var), Some(value)) = (var, value) {
                b.set(var, value);
            }
        }
    }

    /// Adds the sums of a product that has ended.
    fn add_started(&self, kept: &Kept, done: &Started<'b>) {
        for ((group, &products), &offset) in done.groups.clone().zip(&kept.products[done.turn]).zip(&done.offsets) {
            self.add(kept, (0, group, done.plane), self.b.get(products), offset, done.factors);
        }
    }

    /// The sum of the lane's token of a group over a run, if it is needed: with the lowest plane.
    fn offset(&self, offsets: V<'b>, (run, plane): (u32, u32), group: u32) -> Option<V<'b>> {
        let at = (run * self.plan.groups + group) * OF_PRODUCT;
        let needed = self.plan.offsets && plane == 0;
        needed.then(|| self.b.load_as(self.offsets, offsets + at, Elem::I32, 1, Cache::Default))
    }

    /// Adds the sums of a run's products with a plane of the weights, of the high and the low plane of the activations for each of
    /// two rows, to those of tile `m`.
    fn add(
        &self,
        kept: &Kept,
        (m, group, plane): (u32, u32, u32),
        products: V<'b>,
        offset: Option<V<'b>>,
        factors: Option<[Factors<'b>; 2]>,
    ) {
        let b = self.b;
        for half in 0..2 {
            let products = [0, 1].map(|low| products.lane(2 * half + low));
            let term = self.operands.term(plane, products, offset, factors.map(|f| f[half as usize]));
            let sum = kept.sums[((m * self.plan.groups + group) * 2 + half) as usize];
            b.set(sum, b.get(sum) + term);
        }
    }

    /// Multiplies a run of the warp's tiles with all planes, which lie at `first`.
    fn multiply_by_warps(
        &self,
        (run, plane): (u32, u32),
        tiles: &[Decoded<'b>],
        first: V<'b>,
        offsets: V<'b>,
        kept: &Kept,
    ) {
        let (b, plan) = (self.b, self.plan);
        let signed = self.operands.is_signed(plane);
        // Lane 8j + i names row i of matrix j: of planes 0 to 8 the first 16 columns, the second, of planes 8 to 16 …
        let second = (self.lane >> 3) & 1;
        let of_two = first + (self.lane & 7) + (self.lane >> 4) * 8 + second * plan.planes();
        let of_one = first + (self.lane & 7) + second * plan.planes();
        let steps: Vec<Vec<(u32, [V; 4])>> = tiles
            .iter()
            .map(|t| &t.planes[plane as usize])
            .map(|t| self.operands_of(run, &|kt| std::array::from_fn(|a| t[(kt * 4) as usize + a])))
            .collect();
        for pair in (0..plan.groups).step_by(2) {
            let groups = (plan.groups - pair).min(2);
            let from = if groups == 2 { of_two } else { of_one };
            let x: Vec<Vec<V>> = steps[0]
                .iter()
                .map(|(kt, _)| {
                    let at = from + (kt * 2 * plan.planes() + pair * 8);
                    b.load_matrix(self.staged, at * 4, 2 * groups).lanes()
                })
                .collect();
            for group in 0..groups {
                let offset = self.offset(offsets, (run, plane), pair + group);
                for ((m, tile), steps) in (0..).zip(tiles).zip(&steps) {
                    let none = b.vector(&[b.i32(0); 4]);
                    let at = 2 * group as usize;
                    let products = steps
                        .iter()
                        .zip(&x)
                        .fold(none, |sum, ((_, a), x)| b.mma_i8(signed, *a, [x[at], x[at + 1]], sum));
                    self.add(kept, (m, pair + group, plane), products, offset, tile.factors[run as usize]);
                }
            }
        }
    }

    /// Writes the results of a round.
    fn finish(&self, round: V<'b>, sums: &[Var]) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let sum = |m: u32, group: u32, half: u32| ((m * plan.groups + group) * 2 + half) as usize;
        // The lanes side by side.
        let place = |warp: V<'b>, at: usize| (warp * sums.len() as u32 + at as u32) * 64 + self.lane * 2;
        if launch.col_warps > 1 {
            (0..).zip(sums).for_each(|(at, &var)| put(b, self.meeting, place(self.warp, at), b.get(var)));
            b.barrier();
        }
        let write = || {
            for m in 0..launch.row_tiles {
                let tile = self.row_tile(round, m);
                let first = (self.first_row + tile.min(self.rows - 1)) * ROWS + (self.lane >> 2);
                let rows = [0, 8].map(|half| first + half).map(|row| (row, self.operands.row_factor(row)));
                let groups: Vec<u32> = (0..plan.tokens.div_ceil(OF_PRODUCT)).collect();
                for groups in groups.chunks(SCALES) {
                    let tokens: Vec<_> = groups.iter().map(|&group| (group, self.token(group))).collect();
                    for (group, (token, exists, scale)) in tokens {
                        let write = || {
                            for ((row, factor), half) in rows.into_iter().zip(0..) {
                                let at = sum(m, group, half);
                                let total = if launch.col_warps == 1 {
                                    b.get(sums[at])
                                } else {
                                    let of = |c: u32| {
                                        taken(b, self.meeting, place(self.row_warp + c * launch.row_warps, at))
                                    };
                                    (1..launch.col_warps).fold(of(0), |sum, c| sum + of(c))
                                };
                                let inside = tile.lt(self.rows) & row.lt(self.op.shape.rows);
                                let inside = exists.map_or(inside, |e| inside & e);
                                b.if_(inside, || self.operands.write(row, token, total, factor, scale));
                            }
                        };
                        if launch.col_warps == 1 {
                            write();
                        } else {
                            b.if_(self.col_warp.eq((group % launch.col_warps) as i32), write);
                        }
                    }
                }
            }
        };
        write();
    }

    /// The token whose planes of a group the lane holds, whether there is one (`None`: surely), and its scale.
    fn token(&self, group: u32) -> (V<'b>, Option<V<'b>>, V<'b>) {
        let within = (self.lane & 3) + group * OF_PRODUCT;
        let token = self.first_token + within;
        let (tokens, batch) = (self.plan.tokens, self.op.batch);
        let all = tokens.is_multiple_of(OF_PRODUCT) && tokens * self.launch.token_parts == batch;
        let (exists, token) =
            if all { (None, token) } else { (Some(within.lt(tokens) & token.lt(batch)), token.min(batch as i32 - 1)) };
        let exists = match (exists, self.operands.tokens.exists(token)) {
            (Some(exists), Some(there)) => Some(exists & there),
            (exists, there) => exists.or(there),
        };
        (token, exists, self.operands.token_scale(token))
    }
}

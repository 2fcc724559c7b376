//! Matrix-vector products with packed weights, for 1 to 8 tokens: `y[token, row] (+)= W[row, ·] · x[token, ·]`.
//!
//! # How it works
//!
//! A block of the grid takes a run of row tiles and, if `split > 1`, one of `split` parts of the columns; its warps
//! share the columns between them. A warp walks down its row tiles with the words of the next tiles already in flight
//! in registers, decodes a tile into tensor-core operands (`decode`), and multiplies with the activations, which come
//! as two planes of signed bytes a token (`reference::split_activation`) in two of a product's eight columns.
//!
//! All sums are exact integers: partial sums of warps meet in shared memory, of blocks in global memory, in any order,
//! and the result is the same to the bit for every launch shape, batch and GPU. Activations beyond the last column are
//! zero, so it does not matter what padding weights decode to.
//!
//! Matrices that share an input run as one: their row tiles are simply stored one below the other.

use std::collections::VecDeque;

use super::decode::flatten;
use super::experts::Experts;
pub use super::launch::Launch;
pub use super::operands::Gemv;
use super::operands::{self, Form, Operands, TokenScale, Words, divide};
use super::prepare::{Prepare, Reader, Within};
use super::{c_name, copy_all};
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Special, V, Var};
use crate::layout::{CELL, COLUMN_PAD, Packed};

/// Most tokens of one launch of this kernel.
pub const MAX_BATCH: u32 = 8;

/// Sizes that follow from the operation and its launch.
pub(super) struct Plan {
    pub(super) layout: Packed,
    /// Byte planes of the activations: two a token.
    pub(super) planes: u32,
    /// Tensor-core products side by side to hold all planes.
    pub(super) groups: u32,
    /// Products a register: 2 for 16-bit entries.
    pub(super) products: u32,
    /// Column tiles of a warp.
    pub(super) per_warp: u32,
    /// Column tiles decoded in a step of the loop.
    pub(super) depth: u32,
    /// Of a step, the tiles whose words are on their way before it begins.
    pub(super) early: u32,
    /// Steps whose words are on their way.
    pub(super) buffers: u32,
    /// Activations stay in registers.
    pub(super) resident: bool,
    /// Rows of the block that has most.
    most_rows: u32,
    /// Results of a thread: of that block's rows and all tokens.
    pub(super) results: u32,
    /// Each warp stores its sums in a place of its own, instead of adding them to the block's.
    pub(super) own_sums: bool,
}

/// Shared memory that warps may take for sums of their own.
const SUM_BYTES: u32 = 32 << 10;
/// Results of a thread whose scales are on their way at once, at most.
const RESULTS: u32 = 4;
/// Words of activations that a thread has on their way to shared memory at once, at most.
const STAGED: u32 = 16;
/// Most column tiles of a step, which is unrolled, where activations pass by in shared memory.
const DEPTH: u32 = 8;

impl Plan {
    pub(super) fn new(op: &Gemv, launch: &Launch) -> Plan {
        let layout = Packed::new(op.quantizer, op.shape);
        let codes = op.quantizer.codes.len() as u32;
        let planes = 2 * op.batch;
        let groups = planes.div_ceil(8);
        let products = operands::products(op.quantizer);
        let exact = layout.col_tiles().div_ceil(launch.warps * launch.split).next_multiple_of(codes);
        let fragments = layout.tile.cols / 32 * 2 * groups;
        let resident = exact <= 4 && exact * fragments <= 32;
        let depth = if resident {
            exact
        } else {
            // Whole groups of tiles: the depth that wastes least, the deeper of equals.
            let depths = (1..=DEPTH).filter(|d| d % codes == 0);
            let depths = depths.map(|d| (exact.next_multiple_of(d), std::cmp::Reverse(d)));
            depths.min().map_or(codes, |(_, d)| d.0)
        };
        let (buffers, early) = if resident { (launch.ahead, depth) } else { (1, depth.min(launch.ahead * codes)) };
        let most_rows = layout.row_tiles().div_ceil(launch.blocks) * layout.tile.rows;
        let own_sums = 4 * most_rows * planes * products * launch.warps <= SUM_BYTES;
        let per_warp = exact.next_multiple_of(depth);
        let results = (most_rows * op.batch).div_ceil(launch.warps * 32);
        Plan {
            layout,
            planes,
            groups,
            products,
            per_warp,
            depth,
            early,
            buffers,
            resident,
            most_rows,
            results,
            own_sums,
        }
    }

    /// Whether a warp handles all its columns of a row tile in one step, so that no sums wait for the next.
    fn whole_rows(&self) -> bool {
        self.per_warp == self.depth
    }

    /// Accumulators of a warp, each of 16 rows and 8 planes.
    pub(super) fn sums(&self) -> u32 {
        self.layout.row_parts() * self.groups * self.products
    }

    /// Sums kept for a row: one a plane and product.
    pub(super) fn slots(&self) -> u32 {
        self.planes * self.products
    }

    /// Columns that a block's warps cover together.
    fn block_cols(&self, launch: &Launch) -> u32 {
        launch.warps * self.per_warp * self.layout.tile.cols
    }

    /// Places for the sums of a row of the block.
    fn sum_places(&self, launch: &Launch) -> u32 {
        if self.own_sums { launch.warps } else { 1 }
    }

    /// Sums of a block. Those of a row lie side by side where each warp has a place of its own: they are stored and read
    /// at once. Where warps add, those of a slot do, [`Plan::slot_words`] apart: lanes that add together meet in no bank.
    fn sum_words(&self, launch: &Launch) -> u32 {
        if self.own_sums {
            self.most_rows * self.slots() * self.sum_places(launch)
        } else {
            self.most_rows / self.layout.tile.rows * self.tile_sums()
        }
    }

    /// Words from the sums of a row tile that belong to a slot to those of the next slot: lanes of a quad are two planes
    /// apart, and must be eight banks apart, as the quads are one.
    fn slot_words(&self) -> u32 {
        self.layout.tile.rows + 4 / self.products
    }

    /// Words of a row tile's sums, where warps add.
    fn tile_sums(&self) -> u32 {
        self.slots() * self.slot_words()
    }

    /// Bytes of shared memory beside the tables; with those of a preparation, if blocks do that themselves.
    pub(super) fn shared_bytes(&self, launch: &Launch, prepare: Option<&Prepare>) -> u32 {
        let staged = if self.resident { 0 } else { self.planes * self.plane_words(launch) };
        4 * (self.sum_words(launch) + staged) + prepare.map_or(0, |p| p.shared_within(launch.warps))
    }

    /// Words from one staged plane to the next: 4 more than the columns take, so that planes start in other banks.
    pub(super) fn plane_words(&self, launch: &Launch) -> u32 {
        self.block_cols(launch) / 4 + 4
    }
}

/// Makes the kernel. Its parameters, in order:
///
/// * `tables`: see [`super::decode::pack_tables`];
/// * `weights`: packed words ([`Packed`]);
/// * `scales`: bfloat16, one a padded row;
/// * `x`: signed bytes, plane `2·token` the high and `2·token + 1` the low parts, in cells
///   ([`crate::layout::activation_at`]), the columns padded to a multiple of [`COLUMN_PAD`] with zeros;
/// * `x_scale` (`f32`) and `x_sum` (`i32`), one a token;
/// * `y`: `f32`, `batch × padded rows`;
/// * `partial` (`i32`, padded rows × planes × products) and `arrived` (`i32`, one a block), zero before and after; not
///   touched unless `split > 1`. See [`meeting_place`].
pub fn lower(op: &Gemv, launch: &Launch) -> Kernel {
    lower_for(op, launch, Form::Results)
}

/// The same in another form. Of totals, `y` is that of [`super::product::Launch::lower_totals`]. Of experts, `op` is the product
/// of one of them with the pairs of a unit. What has a row a token has one a row of
/// [`Experts::rows`], `y` one a pair, [`Experts::stride`] apart; the matrices lie one below the other, and behind the
/// parameters are those of [`Units::declare`](super::experts::Units::declare). Of a preparing product, `x`, `x_scale` and `x_sum` are no
/// parameters, and before the others are those of [`Within::new`].
pub(super) fn lower_for(op: &Gemv, launch: &Launch, form: Form) -> Kernel {
    let experts = form.experts();
    assert!((1..=MAX_BATCH).contains(&op.batch), "batch");
    assert!(launch.split == 1 || experts.is_none(), "units have no place to meet");
    let q = op.quantizer;
    let name = format!("gemv_{}_{}x{}_b{}", c_name(&q.name), op.shape.rows, op.shape.cols, op.batch);
    let grid = [launch.blocks * launch.split, experts.map_or(1, Experts::units)];
    let b = Builder::new(&name, grid, launch.warps * 32);
    b.doc(operands::doc(op, form));
    b.min_blocks(launch.min_blocks);
    b.dependent_launch();
    if experts.is_none() {
        b.apart();
    }
    let within = form.prepares().map(|prepare| Within::new(&b, prepare, launch.warps, Reader::Packed));
    Emit::new(&b, op, launch, &Plan::new(op, launch), form, within.as_ref()).kernel();
    b.finish()
}

/// Elements of `partial` and `arrived` that a launch needs, at least 1 each.
pub fn meeting_place(op: &Gemv, launch: &Launch) -> (usize, usize) {
    if launch.split == 1 {
        return (1, 1);
    }
    let plan = Plan::new(op, launch);
    ((plan.layout.padded_rows() * plan.slots()) as usize, launch.blocks as usize)
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Gemv<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    operands: Operands<'b, 'a>,
    /// The preparation of the token, if blocks do it themselves.
    within: Option<&'a Within<'a, 'b>>,
    sums: Mem,
    /// Activations of the block's columns, if they do not stay in registers.
    staged: Option<Mem>,
    thread: V<'b>,
    lane: V<'b>,
    /// Which of the blocks that share the row tiles this is.
    block: V<'b>,
    /// First row tile, and how many, of this block.
    first_row: V<'b>,
    rows: V<'b>,
    /// First column tile of this block and of this warp.
    block_col: V<'b>,
    warp_col: V<'b>,
    /// Groups of `depth` tiles that this warp walks through.
    steps: V<'b>,
}

/// What turns the sums of a row and a token into their result.
struct Scaling<'b> {
    /// Whether there is such a result.
    exists: V<'b>,
    /// Of the block.
    row: V<'b>,
    token: V<'b>,
    row_scale: V<'b>,
    token_scale: TokenScale<'b>,
    /// What the result is added to.
    before: Option<V<'b>>,
}

/// Activation operands kept in registers: by tile, by group of planes, by 32 columns.
type Fragments<'b> = Option<Vec<Vec<Vec<[V<'b>; 2]>>>>;

impl<'b, 'a> Emit<'b, 'a> {
    fn new(
        b: &'b Builder,
        op: &'a Gemv<'a>,
        launch: &'a Launch,
        plan: &'a Plan,
        form: Form<'a>,
        within: Option<&'a Within<'a, 'b>>,
    ) -> Self {
        let operands = Operands::new(b, op, &plan.layout, launch.table_bytes, meeting_place(op, launch), form, within);
        let sums = b.shared("sums", Elem::I32, plan.sum_words(launch));
        let staged = (!plan.resident).then(|| b.shared("staged", Elem::U32, plan.planes * plan.plane_words(launch)));

        let thread = b.special(Special::Thread);
        let lane = b.special(Special::Lane);
        let id = b.special(Special::BlockX);
        let (block, part) = divide(b, id, launch.split);
        let row_tiles = plan.layout.row_tiles();
        let first_row = block * row_tiles / launch.blocks;
        let rows = (block + 1) * row_tiles / launch.blocks - first_row;
        let block_col = part * (launch.warps * plan.per_warp);
        let warp_col = block_col + b.special(Special::Warp) * plan.per_warp;
        let steps = rows * (plan.per_warp / plan.depth);
        Emit {
            b,
            op,
            launch,
            plan,
            operands,
            within,
            sums,
            staged,
            thread,
            lane,
            block,
            first_row,
            rows,
            block_col,
            warp_col,
            steps,
        }
    }

    fn kernel(&self) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let buffers = || (0..plan.buffers).map(|_| self.operands.words(0..plan.early)).collect::<Vec<Words>>();
        let first_words = |buffers: &[Words]| {
            for (p, buffer) in buffers.iter().enumerate() {
                let at = b.i32(p as i32);
                b.if_(at.lt(self.steps), || self.fetch(at, 0, buffer));
            }
        };
        let tables = || {
            b.comment("Tables into shared memory.");
            self.operands.decoder.fill(threads);
            let zero = b.i32(0);
            if !plan.own_sums {
                b.for_(self.thread, self.rows * plan.tile_sums(), threads, |i| {
                    b.store(self.sums, i, zero, Elem::I32);
                });
            }
            zero
        };
        if self.operands.tokens.are_pairs() {
            let zero = tables();
            b.grid_wait();
            b.grid_launch();
            return self.operands.tokens.in_unit(b, b.special(Special::BlockY), self.thread, threads, || {
                let buffers = buffers();
                first_words(&buffers);
                self.multiply(&buffers, zero);
            });
        }
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let buffers = buffers();
        first_words(&buffers);
        let early = self.within.map(Within::early);
        let zero = tables();
        b.grid_launch();
        if plan.resident {
            b.barrier();
        }
        b.grid_wait();
        if let (Some(within), Some(early)) = (self.within, &early) {
            b.comment("The token's activations.");
            self.operands.prepared(within.late(early));
            b.barrier();
        }
        self.multiply(&buffers, zero);
    }

    /// All that depends on activations. The first words are on their way to `buffers`.
    fn multiply(&self, buffers: &[Words], zero: V<'b>) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let fragments = self.activations();
        if !plan.resident {
            b.barrier();
        }

        // Where a thread has few results, what they are scaled by is on its way, too: now that of a single one, of more
        // while it waits for the sums.
        let few = self.launch.split == 1 && plan.results <= RESULTS;
        let scaling = || (0..plan.results).map(|r| self.scaling(self.thread + r * threads)).collect::<Vec<_>>();
        let early = (few && plan.results == 1).then(scaling);

        b.comment("Down the row tiles.");
        let none = b.vector(&[zero; 4]);
        let kept = if plan.whole_rows() { 0 } else { plan.sums() };
        let acc: Vec<Var> = (0..kept).map(|_| b.var(none)).collect();
        b.for_(0, self.steps, plan.buffers, |first| {
            for (p, buffer) in (0..).zip(buffers) {
                let step = first + p;
                let run = || self.step(step, buffer, &fragments, &acc);
                if p == 0 { run() } else { b.if_(step.lt(self.steps), run) }
            }
        });
        if self.launch.split > 1 {
            b.barrier();
            self.meet();
        } else if few {
            let scaling = early.unwrap_or_else(scaling);
            b.barrier();
            scaling.iter().for_each(|s| self.write(s, || self.block_sums(s.row, s.token)));
        } else {
            b.barrier();
            let write = |_, s: &Scaling<'b>| self.write(s, || self.block_sums(s.row, s.token));
            copy_all(b, self.thread, self.all_results(), |i| self.scaling(i), write);
        }
    }

    /// How [`copy_all`] goes over the results of the block.
    fn all_results(&self) -> [u32; 3] {
        [self.plan.most_rows * self.op.batch, self.launch.warps * 32, RESULTS]
    }

    /// Row tile (within the block) and column tile of the first tile of a step.
    fn place(&self, step: V<'b>) -> (V<'b>, V<'b>) {
        let per_row = self.plan.per_warp / self.plan.depth;
        match per_row {
            1 => (step, self.warp_col),
            _ => (step / per_row, self.warp_col + step % per_row * self.plan.depth),
        }
    }

    /// Starts loading the words of a step's tiles from the `tile`th on.
    fn fetch(&self, step: V<'b>, tile: u32, words: &[Vec<Var>]) {
        let codes = self.plan.layout.lane_words.len() as u32;
        let period = self.operands.period();
        let (row, col) = self.place(step);
        let first = (self.first_row + row) * self.operands.row_words()
            + if codes == 1 { col * period } else { col / codes * period };
        self.operands.fetch(first, col, tile, words, !self.covers_exactly(), self.lane);
    }

    /// True if warps and splits divide the column tiles evenly.
    fn covers_exactly(&self) -> bool {
        self.plan.per_warp * self.launch.warps * self.launch.split == self.plan.layout.col_tiles()
    }

    /// Brings in the activations: into registers, or into shared memory (a barrier must follow).
    fn activations(&self) -> Fragments<'b> {
        let (b, plan) = (self.b, self.plan);
        let stride = self.op.shape.cols.next_multiple_of(COLUMN_PAD);
        let covered = self.covered();
        if let Some(staged) = self.staged {
            self.stage(staged, stride);
            return None;
        }
        let quad = self.lane & 3;
        let column = self.lane >> 2;
        // Columns of the product beyond the last plane are not read; they repeat it.
        let plane = |group: u32| (column + group * 8).min(plan.planes - 1);
        // Those of experts are looked up once.
        let looked_up = 0..if self.operands.tokens.are_pairs() { plan.groups } else { 0 };
        let looked_up: Vec<V> = looked_up.map(|group| self.operands.tokens.plane(plane(group))).collect();
        let fragment = |d: u32, kt: u32, group: u32| {
            let plane = looked_up.get(group as usize).map_or_else(|| plane(group), |v| *v);
            [0, 1].map(|half| {
                let cell = (self.warp_col + d) * (plan.layout.tile.cols / CELL) + (kt * 2 + half);
                let word = (cell * self.operands.tokens.planes() + plane) * 4 + quad;
                let load = || self.operands.x_word(word);
                if covered <= stride {
                    return load();
                }
                let value = b.var(b.u32(0));
                b.if_(cell.lt(stride / CELL), || b.set(value, load()));
                b.get(value)
            })
        };
        let parts = plan.layout.tile.cols / 32;
        let of_tile = |d, group| (0..parts).map(|kt| fragment(d, kt, group)).collect();
        Some((0..plan.depth).map(|d| (0..plan.groups).map(|group| of_tile(d, group)).collect()).collect())
    }

    /// Brings the activations of the block's columns, of `stride`, into shared memory, plane by plane. Of a tile, the words
    /// that a lane of a quad takes lie side by side, so that it reads them at once.
    fn stage(&self, staged: Mem, stride: u32) {
        let (b, plan) = (self.b, self.plan);
        let threads = self.launch.warps * 32;
        let of_tile = plan.layout.tile.cols / 4;
        let of_lane = of_tile / 4;
        let load = |i: V<'b>| {
            if self.operands.tokens.are_pairs() {
                return self.staged_word(i, stride);
            }
            let word = self.block_col * (of_tile * plan.planes) + i;
            let load = || self.operands.x_word(word);
            if self.covered() <= stride {
                return load();
            }
            let value = b.var(b.u32(0));
            b.if_(word.lt(stride / 4 * plan.planes), || b.set(value, load()));
            b.get(value)
        };
        // Word q of a tile's jth cell is the jth of lane q.
        let store = |i: V<'b>, &value: &V<'b>| {
            let (cell, plane) = divide(b, i / 4, plan.planes);
            let (tile, cell) = (cell / of_lane, cell % of_lane);
            let to = tile * of_tile + i % 4 * of_lane + cell;
            b.store(staged, to + plane * plan.plane_words(self.launch), value, Elem::U32);
        };
        let words = plan.planes * plan.block_cols(self.launch) / 4;
        copy_all(b, self.thread, [words, threads, STAGED], load, store);
    }

    /// Word `i` of the block's activations, of `stride` columns, where its tokens are the pairs of a unit.
    fn staged_word(&self, i: V<'b>, stride: u32) -> V<'b> {
        let (b, plan) = (self.b, self.plan);
        let (cell, plane) = divide(b, i / 4, plan.planes);
        let cell = self.block_col * (plan.layout.tile.cols / CELL) + cell;
        let word = (cell * self.operands.tokens.planes() + self.operands.tokens.plane(plane)) * 4 + i % 4;
        let load = || self.operands.x_word(word);
        if self.covered() <= stride {
            return load();
        }
        let value = b.var(b.u32(0));
        b.if_(cell.lt(stride / CELL), || b.set(value, load()));
        b.get(value)
    }

    /// Columns that all warps of all parts cover.
    fn covered(&self) -> u32 {
        let plan = self.plan;
        plan.per_warp * self.launch.warps * self.launch.split * plan.layout.tile.cols
    }

    /// The activation operands of a column tile, from shared memory: see [`Emit::stage`].
    fn staged_fragments(&self, staged: Mem, col: V<'b>, group: u32) -> Vec<[V<'b>; 2]> {
        let plane = ((self.lane >> 2) + group * 8).min(self.plan.planes - 1);
        let of_tile = self.plan.layout.tile.cols / 4;
        let of_lane = of_tile / 4;
        let first = plane * self.plan.plane_words(self.launch) + (col - self.block_col) * of_tile;
        let first = first + (self.lane & 3) * of_lane;
        // Columns are a multiple of 32, so a lane's words come at least in twos; vectors are aligned to their size.
        let wide = if of_lane.is_multiple_of(4) { 4 } else { 2 };
        let load = |i: u32| self.b.load_as(staged, first + i, Elem::U32, wide, Cache::Default).lanes();
        let words: Vec<V> = (0..of_lane).step_by(wide as usize).flat_map(load).collect();
        words.chunks_exact(2).map(|two| [two[0], two[1]]).collect()
    }

    /// Decodes and multiplies the tiles of a step; `acc` are the sums of the steps before, unless there are none
    /// ([`Plan::whole_rows`]). Where a tile's words were, those of the tile that is due as many tiles
    /// later are on their way meanwhile: of this step, or of the one that has the buffer next.
    fn step(&self, step: V<'b>, buffer: &Words, fragments: &Fragments<'b>, acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let (row, col) = self.place(step);
        let mut current: VecDeque<Vec<V>> = buffer.iter().map(|tile| self.words(tile)).collect();
        let next = step + plan.buffers;
        if plan.early == plan.depth {
            b.if_(next.lt(self.steps), || self.fetch(next, 0, buffer));
        }
        let none = || b.vector(&[b.i32(0); 4]);
        let mut sums: Vec<V> = if plan.whole_rows() {
            (0..plan.sums()).map(|_| none()).collect()
        } else {
            acc.iter().map(|&v| b.get(v)).collect()
        };
        let parts = plan.layout.tile.cols / 32;
        for d in 0..plan.depth {
            if plan.early < plan.depth {
                let ahead = d + plan.early;
                match ahead.checked_sub(plan.depth) {
                    None => {
                        let tile = self.operands.words(ahead..ahead + 1);
                        self.fetch(step, ahead, &tile);
                        current.push_back(self.words(&tile[0]));
                    }
                    Some(tile) => {
                        let range = tile as usize..tile as usize + 1;
                        b.if_(next.lt(self.steps), || self.fetch(next, tile, &buffer[range]));
                    }
                }
            }
            let words = current.pop_front().expect("words of each tile");
            let registers = self.operands.decoder.tile(d as usize % plan.layout.lane_words.len(), &words);
            for group in 0..plan.groups {
                let x = match (fragments, self.staged) {
                    (Some(f), _) => f[d as usize][group as usize].clone(),
                    (None, Some(staged)) => self.staged_fragments(staged, col + d, group),
                    (None, None) => unreachable!("activations are resident or staged"),
                };
                for (kt, &x) in (0..parts).zip(&x) {
                    for part in 0..plan.layout.row_parts() {
                        let first = ((part * parts + kt) * 4) as usize;
                        let a = &registers[first..first + 4];
                        let slot = ((part * plan.groups + group) * plan.products) as usize;
                        operands::multiply(b, a, x, &mut sums[slot..]);
                    }
                }
            }
        }
        if plan.whole_rows() {
            return self.flush(row, &sums);
        }
        acc.iter().zip(&sums).for_each(|(&var, &sum)| b.set(var, sum));
        let per_row = plan.per_warp / plan.depth;
        b.if_((step % per_row).eq(per_row - 1), || {
            self.flush(row, &sums);
            acc.iter().for_each(|&v| b.set(v, none()));
        });
    }

    /// The words of a tile.
    fn words(&self, tile: &[Var]) -> Vec<V<'b>> {
        flatten(&tile.iter().map(|&v| self.b.get(v)).collect::<Vec<_>>())
    }

    /// Stores the warp's sums of a row tile, or adds them to the block's.
    fn flush(&self, row: V<'b>, sums: &[V<'b>]) {
        let (b, plan) = (self.b, self.plan);
        let (g, t) = (self.lane >> 2, self.lane & 3);
        let warp_first = b.special(Special::Warp) * plan.most_rows;
        for part in 0..plan.layout.row_parts() {
            for group in 0..plan.groups {
                let plane = t * 2 + group * 8;
                let store = || {
                    // Planes 2t and 2t + 1 of rows g and g + 8, the products of a plane side by side.
                    for half in 0..2 {
                        let slots = (0..2 * plan.products).map(|s| {
                            let first = (part * plan.groups + group) * plan.products;
                            sums[(first + s % plan.products) as usize].lane(2 * half + s / plan.products)
                        });
                        let tile_row = g + (part * 16 + half * 8);
                        let first = (warp_first + tile_row) * plan.slots() + plane * plan.products;
                        let at = first + row * (plan.layout.tile.rows * plan.slots());
                        b.store(self.sums, at, b.vector(&slots.collect::<Vec<_>>()), Elem::I32);
                    }
                };
                let add = || {
                    for product in 0..plan.products {
                        let sum = sums[((part * plan.groups + group) * plan.products + product) as usize];
                        for (i, value) in sum.lanes().into_iter().enumerate() {
                            let i = i as u32;
                            let slot = (plane + i % 2) * plan.products + product;
                            b.atomic_add(self.sums, self.added(row, g + (part * 16 + i / 2 * 8), slot), value);
                        }
                    }
                };
                let out = || if plan.own_sums { store() } else { add() };
                if plan.planes >= (group + 1) * 8 { out() } else { b.if_(plane.lt(plan.planes), out) }
            }
        }
    }

    /// Where warps add the sums of a row tile's row that belong to a slot.
    fn added(&self, row_tile: V<'b>, row: V<'b>, slot: V<'b>) -> V<'b> {
        row_tile * self.plan.tile_sums() + (slot * self.plan.slot_words() + row)
    }

    /// The sums of a row of the block that belong to a token, over all warps.
    fn block_sums(&self, row: V<'b>, token: V<'b>) -> Vec<V<'b>> {
        let (b, plan) = (self.b, self.plan);
        let of_token = 2 * plan.products;
        if !plan.own_sums {
            let (tile, row) = (row / plan.layout.tile.rows, row % plan.layout.tile.rows);
            let slot = |s: u32| token * of_token + s;
            return (0..of_token).map(|s| b.load(self.sums, self.added(tile, row, slot(s)), Elem::I32)).collect();
        }
        let place = |p: u32| {
            let at = (row + p * plan.most_rows) * plan.slots() + token * of_token;
            b.load_as(self.sums, at, Elem::I32, of_token, Cache::Default).lanes()
        };
        let first = place(0);
        (1..plan.sum_places(self.launch))
            .fold(first, |sums, p| sums.into_iter().zip(place(p)).map(|(a, b)| a + b).collect())
    }

    /// What the sums of the block's result `i` are multiplied with and added to. Neighbouring results are those whose
    /// sums lie side by side: of the tokens of a row, or of the rows of a token where warps add their sums.
    fn scaling(&self, i: V<'b>) -> Scaling<'b> {
        let (plan, batch) = (self.plan, self.op.batch);
        let rows = self.rows * plan.layout.tile.rows;
        // Where there is none, that of another.
        let (row, token, exists) = if plan.own_sums || self.launch.split > 1 || batch == 1 {
            let (row, token) = divide(self.b, i, batch);
            (row, token, row.lt(rows))
        } else {
            let (token, row) = divide(self.b, i, plan.most_rows);
            (row, token.min(batch - 1), row.lt(rows) & token.lt(batch))
        };
        let exists = self.operands.tokens.exists(token).map_or(exists, |there| exists & there);
        let row = row.min(rows - 1);
        let global = self.first_row * plan.layout.tile.rows + row;
        let (row_scale, token_scale) = (self.operands.row_scale(global), self.operands.token_scale(token));
        Scaling { exists, row, token, row_scale, token_scale, before: self.operands.before(global, token, exists) }
    }

    /// Scales and stores a result, if it exists.
    fn write(&self, by: &Scaling<'b>, sums: impl FnOnce() -> Vec<V<'b>>) {
        let row = self.first_row * self.plan.layout.tile.rows + by.row;
        self.b.if_(by.exists, || {
            self.operands.write(row, by.token, &sums(), by.row_scale, by.token_scale, by.before);
        });
    }

    /// The blocks that share row tiles add up in global memory; the last to arrive writes, and leaves zeros.
    fn meet(&self) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let partial = self.operands.partial;
        let first = self.first_row * (plan.layout.tile.rows * plan.slots());
        let len = self.rows * (plan.layout.tile.rows * plan.slots());
        b.for_(self.thread, len, threads, |i| {
            let place = |p: u32| b.load(self.sums, i + p * (plan.most_rows * plan.slots()), Elem::I32);
            let sum = if plan.own_sums {
                (1..plan.sum_places(self.launch)).fold(place(0), |sum, p| sum + place(p))
            } else {
                let (row, slot) = (i / plan.slots(), i % plan.slots());
                let at = self.added(row / plan.layout.tile.rows, row % plan.layout.tile.rows, slot);
                b.load(self.sums, at, Elem::I32)
            };
            b.atomic_add(partial, first + i, sum);
        });
        self.operands.when_all_arrived(self.block, self.launch.split, self.thread, || {
            let of_token = 2 * plan.products;
            let write = |_, s: &Scaling<'b>| {
                let at = first + s.row * plan.slots() + s.token * of_token;
                self.write(s, || b.load_as(partial, at, Elem::I32, of_token, Cache::Default).lanes());
            };
            copy_all(b, self.thread, self.all_results(), |i| self.scaling(i), write);
            b.barrier();
            b.for_(self.thread, len, threads, |i| b.store(partial, first + i, b.i32(0), Elem::I32));
        });
    }
}

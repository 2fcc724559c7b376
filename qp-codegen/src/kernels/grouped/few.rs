//! Products of a few tokens with matrices of formats.
//!
//! # How it works
//!
//! A block of the grid takes a run of rows of tiles, its warps share the columns. A warp walks down the rows with the words and
//! fields of the next ones on their way in registers, and keeps the activations of its columns, two planes of bytes a token,
//! and their sums over each run, which offsets need.
//!
//! In a step a warp makes bytes of the words of its tiles, multiplies them with the activations run by run, joins the planes
//! of a token, and adds to a sum of 64 bits the run's slope times that and the run's rest times the activations' sum. The
//! sums of the warps meet in shared memory, each in a place of its own. Where columns are more than the warps hold the
//! activations of, they go down the rows again for each further pass.
//!
//! Digits that are sums of four bytes ([`Digits::Bytes`]) are not summed: the tensor cores do that, whose operands are the four bytes
//! of a weight and four times its activation. So a product is of 8 columns, and there is one plane.
//!
//! One or two tokens leave columns of a product without planes. There the runs of a tile stand side by side: a column has the
//! activations of one run, zeros elsewhere, so a product over all of them has the sum of each run in a lane of its own, which needs the
//! numbers of that run alone.
//!
//! A block of one token may prepare it itself ([`super::lower_with`]): it does so when its first words are on their way, and has the planes
//! in shared memory.
//!
//! More than [`TOKENS`] tokens are blocks of their own that take the same weights at about the same time, so that those
//! come from memory once.

use std::collections::HashMap;

use super::Product;
use super::layout::{ROWS, Relaid};
use super::operands::{ACROSS, OF_PRODUCT, OperandBytes, Operands, Runs, Tile, number_registers, put, taken};
use crate::ir::{Builder, Elem, Kernel, Mem, Special, V, Var};
use crate::kernels::operands::{Form, divide};
use crate::kernels::prepare::{Prepare, Reader, Within};
use crate::layout::{CELL, COLUMN_PAD};
use crate::spec::terms::{Digits, TILE};

/// Most tokens of a block.
pub const TOKENS: u32 = 8;

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
    /// Whether blocks copy the table of digits, if there is one, into shared memory; else they look it up in global memory.
    pub shared_book: bool,
}

/// Parts of the tokens, each with blocks of its own.
pub(super) fn parts(op: &Product) -> u32 {
    op.batch.div_ceil(TOKENS)
}

/// Sizes that follow from the operation and its launch.
pub(super) struct Plan {
    pub(super) layout: Relaid,
    pub(super) parts: u32,
    /// Tokens of a part.
    tokens: u32,
    /// Tensor-core products side by side to hold all planes of a part.
    pub(super) groups: u32,
    /// Runs side by side in a product; a power of two.
    abreast: u32,
    /// Products of a tile with sums of their own.
    pub(super) sets: u32,
    /// Places of a row's sums: of each token one for each run side by side.
    places: u32,
    /// Times that warps go down the rows.
    pub(super) passes: u32,
    /// Rows of tiles of the block that has most.
    pub(super) most_rows: u32,
    /// Whether sums of activations over runs are needed.
    offsets: bool,
    /// Whether a weight is four bytes of a product.
    pub(super) bytes: bool,
    /// Products across a tile.
    pub(super) across: u32,
}

impl Plan {
    pub(super) fn new(op: &Product, launch: &Launch) -> Plan {
        let layout = op.layout();
        let parts = parts(op);
        let tokens = op.batch.div_ceil(parts);
        let bytes = op.terms.stream.as_ref().is_some_and(|s| matches!(s.digits, Digits::Bytes { .. }));
        let abreast =
            if bytes || tokens > OF_PRODUCT { 1 } else { (OF_PRODUCT / tokens.next_power_of_two()).min(op.runs()) };
        Plan {
            abreast,
            sets: op.runs() / abreast,
            places: tokens * abreast,
            bytes,
            across: if bytes { 4 * ACROSS } else { ACROSS },
            parts,
            tokens,
            groups: tokens.div_ceil(OF_PRODUCT),
            passes: layout.col_tiles().div_ceil(launch.warps * launch.depth),
            most_rows: layout.row_tiles().div_ceil(launch.blocks),
            offsets: op.has_offsets(false),
            layout,
        }
    }

    /// Sums of activations that a lane keeps for a tile and a group of planes.
    pub(super) fn kept_sums(&self) -> u32 {
        if self.offsets { self.sets } else { 0 }
    }

    /// Registers of a lane for the numbers of a tile.
    pub(super) fn number_registers(&self) -> u32 {
        number_registers(&self.layout)
    }

    /// Bytes of shared memory for the sums of a row of tiles.
    fn sum_bytes_of_tile(&self, launch: &Launch) -> u32 {
        launch.warps * ROWS * self.places * 8
    }

    /// Whether what sums are multiplied with is on its way from the start. Products of several tokens do not gain by it.
    fn keeps_factors(&self) -> bool {
        self.tokens == 1
    }

    /// Bytes of shared memory for the sums of a row of tiles, and for what they are multiplied with.
    pub(super) fn row_bytes(&self, launch: &Launch) -> u32 {
        self.sum_bytes_of_tile(launch) + if self.keeps_factors() { ROWS * 4 } else { 0 }
    }

    /// Bytes of shared memory; with those of a preparation, if blocks do that themselves.
    pub(super) fn shared_bytes(&self, launch: &Launch, prepare: Option<&Prepare>) -> u32 {
        let book = if launch.shared_book { self.layout.book_bytes() } else { 0 };
        let planes = prepare.map_or(0, |prepare| prepare.shared_within(launch.warps));
        self.row_bytes(launch) * self.most_rows + book + planes
    }
}

/// Makes the kernel; its parameters are those of [`super::lower`], of experts those of [`super::lower_for_experts`], with a preparation
/// those of [`super::lower_with`].
pub(super) fn lower(op: &Product, launch: &Launch, form: Form) -> Kernel {
    let plan = Plan::new(op, launch);
    let b = op.builder("few", launch.blocks * plan.parts, launch.warps * 32, launch.min_blocks, form);
    let within = form.prepares().map(|prepare| Within::new(&b, prepare, launch.warps, Reader::Grouped));
    Emit::new(&b, op, launch, &plan, form, within.as_ref()).kernel();
    b.finish()
}

/// Registers for what a step needs of the matrix.
struct Buffer {
    tiles: Vec<Tile>,
    grid: Option<Var>,
}

/// Registers for the activations of a warp's columns: by tile and group of planes.
struct Activations {
    /// Operands of each product across the tile.
    x: Vec<Vec<Vec<[Var; 2]>>>,
    /// Of the lane's token and each set, the sum over the lane's run.
    sums: Vec<Vec<Vec<Var>>>,
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Product<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    operands: Operands<'b, 'a>,
    /// The preparation of the token, if blocks do it themselves.
    within: Option<&'a Within<'a, 'b>>,
    sums: Mem,
    /// What the sums of the block's rows are multiplied with, on its way from the start, of one token.
    row_factors: Option<Mem>,
    thread: V<'b>,
    lane: V<'b>,
    warp: V<'b>,
    /// Which of the parts of the tokens.
    part: V<'b>,
    /// First row of tiles, and how many, of this block.
    first_row: V<'b>,
    rows: V<'b>,
    steps: V<'b>,
}

impl<'b, 'a> Emit<'b, 'a> {
    fn new(
        b: &'b Builder,
        op: &'a Product<'a>,
        launch: &'a Launch,
        plan: &'a Plan,
        form: Form,
        within: Option<&'a Within<'a, 'b>>,
    ) -> Self {
        let layout = &plan.layout;
        let (thread, lane) = (b.special(Special::Thread), b.special(Special::Lane));
        let operands = match within {
            Some(within) => Operands::preparing(b, op, lane, launch.shared_book, within),
            None => Operands::new(b, op, lane, OperandBytes::Digits, launch.shared_book, form.experts()),
        };
        let sums = b.shared("sums", Elem::I32, plan.sum_bytes_of_tile(launch) / 4 * plan.most_rows);
        let row_factors = plan.keeps_factors().then(|| b.shared("row_factors", Elem::F32, ROWS * plan.most_rows));
        let warp = b.special(Special::Warp);
        let (block, part) = divide(b, b.special(Special::BlockX), plan.parts);
        let first_row = block * layout.row_tiles() / launch.blocks;
        let rows = (block + 1) * layout.row_tiles() / launch.blocks - first_row;
        // With several passes all blocks count as the one that has most rows: dividing by a constant costs little.
        let steps = if plan.passes == 1 { rows } else { b.i32((plan.most_rows * plan.passes) as i32) };
        Emit {
            b,
            op,
            launch,
            plan,
            operands,
            within,
            sums,
            row_factors,
            thread,
            lane,
            warp,
            part,
            first_row,
            rows,
            steps,
        }
    }

    fn kernel(&self) {
        let (b, tokens, threads) = (self.b, &self.operands.tokens, self.launch.warps * 32);
        if tokens.are_pairs() {
            self.operands.fill(threads);
            b.grid_wait();
            b.grid_launch();
            return tokens.in_unit(b, b.special(Special::BlockY), self.thread, threads, || {
                let work = || self.products(&self.first_words());
                match tokens.exists(self.part * self.plan.tokens) {
                    Some(exists) if self.plan.parts > 1 => b.if_(exists, work),
                    _ => work(),
                }
            });
        }
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let buffers = self.first_words();
        let early = self.within.map(Within::early);
        self.operands.fill(threads);
        b.grid_launch();
        b.grid_wait();
        if let (Some(within), Some(early)) = (self.within, &early) {
            b.comment("The token's activations.");
            self.operands.prepared(within.late(early));
            b.barrier();
        }
        self.products(&buffers);
    }

    /// The words of the first steps, on their way.
    fn first_words(&self) -> Vec<Buffer> {
        let b = self.b;
        let buffers: Vec<Buffer> = (0..self.launch.ahead).map(|_| self.buffer()).collect();
        for (p, buffer) in (0..).zip(&buffers) {
            let at = b.i32(p);
            b.if_(at.lt(self.steps), || self.fetch(at, buffer));
        }
        if let Some(factors) = self.row_factors {
            let (quads, threads) = (self.rows * (ROWS / 4), self.launch.warps * 32);
            b.for_(self.thread, quads, threads, |i| {
                self.operands.copy_row_factors(factors, i, self.first_row * (ROWS / 4) + i);
            });
            b.async_commit();
        }
        buffers
    }

    /// All behind the first words.
    fn products(&self, buffers: &[Buffer]) {
        let (b, plan) = (self.b, self.plan);
        let scale = plan.keeps_factors().then(|| self.operands.token_scale(b.i32(0)));
        let activations = self.activations();
        if plan.passes == 1 {
            self.load_activations(&activations, b.i32(0));
        }
        b.comment("Down the rows of tiles.");
        b.for_(0, self.steps, self.launch.ahead, |first| {
            for (p, buffer) in (0..).zip(buffers) {
                let step = first + p;
                let run = || self.step(step, buffer, &activations);
                if p == 0 { run() } else { b.if_(step.lt(self.steps), run) }
            }
        });
        if self.row_factors.is_some() {
            b.async_wait(0);
        }
        b.barrier();
        self.results(scale);
    }

    /// Pass and row of tiles, within the block, of a step.
    fn place(&self, step: V<'b>) -> (V<'b>, V<'b>) {
        if self.plan.passes == 1 { (self.b.i32(0), step) } else { divide(self.b, step, self.plan.most_rows) }
    }

    /// True if there is a row of tiles for all steps.
    fn has_rows(&self) -> bool {
        self.plan.passes == 1 || self.plan.layout.row_tiles() == self.launch.blocks * self.plan.most_rows
    }

    /// The first of a warp's tiles in a pass.
    fn column(&self, pass: V<'b>) -> V<'b> {
        (pass * self.launch.warps + self.warp) * self.launch.depth
    }

    /// True if there are tiles for all warps in all passes.
    fn covers_exactly(&self) -> bool {
        self.plan.passes * self.launch.warps * self.launch.depth == self.plan.layout.col_tiles()
    }

    fn buffer(&self) -> Buffer {
        let b = self.b;
        Buffer {
            tiles: (0..self.launch.depth).map(|_| self.operands.tile()).collect(),
            grid: self.plan.layout.grid.map(|_| b.var(b.u32(0))),
        }
    }

    /// Starts loading what a step needs of the matrix.
    fn fetch(&self, step: V<'b>, buffer: &Buffer) {
        let b = self.b;
        let (pass, row) = self.place(step);
        // Of a row that is not the block's the sums are not kept.
        let row = self.first_row + if self.has_rows() { row } else { row.min(self.rows - 1) };
        let col = self.column(pass);
        for (d, tile) in (0..).zip(&buffer.tiles) {
            let load = || self.operands.fetch(row, col + d, tile);
            if self.covers_exactly() {
                load();
            } else {
                // Activations beyond the last column are 0: it does not matter what is multiplied with them.
                b.if_((col + d).lt(self.plan.layout.col_tiles()), load);
            }
        }
        if let (Some(var), Some(grid)) = (buffer.grid, self.operands.grid(row)) {
            b.set(var, grid);
        }
    }

    fn activations(&self) -> Activations {
        let (b, plan) = (self.b, self.plan);
        let of = |n: u32, f: &dyn Fn() -> Var| (0..n).map(|_| f()).collect::<Vec<_>>();
        let word = || b.var(b.u32(0));
        let cells = || (0..plan.across).map(|_| [word(), word()]).collect::<Vec<_>>();
        let sums = || of(plan.kept_sums(), &|| b.var(b.i32(0)));
        Activations {
            x: (0..self.launch.depth).map(|_| (0..plan.groups).map(|_| cells()).collect()).collect(),
            sums: (0..self.launch.depth).map(|_| (0..plan.groups).map(|_| sums()).collect()).collect(),
        }
    }

    /// Brings in the activations of a pass.
    fn load_activations(&self, to: &Activations, pass: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let (most, tokens) = (2 * self.op.batch, &self.operands.tokens);
        let cells = self.op.shape.cols.next_multiple_of(COLUMN_PAD) / CELL;
        let covered = plan.passes * self.launch.warps * self.launch.depth * (TILE / CELL);
        let (quad, column) = (self.lane & 3, self.lane >> 2);
        // Which of the runs side by side the column has.
        let (abreast, pair) = (plan.abreast as i32, column >> 1);
        let (column, own) = match abreast {
            1 => (column, None),
            _ => (pair / abreast * 2 + (column & 1), Some(pair % abreast)),
        };
        let first = self.column(pass) * (TILE / CELL);
        for (d, of_tile) in (0..).zip(&to.x) {
            for (group, of_group) in (0..).zip(of_tile) {
                // Columns of the product beyond the last plane repeat it; their sums are not read.
                let plane = (self.part * (2 * plan.tokens) + column + group * 8).min(most as i32 - 1);
                let (plane, planes) = (tokens.plane(plane), tokens.planes());
                let load = |cell: V<'b>| self.operands.x_word((cell * planes + plane) * 4 + quad);
                let word = |n: u32| {
                    let cell = first + (d * (TILE / CELL) + n);
                    if covered <= cells {
                        load(cell)
                    } else {
                        cell.lt(cells).select(load(cell.min(cells as i32 - 1)), 0_u32)
                    }
                };
                let word = |n: u32| {
                    let run = n * CELL * self.op.runs() / TILE % plan.abreast;
                    own.map_or_else(|| word(n), |own| own.eq(run as i32).select(word(n), 0_u32))
                };
                if plan.bytes {
                    for (n, products) in (0..).zip(of_group.chunks_exact(2)) {
                        let word = word(n);
                        for (byte, &var) in (0..).zip(products.iter().flatten()) {
                            b.set(var, word.permute(word, 0x1111 * byte));
                        }
                    }
                } else {
                    of_group.iter().flatten().zip(0..).for_each(|(&var, n)| b.set(var, word(n)));
                }
            }
        }
        let ones = [b.u32(if plan.bytes { 1 } else { 0x0101_0101 }); 4];
        for (d, of_tile) in to.sums.iter().enumerate() {
            for (group, of_group) in of_tile.iter().enumerate() {
                for (set, &var) in (0..).zip(of_group) {
                    let sum = self.multiply(&|_| ones, &to.x[d][group], set);
                    b.set(var, sum.lane(0) * 128 + sum.lane(1));
                }
            }
        }
    }

    /// The products of a set, a run or those side by side: of the registers of each product's columns with their activations.
    fn multiply(&self, a: &dyn Fn(u32) -> [V<'b>; 4], x: &[[Var; 2]], set: u32) -> V<'b> {
        let b = self.b;
        let mut sum = b.vector(&[b.i32(0); 4]);
        let columns = TILE / self.plan.sets;
        let kept = |kt: u32| x[kt as usize].map(|var| b.get(var));
        let of_product = TILE / self.plan.across;
        if columns < of_product {
            // Half a product: the other half's activations are left out.
            let ([first, second], zero) = (kept(set / 2), b.u32(0));
            let x = if set.is_multiple_of(2) { [first, zero] } else { [zero, second] };
            return b.mma_i8(false, a(set / 2), x, sum);
        }
        for kt in set * columns / of_product..(set + 1) * columns / of_product {
            sum = b.mma_i8(false, a(kt), kept(kt), sum);
        }
        sum
    }

    /// Decodes and multiplies the tiles of a step. Where its words were, those of a later step are on their way meanwhile.
    fn step(&self, step: V<'b>, buffer: &Buffer, activations: &Activations) {
        let (b, plan) = (self.b, self.plan);
        let (pass, row) = self.place(step);
        let tiles: Vec<_> = buffer.tiles.iter().map(|t| self.operands.arrived(t)).collect();
        let inverses = buffer.grid.map(|grid| self.operands.inverses(b.get(grid)));
        let next = step + self.launch.ahead;
        b.if_(next.lt(self.steps), || self.fetch(next, buffer));
        if plan.passes > 1 {
            b.if_(row.eq(0), || self.load_activations(activations, pass));
        }
        let mut sums: Vec<[Option<V<'b>>; 2]> = vec![[None; 2]; plan.groups as usize];
        for (d, tile) in tiles.iter().enumerate() {
            let planes = match plan.bytes {
                true => vec![self.operands.byte_registers(tile)],
                false => self.operands.registers(tile),
            };
            let mut known = HashMap::new();
            for set in 0..plan.sets {
                let runs = Runs { first: set * plan.abreast, count: plan.abreast };
                let factors = self.operands.factors(tile, runs, inverses, &mut known);
                for (group, sums) in sums.iter_mut().enumerate() {
                    let offset = plan.offsets.then(|| b.get(activations.sums[d][group][set as usize]));
                    for (plane, registers) in (0..).zip(&planes) {
                        let of = |kt: u32| std::array::from_fn(|a| registers[(kt * 4) as usize + a]);
                        let products = self.multiply(&of, &activations.x[d][group], set);
                        for (half, sum) in (0..).zip(&mut *sums) {
                            let products = [0, 1].map(|low| products.lane(2 * half + low));
                            let term = self.operands.term(plane, products, offset, factors.map(|f| f[half as usize]));
                            *sum = Some(sum.map_or(term, |s| s + term));
                        }
                    }
                }
            }
        }
        let keep = || self.keep(pass, row, &sums);
        if self.has_rows() { keep() } else { b.if_(row.lt(self.rows), keep) }
    }

    /// Stores the warp's sums of a row of tiles, or adds them to those of the passes before.
    fn keep(&self, pass: V<'b>, row: V<'b>, sums: &[[Option<V<'b>>; 2]]) {
        let (b, plan) = (self.b, self.plan);
        let (g, t) = (self.lane >> 2, self.lane & 3);
        for (group, halves) in (0..).zip(sums) {
            let place = t + group * OF_PRODUCT;
            let store = || {
                for (half, sum) in (0..).zip(halves) {
                    let sum = sum.expect("a tile has runs");
                    let of_block = (self.warp * plan.most_rows + row) * ROWS + (g + half * 8);
                    let at = (of_block * plan.places + place) * 2;
                    if plan.passes == 1 {
                        put(b, self.sums, at, sum);
                    } else {
                        b.if_else(
                            pass.eq(0),
                            || put(b, self.sums, at, sum),
                            || put(b, self.sums, at, sum + taken(b, self.sums, at)),
                        );
                    }
                }
            };
            if (group + 1) * OF_PRODUCT <= plan.places { store() } else { b.if_(place.lt(plan.places), store) }
        }
    }

    /// Adds the warps' sums, scales and writes; `scale` is that of the token, if there is one.
    fn results(&self, scale: Option<V<'b>>) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let len = self.rows * (ROWS * plan.tokens);
        b.for_(self.thread, len, launch.warps * 32, |i| {
            let (of_block, within) = divide(b, i, plan.tokens);
            let of_warp = |warp: u32| i * plan.abreast + warp * (plan.most_rows * ROWS * plan.places);
            let places = (0..launch.warps).flat_map(|warp| (0..plan.abreast).map(move |run| (warp, run)));
            let sums = places.map(|(warp, run)| taken(b, self.sums, (of_warp(warp) + run) * 2));
            let sum = sums.reduce(|sum, x| sum + x).expect("there are warps");
            let row = self.first_row * ROWS + of_block;
            let token = self.part * plan.tokens + within;
            let exists = row.lt(self.op.shape.rows);
            let exists = match self.operands.tokens.exists(token) {
                Some(there) => exists & there,
                None if plan.tokens * plan.parts == self.op.batch => exists,
                None => exists & token.lt(self.op.batch),
            };
            b.if_(exists, || {
                let factor = match self.row_factors {
                    Some(factors) => b.load(factors, of_block, Elem::F32),
                    None => self.operands.row_factor(row),
                };
                let scale = scale.unwrap_or_else(|| self.operands.token_scale(token));
                self.operands.write(row, token, sum, factor, scale);
            });
        });
    }
}

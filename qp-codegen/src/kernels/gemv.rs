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

use super::c_name;
use super::decode::{Decoder, flatten, load_words};
pub use super::launch::Launch;
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V, Var};
use crate::layout::{COLUMN_PAD, Packed};
use crate::spec::{Quantizer, Shape, Value};

/// Most tokens of one launch.
pub const MAX_BATCH: u32 = 8;

/// What to compute.
#[derive(Clone, Copy, Debug)]
pub struct Gemv<'q> {
    /// The quantizer of the weights.
    pub quantizer: &'q Quantizer,
    /// Rows × columns; rows of a fused group are those of all its matrices, each padded to whole tiles.
    pub shape: Shape,
    /// Tokens, 1..=8.
    pub batch: u32,
    /// Add to `y` instead of overwriting it (a residual stream).
    pub accumulate: bool,
}

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
    /// Column tiles decoded between two steps of the loop.
    pub(super) depth: u32,
    /// Activations stay in registers.
    pub(super) resident: bool,
    /// Rows of the block that has most.
    most_rows: u32,
    /// Each warp stores its sums in a place of its own, instead of adding them to the block's.
    own_sums: bool,
}

/// Shared memory that warps may take for sums of their own.
const SUM_BYTES: u32 = 24 << 10;

impl Plan {
    pub(super) fn new(op: &Gemv, launch: &Launch) -> Plan {
        let layout = Packed::new(op.quantizer, op.shape);
        let codes = op.quantizer.codes.len() as u32;
        let planes = 2 * op.batch;
        let groups = planes.div_ceil(8);
        let products = match op.quantizer.value() {
            Value::I8 => 1,
            Value::I16 => 2,
        };
        let exact = layout.col_tiles().div_ceil(launch.warps * launch.split).next_multiple_of(codes);
        let fragments = layout.tile.cols / 32 * 2 * groups;
        let resident = exact <= 4 && exact * fragments <= 32;
        let depth = if resident {
            exact
        } else {
            // Whole groups of tiles: the depth that wastes least, the deeper of equals.
            let depths = (1..=4).filter(|d| d % codes == 0).map(|d| (exact.next_multiple_of(d), std::cmp::Reverse(d)));
            depths.min().map_or(codes, |(_, d)| d.0)
        };
        let most_rows = layout.row_tiles().div_ceil(launch.blocks) * layout.tile.rows;
        let own_sums = 4 * most_rows * planes * products * launch.warps <= SUM_BYTES;
        let per_warp = exact.next_multiple_of(depth);
        Plan { layout, planes, groups, products, per_warp, depth, resident, most_rows, own_sums }
    }

    /// Sums kept for a row: one a plane and product.
    pub(super) fn slots(&self) -> u32 {
        self.planes * self.products
    }

    /// Tensor-core tiles of 16 rows in a tile.
    pub(super) fn row_parts(&self) -> u32 {
        self.layout.tile.rows / 16
    }

    /// Columns that a block's warps cover together.
    fn block_cols(&self, launch: &Launch) -> u32 {
        launch.warps * self.per_warp * self.layout.tile.cols
    }

    /// Places for the sums of a row of the block.
    fn sum_places(&self, launch: &Launch) -> u32 {
        if self.own_sums { launch.warps } else { 1 }
    }

    /// Bytes of shared memory beside the tables.
    pub(super) fn shared_bytes(&self, launch: &Launch) -> u32 {
        let staged = if self.resident { 0 } else { self.planes * self.plane_words(launch) };
        4 * (self.most_rows * self.slots() * self.sum_places(launch) + staged)
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
/// * `x`: signed bytes, plane `2·token` the high and `2·token + 1` the low parts, each of the columns padded to a
///   multiple of [`COLUMN_PAD`] with zeros;
/// * `x_scale` (`f32`) and `x_sum` (`i32`), one a token;
/// * `y`: `f32`, `batch × padded rows`;
/// * `partial` (`i32`, padded rows × planes × products) and `arrived` (`i32`, one a block), zero before and after; not
///   touched unless `split > 1`. See [`meeting_place`].
pub fn lower(op: &Gemv, launch: &Launch) -> Kernel {
    assert!((1..=MAX_BATCH).contains(&op.batch), "batch");
    let q = op.quantizer;
    let name = format!("gemv_{}_{}x{}_b{}", c_name(&q.name), op.shape.rows, op.shape.cols, op.batch);
    let b = Builder::new(&name, [launch.blocks * launch.split, 1], launch.warps * 32);
    b.doc(format!(
        "y[token, row] {}= W[row, :] . x[token, :] with W {} x {} in {} ({:.2} bits a weight), {} token{}.",
        if op.accumulate { "+" } else { "" },
        op.shape.rows,
        op.shape.cols,
        q.name,
        q.rate(),
        op.batch,
        if op.batch == 1 { "" } else { "s" },
    ));
    b.min_blocks(launch.min_blocks);
    b.dependent_launch();
    Emit::new(&b, op, launch, &Plan::new(op, launch)).kernel();
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
    decoder: Decoder<'b, 'a>,
    weights: Mem,
    scales: Mem,
    x: Mem,
    x_scale: Mem,
    x_sum: Mem,
    y: Mem,
    partial: Mem,
    arrived: Mem,
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

/// What turns the sums of a row into its results.
struct Scaling<'b> {
    row: V<'b>,
    scale: V<'b>,
    /// For each token its scale and, for codes with an offset, the sum of its activations.
    tokens: Vec<(V<'b>, Option<V<'b>>)>,
}

/// Prefetched words: by tile of the group, by chunk.
type Buffer = Vec<Vec<Var>>;

/// Activation operands kept in registers: by tile, by 32 columns, by group of planes.
type Fragments<'b> = Option<Vec<Vec<Vec<[V<'b>; 2]>>>>;

impl<'b, 'a> Emit<'b, 'a> {
    fn new(b: &'b Builder, op: &'a Gemv<'a>, launch: &'a Launch, plan: &'a Plan) -> Self {
        let decoder = Decoder::new(b, op.quantizer, launch.table_bytes);
        let weights = b.buffer("weights", Elem::U32, false);
        let scales = b.buffer("scales", Elem::BF16, false);
        let x = b.buffer("x", Elem::I8, false);
        let x_scale = b.buffer("x_scale", Elem::F32, false);
        let x_sum = b.buffer("x_sum", Elem::I32, false);
        let y = b.buffer("y", Elem::F32, true);
        let partial = b.buffer("partial", Elem::I32, true);
        let arrived = b.buffer("arrived", Elem::I32, true);
        let sums = b.shared("sums", Elem::I32, plan.most_rows * plan.slots() * plan.sum_places(launch));
        let staged = (!plan.resident).then(|| b.shared("staged", Elem::U32, plan.planes * plan.plane_words(launch)));

        let thread = b.special(Special::Thread);
        let lane = b.special(Special::Lane);
        let id = b.special(Special::BlockX);
        let (block, part) = if launch.split == 1 { (id, b.i32(0)) } else { (id / launch.split, id % launch.split) };
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
            decoder,
            weights,
            scales,
            x,
            x_scale,
            x_sum,
            y,
            partial,
            arrived,
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
        let (b, plan) = (self.b, self.plan);
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let buffers: Vec<Buffer> = (0..self.launch.ahead).map(|_| self.buffer()).collect();
        for (p, buffer) in buffers.iter().enumerate() {
            let at = b.i32(p as i32);
            b.if_(at.lt(self.steps), || self.fetch(at, buffer));
        }
        b.comment("Tables into shared memory.");
        let threads = self.launch.warps * 32;
        self.decoder.fill(threads);
        let zero = b.i32(0);
        if !plan.own_sums {
            b.for_(self.thread, self.rows * (plan.layout.tile.rows * plan.slots()), threads, |i| {
                b.store(self.sums, i, zero, Elem::I32);
            });
        }
        b.grid_wait();
        let fragments = self.activations();
        b.barrier();
        b.grid_launch();

        b.comment("Down the row tiles.");
        let none = b.vector(&[zero; 4]);
        let acc: Vec<Var> = (0..plan.row_parts() * plan.groups * plan.products).map(|_| b.var(none)).collect();
        b.for_(0, self.steps, self.launch.ahead, |first| {
            for (p, buffer) in buffers.iter().enumerate() {
                let step = first + p as u32;
                if p == 0 {
                    self.step(step, buffer, &fragments, &acc);
                } else {
                    b.if_(step.lt(self.steps), || self.step(step, buffer, &fragments, &acc));
                }
            }
        });
        let sums = |i, token| self.block_sums(i, token);
        if self.launch.split > 1 {
            b.barrier();
            self.meet();
        } else if plan.most_rows <= threads {
            // Each thread has at most one row, whose scales are on their way while it waits for the sums.
            let rows = self.rows * plan.layout.tile.rows;
            let scaling = self.scaling(self.thread.min(rows - 1));
            b.barrier();
            b.if_(self.thread.lt(rows), || self.write(self.thread, &scaling, &sums));
        } else {
            b.barrier();
            self.write_rows(&sums);
        }
    }

    /// Registers for the words of one group of tiles.
    fn buffer(&self) -> Buffer {
        let zero = self.b.u32(0);
        let chunk = |&(_, width): &(u32, u32)| {
            self.b.var(if width == 1 { zero } else { self.b.vector(&vec![zero; width as usize]) })
        };
        let lane_words = &self.plan.layout.lane_words;
        (0..self.plan.depth as usize)
            .map(|d| crate::layout::chunks(lane_words[d % lane_words.len()]).iter().map(chunk).collect())
            .collect()
    }

    /// Row tile (within the block) and column tile of the first tile of a step.
    fn place(&self, step: V<'b>) -> (V<'b>, V<'b>) {
        let per_row = self.plan.per_warp / self.plan.depth;
        match per_row {
            1 => (step, self.warp_col),
            _ => (step / per_row, self.warp_col + step % per_row * self.plan.depth),
        }
    }

    /// Starts loading the words of a step's tiles.
    fn fetch(&self, step: V<'b>, buffer: &Buffer) {
        let (b, layout) = (self.b, &self.plan.layout);
        let codes = layout.lane_words.len() as u32;
        let period = layout.lane_words.iter().sum::<u32>() * 32;
        let (row, col) = self.place(step);
        let row_words = u32::try_from(layout.row_stride()).expect("a row tile is below 2^32 words");
        let base = (self.first_row + row) * row_words + if codes == 1 { col * period } else { col / codes * period };
        for (d, chunks) in buffer.iter().enumerate() {
            let d = d as u32;
            let lane_words = layout.lane_words[(d % codes) as usize];
            let ahead = d / codes * period + layout.lane_words[..(d % codes) as usize].iter().sum::<u32>() * 32;
            let load = || {
                for (var, words) in chunks.iter().zip(load_words(b, self.weights, base + ahead, self.lane, lane_words))
                {
                    b.set(*var, words);
                }
            };
            // Beyond the last column any words do: their activations are zero.
            if self.covers_exactly() { load() } else { b.if_((col + d).lt(layout.col_tiles()), load) }
        }
    }

    /// True if warps and splits divide the column tiles evenly.
    fn covers_exactly(&self) -> bool {
        self.plan.per_warp * self.launch.warps * self.launch.split == self.plan.layout.col_tiles()
    }

    /// Brings in the activations: into registers, or into shared memory (a barrier must follow).
    fn activations(&self) -> Fragments<'b> {
        let (b, plan) = (self.b, self.plan);
        let stride = self.op.shape.cols.next_multiple_of(COLUMN_PAD);
        let covered = plan.per_warp * self.launch.warps * self.launch.split * plan.layout.tile.cols;
        if let Some(staged) = self.staged {
            let quads = plan.block_cols(self.launch) / 16;
            for plane in 0..plan.planes {
                b.for_(self.thread, quads, self.launch.warps * 32, |i| {
                    let zero = b.u32(0);
                    let value = b.var(b.vector(&[zero; 4]));
                    let col = self.block_col * plan.layout.tile.cols + i * 16;
                    let load = || {
                        let at = col / 4 + plane * (stride / 4);
                        b.set(value, b.load_as(self.x, at, Elem::U32, 4, Cache::ReadOnly));
                    };
                    if covered <= stride {
                        load()
                    } else {
                        b.if_(col.lt(stride), load)
                    }
                    b.store(staged, i * 4 + plane * plan.plane_words(self.launch), b.get(value), Elem::U32);
                });
            }
            return None;
        }
        let quad = self.lane & 3;
        let column = self.lane >> 2;
        let fragment = |d: u32, kt: u32, group: u32| {
            // Columns of the product beyond the last plane are not read; they repeat it.
            let plane = (column + group * 8).min(plan.planes - 1);
            [0, 16].map(|half| {
                let col = (self.warp_col + d) * plan.layout.tile.cols + quad * 4 + (kt * 32 + half);
                let load = || b.load_as(self.x, plane * (stride / 4) + col / 4, Elem::U32, 1, Cache::ReadOnly);
                if covered <= stride {
                    return load();
                }
                let value = b.var(b.u32(0));
                b.if_(col.lt(stride), || b.set(value, load()));
                b.get(value)
            })
        };
        let parts = plan.layout.tile.cols / 32;
        let groups = |d, kt| (0..plan.groups).map(|group| fragment(d, kt, group)).collect();
        Some((0..plan.depth).map(|d| (0..parts).map(|kt| groups(d, kt)).collect()).collect())
    }

    /// The activation operand of 32 columns, from shared memory.
    fn staged_fragment(&self, staged: Mem, col: V<'b>, kt: u32, group: u32) -> [V<'b>; 2] {
        let plane = ((self.lane >> 2) + group * 8).min(self.plan.planes - 1);
        let words = self.plan.layout.tile.cols / 4;
        let base = plane * self.plan.plane_words(self.launch) + (col - self.block_col) * words + (self.lane & 3);
        [0, 4].map(|half| self.b.load(staged, base + (kt * 8 + half), Elem::U32))
    }

    /// Decodes and multiplies one group of tiles, and fetches the group that takes its place.
    fn step(&self, step: V<'b>, buffer: &Buffer, fragments: &Fragments<'b>, acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let (row, col) = self.place(step);
        let words: Vec<Vec<V>> =
            buffer.iter().map(|t| flatten(&t.iter().map(|&v| b.get(v)).collect::<Vec<_>>())).collect();
        let next = step + self.launch.ahead;
        b.if_(next.lt(self.steps), || self.fetch(next, buffer));
        let mut sums: Vec<V> = acc.iter().map(|&v| b.get(v)).collect();
        let parts = plan.layout.tile.cols / 32;
        for (d, words) in words.iter().enumerate() {
            let registers = self.decoder.tile(d % plan.layout.lane_words.len(), words);
            for kt in 0..parts {
                for group in 0..plan.groups {
                    let x = match (fragments, self.staged) {
                        (Some(f), _) => f[d][kt as usize][group as usize],
                        (None, Some(staged)) => self.staged_fragment(staged, col + d as u32, kt, group),
                        (None, None) => unreachable!("activations are resident or staged"),
                    };
                    for part in 0..plan.row_parts() {
                        let first = ((part * parts + kt) * 4) as usize;
                        let a = &registers[first..first + 4];
                        let slot = ((part * plan.groups + group) * plan.products) as usize;
                        let low = [a[0].low, a[1].low, a[2].low, a[3].low];
                        sums[slot] = b.mma_i8(plan.products == 1, low, x, sums[slot]);
                        if let [Some(h0), Some(h1), Some(h2), Some(h3)] = [a[0].high, a[1].high, a[2].high, a[3].high] {
                            sums[slot + 1] = b.mma_i8(true, [h0, h1, h2, h3], x, sums[slot + 1]);
                        }
                    }
                }
            }
        }
        for (&var, &sum) in acc.iter().zip(&sums) {
            b.set(var, sum);
        }
        let per_row = plan.per_warp / plan.depth;
        if per_row == 1 {
            self.flush(row, acc);
        } else {
            b.if_((step % per_row).eq(per_row - 1), || self.flush(row, acc));
        }
    }

    /// Stores the warp's sums of a row tile, or adds them to the block's, and clears them.
    fn flush(&self, row: V<'b>, acc: &[Var]) {
        let (b, plan) = (self.b, self.plan);
        let (g, t) = (self.lane >> 2, self.lane & 3);
        let zero = b.i32(0);
        let warp_first = b.special(Special::Warp) * plan.most_rows;
        for part in 0..plan.row_parts() {
            for group in 0..plan.groups {
                let plane = t * 2 + group * 8;
                let store = || {
                    // Planes 2t and 2t + 1 of rows g and g + 8, the products of a plane side by side.
                    for half in 0..2 {
                        let slots = (0..2 * plan.products).map(|s| {
                            let var = acc[((part * plan.groups + group) * plan.products + s % plan.products) as usize];
                            b.get(var).lane(2 * half + s / plan.products)
                        });
                        let tile_row = g + (part * 16 + half * 8);
                        let first = (warp_first + tile_row) * plan.slots() + plane * plan.products;
                        let at = first + row * (plan.layout.tile.rows * plan.slots());
                        b.store(self.sums, at, b.vector(&slots.collect::<Vec<_>>()), Elem::I32);
                    }
                };
                let add = || {
                    for product in 0..plan.products {
                        let var = acc[((part * plan.groups + group) * plan.products + product) as usize];
                        for (i, value) in b.get(var).lanes().into_iter().enumerate() {
                            let i = i as u32;
                            let tile_row = g + (part * 16 + i / 2 * 8);
                            let at = (row * plan.layout.tile.rows + tile_row) * plan.slots();
                            let slot = (plane + i % 2) * plan.products + product;
                            b.atomic_add(self.sums, at + slot, value);
                        }
                    }
                };
                let out = || if plan.own_sums { store() } else { add() };
                if plan.planes >= (group + 1) * 8 { out() } else { b.if_(plane.lt(plan.planes), out) }
            }
        }
        let none = b.vector(&[zero; 4]);
        acc.iter().for_each(|&v| b.set(v, none));
    }

    /// The sums of the block's row `i` that belong to a token, over all warps.
    fn block_sums(&self, i: V<'b>, token: u32) -> Vec<V<'b>> {
        let (b, plan) = (self.b, self.plan);
        let of_token = 2 * plan.products;
        let place = |p: u32| {
            let at = (i + p * plan.most_rows) * plan.slots() + token * of_token;
            b.load_as(self.sums, at, Elem::I32, of_token, Cache::Default).lanes()
        };
        let first = place(0);
        (1..plan.sum_places(self.launch))
            .fold(first, |sums, p| sums.into_iter().zip(place(p)).map(|(a, b)| a + b).collect())
    }

    /// What the sums of the block's row `i` are multiplied with.
    fn scaling(&self, i: V<'b>) -> Scaling<'b> {
        let b = self.b;
        let row = self.first_row * self.plan.layout.tile.rows + i;
        let scale = b.load_as(self.scales, row, Elem::BF16, 1, Cache::ReadOnly);
        let token = |token: u32| {
            let at = b.i32(token as i32);
            let sum = || b.load_as(self.x_sum, at, Elem::I32, 1, Cache::ReadOnly);
            let offset = self.op.quantizer.codes[0].half_offset.then(sum);
            (b.load_as(self.x_scale, at, Elem::F32, 1, Cache::ReadOnly), offset)
        };
        Scaling { row, scale, tokens: (0..self.op.batch).map(token).collect() }
    }

    /// Scales and stores the block's row `i`; `sums(i, token)` are those that belong to a token.
    fn write(&self, i: V<'b>, by: &Scaling<'b>, sums: &dyn Fn(V<'b>, u32) -> Vec<V<'b>>) {
        let (b, plan, code) = (self.b, self.plan, &self.op.quantizer.codes[0]);
        let unit = if code.half_offset { code.unit * 0.5 } else { code.unit };
        for (token, &(x_scale, x_sum)) in by.tokens.iter().enumerate() {
            let token = token as u32;
            let sums = sums(i, token);
            let wide = |slot: u32| sums[slot as usize].to(Scalar::I64);
            let plane = |product: u32| wide(product) * 128 + wide(plan.products + product);
            let total = if plan.products == 1 { plane(0) } else { plane(1) * 256 + plane(0) };
            let total = x_sum.map_or(total, |sum| total * 2 + sum.to(Scalar::I64));
            let value = total.to(Scalar::F32) * by.scale * (x_scale * unit);
            let at = by.row + token * plan.layout.padded_rows();
            let value = if self.op.accumulate { b.load(self.y, at, Elem::F32) + value } else { value };
            b.store(self.y, at, value, Elem::F32);
        }
    }

    /// [`Emit::write`] for all rows of the block.
    fn write_rows(&self, sums: &dyn Fn(V<'b>, u32) -> Vec<V<'b>>) {
        let rows = self.rows * self.plan.layout.tile.rows;
        self.b.for_(self.thread, rows, self.launch.warps * 32, |i| self.write(i, &self.scaling(i), sums));
    }

    /// The blocks that share row tiles add up in global memory; the last to arrive writes, and leaves zeros.
    fn meet(&self) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let (partial, arrived) = (self.partial, self.arrived);
        let first = self.first_row * (plan.layout.tile.rows * plan.slots());
        let len = self.rows * (plan.layout.tile.rows * plan.slots());
        b.for_(self.thread, len, threads, |i| {
            let place = |p: u32| b.load(self.sums, i + p * (plan.most_rows * plan.slots()), Elem::I32);
            let sum = (1..plan.sum_places(self.launch)).fold(place(0), |sum, p| sum + place(p));
            b.atomic_add(partial, first + i, sum);
        });
        let last = b.shared("last", Elem::I32, 1);
        let zero = b.i32(0);
        b.fence();
        b.barrier();
        b.if_(self.thread.eq(0), || {
            let before = b.atomic_add(arrived, self.block, b.i32(1));
            b.store(last, zero, before.eq(self.launch.split - 1).select(b.i32(1), 0), Elem::I32);
        });
        b.barrier();
        b.if_(b.load(last, zero, Elem::I32).eq(1), || {
            b.fence();
            let of_token = 2 * plan.products;
            self.write_rows(&|i, token| {
                let at = first + i * plan.slots() + token * of_token;
                b.load_as(partial, at, Elem::I32, of_token, Cache::Default).lanes()
            });
            b.barrier();
            b.for_(self.thread, len, threads, |i| b.store(partial, first + i, zero, Elem::I32));
            b.if_(self.thread.eq(0), || b.store(arrived, self.block, zero, Elem::I32));
        });
    }
}

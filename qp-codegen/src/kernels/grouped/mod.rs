//! Products with matrices of formats: `y[token, row] (+)= W[row, ·] · x[token, ·]`, exactly as [`crate::spec::terms`] says.
//!
//! # How it works
//!
//! The matrix lies as [`layout`] says. A block of the grid takes a run of rows of tiles, its warps share the columns. A warp
//! walks down the rows with the words and fields of the next ones on their way in registers, and keeps the activations of
//! its columns, two planes of bytes a token, and their sums over each run, which offsets need.
//!
//! In a step a warp makes bytes of the words of its tiles, multiplies them with the activations run by run, joins the planes
//! of a token, and adds to a sum of 64 bits the run's slope times that and the run's rest times the activations' sum. The
//! sums of the warps meet in shared memory, each in a place of its own. Where columns are more than the warps hold the
//! activations of, they go down the rows again for each further pass.
//!
//! More than [`TOKENS`] tokens are blocks of their own that take the same weights at about the same time, so that those
//! come from memory once. All sums are of integers: the result is the same to the bit for every launch and batch.

mod launch;
pub mod layout;

use std::collections::HashMap;

pub use self::launch::Launch;
use self::layout::{REGISTERS, ROWS, Relaid, Section};
use super::decode::{flatten, load_words};
use super::operands::divide;
use super::span::Span;
use crate::ir::{Builder, Cache, Const, Elem, Kernel, Mem, Scalar, Special, V, Var};
use crate::layout::{CELL, COLUMN_PAD, chunks};
use crate::spec::format::{Arithmetic, Weight, WeightOp};
use crate::spec::terms::{Kept, TILE, Terms};
use crate::spec::{Shape, mask};

/// Most tokens of a block.
pub const TOKENS: u32 = 8;
/// Tokens whose planes one tensor-core product holds.
const OF_PRODUCT: u32 = 4;
/// Tensor-core products across a tile.
const ACROSS: u32 = TILE / 32;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product<'t> {
    /// The format's weight.
    pub terms: &'t Terms,
    /// Rows × columns.
    pub shape: Shape,
    /// Tokens.
    pub batch: u32,
    /// Outputs.
    pub y: Span,
    /// Add to the outputs instead of overwriting them.
    pub accumulate: bool,
}

impl Product<'_> {
    /// How the matrix lies.
    pub fn layout(&self) -> Relaid {
        Relaid::new(self.terms, self.shape)
    }

    /// Parts of the tokens, each with blocks of its own.
    fn parts(&self) -> u32 {
        self.batch.div_ceil(TOKENS)
    }
}

/// Sizes that follow from the operation and its launch.
struct Plan {
    layout: Relaid,
    parts: u32,
    /// Tokens of a part.
    tokens: u32,
    /// Tensor-core products side by side to hold all planes of a part.
    groups: u32,
    /// Runs of a tile.
    runs: u32,
    /// Times that warps go down the rows.
    passes: u32,
    /// Rows of tiles of the block that has most.
    most_rows: u32,
    /// Whether sums of activations over runs are needed.
    offsets: bool,
}

impl Plan {
    fn new(op: &Product, launch: &Launch) -> Plan {
        let layout = op.layout();
        let parts = op.parts();
        let tokens = op.batch.div_ceil(parts);
        Plan {
            parts,
            tokens,
            groups: tokens.div_ceil(OF_PRODUCT),
            runs: TILE / op.terms.run.unwrap_or(TILE),
            passes: layout.col_tiles().div_ceil(launch.warps * launch.depth),
            most_rows: layout.row_tiles().div_ceil(launch.blocks),
            offsets: op.terms.lowest != 0 || op.terms.rest.is_some(),
            layout,
        }
    }

    /// Sums of activations that a lane keeps for a tile and a group of planes.
    fn kept_sums(&self) -> u32 {
        if self.offsets { self.runs } else { 0 }
    }

    /// Registers of a lane for the numbers of a tile.
    fn number_registers(&self) -> u32 {
        self.layout.sections.iter().map(|s| s.lane_bytes().div_ceil(4)).sum()
    }

    /// Bytes of shared memory for the sums of a row of tiles.
    fn sum_bytes_of_tile(&self, launch: &Launch) -> u32 {
        launch.warps * ROWS * self.tokens * 8
    }
}

/// Makes the kernel. Its parameters, in order:
///
/// * `weights`, `numbers`, `factors`: the matrix ([`layout::Stored`]);
/// * `x`: signed bytes in cells and `x_scale` (`f32`, one a token), as [`super::gemv::lower`] takes them;
/// * `y`: `f32`.
pub fn lower(op: &Product, launch: &Launch) -> Kernel {
    let plan = Plan::new(op, launch);
    let (bits, run) = (op.terms.bits, op.terms.run.map_or(op.shape.cols, |r| r));
    let name = format!("format_{bits}_{run}_{}x{}_b{}", op.shape.rows, op.shape.cols, op.batch);
    let b = Builder::new(&name, [launch.blocks * plan.parts, 1], launch.warps * 32);
    b.doc(format!(
        "y[token, row] {}= W[row, :] . x[token, :] with W {} x {} of {bits} bits in runs of {run} columns, {} token(s).",
        if op.accumulate { "+" } else { "" },
        op.shape.rows,
        op.shape.cols,
        op.batch,
    ));
    b.min_blocks(launch.min_blocks);
    b.dependent_launch();
    b.apart();
    Emit::new(&b, op, launch, &plan).kernel();
    b.finish()
}

/// Registers for what a step needs of the matrix.
struct Buffer {
    /// By tile, by chunk.
    words: Vec<Vec<Var>>,
    /// By tile, by section, by chunk.
    numbers: Vec<Vec<Vec<Var>>>,
    grid: Option<Var>,
}

/// Registers for the activations of a warp's columns: by tile and group of planes.
struct Activations {
    /// Operands of each 32 columns.
    x: Vec<Vec<[[Var; 2]; ACROSS as usize]>>,
    /// Of the lane's token, the sum over each run.
    sums: Vec<Vec<Vec<Var>>>,
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Product<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    weights: Mem,
    numbers: Mem,
    factors: Mem,
    x: Mem,
    x_scale: Mem,
    y: Mem,
    sums: Mem,
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

/// How a lane loads the numbers of a section in a tile: their type, and first and width of each chunk.
fn number_chunks(section: &Section) -> (Elem, Vec<(u32, u32)>) {
    match section.lane_bytes() {
        2 => (Elem::U16, vec![(0, 1)]),
        bytes => (Elem::U32, chunks(bytes / 4)),
    }
}

impl<'b, 'a> Emit<'b, 'a> {
    fn new(b: &'b Builder, op: &'a Product<'a>, launch: &'a Launch, plan: &'a Plan) -> Self {
        let layout = &plan.layout;
        let columns = u64::from(op.shape.cols.next_multiple_of(COLUMN_PAD));
        let batch = u64::from(op.batch);
        let weights = b.sized("weights", Elem::U32, false, layout.words() as u64);
        let numbers = b.sized("numbers", Elem::U32, false, layout.number_words() as u64);
        let factors = b.sized("factors", Elem::F32, false, layout.padded_rows().into());
        let x = b.sized("x", Elem::I8, false, 2 * batch * columns);
        let x_scale = b.sized("x_scale", Elem::F32, false, batch);
        let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.shape.rows));
        let sums = b.shared("sums", Elem::I32, plan.sum_bytes_of_tile(launch) / 4 * plan.most_rows);
        let (thread, lane) = (b.special(Special::Thread), b.special(Special::Lane));
        let warp = b.special(Special::Warp);
        let (block, part) = divide(b, b.special(Special::BlockX), plan.parts);
        let first_row = block * layout.row_tiles() / launch.blocks;
        let rows = (block + 1) * layout.row_tiles() / launch.blocks - first_row;
        let steps = rows * plan.passes;
        Emit {
            b,
            op,
            launch,
            plan,
            weights,
            numbers,
            factors,
            x,
            x_scale,
            y,
            sums,
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
        let (b, plan) = (self.b, self.plan);
        b.comment("First weights on their way, before anything else: they do not depend on earlier kernels.");
        let buffers: Vec<Buffer> = (0..self.launch.ahead).map(|_| self.buffer()).collect();
        for (p, buffer) in (0..).zip(&buffers) {
            let at = b.i32(p);
            b.if_(at.lt(self.steps), || self.fetch(at, buffer));
        }
        b.grid_launch();
        b.grid_wait();
        let activations = self.activations();
        if plan.passes == 1 {
            self.load_activations(&activations, b.i32(0));
        }
        b.comment("Down the rows of tiles.");
        b.for_(0, self.steps, self.launch.ahead, |first| {
            for (p, buffer) in (0..).zip(&buffers) {
                let step = first + p;
                let run = || self.step(step, buffer, &activations);
                if p == 0 { run() } else { b.if_(step.lt(self.steps), run) }
            }
        });
        b.barrier();
        self.results();
    }

    /// Pass and row of tiles, within the block, of a step.
    fn place(&self, step: V<'b>) -> (V<'b>, V<'b>) {
        if self.plan.passes == 1 {
            return (self.b.i32(0), step);
        }
        let pass = step / self.rows;
        (pass, step - pass * self.rows)
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
        let (b, layout) = (self.b, &self.plan.layout);
        let zero = b.u32(0);
        let chunk =
            |&(_, width): &(u32, u32)| b.var(if width == 1 { zero } else { b.vector(&vec![zero; width as usize]) });
        let words = || chunks(layout.lane_words()).iter().map(chunk).collect();
        let section = |s: &Section| number_chunks(s).1.iter().map(chunk).collect();
        let numbers = || layout.sections.iter().map(section).collect();
        Buffer {
            words: (0..self.launch.depth).map(|_| words()).collect(),
            numbers: (0..self.launch.depth).map(|_| numbers()).collect(),
            grid: layout.grid.map(|_| b.var(zero)),
        }
    }

    /// Starts loading what a step needs of the matrix.
    fn fetch(&self, step: V<'b>, buffer: &Buffer) {
        let (b, layout) = (self.b, &self.plan.layout);
        let (pass, row) = self.place(step);
        let row = self.first_row + row;
        let col = self.column(pass);
        let lane_words = layout.lane_words();
        let load = |d: u32| {
            let tile = col + d;
            let first = row * layout.row_words() + tile * (lane_words * 32);
            let words = load_words(b, self.weights, first, self.lane, lane_words);
            buffer.words[d as usize].iter().zip(words).for_each(|(&var, words)| b.set(var, words));
            for (section, vars) in layout.sections.iter().zip(&buffer.numbers[d as usize]) {
                let (elem, chunks) = number_chunks(section);
                let block = if section.tiles == 1 { tile } else { tile / section.tiles };
                let lane = (row * section.blocks + block) * 8 + (self.lane >> 2);
                let first = lane * (section.lane_bytes() / elem.bytes()) + section.first * (4 / elem.bytes());
                for (&var, &(at, width)) in vars.iter().zip(&chunks) {
                    b.set(var, b.load_as(self.numbers, first + at, elem, width, Cache::ReadOnly));
                }
            }
        };
        for d in 0..self.launch.depth {
            if self.covers_exactly() {
                load(d);
            } else {
                // Activations beyond the last column are 0: it does not matter what is multiplied with them.
                b.if_((col + d).lt(layout.col_tiles()), || load(d));
            }
        }
        if let (Some(var), Some(grid)) = (buffer.grid, layout.grid) {
            let at = row * (ROWS / 2) + (self.lane >> 2) + grid * 2;
            b.set(var, b.load_as(self.numbers, at, Elem::U16, 1, Cache::ReadOnly));
        }
    }

    fn activations(&self) -> Activations {
        let (b, plan) = (self.b, self.plan);
        let of = |n: u32, f: &dyn Fn() -> Var| (0..n).map(|_| f()).collect::<Vec<_>>();
        let word = || b.var(b.u32(0));
        let cells = || std::array::from_fn(|_| std::array::from_fn(|_| word()));
        let sums = || of(plan.kept_sums(), &|| b.var(b.i32(0)));
        Activations {
            x: (0..self.launch.depth).map(|_| (0..plan.groups).map(|_| cells()).collect()).collect(),
            sums: (0..self.launch.depth).map(|_| (0..plan.groups).map(|_| sums()).collect()).collect(),
        }
    }

    /// Brings in the activations of a pass.
    fn load_activations(&self, to: &Activations, pass: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let planes = 2 * self.op.batch;
        let cells = self.op.shape.cols.next_multiple_of(COLUMN_PAD) / CELL;
        let covered = plan.passes * self.launch.warps * self.launch.depth * (TILE / CELL);
        let (quad, column) = (self.lane & 3, self.lane >> 2);
        let first = self.column(pass) * (TILE / CELL);
        for (d, of_tile) in (0..).zip(&to.x) {
            for (group, of_group) in (0..).zip(of_tile) {
                // Columns of the product beyond the last plane repeat it; their sums are not read.
                let plane = (self.part * (2 * plan.tokens) + column + group * 8).min(planes as i32 - 1);
                for (kt, halves) in (0..).zip(of_group) {
                    for (half, &var) in (0..).zip(halves) {
                        let cell = first + (d * (TILE / CELL) + kt * 2 + half);
                        let load = |cell: V<'b>| {
                            let word = (cell * planes + plane) * 4 + quad;
                            b.load_as(self.x, word, Elem::U32, 1, Cache::ReadOnly)
                        };
                        b.set(
                            var,
                            if covered <= cells {
                                load(cell)
                            } else {
                                cell.lt(cells).select(load(cell.min(cells as i32 - 1)), 0_u32)
                            },
                        );
                    }
                }
            }
        }
        let ones = [b.u32(0x0101_0101); 4];
        for (d, of_tile) in to.sums.iter().enumerate() {
            for (group, of_group) in of_tile.iter().enumerate() {
                for (run, &var) in (0..).zip(of_group) {
                    let sum = self.multiply(&|_| ones, &to.x[d][group], run);
                    b.set(var, sum.lane(0) * 128 + sum.lane(1));
                }
            }
        }
    }

    /// The products of a run: of the registers of each 32 columns with their activations.
    fn multiply(&self, a: &dyn Fn(u32) -> [V<'b>; 4], x: &[[Var; 2]; ACROSS as usize], run: u32) -> V<'b> {
        let b = self.b;
        let mut sum = b.vector(&[b.i32(0); 4]);
        let columns = TILE / self.plan.runs;
        let kept = |kt: u32| x[kt as usize].map(|var| b.get(var));
        if columns < 32 {
            // Half a product: the other half's activations are left out.
            let ([first, second], zero) = (kept(run / 2), b.u32(0));
            let x = if run.is_multiple_of(2) { [first, zero] } else { [zero, second] };
            return b.mma_i8(false, a(run / 2), x, sum);
        }
        for kt in run * columns / 32..(run + 1) * columns / 32 {
            sum = b.mma_i8(false, a(kt), kept(kt), sum);
        }
        sum
    }

    /// The registers of a tile: each of four unsigned bytes.
    fn registers(&self, words: &[V<'b>]) -> Vec<V<'b>> {
        let b = self.b;
        let part = |register: u32, words: &[V<'b>], first: u32, width: u32| {
            let of_word = 8 / width;
            let word = words[(register / of_word) as usize];
            let from = width * (register % of_word);
            let moved = if from >= first { word >> (from - first) } else { word << (first - from) };
            if width == 8 { word } else { moved & b.u32((mask(width) << first) * 0x0101_0101) }
        };
        let one = |register: u32| {
            let mut rest = words;
            let mut value: Option<V<'b>> = None;
            for (first, width) in self.plan.layout.parts() {
                let bits = part(register, rest, first, width);
                value = Some(value.map_or(bits, |v| v | bits));
                rest = &rest[(REGISTERS * width / 8) as usize..];
            }
            value.unwrap_or_else(|| b.u32(0))
        };
        (0..REGISTERS).map(one).collect()
    }

    /// Decodes and multiplies the tiles of a step. Where its words were, those of a later step are on their way meanwhile.
    fn step(&self, step: V<'b>, buffer: &Buffer, activations: &Activations) {
        let (b, plan) = (self.b, self.plan);
        let (pass, row) = self.place(step);
        let values = |vars: &Vec<Var>| flatten(&vars.iter().map(|&v| b.get(v)).collect::<Vec<_>>());
        let words: Vec<Vec<V>> = buffer.words.iter().map(values).collect();
        let numbers: Vec<Vec<Vec<V>>> = buffer.numbers.iter().map(|t| t.iter().map(values).collect()).collect();
        let inverse = buffer.grid.map(|grid| {
            let grid = b.get(grid);
            [0, 1].map(|half: u32| (((grid >> (8 * half)) & 0xff_u32) << 23_u32).bits(Scalar::F32))
        });
        let next = step + self.launch.ahead;
        b.if_(next.lt(self.steps), || self.fetch(next, buffer));
        if plan.passes > 1 {
            b.if_(row.eq(0), || self.load_activations(activations, pass));
        }
        let mut sums: Vec<[Option<V<'b>>; 2]> = vec![[None; 2]; plan.groups as usize];
        for d in 0..self.launch.depth as usize {
            let registers = self.registers(&words[d]);
            let fields = Fields { emit: self, numbers: &numbers[d] };
            let mut known = HashMap::new();
            for run in 0..plan.runs {
                let factors: Option<[(V<'b>, Option<V<'b>>); 2]> = inverse.map(|inverse| {
                    [0, 1].map(|half| {
                        let mut of = |w: &Weight| {
                            let value = fields.value(w, run, half, &mut known);
                            (value * inverse[half as usize]).to(Scalar::I32).to(Scalar::I64)
                        };
                        (of(&self.op.terms.slope), self.op.terms.rest.as_ref().map(of))
                    })
                });
                for (group, sums) in sums.iter_mut().enumerate() {
                    let of = |kt: u32| std::array::from_fn(|a| registers[(kt * 4) as usize + a]);
                    let products = self.multiply(&of, &activations.x[d][group], run);
                    let offset = plan.offsets.then(|| b.get(activations.sums[d][group][run as usize]));
                    for (half, sum) in (0..).zip(sums) {
                        let mut joined = products.lane(2 * half) * 128 + products.lane(2 * half + 1);
                        if let Some(offset) = offset.filter(|_| self.op.terms.lowest != 0) {
                            joined = joined + offset * self.op.terms.lowest;
                        }
                        let joined = joined.to(Scalar::I64);
                        let term = match factors.map(|f| f[half as usize]) {
                            None => joined,
                            Some((slope, None)) => slope * joined,
                            Some((slope, Some(rest))) => {
                                let offset = offset.expect("a rest needs them").to(Scalar::I64);
                                slope * joined + rest * offset
                            }
                        };
                        *sum = Some(sum.map_or(term, |s| s + term));
                    }
                }
            }
        }
        self.keep(pass, row, &sums);
    }

    /// Stores the warp's sums of a row of tiles, or adds them to those of the passes before.
    fn keep(&self, pass: V<'b>, row: V<'b>, sums: &[[Option<V<'b>>; 2]]) {
        let (b, plan) = (self.b, self.plan);
        let (g, t) = (self.lane >> 2, self.lane & 3);
        for (group, halves) in (0..).zip(sums) {
            let token = t + group * OF_PRODUCT;
            let store = || {
                for (half, sum) in (0..).zip(halves) {
                    let sum = sum.expect("a tile has runs");
                    let of_block = (self.warp * plan.most_rows + row) * ROWS + (g + half * 8);
                    let at = (of_block * plan.tokens + token) * 2;
                    if plan.passes == 1 {
                        self.put(at, sum);
                    } else {
                        b.if_else(pass.eq(0), || self.put(at, sum), || self.put(at, sum + self.taken(at)));
                    }
                }
            };
            if (group + 1) * OF_PRODUCT <= plan.tokens { store() } else { b.if_(token.lt(plan.tokens), store) }
        }
    }

    /// Stores a sum as two words.
    fn put(&self, at: V<'b>, sum: V<'b>) {
        let b = self.b;
        let low = sum.to(Scalar::I32);
        let high = (sum >> 32).to(Scalar::I32);
        b.store(self.sums, at, b.vector(&[low, high]), Elem::I32);
    }

    /// A sum that was stored.
    fn taken(&self, at: V<'b>) -> V<'b> {
        let b = self.b;
        let words = b.load_as(self.sums, at, Elem::I32, 2, Cache::Default);
        let low = words.lane(0).bits(Scalar::U32).to(Scalar::I64);
        words.lane(1).to(Scalar::I64) * b.constant(Const::I64(1 << 32)) + low
    }

    /// Adds the warps' sums, scales and writes.
    fn results(&self) {
        let (b, plan, launch) = (self.b, self.plan, self.launch);
        let len = self.rows * (ROWS * plan.tokens);
        b.for_(self.thread, len, launch.warps * 32, |i| {
            let (row, within) = divide(b, i, plan.tokens);
            let of_warp = |warp: u32| self.taken((i + warp * (plan.most_rows * ROWS * plan.tokens)) * 2);
            let sum = (1..launch.warps).fold(of_warp(0), |sum, w| sum + of_warp(w));
            let row = self.first_row * ROWS + row;
            let token = self.part * plan.tokens + within;
            let exists = row.lt(self.op.shape.rows);
            let exists =
                if plan.tokens * plan.parts == self.op.batch { exists } else { exists & token.lt(self.op.batch) };
            b.if_(exists, || {
                let factor = b.load_as(self.factors, row, Elem::F32, 1, Cache::ReadOnly);
                let scale = b.load_as(self.x_scale, token, Elem::F32, 1, Cache::ReadOnly);
                let value = sum.to(Scalar::F32) * factor * scale;
                let at = row + self.op.y.at(token);
                let value = if self.op.accumulate { b.load(self.y, at, Elem::F32) + value } else { value };
                b.store(self.y, at, value, Elem::F32);
            });
        });
    }
}

/// The fields of a tile.
struct Fields<'e, 'b, 'a> {
    emit: &'e Emit<'b, 'a>,
    /// Their words, by section.
    numbers: &'e [Vec<V<'b>>],
}

/// Numbers that were made floats: by section, unit and half.
type Known<'b> = HashMap<(usize, u32, u32), V<'b>>;

impl<'b> Fields<'_, 'b, '_> {
    /// The value of an expression of fields in a run and one of the lane's two rows.
    fn value(&self, weight: &Weight, run: u32, half: u32, known: &mut Known<'b>) -> V<'b> {
        let b = self.emit.b;
        let mut nodes: Vec<V<'b>> = Vec::new();
        for op in &weight.ops {
            nodes.push(match *op {
                WeightOp::Const(c) => b.f32(c.to_f32()),
                WeightOp::Field(f) => {
                    let units = self.emit.plan.layout.sections[f].units;
                    let unit = run * units / self.emit.plan.runs;
                    *known.entry((f, unit, half)).or_insert_with(|| self.number(f, unit, half))
                }
                WeightOp::Neg(a) => -nodes[a],
                WeightOp::Binary(op, x, y) => match op {
                    Arithmetic::Add => nodes[x] + nodes[y],
                    Arithmetic::Sub => nodes[x] - nodes[y],
                    Arithmetic::Mul => nodes[x] * nodes[y],
                    Arithmetic::Div => nodes[x] / nodes[y],
                },
                WeightOp::Entry | WeightOp::Lookup(..) => unreachable!("terms have fields and constants alone"),
            });
        }
        *nodes.last().expect("an expression has nodes")
    }

    /// A number of a section as a float.
    fn number(&self, section: usize, unit: u32, half: u32) -> V<'b> {
        let b = self.emit.b;
        let (kept, words) = (self.emit.plan.layout.sections[section].kept, &self.numbers[section]);
        let bit = (2 * unit + half) * kept.bytes() * 8;
        let (word, bit) = (words[(bit / 32) as usize], bit % 32);
        match kept {
            Kept::U8 => ((word >> bit) & 0xff_u32).to(Scalar::F32),
            Kept::I8 => ((word << (24 - bit)).bits(Scalar::I32) >> 24).to(Scalar::F32),
            Kept::F16 => {
                // The exponent moves to its place in single precision and is put right by a product, which is exact for all
                // finite numbers.
                let (size, sign) = match bit {
                    0 => ((word & 0x7fff_u32) << 13_u32, (word & 0x8000_u32) << 16_u32),
                    _ => ((word >> 3_u32) & 0x0fff_e000_u32, word & 0x8000_0000_u32),
                };
                (size | sign).bits(Scalar::F32) * b.f32(f32::from_bits((127 + 112) << 23))
            }
            Kept::Bf16 => {
                let bits = if bit == 0 { word << 16_u32 } else { word & 0xffff_0000_u32 };
                bits.bits(Scalar::F32)
            }
            Kept::F32 => word.bits(Scalar::F32),
        }
    }
}

#[cfg(test)]
mod tests;

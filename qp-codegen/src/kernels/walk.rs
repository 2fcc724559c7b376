//! Products with packed weights of any code, however large its blocks are: slower than [`super::gemv`] and [`super::gemm`], and
//! of a program that does not grow with the block.
//!
//! # How it works
//!
//! A block of the grid computes a **strip** of rows, the fewest that hold whole [`Unit`]s of every code: 16 rows, or a few
//! times as many for patterns of steps that do not divide the columns of a tile. Its warps share the columns and decode them
//! unit by unit in a loop, with words and activations straight from memory. The sums, eight planes of four tokens at a time,
//! meet in shared memory; more tokens are more blocks.
//!
//! All sums are exact integers, so the result is that of the other ways to the bit.

use super::decode::Unit;
use super::experts::Experts;
use super::operands::{self, Form, Gemv, Operands, divide};
use super::{c_name, product};
use crate::ir::{Builder, Cache, Const, Elem, Kernel, Mem, Special, V, Var};
use crate::layout::{CELL, COLUMN_PAD, Packed};

/// Tokens of a block: their planes fill a tensor-core product.
const TOKENS: u32 = 4;
/// Planes of a tensor-core product.
const PLANES: u32 = 8;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Warps of a block; they share the columns.
    pub warps: u32,
    /// Shared memory that the copies of tables may take, in bytes.
    pub table_bytes: u32,
}

/// Sizes that follow from the operation.
pub(super) struct Plan {
    layout: Packed,
    /// Parts of 16 rows in a strip.
    parts: u32,
    /// Strips of a row tile.
    strips: u32,
    /// Products a register: 2 for 16-bit entries.
    products: u32,
}

impl Plan {
    pub(super) fn new(op: &Gemv) -> Plan {
        let layout = Packed::new(op.quantizer, op.shape);
        let across = layout.tile.cols / 32;
        // The first number of parts with whole units of every code; all parts of a tile are such a number.
        let whole =
            |parts: &u32| op.quantizer.codes.iter().all(|c| (parts * across).is_multiple_of(Unit::of(c).operands));
        let parts = (1..layout.row_parts()).find(whole).unwrap_or(layout.row_parts());
        Plan { parts, strips: layout.row_parts() / parts, products: operands::products(op.quantizer), layout }
    }

    /// Sums of a block's rows and planes.
    fn sums(&self) -> u32 {
        self.parts * 16 * PLANES * self.products
    }

    /// Bytes of shared memory beside the tables.
    pub(super) fn shared_bytes(&self) -> u32 {
        4 * self.sums()
    }
}

/// Makes the kernel; its parameters are those of [`super::gemv::lower`], of which `partial` and `arrived` are not touched.
pub fn lower(op: &Gemv, launch: &Launch) -> Kernel {
    lower_for(op, launch, Form::Results)
}

/// The same in another form: see [`super::gemv::lower_for`].
pub(super) fn lower_for(op: &Gemv, launch: &Launch, form: Form) -> Kernel {
    let experts = form.experts();
    assert!((1..=product::MAX_BATCH).contains(&op.batch), "batch");
    let plan = Plan::new(op);
    let name = format!("walk_{}_{}x{}_b{}", c_name(&op.quantizer.name), op.shape.rows, op.shape.cols, op.batch);
    let strips = plan.layout.row_tiles() * plan.strips;
    let grid = [strips * experts.map_or(1, Experts::units), op.batch.div_ceil(TOKENS)];
    let b = Builder::new(&name, grid, launch.warps * 32);
    b.doc(operands::doc(op, form));
    b.dependent_launch();
    let operands = Operands::new(&b, op, &plan.layout, launch.table_bytes, (1, 1), form, None);
    let sums = b.shared("sums", Elem::I32, plan.sums());
    let block = b.special(Special::BlockX);
    let (unit, block) = match experts {
        Some(_) => (Some(block / strips), block % strips),
        None => (None, block),
    };
    let (row_tile, strip) = divide(&b, block, plan.strips);
    let part = b.special(Special::BlockY);
    let e = Emit { b: &b, op, launch, plan: &plan, operands, sums, unit, row_tile, strip, part };
    e.kernel();
    b.finish()
}

/// A lowering in progress.
struct Emit<'b, 'a> {
    b: &'b Builder,
    op: &'a Gemv<'a>,
    launch: &'a Launch,
    plan: &'a Plan,
    operands: Operands<'b, 'a>,
    sums: Mem,
    /// Of a product of experts, which unit of pairs.
    unit: Option<V<'b>>,
    row_tile: V<'b>,
    /// Strip of the row tile.
    strip: V<'b>,
    /// Which tokens: [`TOKENS`] from a multiple of that on.
    part: V<'b>,
}

impl<'b> Emit<'b, '_> {
    fn kernel(&self) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let thread = b.special(Special::Thread);
        self.operands.decoder.fill(threads);
        b.for_(thread, plan.sums(), threads, |i| b.store(self.sums, i, b.i32(0), Elem::I32));
        if let Some(unit) = self.unit {
            b.grid_wait();
            b.grid_launch();
            return self.operands.tokens.in_unit(b, unit, thread, threads, || self.multiply(thread));
        }
        b.barrier();
        b.grid_wait();
        b.grid_launch();
        self.multiply(thread);
    }

    /// All that depends on activations.
    fn multiply(&self, thread: V<'b>) {
        let (b, plan, threads) = (self.b, self.plan, self.launch.warps * 32);
        let codes = plan.layout.lane_words.len() as u32;
        let warp = b.special(Special::Warp);
        for code in 0..codes {
            b.for_(warp * codes + code, plan.layout.col_tiles(), self.launch.warps * codes, |col| self.tile(code, col));
        }
        b.barrier();
        // Neighbouring results are those of the tokens of a row, whose sums lie side by side.
        b.for_(thread, plan.parts * 16 * TOKENS, threads, |i| {
            let (row, within) = divide(b, i, TOKENS);
            let token = self.part * TOKENS + within;
            let first = (self.row_tile * plan.strips + self.strip) * (plan.parts * 16);
            let exists = token.lt(self.op.batch);
            let exists = self.operands.tokens.exists(token).map_or(exists, |there| exists & there);
            b.if_(exists, || {
                let of_token = 2 * plan.products;
                let at = row * (PLANES * plan.products) + within * of_token;
                let sums = b.load_as(self.sums, at, Elem::I32, of_token, Cache::Default).lanes();
                let row = first + row;
                let (row_scale, token_scale) = (self.operands.row_scale(row), self.operands.token_scale(token));
                let before = self.operands.before(row, token, b.constant(Const::Bool(true)));
                self.operands.write(row, token, &sums, row_scale, token_scale, before);
            });
        });
    }

    /// Adds the products of the strip's part of column tile `col`, which is of code `code`.
    fn tile(&self, code: u32, col: V<'b>) {
        let (b, plan) = (self.b, self.plan);
        let (codes, across) = (plan.layout.lane_words.len() as u32, plan.layout.tile.cols / 32);
        let unit = Unit::of(&self.op.quantizer.codes[code as usize]).operands;
        let before: u32 = plan.layout.lane_words[..code as usize].iter().sum();
        let first = self.row_tile * self.operands.row_words() + col / codes * self.operands.period() + before * 32;
        let first = self.operands.word(first);
        let units = plan.parts * across / unit;
        // All operands of a strip of 16 rows are added to the same sums.
        let zero = || b.vector(&[b.i32(0); 4]);
        let kept: Option<Vec<Var>> = (plan.parts == 1).then(|| (0..plan.products).map(|_| b.var(zero())).collect());
        b.for_(0, units, 1, |index| {
            let words = self.operands.decoder.unit_words(
                code as usize,
                self.operands.weights,
                first,
                self.strip * units + index,
            );
            let mut steps = self.operands.decoder.unit(code as usize, &words);
            for i in 0..unit {
                let operand = index * unit + i;
                let (part, kt) = if plan.parts == 1 { (b.i32(0), operand) } else { divide(b, operand, across) };
                let registers: Vec<_> = (i * 4..i * 4 + 4).map(|r| steps.register(r)).collect();
                let x = self.activations(col, kt);
                let mut sums: Vec<V> = match &kept {
                    Some(kept) => kept.iter().map(|&v| b.get(v)).collect(),
                    None => (0..plan.products).map(|_| zero()).collect(),
                };
                operands::multiply(b, &registers, x, &mut sums);
                match &kept {
                    Some(kept) => kept.iter().zip(sums).for_each(|(&v, sum)| b.set(v, sum)),
                    None => self.add(part, &sums),
                }
            }
        });
        if let Some(kept) = kept {
            let sums: Vec<V> = kept.iter().map(|&v| b.get(v)).collect();
            self.add(b.i32(0), &sums);
        }
    }

    /// The activation operand of 32 columns of a column tile.
    fn activations(&self, col: V<'b>, kt: V<'b>) -> [V<'b>; 2] {
        let (b, lane, planes) = (self.b, self.b.special(Special::Lane), 2 * self.op.batch);
        // Columns of the product beyond the last plane repeat it; their sums are not read.
        let plane = (self.part * PLANES + (lane >> 2)).min(planes as i32 - 1);
        let (plane, planes) = (self.operands.tokens.plane(plane), self.operands.tokens.planes());
        let cells = self.op.shape.cols.next_multiple_of(COLUMN_PAD) / CELL;
        let padded = self.plan.layout.padded_cols() / CELL;
        [0, 1].map(|half| {
            let cell = col * (self.plan.layout.tile.cols / CELL) + kt * 2 + half;
            let load = |cell: V<'b>| {
                let word = (cell * planes + plane) * 4 + (lane & 3);
                b.load_as(self.operands.x, word, Elem::U32, 1, Cache::ReadOnly)
            };
            if padded <= cells {
                return load(cell);
            }
            // The last tile may reach beyond the activations' padding.
            cell.lt(cells).select(load(cell.min(cells as i32 - 1)), 0_u32)
        })
    }

    /// Adds a warp's sums of 16 rows to the block's.
    fn add(&self, part: V<'b>, sums: &[V<'b>]) {
        let (b, products) = (self.b, self.plan.products);
        let lane = b.special(Special::Lane);
        let (row, plane) = (part * 16 + (lane >> 2), (lane & 3) * 2);
        for (product, sum) in (0..).zip(sums) {
            for (i, value) in (0..).zip(sum.lanes()) {
                // Planes 2t and 2t + 1 of rows g and g + 8.
                let at = ((row + i / 2 * 8) * PLANES + plane + i % 2) * products + product;
                b.atomic_add(self.sums, at, value);
            }
        }
    }
}

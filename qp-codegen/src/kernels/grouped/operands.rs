//! What the kernels have in common: their parameters, tiles on their way, the bytes that words stand for, the numbers of runs,
//! and how sums become results.

use std::collections::HashMap;

use super::Product;
use super::layout::{REGISTERS, ROWS, Relaid, Section};
use super::windows::{Book, Windows};
use crate::ir::{Builder, Cache, Const, Elem, Mem, Scalar, Special, V, Var};
use crate::kernels::copy_all;
use crate::kernels::decode::{FILL, flatten, load_words};
use crate::kernels::experts::{Experts, Tokens};
use crate::kernels::operands::Scales;
use crate::kernels::prepare::Within;
use crate::layout::{COLUMN_PAD, chunks};
use crate::spec::format::{Arithmetic, Weight, WeightOp};
use crate::spec::mask;
use crate::spec::terms::{Digits, Kept, TILE};

/// Tokens whose planes one tensor-core product holds.
pub(super) const OF_PRODUCT: u32 = 4;
/// Tensor-core products across a tile.
pub(super) const ACROSS: u32 = TILE / 32;

/// Registers for the words and fields of a tile, which are on their way.
pub(super) struct Tile {
    /// By chunk.
    words: Vec<Var>,
    /// By section, by chunk.
    numbers: Vec<Vec<Var>>,
}

/// The words and fields of a tile.
pub(super) struct Arrived<'b> {
    words: Vec<V<'b>>,
    /// By section.
    numbers: Vec<Vec<V<'b>>>,
}

/// A run of a tile, or several side by side, of which a lane has one by its place among four.
#[derive(Clone, Copy)]
pub(super) struct Runs {
    /// The first.
    pub(super) first: u32,
    /// How many, a power of two that divides the first.
    pub(super) count: u32,
}

impl Runs {
    /// A run that all lanes have.
    pub(super) fn one(run: u32) -> Runs {
        Runs { first: run, count: 1 }
    }
}

/// The numbers of a run and a row.
#[derive(Clone, Copy)]
pub(super) struct Factors<'b> {
    pub(super) slope: V<'b>,
    pub(super) rest: Option<V<'b>>,
    /// What is added to the integers, if that is not done already.
    pub(super) zero: Option<V<'b>>,
}

/// How a lane loads the numbers of a section in a tile: their type, and first and width of each chunk.
fn number_chunks(section: &Section) -> (Elem, Vec<(u32, u32)>) {
    match section.lane_bytes() {
        2 => (Elem::U16, vec![(0, 1)]),
        bytes => (Elem::U32, chunks(bytes / 4)),
    }
}

/// Registers of a lane for the numbers of a tile.
pub(super) fn number_registers(layout: &Relaid) -> u32 {
    layout.sections.iter().map(|s| s.lane_bytes().div_ceil(4)).sum()
}

/// The parameters of a kernel.
pub(super) struct Operands<'b, 'a> {
    b: &'b Builder,
    op: &'a Product<'a>,
    /// Of all matrices of the launch.
    layout: Relaid,
    weights: Mem,
    numbers: Mem,
    factors: Mem,
    pub(super) x: Mem,
    x_scale: Scales<'b>,
    y: Mem,
    pub(super) tokens: Tokens<'b>,
    lane: V<'b>,
    /// The table of digits, of codes that are looked up.
    book: Option<Book>,
    /// What tensor-core operands are.
    bytes_are: OperandBytes,
}

/// What tensor-core operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OperandBytes {
    /// How far the integers are from the lowest.
    Digits,
    /// The integers themselves, zeros added.
    Integers,
    /// Integers of 4 bits as the upper halves of bytes: 16 times what they are, which takes the fewest instructions. Sums are divided
    /// at the end.
    UpperHalves,
}

impl OperandBytes {
    /// The one that takes the fewest instructions for products of many tokens.
    pub(super) fn of_many(op: &Product) -> OperandBytes {
        let terms = op.terms;
        let halves = terms.bits == 4 && terms.lowest == -8 && terms.table.is_none() && terms.stream.is_none();
        match are_operands(op) {
            true if halves && terms.zero.is_none() && terms.run.is_some() => OperandBytes::UpperHalves,
            true => OperandBytes::Integers,
            false => OperandBytes::Digits,
        }
    }
}

/// Whether the integers of `op`, zeros added, are operands of tensor-core products as they are: then sums of activations are needed for
/// rests alone.
pub(super) fn are_operands(op: &Product) -> bool {
    let (terms, bits) = (op.terms, 8 * op.terms.planes());
    let (least, most) = terms.integers();
    let fits = least >= -(1 << (bits - 1)) && most < 1 << (bits - 1);
    match &terms.table {
        // Digits of streams are not added to.
        _ if terms.stream.is_some() => false,
        // The table holds them.
        Some(table) => {
            let most = i64::from(terms.lowest) + table.iter().map(|&x| i64::from(x)).max().unwrap_or(0);
            terms.zero.is_none() && least >= -(1 << (bits - 1)) && most < 1 << (bits - 1)
        }
        None => terms.planes() == 1 && fits,
    }
}

impl<'b, 'a> Operands<'b, 'a> {
    /// Declares them. With `shared_book`, a table of digits is looked up in shared memory. Of experts, tokens are the pairs of a unit.
    pub(super) fn new(
        b: &'b Builder,
        op: &'a Product<'a>,
        lane: V<'b>,
        bytes_are: OperandBytes,
        shared_book: bool,
        experts: Option<&Experts>,
    ) -> Self {
        Operands::of(b, op, lane, bytes_are, shared_book, experts, None)
    }

    /// Those of a token that each block prepares itself: it has planes and scale.
    pub(super) fn preparing(
        b: &'b Builder,
        op: &'a Product<'a>,
        lane: V<'b>,
        shared_book: bool,
        within: &Within<'_, 'b>,
    ) -> Self {
        Operands::of(b, op, lane, OperandBytes::Digits, shared_book, None, Some(within))
    }

    fn of(
        b: &'b Builder,
        op: &'a Product<'a>,
        lane: V<'b>,
        bytes_are: OperandBytes,
        shared_book: bool,
        experts: Option<&Experts>,
        within: Option<&Within<'_, 'b>>,
    ) -> Self {
        let columns = u64::from(op.shape.cols.next_multiple_of(COLUMN_PAD));
        let (inputs, outputs) = experts.map_or((op.batch, op.batch), |e| (e.rows, e.pairs));
        let layout = op.layout_of_all(experts);
        let weights = b.sized("weights", Elem::U32, false, layout.words() as u64);
        let numbers = b.sized("numbers", Elem::U32, false, layout.number_words() as u64);
        let factors = b.sized("factors", Elem::F32, false, layout.padded_rows().into());
        let (x, x_scale) = match within {
            None => {
                let x = b.sized("x", Elem::I8, false, 2 * u64::from(inputs) * columns);
                (x, Scales::Given(b.sized("x_scale", Elem::F32, false, inputs.into())))
            }
            Some(within) => (within.planes().0, Scales::own()),
        };
        let y = b.sized("y", Elem::F32, true, op.y.len(outputs, op.shape.rows));
        let tokens = Tokens::declare(b, op.batch, experts);
        let book = layout.book.map(|(first, words)| match shared_book {
            true => Book::Shared(b.shared("book", Elem::U32, words)),
            false => Book::Global { mem: numbers, first },
        });
        Operands { b, op, layout, weights, numbers, factors, x, x_scale, y, tokens, lane, book, bytes_are }
    }

    /// Copies the table of digits into shared memory, if it is looked up there, all threads of the block together.
    pub(super) fn fill(&self, threads: u32) {
        let (b, Some(Book::Shared(book)), Some((first, words))) = (self.b, self.book, self.layout.book) else { return };
        b.comment("The table of digits.");
        let load = |i: V<'b>| b.load_as(self.numbers, i * 4 + first, Elem::U32, 4, Cache::ReadOnly);
        let store = |i: V<'b>, four: &V<'b>| b.store(book, i * 4, *four, Elem::U32);
        copy_all(b, b.special(Special::Thread), [words / 4, threads, FILL], load, store);
        b.barrier();
    }

    /// Registers for a tile.
    pub(super) fn tile(&self) -> Tile {
        let (b, zero) = (self.b, self.b.u32(0));
        let chunk =
            |&(_, width): &(u32, u32)| b.var(if width == 1 { zero } else { b.vector(&vec![zero; width as usize]) });
        let section = |s: &Section| number_chunks(s).1.iter().map(chunk).collect();
        Tile {
            words: chunks(self.layout.lane_words()).iter().map(chunk).collect(),
            numbers: self.layout.sections.iter().map(section).collect(),
        }
    }

    /// Row of tiles `row` of the tokens' matrix among those of all matrices.
    fn row_of_tiles(&self, row: V<'b>) -> V<'b> {
        self.tokens.in_matrix(row, self.op.layout().row_tiles())
    }

    /// Starts loading tile `col` of row of tiles `row`.
    pub(super) fn fetch(&self, row: V<'b>, col: V<'b>, to: &Tile) {
        let (b, layout) = (self.b, &self.layout);
        let lane_words = layout.lane_words();
        let row = self.row_of_tiles(row);
        let first = row * layout.row_words() + col * (lane_words * 32);
        let words = load_words(b, self.weights, first, self.lane, lane_words);
        to.words.iter().zip(words).for_each(|(&var, words)| b.set(var, words));
        for (section, vars) in layout.sections.iter().zip(&to.numbers) {
            let (elem, chunks) = number_chunks(section);
            let block = if section.tiles == 1 { col } else { col / section.tiles };
            let lane = (row * section.blocks + block) * 8 + (self.lane >> 2);
            let first = lane * (section.lane_bytes() / elem.bytes()) + section.first * (4 / elem.bytes());
            for (&var, &(at, width)) in vars.iter().zip(&chunks) {
                b.set(var, b.load_as(self.numbers, first + at, elem, width, Cache::ReadOnly));
            }
        }
    }

    /// What has been loaded.
    pub(super) fn arrived(&self, tile: &Tile) -> Arrived<'b> {
        let b = self.b;
        let values = |vars: &Vec<Var>| flatten(&vars.iter().map(|&v| b.get(v)).collect::<Vec<_>>());
        Arrived { words: values(&tile.words), numbers: tile.numbers.iter().map(values).collect() }
    }

    /// Loads what says the powers of two of the lane's rows in row of tiles `row`, if they have any.
    pub(super) fn grid(&self, row: V<'b>) -> Option<V<'b>> {
        let at = self.row_of_tiles(row) * (ROWS / 2) + (self.lane >> 2) + self.layout.grid? * 2;
        Some(self.b.load_as(self.numbers, at, Elem::U16, 1, Cache::ReadOnly))
    }

    /// The inverses of the powers of two.
    pub(super) fn inverses(&self, grid: V<'b>) -> [V<'b>; 2] {
        [0, 1].map(|half: u32| (((grid >> (8 * half)) & 0xff_u32) << 23_u32).bits(Scalar::F32))
    }

    /// The registers of a tile, by plane: each of four bytes, of which those of [`Operands::is_signed`] planes are signed.
    pub(super) fn registers(&self, tile: &Arrived<'b>) -> Vec<Vec<V<'b>>> {
        match (&self.op.terms.table, self.windows()) {
            (_, Some(windows)) => windows.digits(self.op.terms.planes(), &tile.words),
            (Some(table), None) => {
                let lowest = if self.bytes_are == OperandBytes::Digits { 0 } else { self.op.terms.lowest };
                let table: Vec<u32> = table.iter().map(|x| x.wrapping_add_signed(lowest)).collect();
                self.looked_up(&table, tile)
            }
            (None, None) => match self.bytes_are {
                OperandBytes::Digits => (0..self.layout.planes()).map(|plane| self.bytes(plane, tile)).collect(),
                OperandBytes::Integers => vec![self.signed_bytes(tile)],
                OperandBytes::UpperHalves => vec![self.upper_halves(tile)],
            },
        }
    }

    fn windows(&self) -> Option<Windows<'b, '_>> {
        let (stream, bytes) = (self.op.terms.stream.as_ref()?, self.layout.runs?);
        Some(Windows::new(self.b, stream, bytes, self.lane, self.book))
    }

    /// The registers of products of 8 columns with four bytes each, whose sums are the digits.
    pub(super) fn byte_registers(&self, tile: &Arrived<'b>) -> Vec<V<'b>> {
        match (self.op.terms.stream.as_ref().map(|s| &s.digits), self.windows()) {
            (Some(Digits::Bytes { decode, word }), Some(windows)) => windows.words(decode, *word, &tile.words),
            _ => unreachable!("of digits that are sums of bytes"),
        }
    }

    /// Whether the bytes of a plane are signed.
    pub(super) fn is_signed(&self, plane: u32) -> bool {
        self.bytes_are != OperandBytes::Digits && plane + 1 == self.op.terms.planes()
    }

    /// The registers of the only plane, of upper halves of bytes: the sign of an integer of 4 bits is where a byte has its own.
    fn upper_halves(&self, tile: &Arrived<'b>) -> Vec<V<'b>> {
        let b = self.b;
        let of = |word: V<'b>| (word & b.u32(0xf0f0_f0f0)) ^ 0x8080_8080_u32;
        let words = tile.words[..(REGISTERS / 2) as usize].iter();
        words.flat_map(|&word| [of(word << 4_u32), of(word)]).collect()
    }

    /// The registers of the only plane: integers with their zeros, added to all four of a register at once. The sums are by 128 too
    /// large, so that none is negative and nothing goes from one byte into the next; that is undone in the highest bits.
    fn signed_bytes(&self, tile: &Arrived<'b>) -> Vec<V<'b>> {
        let (b, terms) = (self.b, self.op.terms);
        if terms.zero.is_none() && terms.lowest == 0 {
            return self.bytes(0, tile);
        }
        let up = terms.lowest + 128;
        let fields = Fields { operands: self, numbers: &tile.numbers };
        let runs = self.op.runs();
        let add: Vec<[V<'b>; 2]> = (0..if terms.zero.is_some() { runs } else { 1 })
            .map(|run| {
                [0, 1].map(|half| match &terms.zero {
                    Some(zero) => (fields.whole(zero, Runs::one(run), half) + up).bits(Scalar::U32) * 0x0101_0101_u32,
                    None => b.u32(up as u32 * 0x0101_0101),
                })
            })
            .collect();
        let bytes = self.bytes(0, tile).into_iter().zip(0..);
        let of = |(byte, register): (V<'b>, u32)| {
            let (columns, half) = (register / 4 * 32 + register % 4 / 2 * 16, register % 2);
            let of_run = add[(columns * runs / TILE) as usize % add.len()];
            let moved = if up == 0 && terms.zero.is_none() { byte } else { byte + of_run[half as usize] };
            moved ^ 0x8080_8080_u32
        };
        bytes.map(of).collect()
    }

    /// The registers of codes: the bytes of eight are picked by the lower three bits, once of the lower and once of the upper half of
    /// the table, and one of the two by the highest bit.
    fn looked_up(&self, table: &[u32], tile: &Arrived<'b>) -> Vec<Vec<V<'b>>> {
        let b = self.b;
        let selectors: Vec<(V, V)> = tile
            .words
            .iter()
            .flat_map(|&word| {
                let within = word & b.u32(0x7777_7777);
                let half = ((word >> 1) & b.u32(0x4444_4444)) | b.u32(0x3210_3210);
                [(within, half), (within >> 16, half >> 16)]
            })
            .collect();
        let plane = |plane: u32| {
            let four = |first: usize| {
                let bytes = table[first..first + 4].iter().map(|x| (x >> (8 * plane)) as u8);
                b.u32(bytes.rev().fold(0, |word, byte| word << 8 | u32::from(byte)))
            };
            let [t0, t1, t2, t3] = [0, 4, 8, 12].map(four);
            let pick = |&(within, half): &(V<'b>, V<'b>)| {
                t0.permute_by(t1, within).permute_by(t2.permute_by(t3, within), half)
            };
            selectors.iter().map(pick).collect()
        };
        (0..self.op.terms.planes()).map(plane).collect()
    }

    /// The registers of a plane.
    fn bytes(&self, plane: u32, tile: &Arrived<'b>) -> Vec<V<'b>> {
        let b = self.b;
        let part = |register: u32, words: &[V<'b>], first: u32, width: u32| {
            let of_word = 8 / width;
            let word = words[(register / of_word) as usize];
            let from = width * (register % of_word);
            let moved = if from >= first { word >> (from - first) } else { word << (first - from) };
            if width == 8 { word } else { moved & b.u32((mask(width) << first) * 0x0101_0101) }
        };
        let one = |register: u32| {
            let mut rest = &tile.words[(plane * REGISTERS) as usize..];
            let mut value: Option<V<'b>> = None;
            for (first, width) in self.layout.parts(plane) {
                let bits = part(register, rest, first, width);
                value = Some(value.map_or(bits, |v| v | bits));
                rest = &rest[(REGISTERS * width / 8) as usize..];
            }
            value.unwrap_or_else(|| b.u32(0))
        };
        (0..REGISTERS).map(one).collect()
    }

    /// Slopes, rests and zeros of the lane's two rows in a run, if they are not those of whole rows. `known` are the fields that are
    /// floats by now.
    pub(super) fn factors(
        &self,
        tile: &Arrived<'b>,
        run: Runs,
        inverses: Option<[V<'b>; 2]>,
        known: &mut Known<'b>,
    ) -> Option<[Factors<'b>; 2]> {
        let fields = Fields { operands: self, numbers: &tile.numbers };
        let terms = self.op.terms;
        inverses.map(|inverses| {
            [0, 1].map(|half| {
                let mut of = |w: &Weight| {
                    let value = fields.value(w, run, half, known);
                    (value * inverses[half as usize]).to(Scalar::I32)
                };
                let (slope, rest) = (of(&terms.slope), terms.rest.as_ref().map(of));
                let zero = terms
                    .zero
                    .as_ref()
                    .filter(|_| self.bytes_are == OperandBytes::Digits)
                    .map(|zero| fields.whole(zero, run, half));
                Factors { slope, rest, zero }
            })
        })
    }

    /// What a run adds to the sum of a row and a token: `high` and `low` are the sums of the products of a plane of the weights with
    /// those of the activations, `offset` is the sum of these, where it is needed, which is added with the lowest plane.
    pub(super) fn term(
        &self,
        plane: u32,
        [high, low]: [V<'b>; 2],
        offset: Option<V<'b>>,
        factors: Option<Factors<'b>>,
    ) -> V<'b> {
        let terms = self.op.terms;
        let joined = high * 128 + low;
        let times = i64::from(terms.times) << (8 * plane);
        let whole = || {
            let joined = joined.to(Scalar::I64);
            if times == 1 { joined } else { joined * self.b.constant(Const::I64(times)) }
        };
        if plane > 0 {
            return factors.map_or_else(whole, |f| f.slope.to(Scalar::I64) * whole());
        }
        // What the integers are more than the operands.
        let beside = match (factors.and_then(|f| f.zero), terms.lowest) {
            _ if self.bytes_are != OperandBytes::Digits => None,
            (None, 0) => None,
            (None, lowest) => Some(self.b.i32(lowest)),
            (Some(zero), lowest) => Some(zero + lowest),
        };
        let joined = match offset.zip(beside) {
            None => whole(),
            Some((offset, lowest)) if terms.is_wide() => whole() + offset.to(Scalar::I64) * lowest.to(Scalar::I64),
            Some((offset, beside)) => {
                let joined = if terms.times == 1 { joined } else { joined * terms.times };
                (joined + offset * beside).to(Scalar::I64)
            }
        };
        let Some(Factors { slope, rest, zero: _ }) = factors else { return joined };
        let term = slope.to(Scalar::I64) * joined;
        let Some(rest) = rest else { return term };
        term + rest.to(Scalar::I64) * offset.expect("a rest needs them").to(Scalar::I64)
    }

    /// What the sums of a row are multiplied with.
    pub(super) fn row_factor(&self, row: V<'b>) -> V<'b> {
        let row = self.tokens.in_matrix(row, self.op.layout().padded_rows());
        self.b.load_as(self.factors, row, Elem::F32, 1, Cache::ReadOnly)
    }

    /// The scale of a token's activations.
    pub(super) fn token_scale(&self, token: V<'b>) -> V<'b> {
        self.x_scale.of(self.b, self.tokens.input(token))
    }

    /// Starts copying what the sums of four rows, `quad · 4` and the next, are multiplied with to the `at`-th four of shared memory.
    pub(super) fn copy_row_factors(&self, to: Mem, at: V<'b>, quad: V<'b>) {
        let quad = self.tokens.in_matrix(quad, self.op.layout().padded_rows() / 4);
        self.b.async_copy(to, at, self.factors, quad, 16);
    }

    /// A word of the planes.
    pub(super) fn x_word(&self, word: V<'b>) -> V<'b> {
        self.b.load_as(self.x, word, Elem::U32, 1, self.x_scale.x_cache())
    }

    /// The token has been prepared by this block, with this scale.
    pub(super) fn prepared(&self, scale: V<'b>) {
        self.x_scale.prepared(scale);
    }

    /// Scales and stores the sum of a row and a token.
    pub(super) fn write(&self, row: V<'b>, token: V<'b>, sum: V<'b>, factor: V<'b>, scale: V<'b>) {
        let b = self.b;
        let sum = if self.bytes_are == OperandBytes::UpperHalves { sum >> 4 } else { sum };
        let value = sum.to(Scalar::F32) * factor * scale;
        let at = row + self.op.y.at(self.tokens.output(token));
        let value = if self.op.accumulate { b.load(self.y, at, Elem::F32) + value } else { value };
        b.store(self.y, at, value, Elem::F32);
    }
}

/// Stores a sum of 64 bits as two words.
pub(super) fn put<'b>(b: &'b Builder, to: Mem, at: V<'b>, sum: V<'b>) {
    let low = sum.to(Scalar::I32);
    let high = (sum >> 32).to(Scalar::I32);
    b.store(to, at, b.vector(&[low, high]), Elem::I32);
}

/// A sum that was stored.
pub(super) fn taken<'b>(b: &'b Builder, from: Mem, at: V<'b>) -> V<'b> {
    let words = b.load_as(from, at, Elem::I32, 2, Cache::Default);
    let low = words.lane(0).bits(Scalar::U32).to(Scalar::I64);
    words.lane(1).to(Scalar::I64) * b.constant(Const::I64(1 << 32)) + low
}

/// The fields of a tile.
struct Fields<'e, 'b, 'a> {
    operands: &'e Operands<'b, 'a>,
    /// Their words, by section.
    numbers: &'e [Vec<V<'b>>],
}

/// Numbers that were made floats: by section, first unit and half.
pub(super) type Known<'b> = HashMap<(usize, u32, u32), V<'b>>;

impl<'b> Fields<'_, 'b, '_> {
    /// The value of an expression of fields in a run and one of the lane's two rows.
    fn value(&self, weight: &Weight, run: Runs, half: u32, known: &mut Known<'b>) -> V<'b> {
        let b = self.operands.b;
        let mut nodes: Vec<V<'b>> = Vec::new();
        for op in &weight.ops {
            nodes.push(match *op {
                WeightOp::Const(c) => b.f32(c.to_f32()),
                WeightOp::Field(f) => {
                    let unit = self.units(f, run).0;
                    *known.entry((f, unit, half)).or_insert_with(|| self.number(f, run, half))
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

    /// The value of an expression of small integers in a run and one of the lane's two rows.
    fn whole(&self, weight: &Weight, run: Runs, half: u32) -> V<'b> {
        let b = self.operands.b;
        let mut nodes: Vec<V<'b>> = Vec::new();
        for op in &weight.ops {
            nodes.push(match *op {
                WeightOp::Const(c) => b.i32(c.to_f32() as i32),
                WeightOp::Field(f) => {
                    let (kept, word, bit) = self.place(f, run, half);
                    match kept {
                        Kept::U8 => ((word >> bit) & 0xff_u32).bits(Scalar::I32),
                        Kept::I8 => (word << (24 - bit)).bits(Scalar::I32) >> 24,
                        Kept::F16 | Kept::Bf16 | Kept::F32 => unreachable!("zeros are of small integers"),
                    }
                }
                WeightOp::Neg(a) => -nodes[a],
                WeightOp::Binary(Arithmetic::Add, x, y) => nodes[x] + nodes[y],
                WeightOp::Binary(Arithmetic::Sub, x, y) => nodes[x] - nodes[y],
                WeightOp::Binary(..) | WeightOp::Entry | WeightOp::Lookup(..) => {
                    unreachable!("zeros are sums and differences")
                }
            });
        }
        *nodes.last().expect("an expression has nodes")
    }

    /// The first unit of a section that runs have, and how many they have.
    fn units(&self, section: usize, runs: Runs) -> (u32, u32) {
        let (units, of_tile) = (self.operands.layout.sections[section].units, self.operands.op.runs());
        (runs.first * units / of_tile, (runs.count * units / of_tile).max(1))
    }

    /// A number of a section: its type, the word that holds it, and its first bit there.
    fn place(&self, section: usize, runs: Runs, half: u32) -> (Kept, V<'b>, u32) {
        let (kept, words) = (self.operands.layout.sections[section].kept, &self.numbers[section]);
        let (unit, several) = self.units(section, runs);
        let bits = kept.bytes() * 8;
        let bit = (2 * unit + half) * bits;
        if several == 1 {
            return (kept, words[(bit / 32) as usize], bit % 32);
        }
        // Which of the units is the lane's.
        let lane = self.operands.lane & 3;
        let own = lane % runs.count as i32 / (runs.count / several) as i32;
        let choose = |words: Vec<V<'b>>, own: V<'b>| {
            let of = |pair: &[V<'b>], bit: V<'b>| if let [x, y] = *pair { bit.eq(0).select(x, y) } else { pair[0] };
            let chosen: Vec<V<'b>> = words.chunks(2).map(|pair| of(pair, own & 1)).collect();
            if chosen.len() == 1 { chosen[0] } else { of(&chosen, own >> 1) }
        };
        let of_unit = |word: u32| (0..several).map(|n| words[((unit + n) * 2 * bits / 32 + word) as usize]).collect();
        match bits {
            // Two units lie in a word.
            8 => {
                let first = unit / 2;
                let pairs = (0..several / 2).map(|n| words[(first + n) as usize]).collect();
                let word = choose(pairs, own >> 1);
                (kept, word >> ((own & 1) << 4).bits(Scalar::U32), half * 8)
            }
            16 => (kept, choose(of_unit(0), own), half * 16),
            _ => (kept, choose(of_unit(half), own), 0),
        }
    }

    /// A number of a section as a float.
    fn number(&self, section: usize, runs: Runs, half: u32) -> V<'b> {
        let b = self.operands.b;
        let (kept, word, bit) = self.place(section, runs, half);
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

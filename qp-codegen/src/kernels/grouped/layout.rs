//! How a matrix of a format is stored for products.
//!
//! The integers of entries, less the smallest ([`Terms::lowest`]), are cut into **tiles** of 16 rows × 128 columns. A lane
//! of a warp has 64 of a tile, as 16 registers of four bytes: register `4·m + a` is operand `a` of the tensor-core product
//! of columns `32·m..`, by the fragment layout of `mma.m16n8k32`:
//!
//! ```text
//! row in tile    = 8·(a mod 2) + lane / 4
//! column in tile = 32·m + 16·(a div 2) + 4·(lane mod 4) + byte
//! ```
//!
//! Integers of more than 8 bits are several **planes** of bytes, one behind the other, the lowest first.
//!
//! Bytes of `n` bits are cut into **parts** of 8, 4, 2 and 1 bits, those that `n` is a sum of, the lowest bits in the widest
//! part. A word of a part of `w` bits holds `8 / w` registers: register `i` of them is `(word >> w·i)` and the mask of `w`
//! bits in every byte. So four weights become bytes in one or two operations, and 4 bits take 8 words a lane. Codes that are
//! looked up ([`Terms::table`]) lie side by side instead, those of two registers in a word, for four are the selector of a
//! permutation of bytes. The words of a tile lie as [`crate::layout::word_in_tile`] says; tiles of a row of tiles side by side.
//!
//! Of codes with memory the streams themselves are stored, and of others that look up tables of the matrix the codes. A lane has eight
//! **runs** of a tile ([`crate::spec::terms::Runs`]), one of each 16 columns, and columns are counted as the runs have them: those that
//! activations are put in the order of ([`Terms::order`]). First come the runs' first bytes, which a window at the end of another lane's run
//! reaches into, run by run, then the others; runs of no whole bytes, and those that two lanes share, lie one behind the other. A table of
//! digits that windows are looked up in lies before the fields.
//!
//! Fields lie in **sections**, each of the narrowest type that holds its numbers, the two rows of a lane side by side.

use crate::layout::word_in_tile;
use crate::reader::Integers;
use crate::spec::format::Cover;
use crate::spec::terms::{BLOCK, CODE, Digits, Kept, Numbers, RUN, Stream, TILE, Terms};
use crate::spec::{Shape, mask};

/// Rows of a tile.
pub const ROWS: u32 = 16;
/// Registers of a lane in a tile.
pub const REGISTERS: u32 = 16;
/// Bytes of a word that say which multiples a row's slopes are of.
const GRID_BYTES: u32 = 1;

/// A field's numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Their type.
    pub kept: Kept,
    /// Columns that share a number; those of a whole row are as many as it has.
    pub columns: u32,
    /// Numbers of a row in a tile.
    pub units: u32,
    /// Tiles, side by side, that share a number.
    pub tiles: u32,
    /// Numbers of a row, or groups of [`Section::units`].
    pub blocks: u32,
    /// First word among those of all sections.
    pub first: u32,
}

impl Section {
    /// Bytes of a lane's numbers in a tile: of two rows.
    pub fn lane_bytes(&self) -> u32 {
        2 * self.units * self.kept.bytes()
    }

    /// Bytes of a row of tiles.
    fn row_bytes(&self) -> u32 {
        self.blocks * ROWS / 2 * self.lane_bytes()
    }

    /// Where number `k` of row `row` of a row of tiles lies, in bytes from the row's first.
    fn at(&self, row: u32, k: u32) -> usize {
        let (block, unit) = (k / self.units, k % self.units);
        let element = (block * 8 + row % 8) * 2 * self.units + 2 * unit + row / 8;
        (element * self.kept.bytes()) as usize
    }
}

/// The sizes of a matrix that is stored for products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relaid {
    /// Rows × columns.
    pub shape: Shape,
    /// Bits of a weight, as it is stored, where it is stored as an integer or a code of its own.
    pub bits: u32,
    /// Whether weights are stored as codes.
    pub codes: bool,
    /// How streams are stored, if codes have memory.
    pub runs: Option<RunBits>,
    /// First word of the table of digits, and how many there are, if windows are looked up.
    pub book: Option<(u32, u32)>,
    /// One a field of the terms; none where slopes are those of whole rows.
    pub sections: Vec<Section>,
    /// First word of the rows' grids, if they have any.
    pub grid: Option<u32>,
    /// Words of sections and grids.
    number_words: u32,
}

/// The bits of a lane's runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunBits {
    /// Of a run, a multiple of 4.
    pub all: u32,
    /// Those that are stored first: whole bytes, or all.
    pub first: u32,
}

impl RunBits {
    fn of(stream: &Stream) -> RunBits {
        let all = stream.run_bits();
        let whole = all.is_multiple_of(8) && !stream.runs.shared;
        let first = if whole { stream.beyond().next_multiple_of(8).min(all) } else { all };
        RunBits { all, first }
    }

    /// Where bit `bit` of run `run` of a lane lies among the bits of its words.
    pub fn place(self, run: u32, bit: u32) -> u32 {
        match bit.checked_sub(self.first) {
            None => run * self.first + bit,
            Some(bit) => TILE / BLOCK * self.first + run * (self.all - self.first) + bit,
        }
    }
}

/// Why a matrix is not multiplied exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a matrix of {rows} x {cols} is too large: kernels count up to 2^31 weights", rows = .0.rows, cols = .0.cols)]
pub struct TooLarge(pub Shape);

impl Relaid {
    /// Those of a `shape` matrix of a format with `terms`.
    pub fn new(terms: &Terms, shape: Shape) -> Relaid {
        let (row_tiles, col_tiles) = (shape.rows.div_ceil(ROWS), shape.cols.div_ceil(TILE));
        let (mut sections, mut grid, mut at) = (Vec::new(), None, 0);
        if terms.run.is_some() {
            for (_, field) in &terms.fields {
                let kept = Kept::of(field.ty);
                let (columns, units, tiles) = match field.cover {
                    Cover::Rectangle(Shape { cols, .. }) | Cover::Flat(cols) if cols < TILE => (cols, TILE / cols, 1),
                    Cover::Rectangle(Shape { cols, .. }) | Cover::Flat(cols) => (cols, 1, cols / TILE),
                    Cover::Matrix | Cover::Row | Cover::Column => (shape.cols, 1, col_tiles),
                };
                let section = Section { kept, columns, units, tiles, blocks: col_tiles.div_ceil(tiles), first: at };
                at += (row_tiles * section.row_bytes()).div_ceil(4).next_multiple_of(4);
                sections.push(section);
            }
            grid = Some(at);
            at += (row_tiles * ROWS * GRID_BYTES).div_ceil(4).next_multiple_of(4);
        }
        let book = terms.stream.as_ref().and_then(|stream| match &stream.digits {
            Digits::Book(book) => Some((at, (stream.vector << book.bits).div_ceil(2).next_multiple_of(4))),
            Digits::Bytes { .. } => None,
        });
        at += book.map_or(0, |b| b.1);
        let codes = terms.table.is_some();
        let runs = terms.stream.as_ref().map(RunBits::of);
        let bits = if codes { CODE } else { terms.bits };
        Relaid { shape, bits, codes, runs, book, sections, grid, number_words: at.max(4) }
    }

    /// Tiles from top to bottom.
    pub fn row_tiles(&self) -> u32 {
        self.shape.rows.div_ceil(ROWS)
    }

    /// Tiles from left to right.
    pub fn col_tiles(&self) -> u32 {
        self.shape.cols.div_ceil(TILE)
    }

    /// Rows after padding.
    pub fn padded_rows(&self) -> u32 {
        self.row_tiles() * ROWS
    }

    /// Words of a lane in a tile.
    pub fn lane_words(&self) -> u32 {
        self.runs.map_or(REGISTERS * self.bits / 8, |runs| TILE / BLOCK * runs.all / 32)
    }

    /// Words of a row of tiles.
    pub fn row_words(&self) -> u32 {
        self.col_tiles() * self.lane_words() * 32
    }

    /// Words of all tiles.
    pub fn words(&self) -> usize {
        self.row_words() as usize * self.row_tiles() as usize
    }

    /// Words of all sections and grids.
    pub fn number_words(&self) -> usize {
        self.number_words as usize
    }

    /// Bytes of the table of digits; 0 if there is none.
    pub fn book_bytes(&self) -> u32 {
        4 * self.book.map_or(0, |(_, words)| words)
    }

    /// Elements of the longest buffer, in which kernels count in 31 bits: words of weights, or 16-bit numbers.
    pub fn elements(&self) -> u64 {
        (self.words() as u64).max(2 * u64::from(self.number_words))
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> u64 {
        4 * (self.words() as u64 + u64::from(self.number_words) + u64::from(self.padded_rows()))
    }

    /// Planes of bytes that are stored.
    pub fn planes(&self) -> u32 {
        self.bits.div_ceil(8)
    }

    /// The parts that the bits of a plane are cut into, in the order of their words: first bit and bits.
    pub fn parts(&self, plane: u32) -> Vec<(u32, u32)> {
        let mut first = 0;
        let bits = (self.bits - 8 * plane).min(8);
        let widths = [8, 4, 2, 1].into_iter().filter(|w| bits & w != 0);
        widths
            .map(|w| {
                first += w;
                (first - w, w)
            })
            .collect()
    }

    /// Packs a row of tiles: `digits` are 16 rows for each plane, each padded to whole tiles.
    fn pack(&self, digits: &[u8], words: &mut [u32]) {
        let stride = (self.col_tiles() * TILE) as usize;
        for (plane, digits) in (0..).zip(digits.chunks_exact(stride * ROWS as usize)) {
            self.pack_plane(plane, digits, words);
        }
    }

    fn pack_plane(&self, plane: u32, digits: &[u8], words: &mut [u32]) {
        let stride = (self.col_tiles() * TILE) as usize;
        let first_word = plane * REGISTERS;
        let lane_words = self.lane_words();
        for (tile, words) in words.chunks_exact_mut(lane_words as usize * 32).enumerate() {
            for lane in 0..32 {
                let digits = &digits[(lane / 4) as usize * stride + tile * TILE as usize + (lane % 4 * 4) as usize..];
                for register in 0..REGISTERS {
                    let (m, a) = (register / 4, register % 4);
                    let at = (a % 2 * 8) as usize * stride + (32 * m + a / 2 * 16) as usize;
                    let bytes = u32::from_le_bytes([digits[at], digits[at + 1], digits[at + 2], digits[at + 3]]);
                    if self.codes {
                        let codes = (0..4).map(|i| (bytes >> (8 * i) & mask(CODE)) << (CODE * i)).sum::<u32>();
                        let at = word_in_tile(lane_words, lane, register / 2);
                        words[at as usize] |= codes << (16 * (register % 2));
                        continue;
                    }
                    let mut word = first_word;
                    for (first, width) in self.parts(plane) {
                        let of_word = 8 / width;
                        let part = (bytes >> first) & (mask(width) * 0x0101_0101);
                        let at = word_in_tile(lane_words, lane, word + register / of_word);
                        words[at as usize] |= part << (width * (register % of_word));
                        word += REGISTERS / of_word;
                    }
                }
            }
        }
    }

    /// The rows from `first` on of a matrix as a row of tiles of this one.
    pub fn row_tile(&self, integers: &Integers<'_>, first: u32) -> RowTile {
        let Shape { rows, cols } = integers.shape();
        let (cols, there) = (cols as usize, ROWS.min(rows - first) as usize);
        let stride = (self.col_tiles() * TILE) as usize;
        let plane = stride * ROWS as usize;
        let mut digits = vec![0; plane * self.planes() as usize];
        if self.runs.is_none() {
            let mut of_rows = vec![0; there * cols * self.planes() as usize];
            if self.codes {
                (first..).zip(of_rows.chunks_exact_mut(cols)).for_each(|(row, out)| integers.codes(row, out));
            } else {
                integers.digits(first, &mut of_rows);
            }
            for (digits, of_rows) in digits.chunks_exact_mut(plane).zip(of_rows.chunks_exact(there * cols)) {
                let rows = digits.chunks_exact_mut(stride).zip(of_rows.chunks_exact(cols));
                rows.for_each(|(to, from)| to[..cols].copy_from_slice(from));
            }
        }
        let mut out = RowTile {
            words: vec![0; self.row_words() as usize],
            sections: self.sections.iter().map(|s| vec![0; s.row_bytes() as usize]).collect(),
            grid: vec![0; ROWS as usize],
            factors: vec![0.0; ROWS as usize],
        };
        let mut numbers = Numbers::default();
        for row in 0..ROWS {
            // Rows of padding have the numbers of the last, so that nothing in them is beyond all numbers.
            let from = (first + row).min(rows - 1);
            integers.numbers(from, &mut numbers);
            out.factors[row as usize] = numbers.factor;
            out.grid[(row % 8 * 2 + row / 8) as usize] = (127 - numbers.grid) as u8;
            for (f, (section, bytes)) in self.sections.iter().zip(&mut out.sections).enumerate() {
                let size = section.kept.bytes() as usize;
                for (k, value) in (0..).zip(integers.kept(f, from, section.columns)) {
                    let bits = section.kept.bits(value).to_le_bytes();
                    bytes[section.at(row, k)..][..size].copy_from_slice(&bits[..size]);
                }
            }
        }
        match (self.runs, &integers.terms().stream) {
            (Some(runs), Some(stream)) if stream.runs.lanes.is_empty() => {
                self.pack_codes(integers, (first, runs, stream), &mut out.words);
            }
            (Some(runs), Some(stream)) => self.pack_runs(integers, (first / BLOCK, runs, stream), &mut out.words),
            _ => self.pack(&digits, &mut out.words),
        }
        out
    }

    /// Packs the streams of row `i` of blocks.
    fn pack_runs(&self, integers: &Integers<'_>, (i, runs, stream): (u32, RunBits, &Stream), words: &mut [u32]) {
        let mut of_block = vec![0; (BLOCK * BLOCK / stream.vector * stream.step / 32) as usize];
        for j in 0..self.shape.cols / BLOCK {
            integers.stream(i, j, &mut of_block);
            for (of_run, &lane) in (0..).step_by(runs.all as usize).zip(&stream.runs.lanes) {
                for bit in (0..runs.all).step_by(4) {
                    let at = of_run + bit;
                    self.put_bits(
                        words,
                        (j, lane),
                        runs.place(j % (TILE / BLOCK), bit),
                        of_block[(at / 32) as usize] >> (at % 32) & 0xf,
                    );
                }
            }
        }
    }

    /// Packs the codes of the rows from `first` on, of formats without memory: those of the lane's weights, or, of eight weights of a row
    /// each, which two lanes share, those of the upper row in the even lane and those of the lower one in the odd lane.
    fn pack_codes(&self, integers: &Integers<'_>, (first, runs, stream): (u32, RunBits, &Stream), words: &mut [u32]) {
        let Shape { rows, cols } = integers.shape();
        let v = stream.vector;
        for row in 0..ROWS.min(rows - first) {
            for k in 0..cols / v {
                let (code, col) = (integers.code(first + row, k), k * v % BLOCK);
                let (lane, step) = match v {
                    RUN => (row % 8 * 4 + col / RUN * 2 + row / 8, 0),
                    _ => (row % 8 * 4 + col / 4, row / 8 * (4 / v) + col % 4 / v),
                };
                for bit in (0..stream.step).step_by(4) {
                    let j = k * v / BLOCK;
                    let place = runs.place(j % (TILE / BLOCK), step * stream.step + bit);
                    self.put_bits(words, (j, lane), place, code >> bit & 0xf);
                }
            }
        }
    }

    /// Puts bits at a place of a lane's words, in the tile of column `j` of blocks.
    fn put_bits(&self, words: &mut [u32], (j, lane): (u32, u32), place: u32, bits: u32) {
        let of_tile = self.lane_words() * 32;
        let at = j / (TILE / BLOCK) * of_tile + word_in_tile(self.lane_words(), lane, place / 32);
        words[at as usize] |= bits << (place % 32);
    }
}

/// A row of tiles, stored.
#[derive(Clone, Debug, PartialEq)]
pub struct RowTile {
    words: Vec<u32>,
    sections: Vec<Vec<u8>>,
    grid: Vec<u8>,
    factors: Vec<f32>,
}

/// A whole matrix, stored; the parameters of a product's kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// Integers.
    pub words: Vec<u32>,
    /// Fields and grids, little endian.
    pub numbers: Vec<u8>,
    /// Of each row, what its sum is multiplied with at the end.
    pub factors: Vec<f32>,
}

impl Stored {
    /// Without rows of tiles yet, of a matrix, or several with one table of digits.
    pub fn new(integers: &Integers<'_>, layout: &Relaid) -> Stored {
        let mut numbers = vec![0; layout.number_words() * 4];
        if let Some((first, _)) = layout.book {
            let places = numbers[first as usize * 4..].chunks_exact_mut(2);
            places.zip(integers.book()).for_each(|(to, digits)| to.copy_from_slice(&digits.to_le_bytes()));
        }
        Stored { words: vec![0; layout.words()], numbers, factors: vec![0.0; layout.padded_rows() as usize] }
    }

    /// Puts a row of tiles in its place, `at` rows of tiles from the top.
    pub fn put(&mut self, layout: &Relaid, at: u32, tile: &RowTile) {
        let at = at as usize;
        let rows = ROWS as usize;
        self.words[at * tile.words.len()..][..tile.words.len()].copy_from_slice(&tile.words);
        self.factors[at * rows..][..rows].copy_from_slice(&tile.factors);
        for (section, bytes) in layout.sections.iter().zip(&tile.sections) {
            self.numbers[section.first as usize * 4 + at * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        }
        if let Some(grid) = layout.grid {
            self.numbers[grid as usize * 4 + at * rows..][..rows].copy_from_slice(&tile.grid);
        }
    }
}

//! Where each bit of a packed matrix lies.
//!
//! # From matrix to bits
//!
//! The rotated matrix is padded to whole **tiles** of `8·R × C` weights, where `R × C` is the code's block. A tile
//! holds eight blocks; block `g` (0..8) belongs to lanes `4g..4g+4` of a warp, and its bit stream is cut into four
//! equal, whole-word parts, one a lane. So one shuffle fetches the word that a window needs from the next lane.
//!
//! Within a block, weight `p` (0..T) of the stream belongs to lane `t = p / (T/4)` of the four, register
//! `q = (p mod T/4) / 4`, byte `c = p mod 4`. Register `q` is operand `a = q mod 4` of tensor-core product
//! `m = q / 4`, which covers rows `16·rt..` and columns `32·kt..` of the tile with `kt = m mod C/32`,
//! `rt = m / (C/32)`. By the fragment layout of `mma.m16n8k32`:
//!
//! ```text
//! row in tile    = 16·rt + 8·(a mod 2) + g
//! column in tile = 32·kt + 16·(a div 2) + 4·t + c
//! ```
//!
//! A lane's words of a tile (`NW`) are stored in chunks of 4, then 2, then 1 words; a chunk holds lane 0's words,
//! then lane 1's, … so that each chunk is one coalesced vector load. Tiles are stored row-tile major:
//! all column tiles of row tile 0, then of row tile 1, …

use crate::spec::{Code, Quantizer, Shape, Value};

/// Lanes that share a block.
pub const LANES_PER_BLOCK: u32 = 4;
/// Blocks side by side in a tile.
pub const BLOCKS_PER_TILE: u32 = 8;
/// Columns of a cell of activations, 16 bytes; see [`activation_at`].
pub const CELL: u32 = 16;
/// Activations are padded with zeros to a multiple of this many columns, whatever the code.
pub const COLUMN_PAD: u32 = 256;

/// Where the byte of a column and a plane lies among activations of `planes` planes. The cells of the same columns lie side
/// by side, plane by plane, behind them those of the next columns: so lanes that take the same columns of eight planes,
/// and copies of whole runs of columns, find one stretch of memory.
pub fn activation_at(column: usize, plane: usize, planes: usize) -> usize {
    let cell = CELL as usize;
    (column / cell * planes + plane) * cell + column % cell
}

/// Rows and columns of a tile: eight blocks, one below the other (interleaved).
pub fn tile(block: Shape) -> Shape {
    Shape { rows: block.rows * BLOCKS_PER_TILE, cols: block.cols }
}

/// Words of one lane in one tile.
pub fn lane_words(code: &Code) -> u32 {
    code.block_bits() / 32 / LANES_PER_BLOCK
}

/// Where weight `p` of block `g`'s stream lies in the tile: (row, column).
pub fn position(block: Shape, g: u32, p: u32) -> (u32, u32) {
    let lane = block.rows * block.cols / LANES_PER_BLOCK;
    let (t, i) = (p / lane, p % lane);
    let (q, c) = (i / 4, i % 4);
    let (m, a) = (q / 4, q % 4);
    let (rt, kt) = (m / (block.cols / 32), m % (block.cols / 32));
    (16 * rt + 8 * (a % 2) + g, 32 * kt + 16 * (a / 2) + 4 * t + c)
}

/// The chunks of a lane's words: (first word, width) with width 4, 2 or 1.
pub fn chunks(lane_words: u32) -> Vec<(u32, u32)> {
    let mut out = Vec::new();
    let mut at = 0;
    for width in [4, 2, 1] {
        while lane_words - at >= width {
            out.push((at, width));
            at += width;
        }
    }
    out
}

/// Word offset, within a tile, of word `w` of lane `lane` when lanes have `lane_words` words.
pub fn word_in_tile(lane_words: u32, lane: u32, w: u32) -> u32 {
    let (first, width) = chunks(lane_words).into_iter().rev().find(|c| c.0 <= w).expect("w < lane_words");
    first * 32 + lane * width + (w - first)
}

/// The packed form of one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Rows × columns of the matrix itself.
    pub shape: Shape,
    /// Rows × columns of a tile.
    pub tile: Shape,
    /// Words of a lane in a tile of code `i` of the mix.
    pub lane_words: Vec<u32>,
}

/// Why a matrix cannot be packed or multiplied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// No rows or no columns.
    #[error("a matrix of {rows} x {cols} holds nothing", rows = .0.rows, cols = .0.cols)]
    Empty(Shape),
    /// Sums of products would not fit 32 bits.
    #[error(
        "{cols} columns are too many: sums of products of {bits}-bit entries are exact for up to {most}",
        bits = 8 * .value.bytes()
    )]
    Columns {
        /// Columns of the matrix.
        cols: u32,
        /// Type of the entries.
        value: Value,
        /// The most for this type.
        most: u32,
    },
    /// Indices would not fit 32 bits.
    #[error("a matrix of {rows} x {cols} is too large: kernels count up to 2^31 weights", rows = .0.rows, cols = .0.cols)]
    Weights(Shape),
}

/// Most columns of a matrix with entries of type `value`, so that the 32-bit sums of a row's products are exact, whatever
/// the entries and the activations are: a product takes a signed byte of an 8-bit entry, or the low byte (0..=255) or the
/// high byte of a 16-bit entry, times a plane of the activations, which is within ±127.
pub fn most_columns(value: Value) -> u32 {
    let largest = match value {
        Value::I8 => 128 * 127,
        Value::I16 => 255 * 127,
    };
    // The sum of a token's activations, each within ±16256 = 128 · 127, then has 32 bits, too.
    i32::MAX as u32 / largest
}

impl Packed {
    /// Checks that a matrix of `shape` can be packed under `q`, decoded and multiplied, padding included.
    ///
    /// # Errors
    /// A matrix without weights, with more columns than [`most_columns`], or with 2^31 weights or more.
    pub fn check(q: &Quantizer, shape: Shape) -> Result<(), TooLarge> {
        if shape.is_empty() {
            return Err(TooLarge::Empty(shape));
        }
        let most = most_columns(q.value());
        if shape.cols > most {
            return Err(TooLarge::Columns { cols: shape.cols, value: q.value(), most });
        }
        let tile = tile(q.block());
        let padded = |n: u32, of: u32| u64::from(n.div_ceil(of)) * u64::from(of);
        if padded(shape.rows, tile.rows) * padded(shape.cols, tile.cols) > i32::MAX as u64 {
            return Err(TooLarge::Weights(shape));
        }
        Ok(())
    }

    /// The layout of a `shape` matrix under `q`. Rows and columns are padded to whole tiles.
    pub fn new(q: &Quantizer, shape: Shape) -> Self {
        Packed { shape, tile: tile(q.block()), lane_words: q.codes.iter().map(lane_words).collect() }
    }

    /// Tensor-core tiles of 16 rows in a tile.
    pub fn row_parts(&self) -> u32 {
        self.tile.rows / 16
    }

    /// Tiles from top to bottom.
    pub fn row_tiles(&self) -> u32 {
        self.shape.rows.div_ceil(self.tile.rows)
    }

    /// Tiles from left to right.
    pub fn col_tiles(&self) -> u32 {
        self.shape.cols.div_ceil(self.tile.cols)
    }

    /// Columns after padding.
    pub fn padded_cols(&self) -> u32 {
        self.col_tiles() * self.tile.cols
    }

    /// Rows after padding.
    pub fn padded_rows(&self) -> u32 {
        self.row_tiles() * self.tile.rows
    }

    /// Which code of the mix column tile `ct` uses.
    pub fn code_of(&self, ct: u32) -> usize {
        ct as usize % self.lane_words.len()
    }

    /// First word of column tile `ct` within its row tile.
    pub fn col_offset(&self, ct: u32) -> usize {
        let n = self.lane_words.len() as u32;
        let period: u32 = self.lane_words.iter().sum();
        (ct / n * period + self.lane_words[..(ct % n) as usize].iter().sum::<u32>()) as usize * 32
    }

    /// Words of a row tile.
    pub fn row_stride(&self) -> usize {
        self.col_offset(self.col_tiles())
    }

    /// Words of the packed matrix.
    pub fn words(&self) -> usize {
        self.row_stride() * self.row_tiles() as usize
    }

    /// Copies the stream of block `g` of tile (`rt`, `ct`) out of `packed` into `stream`.
    pub fn read_block(&self, packed: &[u32], rt: u32, ct: u32, g: u32, stream: &mut Vec<u32>) {
        stream.clear();
        let nw = self.lane_words[self.code_of(ct)];
        let base = rt as usize * self.row_stride() + self.col_offset(ct);
        for t in 0..LANES_PER_BLOCK {
            stream.extend((0..nw).map(|w| packed[base + word_in_tile(nw, 4 * g + t, w) as usize]));
        }
    }

    /// Where word `i` of the stream of block `g` lies in a tile of code `code`: entry `g · length + i`.
    pub fn block_words(&self, code: usize) -> Vec<u32> {
        let nw = self.lane_words[code];
        let of_block = |g| {
            let word = move |i| word_in_tile(nw, LANES_PER_BLOCK * g + i / nw, i % nw);
            (0..LANES_PER_BLOCK * nw).map(word)
        };
        (0..BLOCKS_PER_TILE).flat_map(of_block).collect()
    }
}

/// The seed whose [`signs`] are those of `seed` from `column` on, a multiple of 64.
pub fn signs_from(seed: u64, column: u32) -> u64 {
    assert!(column.is_multiple_of(64), "signs come 64 from a word");
    seed.wrapping_add(u64::from(column / 64).wrapping_mul(STEP))
}

/// What SplitMix64 adds from one number to the next.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The random signs of a rotation: entry `i` is true if column `i` is negated.
///
/// Bit `i mod 64` of SplitMix64's output number `i / 64` from `seed`.
pub fn signs(seed: u64, columns: u32) -> Vec<bool> {
    let word = |j: u64| {
        let mut z = seed.wrapping_add((j + 1).wrapping_mul(STEP));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..u64::from(columns)).map(|i| word(i / 64) >> (i % 64) & 1 == 1).collect()
}

//! The checked quantizer: what a `.qspec` file means, every constant evaluated.
//!
//! # The model
//!
//! A weight matrix has `rows × columns` = out × in features. It is rotated ([`Rotation`]), each row is
//! divided by its scale ([`ScaleKind`]), and the result, nearly unit Gaussian, is cut into **blocks** of
//! `block.rows × block.cols` = T weights. Each block becomes one bit stream by a [`Code`]:
//!
//! * The T weights of a block are taken in a fixed order (see [`crate::layout`]) and grouped into
//!   **steps** of `vector` = V weights; there are T / V steps.
//! * Step `s` moves [`Code::step_bits`]`(s)` bits forward (KV; the rate is KV / V bits a weight). If KV
//!   differs between steps the pattern repeats cyclically.
//! * The **window** of step `s` is the L = `window` bits of the stream that begin where step `s` begins,
//!   bit 0 first (least significant). The stream is cyclic (**tail-biting**): bits after the last are the first.
//! * The decode expression ([`expr::Decode`]) maps a window to V small integers (`i8` or `i16`), the
//!   **entries**. The weight is `(entry + offset) × unit × row scale`, where `offset` is 0 or ½.
//!
//! A scalar or vector quantizer is the case L = KV: windows do not overlap. A **mix** ([`Quantizer::codes`]
//! with several codes) gives the column blocks of a matrix to its codes in turn: half-TCQ is a mix of two.
//!
//! All arithmetic up to the final scaling is on integers, so every decoder (this crate's, the interpreter's,
//! the GPU's) yields the same bytes.

mod canonical;
mod canonical_format;
mod check;
pub mod expr;
pub mod format;
pub mod formula;
mod fusion;
pub mod index;
mod load;
pub mod table_file;
pub mod terms;

pub use check::Files;
pub use format::Format;
pub use fusion::{Epilogue, Fusion, Launch, Matrix, Prologue};
pub(crate) use load::load_from;
pub use load::{
    Analysis, Definition, Disk, Fact, Library, analyse, file_of_palette, from_canonical, load_alone, load_file,
    load_str, resolve, resolve_all, resolve_all_untrained, resolve_any, resolve_each, resolve_fusion, resolve_in,
    resolve_untrained, untrained,
};

use std::path::PathBuf;

use expr::Decode;

/// Rows × columns of a block or a tile, in weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Out features.
    pub rows: u32,
    /// In features.
    pub cols: u32,
}

impl Shape {
    /// Number of weights, rows × columns.
    pub fn len(self) -> u64 {
        u64::from(self.rows) * u64::from(self.cols)
    }

    /// True if there are no weights.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Integer type of a codebook entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// 8-bit signed: one tensor-core product per register.
    I8,
    /// 16-bit signed: split into high and low bytes, two products.
    I16,
}

impl Value {
    /// Bytes of an entry component.
    pub fn bytes(self) -> u32 {
        match self {
            Value::I8 => 1,
            Value::I16 => 2,
        }
    }

    /// Smallest and largest representable entry.
    pub fn range(self) -> (i32, i32) {
        match self {
            Value::I8 => (i8::MIN.into(), i8::MAX.into()),
            Value::I16 => (i16::MIN.into(), i16::MAX.into()),
        }
    }
}

/// What one scale covers. The scale is the root mean square of what it covers, stored as bfloat16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// One scale a row (out feature).
    Row,
    /// One scale for the whole matrix.
    Matrix,
}

/// How weights are made nearly Gaussian before coding; the engine applies the same to activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rotation {
    /// None.
    None,
    /// Random signs, then orthonormal Hadamard transforms, along the columns (in features).
    Hadamard {
        /// Seed of the signs; see [`crate::layout::signs`].
        seed: u64,
        /// Columns that are transformed together, a power of two; all without it. See [`crate::reference::transforms`].
        block: Option<u32>,
        /// Columns whose blocks are interleaved afterwards, a power of two; see [`crate::reference::Interleave`].
        interleave: Option<u32>,
    },
}

/// How a table is trained: Lloyd's iteration on the trellis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Training {
    /// Seed of the Gaussian samples.
    pub seed: u64,
    /// Rounds of encoding and averaging.
    pub rounds: u32,
    /// Samples (weights) encoded a round.
    pub samples: u64,
}

/// Where a table's values come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TableSource {
    /// Written in the spec.
    #[default]
    Inline,
    /// Read from a file, made by other means.
    File(PathBuf),
    /// Read from a file that `qp train-codebook` writes.
    Trained {
        /// The file, in the folder of the spec unless that named an absolute path.
        file: PathBuf,
        /// How to train.
        training: Training,
    },
}

/// A codebook table: `entries × vector` integers.
///
/// Two tables are equal if their names and values are: where the values came from does not matter.
#[derive(Clone, Debug)]
pub struct Table {
    /// Name used in the decode expression.
    pub name: String,
    /// Number of entries, a power of two.
    pub entries: u32,
    /// `entries × vector` values, entry-major. Empty while untrained (only `qp train-codebook` sees that).
    pub values: Vec<i16>,
    /// Where the values come from.
    pub source: TableSource,
}

impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, self.entries, &self.values) == (&other.name, other.entries, &other.values)
    }
}

impl Eq for Table {}

/// One trellis code: how a block of weights becomes bits and back.
#[derive(Clone, Debug, PartialEq)]
pub struct Code {
    /// L, bits of the sliding window, 1..=24.
    pub window: u32,
    /// KV of each step, repeated cyclically; never empty.
    pub steps: Vec<u32>,
    /// V, weights a step: 1, 2 or 4.
    pub vector: u32,
    /// Shape of a block of T weights.
    pub block: Shape,
    /// Integer type of entries.
    pub value: Value,
    /// True if a weight is `(entry + ½) × unit`, false if `entry × unit`.
    pub half_offset: bool,
    /// Spacing of the integer grid for a source of unit variance.
    pub unit: f32,
    /// Tables that the decode expression may look up.
    pub tables: Vec<Table>,
    /// Window → V entries.
    pub decode: Decode,
}

impl Code {
    /// T, weights of a block: at most 2^16.
    pub fn weights(&self) -> u32 {
        self.block.rows * self.block.cols
    }

    /// T / V, steps of a block.
    pub fn steps_per_block(&self) -> u32 {
        self.weights() / self.vector
    }

    /// KV of step `s`.
    pub fn step_bits(&self, s: u32) -> u32 {
        self.steps[s as usize % self.steps.len()]
    }

    /// First bit of step `s` in the block's stream.
    pub fn step_offset(&self, s: u32) -> u32 {
        let n = self.steps.len() as u32;
        let period: u32 = self.steps.iter().sum();
        s / n * period + self.steps[..(s % n) as usize].iter().sum::<u32>()
    }

    /// Bits of a block's stream.
    pub fn block_bits(&self) -> u32 {
        self.step_offset(self.steps_per_block())
    }

    /// Bits a weight, without scales and tables.
    pub fn rate(&self) -> f64 {
        f64::from(self.block_bits()) / f64::from(self.weights())
    }

    /// True if windows do not overlap (a scalar or vector quantizer): every step is coded alone.
    pub fn is_memoryless(&self) -> bool {
        self.steps.iter().all(|&k| k == self.window)
    }

    /// The window of step `s` in `words`, the block's stream of 32-bit words, bit 0 of word 0 first.
    pub fn window_at(&self, words: &[u32], s: u32) -> u32 {
        let bits = self.block_bits();
        let at = self.step_offset(s);
        let (lo, sh) = ((at / 32) as usize, at % 32);
        let next = if (lo + 1) * 32 < bits as usize { words[lo + 1] } else { words[0] };
        let pair = u64::from(next) << 32 | u64::from(words[lo]);
        (pair >> sh) as u32 & mask(self.window)
    }

    /// How many steps before and after a stream's seam an encoder must look to find a good state there: paths that differ
    /// in the past have nearly always met after a few windows' worth of bits. Whole periods of the pattern where a
    /// stream of `steps` steps allows it.
    pub fn reach(&self, steps: u32) -> u32 {
        let fewest = self.steps.iter().min().expect("at least one step");
        (5 * self.window).div_ceil(*fewest).next_multiple_of(self.steps.len() as u32).min(steps.div_ceil(2))
    }

    /// Decodes a window into `out` (length V).
    pub fn entry(&self, window: u32, out: &mut [i16]) {
        self.decode.eval(window, self.value, self.vector, &self.tables, out);
    }

    /// All 2^L × V entries, window-major: the codebook written out.
    pub fn codebook(&self) -> Vec<i16> {
        let v = self.vector as usize;
        let mut out = vec![0; v << self.window];
        for (w, e) in out.chunks_exact_mut(v).enumerate() {
            self.entry(w as u32, e);
        }
        out
    }
}

/// A mask of the low `bits` bits (`bits` ≤ 32).
pub fn mask(bits: u32) -> u32 {
    if bits >= 32 { u32::MAX } else { (1 << bits) - 1 }
}

/// A checked quantizer. Two quantizers with the same canonical text are the same quantizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantizer {
    /// Name, e.g. `tcq_2.5`. Not part of the content hash.
    pub name: String,
    /// One code, or for a mix several: column block `k` uses code `k mod codes.len()`. All codes of a mix
    /// have the same block shape, value type and offset.
    pub codes: Vec<Code>,
    /// What a scale covers.
    pub scale: ScaleKind,
    /// Rotation along the columns.
    pub rotation: Rotation,
}

impl Quantizer {
    /// Mean bits a weight over the codes, without scales and tables.
    pub fn rate(&self) -> f64 {
        self.codes.iter().map(Code::rate).sum::<f64>() / self.codes.len() as f64
    }

    /// Block shape, common to all codes.
    pub fn block(&self) -> Shape {
        self.codes[0].block
    }

    /// Value type, common to all codes.
    pub fn value(&self) -> Value {
        self.codes[0].value
    }

    /// Whether entries sit on half-integers; common to all codes.
    pub fn half_offset(&self) -> bool {
        self.codes[0].half_offset
    }

    /// True if every table has its values.
    pub fn is_trained(&self) -> bool {
        self.codes.iter().flat_map(|c| &c.tables).all(|t| !t.values.is_empty())
    }

    /// The quantizer as a self-contained `.qspec` text with everything evaluated and tables inlined. Parses back to
    /// an equal quantizer.
    pub fn canonical(&self) -> String {
        canonical::text(self)
    }

    /// SHA-256, in hexadecimal, of the canonical text without the name.
    pub fn hash(&self) -> String {
        canonical::hash(self)
    }
}

//! The codec on the CPU: weights to bits and back.
//!
//! * [`Decoder`]: packed words → entries, weights, or the exact integer product of a linear layer.
//! * [`Lines`]: the same of matrices of formats.
//! * [`products`]: exact products with both, as [`Strips`] of rows.
//! * [`row_products`]: products with a row that is not quantized.
//! * [`Encoder`]: rotated weights → packed words, by the Viterbi algorithm over the trellis of each [`Code`].
//! * [`FormatEncoder`]: weights → matrices of formats.
//! * [`feedback`]: what the encoder does about the inputs of a layer, if it knows them.
//! * [`cut`]: parts of packed matrices, and matrices below one another.
//! * [`train`]: the tables of a code, by Lloyd's iteration on the trellis itself.
//! * [`distortion`]: the mean squared error that a quantizer reaches on a Gaussian source.
//!
//! Everything here is a function of its arguments alone: the number of threads and the machine's vector instructions
//! change no bit of a result.
//!
//! [`Code`]: qp_codegen::spec::Code

pub mod cut;
mod decode;
mod dense;
pub mod distortion;
mod encode;
pub mod feedback;
pub mod gaussian;
mod lines;
pub mod make;
pub mod plain;
pub mod search;
pub(crate) mod simd;
mod strips;
pub mod train;
pub mod viterbi;
mod words;

use half::bf16;
use qp_codegen::layout::Packed;
use qp_codegen::reader::Reader;
use qp_codegen::spec::{Quantizer, Shape};
use rayon::prelude::*;

pub use decode::{Decoded, Decoder, decode_matrix, linear};
pub use dense::{by_token, row_products};
pub use encode::{EncodeError, Encoder, encode_matrix};
pub use gaussian::Gaussian;
pub use lines::Lines;
pub use make::FormatEncoder;
pub use strips::{Form, Inputs, Outcome, Product, Scratch, Source, StripMut, Strips, products};
pub use words::Words;

/// Rows of a format's matrix that a task looks at.
const ROWS: u32 = 64;

/// Whether all weights of the matrix that `reader` reads from `tensors` are finite, and all that its products are computed with.
pub fn is_finite(reader: &Reader, tensors: &[&[u8]]) -> bool {
    let (rows, step) = (reader.shape().rows, ROWS.next_multiple_of(reader.band()));
    let tasks = (0..rows.div_ceil(step)).into_par_iter();
    tasks.all(|i| reader.is_finite(tensors, i * step..rows.min((i + 1) * step)))
}

/// A quantized matrix: words in the order of its layout, and scales.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedMatrix {
    /// Shape, tiles, and where each bit lies.
    pub layout: Packed,
    /// [`Packed::words`] words.
    pub words: Words,
    /// One scale a row (`layout.shape.rows`), or a single one for the whole matrix.
    pub scales: Vec<bf16>,
}

impl PackedMatrix {
    /// Joins the parts of a `shape` matrix that was packed by `q`; `None` if their lengths do not fit, or if no matrix may
    /// be so large ([`Packed::check`]).
    pub fn from_parts(q: &Quantizer, shape: Shape, words: Vec<u32>, scales: Vec<bf16>) -> Option<Self> {
        Packed::check(q, shape).ok()?;
        let layout = Packed::new(q, shape);
        let fits = words.len() == layout.words() && scales.len() == scale_count(q, shape);
        fits.then_some(PackedMatrix { layout, words: words.into(), scales })
    }

    /// The scale of `row`.
    pub fn scale(&self, row: usize) -> f32 {
        // A single scale serves all rows.
        self.scales[if self.scales.len() == 1 { 0 } else { row }].to_f32()
    }
}

/// Number of scales of a `shape` matrix.
pub fn scale_count(q: &Quantizer, shape: Shape) -> usize {
    match q.scale {
        qp_codegen::spec::ScaleKind::Row => shape.rows as usize,
        qp_codegen::spec::ScaleKind::Matrix => 1,
    }
}

#[cfg(test)]
mod tests;

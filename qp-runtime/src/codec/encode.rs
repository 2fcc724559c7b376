//! Rotated weights → packed words.

use std::ops::Range;

use half::bf16;
use qp_codegen::layout::{self, BLOCKS_PER_TILE, Packed};
use qp_codegen::reference;
use qp_codegen::spec::{Code, Quantizer, ScaleKind, Shape};
use rayon::prelude::*;

use super::PackedMatrix;
use super::feedback::Feedback;
use super::search::Search;
use crate::device::{DeviceError, Executor};

/// Why a matrix cannot be encoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// A weight is infinite or not a number.
    #[error(
        "the weight in row {row}, column {column} is {value}: only finite weights can be quantized; check the model's files"
    )]
    NotFinite {
        /// From 0.
        row: usize,
        /// From 0, after rotation.
        column: usize,
        /// The weight.
        value: f32,
    },
    /// A weight that is too large.
    #[error(
        "the weight in row {row}, column {column} is {value}: only weights below 1e30 can be quantized; check the model's files"
    )]
    Large {
        /// From 0.
        row: usize,
        /// From 0, after rotation.
        column: usize,
        /// The weight.
        value: f32,
    },
    /// The numbers that a format's formulas give are beyond single precision, or none.
    #[error(
        "`{format}` makes weights of it that are not finite, or cannot be multiplied: its weight or a formula divides by zero, or \
         multiplies numbers beyond the largest of single precision"
    )]
    NotMade {
        /// The format.
        format: String,
    },
    /// The device failed.
    #[error("encoding on the device: {message}")]
    Device {
        /// Its words.
        message: String,
    },
}

/// Weights are smaller: sums of their squares, and products of fields, then stay within single precision.
const LARGEST: f32 = 1e30;

/// Looks for a weight that cannot be quantized, in rows of `columns`.
///
/// # Errors
/// The first that is not finite or too large.
pub(super) fn check(weights: &[f32], columns: usize) -> Result<(), EncodeError> {
    let Some(at) = weights.par_iter().position_first(|w| w.is_nan() || w.abs() >= LARGEST) else { return Ok(()) };
    let (row, column, value) = (at / columns, at % columns, weights[at]);
    Err(match value.is_finite() {
        true => EncodeError::Large { row, column, value },
        false => EncodeError::NotFinite { row, column, value },
    })
}

/// A quantizer made ready to encode. Make it once, use it for every matrix.
pub struct Encoder {
    quantizer: Quantizer,
    /// For each code.
    searches: Vec<Search>,
    /// For each weight of block 0's stream, its (row, column) in the tile.
    positions: Vec<(u32, u32)>,
}

/// A block's place: row tile, column tile, block in the tile.
type Place = (u32, u32, u32);

impl Encoder {
    /// Prepares `q`, whose tables must be filled.
    pub fn new(q: &Quantizer) -> Self {
        assert!(q.is_trained(), "{} has untrained tables", q.name);
        Self::with(q, q.codes.iter().map(Search::cpu).collect())
    }

    /// Prepares `q`, whose tables must be filled, to be searched on a device. The result is that of the CPU.
    ///
    /// # Errors
    /// A code that needs more memory than the device has, a failing compiler or driver.
    pub fn on(executor: &Executor, q: &Quantizer) -> Result<Self, DeviceError> {
        let searches = q.codes.iter().map(|c| Search::on(executor, c));
        Ok(Self::with(q, searches.collect::<Result<_, _>>()?))
    }

    fn with(q: &Quantizer, searches: Vec<Search>) -> Self {
        let block = q.block();
        let positions = (0..block.rows * block.cols).map(|p| layout::position(block, 0, p)).collect();
        Encoder { quantizer: q.clone(), searches, positions }
    }

    /// The quantizer.
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// Encodes a `shape` matrix of rotated weights, row-major. `progress` is told of weights (padding excluded) as they
    /// are done, from any thread.
    ///
    /// # Errors
    /// A weight that is not finite, or a failing device.
    pub fn encode(
        &self,
        shape: Shape,
        rotated: &[f32],
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<PackedMatrix, EncodeError> {
        let mut out = self.begin(shape, rotated)?;
        let all = 0..out.layout.col_tiles();
        self.blocks(&mut out, all, progress, |m, code, places| {
            let weights = self.scaled(m, places, |r, c| rotated[r * shape.cols as usize + c]);
            Ok((self.windows(code, &weights)?, ()))
        })?;
        Ok(out)
    }

    /// As [`Encoder::encode`], but so that the errors matter least for the (rotated) inputs whose Hessian `feedback` was
    /// made of, for this quantizer's blocks; see [`super::feedback`].
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn encode_for(
        &self,
        shape: Shape,
        rotated: &[f32],
        feedback: &Feedback,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<PackedMatrix, EncodeError> {
        let mut out = self.begin(shape, rotated)?;
        let (columns, length) = (shape.cols as usize, self.positions.len());
        let books: Vec<Vec<i16>> = self.quantizer.codes.iter().map(Code::codebook).collect();
        let mut errors = vec![0f32; rotated.len()];
        for tile in 0..out.layout.col_tiles() {
            let first = (tile * out.layout.tile.cols) as usize;
            let width = (columns - first).min(out.layout.tile.cols as usize);
            let mut targets: Vec<f32> =
                rotated.chunks_exact(columns).flat_map(|row| &row[first..first + width]).copied().collect();
            feedback.from_before(first, width, &errors, &mut targets);
            let encoded = self.blocks(&mut out, tile..tile + 1, progress, |m, code, places| {
                let weights = self.scaled(m, places, |r, c| rotated[r * columns + c]);
                let targets = self.scaled(m, places, |r, c| targets[r * width + c - first]);
                self.in_pieces(code, &books[code], (feedback, first), &weights, targets)
            })?;
            for (places, of_blocks) in encoded {
                for (place, of_block) in places.into_iter().zip(of_blocks.chunks_exact(length)) {
                    for (p, r, c) in self.inside(&out.layout, place) {
                        errors[r * columns + c] = of_block[p] * out.scale(r);
                    }
                }
            }
        }
        Ok(out)
    }

    /// The matrix without its words.
    fn begin(&self, shape: Shape, rotated: &[f32]) -> Result<PackedMatrix, EncodeError> {
        assert_eq!(rotated.len(), shape.rows as usize * shape.cols as usize, "weights of the matrix");
        let scales = self.scales(shape, rotated)?;
        let layout = Packed::new(&self.quantizer, shape);
        let words = vec![0; layout.words()].into();
        Ok(PackedMatrix { layout, words, scales })
    }

    /// Encodes all blocks of the column tiles `columns` by `encode`, which is given some blocks of one code and returns
    /// their windows, one block's after the other's, and more, which is returned with the blocks.
    fn blocks<T: Send>(
        &self,
        out: &mut PackedMatrix,
        columns: Range<u32>,
        progress: &(dyn Fn(u64) + Sync),
        encode: impl Fn(&PackedMatrix, usize, &[Place]) -> Result<(Vec<u32>, T), EncodeError> + Sync,
    ) -> Result<Vec<(Vec<Place>, T)>, EncodeError> {
        let mut groups: Vec<(usize, Vec<Place>)> = vec![];
        for code in 0..self.quantizer.codes.len() {
            let l = &out.layout;
            let tiles = (0..l.row_tiles()).flat_map(|rt| columns.clone().map(move |ct| (rt, ct)));
            let blocks = tiles
                .filter(|&(_, ct)| l.code_of(ct) == code)
                .flat_map(|(rt, ct)| (0..BLOCKS_PER_TILE).map(move |g| (rt, ct, g)))
                .filter(|&place| self.inside(l, place).next().is_some());
            let blocks: Vec<Place> = blocks.collect();
            groups.extend(blocks.chunks(self.searches[code].blocks_at_once()).map(|c| (code, c.to_vec())));
        }
        let run = |(code, places): &(usize, Vec<Place>)| {
            let (windows, more) = encode(out, *code, places)?;
            progress(places.par_iter().map(|&p| self.inside(&out.layout, p).count() as u64).sum());
            let code = &self.quantizer.codes[*code];
            let windows = windows.par_chunks_exact(code.steps_per_block() as usize);
            Ok((windows.flat_map_iter(|w| stream(code, w)).collect::<Vec<u32>>(), more))
        };
        let encoded: Vec<(Vec<u32>, T)> = if self.searches.iter().all(Search::is_parallel) {
            groups.par_iter().map(run).collect::<Result<_, EncodeError>>()?
        } else {
            groups.iter().map(run).collect::<Result<_, EncodeError>>()?
        };
        let PackedMatrix { layout, words, .. } = out;
        let orders: Vec<Vec<u32>> = (0..self.quantizer.codes.len()).map(|code| layout.block_words(code)).collect();
        let mut rest = vec![];
        for ((code, places), (streams, more)) in groups.into_iter().zip(encoded) {
            let length = self.quantizer.codes[code].block_bits() as usize / 32;
            // Places are in the order of row tiles, each of which is a part of the words.
            let row_tiles = words.to_mut().par_chunks_exact_mut(layout.row_stride().max(1)).enumerate();
            row_tiles.for_each(|(rt, row_tile)| {
                let of_tile = |first: usize| places.partition_point(|p| (p.0 as usize) < first);
                let blocks = of_tile(rt)..of_tile(rt + 1);
                let streams = &streams[blocks.start * length..blocks.end * length];
                for (&(_, ct, g), stream) in places[blocks].iter().zip(streams.chunks_exact(length)) {
                    let tile = &mut row_tile[layout.col_offset(ct)..];
                    let order = &orders[code][g as usize * length..];
                    stream.iter().zip(order).for_each(|(&word, &at)| tile[at as usize] = word);
                }
            });
            rest.push((places, more));
        }
        Ok(rest)
    }

    /// Encodes blocks that begin at column `first`, whose scaled weights are `weights` as `targets`, piece by piece. Returns windows, and errors of the
    /// weights.
    fn in_pieces(
        &self,
        code: usize,
        book: &[i16],
        (feedback, first): (&Feedback, usize),
        weights: &[f32],
        mut targets: Vec<f32>,
    ) -> Result<(Vec<u32>, Vec<f32>), EncodeError> {
        let q = &self.quantizer.codes[code];
        let (length, vector) = (self.positions.len(), q.vector as usize);
        let mut windows = vec![0u32; weights.len() / vector];
        let mut errors = vec![0f32; weights.len()];
        let mut begin = 0;
        for &(end, _) in feedback.pieces().parts() {
            let found = self.windows(code, &targets)?;
            for at in (0..weights.len()).step_by(length) {
                let piece = (at + begin) / vector..(at + end) / vector;
                windows[piece.clone()].copy_from_slice(&found[piece]);
                for p in begin..end {
                    let entry = book[windows[(at + p) / vector] as usize * vector + p % vector];
                    errors[at + p] = weights[at + p] - reference::weight(q, entry, 1.0);
                }
                for (&(row, column), error) in self.positions[begin..end].iter().zip(&errors[at + begin..]) {
                    let factors = feedback.within(first, column as usize);
                    for (target, &(r, c)) in targets[at + end..at + length].iter_mut().zip(&self.positions[end..]) {
                        if r == row
                            && let Some(factor) = factors.get(c as usize)
                        {
                            *target += error * factor;
                        }
                    }
                }
            }
            begin = end;
        }
        Ok((windows, errors))
    }

    /// The weights of a block that are not padding: index in the block, row, column.
    fn inside<'a>(&'a self, l: &'a Packed, (rt, ct, g): Place) -> impl Iterator<Item = (usize, usize, usize)> + 'a {
        let (top, left) = (rt * l.tile.rows + g, ct * l.tile.cols);
        let positions = self.positions.iter().enumerate().map(move |(p, &(r, c))| (p, top + r, left + c));
        let inside = positions.filter(|&(_, r, c)| r < l.shape.rows && c < l.shape.cols);
        inside.map(|(p, r, c)| (p, r as usize, c as usize))
    }

    /// The weights of blocks, one after the other, each `value(row, column)` over its row's scale; 0 in the padding.
    fn scaled(&self, m: &PackedMatrix, places: &[Place], value: impl Fn(usize, usize) -> f32 + Sync) -> Vec<f32> {
        let length = self.positions.len();
        let mut weights = vec![0f32; length * places.len()];
        places.par_iter().zip(weights.par_chunks_exact_mut(length)).for_each(|(&place, weights)| {
            for (p, r, c) in self.inside(&m.layout, place) {
                let scale = m.scale(r);
                weights[p] = if scale > 0.0 { value(r, c) / scale } else { 0.0 };
            }
        });
        weights
    }

    /// The windows of blocks of one code, whose scaled weights are `weights`; one block after the other.
    fn windows(&self, code: usize, weights: &[f32]) -> Result<Vec<u32>, EncodeError> {
        self.searches[code].windows(weights).map_err(|e| EncodeError::Device { message: e.to_string() })
    }

    /// Root mean square of each row, or of the matrix; 0 if it has no other weights.
    fn scales(&self, shape: Shape, rotated: &[f32]) -> Result<Vec<bf16>, EncodeError> {
        let columns = shape.cols as usize;
        check(rotated, columns)?;
        let rows = match self.quantizer.scale {
            ScaleKind::Row => 1,
            ScaleKind::Matrix => shape.rows as usize,
        };
        let scale = |part: &[f32]| {
            let square: f64 = part.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
            let scale = bf16::from_f64((square / part.len() as f64).sqrt());
            // Rounding up must not give infinity. Below the normal range nothing of the weights would be left.
            if scale.to_f32() < f32::MIN_POSITIVE { bf16::ZERO } else { scale.min(bf16::MAX) }
        };
        Ok(rotated.par_chunks_exact(rows * columns).map(scale).collect())
    }
}

/// The stream of 32-bit words whose windows are `windows`, one a step: bit 0 of word 0 first, padded with zeros to
/// whole words.
pub fn stream(code: &Code, windows: &[u32]) -> Vec<u32> {
    let bits = code.step_offset(windows.len() as u32) as usize;
    // One word more, for the last step's high half.
    let mut words = vec![0u32; bits.div_ceil(32) + 1];
    for (s, &window) in windows.iter().enumerate() {
        let at = code.step_offset(s as u32);
        let new = u64::from(window & qp_codegen::spec::mask(code.step_bits(s as u32))) << (at % 32);
        words[at as usize / 32] |= new as u32;
        words[at as usize / 32 + 1] |= (new >> 32) as u32;
    }
    words.pop();
    words
}

/// The windows, one a step, of a block's stream.
pub fn windows_of(code: &Code, stream: &[u32]) -> Vec<u32> {
    (0..code.steps_per_block()).map(|s| code.window_at(stream, s)).collect()
}

/// Makes the `windows` of a block those that its [`stream`] has. A search whose costs all reached their limit may have
/// found a path whose ends do not meet.
pub(super) fn close(code: &Code, windows: &mut [u32]) {
    let (first, last) = (windows[0], windows[windows.len() - 1]);
    let bits = code.step_bits(windows.len() as u32 - 1);
    if first & qp_codegen::spec::mask(code.window - bits) != last >> bits {
        windows.copy_from_slice(&windows_of(code, &stream(code, windows)));
    }
}

/// [`Encoder::encode`] of one matrix.
///
/// # Errors
/// A weight that is not finite.
pub fn encode_matrix(
    q: &Quantizer,
    shape: Shape,
    rotated: &[f32],
    progress: &(dyn Fn(u64) + Sync),
) -> Result<PackedMatrix, EncodeError> {
    Encoder::new(q).encode(shape, rotated, progress)
}

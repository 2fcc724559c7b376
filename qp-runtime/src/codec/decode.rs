//! Packed words → entries, weights and exact products.

use std::sync::Arc;

use qp_codegen::layout::{self, BLOCKS_PER_TILE, LANES_PER_BLOCK};
use qp_codegen::reference::{self, Activations};
use qp_codegen::spec::{Code, Quantizer, Value, mask};
use rayon::prelude::*;

use super::PackedMatrix;
use super::dense::by_token;
use super::dot::{Entry, dots};
use crate::memory::arena::{Arena, Piece};

/// A quantizer made ready to decode: its codebooks written out. Make it once, use it for every matrix.
#[derive(Clone, Debug)]
pub struct Decoder {
    quantizer: Quantizer,
    codes: Vec<CodeReader>,
}

/// What it takes to decode the tiles of one code.
#[derive(Clone, Debug)]
struct CodeReader {
    vector: usize,
    /// Mask of L bits.
    mask: u32,
    /// 2^L × V entries.
    book: Vec<i16>,
    /// Words of a tile.
    tile_words: usize,
    /// For each of a tile's blocks, where in the tile the words of its stream lie.
    gather: Vec<Vec<u32>>,
    /// For each step: its first bit, and the (row, column) of its first weight in block 0. The V weights of a step
    /// are neighbours in a row; block `g` lies `g` rows lower.
    steps: Vec<(u32, u32, u32)>,
}

impl CodeReader {
    fn new(code: &Code) -> Self {
        let words = layout::lane_words(code);
        let gather = (0..BLOCKS_PER_TILE)
            .map(|g| {
                let lanes = 4 * g..4 * g + LANES_PER_BLOCK;
                lanes.flat_map(|lane| (0..words).map(move |w| layout::word_in_tile(words, lane, w))).collect()
            })
            .collect();
        let steps = (0..code.steps_per_block())
            .map(|s| {
                let (row, column) = layout::position(code.block, 0, s * code.vector);
                (code.step_offset(s), row, column)
            })
            .collect();
        CodeReader {
            vector: code.vector as usize,
            mask: mask(code.window),
            book: code.codebook(),
            tile_words: words as usize * 32,
            gather,
            steps,
        }
    }

    /// Decodes one tile into `out`, rows of `stride` entries of which the tile's columns come first.
    fn tile<const V: usize>(&self, words: &[u32], stride: usize, out: &mut [i16]) {
        let mut stream = Vec::new();
        for (g, gather) in self.gather.iter().enumerate() {
            stream.clear();
            stream.extend(gather.iter().map(|&i| words[i as usize]));
            stream.push(stream[0]);
            let out = &mut out[g * stride..];
            for &(bit, row, column) in &self.steps {
                let lo = (bit / 32) as usize;
                let pair = u64::from(stream[lo + 1]) << 32 | u64::from(stream[lo]);
                let window = ((pair >> (bit % 32)) as u32 & self.mask) as usize;
                let at = row as usize * stride + column as usize;
                out[at..at + V].copy_from_slice(&self.book[window * V..window * V + V]);
            }
        }
    }
}

impl Decoder {
    /// Prepares `q`, whose tables must be filled.
    pub fn new(q: &Quantizer) -> Self {
        assert!(q.is_trained(), "{} has untrained tables", q.name);
        Decoder { quantizer: q.clone(), codes: q.codes.iter().map(CodeReader::new).collect() }
    }

    /// The quantizer.
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// Decodes row tile `rt` of `m` into `out`: `tile.rows × padded_cols` entries, row-major.
    pub fn row_tile(&self, m: &PackedMatrix, rt: u32, out: &mut [i16]) {
        let stride = m.layout.padded_cols() as usize;
        let words = &m.words[rt as usize * m.layout.row_stride()..];
        for ct in 0..m.layout.col_tiles() {
            let code = &self.codes[m.layout.code_of(ct)];
            let words = &words[m.layout.col_offset(ct)..][..code.tile_words];
            let out = &mut out[(ct * m.layout.tile.cols) as usize..];
            match code.vector {
                1 => code.tile::<1>(words, stride, out),
                2 => code.tile::<2>(words, stride, out),
                4 => code.tile::<4>(words, stride, out),
                v => unreachable!("vectors of {v} are refused by the checker"),
            }
        }
    }

    /// The rows `rows` of the matrix in rotated space, one below the other: each weight a [`reference::weight`].
    pub fn rows(&self, m: &PackedMatrix, rows: &[u32]) -> Vec<f32> {
        let (columns, tile) = (m.layout.shape.cols as usize, m.layout.tile.rows);
        let stride = m.layout.padded_cols() as usize;
        let code = &self.quantizer.codes[0];
        let mut out = vec![0f32; rows.len() * columns];
        out.par_chunks_exact_mut(columns).zip(rows).for_each_init(
            || vec![0i16; tile as usize * stride],
            |entries, (out, &row)| {
                self.row_tile(m, row / tile, entries);
                let scale = m.scale(row as usize);
                let entries = &entries[(row % tile) as usize * stride..];
                out.iter_mut().zip(entries).for_each(|(w, &e)| *w = reference::weight(code, e, scale));
            },
        );
        out
    }

    /// All weights, `rows × columns`, in rotated space: each [`reference::weight`].
    pub fn weights(&self, m: &PackedMatrix) -> Vec<f32> {
        let (columns, tile) = (m.layout.shape.cols as usize, m.layout.tile.rows as usize);
        let stride = m.layout.padded_cols() as usize;
        let code = &self.quantizer.codes[0];
        let mut out = vec![0f32; m.layout.shape.rows as usize * columns];
        out.par_chunks_mut((tile * columns).max(1)).enumerate().for_each_init(
            || vec![0i16; tile * stride],
            |entries, (rt, out)| {
                self.row_tile(m, rt as u32, entries);
                for (i, (out, entries)) in out.chunks_exact_mut(columns).zip(entries.chunks_exact(stride)).enumerate() {
                    let scale = m.scale(rt * tile + i);
                    for (w, &e) in out.iter_mut().zip(entries) {
                        *w = reference::weight(code, e, scale);
                    }
                }
            },
        );
        out
    }

    /// The entries of the whole matrix, written out in `arena`, for products that are computed again and again; `None` if they
    /// do not fit.
    pub fn entries(&self, m: &PackedMatrix, arena: &Arc<Arena>) -> Option<Entries> {
        let len = m.layout.shape.rows as usize * m.layout.shape.cols as usize;
        Some(match self.quantizer.codes[0].value {
            Value::I8 => {
                let mut out = arena.take(len)?;
                // Entries of 8-bit codes lie within -128..128.
                self.write_entries(m, &mut out, |e| e as i8);
                Entries::I8(out)
            }
            Value::I16 => {
                let mut out = arena.take(len)?;
                self.write_entries(m, &mut out, |e| e);
                Entries::I16(out)
            }
        })
    }

    fn write_entries<E: Send>(&self, m: &PackedMatrix, out: &mut [E], entry: impl Fn(i16) -> E + Sync) {
        let (columns, tile) = (m.layout.shape.cols as usize, m.layout.tile.rows as usize);
        let stride = m.layout.padded_cols() as usize;
        out.par_chunks_mut((tile * columns).max(1)).enumerate().for_each_init(
            || vec![0i16; tile * stride],
            |entries, (rt, out)| {
                self.row_tile(m, rt as u32, entries);
                for (out, entries) in out.chunks_exact_mut(columns).zip(entries.chunks_exact(stride)) {
                    out.iter_mut().zip(entries).for_each(|(o, &e)| *o = entry(e));
                }
            },
        );
    }

    /// The product with each token's activations, `tokens × rows`, in the exact arithmetic of [`reference`].
    /// Every token has `layout.shape.cols` activations. `kept` are the matrix's [`Decoder::entries`], if they were
    /// written out; without them each row tile is decoded on its way.
    pub fn linear(&self, m: &PackedMatrix, kept: Option<&Entries>, tokens: &[Activations]) -> Vec<f32> {
        let code = &self.quantizer.codes[0];
        self.products(m, kept, tokens, |inputs, row, sums, out| inputs.scale(code, sums, m.scale(row), out))
    }

    /// The integers that become the results of [`Decoder::linear`], `tokens × rows`: see [`reference::total`].
    pub fn totals(&self, m: &PackedMatrix, tokens: &[Activations]) -> Vec<i64> {
        let code = &self.quantizer.codes[0];
        self.products(m, None, tokens, |inputs, _, sums, out| {
            for ((total, &sum), &(of_token, _)) in out.iter_mut().zip(sums).zip(&inputs.ends) {
                *total = reference::total(code, sum, of_token);
            }
        })
    }

    /// The products with each token's activations, `tokens × rows`: what `end` makes of the sums of a row.
    fn products<T: Copy + Default + Send + Sync>(
        &self,
        m: &PackedMatrix,
        kept: Option<&Entries>,
        tokens: &[Activations],
        end: impl Fn(&Inputs, usize, &[i64], &mut [T]) + Sync,
    ) -> Vec<T> {
        let (rows, columns) = (m.layout.shape.rows as usize, m.layout.shape.cols as usize);
        let (tile, stride) = (m.layout.tile.rows as usize, m.layout.padded_cols() as usize);
        let code = &self.quantizer.codes[0];
        let inputs = Inputs::new(code, tokens, columns);
        let n = tokens.len();
        // Rows × tokens, so that row tiles are apart.
        let mut out = vec![T::default(); rows * n];
        // A task has rows enough to be worth handing to another core.
        let task = tile.max(TASK / columns.max(1)).next_multiple_of(tile);
        out.par_chunks_mut((task * n).max(1)).enumerate().for_each_init(
            || (Vec::new(), vec![0i64; n], vec![0i64; n]),
            |(entries, sums, low), (i, out)| {
                for (r, out) in out.chunks_exact_mut(n.max(1)).enumerate() {
                    let row = i * task + r;
                    let own = row * columns..(row + 1) * columns;
                    match kept {
                        Some(Entries::I8(kept)) => inputs.sums(&kept[own], sums, low),
                        Some(Entries::I16(kept)) => inputs.sums(&kept[own], sums, low),
                        None => {
                            entries.resize(tile * stride, 0i16);
                            if row.is_multiple_of(tile) {
                                self.row_tile(m, (row / tile) as u32, entries);
                            }
                            inputs.sums(&entries[row % tile * stride..][..columns], sums, low);
                        }
                    }
                    end(&inputs, row, sums, out);
                }
            },
        );
        by_token(out, n)
    }
}

/// Entries of a matrix, decoded: `rows × columns`, row-major, without padding.
#[derive(Debug)]
pub enum Entries {
    /// Of 8-bit codes.
    I8(Piece<i8>),
    /// Of 16-bit codes.
    I16(Piece<i16>),
}

impl Entries {
    /// Bytes that the entries of a `rows × columns` matrix of `q` take in an arena.
    pub fn bytes(q: &Quantizer, rows: usize, columns: usize) -> usize {
        match q.codes[0].value {
            Value::I8 => Arena::bytes_of::<i8>(rows * columns),
            Value::I16 => Arena::bytes_of::<i16>(rows * columns),
        }
    }
}

/// Entries that a task multiplies, about.
const TASK: usize = 1 << 15;

/// Tokens' activations, ready for products with rows of entries.
struct Inputs<'a> {
    planes: Planes<'a>,
    /// Of each token, the sum of its activations, and what its results are multiplied with.
    ends: Vec<(i64, f32)>,
}

/// By token.
enum Planes<'a> {
    /// For 8-bit entries: products of at most 2^7 · 16256.
    Whole(Vec<&'a [i16]>),
    /// For 16-bit entries: high and low bytes, `q = 128·high + low`, so that products stay below 2^15 · 128.
    Split(Vec<Vec<i16>>, Vec<Vec<i16>>),
}

impl<'a> Inputs<'a> {
    fn new(code: &Code, tokens: &'a [Activations], columns: usize) -> Self {
        assert!(tokens.iter().all(|a| a.q.len() == columns), "activations of a token");
        let split = |a: &Activations| -> (Vec<i16>, Vec<i16>) {
            a.q.iter().map(|&q| reference::split_activation(q)).map(|(h, l)| (i16::from(h), i16::from(l))).unzip()
        };
        let planes = match code.value {
            Value::I8 => Planes::Whole(tokens.iter().map(|a| &a.q[..]).collect()),
            Value::I16 => {
                let (high, low) = tokens.iter().map(split).unzip();
                Planes::Split(high, low)
            }
        };
        let ends = tokens.iter().map(|a| (a.sum, reference::output_factor(code, a.scale))).collect();
        Inputs { planes, ends }
    }

    /// The products with a row of entries, one a token. `low` is for what is in between.
    fn sums<E: Entry>(&self, row: &[E], sums: &mut [i64], low: &mut [i64]) {
        match &self.planes {
            Planes::Whole(q) => dots(row, q, sums),
            Planes::Split(high, lows) => {
                dots(row, high, sums);
                dots(row, lows, low);
                sums.iter_mut().zip(low).for_each(|(sum, low)| *sum = 128 * *sum + *low);
            }
        }
    }

    /// The results of a row, which has this scale.
    fn scale(&self, code: &Code, sums: &[i64], scale: f32, out: &mut [f32]) {
        for ((y, &sum), &(of_token, factor)) in out.iter_mut().zip(sums).zip(&self.ends) {
            *y = reference::scale_output(code, sum, of_token, scale, factor);
        }
    }
}

/// [`Decoder::weights`] of one matrix.
pub fn decode_matrix(q: &Quantizer, m: &PackedMatrix) -> Vec<f32> {
    Decoder::new(q).weights(m)
}

/// [`Decoder::linear`] of one matrix.
pub fn linear(q: &Quantizer, m: &PackedMatrix, tokens: &[Activations]) -> Vec<f32> {
    Decoder::new(q).linear(m, None, tokens)
}

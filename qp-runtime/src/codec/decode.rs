//! Packed words → entries, weights and exact products.

use qp_codegen::layout::{self, BLOCKS_PER_TILE, LANES_PER_BLOCK};
use qp_codegen::reference::{self, Activations};
use qp_codegen::spec::{Code, Quantizer, Shape, Value, mask};
use rayon::prelude::*;

use super::PackedMatrix;
use super::strips::{Digits, Form, Inputs, Outcome, Product, ROWS, Scratch, Source, StripMut, products};

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

    /// The matrix `m`, to be multiplied.
    pub fn matrix<'a>(&'a self, m: &'a PackedMatrix) -> Decoded<'a> {
        Decoded { decoder: self, matrix: m }
    }

    /// The product with each token's activations, `tokens × rows`, in the exact arithmetic of [`reference`].
    /// Every token has `layout.shape.cols` activations.
    pub fn linear(&self, m: &PackedMatrix, tokens: &[Activations]) -> Vec<f32> {
        self.product(m, tokens)
    }

    /// The integers that become the results of [`Decoder::linear`], `tokens × rows`: see [`reference::total`].
    pub fn totals(&self, m: &PackedMatrix, tokens: &[Activations]) -> Vec<i64> {
        self.product(m, tokens)
    }

    fn product<T: Outcome>(&self, m: &PackedMatrix, tokens: &[Activations]) -> Vec<T> {
        let inputs = Inputs::new(tokens.to_vec(), m.layout.shape.cols as usize);
        products(&[Product { source: &self.matrix(m), kept: None, inputs: &inputs }]).remove(0)
    }
}

/// A packed matrix, with what decodes it.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'a> {
    decoder: &'a Decoder,
    matrix: &'a PackedMatrix,
}

impl Decoded<'_> {
    /// The form of the `rows × columns` matrices of `q`.
    pub fn form(q: &Quantizer, rows: usize, columns: usize) -> Form {
        let code = &q.codes[0];
        let (digits, lowest) = match code.value {
            Value::I8 => (Digits::Eight, i8::MIN.into()),
            Value::I16 => (Digits::Sixteen, i16::MIN.into()),
        };
        let unit = reference::output_factor(code, 1.0);
        Form { rows, columns, digits, lowest, times: 1, runs: None, half_offset: code.half_offset, unit }
    }
}

impl Source for Decoded<'_> {
    fn form(&self) -> Form {
        let Shape { rows, cols } = self.matrix.layout.shape;
        Decoded::form(&self.decoder.quantizer, rows as usize, cols as usize)
    }

    fn write(&self, strip: usize, scratch: &mut Scratch, to: &mut StripMut<'_>) {
        let layout = &self.matrix.layout;
        let (tile, stride) = (layout.tile.rows as usize, layout.padded_cols() as usize);
        let (rows, columns) = (layout.shape.rows as usize, layout.shape.cols as usize);
        let digits = self.form().digits;
        for (i, row) in (strip * ROWS..rows.min((strip + 1) * ROWS)).enumerate() {
            let of_tile = (std::ptr::from_ref(self.matrix).addr(), row / tile);
            if scratch.tile != Some(of_tile) {
                scratch.entries.resize(tile * stride, 0);
                self.decoder.row_tile(self.matrix, (row / tile) as u32, &mut scratch.entries);
                scratch.tile = Some(of_tile);
            }
            let entries = &scratch.entries[row % tile * stride..][..columns];
            // Entries less the smallest: the sign's bit is the other one.
            let mut put = |plane, digit: &dyn Fn(i16) -> u8| {
                scratch.digits.clear();
                scratch.digits.extend(entries.iter().map(|&e| digit(e)));
                to.put(i, plane, &scratch.digits);
            };
            match digits {
                Digits::Sixteen => {
                    put(0, &|e| (e >> 8) as u8 ^ 0x80);
                    put(1, &|e| e as u8);
                }
                _ => put(0, &|e| e as u8 ^ 0x80),
            }
            to.put_factor(i, self.matrix.scale(row));
        }
    }
}

/// [`Decoder::weights`] of one matrix.
pub fn decode_matrix(q: &Quantizer, m: &PackedMatrix) -> Vec<f32> {
    Decoder::new(q).weights(m)
}

/// [`Decoder::linear`] of one matrix.
pub fn linear(q: &Quantizer, m: &PackedMatrix, tokens: &[Activations]) -> Vec<f32> {
    Decoder::new(q).linear(m, tokens)
}

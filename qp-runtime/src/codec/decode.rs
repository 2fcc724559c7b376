//! Packed words → entries, weights and exact products.

use qp_codegen::layout::{self, BLOCKS_PER_TILE, LANES_PER_BLOCK};
use qp_codegen::reference::{self, Activations};
use qp_codegen::spec::{Code, Quantizer, Value, mask};
use rayon::prelude::*;

use super::PackedMatrix;
use super::simd::for_each_instruction_set;

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

    /// The entries of the whole matrix, written out, for products that are computed again and again.
    pub fn entries(&self, m: &PackedMatrix) -> Entries {
        let (columns, tile) = (m.layout.shape.cols as usize, m.layout.tile.rows as usize);
        let stride = m.layout.padded_cols() as usize;
        let len = m.layout.shape.rows as usize * columns;
        match self.quantizer.codes[0].value {
            Value::I8 => {
                let mut out = vec![0i8; len];
                out.par_chunks_mut((tile * columns).max(1)).enumerate().for_each_init(
                    || vec![0i16; tile * stride],
                    |entries, (rt, out)| {
                        self.row_tile(m, rt as u32, entries);
                        for (out, entries) in out.chunks_exact_mut(columns).zip(entries.chunks_exact(stride)) {
                            // Entries of 8-bit codes lie within -128..128.
                            out.iter_mut().zip(entries).for_each(|(o, &e)| *o = e as i8);
                        }
                    },
                );
                Entries::I8(out)
            }
            Value::I16 => {
                let mut out = vec![0i16; len];
                out.par_chunks_mut((tile * columns).max(1)).enumerate().for_each_init(
                    || vec![0i16; tile * stride],
                    |entries, (rt, out)| {
                        self.row_tile(m, rt as u32, entries);
                        for (out, entries) in out.chunks_exact_mut(columns).zip(entries.chunks_exact(stride)) {
                            out.copy_from_slice(&entries[..columns]);
                        }
                    },
                );
                Entries::I16(out)
            }
        }
    }

    /// The product with each token's activations, `tokens × rows`, in the exact arithmetic of [`reference`].
    /// Every token has `layout.shape.cols` activations. `kept` are the matrix's [`Decoder::entries`], if they were
    /// written out; without them each row tile is decoded on its way.
    pub fn linear(&self, m: &PackedMatrix, kept: Option<&Entries>, tokens: &[Activations]) -> Vec<f32> {
        let (rows, columns) = (m.layout.shape.rows as usize, m.layout.shape.cols as usize);
        let (tile, stride) = (m.layout.tile.rows as usize, m.layout.padded_cols() as usize);
        let code = &self.quantizer.codes[0];
        let inputs: Vec<Input> = tokens.iter().map(|a| Input::new(code, a, columns)).collect();
        let n = tokens.len();
        // Rows × tokens, so that row tiles are apart.
        let mut out = vec![0f32; rows * n];
        let products = |out: &mut [f32], row: usize, dot: &dyn Fn(&Input) -> i64| {
            let scale = m.scale(row);
            for (y, x) in out.iter_mut().zip(&inputs) {
                *y = reference::scale_output(code, dot(x), x.sum, scale, x.factor);
            }
        };
        // A task has rows enough to be worth handing to another core.
        let task = tile.max(TASK / columns.max(1)).next_multiple_of(tile);
        out.par_chunks_mut((task * n).max(1)).enumerate().for_each_init(Vec::new, |entries, (i, out)| {
            let first = i * task;
            let row_outputs = out.chunks_exact_mut(n.max(1));
            match kept {
                Some(Entries::I8(kept)) => {
                    let kept = kept[first * columns..].chunks_exact(columns);
                    for ((r, out), row) in row_outputs.enumerate().zip(kept) {
                        products(out, first + r, &|x| x.dot_bytes(row));
                    }
                }
                Some(Entries::I16(kept)) => {
                    let kept = kept[first * columns..].chunks_exact(columns);
                    for ((r, out), row) in row_outputs.enumerate().zip(kept) {
                        products(out, first + r, &|x| x.dot(row));
                    }
                }
                None => {
                    entries.resize(tile * stride, 0i16);
                    for (r, out) in row_outputs.enumerate() {
                        let row = first + r;
                        if row.is_multiple_of(tile) {
                            self.row_tile(m, (row / tile) as u32, entries);
                        }
                        let row_entries = &entries[row % tile * stride..][..columns];
                        products(out, row, &|x| x.dot(row_entries));
                    }
                }
            }
        });
        if n <= 1 {
            return out;
        }
        let mut turned = vec![0f32; n * rows];
        turned.par_chunks_exact_mut(rows).enumerate().for_each(|(t, turned)| {
            turned.iter_mut().enumerate().for_each(|(r, y)| *y = out[r * n + t]);
        });
        turned
    }
}

/// Entries of a matrix, decoded: `rows × columns`, row-major, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entries {
    /// Of 8-bit codes.
    I8(Vec<i8>),
    /// Of 16-bit codes.
    I16(Vec<i16>),
}

impl Entries {
    /// Bytes that the entries of a `rows × columns` matrix of `q` take.
    pub fn bytes(q: &Quantizer, rows: usize, columns: usize) -> u64 {
        let one = match q.codes[0].value {
            Value::I8 => 1,
            Value::I16 => 2,
        };
        rows as u64 * columns as u64 * one
    }
}

/// Entries that a task multiplies, about.
const TASK: usize = 1 << 15;

/// One token's activations, ready for [`dot`].
struct Input<'a> {
    planes: Planes<'a>,
    sum: i64,
    factor: f32,
}

enum Planes<'a> {
    /// For 8-bit entries: products of at most 2^7 · 16256.
    Whole(&'a [i16]),
    /// For 16-bit entries: high and low bytes, `q = 128·high + low`, so that products stay below 2^15 · 128.
    Split(Vec<i16>, Vec<i16>),
}

impl<'a> Input<'a> {
    fn new(code: &Code, a: &'a Activations, columns: usize) -> Self {
        assert_eq!(a.q.len(), columns, "activations of a token");
        let planes = match code.value {
            Value::I8 => Planes::Whole(&a.q),
            Value::I16 => {
                let (high, low) = a.q.iter().map(|&q| reference::split_activation(q)).unzip::<i8, i8, Vec<_>, Vec<_>>();
                let widen = |v: Vec<i8>| v.into_iter().map(i16::from).collect();
                Planes::Split(widen(high), widen(low))
            }
        };
        Input { planes, sum: a.sum, factor: reference::output_factor(code, a.scale) }
    }

    fn dot(&self, entries: &[i16]) -> i64 {
        match &self.planes {
            Planes::Whole(q) => dot(entries, q),
            Planes::Split(high, low) => 128 * dot(entries, high) + dot(entries, low),
        }
    }

    fn dot_bytes(&self, entries: &[i8]) -> i64 {
        match &self.planes {
            Planes::Whole(q) => dot_bytes(entries, q),
            Planes::Split(high, low) => 128 * dot_bytes(entries, high) + dot_bytes(entries, low),
        }
    }
}

/// Terms that an `i32` holds: `512 · 2^7 · 16256` and `512 · 2^15 · 127` are below 2^31.
const DOT_CHUNK: usize = 512;

for_each_instruction_set! {
    /// Exact inner product of entries and activations, where one side has 8 bits.
    fn dot[R](a: &[i16], b: &[i16]) -> i64 {
        let mut sum = 0i64;
        for (a, b) in a.chunks(DOT_CHUNK).zip(b.chunks(DOT_CHUNK)) {
            let part = a.iter().zip(b).fold(0i32, |s, (&a, &b)| s.wrapping_add(i32::from(a) * i32::from(b)));
            sum += i64::from(part);
        }
        sum
    }
}

for_each_instruction_set! {
    /// Exact inner product of 8-bit entries and activations.
    fn dot_bytes[R](a: &[i8], b: &[i16]) -> i64 {
        let mut sum = 0i64;
        for (a, b) in a.chunks(DOT_CHUNK).zip(b.chunks(DOT_CHUNK)) {
            let part = a.iter().zip(b).fold(0i32, |s, (&a, &b)| s.wrapping_add(i32::from(a) * i32::from(b)));
            sum += i64::from(part);
        }
        sum
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

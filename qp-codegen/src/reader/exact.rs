//! What exact products take of a matrix of a format: digits of integers, and the numbers of runs ([`Terms`]).

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use super::{CHUNK, Reader};
use crate::reference::Activations;
use crate::spec::Shape;
use crate::spec::expr::Room;
use crate::spec::format::{Number, Target, Weight, WeightOp};
use crate::spec::terms::{BLOCK, Digits, Near, Numbers, Origin, Stream, Terms, round};

impl Reader {
    /// How products with the matrix are computed exactly, if they are.
    pub fn terms(&self) -> Option<&Arc<Terms>> {
        self.book.terms.as_ref().ok().filter(|terms| terms.fits(self.shape))
    }

    /// What products take of the matrix in `tensors`.
    ///
    /// # Panics
    /// If the format has no terms, or a tensor is shorter than it must be.
    pub fn integers<'a>(&'a self, tensors: &[&'a [u8]]) -> Integers<'a> {
        let terms = self.terms().expect("a format with terms");
        let (mut digits, mut factor) = (Cow::Borrowed(&self.book.digits[..]), 1.0);
        if terms.own {
            let format = self.format();
            let (v, mut room) = (format.vector as usize, Room::default());
            let mut all = vec![0; v << format.window];
            let numbers = self.own_numbers(tensors);
            if let Some(numbers) = &numbers {
                for (code, out) in (0..).zip(all.chunks_exact_mut(v)) {
                    format.integers(code, numbers, &mut room, out);
                }
            }
            let (book, power) = terms.own_book(&all);
            digits = Cow::Owned(planes(&book, terms.planes()));
            factor = if numbers.is_some() { power } else { f32::NAN };
        }
        Integers { reader: self, terms, tensors: tensors.to_vec(), digits, factor }
    }

    /// The value of field `f` of the [`Terms`] that covers the weight (row, col).
    fn term(&self, terms: &Terms, tensors: &[&[u8]], f: usize, row: u32, col: u32) -> f32 {
        match &terms.fields[f].0 {
            Origin::Field(f) => self.field(tensors, *f, row, col).1,
            Origin::Value(value) => self.value(value, tensors, row, col),
        }
    }

    /// The value at (row, col) of an expression of the format's fields and tables.
    fn value(&self, value: &Weight, tensors: &[&[u8]], row: u32, col: u32) -> f32 {
        let leaf = |op: &WeightOp| match *op {
            WeightOp::Field(f) => self.field(tensors, f, row, col).1,
            WeightOp::Lookup(table, f) => self.looked_up(tensors, table, self.field(tensors, f, row, col).0),
            WeightOp::Entry | WeightOp::Const(_) | WeightOp::Neg(_) | WeightOp::Binary(..) => f32::NAN,
        };
        value.value(&leaf, &mut Vec::new())
    }

    /// Slope of the run that (row, col) is in, and rest or zero, if there are any.
    fn line(
        &self,
        terms: &Terms,
        tensors: &[&[u8]],
        (row, col): (u32, u32),
        nodes: &mut Vec<f32>,
    ) -> (f32, Option<f32>) {
        let leaf = |op: &WeightOp| match *op {
            WeightOp::Field(f) => self.term(terms, tensors, f, row, col),
            WeightOp::Entry | WeightOp::Const(_) | WeightOp::Lookup(..) | WeightOp::Neg(_) | WeightOp::Binary(..) => {
                f32::NAN
            }
        };
        (terms.slope.value(&leaf, nodes), terms.of_rests().map(|rest| rest.value(&leaf, nodes)))
    }

    /// Whether slopes and rests of a row are, which may be beyond all numbers where entries are 0.
    pub(super) fn lines_are_finite(&self, tensors: &[&[u8]], row: u32) -> bool {
        let Some(terms) = self.terms() else { return true };
        let mut nodes = Vec::new();
        (0..self.shape.cols).step_by(terms.run.unwrap_or(self.shape.cols) as usize).all(|col| {
            let (slope, rest) = self.line(terms, tensors, (row, col), &mut nodes);
            slope.is_finite() && rest.is_none_or(f32::is_finite)
        })
    }

    /// The product with each token's activations, tokens × rows, as [`crate::spec::terms`] says it: what every engine's is
    /// compared with.
    ///
    /// # Panics
    /// As [`Reader::integers`].
    pub fn product(&self, tensors: &[&[u8]], tokens: &[Activations]) -> Vec<f32> {
        let integers = self.integers(tensors);
        let terms = integers.terms;
        let (rows, cols) = (self.shape.rows as usize, self.shape.cols as usize);
        let planes = terms.planes() as usize;
        let (mut digits, mut numbers) = (Vec::new(), Numbers::default());
        let mut out = vec![0.0; rows * tokens.len()];
        for row in 0..rows {
            // Rows of a block are decoded together.
            let within = row % BLOCK as usize;
            let at_once = (BLOCK as usize).min(rows - (row - within));
            if within == 0 {
                digits.resize(cols * planes * at_once, 0);
                integers.digits(row as u32, &mut digits);
            }
            integers.numbers(row as u32, &mut numbers);
            for (token, x) in tokens.iter().enumerate() {
                let mut sum = 0i64;
                for (col, &q) in x.q.iter().enumerate() {
                    let digit = |p: usize| i64::from(digits[(p * at_once + within) * cols + col]) << (8 * p);
                    let integer =
                        (0..planes).map(digit).sum::<i64>() * i64::from(terms.times) + i64::from(terms.lowest);
                    let run = terms.run.map_or(0, |run| col / run as usize);
                    let rest = numbers.rests.get(run).copied().unwrap_or(0);
                    sum += (i64::from(numbers.slopes[run]) * integer + i64::from(rest)) * i64::from(q);
                }
                out[token * rows + row] = sum as f32 * numbers.factor * x.scale;
            }
        }
        out
    }

    /// Tensors of made-up bits whose floats are of moderate size, for measurements and tests.
    pub fn made(&self, seed: u64) -> Vec<Vec<u8>> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let format = self.format();
        let Some(layout) = format.layout(&self.layout) else { return Vec::new() };
        let mut out = Vec::new();
        for (t, (tensor, stored)) in layout.tensors.iter().zip(&self.tensors).enumerate() {
            let mut bytes: Vec<u8> = (0..stored.bytes).map(|_| word() as u8).collect();
            for (m, &(_, ty, count)) in tensor.members.iter().enumerate() {
                let field = layout.places.iter().find_map(|p| match p.target {
                    Target::Field(f) if (p.tensor, p.member) == (t, m) => Some(format.fields[f].ty),
                    Target::Field(_) | Target::Code | Target::Stream => None,
                });
                let ty = field.filter(|f| f.bits() == ty.bits()).unwrap_or(ty);
                let (size, first) = (ty.bits() as usize / 8, tensor.member_at(m) as usize / 8);
                let element = (tensor.element_bits() / 8).max(1) as usize;
                for element in bytes.chunks_exact_mut(element) {
                    for i in 0..count as usize {
                        let value = (word() % 255 + 1) as f32 / if word() % 4 == 0 { -4096.0 } else { 4096.0 };
                        let bits = match ty {
                            Number::F16 => f16::from_f32(value).to_bits().into(),
                            Number::Bf16 => bf16::from_f32(value).to_bits().into(),
                            Number::F32 => value.to_bits(),
                            Number::E8m0 => 118 + word() % 8,
                            Number::E4m3 | Number::E5m2 => word() & 0xbb,
                            Number::Unsigned(_) | Number::Signed(_) => continue,
                        };
                        element[first + i * size..][..size].copy_from_slice(&bits.to_le_bytes()[..size]);
                    }
                }
            }
            out.push(bytes);
        }
        out
    }
}

/// Each byte of digits, the lowest first.
pub(super) fn planes(digits: &[u32], planes: u32) -> Vec<Vec<u8>> {
    (0..planes).map(|plane| digits.iter().map(|d| (d >> (8 * plane)) as u8).collect()).collect()
}

/// What products take of a matrix; made once for all of its rows.
#[derive(Clone, Debug)]
pub struct Integers<'a> {
    reader: &'a Reader,
    terms: &'a Terms,
    tensors: Vec<&'a [u8]>,
    /// Of each byte the digits of all codes, code by code; none where they are made code by code.
    digits: Cow<'a, [Vec<u8>]>,
    /// What the factors of rows are multiplied with.
    factor: f32,
}

impl Integers<'_> {
    /// The matrix's shape.
    pub fn shape(&self) -> Shape {
        self.reader.shape
    }

    /// How products with it are computed.
    pub fn terms(&self) -> &Terms {
        self.terms
    }

    /// The digits of the entries of rows `first` and following, as many as `out` holds ([`Terms::bits`]): the lowest bytes of all of
    /// them row by row, then those of the next byte, and so on.
    ///
    /// # Panics
    /// If rows end before, or a tensor is shorter than it must be.
    pub fn digits(&self, first: u32, out: &mut [u8]) {
        let (reader, planes) = (self.reader, self.terms.planes() as usize);
        let cols = reader.shape.cols as usize;
        let rows = out.len() / (cols * planes).max(1);
        assert!(first + rows as u32 <= reader.shape.rows && out.len() == rows * cols * planes, "rows' digits");
        let v = reader.format().vector as usize;
        if let (Some(streams), Some(trellis)) = (&reader.streams, &reader.format().trellis) {
            reader.windows(streams, trellis, &self.tensors, first..first + rows as u32, |row, col, window, k| {
                for (plane, digits) in self.digits.iter().enumerate() {
                    out[(plane * rows + (row - first) as usize) * cols + col as usize] =
                        digits[window as usize * v + k];
                }
            });
        } else if self.digits.is_empty() {
            self.each_made(first, rows, out);
        } else {
            for (digits, out) in self.digits.iter().zip(out.chunks_mut(rows * cols)) {
                for (row, out) in (first..).zip(out.chunks_mut(cols)) {
                    if v > 1 {
                        for (k, out) in (0..).zip(out.chunks_mut(v)) {
                            let code = reader.code(&self.tensors, row, k) as usize;
                            out.copy_from_slice(&digits[code * v..][..out.len()]);
                        }
                    } else {
                        self.each_code(row, out, |code| digits[code as usize]);
                    }
                }
            }
        }
    }

    /// As [`Integers::digits`], of codes whose digits are not written out.
    fn each_made(&self, first: u32, rows: usize, out: &mut [u8]) {
        let (reader, terms, format) = (self.reader, self.terms, self.reader.format());
        let (cols, v) = (reader.shape.cols, format.vector as usize);
        let (mut room, mut made) = (Room::default(), vec![0; v]);
        for row in 0..rows {
            let (mut near, mut known) = (0, 0);
            for k in 0..cols / format.vector {
                format.integers(reader.code(&self.tensors, first + row as u32, k), &[], &mut room, &mut made);
                for (col, &integer) in (k * format.vector..).zip(&made) {
                    let mut value = round(integer as i32, terms.rounded);
                    if let Some(Near { times, add }) = &terms.near {
                        if col >= known {
                            let place = (first + row as u32, col);
                            near = (reader.value(add, &self.tensors, place.0, place.1) * *times as f32).round() as i32;
                            known =
                                col + add.fields().map(|f| reader.run(f, place.0, col) as u32).min().unwrap_or(cols);
                        }
                        value = value * times + near;
                    }
                    let digits = value.abs_diff(terms.lowest);
                    for plane in 0..terms.planes() as usize {
                        out[(plane * rows + row) * cols as usize + col as usize] = (digits >> (8 * plane)) as u8;
                    }
                }
            }
        }
    }

    /// The codes of `row`, of up to eight bits and a weight each.
    ///
    /// # Panics
    /// As [`Integers::digits`].
    pub fn codes(&self, row: u32, out: &mut [u8]) {
        assert!(row < self.reader.shape.rows && out.len() == self.reader.shape.cols as usize, "a row's codes");
        self.each_code(row, out, |code| code as u8);
    }

    /// What `of` makes of the codes of `row`, of a weight each.
    fn each_code(&self, row: u32, out: &mut [u8], of: impl Fn(u32) -> u8) {
        let mut codes = [0; CHUNK];
        for (k, out) in (0..).zip(out.chunks_mut(CHUNK)) {
            let codes = &mut codes[..out.len()];
            self.reader.chunk_codes(&self.tensors, row, k * CHUNK as u32, codes);
            out.iter_mut().zip(codes).for_each(|(o, c)| *o = of(*c));
        }
    }

    /// The code of group `k` of `row`; of a format without memory.
    pub fn code(&self, row: u32, k: u32) -> u32 {
        self.reader.code(&self.tensors, row, k)
    }

    /// The words of the stream of block (`i`, `j`), of a format whose codes have memory.
    pub fn stream(&self, i: u32, j: u32, words: &mut [u32]) {
        self.reader.stream(&self.tensors, i, j, words);
    }

    /// The table in which kernels look digits up; empty if there is none.
    pub fn book(&self) -> Vec<u16> {
        match &self.terms.stream {
            Some(Stream { digits: Digits::Book(book), vector, .. }) => match &book.digits {
                Some(digits) => digits.clone(),
                None => {
                    // The matrix's own have 16 bits.
                    let [low, high] = [0, 1].map(|plane| &self.digits[plane]);
                    let windows: Vec<u16> = low.iter().zip(high).map(|(l, h)| u16::from_le_bytes([*l, *h])).collect();
                    book.filled(*vector, &windows)
                }
            },
            Some(Stream { digits: Digits::Bytes { .. }, .. }) | None => Vec::new(),
        }
    }

    /// The numbers of field `f` of the [`Terms`] for a row, one for each `columns` of it.
    ///
    /// # Panics
    /// As [`Integers::digits`].
    pub fn kept(&self, f: usize, row: u32, columns: u32) -> Vec<f32> {
        let (reader, tensors) = (self.reader, &self.tensors);
        (0..reader.shape.cols)
            .step_by(columns as usize)
            .map(|col| reader.term(self.terms, tensors, f, row, col))
            .collect()
    }

    /// What the sums of `row` are multiplied with.
    ///
    /// # Panics
    /// As [`Integers::digits`].
    pub fn numbers(&self, row: u32, out: &mut Numbers) {
        let (terms, cols) = (self.terms, self.reader.shape.cols);
        let (mut slopes, mut rests, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        for col in (0..cols).step_by(terms.run.unwrap_or(cols) as usize) {
            let (slope, rest) = self.reader.line(terms, &self.tensors, (row, col), &mut nodes);
            slopes.push(slope);
            rests.extend(rest);
        }
        terms.numbers(cols, &slopes, &rests, out);
        out.factor *= self.factor;
    }
}

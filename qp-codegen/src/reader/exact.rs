//! What exact products take of a matrix of a format: integers of entries, and the numbers of runs ([`Terms`]).

use std::sync::Arc;

use half::{bf16, f16};

use super::{CHUNK, Reader};
use crate::reference::Activations;
use crate::spec::format::{Number, Target, Weight};
use crate::spec::terms::{BLOCK, Numbers, Terms};

impl Reader {
    /// How products with the matrix are computed exactly, if they are.
    pub fn terms(&self) -> Option<&Arc<Terms>> {
        self.book.terms.as_ref().ok().filter(|terms| terms.fits(self.shape.cols))
    }

    /// The digits of the entries of rows `first` and following, as many as `out` holds ([`Terms::bits`]): the lowest bytes of all of
    /// them row by row, then those of the next byte, and so on.
    ///
    /// # Panics
    /// If the format has no terms, rows end before, or a tensor is shorter than it must be.
    pub fn digits(&self, tensors: &[&[u8]], first: u32, out: &mut [u8]) {
        let cols = self.shape.cols as usize;
        let rows = out.len() / (cols * self.book.digits.len()).max(1);
        assert!(
            first + rows as u32 <= self.shape.rows && out.len() == rows * cols * self.book.digits.len(),
            "rows' digits"
        );
        if let (Some(streams), Some(trellis)) = (&self.streams, &self.format().trellis) {
            self.windows(streams, trellis, tensors, first..first + rows as u32, |row, col, window| {
                for (plane, digits) in self.book.digits.iter().enumerate() {
                    out[(plane * rows + (row - first) as usize) * cols + col as usize] = digits[window as usize];
                }
            });
            return;
        }
        let v = self.format().vector as usize;
        for (digits, out) in self.book.digits.iter().zip(out.chunks_mut(rows * cols)) {
            for (row, out) in (first..).zip(out.chunks_mut(cols)) {
                if v > 1 {
                    for (k, out) in (0..).zip(out.chunks_mut(v)) {
                        let code = self.code(tensors, row, k) as usize;
                        out.copy_from_slice(&digits[code * v..][..out.len()]);
                    }
                } else {
                    self.each_code(tensors, row, out, |code| digits[code as usize]);
                }
            }
        }
    }

    /// The codes of `row`, of up to eight bits and a weight each.
    ///
    /// # Panics
    /// As [`Reader::digits`].
    pub fn row_codes(&self, tensors: &[&[u8]], row: u32, out: &mut [u8]) {
        assert!(row < self.shape.rows && out.len() == self.shape.cols as usize, "a row's codes");
        self.each_code(tensors, row, out, |code| code as u8);
    }

    /// What `of` makes of the codes of `row`, of a weight each.
    fn each_code(&self, tensors: &[&[u8]], row: u32, out: &mut [u8], of: impl Fn(u32) -> u8) {
        let mut codes = [0; CHUNK];
        for (k, out) in (0..).zip(out.chunks_mut(CHUNK)) {
            let codes = &mut codes[..out.len()];
            self.chunk_codes(tensors, row, k * CHUNK as u32, codes);
            out.iter_mut().zip(codes).for_each(|(o, c)| *o = of(*c));
        }
    }

    /// The value of field `f` of the [`Terms`] that covers the weight (row, col).
    fn term(&self, terms: &Terms, tensors: &[&[u8]], f: usize, row: u32, col: u32) -> f32 {
        self.field(tensors, terms.fields[f].0, row, col).1
    }

    /// The numbers of field `f` of the [`Terms`] for a row, one for each `columns` of it.
    ///
    /// # Panics
    /// As [`Reader::digits`].
    pub fn kept(&self, tensors: &[&[u8]], f: usize, row: u32, columns: u32) -> Vec<f32> {
        let terms = self.terms().expect("a format with terms");
        (0..self.shape.cols).step_by(columns as usize).map(|col| self.term(terms, tensors, f, row, col)).collect()
    }

    /// What the sums of `row` are multiplied with.
    ///
    /// # Panics
    /// As [`Reader::digits`].
    pub fn numbers(&self, tensors: &[&[u8]], row: u32, out: &mut Numbers) {
        let terms = self.terms().expect("a format with terms");
        let (mut slopes, mut rests, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        let mut values = vec![0.0; terms.fields.len()];
        for col in (0..self.shape.cols).step_by(terms.run.unwrap_or(self.shape.cols) as usize) {
            (0..).zip(&mut values).for_each(|(f, value)| *value = self.term(terms, tensors, f, row, col));
            slopes.push(terms.slope.value(&|f| values[f], &mut nodes));
            rests.extend(terms.of_rests().map(|rest| rest.value(&|f| values[f], &mut nodes)));
        }
        terms.numbers(self.shape.cols, &slopes, &rests, out);
    }

    /// Whether slopes and rests of a row are, which may be beyond all numbers where entries are 0.
    pub(super) fn lines_are_finite(&self, tensors: &[&[u8]], row: u32) -> bool {
        let Some(terms) = self.terms() else { return true };
        let mut nodes = Vec::new();
        (0..self.shape.cols).step_by(terms.run.unwrap_or(self.shape.cols) as usize).all(|col| {
            let field = |f: usize| self.term(terms, tensors, f, row, col);
            let mut finite = |w: &Weight| w.value(&field, &mut nodes).is_finite();
            finite(&terms.slope) && terms.rest.as_ref().is_none_or(finite)
        })
    }

    /// The product with each token's activations, tokens × rows, as [`crate::spec::terms`] says it: what every engine's is
    /// compared with.
    ///
    /// # Panics
    /// As [`Reader::digits`].
    pub fn product(&self, tensors: &[&[u8]], tokens: &[Activations]) -> Vec<f32> {
        let terms = self.terms().expect("a format with terms").clone();
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
                self.digits(tensors, row as u32, &mut digits);
            }
            self.numbers(tensors, row as u32, &mut numbers);
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

//! What is done to activations and results, applied to the weights.
//!
//! With the activations' steps I₁ … Iₘ and the results' O₁ … Oₙ the matrix is Oₙ … O₁ · W · Iₘ … I₁. Each row of W is
//! multiplied by Iₘ first; each column of what results by O₁ first. Every operation is rounded to single precision. A
//! Hadamard transform adds and subtracts neighbours at distance 1, 2, 4 …, and multiplies by its norm at last.

use super::places::read;
use super::{Misfit, Reader};
use crate::layout;
use crate::reference::{Activations, quantize_activations};
use crate::spec::format::{Format, Step};
use crate::spec::terms::Side;
use crate::spec::{Shape, index::gcd};

/// A step with the numbers of a matrix.
enum Turn {
    /// Products, one each.
    Scale(Vec<f32>),
    /// Transforms of so many neighbours.
    Hadamard(usize),
    /// Where numbers come from; nothing if that is no permutation.
    Permute(Option<Vec<usize>>),
}

/// The steps of both sides, ready for some rows.
pub(super) struct Sides {
    input: Vec<Turn>,
    output: Vec<Turn>,
}

/// Rows that cannot be read apart; an error if `shape` is none for which the steps exist.
pub(super) fn rows_together(format: &Format, shape: Shape) -> Result<u32, Misfit> {
    let check = |what: &'static str, size: u32, of: u32| match size.is_multiple_of(of) {
        true => Ok(()),
        false => Err(Misfit::Side { what, size, wanted: format!("no multiple of {of}") }),
    };
    let transforms = |what: &'static str, size: u32, steps: &[Step]| -> Result<u32, Misfit> {
        let mut most = 1;
        for step in steps {
            most = match *step {
                Step::Hadamard(Some(n)) => {
                    check(what, size, n)?;
                    n.max(most)
                }
                Step::Hadamard(None) if !size.is_power_of_two() => {
                    return Err(Misfit::Side { what, size, wanted: "no power of two".into() });
                }
                Step::Hadamard(None) | Step::Permute(_) => size,
                Step::Field(_) | Step::Signs(_) => most,
            };
        }
        Ok(most)
    };
    transforms("columns", shape.cols, &format.input)?;
    let together = transforms("rows", shape.rows, &format.output)?;
    let block = match &format.trellis {
        Some(t) => {
            check("rows", shape.rows, t.block.rows)?;
            check("columns", shape.cols, t.block.cols)?;
            t.block.rows
        }
        None => 1,
    };
    // The rows are a multiple of both.
    Ok(together / gcd(together.into(), block.into()) as u32 * block)
}

/// Orthonormal Hadamard transforms of `n` neighbours, each of `inner` numbers that are transformed apart.
fn hadamard(x: &mut [f32], n: usize, inner: usize) {
    let norm = (1.0 / (n as f64).sqrt()) as f32;
    for group in x.chunks_exact_mut(n * inner) {
        let mut stride = inner;
        while stride < group.len() {
            for pair in group.chunks_exact_mut(2 * stride) {
                let (lo, hi) = pair.split_at_mut(stride);
                for (u, v) in lo.iter_mut().zip(hi) {
                    (*u, *v) = (*u + *v, *u - *v);
                }
            }
            stride *= 2;
        }
        group.iter_mut().for_each(|x| *x *= norm);
    }
}

/// What is done to a token's activations, or its results, by the side of a format whose products are exact.
#[derive(Clone, Debug, PartialEq)]
pub struct Turned {
    /// One a number, or none.
    pub factors: Vec<f32>,
    /// Numbers that a transform mixes.
    pub mixed: Option<u32>,
}

impl Turned {
    /// Activations as they enter the product: factors, then transforms.
    pub fn enter(&self, x: &mut [f32]) {
        x.iter_mut().zip(&self.factors).for_each(|(x, f)| *x *= f);
        self.mix(x);
    }

    /// A token's activations as a product takes them: entered, then rounded.
    pub fn entered(&self, x: &[f32]) -> Activations {
        let mut x = x.to_vec();
        self.enter(&mut x);
        quantize_activations(&x)
    }

    /// Results as they leave it: transforms, then factors.
    pub fn leave(&self, y: &mut [f32]) {
        self.mix(y);
        y.iter_mut().zip(&self.factors).for_each(|(y, f)| *y *= f);
    }

    fn mix(&self, x: &mut [f32]) {
        if let Some(n) = self.mixed {
            hadamard(x, n as usize, 1);
        }
    }
}

impl Reader {
    /// What is done to activations and results, of a format with terms.
    pub fn turned(&self, tensors: &[&[u8]]) -> Option<[Turned; 2]> {
        let sides = self.terms()?.sides;
        let turned = |side: Side, all: u32| {
            let number =
                |f: usize, i: u32| self.format().fields[f].ty.value(read(&self.fields[f], tensors, i.into(), 0));
            let factors = side.field.map_or(Vec::new(), |f| (0..all).map(|i| number(f, i)).collect());
            Turned { factors, mixed: side.hadamard.map(|n| n.unwrap_or(all)) }
        };
        Some([turned(sides.input, self.shape.cols), turned(sides.output, self.shape.rows)])
    }

    /// The steps for rows `first` and so many more.
    pub(super) fn sides(&self, tensors: &[&[u8]], first: u32, rows: u32) -> Sides {
        let format = self.format();
        let raw = |f: usize, i: u32| read(&self.fields[f], tensors, i.into(), 0);
        let turn = |step: &Step, all: u32, from: u32, count: u32| match *step {
            Step::Field(f) => {
                let ty = format.fields[f].ty;
                Turn::Scale((from..from + count).map(|i| ty.value(raw(f, i))).collect())
            }
            Step::Hadamard(n) => Turn::Hadamard(n.unwrap_or(all) as usize),
            Step::Signs(seed) => {
                let signs = layout::signs(seed, from + count);
                Turn::Scale(signs[from as usize..].iter().map(|s| if *s { -1.0 } else { 1.0 }).collect())
            }
            Step::Permute(f) => {
                let from: Vec<usize> = (0..all).map(|i| raw(f, i) as usize).collect();
                let mut taken = vec![false; all as usize];
                let once = |&i: &usize| taken.get_mut(i).is_some_and(|t| !std::mem::replace(t, true));
                Turn::Permute(from.iter().all(once).then_some(from))
            }
        };
        let Shape { rows: all_rows, cols } = self.shape;
        Sides {
            input: format.input.iter().map(|s| turn(s, cols, 0, cols)).collect(),
            output: format.output.iter().map(|s| turn(s, all_rows, first, rows)).collect(),
        }
    }

    /// Applies the steps to whole rows, those for which `sides` are.
    pub(super) fn apply(&self, sides: &Sides, x: &mut [f32]) {
        let cols = self.shape.cols as usize;
        for row in x.chunks_exact_mut(cols) {
            for turn in sides.input.iter().rev() {
                match turn {
                    Turn::Scale(f) => row.iter_mut().zip(f).for_each(|(x, f)| *x *= f),
                    Turn::Hadamard(n) => hadamard(row, *n, 1),
                    Turn::Permute(None) => row.fill(f32::NAN),
                    Turn::Permute(Some(from)) => {
                        let before = row.to_vec();
                        from.iter().zip(before).for_each(|(&i, x)| row[i] = x);
                    }
                }
            }
        }
        for turn in &sides.output {
            match turn {
                Turn::Scale(f) => {
                    for (row, f) in x.chunks_exact_mut(cols).zip(f) {
                        row.iter_mut().for_each(|x| *x *= f);
                    }
                }
                Turn::Hadamard(n) => hadamard(x, *n, cols),
                Turn::Permute(None) => x.fill(f32::NAN),
                Turn::Permute(Some(from)) => {
                    let before = x.to_vec();
                    for (row, &i) in x.chunks_exact_mut(cols).zip(from) {
                        row.copy_from_slice(&before[i * cols..][..cols]);
                    }
                }
            }
        }
    }

    /// Rows that are best read together, with [`Reader::read_rows`] from a multiple of them on: what is done once for all of
    /// them is done for each part otherwise.
    pub fn band(&self) -> u32 {
        let once = match self.format() {
            f if !f.numbers.is_empty() => 64,
            f if f.has_sides() || f.trellis.is_some() => 16,
            _ => 1,
        };
        let together = self.together;
        (together * u32::max(once / together, 1)).min(self.shape.rows)
    }

    /// Whole rows from row `first` on, as many as `out` holds.
    ///
    /// # Panics
    /// If there are not so many, or a tensor is shorter than it must be.
    pub fn read_rows(&self, tensors: &[&[u8]], first: u32, out: &mut [f32]) {
        let cols = self.shape.cols as usize;
        let end = first + (out.len() / cols) as u32;
        assert!(out.len().is_multiple_of(cols) && end <= self.shape.rows, "rows of the matrix");
        let mut entries = self.entries(tensors);
        let (mut at, mut out) = (first, out);
        while at < end {
            let begin = at / self.together * self.together;
            let next = begin + self.together;
            let (part, rest) = out.split_at_mut((next.min(end) - at) as usize * cols);
            if (at, next) == (begin, next.min(end)) {
                self.rows_of(tensors, begin, &mut entries, part);
            } else {
                let mut all = vec![0.0; self.together as usize * cols];
                self.rows_of(tensors, begin, &mut entries, &mut all);
                part.copy_from_slice(&all[(at - begin) as usize * cols..][..part.len()]);
            }
            (at, out) = (next.min(end), rest);
        }
    }

    /// Rows `first` and following that cannot be read apart.
    fn rows_of(&self, tensors: &[&[u8]], first: u32, entries: &mut super::Entries<'_>, out: &mut [f32]) {
        let cols = self.shape.cols as usize;
        let rows = (out.len() / cols) as u32;
        let mut scratch = self.scratch();
        match (&self.streams, &self.format().trellis) {
            (Some(streams), Some(trellis)) => {
                let high = trellis.block.rows as usize;
                let mut made = vec![0.0; high * cols];
                let blocks = first / trellis.block.rows..;
                for (i, out) in blocks.zip(out.chunks_exact_mut(high * cols)) {
                    self.block_row(streams, trellis, tensors, i, entries, &mut made);
                    let given = (i * trellis.block.rows..).zip(made.chunks_exact(cols));
                    for ((row, given), out) in given.zip(out.chunks_exact_mut(cols)) {
                        self.row(tensors, row, 0, super::Source::Given(given), out, &mut scratch);
                    }
                }
            }
            _ => {
                for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
                    self.row(tensors, row, 0, super::Source::Codes(entries), out, &mut scratch);
                }
            }
        }
        if self.format().has_sides() {
            self.apply(&self.sides(tensors, first, rows), out);
        }
    }

    /// True if each weight follows from its code and fields alone.
    pub(super) fn is_plain(&self) -> bool {
        self.streams.is_none() && !self.format().has_sides()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::reader::Book;
    use crate::spec::load_str;

    /// A reader of the layout of a text's format.
    fn reader(text: &str, rows: u32, cols: u32) -> Result<Reader, Misfit> {
        let library = load_str("test", text).unwrap_or_else(|e| panic!("{e}"));
        let format = library.formats[0].clone();
        let layout = format.layouts[0].clone();
        Reader::new(&Arc::new(Book::new(format)), &layout, Shape { rows, cols })
    }

    const SIDES: &str = "
        quantizer q {
            bits 8
            values i8
            decode w { [(w ^ 128) - 128] }
            field f : f16 per column
            field p : u8 per column
            field g : f16 per row
            field r : u8 per row
            input permute(p), f
            output permute(r), g
        }
        layout l of q {
            tensor w : u8[rows, cols]
            tensor f : f16[cols]
            tensor p : u8[cols]
            tensor g : f16[rows]
            tensor r : u8[rows]
            code(i, j) in w[i, j]
            f(j) in f[j]
            p(j) in p[j]
            g(i) in g[i]
            r(i) in r[i]
        }";

    #[test]
    fn sides_are_those_of_a_product() {
        let reader = reader(SIDES, 2, 4).unwrap();
        let w = [1u8, 2, 3, 4, 255, 6, 7, 250];
        let halves = |x: &[f32]| x.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect::<Vec<u8>>();
        let (f, p, g, r) = ([2.0f32, -1.0, 0.5, 4.0], [2u8, 0, 3, 1], [10.0f32, 0.25], [1u8, 0]);
        let (fs, gs) = (halves(&f), halves(&g));
        let mut out = vec![0.0; 8];
        reader.read_rows(&[&w, &fs, &p, &gs, &r], 0, &mut out);
        // What is done to a token's activations and results, for each column's unit.
        for column in 0..4 {
            let x: Vec<f32> = (0..4).map(|i| f32::from(i == column)).collect();
            let x: Vec<f32> = (0..4).map(|i| x[p[i] as usize] * f[i]).collect();
            let of = |row: usize| (0..4).map(|i| f32::from(w[4 * row + i] as i8) * x[i]).sum::<f32>();
            let y: Vec<f32> = (0..2).map(|i| of(r[i] as usize) * g[i]).collect();
            assert_eq!([out[column], out[4 + column]], y[..]);
        }
        let mut one = vec![0.0; 2];
        reader.read(&[&w, &fs, &p, &gs, &r], 1, 1, &mut one);
        assert_eq!(one, out[5..7]);
        // What is no permutation makes nothing that looks like weights.
        for (p, r) in [([0u8, 0, 3, 1], [1u8, 0]), ([0, 4, 3, 1], [1, 0]), ([2, 0, 3, 1], [1, 1])] {
            assert!(!reader.is_finite(&[&w, &fs, &p, &gs, &r], 0..2));
            reader.read_rows(&[&w, &fs, &p, &gs, &r], 0, &mut out);
            assert!(out.iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn sides_that_have_no_transform_are_refused() {
        let text = "
            quantizer q {
                window 6
                vector 1
                step 2
                block 4 x 8
                order p { [p % 4, p / 4] }
                values i8
                decode w { [w] }
                input signs(seed = 1), hadamard
                output hadamard(8)
            }
            layout l of q {
                tensor s : u32[rows / 4, cols / 8, 2]
                stream(i, j)[b] in s[i, j, b / 32] bit b % 32
            }";
        let why = |rows, cols| reader(text, rows, cols).unwrap_err().to_string();
        assert_eq!(why(16, 24), "24 columns are no power of two");
        assert_eq!(why(12, 32), "12 rows are no multiple of 8");
        assert_eq!(why(8, 4), "4 columns are no multiple of 8");
        let reader = reader(text, 16, 16).unwrap();
        assert_eq!(reader.band(), 16);
        let bytes: Vec<u8> = (0..64u8).map(|i| i.wrapping_mul(77)).collect();
        let mut all = vec![0.0; 256];
        reader.read_rows(&[&bytes], 0, &mut all);
        // Rows of a part of a band, and over its end.
        let mut some = vec![0.0; 9 * 16];
        reader.read_rows(&[&bytes], 3, &mut some);
        assert_eq!(some, all[3 * 16..12 * 16]);
        // By the definition: the sum over both transforms of signs and entries.
        let stream = |i: usize, j: usize, b: usize| bytes[8 * (2 * i + j) + b % 64 / 8] >> (b % 8) & 1;
        let entry = |r: usize, c: usize| {
            let p = c % 8 * 4 + r % 4;
            let window = (0..6).fold(0u8, |w, b| w | stream(r / 4, c / 8, 2 * p + b) << b);
            f64::from(window)
        };
        let sign = |a: usize, b: usize| if (a & b).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
        let signs = layout::signs(1, 16);
        for (r, c) in [(0, 0), (5, 9), (15, 15), (8, 3)] {
            let first = r / 8 * 8;
            let mut sum = 0.0;
            for (i, j) in (0..8).flat_map(|i| (0..16).map(move |j| (i, j))) {
                sum += sign(r % 8, i) * entry(first + i, j) * sign(j, c);
            }
            let expected = sum / 8f64.sqrt() / 4.0 * if signs[c] { -1.0 } else { 1.0 };
            assert!((f64::from(all[r * 16 + c]) - expected).abs() < 1e-4, "{r} {c}: {} {expected}", all[r * 16 + c]);
        }
    }

    #[test]
    fn tables_of_vectors_are_summed_exactly() {
        let text = "
            quantizer q {
                bits 2 for 2
                table a[2] : f16 per matrix
                table b[2] : f16 per matrix
                decode w { negate(a[w[0]] - b[w[1]], w) }
            }
            layout l of q {
                tensor q : u8[rows, cols / 8]
                tensor a : f16[2, 2]
                tensor b : f16[2, 2]
                code(r, k) in q[r, k / 4] bit k % 4 * 2
                a(i, v) in a[i, v]
                b(i, v) in b[i, v]
            }";
        let reader = reader(text, 1, 8).unwrap();
        let halves = |x: [f32; 4]| x.map(|x| half::f16::from_f32(x).to_le_bytes()).concat();
        let (a, b) = (halves([1.0, 2.0, 60000.0, -5.0]), halves([2f32.powi(-24), 0.5, -60000.0, 3.0]));
        let mut out = [0.0; 8];
        // Codes 0, 1, 2, 3.
        reader.read_rows(&[&[0b1110_0100], &a, &b], 0, &mut out);
        // 1 - 2^-24 has 24 bits.
        assert_eq!(out, [1.0 - 2f32.powi(-24), 1.5, -60000.0, -5.5, 60001.0, 1.0, -120000.0, 8.0]);
        let infinite = halves([1.0, f32::INFINITY, 0.0, 0.0]);
        assert!(reader.is_finite(&[&[0b1110_0100], &a, &b], 0..1));
        assert!(!reader.is_finite(&[&[0b1110_0100], &infinite, &b], 0..1));
    }
}

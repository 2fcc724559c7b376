//! What is done to activations and results, applied to the weights.
//!
//! With the activations' steps I₁ … Iₘ and the results' O₁ … Oₙ the matrix is Oₙ … O₁ · W · Iₘ … I₁. Each row of W is
//! multiplied by Iₘ first; each column of what results by O₁ first. Every operation is rounded to single precision. A
//! Hadamard transform adds and subtracts neighbours at distance 1, 2, 4 …, and multiplies by its norm at last.

use super::places::read;
use super::{Misfit, Reader};
use crate::layout;
use crate::spec::format::{Format, Step};
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

impl Reader {
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

//! Data-aware rounding: errors of columns that are encoded are made good by those that are not yet.
//!
//! What a layer's output suffers from errors E = W − Ŵ of its weights is tr(E·H·Eᵀ), with H = Σ x·xᵀ over its inputs. With
//!
//! ```text
//! H = (I + U)·D·(I + U)ᵀ,    U strictly upper and D diagonal, by groups of columns,
//! ```
//!
//! that is Σ over groups of tr(η·D·ηᵀ), η = E·(I + U). So group after group is encoded, each as the target
//! W + E·U, of which only groups before it have a part, and what is left of its error is η: independent of what came
//! before, and weighted by D, which is smaller than H's own diagonal the more the inputs are correlated. This is the
//! block LDLQ of QuIP# ([arXiv 2402.04396](https://arxiv.org/abs/2402.04396), section 4.1), whose groups, as those of
//! QTIP ([arXiv 2406.11235](https://arxiv.org/abs/2406.11235)), are the columns of a trellis block; of a code without
//! memory, whose weights do not depend on each other, they are the few columns of a **piece** of a block.

use qp_codegen::layout;
use qp_codegen::spec::Code;
use rayon::prelude::*;

use crate::matrix::{View, multiply};

/// Added to the diagonal of H, relative to its mean: inputs that the calibration has not seen may come.
const DAMPING: f64 = 0.01;
/// Rows of a task.
const ROWS: usize = 64;

/// Σ x·xᵀ over inputs x of a layer.
#[derive(Clone, Debug)]
pub struct Hessian {
    columns: usize,
    /// `columns²` sums, of which those on and above the diagonal count.
    sums: Vec<f32>,
}

impl Hessian {
    /// No inputs yet, of `columns` values each.
    pub fn new(columns: usize) -> Self {
        Hessian { columns, sums: vec![0.0; columns * columns] }
    }

    /// Values of an input.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Adds inputs: tokens × columns.
    pub fn add(&mut self, x: &[f32]) {
        let n = self.columns;
        let tokens = x.len() / n;
        self.sums.par_chunks_mut(ROWS * n).enumerate().for_each(|(i, out)| {
            let from = i * ROWS;
            let x = View::rows(&x[from..], n);
            multiply([out.len() / n, n - from, tokens], &mut out[from..], n, 1.0, x.transposed(), x, 1.0);
        });
    }

    /// Mean of the diagonal; not finite if a sum on it is not.
    pub fn mean(&self) -> f64 {
        let n = self.columns;
        (0..n).map(|i| f64::from(self.sums[i * n + i])).sum::<f64>() / n as f64
    }
}

/// How a block is cut into pieces, encoded one after the other: no column has weights in two of them. A block of a
/// trellis is one piece.
#[derive(Clone, Debug, PartialEq)]
pub struct Pieces {
    /// Columns of a block.
    width: usize,
    /// For each piece, where its weights end in the block's stream, and its columns.
    parts: Vec<(usize, Vec<usize>)>,
}

impl Pieces {
    /// Cuts the blocks of `code`.
    pub fn new(code: &Code) -> Self {
        let columns: Vec<usize> = (0..code.weights()).map(|p| layout::position(code.block, 0, p).1 as usize).collect();
        let mut parts: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut begin = 0;
        // Vectors have up to 4 weights.
        let step = if code.is_memoryless() { 4 } else { columns.len() };
        for end in (step..=columns.len()).step_by(step) {
            let (piece, later) = (&columns[begin..end], &columns[end..]);
            if !piece.iter().any(|c| later.contains(c)) {
                let mut all = piece.to_vec();
                all.sort_unstable();
                all.dedup();
                parts.push((end, all));
                begin = end;
            }
        }
        Pieces { width: code.block.cols as usize, parts }
    }

    /// Cuts blocks of one row and `width` columns into neighbours of `vector` columns.
    pub fn of_columns(width: usize, vector: usize) -> Self {
        let parts = (vector..=width).step_by(vector).map(|end| (end, (end - vector..end).collect()));
        Pieces { width, parts: parts.collect() }
    }

    /// Columns of a block.
    pub fn width(&self) -> usize {
        self.width
    }

    /// For each piece, where its weights end in the block's stream, and its columns in the block.
    pub fn parts(&self) -> &[(usize, Vec<usize>)] {
        &self.parts
    }
}

/// The matrix U for blocks that are cut into pieces.
#[derive(Clone, Debug)]
pub struct Feedback {
    columns: usize,
    pieces: Pieces,
    /// `columns²` factors; those of a column's own piece and of later ones are 0, or, in other blocks, of no meaning.
    factors: Vec<f32>,
}

impl Feedback {
    /// U of `hessian`; `None` if that is zero, for then nothing matters. Its sums must be finite.
    pub fn new(hessian: &Hessian, pieces: &Pieces) -> Option<Self> {
        let (n, b) = (hessian.columns, pieces.width);
        let mean = hessian.mean();
        if mean <= 0.0 {
            return None;
        }
        let floor = mean * DAMPING;
        let mut a = hessian.sums.clone();
        for k in (0..n.div_ceil(b)).rev() {
            let first = k * b;
            let width = b.min(n - first);
            // In the order of the stream.
            let order: Vec<&[usize]> = pieces.parts.iter().map(|(_, c)| c.as_slice()).collect();
            let groups: Vec<Vec<usize>> = order
                .iter()
                .map(|c| c.iter().copied().filter(|&c| c < width).collect::<Vec<_>>())
                .filter(|c| !c.is_empty())
                .collect();
            let order: Vec<usize> = groups.concat();
            let mut d = vec![0f64; width * width];
            for (i, &r) in order.iter().enumerate() {
                for (j, &c) in order.iter().enumerate() {
                    let (low, high) = (first + r.min(c), first + r.max(c));
                    d[i * width + j] = f64::from(a[low * n + high]) + if i == j { floor } else { 0.0 };
                }
            }
            cholesky(&mut d, width, floor);
            let inverse = invert(&d, width);
            let within = divide_groups(&d, &inverse, width, &groups);

            // The columns of the root, for all rows above: H = root · dᵀ.
            let above = first;
            let mut root = vec![0f32; above * width];
            let back: Vec<f32> = (0..width * width)
                .map(|i| {
                    // Rows of the matrix as it lies, columns in the order of the stream.
                    let (r, c) = (i / width, i % width);
                    let r = order.iter().position(|&o| o == r).expect("every column is in a piece");
                    inverse[c * width + r] as f32
                })
                .collect();
            root.par_chunks_mut(ROWS * width).enumerate().for_each(|(i, out)| {
                let h = View::rows(&a[i * ROWS * n + first..], n);
                multiply([out.len() / width, width, width], out, width, 0.0, h, View::rows(&back, width), 1.0);
            });
            let (rows, rest) = a.split_at_mut(above * n);
            rows.par_chunks_mut(ROWS * n).enumerate().for_each(|(i, out)| {
                let (from, count) = (i * ROWS, out.len() / n);
                let left = View::rows(&root[from * width..], width);
                let right = View::rows(&root[from * width..], width).transposed();
                multiply([count, above - from, width], &mut out[from..], n, 1.0, left, right, -1.0);
                // The root is not needed any more once it is divided by its own groups, columns as they lie.
                let mut divided = vec![0f32; count * width];
                let by = View::rows(&within.divisors, width);
                multiply([count, width, width], &mut divided, width, 0.0, left, by, 1.0);
                for (out, divided) in out.chunks_exact_mut(n).zip(divided.chunks_exact(width)) {
                    order.iter().zip(divided).for_each(|(&c, v)| out[first + c] = *v);
                }
            });
            for (i, &r) in order.iter().enumerate() {
                for (j, &c) in order.iter().enumerate() {
                    rest[r * n + first + c] = within.factors[i * width + j];
                }
            }
        }
        Some(Feedback { columns: n, pieces: pieces.clone(), factors: a })
    }

    /// How blocks are cut.
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// Adds to `targets` (rows × `width`), which are columns `first..` of the matrix and begin a block, what the
    /// `errors` (rows × columns) of all columns before ask for.
    pub fn from_before(&self, first: usize, width: usize, errors: &[f32], targets: &mut [f32]) {
        let n = self.columns;
        let factors = View::rows(&self.factors[first..], n);
        targets.par_chunks_mut(ROWS * width).zip(errors.par_chunks(ROWS * n)).for_each(|(out, errors)| {
            multiply([out.len() / width, width, first], out, width, 1.0, View::rows(errors, n), factors, 1.0);
        });
    }

    /// What an error of column `first + column` asks of each column of its block, which begins at `first`; nothing if it is
    /// padding.
    pub fn within(&self, first: usize, column: usize) -> &[f32] {
        let n = self.columns;
        let width = self.pieces.width.min(n - first);
        if column < width { &self.factors[(first + column) * n + first..][..width] } else { &[] }
    }
}

/// A block's own part of U, and what the rows above are multiplied by.
struct Within {
    factors: Vec<f32>,
    divisors: Vec<f32>,
}

/// From the root of a block and its inverse: root · (the root's blocks on the diagonal)⁻¹ − I, and those blocks'
/// inverses, all in the order of the stream.
fn divide_groups(root: &[f64], inverse: &[f64], n: usize, groups: &[Vec<usize>]) -> Within {
    let mut out = Within { factors: vec![0.0; n * n], divisors: vec![0.0; n * n] };
    let mut at = 0;
    for group in groups {
        let end = at + group.len();
        for c in at..end {
            // The inverse of a triangular matrix has its diagonal blocks' inverses on the diagonal.
            for r in at..end {
                out.divisors[r * n + c] = inverse[r * n + c] as f32;
            }
            for r in 0..at {
                out.factors[r * n + c] = (at..end).map(|k| root[r * n + k] * inverse[k * n + c]).sum::<f64>() as f32;
            }
        }
        at = end;
    }
    out
}

/// Replaces the symmetric `a` by its upper triangular root: a = root · rootᵀ. Rounding may have taken from the diagonal
/// what was added to it; it never counts less than half of `floor`.
fn cholesky(a: &mut [f64], n: usize, floor: f64) {
    for j in (0..n).rev() {
        let pivot = a[j * n + j].max(floor / 2.0).sqrt();
        a[j * n + j] = pivot;
        for i in 0..j {
            a[i * n + j] /= pivot;
        }
        for i in 0..j {
            let factor = a[i * n + j];
            for k in 0..=i {
                a[k * n + i] -= factor * a[k * n + j];
            }
        }
    }
    for i in 1..n {
        a[i * n..i * n + i].fill(0.0);
    }
}

/// The inverse of an upper triangular matrix.
fn invert(u: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0f64; n * n];
    for c in 0..n {
        for r in (0..=c).rev() {
            let sum: f64 = (r + 1..=c).map(|k| u[r * n + k] * out[k * n + c]).sum();
            out[r * n + c] = (if r == c { 1.0 } else { 0.0 } - sum) / u[r * n + r];
        }
    }
    out
}

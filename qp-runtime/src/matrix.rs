//! Products of `f32` matrices, on one thread.
//!
//! A product's bits depend on its shape and the machine's vector instructions, so work that is cut into products by
//! shapes alone gives the same bits for every number of threads.

use gemm::Parallelism;

/// A matrix in a slice: the element (r, c) is `data[r * row + c * column]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The elements, and maybe others between them.
    pub data: &'a [f32],
    /// Distance from one row to the next.
    pub row: usize,
    /// Distance from one column to the next.
    pub column: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix whose rows begin `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        View { data, row: stride, column: 1 }
    }

    /// The same elements, rows as columns.
    pub fn transposed(self) -> Self {
        View { row: self.column, column: self.row, ..self }
    }

    /// True if all elements of a `rows × columns` matrix lie in the slice.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        if rows == 0 || columns == 0 {
            return true;
        }
        let last = (rows - 1)
            .checked_mul(self.row)
            .and_then(|row| (columns - 1).checked_mul(self.column).and_then(|column| row.checked_add(column)));
        last.is_some_and(|last| last < self.data.len())
    }
}

/// `out = keep · out + factor · a · b`, with `a` m × k, `b` k × n and `out` row-major m × n, its rows `stride` apart. With
/// `keep` 0, `out` is not read.
pub fn multiply(
    [m, n, k]: [usize; 3],
    out: &mut [f32],
    stride: usize,
    keep: f32,
    a: View<'_>,
    b: View<'_>,
    factor: f32,
) {
    let target = View::rows(out, stride);
    assert!(stride >= n && target.holds(m, n) && a.holds(m, k) && b.holds(k, n), "whole matrices");
    // SAFETY: the strides address elements of the three slices alone, as was just checked, and `out` is borrowed
    // mutably and so overlaps neither input; its rows do not overlap either.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            keep,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

//! Products with rows of unquantized weights, by the machine's vector instructions.

use qp_codegen::kernels::dense;
use rayon::prelude::*;

use super::simd::for_each_instruction_set;

for_each_instruction_set! {
    /// The products of one row of weights with each token's inputs (tokens × the row's length), in the order of operations
    /// of [`dense::reference`], which no instruction set changes: vectors hold the strided sums that it keeps apart.
    pub fn row_products[R](row: &[f32], x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x.chunks_exact(row.len().max(1))) {
            *out = dense::reference(row, x);
        }
    }
}

/// Results, rows × `tokens`, as tokens × rows. Products are computed the first way, so that the rows of tasks are apart.
pub fn by_token<T: Copy + Default + Send + Sync>(by_row: Vec<T>, tokens: usize) -> Vec<T> {
    if tokens <= 1 {
        return by_row;
    }
    let rows = by_row.len() / tokens;
    let mut out = vec![T::default(); by_row.len()];
    out.par_chunks_exact_mut(rows.max(1)).enumerate().for_each(|(t, out)| {
        out.iter_mut().enumerate().for_each(|(r, y)| *y = by_row[r * tokens + t]);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_instruction_sets_sum_in_the_same_order() {
        for cols in [1usize, 6, 32, 100, 129, 576, 1000] {
            let value = |i: usize| ((i as u32).wrapping_mul(0x9E37_79B9) >> 8) as f32 / 1e6 - 8.0;
            let row: Vec<f32> = (0..cols).map(value).collect();
            let x: Vec<f32> = (0..3 * cols).map(|i| value(i + 7777)).collect();
            let mut out = [0f32; 3];
            row_products(&row, &x, &mut out);
            let expected: Vec<f32> = x.chunks_exact(cols).map(|x| dense::reference(&row, x)).collect();
            assert_eq!(out.map(f32::to_bits).to_vec(), expected.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}

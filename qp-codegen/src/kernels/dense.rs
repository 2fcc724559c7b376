//! Products with an unquantized matrix, for 1 to 8 tokens: the head, and layers that a plan leaves as they are.
//!
//! A warp computes one row: each lane multiplies runs of 4 columns and the lanes' sums meet in a tree. Bound by the
//! bytes of the matrix, which each warp reads once for all tokens.

use super::math::across_lanes;
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Special, V};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dense {
    /// Rows of the matrix: outputs.
    pub rows: u32,
    /// Columns: inputs.
    pub cols: u32,
    /// Its element type: `F16`, `BF16` or `F32`.
    pub elem: Elem,
    /// Tokens, 1..=8.
    pub batch: u32,
    /// Inputs.
    pub x: Span,
    /// Outputs.
    pub y: Span,
    /// Add to the outputs instead of overwriting them.
    pub accumulate: bool,
}

/// Warps of a block.
const WARPS: u32 = 8;

/// Makes the kernel. Its parameters, in order:
///
/// * `weights`: `rows × cols`;
/// * `x`, `y`: `f32`.
pub fn lower(op: &Dense) -> Kernel {
    let name = format!("dense_{}x{}_b{}", op.rows, op.cols, op.batch);
    let b = Builder::new(&name, [op.rows.div_ceil(WARPS), 1], WARPS * 32);
    b.doc(format!("{} × {} unquantized weights, {} token(s).", op.rows, op.cols, op.batch));
    b.dependent_launch();
    let weights = b.buffer("weights", op.elem, false);
    let x = b.buffer("x", Elem::F32, false);
    let y = b.buffer("y", Elem::F32, true);
    let (lane, warp) = (b.special(Special::Lane), b.special(Special::Warp));
    b.grid_wait();
    b.grid_launch();
    let row = b.special(Special::BlockX) * WARPS + warp;
    // Vectors must be aligned, in the matrix and in the inputs.
    let width = [4, 2, 1].into_iter().find(|w| [op.cols, op.x.first, op.x.stride].iter().all(|n| n.is_multiple_of(*w)));
    let width = width.unwrap_or(1);
    b.if_(row.lt(op.rows), || {
        let sums: Vec<_> = (0..op.batch).map(|_| b.var(b.f32(0.0))).collect();
        b.for_(lane * width, op.cols, 32 * width, |i| {
            let w = b.load_as(weights, row * op.cols + i, op.elem, width, Cache::Stream).lanes();
            for (t, sum) in (0..op.batch).zip(&sums) {
                let x = b.load_as(x, i + op.x.first + t * op.x.stride, Elem::F32, width, Cache::Default).lanes();
                let s = w.iter().zip(x).fold(b.get(*sum), |s, (w, x)| w.fma(x, s));
                b.set(*sum, s);
            }
        });
        for (t, sum) in (0..op.batch).zip(sums) {
            let sum = across_lanes(b.get(sum), |a: V, b| a + b);
            b.if_(lane.eq(0), || {
                let at = row + op.y.first + t * op.y.stride;
                let sum = if op.accumulate { b.load(y, at, Elem::F32) + sum } else { sum };
                b.store(y, at, sum, Elem::F32);
            });
        }
    });
    b.finish()
}

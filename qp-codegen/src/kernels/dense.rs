//! Products with an unquantized matrix: the head, and layers that a plan leaves as they are.
//!
//! A warp computes one row: each lane multiplies runs of 4 columns, a sum a column of the run, and the sums meet in a
//! tree. Products are not fused with the sums, so that a CPU without such an instruction keeps up ([`reference`]).
//! Bound by the bytes of the matrix, which each warp reads once for up to 8 tokens; more tokens have blocks of their own,
//! which find the matrix in the L2 cache.

use super::experts::{Experts, Unit, Units};
use super::math::{across_lanes, across_lanes_reference};
use super::operands::divide;
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Special, V};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dense {
    /// Rows of the matrix: outputs.
    pub rows: u32,
    /// Columns: inputs.
    pub cols: u32,
    /// Its element type: `F16`, `BF16` or `F32`.
    pub elem: Elem,
    /// Tokens.
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

/// Most tokens of a block.
const TOKENS: u32 = 8;

/// Columns that a lane takes at once, part of the order of operations.
fn width(cols: u32) -> u32 {
    [4, 2].into_iter().find(|w| cols.is_multiple_of(*w)).unwrap_or(1)
}

/// Makes the kernel. Its parameters, in order:
///
/// * `weights`: `rows × cols`;
/// * `x`, `y`: `f32`.
pub fn lower(op: &Dense) -> Kernel {
    let name = format!("dense_{}x{}_b{}", op.rows, op.cols, op.batch);
    let parts = op.batch.div_ceil(TOKENS);
    let tokens = op.batch.div_ceil(parts);
    let b = Builder::new(&name, [op.rows.div_ceil(WARPS), parts], WARPS * 32);
    b.doc(format!("{} × {} unquantized weights, {} token(s).", op.rows, op.cols, op.batch));
    b.dependent_launch();
    let weights = b.sized("weights", op.elem, false, u64::from(op.rows) * u64::from(op.cols));
    let x = b.sized("x", Elem::F32, false, op.x.len(op.batch, op.cols));
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, op.rows));
    let (lane, warp) = (b.special(Special::Lane), b.special(Special::Warp));
    b.grid_wait();
    b.grid_launch();
    let row = b.special(Special::BlockX) * WARPS + warp;
    let first = if parts == 1 { b.i32(0) } else { b.special(Special::BlockY) * tokens };
    rows(&b, op, [weights, x, y], lane, row, first, tokens, None);
    b.finish()
}

/// Makes the kernel of the products of experts: `op` is that of one of them with the pairs of a unit, whose inputs are rows of
/// `op.x` and whose outputs are rows of `op.y` ([`Experts::rows`], [`Experts::pairs`]). Its parameters, in order:
///
/// * `weights`: the experts' matrices, one below the other;
/// * `x`, `y`: `f32`;
/// * `units`, `pairs`, `places`: see [`super::product::Launch::lower_for_experts`].
pub fn lower_for_experts(op: &Dense, experts: &Experts) -> Kernel {
    let name = format!("dense_experts_{}x{}_b{}", op.rows, op.cols, experts.pairs);
    let parts = op.batch.div_ceil(TOKENS);
    let tokens = op.batch.div_ceil(parts);
    let blocks = op.rows.div_ceil(WARPS) * parts;
    let b = Builder::new(&name, [blocks * experts.units(), 1], WARPS * 32);
    let (count, pairs) = (experts.count, experts.pairs);
    b.doc(format!("{} × {} unquantized weights of {count} experts, {pairs} pair(s).", op.rows, op.cols));
    b.dependent_launch();
    let len = u64::from(experts.matrices) * u64::from(op.rows) * u64::from(op.cols);
    let weights = b.sized("weights", op.elem, false, len);
    let x = b.sized("x", Elem::F32, false, op.x.len(experts.rows, op.cols));
    let y = b.sized("y", Elem::F32, true, op.y.len(experts.pairs, op.rows));
    let units = Units::declare(&b, experts);
    let (thread, lane, warp) = (b.special(Special::Thread), b.special(Special::Lane), b.special(Special::Warp));
    b.grid_wait();
    b.grid_launch();
    let (unit, block) = divide(&b, b.special(Special::BlockX), blocks);
    let (block, part) = divide(&b, block, parts);
    units.run(&b, unit, thread, WARPS * 32, |unit| {
        let (row, first) = (block * WARPS + warp, part * tokens);
        let work = || rows(&b, op, [weights, x, y], lane, row, first, tokens, Some(&unit));
        match unit.count {
            Some(count) if parts > 1 => b.if_(first.lt(count), work),
            _ => work(),
        }
    });
    b.finish()
}

/// The products of a warp's row with `tokens` tokens from `first` on.
#[expect(clippy::too_many_arguments, reason = "the values that the two kernels have in common")]
fn rows<'b>(
    b: &'b Builder,
    op: &Dense,
    [weights, x, y]: [Mem; 3],
    lane: V<'b>,
    row: V<'b>,
    first: V<'b>,
    tokens: u32,
    unit: Option<&Unit<'b>>,
) {
    let exact = op.batch.is_multiple_of(tokens);
    let width = width(op.cols);
    assert!(op.x.first.is_multiple_of(width) && op.x.stride.is_multiple_of(width), "vectors of inputs are aligned");
    b.if_(row.lt(op.rows), || {
        let stored = unit.map_or(row, |unit| unit.matrix * op.rows + row);
        let sums: Vec<Vec<_>> = (0..tokens).map(|_| (0..width).map(|_| b.var(b.f32(0.0))).collect()).collect();
        b.for_(lane * width, op.cols, 32 * width, |i| {
            let w = b.load_as(weights, stored * op.cols + i, op.elem, width, Cache::Stream).lanes();
            for (t, sums) in (0..tokens).zip(&sums) {
                // The last block may have fewer tokens: it repeats the last.
                let token = if exact { first + t } else { (first + t).min(op.batch - 1) };
                let token = unit.map_or(token, |unit| unit.row(token));
                let x = b.load_as(x, i + op.x.at(token), Elem::F32, width, Cache::Default).lanes();
                for (sum, (w, x)) in sums.iter().zip(w.iter().zip(x)) {
                    b.set(*sum, b.get(*sum) + *w * x);
                }
            }
        });
        for (t, sums) in (0..tokens).zip(sums) {
            let token = first + t;
            let sums: Vec<V> = sums.into_iter().map(|s| b.get(s)).collect();
            let own = sums.chunks(2).map(|p| p.iter().copied().reduce(|a, b| a + b).expect("a pair"));
            let sum = across_lanes(own.reduce(|a, b| a + b).expect("at least one"), |a: V, b| a + b);
            let writes = if exact { lane.eq(0) } else { lane.eq(0) & token.lt(op.batch) };
            let writes = match unit.and_then(|unit| unit.count) {
                Some(count) => writes & token.lt(count),
                None => writes,
            };
            b.if_(writes, || {
                let at = row + op.y.at(unit.map_or(token, |unit| unit.pair(token)));
                let sum = if op.accumulate { b.load(y, at, Elem::F32) + sum } else { sum };
                b.store(y, at, sum, Elem::F32);
            });
        }
    });
}

/// The twin of the kernel for one row and one token: the product of `w` and `x`, of equal length. It is inlined into its
/// callers, so that those compiled for vector instructions use them.
#[inline(always)]
pub fn reference(w: &[f32], x: &[f32]) -> f32 {
    match width(w.len() as u32) {
        4 => sums::<128>(w, x, |s| (s[0] + s[1]) + (s[2] + s[3])),
        2 => sums::<64>(w, x, |s| s[0] + s[1]),
        _ => sums::<32>(w, x, |s| s[0]),
    }
}

/// `N` strided sums, joined within each lane and then across lanes.
#[inline(always)]
fn sums<const N: usize>(w: &[f32], x: &[f32], join: impl Fn(&[f32]) -> f32) -> f32 {
    let mut sums = [0f32; N];
    let (chunks, rest) = w.as_chunks::<N>();
    let (of_x, rest_of_x) = x.as_chunks::<N>();
    for (w, x) in chunks.iter().zip(of_x) {
        for ((s, w), x) in sums.iter_mut().zip(w).zip(x) {
            *s += w * x;
        }
    }
    for ((s, w), x) in sums.iter_mut().zip(rest).zip(rest_of_x) {
        *s += w * x;
    }
    let mut lanes = [0f32; 32];
    for (lane, s) in lanes.iter_mut().zip(sums.chunks_exact(N / 32)) {
        *lane = join(s);
    }
    across_lanes_reference(lanes, |a, b| a + b)
}

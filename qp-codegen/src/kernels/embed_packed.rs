//! Embedding from a packed matrix: for each token its row, decoded and rotated back.
//!
//! One block a token. Its warps decode the tiles of the token's row tile and keep the row that is wanted.

use super::decode::Decoder;
use super::dequantize::each_four;
use super::rotate::{GROUP, Transforms, flip, flip_word, placed};
use super::{Span, c_name};
use crate::ir::{Builder, Cache, Elem, Kernel, Special};
use crate::layout::Packed;
use crate::reference::{INTERLEAVED, Interleave};
use crate::spec::{Quantizer, Shape};

/// What to compute.
#[derive(Clone, Copy, Debug)]
pub struct EmbedPacked<'q> {
    /// The quantizer of the matrix.
    pub quantizer: &'q Quantizer,
    /// Vocabulary × columns.
    pub shape: Shape,
    /// Tokens.
    pub batch: u32,
    /// Rows of the result.
    pub y: Span,
}

/// Shared memory for the tables: a block decodes too little to be repaid for filling more.
const TABLE_BYTES: u32 = 8 << 10;

/// Makes the kernel. Its parameters, in order:
///
/// * `tables`, `weights`, `scales`: as in [`super::dequantize`];
/// * `tokens`: `i32`, one a token; negative ones count as 0;
/// * `flips`: see [`super::rotate::flips`];
/// * `base`: see [`super::rotate::inverse_base`];
/// * `y`: `f32`.
///
/// A row is that of [`crate::reference::weight`]s, then [`crate::reference::Rotator::inverse`] of it.
pub fn lower(op: &EmbedPacked) -> Kernel {
    let (q, n) = (op.quantizer, op.shape.cols);
    let layout = Packed::new(q, op.shape);
    let threads = (n / 8).next_power_of_two().clamp(256, 512);
    let name = format!("embed_{}_{}x{n}_b{}", c_name(&q.name), op.shape.rows, op.batch);
    let b = Builder::new(&name, [op.batch, 1], threads);
    b.doc(format!("Embedding of {} token(s) from the {} x {n} matrix of {}.", op.batch, op.shape.rows, q.name));
    b.dependent_launch();
    emit(&b, op, &layout, threads);
    b.finish()
}

fn emit(b: &Builder, op: &EmbedPacked, layout: &Packed, threads: u32) {
    let (q, n) = (op.quantizer, op.shape.cols);
    let decoder = Decoder::new(b, q, TABLE_BYTES);
    let weights = b.sized("weights", Elem::U32, false, layout.words() as u64);
    let scales = b.sized("scales", Elem::BF16, false, layout.padded_rows().into());
    let tokens = b.sized("tokens", Elem::I32, false, op.batch.into());
    let flips = b.buffer("flips", Elem::U32, false);
    let base = b.buffer("base", Elem::U32, false);
    let y = b.sized("y", Elem::F32, true, op.y.len(op.batch, n));
    let padded = n.next_multiple_of(GROUP);
    let values = b.shared("values", Elem::F32, padded);
    let (thread, token) = (b.special(Special::Thread), b.special(Special::BlockX));
    decoder.fill(threads);
    b.grid_wait();
    b.grid_launch();
    b.barrier();

    let interleave = Interleave::of(q.rotation, n);
    let wanted = b.load(tokens, token, Elem::I32).max(0);
    let scale = b.load_as(scales, wanted, Elem::BF16, 1, Cache::ReadOnly);
    b.for_(b.special(Special::Warp), layout.col_tiles(), threads / 32, |col_tile| {
        each_four(&decoder, layout, weights, (wanted / layout.tile.rows, col_tile), |four| {
            b.if_(four.row.eq(wanted), || {
                let column = placed(interleave, n, four.col >> INTERLEAVED.ilog2()) * INTERLEAVED;
                let column = column + (four.col & (INTERLEAVED - 1));
                for (k, v) in (0..4).zip(four.weights(scale)) {
                    let set = || b.store(values, column + k, v, Elem::F32);
                    if n == layout.padded_cols() { set() } else { b.if_((four.col + k).lt(n), set) }
                }
            });
        });
    });
    b.for_(thread + n, padded, threads, |i| b.store(values, i, b.f32(0.0), Elem::F32));
    b.barrier();
    let transforms = Transforms::inverse_of(q.rotation, n);
    if !transforms.is_empty() {
        transforms.transform(b, values, base, threads);
    }
    let from = op.y.at(token);
    b.for_(b.special(Special::Warp), padded / GROUP, threads / 32, |group| {
        let column = group * GROUP + b.special(Special::Lane) * 4;
        let v = b.load_as(values, column, Elem::F32, 4, Cache::Default);
        let mut v = [0, 1, 2, 3].map(|j| v.lane(j));
        if !transforms.is_empty() {
            let mut j = 0;
            v = v.map(|v| {
                j += 1;
                v * transforms.factor(b, column + (j - 1))
            });
            v = flip(flip_word(b, flips, n, column), column, v);
        }
        for (j, v) in (0..4).zip(v) {
            let store = || b.store(y, from + column + j, v, Elem::F32);
            if n == padded { store() } else { b.if_((column + j).lt(n), store) }
        }
    });
}

//! Embedding from a packed matrix: for each token its row, decoded and rotated back.
//!
//! One block a token. Its warps decode the tiles of the token's row tile and keep the row that is wanted.

use super::decode::Decoder;
use super::dequantize::each_four;
use super::rotate::{self, RADIX_BITS, Values};
use super::{Span, c_name};
use crate::ir::{Builder, Cache, Elem, Kernel, Special};
use crate::layout::Packed;
use crate::reference::Hadamard;
use crate::spec::{Quantizer, Rotation, Shape};

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

/// The transform that the kernel makes, that of the rotation's inverse.
fn hadamard(columns: u32) -> Hadamard {
    Hadamard::new(columns).transposed()
}

/// The dense part's signs as the kernel takes them; see [`rotate::base`].
pub fn base(columns: u32) -> Vec<u32> {
    rotate::base(&hadamard(columns))
}

/// Makes the kernel. Its parameters, in order:
///
/// * `tables`, `weights`, `scales`: as in [`super::dequantize`];
/// * `tokens`: `i32`, one a token;
/// * `flips`: see [`rotate::flips`];
/// * `base`: see [`base`];
/// * `y`: `f32`.
///
/// A row is that of [`crate::reference::weight`]s, then [`crate::reference::Rotator::inverse`] of it.
pub fn lower(op: &EmbedPacked) -> Kernel {
    let (q, n) = (op.quantizer, op.shape.cols);
    let layout = Packed::new(q, op.shape);
    let threads = (n >> RADIX_BITS).next_power_of_two().clamp(256, 512);
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
    let weights = b.buffer("weights", Elem::U32, false);
    let scales = b.buffer("scales", Elem::BF16, false);
    let tokens = b.buffer("tokens", Elem::I32, false);
    let flips = b.buffer("flips", Elem::U32, false);
    let base = b.buffer("base", Elem::U32, false);
    let y = b.buffer("y", Elem::F32, true);
    let values = Values::new(b, "values", n);
    let (thread, token) = (b.special(Special::Thread), b.special(Special::BlockX));
    decoder.fill(threads);
    b.grid_wait();
    b.grid_launch();
    b.barrier();

    let wanted = b.load(tokens, token, Elem::I32);
    let scale = b.load_as(scales, wanted, Elem::BF16, 1, Cache::ReadOnly);
    b.for_(b.special(Special::Warp), layout.col_tiles(), threads / 32, |col_tile| {
        each_four(&decoder, layout, weights, (wanted / layout.tile.rows, col_tile), |four| {
            b.if_(four.row.eq(wanted), || {
                for (k, v) in (0..4).zip(four.weights(scale)) {
                    let set = || values.set(four.col + k, v);
                    if n == layout.padded_cols() { set() } else { b.if_((four.col + k).lt(n), set) }
                }
            });
        });
    });
    b.barrier();
    let h = hadamard(n);
    let rotated = q.rotation != Rotation::None;
    if rotated {
        rotate::transform(&values, &h, base, threads);
    }
    b.for_(thread, n, threads, |i| {
        let v = values.get(i);
        let v = if rotated { rotate::flip(b, flips, i, v * h.norm()) } else { v };
        b.store(y, op.y.at(token) + i, v, Elem::F32);
    });
}

//! Dequantization: packed words → the matrix, row-major, in the rotated space.

use super::c_name;
use super::decode::{Decoder, TABLE_BYTES, flatten, load_words};
use crate::ir::{Builder, Cache, Elem, Kernel, Scalar, Special, V};
use crate::layout::Packed;
use crate::spec::{Quantizer, Shape};

/// What to compute.
#[derive(Clone, Copy, Debug)]
pub struct Dequantize<'q> {
    /// The quantizer of the weights.
    pub quantizer: &'q Quantizer,
    /// Rows × columns.
    pub shape: Shape,
    /// `F32`, `F16` or `BF16`.
    pub output: Elem,
}

const WARPS: u32 = 8;

/// Makes the kernel, for a GPU of `sms` multiprocessors. Its parameters, in order: `tables`, `weights`, `scales` (bfloat16, one a padded row) as in [`super::gemv`], and `y`, rows × columns.
///
/// An element is [`crate::reference::weight`] of its entry, rounded to the output type.
pub fn lower(op: &Dequantize, sms: u32) -> Kernel {
    let (q, layout) = (op.quantizer, Packed::new(op.quantizer, op.shape));
    let tiles = layout.row_tiles() * layout.col_tiles();
    let name = format!("dequantize_{}_{}x{}", c_name(&q.name), op.shape.rows, op.shape.cols);
    let grid = tiles.div_ceil(WARPS).min(2 * sms);
    let b = Builder::new(&name, [grid, 1], WARPS * 32);
    b.doc(format!("The {} x {} matrix of {}, decoded.", op.shape.rows, op.shape.cols, q.name));
    emit(&b, op, &layout, grid);
    b.finish()
}

fn emit<'b>(b: &'b Builder, op: &Dequantize, layout: &Packed, grid: u32) {
    let q = op.quantizer;
    let decoder = Decoder::new(b, q, TABLE_BYTES);
    let weights = b.buffer("weights", Elem::U32, false);
    let scales = b.buffer("scales", Elem::BF16, false);
    let y = b.buffer("y", op.output, true);
    decoder.fill(WARPS * 32);
    b.barrier();

    let lane = b.special(Special::Lane);
    let (group, quad) = (lane >> 2, lane & 3);
    let (rows, cols) = (op.shape.rows, op.shape.cols);
    let tiles = layout.row_tiles() * layout.col_tiles();
    let first = b.special(Special::BlockX) * WARPS + b.special(Special::Warp);
    b.for_(first, tiles, grid * WARPS, |tile| {
        let (row_tile, col_tile) = (tile / layout.col_tiles(), tile % layout.col_tiles());
        for (c, code) in q.codes.iter().enumerate() {
            let lane_words = layout.lane_words[c];
            let decode = || {
                let codes = q.codes.len() as u32;
                let period = layout.lane_words.iter().sum::<u32>() * 32;
                let before = layout.lane_words[..c].iter().sum::<u32>() * 32;
                let at = row_tile * layout.row_stride() as u32 + (col_tile / codes * period + before);
                let words = flatten(&load_words(b, weights, at, lane, lane_words));
                let parts = layout.tile.cols / 32;
                for (i, register) in decoder.tile(c, &words).into_iter().enumerate() {
                    // The place of a register's four weights: see `layout`.
                    let (m, a) = (i as u32 / 4, i as u32 % 4);
                    let row = row_tile * layout.tile.rows + group + (m / parts * 16 + a % 2 * 8);
                    let col = col_tile * layout.tile.cols + quad * 4 + (m % parts * 32 + a / 2 * 16);
                    b.if_(row.lt(rows), || {
                        let scale = b.load_as(scales, row, Elem::BF16, 1, Cache::ReadOnly);
                        let unit = if code.half_offset { code.unit * 0.5 } else { code.unit };
                        let step = scale * unit;
                        let value = |k: u32| {
                            let byte = |v: V<'b>| (v << (24 - 8 * k)).bits(Scalar::I32) >> 24_u32;
                            let entry = match register.high {
                                None => byte(register.low),
                                Some(high) => byte(high) * 256 + (byte(register.low) & 0xff),
                            };
                            let entry = if code.half_offset { entry * 2 + 1 } else { entry };
                            entry.to(Scalar::F32) * step
                        };
                        let at = row * cols + col;
                        if cols.is_multiple_of(4) {
                            let four = [value(0), value(1), value(2), value(3)];
                            b.if_(col.lt(cols), || b.store(y, at, b.vector(&four), op.output));
                        } else {
                            for k in 0..4 {
                                let v = value(k);
                                b.if_((col + k).lt(cols), || b.store(y, at + k, v, op.output));
                            }
                        }
                    });
                }
            };
            if q.codes.len() == 1 {
                decode();
            } else {
                b.if_((col_tile % q.codes.len() as u32).eq(c as u32), decode);
            }
        }
    });
}

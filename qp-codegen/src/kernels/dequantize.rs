//! Dequantization: packed words → the matrix, row-major, in the rotated space.

use super::c_name;
use super::decode::{Decoder, Register, TABLE_BYTES, flatten, load_words};
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V};
use crate::layout::Packed;
use crate::spec::{Code, Quantizer, Shape};

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

fn emit(b: &Builder, op: &Dequantize, layout: &Packed, grid: u32) {
    let decoder = Decoder::new(b, op.quantizer, TABLE_BYTES);
    let weights = b.buffer("weights", Elem::U32, false);
    let scales = b.buffer("scales", Elem::BF16, false);
    let y = b.buffer("y", op.output, true);
    decoder.fill(WARPS * 32);
    b.barrier();

    let (rows, cols) = (op.shape.rows, op.shape.cols);
    let tiles = layout.row_tiles() * layout.col_tiles();
    let first = b.special(Special::BlockX) * WARPS + b.special(Special::Warp);
    b.for_(first, tiles, grid * WARPS, |tile| {
        let at = (tile / layout.col_tiles(), tile % layout.col_tiles());
        each_four(&decoder, layout, weights, at, |four| {
            let (row, col) = (four.row, four.col);
            b.if_(row.lt(rows), || {
                let step = four.step(b.load_as(scales, row, Elem::BF16, 1, Cache::ReadOnly));
                let at = row * cols + col;
                if cols.is_multiple_of(4) {
                    let all = [0, 1, 2, 3].map(|k| four.weight(k, step));
                    b.if_(col.lt(cols), || b.store(y, at, b.vector(&all), op.output));
                } else {
                    for k in 0..4 {
                        let v = four.weight(k, step);
                        b.if_((col + k).lt(cols), || b.store(y, at + k, v, op.output));
                    }
                }
            });
        });
    });
}

/// Four decoded weights, side by side in a row.
pub(super) struct Four<'b, 'q> {
    /// Their row, padding included.
    pub row: V<'b>,
    /// The column of the first, padding included.
    pub col: V<'b>,
    register: Register<'b>,
    code: &'q Code,
}

impl<'b> Four<'b, '_> {
    /// What [`Four::weight`] multiplies with, for a row of scale `scale`.
    pub fn step(&self, scale: V<'b>) -> V<'b> {
        let Code { half_offset, unit, .. } = *self.code;
        scale * if half_offset { unit * 0.5 } else { unit }
    }

    /// Weight `k` of them: [`crate::reference::weight`].
    pub fn weight(&self, k: u32, step: V<'b>) -> V<'b> {
        let byte = |v: V<'b>| (v << (24 - 8 * k)).bits(Scalar::I32) >> 24_u32;
        let entry = match self.register.high {
            None => byte(self.register.low),
            Some(high) => byte(high) * 256 + (byte(self.register.low) & 0xff),
        };
        let entry = if self.code.half_offset { entry * 2 + 1 } else { entry };
        entry.to(Scalar::F32) * step
    }
}

/// Decodes a tile by one warp and shows each lane its weights, four at a time. `weights` are the packed words, `tile` is
/// its row tile and column tile.
pub(super) fn each_four<'b>(
    decoder: &Decoder<'b, '_>,
    layout: &Packed,
    weights: Mem,
    (row_tile, col_tile): (V<'b>, V<'b>),
    see: impl Fn(&Four<'b, '_>),
) {
    let (b, q) = (decoder.builder(), decoder.quantizer());
    let lane = b.special(Special::Lane);
    let (group, quad) = (lane >> 2, lane & 3);
    let codes = q.codes.len() as u32;
    for (c, code) in q.codes.iter().enumerate() {
        let lane_words = layout.lane_words[c];
        let decode = || {
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
                see(&Four { row, col, register, code });
            }
        };
        if codes == 1 {
            decode();
        } else {
            b.if_((col_tile % codes).eq(c as u32), decode);
        }
    }
}

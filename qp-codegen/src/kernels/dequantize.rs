//! Dequantization: packed words → the matrix, row-major, in the rotated space.

use super::c_name;
use super::decode::{self, Decoder, Register, TABLE_BYTES, Unit, flatten, load_words};
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

/// Warps of a block.
const WARPS: u32 = 8;
/// Blocks that an SM is to hold, of tiles of 16 rows: enough warps that some write while others wait for words and look-ups.
/// Larger tiles take more registers, and fewer blocks.
const RESIDENT: u32 = 4;

/// Makes the kernel, for a GPU of `sms` multiprocessors. Its parameters, in order: `tables`, `weights`, `scales`
/// (bfloat16, one a padded row) as in [`super::gemv`], and `y`, rows × columns.
///
/// An element is [`crate::reference::weight`] of its entry, rounded to the output type.
///
/// What bounds it is writing. A lane has four neighbours of a row at a time: with halves, a store of 8 bytes, of which
/// the lanes of a block's row fill a whole sector of memory.
pub fn lower(op: &Dequantize, sms: u32) -> Kernel {
    let (q, layout) = (op.quantizer, Packed::new(op.quantizer, op.shape));
    let tiles = layout.row_tiles() * layout.col_tiles();
    let name = format!("dequantize_{}_{}x{}", c_name(&q.name), op.shape.rows, op.shape.cols);
    let resident = (RESIDENT * 16 / layout.tile.rows).max(1);
    let grid = tiles.div_ceil(WARPS).min(resident * sms);
    let b = Builder::new(&name, [grid, 1], WARPS * 32);
    b.doc(format!("The {} x {} matrix of {}, decoded.", op.shape.rows, op.shape.cols, q.name));
    b.min_blocks(resident);
    b.dependent_launch();
    emit(&b, op, &layout, grid);
    b.finish()
}

fn emit(b: &Builder, op: &Dequantize, layout: &Packed, grid: u32) {
    let decoder = Decoder::new(b, op.quantizer, TABLE_BYTES);
    let weights = b.sized("weights", Elem::U32, false, layout.words() as u64);
    let scales = b.sized("scales", Elem::BF16, false, layout.padded_rows().into());
    let y = b.sized("y", op.output, true, op.shape.len());
    decoder.fill(WARPS * 32);
    b.barrier();
    b.grid_wait();
    b.grid_launch();

    let (rows, cols) = (op.shape.rows, op.shape.cols);
    let (whole_rows, whole_cols) = (rows == layout.padded_rows(), cols == layout.padded_cols());
    let tiles = layout.row_tiles() * layout.col_tiles();
    let first = b.special(Special::BlockX) * WARPS + b.special(Special::Warp);
    let group = b.special(Special::Lane) >> 2;
    b.for_(first, tiles, grid * WARPS, |tile| {
        let (row_tile, col_tile) = (tile / layout.col_tiles(), tile % layout.col_tiles());
        let row = row_tile * layout.tile.rows + group;
        let scale = |line: u32| b.load_as(scales, row + line * 8, Elem::BF16, 1, Cache::ReadOnly);
        // Those of a tile that is decoded in one go are loaded at once.
        let lines = if decode::is_small(op.quantizer) { layout.tile.rows / 8 } else { 0 };
        let of_lines: Vec<V> = (0..lines).map(scale).collect();
        each_four(&decoder, layout, weights, (row_tile, col_tile), |four| {
            let (row, col) = (four.row, four.col);
            let write = || {
                let scale = || b.load_as(scales, row, Elem::BF16, 1, Cache::ReadOnly);
                let all = four.weights(four.line.map_or_else(scale, |line| of_lines[line as usize]));
                let at = row * cols + col;
                if cols.is_multiple_of(4) {
                    let store = || b.store(y, at, b.vector(&all), op.output);
                    if whole_cols { store() } else { b.if_(col.lt(cols), store) }
                } else {
                    for (k, v) in (0..4).zip(all) {
                        b.if_((col + k).lt(cols), || b.store(y, at + k, v, op.output));
                    }
                }
            };
            if whole_rows { write() } else { b.if_(row.lt(rows), write) }
        });
    });
}

/// Four decoded weights, side by side in a row.
pub(super) struct Four<'b, 'q> {
    /// Their row, padding included.
    pub row: V<'b>,
    /// The column of the first, padding included.
    pub col: V<'b>,
    /// Which of the lane's rows of the tile theirs is: each is 8 below the one before. `None` in a tile that is decoded in
    /// a loop.
    pub line: Option<u32>,
    b: &'b Builder,
    register: Register<'b>,
    code: &'q Code,
}

impl<'b> Four<'b, '_> {
    /// The weights, [`crate::reference::weight`] each, in a row of scale `scale`.
    ///
    /// Entries become floats by permutes and a difference, both exact: put into the lowest bits of 2^23, a whole number is
    /// added to it.
    pub fn weights(&self, scale: V<'b>) -> [V<'b>; 4] {
        const FLOAT: u32 = 0x4b00_0000;
        const { assert!(f32::from_bits(FLOAT) == 8_388_608.0) };
        let Code { half_offset, unit, .. } = *self.code;
        let step = scale * if half_offset { unit * 0.5 } else { unit };
        let (b, unsigned) = (self.b, |v: V<'b>| v ^ 0x8080_8080_u32);
        let entry = |k: usize| match self.register.high {
            None => {
                let bits = unsigned(self.register.low).permute(b.u32(FLOAT), [0x7440, 0x7441, 0x7442, 0x7443][k]);
                bits.bits(Scalar::F32) - (8_388_608.0 + 128.0)
            }
            Some(high) => {
                // Low and high bytes of two entries side by side, then each of them.
                let pair = self.register.low.permute(unsigned(high), [0x5140, 0x7362][k / 2]);
                let bits = pair.permute(b.u32(FLOAT), [0x7410, 0x7432][k % 2]);
                bits.bits(Scalar::F32) - (8_388_608.0 + 32_768.0)
            }
        };
        [0, 1, 2, 3].map(|k| if half_offset { entry(k).fma(2.0, 1.0) * step } else { entry(k) * step })
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
    let small = decode::is_small(q);
    for (c, code) in q.codes.iter().enumerate() {
        let lane_words = layout.lane_words[c];
        let decode = || {
            let period = layout.lane_words.iter().sum::<u32>() * 32;
            let before = layout.lane_words[..c].iter().sum::<u32>() * 32;
            let at = row_tile * layout.row_stride() as u32 + (col_tile / codes * period + before);
            let parts = layout.tile.cols / 32;
            // The place of a register's four weights: see `layout`.
            if small {
                let words = flatten(&load_words(b, weights, at, lane, lane_words));
                for (i, register) in decoder.tile(c, &words).into_iter().enumerate() {
                    let (m, a) = (i as u32 / 4, i as u32 % 4);
                    let line = m / parts * 2 + a % 2;
                    let row = row_tile * layout.tile.rows + group + line * 8;
                    let col = col_tile * layout.tile.cols + quad * 4 + (m % parts * 32 + a / 2 * 16);
                    see(&Four { row, col, line: Some(line), b, register, code });
                }
                return;
            }
            let unit = Unit::of(code);
            b.for_(0, code.weights() / 64 / unit.operands, 1, |index| {
                let words = decoder.unit_words(c, weights, at, index);
                let mut steps = decoder.unit(c, &words);
                for i in 0..unit.operands * 4 {
                    let (m, a) = (index * unit.operands + i / 4, i % 4);
                    let row = row_tile * layout.tile.rows + group + (m / parts * 16 + a % 2 * 8);
                    let col = col_tile * layout.tile.cols + quad * 4 + (m % parts * 32 + a / 2 * 16);
                    see(&Four { row, col, line: None, b, register: steps.register(i), code });
                }
            });
        };
        if codes == 1 {
            decode();
        } else {
            b.if_((col_tile % codes).eq(c as u32), decode);
        }
    }
}

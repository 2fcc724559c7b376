//! Block types: weights in small groups, each with scales of its own.
//!
//! Every weight is computed in `f32`, product by product as the format defines it (ggml's `dequantize_row_*`), so that
//! all readers of the format agree to the last bit.

use half::f16;

use crate::codec::simd::for_each_instruction_set;

/// A block type, named as the format names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Block {
    /// 4 bits: d · (q − 8).
    Q4_0,
    /// 4 bits: d · q + m.
    Q4_1,
    /// 5 bits: d · (q − 16).
    Q5_0,
    /// 5 bits: d · q + m.
    Q5_1,
    /// 8 bits: d · q.
    Q8_0,
    /// 2 bits, scales and minima of 4 bits for 16 weights.
    Q2_K,
    /// 3 bits, scales of 6 bits for 16 weights.
    Q3_K,
    /// 4 bits, scales and minima of 6 bits for 32 weights.
    Q4_K,
    /// 5 bits, scales and minima of 6 bits for 32 weights.
    Q5_K,
    /// 6 bits, scales of 8 bits for 16 weights.
    Q6_K,
}

/// Most weights in a block.
pub const MOST: usize = 256;

impl Block {
    /// Weights in a block.
    pub fn weights(self) -> usize {
        match self {
            Block::Q4_0 | Block::Q4_1 | Block::Q5_0 | Block::Q5_1 | Block::Q8_0 => 32,
            Block::Q2_K | Block::Q3_K | Block::Q4_K | Block::Q5_K | Block::Q6_K => MOST,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Block::Q4_0 => 18,
            Block::Q4_1 => 20,
            Block::Q5_0 => 22,
            Block::Q5_1 => 24,
            Block::Q8_0 => 34,
            Block::Q2_K => 84,
            Block::Q3_K => 110,
            Block::Q4_K => 144,
            Block::Q5_K => 176,
            Block::Q6_K => 210,
        }
    }

    /// Whether the scales (and minima) that all weights of a block are multiplied with are finite.
    pub fn has_finite_scales(self, block: &[u8]) -> bool {
        let places: &[usize] = match self {
            Block::Q4_0 | Block::Q5_0 | Block::Q8_0 => &[0],
            Block::Q4_1 | Block::Q5_1 | Block::Q4_K | Block::Q5_K => &[0, 2],
            Block::Q2_K => &[80, 82],
            Block::Q3_K => &[108],
            Block::Q6_K => &[208],
        };
        places.iter().all(|&at| f16::from_le_bytes([block[at], block[at + 1]]).is_finite())
    }

    /// The weights of whole blocks that lie side by side.
    ///
    /// # Panics
    /// Unless `bytes` and `out` hold equally many whole blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.len() / self.bytes();
        assert_eq!((bytes.len(), out.len()), (blocks * self.bytes(), blocks * self.weights()), "whole blocks");
        match self {
            Block::Q4_0 => q4_0(bytes, out),
            Block::Q4_1 => q4_1(bytes, out),
            Block::Q8_0 => q8_0(bytes, out),
            other => {
                let blocks = bytes.chunks_exact(self.bytes()).zip(out.chunks_exact_mut(self.weights()));
                blocks.for_each(|(block, out)| other.one(block, out));
            }
        }
    }

    /// The weights of one block of a type that has no function of its own.
    fn one(self, block: &[u8], out: &mut [f32]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let nibble = |at: usize, i: usize| low_then_high(&block[at..], 16, i);
        // Bit 4 of weight i.
        let fifth = |at: usize, i: usize| (block[at + i / 8] >> (i % 8) & 1) << 4;
        match self {
            Block::Q4_0 => q4_0(block, out),
            Block::Q4_1 => q4_1(block, out),
            Block::Q8_0 => q8_0(block, out),
            Block::Q5_0 => fill(out, |i| half(0) * (f32::from(nibble(6, i) | fifth(2, i)) - 16.0)),
            Block::Q5_1 => fill(out, |i| half(0) * f32::from(nibble(8, i) | fifth(4, i)) + half(2)),
            Block::Q2_K => {
                let (d, min) = (half(80), half(82));
                fill(out, |i| {
                    let scale = block[i / 16];
                    d * f32::from(scale & 15) * f32::from(crumb(&block[16..], i)) - min * f32::from(scale >> 4)
                });
            }
            Block::Q3_K => {
                let d = half(108);
                fill(out, |i| {
                    let j = i / 16;
                    let low = block[96 + j % 8] >> (4 * (j / 8)) & 15;
                    let high = block[104 + j % 4] >> (2 * (j / 4)) & 3;
                    let scale = f32::from(low | high << 4) - 32.0;
                    // The high bit is stored inverted.
                    let offset = 4.0 * f32::from(!block[i % 32] >> (i / 32) & 1);
                    d * scale * (f32::from(crumb(&block[32..], i)) - offset)
                });
            }
            Block::Q4_K | Block::Q5_K => {
                let (d, min) = (half(0), half(2));
                let five = self == Block::Q5_K;
                let weights = if five { 48 } else { 16 };
                fill(out, |i| {
                    let (scale, low) = scale_and_min(&block[4..16], i / 32);
                    let high = if five { (block[16 + i % 32] >> (i / 32) & 1) << 4 } else { 0 };
                    let q = low_then_high(&block[weights..], 32, i) | high;
                    d * f32::from(scale) * f32::from(q) - min * f32::from(low)
                });
            }
            Block::Q6_K => {
                let d = half(208);
                fill(out, |i| {
                    let high = block[128 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3;
                    let q = f32::from(low_then_high(block, 64, i) | high << 4) - 32.0;
                    d * f32::from(block[192 + i / 16] as i8) * q
                });
            }
        }
    }
}

/// Half-precision number at byte `at` of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 weights of 16 bytes: the low halves of all, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], out: &mut [f32; 32], weight: impl Fn(f32) -> f32) {
    for i in 0..16 {
        out[i] = weight(f32::from(bytes[i] & 15));
    }
    for i in 0..16 {
        out[16 + i] = weight(f32::from(bytes[i] >> 4));
    }
}

for_each_instruction_set! {
    fn q4_0[R](bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, q) = (half(block, 0), block[2..].first_chunk().expect("16 bytes"));
            nibbles(q, out, |q| d * (q - 8.0));
        }
    }
}

for_each_instruction_set! {
    fn q4_1[R](bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, m, q) = (half(block, 0), half(block, 2), block[4..].first_chunk().expect("16 bytes"));
            nibbles(q, out, |q| d * q + m);
        }
    }
}

for_each_instruction_set! {
    fn q8_0[R](bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let d = half(block, 0);
            for (o, q) in out.iter_mut().zip(&block[2..]) {
                *o = d * f32::from(*q as i8);
            }
        }
    }
}

fn fill(out: &mut [f32], weight: impl Fn(usize) -> f32) {
    out.iter_mut().enumerate().for_each(|(i, o)| *o = weight(i));
}

/// Weight `i` of nibbles: `run` low ones, then the high ones of the same bytes, then of the next `run` bytes.
fn low_then_high(bytes: &[u8], run: usize, i: usize) -> u8 {
    bytes[i / (2 * run) * run + i % run] >> (4 * (i / run % 2)) & 15
}

/// Weight `i` of pairs of bits: from 32 bytes the lowest, then the next ones; then from the next 32 bytes.
fn crumb(bytes: &[u8], i: usize) -> u8 {
    bytes[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// Scale and minimum number `j` of 8: 6 bits each in 12 bytes.
fn scale_and_min(s: &[u8], j: usize) -> (u8, u8) {
    match j {
        0..4 => (s[j] & 63, s[j + 4] & 63),
        _ => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
    }
}

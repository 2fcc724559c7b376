//! How the keys and values of a layer lie in memory.
//!
//! Positions of a sequence come in pages of [`PAGE`]. A page of one head of keys and values is a *piece* of memory, and the
//! pieces of a page's heads lie one behind the other:
//!
//! * the keys: for each plane, for each 16 columns, for each position, 16 signed bytes, one a column;
//! * the values: for each plane, for each 16 positions, for each column, 16 signed bytes, one a position, in the order of
//!   [`Cache::place`];
//! * three numbers (`f32`) of each position: the scale of its key, the base-2 logarithm of the scale of its value, and
//!   the inverse of that scale.
//!
//! So keys and values are, as they lie, the second operand of tensor-core products (16 bytes of a column of the operand
//! side by side), and a piece is brought to shared memory in one stretch. A key (value) of one head and position is rounded
//! to integers with a scale of its own: of two planes, `256·high + low`, or of one.

/// Positions of a page.
pub const PAGE: u32 = 64;

/// The cache of keys and values of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cache {
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Columns of a head, even, at most 256.
    pub head_dim: u32,
    /// Bytes of a number: 2 (16 bits, the default) or 1.
    pub planes: u32,
}

impl Cache {
    /// Columns of a head in memory: a multiple of 32, the last ones zero.
    pub fn columns(&self) -> u32 {
        self.head_dim.next_multiple_of(32)
    }

    /// Bytes of a plane of the keys, or of the values, of a piece.
    pub fn plane_bytes(&self) -> u32 {
        PAGE * self.columns()
    }

    /// Bytes of a piece: one head of one page.
    pub fn piece_bytes(&self) -> u32 {
        2 * self.planes * self.plane_bytes() + 3 * PAGE * 4
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u32 {
        self.kv_heads * self.piece_bytes()
    }

    /// Most pages of a layer: kernels count bytes in 31 bits.
    pub fn most_pages(&self) -> u32 {
        i32::MAX as u32 / self.page_bytes()
    }

    /// Where the values begin in a piece, in bytes.
    pub fn values(&self) -> u32 {
        self.planes * self.plane_bytes()
    }

    /// Where the numbers of positions begin in a piece, in bytes.
    pub fn scales(&self) -> u32 {
        2 * self.planes * self.plane_bytes()
    }

    /// Where the byte of a key lies in its piece.
    pub fn key(&self, plane: u32, position: u32, column: u32) -> u32 {
        plane * self.plane_bytes() + column / 16 * (PAGE * 16) + position * 16 + column % 16
    }

    /// Where the byte of a value lies in its piece.
    pub fn value(&self, plane: u32, position: u32, column: u32) -> u32 {
        self.values()
            + plane * self.plane_bytes()
            + position / 16 * (self.columns() * 16)
            + column * 16
            + Cache::place(position % 16)
    }

    /// Where among the 16 bytes of a column of values position `position` of 16 lies. A lane of a product of queries and keys
    /// gets positions `2t`, `2t + 1`, `2t + 8` and `2t + 9` of 16: as they lie side by side here, it holds the operand of the
    /// product with the values already.
    pub const fn place(position: u32) -> u32 {
        position / 2 % 4 * 4 + position / 8 * 2 + position % 2
    }

    /// Largest magnitude of a rounded number.
    pub fn largest(&self) -> f32 {
        if self.planes == 2 { LARGEST_OF_TWO_PLANES } else { 127.0 }
    }
}

/// Largest magnitude of a number of two planes: `127·256 + 127`.
pub const LARGEST_OF_TWO_PLANES: f32 = 32639.0;

/// The two planes of a number: `256·high + low`.
pub fn planes(q: i16) -> (i8, i8) {
    (((i32::from(q) + 128) >> 8) as i8, q as i8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_split_into_planes() {
        for q in -32639..=32639i16 {
            let (high, low) = planes(q);
            assert_eq!(i32::from(q), 256 * i32::from(high) + i32::from(low));
            assert!(high.unsigned_abs() <= 127);
        }
    }

    #[test]
    fn every_byte_of_a_piece_has_one_place() {
        for (head_dim, planes) in [(64, 2), (80, 1), (128, 2)] {
            let cache = Cache { kv_heads: 3, head_dim, planes };
            let mut seen = vec![0u8; cache.piece_bytes() as usize];
            for plane in 0..planes {
                for position in 0..PAGE {
                    for column in 0..cache.columns() {
                        seen[cache.key(plane, position, column) as usize] += 1;
                        seen[cache.value(plane, position, column) as usize] += 1;
                    }
                }
            }
            let (bytes, scales) = seen.split_at(cache.scales() as usize);
            assert!(bytes.iter().all(|n| *n == 1));
            assert_eq!((scales.len(), scales.iter().all(|n| *n == 0)), (768, true));
        }
    }
}

//! Entries: those of codes, looked up or computed, and those of the streams of blocks.

use super::places::{Part, read};
use super::{Book, Reader};
use crate::spec::expr::Room;
use crate::spec::format::{Trellis, number};
use crate::spec::mask;

/// Makes the entries of a matrix's codes.
pub(super) struct Entries<'a> {
    book: &'a Book,
    /// Numbers of the matrix's tables that codes look up; nothing if one of them is not finite.
    numbers: Option<Vec<Vec<i64>>>,
    integers: Vec<i64>,
    room: Room,
}

impl Entries<'_> {
    /// The entries of `code`: `vector` of them, which are no numbers where a table of the matrix holds any that are not finite.
    pub(super) fn of(&mut self, code: u32, out: &mut [f32]) {
        let v = out.len();
        if let Some(written) = self.book.entries.get(code as usize * v..(code as usize + 1) * v) {
            out.copy_from_slice(written);
            return;
        }
        let Some(numbers) = &self.numbers else { return out.fill(f32::NAN) };
        let format = &self.book.format;
        format.integers(code, numbers, &mut self.room, &mut self.integers);
        out.iter_mut().zip(&self.integers).for_each(|(o, i)| *o = format.entry(*i));
    }
}

/// The streams of a matrix's blocks.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    pub(super) part: Part,
    /// Row and column in the block of each weight of the stream.
    places: Vec<(u32, u32)>,
}

impl Streams {
    pub(super) fn new(part: Part, trellis: &Trellis) -> Self {
        // A checked format's order has all places.
        Streams { part, places: trellis.places().unwrap_or_default() }
    }
}

/// `len` bits, at most 24, from bit `at` of a stream of `bits` bits whose first follows its last.
fn window(words: &[u32], bits: u32, at: u32, len: u32) -> u32 {
    let some = |at: u32, len: u32| {
        let (i, shift) = ((at / 32) as usize, at % 32);
        let next = words.get(i + 1).copied().unwrap_or(0);
        ((u64::from(next) << 32 | u64::from(words[i])) >> shift) as u32 & mask(len)
    };
    let left = bits - at;
    if len <= left { some(at, len) } else { some(at, left) | some(0, len - left) << left }
}

impl Reader {
    /// What makes the entries of this matrix.
    pub(super) fn entries(&self, tensors: &[&[u8]]) -> Entries<'_> {
        Entries {
            book: &self.book,
            numbers: self.own_numbers(tensors),
            integers: vec![0; self.format().vector as usize],
            room: Room::default(),
        }
    }

    /// The numbers of the matrix's tables that codes look up, as [`Format::integers`](crate::spec::format::Format::integers) takes them; nothing if one of
    /// them is not finite.
    pub(super) fn own_numbers(&self, tensors: &[&[u8]]) -> Option<Vec<Vec<i64>>> {
        let format = self.format();
        let numbers = format.numbers.iter().map(|&f| {
            let field = &format.fields[f];
            let (count, width) = (i64::from(field.entries.unwrap_or(1)), i64::from(field.width));
            let all = (0..count).flat_map(|i| (0..width).map(move |k| (i, k)));
            all.map(|(i, k)| number(field.ty.value(read(&self.fields[f], tensors, i, k)))).collect()
        });
        numbers.collect()
    }

    /// Gives `each` row, column and window of the weights of `rows`, and which of the window's weights it is.
    pub(super) fn windows(
        &self,
        streams: &Streams,
        trellis: &Trellis,
        tensors: &[&[u8]],
        rows: std::ops::Range<u32>,
        mut each: impl FnMut(u32, u32, u32, usize),
    ) {
        let (high, width) = (trellis.block.rows, trellis.block.cols);
        let (v, length) = (self.format().vector, self.format().window);
        let bits = trellis.bits(v);
        let mut words = vec![0u32; bits.div_ceil(32) as usize];
        for i in rows.start / high..rows.end.div_ceil(high) {
            for j in 0..self.shape.cols / width {
                streams.part.stream(tensors[streams.part.tensor], i.into(), j.into(), &mut words);
                for (s, places) in (0..).zip(streams.places.chunks_exact(v as usize)) {
                    let window = window(&words, bits, s * trellis.step, length);
                    for (k, &(row, col)) in places.iter().enumerate() {
                        let row = i * high + row;
                        if rows.contains(&row) {
                            each(row, j * width + col, window, k);
                        }
                    }
                }
            }
        }
    }

    /// The words of the stream of block (`i`, `j`), of a format whose codes have memory.
    pub(super) fn stream(&self, tensors: &[&[u8]], i: u32, j: u32, words: &mut [u32]) {
        if let Some(streams) = &self.streams {
            streams.part.stream(tensors[streams.part.tensor], i.into(), j.into(), words);
        }
    }

    /// The entries of row `i` of blocks: rows of a block × columns of the matrix.
    pub(super) fn block_row(
        &self,
        streams: &Streams,
        trellis: &Trellis,
        tensors: &[&[u8]],
        i: u32,
        entries: &mut Entries<'_>,
        out: &mut [f32],
    ) {
        let format = self.format();
        let (v, cols, width) = (format.vector as usize, self.shape.cols as usize, trellis.block.cols as usize);
        let bits = trellis.bits(format.vector);
        let mut words = vec![0u32; bits.div_ceil(32) as usize];
        let mut made = vec![0.0; v];
        for j in 0..cols / width {
            streams.part.stream(tensors[streams.part.tensor], i.into(), j as i64, &mut words);
            for (s, places) in (0..).zip(streams.places.chunks_exact(v)) {
                entries.of(window(&words, bits, s * trellis.step, format.window), &mut made);
                for (&(row, col), &x) in places.iter().zip(&made) {
                    out[row as usize * cols + j * width + col as usize] = x;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::window;

    #[test]
    fn windows_come_round() {
        // 40 bits: 0 to 9 in nibbles.
        let words = [0x7654_3210, 0x98];
        assert_eq!(window(&words, 40, 4, 8), 0x21);
        assert_eq!(window(&words, 40, 28, 12), 0x987);
        assert_eq!(window(&words, 40, 32, 16), 0x1098);
        assert_eq!(window(&words, 40, 39, 9), 0x21);
    }
}

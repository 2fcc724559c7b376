//! Writing codes and fields into the tensors of a layout: the inverse of reading.

use super::Reader;
use super::places::{Part, extent};
use crate::spec::format::Target;
use crate::spec::mask;

/// Sets the `len` bits (at most 32) from bit `at` on, which are 0, to `value`.
fn put_bits(bytes: &mut [u8], at: i64, len: u32, value: u32) {
    let (byte, shift) = ((at >> 3) as usize, (at & 7) as u32);
    let word = u64::from(value & mask(len)) << shift;
    let count = ((shift + len) as usize).div_ceil(8);
    bytes[byte..byte + count].iter_mut().zip(word.to_le_bytes()).for_each(|(b, new)| *b |= new);
}

impl Part {
    fn write(&self, bytes: &mut [u8], i: i64, j: i64, value: u32) {
        let value = if self.less > 0 { value.wrapping_sub(self.less) & mask(self.bits) } else { value };
        let (member, base) = self.address(i, j);
        for r in &self.runs[self.starts[member] as usize..self.starts[member + 1] as usize] {
            put_bits(bytes, base + r.at, r.len, value >> r.to);
        }
    }
}

impl Reader {
    /// Whether the layout can be written: no place is there for reading alone, and codes have no memory.
    pub fn is_writable(&self) -> bool {
        self.streams.is_none() && self.codes.iter().chain(self.fields.iter().flatten()).all(|p| p.translation.is_none())
    }

    /// The bytes of all tensors, in the layout's order, from the codes (row by row) and the bits of each field's numbers
    /// (row by row of [`crate::spec::format::Cover::grid`]).
    ///
    /// # Panics
    /// If the layout cannot be written ([`Reader::is_writable`]), or there are too few codes or numbers.
    pub fn write(&self, codes: &[u32], fields: &[Vec<u32>]) -> Vec<Vec<u8>> {
        assert!(self.is_writable(), "{} is read only", self.layout());
        let mut tensors: Vec<Vec<u8>> = self.tensors.iter().map(|t| vec![0; t.bytes as usize]).collect();
        let targets = [(Target::Code, &self.codes, codes)].into_iter().chain(
            self.fields.iter().zip(fields).enumerate().map(|(f, (parts, raw))| (Target::Field(f), parts, &raw[..])),
        );
        for (target, parts, values) in targets {
            let [n, m] = extent(self.format(), target, self.shape());
            assert_eq!(values.len() as i64, n * m, "numbers of a target");
            for part in parts {
                let bytes = &mut tensors[part.tensor];
                let mut values = values.iter();
                for i in 0..n {
                    (0..m).zip(&mut values).for_each(|(j, &value)| part.write(bytes, i, j, value));
                }
            }
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::formats;
    use crate::reader::{Book, Reader, sample_shapes};
    use crate::spec::format::Layout;

    /// What is written reads back as what it was, by every layout and by the plain one.
    #[test]
    fn what_is_written_is_what_is_read() {
        let mut count = 0;
        for name in formats::names() {
            let format = formats::get(name).unwrap();
            let mut format = format.clone();
            format.layouts.extend(Layout::plain(&format));
            let book = Arc::new(Book::without_entries(format.clone()));
            for layout in &format.layouts {
                let shapes = sample_shapes(&format, layout);
                assert!(!shapes.is_empty(), "{name} {}", layout.name);
                for shape in shapes.into_iter().take(2) {
                    // Whole sides are transformed only if they are powers of two.
                    let Ok(reader) = Reader::new(&book, layout, shape) else { continue };
                    if !reader.is_writable() {
                        continue;
                    }
                    let mut state = 1u32;
                    let mut bits = |n: u32| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 7) & crate::spec::mask(n)
                    };
                    let groups = shape.cols / format.vector;
                    let codes: Vec<u32> = (0..shape.rows * groups).map(|_| bits(format.window)).collect();
                    let of = |f: &crate::spec::format::Field| {
                        let [n, m] = f.cover.grid(shape);
                        f.entries.map_or(n * m, |entries| u64::from(entries * f.width))
                    };
                    let fields: Vec<Vec<u32>> =
                        format.fields.iter().map(|f| (0..of(f)).map(|_| bits(f.ty.bits())).collect()).collect();
                    let tensors = reader.write(&codes, &fields);
                    let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
                    for (at, code) in codes.iter().enumerate() {
                        let (row, k) = (at as u32 / groups, at as u32 % groups);
                        assert_eq!(reader.code(&tensors, row, k), *code, "{name} {} code {at}", layout.name);
                    }
                    for (f, field) in format.fields.iter().enumerate().filter(|f| f.1.entries.is_none()) {
                        for (row, col) in (0..shape.rows).flat_map(|r| (0..shape.cols).map(move |c| (r, c))) {
                            let [i, j] = field.cover.place(shape, row, col);
                            let at = i * field.cover.grid(shape)[1] + j;
                            assert_eq!(reader.field(&tensors, f, row, col).0, fields[f][at as usize], "{name}");
                        }
                    }
                    count += 1;
                }
            }
        }
        assert!(count > 80, "{count}");
    }
}

//! Whether a layout names every bit once.

use std::sync::Arc;

use super::places::{extent, stored};
use super::{Book, Misfit, Reader};
use crate::spec::Shape;
use crate::spec::format::{Cover, Field, Format, Layout, Target};
use crate::spec::index::gcd;

/// Most bytes of the tensors of a matrix for which a layout's bits are counted.
const MOST_COUNTED: u64 = 1 << 22;

/// What is wrong with the bits of a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The tensor.
    pub tensor: String,
    /// The matrix for which it was counted.
    pub shape: Shape,
    /// Bits that no place names, and the first of them.
    pub unnamed: (u64, u64),
    /// Bits that several places name, and the first of them.
    pub twice: (u64, u64),
}

/// What rows and columns of a matrix are multiples of, powers of two apart, if whole numbers of everything that belongs together
/// are to lie in it.
fn odd_sides(format: &Format) -> Shape {
    let together = |a: u32, b: u32| {
        let odd = i64::from(b >> b.trailing_zeros().min(31)).max(1);
        u32::try_from(i64::from(a) / gcd(a.into(), odd) * odd).unwrap_or(a)
    };
    let blocks = format.trellis.iter().map(|t| t.block).chain([Shape { rows: 1, cols: format.vector }]);
    let covers = format.fields.iter().filter_map(|f| match f.cover {
        Cover::Rectangle(s) => Some(s),
        Cover::Flat(cols) => Some(Shape { rows: 1, cols }),
        Cover::Matrix | Cover::Row | Cover::Column => None,
    });
    blocks.chain(covers).fold(Shape { rows: 1, cols: 1 }, |a, b| Shape {
        rows: together(a.rows, b.rows),
        cols: together(a.cols, b.cols),
    })
}

/// Shapes for which a layout's bits are counted, the smallest that fits first.
pub fn sample_shapes(format: &Format, layout: &Layout) -> Vec<Shape> {
    let odd = odd_sides(format);
    let sides = |odd: u32, most: u32| (0..=most).map_while(move |k| odd.checked_mul(1 << k));
    let mut shapes: Vec<Shape> =
        sides(odd.rows, 8).flat_map(|rows| sides(odd.cols, 15).map(move |cols| Shape { rows, cols })).collect();
    shapes.sort_by_key(|s| (s.len(), s.rows));
    let fits = |s: &Shape| {
        let covered = |f: &Field| match f.cover {
            Cover::Rectangle(c) => s.rows.is_multiple_of(c.rows) && s.cols.is_multiple_of(c.cols),
            Cover::Flat(n) => s.len().is_multiple_of(n.into()),
            Cover::Matrix | Cover::Row | Cover::Column => true,
        };
        let small = || stored(layout, *s).is_ok_and(|t| t.iter().map(|t| t.bytes).sum::<u64>() <= MOST_COUNTED);
        let blocks = format
            .trellis
            .as_ref()
            .is_none_or(|t| s.rows.is_multiple_of(t.block.rows) && s.cols.is_multiple_of(t.block.cols));
        blocks && s.cols.is_multiple_of(format.vector) && format.fields.iter().all(covered) && small()
    };
    let Some(first) = shapes.into_iter().find(fits) else { return Vec::new() };
    let larger = Shape { rows: 2 * first.rows, cols: 3 * first.cols };
    [first, larger].into_iter().filter(fits).collect()
}

/// Checks that `layout` names every bit of a `shape` matrix' tensors once; bits that a `read` place reads may be read
/// more often.
///
/// # Errors
/// A layout that does not fit the shape.
pub fn overlap(book: &Arc<Book>, layout: &Layout, shape: Shape) -> Result<Option<Overlap>, Misfit> {
    let reader = Reader::of_places(book, layout, shape)?;
    let mut named: Vec<Vec<u8>> = reader.tensors.iter().map(|t| vec![0; t.bytes as usize * 8]).collect();
    let format = reader.format();
    let streams: Vec<_> = reader.streams.iter().map(|s| s.part.clone()).collect();
    let targets = [(Target::Code, &reader.codes), (Target::Stream, &streams)]
        .into_iter()
        .chain(reader.fields.iter().enumerate().map(|(f, parts)| (Target::Field(f), parts)));
    for (target, parts) in targets {
        let [n, m] = extent(format, target, shape);
        for p in parts {
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                let (member, base) = p.address(i, j);
                for r in &p.runs[p.starts[member] as usize..p.starts[member + 1] as usize] {
                    for at in base + r.at..base + r.at + i64::from(r.len) {
                        let count = &mut named[p.tensor][at as usize];
                        *count = if p.translation.is_some() { 1 } else { count.saturating_add(1) };
                    }
                }
            }
        }
    }
    for (t, counts) in reader.tensors.iter().zip(&named) {
        let of = |wrong: &dyn Fn(u8) -> bool| {
            let mut bits = (0u64..).zip(counts).filter(|c| wrong(*c.1)).map(|c| c.0);
            let first = bits.next();
            (first.map_or(0, |_| 1 + bits.count() as u64), first.unwrap_or(0))
        };
        let (unnamed, twice) = (of(&|n| n == 0), of(&|n| n > 1));
        if unnamed.0 + twice.0 > 0 {
            return Ok(Some(Overlap { tensor: t.name.clone(), shape, unnamed, twice }));
        }
    }
    Ok(None)
}

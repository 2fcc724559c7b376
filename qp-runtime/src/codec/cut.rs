//! Parts of packed matrices, for several devices, and matrices below one another, for one launch.
//!
//! Nothing is decoded: tiles are independent of one another, so a part is some of the matrix's tiles. A part of the columns
//! needs a rotation in blocks, which turns no column outside the part into it. Its signs are those of the whole matrix from the
//! first column on, which are the signs of another seed ([`qp_codegen::layout::signs`]): so the part has a quantizer of its own.

use std::ops::Range;

use qp_codegen::layout::{Packed, signs_from};
use qp_codegen::spec::{Quantizer, Rotation, ScaleKind, Shape};

use super::PackedMatrix;

/// Why a matrix cannot be cut, or not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// A part that the matrix does not have, or an empty one.
    #[error("{} {} to {} are no part of its {of}", what, part.start, part.end)]
    Outside {
        /// Rows or columns.
        what: &'static str,
        /// The part.
        part: Range<u32>,
        /// How many there are.
        of: u32,
    },
    /// A part that begins or ends within a tile or a block of the rotation.
    #[error(
        "{what} {} to {}: a matrix of `{name}` is cut at multiples of {step} {what} only; use fewer devices, or keep the layer whole",
        part.start, part.end
    )]
    Within {
        /// Rows or columns.
        what: &'static str,
        /// The part.
        part: Range<u32>,
        /// The quantizer.
        name: String,
        /// Where it may be cut.
        step: u32,
    },
    /// A rotation that mixes all columns.
    #[error(
        "columns of a matrix of `{0}` cannot be cut, since it rotates all of them together; \
         use a quantizer whose rotation is in blocks, as all of the palette (`rotate hadamard(seed = 0, block = 128, interleave = 1024)`)"
    )]
    Whole(String),
    /// Matrices that cannot lie below one another.
    #[error(
        "matrices of other quantizers, columns or scales, or whose rows are no whole tiles, cannot lie below one another"
    )]
    Unlike,
}

/// Rows and columns at whose multiples a matrix of `q` may be cut; no number of columns if it may not.
pub fn steps(q: &Quantizer) -> (u32, Option<u32>) {
    let tile = Packed::new(q, Shape { rows: 1, cols: 1 }).tile;
    let period = tile.cols * q.codes.len() as u32;
    let columns = match q.rotation {
        Rotation::None => Some(period),
        // Signs come 64 from a word.
        Rotation::Hadamard { seed: _, block, interleave } => {
            block.map(|block| lcm(lcm(period, interleave.unwrap_or(block)), 64))
        }
    };
    (tile.rows, columns)
}

fn lcm(a: u32, b: u32) -> u32 {
    let gcd = |mut a: u32, mut b: u32| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}

/// The part of `m` with these rows and columns, and its quantizer.
///
/// # Errors
/// Where it cannot be cut there.
pub fn cut(
    q: &Quantizer,
    m: &PackedMatrix,
    rows: Range<u32>,
    columns: Range<u32>,
) -> Result<(Quantizer, PackedMatrix), CutError> {
    let Shape { rows: all_rows, cols: all_columns } = m.layout.shape;
    let (row_step, column_step) = steps(q);
    let check = |what, part: &Range<u32>, of: u32, step: u32| {
        let part = part.clone();
        if part.start >= part.end || part.end > of {
            return Err(CutError::Outside { what, part, of });
        }
        if !part.start.is_multiple_of(step) || (part.end != of && !part.end.is_multiple_of(step)) {
            return Err(CutError::Within { what, part, name: q.name.clone(), step });
        }
        Ok(())
    };
    check("rows", &rows, all_rows, row_step)?;
    let whole = columns == (0..all_columns);
    let step = match column_step {
        Some(step) => step,
        None if whole => 1,
        None => return Err(CutError::Whole(q.name.clone())),
    };
    check("columns", &columns, all_columns, step)?;

    let mut of_part = q.clone();
    if let Rotation::Hadamard { seed, .. } = &mut of_part.rotation {
        *seed = signs_from(*seed, columns.start);
    }
    let shape = Shape { rows: rows.end - rows.start, cols: columns.end - columns.start };
    let layout = Packed::new(&of_part, shape);
    let (first_tile, stride) = (rows.start / m.layout.tile.rows, m.layout.row_stride());
    let first = m.layout.col_offset(columns.start / m.layout.tile.cols);
    let words = (0..layout.row_tiles())
        .flat_map(|tile| &m.words[(first_tile + tile) as usize * stride + first..][..layout.row_stride()])
        .copied()
        .collect::<Vec<u32>>();
    let scales = match q.scale {
        ScaleKind::Row => m.scales[rows.start as usize..rows.end as usize].to_vec(),
        ScaleKind::Matrix => m.scales.clone(),
    };
    Ok((of_part, PackedMatrix { layout, words: words.into(), scales }))
}

/// Matrices of one quantizer as one, each below the one before: their products are one launch.
///
/// # Errors
/// If they differ in columns or have one scale each, or if one but the last has no whole tiles of rows.
pub fn stack(q: &Quantizer, parts: &[&PackedMatrix]) -> Result<PackedMatrix, CutError> {
    let (Some(first), Some((_, before))) = (parts.first(), parts.split_last()) else { return Err(CutError::Unlike) };
    let cols = first.layout.shape.cols;
    let alike = parts.iter().all(|p| p.layout.shape.cols == cols && p.layout.tile == first.layout.tile);
    let whole = before.iter().all(|p| p.layout.shape.rows == p.layout.padded_rows());
    let rows: u32 = parts.iter().map(|p| p.layout.shape.rows).sum();
    let shape = Shape { rows, cols };
    if !alike || !whole || (q.scale == ScaleKind::Matrix && parts.len() > 1) || Packed::check(q, shape).is_err() {
        return Err(CutError::Unlike);
    }
    let words: Vec<u32> = parts.iter().flat_map(|p| p.words.iter()).copied().collect();
    let scales = parts.iter().flat_map(|p| p.scales.iter()).copied().collect();
    PackedMatrix::from_parts(q, shape, words, scales).ok_or(CutError::Unlike)
}

#[cfg(test)]
mod tests {
    use qp_codegen::palette;
    use qp_codegen::reference::Rotator;

    use super::*;
    use crate::codec::{decode_matrix, encode_matrix};

    fn made(q: &Quantizer, shape: Shape) -> PackedMatrix {
        let mut weights: Vec<f32> = (0..shape.len()).map(|i| ((i * 7919 % 1013) as f32 - 506.0) / 300.0).collect();
        let rotator = Rotator::new(q.rotation, shape.cols);
        weights.chunks_mut(shape.cols as usize).for_each(|row| rotator.apply(row));
        encode_matrix(q, shape, &weights, &|_| ()).unwrap()
    }

    fn decoded(q: &Quantizer, m: &PackedMatrix) -> Vec<f32> {
        let mut weights = decode_matrix(q, m);
        let back = Rotator::inverse(q.rotation, m.layout.shape.cols);
        weights.chunks_mut(m.layout.shape.cols as usize).for_each(|row| back.apply(row));
        weights
    }

    #[test]
    fn a_part_decodes_to_the_part_of_what_the_matrix_decodes_to() {
        for (name, shape) in [("nuq_3", Shape { rows: 100, cols: 2048 }), ("htcq_2.25", Shape { rows: 64, cols: 1090 })]
        {
            let q = palette::get(name).unwrap();
            let m = made(&q, shape);
            let all = decoded(&q, &m);
            let (row_step, column_step) = steps(&q);
            let column_step = column_step.unwrap();
            for rows in [0..shape.rows, 0..row_step, row_step..shape.rows] {
                for columns in [0..shape.cols, 0..column_step, column_step..shape.cols] {
                    let (of_part, part) = cut(&q, &m, rows.clone(), columns.clone()).unwrap();
                    let wanted: Vec<f32> = rows
                        .clone()
                        .flat_map(|r| &all[(r * shape.cols + columns.start) as usize..][..columns.len()])
                        .copied()
                        .collect();
                    assert_eq!(decoded(&of_part, &part), wanted, "{name} {rows:?} {columns:?}");
                    // The part's quantizer can be written and read.
                    let text = of_part.canonical();
                    let read = qp_codegen::spec::load_str("part", &text).unwrap().quantizers.remove(0);
                    assert_eq!(read.hash(), of_part.hash());
                }
            }
        }
    }

    #[test]
    fn matrices_below_one_another_are_one() {
        let q = palette::get("nuq_4").unwrap();
        let m = made(&q, Shape { rows: 90, cols: 256 });
        let step = steps(&q).0;
        let parts = [0..step, step..2 * step, 2 * step..90].map(|rows| cut(&q, &m, rows, 0..256).unwrap().1);
        assert_eq!(stack(&q, &parts.each_ref()).unwrap(), m);
        assert_eq!(stack(&q, &[&parts[2], &parts[0]]), Err(CutError::Unlike));
    }

    #[test]
    fn what_cannot_be_cut_is_said() {
        let mut q = palette::get("nuq_4").unwrap();
        let m = made(&q, Shape { rows: 64, cols: 512 });
        let said = |q: &Quantizer, rows, columns| cut(q, &m, rows, columns).unwrap_err().to_string();
        assert!(
            said(&q, 0..3, 0..512).contains("multiples of 16 rows") || said(&q, 0..3, 0..512).contains("rows only")
        );
        assert!(said(&q, 0..64, 0..100).contains("columns only"));
        assert!(said(&q, 0..65, 0..512).contains("no part of its 64"));
        assert!(said(&q, 5..5, 0..512).contains("no part"));
        q.rotation = Rotation::Hadamard { seed: 0, block: None, interleave: None };
        assert!(said(&q, 0..64, 0..256).contains("rotation is in blocks"));
        assert!(cut(&q, &m, 0..32, 0..512).is_ok());
    }
}

//! Experts that files stack in one tensor, plain or MXFP4. Each is given the names that the program has; what it holds is
//! gathered when it is read, MXFP4 as the format.

use std::sync::{Arc, LazyLock};

use half::bf16;
use qp_codegen::formats;
use qp_codegen::reader::{Book, Misfit, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::Layout;
use safetensors::Dtype;

use super::Error;
use super::config::Config;
use super::tensors::{Bytes, Entry, Kind, TensorDir};

/// How the elements of a tensor lie in another one.
#[derive(Debug)]
pub(super) enum View {
    /// Element `(row, column)` is number `first + row · rows + column · columns` of the stored ones.
    Strided {
        /// Number of the first.
        first: usize,
        /// Distance of rows.
        rows: usize,
        /// Distance of columns.
        columns: usize,
    },
    /// MXFP4: 16 bytes for 32 columns, the even ones low, and the logarithm of their scale, plus 127, in a byte. Row `i` is
    /// number `first + step · i` of the stored ones.
    Mxfp4 {
        /// Reads the matrix from its blocks and its logarithms ([`View::packed`]).
        reader: Arc<Reader>,
        /// The logarithms.
        scales: Bytes,
        /// Number of the first row.
        first: usize,
        /// Distance of rows.
        step: usize,
    },
}

impl View {
    /// The bytes of a tensor of shape `shape` and elements of `size` bytes, from those that are stored.
    pub fn bytes(&self, stored: &Bytes, shape: &[usize], size: usize) -> Vec<u8> {
        let (rows, columns) = (shape[0], shape[1..].iter().product::<usize>());
        let mut out = Vec::with_capacity(rows * columns * size);
        match self {
            View::Strided { first, rows: row, columns: column } => {
                for i in 0..rows {
                    for j in 0..columns {
                        let at = (first + i * row + j * column) * size;
                        out.extend_from_slice(&stored.as_slice()[at..at + size]);
                    }
                }
            }
            View::Mxfp4 { .. } => {
                let (reader, parts) = self.packed(stored).expect("of MXFP4");
                let mut weights = vec![0f32; rows * columns];
                reader.read_rows(&parts.each_ref().map(Bytes::as_slice), 0, &mut weights);
                // At most two bits of mantissa: exact.
                out.extend(weights.into_iter().flat_map(|w| bf16::from_f32(w).to_le_bytes()));
            }
        }
        out
    }

    /// Of MXFP4, the format's reader of the matrix, and its blocks and scales from those that are stored.
    pub fn packed(&self, stored: &Bytes) -> Option<(&Arc<Reader>, [Bytes; 2])> {
        let View::Mxfp4 { reader, scales, first, step } = self else { return None };
        let (rows, groups) = (reader.shape().rows as usize, reader.shape().cols as usize / 32);
        let gather = |from: &Bytes, width: usize| {
            if *step == 1 {
                return from.part(first * width..(first + rows) * width);
            }
            let row = |i: usize| &from.as_slice()[(first + step * i) * width..][..width];
            (0..rows).flat_map(row).copied().collect::<Vec<u8>>().into()
        };
        Some((reader, [gather(stored, groups * 16), gather(scales, groups)]))
    }
}

/// Gives the tensors of `dir` the names and shapes that the program of `config` has.
///
/// # Errors
/// If what belongs together does not fit.
pub(super) fn unpack(dir: &mut TensorDir, config: &Config) -> Result<(), Error> {
    if config.stacked {
        for layer in 0..config.layers {
            unstack(dir, &format!("model.layers.{layer}.mlp.experts."), config)?;
        }
    }
    Ok(())
}

/// Names of layers whose experts files stack, and of the layers whose rows follow each other by turns in them.
pub(crate) const STACKED: [(&str, &[&str]); 2] =
    [("gate_up_proj", &["gate_proj", "up_proj"]), ("down_proj", &["down_proj"])];

/// Takes apart the experts whose tensors' names begin with `prefix`.
fn unstack(dir: &mut TensorDir, prefix: &str, config: &Config) -> Result<(), Error> {
    let Some(experts) = &config.experts else { return Ok(()) };
    let (count, inner, hidden) = (experts.count, experts.inner, config.hidden);
    // Rows and columns as the program has them.
    for ((stacked, parts), (rows, columns)) in STACKED.into_iter().zip([(inner, hidden), (hidden, inner)]) {
        let step = parts.len();
        let all = format!("{prefix}{stacked}");
        let name = |expert: usize, part: usize, kind: &str| format!("{prefix}{expert}.{}.{kind}", parts[part]);
        let each = || (0..count).flat_map(|e| (0..step).map(move |part| (e, part)));
        if let Some(bias) = dir.take(&format!("{all}_bias")) {
            fits(&format!("{all}_bias"), &bias, &[count, step * rows])?;
            for (e, part) in each() {
                let view = View::Strided { first: e * step * rows + part, rows: step, columns: 0 };
                let entry = Entry::of_view(bias.kind.clone(), vec![rows], bias.bytes.clone(), view);
                dir.put(name(e, part, "bias"), entry);
            }
        }
        if let Some(plain) = dir.take(&all) {
            fits(&all, &plain, &[count, columns, step * rows])?;
            for (e, part) in each() {
                let first = e * columns * step * rows + part;
                let view = View::Strided { first, rows: step, columns: step * rows };
                let entry = Entry::of_view(plain.kind.clone(), vec![rows, columns], plain.bytes.clone(), view);
                dir.put(name(e, part, "weight"), entry);
            }
        } else if let (Some(blocks), Some(scales)) =
            (dir.take(&format!("{all}_blocks")), dir.take(&format!("{all}_scales")))
        {
            let groups = columns / 32;
            fits(&format!("{all}_blocks"), &blocks, &[count, step * rows, groups, 16])?;
            fits(&format!("{all}_scales"), &scales, &[count, step * rows, groups])?;
            for (of, entry) in [("blocks", &blocks), ("scales", &scales)] {
                if entry.kind != Kind::Plain(Dtype::U8) {
                    let found = format!("{:?}, where U8 belongs", entry.kind);
                    return Err(Error::Dtype { name: format!("{all}_{of}"), found });
                }
            }
            if !columns.is_multiple_of(32) {
                let expected = vec![count, step * rows, columns.div_ceil(32), 16];
                return Err(Error::Shape { name: format!("{all}_blocks"), found: blocks.shape, expected });
            }
            let reader = mxfp4(rows, columns).map_err(|why| Error::file(dir.path(), format!("{all}_blocks: {why}")))?;
            for (e, part) in each() {
                let (reader, scales) = (reader.clone(), scales.bytes.clone());
                let view = View::Mxfp4 { reader, scales, first: e * step * rows + part, step };
                let kind = Kind::Plain(Dtype::BF16);
                let entry = Entry::of_view(kind, vec![rows, columns], blocks.bytes.clone(), view);
                dir.put(name(e, part, "weight"), entry);
            }
        }
    }
    Ok(())
}

/// Reads a matrix of gpt-oss's experts.
fn mxfp4(rows: usize, columns: usize) -> Result<Arc<Reader>, Misfit> {
    static BOOK: LazyLock<(Arc<Book>, &Layout)> = LazyLock::new(|| {
        let format = formats::get("mxfp4").expect("built in");
        (Arc::new(Book::new(format.clone())), format.layout("gpt_oss").expect("built in"))
    });
    let (book, layout) = &*BOOK;
    // Sides of a checked configuration fit 32 bits.
    Reader::new(book, layout, Shape { rows: rows as u32, cols: columns as u32 }).map(Arc::new)
}

fn fits(name: &str, entry: &Entry, expected: &[usize]) -> Result<(), Error> {
    if entry.shape == expected {
        return Ok(());
    }
    Err(Error::Shape { name: name.to_owned(), found: entry.shape.clone(), expected: expected.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mxfp4_has_the_even_columns_low() {
        let mut blocks = vec![0u8; 48];
        (blocks[16], blocks[17]) = (0x21, 0xf7);
        let reader = mxfp4(1, 32).unwrap();
        let view = View::Mxfp4 { reader, scales: vec![127, 128, 127].into(), first: 1, step: 2 };
        let out = view.bytes(&blocks.into(), &[1, 32], 2);
        let out: Vec<f32> = out.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(out[..5], [1.0, 2.0, 12.0, -12.0, 0.0]);
    }

    #[test]
    fn strided_elements_are_gathered() {
        let view = View::Strided { first: 1, rows: 2, columns: 4 };
        assert_eq!(view.bytes(&vec![0, 1, 2, 3, 4, 5, 6, 7].into(), &[2, 2], 1), [1, 5, 3, 7]);
        let bias = View::Strided { first: 0, rows: 2, columns: 0 };
        assert_eq!(bias.bytes(&vec![0, 1, 2, 3].into(), &[2], 1), [0, 2]);
    }
}

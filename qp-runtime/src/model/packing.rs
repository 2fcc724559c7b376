//! Weights that files hold in other forms than the model computes with: experts stacked in one tensor, MXFP4, and FP8 with
//! a scale for each block. Each is given the names that the program has; what it holds is decoded when it is read, but MXFP4 is put
//! together as the format.

use std::sync::{Arc, LazyLock};

use half::bf16;
use qp_codegen::formats;
use qp_codegen::reader::{Book, Misfit, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::{Layout, Number};
use safetensors::Dtype;

use super::Error;
use super::config::{Config, Packing};
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
    /// FP8 (E4M3) with a scale for each block of rows and columns.
    Fp8 {
        /// The scales, blocks of rows × blocks of columns.
        scales: Bytes,
        /// Rows and columns of a block.
        block: [usize; 2],
    },
}

impl View {
    /// The bytes of a tensor of shape `shape` and elements of `size` bytes, from those that are stored.
    pub fn bytes(&self, stored: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
        let (rows, columns) = (shape[0], shape[1..].iter().product::<usize>());
        let mut out = Vec::with_capacity(rows * columns * size);
        match self {
            View::Strided { first, rows: row, columns: column } => {
                for i in 0..rows {
                    for j in 0..columns {
                        let at = (first + i * row + j * column) * size;
                        out.extend_from_slice(&stored[at..at + size]);
                    }
                }
            }
            View::Mxfp4 { reader: _, scales, first, step } => {
                let groups = columns / 32;
                for i in (0..rows).map(|i| first + step * i) {
                    let scales = &scales.as_slice()[i * groups..(i + 1) * groups];
                    let blocks = &stored[i * groups * 16..(i + 1) * groups * 16];
                    for (block, scale) in blocks.as_chunks::<16>().0.iter().zip(scales) {
                        let scale = 2f32.powi(i32::from(*scale) - 127);
                        for code in block.iter().flat_map(|b| [b & 15, b >> 4]) {
                            // At most two bits of mantissa: exact.
                            out.extend(bf16::from_f32(fp4(code) * scale).to_le_bytes());
                        }
                    }
                }
            }
            View::Fp8 { scales, block: [of_rows, of_columns] } => {
                let scales = scales.as_slice().as_chunks::<4>().0;
                let across = columns.div_ceil(*of_columns);
                for (i, row) in stored.chunks_exact(columns.max(1)).enumerate() {
                    for (j, code) in row.iter().enumerate() {
                        let scale = f32::from_le_bytes(scales[i / of_rows * across + j / of_columns]);
                        out.extend((Number::E4m3.value((*code).into()) * scale).to_le_bytes());
                    }
                }
            }
        }
        out
    }
}

impl View {
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

/// A number of four bits: sign, two bits of exponent, one of mantissa.
fn fp4(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// Gives the tensors of `dir` the names and shapes that the program of `config` has.
///
/// # Errors
/// If what belongs together does not fit.
pub(super) fn unpack(dir: &mut TensorDir, config: &Config) -> Result<(), Error> {
    if let Packing::Fp8(block) = config.packing {
        scale_blocks(dir, block)?;
    }
    if config.stacked {
        for layer in 0..config.layers {
            unstack(dir, &format!("model.layers.{layer}.mlp.experts."), config)?;
        }
    }
    Ok(())
}

/// Joins each FP8 tensor `NAME` with its scales, `NAME_scale_inv`.
fn scale_blocks(dir: &mut TensorDir, block: [usize; 2]) -> Result<(), Error> {
    let names: Vec<String> = dir.names().filter(|n| n.ends_with("_scale_inv")).map(str::to_owned).collect();
    for of_scales in names {
        let name = of_scales.trim_end_matches("_scale_inv");
        let (Some(scales), Some(entry)) = (dir.take(&of_scales), dir.take(name)) else {
            return Err(Error::MissingTensor { name: name.to_owned(), path: dir.path().to_owned() });
        };
        let &[rows, columns] = entry.shape.as_slice() else {
            return Err(Error::Shape { name: name.to_owned(), found: entry.shape, expected: vec![0, 0] });
        };
        let expected = vec![rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        if scales.shape != expected {
            return Err(Error::Shape { name: of_scales, found: scales.shape, expected });
        }
        for (of, found, wanted) in [(name, entry.kind, Dtype::F8_E4M3), (of_scales.as_str(), scales.kind, Dtype::F32)] {
            if found != Kind::Plain(wanted) {
                return Err(Error::Dtype {
                    name: of.to_owned(),
                    found: format!("{found:?}, where {wanted:?} belongs"),
                });
            }
        }
        let view = View::Fp8 { scales: scales.bytes, block };
        dir.put(name.to_owned(), Entry::of_view(Kind::Plain(Dtype::F32), entry.shape, entry.bytes, view));
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
    use crate::model::Tensor;

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn blocks_have_scales_of_their_own() {
        let scales: Vec<u8> = [2f32, 3.0, 4.0, 5.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = View::Fp8 { scales: scales.into(), block: [2, 2] };
        let out = floats(&view.bytes(&[0x38; 9], &[3, 3], 4));
        assert_eq!(out, [2.0, 2.0, 3.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0]);
    }

    #[test]
    fn mxfp4_has_the_even_columns_low() {
        let mut blocks = vec![0u8; 48];
        (blocks[16], blocks[17]) = (0x21, 0xf7);
        let reader = mxfp4(1, 32).unwrap();
        let view = View::Mxfp4 { reader, scales: vec![127, 128, 127].into(), first: 1, step: 2 };
        let out: Vec<f32> =
            view.bytes(&blocks, &[1, 32], 2).as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(out[..5], [1.0, 2.0, 12.0, -12.0, 0.0]);
        let (reader, parts) = view.packed(&blocks.into()).unwrap();
        assert_eq!(Tensor::of_format(reader, parts.into()).unwrap().to_f32(), out);
    }

    #[test]
    fn strided_elements_are_gathered() {
        let view = View::Strided { first: 1, rows: 2, columns: 4 };
        assert_eq!(view.bytes(&[0, 1, 2, 3, 4, 5, 6, 7], &[2, 2], 1), [1, 5, 3, 7]);
        let bias = View::Strided { first: 0, rows: 2, columns: 0 };
        assert_eq!(bias.bytes(&[0, 1, 2, 3], &[2], 1), [0, 2]);
    }
}

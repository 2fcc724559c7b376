//! How well a quantizer reproduces a Gaussian source.

use qp_codegen::reader::Misfit;
use qp_codegen::reference;
use qp_codegen::spec::{Code, Quantizer, Shape};
use rayon::prelude::*;

use super::search::Search;
use super::{FormatEncoder, Gaussian, train};
use crate::device::{DeviceError, Executor};

/// A measured mean squared error for a source of unit variance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distortion {
    /// Mean squared error.
    pub mean: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// Weights that were encoded.
    pub samples: u64,
}

/// Measures `q` on `samples` samples (rounded up to blocks) of the stream `seed`, in equal parts for the codes of a mix,
/// on the CPU.
pub fn measure(q: &Quantizer, samples: u64, seed: u64) -> Distortion {
    let share = samples.div_ceil(q.codes.len() as u64);
    let parts: Vec<Distortion> = q.codes.iter().map(|c| measure_code(c, share, seed)).collect();
    combine(&parts)
}

/// As [`measure`], of one code.
pub fn measure_code(code: &Code, samples: u64, seed: u64) -> Distortion {
    measure_on(None, code, samples, seed).expect("the CPU does not fail")
}

/// The distortion of a mix whose codes, measured apart, have these.
pub fn combine(parts: &[Distortion]) -> Distortion {
    let n = parts.len() as f64;
    Distortion {
        mean: parts.iter().map(|d| d.mean).sum::<f64>() / n,
        standard_error: parts.iter().map(|d| d.standard_error.powi(2)).sum::<f64>().sqrt() / n,
        samples: parts.iter().map(|d| d.samples).sum(),
    }
}

/// Measures a format that can be made on a Gaussian matrix of `columns` columns and at least `samples` weights, of the
/// stream `seed`, on the CPU. Returns the bits a weight of all its tensors too.
///
/// # Errors
/// If such a matrix does not fit its layout.
pub fn measure_format(
    encoder: &FormatEncoder,
    columns: u32,
    samples: u64,
    seed: u64,
) -> Result<(f64, Distortion), Misfit> {
    // Whole squares and words of all layouts.
    let rows = samples.div_ceil(columns.into()).next_multiple_of(128) as u32;
    let shape = Shape { rows, cols: columns };
    let reader = encoder.reader(shape)?;
    let weights = Gaussian::new(seed).samples(shape.len() as usize);
    let made = encoder.encode(&reader, &weights, &|_| ()).expect("finite weights");
    let tensors: Vec<&[u8]> = made.iter().map(Vec::as_slice).collect();
    let errors: Vec<f64> = (0..rows)
        .into_par_iter()
        .map(|row| {
            let mut decoded = vec![0.0; columns as usize];
            reader.read(&tensors, row, 0, &mut decoded);
            let weights = &weights[row as usize * columns as usize..];
            let squares = decoded.iter().zip(weights).map(|(a, b)| f64::from(a - b).powi(2));
            squares.sum::<f64>() / f64::from(columns)
        })
        .collect();
    let n = errors.len() as f64;
    let mean = errors.iter().sum::<f64>() / n;
    let variance = errors.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let bits = made.iter().map(Vec::len).sum::<usize>() as f64 * 8.0 / shape.len() as f64;
    Ok((bits, Distortion { mean, standard_error: (variance / n).sqrt(), samples: shape.len() }))
}

/// As [`measure_code`], on a device if there is one; the result is the same.
///
/// # Errors
/// A failing device.
pub fn measure_on(device: Option<&Executor>, code: &Code, samples: u64, seed: u64) -> Result<Distortion, DeviceError> {
    let search = Search::roomy(device, code)?;
    let (block, v) = (code.block.len() as usize, code.vector as usize);
    let blocks = (samples as usize).div_ceil(block).max(2);
    let book: Vec<f32> = code.codebook().iter().map(|&e| reference::weight(code, e, 1.0)).collect();
    let mut random = Gaussian::new(seed);
    // Without memory: drawn wider and weighted, for else a few far samples decide at high rates.
    let width = if code.is_memoryless() { train::entry_spread(code) } else { 1.0 };
    let (mut sum, mut squares) = (0.0, 0.0);
    let mut left = blocks;
    while left > 0 {
        // In parts, to bound the memory.
        let n = left.min(1 << 14);
        let mut x = random.samples(n * block);
        x.iter_mut().for_each(|x| *x *= width as f32);
        let windows = search.windows(&x)?;
        for (x, windows) in x.chunks_exact(block).zip(windows.chunks_exact(block / v)) {
            let squares_of_steps = x.chunks_exact(v).zip(windows).map(|(x, &w)| {
                let decoded = &book[w as usize * v..][..v];
                let error: f64 = x.iter().zip(decoded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                if code.is_memoryless() { error * train::likelihood_ratio(x, width) } else { error }
            });
            let error = squares_of_steps.sum::<f64>() / block as f64;
            sum += error;
            squares += error * error;
        }
        left -= n;
    }
    // Blocks are independent; weights of one are not.
    let n = blocks as f64;
    let mean = sum / n;
    let variance = (squares / n - mean * mean).max(0.0) * n / (n - 1.0);
    Ok(Distortion { mean, standard_error: (variance / n).sqrt(), samples: (blocks * block) as u64 })
}

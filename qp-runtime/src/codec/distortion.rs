//! How well a quantizer reproduces a Gaussian source.

use qp_codegen::reference;
use qp_codegen::spec::{Code, Quantizer};

use super::search::Search;
use super::{Gaussian, train};
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

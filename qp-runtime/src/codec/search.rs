//! Who looks for the windows of a code: the CPU's cores or a device, with the same result.

use std::sync::Mutex;

use qp_codegen::spec::Code;
use rayon::prelude::*;

use super::encode::close;
use super::viterbi::{Scratch, Trellis};
use crate::device::{DeviceError, DeviceTrellis, Executor};

/// A code made ready to be searched.
pub struct Search {
    code: Code,
    by: By,
}

enum By {
    Cpu(Trellis, Mutex<Vec<Scratch>>),
    Device(DeviceTrellis),
}

/// Weights that a device is given at once: enough to keep it busy, and a bound on the memory that they take.
const DEVICE_WEIGHTS: usize = 1 << 23;

/// Costs that the CPU keeps where windows are all that is wanted and memory is not short, in bytes a thread.
const ROOMY: usize = 256 << 20;

impl Search {
    /// On the CPU, for `code`, whose tables must be filled.
    pub fn cpu(code: &Code) -> Search {
        Search::new(code, By::Cpu(Trellis::new(code), Mutex::default()))
    }

    /// On `device`, or on the CPU if there is none; there with more memory than [`Search::cpu`] takes, for the training
    /// of tables and the like.
    ///
    /// # Errors
    /// A code that needs more memory than the device has, a failing compiler or driver.
    pub fn roomy(device: Option<&Executor>, code: &Code) -> Result<Search, DeviceError> {
        match device {
            Some(on) => Search::on(on, code),
            None => Ok(Search::new(code, By::Cpu(Trellis::new(code).with_history(ROOMY), Mutex::default()))),
        }
    }

    /// On a device, for `code`, whose tables must be filled.
    ///
    /// # Errors
    /// A code that needs more memory than the device has, a failing compiler or driver.
    pub fn on(executor: &Executor, code: &Code) -> Result<Search, DeviceError> {
        Ok(Search::new(code, By::Device(DeviceTrellis::new(executor, code)?)))
    }

    fn new(code: &Code, by: By) -> Search {
        Search { code: code.clone(), by }
    }

    /// True if several threads should each be given some blocks; a device takes one group of blocks after the other.
    pub fn is_parallel(&self) -> bool {
        matches!(self.by, By::Cpu(..))
    }

    /// Blocks that are best given at once, by each thread if there are several.
    pub fn blocks_at_once(&self) -> usize {
        match &self.by {
            By::Cpu(trellis, _) => trellis.blocks_at_once(),
            By::Device(_) => (DEVICE_WEIGHTS / self.code.block.len() as usize).max(1),
        }
    }

    /// The windows of whole blocks of finite weights, block after block.
    ///
    /// # Errors
    /// A failing device.
    pub fn windows(&self, weights: &[f32]) -> Result<Vec<u32>, DeviceError> {
        let (block, steps) = (self.code.block.len() as usize, self.code.steps_per_block() as usize);
        let mut windows = vec![0; weights.len() / block * steps];
        let parts = self.blocks_at_once();
        match &self.by {
            By::Cpu(trellis, pool) => windows
                .par_chunks_mut(steps * parts)
                .zip(weights.par_chunks(block * parts))
                .for_each(|(windows, weights)| {
                    let mut scratch = pool.lock().map(|mut s| s.pop()).ok().flatten().unwrap_or_default();
                    trellis.encode(weights, windows, &mut scratch);
                    if let Ok(mut pool) = pool.lock() {
                        pool.push(scratch);
                    }
                }),
            By::Device(trellis) => {
                let parts = windows.chunks_mut(steps * parts).zip(weights.chunks(block * parts));
                for (windows, weights) in parts {
                    windows.copy_from_slice(&trellis.encode(weights)?.0);
                }
            }
        }
        windows.par_chunks_exact_mut(steps).for_each(|windows| close(&self.code, windows));
        Ok(windows)
    }
}

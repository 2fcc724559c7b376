//! The trellis encoder on a device.

use qp_codegen::kernels::encode::Plan;
use qp_codegen::spec::Code;
use rayon::prelude::*;

use super::{Buffer, DeviceError, Executor, LaunchArgs, Loaded};

/// Arguments of [`Plan::lower`]'s kernels.
#[derive(LaunchArgs)]
struct EncodeArgs<'a> {
    weights: &'a Buffer<u32>,
    book: &'a Buffer<u32>,
    history: &'a mut Buffer<u32>,
    floors: &'a mut Buffer<u32>,
    windows: &'a mut Buffer<u32>,
    groups: i32,
}

/// Most words of costs of all searches together: indices are signed.
const HISTORY: u64 = 1 << 31;

/// A code made ready to encode on a device: what [`crate::codec::viterbi::Trellis`] is on the CPU, with the same results.
pub struct DeviceTrellis {
    on: Executor,
    plan: Plan,
    kernel: Loaded,
    /// That the kernel runs at once.
    searches: u32,
    book: Buffer<u32>,
}

impl DeviceTrellis {
    /// Prepares `code`, whose tables must be filled.
    ///
    /// # Errors
    /// A code that needs more memory than a GPU has, a failing compiler or driver.
    pub fn new(on: &Executor, code: &Code) -> Result<DeviceTrellis, DeviceError> {
        let plan = Plan::new(code, &on.device()).map_err(|e| DeviceError::Buffer(e.to_string()))?;
        DeviceTrellis::with(on, plan)
    }

    /// Prepares to encode as `plan` says.
    pub(crate) fn with(on: &Executor, mut plan: Plan) -> Result<DeviceTrellis, DeviceError> {
        // A part of what is free, for the matrix and its result need room too.
        let free = on.free_memory()?.map_or(u64::MAX, |(free, _)| free as u64 / 2 / 4);
        let most = HISTORY.min(free) / plan.history();
        if most == 0 {
            let reason = "a search's costs need more memory than is free".into();
            return Err(DeviceError::Kernel { kernel: "encode".into(), reason });
        }
        let wanted = if on.gpu().is_some() { plan.searches(&on.device()) } else { 2 };
        let mut searches = wanted.min(most.try_into().unwrap_or(u32::MAX));
        let mut kernel = on.load::<EncodeArgs<'_>>(plan.lower(searches))?;
        // A cluster's blocks lie near to each other: a few multiprocessors may be left over. A search that has to wait for
        // another to end would double the time.
        match kernel.resident_clusters()? {
            Some(0) => {
                plan.cluster /= 2;
                return DeviceTrellis::with(on, plan);
            }
            Some(fit) if fit < searches => {
                searches = fit;
                kernel = on.load::<EncodeArgs<'_>>(plan.lower(searches))?;
            }
            Some(_) | None => {}
        }
        let book = on.upload(&plan.book())?;
        Ok(DeviceTrellis { on: on.clone(), plan, kernel, searches, book })
    }

    /// Blocks of weights that are encoded at once.
    pub fn blocks_at_once(&self) -> usize {
        self.searches as usize * self.plan.lanes as usize
    }

    /// The kernel.
    pub fn kernel(&self) -> &Loaded {
        &self.kernel
    }

    /// The windows of whole `blocks` of finite weights, block after block, and the seconds that the kernel took.
    ///
    /// # Errors
    /// A full GPU, a failing driver.
    pub fn encode(&self, blocks: &[f32]) -> Result<(Vec<u32>, f64), DeviceError> {
        let (on, plan) = (&self.on, &self.plan);
        let (len, steps, lanes) = (plan.code.block.len() as usize, plan.steps() as usize, plan.lanes as usize);
        let count = blocks.len() / len;
        let groups = count.div_ceil(lanes);
        let per_group = steps * plan.weight_words() as usize;
        let mut words = vec![0u32; groups * per_group];
        words
            .par_chunks_exact_mut(per_group)
            .zip(blocks.par_chunks(len * lanes))
            .for_each(|(words, blocks)| plan.weights(blocks, words));
        let weights = on.upload(&words)?;
        let working = groups.min(self.searches as usize);
        let mut history = on.zeroed::<u32>(plan.history() as usize * working)?;
        let mut floors = on.zeroed::<u32>(plan.floors() as usize * working)?;
        let mut windows = on.zeroed::<u32>(groups * lanes * steps)?;
        let groups = i32::try_from(groups).map_err(|_| DeviceError::Buffer("too many blocks at once".into()))?;
        let args = EncodeArgs {
            weights: &weights,
            book: &self.book,
            history: &mut history,
            floors: &mut floors,
            windows: &mut windows,
            groups,
        };
        let seconds = on.time(|| on.launch(&self.kernel, args))?;
        let mut out = vec![0; count * steps];
        windows.read(0, &mut out)?;
        Ok((out, seconds))
    }
}

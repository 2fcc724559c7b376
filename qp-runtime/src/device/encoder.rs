//! The trellis encoder on a device.

use std::sync::{Mutex, PoisonError};

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
    /// For the kernel's own use; its launches follow each other, so one serves all.
    own: Mutex<Option<Own>>,
    /// Of calls that are over.
    rooms: Mutex<Vec<Room>>,
}

/// What the searches of a kernel keep.
struct Own {
    history: Buffer<u32>,
    floors: Buffer<u32>,
}

/// What one call copies to the device and back.
struct Room {
    weights: Buffer<u32>,
    windows: Buffer<u32>,
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
        let (own, rooms) = (Mutex::default(), Mutex::default());
        Ok(DeviceTrellis { on: on.clone(), plan, kernel, searches, book, own, rooms })
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
    /// Several threads may call it: what one copies passes the kernels of the others by.
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
        let mut room = self.room(words.len(), groups * lanes * steps)?;
        room.weights.write_beside(0, &words)?;
        let seconds = on.time(|| self.launch(&mut room, groups))?;
        let mut out = vec![0; count * steps];
        room.windows.read_beside(0, &mut out)?;
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner).push(room);
        Ok((out, seconds))
    }

    /// Starts the search of `groups` groups of blocks.
    fn launch(&self, room: &mut Room, groups: usize) -> Result<(), DeviceError> {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let working = groups.min(self.searches as usize);
        let (history, floors) = (self.plan.history() as usize * working, self.plan.floors() as usize * working);
        let Own { history, floors } = match own.take() {
            Some(own) if own.history.len() >= history => own,
            Some(_) | None => Own { history: self.on.zeroed(history)?, floors: self.on.zeroed(floors)? },
        };
        let Own { history, floors } = own.insert(Own { history, floors });
        let groups = i32::try_from(groups).map_err(|_| DeviceError::Buffer("too many blocks at once".into()))?;
        let Room { weights, windows } = room;
        self.on.launch(&self.kernel, EncodeArgs { weights, book: &self.book, history, floors, windows, groups })
    }

    /// Room for so many words of weights and windows: what a call before left, if it is large enough.
    fn room(&self, weights: usize, windows: usize) -> Result<Room, DeviceError> {
        let left = self.rooms.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match left {
            Some(room) if room.weights.len() >= weights && room.windows.len() >= windows => Ok(room),
            Some(_) | None => {
                let room = Room { weights: self.on.zeroed(weights)?, windows: self.on.zeroed(windows)? };
                // The zeros are to be there before what is copied past the stream.
                self.on.synchronize()?;
                Ok(room)
            }
        }
    }
}

//! Which device runs a model.

use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;

use crate::device::{DeviceError, Executor};
use crate::engine::{Room, Session, SharedWeights};
use crate::model::Model;

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// CUDA if there is a GPU, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The first CUDA device.
    Cuda,
    /// The GPU's kernels on the CPU, lane by lane: slow, for checking.
    Interpreter,
}

/// The model in `dir` and the executor that `device` means, both opened at once: a driver takes as long to begin as
/// gigabytes of weights to be checked.
///
/// # Errors
/// If the model cannot be opened or the device is not there.
pub fn open_model(dir: &Path, device: Device) -> Result<(Model, Option<Executor>), super::Error> {
    std::thread::scope(|scope| {
        let on = scope.spawn(|| open(device));
        let model = super::model::open(dir);
        let on = on.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((model?, on?))
    })
}

/// A session of `model` on an executor, or on the CPU, with a sequence of up to `context` tokens.
///
/// # Errors
/// If the model does not fit.
pub fn open_session(model: Model, on: Option<&Executor>, context: usize) -> Result<Session, super::Error> {
    open_room(model, on, Room::one(context))
}

/// As [`open_session`], with a sequence that may take all of a room.
///
/// # Errors
/// If the model does not fit.
pub fn open_room(model: Model, on: Option<&Executor>, room: Room) -> Result<Session, super::Error> {
    Ok(Session::new(SharedWeights::on(on).open(&Arc::new(model.weights), room)?))
}

/// The tokens that `--context` asks for, of a model that has `most`.
///
/// # Errors
/// If the model has fewer.
pub fn context_within(context: u32, most: usize) -> Result<usize, super::Error> {
    match context as usize {
        context if context <= most => Ok(context),
        context => Err(format!(
            "the model's context ends at {most}: give a --context of so many tokens or fewer, not {context}"
        )
        .into()),
    }
}

/// The executors that `device` means where several can share the work: all GPUs; none for the CPU.
///
/// # Errors
/// If the device is not there.
pub fn open_all(device: Device) -> Result<Vec<Executor>, super::Error> {
    let Some(first) = open(device)? else { return Ok(Vec::new()) };
    let more = match first.gpu() {
        Some(_) => crate::device::gpus()?.1.len(),
        None => 1,
    };
    let mut all = vec![first];
    for index in 1..more {
        all.push(Executor::cuda(index)?);
    }
    Ok(all)
}

/// The executor that `device` means; `None` for the CPU.
///
/// # Errors
/// If the device is not there.
pub fn open(device: Device) -> Result<Option<Executor>, super::Error> {
    Ok(match device {
        Device::Cpu => None,
        Device::Cuda => Some(Executor::cuda(0)?),
        Device::Interpreter => Some(Executor::interpreter()),
        Device::Auto => match Executor::cuda(0) {
            Ok(executor) => Some(executor),
            Err(DeviceError::NoDriver | DeviceError::NoGpu { .. }) => None,
            Err(e) => {
                super::output::note(format_args!("running on the CPU: {e}"));
                None
            }
        },
    })
}

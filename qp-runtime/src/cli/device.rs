//! Which device runs a model.

use std::sync::Arc;

use clap::ValueEnum;

use crate::engine::{CpuEngine, Engine};
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
}

/// An engine for `model` on `device`, for sequences of up to `context` tokens.
///
/// # Errors
/// If the device is not there or the model does not fit.
pub fn open_engine(model: Model, device: Device, context: usize) -> Result<Box<dyn Engine>, super::Error> {
    match device {
        Device::Auto | Device::Cpu => Ok(Box::new(CpuEngine::new(&model.config, Arc::new(model.weights), context)?)),
        Device::Cuda => Err("no engine for CUDA in this build: use --device cpu".into()),
    }
}

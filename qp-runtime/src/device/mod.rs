//! Where kernels run: on a GPU through CUDA's driver, or on the CPU in the interpreter.
//!
//! An [`Executor`] is one of the two, with one interface: it makes [`Buffer`]s, [loads](Executor::load) kernels for a
//! [`LaunchArgs`] struct, runs them and records sequences of launches as a [`Graph`]. An engine written on it is
//! tested on the CPU, launch by launch, as it runs on a GPU.
//!
//! The driver is opened when a GPU is first asked for; a machine without one gets a [`DeviceError`] that says what to
//! install, never a panic.

mod args;
pub mod attend;
mod driver;
mod encoder;
mod error;
mod executor;
pub mod grouped;
pub mod guest;
pub mod launches;
pub mod ops;
#[cfg(test)]
mod tests;
pub mod tune;

pub use args::{Arg, ArgField, Element, LaunchArgs, Mismatch, ParamDecl, check};
pub use driver::Gpu;
pub use encoder::DeviceTrellis;
pub use error::DeviceError;
pub use executor::{Buffer, Executor, Graph, Loaded, Mail, RawBuffer, Recorder};
pub use qp_macros::LaunchArgs;

/// What the machine's driver offers: the CUDA version it supports and its GPUs.
///
/// # Errors
/// No driver, one that is too old, or no GPU.
pub fn gpus() -> Result<((u32, u32), Vec<Gpu>), DeviceError> {
    let version = driver::probe()?;
    Ok((driver::version_pair(version), driver::gpus()?))
}

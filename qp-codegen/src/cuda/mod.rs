//! CUDA: the [`Target`]s, and the printer that turns kernel IR into source that includes nothing.

mod target;

pub use target::{Device, Target, UnknownTarget};

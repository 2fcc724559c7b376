//! CUDA: the [`Target`]s, and the printer that turns kernel IR into source that includes nothing.

mod fold;
mod helpers;
mod names;
mod print;
mod target;

pub use print::{print, print_module};
pub use target::{Device, Target, UnknownTarget};

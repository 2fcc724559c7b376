//! CUDA: the [`Target`]s, and the printer that turns kernel IR, checked for one of them, into source that includes nothing.

mod check;
mod fold;
mod helpers;
mod names;
mod print;
mod target;

pub use check::{Checked, check};
pub use print::{print, print_module};
pub use target::{Device, Target, UnknownTarget};

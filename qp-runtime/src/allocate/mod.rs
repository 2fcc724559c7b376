//! The allocator: which quantizer and which launch each layer gets, so that the predicted loss is least within a
//! memory budget, a time budget or both, with a proof.
//!
//! 1. [`problem`]: layers with sensitivities, candidate quantizers with distortions, kernels with times → units of
//!    choice.
//! 2. [`choice`]: the abstract problem, free of models.
//! 3. [`dual`]: prices on the resources; the Lagrangian bound.
//! 4. [`search`]: from the bound to the proven optimum.
//!
//! Where the numbers come from: [`sensitivity`], [`profile`]. What is made of the plan: [`report`], [`heatmap`],
//! [`frontier`], and for comparison [`continuous`], the closed form.

pub mod choice;
pub mod continuous;
pub mod dual;
pub mod frontier;
pub mod heatmap;
pub mod problem;
pub mod profile;
pub mod report;
pub mod search;
pub mod sensitivity;

pub use choice::{Infeasible, Solution};
pub use problem::{Allocation, Candidate, Core, Freedom, Launch, Layer, Problem, Role, Unusable};
pub use search::Effort;

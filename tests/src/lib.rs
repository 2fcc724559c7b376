//! Tests that cross crates; see the files beside this folder. Here: what several of them need.

pub mod anchors;
pub mod conformance;
pub mod converted;
pub mod gguf;
pub mod models;
pub mod random_specs;

//! Quantize a language model with `.qspec` quantizers and run it on CPU or GPU.

pub mod allocate;
pub mod chat;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod codec;
pub mod device;
pub mod engine;
pub mod eval;
pub mod import;
pub mod input;
pub mod jit;
pub mod matrix;
pub mod memory;
pub mod model;
pub mod plan;
pub mod quantize;
pub mod serve;
pub mod svg;

// So that the paths which derives write work in this crate too.
extern crate self as qp_runtime;

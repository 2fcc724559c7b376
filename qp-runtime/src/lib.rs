//! Quantize a language model with `.qspec` quantizers and run it on CPU or GPU.

pub mod cli;
pub mod jit;

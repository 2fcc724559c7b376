//! A language for quantizers and the compiler that turns each into a specialised CUDA kernel.
//!
//! The way through, one stage a module:
//!
//! 1. [`syntax`]: `.qspec` text → tokens → tree, with diagnostics; the formatter.
//! 2. [`spec`]: tree → [`spec::Quantizer`], every constant evaluated; canonical text and hash.
//! 3. [`layout`]: where each bit of a packed matrix lies.
//! 4. [`kernels`]: quantizer + operation + shape + target → kernel IR. One file an operation.
//! 5. [`ir`]: the IR, its validator, text form and CPU interpreter.
//! 6. [`cuda`]: targets and the printer to CUDA source.
//! 7. [`nvrtc`]: CUDA source to machine code, where the compiler library is found.
//!
//! Beside the way: [`palette`], the quantizers built in; [`formats`], those of others, and [`reader`], their weights; [`explain`], a quantizer for people; [`reference`], the arithmetic
//! that every engine shares; [`metric`], that of every encoder; [`find`], where NVIDIA's libraries may lie; [`text_file`], reading what a user names; [`output`],
//! writing it.

pub mod cuda;
pub mod explain;
pub mod find;
pub mod formats;
pub mod ir;
pub mod kernels;
pub mod layout;
pub mod metric;
pub mod nvrtc;
pub mod output;
pub mod palette;
pub mod reader;
pub mod reference;
#[doc(hidden)]
pub mod skipped;
pub mod spec;
pub mod syntax;
pub mod text_file;

/// Another for other sources of this crate's lowerings, printer and cost model: what was measured of one's kernels says
/// nothing about another's.
pub const GENERATOR: &str = env!("QP_GENERATOR");

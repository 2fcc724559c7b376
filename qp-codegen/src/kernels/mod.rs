//! Lowerings: one file an operation, each from a quantizer, a shape and a target to kernel IR.

pub mod add;
pub mod append;
pub mod argmax;
pub mod attention;
pub mod decode;
pub mod dense;
pub mod dequantize;
pub mod embed;
pub mod embed_packed;
pub mod encode;
pub mod gemm;
pub mod gemv;
pub mod glu;
mod launch;
pub mod math;
pub mod norm;
pub mod prepare;
pub mod product;
pub mod read;
pub mod rotate;
mod span;

pub use span::Span;

/// A name as part of a C identifier.
fn c_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

#[cfg(test)]
mod step_tests;
#[cfg(test)]
mod tests;

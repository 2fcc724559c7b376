//! Lowerings: one file an operation, each from a quantizer, a shape and a target to kernel IR.

pub mod decode;
pub mod dequantize;
pub mod gemv;
pub mod prepare;

/// A name as part of a C identifier.
fn c_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests;

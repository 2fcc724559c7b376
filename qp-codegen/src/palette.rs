//! The built-in palette: the quantizers of `specs/`, embedded in the program.

use crate::spec::Quantizer;

/// Names of all quantizers of the palette, in order.
pub fn names() -> Vec<&'static str> {
    Vec::new()
}

/// A quantizer of the palette (perhaps untrained: see [`Quantizer::is_trained`]).
pub fn get(name: &str) -> Option<Quantizer> {
    let _ = name;
    None
}

/// Measured distortion of a quantizer of the palette: mean squared error for a unit-variance Gaussian source.
pub fn distortion(name: &str) -> Option<f64> {
    let _ = name;
    None
}

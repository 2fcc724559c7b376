//! The native half of the Python package `qpalette`. What each item does is said where Python users read it: in
//! `python/qpalette/_native.pyi`.

mod format;
mod matrix;
mod model;
mod operator;
mod spec;
mod study;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::format::{Format, StoredMatrix, formats};
    #[pymodule_export]
    use super::matrix::PackedMatrix;
    #[pymodule_export]
    use super::model::{Checkpoint, generate, logits, perplexity, quantize, seal};
    #[pymodule_export]
    use super::operator::{Lookup, Product};
    #[pymodule_export]
    use super::spec::{Diagnostic, Quantizer, SpecError, check, palette};
    #[pymodule_export]
    use super::study::{Plan, plan, sensitivity};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

/// An error of the runtime, as Python's `ValueError`.
fn invalid(e: impl std::fmt::Display) -> PyErr {
    pyo3::exceptions::PyValueError::new_err(e.to_string())
}

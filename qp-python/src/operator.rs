//! Kernels on memory and streams of PyTorch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use qp_codegen::ir::Elem;
use qp_codegen::kernels::product::MAX_BATCH;
use qp_runtime::device::Executor;
use qp_runtime::device::guest::{self, Call, Guest};

use crate::spec::{Quantizer, shape};

/// The guest of a GPU, or of the interpreter where no number is given.
fn guest(device: Option<usize>) -> PyResult<Arc<Guest>> {
    static GUESTS: Mutex<Option<HashMap<Option<usize>, Arc<Guest>>>> = Mutex::new(None);
    let mut guests = GUESTS.lock().unwrap_or_else(PoisonError::into_inner);
    let guests = guests.get_or_insert_default();
    if let Some(there) = guests.get(&device) {
        return Ok(there.clone());
    }
    let on = match device {
        Some(index) => Executor::cuda(index).map_err(failed)?,
        None => Executor::interpreter(),
    };
    Ok(guests.entry(device).or_insert(Guest::new(on)).clone())
}

/// An error of a device, as Python's `RuntimeError`.
fn failed(e: impl std::fmt::Display) -> PyErr {
    PyRuntimeError::new_err(e.to_string())
}

fn batch(tokens: u32) -> PyResult<u32> {
    if (1..=MAX_BATCH).contains(&tokens) {
        return Ok(tokens);
    }
    Err(PyValueError::new_err(format!("a batch is 1 to {MAX_BATCH} tokens, not {tokens}")))
}

/// The product of matrices of one quantizer and shape with up to `batch` tokens, on a device.
#[pyclass(frozen, module = "qpalette")]
pub struct Product(guest::Product);

#[pymethods]
impl Product {
    #[new]
    #[pyo3(signature = (quantizer, rows, columns, tokens, dtype, device, share=false))]
    #[expect(clippy::too_many_arguments, reason = "what a kernel is made for")]
    fn new(
        py: Python<'_>,
        quantizer: Quantizer,
        rows: u32,
        columns: u32,
        tokens: u32,
        dtype: &str,
        device: Option<usize>,
        share: bool,
    ) -> PyResult<Self> {
        let (shape, tokens) = (shape(&quantizer.0, rows, columns)?, batch(tokens)?);
        let input = match dtype {
            "float32" => Elem::F32,
            "float16" => Elem::F16,
            "bfloat16" => Elem::BF16,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "activations are float32, float16 or bfloat16, not {dtype}"
                )));
            }
        };
        py.detach(|| {
            let make = if share { guest::Product::share } else { guest::Product::new };
            make(&guest(device)?, &quantizer.0, shape, tokens, input).map(Product).map_err(failed)
        })
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.0.batch()
    }

    #[getter]
    fn stride(&self) -> u32 {
        self.0.stride()
    }

    #[getter]
    fn scratch_bytes(&self) -> usize {
        self.0.scratch_bytes()
    }

    #[getter]
    fn meeting_bytes(&self) -> usize {
        self.0.meeting_bytes()
    }

    #[getter]
    fn scales_at(&self) -> usize {
        self.0.scales_at()
    }

    /// Puts the launch into the stream that finds the largest magnitudes of a share's activations.
    fn largest(&self, stream: u64, tokens: u32, x: u64, scratch: u64, magnitudes: u64) -> PyResult<()> {
        let call = Call { stream, tokens, x, words: 0, scales: 0, y: 0, scratch, meeting: 0, magnitudes };
        // SAFETY: as for `launch`.
        unsafe { self.0.largest(call) }.map_err(failed)
    }

    /// Puts the launches into the stream.
    #[pyo3(signature = (stream, tokens, x, words, scales, y, scratch, meeting, magnitudes=0))]
    #[expect(clippy::too_many_arguments, reason = "addresses, in the order of the kernels")]
    fn launch(
        &self,
        stream: u64,
        tokens: u32,
        x: u64,
        words: u64,
        scales: u64,
        y: u64,
        scratch: u64,
        meeting: u64,
        magnitudes: u64,
    ) -> PyResult<()> {
        let call = Call { stream, tokens, x, words, scales, y, scratch, meeting, magnitudes };
        // SAFETY: the one caller, `qpalette/_cuda.py`, passes tensors of these sizes that PyTorch keeps for the stream.
        unsafe { self.0.launch(call) }.map_err(failed)
    }
}

/// Rows of matrices of one quantizer and shape, on a device.
#[pyclass(frozen, module = "qpalette")]
pub struct Lookup(guest::Lookup);

#[pymethods]
impl Lookup {
    #[new]
    fn new(
        py: Python<'_>,
        quantizer: Quantizer,
        rows: u32,
        columns: u32,
        tokens: u32,
        device: Option<usize>,
    ) -> PyResult<Self> {
        let (shape, tokens) = (shape(&quantizer.0, rows, columns)?, batch(tokens)?);
        py.detach(|| guest::Lookup::new(&guest(device)?, &quantizer.0, shape, tokens).map(Lookup).map_err(failed))
    }

    #[getter]
    fn stride(&self) -> u32 {
        self.0.stride()
    }

    /// Puts the launch into the stream.
    fn launch(&self, stream: u64, count: u32, tokens: u64, words: u64, scales: u64, y: u64) -> PyResult<()> {
        // SAFETY: as for `Product::launch`.
        unsafe { self.0.launch(stream, (tokens, count), words, scales, y) }.map_err(failed)
    }
}

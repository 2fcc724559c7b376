//! Quantized matrices.

use std::sync::Arc;

use numpy::{
    AllowTypeChange, PyArray1, PyArray2, PyArrayLike2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qp_codegen::reference::{self, Rotator};
use qp_runtime::codec;
use rayon::prelude::*;

use crate::invalid;
use crate::spec::{Quantizer, shape};

/// A matrix of a quantizer's windows.
#[pyclass(frozen, module = "qpalette")]
pub struct PackedMatrix {
    pub quantizer: Arc<qp_codegen::spec::Quantizer>,
    pub matrix: codec::PackedMatrix,
}

impl PackedMatrix {
    fn rows_columns(&self) -> (usize, usize) {
        let shape = self.matrix.layout.shape;
        (shape.rows as usize, shape.cols as usize)
    }

    /// Encodes a matrix.
    pub fn of(py: Python<'_>, weights: &PyReadonlyArray2<'_, f32>, quantizer: Quantizer) -> PyResult<Self> {
        let (rows, columns) = (weights.shape()[0], weights.shape()[1]);
        let [r, c] = [rows, columns].map(u32::try_from);
        let shape = shape(&quantizer.0, r.map_err(invalid)?, c.map_err(invalid)?)?;
        if !quantizer.0.is_trained() {
            return Err(PyValueError::new_err(format!("`{}` has no table yet: train it first", quantizer.0.name)));
        }
        let mut rotated: Vec<f32> = weights.as_array().iter().copied().collect();
        let q = quantizer.0;
        let matrix = py.detach(|| {
            let rotator = Rotator::new(q.rotation, shape.cols);
            rotated.par_chunks_mut(columns.max(1)).for_each(|row| rotator.apply(row));
            codec::encode_matrix(&q, shape, &rotated, &|_| ())
        });
        Ok(PackedMatrix { matrix: matrix.map_err(invalid)?, quantizer: q })
    }
}

#[pymethods]
impl PackedMatrix {
    /// Joins what `words` and `scales` gave.
    #[staticmethod]
    fn from_parts(quantizer: Quantizer, rows: u32, columns: u32, words: Vec<u32>, scales: Vec<f32>) -> PyResult<Self> {
        let shape = shape(&quantizer.0, rows, columns)?;
        let scales = scales.into_iter().map(half::bf16::from_f32).collect();
        let matrix = codec::PackedMatrix::from_parts(&quantizer.0, shape, words, scales);
        let wrong = || PyValueError::new_err("words or scales are not as many as a matrix of this shape has");
        Ok(PackedMatrix { matrix: matrix.ok_or_else(wrong)?, quantizer: quantizer.0 })
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.rows_columns()
    }

    #[getter]
    fn quantizer(&self) -> Quantizer {
        Quantizer(self.quantizer.clone())
    }

    #[getter]
    fn nbytes(&self) -> usize {
        4 * self.matrix.words.len() + 2 * self.matrix.scales.len()
    }

    #[getter]
    fn words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        PyArray1::from_slice(py, &self.matrix.words)
    }

    #[getter]
    fn scales<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        PyArray1::from_iter(py, self.matrix.scales.iter().map(|s| s.to_f32()))
    }

    /// The weights that the windows stand for.
    fn decode<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (rows, columns) = self.rows_columns();
        let weights = py.detach(|| {
            let mut weights = codec::decode_matrix(&self.quantizer, &self.matrix);
            let back = Rotator::inverse(self.quantizer.rotation, columns as u32);
            weights.par_chunks_mut(columns.max(1)).for_each(|row| back.apply(row));
            weights
        });
        PyArray1::from_vec(py, weights).reshape([rows, columns])
    }

    /// The product with each row of `x`, exactly as the engine computes it.
    fn linear<'py>(
        &self,
        py: Python<'py>,
        x: PyArrayLike2<'_, f32, AllowTypeChange>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (rows, columns) = self.rows_columns();
        let tokens = x.shape()[0];
        if x.shape()[1] != columns {
            let message = format!("the matrix has {columns} columns, x has {}", x.shape()[1]);
            return Err(PyValueError::new_err(message));
        }
        let mut x: Vec<f32> = x.as_array().iter().copied().collect();
        if !x.iter().all(|v| v.is_finite()) {
            return Err(PyValueError::new_err("x holds numbers that are not finite"));
        }
        let y = py.detach(|| {
            let rotator = Rotator::new(self.quantizer.rotation, columns as u32);
            let prepared: Vec<_> = x
                .par_chunks_mut(columns.max(1))
                .map(|row| {
                    rotator.apply(row);
                    reference::quantize_activations(row)
                })
                .collect();
            codec::linear(&self.quantizer, &self.matrix, &prepared)
        });
        PyArray1::from_vec(py, y).reshape([tokens, rows])
    }

    fn __repr__(&self) -> String {
        let (rows, columns) = self.rows_columns();
        format!("PackedMatrix({rows} x {columns}, {}, {} bytes)", self.quantizer.name, self.nbytes())
    }
}

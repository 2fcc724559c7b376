//! Quantized matrices.

use std::sync::Arc;

use numpy::{
    AllowTypeChange, PyArray1, PyArray2, PyArrayLike1, PyArrayLike2, PyArrayMethods, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qp_codegen::reference::{self, Rotator};
use qp_runtime::codec;
use qp_runtime::codec::cut;
use qp_runtime::quantize::relative_error;
use rayon::prelude::*;

use crate::invalid;
use crate::spec::{Quantizer, shape};

/// A matrix of a quantizer's windows.
#[pyclass(frozen, module = "qpalette")]
pub struct PackedMatrix {
    pub quantizer: Arc<qp_codegen::spec::Quantizer>,
    pub matrix: codec::PackedMatrix,
    /// Σ (w − ŵ)² / Σ w², where that is known.
    pub error: Option<f64>,
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
            let matrix = codec::encode_matrix(&q, shape, &rotated, &|_| ())?;
            let error = relative_error(&codec::Decoder::new(&q), &matrix, &rotated);
            Ok::<_, codec::EncodeError>((matrix, Some(error)))
        });
        let (matrix, error) = matrix.map_err(invalid)?;
        Ok(PackedMatrix { matrix, quantizer: q, error })
    }

    /// The activations of some tokens, rotated.
    fn rotated(&self, py: Python<'_>, x: &PyArrayLike2<'_, f32, AllowTypeChange>) -> PyResult<Vec<f32>> {
        let (_, columns) = self.rows_columns();
        if x.shape()[1] != columns {
            let message = format!("the matrix has {columns} columns, x has {}", x.shape()[1]);
            return Err(PyValueError::new_err(message));
        }
        let mut x: Vec<f32> = x.as_array().iter().copied().collect();
        py.detach(|| {
            let rotator = Rotator::new(self.quantizer.rotation, columns as u32);
            x.par_chunks_mut(columns.max(1)).for_each(|row| rotator.apply(row));
        });
        Ok(x)
    }
}

#[pymethods]
impl PackedMatrix {
    /// Joins what `words` and `scales` gave.
    #[staticmethod]
    fn from_parts(
        quantizer: Quantizer,
        rows: u32,
        columns: u32,
        words: PyArrayLike1<'_, u32, AllowTypeChange>,
        scales: PyArrayLike1<'_, f32, AllowTypeChange>,
    ) -> PyResult<Self> {
        let shape = shape(&quantizer.0, rows, columns)?;
        let scales = scales.as_array().iter().copied().map(half::bf16::from_f32).collect();
        let words = words.as_array().iter().copied().collect();
        let matrix = codec::PackedMatrix::from_parts(&quantizer.0, shape, words, scales);
        let wrong = || PyValueError::new_err("words or scales are not as many as a matrix of this shape has");
        Ok(PackedMatrix { matrix: matrix.ok_or_else(wrong)?, quantizer: quantizer.0, error: None })
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
    fn error(&self) -> Option<f64> {
        self.error
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
        if !x.as_array().iter().all(|v| v.is_finite()) {
            return Err(PyValueError::new_err("x holds numbers that are not finite"));
        }
        let rotated = self.rotated(py, &x)?;
        let y = py.detach(|| {
            let prepared: Vec<_> = rotated.par_chunks(columns.max(1)).map(reference::quantize_activations).collect();
            codec::linear(&self.quantizer, &self.matrix, &prepared)
        });
        PyArray1::from_vec(py, y).reshape([x.shape()[0], rows])
    }

    /// Of each row of `x`, which are activations of the matrix's columns, the largest magnitude once they are rotated.
    fn largest<'py>(
        &self,
        py: Python<'py>,
        x: PyArrayLike2<'_, f32, AllowTypeChange>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let (_, columns) = self.rows_columns();
        let rotated = self.rotated(py, &x)?;
        Ok(PyArray1::from_iter(py, rotated.chunks(columns.max(1)).map(reference::largest_magnitude)))
    }

    /// The integers that become the product with each row of `x`, rounded by the given magnitudes, and the scales of the rows.
    fn totals<'py>(
        &self,
        py: Python<'py>,
        x: PyArrayLike2<'_, f32, AllowTypeChange>,
        magnitudes: PyArrayLike1<'_, f32, AllowTypeChange>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let ((rows, columns), tokens) = (self.rows_columns(), x.shape()[0]);
        let rotated = self.rotated(py, &x)?;
        let magnitudes: Vec<f32> = magnitudes.as_array().iter().copied().collect();
        if magnitudes.len() != tokens {
            let message = format!("{} magnitudes for {tokens} rows of x", magnitudes.len());
            return Err(PyValueError::new_err(message));
        }
        let (totals, scales) = py.detach(|| {
            let by = |(row, &given): (&[f32], &f32)| reference::quantize_activations_by(row, given);
            let prepared: Vec<_> = rotated.par_chunks(columns.max(1)).zip(&magnitudes).map(by).collect();
            let totals = codec::Decoder::new(&self.quantizer).totals(&self.matrix, &prepared);
            (totals, prepared.iter().map(|a| a.scale).collect::<Vec<_>>())
        });
        let totals = PyArray1::from_vec(py, totals).reshape([tokens, rows])?;
        (totals, PyArray1::from_vec(py, scales)).into_pyobject(py)
    }

    /// Rows of the matrix, decoded: tokens × columns.
    fn rows<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (rows, columns) = self.rows_columns();
        if let Some(beyond) = tokens.iter().find(|t| **t as usize >= rows) {
            return Err(PyIndexError::new_err(format!("row {beyond} of a matrix of {rows}")));
        }
        let decoded = py.detach(|| {
            let mut x = codec::Decoder::new(&self.quantizer).rows(&self.matrix, &tokens);
            let back = Rotator::inverse(self.quantizer.rotation, columns as u32);
            x.par_chunks_mut(columns.max(1)).for_each(|row| back.apply(row));
            x
        });
        PyArray1::from_vec(py, decoded).reshape([tokens.len(), columns])
    }

    /// The part of the matrix with rows and columns from one up to another.
    #[pyo3(signature = (*, rows=None, columns=None))]
    fn cut(&self, rows: Option<(u32, u32)>, columns: Option<(u32, u32)>) -> PyResult<PackedMatrix> {
        let (all_rows, all_columns) = self.rows_columns();
        let rows = rows.map_or(0..all_rows as u32, |(a, b)| a..b);
        let columns = columns.map_or(0..all_columns as u32, |(a, b)| a..b);
        let (quantizer, matrix) = cut::cut(&self.quantizer, &self.matrix, rows, columns).map_err(invalid)?;
        Ok(PackedMatrix { quantizer: Arc::new(quantizer), matrix, error: None })
    }

    /// Matrices of one quantizer as one, each below the one before.
    #[staticmethod]
    fn stack(parts: Vec<PyRef<'_, PackedMatrix>>) -> PyResult<PackedMatrix> {
        let first = parts.first().ok_or_else(|| PyValueError::new_err("there is nothing to stack"))?;
        let hash = first.quantizer.hash();
        if parts.iter().any(|p| p.quantizer.hash() != hash) {
            return Err(invalid(cut::CutError::Unlike));
        }
        let matrices: Vec<&codec::PackedMatrix> = parts.iter().map(|p| &p.matrix).collect();
        let matrix = cut::stack(&first.quantizer, &matrices).map_err(invalid)?;
        Ok(PackedMatrix { quantizer: first.quantizer.clone(), matrix, error: None })
    }

    fn __repr__(&self) -> String {
        let (rows, columns) = self.rows_columns();
        format!("PackedMatrix({rows} x {columns}, {}, {} bytes)", self.quantizer.name, self.nbytes())
    }
}

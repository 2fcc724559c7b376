//! Formats, and matrices of them.

use std::sync::Arc;

use numpy::{
    AllowTypeChange, PyArray1, PyArray2, PyArrayLike1, PyArrayLike2, PyArrayMethods, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::{self, Definition, Shape};
use qp_codegen::{explain, formats as built_in};
use qp_runtime::codec::{FormatEncoder, Lines};
use qp_runtime::quantize::relative_error_of_format;
use rayon::prelude::*;

use crate::invalid;
use crate::spec::{Source, chosen, failed, load};

/// Names of the formats that are built in.
#[pyfunction]
pub fn formats() -> Vec<&'static str> {
    built_in::names()
}

/// A format, checked, and its encoder or why there is none.
#[pyclass(frozen, eq, hash, from_py_object, module = "qpalette")]
#[derive(Clone)]
pub struct Format {
    format: Arc<spec::Format>,
    encoder: Result<Arc<FormatEncoder>, String>,
}

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.format == other.format
    }
}

impl std::hash::Hash for Format {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        spec::Format::hash(&self.format).hash(state);
    }
}

impl Format {
    pub fn of(format: spec::Format) -> Self {
        let encoder = FormatEncoder::new(&format).map(Arc::new).map_err(|why| why.to_string());
        Format { format: Arc::new(format), encoder }
    }
}

#[pymethods]
impl Format {
    #[new]
    #[pyo3(signature = (spec, name=None))]
    fn new(py: Python<'_>, spec: Source, name: Option<&str>) -> PyResult<Self> {
        let mut library = load(py, &spec)?;
        let names: Vec<&str> = library.formats.iter().map(|f| f.name.as_str()).collect();
        let at = chosen("format", &names, name)?;
        Ok(Format::of(library.formats.swap_remove(at)))
    }

    #[staticmethod]
    fn named(py: Python<'_>, name: &str) -> PyResult<Self> {
        match spec::resolve_any(name).map_err(|d| failed(py, &d))? {
            Definition::Format(f) => Ok(Format::of(f)),
            Definition::Quantizer(q) => {
                Err(PyValueError::new_err(format!("`{}` is no format: Quantizer.named has it", q.name)))
            }
        }
    }

    #[getter]
    fn name(&self) -> &str {
        &self.format.name
    }

    /// Bits a weight, with the fields that belong to a number of weights.
    #[getter]
    fn bits(&self) -> f64 {
        self.format.rate().1
    }

    #[getter]
    fn text(&self) -> String {
        self.format.canonical()
    }

    #[getter]
    fn digest(&self) -> String {
        spec::Format::hash(&self.format)
    }

    #[getter]
    fn layouts(&self) -> Vec<&str> {
        self.format.layouts.iter().map(|l| l.name.as_str()).collect()
    }

    /// Why it cannot be made, if so.
    #[getter]
    fn unmade(&self) -> Option<&str> {
        self.encoder.as_ref().err().map(String::as_str)
    }

    #[pyo3(signature = (rows = 4096, columns = 4096))]
    fn explain(&self, rows: usize, columns: usize) -> PyResult<String> {
        Ok(explain::explain_format(&self.format, shape(rows, columns)?))
    }

    fn encode(&self, py: Python<'_>, weights: PyArrayLike2<'_, f32, AllowTypeChange>) -> PyResult<StoredMatrix> {
        let (rows, columns) = sides(&weights);
        let shape = shape(rows, columns)?;
        let refused = |why: &String| PyValueError::new_err(format!("`{}` cannot be made: {why}", self.format.name));
        let encoder = self.encoder.as_ref().map_err(refused)?;
        let reader = encoder.reader(shape).map_err(invalid)?;
        let weights: Vec<f32> = weights.as_array().iter().copied().collect();
        let made = py.detach(|| {
            let tensors = encoder.encode(&reader, &weights, &|_| ())?;
            let slices: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            let error = relative_error_of_format(&reader, &slices, &weights);
            Ok::<_, qp_runtime::codec::EncodeError>((tensors, error))
        });
        let (tensors, error) = made.map_err(invalid)?;
        Ok(StoredMatrix { format: self.clone(), reader, tensors, error: Some(error) })
    }

    fn __repr__(&self) -> String {
        format!("Format({}, {} bits a weight)", self.format.name, self.bits())
    }

    fn _repr_html_(&self) -> String {
        format!(
            "<pre>{}</pre>",
            explain::explain_format(&self.format, Shape { rows: 4096, cols: 4096 })
                .replace('&', "&amp;")
                .replace('<', "&lt;")
        )
    }
}

fn sides(matrix: &PyReadonlyArray2<'_, f32>) -> (usize, usize) {
    (matrix.shape()[0], matrix.shape()[1])
}

/// A shape that has weights.
fn shape(rows: usize, columns: usize) -> PyResult<Shape> {
    let side = |n: usize| u32::try_from(n).ok().filter(|n| *n > 0);
    match (side(rows), side(columns)) {
        (Some(rows), Some(cols)) => Ok(Shape { rows, cols }),
        _ => Err(PyValueError::new_err(format!("a matrix of {rows} x {columns} has no weights, or too many"))),
    }
}

/// A matrix of a format: the bytes of its layout's tensors.
#[pyclass(frozen, module = "qpalette")]
pub struct StoredMatrix {
    format: Format,
    reader: Reader,
    tensors: Vec<Vec<u8>>,
    error: Option<f64>,
}

impl StoredMatrix {
    fn slices(&self) -> Vec<&[u8]> {
        self.tensors.iter().map(Vec::as_slice).collect()
    }
}

#[pymethods]
impl StoredMatrix {
    /// The matrix of such bytes, by a layout's name; by the first without one.
    #[staticmethod]
    #[pyo3(signature = (format, rows, columns, tensors, layout=None))]
    fn from_tensors(
        format: Format,
        rows: usize,
        columns: usize,
        tensors: &Bound<'_, PyDict>,
        layout: Option<&str>,
    ) -> PyResult<Self> {
        let shape = shape(rows, columns)?;
        let of = format.encoder.as_ref().map_or(&*format.format, |e| e.format());
        let found = match layout {
            Some(name) => of.layout(name),
            None => of.layouts.first(),
        };
        let Some(found) = found else {
            let names: Vec<&str> = of.layouts.iter().map(|l| l.name.as_str()).collect();
            let message =
                format!("`{}` has no layout `{}`: it has {}", of.name, layout.unwrap_or_default(), names.join(", "));
            return Err(PyValueError::new_err(message));
        };
        let reader = Reader::new(&Arc::new(Book::new(of.clone())), found, shape).map_err(invalid)?;
        let mut parts = Vec::new();
        for stored in reader.tensors() {
            let missing = || PyValueError::new_err(format!("`{}` needs a tensor `{}`", found.name, stored.name));
            let value = tensors.get_item(&stored.name)?.ok_or_else(missing)?;
            let bytes: PyArrayLike1<'_, u8, AllowTypeChange> = value.extract()?;
            let bytes: Vec<u8> = bytes.as_array().iter().copied().collect();
            if bytes.len() as u64 != stored.bytes {
                let message = format!("tensor `{}` has {} bytes, not {}", stored.name, stored.bytes, bytes.len());
                return Err(PyValueError::new_err(message));
            }
            parts.push(bytes);
        }
        Ok(StoredMatrix { format, reader, tensors: parts, error: None })
    }

    #[getter]
    fn format(&self) -> Format {
        self.format.clone()
    }

    #[getter]
    fn layout(&self) -> &str {
        self.reader.layout()
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.reader.shape().rows as usize, self.reader.shape().cols as usize)
    }

    #[getter]
    fn error(&self) -> Option<f64> {
        self.error
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.tensors.iter().map(Vec::len).sum()
    }

    /// The bytes of each tensor, by the name that the layout gives it.
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for (stored, bytes) in self.reader.tensors().iter().zip(&self.tensors) {
            out.set_item(&stored.name, PyArray1::from_slice(py, bytes))?;
        }
        Ok(out)
    }

    fn decode<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (rows, columns) = self.shape();
        let weights = py.detach(|| {
            let mut weights = vec![0f32; rows * columns];
            self.reader.read_rows(&self.slices(), 0, &mut weights);
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
        let (rows, columns) = self.shape();
        if x.shape()[1] != columns {
            let message = format!("the matrix has {columns} columns, x has {}", x.shape()[1]);
            return Err(PyValueError::new_err(message));
        }
        let slices = self.slices();
        let Some([enter, leave]) = self.reader.turned(&slices) else {
            let name = &self.format.format.name;
            let message =
                format!("products of `{name}` are not exact (Format.explain says why): multiply with decode()");
            return Err(PyValueError::new_err(message));
        };
        let x: Vec<f32> = x.as_array().iter().copied().collect();
        if !x.iter().all(|v| v.is_finite()) {
            return Err(PyValueError::new_err("x holds numbers that are not finite"));
        }
        let y = py.detach(|| {
            let prepared: Vec<_> = x.par_chunks(columns).map(|x| enter.entered(x)).collect();
            let mut y = Lines::new(&self.reader, slices).product(&prepared);
            y.par_chunks_mut(rows).for_each(|y| leave.leave(y));
            y
        });
        PyArray1::from_vec(py, y).reshape([x.len() / columns, rows])
    }

    fn __repr__(&self) -> String {
        let (rows, columns) = self.shape();
        let bits = 8.0 * self.nbytes() as f64 / (rows * columns) as f64;
        format!("StoredMatrix({}, {rows} x {columns}, {bits:.3} bits a weight)", self.format.format.name)
    }
}

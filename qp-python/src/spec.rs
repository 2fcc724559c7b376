//! Specs, quantizers, and what is wrong with them.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use numpy::{AllowTypeChange, PyArrayLike2};
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qp_codegen::cuda::{self, Target};
use qp_codegen::ir::Elem;
use qp_codegen::kernels::{dequantize, gemv, product};
use qp_codegen::layout::Packed;
use qp_codegen::spec::{self, Library, Shape};
use qp_codegen::syntax::{Diagnostics, Severity};
use qp_codegen::{explain, palette as built_in};

use crate::invalid;
use crate::matrix::PackedMatrix;

create_exception!(qpalette, SpecError, PyValueError, "A spec with errors; `diagnostics` says which, and where.");

/// One thing that is wrong with a spec, or odd.
#[pyclass(frozen, get_all, module = "qpalette")]
pub struct Diagnostic {
    severity: &'static str,
    message: String,
    /// File, first line and column, counted from 1; `None` if it is about no place.
    file: Option<String>,
    line: Option<usize>,
    column: Option<usize>,
    /// Bytes of the text that are meant.
    span: Option<(usize, usize)>,
    hint: Option<String>,
}

#[pymethods]
impl Diagnostic {
    fn __repr__(&self) -> String {
        let place = match (&self.file, self.line, self.column) {
            (Some(file), Some(line), Some(column)) => format!("{file}:{line}:{column}: "),
            _ => String::new(),
        };
        format!("{place}{}: {}", self.severity, self.message)
    }
}

fn listed(diagnostics: &Diagnostics) -> Vec<Diagnostic> {
    let one = |d: &qp_codegen::syntax::Diagnostic| {
        let span = d.labels.first().map(|l| l.0);
        let place = span.map(|s| diagnostics.sources.line_column(s));
        Diagnostic {
            severity: if d.severity == Severity::Error { "error" } else { "warning" },
            message: d.message.clone(),
            file: span.map(|s| diagnostics.sources.name(s.file).to_owned()),
            line: place.map(|p| p.0),
            column: place.map(|p| p.1),
            span: span.map(|s| (s.range().start, s.range().end)),
            hint: d.hint.clone(),
        }
    };
    diagnostics.list.iter().map(one).collect()
}

/// The error that shows what is wrong with excerpts, and carries it as data.
pub fn failed(py: Python<'_>, diagnostics: &Diagnostics) -> PyErr {
    let error = SpecError::new_err(diagnostics.render(false));
    let list: Result<Vec<_>, _> = listed(diagnostics).into_iter().map(|d| Py::new(py, d)).collect();
    match list.and_then(|list| error.value(py).setattr("diagnostics", list)) {
        Ok(()) => error,
        Err(e) => e,
    }
}

/// A spec's text, or the file that holds it.
#[derive(FromPyObject)]
pub enum Source {
    Text(String),
    File(PathBuf),
}

pub fn load(py: Python<'_>, source: &Source) -> PyResult<Library> {
    let loaded = py.detach(|| match source {
        Source::Text(text) => spec::load_str("<text>", text),
        Source::File(path) => spec::load_file(path),
    });
    loaded.map_err(|d| failed(py, &d))
}

/// Which of `names`, all that a spec defines of a kind, is meant.
pub fn chosen(kind: &str, names: &[&str], name: Option<&str>) -> PyResult<usize> {
    let at = match name {
        Some(name) => names.iter().position(|n| *n == name),
        None if names.len() == 1 => Some(0),
        None => None,
    };
    at.ok_or_else(|| {
        PyValueError::new_err(match (name, names.is_empty()) {
            (_, true) => format!("the spec defines no {kind}"),
            (Some(name), false) => format!("the spec defines no `{name}`; it has {}", names.join(", ")),
            (None, false) => format!("the spec defines {}: say which with name=", names.join(", ")),
        })
    })
}

#[pyfunction]
pub fn check(py: Python<'_>, spec: Source) -> PyResult<Vec<Diagnostic>> {
    load(py, &spec).map(|library| listed(&library.warnings))
}

#[pyfunction]
pub fn palette() -> Vec<Quantizer> {
    built_in::names().into_iter().filter_map(built_in::get).map(|q| Quantizer(Arc::new(q))).collect()
}

/// A quantizer, checked.
#[pyclass(frozen, eq, hash, from_py_object, module = "qpalette")]
#[derive(Clone)]
pub struct Quantizer(pub Arc<spec::Quantizer>);

impl PartialEq for Quantizer {
    fn eq(&self, other: &Self) -> bool {
        self.0.canonical() == other.0.canonical()
    }
}

impl std::hash::Hash for Quantizer {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.hash().hash(state);
    }
}

/// A shape that a packed matrix may have.
pub fn shape(q: &spec::Quantizer, rows: u32, columns: u32) -> PyResult<Shape> {
    let shape = Shape { rows, cols: columns };
    Packed::check(q, shape).map_err(invalid)?;
    Ok(shape)
}

#[pymethods]
impl Quantizer {
    #[new]
    #[pyo3(signature = (spec, name=None))]
    fn new(py: Python<'_>, spec: Source, name: Option<&str>) -> PyResult<Self> {
        let mut library = load(py, &spec)?;
        let names: Vec<&str> = library.quantizers.iter().map(|q| q.name.as_str()).collect();
        let at = chosen("quantizer", &names, name)?;
        Ok(Quantizer(Arc::new(library.quantizers.swap_remove(at))))
    }

    #[staticmethod]
    fn named(py: Python<'_>, name: &str) -> PyResult<Self> {
        let found = spec::resolve_untrained(name).map_err(|d| failed(py, &d))?;
        Ok(Quantizer(Arc::new(found)))
    }

    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    #[getter]
    fn bits(&self) -> f64 {
        self.0.rate()
    }

    #[getter]
    fn text(&self) -> String {
        self.0.canonical()
    }

    #[getter]
    fn digest(&self) -> String {
        self.0.hash()
    }

    #[getter]
    fn block(&self) -> (u32, u32) {
        (self.0.block().rows, self.0.block().cols)
    }

    /// Rows and columns at whose multiples a matrix may be cut; None where columns may not be.
    #[getter]
    fn cuts(&self) -> (u32, Option<u32>) {
        qp_runtime::codec::cut::steps(&self.0)
    }

    /// What the totals of a product are multiples of, where scales of rows and activations are 1.
    #[getter]
    fn total_unit(&self) -> f32 {
        qp_codegen::reference::output_factor(&self.0.codes[0], 1.0)
    }

    #[getter]
    fn trained(&self) -> bool {
        self.0.is_trained()
    }

    #[getter]
    fn distortion(&self) -> Option<f64> {
        built_in::get(&self.0.name).filter(|q| q.canonical() == self.0.canonical())?;
        built_in::distortion(&self.0.name)
    }

    fn encode(&self, py: Python<'_>, weights: PyArrayLike2<'_, f32, AllowTypeChange>) -> PyResult<PackedMatrix> {
        PackedMatrix::of(py, &weights, self.clone())
    }

    #[pyo3(signature = (rows=4096, columns=4096))]
    fn explain(&self, rows: u32, columns: u32) -> PyResult<String> {
        Ok(explain::explain(&self.0, shape(&self.0, rows, columns)?))
    }

    #[pyo3(signature = (rows=4096, columns=4096))]
    fn packed_bytes(&self, rows: u32, columns: u32) -> PyResult<u64> {
        Ok(explain::matrix_bytes(&self.0, shape(&self.0, rows, columns)?))
    }

    /// Words and scales of a matrix.
    #[pyo3(signature = (rows=4096, columns=4096))]
    fn packed_lengths(&self, rows: u32, columns: u32) -> PyResult<(usize, usize)> {
        let shape = shape(&self.0, rows, columns)?;
        Ok((Packed::new(&self.0, shape).words(), qp_runtime::codec::scale_count(&self.0, shape)))
    }

    #[pyo3(signature = (op="product", rows=4096, columns=4096, batch=1, target="sm_90a"))]
    fn emit(&self, op: &str, rows: u32, columns: u32, batch: u32, target: &str) -> PyResult<String> {
        let shape = shape(&self.0, rows, columns)?;
        let target = Target::from_str(target).map_err(invalid)?;
        let device = target.device();
        let kernel = match op {
            "product" if (1..=2048).contains(&batch) => {
                let op = gemv::Gemv { quantizer: &self.0, shape, batch, accumulate: false };
                product::Launch::choose(&op, &device).lower(&op)
            }
            "product" => return Err(PyValueError::new_err(format!("a batch is 1 to 2048 tokens, not {batch}"))),
            "dequantize" => {
                let op = dequantize::Dequantize { quantizer: &self.0, shape, output: Elem::F16 };
                dequantize::lower(&op, device.sms)
            }
            _ => return Err(PyValueError::new_err(format!("`{op}` is no kernel: product or dequantize"))),
        };
        Ok(cuda::print(cuda::check(&kernel, target).map_err(invalid)?))
    }

    fn __repr__(&self) -> String {
        let (rows, columns) = self.block();
        format!("Quantizer({}, {} bits a weight, blocks of {rows} x {columns})", self.0.name, self.0.rate())
    }

    fn _repr_html_(&self) -> String {
        let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
        let block = self.0.block();
        let shape = Shape { rows: block.rows.max(64), cols: block.cols.max(128) };
        format!("<pre>{}</pre>", escape(&explain::explain(&self.0, shape)))
    }
}

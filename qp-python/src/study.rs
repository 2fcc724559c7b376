//! How much each layer of a model matters, and the best plan within a budget.

use std::path::{Path, PathBuf};

use clap::Parser;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qp_runtime::allocate::sensitivity::{Error, Progress, Sensitivities, Settings, measure};
use qp_runtime::cli;

use crate::invalid;
use crate::model::device;

/// Tells Python how the work goes, and stops it where Python raises.
struct Watcher<'a> {
    callback: Option<Py<PyAny>>,
    out: &'a Path,
    raised: Option<PyErr>,
}

impl Progress for Watcher<'_> {
    fn trial(&mut self, done: usize, total: usize, layer: &str) {
        if self.raised.is_none() {
            self.raised = Python::attach(|py| {
                py.check_signals()?;
                self.callback.as_ref().map_or(Ok(()), |call| call.call1(py, (done, total, layer)).map(drop))
            })
            .err();
        }
    }

    fn measured(&mut self, so_far: &Sensitivities) -> Result<(), Error> {
        so_far.write(self.out)?;
        // What stops the work is an error of the writing; what Python raised is told in its place.
        let stopped = || Error::Io { path: self.out.display().to_string(), source: std::io::Error::other("stopped") };
        if self.raised.is_some() { Err(stopped()) } else { Ok(()) }
    }
}

#[pyfunction]
#[pyo3(signature = (model, out, *, sequences=16, tokens=256, levels=4, draws=1, seed=0, resume=false, device="auto", progress=None))]
#[expect(clippy::too_many_arguments, reason = "keywords of a Python function")]
pub fn sensitivity(
    py: Python<'_>,
    model: PathBuf,
    out: PathBuf,
    sequences: usize,
    tokens: usize,
    levels: usize,
    draws: usize,
    seed: u64,
    resume: bool,
    device: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    if sequences == 0 || tokens < 2 || !(1..=64).contains(&levels) || !(1..=64).contains(&draws) {
        let message = "at least 1 sequence of 2 tokens is needed, and 1 to 64 levels and draws";
        return Err(PyValueError::new_err(message));
    }
    let device = self::device(device)?;
    let settings = Settings { sequences, tokens, levels, draws, seed };
    let mut watcher = Watcher { callback: progress, out: &out, raised: None };
    let done = py.detach(|| {
        let earlier = (resume && out.exists()).then(|| Sensitivities::read(&out)).transpose()?;
        let (model, on) = cli::device::open_model(&model, device)?;
        let name = model.dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let measured = measure(on.as_ref(), &name, model.config.bos, &model.weights, settings, earlier, &mut watcher)?;
        Ok::<_, cli::Error>(measured.write(&out)?)
    });
    match watcher.raised {
        Some(raised) => Err(raised),
        None => done.map_err(invalid),
    }
}

/// A plan: which quantizer each layer gets.
#[pyclass(frozen, get_all, module = "qpalette")]
pub struct Plan {
    toml: String,
    table: String,
    svg: String,
    bits: f64,
    loss: f64,
}

#[pymethods]
impl Plan {
    /// Writes the plan file.
    fn write(&self, path: PathBuf) -> PyResult<()> {
        qp_codegen::output::write(&path, self.toml.as_bytes()).map_err(|e| invalid(format!("{}: {e}", path.display())))
    }

    fn __str__(&self) -> &str {
        &self.table
    }

    fn __repr__(&self) -> String {
        format!("Plan({:.3} bits a weight, predicted loss {:.5})", self.bits, self.loss)
    }

    fn _repr_svg_(&self) -> &str {
        &self.svg
    }
}

/// The command's options.
#[derive(Parser)]
#[command(name = "plan", no_binary_name = true)]
struct Options {
    #[command(flatten)]
    plan: cli::plan::Plan,
}

/// The plan that `qp plan` finds with these options.
#[pyfunction]
pub fn plan(py: Python<'_>, options: Vec<String>) -> PyResult<Plan> {
    let options = Options::try_parse_from(options).map_err(|e| PyValueError::new_err(e.to_string()))?;
    let solved = py.detach(|| options.plan.solved()).map_err(invalid)?;
    let cli::plan::Solved { toml, table, svg, bits, loss } = solved;
    Ok(Plan { toml, table, svg, bits, loss })
}

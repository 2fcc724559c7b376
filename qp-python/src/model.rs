//! Models: quantizing, measuring, continuing, looking into checkpoints.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use qp_runtime::checkpoint::hugging::Written;
use qp_runtime::checkpoint::{self, Begin, LayerEntry};
use qp_runtime::cli::device::{self, Device};
use qp_runtime::engine::{self, Logits, Sampler, Sampling};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::calibrate::{Calibrate, Texts};
use qp_runtime::quantize::{Error, Job, Progress};

use crate::invalid;
use crate::matrix::PackedMatrix;
use crate::spec::{Quantizer, failed, shape};

pub fn device(name: &str) -> PyResult<Device> {
    match name {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda),
        "interpreter" => Ok(Device::Interpreter),
        _ => Err(PyValueError::new_err(format!("`{name}` is no device: auto, cpu, cuda or interpreter"))),
    }
}

/// Calls Python now and then while the work goes on without the interpreter's lock.
struct Watcher {
    callback: Option<Py<PyAny>>,
    total: AtomicU64,
    done: AtomicU64,
    /// What Python raised: an interruption, or an error of the callback.
    raised: Mutex<Option<PyErr>>,
}

impl Watcher {
    fn new(callback: Option<Py<PyAny>>) -> Self {
        Watcher { callback, total: AtomicU64::new(0), done: AtomicU64::new(0), raised: Mutex::new(None) }
    }

    fn raised(&self) -> Option<PyErr> {
        self.raised.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }
}

impl Progress for Watcher {
    fn start(&self, total: u64, done: u64, _draft: &Path) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
    }

    fn layer(&self, _name: &str, _spec: &str) {}

    fn advance(&self, weights: u64) {
        self.done.fetch_add(weights, Ordering::Relaxed);
    }

    fn finished(&self, layer: &LayerEntry) -> ControlFlow<()> {
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let told = Python::attach(|py| {
            py.check_signals()?;
            self.callback.as_ref().map_or(Ok(()), |call| call.call1(py, (done, total, &layer.name)).map(drop))
        });
        match told {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                *self.raised.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(e);
                ControlFlow::Break(())
            }
        }
    }
}

#[pyfunction]
#[pyo3(signature = (model, out, *, spec=None, plan=None, calibrate=None, calibrate_tokens=32768, resume=false, force=false, device="auto", threads=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keywords of a Python function")]
pub fn quantize(
    py: Python<'_>,
    model: PathBuf,
    out: PathBuf,
    spec: Option<&str>,
    plan: Option<PathBuf>,
    calibrate: Option<PathBuf>,
    calibrate_tokens: usize,
    resume: bool,
    force: bool,
    device: &str,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let plan = match (spec, &plan) {
        (Some(spec), None) => Plan::uniform(spec),
        (None, Some(path)) => Plan::read(path).map_err(|d| failed(py, &d))?,
        _ => return Err(PyValueError::new_err("give either spec= or plan=")),
    };
    let mut job = Job::new(model, plan, out);
    job.calibrate = calibrate.map(|texts| Calibrate {
        texts: if texts == Path::new("self") { Texts::Own } else { Texts::File(texts) },
        tokens: calibrate_tokens,
    });
    job.begin = Begin { resume, force };
    job.threads = threads;
    job.devices = device::open_all(self::device(device)?).map_err(invalid)?;
    let watcher = Watcher::new(progress);
    let result = py.detach(|| job.run(&watcher));
    if let Some(raised) = watcher.raised() {
        return Err(raised);
    }
    match result {
        Ok(_) => Ok(()),
        Err(Error::Plan(d)) => Err(failed(py, &d)),
        Err(e) => Err(invalid(e)),
    }
}

#[pyfunction]
#[pyo3(signature = (model, text, *, window=256, limit=None, device="auto"))]
pub fn perplexity(
    py: Python<'_>,
    model: PathBuf,
    text: &str,
    window: usize,
    limit: Option<usize>,
    device: &str,
) -> PyResult<f64> {
    let device = self::device(device)?;
    let measured = py.detach(|| {
        let (model, on) = device::open_model(&model, device)?;
        let mut tokens = model.tokenizer.encode(text)?;
        tokens.truncate(limit.unwrap_or(tokens.len()));
        let mut session = device::open_session(model, on.as_ref(), window)?;
        let measured = qp_runtime::eval::perplexity(&mut session, &tokens, window, |_| ())?;
        Ok::<_, qp_runtime::cli::Error>(measured.perplexity())
    });
    measured.map_err(invalid)
}

#[pyfunction]
#[pyo3(signature = (model, prompt, *, tokens=60, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, device="auto"))]
#[expect(clippy::too_many_arguments, reason = "keywords of a Python function")]
pub fn generate(
    py: Python<'_>,
    model: PathBuf,
    prompt: &str,
    tokens: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    seed: u64,
    device: &str,
) -> PyResult<String> {
    let in_range =
        temperature.is_finite() && temperature >= 0.0 && [top_p, min_p].iter().all(|p| (0.0..=1.0).contains(p));
    if !in_range {
        return Err(PyValueError::new_err("a temperature is not negative, top_p and min_p are from 0 to 1"));
    }
    let device = self::device(device)?;
    let mut raised = None;
    let text = py.detach(|| {
        let (mut model, on) = device::open_model(&model, device)?;
        let mut prompt = model.tokenizer.encode(prompt)?;
        if prompt.is_empty() {
            prompt.extend(model.config.bos);
        }
        let end = std::mem::take(&mut model.config.eos);
        let tokenizer = model.tokenizer.clone();
        let context = prompt.len() + tokens.saturating_sub(1);
        let mut session = device::open_session(model, on.as_ref(), context)?;
        let mut sampler = Sampler::new(Sampling { temperature, top_k, top_p, min_p, seed });
        let (mut stream, mut text) = (tokenizer.stream(&prompt), String::new());
        engine::generate(&mut session, &prompt, tokens, &end, &mut sampler, |token| {
            text += &stream.push(token)?;
            raised = Python::attach(|py| py.check_signals()).err();
            Ok::<_, qp_runtime::cli::Error>(match raised {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            })
        })?;
        text += &stream.finish()?;
        Ok::<_, qp_runtime::cli::Error>(text)
    });
    match raised {
        Some(raised) => Err(raised),
        None => text.map_err(invalid),
    }
}

/// The logits of a model after each token of a sequence.
#[pyfunction]
#[pyo3(signature = (model, tokens, *, device="auto"))]
pub fn logits<'py>(
    py: Python<'py>,
    model: PathBuf,
    tokens: Vec<u32>,
    device: &str,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let device = self::device(device)?;
    let computed = py.detach(|| {
        let (model, on) = device::open_model(&model, device)?;
        let mut session = device::open_session(model, on.as_ref(), tokens.len().max(1))?;
        let mut logits = Vec::new();
        if !tokens.is_empty() {
            session.forward(&tokens, Logits::All, &mut logits)?;
        }
        Ok::<_, qp_runtime::cli::Error>((logits, session.vocab()))
    });
    let (logits, vocab) = computed.map_err(invalid)?;
    PyArray1::from_vec(py, logits).reshape([tokens.len(), vocab])
}

/// Makes a checkpoint of a directory that another program wrote. A layer: name, quantizer, rows, columns, relative error.
#[pyfunction]
pub fn seal(py: Python<'_>, dir: PathBuf, layers: Vec<(String, Quantizer, u32, u32, f64)>) -> PyResult<()> {
    let one = |(name, quantizer, rows, columns, error): (String, Quantizer, u32, u32, f64)| {
        Ok(Written { name, shape: shape(&quantizer.0, rows, columns)?, quantizer: quantizer.0, error })
    };
    let layers: Vec<Written> = layers.into_iter().map(one).collect::<PyResult<_>>()?;
    py.detach(|| checkpoint::hugging::seal(&dir, &layers)).map(drop).map_err(invalid)
}

/// A directory that `quantize` wrote.
#[pyclass(frozen, module = "qpalette")]
pub struct Checkpoint(checkpoint::Checkpoint);

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(dir: PathBuf) -> PyResult<Self> {
        let checkpoint = checkpoint::Checkpoint::open(&dir).map_err(invalid)?;
        checkpoint.check().map_err(invalid)?;
        Ok(Checkpoint(checkpoint))
    }

    /// What the manifest says, as JSON.
    #[getter]
    fn manifest(&self) -> String {
        self.0.manifest().to_text()
    }

    #[getter]
    fn layers(&self) -> Vec<String> {
        self.0.manifest().layers.iter().map(|l| l.name.clone()).collect()
    }

    fn __len__(&self) -> usize {
        self.0.manifest().layers.len()
    }

    fn __contains__(&self, layer: &str) -> bool {
        self.0.layer(layer).is_some()
    }

    fn __getitem__(&self, py: Python<'_>, layer: &str) -> PyResult<PackedMatrix> {
        if self.0.layer(layer).is_none() {
            return Err(PyKeyError::new_err(layer.to_owned()));
        }
        let (quantizer, matrix) = py.detach(|| self.0.linear(layer)).map_err(invalid)?;
        let error = self.0.layer(layer).map(|l| l.error);
        Ok(PackedMatrix { quantizer, matrix, error })
    }

    /// What `qp inspect --json` prints.
    fn inspect(&self) -> PyResult<String> {
        qp_runtime::cli::inspect::json(&self.0).map_err(invalid)
    }

    fn __repr__(&self) -> String {
        format!("Checkpoint({:?}, {} layers)", self.0.dir().display().to_string(), self.__len__())
    }
}

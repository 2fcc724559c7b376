//! The pipeline: a model directory and a plan in, a checkpoint out.
//!
//! Layer by layer: load as `f32`, rotate each row, encode, write, record, all of it at once on different layers
//! ([`pipeline`]). What is finished stays finished: see [`crate::checkpoint::draft`].

pub mod calibrate;
pub mod items;
mod pipeline;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_codegen::layout::TooLarge;
use qp_codegen::metric::Effort;
use qp_codegen::reader::Misfit;
use qp_codegen::spec::Quantizer;
use qp_codegen::syntax::Diagnostics;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::checkpoint::weights::SHARD_BYTES;
use crate::checkpoint::{self, Begin, Draft, Head, LayerEntry, Manifest, ModelId, SpecEntry, is_checkpoint};
use crate::codec::EncodeError;
use crate::device::{DeviceError, Executor};
use crate::engine;
use crate::import;
use crate::model::{self, Files, Model, TensorDir};
use crate::plan::{Plan, Resolved, Spec};
use calibrate::{Calibrate, Calibration};
use items::{Item, Work, items, join_tied, layers};
use pipeline::{Pipeline, Pool};
pub use pipeline::{relative_error, relative_error_of_format};

/// Files of a model directory that a checkpoint takes along, where they exist.
pub(crate) const COPIED: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];

/// An error of quantization. What existed before is untouched; a partial directory may stay, to be resumed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model is not as it should be.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The plan cannot be used.
    #[error(transparent)]
    Plan(#[from] Diagnostics),
    /// Reading or writing failed.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The model is quantized already.
    #[error("{} is a quantized checkpoint already; quantize the model that it was made from", dir.display())]
    Quantized {
        /// The directory.
        dir: PathBuf,
    },
    /// Finite weights whose rotation is not.
    #[error(
        "layer '{layer}': its weights are too large to be rotated (row {row} overflows); the model is damaged: get it \
         again, or leave the layer as it is with \"{layer}\" = \"keep\" in the plan"
    )]
    Overflow {
        /// The layer as a plan names it.
        layer: String,
        /// The first row, from 0.
        row: usize,
    },
    /// A layer that no kernel could compute exactly.
    #[error("layer '{layer}': {source}; leave it as it is with \"{layer}\" = \"keep\" in the plan")]
    TooLarge {
        /// The layer.
        layer: String,
        /// What is too large.
        source: TooLarge,
    },
    /// A layer whose sides are no multiples of what its format's layout needs.
    #[error(
        "layer '{layer}' as {spec}: {source}; give it another quantizer, or leave it as it is with \"{layer}\" = \"keep\" in the plan"
    )]
    Misfit {
        /// The layer.
        layer: String,
        /// The format.
        spec: String,
        /// What does not fit.
        source: Misfit,
    },
    /// The encoder refused a layer.
    #[error("layer '{layer}': {source}")]
    Encode {
        /// The layer.
        layer: String,
        /// Why.
        source: EncodeError,
    },
    /// A device that cannot encode.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model cannot run over the calibration's texts.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The calibration's text cannot be read.
    #[error("{0}")]
    Text(String),
    /// The calibration's text is shorter than a window.
    #[error("{} has {tokens} tokens, fewer than the {window} of one window: calibrate with a longer text, or with self", path.display())]
    ShortText {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// Tokens needed.
        window: usize,
    },
    /// What enters a layer is not finite.
    #[error(
        "what enters layer '{layer}' is infinite or not a number when the model runs over the calibration's texts: \
         a layer before it is damaged or overflows; get the model again, or quantize it without --calibrate"
    )]
    Inputs {
        /// The layer.
        layer: String,
    },
    /// Stopped by [`Progress::finished`].
    #[error("stopped; {} can be continued with --resume", draft.display())]
    Stopped {
        /// The partial directory.
        draft: PathBuf,
    },
    /// No threads.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why.
        message: String,
    },
}

/// Is told how the work goes.
pub trait Progress: Sync {
    /// `done` of `total` weights were finished by an earlier run; the work is kept in `draft` until it is whole.
    fn start(&self, total: u64, done: u64, draft: &Path);
    /// So many of all calibration texts are written.
    fn text(&self, done: usize, total: usize) {
        let _ = (done, total);
    }
    /// Something that the user should know, of the model or of the work ahead.
    fn note(&self, note: &str) {
        let _ = note;
    }
    /// The next layer, with its quantizer's name.
    fn layer(&self, name: &str, spec: &str);
    /// That many more weights are encoded. Called from many threads.
    fn advance(&self, weights: u64);
    /// A layer is encoded and written. `Break` stops the work.
    fn finished(&self, layer: &LayerEntry) -> ControlFlow<()>;
}

/// What a CPU of `threads` threads should be warned of before it encodes so many weights by each quantizer: hours, or
/// gigabytes.
fn warning<'q>(work: impl Iterator<Item = (&'q Arc<Quantizer>, u64)>, threads: usize) -> Option<String> {
    let (mut seconds, mut most) = (0.0, (0, ""));
    for (q, weights) in work {
        let effort = Effort::of_all(&q.codes);
        seconds += effort.seconds * weights as f64;
        most = most.max((effort.of_thread * threads as u64 + effort.shared, q.name.as_str()));
    }
    let (hours, gigabytes) = (seconds / threads as f64 / 3600.0, most.0 as f64 / 1e9);
    if hours < 1.0 && gigabytes < 4.0 {
        return None;
    }
    let time = if hours < 1.0 { String::new() } else { format!(" takes about {hours:.0} hours on {threads} threads") };
    let memory = if gigabytes < 4.0 { String::new() } else { format!(" needs about {gigabytes:.0} GB for {}", most.1) };
    let both = if time.is_empty() || memory.is_empty() { "" } else { ", and" };
    Some(format!("encoding{time}{both}{memory}: a GPU is much faster (--device cuda), shorter windows need less"))
}

/// Says nothing.
#[derive(Debug)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: u64, _: u64, _: &Path) {}
    fn layer(&self, _: &str, _: &str) {}
    fn advance(&self, _: u64) {}
    fn finished(&self, _: &LayerEntry) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// What to quantize, how, and where to.
#[derive(Clone)]
pub struct Job {
    /// The model's directory.
    pub model: PathBuf,
    /// The plan.
    pub plan: Plan,
    /// The checkpoint's directory.
    pub out: PathBuf,
    /// Texts that the rounding is fitted to, if it is.
    pub calibrate: Option<Calibrate>,
    /// What to do about an unfinished run or an existing output.
    pub begin: Begin,
    /// Threads; by default one a core.
    pub threads: Option<usize>,
    /// Where windows are searched for: each device takes layers as it becomes free. None, the default: on the CPU. The
    /// checkpoint is the same.
    pub devices: Vec<Executor>,
    /// Largest weight file in bytes.
    pub shard_bytes: u64,
}

impl Job {
    /// A job with default options.
    pub fn new(model: impl Into<PathBuf>, plan: Plan, out: impl Into<PathBuf>) -> Job {
        let (model, out) = (model.into(), out.into());
        let (calibrate, begin, threads, devices) = (None, Begin::default(), None, Vec::new());
        Job { model, plan, out, calibrate, begin, threads, devices, shard_bytes: SHARD_BYTES }
    }

    /// Does the job. Returns the manifest of the checkpoint.
    ///
    /// # Errors
    /// If the model, the plan, the output or the disk does not allow it; nothing that existed is changed then.
    pub fn run(&self, progress: &dyn Progress) -> Result<Manifest, Error> {
        let build = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(|e| Error::Threads { threads, message: e.to_string() })
        };
        let pool = &Pool(self.threads.map(build).transpose()?);
        if is_checkpoint(&self.model) {
            return Err(Error::Quantized { dir: self.model.clone() });
        }
        // Whatever is missing, misshapen or broken is found now and not after hours.
        checkpoint::check_output(&self.out, self.begin.force)?;
        let (model, source) = Model::open_plain(&self.model)?;
        model.notes.iter().for_each(|n| progress.note(n));
        let (config, weights) = (model.config, Arc::new(model.weights));
        let program = weights.program.clone();
        let layers = layers(&program);
        let mut plan = self.plan.resolve(&layers.iter().map(|l| l.layer.clone()).collect::<Vec<_>>())?;
        join_tied(&program, &mut plan);
        let items = items(&source, &layers, &plan)?;

        let spec_of = |i: usize| plan.layers[i].map(|s| &plan.specs[s]);
        let chosen: Vec<(String, String)> = layers
            .iter()
            .enumerate()
            .filter_map(|(i, l)| Some((l.layer.name.clone(), spec_of(i)?)))
            .map(|(l, spec)| (l, format!("{} {}", spec.name(), spec.hash())))
            .collect();
        let name = |i: &usize| layers[*i].layer.name.clone();
        let groups: Vec<Vec<String>> = plan.groups.iter().map(|g| g.iter().map(name).collect()).collect();
        let model = pool.run(|| identity(&self.model, &source))?;
        let calibration = |how: &Calibrate| {
            pool.run(|| Calibration::new(how, &self.model, &config, &weights, &mut |i, n| progress.text(i, n)))
        };
        let calibration = self.calibrate.as_ref().map(calibration).transpose()?;
        let mut head = Head::new(model, self.shard_bytes, chosen, groups.clone());
        if plan.specs.iter().any(|s| matches!(s, Spec::Format(_))) {
            head.format = import::FORMAT;
        }
        head.calibration = calibration.as_ref().map(|c| c.entry().clone());
        let planned = items.iter().map(|i| (i.name.clone(), i.tensors.clone())).collect();
        let mut draft = Draft::begin(&self.out, &head, planned, self.begin)?;

        let weights = |i: &Item| match i.work {
            Work::Encode { layer, .. } => layers[layer].layer.shape.len(),
            Work::Copy => 0,
        };
        let total = items.iter().map(weights).sum();
        let done = items.iter().filter(|i| draft.record(&i.name).is_some()).map(weights).sum();
        progress.start(total, done, draft.dir());
        if self.devices.is_empty() {
            let left = items.iter().filter(|i| draft.record(&i.name).is_none());
            let left = left.filter_map(|i| match i.work {
                Work::Encode { layer, .. } => match spec_of(layer)? {
                    Spec::Quantizer(q) => Some((q, layers[layer].layer.shape.len())),
                    Spec::Format(_) => None,
                },
                Work::Copy => None,
            });
            let threads = self.threads.unwrap_or_else(rayon::current_num_threads);
            if let Some(text) = warning(left, threads) {
                progress.note(&text);
            }
        }
        let (source, layers, items, devices) = (&source, &layers[..], &items[..], &self.devices[..]);
        let pipeline = Pipeline { source, program: &program, layers, plan: &plan, items, devices, pool, progress };
        let entries = pipeline.run(&mut draft, calibration)?;
        self.finish(draft, head, &plan, entries, groups)
    }

    /// Writes the small files and publishes the checkpoint.
    fn finish(
        &self,
        mut draft: Draft,
        head: Head,
        plan: &Resolved,
        layers: Vec<LayerEntry>,
        groups: Vec<Vec<String>>,
    ) -> Result<Manifest, Error> {
        let mut specs = Vec::new();
        for spec in &plan.specs {
            let file = format!("specs/{}.qspec", spec.name());
            draft.put_file(&file, spec.canonical().as_bytes())?;
            specs.push(SpecEntry { name: spec.name().to_owned(), file, hash: spec.hash() });
        }
        // Other programs read quantizers alone.
        let for_others = !plan.specs.iter().any(|s| matches!(s, Spec::Format(_)));
        let files = Files::open(&self.model)?;
        for name in COPIED {
            if let Some(bytes) = files.read(name)? {
                let bytes =
                    if name == "config.json" && for_others { checkpoint::hugging::config(&bytes) } else { bytes };
                draft.put_file(name, &bytes)?;
            }
        }
        if for_others {
            draft.put_index()?;
        }
        draft.put_file("plan.toml", plan_text(&layers, &groups).as_bytes())?;
        let model = ModelId { sha256: head.model };
        let (tensors, files) = (Vec::new(), Vec::new());
        Ok(draft.finish(Manifest {
            format: head.format,
            tool: head.tool,
            model,
            calibration: head.calibration,
            source: None,
            specs,
            layers,
            groups,
            tensors,
            files,
        })?)
    }
}

/// Identity of a model: a hash over its configuration and all tensors, however they are spread over files.
fn identity(model: &Path, source: &TensorDir) -> Result<String, Error> {
    let names: Vec<&str> = source.names().collect();
    let sums: Vec<String> = names
        .par_iter()
        .map(|name| {
            let (dtype, shape, bytes) = source.raw(name)?;
            Ok(format!("{name} {dtype:?} {shape:?} {}\n", checkpoint::sha256(bytes.as_slice())))
        })
        .collect::<Result<_, model::Error>>()?;
    let mut hash = Sha256::new();
    hash.update(Files::open(model)?.read("config.json")?.unwrap_or_default());
    sums.iter().for_each(|s| hash.update(s));
    Ok(checkpoint::hex(&hash.finalize()))
}

/// The plan as carried out, as a plan file that names every layer.
fn plan_text(layers: &[LayerEntry], groups: &[Vec<String>]) -> String {
    use std::fmt::Write;
    let mut out = String::from("# The plan that this checkpoint was made by; `qp quantize --plan` takes it.\n");
    out.push_str("default = \"keep\"\n\n[layers]\n");
    for l in layers {
        let _ = writeln!(out, "\"{}\" = \"specs/{}.qspec\"", l.name, l.spec);
    }
    for group in groups {
        let names: Vec<String> = group.iter().map(|n| format!("\"{n}\"")).collect();
        let _ = write!(out, "\n[[groups]]\nfuse = [{}]\n", names.join(", "));
    }
    out
}

//! `qp quantize`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use qp_codegen::spec::{self, Definition};

use super::device::{Device, open_all};
use super::output::{self, outln};
use super::{Error, interrupt};
use crate::checkpoint::{Begin, LayerEntry};
use crate::model::weights::{EMBEDDING, HEAD};
use crate::plan::Plan;
use crate::quantize::calibrate::{Calibrate, Texts};
use crate::quantize::{Job, Progress};

/// Quantize a model: encode every linear layer of the blocks, or what a plan names, and write a checkpoint that explains itself.
///
/// The work may be interrupted at any time and continued with --resume; the result is the same, byte for byte. The
/// output appears only when it is whole.
#[derive(clap::Args)]
pub struct Quantize {
    /// The model: a directory (config.json, safetensors, tokenizer) or a GGUF file
    model: PathBuf,
    /// One quantizer for every linear layer of the blocks: a name of the palette or of a format (q4_k), or a .qspec file
    #[arg(long, value_name = "SPEC", required_unless_present = "plan", conflicts_with = "plan")]
    spec: Option<String>,
    /// A TOML file that gives each layer its quantizer (see docs/checkpoint.md)
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Quantize the output layer too, whatever the plan says of it. If it is tied to the embedding, that stays as it is
    #[arg(long, value_name = "SPEC")]
    lm_head: Option<String>,
    /// Quantize the embedding too, whatever the plan says of it. If the output layer is tied to it, one matrix serves both
    #[arg(long, value_name = "SPEC")]
    embedding: Option<String>,
    /// Directory of the checkpoint
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Fit the rounding to what enters each layer when the model runs over texts: a UTF-8 file, or `self` for texts that
    /// the model writes itself (slow for large models). Never the text that it is evaluated with
    #[arg(long, value_name = "self|FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of texts to calibrate with, at most
    #[arg(long, value_name = "COUNT", default_value_t = 32768, requires = "calibrate", value_parser = clap::value_parser!(u32).range(1..))]
    calibrate_tokens: u32,
    /// Continue an unfinished run of the same model and plan
    #[arg(long)]
    resume: bool,
    /// Replace an existing checkpoint (at the end); without --resume, discard an unfinished run
    #[arg(long)]
    force: bool,
    /// Where to search for the best bits: on all GPUs there are, or on the CPU; the checkpoint is the same
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

impl Quantize {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let mut plan = match (&self.spec, &self.plan) {
            (Some(spec), _) => Plan::uniform(spec),
            (None, Some(path)) => Plan::read(path)?,
            (None, None) => return Err("give --spec or --plan".into()),
        };
        for (option, name, spec) in [("--lm-head", HEAD, &self.lm_head), ("--embedding", EMBEDDING, &self.embedding)] {
            if let Some(spec) = spec {
                plan.set(option, name, spec);
            }
        }
        let mut job = Job::new(self.model, plan, &self.out);
        job.calibrate = self.calibrate.map(|texts| Calibrate {
            texts: if texts == Path::new("self") { Texts::Own } else { Texts::File(texts) },
            tokens: self.calibrate_tokens as usize,
        });
        job.begin = Begin { resume: self.resume, force: self.force };
        if let Some(bits) = self.spec.as_deref().and_then(few_bits)
            && job.calibrate.is_none()
            && !self.quiet
        {
            output::note(format_args!(
                "at {bits} bits the rounding should be fitted with --calibrate self: SmolLM2-135M's perplexity of 21 \
                 became 47 at 3 bits without it, and 27 fitted to a text"
            ));
        }
        job.devices = open_all(self.device)?;
        let bar = Bar::new(self.quiet);
        let manifest = match job.run(&bar) {
            Ok(m) => m,
            Err(e) => {
                bar.bar.abandon();
                return Err(match e {
                    // Shown with excerpts.
                    crate::quantize::Error::Plan(d) => d.into(),
                    e => e.into(),
                });
            }
        };
        bar.bar.finish_and_clear();
        if !self.quiet {
            let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
            outln!(
                "{}: {} layers quantized, {} in {}",
                self.out.display(),
                manifest.layers.len(),
                HumanBytes(bytes),
                HumanDuration(bar.bar.elapsed()),
            )?;
        }
        Ok(())
    }
}

/// The bits a weight of a quantizer, if they are so few that rounding to the nearest costs much.
fn few_bits(spec: &str) -> Option<f64> {
    let bits = match spec::resolve_any(spec).ok()? {
        Definition::Quantizer(q) => q.rate(),
        Definition::Format(f) => f.rate().1,
    };
    (bits <= 3.5).then_some(bits)
}

/// The progress bar: weights a second, time left, and the draft's name if the work is cut short.
struct Bar {
    bar: ProgressBar,
    resumed: OnceLock<u64>,
}

impl Bar {
    fn new(quiet: bool) -> Bar {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
        Bar { bar, resumed: OnceLock::new() }
    }
}

impl Progress for Bar {
    fn start(&self, total: u64, done: u64, _: &Path) {
        interrupt::can_resume();
        let style = ProgressStyle::with_template(
            "{msg:40!} [{wide_bar:.cyan/blue}] {percent:>3}% {human_pos}/{human_len} weights, {per_sec}, {eta} left",
        );
        if let Ok(style) = style {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        // Weights of an earlier run say nothing about this run's speed.
        self.bar.reset_eta();
        self.bar.reset_elapsed();
        self.bar.enable_steady_tick(Duration::from_millis(200));
        if done > 0 && self.resumed.set(done).is_ok() {
            self.bar.println(format!("resumed: {done} of {total} weights were done"));
        }
    }

    fn note(&self, note: &str) {
        self.bar.suspend(|| output::note(note));
    }

    fn text(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message("texts to calibrate with");
    }

    fn layer(&self, name: &str, spec: &str) {
        let short = name.strip_prefix("model.layers.").unwrap_or(name);
        self.bar.set_message(format!("{short} {spec}"));
    }

    fn advance(&self, weights: u64) {
        self.bar.inc(weights);
    }

    fn finished(&self, _: &LayerEntry) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

//! `qp sensitivity`: how much each layer matters.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use super::device::{Device, open};
use super::output::{self, outln};
use crate::allocate::sensitivity::{self, Progress, Sensitivities, Settings, measure};

/// Measure how much the predictions of a model suffer from noise in each of its linear layers and in its embedding.
///
/// Needs no data: the model writes the texts itself. `qp plan` reads the result.
#[derive(Debug, clap::Args)]
pub struct Sensitivity {
    /// Model, not quantized: a directory in Hugging Face's layout, or a GGUF file
    model: PathBuf,
    /// The file to write (JSON); saved after every layer
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Texts to sample from the model
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
    /// Tokens of each text
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Levels of noise, evenly up to a relative mean square of 1/16
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    levels: u32,
    /// Independent draws of noise at each level
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    draws: u32,
    /// Seed of texts and noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A rough estimate: two texts, one level. Overrides the counts above
    #[arg(long)]
    quick: bool,
    /// Where to run; sensitivities differ by rounding
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    /// Continue an unfinished run of the same model and settings
    #[arg(long)]
    resume: bool,
}

impl Sensitivity {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model cannot be opened or run, or the file cannot be written.
    pub fn run(self) -> Result<(), super::Error> {
        let mut settings = Settings {
            sequences: self.sequences as usize,
            tokens: self.tokens as usize,
            levels: self.levels as usize,
            draws: self.draws as usize,
            seed: self.seed,
        };
        if self.quick {
            settings = Settings { sequences: settings.sequences.min(2), levels: 1, draws: 1, ..settings };
        }
        output::check(&self.out)?;
        let earlier = match self.resume && self.out.exists() {
            true => Some(Sensitivities::read(&self.out)?),
            false => None,
        };
        let model = super::model::open(&self.model)?;
        let on = open(self.device)?;
        let name = std::fs::canonicalize(&self.model)
            .ok()
            .and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
            .unwrap_or_else(|| self.model.display().to_string());
        let bar = ProgressBar::no_length();
        bar.set_style(
            ProgressStyle::with_template("{msg:40!} [{wide_bar:.cyan/blue}] {pos}/{len} trials, {eta} left")
                .expect("a valid template"),
        );
        super::interrupt::can_resume();
        let mut shown = Bar { bar, out: &self.out };
        let done = measure(on.as_ref(), &name, model.config.bos, &model.weights, settings, earlier, &mut shown);
        let done = done.map_err(|e| match e {
            sensitivity::Error::Other(_) => sensitivity::Error::Other(self.out.display().to_string()),
            e => e,
        })?;
        shown.bar.finish_and_clear();
        done.write(&self.out)?;
        outln!("{}: {} layers", self.out.display(), done.layers.len())?;
        Ok(())
    }
}

struct Bar<'a> {
    bar: ProgressBar,
    out: &'a Path,
}

impl Progress for Bar<'_> {
    fn trial(&mut self, done: usize, total: usize, layer: &str) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(layer.strip_prefix("model.layers.").unwrap_or(layer).to_owned());
    }

    fn measured(&mut self, so_far: &Sensitivities) -> Result<(), sensitivity::Error> {
        so_far.write(self.out)
    }
}

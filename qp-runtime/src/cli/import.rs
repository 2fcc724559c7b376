//! `qp import` and `qp export`.

use std::path::PathBuf;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::Error;
use super::output::{outln, plain};
use crate::checkpoint::Begin;
use crate::import;

/// Take a GGUF file, or a directory quantized by GPTQ and others, as it is: a checkpoint without encoding again.
///
/// No weight is rounded: the bits move. `qp export` gives the files back, byte for byte.
#[derive(clap::Args)]
pub struct Import {
    /// The GGUF file, or a directory whose config.json says how it is quantized
    model: PathBuf,
    /// Directory of the checkpoint
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Continue an unfinished run with the same model
    #[arg(long)]
    resume: bool,
    /// Replace an existing checkpoint (at the end); without --resume, discard an unfinished run
    #[arg(long)]
    force: bool,
    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

/// Write the files that a checkpoint was imported from: the same bytes, checked by their SHA-256.
///
/// With -o FILE.gguf, of a checkpoint that was made here: a GGUF file, if GGUF has types for all its layers (q4_k, q8_0, …).
/// With --dequantized, of any checkpoint: a model directory whose weights are floats, for programs that read no other.
#[derive(clap::Args)]
pub struct Export {
    /// The checkpoint
    dir: PathBuf,
    /// Write the weights out as floats instead, in safetensors with config.json and tokenizer
    #[arg(long, value_enum, value_name = "TYPE", num_args = 0..=1, default_missing_value = "bf16")]
    dequantized: Option<import::Float>,
    /// Folder to write to, or a file that ends in .gguf
    #[arg(short, long, value_name = "PATH", default_value = ".")]
    out: PathBuf,
    /// Replace existing files
    #[arg(long)]
    force: bool,
    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

fn bar(quiet: bool) -> ProgressBar {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
    if let Ok(style) = ProgressStyle::with_template("{msg:40!} [{wide_bar:.cyan/blue}] {pos}/{len} tensors") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn show(bar: &ProgressBar, name: &str, done: usize, total: usize) {
    bar.set_length(total as u64);
    bar.set_position(done as u64);
    bar.set_message(name.to_owned());
}

impl Import {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let bar = bar(self.quiet);
        let begin = Begin { resume: self.resume, force: self.force };
        let result = import::import(&self.model, &self.out, begin, &mut |name, i, n| show(&bar, name, i, n));
        bar.finish_and_clear();
        let manifest = result?;
        if !self.quiet {
            let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
            let layers = manifest.layers.len();
            let specs: Vec<&str> = manifest.specs.iter().map(|s| s.name.as_str()).collect();
            outln!("{}: {layers} layers ({}), {}", self.out.display(), specs.join(", "), HumanBytes(bytes))?;
        }
        Ok(())
    }
}

impl Export {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let bar = bar(self.quiet);
        let shown = &mut |name: &str, i, n| show(&bar, name, i, n);
        let result = match self.dequantized {
            Some(ty) => import::write_out(&self.dir, &self.out, ty, self.force, shown),
            None => import::export(&self.dir, &self.out, self.force, shown),
        };
        bar.finish_and_clear();
        // Files of a checkpoint may be called as their maker likes, and a pipe may end at a terminal.
        for path in result? {
            outln!("{}", plain(&path.display().to_string()))?;
        }
        Ok(())
    }
}

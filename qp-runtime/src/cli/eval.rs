//! `qp eval`: perplexity of a text file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::device::{Device, open_model, open_session};
use crate::eval::perplexity;

/// Measure how well a model predicts a text: its perplexity.
#[derive(Debug, clap::Args)]
pub struct Eval {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// The text, a UTF-8 file.
    #[arg(long)]
    text: PathBuf,
    /// Tokens of a window. Each window's tokens but the first are scored, from that window alone.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    /// Score the beginning of the text alone, so many tokens
    #[arg(long, value_name = "TOKENS")]
    limit: Option<usize>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
    /// Where to run.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
}

impl Eval {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model cannot be opened, or the text is not UTF-8 or shorter than a window.
    pub fn run(self) -> Result<(), super::Error> {
        let text = read_text(&self.text)?;
        let (model, on) = open_model(&self.model, self.device)?;
        let mut tokens = model.tokenizer.encode(&text)?;
        tokens.truncate(self.limit.unwrap_or(tokens.len()));
        let window = self.window as usize;
        let mut session = open_session(model, on.as_ref(), window)?;

        let bar = ProgressBar::new((tokens.len() / window * window) as u64);
        bar.set_style(
            ProgressStyle::with_template("{wide_bar} {pos}/{len} tokens, {per_sec}, {eta} left")
                .expect("a valid template"),
        );
        let start = Instant::now();
        let result = perplexity(&mut session, &tokens, window, |done| bar.set_position(done as u64));
        bar.finish_and_clear();
        let p = result?;
        let seconds = start.elapsed().as_secs_f64();
        let mut out = std::io::stdout().lock();
        if self.json {
            let line = json!({
                "perplexity": p.perplexity(), "loss": p.loss, "tokens": p.tokens, "scored": p.scored,
                "window": p.window, "seconds": seconds,
            });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "perplexity {:.4}", p.perplexity())?;
            writeln!(out, "loss       {:.5} nats a token", p.loss)?;
            writeln!(
                out,
                "tokens     {} scored of {}, in windows of {}, {seconds:.1} s",
                p.scored, p.tokens, p.window
            )?;
        }
        Ok(())
    }
}

fn read_text(path: &Path) -> Result<String, super::Error> {
    let bytes = std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        format!("{} is not UTF-8 (byte {at}): convert it to UTF-8 first", path.display()).into()
    })
}

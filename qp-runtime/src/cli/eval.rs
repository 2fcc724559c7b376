//! `qp eval`: perplexity of a text file.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::device::{Device, open_model, open_session};
use super::output::{note, outln};
use crate::eval::perplexity;

/// Measure how well a model predicts a text: its perplexity.
#[derive(Debug, clap::Args)]
pub struct Eval {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// The text, a UTF-8 file; `-` for standard input. It is scored as the tokenizer gives it, with a first token (BOS)
    /// only where the tokenizer puts one: before the text, not before each window.
    #[arg(long)]
    text: PathBuf,
    /// Tokens of a window. Each window's tokens but the first are scored, from that window alone.
    /// It is made smaller if the model's context or the text is
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
    /// If the model cannot be opened, or the text is not UTF-8 or has fewer than two tokens.
    pub fn run(self) -> Result<(), super::Error> {
        let text = crate::input::text(&self.text)?;
        let (model, on) = open_model(&self.model, self.device)?;
        let mut tokens = model.tokenizer.encode(&text)?;
        tokens.truncate(self.limit.unwrap_or(tokens.len()));
        let window = fitted(
            self.window as usize,
            &[(model.config.max_positions, "the model's context"), (tokens.len(), "the text")],
        );
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
        if self.json {
            let line = json!({
                "perplexity": p.perplexity().min(f64::MAX), "loss": p.loss, "tokens": p.tokens, "scored": p.scored,
                "window": p.window, "seconds": seconds,
            });
            outln!("{line}")?;
        } else {
            outln!("perplexity {:.4}", p.perplexity())?;
            outln!("loss       {:.5} nats a token", p.loss)?;
            outln!("tokens     {} scored of {}, in windows of {}, {seconds:.1} s", p.scored, p.tokens, p.window)?;
        }
        Ok(())
    }
}

/// `window`, or the smallest of `limits`, which is said.
fn fitted(window: usize, limits: &[(usize, &str)]) -> usize {
    match limits.iter().min_by_key(|(limit, _)| *limit) {
        Some(&(limit, what)) if (2..window).contains(&limit) => {
            note(format_args!("the window is {limit} tokens, not {window}: {what} has no more"));
            limit
        }
        _ => window,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows() {
        assert_eq!(fitted(256, &[(512, ""), (1000, "")]), 256);
        assert_eq!(fitted(256, &[(128, ""), (100, "")]), 100);
        // Of nothing no window can be made: the error says so.
        assert_eq!(fitted(256, &[(512, ""), (1, "")]), 256);
    }
}

//! `qp eval`: how well a model predicts a text or answers questions.

use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::device::{Device, open_model, open_room, open_session};
use super::output::{note, outln};
use crate::engine::{Precision, Room};
use crate::eval::{divergence, perplexity, questions};

/// Measure how well a model predicts: the perplexity of a text, how far its predictions are from another model's, or how
/// many questions with choices it answers.
#[derive(Debug, clap::Args)]
pub struct Eval {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// The text, a UTF-8 file; `-` for standard input. It is scored as the tokenizer gives it, with a first token (BOS)
    /// only where the tokenizer puts one: before the text, not before each window.
    #[arg(long, required_unless_present = "questions")]
    text: Option<PathBuf>,
    /// Tokens of a window. Each window's tokens but the first are scored, from that window alone.
    /// It is made smaller if the model's context or the text is
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    /// Score the beginning of the text alone, so many tokens
    #[arg(long, value_name = "TOKENS")]
    limit: Option<usize>,
    /// Another model, such as the unquantized one: instead of perplexity, the mean Kullback-Leibler divergence from its
    /// predictions
    #[arg(long, value_name = "MODEL", requires = "text")]
    against: Option<PathBuf>,
    /// Questions instead of a text: a file with `{"question": "…", "choices": [" …", " …"], "answer": 0}` in each line. The
    /// likeliest choice is the model's answer
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "limit", "window", "against"])]
    questions: Option<PathBuf>,
    /// Bits of a number of keys and values: 8 or 16. Of the model that is compared with, 16 always
    #[arg(long, default_value_t, value_name = "BITS")]
    cache_bits: Precision,
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
    /// If the model cannot be opened, the text is not UTF-8 or has fewer than two tokens, or a line is no question.
    pub fn run(self) -> Result<(), super::Error> {
        if let Some(questions) = &self.questions {
            return self.ask(questions);
        }
        let path = self.text.as_ref().expect("required without questions");
        let text = crate::input::text(path)?;
        let (model, on) = open_model(&self.model, self.device)?;
        let mut tokens = model.tokenizer.encode(&text)?;
        tokens.truncate(self.limit.unwrap_or(tokens.len()));
        let window = fitted(
            self.window as usize,
            &[(model.config.max_positions, "the model's context"), (tokens.len(), "the text")],
        );
        let mut session = open_room(model, on.as_ref(), Room { cache: self.cache_bits, ..Room::one(window) })?;
        let bar = bar(tokens.len() / window * window, "tokens");
        let start = Instant::now();
        if let Some(against) = &self.against {
            let reference = super::model::open(against)?;
            let mut reference = open_session(reference, on.as_ref(), window)?;
            let result =
                divergence(&mut session, &mut reference, &tokens, window, |done| bar.set_position(done as u64));
            bar.finish_and_clear();
            let (d, seconds) = (result?, start.elapsed().as_secs_f64());
            if self.json {
                let line = json!({
                    "divergence": d.mean.min(f64::MAX), "largest": d.largest.min(f64::MAX), "agreement": d.agreement,
                    "scored": d.scored, "window": d.window, "seconds": seconds,
                });
                outln!("{line}")?;
            } else {
                outln!("divergence {:.6} nats a token, {:.4} at most", d.mean, d.largest)?;
                outln!("agreement  {:.2} % of the likeliest tokens", 100.0 * d.agreement)?;
                outln!("tokens     {} compared, in windows of {}, {seconds:.1} s", d.scored, d.window)?;
            }
            return Ok(());
        }
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

    /// Asks the questions of a file.
    fn ask(&self, path: &Path) -> Result<(), super::Error> {
        let read = questions::read(path, &crate::input::text(path)?)?;
        let (model, on) = open_model(&self.model, self.device)?;
        let prepare = |question| questions::Prepared::new(question, &model.tokenizer, model.config.bos);
        let prepared = read.iter().map(prepare).collect::<Result<Vec<_>, _>>()?;
        let longest = prepared.iter().map(questions::Prepared::tokens).max().unwrap_or(1);
        let mut session = open_room(model, on.as_ref(), Room { cache: self.cache_bits, ..Room::one(longest) })?;
        let bar = bar(prepared.len(), "questions");
        let start = Instant::now();
        let result = questions::ask(&mut session, &prepared, |done| bar.set_position(done as u64));
        bar.finish_and_clear();
        let (a, seconds) = (result?, start.elapsed().as_secs_f64());
        let share = |right: usize| right as f64 / a.questions as f64;
        if self.json {
            let line = json!({
                "questions": a.questions, "right": a.right, "accuracy": share(a.right),
                "right_by_byte": a.right_by_byte, "accuracy_by_byte": share(a.right_by_byte), "seconds": seconds,
            });
            outln!("{line}")?;
        } else {
            outln!("accuracy   {:.2} %: {} of {} questions", 100.0 * share(a.right), a.right, a.questions)?;
            outln!(
                "by byte    {:.2} %: the likeliest choice by its length, {seconds:.1} s",
                100.0 * share(a.right_by_byte)
            )?;
        }
        Ok(())
    }
}

/// A bar of progress to `len`.
fn bar(len: usize, what: &str) -> ProgressBar {
    let template = format!("{{wide_bar}} {{pos}}/{{len}} {what}, {{per_sec}}, {{eta}} left");
    let bar = ProgressBar::new(len as u64);
    bar.set_style(ProgressStyle::with_template(&template).expect("a valid template"));
    bar
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

//! `qp generate`: continue a text.

use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use super::device::{Device, open_model, open_session};
use crate::engine::{self, Sampler, Sampling, Stop};

/// Continue a text, printed as it is produced.
#[derive(Debug, clap::Args)]
pub struct Generate {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// The text to continue; without it, the model begins a text of its own.
    #[arg(long, short, default_value = "")]
    prompt: String,
    /// Tokens to produce at most.
    #[arg(long = "tokens", short = 'n', value_name = "COUNT", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Divides the logits before drawing; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.0, value_parser = temperature)]
    temperature: f32,
    /// Draw from the so many most likely tokens only; 0 for no limit.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    top_k: usize,
    /// Draw from the fewest tokens only whose probabilities reach this sum.
    #[arg(long, value_name = "SUM", default_value_t = 1.0, value_parser = probability)]
    top_p: f32,
    /// Draw only from tokens whose probability is at least this part of the largest.
    #[arg(long, value_name = "PART", default_value_t = 0.0, value_parser = probability)]
    min_p: f32,
    /// Divides positive logits of tokens that occurred before, prompt included, and multiplies negative ones; 1 for none.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = penalty)]
    repetition_penalty: f32,
    /// Seed of the draws: equal seeds give equal texts.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to run.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
}

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(v) if v.is_finite() && v >= 0.0 => Ok(v),
        _ => Err("expected a number that is not negative".to_owned()),
    }
}

fn penalty(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(v) if (0.01..=100.0).contains(&v) => Ok(v),
        _ => Err("expected a number from 0.01 to 100".to_owned()),
    }
}

fn probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(v) if (0.0..=1.0).contains(&v) => Ok(v),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

impl Generate {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model cannot be opened, or prompt and tokens do not fit its context.
    pub fn run(self) -> Result<(), super::Error> {
        let (mut model, on) = open_model(&self.model, self.device)?;
        let mut prompt = model.tokenizer.encode(&self.prompt)?;
        if prompt.is_empty() {
            prompt.extend(model.config.bos);
        }
        if prompt.is_empty() {
            return Err(engine::Error::EmptyPrompt.into());
        }
        let end = std::mem::take(&mut model.config.eos);
        let tokenizer = model.tokenizer.clone();
        let mut session = open_session(model, on.as_ref(), prompt.len() + self.count as usize - 1)?;
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
        };

        let mut output = Output::new();
        output.print(&self.prompt)?;
        let mut text = tokenizer.stream(&prompt);
        let mut sampler = Sampler::with_penalty(sampling, self.repetition_penalty);
        let done = engine::generate(&mut session, &prompt, self.count as usize, &end, &mut sampler, |token| {
            output.print(&text.push(token)?)?;
            Ok::<_, super::Error>(if output.closed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        output.print(&text.finish()?)?;
        output.print("\n")?;
        if done.stop == Stop::Caller {
            return Ok(());
        }
        eprintln!(
            "prompt: {} tokens in {:.2} s; then {} tokens at {:.1} tokens/s{}",
            prompt.len(),
            done.prefill.as_secs_f64(),
            done.tokens.len(),
            done.rate(),
            if done.stop == Stop::End { " (end of text)" } else { "" },
        );
        Ok(())
    }
}

/// Standard output. A reader that went away (`qp generate … | head`) ends the work without an error.
struct Output {
    out: std::io::Stdout,
    closed: bool,
}

impl Output {
    fn new() -> Self {
        Output { out: std::io::stdout(), closed: false }
    }

    fn print(&mut self, text: &str) -> std::io::Result<()> {
        let mut out = self.out.lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other,
        }
    }
}

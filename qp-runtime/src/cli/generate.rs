//! `qp generate`: continue a text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::chat::say_answer;
use super::device::{Device, open_model, open_session};
use super::drafts::{self, Drafting};
use super::output;
use crate::chat::{Chat, Options, StopTexts};
use crate::device::Executor;
use crate::engine::{self, Generated, Room, Sampler, Sampling, Stop};
use crate::model::{Files, Model};

/// Continue a text, printed as it is produced.
#[derive(Debug, clap::Args)]
pub struct Generate {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// The text to continue, or `-` to read it from standard input; without it, the model begins a text of its own.
    #[arg(long, short, default_value = "", allow_hyphen_values = true)]
    prompt: String,
    /// File with the text to continue; `-` is standard input. A line end at its end is left out.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// End before this text appears in what the model writes; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Tokens to produce at most.
    #[arg(long = "tokens", short = 'n', value_name = "COUNT", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    #[command(flatten)]
    drawing: Drawing,
    /// Take the prompt for a question and answer it, by the model's chat template.
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    drafting: Drafting,
    /// Where to run.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
}

/// How tokens are drawn.
#[derive(Debug, clap::Args)]
pub(super) struct Drawing {
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
}

impl Drawing {
    /// A sampler that draws so.
    pub(super) fn sampler(&self) -> Sampler {
        self.sampler_of(0)
    }

    /// Says what the model's makers suggest, if nothing was asked for: a file does not change how tokens are drawn.
    pub(super) fn say_suggested(&self, suggested: &[String]) {
        let asked = self.temperature != 0.0 || self.repetition_penalty != 1.0;
        if let Some(said) = suggestion(suggested).filter(|_| !asked) {
            output::note(said);
        }
    }

    /// As [`Drawing::sampler`], by a seed that differs by `more`.
    pub(super) fn sampler_of(&self, more: u64) -> Sampler {
        let Drawing { temperature, top_k, top_p, min_p, repetition_penalty, seed } = *self;
        let seed = seed.wrapping_add(more);
        Sampler::with_penalty(Sampling { temperature, top_k, top_p, min_p, seed }, repetition_penalty)
    }
}

/// What `generation_config.json` suggests, as `KEY VALUE`, with the options that do so.
fn suggestion(suggested: &[String]) -> Option<String> {
    const OPTIONS: [&str; 5] = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
    let option = |s: &String| {
        let (key, value) = s.split_once(' ')?;
        OPTIONS.contains(&key).then(|| format!(" --{} {value}", key.replace('_', "-")))
    };
    let options: String = suggested.iter().filter_map(option).collect();
    let follow = if options.is_empty() { String::new() } else { format!("; to draw so:{options}") };
    let said = format!("generation_config.json suggests {}, which is not followed{follow}", suggested.join(", "));
    (!suggested.is_empty()).then_some(said)
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
        let given = self.given()?;
        let (mut model, on) = open_model(&self.model, self.device)?;
        self.drawing.say_suggested(&model.config.suggested);
        if self.chat {
            return self.answer(&given, model, on.as_ref());
        }
        let mut prompt = model.tokenizer.encode(&given)?;
        if prompt.is_empty() {
            prompt.extend(model.config.bos);
        }
        if prompt.is_empty() {
            return Err(engine::Error::NoFirstToken.into());
        }
        let end = std::mem::take(&mut model.config.eos);
        let tokenizer = model.tokenizer.clone();
        let drafting = self.drafting.open(&tokenizer)?;
        let mut session = open_session(model, on.as_ref(), prompt.len() + self.count as usize - 1)?;
        session.set_drafts(drafting.drafts(on.as_ref(), session.vocab(), Room::one(session.context()))?);

        output::print(format_args!("{given}"))?;
        let mut stream = tokenizer.stream(&prompt);
        let mut texts = StopTexts::new(self.stop);
        let mut sampler = self.drawing.sampler();
        let done = engine::generate(&mut session, &prompt, self.count as usize, &end, &mut sampler, |token| {
            let (text, found) = texts.push(&stream.push(token)?);
            output::print(format_args!("{text}"))?;
            let end = found || output::closed();
            Ok::<_, super::Error>(if end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if done.stop != Stop::Caller {
            let (text, found) = texts.push(&stream.finish()?);
            let rest = if found { String::new() } else { texts.rest() };
            output::print(format_args!("{text}{rest}"))?;
        }
        output::print(format_args!("\n"))?;
        if !output::closed() {
            report(prompt.len(), &done);
        }
        Ok(())
    }

    /// The prompt, wherever it was given.
    fn given(&self) -> Result<String, super::Error> {
        let file = match &self.prompt_file {
            Some(file) => file,
            None if self.prompt == "-" => Path::new("-"),
            None => return Ok(self.prompt.clone()),
        };
        let mut text = crate::input::text(file)?;
        if text.ends_with('\n') {
            text.pop();
            text.truncate(text.strip_suffix('\r').unwrap_or(&text).len());
        }
        Ok(text)
    }

    /// Answers the question that was `given`.
    fn answer(self, given: &str, model: Model, on: Option<&Executor>) -> Result<(), super::Error> {
        let mut chat = Chat::open(&Files::open(&self.model)?, &model.tokenizer, &model.config.eos)?;
        chat.stop.extend(self.stop);
        let tokenizer = model.tokenizer.clone();
        let question = json!({"role": "user", "content": given});
        let (_, prompt) = chat.prompt(&tokenizer, &[question], &Options::default())?;
        let count = self.count as usize;
        let drafting = self.drafting.open(&tokenizer)?;
        let mut session = open_session(model, on, prompt.len() + count - 1)?;
        session.set_drafts(drafting.drafts(on, session.vocab(), Room::one(session.context()))?);
        let mut sampler = self.drawing.sampler();
        let (_, done) = say_answer(&mut session, &tokenizer, &chat, &prompt, count, &mut sampler, || false)?;
        if !output::closed() {
            report(prompt.len(), &done);
        }
        Ok(())
    }
}

/// Says how fast it went.
fn report(prompt: usize, done: &Generated) {
    output::say(&format!(
        "prompt: {prompt} tokens in {:.2} s; then {} tokens at {:.1} tokens/s{}\n",
        done.prefill.as_secs_f64(),
        done.tokens.len(),
        done.rate(),
        match done.stop {
            Stop::End => " (end of text)",
            Stop::Caller => " (stopped at a text)",
            Stop::Count => "",
        },
    ));
    if let Some(said) = drafts::said(done) {
        output::say(&format!("{said}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_come_with_their_options() {
        let of = |s: &[&str]| suggestion(&s.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&[]), None);
        let all = of(&["temperature 0.6", "max_length 4096", "top_p 0.9"]).unwrap();
        assert_eq!(
            all,
            "generation_config.json suggests temperature 0.6, max_length 4096, top_p 0.9, which is not followed; to draw so: \
             --temperature 0.6 --top-p 0.9"
        );
        assert_eq!(of(&["seed 4"]).unwrap(), "generation_config.json suggests seed 4, which is not followed");
    }
}

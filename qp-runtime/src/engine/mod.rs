//! Running a model: what an engine does, and what is written once above all of them.
//!
//! An [`Engine`] holds one sequence's keys and values and computes logits. [`generate()`] and [`crate::eval`] know
//! nothing else of it. [`cpu`] is the engine that runs everywhere.

pub mod cpu;
pub mod cuda;
pub mod generate;
pub mod linear;
pub mod sampling;
pub mod texts;

use std::sync::Arc;

pub use cpu::CpuEngine;
pub use cuda::CudaEngine;
use cuda::Uploads;
pub use generate::{Generated, Stop, generate};
pub use sampling::{Sampler, Sampling};

use crate::device::Executor;
use crate::model::{Config, Weights};

/// An engine for sequences of up to `context` tokens, on the CPU without an executor.
///
/// # Errors
/// If the model has fewer positions or does not fit the device.
pub fn open(
    on: Option<&Executor>,
    config: &Config,
    weights: &Arc<Weights>,
    context: usize,
) -> Result<Box<dyn Engine>, Error> {
    Relatives::on(on).open(config, weights, context)
}

/// Opens engines of models that have most of their tensors in common with the first: on a device these lie once.
pub struct Relatives<'e> {
    on: Option<&'e Executor>,
    uploads: Uploads,
}

impl<'e> Relatives<'e> {
    /// Engines on an executor, or on the CPU.
    pub fn on(on: Option<&'e Executor>) -> Self {
        Relatives { on, uploads: Uploads::default() }
    }

    /// See [`open`].
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(&mut self, config: &Config, weights: &Arc<Weights>, context: usize) -> Result<Box<dyn Engine>, Error> {
        Ok(match self.on {
            Some(on) => Box::new(CudaEngine::sharing(on.clone(), config, weights, context, &mut self.uploads)?),
            None => Box::new(CpuEngine::new(config, weights.clone(), context)?),
        })
    }
}

/// Tokens that an engine is given at once when there are many: bounds its memory.
pub const PREFILL: usize = 256;

/// Which of the tokens given to [`Engine::forward`] logits are wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// Of none.
    None,
    /// Of the last.
    Last,
    /// Of each.
    All,
}

impl Logits {
    /// Rows of logits for `tokens` tokens: the last so many tokens have them.
    pub fn rows(self, tokens: usize) -> usize {
        match self {
            Logits::None => 0,
            Logits::Last => tokens.min(1),
            Logits::All => tokens,
        }
    }
}

/// What can go wrong while a model runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More tokens than the context holds.
    #[error("{wanted} tokens do not fit the context of {context} tokens: shorten the text or ask for fewer tokens")]
    Context {
        /// Tokens that were to be in the context.
        wanted: usize,
        /// How many fit.
        context: usize,
    },
    /// A context that the model cannot have.
    #[error(
        "{wanted} tokens were asked for, but the model's context ends at {max}: shorten the text or ask for fewer tokens"
    )]
    Positions {
        /// Context asked for.
        wanted: usize,
        /// The model's longest.
        max: usize,
    },
    /// No token to begin with.
    #[error("the prompt is empty and the model has no first token: give a prompt")]
    EmptyPrompt,
    /// Nothing to start a text with.
    #[error("the model has no first token (bos_token_id in config.json), so it cannot write texts of its own")]
    NoFirstToken,
    /// A token that the model does not know.
    #[error("token {token} is not among the model's {vocab}: the tokenizer and the model do not belong together")]
    Token {
        /// The token.
        token: u32,
        /// Tokens that the model knows.
        vocab: usize,
    },
    /// No logit to choose by.
    #[error("the model's logits are not numbers: its weights are damaged or overflow")]
    NotANumber,
    /// The text is too short to be scored.
    #[error("the text has {tokens} tokens, fewer than one window of {window}: give a longer text or a smaller window")]
    ShortText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// A window in which nothing can be scored.
    #[error("a window of {0} tokens scores nothing: it must be at least 2")]
    Window(usize),
    /// The device failed.
    #[error("{0}")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Computes logits of one sequence, whose keys and values it keeps.
pub trait Engine {
    /// Tokens that the model knows: the length of a row of logits.
    fn vocab(&self) -> usize;

    /// Longest sequence, in tokens.
    fn context(&self) -> usize;

    /// Tokens of the sequence so far.
    fn position(&self) -> usize;

    /// Shortens the sequence to its first `position` tokens; no effect if it is not longer.
    fn truncate(&mut self, position: usize);

    /// Appends `tokens` to the sequence and writes the wanted logits to `out`, replacing what it held:
    /// `logits.rows(tokens.len()) × vocab`, row-major.
    ///
    /// # Errors
    /// If the sequence would exceed the context, a token is unknown or the device fails. Nothing is appended then.
    fn forward(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) -> Result<(), Error>;

    /// Appends `tokens` to the sequence and gives the first of the likeliest next ones.
    ///
    /// # Errors
    /// As [`Engine::forward`], and if a logit is not a number or none is finite.
    fn greedy(&mut self, tokens: &[u32]) -> Result<u32, Error> {
        let mut logits = Vec::new();
        self.forward(tokens, Logits::Last, &mut logits)?;
        sampling::argmax(&logits).ok_or(Error::NotANumber)
    }
}

/// What every [`Engine::forward`] checks first.
///
/// # Errors
/// If the sequence would exceed the context or a token is unknown.
pub fn check_tokens(tokens: &[u32], position: usize, context: usize, vocab: usize) -> Result<(), Error> {
    let wanted = position + tokens.len();
    if wanted > context {
        return Err(Error::Context { wanted, context });
    }
    match tokens.iter().find(|&&t| t as usize >= vocab) {
        Some(&token) => Err(Error::Token { token, vocab }),
        None => Ok(()),
    }
}

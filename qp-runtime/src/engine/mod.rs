//! Running a model: what an engine does, and what is written once above all of them.
//!
//! An [`Engine`] computes steps of many sequences. It holds the storage of keys and values, in pages of [`PAGE`]
//! positions, and knows nothing of who owns them: a [`Chunk`] says which tokens follow where, and in which pages the
//! sequence lies. [`pages`] gives pages out; a [`Session`] is one sequence with an engine of its own, which is all that
//! [`generate()`] and [`crate::eval`] need. [`cpu`] is the engine that runs everywhere.

pub mod cpu;
pub mod cuda;
pub mod drafts;
pub mod generate;
pub mod linear;
pub mod lookup;
pub mod pages;
pub mod sampling;
pub mod session;
pub mod texts;

use std::sync::Arc;

pub use cpu::CpuEngine;
pub use cuda::CudaEngine;
use cuda::Uploads;
pub use drafts::Drafts;
pub use generate::{Generated, Stop, generate};
pub use pages::Pool;
pub use sampling::{Sampler, Sampling};
pub use session::Session;

pub use qp_codegen::kernels::sample::mask_words;
use qp_codegen::kernels::{Span, attend};

use crate::device::Executor;
use crate::model::{Weights, program};

/// Positions of a page of keys and values.
pub const PAGE: usize = attend::PAGE as usize;

/// Rows of logits that every engine computes at once: steps that want more may be cut.
pub const MOST_ROWS: usize = 64;

/// Room for sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Pages of all sequences together.
    pub pages: usize,
    /// How precisely keys and values are kept.
    pub cache: Precision,
}

/// Bits of a number of keys and values. Each head of a position has scales of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits.
    Bits8,
    /// 16 bits.
    #[default]
    Bits16,
}

impl std::str::FromStr for Precision {
    type Err = String;

    /// From the number of bits.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "8" => Ok(Precision::Bits8),
            "16" => Ok(Precision::Bits16),
            _ => Err(format!("keys and values are kept in 8 or 16 bits, not {text}")),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", 8 * self.planes())
    }
}

impl Precision {
    /// Bytes of a number, each of which is a plane of the cache.
    pub fn planes(self) -> u32 {
        match self {
            Precision::Bits8 => 1,
            Precision::Bits16 => 2,
        }
    }
}

impl Room {
    /// For one sequence of up to `context` tokens.
    pub fn one(context: usize) -> Room {
        Room { context, pages: context.div_ceil(PAGE), cache: Precision::default() }
    }
}

/// A session with one sequence of up to `context` tokens, on the CPU without an executor.
///
/// # Errors
/// If the model has fewer positions or does not fit the device.
pub fn open(on: Option<&Executor>, weights: &Arc<Weights>, context: usize) -> Result<Session, Error> {
    Ok(Session::new(SharedWeights::on(on).open(weights, Room::one(context))?))
}

/// Opens engines of models that have most of their tensors in common with the first: on a device these lie once.
pub struct SharedWeights<'e> {
    on: Option<&'e Executor>,
    uploads: Uploads,
}

impl<'e> SharedWeights<'e> {
    /// Engines on an executor, or on the CPU.
    pub fn on(on: Option<&'e Executor>) -> Self {
        SharedWeights { on, uploads: Uploads::default() }
    }

    /// An engine with room for sequences.
    ///
    /// # Errors
    /// If the model has fewer positions or does not fit the device.
    pub fn open(&mut self, weights: &Arc<Weights>, room: Room) -> Result<Box<dyn Engine>, Error> {
        Ok(match self.on {
            Some(on) => Box::new(CudaEngine::sharing(on.clone(), weights, room, &mut self.uploads)?),
            None => Box::new(CpuEngine::new(weights.clone(), room)?),
        })
    }
}

/// Which of a chunk's tokens logits are wanted of.
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

/// What the kernels of an attention, and their twins, are made for: a step of `tokens` tokens whose queries, keys and values
/// lie where `spans` say.
fn attention_ops(
    program: &program::Program,
    attention: &program::Attention,
    cache: Precision,
    tokens: u32,
    [q, k, v]: [Span; 3],
) -> (attend::Append, attend::Attend) {
    let shape = program.caches[attention.cache.0];
    let (kv_heads, head_dim) = (shape.heads as u32, shape.head_dim as u32);
    let cache = attend::Cache { kv_heads, head_dim, planes: cache.planes() };
    let (heads, scale) = (attention.heads as u32, attention.scale);
    let rope = attention.rope.map(|id| &program.ropes[id.0]);
    let (rotary, interleaved) = rope.map_or((0, false), |r| (2 * r.frequencies.len() as u32, r.interleaved));
    let norm = attention.q_norm.map(|n| n.norm.eps);
    let append = attend::Append { cache, heads, tokens, q, k, v, rotary, interleaved, norm, scale };
    let (window, sinks) = (attention.window.map(|w| w as u32), attention.sinks.is_some());
    (append, attend::Attend { cache, heads, tokens, window, soft_cap: attention.soft_cap, sinks })
}

/// How the next token is chosen from a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Temperature and limits.
    pub sampling: Sampling,
    /// Number of the draw among those of the sampling's seed.
    pub draw: u32,
}

/// What is wanted of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wish<'a> {
    /// A token, drawn of those that are not forbidden: bit `i mod 32` of word `i / 32` is set for a forbidden token `i`, in
    /// [`mask_words`](qp_codegen::kernels::sample::mask_words) words; without words all are allowed.
    Token(Choice, &'a [u32]),
    /// The logits themselves.
    Logits,
}

/// Tokens that follow a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first: tokens of the sequence before them, whose keys and values are there.
    pub position: usize,
    /// The pages in which the sequence lies, in order: at least enough for all its tokens with these. What the engine
    /// writes lies in the pages of the new tokens' positions.
    pub pages: &'a [u32],
    /// Of which tokens logits are wanted.
    pub logits: Logits,
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
    #[error("the prompt is empty, there is no token to go on from: give a text")]
    EmptyPrompt,
    /// Nothing to start a text with.
    #[error(
        "the model has no first token (bos_token_id in config.json), so it cannot begin a text of its own: give a prompt"
    )]
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
    /// A page that the engine does not have.
    #[error("page {page} is not among the engine's {pages} pages of keys and values")]
    Page {
        /// The page.
        page: u32,
        /// How many there are.
        pages: usize,
    },
    /// Two models whose predictions cannot be compared.
    #[error("the models know {found} and {expected} tokens: only models of one tokenizer can be compared")]
    Vocabulary {
        /// Tokens of one.
        found: usize,
        /// Tokens of the other.
        expected: usize,
    },
    /// Numbers that are none where a model computes.
    #[error("what {layer} computes is not finite: the weights before it are damaged, or overflow for this text")]
    NotFinite {
        /// Where it was noticed.
        layer: String,
    },
    /// A model or context that the device's memory cannot hold.
    #[error(
        "the GPU's memory is too small: {needs}, but {:.2} GiB are free: {}",
        *free as f64 / (1u64 << 30) as f64,
        if *fits == 0 { "no tokens fit beside the weights; quantize to fewer bits".to_owned() } else { format!("at most {fits} tokens fit") },
    )]
    Memory {
        /// What it takes.
        needs: cuda::Needs,
        /// Free bytes.
        free: u64,
        /// Tokens whose keys and values would fit.
        fits: u64,
    },
    /// A draft model that cannot guess.
    #[error("the draft model fails: {0}; leave --draft-model out")]
    Draft(#[source] Box<Error>),
    /// The device failed.
    #[error("{0}")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Computes steps of many sequences, whose keys and values it keeps in pages.
///
/// The bits of a result depend on the sequence alone: not on the other chunks of the step, on how a sequence is cut into
/// chunks, or on the pages in which it lies.
pub trait Engine: Send {
    /// Tokens that the model knows: the length of a row of logits.
    fn vocab(&self) -> usize;

    /// Longest sequence, in tokens.
    fn context(&self) -> usize;

    /// Pages of keys and values, [`PAGE`] positions each, numbered from 0.
    fn pages(&self) -> usize;

    /// Tokens that are computed at once. Larger steps are cut.
    fn most_tokens(&self) -> usize;

    /// Appends the tokens of each chunk to its sequence and writes the wanted logits to `out`, replacing what it held:
    /// rows of `vocab` values, chunk after chunk. No two chunks are of one sequence.
    ///
    /// # Errors
    /// If a sequence would exceed the context or its pages, a token or page is unknown, or the device fails. What the
    /// pages hold at the chunks' positions is lost then.
    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error>;

    /// As [`Engine::step`], but writes the first of the likeliest next tokens for each row of logits that is wanted.
    ///
    /// # Errors
    /// As [`Engine::step`], and if a logit is not a number or none of a row is finite.
    fn best(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<u32>) -> Result<(), Error> {
        let mut logits = Vec::new();
        self.step(chunks, &mut logits)?;
        out.clear();
        for row in logits.chunks_exact(self.vocab()) {
            out.push(sampling::argmax(row).ok_or(Error::NotANumber)?);
        }
        Ok(())
    }

    /// As [`Engine::best`], but each row's token is drawn as `choices` say: one for each row that is wanted. Equal choices
    /// draw equal tokens on every engine.
    ///
    /// # Errors
    /// As [`Engine::best`].
    fn choose(&mut self, chunks: &[Chunk<'_>], choices: &[Choice], out: &mut Vec<u32>) -> Result<(), Error> {
        let wishes: Vec<Wish<'_>> = choices.iter().map(|c| Wish::Token(*c, &[])).collect();
        self.answer(chunks, &wishes, out, &mut Vec::new())
    }

    /// As [`Engine::step`], but of each row of logits that is wanted, `wishes` say what: `tokens` are those of the rows that
    /// wish one, `logits` the rows that are wished, both in order and in place of what was there.
    ///
    /// # Errors
    /// As [`Engine::best`], and if all tokens of a row are forbidden.
    fn answer(
        &mut self,
        chunks: &[Chunk<'_>],
        wishes: &[Wish<'_>],
        tokens: &mut Vec<u32>,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.step(chunks, logits)?;
        answer_from(logits, self.vocab(), wishes, tokens)
    }

    /// Makes ready what steps of any size need, so that none of them waits for a compiler.
    ///
    /// # Errors
    /// If the device or its compiler fails.
    fn warm(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Copies the keys and values of a page to another one.
    ///
    /// # Errors
    /// If there is no such page or the device fails.
    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), Error>;
}

/// Grants wishes from all rows of logits, of which those stay that are wished: see [`Engine::answer`].
fn answer_from(logits: &mut Vec<f32>, vocab: usize, wishes: &[Wish<'_>], tokens: &mut Vec<u32>) -> Result<(), Error> {
    tokens.clear();
    let mut kept = 0;
    for (i, wish) in wishes.iter().enumerate() {
        let row = i * vocab..(i + 1) * vocab;
        match wish {
            Wish::Token(Choice { sampling, draw }, mask) => {
                let is_forbidden = |token: usize| mask[token / 32] >> (token % 32) & 1 == 1;
                let token = sampling.choose(&logits[row], penalty(mask), is_forbidden, *draw);
                tokens.push(token.ok_or(Error::NotANumber)?);
            }
            Wish::Logits => {
                logits.copy_within(row, kept);
                kept += vocab;
            }
        }
    }
    logits.truncate(kept);
    Ok(())
}

/// The penalty of [`qp_codegen::reference::sampling`] by which the tokens of a mask are forbidden.
fn penalty(mask: &[u32]) -> f32 {
    if mask.is_empty() { 1.0 } else { 0.0 }
}

/// What every [`Engine::step`] checks first.
///
/// # Errors
/// See there.
pub fn check_chunks(engine: &dyn Engine, chunks: &[Chunk<'_>]) -> Result<(), Error> {
    for chunk in chunks {
        let end = chunk.position + chunk.tokens.len();
        check_tokens(chunk.tokens, chunk.position, engine.context(), engine.vocab())?;
        if chunk.pages.len() * PAGE < end {
            return Err(Error::Context { wanted: end, context: chunk.pages.len() * PAGE });
        }
        check_pages(engine, chunk.pages)?;
    }
    Ok(())
}

/// Checks that an engine has pages.
///
/// # Errors
/// If it has not.
pub fn check_pages(engine: &dyn Engine, pages: &[u32]) -> Result<(), Error> {
    match pages.iter().find(|&&p| p as usize >= engine.pages()) {
        Some(&page) => Err(Error::Page { page, pages: engine.pages() }),
        None => Ok(()),
    }
}

/// Cuts chunks into steps. Of the tokens that are left, whose number it is given, each step takes as many as `take` says,
/// of at most `sequences` chunks, and wants at most `rows` rows of logits.
pub fn cut<'a>(
    chunks: &[Chunk<'a>],
    take: &dyn Fn(usize) -> usize,
    rows: usize,
    sequences: usize,
) -> Vec<Vec<Chunk<'a>>> {
    let mut tokens_left: usize = chunks.iter().map(|c| c.tokens.len()).sum();
    let (mut steps, mut step) = (Vec::new(), Vec::new());
    let (mut room, mut rows_left) = (take(tokens_left), rows);
    for chunk in chunks {
        let mut left = *chunk;
        while !left.tokens.is_empty() {
            let mut n = room.min(left.tokens.len());
            match left.logits {
                Logits::None => (),
                Logits::All => n = n.min(rows_left),
                Logits::Last if rows_left == 0 => n = n.min(left.tokens.len() - 1),
                Logits::Last => (),
            }
            if n == 0 || step.len() == sequences {
                steps.push(std::mem::take(&mut step));
                (room, rows_left) = (take(tokens_left), rows);
                continue;
            }
            let (tokens, later) = left.tokens.split_at(n);
            let logits = match left.logits {
                Logits::Last if !later.is_empty() => Logits::None,
                other => other,
            };
            step.push(Chunk { tokens, logits, ..left });
            left = Chunk { tokens: later, position: left.position + n, ..left };
            (room, rows_left, tokens_left) = (room - n, rows_left - logits.rows(n), tokens_left - n);
        }
    }
    if !step.is_empty() {
        steps.push(step);
    }
    steps
}

/// Checks that `tokens` can follow `position` others.
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

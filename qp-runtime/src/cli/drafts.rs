//! What commands that write texts say of guesses.

use std::path::PathBuf;
use std::sync::Arc;

use super::Error;
use crate::device::Executor;
use crate::engine::{Drafts, Generated, Room, SharedWeights};
use crate::model::{Model, Tokenizer, Weights};

/// Guesses of a draft model at once, unless it is said how many.
const BY_MODEL: u32 = 4;

/// How tokens are guessed.
#[derive(Debug, clap::Args)]
pub(super) struct Drafting {
    /// Guess up to so many tokens at once and verify them together: sooner done where guesses are right, and the same text
    /// always. Guessed is what the text said before, or by --draft-model (then 4 by default). 0 guesses none.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(0..=63))]
    drafts: Option<u32>,
    /// A smaller model with the same tokens that guesses: a directory or GGUF file.
    #[arg(long, value_name = "MODEL")]
    draft_model: Option<PathBuf>,
}

/// How tokens are guessed, the draft model opened.
pub(super) struct Opened {
    most: usize,
    pub(super) model: Option<Arc<Weights>>,
}

impl Drafting {
    /// Opens the draft model, if there is one.
    ///
    /// # Errors
    /// If it cannot be opened, or has other tokens than the model whose tokenizer this is.
    pub(super) fn open(&self, tokenizer: &Tokenizer) -> Result<Opened, Error> {
        let most = self.drafts.unwrap_or(if self.draft_model.is_some() { BY_MODEL } else { 0 }) as usize;
        let Some(path) = self.draft_model.as_ref().filter(|_| most > 0) else {
            return Ok(Opened { most, model: None });
        };
        let Model { tokenizer: own, weights, .. } = super::model::open(path)?;
        tokenizer.same_tokens(&own).map_err(|e| {
            format!("{} cannot guess for this model: {e}; give a draft model of its family", path.display())
        })?;
        Ok(Opened { most, model: Some(Arc::new(weights)) })
    }
}

impl Opened {
    /// The room of the draft model beside that of a model.
    pub(super) fn room(weights: &Weights, room: Room) -> Room {
        Room { context: room.context.min(weights.program.context), ..room }
    }

    /// What guesses for a model that knows `vocab` tokens and has this room.
    ///
    /// # Errors
    /// If the draft model does not fit the device.
    pub(super) fn drafts(self, on: Option<&Executor>, vocab: usize, room: Room) -> Result<Option<Drafts>, Error> {
        Ok(match self.model {
            _ if self.most == 0 => None,
            None => Some(Drafts::look_up(self.most)),
            Some(weights) => {
                let engine = SharedWeights::on(on).open(&weights, Opened::room(&weights, room))?;
                Some(Drafts::of_model(engine, vocab, self.most))
            }
        })
    }
}

/// How many guesses were right, if there were any.
pub(super) fn said(done: &Generated) -> Option<String> {
    match done.drafted {
        (0, _) => None,
        (guessed, right) => Some(format!("guessed: {guessed} tokens, {right} of them right")),
    }
}

//! A model directory in Hugging Face's layout (`config.json`, safetensors, tokenizer), or a GGUF file read as one.
//!
//! * [`files`]: a directory's small files, or those that a GGUF file stands for.
//! * [`gguf`]: GGUF files.
//! * [`config`]: the keys of `config.json`, checked.
//! * [`arch`]: architectures: from a configuration to a program, one file each.
//! * [`program`]: what a model computes, without weights or a device; all else walks it.
//! * [`keys`]: the keys of a JSON file, taken by name and type.
//! * [`shards`]: which files hold the tensors.
//! * `packing`: experts that files stack in one tensor.
//! * [`stored`]: matrices that a model's files keep quantized.
//! * [`tensors`]: the tensors of mapped files.
//! * [`weights`]: the tensors put in their places, each linear layer dense or packed.
//! * [`rope`]: tables of rotary position embedding, shared by every engine.
//! * [`unused`]: tensors that nothing asks for are refused or named.
//! * [`tokenizer`]: text to tokens, and tokens to text as they come.

pub mod arch;
pub mod config;
pub mod error;
pub mod files;
pub mod gguf;
mod halves;
pub mod keys;
pub(crate) mod packing;
pub mod program;
pub mod rope;
pub mod shards;
pub mod stored;
pub mod tensors;
pub mod tokenizer;
pub mod unused;
pub mod weights;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::Config;
pub use error::Error;
pub use files::Files;
pub use program::{LayerId, Program};
pub use rope::{RopeTables, rope_tables};
pub use tensors::{Dtype, Tensor, TensorDir};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::{Linear, Source, Weight, Weights};

use crate::checkpoint::{Checkpoint, is_checkpoint};

/// An opened model.
#[derive(Debug)]
pub struct Model {
    /// The directory or file.
    pub dir: PathBuf,
    /// `config.json` and `generation_config.json`.
    pub config: Config,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// All tensors.
    pub weights: Weights,
    /// What the files say that is not used and changes nothing, or that was decided between contradictions: for the
    /// user.
    pub notes: Vec<String>,
}

impl Model {
    /// Opens `dir`: a directory, plain or a quantized checkpoint, or a GGUF file. Dense tensors are mapped, and their
    /// values looked at once.
    ///
    /// # Errors
    /// If a file is missing, malformed or truncated, the architecture is not supported, a tensor is missing, has
    /// another shape than the configuration says or values that are not finite, or something would not be used that
    /// changes the result.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !is_checkpoint(dir) {
            return Ok(Self::open_plain(dir)?.0);
        }
        // Before config.json is read: of a damaged one it says that it is damaged.
        let checkpoint = Checkpoint::open(dir)?;
        let files = Files::open(dir)?;
        let config = Config::of(&files)?;
        Ok(Self::of(dir, &files, config, &checkpoint)?.0)
    }

    /// As [`Model::open`], of what is not a quantized checkpoint; and its tensors, as far as they are used.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_plain(dir: &Path) -> Result<(Self, TensorDir), Error> {
        let files = Files::open(dir)?;
        // First what the model is: of another kind, all else would be beside the point. But where there are no tensors,
        // there is no model.
        let (config, tensors) = (Config::of(&files), TensorDir::of(&files));
        if let Err(none @ Error::NoWeights { .. }) = tensors {
            return Err(none);
        }
        let (config, mut tensors) = (config?, tensors?);
        if config.of_checkpoint {
            let what =
                "says that qp quantized the model, but there is no qp.json beside it: copy the whole checkpoint again";
            return Err(Error::file(&files.path("config.json"), what));
        }
        if config.of_parts {
            let others = tensors.keep_text();
            let what = format!("the text's part is read; {others} tensors of other parts are not");
            tensors.notes.push(format!("{}: {what}", dir.display()));
        }
        packing::unpack(&mut tensors, &config)?;
        if let Some(stored) = &config.stored {
            stored.join(&mut tensors, &arch::program(&config))?;
        }
        let (mut model, used) = Self::of(dir, &files, config, &tensors)?;
        model.notes.append(&mut tensors.notes);
        tensors.retain(|name| used.contains(name));
        Ok((model, tensors))
    }

    /// The model, and the names of the tensors that it uses.
    fn of(
        dir: &Path,
        files: &Files,
        mut config: Config,
        source: &(dyn Source + Sync),
    ) -> Result<(Self, BTreeSet<String>), Error> {
        let load = || {
            source.check()?;
            unused::untie(&mut config, source)?;
            let asked = unused::Asked::new(source);
            let weights = Weights::load(&Arc::new(arch::program(&config)), &asked)?;
            let asked = asked.names();
            let notes = unused::check(dir, &config, source, &asked)?;
            Ok::<_, Error>((weights, asked, notes))
        };
        // A large vocabulary takes as long as gigabytes of weights.
        let (loaded, tokenizer) = rayon::join(load, || Tokenizer::of(files));
        let ((weights, asked, unused), tokenizer) = (loaded?, tokenizer?);
        let mut notes = std::mem::take(&mut config.notes);
        notes.extend(unused);
        notes.extend(tokenizer.settle(&mut config));
        Ok((Model { dir: dir.to_owned(), config, tokenizer, weights, notes }, asked))
    }
}

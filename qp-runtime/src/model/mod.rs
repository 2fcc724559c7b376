//! A model directory in Hugging Face's layout (`config.json`, safetensors, tokenizer), or a GGUF file read as one.
//!
//! * [`files`]: a directory's small files, or those that a GGUF file stands for.
//! * [`gguf`]: GGUF files.
//! * [`config`]: the keys of `config.json`, checked.
//! * [`arch`]: architectures: from a configuration to a program, one file each.
//! * [`program`]: what a model computes, without weights or a device; all else walks it.
//! * [`tensors`]: the tensors of mapped files.
//! * [`weights`]: the tensors put in their places, each linear layer dense or packed.
//! * [`rope`]: tables of rotary position embedding, shared by every engine.
//! * [`tokenizer`]: text to tokens, and tokens to text as they come.

pub mod arch;
pub mod config;
pub mod error;
pub mod files;
pub mod gguf;
pub mod program;
pub mod rope;
pub mod tensors;
pub mod tokenizer;
pub mod weights;

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
    /// `tokenizer.json`.
    pub tokenizer: Tokenizer,
    /// All tensors.
    pub weights: Weights,
}

impl Model {
    /// Opens `dir`: a directory, plain or a quantized checkpoint, or a GGUF file. Dense tensors are mapped, not read.
    ///
    /// # Errors
    /// If a file is missing, malformed or truncated, the architecture is not supported, or a tensor is missing or
    /// has another shape than the configuration says.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Files::open(dir)?;
        // A checkpoint first: it says of a damaged config.json that it is damaged.
        let checkpoint = is_checkpoint(dir).then(|| Checkpoint::open(dir)).transpose()?;
        let tensors = if checkpoint.is_none() { Some(TensorDir::open(dir)?) } else { None };
        let config = Config::read(dir)?;
        let program = Arc::new(arch::program(&config));
        let load = || match (&checkpoint, &tensors) {
            (Some(checkpoint), _) => {
                checkpoint.check()?;
                Weights::load(&program, checkpoint)
            }
            (None, Some(tensors)) => Weights::load(&program, tensors),
            (None, None) => unreachable!("what is no checkpoint was opened as tensors"),
        };
        // A large vocabulary takes as long as gigabytes of weights.
        let (weights, tokenizer) = rayon::join(load, || Tokenizer::read(dir));
        Ok(Model { dir: dir.to_owned(), weights: weights?, tokenizer: tokenizer?, config })
    }
}

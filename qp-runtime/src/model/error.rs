//! What can be wrong with a model directory.

use std::path::{Path, PathBuf};

/// An error in a model directory. Each message names the file or tensor and, where there is one, the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model path is a file, and not of the kind that holds a model.
    #[error("{} is not a directory: give the directory that holds config.json and the safetensors files, or a .gguf file", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A file of the directory does not say what it should.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// No weights in the directory.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json{}", path.display(), hint)]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What to do, or nothing.
        hint: String,
    },
    /// The model is of a kind that no engine here computes.
    #[error("{}: {what} is not supported (supported: {supported})", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// The kind.
        what: String,
        /// What is supported in its place.
        supported: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("tensor '{name}' is missing from {}", path.display())]
    MissingTensor {
        /// Its name.
        name: String,
        /// The directory.
        path: PathBuf,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor '{name}' has shape {found:?}, but config.json makes it {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor has an element type that cannot be used.
    #[error("tensor '{name}' holds {found}: expected F32, F16 or BF16")]
    Dtype {
        /// Its name.
        name: String,
        /// Its element type.
        found: String,
    },
    /// A tensor holds what is not a number, or is infinite.
    #[error(
        "tensor '{name}' has {count} values that are not finite, the first ({value}) at {at:?}: \
         the model is damaged, get it again"
    )]
    NotFinite {
        /// Its name.
        name: String,
        /// How many there are.
        count: usize,
        /// The first one.
        value: f32,
        /// Its indices, from 0, outermost first.
        at: Vec<usize>,
    },
    /// A tensor of a format whose weights are finite, but not all that its products are computed with.
    #[error(
        "tensor '{name}' has scales beyond the largest number of single precision, with which no product can be computed; the file is \
         damaged: get it again"
    )]
    Scales {
        /// Its name.
        name: String,
    },
    /// A tensor that nothing would use, though it would change the result.
    #[error("{}: {what}", path.display())]
    Unused {
        /// The directory or file.
        path: PathBuf,
        /// Which tensors, and what to do.
        what: String,
    },
    /// A weight of a block that 16 bits cannot hold.
    #[error("tensor '{name}' holds {value}, too large for F16: the model is damaged, get it again")]
    TooLarge {
        /// The tensor.
        name: String,
        /// Its first weight that is too large.
        value: f32,
    },
    /// A quantized checkpoint is damaged.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The tokenizer refused a text.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
}

impl Error {
    /// `source` happened to `path`.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), source }
    }

    /// `what` is wrong with `path`.
    pub fn file(path: &Path, what: impl Into<String>) -> Self {
        Error::File { path: path.to_owned(), what: what.into() }
    }
}

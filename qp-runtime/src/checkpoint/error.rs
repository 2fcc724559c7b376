//! What can be wrong with a checkpoint: every message names the file, the tensor where there is one, and the cure.

use std::path::PathBuf;

use super::{FORMAT, MANIFEST};
use crate::import;

/// Advice for data that is not what was written.
const RESTORE: &str = "copy the checkpoint again from where it came, or run `qp quantize` again";

/// An error of reading or writing a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The disk (or quota) is full; what was there before is untouched.
    #[error(
        "{}: no space left on the device, {needed} bytes are needed here; \
         free some space and continue with --resume (the output was not touched)", path.display()
    )]
    Full {
        /// The file being written, or the folder.
        path: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
    },
    /// Not a checkpoint.
    #[error("{} is not a quantized checkpoint: it has no {MANIFEST}; `qp quantize` makes one of a model, `qp import` of a file that is quantized already", dir.display())]
    NoManifest {
        /// The directory.
        dir: PathBuf,
    },
    /// Written by a later version, or not a version at all.
    #[error("{}: format version {found}, but this program knows versions {FORMAT} and {} only; update qp, or quantize the model again with this one", path.display(), import::FORMAT)]
    Version {
        /// The manifest.
        path: PathBuf,
        /// The version it states.
        found: String,
    },
    /// The manifest cannot be understood.
    #[error("{}: damaged manifest: {message}; {RESTORE}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The manifest's own checksum does not match.
    #[error("{}: the manifest was changed after it was written (its checksum differs); {RESTORE}", path.display())]
    ManifestChanged {
        /// The manifest.
        path: PathBuf,
    },
    /// A file that the manifest lists is not there.
    #[error("{}: file is missing; {RESTORE}", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
    },
    /// A file is shorter or longer than it was.
    #[error("{}: has {found} bytes, but was written with {expected}{}; {RESTORE}", path.display(), if found < expected { " (truncated)" } else { "" })]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A file's checksum differs.
    #[error("{}: was changed after it was written (its checksum differs); {RESTORE}", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// A weight file's header is not what the manifest says.
    #[error("{}: damaged header: {message}; {RESTORE}", path.display())]
    Header {
        /// The weight file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A tensor's values cannot be used.
    #[error("{}: {message}", path.display())]
    Values {
        /// The weight file.
        path: PathBuf,
        /// What is wrong with which.
        message: String,
    },
    /// A tensor's checksum differs.
    #[error("{}: tensor `{tensor}` was changed after it was written (its checksum differs); {RESTORE}", path.display())]
    TensorChanged {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor that the model needs is not in the checkpoint.
    #[error("{}: there is no tensor `{tensor}`{}", dir.display(), hint.as_ref().map_or(String::new(), |h| format!("; {h}")))]
    NoTensor {
        /// The checkpoint.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// A near name, if there is one.
        hint: Option<String>,
    },
    /// A layer's tensors do not fit its spec and shape.
    #[error("{}: layer `{layer}`: {message}; {RESTORE}", dir.display())]
    Layer {
        /// The checkpoint.
        dir: PathBuf,
        /// The layer.
        layer: String,
        /// What is wrong.
        message: String,
    },
    /// A spec's text cannot be compiled.
    #[error("{}: {message}", path.display())]
    Spec {
        /// The spec's file.
        path: PathBuf,
        /// The diagnostics.
        message: String,
    },
    /// A spec's text means another quantizer than the one the weights were coded with.
    #[error("{}: the spec's content hash is {found}, but the weights were coded with {expected}; {RESTORE}", path.display())]
    SpecHash {
        /// The spec's file.
        path: PathBuf,
        /// Hash by the manifest.
        expected: String,
        /// Hash of the text.
        found: String,
    },
    /// The output is there already.
    #[error("{} exists already; choose another output, or replace it with --force", out.display())]
    Exists {
        /// The output.
        out: PathBuf,
    },
    /// The output is a link to nothing.
    #[error("{} is a link to nothing: remove it, make what it names, or choose another output", out.display())]
    Dangling {
        /// The output.
        out: PathBuf,
    },
    /// The output is there and is no checkpoint, so not even `--force` replaces it.
    #[error("{} exists and is not a quantized checkpoint: --force replaces checkpoints only; choose another output or remove it yourself", out.display())]
    Foreign {
        /// The output.
        out: PathBuf,
    },
    /// An unfinished run would be lost.
    #[error("{} holds an unfinished run ({done} layers done); continue it with --resume, or discard it with --force", draft.display())]
    Unfinished {
        /// The partial directory.
        draft: PathBuf,
        /// Layers and tensors that are finished.
        done: usize,
    },
    /// The unfinished run was for something else.
    #[error("cannot resume {}: {message}; run with what it was begun with, or delete it and begin anew", draft.display())]
    OtherRun {
        /// The partial directory.
        draft: PathBuf,
        /// What differs.
        message: String,
    },
    /// Another process works on it.
    #[error("{}: another qp process is writing it; wait for it or stop it", draft.display())]
    Busy {
        /// The partial directory.
        draft: PathBuf,
    },
}

impl Error {
    /// Wraps an I/O error: `action` is a verb, e.g. `read`.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { action, path, source }
    }
}

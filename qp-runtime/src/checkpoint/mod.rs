//! The checkpoint: a directory that explains itself.
//!
//! ```text
//! OUT/qp.json                       manifest: format version, model, plan carried out, checksum of everything
//! OUT/specs/NAME.qspec              canonical text of each quantizer in use
//! OUT/weights-00001.safetensors     NAME.packed (U32), NAME.scales (BF16); all other tensors unchanged
//! OUT/plan.toml                     the plan, naming every layer
//! OUT/config.json                   that of the model, which says too that `qp` quantized it
//! OUT/model.safetensors.index.json  which tensor lies where, for other programs
//! OUT/tokenizer.json …              copied from the model
//! ```
//!
//! The format is described in `docs/checkpoint.md`. One file a concern:
//!
//! * [`manifest`]: what `qp.json` holds.
//! * [`weights`]: the layout of the weight files, known before the first layer is coded.
//! * [`draft`]: writing: a partial directory with a journal beside the output, renamed when it is whole.
//! * [`reader`]: [`Checkpoint`]: opening, checking, access to layers.
//! * [`hugging`]: what lets other programs open a checkpoint, and a checkpoint be made of what they wrote.
//! * [`error`]: what can be wrong.

pub mod draft;
pub mod error;
pub mod hugging;
pub mod manifest;
pub mod reader;
pub mod weights;

use std::fmt::Write;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

pub use draft::{Begin, Draft, Head, check_output};
pub use error::Error;
pub use manifest::{CalibrationEntry, FileEntry, LayerEntry, Manifest, ModelId, SpecEntry, TensorEntry};
pub use reader::Checkpoint;

/// Version of the format that this program writes where all matrices are packed; [`crate::import::FORMAT`] is the other.
pub const FORMAT: u32 = 1;
/// Name of the manifest.
pub const MANIFEST: &str = "qp.json";

/// True if `dir` holds a quantized checkpoint (whole or damaged), not a plain model.
pub fn is_checkpoint(dir: &Path) -> bool {
    dir.join(MANIFEST).exists()
}

/// SHA-256 of `bytes`, hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// BLAKE3 of `bytes`, hexadecimal, computed by all cores.
pub fn blake3(bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update_rayon(bytes);
    hasher.finalize().to_hex().to_string()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Size and SHA-256 of a file.
pub fn hash_file(path: &Path) -> Result<(u64, String), Error> {
    let mut file = crate::input::open(path, false).map_err(Error::io("open", path))?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            return Ok((bytes, hex(&hash.finalize())));
        }
        bytes += n as u64;
        hash.update(&buffer[..n]);
    }
}

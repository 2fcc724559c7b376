//! The manifest `qp.json`: what a checkpoint holds, with a checksum of everything, itself included.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, FORMAT, sha256};
use crate::import::{self, SourceEntry};

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format: [`FORMAT`], or [`import::FORMAT`] with formats in it.
    pub format: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// The model that was quantized.
    pub model: ModelId,
    /// The texts that the rounding was fitted to, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationEntry>,
    /// The files that were imported, if it was not quantized here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceEntry>,
    /// The quantizers and formats in use, by name.
    pub specs: Vec<SpecEntry>,
    /// The quantized layers, in the model's order: the plan, carried out.
    pub layers: Vec<LayerEntry>,
    /// Fusion groups: names of layers that share a launch. Empty if the plan states none.
    pub groups: Vec<Vec<String>>,
    /// Every tensor of the weight files.
    pub tensors: Vec<TensorEntry>,
    /// Every file but this one, by name.
    pub files: Vec<FileEntry>,
}

/// Identity of a model: a hash over its configuration and weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelId {
    /// Hash, hexadecimal.
    pub sha256: String,
}

/// What a model was calibrated with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationEntry {
    /// `self` for texts that the model wrote, or `file`.
    pub texts: String,
    /// Tokens of all texts.
    pub tokens: usize,
    /// Hash of the tokens, hexadecimal.
    pub sha256: String,
}

/// A quantizer that the checkpoint carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecEntry {
    /// Name of the quantizer.
    pub name: String,
    /// File with its canonical text, relative to the checkpoint.
    pub file: String,
    /// Content hash of the quantizer, hexadecimal.
    pub hash: String,
}

/// A quantized layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Name without `.weight`.
    pub name: String,
    /// Name of its quantizer or format.
    pub spec: String,
    /// Of a format, the layout of its tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// Out features.
    pub rows: u32,
    /// In features.
    pub cols: u32,
    /// Σ (w − ŵ)² / Σ w² over the layer's weights, six digits; 0 for a layer of zeros.
    pub error: f64,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name in the weight file.
    pub name: String,
    /// The weight file, relative to the checkpoint.
    pub file: String,
    /// Element type, as safetensors writes it.
    pub dtype: safetensors::Dtype,
    /// Shape, in elements.
    pub shape: Vec<usize>,
    /// Hash of its bytes, hexadecimal.
    pub sha256: String,
    /// BLAKE3 of its bytes, hexadecimal, which all cores can compute together; absent where an older program wrote the
    /// checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path relative to the checkpoint.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Hash of its bytes, hexadecimal.
    pub sha256: String,
}

/// Versions that are read.
const KNOWN: [u64; 2] = [FORMAT as u64, import::FORMAT as u64];

/// What stands between the manifest's text and its checksum.
const SEAL: &str = ",\n  \"seal\": \"";

impl Manifest {
    /// The text of `qp.json`. Its last member, `seal`, is the hash of all text before it.
    pub fn to_text(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("strings and numbers");
        let body = json.strip_suffix("\n}").expect("an object of several lines");
        format!("{body}{SEAL}{}\"\n}}\n", sha256(body.as_bytes()))
    }

    /// Reads the text of the manifest at `path` (named in errors).
    pub fn from_text(path: &Path, text: &str) -> Result<Manifest, Error> {
        let damaged = |message: String| Error::Manifest { path: path.to_owned(), message };
        let json: serde_json::Value = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        // The version comes first: a later one may seal and name things differently.
        match json.get("format") {
            Some(v) if v.as_u64().is_some_and(|v| KNOWN.contains(&v)) => (),
            Some(v) => return Err(Error::Version { path: path.to_owned(), found: v.to_string() }),
            None => return Err(damaged("it states no format version".to_owned())),
        }
        let (body, seal) = text.rsplit_once(SEAL).ok_or_else(|| damaged("it has no seal".to_owned()))?;
        if seal != format!("{}\"\n}}\n", sha256(body.as_bytes())) {
            return Err(Error::ManifestChanged { path: path.to_owned() });
        }
        serde_json::from_value(json).map_err(|e| damaged(e.to_string()))
    }
}

/// Rounds to six significant digits, so that the decimal text reads back as the same number.
pub fn six_digits(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

//! Times of kernels, as `qp profile` writes and `qp plan` reads them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::problem::{Core, Layer};

/// Version of the file format.
pub const FORMAT: u32 = 1;

/// In place of a quantizer: the layer is left as it is.
pub const KEEP: &str = "keep";

/// Where times come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Measured on the device.
    Measured,
    /// Predicted from what is known about the device.
    Predicted,
}

/// Time of one kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// What it multiplies, in the order of a block: `["q", "k"]`, `["lm_head"]`.
    pub layers: Vec<String>,
    /// Rows of all of them.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// The quantizer.
    pub quantizer: String,
    /// Tensor or CUDA cores.
    pub core: Core,
    /// Time of a launch.
    pub seconds: f64,
}

/// A latency profile: every kernel that a plan could use, and the rest of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Version of the format.
    pub format: u32,
    /// The device.
    pub device: String,
    /// Where the times come from.
    pub origin: Origin,
    /// The model whose shapes these are.
    pub model: String,
    /// Time of a decode step without the kernels.
    pub rest_seconds: f64,
    /// The kernels.
    pub kernels: Vec<Kernel>,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not of this kind.
    #[error("{path} is not a latency profile of this version: {why}; make it anew with `qp profile`")]
    Format {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
}

impl Profile {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is of another version or has times that are not positive.
    pub fn read(path: &Path) -> Result<Profile, Error> {
        let shown = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: shown(), source })?;
        let bad = |why: String| Error::Format { path: shown(), why };
        let p: Profile = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if p.format != FORMAT {
            return Err(bad(format!("its format is {}, not {FORMAT}", p.format)));
        }
        // A step of more than an hour is a mistake, and femtoseconds of it would not fit.
        let sound = |s: f64| (0.0..3600.0).contains(&s);
        if !sound(p.rest_seconds) {
            return Err(bad(format!("`rest_seconds` is {}", p.rest_seconds)));
        }
        if let Some(k) = p.kernels.iter().find(|k| !sound(k.seconds) || k.seconds == 0.0) {
            return Err(bad(format!("the time of {} under {} is {} s", k.layers.join("+"), k.quantizer, k.seconds)));
        }
        Ok(p)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.display().to_string(), source };
        let text = serde_json::to_string_pretty(self).map_err(|e| io(e.into()))?;
        qp_codegen::output::write(path, (text + "\n").as_bytes()).map_err(io)
    }

    /// Time of the layers that stand alone (the output layer), left as they are.
    pub fn kept_seconds(&self) -> f64 {
        self.kernels.iter().filter(|k| k.quantizer == KEEP).map(|k| k.seconds).sum()
    }

    /// Times by kernel, quickly found.
    pub fn table(&self) -> Times {
        let key = |k: &Kernel| (k.layers.join("+"), k.rows, k.cols, k.quantizer.clone(), k.core);
        Times { by_kernel: self.kernels.iter().map(|k| (key(k), femtoseconds(k.seconds))).collect() }
    }
}

/// Seconds as femtoseconds, rounded up, so that a plan never takes longer than it says.
pub fn femtoseconds(seconds: f64) -> i64 {
    (seconds * 1e15).ceil() as i64
}

/// Times of a profile, in femtoseconds.
#[derive(Clone, Debug)]
pub struct Times {
    by_kernel: BTreeMap<(String, u32, u32, String, Core), i64>,
}

impl Times {
    /// Time of one launch for `layers`, if there is such a kernel.
    pub fn get(&self, layers: &[&Layer], quantizer: &str, core: Core) -> Option<i64> {
        let names: Vec<&str> = layers.iter().map(|l| l.short()).collect();
        let rows = layers.iter().map(|l| l.shape.rows).sum();
        let cols = layers.first()?.shape.cols;
        self.by_kernel.get(&(names.join("+"), rows, cols, quantizer.to_owned(), core)).copied()
    }
}

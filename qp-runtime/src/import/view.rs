//! A file of tensors: its header, and where tensors lie.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Error;
use crate::input;
use crate::model::{self, gguf};

/// Most bytes of a safetensors header.
const HEADER: u64 = 100 << 20;

/// A file of tensors.
pub struct View {
    /// The file.
    pub path: PathBuf,
    /// All bytes before the data.
    pub header: Vec<u8>,
    /// Where tensors lie in the file.
    pub ranges: BTreeMap<String, Range<usize>>,
}

#[derive(Deserialize)]
struct Place {
    data_offsets: [usize; 2],
}

impl View {
    /// A part of a GGUF model.
    pub fn of_gguf(part: &gguf::Part) -> Result<View, Error> {
        Ok(View { path: part.path.clone(), header: part.header().to_vec(), ranges: part.ranges.clone() })
    }

    /// A safetensors file, or its header alone.
    ///
    /// # Errors
    /// If it cannot be read or its header is damaged.
    pub fn of_safetensors(path: &Path) -> Result<View, Error> {
        let mut file = input::open(path, false).map_err(|e| model::Error::io(path, e))?;
        let mut header = vec![0; 8];
        let damaged = |why: &str| Error::refused(path, format!("is no whole safetensors file: {why}"));
        file.read_exact(&mut header).map_err(|_| damaged("it ends within its header"))?;
        let length = u64::from_le_bytes(header[..8].try_into().expect("8 bytes"));
        if length > HEADER {
            return Err(damaged("its header is too long"));
        }
        let found = file.take(length).read_to_end(&mut header).map_err(|e| model::Error::io(path, e))?;
        if found as u64 != length {
            return Err(damaged("it ends within its header"));
        }
        let names: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&header[8..]).map_err(|e| damaged(&e.to_string()))?;
        let mut ranges = BTreeMap::new();
        for (name, value) in names.into_iter().filter(|(name, _)| name != "__metadata__") {
            let place: Place = serde_json::from_value(value).map_err(|e| damaged(&e.to_string()))?;
            let [from, to] = place.data_offsets.map(|n| n.saturating_add(header.len()));
            if from > to {
                return Err(damaged("a tensor ends before it begins"));
            }
            ranges.insert(name, from..to);
        }
        Ok(View { path: path.to_owned(), header, ranges })
    }
}

//! Foreign checkpoints taken as they are, and given back.
//!
//! [`import`] makes a checkpoint of a GGUF file, or of a model whose `config.json` says how it is quantized (see
//! [`crate::model::stored`]): no weight is encoded again. A matrix of a format keeps
//! the bytes of its tensors under the names `LAYER.TENSOR`, `TENSOR` as the format's layout calls it; the format's text, layouts included,
//! lies in `specs/`. What else the file holds is kept too: the header with all of its keys, and tensors that no engine
//! reads. So [`export`] writes the same file again, byte for byte, and checks that with the SHA-256 that was taken then.
//! [`write_out`] writes the weights of any checkpoint as floats, [`to_gguf`] a GGUF file of one that GGUF has types for.

mod export;
mod plain;
mod to_gguf;
mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use export::export;
pub use plain::{Float, write_out};
pub use to_gguf::to_gguf;
use view::View;

use crate::checkpoint::weights::{Planned, SHARD_BYTES};
use crate::checkpoint::{self, Begin, Draft, Head, LayerEntry, Manifest, ModelId, SpecEntry, is_checkpoint};
use crate::model::tensors::{Bytes, Kind};
use crate::model::{self, Files, Model, shards};
use crate::quantize::COPIED;

/// Version of the checkpoint's format with formats in it.
pub const FORMAT: u32 = 2;
/// Folder of what a file holds beside tensors that engines read.
const FOLDER: &str = "source";

/// Where an imported checkpoint came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEntry {
    /// Kind of files: `gguf` or `safetensors`.
    pub kind: String,
    /// The files, in order.
    pub files: Vec<SourceFile>,
}

/// A file that was imported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its name.
    pub name: String,
    /// The file of the checkpoint that holds its header.
    pub header: String,
    /// Its bytes.
    pub bytes: u64,
    /// Its hash, hexadecimal.
    pub sha256: String,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// What was given is nothing that can be imported.
    #[error("{}: {why}", path.display())]
    Refused {
        /// What was given.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    fn refused(path: &Path, why: impl Into<String>) -> Self {
        Error::Refused { path: path.to_owned(), why: why.into() }
    }
}

/// Refuses to write beside a checkpoint's files, which would be replaced or no longer be those of its manifest.
fn no_checkpoint(out: &Path) -> Result<(), Error> {
    if out.join(checkpoint::MANIFEST).exists() {
        return Err(Error::refused(out, "is a checkpoint, which is not written into; choose another output"));
    }
    Ok(())
}

/// Is told the name of each tensor when it is written, how many are done, and how many there are.
pub type Progress<'a> = dyn FnMut(&str, usize, usize) + 'a;

/// Makes the checkpoint `out` of `model`, a GGUF file or a directory.
///
/// # Errors
/// If the file is damaged or not supported, has parts that the layout of GGUF does not explain, or `out` cannot be
/// written.
pub fn import(model: &Path, out: &Path, begin: Begin, progress: &mut Progress<'_>) -> Result<Manifest, Error> {
    if is_checkpoint(model) {
        return Err(Error::refused(model, "is a checkpoint of qp already"));
    }
    checkpoint::check_output(out, begin.force)?;
    let files = Files::open(model)?;
    // All that opening finds wrong is found before anything is written.
    let (opened, mut joined) = Model::open_plain(model)?;
    let (kind, source, views) = match &files {
        Files::Gguf(gguf) => {
            let views = gguf.parts().iter().map(View::of_gguf).collect::<Result<Vec<_>, _>>()?;
            ("gguf", gguf.tensors()?, views)
        }
        Files::Dir(dir) => {
            if joined.keep_packed() == 0 && opened.config.stored.is_none() {
                let why = "is not quantized: GGUF files are imported, and models whose config.json says how; use `qp quantize`";
                return Err(Error::refused(model, why));
            }
            let views =
                shards::find(dir)?.paths.iter().map(|p| View::of_safetensors(p)).collect::<Result<Vec<_>, _>>()?;
            ("safetensors", joined, views)
        }
    };
    let sources = views.iter().map(inspect).collect::<Result<Vec<_>, _>>()?;

    let mut items: Vec<(String, Vec<Planned>)> = Vec::new();
    let mut layers = Vec::new();
    let mut specs: BTreeMap<String, (String, String)> = BTreeMap::new();
    for name in source.names() {
        let (kind, pieces) = source.stored(name)?;
        if let Kind::Format(reader) = kind {
            let layer = name
                .strip_suffix(".weight")
                .ok_or_else(|| Error::refused(model, format!("tensor '{name}' has blocks, but is no matrix")))?;
            let format = reader.format();
            specs.entry(format.name.clone()).or_insert_with(|| (format.canonical(), format.hash()));
            layers.push(LayerEntry {
                name: layer.to_owned(),
                spec: format.name.clone(),
                layout: Some(reader.layout().to_owned()),
                rows: reader.shape().rows,
                cols: reader.shape().cols,
                error: 0.0,
            });
        }
        let planned = pieces.into_iter().map(|p| Planned { name: p.name, dtype: p.dtype, shape: p.shape });
        items.push((name.to_owned(), planned.collect()));
    }
    let sums: Vec<&str> = sources.iter().map(|s| s.sha256.as_str()).collect();
    let id = checkpoint::sha256(sums.join("\n").as_bytes());
    let plan = layers.iter().map(|l| (l.name.clone(), format!("{} {}", l.spec, specs[&l.spec].1))).collect();
    let mut head = Head::new(id.clone(), SHARD_BYTES, plan, Vec::new());
    head.format = FORMAT;
    let total = items.len();
    let mut draft = Draft::begin(out, &head, items, begin)?;
    for (i, name) in source.names().enumerate() {
        progress(name, i, total);
        if draft.record(name).is_none() {
            let (_, pieces) = source.stored(name)?;
            let bytes: Vec<&[u8]> = pieces.iter().map(|p| p.bytes.as_slice()).collect();
            draft.put(name, &bytes, None)?;
        }
    }
    let left_out = match &files {
        Files::Gguf(gguf) => gguf.left_out(),
        Files::Dir(_) => source.left_out.iter().map(|p| (p.name.clone(), p.bytes.clone())).collect(),
    };
    let files = put_files(&mut draft, &files, &views, &sources, &left_out)?;
    let specs = put_specs(&mut draft, specs)?;
    let (tool, calibration, tensors) = (head.tool, None, Vec::new());
    let source = Some(SourceEntry { kind: kind.to_owned(), files });
    let manifest = Manifest {
        format: FORMAT,
        tool,
        model: ModelId { sha256: id },
        calibration,
        source,
        specs,
        layers,
        groups: Vec::new(),
        tensors,
        files: Vec::new(),
    };
    Ok(draft.finish(manifest)?)
}

fn put_specs(draft: &mut Draft, specs: BTreeMap<String, (String, String)>) -> Result<Vec<SpecEntry>, Error> {
    let mut entries = Vec::new();
    for (name, (text, hash)) in specs {
        let file = format!("specs/{name}.qspec");
        draft.put_file(&file, text.as_bytes())?;
        entries.push(SpecEntry { name, file, hash });
    }
    Ok(entries)
}

/// Writes the small files: those of the model, the headers, and the tensors that no engine reads.
fn put_files(
    draft: &mut Draft,
    files: &Files,
    views: &[View],
    sources: &[Inspected],
    left_out: &[(String, Bytes)],
) -> Result<Vec<SourceFile>, Error> {
    for name in COPIED {
        if let Some(bytes) = files.read(name)? {
            draft.put_file(name, &bytes)?;
        }
    }
    let folder = draft.dir().join(FOLDER);
    std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder, source })?;
    let mut out = Vec::new();
    for (part, found) in views.iter().zip(sources) {
        let name = part.path.file_name().and_then(|n| n.to_str()).unwrap_or("model.gguf").to_owned();
        let header = format!("{FOLDER}/{name}.header");
        draft.put_file(&header, &part.header)?;
        out.push(SourceFile { name, header, bytes: found.bytes, sha256: found.sha256.clone() });
    }
    for (name, bytes) in left_out {
        draft.put_file(&left_out_file(name), bytes.as_slice())?;
    }
    Ok(out)
}

/// The file of a tensor that no engine reads.
fn left_out_file(name: &str) -> String {
    format!("{FOLDER}/{name}.tensor")
}

/// Size and hash of a file.
struct Inspected {
    bytes: u64,
    sha256: String,
}

/// Makes sure that a file is its header, its tensors, and zeros between them.
fn inspect(part: &View) -> Result<Inspected, Error> {
    let file = crate::input::open(&part.path, false).map_err(|e| model::Error::io(&part.path, e))?;
    // SAFETY: the map is read-only; the documentation asks that the file stay unchanged.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| model::Error::io(&part.path, e))?;
    let all = &map[..];
    let mut at = part.header.len();
    let mut ranges = part.ranges.values().cloned().collect::<Vec<_>>();
    ranges.sort_by_key(|r| r.start);
    for range in ranges.into_iter().chain(std::iter::once(all.len()..all.len())) {
        let gap = all.get(at..range.start);
        if !gap.is_some_and(|gap| gap.iter().all(|b| *b == 0)) {
            let why = format!("bytes {at} to {} are of no tensor, or of two: it could not be given back", range.start);
            return Err(Error::refused(&part.path, why));
        }
        at = range.end;
    }
    let sha256 = checkpoint::hex(&Sha256::digest(all));
    Ok(Inspected { bytes: all.len() as u64, sha256 })
}

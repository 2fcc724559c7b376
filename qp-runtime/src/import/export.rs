//! Writing the files again that a checkpoint was imported from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Component, Path, PathBuf};

use qp_codegen::output::Whole;
use sha2::{Digest, Sha256};

use super::view::View;
use super::{Error, Progress, SourceFile, left_out_file, no_checkpoint, to_gguf};
use crate::checkpoint::{self, Checkpoint};
use crate::model::gguf::{Gguf, Kept};
use crate::model::tensors::interleaved;
use crate::model::{packing::STACKED, stored};

/// A writer that counts and hashes.
struct Hashing<W> {
    to: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    /// Writes zeros up to byte `end`.
    fn zeros(&mut self, end: u64) -> io::Result<()> {
        let zeros = [0; 4096];
        while self.bytes < end {
            let n = (end - self.bytes).min(zeros.len() as u64);
            self.put(&zeros[..n as usize])?;
        }
        Ok(())
    }
}

/// Whether `out` names a GGUF file, and not a folder.
fn is_file(out: &Path) -> bool {
    out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// Refuses a file where a folder is meant (`file` is false), and the reverse.
pub(super) fn check_kind(out: &Path, file: bool) -> Result<(), Error> {
    match out.metadata() {
        Ok(meta) if file && meta.is_dir() => {
            Err(Error::refused(out, "is a folder: name the file in it, as in FOLDER/model.gguf"))
        }
        Ok(meta) if !file && !meta.is_dir() => Err(Error::refused(out, "is a file: give the folder to write to")),
        _ if !file && is_file(out) => {
            Err(Error::refused(out, "is called like a GGUF file, but a folder is written here: call it otherwise"))
        }
        _ => Ok(()),
    }
}

/// Writes the files that the checkpoint `dir` was imported from into the folder `out`. Returns their paths. If `out` ends in
/// `.gguf`, it is the file that is written: the one that was imported, or, of another checkpoint, one that is made.
///
/// # Errors
/// If the checkpoint was neither imported nor can be said in a GGUF file, or is damaged, a file exists and `force` is not given, or cannot be written; or if
/// what was written has not the hash of the file that was imported. What is written is removed then.
pub fn export(dir: &Path, out: &Path, force: bool, progress: &mut Progress<'_>) -> Result<Vec<PathBuf>, Error> {
    no_checkpoint(out)?;
    let file = is_file(out);
    check_kind(out, file)?;
    let checkpoint = Checkpoint::open(dir)?;
    let source = checkpoint.manifest().source.clone();
    let source = match source {
        Some(source) if !file || source.kind == "gguf" => source,
        _ if file => return Ok(vec![to_gguf(dir, out, force, progress)?]),
        _ => {
            let why = "was not imported: there are no files to give back; `-o FILE.gguf` writes a GGUF file, if GGUF has \
                       types for all its layers, and --dequantized writes its weights as floats";
            return Err(Error::refused(dir, why));
        }
    };
    if !["gguf", "safetensors"].contains(&source.kind.as_str()) {
        return Err(Error::refused(
            dir,
            format!("was imported from {}, which this program does not write", source.kind),
        ));
    }
    if file && source.files.len() != 1 {
        let why = format!("was imported from {} files: give a folder to write them to", source.files.len());
        return Err(Error::refused(dir, why));
    }
    let headers = source.files.iter().map(|f| own(&checkpoint, &f.header)).collect::<Result<Vec<_>, _>>()?;
    let (gguf, views) = if source.kind == "gguf" {
        let gguf = Gguf::of_headers(headers.into_iter())?;
        let views = gguf.parts().iter().map(View::of_gguf).collect::<Result<Vec<_>, _>>()?;
        (Some(gguf), views)
    } else {
        (None, headers.iter().map(|p| View::of_safetensors(p)).collect::<Result<Vec<_>, _>>()?)
    };
    let layers = checkpoint.manifest().layers.iter();
    let renamed = layers.flat_map(|l| stored::renamed(&l.name, &l.spec, l.layout.as_deref())).collect();
    let mut paths = Vec::new();
    for (view, file) in views.iter().zip(&source.files) {
        let path = if is_file(out) { out.to_owned() } else { out.join(plain_name(dir, &file.name)?) };
        if path.exists() && !force {
            return Err(Error::refused(&path, "exists; --force replaces it"));
        }
        let failed = |source| Error::Write { path: path.clone(), source };
        let mut whole = Whole::create(&path).map_err(failed)?;
        one((&checkpoint, &renamed), gguf.as_ref(), view, file, (&path, whole.file()), progress)?;
        whole.keep().map_err(failed)?;
        paths.push(path);
    }
    Ok(paths)
}

/// The path of a file that the checkpoint is made of, so that no other is opened, whatever its manifest says.
fn own(checkpoint: &Checkpoint, name: &str) -> Result<PathBuf, Error> {
    if checkpoint.manifest().files.iter().any(|f| f.name == name) {
        return Ok(checkpoint.dir().join(name));
    }
    Err(Error::refused(checkpoint.dir(), format!("has no file '{name}', which its manifest speaks of")))
}

/// The name of a file in a folder, so that none is written elsewhere, whatever a manifest says.
fn plain_name<'a>(dir: &Path, name: &'a str) -> Result<&'a str, Error> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name && !name.contains(char::is_control) => Ok(name),
        _ => Err(Error::refused(
            dir,
            format!("was made of a file called {name:?}, which is no name of a file in a folder"),
        )),
    }
}

/// The bytes of a file's tensor in which the experts of several layers are stacked, rows of two layers by turns.
fn stacked(checkpoint: &Checkpoint, name: &str) -> Result<Option<Vec<u8>>, Error> {
    for (all, parts) in STACKED {
        let Some((before, kind)) = name.split_once(&format!(".experts.{all}_")) else { continue };
        let layer = |expert: usize, part: &str| format!("{before}.experts.{expert}.{part}");
        let mut out = Vec::new();
        for expert in 0.. {
            let Some(rows) = checkpoint.layer(&layer(expert, parts[0])).map(|l| l.rows as usize) else { break };
            let pieces = parts.iter().map(|part| checkpoint.bytes(&format!("{}.{kind}", layer(expert, part))));
            let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
            for row in 0..rows {
                for piece in pieces.iter().map(|p| p.as_slice()) {
                    let width = piece.len() / rows;
                    out.extend_from_slice(&piece[row * width..(row + 1) * width]);
                }
            }
        }
        return Ok((!out.is_empty()).then_some(out));
    }
    Ok(None)
}

/// Writes the file `part`, which is to become `path`, of a checkpoint with the names of tensors that files call otherwise.
fn one(
    (checkpoint, renamed): (&Checkpoint, &BTreeMap<String, String>),
    gguf: Option<&Gguf>,
    part: &View,
    file: &SourceFile,
    (path, to): (&Path, &mut File),
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let to = BufWriter::with_capacity(1 << 20, to);
    let mut to = Hashing { to, hash: Sha256::new(), bytes: 0 };
    to.put(&part.header).map_err(failed)?;
    let mut tensors: Vec<_> = part.ranges.iter().collect();
    tensors.sort_by_key(|t| t.1.start);
    let total = tensors.len();
    for (i, (name, range)) in tensors.into_iter().enumerate() {
        progress(name, i, total);
        to.zeros(range.start as u64).map_err(failed)?;
        let as_it_is = || Kept { names: vec![name.clone()], rows: 1, heads: None };
        let kept = match gguf {
            Some(gguf) => gguf.kept_as(name)?,
            None => match renamed.get(name) {
                Some(ours) => Some(Kept { names: vec![ours.clone()], ..as_it_is() }),
                None => checkpoint.contains(name).then(as_it_is),
            },
        };
        let bytes = match kept {
            Some(kept) => {
                let mut bytes = Vec::with_capacity(range.len());
                for name in &kept.names {
                    bytes.extend_from_slice(checkpoint.bytes(name)?.as_slice());
                }
                match kept.heads {
                    Some(heads) => interleaved(&bytes, kept.rows, heads),
                    None => bytes,
                }
            }
            None => match stacked(checkpoint, name)? {
                Some(bytes) => bytes,
                None => {
                    let path = own(checkpoint, &left_out_file(name))?;
                    std::fs::read(&path).map_err(checkpoint::Error::io("read", &path))?
                }
            },
        };
        if bytes.len() != range.len() {
            return Err(Error::refused(checkpoint.dir(), format!("tensor '{name}' has not the bytes that it had")));
        }
        to.put(&bytes).map_err(failed)?;
    }
    to.zeros(file.bytes).map_err(failed)?;
    to.to.flush().map_err(failed)?;
    let found = checkpoint::hex(&to.hash.finalize());
    if (to.bytes, &found) != (file.bytes, &file.sha256) {
        let why = format!("{} would have the SHA-256 {found}, but was imported with {}", file.name, file.sha256);
        return Err(Error::refused(checkpoint.dir(), why));
    }
    Ok(())
}

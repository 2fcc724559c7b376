//! Writing a checkpoint: everything goes into `OUT.partial-KEY` beside the output, and is renamed when it is whole.
//!
//! The weight files are laid out at the start (see [`super::weights`]) and filled item by item; an item is a layer's
//! tensors or one unquantized tensor. When an item's bytes are on the disk, one line with their checksums is
//! appended to `journal`. So at any moment the process may be killed: [`Begin::Resume`] keeps the items whose line
//! is whole and whose bytes have the stated checksums, and only the others are written again. KEY is a hash of
//! [`Head`], all that the bytes depend on.
//!
//! The journal stays locked while a process writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::reader::inside;
use super::weights::{Planned, Shard, layout};
use super::{
    CalibrationEntry, Error, FORMAT, FileEntry, MANIFEST, Manifest, TensorEntry, blake3, hash_file, hugging,
    is_checkpoint, sha256,
};
use crate::input;

/// Name of the journal in a partial directory.
const JOURNAL: &str = "journal";
/// Bytes written at once.
const CHUNK: usize = 64 << 20;

/// All that the bytes of a checkpoint depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Format version.
    pub format: u32,
    /// Program and version.
    pub tool: String,
    /// Identity of the model.
    pub model: String,
    /// Largest weight file in bytes.
    pub shard_bytes: u64,
    /// (layer, name and hash of its quantizer), in the model's order.
    pub plan: Vec<(String, String)>,
    /// Fusion groups.
    pub groups: Vec<Vec<String>>,
    /// What the rounding is fitted to, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationEntry>,
}

impl Head {
    /// The head of a run of this program.
    pub fn new(model: String, shard_bytes: u64, plan: Vec<(String, String)>, groups: Vec<Vec<String>>) -> Self {
        let tool = format!("qp {}", env!("CARGO_PKG_VERSION"));
        Head { format: FORMAT, tool, model, shard_bytes, plan, groups, calibration: None }
    }

    fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers")
    }

    /// What differs in `old`, the head of an unfinished run.
    fn difference(&self, old: &Head) -> String {
        if old.model != self.model {
            return "it was begun with another model (or the model's files have changed)".to_owned();
        }
        if (old.format, &old.tool) != (self.format, &self.tool) {
            return format!(
                "it was begun by {} (format {}), this is {} (format {})",
                old.tool, old.format, self.tool, self.format
            );
        }
        if old.calibration != self.calibration {
            let shown = |c: &Option<CalibrationEntry>| match c {
                None => "without calibration".to_owned(),
                Some(c) => format!(
                    "calibrated with {} tokens of {} ({})",
                    c.tokens,
                    c.texts,
                    &c.sha256[..c.sha256.len().min(8)]
                ),
            };
            return format!("it was begun {}, this is {}", shown(&old.calibration), shown(&self.calibration));
        }
        let (a, b): (BTreeMap<_, _>, BTreeMap<_, _>) =
            (old.plan.iter().cloned().collect(), self.plan.iter().cloned().collect());
        let changed = a.keys().chain(b.keys()).find(|k| a.get(*k) != b.get(*k));
        match changed {
            Some(layer) => {
                let name = |m: &BTreeMap<String, String>| {
                    m.get(layer).map_or("not quantized".to_owned(), |s| {
                        let (name, hash) = s.split_once(' ').unwrap_or((s, ""));
                        format!("{name} ({})", hash.get(..8).unwrap_or(hash))
                    })
                };
                format!("it was begun with another plan: `{layer}` was {}, now it is {}", name(&a), name(&b))
            }
            None => "it was begun with other fusion groups or file sizes".to_owned(),
        }
    }
}

/// What to do about an unfinished run or an existing output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begin {
    /// Continue an unfinished run, if there is one.
    pub resume: bool,
    /// Replace an existing checkpoint at the end; without `resume`, discard an unfinished run.
    pub force: bool,
}

/// A finished item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the layer or tensor.
    pub item: String,
    /// Relative error of a quantized layer.
    pub error: Option<f64>,
    /// Checksums of its tensors, in the order of the layout.
    pub sha256: Vec<String>,
}

/// A checkpoint being written.
#[derive(Debug)]
pub struct Draft {
    out: PathBuf,
    dir: PathBuf,
    force: bool,
    journal: File,
    shards: Vec<Shard>,
    files: Vec<File>,
    items: Vec<(String, Vec<Planned>)>,
    /// Shard and offset of each tensor.
    places: BTreeMap<String, (usize, u64)>,
    done: BTreeMap<String, Record>,
    small: Vec<String>,
    /// Bytes of all weight files.
    bytes: u64,
}

impl Draft {
    /// Begins or continues the checkpoint `out` of `items` (name and tensors of each).
    ///
    /// # Errors
    /// If the output exists (see [`Begin`]), an unfinished run is in the way or is of something else, another process
    /// writes it, or the disk cannot hold it.
    pub fn begin(out: &Path, head: &Head, items: Vec<(String, Vec<Planned>)>, how: Begin) -> Result<Draft, Error> {
        check_output(out, how.force)?;
        // The directory that a link names is what is replaced.
        let given = out;
        let out = if out.is_symlink() { fs::canonicalize(out) } else { std::path::absolute(out) };
        let out = out.map_err(Error::io("find", given))?;
        let parent = out.parent().unwrap_or(&out).to_owned();
        fs::create_dir_all(&parent).map_err(Error::io("create", &parent))?;
        let json = head.to_json();
        let dir = partial(&out, &sha256(json.as_bytes())[..12]);
        if how.resume
            && !dir.exists()
            && let Some(other) = unfinished(&out)?.into_iter().next()
        {
            let message = match read_head(&other) {
                Some(old) => head.difference(&old),
                None => "its journal has no readable beginning".to_owned(),
            };
            return Err(Error::OtherRun { draft: other, message });
        }
        fs::create_dir_all(dir.join("specs")).map_err(Error::io("create", &dir))?;
        let journal_path = dir.join(JOURNAL);
        let mut journal = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&journal_path)
            .map_err(Error::io("open", &journal_path))?;
        if fs4::FileExt::try_lock(&journal).is_err() {
            return Err(Error::Busy { draft: dir });
        }
        let mut records = Vec::new();
        let mut valid = 0;
        let text = fs::read(&journal_path).map_err(Error::io("read", &journal_path))?;
        let mut lines = whole_lines(&text);
        if let Some((_, end)) = lines.next().filter(|(line, _)| *line == json) {
            valid = end;
            for (line, end) in lines {
                let Ok(record) = serde_json::from_str::<Record>(line) else { break };
                records.push(record);
                valid = end;
            }
        }
        if !records.is_empty() && !how.resume {
            if !how.force {
                return Err(Error::Unfinished { draft: dir, done: records.len() });
            }
            records.clear();
            valid = 0;
        }
        journal.set_len(valid as u64).map_err(Error::io("write", &journal_path))?;
        journal.seek(SeekFrom::End(0)).map_err(Error::io("write", &journal_path))?;

        let shards = layout(&items.iter().map(|i| i.1.clone()).collect::<Vec<_>>(), head.shard_bytes);
        let bytes = shards.iter().map(|s| s.bytes).sum();
        let mut draft = Draft {
            out,
            dir,
            force: how.force,
            journal,
            shards,
            files: Vec::new(),
            items,
            places: BTreeMap::new(),
            done: BTreeMap::new(),
            small: Vec::new(),
            bytes,
        };
        draft.open_files()?;
        draft.keep_verified(records)?;
        draft.check_space()?;
        if valid == 0 {
            draft.log(&json)?;
        }
        Ok(draft)
    }

    /// Creates the weight files with their headers, or opens what is there.
    fn open_files(&mut self) -> Result<(), Error> {
        for i in 0..self.shards.len() {
            let path = self.dir.join(&self.shards[i].file);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(Error::io("create", &path))?;
            self.files.push(file);
            let header = std::mem::take(&mut self.shards[i].header);
            self.write(i, 0, &header)?;
            self.shards[i].header = header;
            self.files[i].set_len(self.shards[i].bytes).map_err(|e| self.failed(&path, e))?;
            self.places.extend(self.shards[i].tensors.iter().map(|(t, at)| (t.name.clone(), (i, *at))));
        }
        Ok(())
    }

    /// Takes over the records whose tensors are on the disk as they were written.
    fn keep_verified(&mut self, records: Vec<Record>) -> Result<(), Error> {
        let maps = self.maps()?;
        let tensors: BTreeMap<&str, &[Planned]> = self.items.iter().map(|(n, t)| (n.as_str(), t.as_slice())).collect();
        for record in records {
            let Some(planned) = tensors.get(record.item.as_str()) else { continue };
            let same = |(t, sum): (&Planned, &String)| {
                let (shard, at) = self.places[&t.name];
                let at = at as usize;
                sha256(&maps[shard][at..at + t.bytes() as usize]) == *sum
            };
            if planned.len() == record.sha256.len() && planned.iter().zip(&record.sha256).all(same) {
                self.done.insert(record.item.clone(), record);
            }
        }
        Ok(())
    }

    /// The weight files, mapped.
    fn maps(&self) -> Result<Vec<memmap2::Mmap>, Error> {
        self.files
            .iter()
            .zip(&self.shards)
            // SAFETY: the journal's lock keeps other writers away, and this process writes only after the maps are gone.
            .map(|(f, s)| unsafe { memmap2::Mmap::map(f) }.map_err(Error::io("read", self.dir.join(&s.file))))
            .collect()
    }

    fn check_space(&self) -> Result<(), Error> {
        let missing: u64 =
            self.items.iter().filter(|i| !self.done.contains_key(&i.0)).flat_map(|i| &i.1).map(Planned::bytes).sum();
        match fs4::available_space(&self.dir) {
            Ok(free) if free < missing => Err(Error::Full { path: self.dir.clone(), needed: missing }),
            // Where the free space is unknown, writing will tell.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The partial directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The record of `item`, if it is finished.
    pub fn record(&self, item: &str) -> Option<&Record> {
        self.done.get(item)
    }

    /// Number of finished items.
    pub fn done(&self) -> usize {
        self.done.len()
    }

    /// Writes the tensors of `item`, in the order in which they were planned, and records it as finished.
    ///
    /// # Errors
    /// If the disk is full or writing fails otherwise. The item can be written again.
    pub fn put(&mut self, item: &str, tensors: &[&[u8]], error: Option<f64>) -> Result<(), Error> {
        let planned = &self.items.iter().find(|i| i.0 == item).expect("a planned item").1;
        assert_eq!(planned.len(), tensors.len(), "tensors of {item}");
        let places: Vec<(usize, u64)> = planned.iter().map(|t| self.places[&t.name]).collect();
        for (t, bytes) in planned.iter().zip(tensors) {
            assert_eq!(t.bytes(), bytes.len() as u64, "bytes of {}", t.name);
        }
        for (&(shard, at), bytes) in places.iter().zip(tensors) {
            self.write(shard, at, bytes)?;
        }
        for shard in places.iter().map(|p| p.0).collect::<std::collections::BTreeSet<_>>() {
            let path = self.dir.join(&self.shards[shard].file);
            self.files[shard].sync_data().map_err(|e| self.failed(&path, e))?;
        }
        let record = Record { item: item.to_owned(), error, sha256: tensors.iter().map(|b| sha256(b)).collect() };
        self.log(&serde_json::to_string(&record).expect("strings and numbers"))?;
        self.done.insert(item.to_owned(), record);
        Ok(())
    }

    /// Writes a small file; `name` is relative to the checkpoint. Its folder is made.
    ///
    /// # Errors
    /// If the name leads out of the checkpoint, the disk is full or writing fails otherwise.
    pub fn put_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = inside(&self.dir, name)?;
        admit().map_err(|e| self.failed(&path, e))?;
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.dir))?;
            let mut f = File::create(&path)?;
            f.write_all(bytes)?;
            f.sync_all()
        };
        write().map_err(|e| self.failed(&path, e))?;
        self.small.push(name.to_owned());
        Ok(())
    }

    /// Writes the file that says which tensor lies where.
    ///
    /// # Errors
    /// If the disk is full or writing fails otherwise.
    pub fn put_index(&mut self) -> Result<(), Error> {
        let tensors = self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| (&*t.0.name, &*s.file, t.0.bytes())));
        let text = hugging::index(tensors);
        self.put_file(hugging::INDEX, &text)
    }

    /// Completes the manifest with the tensors and files, writes it, and moves the checkpoint to its place.
    /// Returns the manifest as written.
    ///
    /// # Errors
    /// If writing or renaming fails; the output is as it was before.
    ///
    /// # Panics
    /// If an item is not finished.
    pub fn finish(mut self, mut manifest: Manifest) -> Result<Manifest, Error> {
        let mut sums = BTreeMap::new();
        for (name, tensors) in &self.items {
            let record = self.done.get(name).expect("every item is finished");
            sums.extend(tensors.iter().map(|t| t.name.as_str()).zip(&record.sha256));
        }
        let maps = self.maps()?;
        manifest.tensors = self
            .shards
            .iter()
            .zip(&maps)
            .flat_map(|(s, map)| {
                s.tensors.iter().map(move |(t, at)| (s, t, &map[*at as usize..][..t.bytes() as usize]))
            })
            .map(|(s, t, bytes)| TensorEntry {
                name: t.name.clone(),
                file: s.file.clone(),
                dtype: t.dtype,
                shape: t.shape.clone(),
                sha256: sums[t.name.as_str()].clone(),
                blake3: Some(blake3(bytes)),
            })
            .collect();
        drop(maps);
        let mut names: Vec<String> = self.small.drain(..).chain(self.shards.iter().map(|s| s.file.clone())).collect();
        names.sort();
        manifest.files = names
            .into_par_iter()
            .map(|name| hash_file(&self.dir.join(&name)).map(|(bytes, sha256)| FileEntry { name, bytes, sha256 }))
            .collect::<Result<_, _>>()?;
        self.put_file(MANIFEST, manifest.to_text().as_bytes())?;
        let folders: BTreeSet<&Path> = manifest.files.iter().filter_map(|f| Path::new(&f.name).parent()).collect();
        for folder in folders {
            sync_dir(&self.dir.join(folder))?;
        }
        sync_dir(&self.dir)?;
        self.publish()?;
        Ok(manifest)
    }

    /// Renames the partial directory to the output. The journal goes last: until then the run can be resumed.
    fn publish(self) -> Result<(), Error> {
        check_output(&self.out, self.force)?;
        let parent = self.out.parent().unwrap_or(&self.out);
        let old = self.dir.with_extension(format!("{}-replaced", extension(&self.dir)));
        let replaces = self.out.exists();
        if replaces {
            self.keep_foreign()?;
            remove_replaced(&old)?;
            fs::rename(&self.out, &old).map_err(Error::io("replace", &self.out))?;
        }
        if let Err(e) = fs::rename(&self.dir, &self.out) {
            if replaces {
                // The first rename worked a moment ago; if its undoing fails, `old` still has everything.
                let _ = fs::rename(&old, &self.out);
            }
            return Err(Error::io("rename the finished checkpoint to", &self.out)(e));
        }
        sync_dir(parent)?;
        let journal = self.out.join(JOURNAL);
        fs::remove_file(&journal).map_err(Error::io("remove", &journal))?;
        remove_replaced(&old)?;
        sync_dir(&self.out)
    }

    /// Links what the output holds beside its own files into the partial directory, so that it is there afterwards.
    fn keep_foreign(&self) -> Result<(), Error> {
        let own = own_files(&self.out);
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            let here = self.out.join(&folder);
            for entry in fs::read_dir(&here).map_err(Error::io("read", &here))? {
                let entry = entry.map_err(Error::io("read", &here))?;
                let (name, path) = (folder.join(entry.file_name()), entry.path());
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    folders.push(name);
                    continue;
                }
                if own.contains(&name) {
                    continue;
                }
                let mut to = self.dir.join(&name);
                if to.symlink_metadata().is_ok() {
                    // A file of this checkpoint has that name now.
                    let mut other = name.into_os_string();
                    other.push(".before");
                    to = self.dir.join(other);
                }
                let parent = to.parent().unwrap_or(&self.dir);
                fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
                if to.symlink_metadata().is_err() && fs::hard_link(&path, &to).is_err() {
                    fs::copy(&path, &to).map_err(Error::io("keep", &path))?;
                }
            }
        }
        Ok(())
    }

    /// Appends a line to the journal: 16 digits of its hash, a blank, `json`.
    fn log(&mut self, json: &str) -> Result<(), Error> {
        let path = self.dir.join(JOURNAL);
        let line = format!("{} {json}\n", &sha256(json.as_bytes())[..16]);
        admit()
            .and_then(|()| self.journal.write_all(line.as_bytes()))
            .and_then(|()| self.journal.sync_data())
            .map_err(|e| self.failed(&path, e))
    }

    fn write(&mut self, shard: usize, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let path = self.dir.join(&self.shards[shard].file);
        let file = &mut self.files[shard];
        file.seek(SeekFrom::Start(at)).map_err(Error::io("write", &path))?;
        for chunk in bytes.chunks(CHUNK) {
            if let Err(e) = admit().and_then(|()| (&self.files[shard]).write_all(chunk)) {
                return Err(self.failed(&path, e));
            }
        }
        Ok(())
    }

    /// The error of a failed write.
    fn failed(&self, path: &Path, e: io::Error) -> Error {
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Error::Full { path: path.to_owned(), needed: self.bytes }
            }
            _ => Error::io("write", path)(e),
        }
    }
}

/// Refuses an output that exists, unless it may be replaced: an empty directory, or with `force` a checkpoint.
///
/// # Errors
/// If it may not, or is a link to nothing.
pub fn check_output(out: &Path, force: bool) -> Result<(), Error> {
    if qp_codegen::output::dangles(out) {
        return Err(Error::Dangling { out: out.to_owned() });
    }
    match fs::read_dir(out).map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(_) if !is_checkpoint(out) => Err(Error::Foreign { out: out.to_owned() }),
        Ok(_) if !force => Err(Error::Exists { out: out.to_owned() }),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => Err(Error::Foreign { out: out.to_owned() }),
    }
}

/// Called before each write. Tests of this crate let the disk become full here, see [`fault`].
fn admit() -> io::Result<()> {
    #[cfg(test)]
    fault::admit()?;
    Ok(())
}

/// A disk that becomes full.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        /// Writes of this thread that still succeed; negative: all.
        static LEFT: Cell<i64> = const { Cell::new(-1) };
    }

    /// Lets only the next `writes` writes of this thread succeed.
    pub fn after(writes: i64) {
        LEFT.set(writes);
    }

    pub fn admit() -> io::Result<()> {
        match LEFT.get() {
            0 => Err(io::ErrorKind::StorageFull.into()),
            n => {
                LEFT.set(if n > 0 { n - 1 } else { n });
                Ok(())
            }
        }
    }
}

/// The files that a checkpoint wrote, by its manifest, however damaged.
fn own_files(out: &Path) -> BTreeSet<PathBuf> {
    let text = input::read(&out.join(MANIFEST), input::SMALL).unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let listed = manifest["files"].as_array().into_iter().flatten().filter_map(|f| f["name"].as_str());
    listed.map(PathBuf::from).chain([MANIFEST, JOURNAL].map(PathBuf::from)).collect()
}

/// Removes what was replaced, now or by a run that was killed between its two renames.
fn remove_replaced(old: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(old) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", old)(e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// `OUT.partial-KEY`.
fn partial(out: &Path, key: &str) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{key}"));
    out.with_file_name(name)
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().into_owned()
}

/// Partial directories of `out`, sorted.
fn unfinished(out: &Path) -> Result<Vec<PathBuf>, Error> {
    let parent = out.parent().unwrap_or(out);
    let prefix = partial(out, "").file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found: Vec<PathBuf> = fs::read_dir(parent)
        .map_err(Error::io("read", parent))?
        .filter_map(Result::ok)
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix) && e.path().join(JOURNAL).exists())
        .map(|e| e.path())
        .collect();
    found.sort();
    Ok(found)
}

fn read_head(draft: &Path) -> Option<Head> {
    let text = input::read(&draft.join(JOURNAL), input::SMALL).ok()?;
    serde_json::from_str(whole_lines(&text).next()?.0).ok()
}

/// The leading lines of a journal that are whole and unchanged, each with the offset of its end.
fn whole_lines(text: &[u8]) -> impl Iterator<Item = (&str, usize)> {
    let mut at = 0;
    text.split_inclusive(|&b| b == b'\n').map_while(move |line| {
        at += line.len();
        let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let (sum, json) = line.split_once(' ')?;
        (sha256(json.as_bytes())[..16] == *sum).then_some((json, at))
    })
}

/// Makes renames and new files in `dir` durable.
fn sync_dir(dir: &Path) -> Result<(), Error> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("write", dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

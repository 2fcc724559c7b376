//! Compiled kernels on disk, and launches chosen by measurement.
//!
//! One file an entry, named by the SHA-256 of all that determines its content. A file is believed only if its header,
//! lengths and checksum agree, so a truncated or foreign one is compiled anew and replaced. Files are written
//! elsewhere and renamed, so processes may share the folder. A folder that cannot be written is no error: one
//! compiles each time.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

/// The environment variable that names the folder.
pub const VARIABLE: &str = "QP_CACHE_DIR";

const MAGIC: &[u8; 8] = b"qp-cubin";
/// Of the file's format and of what enters the key; old entries are never read again after a change.
const VERSION: u32 = 1;
/// Magic, version, length of the log, length of the code, checksum.
const HEADER: usize = 8 + 4 + 4 + 8 + 32;
const TEMPORARY: &str = ".qp-cubin-";
/// Entries used less recently than others are removed beyond this many bytes.
const BOUND: u64 = 512 << 20;

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A compiled kernel.
    Cubin,
    /// A launch chosen by measurement.
    Launch,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Cubin, Kind::Launch];

    /// How names of its files end.
    fn suffix(self) -> &'static str {
        match self {
            Kind::Cubin => ".cubin",
            Kind::Launch => ".launch",
        }
    }

    /// What a file of this name holds; `None` for files that are none of ours.
    fn of(name: &str) -> Option<Kind> {
        let hash = |n: &str| n.len() == 64 && n.bytes().all(|b| b.is_ascii_hexdigit());
        Kind::ALL.into_iter().find(|k| name.strip_suffix(k.suffix()).is_some_and(hash))
    }
}

/// The folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
    bound: u64,
}

/// What lies in the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The folder; `None` if neither `QP_CACHE_DIR`, `XDG_CACHE_HOME` nor `HOME` is set.
    pub folder: Option<PathBuf>,
    /// Compiled kernels.
    pub entries: usize,
    /// Launches chosen by measurement.
    pub launches: usize,
    /// Bytes of all entries.
    pub bytes: u64,
    /// Why it cannot be written, if so.
    pub problem: Option<String>,
}

/// A file of the folder.
struct Entry {
    kind: Kind,
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// Names an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    kind: Kind,
    hash: String,
}

impl Key {
    /// The key of what follows from `parts`; each is hashed with its length.
    pub fn new<'a>(kind: Kind, parts: impl IntoIterator<Item = &'a str>) -> Key {
        let mut hash = Sha256::new();
        hash.update(VERSION.to_le_bytes());
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Key { kind, hash: hash.finalize().iter().map(|b| format!("{b:02x}")).collect() }
    }
}

impl Cache {
    /// The user's: `$QP_CACHE_DIR`, else `$XDG_CACHE_HOME/qp/cubin`, else `~/.cache/qp/cubin`, else none.
    pub fn of_user() -> Cache {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = variable(VARIABLE)
            .or_else(|| variable("XDG_CACHE_HOME").map(|x| x.join("qp/cubin")))
            .or_else(|| variable("HOME").map(|h| h.join(".cache/qp/cubin")));
        Cache { folder, bound: BOUND }
    }

    /// A cache in `folder`, made when first written.
    pub fn at(folder: impl Into<PathBuf>) -> Cache {
        Cache { folder: Some(folder.into()), bound: BOUND }
    }

    /// No cache.
    pub fn none() -> Cache {
        Cache { folder: None, bound: BOUND }
    }

    fn file(&self, key: &Key) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{}{}", key.hash, key.kind.suffix())))
    }

    /// Log and code of an entry, if it is there and whole.
    pub(super) fn get(&self, key: &Key) -> Option<(String, Vec<u8>)> {
        let file = self.file(key)?;
        let entry = decode(&fs::read(&file).ok()?)?;
        touch(&file);
        Some(entry)
    }

    /// Stores an entry. Failure is silent: [`Cache::status`] shows it.
    pub(super) fn put(&self, key: &Key, log: &str, code: &[u8]) {
        let Some(file) = self.file(key) else { return };
        if self.write(&file, &encode(log, code)).is_ok() {
            self.evict();
        }
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let folder = file.parent().expect("a file in the folder");
        fs::create_dir_all(folder)?;
        let mut temporary = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder)?;
        temporary.write_all(bytes)?;
        temporary.persist(file).map_err(|e| e.error)?;
        Ok(())
    }

    /// The entries, the least recently used first.
    fn entries(&self) -> Vec<Entry> {
        let Some(folder) = &self.folder else { return Vec::new() };
        let mut out: Vec<_> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| {
                let kind = Kind::of(&e.file_name().to_string_lossy())?;
                let data = e.metadata().ok()?;
                Some(Entry { kind, path: e.path(), bytes: data.len(), used: data.modified().ok()? })
            })
            .collect();
        out.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
        out
    }

    fn evict(&self) {
        let entries = self.entries();
        let mut bytes: u64 = entries.iter().map(|e| e.bytes).sum();
        for entry in entries {
            if bytes <= self.bound {
                break;
            }
            if fs::remove_file(entry.path).is_ok() {
                bytes -= entry.bytes;
            }
        }
    }

    /// Removes all entries (and what killed processes left), giving how many; other files stay.
    ///
    /// # Errors
    /// The first file that could not be removed.
    pub fn clear(&self) -> std::io::Result<usize> {
        let Some(folder) = &self.folder else { return Ok(0) };
        let listing = match fs::read_dir(folder) {
            Ok(l) => l,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(e) => return Err(e),
        };
        let mut removed = 0;
        for entry in listing {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if Kind::of(&name).is_some() {
                fs::remove_file(entry.path())?;
                removed += 1;
            } else if name.starts_with(TEMPORARY) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(removed)
    }

    /// What lies there, and whether it can be written.
    pub fn status(&self) -> Status {
        let entries = self.entries();
        let of = |kind| entries.iter().filter(|e| e.kind == kind).count();
        Status {
            folder: self.folder.clone(),
            entries: of(Kind::Cubin),
            launches: of(Kind::Launch),
            bytes: entries.iter().map(|e| e.bytes).sum(),
            problem: self.problem(),
        }
    }

    /// Why the folder cannot be written, if so.
    pub(super) fn problem(&self) -> Option<String> {
        let Some(folder) = &self.folder else {
            return Some("neither QP_CACHE_DIR, XDG_CACHE_HOME nor HOME is set".to_owned());
        };
        let probe = || {
            fs::create_dir_all(folder)?;
            tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder)?.write_all(&[0; 4096])
        };
        probe().err().map(|e| e.to_string())
    }
}

/// Marks an entry as used, so that it outlives others; once a day is enough.
fn touch(file: &Path) {
    let stale = |t: SystemTime| t.elapsed().is_ok_and(|age| age > Duration::from_secs(86_400));
    if fs::metadata(file).and_then(|m| m.modified()).is_ok_and(stale) {
        let _ = fs::File::options().append(true).open(file).and_then(|f| f.set_modified(SystemTime::now()));
    }
}

fn checksum(log: &[u8], code: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(log).chain_update(code).finalize().into()
}

fn encode(log: &str, code: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + log.len() + code.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(log.len() as u32).to_le_bytes());
    out.extend_from_slice(&(code.len() as u64).to_le_bytes());
    out.extend_from_slice(&checksum(log.as_bytes(), code));
    out.extend_from_slice(log.as_bytes());
    out.extend_from_slice(code);
    out
}

fn decode(bytes: &[u8]) -> Option<(String, Vec<u8>)> {
    let (header, body) = bytes.split_at_checked(HEADER)?;
    let (magic, header) = header.split_first_chunk::<8>()?;
    let (version, header) = header.split_first_chunk::<4>()?;
    let (log_len, header) = header.split_first_chunk::<4>()?;
    let (code_len, sum) = header.split_first_chunk::<8>()?;
    if magic != MAGIC || u32::from_le_bytes(*version) != VERSION {
        return None;
    }
    let (log, code) = body.split_at_checked(u32::from_le_bytes(*log_len) as usize)?;
    if code.len() as u64 != u64::from_le_bytes(*code_len) || checksum(log, code) != sum {
        return None;
    }
    Some((String::from_utf8(log.to_vec()).ok()?, code.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> (tempfile::TempDir, Cache, Key, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("new/folder"));
        let key = Key::new(Kind::Cubin, ["source", "sm_80"]);
        cache.put(&key, "a log", b"code");
        let file = cache.file(&key).unwrap();
        (dir, cache, key, file)
    }

    #[test]
    fn what_was_put_comes_back() {
        let (_dir, cache, key, _) = filled();
        assert_eq!(cache.get(&key), Some(("a log".into(), b"code".to_vec())));
        assert_eq!(cache.get(&Key::new(Kind::Cubin, ["source", "sm_90a"])), None);
        let status = cache.status();
        assert_eq!((status.entries, status.problem), (1, None));
        assert_eq!(cache.clear().unwrap(), 1);
        assert_eq!(cache.get(&key), None);
    }

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(Key::new(Kind::Cubin, ["ab", "c"]), Key::new(Kind::Cubin, ["a", "bc"]));
        assert_ne!(Key::new(Kind::Cubin, ["ab"]), Key::new(Kind::Cubin, ["ab", ""]));
    }

    #[test]
    fn any_flipped_byte_or_truncation_is_noticed_and_healed() {
        let (_dir, cache, key, file) = filled();
        let whole = fs::read(&file).unwrap();
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 0x40;
            fs::write(&file, &bad).unwrap();
            assert_eq!(cache.get(&key), None, "byte {i}");
            fs::write(&file, &whole[..i]).unwrap();
            assert_eq!(cache.get(&key), None, "cut at {i}");
        }
        fs::write(&file, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(cache.get(&key), None, "a byte too many");
        cache.put(&key, "a log", b"code");
        assert!(cache.get(&key).is_some());
    }

    #[test]
    fn foreign_files_are_left_alone() {
        let (_dir, cache, key, file) = filled();
        let folder = file.parent().unwrap();
        fs::write(folder.join("notes.txt"), "mine").unwrap();
        fs::write(folder.join("short.cubin"), "mine").unwrap();
        assert_eq!(cache.status().entries, 1);
        cache.clear().unwrap();
        assert!(folder.join("notes.txt").exists() && folder.join("short.cubin").exists());
        assert_eq!(cache.get(&key), None);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let cache = Cache::at(dir.path().join("file/below"));
        let key = Key::new(Kind::Cubin, ["x"]);
        cache.put(&key, "", b"code");
        assert_eq!(cache.get(&key), None);
        assert!(cache.status().problem.is_some());
        assert_eq!(Cache::none().clear().unwrap(), 0);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { folder: Some(dir.path().into()), bound: 3 * (HEADER as u64 + 100) };
        let keys: Vec<Key> = (0..5).map(|i| Key::new(Kind::Cubin, [format!("{i}").as_str()])).collect();
        for (age, key) in (1..=4).rev().zip(&keys) {
            cache.put(key, "", &[0; 100]);
            let file = fs::File::options().append(true).open(cache.file(key).unwrap()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age * 100_000)).unwrap();
            if age == 2 {
                // The oldest is used: it becomes the youngest.
                assert!(cache.get(&keys[0]).is_some());
            }
        }
        cache.put(&keys[4], "", &[0; 100]);
        let left: Vec<bool> = keys.iter().map(|k| cache.get(k).is_some()).collect();
        assert_eq!(left, [true, false, false, true, true]);
    }

    #[test]
    fn many_threads_write_and_read_one_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let key = Key::new(Kind::Cubin, ["shared"]);
        let code = vec![7u8; 100_000];
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..50 {
                        if let Some((_, got)) = cache.get(&key) {
                            assert_eq!(got, code);
                        }
                        cache.put(&key, "log", &code);
                    }
                });
            }
        });
        assert_eq!(cache.get(&key).unwrap().1, code);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    /// What a process of [`many_processes_write_and_read_one_entry`] does; nothing in a plain run.
    #[test]
    fn one_of_many_processes() {
        let Some(folder) = std::env::var_os("QP_TEST_SHARED_CACHE") else { return };
        let (cache, key) = (Cache::at(folder), Key::new(Kind::Cubin, ["shared"]));
        let code = vec![7u8; 100_000];
        for _ in 0..100 {
            if let Some((_, got)) = cache.get(&key) {
                assert_eq!(got, code);
            }
            cache.put(&key, "log", &code);
        }
    }

    #[test]
    fn many_processes_write_and_read_one_entry() {
        let dir = tempfile::tempdir().unwrap();
        let child = |_| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "jit::cache::tests::one_of_many_processes"])
                .env("QP_TEST_SHARED_CACHE", dir.path())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut children: Vec<_> = (0..4).map(child).collect();
        assert!(children.iter_mut().all(|c| c.wait().unwrap().success()));
        assert_eq!(Cache::at(dir.path()).get(&Key::new(Kind::Cubin, ["shared"])).unwrap().1.len(), 100_000);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }
}

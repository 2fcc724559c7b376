//! Where NVIDIA's libraries may lie that are opened at run time.
//!
//! A toolkit puts them under `/usr/local/cuda*`, wheels (`pip install nvidia-cuda-nvrtc`) into the site-packages of some
//! Python; neither is on the loader's path by default.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A library to be found.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its file's name without a version: `libnvrtc.so`.
    pub stem: &'static str,
    /// The environment variable that names its file or folder; nothing else is searched if it is set.
    pub variable: &'static str,
    /// Names that the loader may know, newest first. The bare one comes last: it is a link of a toolkit, often stale.
    pub names: &'static [&'static str],
}

/// What to try, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// A bare name, for the loader to search.
    Name(&'static str),
    /// A file, which exists unless the user named it.
    File(PathBuf),
}

impl Candidate {
    /// What the loader is given.
    pub fn path(&self) -> &Path {
        match self {
            Candidate::Name(name) => Path::new(name),
            Candidate::File(file) => file,
        }
    }
}

impl Wanted {
    /// What the user names.
    pub fn given(&self) -> Option<PathBuf> {
        std::env::var_os(self.variable).filter(|v| !v.is_empty()).map(PathBuf::from)
    }

    /// The first candidate that `open` makes something of.
    ///
    /// # Errors
    /// What `open` says of the first file that it cannot use; `None` if there is no file.
    pub fn open<T, E>(&self, mut open: impl FnMut(&Candidate) -> Result<T, E>) -> Result<T, Option<E>> {
        let mut broken = None;
        for deep in [false, true] {
            for candidate in self.candidates(deep) {
                match open(&candidate) {
                    Ok(found) => return Ok(found),
                    // The loader not knowing a bare name is the common case and says nothing.
                    Err(e) => match candidate {
                        Candidate::Name(_) => (),
                        Candidate::File(_) => broken = broken.or(Some(e)),
                    },
                }
            }
            if self.given().is_some() {
                break;
            }
        }
        Err(broken)
    }

    /// Candidates in order of preference. `deep` adds the answer of `python3` itself, which costs starting a process.
    fn candidates(&self, deep: bool) -> Vec<Candidate> {
        if let Some(given) = self.given() {
            return if given.is_dir() {
                newest_in(&given, self.stem).into_iter().map(Candidate::File).collect()
            } else {
                vec![Candidate::File(given)]
            };
        }
        if deep {
            return python_path().iter().flat_map(|p| self.in_site_packages(p)).map(Candidate::File).collect();
        }
        let mut out: Vec<Candidate> = self.names.iter().map(|n| Candidate::Name(n)).collect();
        let mut files = Vec::new();
        for toolkit in children(Path::new("/usr/local"), "cuda").into_iter().rev() {
            files.extend(newest_in(&toolkit.join("lib64"), self.stem));
        }
        for site in site_packages() {
            files.extend(self.in_site_packages(&site));
        }
        let mut seen = BTreeSet::new();
        files.retain(|f| seen.insert(f.clone()));
        out.extend(files.into_iter().map(Candidate::File));
        out
    }

    /// What NVIDIA's wheels put below a site-packages folder: `nvidia/cu13/lib`, `nvidia/cuda_nvrtc/lib`.
    fn in_site_packages(&self, site: &Path) -> Vec<PathBuf> {
        children(&site.join("nvidia"), "cu").iter().filter_map(|p| newest_in(&p.join("lib"), self.stem)).collect()
    }
}

/// Subfolders of `folder` whose name begins with `prefix`, sorted.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(prefix))
        .map(|e| e.path())
        .filter(|p| p.is_dir())
        .collect();
    out.sort();
    out
}

/// The newest version of the library `stem` (`libnvrtc.so`) in a folder.
pub fn newest_in(folder: &Path, stem: &str) -> Option<PathBuf> {
    let version = |e: &std::fs::DirEntry| -> Option<Vec<u32>> {
        let name = e.file_name().into_string().ok()?;
        let rest = name.strip_prefix(stem)?;
        if rest.is_empty() {
            return Some(Vec::new());
        }
        rest.strip_prefix('.')?.split('.').map(|n| n.parse().ok()).collect()
    };
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries.filter_map(|e| Some((version(&e)?, e.path()))).max().map(|(_, path)| path)
}

/// Folders that are, or may be, the site-packages of a Python: of an active environment, of each `python3` on the
/// path, of the user and of the system.
fn site_packages() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    for bin in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        if bin.join("python3").exists() {
            prefixes.extend(bin.parent().map(Path::to_owned));
        }
    }
    prefixes.extend(std::env::var_os("HOME").map(|h| Path::new(&h).join(".local")));
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    let mut out = Vec::new();
    for prefix in prefixes {
        for lib in ["lib", "lib64"] {
            for python in children(&prefix.join(lib), "python3").into_iter().rev() {
                out.extend(["site-packages", "dist-packages"].map(|s| python.join(s)));
            }
        }
    }
    out.retain(|p| p.is_dir());
    out
}

/// `sys.path` of `python3`.
fn python_path() -> Vec<PathBuf> {
    let output = Command::new("python3")
        .args(["-c", "import sys; print('\\n'.join(sys.path))"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).lines().filter(|l| !l.is_empty()).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "libnvrtc.so.12",
            "libnvrtc.so.13",
            "libnvrtc.so.9.2",
            "libnvrtc.alt.so.14",
            "libnvrtc-builtins.so.15.0",
            "libnvrtc.so.bak",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let newest = |stem| newest_in(dir.path(), stem).unwrap();
        assert_eq!(newest("libnvrtc.so"), dir.path().join("libnvrtc.so.13"));
        assert_eq!(newest("libnvrtc-builtins.so"), dir.path().join("libnvrtc-builtins.so.15.0"));
        assert_eq!(newest_in(&dir.path().join("none"), "libnvrtc.so"), None);
    }

    #[test]
    fn wheels_of_both_layouts() {
        let dir = tempfile::tempdir().unwrap();
        for package in ["cu13", "cuda_nvrtc", "cudnn", "nccl"] {
            let lib = dir.path().join("nvidia").join(package).join("lib");
            std::fs::create_dir_all(&lib).unwrap();
            if package.starts_with("cu") && package != "cudnn" {
                std::fs::write(lib.join("libnvrtc.so.13"), "").unwrap();
            }
        }
        let wanted = Wanted { stem: "libnvrtc.so", variable: "QP_NO_SUCH_VARIABLE", names: &[] };
        let found = wanted.in_site_packages(dir.path());
        assert_eq!(found.len(), 2, "{found:?}");
    }
}

//! Where `libnvrtc` may lie.
//!
//! A toolkit puts it under `/usr/local/cuda*`, `pip install nvidia-cuda-nvrtc` into the site-packages of some Python;
//! neither is on the loader's path by default.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The environment variable that names the library's file or folder; nothing else is searched if it is set.
pub const VARIABLE: &str = "QP_NVRTC";

/// What to try, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Candidate {
    /// A bare name, for the loader to search.
    Name(&'static str),
    /// A file that exists.
    File(PathBuf),
}

/// Names that the loader may know, newest first. The bare one comes last: it is a link of a toolkit, often stale.
const NAMES: [&str; 5] = ["libnvrtc.so.14", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"];

/// What the user names.
pub(super) fn given() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Candidates in order of preference. `deep` adds the answer of `python3` itself, which costs starting a process.
pub(super) fn candidates(deep: bool) -> Vec<Candidate> {
    if let Some(given) = given() {
        return if given.is_dir() {
            newest_in(&given).into_iter().map(Candidate::File).collect()
        } else {
            vec![Candidate::File(given)]
        };
    }
    if deep {
        return python_path().iter().flat_map(|p| in_site_packages(p)).map(Candidate::File).collect();
    }
    let mut out: Vec<Candidate> = NAMES.iter().map(|n| Candidate::Name(n)).collect();
    let mut files = Vec::new();
    for toolkit in children(Path::new("/usr/local"), "cuda").into_iter().rev() {
        files.extend(newest_in(&toolkit.join("lib64")));
    }
    for site in site_packages() {
        files.extend(in_site_packages(&site));
    }
    let mut seen = BTreeSet::new();
    files.retain(|f| seen.insert(f.clone()));
    out.extend(files.into_iter().map(Candidate::File));
    out
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

/// The newest `libnvrtc.so*` of a folder.
pub(super) fn newest_in(folder: &Path) -> Option<PathBuf> {
    newest_library(folder, "libnvrtc.so")
}

/// The newest `libnvrtc-builtins.so*` of a folder.
pub(super) fn builtins_in(folder: &Path) -> Option<PathBuf> {
    newest_library(folder, "libnvrtc-builtins.so")
}

fn newest_library(folder: &Path, stem: &str) -> Option<PathBuf> {
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

/// The libraries that NVIDIA's wheels put below a site-packages folder: `nvidia/cu13/lib`, `nvidia/cuda_nvrtc/lib`.
fn in_site_packages(site: &Path) -> Vec<PathBuf> {
    children(&site.join("nvidia"), "cu").iter().filter_map(|p| newest_in(&p.join("lib"))).collect()
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
        assert_eq!(newest_in(dir.path()).unwrap(), dir.path().join("libnvrtc.so.13"));
        assert_eq!(builtins_in(dir.path()).unwrap(), dir.path().join("libnvrtc-builtins.so.15.0"));
        assert_eq!(newest_in(&dir.path().join("none")), None);
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
        let found = in_site_packages(dir.path());
        assert_eq!(found.len(), 2, "{found:?}");
    }
}

//! Lists the files of `specs/`, so that the palette can be embedded, and hashes the sources that make kernels.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    list(&root.join("../specs"))?;
    let mut hasher = DefaultHasher::new();
    for name in ["cuda", "ir", "kernels", "layout.rs"] {
        let path = root.join("src").join(name);
        println!("cargo::rerun-if-changed={}", path.display());
        hash(&path, &mut hasher)?;
    }
    println!("cargo::rustc-env=QP_GENERATOR={:016x}", hasher.finish());
    Ok(())
}

/// Adds a file, or all of a folder, in the order of names.
fn hash(path: &Path, hasher: &mut DefaultHasher) -> io::Result<()> {
    if path.is_dir() {
        let mut inside = fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
        inside.sort();
        return inside.iter().try_for_each(|p| hash(p, hasher));
    }
    path.file_name().hash(hasher);
    fs::read(path)?.hash(hasher);
    Ok(())
}

fn list(specs: &Path) -> io::Result<()> {
    println!("cargo::rerun-if-changed={}", specs.display());
    let mut files = Vec::new();
    for folder in ["", "tables", "library", "formats", "formats/tables"] {
        let Ok(entries) = fs::read_dir(specs.join(folder)) else { continue };
        for entry in entries {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let wanted = [".qspec", ".table", ".toml"].iter().any(|end| name.ends_with(end));
            if wanted && path.is_file() {
                let inside = if folder.is_empty() { name.to_string() } else { format!("{folder}/{name}") };
                files.push((inside, fs::canonicalize(&path)?));
            }
        }
    }
    files.sort();
    let entry = |(name, path): &(String, PathBuf)| format!("    ({name:?}, include_str!({:?})),\n", path.display());
    let list: String = files.iter().map(entry).collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("palette_files.rs");
    fs::write(out, format!("&[\n{list}]\n"))
}

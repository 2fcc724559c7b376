//! Lists the files of `specs/`, so that the palette can be embedded.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let specs = Path::new(&env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../specs");
    println!("cargo::rerun-if-changed={}", specs.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut files = Vec::new();
    for folder in ["", "tables"] {
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

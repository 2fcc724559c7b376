//! Which files of a directory hold its tensors: the rules are transformers', and where it would give up, a little more.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::Error;
use super::keys::Keys;
use crate::input;

/// The file that holds everything, if there is one.
const WHOLE: &str = "model.safetensors";
/// The file that says which tensor lies where, if there are several.
const INDEX: &str = "model.safetensors.index.json";

/// Files with tensors, and what is to be said about the choice.
#[derive(Debug, PartialEq)]
pub struct Shards {
    /// The files, sorted.
    pub paths: Vec<PathBuf>,
    /// For the user.
    pub notes: Vec<String>,
}

/// The safetensors files of the model in `dir`: `model.safetensors`; or else those that
/// `model.safetensors.index.json` names; or else, without an index, `NAME-00001-of-0000N.safetensors` and the rest of
/// these.
///
/// # Errors
/// If there are none, some of several are missing, or the index is malformed or names a file outside `dir`.
pub fn find(dir: &Path) -> Result<Shards, Error> {
    let (whole, index) = (dir.join(WHOLE), dir.join(INDEX));
    if whole.exists() {
        let mut notes = Vec::new();
        if index.exists() {
            notes.push(format!("{} is read, and {INDEX} beside it is not", whole.display()));
        }
        return Ok(Shards { paths: vec![whole], notes });
    }
    if index.exists() {
        let paths = named_by(dir, &index)?;
        return Ok(Shards { paths, notes: Vec::new() });
    }
    let (paths, name) = numbered(dir)?;
    if let Some(name) = name {
        let notes = vec![format!("{} has no {INDEX}; all {} files {name} are read", dir.display(), paths.len())];
        return Ok(Shards { paths, notes });
    }
    Err(Error::NoWeights { path: dir.to_owned(), hint: hint(dir) })
}

/// The files that `index` names.
fn named_by(dir: &Path, index: &Path) -> Result<Vec<PathBuf>, Error> {
    let bytes = input::read(index, input::SMALL).map_err(|e| Error::io(index, e))?;
    let text = String::from_utf8(bytes).map_err(|e| Error::file(index, e.to_string()))?;
    let keys = Keys::parse(index, &text)?;
    let Some(map) = keys.object("weight_map")? else {
        return Err(Error::file(index, "has no weight_map: get it again"));
    };
    let mut names = BTreeSet::new();
    for (tensor, _) in map.unasked() {
        let name = map.text(tensor)?.unwrap_or_default();
        // A file may lie in a folder, but not outside of the model.
        if name.is_empty() || !Path::new(&name).components().all(|c| matches!(c, Component::Normal(_))) {
            let what = format!("names the file '{name}' for tensor '{tensor}', which lies outside the directory");
            return Err(Error::file(index, what));
        }
        names.insert(name);
    }
    let missing: Vec<&str> = names.iter().map(String::as_str).filter(|n| !dir.join(n).exists()).collect();
    if let [first, ..] = missing.as_slice() {
        let what = format!(
            "{} of the {} files that it names are missing, the first is {first}: get them again",
            missing.len(),
            names.len()
        );
        return Err(Error::file(index, what));
    }
    if names.is_empty() {
        return Err(Error::file(index, "names no files: get it again"));
    }
    Ok(names.iter().map(|n| dir.join(n)).collect())
}

/// The files `NAME-00001-of-0000N.safetensors`, all N of them, and their names as a pattern.
fn numbered(dir: &Path) -> Result<(Vec<PathBuf>, Option<String>), Error> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut found = BTreeSet::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::io(dir, e))?.file_name();
        if let Some((stem, part, count)) = name.to_str().and_then(|n| part_of(n, "safetensors")) {
            found.insert((stem.to_owned(), count, part));
        }
    }
    let Some((stem, count, _)) = found.first().cloned() else { return Ok((Vec::new(), None)) };
    if let Some((other, n, _)) = found.iter().find(|(s, n, _)| *s != stem || *n != count) {
        let what = format!(
            "holds parts of two models and no {INDEX}: {}, {}",
            part_name(&stem, 1, count, "safetensors"),
            part_name(other, 1, *n, "safetensors")
        );
        return Err(Error::file(dir, what));
    }
    let missing = (1..=count).find(|part| !found.contains(&(stem.clone(), count, *part)));
    if let Some(part) = missing {
        let what = format!(
            "holds {} of {count} parts of a model and no {INDEX}; {} is missing: get it again",
            found.len(),
            part_name(&stem, part, count, "safetensors")
        );
        return Err(Error::file(dir, what));
    }
    let paths = (1..=count).map(|part| dir.join(part_name(&stem, part, count, "safetensors"))).collect();
    Ok((paths, Some(format!("{stem}-*-of-{count:05}.safetensors"))))
}

/// Taken apart: `NAME-00001-of-00003.EXTENSION` into name, 1 and 3.
pub fn part_of<'a>(file: &'a str, extension: &str) -> Option<(&'a str, usize, usize)> {
    let stem = file.strip_suffix(extension)?.strip_suffix('.')?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, part) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        let all = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        all.then(|| digits.parse().ok()).flatten()
    };
    let (part, count): (usize, usize) = (number(part)?, number(count)?);
    (1..=count).contains(&part).then_some((name, part, count))
}

/// The name of part `part` of `count`, the first is 1.
pub fn part_name(stem: &str, part: usize, count: usize, extension: &str) -> String {
    format!("{stem}-{part:05}-of-{count:05}.{extension}")
}

/// What to do about a directory without weights.
fn hint(dir: &Path) -> String {
    let has = |name: &str| dir.join(name).exists();
    if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
        return ": convert pytorch_model.bin to safetensors first".to_owned();
    }
    if has("specs") {
        return ": if it was a quantized checkpoint, its qp.json is missing; copy it again from where it came"
            .to_owned();
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let mut other: Vec<String> = names.filter_map(|n| n.into_string().ok()).collect();
    other.retain(|n| n.ends_with(".safetensors") || n.ends_with(".gguf"));
    other.sort();
    match other.as_slice() {
        [] => String::new(),
        [gguf, ..] if gguf.ends_with(".gguf") => format!(": to read {gguf}, give the path of that file"),
        [file, ..] => format!(": if {file} holds the whole model, rename it to {WHOLE}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        dir
    }

    fn found(dir: &tempfile::TempDir) -> Result<(Vec<String>, usize), String> {
        let name = |p: &PathBuf| p.strip_prefix(dir.path()).unwrap().display().to_string();
        find(dir.path())
            .map(|s| (s.paths.iter().map(name).collect(), s.notes.len()))
            .map_err(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR"))
    }

    fn index(dir: &tempfile::TempDir, text: &str) {
        std::fs::write(dir.path().join(INDEX), text).unwrap();
    }

    #[test]
    fn a_whole_file_is_taken_before_an_index() {
        let dir = dir(&["model.safetensors"]);
        assert_eq!(found(&dir), Ok((vec!["model.safetensors".to_owned()], 0)));
        index(&dir, r#"{"weight_map":{"x":"gone.safetensors"}}"#);
        assert_eq!(found(&dir), Ok((vec!["model.safetensors".to_owned()], 1)));
    }

    #[test]
    fn an_index_names_files_and_folders_within() {
        let dir = dir(&["a.safetensors", "sub/b.safetensors"]);
        index(&dir, r#"{"metadata":{},"weight_map":{"x":"a.safetensors","y":"sub/b.safetensors"}}"#);
        assert_eq!(found(&dir), Ok((vec!["a.safetensors".to_owned(), "sub/b.safetensors".to_owned()], 0)));
        for bad in ["../a.safetensors", "/etc/passwd", "..", ""] {
            index(&dir, &format!(r#"{{"weight_map":{{"x":"{bad}"}}}}"#));
            assert!(found(&dir).unwrap_err().contains("outside the directory"), "{bad}");
        }
        index(&dir, r#"{"weight_map":{"x":"a.safetensors","y":"b.safetensors","z":"c.safetensors"}}"#);
        assert_eq!(
            found(&dir).unwrap_err(),
            "DIR/model.safetensors.index.json: 2 of the 3 files that it names are missing, the first is b.safetensors: \
             get them again"
        );
        index(&dir, r#"{"weight_map":{"x":1}}"#);
        assert!(found(&dir).unwrap_err().contains("x is 1: expected text"));
        index(&dir, "{}");
        assert!(found(&dir).unwrap_err().contains("has no weight_map"));
    }

    #[test]
    fn numbered_files_need_no_index() {
        let whole = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"];
        assert_eq!(found(&dir(&whole)), Ok((whole.map(str::to_owned).to_vec(), 1)));
        assert_eq!(
            found(&dir(&whole[1..])).unwrap_err(),
            "DIR: holds 1 of 2 parts of a model and no model.safetensors.index.json; m-00001-of-00002.safetensors is \
             missing: get it again"
        );
        assert!(found(&dir(&[whole[0], whole[1], "n-00001-of-00001.safetensors"])).unwrap_err().contains("two models"));
    }

    #[test]
    fn other_files_are_hinted_at() {
        assert!(found(&dir(&["consolidated.safetensors"])).unwrap_err().contains("rename it to model.safetensors"));
        assert!(found(&dir(&["x.gguf"])).unwrap_err().ends_with("to read x.gguf, give the path of that file"));
    }

    #[test]
    fn parts() {
        assert_eq!(part_of("a-b-00002-of-00003.gguf", "gguf"), Some(("a-b", 2, 3)));
        for bad in ["a-00004-of-00003.gguf", "a-2-of-3.gguf", "a-00000-of-00003.gguf", "a.gguf", "gguf"] {
            assert_eq!(part_of(bad, "gguf"), None, "{bad}");
        }
    }
}

//! The built-in palette: the quantizers of `specs/`, embedded in the program.

use std::io;
use std::path::Path;
use std::sync::OnceLock;

use crate::spec::{Files, Library, Quantizer, load_from};

/// Path in the folder `specs` and text of each embedded file, sorted by path.
pub(crate) const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/palette_files.rs"));

/// Measured distortions, in [`FILES`].
const DISTORTION: &str = "distortion.toml";

/// The embedded files.
pub(crate) struct Embedded;

/// Names of the palette's files: formats are no quantizers that one makes.
pub(crate) fn files() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    FILES.iter().filter(|f| f.0.ends_with(".qspec") && !f.0.contains('/'))
}

impl Files for Embedded {
    fn read(&self, path: &Path) -> io::Result<String> {
        let inside = path.strip_prefix("specs").unwrap_or(path);
        let text = FILES.iter().find(|f| Path::new(f.0) == inside);
        text.map(|f| f.1.to_string()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// All of the palette. Table files are named relative to the project's root, as in `specs/tables/tcq_2.table`.
///
/// A file with errors is left out, its errors are among the warnings; a test holds the palette to having none.
pub fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let mut all = Library::default();
        for (name, _) in files() {
            match load_from(&Embedded, &Path::new("specs").join(name)) {
                Ok(l) => {
                    all.quantizers.extend(l.quantizers);
                    all.fusions.extend(l.fusions);
                }
                Err(e) => all.warnings = e,
            }
        }
        all
    })
}

/// Names of all quantizers of the palette, by file and in its order.
pub fn names() -> Vec<&'static str> {
    library().quantizers.iter().map(|q| q.name.as_str()).collect()
}

/// A quantizer of the palette (perhaps untrained: see [`Quantizer::is_trained`]).
pub fn get(name: &str) -> Option<Quantizer> {
    library().get(name).cloned()
}

/// Measured distortion of a quantizer of the palette: mean squared error for a unit-variance Gaussian source.
///
/// From `specs/distortion.toml`, whose lines are `"name" = error`.
pub fn distortion(name: &str) -> Option<f64> {
    let (_, text) = FILES.iter().find(|f| f.0 == DISTORTION)?;
    text.lines().find_map(|line| {
        let (key, value) = line.split('#').next()?.split_once('=')?;
        (key.trim().trim_matches('"') == name).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{TableSource, load_str};

    #[test]
    fn the_palette_has_no_errors_and_all_its_members() {
        for (name, _) in files() {
            let l = load_from(&Embedded, Path::new(name)).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(l.warnings.to_string(), "");
        }
        let count = |prefix: &str| names().iter().filter(|n| n.starts_with(prefix)).count();
        let kinds = ["tcq_", "htcq_", "fine_", "nuq_", "vq2_", "fast_", "lean_"];
        assert_eq!(kinds.map(count), [8, 7, 15, 7, 10, 5, 2]);
        let mut sorted = names();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), names().len(), "a name twice");
    }

    #[test]
    fn names_tell_the_rate() {
        for q in &library().quantizers {
            let rate: f64 = q.name.split_once('_').unwrap().1.parse().unwrap();
            assert_eq!(q.rate(), rate, "{}", q.name);
        }
    }

    #[test]
    fn files_are_formatted() {
        for (name, text) in files() {
            let formatted = crate::syntax::format(crate::syntax::FileId(0), text).unwrap();
            assert_eq!(formatted, *text, "{name}");
        }
    }

    /// Any values do: the palette may be untrained.
    fn filled(mut q: Quantizer) -> Quantizer {
        for c in &mut q.codes {
            for t in &mut c.tables {
                let (min, max) = c.value.range();
                let n = t.entries * c.vector;
                let any = |i: u32| (i.wrapping_mul(0x9E37_79B1) >> 12).cast_signed() % (max - min + 1);
                t.values = (0..n).map(|i| (min + any(i)) as i16).collect();
                t.source = TableSource::Inline;
            }
        }
        q
    }

    #[test]
    fn canonical_text_parses_back_to_the_quantizer() {
        for q in &library().quantizers {
            let q = filled(q.clone());
            let text = q.canonical();
            let library = load_str("canonical", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(library.quantizers, std::slice::from_ref(&q));
            assert_eq!(library.warnings.to_string(), "");
            assert_eq!(library.quantizers[0].canonical(), text);
            let renamed = Quantizer { name: "other".into(), ..q.clone() };
            assert_eq!(renamed.hash(), q.hash());
        }
    }
}

//! The formats built in: those of `specs/formats/`, embedded in the program. Each file is read when it is first needed.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use crate::palette::{Embedded, FILES};
use crate::spec::{Files, Format, Library, load_from};

/// Folder of the formats in `specs`.
const FOLDER: &str = "formats/";

/// A file of formats.
struct File {
    path: &'static str,
    text: &'static str,
    library: OnceLock<Library>,
}

impl File {
    fn path(&self) -> PathBuf {
        Path::new("specs").join(self.path)
    }

    /// What it defines. A file with errors defines nothing, and says so among its warnings; a test holds all files to
    /// having none.
    fn library(&self) -> &Library {
        self.library.get_or_init(|| {
            load_from(&Embedded, &self.path()).unwrap_or_else(|warnings| Library { warnings, ..Library::default() })
        })
    }
}

fn files() -> &'static [File] {
    static ALL: OnceLock<Vec<File>> = OnceLock::new();
    ALL.get_or_init(|| {
        let formats = FILES.iter().filter(|f| f.0.starts_with(FOLDER) && f.0.ends_with(".qspec"));
        formats.map(|(path, text)| File { path, text, library: OnceLock::new() }).collect()
    })
}

/// Names of all formats, by file.
pub fn names() -> Vec<&'static str> {
    files().iter().flat_map(|f| &f.library().formats).map(|f| f.name.as_str()).collect()
}

/// The format called `name`: one of [`names`], or a family's with its arguments, as `gptq_3_64`.
pub fn get(name: &str) -> Option<&'static Format> {
    // Most files are called like their format.
    let own = |f: &&File| f.path.strip_prefix(FOLDER).and_then(|p| p.strip_suffix(".qspec")) == Some(name);
    let first = files().iter().find(own).and_then(|f| f.library().format(name));
    let named = first.or_else(|| files().iter().find_map(|f| f.library().format(name)));
    named.or_else(|| {
        let (mut family, mut arguments) = (name, VecDeque::new());
        while let Some((rest, last)) = family.rsplit_once('_') {
            arguments.push_front(last.parse().ok().filter(|n: &u64| n.to_string() == last)?);
            family = rest;
            if let Some(format) = instance(family, arguments.make_contiguous()) {
                return Some(format);
            }
        }
        None
    })
}

/// The embedded files, of which one has another text.
struct Extended {
    path: PathBuf,
    text: String,
}

impl Files for Extended {
    fn read(&self, path: &Path) -> io::Result<String> {
        if path == self.path { Ok(self.text.clone()) } else { Embedded.read(path) }
    }
}

/// What `family` is with `arguments`: one of [`names`] if one means the same, and otherwise a format called
/// `FAMILY_ARGUMENT_ARGUMENT…`. Nothing if there is no such family, or none with these arguments.
pub fn instance(family: &str, arguments: &[u64]) -> Option<&'static Format> {
    type Made = BTreeMap<(String, Vec<u64>), Option<&'static Format>>;
    static MADE: Mutex<Made> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *made.entry((family.to_owned(), arguments.to_vec())).or_insert_with(|| {
        let name = arguments.iter().fold(family.to_owned(), |name, a| format!("{name}_{a}"));
        let defines = |f: &&File| f.text.lines().any(|l| l.starts_with(&format!("family {family}(")));
        let file = files().iter().find(defines)?;
        let arguments: Vec<String> = arguments.iter().map(u64::to_string).collect();
        let text = format!("{}\nquantizer {name} = {family}({})\n", file.text, arguments.join(", "));
        let library = load_from(&Extended { path: file.path(), text }, &file.path()).ok()?;
        let format = library.format(&name)?;
        let same = file.library().formats.iter().find(|f| f.hash() == format.hash());
        Some(same.unwrap_or_else(|| Box::leak(Box::new(format.clone()))))
    })
}

/// The text of `specs/formats/imports.toml`: what others' `config.json` calls the formats.
pub fn imports() -> &'static str {
    FILES.iter().find(|f| f.0 == "formats/imports.toml").map_or("", |f| f.1)
}

/// The format whose layout called `layout` has the type number `ty`.
pub fn of_type(layout: &str, ty: u32) -> Option<&'static Format> {
    let has = |f: &&Format| f.layout(layout).is_some_and(|l| l.ty == Some(ty));
    // Only files that write such a number are read.
    let writes =
        |f: &&File| f.text.lines().any(|l| l.trim().strip_prefix("type").is_some_and(|n| n.trim() == ty.to_string()));
    files().iter().filter(writes).find_map(|f| f.library().formats.iter().find(has))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::reader::{Book, Reader};
    use crate::spec::format::Number;
    use crate::spec::{Shape, load_str};

    #[test]
    fn all_files_are_sound_and_formatted_and_their_canonical_text_means_the_same() {
        for f in files() {
            let library = load_from(&Embedded, &f.path()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(library.warnings.to_string(), "");
            let formatted = crate::syntax::format(crate::syntax::FileId(0), f.text).unwrap();
            assert_eq!(formatted, f.text, "{}", f.path);
            assert!(!library.formats.is_empty() && library.quantizers.is_empty(), "{}", f.path);
            for format in &library.formats {
                let text = format.canonical();
                let again = load_str("canonical", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
                assert_eq!(again.formats, std::slice::from_ref(format));
                assert_eq!(again.formats[0].canonical(), text);
                assert_eq!(again.formats[0].hash(), format.hash());
            }
        }
        let mut sorted = names();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), names().len(), "a name twice");
    }

    #[test]
    fn families_have_more_members_than_are_named() {
        let of = |family, arguments: &[u64]| instance(family, arguments).map(|f| f.name.as_str());
        assert_eq!(of("gptq", &[4, 128]), Some("gptq_int4_g128"));
        assert_eq!(of("fp8", &[64, 32]), Some("fp8_64_32"));
        assert_eq!(of("gptq", &[8, 96]), Some("gptq_8_96"), "sizes need be no powers of two");
        assert!(instance("fp8", &[64, 32]).unwrap().layout("deepseek").is_some());
        assert!(std::ptr::eq(instance("fp8", &[64, 32]).unwrap(), instance("fp8", &[64, 32]).unwrap()));
        for (family, arguments) in
            [("fp8", &[0, 1][..]), ("fp8", &[1 << 40, 1]), ("fp8", &[1]), ("q4_0", &[]), ("f", &[])]
        {
            assert_eq!(of(family, arguments), None, "{family} {arguments:?}");
        }
    }

    /// The weights of all of a layout's tensors.
    fn weights(format: &Format, layout: &str, shape: Shape, tensors: &[&[u8]]) -> Vec<f32> {
        let book = Arc::new(Book::new(format.clone()));
        let reader = Reader::new(&book, format.layout(layout).unwrap(), shape).unwrap();
        let sizes: Vec<u64> = reader.tensors().iter().map(|t| t.bytes).collect();
        assert_eq!(sizes, tensors.iter().map(|t| t.len() as u64).collect::<Vec<_>>(), "{}", format.name);
        let cols = shape.cols as usize;
        let mut out = vec![0.0; shape.rows as usize * cols];
        reader.read_rows(tensors, 0, &mut out);
        assert!(reader.is_finite(tensors, 0..shape.rows));
        // Of rows that are read together a few are enough.
        let step = (reader.band() as usize / 2).max(1);
        for (row, out) in (0..).zip(out.chunks_exact(cols)).step_by(step) {
            let mut whole = vec![0.0; cols];
            reader.read(tensors, row, 0, &mut whole);
            assert_eq!(whole, out, "{}", format.name);
            // A part that begins and ends anywhere.
            let mut part = vec![0.0; cols / 2];
            reader.read(tensors, row, cols as u32 / 2 - 3, &mut part);
            assert_eq!(part, out[cols / 2 - 3..][..cols / 2], "{}", format.name);
        }
        out
    }

    #[test]
    fn blocks_hold_what_the_reference_says() {
        let lines = include_str!("../../tests/formats/gguf.txt").lines().filter(|l| !l.starts_with('#'));
        let mut count = 0;
        for line in lines {
            let [name, block, sum] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let format = get(name).unwrap_or_else(|| panic!("there is no {name}"));
            let bytes: Vec<u8> =
                (0..block.len() / 2).map(|i| u8::from_str_radix(&block[2 * i..2 * i + 2], 16).unwrap()).collect();
            let layout = format.layout("gguf").unwrap();
            let columns = (1..).map(|k| 16 * k).find(|c| layout.tensors[0].dims[1].eval_exact(&|_| *c) == Some(1));
            let cols = columns.unwrap() as u32;
            // One row of two blocks, or two rows of one.
            for shape in [Shape { rows: 1, cols: 2 * cols }, Shape { rows: 2, cols }] {
                let mut hash = Sha256::new();
                weights(format, "gguf", shape, &[&bytes]).iter().for_each(|w| hash.update(w.to_le_bytes()));
                let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
                assert_eq!(found, sum, "{name}");
            }
            count += 1;
        }
        assert_eq!(count, 23);
    }

    /// The tensors of `tests/formats/others.txt`: bytes of a generator, and numbers that every type holds exactly.
    fn made(reader: &Reader) -> Vec<Vec<u8>> {
        let mut x = 12345u32;
        let mut byte = || {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
            (x >> 16) as u8
        };
        let mut of = |t: &crate::reader::Stored, codes: bool| -> Vec<u8> {
            let number = |b: u8| (f32::from(b) + 1.0) / 1024.0;
            let count = t.dims.iter().product::<u64>();
            let e4m3 = codes && reader.format().name.starts_with("fp8");
            let e8m0 = !codes && reader.format().name.starts_with("mx");
            let Some(ty) = t.ty else { return (0..t.bytes).map(|_| byte()).collect() };
            match ty {
                Number::F16 => (0..count).flat_map(|_| half::f16::from_f32(number(byte())).to_le_bytes()).collect(),
                Number::Bf16 => (0..count).flat_map(|_| half::bf16::from_f32(number(byte())).to_le_bytes()).collect(),
                Number::F32 => (0..count).flat_map(|_| number(byte()).to_le_bytes()).collect(),
                Number::E4m3 => (0..count).map(|_| byte() % 127).collect(),
                _ if e4m3 => (0..count).map(|_| byte() % 127).collect(),
                _ if e8m0 => (0..count).map(|_| 118 + byte() % 8).collect(),
                _ => (0..t.bytes).map(|_| byte()).collect(),
            }
        };
        reader.tensors().iter().enumerate().map(|(i, t)| of(t, i == 0)).collect()
    }

    #[test]
    fn matrices_hold_what_the_published_definitions_say() {
        let mut count = 0;
        for line in include_str!("../../tests/formats/others.txt").lines().filter(|l| !l.starts_with('#')) {
            let [name, layout, rows, cols, sum] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let format = get(name).unwrap_or_else(|| panic!("there is no {name}"));
            let shape = Shape { rows: rows.parse().unwrap(), cols: cols.parse().unwrap() };
            let book = Arc::new(Book::new(format.clone()));
            let reader = Reader::new(&book, format.layout(layout).unwrap(), shape).unwrap();
            let tensors = made(&reader);
            let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            let mut hash = Sha256::new();
            weights(format, layout, shape, &tensors).iter().for_each(|w| hash.update(w.to_le_bytes()));
            let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(found, sum, "{name}");
            count += 1;
        }
        assert_eq!(count, 76);
    }

    #[test]
    fn types_of_ggufs_are_found() {
        assert_eq!(of_type("gguf", 12).unwrap().name, "q4_k");
        assert_eq!(of_type("gguf", 40).unwrap().name, "nvfp4_gguf");
        assert_eq!(of_type("gguf", 9), None);
        assert_eq!(get("nf4").unwrap().rate(), (4.0, 4.5));
        assert_eq!(get("exl3_mcg_3").unwrap().rate(), (3.0, 3.0));
        assert_eq!(get("qpalette_tcq_3.5").unwrap().rate(), (3.5, 3.5));
    }
}

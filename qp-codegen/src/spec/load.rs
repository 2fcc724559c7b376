//! From files to checked quantizers.

use std::io;
use std::path::{Component, Path, PathBuf};

use super::check::{self, Files, Parsed, Sink};
use super::{Format, Fusion, Quantizer, TableSource};
use crate::palette::Embedded;
use crate::syntax::ast::{Ident, Item, Use};
use crate::syntax::diag::{Diagnostic, Diagnostics, FileId, Severity, Sources, Span, nearest};
use crate::syntax::{diag, parse};
use crate::text_file;
use crate::{formats, palette};

/// What a `.qspec` file defines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Library {
    /// Quantizers in order of definition. Some may be untrained: see [`Quantizer::is_trained`].
    pub quantizers: Vec<Quantizer>,
    /// Formats in order of definition: quantizers that say their `weight`, to be read from others' files.
    pub formats: Vec<Format>,
    /// Fusion patterns in order of definition.
    pub fusions: Vec<Fusion>,
    /// Warnings, with the texts they point into.
    pub warnings: Diagnostics,
    /// Files it was read from: its own, those it uses and the tables that exist.
    pub files: Vec<PathBuf>,
}

impl Library {
    /// The quantizer called `name`.
    pub fn get(&self, name: &str) -> Option<&Quantizer> {
        self.quantizers.iter().find(|q| q.name == name)
    }

    /// The format called `name`.
    pub fn format(&self, name: &str) -> Option<&Format> {
        self.formats.iter().find(|f| f.name == name)
    }

    /// Names of all quantizers and formats.
    pub fn names(&self) -> Vec<&str> {
        let formats = self.formats.iter().map(|f| f.name.as_str());
        self.quantizers.iter().map(|q| q.name.as_str()).chain(formats).collect()
    }

    /// All quantizers, then all formats.
    pub fn definitions(self) -> Vec<Definition> {
        let quantizers = self.quantizers.into_iter().map(Definition::Quantizer);
        quantizers.chain(self.formats.into_iter().map(Definition::Format)).collect()
    }

    /// The fusion pattern called `name`.
    pub fn fusion(&self, name: &str) -> Option<&Fusion> {
        self.fusions.iter().find(|f| f.name == name)
    }
}

/// The files of the disk.
pub struct Disk;

impl Files for Disk {
    fn read(&self, path: &Path) -> io::Result<String> {
        text_file::read(path)
    }
}

/// No files at all.
struct Nothing;

impl Files for Nothing {
    fn read(&self, _: &Path) -> io::Result<String> {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "this text must stand alone, and name no file"))
    }
}

/// Most files that use each other in a row.
const MOST_OPEN: usize = 32;

/// Reads and checks a `.qspec` file, the files it uses and the table files it names. A trained table whose file does
/// not exist yet leaves its quantizer untrained.
///
/// # Errors
/// All that is wrong with the file or the files it uses.
pub fn load_file(path: impl AsRef<Path>) -> Result<Library, Diagnostics> {
    load_from(&Disk, path.as_ref())
}

/// Checks a text. `name` stands in diagnostics; `use` and table files are looked for in the current folder.
///
/// # Errors
/// As [`load_file`].
///
/// ```
/// let text = "quantizer nf {
///     scale row  rotate none  window 2  vector 1  step 2  block 2 x 128  values i8 + 1/2  unit 1/2
///     table t[4] = [-3, -1, 0, 2]
///     decode w { t[w] }
/// }";
/// let library = qp_codegen::spec::load_str("example", text).unwrap();
/// assert_eq!(library.quantizers[0].rate(), 2.0);
/// ```
pub fn load_str(name: &str, text: &str) -> Result<Library, Diagnostics> {
    let mut loader = Loader::new(&Disk);
    loader.parse(name, Path::new(""), text, false);
    loader.finish()
}

/// Checks a text that stands alone, such as a checkpoint's: it may use no file and take no table from one. `name` stands in
/// diagnostics.
///
/// # Errors
/// All that is wrong with the text, files that it names included.
pub fn load_alone(name: &str, text: &str) -> Result<Library, Diagnostics> {
    let mut loader = Loader::new(&Nothing);
    loader.parse(name, Path::new(""), text, false);
    loader.finish()
}

/// The quantizer of a canonical text that was checked when the program was compiled.
///
/// # Panics
/// If the text defines no quantizer: it is for the macros of `qp-macros` only.
#[doc(hidden)]
pub fn from_canonical(text: &str) -> Quantizer {
    let library = load_alone("canonical", text).unwrap_or_else(|e| panic!("{e}"));
    library.quantizers.into_iter().next().expect("a canonical text defines a quantizer")
}

/// As [`load_file`], from other places than a disk.
pub(crate) fn load_from(files: &dyn Files, path: &Path) -> Result<Library, Diagnostics> {
    Loader::of_file(files, path).finish()
}

/// What is known of a file, also where it has errors: for editors.
pub struct Analysis {
    /// Errors and warnings, errors first, with the texts: that of the file, then those of the files that it uses.
    pub found: Diagnostics,
    /// Paths of the texts.
    pub paths: Vec<PathBuf>,
    /// Which of the texts the file uses itself, whose names it knows.
    pub uses: Vec<usize>,
    /// What the file defines without errors.
    pub definitions: Vec<Definition>,
    /// What is known of names.
    pub facts: Vec<Fact>,
}

/// What is known of a name where it is defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The name's place.
    pub at: Span,
    /// A value, or the type of one that is computed from the window.
    pub text: String,
    /// The quantizer for which it holds: a family's constants have another value in each member.
    pub of: String,
}

/// Reads and checks a file of `files` and tells all that is known of it.
pub fn analyse(files: &dyn Files, path: &Path) -> Analysis {
    let mut loader = Loader::of_file(files, path);
    loader.sink.facts = Some(Vec::new());
    let paths = loader.parsed.iter().map(|p| p.path.clone()).collect();
    let uses = loader.parsed.first().map_or(Vec::new(), |p| p.uses.clone());
    let (found, checked) = loader.check();
    let quantizers = checked.quantizers.into_iter().map(Definition::Quantizer);
    let definitions = quantizers.chain(checked.formats.into_iter().map(Definition::Format)).collect();
    Analysis { found, paths, uses, definitions, facts: loader.sink.facts.unwrap_or_default() }
}

struct Loader<'a> {
    files: &'a dyn Files,
    sources: Sources,
    sink: Sink,
    parsed: Vec<Parsed>,
    /// Files being read, with the `use` that leads to the next.
    open: Vec<usize>,
}

impl<'a> Loader<'a> {
    fn new(files: &'a dyn Files) -> Self {
        Loader { files, sources: Sources::default(), sink: Sink::default(), parsed: Vec::new(), open: Vec::new() }
    }

    /// With the file `path` and those that it uses.
    fn of_file(files: &'a dyn Files, path: &Path) -> Self {
        let mut loader = Loader::new(files);
        match files.read(path) {
            Ok(text) => {
                loader.parse(&path.display().to_string(), path, &text, false);
            }
            Err(e) => loader.sink.push(Diagnostic::plain(format!("cannot read {}: {e}", path.display()))),
        }
        loader
    }

    /// Parses a text and the files it uses; its index.
    fn parse(&mut self, name: &str, path: &Path, text: &str, embedded: bool) -> usize {
        let file = self.sources.add(name, text);
        let mut errors = Vec::new();
        let (tree, _) = parse(file, text, &mut errors);
        errors.into_iter().for_each(|e| self.sink.push(e));
        let uses: Vec<Use> = tree
            .items
            .iter()
            .filter_map(|i| match i {
                Item::Use(u) => Some(u.clone()),
                Item::Family(_) | Item::Quantizer(_) | Item::Fusion(_) | Item::Function(_) | Item::Layout(_) => None,
            })
            .collect();
        let index = self.parsed.len();
        self.parsed.push(Parsed { path: path.to_path_buf(), tree, uses: Vec::new(), embedded });
        self.open.push(index);
        let folder = path.parent().unwrap_or(Path::new(""));
        for Use { path, library, .. } in uses {
            let files = match library {
                true => self.library(&path),
                false => vec![self.used(&plain(&folder.join(&path.name)), path.span, embedded)],
            };
            for file in files {
                match file {
                    // Said twice is said.
                    Some(i) if self.parsed[index].uses.contains(&i) => (),
                    Some(i) => self.parsed[index].uses.push(i),
                    None => self.parsed[index].tree.incomplete = true,
                }
            }
        }
        self.open.pop();
        index
    }

    /// The files of a library that is built in.
    fn library(&mut self, name: &Ident) -> Vec<Option<usize>> {
        let files: Vec<&str> = match name.name.as_str() {
            "std" => vec!["library/std.qspec"],
            "palette" => palette::files().map(|f| f.0).collect(),
            other => {
                let d = Diagnostic::error(name.span, format!("there is no library `{other}`"), "");
                let d =
                    d.hint("there is `std`, what several formats share, and `palette`; a file is `use \"file.qspec\"`");
                return vec![self.sink.fail(d)];
            }
        };
        files.into_iter().map(|f| self.used(&Path::new("specs").join(f), name.span, true)).collect()
    }

    fn used(&mut self, path: &Path, span: Span, embedded: bool) -> Option<usize> {
        if let Some(i) = self.parsed.iter().position(|p| p.embedded == embedded && plain(&p.path) == path) {
            if self.open.contains(&i) {
                let d = Diagnostic::error(span, "a file cannot use itself", "this leads back to where it is used");
                return self.sink.fail(d.hint("move what both need to a file of its own"));
            }
            return Some(i);
        }
        if self.open.len() >= MOST_OPEN {
            let d = Diagnostic::error(span, format!("more than {MOST_OPEN} files use each other in a row"), "");
            return self.sink.fail(d.hint("let one file use the others"));
        }
        let files: &dyn Files = if embedded { &Embedded } else { self.files };
        match files.read(path) {
            Ok(text) => Some(self.parse(&path.display().to_string(), path, &text, embedded)),
            Err(e) => {
                let d = Diagnostic::error(span, format!("cannot read {}: {e}", path.display()), "");
                self.sink.fail(d.hint("the path is relative to the folder of this file"))
            }
        }
    }

    /// Checks what was parsed. Diagnostics are in the order of the text, errors first: what was found at parsing came before
    /// all else.
    fn check(&mut self) -> (Diagnostics, check::Found) {
        let checked = match self.parsed.is_empty() {
            true => Default::default(),
            false => check::library(&self.parsed, 0, self.files, &mut self.sink),
        };
        let (sources, list) = (std::mem::take(&mut self.sources), std::mem::take(&mut self.sink.list));
        let mut found = Diagnostics { sources, list };
        found.list.sort_by_key(|d| (d.severity, d.labels.first().map(|l| l.0)));
        diag::limit(&mut found.list);
        (found, checked)
    }

    fn finish(mut self) -> Result<Library, Diagnostics> {
        let (mut found, check::Found { quantizers, formats, fusions }) = self.check();
        if found.has_errors() {
            return Err(found);
        }
        if self.parsed.first().is_some_and(|root| root.tree.items.is_empty()) {
            let d = Diagnostic::plain(format!("{} defines nothing", found.sources.name(FileId(0))));
            let d = d.hint("a file holds `quantizer name { … }`, families, fusion patterns and `use`");
            found.list.push(Diagnostic { severity: Severity::Warning, ..d });
        }
        let (embedded, own): (Vec<_>, Vec<_>) =
            self.parsed.into_iter().map(|p| (p.embedded, p.path)).partition(|p| p.0);
        let built_in =
            |file: &Path| embedded.iter().any(|(_, p)| p.parent().is_some_and(|folder| file.starts_with(folder)));
        let mut files: Vec<PathBuf> = own.into_iter().map(|p| p.1).collect();
        files.retain(|f| !f.as_os_str().is_empty());
        for t in quantizers.iter().flat_map(|q| &q.codes).flat_map(|c| &c.tables).filter(|t| !t.values.is_empty()) {
            match &t.source {
                TableSource::File(file) | TableSource::Trained { file, .. }
                    if !files.contains(file) && !built_in(file) =>
                {
                    files.push(file.clone());
                }
                TableSource::File(_) | TableSource::Trained { .. } | TableSource::Inline => (),
            }
        }
        Ok(Library { quantizers, formats, fusions, warnings: found, files })
    }
}

/// `path` without `.` and, where possible, `..`.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for c in path.components() {
        match c {
            Component::CurDir => (),
            Component::ParentDir if matches!(out.components().next_back(), Some(Component::Normal(_))) => {
                out.pop();
            }
            Component::ParentDir | Component::Normal(_) | Component::RootDir | Component::Prefix(_) => out.push(c),
        }
    }
    out
}

/// The trained quantizer that a command line names: `tcq_2.5` (of the palette), `path/file.qspec` (which defines one,
/// or one called `file`), `path/file.qspec:member`, or `path/member.qspec` where no such file exists but a `.qspec`
/// file of that folder, or the palette, defines `member`.
///
/// # Errors
/// If nothing or more than one thing is meant, if its file has errors, or if it is untrained.
pub fn resolve(arg: &str) -> Result<Quantizer, Diagnostics> {
    let q = resolve_untrained(arg)?;
    match untrained(&q, arg) {
        None => Ok(q),
        Some(d) => Err(Diagnostics { list: vec![d], ..Diagnostics::default() }),
    }
}

/// The quantizers that command line arguments name, where several may be named: as [`resolve`], but a file means all that it
/// defines.
///
/// # Errors
/// If an argument means nothing, its file has errors, or one of them is untrained.
pub fn resolve_all(args: &[String]) -> Result<Vec<Quantizer>, Diagnostics> {
    let all = resolve_all_untrained(args)?;
    let untrained = all.iter().find_map(|(q, arg)| untrained(q, &member(arg, &q.name)));
    match untrained {
        None => Ok(all.into_iter().map(|(q, _)| q).collect()),
        Some(d) => Err(Diagnostics { list: vec![d], ..Diagnostics::default() }),
    }
}

/// As [`resolve_all`], but they may be untrained; each with the argument that means it.
///
/// # Errors
/// As [`resolve_all`].
pub fn resolve_all_untrained(args: &[String]) -> Result<Vec<(Quantizer, &String)>, Diagnostics> {
    let mut out = Vec::new();
    for arg in args {
        let of_file =
            if arg.ends_with(".qspec") && Path::new(arg).exists() { load_file(arg)?.quantizers } else { vec![] };
        let found = if of_file.is_empty() { vec![resolve_untrained(arg)?] } else { of_file };
        out.extend(found.into_iter().map(|q| (q, arg)));
    }
    Ok(out)
}

/// What command line arguments name, where several may be named: as [`resolve_any`], but a file means all that it defines.
/// Each with what a command line calls it alone.
///
/// # Errors
/// If an argument means nothing, or its file has errors.
pub fn resolve_each(args: &[String]) -> Result<Vec<(Definition, String)>, Diagnostics> {
    let mut out = Vec::new();
    for arg in args {
        let of_file = match arg.ends_with(".qspec") && Path::new(arg).exists() {
            true => load_file(arg)?.definitions(),
            false => Vec::new(),
        };
        match of_file.is_empty() {
            true => out.push((resolve_any(arg)?, arg.clone())),
            false => out.extend(of_file.into_iter().map(|d| {
                let name = member(arg, d.name());
                (d, name)
            })),
        }
    }
    Ok(out)
}

/// What a command line calls the definition `name` that `arg` means.
fn member(arg: &str, name: &str) -> String {
    if arg.ends_with(".qspec") { format!("{arg}:{name}") } else { arg.to_owned() }
}

/// A quantizer or a format.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a file defines few")]
pub enum Definition {
    /// A quantizer, perhaps untrained.
    Quantizer(Quantizer),
    /// A format.
    Format(Format),
}

impl Definition {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Definition::Quantizer(q) => &q.name,
            Definition::Format(f) => &f.name,
        }
    }
}

/// As [`resolve_untrained`], formats included: those of a file, and those built in by name (`q4_k`).
///
/// # Errors
/// As [`resolve`].
pub fn resolve_any(arg: &str) -> Result<Definition, Diagnostics> {
    if let Some(f) = format_of(arg)? {
        return Ok(Definition::Format(f));
    }
    resolve_untrained(arg).map(Definition::Quantizer).map_err(|e| {
        // A slip in the name of a format.
        let is_name = !arg.contains(['/', '\\', ':']) && !arg.ends_with(".qspec") && !Path::new(arg).exists();
        match nearest(arg, palette::names().into_iter().chain(formats::names())).filter(|_| is_name) {
            Some(near) => {
                let d = Diagnostic::plain(format!("there is no quantizer or format `{arg}`"));
                Diagnostics { list: vec![d.hint(format!("did you mean `{near}`?"))], ..Diagnostics::default() }
            }
            None => e,
        }
    })
}

/// The format that a command line names, if it names one.
fn format_of(arg: &str) -> Result<Option<Format>, Diagnostics> {
    let (file, member) = match arg.rsplit_once(':').filter(|(file, _)| file.ends_with(".qspec")) {
        Some((file, member)) => (file, member),
        None => match arg.strip_suffix(".qspec") {
            Some(stem) => (arg, stem.rsplit(['/', '\\']).next().unwrap_or(stem)),
            None if palette::get(arg).is_some() => return Ok(None),
            None => return Ok(formats::get(arg).cloned()),
        },
    };
    if !Path::new(file).exists() {
        return Ok(None);
    }
    let library = load_file(file)?;
    Ok(match (library.format(member), &library.formats[..], &library.quantizers[..]) {
        (Some(f), ..) => Some(f.clone()),
        (None, [f], []) if file == arg => Some(f.clone()),
        _ => None,
    })
}

/// As [`resolve`], but the quantizer may be untrained.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_untrained(arg: &str) -> Result<Quantizer, Diagnostics> {
    if let Some(f) = format_of(arg)? {
        let d = Diagnostic::plain(format!("`{}` is a format, and a quantizer of blocks is needed here", f.name));
        let d = d.hint(
            "`qp quantize`, `qp plan` and `qp bench distortion` take formats; `qp-codegen list` shows the palette",
        );
        return Err(Diagnostics { list: vec![d], ..Diagnostics::default() });
    }
    if let Some((file, member)) = arg.rsplit_once(':').filter(|(file, _)| file.ends_with(".qspec")) {
        let library = load_file(file)?;
        let q = library.get(member).cloned();
        return q.ok_or_else(|| no_quantizer(member, &format!(" in {file}"), &library.names()));
    }
    let Some(stem) = arg.strip_suffix(".qspec") else {
        return palette::get(arg).ok_or_else(|| {
            let mut all = no_quantizer(arg, " in the palette", &palette::names());
            if Path::new(arg).exists() {
                all.list[0].hint = Some("a file of quantizers is called `….qspec`".into());
            }
            all
        });
    };
    let path = Path::new(arg);
    let member = stem.rsplit(['/', '\\']).next().unwrap_or(stem);
    if path.exists() {
        let library = load_file(path)?;
        let names = library.names();
        return match (library.get(member), &library.quantizers[..]) {
            (Some(q), _) => Ok(q.clone()),
            (None, [q]) => Ok(q.clone()),
            (None, _) if names.is_empty() => Err(Diagnostics::plain(format!("{arg} defines no quantizer"))),
            (None, _) => {
                let d = Diagnostic::plain(format!("{arg} defines {} quantizers", names.len()));
                let d = d.hint(format!("name one, as in `{arg}:{}`; there is {}", names[0], names.join(", ")));
                Err(Diagnostics { list: vec![d], ..Diagnostics::default() })
            }
        };
    }
    for file in beside(path) {
        // A file with errors hides what it defines; that is told only if nothing else fits.
        if let Ok(library) = load_file(&file)
            && let Some(q) = library.get(member)
        {
            return Ok(q.clone());
        }
    }
    palette::get(member).ok_or_else(|| {
        let mut all = no_quantizer(member, " in the palette", &palette::names());
        all.list[0].message =
            format!("there is no file {arg}, and no quantizer `{member}` beside it or in the palette");
        all
    })
}

/// The fusion pattern that a command line names: of the palette, or `path/file.qspec:name`.
///
/// # Errors
/// If there is none, or its file has errors.
pub fn resolve_fusion(arg: &str) -> Result<Fusion, Diagnostics> {
    let loaded;
    let (library, name, place) = match arg.rsplit_once(':').filter(|(file, _)| file.ends_with(".qspec")) {
        Some((file, name)) => {
            loaded = load_file(file)?;
            (&loaded, name, format!(" in {file}"))
        }
        None => (palette::library(), arg, " in the palette".to_string()),
    };
    library.fusion(name).cloned().ok_or_else(|| {
        let d = Diagnostic::plain(format!("there is no fusion pattern `{name}`{place}"));
        let names: Vec<&str> = library.fusions.iter().map(|f| f.name.as_str()).collect();
        let d = if names.is_empty() { d } else { d.hint(format!("there is {}", names.join(", "))) };
        Diagnostics { list: vec![d], ..Diagnostics::default() }
    })
}

/// The error that `q`, which a command line would call `arg`, has no table yet, if so.
pub fn untrained(q: &Quantizer, arg: &str) -> Option<Diagnostic> {
    let table = q.codes.iter().flat_map(|c| &c.tables).find(|t| t.values.is_empty())?;
    let file = match &table.source {
        TableSource::Trained { file, .. } | TableSource::File(file) => format!(": there is no {}", file.display()),
        TableSource::Inline => String::new(),
    };
    let d = Diagnostic::plain(format!("the table `{}` of `{}` is not trained yet{file}", table.name, q.name));
    Some(d.hint(format!("run: qp train-codebook {arg}")))
}

fn no_quantizer(name: &str, place: &str, names: &[&str]) -> Diagnostics {
    let d = Diagnostic::plain(format!("there is no quantizer `{name}`{place}"));
    let d = match nearest(name, names.iter().copied()) {
        Some(near) => d.hint(format!("did you mean `{near}`?")),
        None if names.is_empty() => d,
        None => d.hint(format!("there is {}", names.join(", "))),
    };
    Diagnostics { list: vec![d], ..Diagnostics::default() }
}

/// The `.qspec` files in the folder of `path`, sorted.
fn beside(path: &Path) -> Vec<PathBuf> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.extension().is_some_and(|x| x == "qspec")).collect();
    files.sort();
    files
}

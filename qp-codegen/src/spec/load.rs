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

    /// The quantizer or the format called `name`.
    pub fn definition(&self, name: &str) -> Option<Definition> {
        let quantizer = self.get(name).cloned().map(Definition::Quantizer);
        quantizer.or_else(|| self.format(name).cloned().map(Definition::Format))
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
/// file of that folder defines `member`. A file that does not exist means the palette's only as [`file_of_palette`] says.
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

/// What a command line names, perhaps untrained: as [`resolve`], formats included.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_any(arg: &str) -> Result<Definition, Diagnostics> {
    resolve_in(Path::new(""), arg)
}

/// As [`resolve_any`], where files are named relative to `folder`.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_in(folder: &Path, arg: &str) -> Result<Definition, Diagnostics> {
    if let Some((file, member)) = arg.rsplit_once(':').filter(|(file, _)| file.ends_with(".qspec")) {
        let library = load_file(folder.join(file))?;
        let found = library.definition(member);
        return found.ok_or_else(|| nothing_called(member, &format!(" in {file}"), &library.names()));
    }
    if !arg.ends_with(".qspec") {
        return built_in(arg).ok_or_else(|| {
            let known: Vec<&str> = palette::names().into_iter().chain(formats::names()).collect();
            let mut all = nothing_called(arg, "", &known);
            let d = &mut all.list[0];
            if folder.join(arg).exists() {
                d.hint = Some("a file of quantizers is called `….qspec`".into());
            } else if nearest(arg, known).is_none() {
                d.hint = Some("`qp-codegen list` shows the palette and the formats".into());
            }
            all
        });
    }
    let path = folder.join(arg);
    let member = path.file_stem().map_or(String::new(), |stem| stem.to_string_lossy().into_owned());
    if path.exists() {
        let library = load_file(&path)?;
        return match (library.definition(&member), &library.quantizers[..], &library.formats[..]) {
            (Some(found), ..) => Ok(found),
            (None, [q], _) => Ok(Definition::Quantizer(q.clone())),
            (None, [], [f]) => Ok(Definition::Format(f.clone())),
            (None, [], []) => Err(Diagnostics::plain(format!("{arg} defines no quantizer"))),
            (None, ..) => {
                let names = library.names();
                let d = Diagnostic::plain(format!("{arg} defines {} quantizers", names.len()));
                let d = d.hint(format!("name one, as in `{arg}:{}`; there is {}", names[0], names.join(", ")));
                Err(Diagnostics { list: vec![d], ..Diagnostics::default() })
            }
        };
    }
    let beside = beside(&path);
    for file in &beside {
        // A file with errors hides what it defines; that is told only if nothing else fits.
        if let Ok(library) = load_file(file)
            && let Some(found) = library.definition(&member)
        {
            return Ok(found);
        }
    }
    file_of_palette(arg).and_then(built_in).ok_or_else(|| {
        let d = Diagnostic::plain(format!("cannot read {}: there is no such file", path.display()));
        let files: Vec<String> = beside.iter().filter_map(|f| Some(f.file_name()?.to_str()?.to_owned())).collect();
        let d = match nearest(&format!("{member}.qspec"), files.iter().map(String::as_str)) {
            Some(file) => d.hint(format!("did you mean `{}`?", path.with_file_name(file).display())),
            None => match nearest(&member, palette::names().into_iter().chain(formats::names())) {
                Some(name) => d.hint(format!("what is built in is named without a folder: `{name}`")),
                None => d,
            },
        };
        Diagnostics { list: vec![d], ..Diagnostics::default() }
    })
}

/// The quantizer of the palette, or the format, that is called `name`.
fn built_in(name: &str) -> Option<Definition> {
    palette::get(name).map(Definition::Quantizer).or_else(|| formats::get(name).cloned().map(Definition::Format))
}

/// The name that `arg` means if there is no such file: `NAME.qspec`, or where the project keeps it, `specs/NAME.qspec` and
/// `specs/formats/NAME.qspec`. Any other path means a file that must be there.
pub fn file_of_palette(arg: &str) -> Option<&str> {
    let name = arg.strip_suffix(".qspec")?;
    let name = name.strip_prefix("specs/").map_or(name, |inside| inside.strip_prefix("formats/").unwrap_or(inside));
    (!name.contains(['/', '\\', ':'])).then_some(name)
}

/// As [`resolve`], but the quantizer may be untrained.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_untrained(arg: &str) -> Result<Quantizer, Diagnostics> {
    match resolve_any(arg)? {
        Definition::Quantizer(q) => Ok(q),
        Definition::Format(f) => {
            let d = Diagnostic::plain(format!("`{}` is a format, and a quantizer of blocks is needed here", f.name));
            let d = d.hint(
                "`qp quantize`, `qp plan` and `qp bench distortion` take formats; `qp-codegen list` shows the palette",
            );
            Err(Diagnostics { list: vec![d], ..Diagnostics::default() })
        }
    }
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

fn nothing_called(name: &str, place: &str, names: &[&str]) -> Diagnostics {
    let d = Diagnostic::plain(format!("there is no quantizer or format `{name}`{place}"));
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

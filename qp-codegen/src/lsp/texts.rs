//! Texts that are open in an editor, and what is known of them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use lsp_types::{
    Diagnostic, DiagnosticRelatedInformation, DiagnosticSeverity, Location, NumberOrString, Range, TextEdit, Uri,
};
use qp_codegen::spec::{self, Analysis, Definition, Disk, Files};
use qp_codegen::syntax::{self, FileId, Severity, Span};

use super::names::{Kind, Name, Names};
use super::position::{Lines, uri_of};

/// A text of an editor.
pub struct Text {
    pub uri: Uri,
    pub version: Option<i32>,
    pub text: String,
}

/// All texts of the editor, by path.
#[derive(Default)]
pub struct Texts {
    pub open: BTreeMap<PathBuf, Text>,
}

/// Texts of the editor hide files of the disk.
impl Files for Texts {
    fn read(&self, path: &Path) -> io::Result<String> {
        match self.open.get(&plain(path)) {
            Some(text) => Ok(text.text.clone()),
            None => Disk.read(path),
        }
    }
}

/// `path` without `.` and, where possible, `..`.
pub fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for c in path.components() {
        match c {
            Component::CurDir => (),
            Component::ParentDir if out.file_name().is_some() => {
                out.pop();
            }
            _ => out.push(c),
        }
    }
    out
}

/// A file of a checked text: its own, or one that it uses.
pub struct File {
    pub path: PathBuf,
    pub text: String,
    pub lines: Lines,
    pub names: Names,
}

/// What is known of a text.
pub struct Checked {
    /// Its own file first.
    pub files: Vec<File>,
    analysis: Analysis,
}

/// A diagnostic in the editor's form, and what cures it.
pub struct Problem {
    pub shown: Diagnostic,
    pub cure: Option<(String, TextEdit)>,
}

impl Checked {
    /// Checks the text at `path`.
    pub fn new(texts: &Texts, path: &Path) -> Self {
        let analysis = spec::analyse(texts, path);
        let file = |(i, path): (usize, &PathBuf)| {
            let text = analysis.found.sources.text(FileId(i as u32)).to_string();
            let (lines, names) = (Lines::new(&text), Names::new(&text));
            File { path: path.clone(), text, lines, names }
        };
        let files = analysis.paths.iter().enumerate().map(file).collect();
        Checked { files, analysis }
    }

    /// The text's own file; there is none if it cannot be read.
    pub fn file(&self) -> Option<&File> {
        self.files.first()
    }

    /// Where a span lies.
    fn location(&self, span: Span) -> Option<Location> {
        let file = self.files.get(span.file.0 as usize)?;
        Some(Location { uri: uri_of(&file.path)?, range: file.lines.range(&file.text, span.range()) })
    }

    /// All that is wrong, in places of this text: what is wrong with a file that it uses is told where that is used.
    pub fn problems(&self) -> Vec<Problem> {
        let Some(own) = self.file() else { return Vec::new() };
        let mut out = Vec::new();
        for d in &self.analysis.found.list {
            let severity = match d.severity {
                Severity::Error => DiagnosticSeverity::ERROR,
                Severity::Warning => DiagnosticSeverity::WARNING,
            };
            let mut message = d.message.clone();
            if let Some(hint) = &d.hint {
                message.push_str(&format!("\n{hint}"));
            }
            let at = d.labels.first().map(|l| l.0);
            let mut others = d.labels.get(1..).unwrap_or(&[]).to_vec();
            let range = match at {
                Some(span) if span.file == FileId(0) => own.lines.range(&own.text, span.range()),
                Some(span) => {
                    others.insert(0, (span, "here".into()));
                    self.use_of(own, span.file)
                }
                None => Range::default(),
            };
            let related = others.iter().filter_map(|(span, text)| {
                let message = if text.is_empty() { "here".to_string() } else { text.clone() };
                Some(DiagnosticRelatedInformation { location: self.location(*span)?, message })
            });
            let cure = d.replace.as_ref().filter(|r| r.0.file == FileId(0)).map(|(span, text)| {
                let title = if text.is_empty() { "Take it out".to_string() } else { format!("Write `{text}`") };
                (title, TextEdit { range: own.lines.range(&own.text, span.range()), new_text: text.clone() })
            });
            let shown = Diagnostic {
                range,
                severity: Some(severity),
                code: None::<NumberOrString>,
                source: Some("qspec".into()),
                message,
                related_information: Some(related.collect()),
                ..Diagnostic::default()
            };
            out.push(Problem { shown, cure });
        }
        out
    }

    /// The path in this text's first `use` that leads to a file.
    fn use_of(&self, own: &File, file: FileId) -> Range {
        let path = self.files.get(file.0 as usize).map(|f| plain(&f.path));
        let tokens = &own.names.lexed.tokens;
        let uses = tokens.windows(2).filter(|t| t[0].first_on_line && &own.text[t[0].span.range()] == "use");
        let found = uses.map(|t| t[1].span).find(|s| self.used(own, *s).map(|p| plain(&p)) == path);
        // A file that a used file uses is told at the first `use`.
        let first = || tokens.first().map(|t| t.span);
        found.or_else(first).map_or(Range::default(), |s| own.lines.range(&own.text, s.range()))
    }

    /// The file that a string names.
    pub fn used(&self, own: &File, string: Span) -> Option<PathBuf> {
        let text = own.text.get(string.range())?.trim_matches('"');
        Some(own.path.parent()?.join(text))
    }

    /// Items called `name` of this file and those that it uses.
    pub fn items(&self, name: &str) -> impl Iterator<Item = (&File, &Name)> {
        self.visible().into_iter().flat_map(|f| f.names.items().map(move |n| (f, n))).filter(move |n| n.1.name == name)
    }

    /// The file, then those that it uses itself.
    pub fn visible(&self) -> Vec<&File> {
        let used = self.analysis.uses.iter().filter_map(|i| self.files.get(*i));
        self.file().into_iter().chain(used).collect()
    }

    /// The definitions whose body the item `item` has: itself, or the members of a family.
    pub fn made_by(&self, file: &File, item: &Name) -> Vec<&Definition> {
        let is_member = |name: &str| {
            let find = self.items(name).find(|(_, n)| n.kind == Kind::Quantizer);
            find.is_some_and(|(f, n)| f.text[n.line.clone()].contains(&format!("{}(", item.name)))
        };
        self.analysis
            .definitions
            .iter()
            .filter(|d| {
                let name = match d {
                    Definition::Quantizer(q) => &q.name,
                    Definition::Format(f) => &f.name,
                };
                match item.kind {
                    Kind::Family => is_member(name),
                    _ => *name == item.name && self.files.first().is_some_and(|own| std::ptr::eq(own, file)),
                }
            })
            .collect()
    }

    /// Values of the name whose bytes begin at `at` of a file: each with the quantizers that have it.
    pub fn values(&self, file: &File, at: usize) -> Vec<(String, Vec<String>)> {
        let mut out: Vec<(String, Vec<String>)> = Vec::new();
        let number = self.files.iter().position(|f| std::ptr::eq(f, file));
        let here = |s: Span| Some(s.file.0 as usize) == number && s.start as usize == at;
        for fact in self.analysis.facts.iter().filter(|f| here(f.at)) {
            match out.iter_mut().find(|v| v.0 == fact.text) {
                Some((_, of)) if !of.contains(&fact.of) => of.push(fact.of.clone()),
                Some(_) => (),
                None => out.push((fact.text.clone(), vec![fact.of.clone()])),
            }
        }
        out
    }

    /// The text laid out anew, if it is not already.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn formatted(&self) -> Result<Option<TextEdit>, String> {
        let Some(own) = self.file() else { return Err("the file cannot be read".into()) };
        let new_text = syntax::format(FileId(0), &own.text)
            .map_err(|errors| errors.into_iter().next().map_or_else(|| "it has errors".to_string(), |d| d.message))?;
        let range = own.lines.range(&own.text, 0..own.text.len());
        Ok((new_text != own.text).then_some(TextEdit { range, new_text }))
    }
}

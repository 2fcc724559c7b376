//! Diagnostics: what is wrong, where, and what cures it. The one place that knows how they are shown.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use super::lexer::LINE_ENDS;

/// Index of a file in [`Sources`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A range of bytes in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// The file.
    pub file: FileId,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// The smallest span that holds both (of one file).
    pub fn to(self, other: Span) -> Span {
        Span { file: self.file, start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// The span as a byte range.
    pub fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// The texts that spans point into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    files: Vec<(String, String)>,
}

impl Sources {
    /// Adds a file by its name (as shown to the user) and text.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> FileId {
        self.files.push((name.into(), text.into()));
        FileId(self.files.len() as u32 - 1)
    }

    /// Name of a file.
    pub fn name(&self, file: FileId) -> &str {
        self.files.get(file.0 as usize).map_or("", |f| &f.0)
    }

    /// Text of a file.
    pub fn text(&self, file: FileId) -> &str {
        self.files.get(file.0 as usize).map_or("", |f| &f.1)
    }

    /// Line and column (from 1, in characters) of the start of a span.
    pub fn line_column(&self, span: Span) -> (usize, usize) {
        let text = self.text(span.file);
        let before = text.get(..span.start as usize).unwrap_or(text);
        let line = before.rsplit(LINE_ENDS).next().unwrap_or("");
        // A return and a line feed are one end.
        let ends = before.matches(LINE_ENDS).count() - before.matches("\r\n").count();
        (ends + 1, line.chars().count() + 1)
    }
}

/// How grave a diagnostic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The file has no meaning.
    Error,
    /// The file has a meaning, perhaps not the one that was wanted.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// What is wrong, in one sentence without a full stop.
    pub message: String,
    /// Where, and what is there. The first label is the place; without one the diagnostic is about no text.
    pub labels: Vec<(Span, String)>,
    /// What cures it.
    pub hint: Option<String>,
    /// A text that cures it, and what it takes the place of: what an editor can do by itself.
    pub replace: Option<(Span, String)>,
}

impl Diagnostic {
    /// An error at `span`, underlined with `label`.
    pub fn error(span: Span, message: impl Into<String>, label: impl Into<String>) -> Self {
        Diagnostic {
            severity: Severity::Error,
            message: message.into(),
            labels: vec![(span, label.into())],
            hint: None,
            replace: None,
        }
    }

    /// A warning at `span`, underlined with `label`.
    pub fn warning(span: Span, message: impl Into<String>, label: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Warning, ..Self::error(span, message, label) }
    }

    /// An error about no place in a text (a missing file, a wrong name on the command line).
    pub fn plain(message: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Error, message: message.into(), labels: Vec::new(), hint: None, replace: None }
    }

    /// Adds what cures it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a text that cures it, in place of what stands at `span`.
    pub fn replace(mut self, span: Span, text: impl Into<String>) -> Self {
        self.replace = Some((span, text.into()));
        self
    }

    /// Adds that `near` was meant where the first label is.
    pub fn meant(self, near: &str) -> Self {
        let at = self.labels.first().map(|l| l.0);
        let d = self.hint(format!("did you mean `{near}`?"));
        match at {
            Some(at) => d.replace(at, near),
            None => d,
        }
    }

    /// Adds a further place.
    pub fn label(mut self, span: Span, label: impl Into<String>) -> Self {
        self.labels.push((span, label.into()));
        self
    }
}

/// Most diagnostics that are shown: who corrects so many runs the checker again.
const MOST: usize = 32;

/// Keeps the first [`MOST`] diagnostics of an ordered list, and says how many more there are.
pub fn limit(list: &mut Vec<Diagnostic>) {
    if list.len() > MOST {
        let more = list.len() - MOST;
        let severity = list[MOST].severity;
        list.truncate(MOST);
        let d = Diagnostic::plain(format!("and {more} more of them, which are not shown"));
        list.push(Diagnostic { severity, ..d });
    }
}

/// True for characters that could steer a terminal or hide what is written: controls, and marks that turn the direction of
/// writing.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` as it may be shown on a terminal: what steers it is escaped, as in `\u{1b}`, but for line ends and tabs.
pub fn shown(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| steers(c) && !matches!(c, '\n' | '\t');
    if !text.contains(hidden) {
        return text.into();
    }
    let escape = |c: char| if hidden(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect::<String>().into()
}

/// The same of a source, whose every byte keeps its place.
fn shown_in_place(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| steers(c) && !matches!(c, '\n' | '\r' | '\t');
    if !text.contains(hidden) {
        return text.into();
    }
    let replace = |c: char| match (hidden(c), c.len_utf8()) {
        (false, _) => c,
        (true, 1) => '?',
        (true, 2) => '\u{bf}',
        (true, _) => char::REPLACEMENT_CHARACTER,
    };
    text.chars().map(replace).collect::<String>().into()
}

/// Several diagnostics with the texts they point into.
///
/// `Display` gives one line each, `file:line:column: error: message; hint`; [`Diagnostics::render`] shows the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// The texts.
    pub sources: Sources,
    /// In order of discovery.
    pub list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// A single error about no place in a text.
    pub fn plain(message: impl Into<String>) -> Self {
        Diagnostics { sources: Sources::default(), list: vec![Diagnostic::plain(message)] }
    }

    /// Adds a diagnostic.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.list.push(diagnostic);
    }

    /// True if any is an error.
    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|d| d.severity == Severity::Error)
    }

    /// Number of errors and of warnings.
    pub fn counts(&self) -> (usize, usize) {
        let errors = self.list.iter().filter(|d| d.severity == Severity::Error).count();
        (errors, self.list.len() - errors)
    }

    /// The diagnostics with source excerpts, underlines and hints; with `color` for a terminal.
    pub fn render(&self, color: bool) -> String {
        use ariadne::{Color, Config, IndexType, Label, Report, ReportKind};
        let mut out = Vec::new();
        let mut cache = ariadne::sources(
            self.sources.files.iter().enumerate().map(|(i, (_, text))| (self.display_name(i), shown_in_place(text))),
        );
        for d in &self.list {
            let (kind, shade) = match d.severity {
                Severity::Error => (ReportKind::Error, Color::Red),
                Severity::Warning => (ReportKind::Warning, Color::Yellow),
            };
            let Some((place, _)) = d.labels.first() else {
                out.extend_from_slice(format!("{}\n", Line(self, d)).as_bytes());
                continue;
            };
            let at = |s: &Span| (self.display_name(s.file.0 as usize), s.range());
            let config = Config::default().with_color(color).with_index_type(IndexType::Byte);
            let mut report = Report::build(kind, at(place)).with_config(config).with_message(shown(&d.message));
            // In the order of the text, or ariadne shows the file twice.
            let mut labels: Vec<_> = d.labels.iter().enumerate().collect();
            labels.sort_by_key(|(_, (span, _))| (span.file != place.file, *span));
            for (rank, (i, (span, text))) in labels.into_iter().enumerate() {
                let color = if i == 0 { shade } else { Color::Blue };
                let label = Label::new(at(span)).with_color(color).with_order(rank as i32);
                // Without a message a label is not underlined.
                report =
                    report.with_label(label.with_message(if text.is_empty() { "here".into() } else { shown(text) }));
            }
            if let Some(hint) = &d.hint {
                report = report.with_help(shown(hint));
            }
            // Writing to memory fails only if a span is outside its text; then the plain line must do.
            let before = out.len();
            if report.finish().write(&mut cache, &mut out).is_err() {
                out.truncate(before);
                out.extend_from_slice(format!("{}\n", Line(self, d)).as_bytes());
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Two files may have one name; ariadne finds texts by name.
    fn display_name(&self, i: usize) -> String {
        let name = &self.sources.files[i].0;
        let earlier = self.sources.files[..i].iter().filter(|f| f.0 == *name).count();
        let name = shown(name);
        if earlier == 0 { name.into_owned() } else { format!("{name} ({})", earlier + 1) }
    }
}

/// One diagnostic on one line.
struct Line<'a>(&'a Diagnostics, &'a Diagnostic);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line(all, d) = self;
        if let Some((span, _)) = d.labels.first() {
            let (line, column) = all.sources.line_column(*span);
            write!(f, "{}:{line}:{column}: ", shown(all.sources.name(span.file)))?;
        }
        f.write_str(match d.severity {
            Severity::Error => "error: ",
            Severity::Warning => "warning: ",
        })?;
        f.write_str(&shown(&d.message))?;
        if let Some(hint) = &d.hint {
            write!(f, "; {}", shown(hint))?;
        }
        Ok(())
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.list.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}", Line(self, d))?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// The candidate nearest to `name`, if near enough to be what was meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = name.chars().count();
    let limit = if length < 3 { 0 } else { (length / 3).max(1) };
    let best = candidates.into_iter().map(|c| (distance(name, c), c)).min_by_key(|(d, _)| *d)?;
    (best.0 <= limit).then_some(best.1)
}

/// Edits (insert, delete, replace, swap neighbours) from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut d = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            d[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replace = d[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut best = replace.min(d[i - 1][j] + 1).min(d[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(d[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    d[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_slips_and_refuses_strangers() {
        let names = ["window", "vector", "step", "block"];
        assert_eq!(nearest("widnow", names), Some("window"));
        assert_eq!(nearest("vectr", names), Some("vector"));
        assert_eq!(nearest("table", names), None);
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_shown() {
        let mut d = Diagnostics::default();
        let text = "a \x1b[31m\u{9b}\u{202e}z \x07\0 bad\n";
        let file = d.sources.add("\x1b]0;name\x07.qspec", text);
        let at = text.find("bad").unwrap() as u32;
        d.push(Diagnostic::error(Span { file, start: at, end: at + 3 }, "no \x1b[2J", "\x1b[1m").hint("\u{202e}"));
        for shown in [d.render(false), d.to_string()] {
            assert!(!shown.contains(|c| steers(c) && c != '\n'), "{shown:?}");
            assert!(shown.contains(":1:15") && shown.contains("\\u{1b}[2J"), "{shown}");
        }
    }

    #[test]
    fn few_of_many_are_shown() {
        let mut list = vec![Diagnostic::error(Span::default(), "it", ""); 1000];
        limit(&mut list);
        assert_eq!(list.len(), MOST + 1);
        assert!(list[MOST].message.contains("968 more"), "{}", list[MOST].message);
        list.truncate(MOST);
        limit(&mut list);
        assert_eq!(list.len(), MOST);
    }

    #[test]
    fn lines_and_excerpts_name_the_place() {
        let mut d = Diagnostics::default();
        let file = d.sources.add("a.qspec", "one\ntwö three\n");
        d.push(Diagnostic::error(Span { file, start: 9, end: 14 }, "bad word", "this one").hint("write `four`"));
        assert_eq!(d.to_string(), "a.qspec:2:5: error: bad word; write `four`");
        let shown = d.render(false);
        assert!(
            shown.contains("a.qspec:2:5") && shown.contains("this one") && shown.contains("write `four`"),
            "{shown}"
        );
    }
}

//! What an editor asks about a place in a text.

use std::fmt::Write;
use std::ops::Range;

use lsp_types::{
    CompletionItem, CompletionItemKind, DocumentSymbol, Documentation, Hover, HoverContents, Location, MarkupContent,
    MarkupKind, Position, SymbolKind,
};
use qp_codegen::explain;
use qp_codegen::palette;
use qp_codegen::spec::expr::Room;
use qp_codegen::spec::{Definition, Shape};
use qp_codegen::syntax::lexer::{Token, TokenKind};
use qp_codegen::syntax::parser::PROPERTIES;

use super::names::{Block, Kind, Name};
use super::position::uri_of;
use super::texts::{Checked, File};
use super::words::{self, Word};

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

/// The matrix whose bytes are told.
const MATRIX: Shape = Shape { rows: 4096, cols: 4096 };
/// Most lines of a definition that are shown.
const MOST_LINES: usize = 24;
/// Most letters of a value that are shown.
const MOST_LETTERS: usize = 120;
/// Most quantizers that are named in one line.
const MOST_NAMES: usize = 8;

/// What stands at a place.
enum Meaning<'a> {
    Word(&'static Word),
    Name(&'a File, &'a Name),
    /// A file that a string names.
    Path(std::path::PathBuf),
}

/// What the token at byte `at` means, and its bytes.
fn meaning<'a>(checked: &'a Checked, file: &'a File, at: usize) -> Option<(Meaning<'a>, Range<usize>)> {
    let i = file.names.token(at)?;
    let token = file.names.lexed.tokens[i];
    let bytes = token.span.range();
    if token.kind == TokenKind::Str {
        let before = i.checked_sub(1).map(|b| &file.text[file.names.lexed.tokens[b].span.range()]);
        let names_file = matches!(before, Some("use" | "from" | "in"));
        return checked.used(file, token.span).filter(|_| names_file).map(|p| (Meaning::Path(p), bytes));
    }
    let word = &file.text[bytes.clone()];
    let known = file.names.known(at);
    let defined = file.names.all.iter().find(|n| n.bytes == bytes);
    if let Some(name) = defined {
        return Some((Meaning::Name(file, name), bytes));
    }
    if begins(&file.names.lexed.tokens, i)
        && let Some(word) = words::keyword(word, file.names.block(at))
    {
        return Some((Meaning::Word(word), bytes));
    }
    if let Some(name) = known.into_iter().find(|n| n.name == word) {
        return Some((Meaning::Name(file, name), bytes));
    }
    let block = file.names.block(at);
    let item = checked.items(word).find(|(_, n)| (n.kind == Kind::Function) == expression(block));
    match item {
        Some((f, n)) => Some((Meaning::Name(f, n), bytes)),
        None => words::any(word).map(|w| (Meaning::Word(w), bytes)),
    }
}

/// True for blocks of expressions, which call functions.
fn expression(block: Block) -> bool {
    matches!(block, Block::Decode | Block::Weight | Block::Function | Block::Read)
}

/// True if token `i` begins a line, or stands where one could.
fn begins(tokens: &[Token], i: usize) -> bool {
    let Some(before) = i.checked_sub(1).map(|b| tokens[b]) else { return true };
    let ends = matches!(
        before.kind,
        TokenKind::Name
            | TokenKind::Number(_)
            | TokenKind::Str
            | TokenKind::LBrace
            | TokenKind::RBrace
            | TokenKind::RParen
            | TokenKind::RBracket
    );
    tokens[i].first_on_line || ends
}

/// What the place says, in Markdown.
pub fn hover(checked: &Checked, at: Position) -> Option<Hover> {
    let file = checked.file()?;
    let (meaning, bytes) = meaning(checked, file, file.lines.offset(&file.text, at))?;
    let value = match meaning {
        Meaning::Word(word) => format!("```qspec\n{}\n```\n{}", word.example, word.text),
        Meaning::Path(path) => path.display().to_string(),
        Meaning::Name(of, name) if name.kind.is_item() => about_item(checked, of, name),
        Meaning::Name(of, name) => about_name(checked, of, name),
    };
    let contents = HoverContents::Markup(MarkupContent { kind: MarkupKind::Markdown, value });
    Some(Hover { contents, range: Some(file.lines.range(&file.text, bytes)) })
}

fn about_name(checked: &Checked, file: &File, name: &Name) -> String {
    let mut out = format!("```qspec\n{}\n```\n{} `{}`", &file.text[name.line.clone()], name.kind.text(), name.name);
    match &checked.values(file, name.bytes.start)[..] {
        [] => (),
        [(value, _)] => {
            let _ = write!(out, ": {}", shortened(value));
        }
        many => {
            for (value, of) in many.iter().take(MOST_NAMES) {
                let _ = write!(out, "\n* {} in {}", shortened(value), listed(of));
            }
        }
    }
    if matches!(name.kind, Kind::Window | Kind::Entry) {
        let around = file.names.items().find(|i| file.names.whole(i).contains(&name.bytes.start));
        for definition in around.into_iter().flat_map(|i| checked.made_by(file, i)).take(MOST_NAMES) {
            let _ = write!(out, "\n* {}", first_entry(definition));
        }
    }
    out
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MOST_LETTERS) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_string(),
    }
}

fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(MOST_NAMES).map(|n| format!("`{n}`")).collect();
    let more = names.len().saturating_sub(MOST_NAMES);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

fn about_item(checked: &Checked, file: &File, item: &Name) -> String {
    let mut out = String::from("```qspec\n");
    // Functions are short and stand for what they say; of the others the first line says enough.
    let whole = &file.text[file.names.whole(item)];
    match item.kind {
        Kind::Function if whole.lines().count() <= MOST_LINES => line!(out, "{}", whole.trim_end()),
        _ => line!(out, "{}", &file.text[item.line.clone()]),
    }
    line!(out, "```");
    if !item.doc.is_empty() {
        line!(out, "{}\n", item.doc);
    }
    for definition in checked.made_by(file, item).into_iter().take(MOST_NAMES) {
        line!(out, "{}", about(definition));
    }
    out
}

/// Rate, bytes and the first entry of what was checked.
fn about(definition: &Definition) -> String {
    match definition {
        Definition::Quantizer(q) => {
            let bytes = explain::matrix_bytes(q, MATRIX);
            let mut out = format!(
                "* `{}`: {} bits a weight, {:.2} MB for {} x {}",
                q.name,
                q.rate(),
                bytes as f64 / 1e6,
                MATRIX.rows,
                MATRIX.cols
            );
            if let Some(d) = palette::distortion(&q.name).filter(|_| palette::get(&q.name).as_ref() == Some(q)) {
                let _ = write!(out, ", squared error {d}");
            }
            let _ = write!(out, "; {}", first_entry(definition));
            out
        }
        Definition::Format(f) => {
            let (codes, all) = f.rate();
            format!("* `{}`: {codes} bits a weight, {all} with fields; {}", f.name, first_entry(definition))
        }
    }
}

/// What window or code 0 decodes to.
fn first_entry(definition: &Definition) -> String {
    let list = |values: &[i64]| values.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
    match definition {
        Definition::Quantizer(q) if !q.is_trained() => format!("`{}` has a table that is not trained yet", q.name),
        Definition::Quantizer(q) => {
            let code = &q.codes[0];
            let mut entries = vec![0; code.vector as usize];
            code.entry(0, &mut entries);
            let entries: Vec<i64> = entries.into_iter().map(i64::from).collect();
            format!("window 0 of `{}` gives [{}]", q.name, list(&entries))
        }
        Definition::Format(f) if !f.numbers.is_empty() => {
            format!("codes of `{}` look up tables of each matrix", f.name)
        }
        Definition::Format(f) => {
            let mut integers = vec![0; f.vector as usize];
            f.integers(0, &[], &mut Room::default(), &mut integers);
            format!("code 0 of `{}` gives [{}]", f.name, list(&integers))
        }
    }
}

/// Where what stands at a place is defined.
pub fn definition(checked: &Checked, at: Position) -> Option<Location> {
    let file = checked.file()?;
    match meaning(checked, file, file.lines.offset(&file.text, at))?.0 {
        Meaning::Word(_) => None,
        Meaning::Path(path) if path.is_file() => {
            Some(Location { uri: uri_of(&super::texts::plain(&path))?, range: Default::default() })
        }
        Meaning::Path(_) => None,
        Meaning::Name(of, name) => {
            let range = of.lines.range(&of.text, name.bytes.clone());
            Some(Location { uri: uri_of(&super::texts::plain(&of.path))?, range })
        }
    }
}

/// Items of the text, with what they define.
pub fn symbols(checked: &Checked) -> Vec<DocumentSymbol> {
    let Some(file) = checked.file() else { return Vec::new() };
    let symbol = |name: &Name, whole: Range<usize>, children: Option<Vec<DocumentSymbol>>| {
        let kind = match name.kind {
            Kind::Family => SymbolKind::CLASS,
            Kind::Quantizer => SymbolKind::OBJECT,
            Kind::Function => SymbolKind::FUNCTION,
            Kind::Layout => SymbolKind::STRUCT,
            Kind::Fusion => SymbolKind::MODULE,
            Kind::Table => SymbolKind::ARRAY,
            Kind::Field | Kind::Tensor | Kind::Member => SymbolKind::FIELD,
            Kind::Constant => SymbolKind::CONSTANT,
            Kind::Parameter | Kind::Window | Kind::Entry | Kind::Index => SymbolKind::VARIABLE,
        };
        // It must hold the name, also where that is all that stands there.
        let whole = whole.start.min(name.bytes.start)..whole.end.max(name.bytes.end);
        #[expect(deprecated, reason = "the field is part of the type")]
        DocumentSymbol {
            name: name.name.clone(),
            detail: Some(name.kind.text().to_string()),
            kind,
            tags: None,
            deprecated: None,
            range: file.lines.range(&file.text, whole),
            selection_range: file.lines.range(&file.text, name.bytes.clone()),
            children,
        }
    };
    let items = file.names.items().map(|item| {
        let parts = file.names.parts(item).map(|part| symbol(part, part.line.clone(), None));
        symbol(item, file.names.whole(item), Some(parts.collect()))
    });
    items.collect()
}

/// What may be written at a place.
pub fn completions(checked: &Checked, at: Position) -> Vec<CompletionItem> {
    let Some(file) = checked.file() else { return Vec::new() };
    let at = file.lines.offset(&file.text, at);
    if file.names.lexed.comments.iter().any(|c| c.range().start < at && at <= c.range().end) {
        return Vec::new();
    }
    let tokens = &file.names.lexed.tokens;
    // The word that is being written is not yet there.
    let written = |t: &Token| t.kind == TokenKind::Name && t.span.range().start < at && at <= t.span.range().end;
    let count = tokens.iter().take_while(|t| t.span.range().end <= at && !written(t)).count();
    let before = &tokens[..count];
    let inside = tokens.get(count).is_some_and(|t| t.kind == TokenKind::Str && t.span.range().start < at);
    if inside {
        return Vec::new();
    }
    let word = |back: usize| match before.len().checked_sub(back) {
        Some(i) => &file.text[before[i].span.range()],
        None => "",
    };
    let block = file.names.block(at);
    let fresh =
        before.last().is_none_or(|t| file.text[t.span.range().end..at].contains(['\n', '\r']) || word(1) == "{");
    let continues = before.last().is_some_and(|t| {
        !matches!(
            t.kind,
            TokenKind::Name
                | TokenKind::Number(_)
                | TokenKind::Str
                | TokenKind::RBrace
                | TokenKind::LBrace
                | TokenKind::RParen
                | TokenKind::RBracket
        )
    });
    let of_word = |w: &Word, kind, rank| item(w.word, kind, w.example, w.text, rank);
    let keyword = CompletionItemKind::KEYWORD;
    match (word(1), word(2)) {
        ("values", _) if block == Block::Body => {
            let types = words::types(true).iter();
            return types.map(|w| of_word(w, CompletionItemKind::TYPE_PARAMETER, 0)).collect();
        }
        (":", _) => {
            let types = words::types(false).iter();
            return types.map(|w| of_word(w, CompletionItemKind::TYPE_PARAMETER, 0)).collect();
        }
        ("per", _) | ("scale", _) => {
            return words::covers(word(1) == "scale").map(|w| of_word(w, keyword, 0)).collect();
        }
        ("rotate", _) => {
            let all = ["none", "hadamard"].into_iter().filter_map(words::any);
            return all.map(|w| of_word(w, keyword, 0)).collect();
        }
        ("let" | "table" | "field" | "tensor" | "record" | "decode" | "weight" | "quantizer" | "family", _) => {
            return Vec::new();
        }
        _ => (),
    }
    let of_items = |kinds: &[Kind]| -> Vec<CompletionItem> {
        let all = checked.visible().into_iter().flat_map(|f| f.names.items().map(move |n| (f, n)));
        all.filter(|(_, n)| kinds.contains(&n.kind)).map(|(f, n)| of_name(f, n, 0)).collect()
    };
    match block {
        Block::File if word(1) == "=" => {
            let mut all = of_items(&[Kind::Family]);
            all.extend(words::any("mix").map(|w| of_word(w, CompletionItemKind::FUNCTION, 1)));
            return all;
        }
        Block::File if in_mix(&file.text, before) => return of_items(&[Kind::Quantizer]),
        Block::File if word(1) == "of" => return of_items(&[Kind::Quantizer, Kind::Family]),
        _ => (),
    }
    let mut all = Vec::new();
    if fresh && !continues {
        let given = file.names.around(at).map_or(&[][..], |b| &b.given);
        let again = ["let", "table", "field", "code"];
        let starts = words::starts(block).iter();
        let missing = starts.filter(|w| {
            block != Block::Body || PROPERTIES.contains(&w.word) && (again.contains(&w.word) || !has(given, w.word))
        });
        all.extend(missing.map(|w| of_word(w, keyword, u32::from(again.contains(&w.word)))));
    }
    if block != Block::File && !(fresh && block == Block::Body) {
        all.extend(file.names.known(at).into_iter().map(|n| of_name(file, n, 2)));
        if matches!(block, Block::Decode | Block::Function | Block::Read) {
            all.extend(of_items(&[Kind::Function]));
        }
        all.extend(words::functions(block).map(|w| of_word(w, CompletionItemKind::FUNCTION, 3)));
    }
    all.dedup_by(|a, b| a.label == b.label);
    all
}

/// True if a body that has the properties `given` needs no `word`.
fn has(given: &[String], word: &str) -> bool {
    let is = |w: &str| given.iter().any(|g| g == w);
    match word {
        // One says the others.
        "window" | "vector" | "step" => is(word) || is("bits"),
        "bits" => is("bits") || is("window") || is("vector") || is("step"),
        // A format has no such properties, and these make one.
        "block" | "scale" => is(word) || is("weight") || is("field"),
        "weight" => is(word) || is("scale") || is("block"),
        _ => is(word),
    }
}

/// True behind `mix(`.
fn in_mix(text: &str, before: &[Token]) -> bool {
    let open = before.iter().rposition(|t| matches!(t.kind, TokenKind::LParen | TokenKind::RParen));
    open.is_some_and(|i| before[i].kind == TokenKind::LParen && i > 0 && &text[before[i - 1].span.range()] == "mix")
}

fn of_name(file: &File, name: &Name, rank: u32) -> CompletionItem {
    let kind = match name.kind {
        Kind::Family => CompletionItemKind::CLASS,
        Kind::Quantizer => CompletionItemKind::VALUE,
        Kind::Function => CompletionItemKind::FUNCTION,
        Kind::Constant | Kind::Parameter => CompletionItemKind::CONSTANT,
        Kind::Field | Kind::Member | Kind::Tensor | Kind::Table => CompletionItemKind::FIELD,
        Kind::Layout | Kind::Fusion | Kind::Window | Kind::Entry | Kind::Index => CompletionItemKind::VARIABLE,
    };
    item(&name.name, kind, &file.text[name.line.clone()], &name.doc, rank)
}

fn item(label: &str, kind: CompletionItemKind, detail: &str, text: &str, rank: u32) -> CompletionItem {
    CompletionItem {
        label: label.to_string(),
        kind: Some(kind),
        detail: Some(detail.to_string()),
        documentation: (!text.is_empty()).then(|| Documentation::String(text.to_string())),
        sort_text: Some(format!("{rank}{label}")),
        ..CompletionItem::default()
    }
}

//! Names of a text and where they are known, by its tokens alone: so they are found in a text that is being written, too.

use std::ops::Range;

use qp_codegen::syntax::FileId;
use qp_codegen::syntax::lexer::{Lexed, Token, TokenKind, lex};
use qp_codegen::syntax::parser::{ITEMS, PROPERTIES};

/// What a name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Family,
    Quantizer,
    Function,
    Layout,
    Fusion,
    Parameter,
    Constant,
    Table,
    Field,
    Window,
    Entry,
    Tensor,
    Member,
    Index,
}

impl Kind {
    /// How it is called in texts for people.
    pub fn text(self) -> &'static str {
        match self {
            Kind::Family => "family",
            Kind::Quantizer => "quantizer",
            Kind::Function => "function",
            Kind::Layout => "layout",
            Kind::Fusion => "fusion pattern",
            Kind::Parameter => "parameter",
            Kind::Constant => "constant",
            Kind::Table => "table",
            Kind::Field => "field",
            Kind::Window => "window",
            Kind::Entry => "entry",
            Kind::Tensor => "tensor",
            Kind::Member => "member of a record",
            Kind::Index => "index",
        }
    }

    /// True for what stands at the top of a file.
    pub fn is_item(self) -> bool {
        matches!(self, Kind::Family | Kind::Quantizer | Kind::Function | Kind::Layout | Kind::Fusion)
    }
}

/// What braces hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Nothing: the top of the file.
    File,
    /// Properties.
    Body,
    /// Lines of `decode`.
    Decode,
    /// Lines of `weight`.
    Weight,
    /// Lines of a function.
    Function,
    /// What is read from an element, or where a weight lies.
    Read,
    /// Lines of a layout.
    Layout,
    /// Members of a record.
    Record,
    /// Launches.
    Fusion,
    /// What surrounds a launch.
    Launch,
}

/// Braces and what stands between them.
#[derive(Clone, Debug)]
pub struct Braces {
    pub block: Block,
    /// Bytes, braces included.
    pub bytes: Range<usize>,
    /// Keywords of properties in them.
    pub given: Vec<String>,
    /// The item.
    item: usize,
    depth: usize,
}

/// A name.
#[derive(Clone, Debug)]
pub struct Name {
    pub name: String,
    pub kind: Kind,
    /// Its bytes.
    pub bytes: Range<usize>,
    /// The bytes where it is known.
    pub known: Range<usize>,
    /// Bytes of the first line of what defines it.
    pub line: Range<usize>,
    /// Lines of `///` before an item.
    pub doc: String,
    /// Of a layout: the quantizer or family whose it is.
    pub of: Option<String>,
    /// The item that has it, by order.
    item: usize,
    /// How many braces are around it.
    depth: usize,
}

/// All names of a text.
#[derive(Debug, Default)]
pub struct Names {
    pub lexed: Lexed,
    pub all: Vec<Name>,
    pub braces: Vec<Braces>,
    /// Bytes of each item.
    items: Vec<Range<usize>>,
}

impl Names {
    pub fn new(text: &str) -> Self {
        let lexed = lex(FileId(0), text, &mut Vec::new());
        Reader { text, tokens: &lexed.tokens, comments: &lexed.comments, out: Names::default() }.read(&lexed)
    }

    /// The token that holds the byte `at`, or ends there.
    pub fn token(&self, at: usize) -> Option<usize> {
        let touches = |t: &Token| t.kind != TokenKind::End && t.span.range().start <= at && at <= t.span.range().end;
        let all = || self.lexed.tokens.iter().enumerate().filter(|(_, t)| touches(t));
        // Of two that touch, a name is meant.
        all().find(|(_, t)| t.kind == TokenKind::Name).or_else(|| all().next_back()).map(|(i, _)| i)
    }

    /// The innermost braces around the byte `at`.
    pub fn around(&self, at: usize) -> Option<&Braces> {
        self.braces.iter().filter(|b| b.bytes.start < at && at < b.bytes.end).max_by_key(|b| b.bytes.start)
    }

    /// What the innermost braces hold.
    pub fn block(&self, at: usize) -> Block {
        self.around(at).map_or(Block::File, |b| b.block)
    }

    /// The item around the byte `at`.
    fn item(&self, at: usize) -> Option<usize> {
        self.items.iter().position(|i| i.start <= at && at <= i.end)
    }

    /// Names of items.
    pub fn items(&self) -> impl Iterator<Item = &Name> {
        self.all.iter().filter(|n| n.kind.is_item())
    }

    /// Bytes of the whole item that a name is that of.
    pub fn whole(&self, item: &Name) -> Range<usize> {
        self.items.get(item.item).cloned().unwrap_or(item.bytes.clone())
    }

    /// Names within an item that belong to all of it: parameters, constants, tables, fields, tensors.
    pub fn parts<'a>(&'a self, item: &'a Name) -> impl Iterator<Item = &'a Name> {
        let parts = [Kind::Parameter, Kind::Constant, Kind::Table, Kind::Field, Kind::Tensor];
        let of = move |n: &&Name| n.item == item.item && n.depth == 1 && parts.contains(&n.kind);
        self.all.iter().filter(of)
    }

    /// Names known at the byte `at` that are no items, innermost first.
    pub fn known(&self, at: usize) -> Vec<&Name> {
        let here = |n: &&Name| !n.kind.is_item() && n.known.start <= at && at <= n.known.end;
        let mut known: Vec<&Name> = self.all.iter().filter(here).collect();
        known.sort_by_key(|n| std::cmp::Reverse(n.depth));
        // A layout knows what is stored.
        let layout = self.item(at).and_then(|i| self.items().find(|n| n.item == i && n.kind == Kind::Layout));
        if let Some(of) = layout.and_then(|l| l.of.as_ref())
            && let Some(stored) = self.items().find(|n| n.name == *of && n.kind != Kind::Layout)
        {
            known.extend(self.parts(stored));
        }
        known
    }
}

struct Reader<'a> {
    text: &'a str,
    tokens: &'a [Token],
    comments: &'a [qp_codegen::syntax::Span],
    out: Names,
}

impl Reader<'_> {
    fn word(&self, i: usize) -> &str {
        self.tokens.get(i).map_or("", |t| &self.text[t.span.range()])
    }

    fn is_name(&self, i: usize) -> bool {
        self.tokens.get(i).is_some_and(|t| t.kind == TokenKind::Name)
    }

    fn kind(&self, i: usize) -> TokenKind {
        self.tokens.get(i).map_or(TokenKind::End, |t| t.kind)
    }

    /// What the brace at token `i` opens.
    fn opens(&self, i: usize) -> Block {
        let Some(before) = i.checked_sub(1) else { return Block::File };
        match self.kind(before) {
            TokenKind::RParen => {
                let open = (0..before).rev().find(|j| self.kind(*j) == TokenKind::LParen).unwrap_or(0);
                match self.word(open.saturating_sub(2)) {
                    "function" => Block::Function,
                    _ => Block::Body,
                }
            }
            TokenKind::RBracket => Block::Record,
            _ => match (self.word(i.saturating_sub(2)), self.word(before)) {
                ("quantizer", _) => Block::Body,
                ("fusion", _) => Block::Fusion,
                ("decode", _) => Block::Decode,
                ("weight", _) => Block::Weight,
                ("read" | "order", _) => Block::Read,
                ("of", _) => Block::Layout,
                (_, "code") => Block::Body,
                _ => Block::Launch,
            },
        }
    }

    /// Bytes from token `i` to the end of its line.
    fn line(&self, i: usize) -> Range<usize> {
        let start = self.tokens[i].span.range().start;
        let rest = &self.text[start..];
        let line = rest[..rest.find(['\n', '\r']).unwrap_or(rest.len())].trim_end();
        start..start + line.trim_end_matches('{').trim_end().len()
    }

    fn doc(&self, i: usize) -> String {
        let start = self.tokens[i].span.start;
        let from = if i == 0 { 0 } else { self.tokens[i - 1].span.end };
        let between = self.comments.iter().filter(|c| from <= c.start && c.start < start);
        let lines = between.filter_map(|c| self.text[c.range()].strip_prefix("///"));
        lines.map(|l| l.trim()).collect::<Vec<_>>().join("\n")
    }

    fn read(mut self, lexed: &Lexed) -> Names {
        // Indices of open braces; names that the next braces know; indices of a layout's line.
        let mut open: Vec<usize> = Vec::new();
        let mut pending: Vec<usize> = Vec::new();
        let mut indices: Vec<usize> = Vec::new();
        let mut parens = 0usize;
        let end = self.text.len();
        for i in 0..self.tokens.len() {
            let token = self.tokens[i];
            let at = token.span.range();
            let begins = token.first_on_line && ITEMS.contains(&self.word(i));
            if begins || token.kind == TokenKind::End {
                // An item that is not closed ends where the next begins.
                for b in open.drain(..) {
                    self.close(b, at.start);
                }
                parens = 0;
                if let Some(item) = self.out.items.last_mut() {
                    item.end = item.end.min(at.start);
                }
                let item = self.out.items.len();
                if begins {
                    pending.clear();
                    self.out.items.push(at.start..end);
                    self.item(i, item, &mut pending);
                }
                continue;
            }
            let block = open.last().map_or(Block::File, |b| self.out.braces[*b].block);
            match token.kind {
                TokenKind::LBrace => {
                    let (item, depth) = (self.out.items.len().saturating_sub(1), open.len() + 1);
                    let block = self.opens(i);
                    self.out.braces.push(Braces { block, bytes: at.start..end, given: Vec::new(), item, depth });
                    open.push(self.out.braces.len() - 1);
                    for n in pending.drain(..) {
                        self.out.all[n].known = at.start..end;
                    }
                }
                TokenKind::RBrace => {
                    if let Some(b) = open.pop() {
                        self.close(b, at.end);
                    }
                    if open.is_empty()
                        && let Some(item) = self.out.items.last_mut()
                    {
                        item.end = at.end;
                    }
                }
                TokenKind::LParen | TokenKind::LBracket => parens += 1,
                TokenKind::RParen | TokenKind::RBracket => parens = parens.saturating_sub(1),
                TokenKind::Name => {
                    let next = (self.is_name(i + 1), self.kind(i + 2));
                    let found = match (self.word(i), block, next) {
                        ("let", _, (true, _)) => Some((Kind::Constant, i + 1)),
                        ("table", Block::Body, (true, TokenKind::LBracket)) => Some((Kind::Table, i + 1)),
                        ("field", Block::Body, (true, TokenKind::Colon)) => Some((Kind::Field, i + 1)),
                        ("tensor" | "record", Block::Layout, (true, _)) => Some((Kind::Tensor, i + 1)),
                        ("decode" | "order", Block::Body, (true, TokenKind::LBrace))
                        | ("read", Block::Layout, (true, TokenKind::LBrace)) => Some((Kind::Window, i + 1)),
                        ("weight", Block::Body, (true, TokenKind::LBrace)) => Some((Kind::Entry, i + 1)),
                        (_, Block::Record, _) if self.kind(i + 1) == TokenKind::Colon => Some((Kind::Member, i)),
                        _ => None,
                    };
                    if let Some((kind, name)) = found {
                        let n = self.name(name, i, kind, &open, at.start);
                        if matches!(kind, Kind::Window | Kind::Entry) {
                            pending.push(n);
                        }
                    }
                    if block == Block::Body && parens == 0 && self.begins_property(i) {
                        let word = self.word(i).to_string();
                        if let Some(b) = open.last() {
                            self.out.braces[*b].given.push(word);
                        }
                    }
                    if block == Block::Layout && token.first_on_line {
                        for n in indices.drain(..) {
                            self.out.all[n].known.end = at.start;
                        }
                        if parens == 0 && self.kind(i + 1) == TokenKind::LParen {
                            let names: Vec<usize> = self.in_parentheses(i + 1);
                            for name in names {
                                indices.push(self.name(name, i, Kind::Index, &open, at.start));
                            }
                        }
                    }
                }
                _ => (),
            }
        }
        self.out.lexed = lexed.clone();
        self.out
    }

    /// True if the word at token `i` begins a property, and is no name.
    fn begins_property(&self, i: usize) -> bool {
        let before = i.checked_sub(1).map_or("{", |b| self.word(b));
        let joins =
            ["let", "table", "field", "decode", "weight", "=", ":", "per", "for", "flat", "x", "scale", "rotate"];
        let operator = |t: &str| !t.is_empty() && t.chars().all(|c| "+-*/%&|^~<>,([".contains(c));
        PROPERTIES.contains(&self.word(i)) && !joins.contains(&before) && !operator(before)
    }

    /// Names between the parenthesis at token `open` and its end.
    fn in_parentheses(&self, open: usize) -> Vec<usize> {
        let inside = (open + 1..self.tokens.len()).take_while(|i| {
            matches!(self.kind(*i), TokenKind::Name | TokenKind::Comma) && !ITEMS.contains(&self.word(*i))
        });
        inside.filter(|i| self.is_name(*i)).collect()
    }

    /// Notes the item that begins at token `i`.
    fn item(&mut self, i: usize, item: usize, pending: &mut Vec<usize>) {
        let kind = match self.word(i) {
            "family" => Kind::Family,
            "quantizer" => Kind::Quantizer,
            "function" => Kind::Function,
            "layout" => Kind::Layout,
            "fusion" => Kind::Fusion,
            _ => return,
        };
        if !self.is_name(i + 1) {
            return;
        }
        let of = (kind == Kind::Layout && self.word(i + 2) == "of").then(|| self.word(i + 3).to_string());
        let name = Name {
            name: self.word(i + 1).to_string(),
            kind,
            bytes: self.tokens[i + 1].span.range(),
            known: 0..self.text.len(),
            line: self.line(i),
            doc: self.doc(i),
            of,
            item,
            depth: 0,
        };
        self.out.all.push(name);
        if matches!(kind, Kind::Family | Kind::Function) && self.kind(i + 2) == TokenKind::LParen {
            for p in self.in_parentheses(i + 2) {
                let n = self.name(p, i, Kind::Parameter, &[], self.tokens[p].span.range().start);
                pending.push(n);
            }
        }
    }

    /// Notes the name at token `name`, defined by what begins at token `line`, known from `from` to the end of the braces.
    fn name(&mut self, name: usize, line: usize, kind: Kind, open: &[usize], from: usize) -> usize {
        // Properties know each other in any order, lines of a block those before them.
        let (start, end) = match open.last().map(|b| &self.out.braces[*b]) {
            Some(b) if matches!(b.block, Block::Body | Block::Layout) && kind != Kind::Index => {
                (b.bytes.start, b.bytes.end)
            }
            Some(b) => (from, b.bytes.end),
            None => (from, self.text.len()),
        };
        self.out.all.push(Name {
            name: self.word(name).to_string(),
            kind,
            bytes: self.tokens[name].span.range(),
            known: start..end,
            line: self.line(line),
            doc: String::new(),
            of: None,
            item: self.out.items.len().saturating_sub(1),
            depth: open.len().max(1),
        });
        self.out.all.len() - 1
    }

    /// Ends braces at byte `at`: names in them are known no longer.
    fn close(&mut self, braces: usize, at: usize) {
        let b = &mut self.out.braces[braces];
        b.bytes.end = at;
        let (start, item, depth) = (b.bytes.start, b.item, b.depth);
        let inside = |n: &&mut Name| n.item == item && n.known.start >= start && n.known.end > at && n.depth >= depth;
        self.out.all.iter_mut().filter(|n| !n.kind.is_item()).filter(inside).for_each(|n| n.known.end = at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "/// Doc.
family f(n, m) {
    let size = 2 ** n
    table t[size] = [1]
    window n
    decode w {
        let h = w * 3
        t[h]
    }
}
quantizer q {
    field d : f16 per 1 x 32
    weight e { e * d
layout l of q {
    record block[rows] {
        qs : u8[4]
    }
    d(r, k) in block[r].qs[k]
}
";

    fn known(names: &Names, text: &str) -> Vec<String> {
        names.known(TEXT.find(text).unwrap()).iter().map(|n| n.name.clone()).collect()
    }

    #[test]
    fn names_are_known_in_their_braces_also_where_one_is_missing() {
        let names = Names::new(TEXT);
        let items: Vec<_> = names.items().map(|n| (n.name.as_str(), n.kind, n.doc.as_str())).collect();
        assert_eq!(items, [("f", Kind::Family, "Doc."), ("q", Kind::Quantizer, ""), ("l", Kind::Layout, "")]);
        let mut decode = known(&names, "t[h]");
        decode.sort();
        assert_eq!(decode, ["h", "m", "n", "size", "t", "w"]);
        let mut body = known(&names, "window n");
        body.sort();
        assert_eq!(body, ["m", "n", "size", "t"]);
        assert!(known(&names, "quantizer q").is_empty(), "{:?}", known(&names, "quantizer q"));
        let weight = known(&names, "* d");
        assert!(weight.contains(&"e".to_string()) && weight.contains(&"d".to_string()), "{weight:?}");
        let layout = known(&names, "in block");
        assert!(["block", "r", "k", "d"].iter().all(|n| layout.contains(&n.to_string())), "{layout:?}");
        assert_eq!(names.block(TEXT.find("t[h]").unwrap()), Block::Decode);
        assert_eq!(names.block(TEXT.find("qs").unwrap()), Block::Record);
        let body = names.around(TEXT.find("window").unwrap()).unwrap();
        assert_eq!(body.given, ["let", "table", "window", "decode"]);
        let table = names.all.iter().find(|n| n.kind == Kind::Table).unwrap();
        assert_eq!(&TEXT[table.line.clone()], "table t[size] = [1]");
    }
}

//! The formatter: one layout for every file. It moves white space only, so no comment is ever lost.
//!
//! * Items, properties, and lines of a decode block or launch begin a line, indented by four spaces a brace. A decode
//!   block without `let`, or a launch, may stand on one line.
//! * Keywords of properties are padded to one column, and so are the names of neighbouring one-line quantizers.
//! * One blank line is kept where there were some. Line ends within an expression are kept; lists are also broken
//!   where they pass the right margin.

use std::collections::{BTreeMap, BTreeSet};

use super::ast::{Body, Decode, Definition, File, Item, LayoutLine, PropertyKind};
use super::diag::{Diagnostic, FileId, Span};
use super::lexer::{Lexed, Token, TokenKind};
use super::parser::parse;

const INDENT: usize = 4;
const MARGIN: usize = 110;
/// Width of the longest of the aligned keywords.
const KEYWORD: usize = "window".len();

/// Formats `text`.
///
/// # Errors
/// If `text` does not parse: what is wrong with it.
pub fn format(file: FileId, text: &str) -> Result<String, Vec<Diagnostic>> {
    let mut errors = Vec::new();
    let (tree, lexed) = parse(file, text, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }
    let mut writer = Writer::new(text, &tree, &lexed);
    for i in 0..lexed.tokens.len() {
        writer.token(i);
    }
    Ok(writer.out)
}

/// What the tree says about where tokens stand.
#[derive(Default)]
struct Plan {
    /// First bytes of items, properties, lines of decode blocks and launches.
    line_starts: BTreeSet<u32>,
    /// First bytes of property keywords that are padded.
    padded: BTreeSet<u32>,
    /// Last bytes of what precedes a brace that may open a one-line group.
    one_line_after: BTreeSet<u32>,
    /// End of a quantizer's name → spaces after it.
    name_padding: BTreeMap<u32, usize>,
}

impl Plan {
    fn new(text: &str, tree: &File) -> Self {
        let mut plan = Plan::default();
        let mut run: Vec<Span> = Vec::new();
        let mut last_end = 0;
        for item in &tree.items {
            let (span, aligned) = match item {
                Item::Use(u) => (u.span, None),
                Item::Family(f) => {
                    plan.body(&f.body);
                    (f.span, None)
                }
                Item::Quantizer(q) => match &q.def {
                    Definition::Body(body) => {
                        plan.body(body);
                        (q.span, None)
                    }
                    Definition::Member { .. } | Definition::Mix(_) => (q.span, Some(q.name.span)),
                },
                Item::Fusion(f) => {
                    for l in &f.launches {
                        plan.line_starts.insert(l.span.start);
                        plan.one_line_after.extend(l.matrices.last().map(|m| m.span.end));
                    }
                    (f.span, None)
                }
                Item::Function(f) => {
                    plan.line_starts.extend(f.lets.iter().map(|(name, _)| name.span.start));
                    plan.line_starts.insert(f.result.span.start);
                    (f.span, None)
                }
                Item::Layout(l) => {
                    for line in &l.lines {
                        plan.line_starts.insert(line.span().start);
                        match line {
                            LayoutLine::Type(keyword, _) => drop(plan.padded.insert(keyword.span.start)),
                            LayoutLine::Tensor(t) => {
                                plan.padded.insert(t.keyword.span.start);
                                if t.keyword.name == "record" {
                                    plan.line_starts.extend(t.members.iter().map(|m| m.span.start));
                                }
                            }
                            LayoutLine::Place(p) => p.read.iter().for_each(|d| plan.decode(d)),
                        }
                    }
                    (l.span, None)
                }
            };
            plan.line_starts.insert(span.start);
            let between = &text[last_end as usize..span.start as usize];
            if aligned.is_none() || between.matches('\n').count() > 1 {
                plan.align(&mut run);
            }
            run.extend(aligned);
            last_end = span.end;
        }
        plan.align(&mut run);
        plan
    }

    fn align(&mut self, run: &mut Vec<Span>) {
        let width = run.iter().map(|s| s.end - s.start).max().unwrap_or(0);
        for s in run.drain(..) {
            self.name_padding.insert(s.end, (width - (s.end - s.start)) as usize);
        }
    }

    /// Lines of a block with a name before its brace.
    fn decode(&mut self, d: &Decode) {
        self.line_starts.extend(d.lets.iter().map(|(name, _)| name.span.start));
        self.line_starts.insert(d.result.span.start);
        if d.lets.is_empty() {
            self.one_line_after.insert(d.window.span.end);
        }
    }

    fn body(&mut self, body: &Body) {
        for p in &body.properties {
            self.line_starts.insert(p.span.start);
            match &p.kind {
                PropertyKind::Let(..) => continue,
                PropertyKind::Code(inner) => {
                    self.body(inner);
                    continue;
                }
                PropertyKind::Decode(d) | PropertyKind::Weight(d) | PropertyKind::Order(d) => self.decode(d),
                PropertyKind::Window(_)
                | PropertyKind::Vector(_)
                | PropertyKind::Step(_)
                | PropertyKind::Block(..)
                | PropertyKind::Values(..)
                | PropertyKind::Unit(_)
                | PropertyKind::Table(_)
                | PropertyKind::Bits(..)
                | PropertyKind::Field(_)
                | PropertyKind::Input(_)
                | PropertyKind::Output(_)
                | PropertyKind::Scale(_)
                | PropertyKind::Rotate(..) => (),
            }
            self.padded.insert(p.keyword.span.start);
        }
    }
}

struct Writer<'a> {
    text: &'a str,
    lexed: &'a Lexed,
    plan: Plan,
    out: String,
    /// One for each open brace: true if its group stands on one line.
    groups: Vec<bool>,
    /// Open parentheses and brackets.
    nested: usize,
    /// Next comment.
    comment: usize,
    /// End of the last thing written, in the source.
    end: usize,
    in_fusion: bool,
    /// A comment ended the line.
    must_break: bool,
}

impl<'a> Writer<'a> {
    fn new(text: &'a str, tree: &File, lexed: &'a Lexed) -> Self {
        Writer {
            text,
            lexed,
            plan: Plan::new(text, tree),
            out: String::new(),
            groups: Vec::new(),
            nested: 0,
            comment: 0,
            end: 0,
            in_fusion: false,
            must_break: false,
        }
    }

    fn str(&self, t: Token) -> &'a str {
        &self.text[t.span.range()]
    }

    fn lines_since(&self, start: u32) -> usize {
        self.text[self.end..start as usize].matches('\n').count()
    }

    fn column(&self) -> usize {
        self.out.rsplit('\n').next().unwrap_or("").chars().count()
    }

    fn new_line(&mut self, indent: usize, blank: bool) {
        if self.out.is_empty() {
            return;
        }
        self.out.truncate(self.out.trim_end().len());
        self.out.push_str(if blank && !self.out.ends_with('{') { "\n\n" } else { "\n" });
        self.out.extend(std::iter::repeat_n(' ', indent * INDENT));
    }

    fn comments_before(&mut self, start: u32, continued: bool) {
        while let Some(&c) = self.lexed.comments.get(self.comment).filter(|c| c.start < start) {
            self.comment += 1;
            let lines = self.lines_since(c.start);
            if lines == 0 && !self.out.is_empty() {
                self.out.truncate(self.out.trim_end().len());
                self.out.push(' ');
            } else {
                self.new_line(self.groups.len() + usize::from(continued), lines > 1);
            }
            self.out.push_str(self.text[c.range()].trim_end());
            self.end = c.end as usize;
            self.must_break = true;
        }
    }

    /// A line of a decode block begins at `let`, which stands before what the tree knows.
    fn begins_line(&self, i: usize) -> bool {
        let t = self.lexed.tokens[i];
        let word = if t.kind == TokenKind::Name { self.str(t) } else { "" };
        let next = self.lexed.tokens.get(i + 1);
        if word == "let" {
            return true;
        }
        if i > 0 && self.str(self.lexed.tokens[i - 1]) == "let" {
            return false;
        }
        self.plan.line_starts.contains(&t.span.start)
            || (self.in_fusion && self.groups.len() == 2 && matches!(word, "prologue" | "epilogue") && next.is_some())
    }

    fn token(&mut self, i: usize) {
        let t = self.lexed.tokens[i];
        let word = self.str(t);
        if t.kind == TokenKind::End {
            self.comments_before(t.span.start, false);
            self.out.truncate(self.out.trim_end().len());
            if !self.out.is_empty() {
                self.out.push('\n');
            }
            return;
        }
        let closes = t.kind == TokenKind::RBrace;
        let begins = self.begins_line(i);
        self.comments_before(t.span.start, !begins && !closes);
        let one_line = self.groups.last().copied().unwrap_or(false);
        let lines = self.lines_since(t.span.start);
        if closes {
            self.groups.pop();
            let empty = i > 0 && self.lexed.tokens[i - 1].kind == TokenKind::LBrace && !self.must_break;
            if empty {
                // `{}`
            } else if one_line {
                self.out.push(' ');
            } else {
                self.new_line(self.groups.len(), false);
            }
        } else if begins && !one_line {
            self.new_line(self.groups.len(), lines > 1);
        } else if self.must_break || (lines > 0 && i > 0 && t.kind != TokenKind::LBrace) {
            let closing = matches!(t.kind, TokenKind::RParen | TokenKind::RBracket);
            self.new_line(self.groups.len() + usize::from(!closing), false);
        } else if i > 0 {
            let space = self.space(i);
            let after_comma = self.lexed.tokens[i - 1].kind == TokenKind::Comma;
            if after_comma && self.nested > 0 && self.column() + space + self.item_width(i) > MARGIN {
                self.new_line(self.groups.len() + 1, false);
            } else {
                self.out.extend(std::iter::repeat_n(' ', space));
            }
        }
        self.must_break = false;
        self.end = t.span.end as usize;
        self.out.push_str(word);
        match t.kind {
            TokenKind::LBrace => {
                let one = self.is_one_line(i);
                self.groups.push(one);
            }
            TokenKind::LParen | TokenKind::LBracket => self.nested += 1,
            TokenKind::RParen | TokenKind::RBracket => self.nested = self.nested.saturating_sub(1),
            TokenKind::Name if self.groups.is_empty() && begins => self.in_fusion = word == "fusion",
            _ => (),
        }
    }

    /// Characters of a list's member that begins at token `i`, with the comma or bracket after it.
    fn item_width(&self, i: usize) -> usize {
        let mut depth = 0;
        let mut width = 0;
        for (k, t) in self.lexed.tokens[i..].iter().enumerate() {
            width += self.str(*t).chars().count() + if k > 0 { self.space(i + k) } else { 0 };
            match t.kind {
                TokenKind::LParen | TokenKind::LBracket => depth += 1,
                TokenKind::RParen | TokenKind::RBracket if depth == 0 => break,
                TokenKind::RParen | TokenKind::RBracket => depth -= 1,
                TokenKind::Comma if depth == 0 => break,
                TokenKind::LBrace | TokenKind::RBrace | TokenKind::End => break,
                _ => (),
            }
        }
        width
    }

    /// The brace at token `i` opens a group that was on one line and may be.
    fn is_one_line(&self, i: usize) -> bool {
        let open = self.lexed.tokens[i].span;
        let allowed = i > 0 && self.plan.one_line_after.contains(&self.lexed.tokens[i - 1].span.end);
        let close = self.lexed.tokens[i..].iter().find(|t| t.kind == TokenKind::RBrace);
        allowed && close.is_some_and(|c| !self.text[open.start as usize..c.span.start as usize].contains(['\n']))
    }

    /// Spaces between token `i - 1` and token `i` on one line.
    fn space(&self, i: usize) -> usize {
        use TokenKind as K;
        let (a, b) = (self.lexed.tokens[i - 1], self.lexed.tokens[i]);
        let touch = a.span.end == b.span.start;
        if self.plan.padded.contains(&a.span.start) {
            return 1 + KEYWORD.saturating_sub(self.str(a).len());
        }
        if let Some(padding) = self.plan.name_padding.get(&a.span.end) {
            return 1 + padding;
        }
        let ends_operand = |k: usize| match self.lexed.tokens[k].kind {
            K::Number(_) | K::RParen | K::RBracket => true,
            K::Name => !matches!(self.str(self.lexed.tokens[k]), "if" | "then" | "else"),
            _ => false,
        };
        let unary = |k: usize| match self.lexed.tokens[k].kind {
            K::Not => true,
            K::Minus => {
                k == 0 || !ends_operand(k - 1) || self.plan.padded.contains(&self.lexed.tokens[k - 1].span.start)
            }
            _ => false,
        };
        let number = |k: usize| self.lexed.tokens.get(k).is_some_and(|t| matches!(t.kind, K::Number(_)));
        // A fraction of literals is written close: 1/32.
        // But not where the number belongs to what stands before it: c % 32 / 16.
        let quotient = |k: usize| k > 1 && matches!(self.lexed.tokens[k - 2].kind, K::Percent | K::Slash);
        let fraction =
            |k: usize| self.lexed.tokens[k].kind == K::Slash && k > 0 && number(k - 1) && number(k + 1) && !quotient(k);
        let tight = match (a.kind, b.kind) {
            (K::Dot | K::Range, _) | (_, K::Dot | K::Range) => true,
            (K::LParen | K::LBracket, _) | (_, K::RParen | K::RBracket | K::Comma) => true,
            (K::Name | K::Number(_) | K::RParen | K::RBracket, K::LBracket) => {
                touch || (i > 1 && self.str(self.lexed.tokens[i - 2]) == "table")
            }
            (K::Name, K::LParen) => touch,
            _ => unary(i - 1) || fraction(i) || fraction(i - 1),
        };
        usize::from(!tight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(text: &str) -> String {
        let once = format(FileId(0), text).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(format(FileId(0), &once).unwrap(), once, "formatting twice changes the text");
        once
    }

    #[test]
    fn layout_and_comments() {
        let text = "// head\nfamily tcq( kv ){ window 16 vector 2 // two\n\n\n step   [ kv,kv+1 ]\nblock 2 x 128\n values i8+1 / 2\nunit 1/32
            // own line\n table t [4]=[-1,2,  3,- 4]\n decode w{ let h=w*0x9E3779B1 // hash\n t[ h>>23 ]^signs( h[22],h[21] ) }
            // last\n}\nquantizer a=tcq(4)\nquantizer bbb = tcq( 5 )\n\n/// mixed\nquantizer c = mix(a,bbb)
            fusion f { launch q + k { prologue rms_norm,rotate } launch o }";
        insta::assert_snapshot!(formatted(text), @r"
        // head
        family tcq(kv) {
            window 16
            vector 2 // two

            step   [kv, kv + 1]
            block  2 x 128
            values i8 + 1/2
            unit   1/32
            // own line
            table  t[4] = [-1, 2, 3, -4]
            decode w {
                let h = w * 0x9E3779B1 // hash
                t[h >> 23] ^ signs(h[22], h[21])
            }
            // last
        }
        quantizer a   = tcq(4)
        quantizer bbb = tcq(5)

        /// mixed
        quantizer c = mix(a, bbb)
        fusion f {
            launch q + k { prologue rms_norm, rotate }
            launch o
        }
        ");
    }

    #[test]
    fn one_line_decode_and_long_lists() {
        let values: Vec<String> = (0..64).map(|i| (i - 32).to_string()).collect();
        let text = format!("quantizer q {{\n table t[64] = [{}]\n decode w {{t[w]}}\n}}\n", values.join(","));
        insta::assert_snapshot!(formatted(&text), @r"
        quantizer q {
            table  t[64] = [-32, -31, -30, -29, -28, -27, -26, -25, -24, -23, -22, -21, -20, -19, -18, -17, -16, -15,
                -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]
            decode w { t[w] }
        }
        ");
    }

    #[test]
    fn an_index_stays_where_it_is() {
        assert!(formatted("quantizer q { decode w { t2 ** 126[w] } }").contains("t2 ** 126[w]"));
    }
}

//! Tokens → tree. Recovers at the next property or item, so that one run finds many errors.
//!
//! Line ends mean nothing except for recovery: a keyword that is first on its line begins something new. An index or a
//! call must touch what it applies to (`t[i]`), so a list at the start of a line is never an index.

use super::ast::*;
use super::diag::{Diagnostic, FileId, Span, limit, nearest};
use super::lexer::{Lexed, Token, TokenKind, lex};

/// Keywords that begin an item.
pub const ITEMS: [&str; 6] = ["use", "family", "quantizer", "fusion", "function", "layout"];

/// Keywords that begin a property.
pub const PROPERTIES: [&str; 18] = [
    "let", "window", "vector", "step", "bits", "block", "values", "unit", "table", "decode", "field", "weight",
    "scale", "rotate", "code", "order", "input", "output",
];

/// Words that cannot be names.
const RESERVED: [&str; 4] = ["let", "if", "then", "else"];

/// Height of an expression's tree: more would only serve to exhaust the stack.
const MAX_HEIGHT: u32 = 250;
/// Nested parentheses and lists, for the same reason.
const MAX_DEPTH: u32 = 50;
/// Definitions of a file, and members of a body: more are no spec that anyone wrote.
const MOST_MEMBERS: usize = 4096;
/// Nested `code` bodies that are parsed before giving up.
const MAX_BODIES: u32 = 4;

/// The error is already among the diagnostics.
struct Failed;

mod format;

type Parse<T> = Result<T, Failed>;

/// Reads a file. The tree holds all that could be understood; `errors` gets the rest.
pub fn parse(file: FileId, text: &str, errors: &mut Vec<Diagnostic>) -> (File, Lexed) {
    let lexed = lex(file, text, errors);
    let mut found = Vec::new();
    let mut parser = Parser { text, lexed: &lexed, at: 0, errors: &mut found, depth: 0, bodies: 0, sign_first: None };
    let tree = parser.file();
    errors.append(&mut found);
    errors.sort_by_key(|d| d.labels.first().map(|l| l.0));
    limit(errors);
    (tree, lexed)
}

struct Parser<'a> {
    text: &'a str,
    lexed: &'a Lexed,
    at: usize,
    errors: &'a mut Vec<Diagnostic>,
    depth: u32,
    bodies: u32,
    /// The last minus of the block that is first on its line, and continues the line before.
    sign_first: Option<Span>,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token {
        self.lexed.tokens[self.at]
    }

    fn text_of(&self, span: Span) -> &'a str {
        &self.text[span.range()]
    }

    /// Text of the next token if it is a name.
    fn word(&self) -> Option<&'a str> {
        (self.peek().kind == TokenKind::Name).then(|| self.text_of(self.peek().span))
    }

    fn next(&mut self) -> Token {
        let t = self.peek();
        if t.kind != TokenKind::End {
            self.at += 1;
        }
        t
    }

    /// Span of the token before the next.
    fn last(&self) -> Span {
        self.lexed.tokens[self.at.saturating_sub(1)].span
    }

    fn eat(&mut self, kind: TokenKind) -> bool {
        let found = self.peek().kind == kind;
        if found {
            self.next();
        }
        found
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let found = self.word() == Some(word);
        if found {
            self.next();
        }
        found
    }

    /// The next token touches the one before it.
    fn touches(&self) -> bool {
        self.at > 0 && self.last().end == self.peek().span.start
    }

    fn found(&self) -> String {
        let t = self.peek();
        t.kind.describe().map_or_else(|| format!("`{}`", self.text_of(t.span)), str::to_string)
    }

    fn fail<T>(&mut self, d: Diagnostic) -> Parse<T> {
        self.errors.push(d);
        Err(Failed)
    }

    fn expected<T>(&mut self, what: &str) -> Parse<T> {
        let d = self.expected_here(what);
        self.fail(d)
    }

    fn expected_here(&self, what: &str) -> Diagnostic {
        let t = self.peek();
        // What is missing at the end of a line is missed there, not on the next line.
        let (span, label) = if (t.first_on_line || t.kind == TokenKind::End) && self.at > 0 {
            (self.last(), "after this")
        } else {
            (t.span, "")
        };
        Diagnostic::error(span, format!("expected {what}, found {}", self.found()), label)
    }

    fn expect(&mut self, kind: TokenKind, text: &str) -> Parse<Span> {
        if self.peek().kind == kind { Ok(self.next().span) } else { self.expected(&format!("`{text}`")) }
    }

    fn name(&mut self, what: &str) -> Parse<Ident> {
        match self.word() {
            Some(w) if RESERVED.contains(&w) => {
                let d = Diagnostic::error(self.peek().span, format!("`{w}` is a keyword and cannot be a name"), "");
                self.fail(d)
            }
            Some("×") | None => self.expected(what),
            Some(w) => Ok(Ident { name: w.to_string(), span: self.next().span }),
        }
    }

    fn string(&mut self, what: &str) -> Parse<Ident> {
        if self.peek().kind != TokenKind::Str {
            return self.expected(what);
        }
        let span = self.next().span;
        Ok(Ident { name: self.text_of(span).trim_matches('"').to_string(), span })
    }

    fn starts(&self, keywords: &[&str]) -> bool {
        self.peek().first_on_line && self.word().is_some_and(|w| keywords.contains(&w))
    }

    /// Skips to where something new begins: a keyword of `at_line_start` that is first on its line, an item, or a
    /// closing brace that closes nothing skipped.
    fn recover(&mut self, at_line_start: &[&str]) {
        let mut open = 0;
        loop {
            if self.starts(&ITEMS) || (open == 0 && self.starts(at_line_start)) {
                return;
            }
            match self.peek().kind {
                TokenKind::End => return,
                TokenKind::LBrace => open += 1,
                TokenKind::RBrace if open == 0 => return,
                TokenKind::RBrace => open -= 1,
                _ => (),
            }
            self.next();
        }
    }

    /// Lines of `///` directly before the next token.
    fn doc(&self) -> Vec<String> {
        let start = self.peek().span.start;
        let from = if self.at == 0 { 0 } else { self.last().end };
        let end = self.lexed.comments.partition_point(|c| c.start < start);
        let begin = self.lexed.comments.partition_point(|c| c.start < from);
        self.lexed.comments[begin..end]
            .iter()
            .filter_map(|c| self.text_of(*c).strip_prefix("///"))
            .map(|l| l.strip_prefix(' ').unwrap_or(l).to_string())
            .collect()
    }

    fn file(&mut self) -> File {
        let mut file = File::default();
        while self.peek().kind != TokenKind::End {
            let doc = self.doc();
            let at = self.at;
            let item = match self.word() {
                Some("use") => self.use_item().map(Item::Use),
                Some("family") => self.family(doc).map(Item::Family),
                Some("quantizer") => self.quantizer(doc).map(Item::Quantizer),
                Some("fusion") => self.fusion(doc).map(Item::Fusion),
                Some("function") => self.function(doc).map(Item::Function),
                Some("layout") => self.layout(doc).map(Item::Layout),
                word => {
                    let mut d = self.expected_here("`family`, `quantizer`, `layout`, `function`, `fusion` or `use`");
                    d.labels[0] = (self.peek().span, String::new());
                    if let Some(near) = word.and_then(|w| nearest(w, ITEMS)) {
                        d = d.meant(near);
                    } else if word.is_some_and(|w| PROPERTIES.contains(&w)) {
                        d = d.hint("a property stands in the braces of a family or quantizer");
                    }
                    self.fail(d)
                }
            };
            match item {
                Ok(_) if file.items.len() == MOST_MEMBERS => {
                    let d = Diagnostic::error(self.last(), format!("more than {MOST_MEMBERS} definitions"), "");
                    self.errors.push(d.hint("put the others in a file of their own"));
                    file.incomplete = true;
                    break;
                }
                Ok(item) => file.items.push(item),
                Err(Failed) => {
                    file.incomplete = true;
                    if self.at == at {
                        self.next();
                    }
                    self.recover(&[]);
                    self.eat(TokenKind::RBrace);
                }
            }
        }
        file
    }

    fn use_item(&mut self) -> Parse<Use> {
        let start = self.next().span;
        let library = self.peek().kind == TokenKind::Name && !self.peek().first_on_line;
        let path = match library {
            true => self.name("the name of a library")?,
            false => self.string("the path of a file in double quotes, or `std` or `palette`")?,
        };
        Ok(Use { span: start.to(path.span), path, library })
    }

    fn family(&mut self, doc: Vec<String>) -> Parse<Family> {
        let start = self.next().span;
        let name = self.name("the family's name")?;
        self.expect(TokenKind::LParen, "(")?;
        let params = self.separated(TokenKind::RParen, ")", |p| p.name("a parameter"))?;
        let body = self.body()?;
        Ok(Family { doc, name, params, body, span: start.to(self.last()) })
    }

    fn quantizer(&mut self, doc: Vec<String>) -> Parse<Quantizer> {
        let start = self.next().span;
        let name = self.name("the quantizer's name")?;
        let def = if self.eat(TokenKind::Assign) {
            let family = self.name("a family or `mix`")?;
            self.expect(TokenKind::LParen, "(")?;
            if family.name == "mix" {
                Definition::Mix(self.separated(TokenKind::RParen, ")", |p| p.name("a quantizer's name"))?)
            } else {
                Definition::Member { family, args: self.separated(TokenKind::RParen, ")", Parser::expr)? }
            }
        } else if self.peek().kind == TokenKind::LBrace {
            Definition::Body(self.body()?)
        } else {
            return self.expected("`=` and a family, or `{` and properties");
        };
        Ok(Quantizer { doc, name, def, span: start.to(self.last()) })
    }

    /// Items separated by commas up to `close`; a last comma is allowed.
    fn separated<T>(
        &mut self,
        close: TokenKind,
        close_text: &str,
        mut item: impl FnMut(&mut Self) -> Parse<T>,
    ) -> Parse<Vec<T>> {
        let mut out = Vec::new();
        loop {
            if self.eat(close) {
                return Ok(out);
            }
            out.push(item(self)?);
            if !self.eat(TokenKind::Comma) {
                if self.eat(close) {
                    return Ok(out);
                }
                return self.expected(&format!("`,` or `{close_text}`"));
            }
        }
    }

    fn unclosed(&mut self, open: Span) {
        let d = Diagnostic::error(open, "this `{` is never closed", "opened here");
        let end = self.last();
        self.errors.push(d.label(end, "`}` is missing after this").hint("add a `}`"));
    }

    /// Properties in braces. Bad properties are left out.
    fn body(&mut self) -> Parse<Body> {
        let open = self.expect(TokenKind::LBrace, "{")?;
        self.bodies += 1;
        if self.bodies > MAX_BODIES {
            self.bodies = 0;
            return self.fail(
                Diagnostic::error(open, "`code` bodies are nested too deeply", "")
                    .hint("a quantizer holds `code` bodies, and these hold none"),
            );
        }
        let (properties, incomplete) = self.members(open, &PROPERTIES, Self::property);
        self.bodies = self.bodies.saturating_sub(1);
        Ok(Body { properties, span: open.to(self.last()), incomplete })
    }

    /// What stands between the brace `open` and its end: members that begin with one of `words`, where the next is looked
    /// for after one that fails. True if anything failed or the brace is not closed.
    fn members<T>(&mut self, open: Span, words: &[&str], member: impl Fn(&mut Self) -> Parse<T>) -> (Vec<T>, bool) {
        let mut members = Vec::new();
        let mut incomplete = false;
        while !self.eat(TokenKind::RBrace) {
            if self.peek().kind == TokenKind::End || self.starts(&ITEMS) {
                self.unclosed(open);
                return (members, true);
            }
            let at = self.at;
            match member(self) {
                Ok(_) if members.len() == MOST_MEMBERS => {
                    if !incomplete {
                        let what = format!("more than {MOST_MEMBERS} lines between these braces");
                        self.errors.push(Diagnostic::error(open, what, "opened here"));
                    }
                    incomplete = true;
                }
                Ok(m) => members.push(m),
                Err(Failed) => {
                    incomplete = true;
                    if self.at == at {
                        self.next();
                    }
                    self.recover(words);
                }
            }
        }
        (members, incomplete)
    }

    fn property(&mut self) -> Parse<Property> {
        let Some(word) = self.word() else { return self.expected("a property such as `window`") };
        let keyword = Ident { name: word.to_string(), span: self.peek().span };
        if !PROPERTIES.contains(&word) {
            let d = Diagnostic::error(keyword.span, format!("there is no property `{word}`"), "");
            let d = match nearest(word, PROPERTIES) {
                Some(near) => d.meant(near),
                None => d.hint(format!("the properties are {}", PROPERTIES.join(", "))),
            };
            return self.fail(d);
        }
        self.next();
        let kind = match word {
            "let" => {
                let name = self.name("a name")?;
                self.expect(TokenKind::Assign, "=")?;
                PropertyKind::Let(name, self.expr()?)
            }
            "window" => PropertyKind::Window(self.expr()?),
            "vector" => PropertyKind::Vector(self.expr()?),
            "step" => PropertyKind::Step(self.expr()?),
            "block" => {
                let rows = self.expr()?;
                if !self.eat_word("x") && !self.eat_word("×") {
                    let d = self.expected_here("`x`").hint("a block is written `rows x columns`, as in `2 x 128`");
                    return self.fail(d);
                }
                PropertyKind::Block(rows, self.expr()?)
            }
            "values" => {
                let ty = self.name("`i8` or `i16`")?;
                let offset = match self.peek().kind {
                    TokenKind::Plus => {
                        self.next();
                        Some(self.expr()?)
                    }
                    // `values i8 - 4`: a sum that begins with a sign.
                    TokenKind::Minus => Some(self.expr()?),
                    _ => None,
                };
                PropertyKind::Values(ty, offset)
            }
            "unit" => PropertyKind::Unit(self.expr()?),
            "table" => PropertyKind::Table(self.table()?),
            "decode" => PropertyKind::Decode(self.decode("a name for the window, as in `decode w {`", "decode")?),
            "scale" => {
                let name = self.name("`row` or `matrix`")?;
                if self.peek().kind == TokenKind::LParen {
                    let d = Diagnostic::error(name.span, format!("there is no scale `{}(…)`", name.name), "");
                    let d = d.hint(
                        "a scale is of a `row` or of the `matrix`; one for a group of columns is a format's field: \
                         `field s : f16 per 1 x 128` and `weight e { e * s }`",
                    );
                    return self.fail(d);
                }
                PropertyKind::Scale(name)
            }
            "rotate" => {
                let name = self.name("`none` or `hadamard(seed = 0)`")?;
                let args = if self.peek().kind == TokenKind::LParen {
                    self.args("seed = 0, block = 128, interleave = 1024")?.0
                } else {
                    Vec::new()
                };
                PropertyKind::Rotate(name, args)
            }
            "code" => PropertyKind::Code(self.body()?),
            "bits" => {
                let bits = self.expr()?;
                PropertyKind::Bits(bits, if self.eat_word("for") { Some(self.expr()?) } else { None })
            }
            "field" => PropertyKind::Field(self.field()?),
            "weight" => PropertyKind::Weight(self.decode("a name for the entry, as in `weight e {`", "weight")?),
            "order" => PropertyKind::Order(self.decode("a name for the weight's number, as in `order p {`", "order")?),
            "input" => PropertyKind::Input(self.steps()?),
            "output" => PropertyKind::Output(self.steps()?),
            _ => return self.expected("a property"),
        };
        Ok(Property { span: keyword.span.to(self.last()), keyword, kind })
    }

    /// `(name = constant, …)`, as in `example`, and the span of the parentheses.
    fn args(&mut self, example: &str) -> Parse<(Vec<Arg>, Span)> {
        let open = self.expect(TokenKind::LParen, "(")?;
        let args = self.separated(TokenKind::RParen, ")", |p| {
            if !p.lexed.tokens.get(p.at + 1).is_some_and(|t| t.kind == TokenKind::Assign) {
                let d = p.expected_here("the name of an argument and `=`");
                return p.fail(d.hint(format!("arguments have names: `({example})`")));
            }
            let name = p.name("a name, as in `seed = 0`")?;
            p.expect(TokenKind::Assign, "=")?;
            Ok(Arg { name, value: p.expr()? })
        })?;
        Ok((args, open.to(self.last())))
    }

    fn table(&mut self) -> Parse<Table> {
        let name = self.name("the table's name")?;
        if self.peek().kind != TokenKind::LBracket {
            let d = self.expected_here("`[`").hint(format!("say how many entries it has: `table {}[512]`", name.name));
            return self.fail(d);
        }
        self.next();
        let entries = self.expr()?;
        self.expect(TokenKind::RBracket, "]")?;
        let source = if self.eat(TokenKind::Assign) {
            TableSource::Inline(self.expr()?)
        } else if self.eat_word("from") {
            TableSource::File(self.string("the path of a table file in double quotes")?)
        } else if self.eat_word("trained") {
            let (args, args_span) = self.args("seed = 1, rounds = 8, samples = 2 ** 20")?;
            if !self.eat_word("in") {
                let d = self.expected_here("`in`").hint("say where the table is kept: `in \"tables/{name}.table\"`");
                return self.fail(d);
            }
            TableSource::Trained { args, args_span, path: self.string("the path of a table file in double quotes")? }
        } else if self.eat(TokenKind::Colon) {
            TableSource::OfMatrix(Box::new(self.type_and_cover()?))
        } else {
            return self.expected("`= [values]`, `from \"file\"` or `trained(…) in \"file\"`");
        };
        Ok(Table { name, entries, source })
    }

    /// `name { let … result }`; `what` is expected for a name, `kind` is what the block is called.
    fn decode(&mut self, what: &str, kind: &str) -> Parse<Decode> {
        let window = self.name(what)?;
        let (lets, result) = self.block(kind)?;
        Ok(Decode { window, lets, result })
    }

    /// `{ let … result }`
    fn block(&mut self, kind: &str) -> Parse<(Vec<(Ident, Expr)>, Expr)> {
        let open = self.expect(TokenKind::LBrace, "{")?;
        self.sign_first = None;
        let mut lets = Vec::new();
        let mut result = None;
        let mut failed = false;
        loop {
            if self.peek().kind == TokenKind::RBrace {
                break;
            }
            if self.peek().kind == TokenKind::End || self.starts(&ITEMS) {
                self.unclosed(open);
                return Err(Failed);
            }
            if self.block_line(kind, &mut lets, &mut result).is_err() {
                failed = true;
                self.recover(&["let"]);
            }
        }
        let close = self.next().span;
        match result {
            Some(result) if !failed => Ok((lets, result)),
            None if !failed => {
                let message = format!("the {kind} block has no result");
                let d = Diagnostic::error(close, message, "expected an expression before this");
                if let (Some(sign), Some((_, last))) = (self.sign_first, lets.last())
                    && last.span.start < sign.start
                {
                    let d = d.label(sign, "this continues the line before");
                    return self.fail(d.hint("put a result that begins with a sign in parentheses, as in `(-t[h])`"));
                }
                self.fail(d.hint(match kind {
                    "decode" => "end the block with the entries, as in `t[h >> 23]`",
                    "weight" => "end the block with the weight, as in `e * s`",
                    "order" => "end the block with the weight's place, as in `[p / 16, p % 16]`",
                    _ => "end the block with an expression",
                }))
            }
            Some(_) | None => Err(Failed),
        }
    }

    fn block_line(&mut self, kind: &str, lets: &mut Vec<(Ident, Expr)>, result: &mut Option<Expr>) -> Parse<()> {
        if let Some(r) = result {
            let d = Diagnostic::error(
                r.span,
                format!("only the last expression of a {kind} block is its result"),
                "this one is followed by more",
            );
            *result = None;
            return self.fail(d.hint("give it a name with `let`, or join the lines with an operator"));
        }
        if self.eat_word("let") {
            let name = self.name("a name")?;
            if lets.len() == MOST_MEMBERS {
                return self.fail(Diagnostic::error(name.span, format!("more than {MOST_MEMBERS} names"), ""));
            }
            self.expect(TokenKind::Assign, "=")?;
            lets.push((name, self.expr()?));
        } else {
            *result = Some(self.expr()?);
        }
        Ok(())
    }

    fn fusion(&mut self, doc: Vec<String>) -> Parse<Fusion> {
        let start = self.next().span;
        let name = self.name("the fusion pattern's name")?;
        let open = self.expect(TokenKind::LBrace, "{")?;
        let (launches, incomplete) = self.members(open, &["launch"], Self::launch);
        Ok(Fusion { doc, name, launches, span: start.to(self.last()), incomplete })
    }

    fn launch(&mut self) -> Parse<Launch> {
        if self.word() != Some("launch") {
            let what = "expected `launch` and matrices, as in `launch q + k + v`";
            let d = Diagnostic::error(self.peek().span, format!("{what}, found {}", self.found()), "");
            return self.fail(d);
        }
        let start = self.next().span;
        let mut matrices = vec![self.name("a matrix")?];
        while self.eat(TokenKind::Plus) {
            matrices.push(self.name("a matrix")?);
        }
        let (mut prologue, mut epilogue) = (Vec::new(), Vec::new());
        if self.eat(TokenKind::LBrace) {
            while !self.eat(TokenKind::RBrace) {
                if self.around_launch(&mut prologue, &mut epilogue).is_err() {
                    self.recover(&["launch"]);
                    self.eat(TokenKind::RBrace);
                    return Err(Failed);
                }
            }
        }
        Ok(Launch { matrices, prologue, epilogue, span: start.to(self.last()) })
    }

    fn around_launch(&mut self, prologue: &mut Vec<Ident>, epilogue: &mut Vec<Ident>) -> Parse<()> {
        let list = if self.eat_word("prologue") {
            prologue
        } else if self.eat_word("epilogue") {
            epilogue
        } else {
            return self.expected("`prologue`, `epilogue` or `}`");
        };
        loop {
            list.push(self.name("an operation")?);
            if !self.eat(TokenKind::Comma) {
                return Ok(());
            }
        }
    }

    fn expr(&mut self) -> Parse<Expr> {
        self.nested(|p| p.binary(0))
    }

    fn too_long<T>(&mut self) -> Parse<T> {
        let d = Diagnostic::error(self.peek().span, "this expression is too long or nested too deeply", "");
        self.fail(d.hint("split it with `let`"))
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        self.depth += 1;
        let out = if self.depth > MAX_DEPTH { self.too_long() } else { parse(self) };
        self.depth -= 1;
        out
    }

    fn node(&mut self, kind: ExprKind, span: Span) -> Parse<Expr> {
        let e = Expr::new(kind, span);
        if e.height > MAX_HEIGHT { self.too_long() } else { Ok(e) }
    }

    fn binary(&mut self, min: u32) -> Parse<Expr> {
        let mut left = self.unary()?;
        while let Some((op, precedence)) = binary_op(self.peek().kind) {
            if precedence < min {
                break;
            }
            let sign = self.next();
            if op == BinaryOp::Sub && sign.first_on_line {
                self.sign_first = Some(sign.span);
            }
            let right = self.binary(precedence + 1)?;
            let span = left.span.to(right.span);
            left = self.node(ExprKind::Binary(op, Box::new(left), Box::new(right)), span)?;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parse<Expr> {
        let t = self.peek();
        let op = match t.kind {
            TokenKind::Minus => UnaryOp::Neg,
            TokenKind::Not => UnaryOp::Not,
            _ => return self.power(),
        };
        self.next();
        let of = self.nested(Self::unary)?;
        let span = t.span.to(of.span);
        // A negative literal is a number, so that tables of numbers are lists of numbers.
        if let (UnaryOp::Neg, ExprKind::Number(n)) = (op, &of.kind)
            && let Some(n) = n.checked_neg()
        {
            return self.node(ExprKind::Number(n), span);
        }
        self.node(ExprKind::Unary(op, Box::new(of)), span)
    }

    /// `a ** b`: binds more tightly than a sign before it, and takes one after it.
    fn power(&mut self) -> Parse<Expr> {
        let base = self.postfix()?;
        if !self.eat(TokenKind::Power) {
            return Ok(base);
        }
        let exponent = self.nested(Self::unary)?;
        let span = base.span.to(exponent.span);
        self.node(ExprKind::Binary(BinaryOp::Pow, Box::new(base), Box::new(exponent)), span)
    }

    fn postfix(&mut self) -> Parse<Expr> {
        let mut e = self.primary()?;
        while self.peek().kind == TokenKind::LBracket && self.touches() {
            self.next();
            let index = self.expr()?;
            if self.eat(TokenKind::Range) {
                let to = self.expr()?;
                self.expect(TokenKind::RBracket, "]")?;
                let span = e.span.to(self.last());
                e = self.node(ExprKind::Range(Box::new(e), Box::new(index), Box::new(to)), span)?;
                continue;
            }
            if self.peek().kind == TokenKind::Comma {
                let d = Diagnostic::error(self.peek().span, "there is one index, not several", "");
                let cure = "an entry is `t[i]`, and has as many weights as the code's `vector`; bits a to b - 1 of a word are `h[a..b]`";
                return self.fail(d.hint(cure));
            }
            self.expect(TokenKind::RBracket, "]")?;
            let span = e.span.to(self.last());
            e = self.node(ExprKind::Index(Box::new(e), Box::new(index)), span)?;
        }
        Ok(e)
    }

    fn primary(&mut self) -> Parse<Expr> {
        let t = self.peek();
        match t.kind {
            TokenKind::Number(n) => {
                self.next();
                self.node(ExprKind::Number(n), t.span)
            }
            TokenKind::LParen => {
                self.next();
                let mut inner = self.expr()?;
                self.expect(TokenKind::RParen, ")")?;
                inner.span = t.span.to(self.last());
                Ok(inner)
            }
            TokenKind::LBracket => {
                self.next();
                let list = self.separated(TokenKind::RBracket, "]", Parser::expr)?;
                self.node(ExprKind::List(list), t.span.to(self.last()))
            }
            TokenKind::Name if self.starts(&PROPERTIES) || self.starts(&ITEMS) => self.expected("an expression"),
            TokenKind::Name if self.eat_word("if") => {
                let condition = self.expr()?;
                if !self.eat_word("then") {
                    return self.expected("`then`");
                }
                let a = self.expr()?;
                if !self.eat_word("else") {
                    return self.expected("`else`");
                }
                let b = self.expr()?;
                let span = t.span.to(b.span);
                self.node(ExprKind::If(Box::new(condition), Box::new(a), Box::new(b)), span)
            }
            TokenKind::Name => {
                let name = self.name("an expression")?;
                if self.peek().kind == TokenKind::LParen && self.touches() {
                    self.next();
                    let args = self.separated(TokenKind::RParen, ")", Parser::expr)?;
                    let span = name.span.to(self.last());
                    return self.node(ExprKind::Call(name, args), span);
                }
                self.node(ExprKind::Name(name.name), name.span)
            }
            _ => self.expected("an expression"),
        }
    }
}

/// Operator and precedence; higher binds more tightly.
fn binary_op(kind: TokenKind) -> Option<(BinaryOp, u32)> {
    Some(match kind {
        TokenKind::Eq => (BinaryOp::Eq, 0),
        TokenKind::Ne => (BinaryOp::Ne, 0),
        TokenKind::Lt => (BinaryOp::Lt, 0),
        TokenKind::Le => (BinaryOp::Le, 0),
        TokenKind::Gt => (BinaryOp::Gt, 0),
        TokenKind::Ge => (BinaryOp::Ge, 0),
        TokenKind::Or => (BinaryOp::Or, 1),
        TokenKind::Xor => (BinaryOp::Xor, 2),
        TokenKind::And => (BinaryOp::And, 3),
        TokenKind::Shl => (BinaryOp::Shl, 4),
        TokenKind::Shr => (BinaryOp::Shr, 4),
        TokenKind::Plus => (BinaryOp::Add, 5),
        TokenKind::Minus => (BinaryOp::Sub, 5),
        TokenKind::Star => (BinaryOp::Mul, 6),
        TokenKind::Slash => (BinaryOp::Div, 6),
        TokenKind::Percent => (BinaryOp::Rem, 6),
        TokenKind::Name
        | TokenKind::Number(_)
        | TokenKind::Str
        | TokenKind::LBrace
        | TokenKind::RBrace
        | TokenKind::LParen
        | TokenKind::RParen
        | TokenKind::LBracket
        | TokenKind::RBracket
        | TokenKind::Comma
        | TokenKind::Dot
        | TokenKind::Range
        | TokenKind::Colon
        | TokenKind::Assign
        | TokenKind::Power
        | TokenKind::Not
        | TokenKind::End => return None,
    })
}

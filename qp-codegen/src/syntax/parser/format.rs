//! What formats have beside codes: functions, fields, layouts.

use super::{Failed, Parse, Parser, TokenKind};
use crate::syntax::ast::*;
use crate::syntax::diag::nearest;

/// Words that begin a line of a layout, beside targets.
const LINES: [&str; 3] = ["type", "tensor", "record"];

impl Parser<'_> {
    /// `function name(parameters) { let … result }`
    pub(super) fn function(&mut self, doc: Vec<String>) -> Parse<Function> {
        let start = self.next().span;
        let name = self.name("the function's name")?;
        self.expect(TokenKind::LParen, "(")?;
        let params = self.separated(TokenKind::RParen, ")", |p| p.name("a parameter"))?;
        let (lets, result) = self.block("function")?;
        Ok(Function { doc, name, params, lets, result, span: start.to(self.last()) })
    }

    /// What stands after `field`.
    pub(super) fn field(&mut self) -> Parse<FieldDecl> {
        let name = self.name("the field's name")?;
        if !self.eat(TokenKind::Colon) {
            let d = self.expected_here("`:`");
            return self
                .fail(d.hint(format!("a field has a type and a cover: `field {} : f16 per 1 x 32`", name.name)));
        }
        let (ty, cover) = self.type_and_cover()?;
        let formula = if self.eat(TokenKind::Assign) { Some(self.expr()?) } else { None };
        Ok(FieldDecl { name, ty, cover, formula })
    }

    /// `type per cover`
    pub(super) fn type_and_cover(&mut self) -> Parse<(TypeName, CoverExpr)> {
        let ty = self.type_name()?;
        if !self.eat_word("per") {
            let d = self.expected_here("`per`");
            return self.fail(d.hint("say which weights share one: `per row`, `per matrix` or `per 1 x 32`"));
        }
        Ok((ty, self.cover()?))
    }

    fn type_name(&mut self) -> Parse<TypeName> {
        let name = self.name("a type such as `f16` or `u4`")?;
        let bits = if self.peek().kind == TokenKind::LParen && self.touches() {
            self.next();
            let bits = self.expr()?;
            self.expect(TokenKind::RParen, ")")?;
            Some(bits)
        } else {
            None
        };
        Ok(TypeName { name, bits })
    }

    fn cover(&mut self) -> Parse<CoverExpr> {
        if let Some(word @ ("matrix" | "row" | "column" | "flat")) = self.word() {
            let name = self.name("a cover")?;
            return Ok(if word == "flat" { CoverExpr::Flat(name, self.expr()?) } else { CoverExpr::Named(name) });
        }
        let rows = self.expr()?;
        if !self.eat_word("x") && !self.eat_word("×") {
            let d = self.expected_here("`x`");
            return self
                .fail(d.hint("a cover is `matrix`, `row`, `column`, `flat 64`, or rows x columns, as in `1 x 32`"));
        }
        Ok(CoverExpr::Rectangle(rows, self.expr()?))
    }

    /// What stands after `input` or `output`.
    pub(super) fn steps(&mut self) -> Parse<Vec<Step>> {
        let mut steps = Vec::new();
        loop {
            let name = self.name("a field, `hadamard`, `signs(seed = 0)` or `permute(field)`")?;
            let (mut value, mut args) = (None, Vec::new());
            if self.peek().kind == TokenKind::LParen && self.touches() {
                let named = self.lexed.tokens.get(self.at + 2).is_some_and(|t| t.kind == TokenKind::Assign);
                if named {
                    args = self.args("seed = 0")?.0;
                } else {
                    self.next();
                    value = Some(self.expr()?);
                    self.expect(TokenKind::RParen, ")")?;
                }
            }
            steps.push(Step { name, value, args });
            if !self.eat(TokenKind::Comma) {
                return Ok(steps);
            }
        }
    }

    /// `layout name of quantizer { … }`
    pub(super) fn layout(&mut self, doc: Vec<String>) -> Parse<Layout> {
        let start = self.next().span;
        let name = self.name("the layout's name")?;
        if !self.eat_word("of") {
            let d = self.expected_here("`of`");
            return self.fail(d.hint("say whose bits it places: `layout gguf of q4_0 { … }`"));
        }
        let of = self.name("a quantizer or family")?;
        let open = self.expect(TokenKind::LBrace, "{")?;
        let (lines, incomplete) = self.members(open, &LINES, Self::layout_line);
        Ok(Layout { doc, name, of, lines, span: start.to(self.last()), incomplete })
    }

    fn layout_line(&mut self) -> Parse<LayoutLine> {
        match self.word() {
            Some("type") => {
                let keyword = self.name("`type`")?;
                Ok(LayoutLine::Type(keyword, self.expr()?))
            }
            Some("tensor" | "record") => self.tensor().map(LayoutLine::Tensor),
            Some(_) => self.place().map(|p| LayoutLine::Place(Box::new(p))),
            None => self.expected("`tensor`, `record`, `type`, or a place such as `code(r, c) in …`"),
        }
    }

    fn dims(&mut self) -> Parse<Vec<Expr>> {
        self.expect(TokenKind::LBracket, "[")?;
        self.separated(TokenKind::RBracket, "]", Self::expr)
    }

    fn tensor(&mut self) -> Parse<TensorDecl> {
        let keyword = self.name("`tensor`")?;
        let name = self.name("the tensor's name")?;
        let (dims, members) = if keyword.name == "tensor" {
            self.expect(TokenKind::Colon, ":")?;
            let ty = self.type_name()?;
            let span = ty.name.span;
            (self.dims()?, vec![Member { name: None, ty, count: None, span }])
        } else {
            let dims = self.dims()?;
            let open = self.expect(TokenKind::LBrace, "{")?;
            let (members, incomplete) = self.members(open, &[], Self::member);
            if incomplete {
                return Err(Failed);
            }
            (dims, members)
        };
        let span = keyword.span.to(self.last());
        Ok(TensorDecl { keyword, name, dims, members, span })
    }

    fn member(&mut self) -> Parse<Member> {
        let name = self.name("a member, as in `d : f16`")?;
        self.expect(TokenKind::Colon, ":")?;
        let ty = self.type_name()?;
        let count = if self.peek().kind == TokenKind::LBracket && self.touches() {
            self.next();
            let count = self.expr()?;
            self.expect(TokenKind::RBracket, "]")?;
            Some(count)
        } else {
            None
        };
        let span = name.span.to(self.last());
        Ok(Member { name: Some(name), ty, count, span })
    }

    fn place(&mut self) -> Parse<Place> {
        let target = self.name("a target")?;
        if self.peek().kind != TokenKind::LParen {
            let d = self.expected_here("`(`");
            let d = match nearest(&target.name, LINES) {
                Some(near) => d.replace(target.span, near).hint(format!("did you mean `{near}`?")),
                None => d.hint("a place begins with what is stored and its indices: `code(r, c) in …`"),
            };
            return self.fail(d);
        }
        self.next();
        let vars = self.separated(TokenKind::RParen, ")", |p| p.name("the name of an index"))?;
        let (mut bits, mut bit_name) = (None, None);
        if self.eat(TokenKind::LBracket) {
            // A name alone stands for each bit of a stream.
            if self.lexed.tokens.get(self.at + 1).is_some_and(|t| t.kind == TokenKind::RBracket) {
                bit_name = Some(self.name("the name of a bit's number")?);
            } else {
                let from = self.expr()?;
                self.expect(TokenKind::Range, "..")?;
                bits = Some((from, self.expr()?));
            }
            self.expect(TokenKind::RBracket, "]")?;
        }
        let less = if self.eat(TokenKind::Minus) { Some(self.expr()?) } else { None };
        if !self.eat_word("in") {
            let d = self.expected_here("`in`");
            return self.fail(d.hint("say where it lies: `in tensor[r, c]` or `in record[r, c / 32].member[c % 32]`"));
        }
        let tensor = self.name("a tensor or record")?;
        self.expect(TokenKind::LBracket, "[")?;
        let indices = self.separated(TokenKind::RBracket, "]", |p| {
            if p.eat(TokenKind::Star) { Ok(None) } else { p.expr().map(Some) }
        })?;
        let member = if self.eat(TokenKind::Dot) {
            let name = self.name("a member of the record")?;
            let index = if self.eat(TokenKind::LBracket) {
                let index = self.expr()?;
                self.expect(TokenKind::RBracket, "]")?;
                Some(index)
            } else {
                None
            };
            Some((name, index))
        } else {
            None
        };
        let bit = if self.eat_word("bit") { Some(self.expr()?) } else { None };
        let read = if self.eat_word("read") {
            Some(self.decode("a name for what is stored, as in `read b {`", "read")?)
        } else {
            None
        };
        let span = target.span.to(self.last());
        Ok(Place { target, vars, bit_name, bits, less, tensor, indices, member, bit, read, span })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ITEMS, PROPERTIES, RESERVED};
    use super::LINES;

    #[test]
    fn the_editors_grammar_knows_all_keywords() {
        let grammar = include_str!("../../../../editors/vscode/syntaxes/qspec.tmLanguage.json");
        for word in ITEMS.iter().chain(&PROPERTIES).chain(&RESERVED).chain(&LINES) {
            let listed = ["(", "|"]
                .iter()
                .any(|before| [")", "|"].iter().any(|after| grammar.contains(&format!("{before}{word}{after}"))));
            assert!(listed || grammar.contains(&format!("{word}\\\\b")), "{word}");
        }
    }
}

//! Formulas of fields: how an encoder finds their numbers.

use super::Sink;
use super::consts::{self, Const, Scope, number};
use crate::spec::format::{Arithmetic, Field};
use crate::spec::formula::{Formula, FormulaOp, Reduction};
use crate::syntax::ast::{BinaryOp, Body, Expr, ExprKind, PropertyKind, UnaryOp};
use crate::syntax::diag::{Diagnostic, Span};
use crate::syntax::number::Rational;

/// The name of the weights that a number covers.
const WEIGHTS: &str = "w";
/// Functions of numbers, beside those of the weights.
const FUNCTIONS: [&str; 5] = ["round", "floor", "log2", "max", "min"];
/// Most operations of a formula.
const MOST: usize = 256;

/// Checks the formulas of all fields of a body and gives them to `fields`; false if one is wrong.
pub fn all(b: &Body, fields: &mut [(Field, Span)], scope: &Scope, sink: &mut Sink) -> bool {
    let mut ok = true;
    let mut spans: Vec<Option<Span>> = vec![None; fields.len()];
    for property in &b.properties {
        let PropertyKind::Field(decl) = &property.kind else { continue };
        let Some(e) = &decl.formula else { continue };
        // Of two fields of one name, which is an error, the first.
        let Some(own) = fields.iter().position(|f| f.0.name == decl.name.name) else { continue };
        let checked = Checker { own, fields, scope, sink, ops: Vec::new() }.check(e);
        ok &= checked.is_some();
        spans[own] = Some(e.span);
        fields[own].0.formula = checked;
    }
    ok && acyclic(fields, &spans, sink)
}

/// Whether no formula needs its own field by way of others.
fn acyclic(fields: &[(Field, Span)], spans: &[Option<Span>], sink: &mut Sink) -> bool {
    let of = |f: usize| fields[f].0.formula.iter().flat_map(Formula::fields);
    for start in 0..fields.len() {
        let (mut seen, mut queue) = (vec![false; fields.len()], of(start).collect::<Vec<_>>());
        while let Some(f) = queue.pop() {
            if f == start {
                let name = &fields[start].0.name;
                let span = spans[start].unwrap_or(fields[start].1);
                let d = Diagnostic::error(span, format!("the formula of `{name}` needs `{name}` itself"), "");
                sink.push(d.hint("say one of the fields by the weights alone: max(w), absmax(w), …"));
                return false;
            }
            if !std::mem::replace(&mut seen[f], true) {
                queue.extend(of(f));
            }
        }
    }
    true
}

/// The value of a part of a formula.
#[derive(Clone, Copy)]
enum Part {
    Const(Rational),
    Node(usize),
}

struct Checker<'a> {
    own: usize,
    fields: &'a [(Field, Span)],
    scope: &'a Scope,
    sink: &'a mut Sink,
    ops: Vec<FormulaOp>,
}

impl Checker<'_> {
    fn check(mut self, e: &Expr) -> Option<Formula> {
        let part = self.expr(e)?;
        let last = self.node(part, e.span)?;
        Some(Formula::of(&self.ops, last))
    }

    fn push(&mut self, op: FormulaOp, span: Span) -> Option<usize> {
        if let Some(i) = self.ops.iter().position(|o| *o == op) {
            return Some(i);
        }
        if self.ops.len() == MOST {
            return self.fail(span, format!("a formula has more than {MOST} operations"), "divide it among fields");
        }
        self.ops.push(op);
        Some(self.ops.len() - 1)
    }

    fn node(&mut self, part: Part, span: Span) -> Option<usize> {
        match part {
            Part::Const(c) => self.push(FormulaOp::Const(c), span),
            Part::Node(n) => Some(n),
        }
    }

    fn part(&mut self, op: FormulaOp, span: Span) -> Option<Part> {
        self.push(op, span).map(Part::Node)
    }

    fn fail<T>(&mut self, span: Span, message: impl Into<String>, hint: impl Into<String>) -> Option<T> {
        self.sink.fail(Diagnostic::error(span, message, "").hint(hint))
    }

    fn constant(&mut self, value: Const, span: Span) -> Option<Part> {
        match value {
            Const::Number(n) => Some(Part::Const(n)),
            other => self.fail(span, format!("expected a number, found {}", other.describe()), "a formula is a number"),
        }
    }

    fn expr(&mut self, e: &Expr) -> Option<Part> {
        match &e.kind {
            ExprKind::Number(n) => Some(Part::Const(*n)),
            ExprKind::Name(name) => self.name(name, e.span),
            ExprKind::Unary(UnaryOp::Neg, a) => match self.expr(a)? {
                Part::Const(c) => {
                    let value = consts::fold_unary(UnaryOp::Neg, c, e.span, self.sink)?;
                    self.constant(value, e.span)
                }
                Part::Node(n) => self.part(FormulaOp::Neg(n), e.span),
            },
            ExprKind::Binary(op, a, b) => self.binary(*op, a, b, e.span),
            ExprKind::If(c, a, b) => self.choice(c, a, b, e.span),
            ExprKind::Call(f, args) => self.call(&f.name, f.span, args, e.span),
            ExprKind::Unary(UnaryOp::Not, _) | ExprKind::Index(..) | ExprKind::Range(..) | ExprKind::List(_) => {
                self.fail(e.span, "a formula is a number", "bits, lists and look-ups stand in the decode block")
            }
        }
    }

    fn binary(&mut self, op: BinaryOp, a: &Expr, b: &Expr, span: Span) -> Option<Part> {
        let (x, y) = (self.expr(a), self.expr(b));
        let (x, y) = (x?, y?);
        if let (Part::Const(x), Part::Const(y)) = (x, y) {
            let value = consts::fold(op, x, y, span, self.sink)?;
            return self.constant(value, span);
        }
        let arithmetic = match op {
            BinaryOp::Add => Arithmetic::Add,
            BinaryOp::Sub => Arithmetic::Sub,
            BinaryOp::Mul => Arithmetic::Mul,
            BinaryOp::Div => Arithmetic::Div,
            BinaryOp::Pow => {
                return match (x, y) {
                    (Part::Const(two), Part::Node(n)) if two == 2.into() => self.part(FormulaOp::Exp2(n), span),
                    _ => {
                        self.fail(span, "powers of what weights decide are powers of 2", "write `2 ** …`, or a product")
                    }
                };
            }
            BinaryOp::Lt | BinaryOp::Le | BinaryOp::Gt | BinaryOp::Ge | BinaryOp::Eq | BinaryOp::Ne => {
                return self.fail(span, "a formula is a number", "a comparison chooses: `if a < b then … else …`");
            }
            other => {
                let message = format!("formulas have no operator `{}`", other.text());
                return self.fail(span, message, "they have + - * / and `2 ** …`");
            }
        };
        if arithmetic == Arithmetic::Div && matches!(y, Part::Const(zero) if zero == 0.into()) {
            return self.fail(b.span, "division by zero", "divide by another number");
        }
        let (x, y) = (self.node(x, a.span)?, self.node(y, b.span)?);
        self.part(FormulaOp::Binary(arithmetic, x, y), span)
    }

    fn choice(&mut self, c: &Expr, a: &Expr, b: &Expr, span: Span) -> Option<Part> {
        let ExprKind::Binary(op, left, right) = &c.kind else {
            return self.fail(c.span, "expected a comparison", "compare two numbers, as in `max(w) > -min(w)`");
        };
        let parts = (self.expr(left), self.expr(right), self.expr(a), self.expr(b));
        let (x, y, a_part, b_part) = (parts.0?, parts.1?, parts.2?, parts.3?);
        if let (Part::Const(x), Part::Const(y)) = (x, y) {
            return match consts::fold(*op, x, y, c.span, self.sink)? {
                Const::Condition(holds) => Some(if holds { a_part } else { b_part }),
                other => self.fail(c.span, format!("expected a condition, found {}", other.describe()), "compare it"),
            };
        }
        let (x, y) = (self.node(x, left.span)?, self.node(y, right.span)?);
        let (a, b) = (self.node(a_part, a.span)?, self.node(b_part, b.span)?);
        let select = match op {
            BinaryOp::Lt => [x, y, a, b],
            BinaryOp::Gt => [y, x, a, b],
            BinaryOp::Ge => [x, y, b, a],
            BinaryOp::Le => [y, x, b, a],
            _ => return self.fail(c.span, "numbers of weights are compared by < <= > >=", "write one of these"),
        };
        self.part(FormulaOp::Select(select), span)
    }

    fn call(&mut self, name: &str, at: Span, args: &[Expr], span: Span) -> Option<Part> {
        if let [Expr { kind: ExprKind::Name(w), .. }] = args
            && w == WEIGHTS
        {
            return match Reduction::ALL.into_iter().find(|r| r.name() == name) {
                Some(r) => self.part(FormulaOp::Of(r), span),
                None => {
                    let known = Reduction::ALL.map(Reduction::name);
                    let d = consts::unknown(name, at, "function of weights", known.into_iter());
                    self.sink.fail(d)
                }
            };
        }
        if !FUNCTIONS.contains(&name) {
            if Reduction::ALL.iter().any(|r| r.name() == name) {
                return self.fail(span, format!("`{name}` is of the weights"), format!("write `{name}({WEIGHTS})`"));
            }
            let known = Reduction::ALL.map(Reduction::name).into_iter().chain(FUNCTIONS);
            let d = consts::unknown(name, at, "function of a formula", known);
            return self.sink.fail(d);
        }
        let parts: Vec<Option<Part>> = args.iter().map(|a| self.expr(a)).collect();
        let parts = parts.into_iter().collect::<Option<Vec<Part>>>()?;
        let extreme = matches!(name, "max" | "min");
        if parts.is_empty() || (!extreme && parts.len() > 1) {
            let takes = if extreme { "numbers, or the weights" } else { "one number" };
            return self.fail(
                span,
                format!("`{name}` takes {takes}, not {}", parts.len()),
                format!("as in `{name}(x)`"),
            );
        }
        if extreme && parts.iter().all(|p| matches!(p, Part::Const(_))) {
            let call = Expr::new(
                ExprKind::Call(crate::syntax::ast::Ident { name: name.into(), span: at }, args.to_vec()),
                span,
            );
            return number(&call, self.scope, self.sink).map(Part::Const);
        }
        let mut nodes = Vec::new();
        for (part, arg) in parts.into_iter().zip(args) {
            nodes.push(self.node(part, arg.span)?);
        }
        let mut result = nodes[0];
        for &n in &nodes[1..] {
            result =
                self.push(if name == "max" { FormulaOp::Max(result, n) } else { FormulaOp::Min(result, n) }, span)?;
        }
        match name {
            "round" => self.part(FormulaOp::Round(result), span),
            "floor" => self.part(FormulaOp::Floor(result), span),
            "log2" => self.part(FormulaOp::Log2(result), span),
            _ => Some(Part::Node(result)),
        }
    }

    fn name(&mut self, name: &str, span: Span) -> Option<Part> {
        if name == WEIGHTS {
            let known = Reduction::ALL.map(|r| format!("{}({WEIGHTS})", r.name())).join(", ");
            let message = format!("`{WEIGHTS}` is all weights that a number covers");
            return self.fail(span, message, format!("one number of them is {known}"));
        }
        if let Some(f) = self.fields.iter().position(|f| f.0.name == name) {
            let (own, other) = (&self.fields[self.own].0, &self.fields[f].0);
            if other.entries.is_some() {
                return self.fail(span, format!("`{name}` is a table"), "a formula names fields with one number");
            }
            if !other.cover.holds(own.cover) {
                let covers = (own.cover.text(), other.cover.text());
                let message = format!("`{}` is for {}, and `{name}` for {}", own.name, covers.0, covers.1);
                return self.fail(span, message, "a formula names fields that cover as much as its own, or more");
            }
            return self.part(FormulaOp::Field(f), span);
        }
        match self.scope.get(name) {
            Some(value) => {
                let value = value?.clone();
                self.constant(value, span)
            }
            None if self.scope.lenient => None,
            None => {
                let known = self.fields.iter().map(|f| f.0.name.as_str()).chain(self.scope.names());
                let d = consts::unknown(name, span, "field or constant", known);
                self.sink.fail(d)
            }
        }
    }
}

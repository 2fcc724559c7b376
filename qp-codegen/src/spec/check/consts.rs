//! Constant expressions: exact rational numbers, lists of them, and conditions.

use std::cell::Cell;
use std::cmp::Ordering;

use super::Sink;
use crate::syntax::ast::{BinaryOp, Expr, ExprKind, UnaryOp};
use crate::syntax::diag::{Diagnostic, Span, nearest};
use crate::syntax::number::Rational;

/// Functions of constants.
pub const FUNCTIONS: [&str; 3] = ["max", "min", "log2"];

/// The value of a constant expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Const {
    /// A number.
    Number(Rational),
    /// A list.
    List(Vec<Const>),
    /// A condition.
    Condition(bool),
}

/// Most numbers of a list, those in lists within it included.
const MOST_LIST: usize = 256;
/// Most constants of a body.
const MOST_CONSTANTS: usize = 1000;

impl Const {
    /// Numbers and conditions in it, at least 1.
    fn count(&self) -> usize {
        match self {
            Const::Number(_) | Const::Condition(_) => 1,
            Const::List(l) => l.iter().map(Const::count).sum::<usize>().max(1),
        }
    }

    /// What it is, for messages.
    pub fn describe(&self) -> &'static str {
        match self {
            Const::Number(_) => "a number",
            Const::List(_) => "a list",
            Const::Condition(_) => "a condition",
        }
    }

    /// As in messages about an instance of a family.
    pub fn text(&self) -> String {
        match self {
            Const::Number(n) => n.to_string(),
            Const::List(l) => format!("[{}]", l.iter().map(Const::text).collect::<Vec<_>>().join(", ")),
            Const::Condition(b) => b.to_string(),
        }
    }
}

/// A named constant.
#[derive(Clone, Debug)]
struct Constant {
    name: String,
    span: Span,
    /// Nothing if its expression was wrong: uses of it are then not reported.
    value: Option<Const>,
    used: Cell<bool>,
    what: &'static str,
}

/// The constants that an expression may name.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    constants: Vec<Constant>,
    /// True if definitions may be missing because of errors already reported: then unknown names are no errors.
    pub lenient: bool,
}

impl Scope {
    /// Adds a constant; an earlier one of the same name is an error.
    pub fn define(&mut self, name: &str, span: Span, value: Option<Const>, what: &'static str, sink: &mut Sink) {
        if let Some(c) = self.constants.iter().find(|c| c.name == name) {
            sink.push(
                Diagnostic::error(span, format!("`{name}` is defined twice"), "again here").label(c.span, "first here"),
            );
            return;
        }
        if self.constants.len() == MOST_CONSTANTS {
            sink.push(Diagnostic::error(span, format!("more than {MOST_CONSTANTS} constants"), ""));
            return;
        }
        if let Some(value) = &value {
            sink.fact(span, || value.text());
        }
        self.constants.push(Constant { name: name.to_string(), span, value, used: Cell::new(false), what });
    }

    /// The place of a constant.
    pub fn span(&self, name: &str) -> Option<Span> {
        self.constants.iter().find(|c| c.name == name).map(|c| c.span)
    }

    /// The constant `name`; its value is nothing if it was wrong. Counts as a use.
    pub fn get(&self, name: &str) -> Option<Option<&Const>> {
        let c = self.constants.iter().find(|c| c.name == name)?;
        c.used.set(true);
        Some(c.value.as_ref())
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.constants.iter().map(|c| c.name.as_str())
    }

    /// Counts each name in `e` as used.
    pub fn touch(&self, e: &Expr) {
        match &e.kind {
            ExprKind::Number(_) => (),
            ExprKind::Name(n) => {
                self.get(n);
            }
            ExprKind::Unary(_, a) => self.touch(a),
            ExprKind::Binary(_, a, b) | ExprKind::Index(a, b) => {
                self.touch(a);
                self.touch(b);
            }
            ExprKind::Call(_, l) | ExprKind::List(l) => l.iter().for_each(|e| self.touch(e)),
            ExprKind::Range(a, b, c) | ExprKind::If(a, b, c) => [a, b, c].into_iter().for_each(|e| self.touch(e)),
        }
    }

    /// Takes over from a copy of this scope (with more constants behind) what was used.
    pub fn used_as(&self, copy: &Scope) {
        for (mine, theirs) in self.constants.iter().zip(&copy.constants) {
            mine.used.set(mine.used.get() || theirs.used.get());
        }
    }

    /// Warns of each constant after the first `skip` that nothing used.
    pub fn warn_unused(&self, skip: usize, sink: &mut Sink) {
        for c in self.constants.iter().skip(skip).filter(|c| !c.used.get()) {
            let d = Diagnostic::warning(c.span, format!("the {} `{}` is never used", c.what, c.name), "");
            sink.push(d.hint("take it out"));
        }
    }

    /// Number of constants.
    pub fn len(&self) -> usize {
        self.constants.len()
    }
}

/// Evaluates `e`. Errors go to `sink`.
pub fn eval(e: &Expr, scope: &Scope, sink: &mut Sink) -> Option<Const> {
    match &e.kind {
        ExprKind::Number(n) => Some(Const::Number(*n)),
        ExprKind::Name(name) => match scope.get(name) {
            Some(value) => value.cloned(),
            None if scope.lenient => None,
            None => sink.fail(unknown(name, e.span, "constant", scope.names())),
        },
        ExprKind::Unary(op, a) => {
            let a = number(a, scope, sink)?;
            fold_unary(*op, a, e.span, sink)
        }
        ExprKind::Binary(op, a, b) => {
            let (a, b) = (number(a, scope, sink), number(b, scope, sink));
            fold(*op, a?, b?, e.span, sink)
        }
        ExprKind::List(list) => {
            let values: Vec<_> = list.iter().map(|e| eval(e, scope, sink)).collect();
            let list = Const::List(values.into_iter().collect::<Option<_>>()?);
            if list.count() > MOST_LIST {
                let d = Diagnostic::error(e.span, format!("a list of {} numbers is too long", list.count()), "");
                return sink.fail(
                    d.hint(format!("a constant holds {MOST_LIST} at most; a table's entries stand in its list")),
                );
            }
            Some(list)
        }
        ExprKind::If(c, a, b) => {
            let chosen = choose(c, a, b, scope, sink)?;
            eval(chosen, scope, sink)
        }
        ExprKind::Call(f, args) => {
            let args: Vec<_> = args.iter().map(|e| eval(e, scope, sink)).collect();
            call(&f.name, f.span, &args.into_iter().collect::<Option<Vec<_>>>()?, e.span, sink)
        }
        ExprKind::Index(..) | ExprKind::Range(..) => {
            let d = Diagnostic::error(e.span, "a constant has no members to index", "");
            sink.fail(d.hint("tables and bits stand in the decode block"))
        }
    }
}

/// The branch of a conditional that its condition chooses; names of the other count as used.
pub fn choose<'e>(c: &Expr, a: &'e Expr, b: &'e Expr, scope: &Scope, sink: &mut Sink) -> Option<&'e Expr> {
    scope.touch(a);
    scope.touch(b);
    match eval(c, scope, sink)? {
        Const::Condition(true) => Some(a),
        Const::Condition(false) => Some(b),
        other @ (Const::Number(_) | Const::List(_)) => {
            let d = Diagnostic::error(c.span, format!("expected a condition, found {}", other.describe()), "");
            sink.fail(d.hint("compare it, as in `kv <= 8`"))
        }
    }
}

/// Evaluates `e`, which must be a number.
pub fn number(e: &Expr, scope: &Scope, sink: &mut Sink) -> Option<Rational> {
    match eval(e, scope, sink)? {
        Const::Number(n) => Some(n),
        other @ (Const::List(_) | Const::Condition(_)) => {
            sink.fail(Diagnostic::error(e.span, format!("expected a number, found {}", other.describe()), ""))
        }
    }
}

/// Evaluates `e`, which must be an integer of `range`; `what` names it.
pub fn integer(
    e: &Expr,
    what: &str,
    range: std::ops::RangeInclusive<i128>,
    scope: &Scope,
    sink: &mut Sink,
) -> Option<i128> {
    let n = number(e, scope, sink)?;
    in_range(n, e.span, what, range, sink)
}

/// `n` as an integer of `range`.
pub fn in_range(
    n: Rational,
    span: Span,
    what: &str,
    range: std::ops::RangeInclusive<i128>,
    sink: &mut Sink,
) -> Option<i128> {
    match n.integer() {
        Some(i) if range.contains(&i) => Some(i),
        Some(i) => {
            let limits = format!("{} to {}", range.start(), range.end());
            sink.fail(Diagnostic::error(span, format!("{what} must be {limits}, not {i}"), format!("this is {i}")))
        }
        None => {
            sink.fail(Diagnostic::error(span, format!("{what} must be an integer, not {n}"), format!("this is {n}")))
        }
    }
}

/// "There is no such name", with the nearest.
pub fn unknown<'a>(name: &str, span: Span, what: &str, names: impl Iterator<Item = &'a str>) -> Diagnostic {
    let d = Diagnostic::error(span, format!("there is no {what} `{name}`"), "");
    let names: Vec<&str> = names.collect();
    match nearest(name, names.iter().copied()) {
        Some(near) => d.meant(near),
        None if !names.is_empty() && names.len() <= 16 => d.hint(format!("there is {}", names.join(", "))),
        None => d,
    }
}

/// A unary operation on a constant.
pub fn fold_unary(op: UnaryOp, a: Rational, span: Span, sink: &mut Sink) -> Option<Const> {
    match op {
        UnaryOp::Neg => match a.checked_neg() {
            Some(n) => Some(Const::Number(n)),
            None => sink.fail(too_large(span)),
        },
        UnaryOp::Not => match a.integer().and_then(|i| u32::try_from(i).ok()) {
            Some(i) => Some(Const::Number(i64::from(!i).into())),
            None => sink.fail(Diagnostic::error(span, format!("`~` is for 32-bit words, not for {a}"), "")),
        },
    }
}

fn too_large(span: Span) -> Diagnostic {
    Diagnostic::error(span, "this constant is too large to compute", "")
}

/// A binary operation on constants.
pub fn fold(op: BinaryOp, a: Rational, b: Rational, span: Span, sink: &mut Sink) -> Option<Const> {
    let order = || a.compare(b).unwrap_or(Ordering::Equal);
    let bits = |f: fn(i128, i128) -> i128| match (a.integer(), b.integer()) {
        (Some(x), Some(y)) if x >= 0 && y >= 0 => Rational::new(f(x, y), 1),
        _ => None,
    };
    let shift = |sign: i128| {
        let by = b.integer().filter(|y| (0..127).contains(y))?;
        let shifted = a.checked_mul(Rational::from(2).pow(sign * by)?)?;
        let (n, d) = shifted.parts();
        a.integer().filter(|x| *x >= 0).and(Rational::new(n.div_euclid(d), 1))
    };
    let value = match op {
        BinaryOp::Add => a.checked_add(b),
        BinaryOp::Sub => a.checked_sub(b),
        BinaryOp::Mul => a.checked_mul(b),
        BinaryOp::Div | BinaryOp::Rem if b == 0.into() => {
            return sink.fail(Diagnostic::error(span, "division by zero", ""));
        }
        BinaryOp::Div => a.checked_div(b),
        BinaryOp::Rem => bits(i128::rem_euclid),
        BinaryOp::Pow => b.integer().and_then(|e| a.pow(e)),
        BinaryOp::Shl => shift(1),
        BinaryOp::Shr => shift(-1),
        BinaryOp::And => bits(|x, y| x & y),
        BinaryOp::Or => bits(|x, y| x | y),
        BinaryOp::Xor => {
            let d = Diagnostic::error(span, "`^` is the exclusive or of words, not a power", "");
            let d = d.replace(span, format!("{a} ** {b}"));
            return sink.fail(d.hint(format!("a power is written `{a} ** {b}`")));
        }
        BinaryOp::Eq => return Some(Const::Condition(a == b)),
        BinaryOp::Ne => return Some(Const::Condition(a != b)),
        BinaryOp::Lt => return Some(Const::Condition(order().is_lt())),
        BinaryOp::Le => return Some(Const::Condition(order().is_le())),
        BinaryOp::Gt => return Some(Const::Condition(order().is_gt())),
        BinaryOp::Ge => return Some(Const::Condition(order().is_ge())),
    };
    match value {
        Some(n) => Some(Const::Number(n)),
        None => {
            let d = Diagnostic::error(span, format!("`{a} {} {b}` cannot be computed", op.text()), "");
            sink.fail(d.hint("results have up to 127 bits; bit operations, shifts, `%` and powers need integers"))
        }
    }
}

/// A function of constants.
pub fn call(name: &str, at: Span, args: &[Const], span: Span, sink: &mut Sink) -> Option<Const> {
    let mut flat = Vec::new();
    let mut queue: Vec<&Const> = args.iter().rev().collect();
    while let Some(c) = queue.pop() {
        match c {
            Const::Number(n) => flat.push(*n),
            Const::List(l) => queue.extend(l.iter().rev()),
            Const::Condition(_) => {
                return sink.fail(Diagnostic::error(span, format!("`{name}` takes numbers, not conditions"), ""));
            }
        }
    }
    let (Some(&first), rest) = (flat.first(), flat.get(1..).unwrap_or(&[])) else {
        return sink.fail(Diagnostic::error(span, format!("`{name}` needs at least one number"), ""));
    };
    let pick = |wanted: Ordering| rest.iter().fold(first, |m, n| if n.compare(m) == Some(wanted) { *n } else { m });
    match name {
        "max" => Some(Const::Number(pick(Ordering::Greater))),
        "min" => Some(Const::Number(pick(Ordering::Less))),
        "log2" => match first.integer() {
            Some(i) if rest.is_empty() && i > 0 && i & (i - 1) == 0 => {
                Some(Const::Number(i64::from(i.trailing_zeros()).into()))
            }
            _ => sink.fail(Diagnostic::error(span, "`log2` takes one power of two", "")),
        },
        _ => sink.fail(unknown(name, at, "function", FUNCTIONS.into_iter())),
    }
}

//! What a format says beside its code: where weights of a stream lie, and what is done to activations and results.

use super::Sink;
use super::code::Properties;
use super::consts::{self, Scope, integer};
use super::layout::{Names, index};
use crate::spec::Shape;
use crate::spec::format::{Cover, Field, Number, Step, Trellis};
use crate::spec::index::Var;
use crate::syntax::ast::{self, Body, Expr, ExprKind, Ident, PropertyKind};
use crate::syntax::diag::{Diagnostic, Span};

/// Most weights of a block, and most columns or rows that a transform joins.
const MOST: i128 = 1 << 16;
/// What steps are called that are no fields.
const STEPS: [&str; 3] = ["hadamard", "signs", "permute"];

/// The window, its movement and the order of a code with memory; nothing is missing from them.
pub struct Memory<'a> {
    step: &'a Expr,
    block: (&'a Expr, &'a Expr),
    order: &'a ast::Decode,
}

impl<'a> Memory<'a> {
    /// What is there of it, unless something is missing, and what is missing; all five where nothing speaks of memory.
    pub fn of(b: &'a Body, p: &Properties<'a>) -> (Option<Self>, Vec<&'static str>) {
        let order = b.properties.iter().find_map(|p| match &p.kind {
            PropertyKind::Order(d) => Some(d),
            _ => None,
        });
        let given = [
            ("window", p.window.is_some()),
            ("vector", p.vector.is_some()),
            ("step", p.step.is_some()),
            ("block", p.block.is_some()),
            ("order", order.is_some()),
        ];
        let speaks = order.is_some() || (p.window.is_some() && p.step.is_some());
        let missing = given.into_iter().filter(|g| !speaks || !g.1).map(|g| g.0).collect();
        let all = || Some(Memory { step: p.step?, block: p.block?, order: order? });
        (all(), missing)
    }

    /// Checks it for a code of `window` bits for `vector` weights.
    pub fn check(&self, window: u32, vector: u32, scope: &Scope, sink: &mut Sink) -> Option<Trellis> {
        let step = integer(self.step, "the step", 1..=window.into(), scope, sink);
        let (rows, cols) = self.block;
        let rows = integer(rows, "the rows of a block", 1..=MOST, scope, sink);
        let cols = integer(cols, "the columns of a block", 1..=MOST, scope, sink);
        let order = self.places(scope, sink);
        let (step, block, order) = (step? as u32, Shape { rows: rows? as u32, cols: cols? as u32 }, order?);
        let span = self.block.0.span.to(self.block.1.span);
        if i128::from(block.len()) > MOST || !block.len().is_multiple_of(vector.into()) {
            let message = format!("a block of {} x {} weights is no block of this code", block.rows, block.cols);
            let d = Diagnostic::error(span, message, "");
            return sink.fail(d.hint(format!("it has whole steps of {vector}, and {MOST} weights at most")));
        }
        if step == window {
            let d = Diagnostic::error(self.order.window.span, "a code without memory has no order", "");
            return sink.fail(d.hint("write `bits N for V` in place of window, vector, step, block and order"));
        }
        let trellis = Trellis { step, block, order };
        let bits = trellis.bits(vector);
        if bits < window {
            let message = format!("a block's stream of {bits} bits is shorter than the window");
            return sink.fail(Diagnostic::error(span, message, ""));
        }
        if let Err(p) = trellis.places() {
            let message = format!("weight {p} of the stream has no place of its own in the block");
            let d = Diagnostic::error(self.order.result.span, message, "");
            let (r, c) = (block.rows - 1, block.cols - 1);
            return sink.fail(d.hint(format!("rows are 0 to {r}, columns 0 to {c}, and no two weights share a place")));
        }
        Some(trellis)
    }

    fn places(&self, scope: &Scope, sink: &mut Sink) -> Option<[crate::spec::index::Index; 2]> {
        let vars = std::slice::from_ref(&self.order.window);
        let mut names = Names { vars, bit: None, stored: None, lets: Vec::new() };
        for (name, e) in &self.order.lets {
            let value = index(e, &names, scope, sink)?;
            if name.name == self.order.window.name || names.lets.iter().any(|l| l.0 == name.name) {
                return sink.fail(Diagnostic::error(name.span, format!("`{}` is defined twice", name.name), ""));
            }
            names.lets.push((&name.name, value));
        }
        let result = &self.order.result;
        let ExprKind::List(list) = &result.kind else {
            let d = Diagnostic::error(result.span, "an order ends with row and column", "");
            return sink.fail(d.hint("in brackets, as in `[p / 16, p % 16]`"));
        };
        let [row, col] = &list[..] else {
            let d = Diagnostic::error(result.span, format!("an order gives row and column, not {}", list.len()), "");
            return sink.fail(d);
        };
        let (row, col) = (index(row, &names, scope, sink), index(col, &names, scope, sink));
        let (row, col) = (row?, col?);
        if [&row, &col].iter().any(|e| e.has(Var::Rows) || e.has(Var::Cols)) {
            let d = Diagnostic::error(result.span, "an order knows the block alone, not the matrix", "");
            return sink.fail(d);
        }
        Some([row, col])
    }
}

/// The steps of `input` and `output`; the fields that they name are among `used` afterwards.
pub fn steps(
    b: &Body,
    fields: &[(Field, Span)],
    used: &mut [bool],
    scope: &Scope,
    sink: &mut Sink,
) -> Option<(Vec<Step>, Vec<Step>)> {
    let (mut input, mut output) = (Some(Vec::new()), Some(Vec::new()));
    for p in &b.properties {
        let (list, cover, out) = match &p.kind {
            PropertyKind::Input(list) => (list, Cover::Column, &mut input),
            PropertyKind::Output(list) => (list, Cover::Row, &mut output),
            _ => continue,
        };
        let checked: Vec<Option<Step>> = list.iter().map(|s| step(s, cover, fields, used, scope, sink)).collect();
        *out = checked.into_iter().collect();
    }
    Some((input?, output?))
}

fn step(
    s: &ast::Step,
    cover: Cover,
    fields: &[(Field, Span)],
    used: &mut [bool],
    scope: &Scope,
    sink: &mut Sink,
) -> Option<Step> {
    let name = &s.name;
    let field = |name: &str| fields.iter().position(|f| f.0.name == name && f.0.entries.is_none());
    let mut of_field = |name: &Ident, sink: &mut Sink| {
        let Some(f) = field(&name.name) else {
            let known = fields.iter().filter(|f| f.0.entries.is_none()).map(|f| f.0.name.as_str()).chain(STEPS);
            return sink.fail(consts::unknown(&name.name, name.span, "field or step", known));
        };
        used[f] = true;
        if fields[f].0.cover != cover {
            let (wanted, found) = (cover.text(), fields[f].0.cover.text());
            let message = format!("`{}` is a field `per {found}`, not `per {wanted}`", name.name);
            let d = Diagnostic::error(name.span, message, "");
            return sink.fail(d.hint("`input` takes fields `per column`, `output` takes fields `per row`"));
        }
        Some(f)
    };
    match (name.name.as_str(), &s.value, &s.args[..]) {
        ("hadamard", None, []) => Some(Step::Hadamard(None)),
        ("hadamard", Some(e), _) => {
            let n = integer(e, "the length of a transform", 2..=MOST, scope, sink)? as u32;
            if !n.is_power_of_two() {
                let d = Diagnostic::error(e.span, format!("a transform has a power of two of numbers, not {n}"), "");
                return sink.fail(d.hint(format!("write `hadamard({})`", n.next_power_of_two())));
            }
            Some(Step::Hadamard(Some(n)))
        }
        ("signs", None, [arg]) if arg.name.name == "seed" => {
            Some(Step::Signs(integer(&arg.value, "the seed", 0..=i64::MAX.into(), scope, sink)? as u64))
        }
        ("permute", Some(Expr { kind: ExprKind::Name(of), span, .. }), _) => {
            let f = of_field(&Ident { name: of.clone(), span: *span }, sink)?;
            if !matches!(fields[f].0.ty, Number::Unsigned(_)) {
                let d = Diagnostic::error(*span, format!("`{of}` holds no unsigned integers"), "");
                return sink.fail(d.hint("a permutation says for each number which it was, from 0 on"));
            }
            Some(Step::Permute(f))
        }
        (word, ..) if STEPS.contains(&word) => {
            let d = Diagnostic::error(name.span, format!("`{word}` has other arguments"), "");
            sink.fail(d.hint("steps are a field, `hadamard`, `hadamard(128)`, `signs(seed = 0)` and `permute(field)`"))
        }
        (_, None, []) => of_field(name, sink).map(Step::Field),
        _ => sink.fail(consts::unknown(&name.name, name.span, "step", STEPS.into_iter())),
    }
}

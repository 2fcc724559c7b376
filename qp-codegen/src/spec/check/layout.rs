//! Layouts: places of codes and fields in someone's tensors, checked to name every bit once.

use std::sync::Arc;

use super::Sink;
use super::consts::{self, Const, Scope, integer, number};
use super::format::type_of;
use crate::reader::{Book, Misfit, overlap, sample_shapes};
use crate::spec::format::{Format, Layout, Place, Target, TensorSpec};
use crate::spec::index::{Index, IndexOp, Var};
use crate::syntax::ast::{self, BinaryOp, Expr, ExprKind, LayoutLine, UnaryOp};
use crate::syntax::diag::Diagnostic;
use crate::syntax::number::Rational;

/// Largest expression of a layout.
const MOST_INDEX: usize = 10_000;
/// Highest tree of an expression of a layout.
const HIGHEST_INDEX: usize = 500;

/// Checks a layout of `format`, whose constants are `scope`.
pub fn check(l: &ast::Layout, format: &Format, scope: &Scope, sink: &mut Sink) -> Option<Layout> {
    if let Some(other) = format.layouts.iter().find(|o| o.name == l.name.name) {
        let d = Diagnostic::error(l.name.span, format!("`{}` has two layouts `{}`", format.name, other.name), "");
        return sink.fail(d.hint("choose another name"));
    }
    let mut ok = !l.incomplete;
    let mut out = Layout { name: l.name.name.clone(), ty: None, tensors: Vec::new(), places: Vec::new() };
    for line in &l.lines {
        match line {
            LayoutLine::Type(_, e) => {
                out.ty = integer(e, "the type's number", 0..=u32::MAX.into(), scope, sink).map(|n| n as u32);
            }
            LayoutLine::Tensor(t) => match tensor(t, &out.tensors, scope, sink) {
                Some(t) => out.tensors.push(t),
                None => ok = false,
            },
            LayoutLine::Place(_) => (),
        }
    }
    if !ok {
        return None;
    }
    let mut named = vec![0u64; 1 + format.fields.len()];
    for line in &l.lines {
        let LayoutLine::Place(p) = line else { continue };
        let Some(place) = place(p, format, &out.tensors, scope, sink) else {
            ok = false;
            continue;
        };
        let (slot, name) = match place.target {
            Target::Code => (0, "code"),
            Target::Stream => (0, "stream"),
            Target::Field(f) => (1 + f, format.fields[f].name.as_str()),
        };
        // A stream has one place, which names all of its bits.
        let bits = match place.target {
            Target::Stream => 1,
            Target::Code | Target::Field(_) => ((1u64 << (place.bits.1 - place.bits.0)) - 1) << place.bits.0,
        };
        if place.read.is_none() && named[slot] & bits != 0 {
            let d = Diagnostic::error(p.target.span, format!("bits of `{name}` are placed twice"), "");
            sink.push(d.hint("`[a..b]` after the indices says which bits a place holds"));
            ok = false;
        }
        named[slot] |= bits;
        out.places.push(place);
    }
    let (code, width) = match format.trellis {
        Some(_) => ("stream", 1),
        None => ("code", format.window),
    };
    let widths = [width].into_iter().chain(format.fields.iter().map(|f| f.ty.bits()));
    let names = [code].into_iter().chain(format.fields.iter().map(|f| f.name.as_str()));
    let complete = ok;
    for ((found, width), name) in named.iter().zip(widths).zip(names) {
        if complete && *found != (1u64 << width) - 1 {
            let message = format!("the layout `{}` does not say where `{name}` lies", l.name.name);
            let d = Diagnostic::error(l.name.span, message, "");
            let d = if *found == 0 { d } else { d.hint(format!("of its {width} bits only some have a place")) };
            sink.push(d);
            ok = false;
        }
    }
    if !ok {
        return None;
    }
    counted(l, format, &out, sink).then_some(out)
}

/// Counts how often each bit is named, for small matrices.
fn counted(l: &ast::Layout, format: &Format, layout: &Layout, sink: &mut Sink) -> bool {
    let shapes = sample_shapes(format, layout);
    if shapes.is_empty() {
        let message = format!("no matrix fits the layout `{}`", layout.name);
        let d = Diagnostic::error(l.name.span, message, "");
        sink.push(d.hint("sizes such as `cols / 32` must be whole numbers for some rows and columns"));
        return false;
    }
    let book = Arc::new(Book::without_entries(format.clone()));
    for shape in shapes {
        let d = match overlap(&book, layout, shape) {
            Ok(None) => continue,
            Ok(Some(o)) => {
                let tensor = &o.tensor;
                let ((unnamed, first), (twice, again)) = (o.unnamed, o.twice);
                let which = match (unnamed, twice) {
                    (0, n) => format!("names {n} bits of `{tensor}` twice, bit {again} first"),
                    (n, 0) => format!("does not name {n} bits of `{tensor}`, bit {first} first"),
                    (n, m) => format!(
                        "names {m} bits of `{tensor}` twice, bit {again} first, and {n} not at all, bit {first} first"
                    ),
                };
                let message = format!("the layout `{}` {which}", layout.name);
                let shape = format!("counted for a matrix of {} x {}", o.shape.rows, o.shape.cols);
                Diagnostic::error(l.name.span, message, "").hint(format!("{shape}; each bit has one place"))
            }
            Err(
                e @ (Misfit::Aperiodic { .. }
                | Misfit::Outside { .. }
                | Misfit::Size { .. }
                | Misfit::Vector { .. }
                | Misfit::Side { .. }),
            ) => {
                let message = format!("the layout `{}` has a wrong place: {e}", layout.name);
                let shape = format!("seen for a matrix of {} x {}", shape.rows, shape.cols);
                Diagnostic::error(l.name.span, message, "").hint(shape)
            }
        };
        sink.push(d);
        return false;
    }
    true
}

fn tensor(t: &ast::TensorDecl, known: &[TensorSpec], scope: &Scope, sink: &mut Sink) -> Option<TensorSpec> {
    let name = &t.name;
    if known.iter().any(|k| k.name == name.name) {
        return sink.fail(Diagnostic::error(name.span, format!("`{}` is defined twice", name.name), ""));
    }
    let names = Names { vars: &[], bit: None, stored: None, lets: Vec::new() };
    let dims: Vec<Option<Index>> = t.dims.iter().map(|e| index(e, &names, scope, sink)).collect();
    let mut members = Vec::new();
    for m in &t.members {
        let ty = type_of(&m.ty, scope, sink)?;
        let count = match &m.count {
            Some(e) => integer(e, "the elements of a member", 1..=1 << 16, scope, sink)? as u32,
            None => 1,
        };
        members.push((m.name.as_ref().map_or(String::new(), |n| n.name.clone()), ty, count));
    }
    let dims: Vec<Index> = dims.into_iter().collect::<Option<_>>()?;
    if dims.is_empty() || members.is_empty() {
        let d = Diagnostic::error(name.span, format!("`{}` has no sizes or no members", name.name), "");
        return sink.fail(d.hint("as in `tensor scales : f16[rows, cols / 32]`"));
    }
    Some(TensorSpec { name: name.name.clone(), record: t.keyword.name == "record", dims, members })
}

fn place(p: &ast::Place, format: &Format, tensors: &[TensorSpec], scope: &Scope, sink: &mut Sink) -> Option<Place> {
    let fields = || format.fields.iter().map(|f| f.name.as_str());
    let code = if format.trellis.is_some() { "stream" } else { "code" };
    let (target, width, wanted) = match fields().position(|f| f == p.target.name) {
        _ if p.target.name == code => match &format.trellis {
            Some(t) => (Target::Stream, t.bits(format.vector), 2),
            None => (Target::Code, format.window, 2),
        },
        Some(f) => {
            let field = &format.fields[f];
            let indices = field.indices();
            (Target::Field(f), field.ty.bits(), indices)
        }
        None => {
            let known: Vec<&str> = [code].into_iter().chain(fields()).collect();
            let d = consts::unknown(&p.target.name, p.target.span, "target", known.into_iter());
            return sink.fail(d);
        }
    };
    if p.vars.len() != wanted {
        let message = format!("`{}` has {wanted} indices, not {}", p.target.name, p.vars.len());
        let d = Diagnostic::error(p.target.span, message, "");
        return sink.fail(d.hint(match target {
            Target::Code => "a code has its row, and the number of its group of columns",
            Target::Stream => "a stream has row and column of its block, and then the bit: `stream(i, j)[b]`",
            Target::Field(_) => {
                "none for a matrix; the row, the column or the number of the cover; row and column of a grid"
            }
        }));
    }
    let is_stream = target == Target::Stream;
    if is_stream != p.bit_name.is_some() || (is_stream && (p.less.is_some() || p.read.is_some())) {
        let message = format!("`{}` is not placed so", p.target.name);
        let d = Diagnostic::error(p.target.span, message, "");
        return sink
            .fail(d.hint("`stream(i, j)[b] in …` says for each bit b where it lies; of others `[a..b]` names some"));
    }
    let bits = match &p.bits {
        None => (0, width),
        Some((from, to)) => {
            let a = integer(from, "the first bit", 0..=i128::from(width) - 1, scope, sink)?;
            let b = integer(to, "the end of the bits", a + 1..=width.into(), scope, sink)?;
            (a as u32, b as u32)
        }
    };
    let less = match &p.less {
        None => 0,
        Some(e) => integer(e, "what is subtracted", 0..=u32::MAX.into(), scope, sink)? as u32,
    };
    if less > 0 && (bits != (0, width) || p.read.is_some()) {
        let d = Diagnostic::error(p.target.span, "only a whole number can be stored less by something", "");
        return sink.fail(d);
    }
    let Some(tensor) = tensors.iter().position(|t| t.name == p.tensor.name) else {
        let names = tensors.iter().map(|t| t.name.as_str());
        let d = consts::unknown(&p.tensor.name, p.tensor.span, "tensor", names);
        return sink.fail(d);
    };
    let spec = &tensors[tensor];
    if p.indices.len() != spec.dims.len() || p.indices.iter().filter(|i| i.is_none()).count() > 1 {
        let message = format!("`{}` has {} indices, not {}", spec.name, spec.dims.len(), p.indices.len());
        let d = Diagnostic::error(p.tensor.span, message, "");
        return sink.fail(d.hint("one of them may be `*`: bits run on along it"));
    }
    let (member, element) = match (&p.member, spec.record) {
        (None, false) => (0, Index::Const(0)),
        (Some((name, e)), true) => {
            let Some(member) = spec.members.iter().position(|m| m.0 == name.name) else {
                let names = spec.members.iter().map(|m| m.0.as_str());
                let d = consts::unknown(&name.name, name.span, "member", names);
                return sink.fail(d);
            };
            let names = Names { vars: &p.vars, bit: p.bit_name.as_ref(), stored: None, lets: Vec::new() };
            (member, e.as_ref().map_or(Some(Index::Const(0)), |e| index(e, &names, scope, sink))?)
        }
        (None, true) => {
            let d = Diagnostic::error(p.tensor.span, format!("`{}` holds records", spec.name), "");
            return sink.fail(d.hint(format!("name a member: `{}[…].{}`", spec.name, spec.members[0].0)));
        }
        (Some((name, _)), false) => {
            return sink.fail(Diagnostic::error(name.span, format!("`{}` holds no records", spec.name), ""));
        }
    };
    if spec.record && p.indices.iter().any(Option::is_none) {
        let d = Diagnostic::error(p.tensor.span, "bits run on along tensors of numbers, not of records", "");
        return sink.fail(d);
    }
    let names = Names { vars: &p.vars, bit: p.bit_name.as_ref(), stored: None, lets: Vec::new() };
    let indices: Vec<Option<Option<Index>>> =
        p.indices.iter().map(|e| e.as_ref().map(|e| index(e, &names, scope, sink))).collect();
    let mut checked = Vec::new();
    for i in indices {
        checked.push(match i {
            Some(e) => Some(e?),
            None => None,
        });
    }
    let bit = p.bit.as_ref().map_or(Some(Index::Const(0)), |e| index(e, &names, scope, sink))?;
    let read = match &p.read {
        None => None,
        Some(d) => {
            if spec.members[member].1.bits() > 16 || p.bit.is_some() || p.bits.is_some() {
                let d = Diagnostic::error(d.window.span, "a `read` block takes whole elements of up to 16 bits", "");
                return sink.fail(d.hint("it gives the whole target, so that neither has a range of bits"));
            }
            let mut names = Names { vars: &p.vars, bit: None, stored: Some(&d.window), lets: Vec::new() };
            for (name, e) in &d.lets {
                let value = index(e, &names, scope, sink)?;
                names.lets.push((&name.name, value));
            }
            Some(index(&d.result, &names, scope, sink)?)
        }
    };
    Some(Place { target, bits, less, tensor, indices: checked, member, element, bit, read })
}

/// What the expressions of a layout may name beside constants.
pub struct Names<'a> {
    pub vars: &'a [ast::Ident],
    pub bit: Option<&'a ast::Ident>,
    pub stored: Option<&'a ast::Ident>,
    pub lets: Vec<(&'a str, Index)>,
}

/// A whole-number expression.
pub fn index(e: &Expr, names: &Names<'_>, scope: &Scope, sink: &mut Sink) -> Option<Index> {
    let out = part(e, names, scope, sink)?;
    if out.height() > HIGHEST_INDEX || out.size() > MOST_INDEX {
        return sink.fail(Diagnostic::error(e.span, "this expression is too long", ""));
    }
    Some(out)
}

fn part(e: &Expr, names: &Names<'_>, scope: &Scope, sink: &mut Sink) -> Option<Index> {
    let whole = |n: Rational, sink: &mut Sink| match n.integer().and_then(|i| i64::try_from(i).ok()) {
        Some(i) => Some(Index::Const(i)),
        None => sink.fail(Diagnostic::error(e.span, format!("expected a whole number, found {n}"), "")),
    };
    match &e.kind {
        ExprKind::Number(n) => whole(*n, sink),
        ExprKind::Name(name) => {
            if let Some(l) = names.lets.iter().find(|l| l.0 == name) {
                return Some(l.1.clone());
            }
            if names.bit.is_some_and(|b| b.name == *name) {
                return Some(Index::Var(Var::Bit));
            }
            if names.stored.is_some_and(|s| s.name == *name) {
                return Some(Index::Var(Var::Stored));
            }
            if let Some(k) = names.vars.iter().position(|v| v.name == *name) {
                return Some(Index::Var([Var::First, Var::Second][k.min(1)]));
            }
            match name.as_str() {
                "rows" => return Some(Index::Var(Var::Rows)),
                "cols" => return Some(Index::Var(Var::Cols)),
                _ => (),
            }
            match scope.get(name) {
                Some(Some(Const::Number(n))) => whole(*n, sink),
                Some(Some(other)) => {
                    let message = format!("expected a number, found {}", other.describe());
                    sink.fail(Diagnostic::error(e.span, message, ""))
                }
                Some(None) => None,
                None => {
                    let known = names.vars.iter().map(|v| v.name.as_str()).chain(["rows", "cols"]).chain(scope.names());
                    let d = consts::unknown(name, e.span, "name", known.collect::<Vec<_>>().into_iter());
                    sink.fail(d)
                }
            }
        }
        ExprKind::Unary(UnaryOp::Neg, a) => {
            Some(Index::binary(IndexOp::Sub, Index::Const(0), part(a, names, scope, sink)?))
        }
        ExprKind::Binary(op, a, b) => {
            let (x, y) = (part(a, names, scope, sink), part(b, names, scope, sink));
            let (x, y) = (x?, y?);
            let not = |c: Index| Index::If(Box::new(c), Box::new(Index::Const(0)), Box::new(Index::Const(1)));
            let b = Index::binary;
            Some(match op {
                BinaryOp::Add => b(IndexOp::Add, x, y),
                BinaryOp::Sub => b(IndexOp::Sub, x, y),
                BinaryOp::Mul => b(IndexOp::Mul, x, y),
                BinaryOp::Div => b(IndexOp::Div, x, y),
                BinaryOp::Rem => b(IndexOp::Rem, x, y),
                BinaryOp::Pow => b(IndexOp::Pow, x, y),
                BinaryOp::And => b(IndexOp::And, x, y),
                BinaryOp::Or => b(IndexOp::Or, x, y),
                BinaryOp::Xor => b(IndexOp::Xor, x, y),
                BinaryOp::Shl => b(IndexOp::Shl, x, y),
                BinaryOp::Shr => b(IndexOp::Shr, x, y),
                BinaryOp::Eq => b(IndexOp::Eq, x, y),
                BinaryOp::Ne => not(b(IndexOp::Eq, x, y)),
                BinaryOp::Lt => b(IndexOp::Lt, x, y),
                BinaryOp::Gt => b(IndexOp::Lt, y, x),
                BinaryOp::Le => not(b(IndexOp::Lt, y, x)),
                BinaryOp::Ge => not(b(IndexOp::Lt, x, y)),
            })
        }
        ExprKind::If(c, a, b) => {
            let (c, a, b) = (part(c, names, scope, sink), part(a, names, scope, sink), part(b, names, scope, sink));
            let (c, a, b) = (c?, a?, b?);
            Some(match c {
                Index::Const(0) => b,
                Index::Const(_) => a,
                c => Index::If(Box::new(c), Box::new(a), Box::new(b)),
            })
        }
        ExprKind::Call(f, _) if consts::FUNCTIONS.contains(&f.name.as_str()) => {
            let n = number(e, scope, sink)?;
            whole(n, sink)
        }
        ExprKind::Unary(UnaryOp::Not, _)
        | ExprKind::Index(..)
        | ExprKind::Range(..)
        | ExprKind::List(_)
        | ExprKind::Call(..) => {
            let d = Diagnostic::error(e.span, "a layout's expressions are whole numbers", "");
            sink.fail(d.hint("they are made of indices, `rows`, `cols`, constants, + - * / % and `if`"))
        }
    }
}

//! Properties in braces → [`Format`]: a quantizer with a weight of its own, and its layouts.

use std::io::ErrorKind;
use std::sync::Arc;

use super::code::{self, Context, Properties, choice};
use super::consts::{self, Const, Scope, integer, number};
use super::{Sink, decode};
use crate::reader::{Book, Misfit, overlap, sample_shapes};
use crate::spec::format::{
    Arithmetic, Cover, Field, Format, Layout, Number, Place, Target, TensorSpec, Weight, WeightOp, WideTable,
};
use crate::spec::index::{Index, IndexOp, Var};
use crate::spec::{Shape, Table, TableSource, table_file};
use crate::syntax::ast::{
    self, BinaryOp, Body, CoverExpr, Expr, ExprKind, LayoutLine, PropertyKind, TypeName, UnaryOp,
};
use crate::syntax::diag::{Diagnostic, Span};
use crate::syntax::number::Rational;

/// Most bits of a code: entries of all codes are written out.
const MAX_CODE: i128 = 18;
/// Most weights of a code.
const MAX_VECTOR: i128 = 16;
/// Most entries of all codes.
const MOST_ENTRIES: u64 = 1 << 21;
/// Largest expression of a layout.
const MOST_INDEX: usize = 10_000;
/// Most operations of a weight.
const MOST_WEIGHT: usize = 256;

/// Types of entries: bits, and the integers they hold.
const ENTRIES: [(&str, u32); 4] = [("i8", 8), ("i16", 16), ("i24", 24), ("i32", 32)];

/// True if a body says what its weights are, so that it is a format's.
pub fn is_format(b: &Body) -> bool {
    b.properties.iter().any(|p| match &p.kind {
        PropertyKind::Field(_) | PropertyKind::Weight(_) => true,
        PropertyKind::Table(t) => matches!(t.source, ast::TableSource::OfMatrix(..)),
        _ => false,
    })
}

/// Checks a format's body, without its layouts.
pub fn body(b: &Body, mut scope: Scope, cx: &Context<'_>, sink: &mut Sink) -> Option<Format> {
    code::define(b, &mut scope, sink);
    code::duplicates(b, sink);
    let p = Properties::new(&[b]);
    p.report_said(sink);
    for property in &b.properties {
        let cure = match &property.kind {
            PropertyKind::Scale(_) => "a format's scales are fields: `field s : f32 per row` and `weight e { e * s }`",
            PropertyKind::Block(..) => "a format has a code for each group of weights, and no blocks: leave it out",
            PropertyKind::Step(_) => {
                "a format's codes do not overlap: write `bits N for V` in place of window and step"
            }
            PropertyKind::Code(_) => "a format has one code",
            PropertyKind::Rotate(name, _) if name.name != "none" => "a format's weights are as they are: leave it out",
            _ => continue,
        };
        let keyword = &property.keyword;
        let d = Diagnostic::error(keyword.span, format!("a format has no `{}`", keyword.name), "");
        sink.push(d.hint(cure));
    }
    let weight = b.properties.iter().find_map(|p| match &p.kind {
        PropertyKind::Weight(w) => Some(w),
        _ => None,
    });
    if !b.incomplete {
        let bits = p.bits.is_none().then_some("bits");
        let given = [("values", p.values.is_some()), ("decode", p.decode.is_some()), ("weight", weight.is_some())];
        let missing: Vec<&str> = bits.into_iter().chain(given.into_iter().filter(|g| !g.1).map(|g| g.0)).collect();
        code::report_missing(&missing, cx.owner.span, cx, sink);
    }
    let (bits, length, _) = p.bits?;
    let window = integer(bits, "the bits of a code", 1..=MAX_CODE, &scope, sink).map(|n| n as u32);
    let vector = match length {
        Some(e) => integer(e, "the weights of a code", 1..=MAX_VECTOR, &scope, sink).map(|n| n as u32),
        None => Some(1),
    };
    if let (Some(l), Some(v)) = (window, vector)
        && u64::from(v) << l > MOST_ENTRIES
    {
        let d = Diagnostic::error(bits.span, format!("2^{l} codes of {v} weights are too many"), "");
        return sink.fail(d.hint(format!("all codes together have {MOST_ENTRIES} entries at most")));
    }
    let values = p.values.and_then(|(ty, offset)| {
        let bits = choice(ty, "entry type", &ENTRIES, sink);
        let offset = offset.map_or(Some(0.into()), |e| number(e, &scope, sink));
        Some((bits?, offset?))
    });
    let unit = match p.unit {
        None => Some(1.into()),
        Some(e) => number(e, &scope, sink).and_then(|n| {
            if n.parts().0 > 0 {
                return Some(n);
            }
            sink.fail(Diagnostic::error(e.span, format!("the unit must be positive, not {n}"), format!("this is {n}")))
        }),
    };
    let range = values.map(|(bits, _)| range(bits));
    let mut ok = true;
    let (mut tables, mut fields) = (Vec::new(), Vec::new());
    for property in &b.properties {
        match &property.kind {
            PropertyKind::Table(t) => match &t.source {
                ast::TableSource::OfMatrix(ty, cover) => {
                    let entries = integer(&t.entries, "the number of entries", 1..=1 << 20, &scope, sink);
                    let ty = type_of(ty, &scope, sink);
                    if !matches!(cover, CoverExpr::Named(n) if n.name == "matrix") {
                        let d = Diagnostic::error(t.name.span, "a table is a matrix's: write `per matrix`", "");
                        sink.push(d);
                        ok = false;
                    }
                    match (entries, ty) {
                        (Some(n), Some(ty)) => {
                            let (name, entries) = (t.name.name.clone(), Some(n as u32));
                            fields.push((Field { name, ty, cover: Cover::Matrix, entries }, t.name.span));
                        }
                        _ => ok = false,
                    }
                }
                _ => match table(t, vector, range, &scope, cx, sink) {
                    Some(table) => tables.push((table, t.name.span)),
                    None => ok = false,
                },
            },
            PropertyKind::Field(f) => {
                let (ty, cover) = (type_of(&f.ty, &scope, sink), cover(&f.cover, &scope, sink));
                match (ty, cover) {
                    (Some(ty), Some(cover)) => {
                        fields.push((Field { name: f.name.name.clone(), ty, cover, entries: None }, f.name.span));
                    }
                    _ => ok = false,
                }
                if f.name.name == "code" {
                    let d = Diagnostic::error(f.name.span, "no field can be called `code`", "");
                    sink.push(d.hint("layouts call the codes so"));
                    ok = false;
                }
            }
            _ => (),
        }
    }
    let known: Vec<(Table, Span)> = tables
        .iter()
        .map(|(t, span)| {
            let known =
                Table { name: t.name.clone(), entries: t.entries, values: Vec::new(), source: TableSource::Inline };
            (known, *span)
        })
        .collect();
    let decoded =
        p.decode.and_then(|d| decode::Checker::new(window, vector, &known, &cx.functions, &scope, sink).check(d));
    let weight = weight.and_then(|w| WeightChecker::new(w, &fields, &known, &scope, sink).check(w));
    if !b.incomplete && ok && decoded.is_some() && weight.is_some() {
        scope.warn_unused(0, sink);
    }
    let (mut decoded, (entry_bits, offset)) = (decoded?, values?);
    let mut kept = Vec::new();
    let mut new = vec![0; known.len()];
    for (i, ((t, span), used)) in tables.into_iter().zip(&decoded.looked_up).enumerate() {
        if *used {
            new[i] = kept.len() as u32;
            kept.push(t);
        } else {
            let d = Diagnostic::warning(span, format!("the table `{}` is never used", t.name), "");
            sink.push(d.hint("take it out, or look it up in the decode block"));
        }
    }
    decode::renumber(&mut decoded.decode, &new);
    let format = Format {
        name: cx.name.name.clone(),
        window: window?,
        vector: vector?,
        entry_bits,
        offset,
        unit: unit?,
        tables: kept,
        decode: decoded.decode,
        fields: fields.into_iter().map(|f| f.0).collect(),
        weight: weight?,
        layouts: Vec::new(),
    };
    (ok && entries(&format, p.decode?, sink)).then_some(format)
}

/// Smallest and largest integer of an entry type of `bits` bits.
fn range(bits: u32) -> (i32, i32) {
    (i32::MIN >> (32 - bits), i32::MAX >> (32 - bits))
}

/// Looks at all codes: integers must be of the entries' type; bits on which nothing depends are told.
fn entries(format: &Format, d: &ast::Decode, sink: &mut Sink) -> bool {
    let (min, max) = range(format.entry_bits);
    let v = format.vector as usize;
    let mut all = vec![0; v << format.window];
    for (code, out) in all.chunks_exact_mut(v).enumerate() {
        format.integers(code as u32, out);
        if let Some(bad) = out.iter().find(|x| !(min..=max).contains(*x)) {
            let message = format!("code {code:#x} gives {bad}, which is no integer of {} bits", format.entry_bits);
            let d = Diagnostic::error(d.result.span, message, "");
            sink.push(d.hint(format!("entries lie within {min}..={max}: choose another type, or another expression")));
            return false;
        }
    }
    let unused: Vec<u32> = (0..format.window)
        .filter(|bit| {
            let half = v << bit;
            all.chunks_exact(2 * half).all(|pair| pair[..half] == pair[half..])
        })
        .collect();
    if let [first, ..] = unused[..] {
        let message = format!("no entry depends on bit {first} of the code");
        sink.push(Diagnostic::warning(d.result.span, message, "").hint("such bits are stored in vain"));
    }
    true
}

fn table(
    t: &ast::Table,
    vector: Option<u32>,
    range: Option<(i32, i32)>,
    scope: &Scope,
    cx: &Context<'_>,
    sink: &mut Sink,
) -> Option<WideTable> {
    let entries = code::table_entries(t, scope, sink);
    let values = match &t.source {
        ast::TableSource::Inline(e) => code::inline(t, e, entries, vector, range, scope, sink)?,
        ast::TableSource::File(path) => {
            let file = code::table_path(path, cx, sink)?;
            let text = match cx.files.read(&file) {
                Ok(text) => text,
                Err(e) => {
                    let why =
                        if e.kind() == ErrorKind::NotFound { "there is no such file".into() } else { e.to_string() };
                    let message = format!("cannot read the table file {}: {why}", file.display());
                    return sink.fail(Diagnostic::error(path.span, message, ""));
                }
            };
            sink.count_values(entries? as usize * vector? as usize, path.span)?;
            match table_file::read_within(&text, entries?, vector?, range?) {
                Ok(values) => values,
                Err(e) => {
                    let message = format!("the table file {} does not fit: {e}", file.display());
                    return sink.fail(Diagnostic::error(path.span, message, ""));
                }
            }
        }
        ast::TableSource::Trained { path, .. } => {
            let d = Diagnostic::error(path.span, "a format's tables are not trained", "");
            return sink.fail(d.hint("write the values in brackets, or name their file: `from \"file\"`"));
        }
        ast::TableSource::OfMatrix(..) => return None,
    };
    Some(WideTable { name: t.name.name.clone(), entries: entries?, values })
}

/// The type that a name means.
fn type_of(t: &TypeName, scope: &Scope, sink: &mut Sink) -> Option<Number> {
    let name = t.name.name.as_str();
    let (kind, digits) = name.split_at(1);
    let written = digits.parse::<u32>().ok().filter(|_| !digits.starts_with('0'));
    let bits = match (&t.bits, digits) {
        (Some(e), "") => Some(integer(e, "the bits of a type", 1..=32, scope, sink)? as u32),
        (None, _) => written.filter(|n| (1..=32).contains(n)),
        (Some(_), _) => None,
    };
    match (kind, bits) {
        ("u", Some(n)) => return Some(Number::Unsigned(n)),
        ("i", Some(n @ 2..)) => return Some(Number::Signed(n)),
        _ => (),
    }
    let floats = [Number::F16, Number::Bf16, Number::F32, Number::E8m0, Number::E4m3, Number::E5m2];
    if let Some(n) = floats.into_iter().find(|n| t.bits.is_none() && n.text() == name) {
        return Some(n);
    }
    let d = Diagnostic::error(t.name.span, format!("there is no type `{name}`"), "");
    sink.fail(d.hint("types are u1 to u32, i2 to i32, u(n), i(n), f16, bf16, f32, e8m0, e4m3 and e5m2"))
}

fn cover(c: &CoverExpr, scope: &Scope, sink: &mut Sink) -> Option<Cover> {
    let most = 1 << 24;
    Some(match c {
        CoverExpr::Named(n) => match n.name.as_str() {
            "matrix" => Cover::Matrix,
            "row" => Cover::Row,
            _ => Cover::Column,
        },
        CoverExpr::Flat(_, e) => Cover::Flat(integer(e, "the weights of a cover", 1..=most, scope, sink)? as u32),
        CoverExpr::Rectangle(r, c) => {
            let rows = integer(r, "the rows of a cover", 1..=most, scope, sink);
            let cols = integer(c, "the columns of a cover", 1..=most, scope, sink);
            Cover::Rectangle(Shape { rows: rows? as u32, cols: cols? as u32 })
        }
    })
}

/// The value of a part of a weight.
#[derive(Clone, Copy)]
enum Part {
    Const(Rational),
    /// A node, and whether it depends on the entry.
    Node(usize, bool),
}

struct WeightChecker<'a> {
    entry: &'a ast::Ident,
    fields: &'a [(Field, Span)],
    tables: &'a [(Table, Span)],
    scope: &'a Scope,
    sink: &'a mut Sink,
    lets: Vec<(&'a ast::Ident, Option<Part>, bool)>,
    used: Vec<bool>,
    ops: Vec<WeightOp>,
}

impl<'a> WeightChecker<'a> {
    fn new(
        d: &'a ast::Decode,
        fields: &'a [(Field, Span)],
        tables: &'a [(Table, Span)],
        scope: &'a Scope,
        sink: &'a mut Sink,
    ) -> Self {
        let used = vec![false; fields.len()];
        WeightChecker { entry: &d.window, fields, tables, scope, sink, lets: Vec::new(), used, ops: Vec::new() }
    }

    fn check(mut self, d: &'a ast::Decode) -> Option<Weight> {
        self.clash(&d.window);
        let mut ok = true;
        for (name, e) in &d.lets {
            let value = self.expr(e);
            ok &= value.is_some() & self.clash(name);
            self.lets.push((name, value, false));
        }
        let result = self.expr(&d.result).filter(|_| ok)?;
        let (last, depends) = match result {
            Part::Node(n, depends) => (n, depends),
            Part::Const(c) => (self.push(WeightOp::Const(c), d.result.span)?, false),
        };
        for (name, ..) in self.lets.iter().filter(|l| !l.2) {
            let w = Diagnostic::warning(name.span, format!("`{}` is never used", name.name), "");
            self.sink.push(w.hint("take it out"));
        }
        for ((f, span), _) in self.fields.iter().zip(&self.used).filter(|f| !f.1) {
            let w = Diagnostic::warning(*span, format!("the field `{}` is never used", f.name), "");
            self.sink.push(w.hint("take it out, or use it in the weight block"));
        }
        if !depends {
            let message = format!("the entry `{}` is never used", self.entry.name);
            self.sink.push(Diagnostic::warning(self.entry.span, message, ""));
        }
        Some(Weight { ops: needed(&self.ops, last) })
    }

    fn clash(&mut self, name: &ast::Ident) -> bool {
        let lets = self.lets.iter().find(|l| l.0.name == name.name).map(|l| l.0.span);
        let fields = self.fields.iter().find(|f| f.0.name == name.name).map(|f| f.1);
        let entry = (self.entry.name == name.name && self.entry.span != name.span).then_some(self.entry.span);
        let Some(first) = lets.or(fields).or(entry).or(self.scope.span(&name.name)) else { return true };
        let d = Diagnostic::error(name.span, format!("`{}` is defined twice", name.name), "again here");
        self.sink.push(d.label(first, "first here").hint("choose another name: a name means one thing"));
        false
    }

    fn push(&mut self, op: WeightOp, span: Span) -> Option<usize> {
        if let Some(i) = self.ops.iter().position(|o| *o == op) {
            return Some(i);
        }
        if self.ops.len() == MOST_WEIGHT {
            let d = Diagnostic::error(span, format!("a weight has more than {MOST_WEIGHT} operations"), "");
            return self.sink.fail(d);
        }
        self.ops.push(op);
        Some(self.ops.len() - 1)
    }

    fn node(&mut self, part: Part, span: Span) -> Option<(usize, bool)> {
        match part {
            Part::Const(c) => Some((self.push(WeightOp::Const(c), span)?, false)),
            Part::Node(n, depends) => Some((n, depends)),
        }
    }

    fn field(&mut self, name: &str) -> Option<usize> {
        let i = self.fields.iter().position(|f| f.0.name == name)?;
        self.used[i] = true;
        Some(i)
    }

    fn expr(&mut self, e: &Expr) -> Option<Part> {
        match &e.kind {
            ExprKind::Number(n) => Some(Part::Const(*n)),
            ExprKind::Name(name) => self.name(name, e.span),
            ExprKind::Unary(UnaryOp::Neg, a) => match self.expr(a)? {
                Part::Const(c) => match c.checked_neg() {
                    Some(c) => Some(Part::Const(c)),
                    None => self.sink.fail(Diagnostic::error(e.span, "this constant is too large to compute", "")),
                },
                Part::Node(n, depends) => Some(Part::Node(self.push(WeightOp::Neg(n), e.span)?, depends)),
            },
            ExprKind::Binary(op, a, b) => {
                let (x, y) = (self.expr(a), self.expr(b));
                let (x, y) = (x?, y?);
                if let (Part::Const(x), Part::Const(y)) = (x, y) {
                    return match consts::fold(*op, x, y, e.span, self.sink)? {
                        Const::Number(n) => Some(Part::Const(n)),
                        other => {
                            let message = format!("expected a number, found {}", other.describe());
                            self.sink.fail(Diagnostic::error(e.span, message, ""))
                        }
                    };
                }
                let arithmetic = match op {
                    BinaryOp::Add => Arithmetic::Add,
                    BinaryOp::Sub => Arithmetic::Sub,
                    BinaryOp::Mul => Arithmetic::Mul,
                    BinaryOp::Div => Arithmetic::Div,
                    other => {
                        let d = Diagnostic::error(e.span, format!("weights have no operator `{}`", other.text()), "");
                        return self.sink.fail(d.hint("weights have + - * /; the others are for constants"));
                    }
                };
                let (x, of_x) = self.node(x, a.span)?;
                let (y, of_y) = self.node(y, b.span)?;
                let bent = match arithmetic {
                    Arithmetic::Mul => of_x && of_y,
                    Arithmetic::Div => of_y,
                    Arithmetic::Add | Arithmetic::Sub => false,
                };
                if bent {
                    let d = Diagnostic::error(e.span, "a weight must be affine in its entry", "");
                    return self
                        .sink
                        .fail(d.hint("it is a factor times the entry, and a summand; a table makes other curves"));
                }
                let n = self.push(WeightOp::Binary(arithmetic, x, y), e.span)?;
                Some(Part::Node(n, of_x || of_y))
            }
            ExprKind::Index(base, index) => {
                let ExprKind::Name(name) = &base.kind else {
                    let d = Diagnostic::error(e.span, "a weight looks up tables of the matrix alone", "");
                    return self.sink.fail(d);
                };
                let table = self.field(name);
                let Some(table) = table.filter(|t| self.fields[*t].0.entries.is_some()) else {
                    let tables = self.fields.iter().filter(|f| f.0.entries.is_some()).map(|f| f.0.name.as_str());
                    let d = consts::unknown(name, base.span, "table of the matrix", tables);
                    return self.sink.fail(d);
                };
                let field = match &index.kind {
                    ExprKind::Name(f) => self.field(f),
                    _ => None,
                };
                let unsigned = |f: &usize| matches!(self.fields[*f].0.ty, Number::Unsigned(_));
                match field.filter(|f| unsigned(f) && self.fields[*f].0.entries.is_none()) {
                    Some(f) => Some(Part::Node(self.push(WeightOp::Lookup(table, f), e.span)?, false)),
                    None => {
                        let d = Diagnostic::error(index.span, "the index of a matrix's table is a field", "");
                        self.sink.fail(d.hint("of unsigned integers, such as `field peak : u8 per flat 64`"))
                    }
                }
            }
            ExprKind::If(c, a, b) => {
                let chosen = consts::choose(c, a, b, self.scope, self.sink)?;
                self.expr(chosen)
            }
            ExprKind::Unary(UnaryOp::Not, _) | ExprKind::Range(..) | ExprKind::List(_) => {
                let d = Diagnostic::error(e.span, "a weight is a number", "");
                self.sink.fail(d.hint("bits, lists and words stand in the decode block"))
            }
            ExprKind::Call(f, args) if consts::FUNCTIONS.contains(&f.name.as_str()) => {
                let call = Expr::new(ExprKind::Call(f.clone(), args.clone()), e.span);
                number(&call, self.scope, self.sink).map(Part::Const)
            }
            ExprKind::Call(f, _) => {
                let d = consts::unknown(&f.name, f.span, "function of a weight", consts::FUNCTIONS.into_iter());
                self.sink.fail(d)
            }
        }
    }

    fn name(&mut self, name: &str, span: Span) -> Option<Part> {
        if self.entry.name == name {
            return Some(Part::Node(self.push(WeightOp::Entry, span)?, true));
        }
        if let Some(l) = self.lets.iter_mut().find(|l| l.0.name == name) {
            l.2 = true;
            return l.1;
        }
        if let Some(f) = self.field(name) {
            if self.fields[f].0.entries.is_some() {
                let d = Diagnostic::error(span, format!("the table `{name}` needs an index"), "");
                return self.sink.fail(d.hint(format!("an entry is `{name}[field]`")));
            }
            return Some(Part::Node(self.push(WeightOp::Field(f), span)?, false));
        }
        if let Some(value) = self.scope.get(name) {
            return match value? {
                Const::Number(n) => Some(Part::Const(*n)),
                other => {
                    let message = format!("expected a number, found {}", other.describe());
                    self.sink.fail(Diagnostic::error(span, message, ""))
                }
            };
        }
        if self.tables.iter().any(|t| t.0.name == name) {
            let d = Diagnostic::error(span, format!("the table `{name}` belongs to the decode block"), "");
            return self.sink.fail(d.hint("a weight looks up tables `per matrix`"));
        }
        let known = [self.entry.name.as_str()].into_iter().chain(self.fields.iter().map(|f| f.0.name.as_str()));
        let known = known.chain(self.lets.iter().map(|l| l.0.name.as_str())).chain(self.scope.names());
        let d = consts::unknown(name, span, "name", known.collect::<Vec<_>>().into_iter());
        self.sink.fail(d)
    }
}

/// The operations that node `last` needs, which comes last, in order of first need.
fn needed(ops: &[WeightOp], last: usize) -> Vec<WeightOp> {
    fn visit(ops: &[WeightOp], n: usize, new: &mut [Option<usize>], out: &mut Vec<WeightOp>) -> usize {
        if let Some(at) = new[n] {
            return at;
        }
        let op = match &ops[n] {
            WeightOp::Neg(a) => WeightOp::Neg(visit(ops, *a, new, out)),
            WeightOp::Binary(op, a, b) => {
                let a = visit(ops, *a, new, out);
                WeightOp::Binary(*op, a, visit(ops, *b, new, out))
            }
            other => other.clone(),
        };
        out.push(op);
        new[n] = Some(out.len() - 1);
        out.len() - 1
    }
    let mut out = Vec::new();
    visit(ops, last, &mut vec![None; ops.len()], &mut out);
    out
}

/// Checks a layout of `format`, whose constants are `scope`.
pub fn layout(l: &ast::Layout, format: &Format, scope: &Scope, sink: &mut Sink) -> Option<Layout> {
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
            Target::Field(f) => (1 + f, format.fields[f].name.as_str()),
        };
        let bits = ((1u64 << (place.bits.1 - place.bits.0)) - 1) << place.bits.0;
        if place.read.is_none() && named[slot] & bits != 0 {
            let d = Diagnostic::error(p.target.span, format!("bits of `{name}` are placed twice"), "");
            sink.push(d.hint("`[a..b]` after the indices says which bits a place holds"));
            ok = false;
        }
        named[slot] |= bits;
        out.places.push(place);
    }
    let widths = [format.window].into_iter().chain(format.fields.iter().map(|f| f.ty.bits()));
    let names = ["code"].into_iter().chain(format.fields.iter().map(|f| f.name.as_str()));
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
                e @ (Misfit::Aperiodic { .. } | Misfit::Outside { .. } | Misfit::Size { .. } | Misfit::Vector { .. }),
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
    let names = Names { vars: &[], stored: None, lets: Vec::new() };
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
    let (target, width, wanted) = match fields().position(|f| f == p.target.name) {
        _ if p.target.name == "code" => (Target::Code, format.window, 2),
        Some(f) => {
            let field = &format.fields[f];
            let indices = if field.entries.is_some() { 1 } else { field.cover.indices() };
            (Target::Field(f), field.ty.bits(), indices)
        }
        None => {
            let known: Vec<&str> = ["code"].into_iter().chain(fields()).collect();
            let d = consts::unknown(&p.target.name, p.target.span, "target", known.into_iter());
            return sink.fail(d);
        }
    };
    if p.vars.len() != wanted {
        let message = format!("`{}` has {wanted} indices, not {}", p.target.name, p.vars.len());
        let d = Diagnostic::error(p.target.span, message, "");
        return sink.fail(d.hint(match target {
            Target::Code => "a code has its row, and the number of its group of columns",
            Target::Field(_) => {
                "none for a matrix; the row, the column or the number of the cover; row and column of a grid"
            }
        }));
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
            let names = Names { vars: &p.vars, stored: None, lets: Vec::new() };
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
    let names = Names { vars: &p.vars, stored: None, lets: Vec::new() };
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
            let mut names = Names { vars: &p.vars, stored: Some(&d.window), lets: Vec::new() };
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
struct Names<'a> {
    vars: &'a [ast::Ident],
    stored: Option<&'a ast::Ident>,
    lets: Vec<(&'a str, Index)>,
}

/// A whole-number expression.
fn index(e: &Expr, names: &Names<'_>, scope: &Scope, sink: &mut Sink) -> Option<Index> {
    let out = part(e, names, scope, sink)?;
    if out.size() > MOST_INDEX {
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

//! Properties in braces → [`Format`]: a quantizer with a weight of its own.

use std::io::ErrorKind;

use super::code::{self, Context, Properties, choice};
use super::consts::{self, Const, Scope, integer, number};
use super::{Sink, decode, formula, sides};
use crate::spec::expr::Room;
use crate::spec::format::{Arithmetic, Cover, Field, Format, Number, Weight, WeightOp, WideTable};
use crate::spec::{Shape, Table, TableSource, mask, table_file};
use crate::syntax::ast::{self, BinaryOp, Body, CoverExpr, Expr, ExprKind, PropertyKind, TypeName, UnaryOp};
use crate::syntax::diag::{Diagnostic, Span};
use crate::syntax::number::Rational;

/// Most bits of a code.
const MAX_CODE: i128 = 24;
/// Codes of up to so many bits are all tried; of longer ones so many, spread evenly.
const TRIED: u32 = 18;
/// Most weights of a code.
const MAX_VECTOR: i128 = 16;
/// Most operations of a weight.
const MOST_WEIGHT: usize = 256;

/// Types of entries: bits, and the integers they hold.
const ENTRIES: [(&str, u32); 4] = [("i8", 8), ("i16", 16), ("i24", 24), ("i32", 32)];

/// True if a body says what its weights are, so that it is a format's.
pub fn is_format(b: &Body) -> bool {
    b.properties.iter().any(|p| match &p.kind {
        PropertyKind::Field(_) | PropertyKind::Weight(_) | PropertyKind::Order(_) => true,
        PropertyKind::Input(_) | PropertyKind::Output(_) => true,
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
    let (memory, of_memory) = sides::Memory::of(b, &p);
    // Windows that overlap are told by any of their properties.
    let has_memory = p.bits.is_none() && of_memory.len() < 5;
    for property in &b.properties {
        let cure = match &property.kind {
            PropertyKind::Scale(_) => "a format's scales are fields: `field s : f32 per row` and `weight e { e * s }`",
            PropertyKind::Block(..) if !has_memory => {
                "a format has a code for each group of weights, and no blocks: leave it out"
            }
            PropertyKind::Order(_) if !has_memory => "codes without memory have no order: leave it out",
            PropertyKind::Step(_) if !has_memory => {
                "a format's codes do not overlap: write `bits N for V` in place of window and step"
            }
            PropertyKind::Code(_) => "a format has one code",
            PropertyKind::Rotate(name, _) if name.name != "none" => {
                "say what is done to activations: `input signs(seed = 0), hadamard`"
            }
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
    // A table of the matrix gives numbers, which have no type of the spec's.
    let of_matrix = |p: &ast::Property| match &p.kind {
        PropertyKind::Table(t) => matches!(t.source, ast::TableSource::OfMatrix(..)),
        _ => false,
    };
    let may_be_numbers = b.properties.iter().any(of_matrix);
    if !b.incomplete {
        let bits = (p.bits.is_none() && !has_memory).then_some("bits");
        let of_memory = of_memory.iter().copied().filter(|_| has_memory);
        let given = [("values", p.values.is_some() || may_be_numbers), ("decode", p.decode.is_some())];
        let missing: Vec<&str> =
            bits.into_iter().chain(of_memory).chain(given.into_iter().filter(|g| !g.1).map(|g| g.0)).collect();
        code::report_missing(&missing, cx.owner.span, cx, sink);
    }
    let (bits, length) = match (p.bits, memory.is_some()) {
        (Some((bits, length, _)), _) => (bits, length),
        (None, true) if has_memory => (p.window?, p.vector),
        (None, _) => return None,
    };
    let window = integer(bits, "the bits of a code", 1..=MAX_CODE, &scope, sink).map(|n| n as u32);
    let vector = match length {
        Some(e) => integer(e, "the weights of a code", 1..=MAX_VECTOR, &scope, sink).map(|n| n as u32),
        None => Some(1),
    };
    let trellis = match memory.filter(|_| has_memory) {
        Some(m) => Some(m.check(window?, vector?, &scope, sink)?),
        None => None,
    };
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
                ast::TableSource::OfMatrix(of) => {
                    let (ty, cover) = &**of;
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
                            let field = Field { name, ty, cover: Cover::Matrix, entries, width: 1, formula: None };
                            fields.push((field, t.name.span));
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
                ok &= ty.is_some() && cover.is_some();
                // With errors it is still known by name, so that its uses are not errors too.
                let (ty, cover) = (ty.unwrap_or(Number::Unsigned(1)), cover.unwrap_or(Cover::Matrix));
                let name = f.name.name.clone();
                fields.push((Field { name, ty, cover, entries: None, width: 1, formula: None }, f.name.span));
                if ["code", "stream"].contains(&f.name.name.as_str()) {
                    let d = Diagnostic::error(f.name.span, format!("no field can be called `{}`", f.name.name), "");
                    sink.push(d.hint("layouts call codes and their streams so"));
                    ok = false;
                }
            }
            _ => (),
        }
    }
    ok &= formula::all(b, &mut fields, &scope, sink);
    let by_name = |name: &str, entries: u32, span: Span| {
        let (name, values, source) = (name.to_string(), Vec::new(), TableSource::Inline);
        (Table { name, entries, values, source }, span)
    };
    let known: Vec<(Table, Span)> = tables.iter().map(|(t, span)| by_name(&t.name, t.entries, *span)).collect();
    let of_matrix: Vec<usize> = (0..fields.len()).filter(|f| fields[*f].0.entries.is_some()).collect();
    let its = of_matrix.iter().map(|f| (&fields[*f].0, fields[*f].1));
    let its = its.map(|(f, span)| by_name(&f.name, f.entries.unwrap_or(1), span));
    let all: Vec<(Table, Span)> = known.iter().cloned().chain(its).collect();
    let decoded = p
        .decode
        .and_then(|d| decode::Checker::new(window, vector, &all, known.len(), &cx.functions, &scope, sink).check(d));
    let mut used = vec![false; fields.len()];
    let mut numbers = Vec::new();
    for (i, &f) in of_matrix.iter().enumerate() {
        if decoded.as_ref().is_some_and(|d| d.looked_up[known.len() + i]) {
            (used[f], fields[f].0.width) = (true, vector.unwrap_or(1));
            numbers.push(f);
            ok &= looked_up(&fields[f], sink);
        }
    }
    let steps = sides::steps(b, &fields, &mut used, &scope, sink);
    let weight = match weight {
        Some(w) => WeightChecker::new(w, &fields, &known, used, &scope, sink).check(w),
        None => Some(Weight { ops: vec![WeightOp::Entry] }),
    };
    if !numbers.is_empty()
        && let Some(at) = p.values.map(|v| v.0.span).or(p.unit.map(|u| u.span))
    {
        let d = Diagnostic::error(at, "the entries are numbers of the matrix's tables", "");
        return sink.fail(d.hint("they are as the tables have them: take `values` and `unit` away"));
    }
    if may_be_numbers && decoded.is_some() && numbers.is_empty() && p.values.is_none() && !b.incomplete {
        code::report_missing(&["values"], cx.owner.span, cx, sink);
    }
    if !b.incomplete && ok && decoded.is_some() && weight.is_some() {
        scope.warn_unused(0, sink);
    }
    let mut decoded = decoded?;
    let (entry_bits, offset) = if numbers.is_empty() { values? } else { (32, 0.into()) };
    let (input, output) = steps?;
    let mut kept = Vec::new();
    let mut new = vec![0; all.len()];
    for (i, ((t, span), used)) in tables.into_iter().zip(&decoded.looked_up).enumerate() {
        if *used {
            new[i] = kept.len() as u32;
            kept.push(t);
        } else {
            let d = Diagnostic::warning(span, format!("the table `{}` is never used", t.name), "");
            sink.push(d.hint("take it out, or look it up in the decode block"));
        }
    }
    let of_tables = (0..).zip(of_matrix).filter(|(_, f)| numbers.contains(f));
    for (n, (i, _)) in (kept.len() as u32..).zip(of_tables) {
        new[known.len() + i] = n;
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
        trellis,
        numbers,
        input,
        output,
    };
    (ok && entries(&format, p.decode?, sink)).then_some(format)
}

/// Smallest and largest integer of an entry type of `bits` bits.
fn range(bits: u32) -> (i32, i32) {
    (i32::MIN >> (32 - bits), i32::MAX >> (32 - bits))
}

/// Whether codes can look up a table of the matrix.
fn looked_up((table, span): &(Field, Span), sink: &mut Sink) -> bool {
    let narrow = match table.ty {
        Number::F16 | Number::E4m3 | Number::E5m2 => true,
        Number::Unsigned(n) | Number::Signed(n) => n <= 16,
        Number::Bf16 | Number::F32 | Number::E8m0 => false,
    };
    if !narrow {
        let message = format!("codes look up no tables of {}", table.ty.text());
        let d = Diagnostic::error(*span, message, "");
        sink.push(d.hint("sums of f16, e4m3, e5m2 and integers of up to 16 bits are exact, and no others"));
    }
    let power = table.entries.is_some_and(u32::is_power_of_two);
    if !power {
        let message = format!("codes look up no table of {} entries", table.entries.unwrap_or(0));
        sink.push(Diagnostic::error(*span, message, "").hint("make their number a power of two"));
    }
    narrow && power
}

/// Looks at all codes: integers must be of the entries' type; bits on which nothing depends are told.
fn entries(format: &Format, d: &ast::Decode, sink: &mut Sink) -> bool {
    let key = (format.decode.clone(), format.tables.clone(), [format.window, format.vector, format.entry_bits]);
    let is_number = !format.numbers.is_empty();
    // Members of a family often differ in other things.
    if !is_number && sink.sound.contains(&key) {
        return true;
    }
    let (min, max) = range(format.entry_bits);
    let (min, max) = (i64::from(min), i64::from(max));
    let v = format.vector as usize;
    // In place of a matrix's tables stand numbers that tell all entries apart.
    let made = |f: &usize| {
        let of = &format.fields[*f];
        let count = u64::from(of.entries.unwrap_or(1)) * u64::from(of.width);
        (1..=count).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20) as i64).collect::<Vec<i64>>()
    };
    let numbers: Vec<Vec<i64>> = format.numbers.iter().map(made).collect();
    let (tried, stride) = (format.window.min(TRIED), (1u32 << (format.window - format.window.min(TRIED))) | 1);
    let stride = if format.window > TRIED { stride } else { 1 };
    let mut room = Room::default();
    let mut all = vec![0i64; v << tried];
    for (code, out) in (0u32..).map(|i| i.wrapping_mul(stride) & mask(format.window)).zip(all.chunks_exact_mut(v)) {
        format.integers(code, &numbers, &mut room, out);
        if let Some(bad) = out.iter().find(|x| !is_number && !(min..=max).contains(*x)) {
            let message = format!("code {code:#x} gives {bad}, which is no integer of {} bits", format.entry_bits);
            let d = Diagnostic::error(d.result.span, message, "");
            sink.push(d.hint(format!("entries lie within {min}..={max}: choose another type, or another expression")));
            return false;
        }
    }
    let depends = |bit: u32| {
        if format.window <= TRIED {
            let half = v << bit;
            return all.chunks_exact(2 * half).any(|pair| pair[..half] != pair[half..]);
        }
        let mut other = vec![0; v];
        let mut room = Room::default();
        (0u32..1 << tried).zip(all.chunks_exact(v)).any(|(i, entry)| {
            let code = (i.wrapping_mul(stride) & mask(format.window)) ^ 1 << bit;
            format.integers(code, &numbers, &mut room, &mut other);
            entry != other
        })
    };
    if let Some(first) = (0..format.window).find(|bit| !depends(*bit)) {
        let message = format!("no entry depends on bit {first} of the code");
        sink.push(Diagnostic::warning(d.result.span, message, "").hint("such bits are stored in vain"));
    } else {
        sink.sound.push(key);
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
pub fn type_of(t: &TypeName, scope: &Scope, sink: &mut Sink) -> Option<Number> {
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
        used: Vec<bool>,
        scope: &'a Scope,
        sink: &'a mut Sink,
    ) -> Self {
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
                if arithmetic == Arithmetic::Div && matches!(y, Part::Const(zero) if zero == 0.into()) {
                    let d = Diagnostic::error(b.span, "division by zero", "");
                    return self.sink.fail(d.hint("divide by another number"));
                }
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
                if let Some(of) = table.filter(|t| self.fields[*t].0.width > 1) {
                    let message = format!("`{}` is looked up by codes", self.fields[of].0.name);
                    return self.sink.fail(Diagnostic::error(base.span, message, "").hint("its entries are vectors"));
                }
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

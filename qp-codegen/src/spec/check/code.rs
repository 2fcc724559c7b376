//! Properties in braces → [`Code`]: ranges, and what must fit what.

use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::Path;

use super::consts::{self, Const, Scope, in_range, integer, number};
use super::{Files, Sink, decode, enumerate};
use crate::layout::LANES_PER_BLOCK;
use crate::reference::INTERLEAVED;
use crate::spec::{Code, Rotation, ScaleKind, Shape, Table, TableSource, Training, Value, table_file};
use crate::syntax::ast::{self, Arg, Body, Expr, ExprKind, Ident, Property, PropertyKind};
use crate::syntax::diag::{Diagnostic, Span, nearest};

/// Longest window: an encoder keeps a cost for each of 2^L states.
const MAX_WINDOW: i128 = 24;
/// Most entries of a table.
const MAX_ENTRIES: i128 = 1 << 20;
/// Most weights of a block.
const MAX_BLOCK: i128 = 1 << 16;
/// Most steps of a pattern: a program is as long as what it takes to come round.
const MAX_PATTERN: usize = 16;

/// What a body is checked with.
pub struct Context<'a> {
    /// Name of the quantizer.
    pub name: &'a Ident,
    /// Name of the family or quantizer that has the body.
    pub owner: &'a Ident,
    /// Folder of the file that has the body.
    pub folder: &'a Path,
    /// Where table files are read.
    pub files: &'a dyn Files,
    /// Functions that may be called.
    pub functions: Vec<&'a ast::Function>,
}

/// A code and what the codes of one mix must share.
pub struct CheckedCode {
    /// The code.
    pub code: Code,
    /// Where it is defined.
    pub span: Span,
}

/// A checked body.
pub struct CheckedBody {
    /// One, or those of a mix.
    pub codes: Vec<CheckedCode>,
    /// What a scale covers.
    pub scale: ScaleKind,
    /// Rotation.
    pub rotation: Rotation,
}

/// Checks a body whose parameters are `scope`.
pub fn body(b: &Body, mut scope: Scope, cx: &Context<'_>, sink: &mut Sink) -> Option<CheckedBody> {
    define(b, &mut scope, sink);
    duplicates(b, sink);
    let inner: Vec<(&Body, Span)> = b
        .properties
        .iter()
        .filter_map(|p| match &p.kind {
            PropertyKind::Code(c) => Some((c, p.keyword.span)),
            _ => None,
        })
        .collect();
    let find = |f: fn(&PropertyKind) -> bool| b.properties.iter().find(|p| f(&p.kind)).map(|p| &p.kind);
    let scale = find(|k| matches!(k, PropertyKind::Scale(_)));
    let rotate = find(|k| matches!(k, PropertyKind::Rotate(..)));
    let common = [("scale", scale.is_none()), ("rotate", rotate.is_none())];
    let missing: Vec<&str> = common.into_iter().filter(|c| c.1).map(|c| c.0).collect();
    let mut codes = Vec::new();
    if inner.is_empty() {
        let span = cx.owner.span;
        codes.push(code(&[b], span, &missing, &scope, cx, sink).map(|code| CheckedCode { code, span }));
    } else if !b.incomplete {
        report_missing(&missing, cx.owner.span, cx, sink);
    }
    for (c, span) in inner {
        let mut scope_inside = scope.clone();
        define(c, &mut scope_inside, sink);
        duplicates(c, sink);
        for p in &c.properties {
            if matches!(p.kind, PropertyKind::Scale(_) | PropertyKind::Rotate(..) | PropertyKind::Code(_)) {
                let d = Diagnostic::error(
                    p.keyword.span,
                    format!("`{}` cannot stand in a `code` body", p.keyword.name),
                    "",
                );
                sink.push(d.hint("it is common to all codes of a quantizer: put it outside"));
            }
        }
        codes.push(code(&[c, b], span, &[], &scope_inside, cx, sink).map(|code| CheckedCode { code, span }));
        scope_inside.warn_unused(scope.len(), sink);
        scope.used_as(&scope_inside);
    }
    let scale = match scale {
        Some(PropertyKind::Scale(name)) => {
            choice(name, "scale", &[("row", ScaleKind::Row), ("matrix", ScaleKind::Matrix)], sink)
        }
        _ => None,
    };
    let rotation = match rotate {
        Some(PropertyKind::Rotate(name, args)) => rotation(name, args, &scope, sink),
        _ => None,
    };
    // A code with errors may have stopped before it used everything.
    if !b.incomplete && codes.iter().all(Option::is_some) {
        scope.warn_unused(0, sink);
    }
    let codes: Vec<CheckedCode> = codes.into_iter().collect::<Option<_>>()?;
    Some(CheckedBody { codes, scale: scale?, rotation: rotation? })
}

/// Defines the `let`s of a body.
pub fn define(b: &Body, scope: &mut Scope, sink: &mut Sink) {
    scope.lenient |= b.incomplete;
    for p in &b.properties {
        if let PropertyKind::Let(name, e) = &p.kind {
            let value = consts::eval(e, scope, sink);
            scope.define(&name.name, name.span, value, "constant", sink);
        }
    }
}

/// Reports properties given twice and tables of one name.
pub fn duplicates(b: &Body, sink: &mut Sink) {
    let key = |p: &Property| match &p.kind {
        PropertyKind::Let(..) | PropertyKind::Code(_) => None,
        PropertyKind::Table(t) => Some(("table", t.name.name.clone(), t.name.span)),
        PropertyKind::Field(f) => Some(("table", f.name.name.clone(), f.name.span)),
        PropertyKind::Window(_)
        | PropertyKind::Vector(_)
        | PropertyKind::Step(_)
        | PropertyKind::Block(..)
        | PropertyKind::Values(..)
        | PropertyKind::Unit(_)
        | PropertyKind::Decode(_)
        | PropertyKind::Bits(..)
        | PropertyKind::Weight(_)
        | PropertyKind::Order(_)
        | PropertyKind::Input(_)
        | PropertyKind::Output(_)
        | PropertyKind::Scale(_)
        | PropertyKind::Rotate(..) => Some(("", p.keyword.name.clone(), p.keyword.span)),
    };
    let keys: Vec<_> = b.properties.iter().filter_map(key).collect();
    for (i, (what, name, span)) in keys.iter().enumerate() {
        if let Some((_, _, first)) = keys[..i].iter().find(|k| (k.0, &k.1) == (*what, name)) {
            let verb = if what.is_empty() { "given" } else { "defined" };
            sink.push(
                Diagnostic::error(*span, format!("`{name}` is {verb} twice"), "again here").label(*first, "first here"),
            );
        }
    }
}

pub fn report_missing(missing: &[&str], at: Span, cx: &Context<'_>, sink: &mut Sink) {
    let example = |name: &str| match name {
        "window" => "window 16",
        "vector" => "vector 2",
        "step" => "step 4",
        "block" => "block 2 x 128",
        "values" => "values i8 + 1/2",
        "unit" => "unit 1/32",
        "decode" => "decode w { … }",
        "scale" => "scale row",
        "bits" => "bits 4",
        "order" => "order p { [p / 16, p % 16] }",
        _ => "rotate hadamard(seed = 0)",
    };
    if !missing.is_empty() {
        let names: Vec<String> = missing.iter().map(|m| format!("`{m}`")).collect();
        let lines: Vec<&str> = missing.iter().map(|m| example(m)).collect();
        let d = Diagnostic::error(at, format!("`{}` says no {}", cx.owner.name, names.join(", ")), "");
        sink.push(d.hint(format!("add, for example: {}", lines.join("; "))));
    }
}

pub fn choice<T: Copy>(name: &Ident, what: &str, choices: &[(&str, T)], sink: &mut Sink) -> Option<T> {
    if let Some((_, v)) = choices.iter().find(|(n, _)| *n == name.name) {
        return Some(*v);
    }
    let names: Vec<&str> = choices.iter().map(|c| c.0).collect();
    let d = Diagnostic::error(name.span, format!("there is no {what} `{}`", name.name), "");
    sink.fail(match nearest(&name.name, names.iter().copied()) {
        Some(near) => d.meant(near),
        None => d.hint(format!("it is one of {}", names.join(", "))),
    })
}

/// The named arguments `wanted` with the values that they may have, in that order, all required.
fn args<const N: usize>(
    given: &[Arg],
    span: Span,
    wanted: [(&str, RangeInclusive<i128>); N],
    scope: &Scope,
    sink: &mut Sink,
) -> Option<[i128; N]> {
    let found = optional_args(given, &wanted, scope, sink);
    for (found, (name, _)) in found.iter().zip(&wanted) {
        if found.is_none() {
            let d = Diagnostic::error(span, format!("`{name}` is missing"), "");
            sink.push(d.hint(format!("write `{name} = …`")));
        }
    }
    let mut values = [0; N];
    for (v, found) in values.iter_mut().zip(found) {
        *v = found??;
    }
    Some(values)
}

/// The named arguments `wanted` with their largest values, in that order: of each whether it is given, and its value unless
/// that is wrong.
fn optional_args<const N: usize>(
    given: &[Arg],
    wanted: &[(&str, RangeInclusive<i128>); N],
    scope: &Scope,
    sink: &mut Sink,
) -> [Option<Option<i128>>; N] {
    let mut out = [None; N];
    for a in given {
        let Some(i) = wanted.iter().position(|w| w.0 == a.name.name) else {
            sink.push(consts::unknown(&a.name.name, a.name.span, "argument", wanted.iter().map(|w| w.0)));
            continue;
        };
        if out[i].is_some() {
            sink.push(Diagnostic::error(a.name.span, format!("`{}` is given twice", a.name.name), ""));
        }
        out[i] = Some(integer(&a.value, wanted[i].0, wanted[i].1.clone(), scope, sink));
    }
    out
}

/// Most columns of a rotation's block.
const MAX_ROTATION_BLOCK: u32 = 1 << 16;

fn rotation(name: &Ident, given: &[Arg], scope: &Scope, sink: &mut Sink) -> Option<Rotation> {
    let none = choice(name, "rotation", &[("none", true), ("hadamard", false)], sink)?;
    if none {
        if let Some(a) = given.first() {
            return sink.fail(Diagnostic::error(a.name.span, "`none` takes no arguments", ""));
        }
        return Some(Rotation::None);
    }
    let (most, given_as) = (MAX_ROTATION_BLOCK.into(), |name: &str| given.iter().find(|a| a.name.name == name));
    let wanted = [("seed", 0..=u64::MAX.into()), ("block", 2..=most), ("interleave", 2..=most)];
    let [seed, block, interleave] = optional_args(given, &wanted, scope, sink);
    let Some(seed) = seed else {
        let d = Diagnostic::error(name.span, "`seed` is missing", "");
        return sink.fail(d.hint("write `seed = …`"));
    };
    let seed = seed? as u64;
    let of = |value: Option<Option<i128>>| match value {
        Some(value) => value.map(|value| Some(value as u32)),
        None => Some(None),
    };
    let (block, interleave) = (of(block)?, of(interleave)?);
    if let (Some(size), Some(arg)) = (block, given_as("block"))
        && !size.is_power_of_two()
    {
        let d = Diagnostic::error(arg.name.span, format!("a rotation's block must be a power of two, not {size}"), "");
        let near = size.next_power_of_two().min(MAX_ROTATION_BLOCK);
        return sink.fail(d.hint(format!("write `block = {near}`, or leave it out to transform all columns together")));
    }
    if let (Some(span), Some(arg)) = (interleave, given_as("interleave")) {
        let Some(block) = block.filter(|block| *block >= INTERLEAVED) else {
            let d = Diagnostic::error(arg.name.span, "what is interleaved are blocks of 16 columns or more", "");
            return sink.fail(d.hint("write `block = 128, interleave = 1024`, say, or leave `interleave` out"));
        };
        if !span.is_power_of_two() || span <= block {
            let problem = format!("blocks of {block} columns are interleaved over a larger power of two, not {span}");
            let near = span.next_power_of_two().clamp(2 * block, MAX_ROTATION_BLOCK);
            return sink
                .fail(Diagnostic::error(arg.name.span, problem, "").hint(format!("write `interleave = {near}`")));
        }
    }
    Some(Rotation::Hadamard { seed, block, interleave })
}

/// Properties of one code, each from the innermost body that has it.
#[derive(Default)]
pub struct Properties<'a> {
    pub window: Option<&'a Expr>,
    pub vector: Option<&'a Expr>,
    pub step: Option<&'a Expr>,
    /// `bits N for V`: all three of these.
    pub bits: Option<(&'a Expr, Option<&'a Expr>, Span)>,
    pub block: Option<(&'a Expr, &'a Expr)>,
    pub values: Option<(&'a Ident, Option<&'a Expr>)>,
    pub unit: Option<&'a Expr>,
    pub tables: Vec<&'a ast::Table>,
    pub decode: Option<&'a ast::Decode>,
}

impl<'a> Properties<'a> {
    pub fn new(bodies: &[&'a Body]) -> Self {
        let mut out = Properties::default();
        for p in bodies.iter().flat_map(|b| &b.properties) {
            match &p.kind {
                PropertyKind::Window(e) => out.window = out.window.or(Some(e)),
                PropertyKind::Vector(e) => out.vector = out.vector.or(Some(e)),
                PropertyKind::Step(e) => out.step = out.step.or(Some(e)),
                PropertyKind::Bits(n, v) => out.bits = out.bits.or(Some((n, v.as_ref(), p.keyword.span))),
                PropertyKind::Block(r, c) => out.block = out.block.or(Some((r, c))),
                PropertyKind::Values(t, o) => out.values = out.values.or(Some((t, o.as_ref()))),
                PropertyKind::Unit(e) => out.unit = out.unit.or(Some(e)),
                PropertyKind::Table(t) => {
                    if !out.tables.iter().any(|o| o.name.name == t.name.name) {
                        out.tables.push(t);
                    }
                }
                PropertyKind::Decode(d) => out.decode = out.decode.or(Some(d)),
                PropertyKind::Let(..)
                | PropertyKind::Field(_)
                | PropertyKind::Weight(_)
                | PropertyKind::Order(_)
                | PropertyKind::Input(_)
                | PropertyKind::Output(_)
                | PropertyKind::Scale(_)
                | PropertyKind::Rotate(..)
                | PropertyKind::Code(_) => (),
            }
        }
        out
    }

    /// Reports what `bits` says already.
    pub fn report_said(&self, sink: &mut Sink) {
        let Some((.., span)) = self.bits else { return };
        for (name, given) in [("window", self.window), ("vector", self.vector), ("step", self.step)] {
            if let Some(e) = given {
                let d = Diagnostic::error(e.span, format!("`bits` says the `{name}` already"), "").label(span, "here");
                sink.push(d.hint("`bits N for V` is short for `window N`, `vector V` and `step N`: take one away"));
            }
        }
    }

    fn missing(&self) -> Vec<&'static str> {
        let given = [
            ("window", self.window.or(self.bits.map(|b| b.0)).is_some()),
            ("vector", self.vector.or(self.bits.map(|b| b.0)).is_some()),
            ("step", self.step.or(self.bits.map(|b| b.0)).is_some()),
            ("block", self.block.is_some()),
            ("values", self.values.is_some()),
            ("unit", self.unit.is_some()),
            ("decode", self.decode.is_some()),
        ];
        given.into_iter().filter(|g| !g.1).map(|g| g.0).collect()
    }
}

/// Checks the code of `bodies`, innermost first, defined at `at`; `missing` is missing beside what is found so.
fn code(
    bodies: &[&Body],
    at: Span,
    missing: &[&'static str],
    scope: &Scope,
    cx: &Context<'_>,
    sink: &mut Sink,
) -> Option<Code> {
    let mut p = Properties::new(bodies);
    p.report_said(sink);
    if bodies.iter().all(|b| !b.incomplete) {
        report_missing(&[&p.missing(), missing].concat(), at, cx, sink);
    }
    let mut vector = p.vector.and_then(|e| vector_length(e, scope, sink));
    if let Some((n, v, _)) = p.bits {
        (p.window, p.step) = (Some(n), Some(n));
        vector = v.map_or(Some(1), |e| vector_length(e, scope, sink));
    }
    let window = p.window.and_then(|e| integer(e, "the window", 1..=MAX_WINDOW, scope, sink)).map(|w| w as u32);
    let steps = p.step.and_then(|e| steps(e, window, scope, sink));
    let block = p.block.and_then(|(r, c)| block(r, c, scope, sink));
    let values = p.values.and_then(|(t, o)| values(t, o, scope, sink));
    let unit = p.unit.and_then(|e| unit(e, scope, sink));
    let fits = match (&steps, vector, block, p.step, p.block) {
        (Some(steps), Some(v), Some(block), Some(step_at), Some((r, c))) => {
            fits(steps, v, block, step_at.span, r.span.to(c.span), sink)
        }
        _ => true,
    };
    let checked: Vec<_> = p
        .tables
        .iter()
        .map(|t| table(t, vector, values.map(|v| v.0), scope, cx, sink).map(|c| (c, t.name.span)))
        .collect();
    // Tables with errors are still known by name, so that their uses are not errors too.
    let known: Vec<(Table, Span)> = checked
        .iter()
        .zip(&p.tables)
        .map(|(c, t)| {
            let unknown =
                Table { name: t.name.name.clone(), entries: 1, values: Vec::new(), source: TableSource::Inline };
            c.clone().unwrap_or((unknown, t.name.span))
        })
        .collect();
    let decoded = p
        .decode
        .and_then(|d| decode::Checker::new(window, vector, &known, known.len(), &cx.functions, scope, sink).check(d));
    let mut tables = Vec::new();
    let mut new = vec![0; known.len()];
    let tables_ok = checked.iter().all(Option::is_some);
    let mut decoded = decoded?;
    for (i, ((t, span), used)) in known.into_iter().zip(&decoded.looked_up).enumerate() {
        if *used {
            new[i] = tables.len() as u32;
            tables.push(t);
        } else {
            let d = Diagnostic::warning(span, format!("the table `{}` is never used", t.name), "");
            sink.push(d.hint("take it out, or look it up in the decode block"));
        }
    }
    decode::renumber(&mut decoded.decode, &new);
    let (value, half_offset) = values?;
    let code = Code {
        window: window?,
        steps: steps?,
        vector: vector?,
        block: block?,
        value,
        half_offset,
        unit: unit?,
        tables,
        decode: decoded.decode,
    };
    if !(fits && tables_ok) {
        return None;
    }
    if let Some(d) = p.decode {
        enumerate::warn(&code, d, sink);
    }
    Some(code)
}

fn vector_length(e: &Expr, scope: &Scope, sink: &mut Sink) -> Option<u32> {
    let v = number(e, scope, sink)?;
    match v.integer() {
        Some(v @ (1 | 2 | 4)) => Some(v as u32),
        Some(_) | None => {
            let d = Diagnostic::error(
                e.span,
                format!("the vector length must be 1, 2 or 4, not {v}"),
                format!("this is {v}"),
            );
            sink.fail(d.hint("a step gives so many weights, and a register holds four entries of 8 bits"))
        }
    }
}

fn steps(e: &Expr, window: Option<u32>, scope: &Scope, sink: &mut Sink) -> Option<Vec<u32>> {
    let list = match consts::eval(e, scope, sink)? {
        n @ Const::Number(_) => vec![n],
        Const::List(l) if !l.is_empty() => l,
        Const::List(_) | Const::Condition(_) => {
            let d = Diagnostic::error(e.span, "a step is a number of bits, or a list of them", "");
            return sink.fail(d.hint("write `step 4`, or `step [4, 5]` for steps that alternate"));
        }
    };
    let mut out = Vec::new();
    for (i, k) in list.iter().enumerate() {
        // In a list written here the member is the place; a parameter has only one.
        let span = match &e.kind {
            ExprKind::List(l) => l.get(i).map_or(e.span, |m| m.span),
            _ => e.span,
        };
        let Const::Number(k) = k else {
            return sink.fail(Diagnostic::error(span, format!("a step is a number of bits, not {}", k.describe()), ""));
        };
        let k = in_range(*k, span, "the bits of a step", 1..=MAX_WINDOW, sink)? as u32;
        if let Some(l) = window.filter(|l| k > *l) {
            let d = Diagnostic::error(
                span,
                format!("a step of {k} bits is longer than the window of {l} bits"),
                format!("this is {k}"),
            );
            return sink
                .fail(d.hint(format!("bits between two windows would have no meaning: make the window at least {k}")));
        }
        out.push(k);
    }
    // [4, 4] is 4.
    let n = (1..=out.len()).find(|n| out.len() % n == 0 && out.iter().enumerate().all(|(i, k)| *k == out[i % n]));
    out.truncate(n.unwrap_or(1));
    if out.len() > MAX_PATTERN {
        let d = Diagnostic::error(e.span, format!("a pattern of {} steps is too long", out.len()), "");
        return sink.fail(d.hint(format!("a pattern has {MAX_PATTERN} steps at most before it begins anew")));
    }
    Some(out)
}

fn block(r: &Expr, c: &Expr, scope: &Scope, sink: &mut Sink) -> Option<Shape> {
    let rows = integer(r, "the rows of a block", 1..=MAX_BLOCK, scope, sink);
    let cols = integer(c, "the columns of a block", 1..=MAX_BLOCK, scope, sink);
    let rows = rows.and_then(|n| {
        if n % 2 == 0 {
            return Some(n);
        }
        let d = Diagnostic::error(r.span, format!("the rows of a block must be even, not {n}"), format!("this is {n}"));
        sink.fail(d.hint("a tensor-core operand holds two rows of each block"))
    });
    let cols = cols.and_then(|n| {
        if n % 32 == 0 {
            return Some(n);
        }
        let near = (n / 32 * 32).max(32);
        let d = Diagnostic::error(
            c.span,
            format!("the columns of a block must be a multiple of 32, not {n}"),
            format!("this is {n}"),
        );
        sink.fail(d.hint(format!("a tensor-core product takes 32 columns: use {near} or {}", near + 32)))
    });
    let (rows, cols) = (rows?, cols?);
    if rows * cols > MAX_BLOCK {
        let d = Diagnostic::error(r.span.to(c.span), format!("a block of {} weights is too large", rows * cols), "");
        return sink.fail(d.hint(format!("a block has at most {MAX_BLOCK} weights")));
    }
    Some(Shape { rows: rows as u32, cols: cols as u32 })
}

/// A block's stream is cut into four lanes of whole words and whole periods of the step pattern.
fn fits(steps: &[u32], v: u32, block: Shape, step_at: Span, block_at: Span, sink: &mut Sink) -> bool {
    let ok = |steps: &[u32], t: u32| {
        let lane = t / v / LANES_PER_BLOCK;
        let n = steps.len() as u32;
        lane.is_multiple_of(n) && (lane / n * steps.iter().sum::<u32>()).is_multiple_of(32)
    };
    let t = block.rows * block.cols;
    if ok(steps, t) {
        return true;
    }
    let lane = t / v / LANES_PER_BLOCK;
    let mut cures = Vec::new();
    let larger = (2..=32)
        .map(|m| Shape { rows: block.rows * m, cols: block.cols })
        .find(|s| i128::from(s.len()) <= MAX_BLOCK && ok(steps, s.rows * s.cols));
    if let Some(s) = larger {
        cures.push(format!("`block {} x {}`", s.rows, s.cols));
    }
    if let [k] = steps {
        let below = (1..*k).rev().find(|k| ok(&[*k], t));
        let above = (k + 1..=MAX_WINDOW as u32).find(|k| ok(&[*k], t));
        cures.extend([below, above].into_iter().flatten().map(|k| format!("`step {k}`")));
    }
    let cure = if cures.is_empty() {
        "use another step or block".to_string()
    } else {
        format!("{} would fit", cures.join(" or "))
    };
    let shape = format!("this has {t} weights, {lane} steps a lane");
    let d = if !lane.is_multiple_of(steps.len() as u32) {
        Diagnostic::error(
            step_at,
            format!("a pattern of {} steps does not divide the {lane} steps of a lane", steps.len()),
            "",
        )
        .label(block_at, shape)
        .hint(format!("each of the four lanes that share a block begins the pattern anew: {cure}"))
    } else {
        let bits = lane / steps.len() as u32 * steps.iter().sum::<u32>();
        Diagnostic::error(step_at, format!("a lane would hold {bits} bits, which are no whole words of 32"), "")
            .label(block_at, shape)
            .hint(format!("four lanes share a block's {} bits: {cure}", bits * LANES_PER_BLOCK))
    };
    sink.push(d);
    false
}

fn values(ty: &Ident, offset: Option<&Expr>, scope: &Scope, sink: &mut Sink) -> Option<(Value, bool)> {
    let value = choice(ty, "entry type", &[("i8", Value::I8), ("i16", Value::I16)], sink);
    let half = match offset {
        None => Some(false),
        Some(e) => number(e, scope, sink).and_then(|n| match n.parts() {
            (0, 1) => Some(false),
            (1, 2) => Some(true),
            _ => {
                let d = Diagnostic::error(e.span, format!("the offset of the entries must be 0 or 1/2, not {n}"), "");
                let whole = n.integer().map_or(String::new(), |i| {
                    let (sign, i) = if i < 0 { ('-', -i) } else { ('+', i) };
                    format!(", and add others where entries are made: `[w {sign} {i}]`")
                });
                sink.fail(d.hint(format!("write `+ 1/2` or leave it out{whole}")))
            }
        }),
    };
    Some((value?, half?))
}

fn unit(e: &Expr, scope: &Scope, sink: &mut Sink) -> Option<f32> {
    let n = number(e, scope, sink)?;
    let f = n.to_f32();
    // Far beyond any use, and far from the limits of single precision.
    if n.parts().0 > 0 && (1e-9..=1e9).contains(&f) {
        return Some(f);
    }
    let d = Diagnostic::error(
        e.span,
        format!("the unit must be positive and of ordinary size, not {n}"),
        format!("this is {n}"),
    );
    sink.fail(d.hint("it is the spacing of the entries for weights of variance 1, such as 1/32"))
}

fn table(
    t: &ast::Table,
    vector: Option<u32>,
    value: Option<Value>,
    scope: &Scope,
    cx: &Context<'_>,
    sink: &mut Sink,
) -> Option<Table> {
    let entries = table_entries(t, scope, sink);
    let (values, source) = match &t.source {
        ast::TableSource::Inline(e) => {
            let values = inline(t, e, entries, vector, value.map(Value::range), scope, sink)?;
            (values.into_iter().map(|v| v as i16).collect(), TableSource::Inline)
        }
        ast::TableSource::OfMatrix(of) => {
            let d = Diagnostic::error(of.0.name.span, "a matrix's own tables are for weights", "");
            return sink.fail(d.hint("look it up by a field in a `weight` block"));
        }
        ast::TableSource::File(path) => {
            let file = table_path(path, cx, sink)?;
            let values = read(&file, path, entries?, vector?, value?, None, cx, sink)?;
            (values, TableSource::File(file))
        }
        ast::TableSource::Trained { args: given, args_span, path } => {
            let file = table_path(path, cx, sink);
            let wanted = [("seed", 0..=i64::MAX.into()), ("rounds", 1..=10_000), ("samples", 1..=1i128 << 40)];
            let training = args(given, *args_span, wanted, scope, sink);
            let (file, [seed, rounds, samples]) = (file?, training?);
            let training = Training { seed: seed as u64, rounds: rounds as u32, samples: samples as u64 };
            let values = read(&file, path, entries?, vector?, value?, Some((&training, *args_span)), cx, sink)?;
            (values, TableSource::Trained { file, training })
        }
    };
    Some(Table { name: t.name.name.clone(), entries: entries?, values, source })
}

/// The number of a table's entries.
pub fn table_entries(t: &ast::Table, scope: &Scope, sink: &mut Sink) -> Option<u32> {
    integer(&t.entries, "the number of entries", 1..=MAX_ENTRIES, scope, sink).and_then(|n| {
        if n & (n - 1) == 0 {
            return Some(n as u32);
        }
        let up = (n as u32).next_power_of_two();
        let d = Diagnostic::error(
            t.entries.span,
            format!("the number of entries must be a power of two, not {n}"),
            format!("this is {n}"),
        );
        sink.fail(d.hint(format!("use {} or {up}", up / 2)))
    })
}

pub fn table_path(path: &Ident, cx: &Context<'_>, sink: &mut Sink) -> Option<std::path::PathBuf> {
    let text = path.name.replace("{name}", &cx.name.name);
    if text.is_empty() || text.contains(['{', '}']) {
        let d = Diagnostic::error(path.span, "this is not the path of a file", "");
        return sink.fail(d.hint("of names in braces only `{name}` is known: the quantizer's name"));
    }
    Some(cx.folder.join(text))
}

/// The values of a table's file. That of a trained table, whose training the spec gives at a place, need not be there yet.
#[expect(clippy::too_many_arguments, reason = "each is a different thing that the file must agree with")]
fn read(
    file: &Path,
    path: &Ident,
    entries: u32,
    vector: u32,
    value: Value,
    trained: Option<(&Training, Span)>,
    cx: &Context<'_>,
    sink: &mut Sink,
) -> Option<Vec<i16>> {
    let shown = file.display();
    sink.count_values(entries as usize * vector as usize, path.span)?;
    let text = match cx.files.read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound && trained.is_some() => return Some(Vec::new()),
        Err(e) => {
            return sink.fail(Diagnostic::error(path.span, format!("cannot read the table file {shown}: {e}"), ""));
        }
    };
    if let Some((training, at)) = trained
        && let Some(other) = table_file::other_training(&text, training)
    {
        let message = format!("the table in {shown} is of another training: its file says `{other}`");
        let d = Diagnostic::warning(at, message, "the table was not trained so");
        sink.push(d.hint("train it anew by `qp train-codebook`, or write here what the file says"));
    }
    match table_file::read(&text, entries, vector, value) {
        Ok(values) => Some(values),
        Err(e) => {
            let d = Diagnostic::error(path.span, format!("the table file {shown} does not fit: {e}"), "");
            let cure = if trained.is_none() { "correct the file" } else { "remove the file and train it again" };
            sink.fail(d.hint(format!("{cure}: it has one entry a line, of `vector` integers of the entry type")))
        }
    }
}

/// Entries written in the spec: a flat list of entries × V integers, or of entries that are lists of V.
pub fn inline(
    t: &ast::Table,
    e: &Expr,
    entries: Option<u32>,
    vector: Option<u32>,
    range: Option<(i32, i32)>,
    scope: &Scope,
    sink: &mut Sink,
) -> Option<Vec<i32>> {
    let ExprKind::List(list) = &e.kind else {
        let d = Diagnostic::error(e.span, "the values of a table are a list", "");
        return sink.fail(d.hint("write them in brackets: `[-40, -12, 12, 40]`"));
    };
    let (min, max) = range?;
    let v = vector? as usize;
    let name = &t.name.name;
    let mut flat: Vec<&Expr> = Vec::new();
    let nested = matches!(list.first(), Some(Expr { kind: ExprKind::List(_), .. }));
    for entry in list {
        match &entry.kind {
            ExprKind::List(parts) if nested => {
                if parts.len() != v {
                    let d = Diagnostic::error(
                        entry.span,
                        format!("an entry of `{name}` has {v} integers, not {}", parts.len()),
                        "",
                    );
                    return sink.fail(d.hint("their number is the code's `vector`"));
                }
                flat.extend(parts);
            }
            _ if !nested => flat.push(entry),
            _ => {
                return sink.fail(Diagnostic::error(entry.span, "expected an entry in brackets, like the first", ""));
            }
        }
    }
    let mut out = Vec::with_capacity(flat.len());
    let mut ok = true;
    for e in &flat {
        match integer(e, "an entry", min.into()..=max.into(), scope, sink) {
            Some(i) => out.push(i as i32),
            None => ok = false,
        }
    }
    let entries = entries?;
    let wanted = entries as usize * v;
    sink.count_values(wanted, e.span)?;
    if flat.len() != wanted {
        let shape = if v == 1 { String::new() } else { format!(" ({entries} entries of {v})") };
        let found = flat.len();
        let message = format!("`{name}` needs {wanted} integers{shape}, not {found}");
        return sink.fail(Diagnostic::error(e.span, message, format!("{found} here")));
    }
    ok.then_some(out)
}

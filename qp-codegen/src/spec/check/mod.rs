//! Tree → checked quantizers: names across files, instances of families, mixes.
//!
//! 1. [`consts`]: constant expressions.
//! 2. [`decode`]: the decode block.
//! 3. [`code`]: a body's properties, and what must fit what.
//! 4. [`enumerate`]: what looking at all windows shows.
//! 5. [`format`]: quantizers that say their weight.
//! 6. [`layout`]: the layouts of their bits.
//! 7. [`sides`]: what else a format says.
//! 8. [`fusion`]: fusion patterns.

mod code;
mod consts;
mod decode;
mod enumerate;
mod format;
mod formula;
mod fusion;
mod layout;
mod sides;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use code::{CheckedBody, CheckedCode, Context};
use consts::Scope;

use super::expr::Decode;
use super::format::WideTable;
use super::{Code, Fact, Format, Fusion, Quantizer};
use crate::kernels::decode::Unit;
use crate::palette::Embedded;
use crate::syntax::ast::{self, Definition, Expr, Ident, Item};
use crate::syntax::diag::{Diagnostic, Severity, Span};

/// Where files are read: a disk, or what is embedded in the program.
pub trait Files {
    /// The text of a file.
    fn read(&self, path: &Path) -> io::Result<String>;
}

/// A parsed file.
pub struct Parsed {
    /// Its path.
    pub path: PathBuf,
    /// Its tree.
    pub tree: ast::File,
    /// Files it uses.
    pub uses: Vec<usize>,
    /// True if it is embedded in the program.
    pub embedded: bool,
}

/// Most diagnostics that are collected.
const MOST_FOUND: usize = 1000;
/// Most integers in the tables of a file's quantizers, all together.
const MOST_VALUES: usize = 1 << 24;
/// Most operations of looking at the windows of a file's quantizers, for warnings: part of a second.
const MOST_LOOKED: u64 = 1 << 27;
/// Most codes of a quantizer.
const MOST_CODES: usize = 16;
/// Most operations in the program that decodes a unit of each code of a quantizer: more would take a compiler minutes.
const MOST_OPERATIONS: u64 = 1 << 15;

/// Collects diagnostics, each once, with the instance in which they were found.
#[derive(Default)]
pub struct Sink {
    /// In order of discovery.
    pub list: Vec<Diagnostic>,
    seen: BTreeSet<(Span, String)>,
    /// What is learnt of names, if anyone asks.
    pub facts: Option<Vec<Fact>>,
    /// Name of the quantizer that is being checked.
    of: String,
    /// Integers in tables so far.
    values: usize,
    /// Codes of formats all of whose entries were found good, by all that decides them.
    sound: Vec<(Decode, Vec<WideTable>, [u32; 3])>,
    /// Operations of looking at windows so far.
    looked: u64,
    context: Option<(Span, String)>,
}

impl Sink {
    /// Adds a diagnostic.
    pub fn push(&mut self, mut d: Diagnostic) {
        if self.list.len() == MOST_FOUND {
            return;
        }
        let at = d.labels.first().map(|l| l.0).unwrap_or_default();
        if !self.seen.insert((at, d.message.clone())) {
            return;
        }
        if let (Some((span, text)), Severity::Error) = (&self.context, d.severity)
            && *span != at
        {
            d.labels.push((*span, text.clone()));
        }
        self.list.push(d);
    }

    /// Notes what is known of the name at `at`, if anyone asks.
    pub fn fact(&mut self, at: Span, text: impl FnOnce() -> String) {
        if let Some(facts) = &mut self.facts {
            facts.push(Fact { at, text: text(), of: self.of.clone() });
        }
    }

    /// Counts `operations` of looking at windows for warnings; false if that would take too long.
    pub fn may_look(&mut self, operations: u64) -> bool {
        let looked = self.looked.saturating_add(operations);
        let may = looked <= MOST_LOOKED;
        if may {
            self.looked = looked;
        }
        may
    }

    /// Counts `values` integers of a table at `at`.
    pub fn count_values(&mut self, values: usize, at: Span) -> Option<()> {
        self.values = self.values.saturating_add(values);
        if self.values <= MOST_VALUES {
            return Some(());
        }
        let d = Diagnostic::error(at, "the tables of this file's quantizers are too large", "");
        self.fail(d.hint(format!("together they have {MOST_VALUES} integers at most: use several files")))
    }

    /// Adds a diagnostic; nothing.
    pub fn fail<T>(&mut self, d: Diagnostic) -> Option<T> {
        self.push(d);
        None
    }
}

/// A checked `quantizer` item.
#[derive(Clone)]
enum Checked {
    Quantizer(Quantizer),
    Format(Box<Format>),
}

enum State {
    Todo,
    Doing,
    Done(Option<Checked>),
}

/// What a file defines.
#[derive(Default)]
pub struct Found {
    /// Quantizers.
    pub quantizers: Vec<Quantizer>,
    /// Formats.
    pub formats: Vec<Format>,
    /// Fusion patterns.
    pub fusions: Vec<Fusion>,
}

/// Checks the quantizers, formats and fusion patterns of file `root`.
pub fn library(parsed: &[Parsed], root: usize, files: &dyn Files, sink: &mut Sink) -> Found {
    let states = parsed.iter().map(|p| p.tree.items.iter().map(|_| State::Todo).collect()).collect();
    let mut checker = Checker { parsed, files, sink, states };
    checker.duplicates(root);
    checker.memberless(root);
    checker.strays(root);
    let mut found = Found::default();
    for (i, item) in parsed[root].tree.items.iter().enumerate() {
        match item {
            Item::Use(_) | Item::Family(_) | Item::Function(_) | Item::Layout(_) => (),
            Item::Quantizer(_) => match checker.quantizer(root, i) {
                Some(Checked::Quantizer(q)) => found.quantizers.push(q),
                Some(Checked::Format(f)) => found.formats.push(*f),
                None => (),
            },
            Item::Fusion(f) => found.fusions.extend(fusion::check(f, checker.sink)),
        }
    }
    found
}

struct Checker<'a> {
    parsed: &'a [Parsed],
    files: &'a dyn Files,
    sink: &'a mut Sink,
    /// For each item of each file.
    states: Vec<Vec<State>>,
}

impl<'a> Checker<'a> {
    /// File `file`, then the files it uses.
    fn visible(&self, file: usize) -> Vec<usize> {
        std::iter::once(file).chain(self.parsed[file].uses.iter().copied()).collect()
    }

    /// A name that `file` may name can be unknown because its definition has errors.
    fn incomplete(&self, file: usize) -> bool {
        self.visible(file).into_iter().any(|f| self.parsed[f].tree.incomplete)
    }

    fn families(&self, file: usize) -> Vec<(usize, &'a ast::Family)> {
        let parsed = self.parsed;
        let of = |f: usize| {
            parsed[f].tree.items.iter().filter_map(move |i| match i {
                Item::Family(family) => Some((f, family)),
                Item::Use(_) | Item::Quantizer(_) | Item::Fusion(_) | Item::Function(_) | Item::Layout(_) => None,
            })
        };
        self.visible(file).into_iter().flat_map(of).collect()
    }

    fn functions(&self, file: usize) -> Vec<&'a ast::Function> {
        let parsed = self.parsed;
        let of = |f: usize| {
            parsed[f].tree.items.iter().filter_map(|i| match i {
                Item::Function(function) => Some(function),
                Item::Use(_) | Item::Family(_) | Item::Quantizer(_) | Item::Fusion(_) | Item::Layout(_) => None,
            })
        };
        self.visible(file).into_iter().flat_map(of).collect()
    }

    /// The layouts that `file` may name.
    fn layouts(&self, file: usize) -> Vec<&'a ast::Layout> {
        let parsed = self.parsed;
        let of = |f: usize| {
            parsed[f].tree.items.iter().filter_map(|i| match i {
                Item::Layout(layout) => Some(layout),
                Item::Use(_) | Item::Family(_) | Item::Quantizer(_) | Item::Fusion(_) | Item::Function(_) => None,
            })
        };
        self.visible(file).into_iter().flat_map(of).collect()
    }

    /// Layouts of nothing.
    fn strays(&mut self, root: usize) {
        if self.incomplete(root) {
            return;
        }
        let names: Vec<&str> = self.families(root).into_iter().map(|(_, f)| f.name.name.as_str()).collect();
        let names: Vec<&str> =
            names.into_iter().chain(self.quantizers(root).into_iter().map(|q| q.2.name.as_str())).collect();
        for item in &self.parsed[root].tree.items {
            if let Item::Layout(l) = item
                && !names.contains(&l.of.name.as_str())
            {
                let d = consts::unknown(&l.of.name, l.of.span, "quantizer or family", names.iter().copied());
                self.sink.push(d);
            }
        }
    }

    /// File, item and name of each quantizer that `file` may name.
    fn quantizers(&self, file: usize) -> Vec<(usize, usize, &'a Ident)> {
        let parsed = self.parsed;
        let of = |f: usize| {
            parsed[f].tree.items.iter().enumerate().filter_map(move |(i, item)| match item {
                Item::Quantizer(q) => Some((f, i, &q.name)),
                Item::Use(_) | Item::Family(_) | Item::Fusion(_) | Item::Function(_) | Item::Layout(_) => None,
            })
        };
        self.visible(file).into_iter().flat_map(of).collect()
    }

    fn duplicates(&mut self, root: usize) {
        let families = self.families(root).into_iter().map(|(_, f)| &f.name).collect();
        let quantizers = self.quantizers(root).into_iter().map(|q| q.2).collect();
        let fusions = self.parsed[root].tree.items.iter().filter_map(|i| match i {
            Item::Fusion(f) => Some(&f.name),
            Item::Use(_) | Item::Family(_) | Item::Quantizer(_) | Item::Function(_) | Item::Layout(_) => None,
        });
        let functions = self.functions(root).into_iter().map(|f| &f.name).collect();
        let kinds: [(&str, Vec<&Ident>); 4] = [
            ("family", families),
            ("quantizer", quantizers),
            ("fusion pattern", fusions.collect()),
            ("function", functions),
        ];
        for (what, names) in kinds {
            for (i, name) in names.iter().enumerate() {
                if let Some(first) = names[..i].iter().find(|n| n.name == name.name) {
                    // Names of used files come last; the clash is this file's.
                    let (at, other) = if name.span.file == first.span.file { (name, first) } else { (first, name) };
                    let d = Diagnostic::error(at.span, format!("the {what} `{}` is defined twice", name.name), "here");
                    self.sink.push(d.label(other.span, "and here").hint("choose another name"));
                }
                if matches!(what, "family" | "quantizer") && name.name == "mix" {
                    self.sink.push(Diagnostic::error(name.span, format!("no {what} can be called `mix`"), ""));
                }
            }
        }
    }

    /// Families are checked with their members' parameters: without members only their syntax is.
    fn memberless(&mut self, root: usize) {
        for item in &self.parsed[root].tree.items {
            let Item::Family(f) = item else { continue };
            let has_member = self.parsed[root].tree.items.iter().any(|i| match i {
                Item::Quantizer(ast::Quantizer { def: Definition::Member { family, .. }, .. }) => {
                    family.name == f.name.name
                }
                Item::Use(_)
                | Item::Family(_)
                | Item::Quantizer(_)
                | Item::Fusion(_)
                | Item::Function(_)
                | Item::Layout(_) => false,
            });
            if !has_member {
                let name = &f.name.name;
                let d = Diagnostic::warning(
                    f.name.span,
                    format!("the family `{name}` has no member, so only its syntax was checked"),
                    "",
                );
                let args: Vec<&str> = f.params.iter().map(|p| p.name.as_str()).collect();
                self.sink.push(d.hint(format!("add one: `quantizer {name}_1 = {name}({})`", args.join(", "))));
            }
        }
    }

    fn quantizer(&mut self, file: usize, item: usize) -> Option<Checked> {
        let Item::Quantizer(q) = &self.parsed[file].tree.items[item] else { return None };
        if let State::Done(done) = &self.states[file][item] {
            return done.clone();
        }
        self.states[file][item] = State::Doing;
        let outer = self.sink.context.take();
        let outer_name = std::mem::replace(&mut self.sink.of, q.name.name.clone());
        let done = match &q.def {
            Definition::Body(body) => {
                let owner = (&q.name, file);
                self.checked(&q.name, owner, body, Scope::default())
            }
            Definition::Member { family, args } => self.member(file, q, family, args),
            Definition::Mix(names) => self.mix(file, q, names).map(Checked::Quantizer),
        };
        self.sink.context = outer;
        self.sink.of = outer_name;
        self.states[file][item] = State::Done(done.clone());
        done
    }

    /// The quantizer or format called `name` whose body `owner`, of a file, has.
    fn checked(&mut self, name: &Ident, owner: (&Ident, usize), body: &ast::Body, scope: Scope) -> Option<Checked> {
        let folder = self.parsed[owner.1].path.parent().unwrap_or(Path::new(""));
        let functions = self.functions(owner.1);
        let files: &dyn Files = if self.parsed[owner.1].embedded { &Embedded } else { self.files };
        let cx = Context { name, owner: owner.0, folder, files, functions };
        let layouts: Vec<_> = self.layouts(owner.1).into_iter().filter(|l| l.of.name == owner.0.name).collect();
        if !format::is_format(body) {
            if let Some(l) = layouts.first() {
                let message = format!("`{}` is no format", owner.0.name);
                let d = Diagnostic::error(l.of.span, message, "");
                self.sink.push(d.hint("a layout is of a quantizer that says its `weight`"));
            }
            let body = code::body(body, scope, &cx, self.sink)?;
            return self.assemble(name, body).map(Checked::Quantizer);
        }
        // The constants once more, for the layouts; what is wrong with them is told with the body.
        let mut constants = scope.clone();
        code::define(body, &mut constants, &mut Sink::default());
        let mut format = format::body(body, scope, &cx, self.sink)?;
        let mut ok = true;
        for l in layouts {
            match layout::check(l, &format, &constants, self.sink) {
                Some(l) => format.layouts.push(l),
                None => ok = false,
            }
        }
        ok.then(|| Checked::Format(Box::new(format)))
    }

    fn member(&mut self, file: usize, q: &ast::Quantizer, name: &Ident, args: &[Expr]) -> Option<Checked> {
        let families = self.families(file);
        let Some((family_file, family)) = families.iter().copied().find(|f| f.1.name.name == name.name) else {
            if self.incomplete(file) {
                return None;
            }
            let names = families.iter().map(|f| f.1.name.name.as_str()).chain(["mix"]);
            return self.sink.fail(consts::unknown(&name.name, name.span, "family", names));
        };
        // Arguments are constants, with nothing in scope.
        let values: Vec<_> = args.iter().map(|a| consts::eval(a, &Scope::default(), self.sink)).collect();
        if args.len() != family.params.len() {
            let params: Vec<&str> = family.params.iter().map(|p| p.name.as_str()).collect();
            let count = |n: usize| if n == 1 { "1 argument".to_string() } else { format!("{n} arguments") };
            let d = Diagnostic::error(
                q.span,
                format!("`{}` takes {}, not {}", name.name, count(params.len()), args.len()),
                "",
            );
            return self.sink.fail(d.hint(format!("its parameters are ({})", params.join(", "))));
        }
        let mut scope = Scope::default();
        let mut shown = Vec::new();
        for (p, v) in family.params.iter().zip(values) {
            let v = v?;
            shown.push(format!("{} = {}", p.name, v.text()));
            scope.define(&p.name, p.span, Some(v), "parameter", self.sink);
        }
        let with = if shown.is_empty() { String::new() } else { format!(", where {}", shown.join(", ")) };
        self.sink.context = Some((q.name.span, format!("in `{}`{with}", q.name.name)));
        self.checked(&q.name, (&family.name, family_file), &family.body, scope)
    }

    fn mix(&mut self, file: usize, q: &ast::Quantizer, names: &[Ident]) -> Option<Quantizer> {
        let known = self.quantizers(file);
        let mut parts: Vec<(Quantizer, Span)> = Vec::new();
        let mut ok = true;
        for name in names {
            let Some(&(f, i, _)) = known.iter().find(|k| k.2.name == name.name) else {
                ok = false;
                if self.incomplete(file) {
                    continue;
                }
                let d = consts::unknown(&name.name, name.span, "quantizer", known.iter().map(|k| k.2.name.as_str()));
                self.sink.push(d);
                continue;
            };
            if matches!(self.states[f][i], State::Doing) {
                let d = Diagnostic::error(name.span, format!("`{}` is defined by itself", name.name), "");
                self.sink.push(d.hint("a mix names quantizers that stand on their own"));
                ok = false;
                continue;
            }
            match self.quantizer(f, i) {
                Some(Checked::Format(_)) => {
                    let d = Diagnostic::error(name.span, format!("`{}` is a format", name.name), "");
                    self.sink.push(d.hint("a mix takes quantizers with a scale for each row or matrix"));
                    ok = false;
                }
                Some(Checked::Quantizer(part)) if part.codes.len() > 1 => {
                    let d = Diagnostic::error(name.span, format!("`{}` is itself a mix", name.name), "");
                    self.sink.push(d.hint("name the quantizers of that mix instead"));
                    ok = false;
                }
                Some(Checked::Quantizer(part)) => parts.push((part, name.span)),
                None => ok = false,
            }
        }
        if names.len() < 2 {
            let d = Diagnostic::error(q.span, "a mix needs at least two quantizers", "");
            return self.sink.fail(d.hint("column blocks take them in turn, as in `mix(tcq_2, tcq_2.5)`"));
        }
        let (first, at) = parts.first()?.clone();
        for (part, span) in &parts[1..] {
            let difference = if part.scale != first.scale {
                Some("scales")
            } else if part.rotation != first.rotation {
                Some("rotations")
            } else {
                None
            };
            if let Some(what) = difference {
                let d = Diagnostic::error(
                    *span,
                    format!("the quantizers of a mix must have equal {what}"),
                    "this one's differs",
                );
                self.sink.push(d.label(at, "from that of this one"));
                ok = false;
            }
        }
        let codes = parts.iter().map(|(p, span)| CheckedCode { code: p.codes[0].clone(), span: *span }).collect();
        let body = CheckedBody { codes, scale: first.scale, rotation: first.rotation };
        let assembled = self.assemble(&q.name, body);
        if ok { assembled } else { None }
    }

    /// A quantizer of codes that agree in what kernels need common.
    fn assemble(&mut self, name: &Ident, body: CheckedBody) -> Option<Quantizer> {
        let first = &body.codes[0];
        let mut ok = true;
        for c in &body.codes[1..] {
            let (a, b) = (&first.code, &c.code);
            let equal = [
                ("block", a.block == b.block),
                ("entry type", a.value == b.value),
                ("offset", a.half_offset == b.half_offset),
                ("unit", a.unit == b.unit),
            ];
            for (what, _) in equal.iter().filter(|e| !e.1) {
                let d =
                    Diagnostic::error(c.span, format!("the codes of a mix must have one {what}"), "this one's differs");
                self.sink.push(d.label(first.span, "from that of this one").hint(format!("give both the same {what}")));
                ok = false;
            }
        }
        if body.codes.len() > MOST_CODES {
            let d = Diagnostic::error(name.span, format!("a quantizer of {} codes", body.codes.len()), "");
            return self.sink.fail(d.hint(format!("column blocks take turns among {MOST_CODES} codes at most")));
        }
        let operations: u64 = body.codes.iter().map(|c| unit_operations(&c.code)).sum();
        if operations > MOST_OPERATIONS {
            let d = Diagnostic::error(
                name.span,
                format!("decoding is a program of {operations} operations, more than {MOST_OPERATIONS}"),
                "",
            );
            let cure = "use shorter decode blocks, shorter patterns of steps, or fewer codes: a program has the operations \
                        of the decode block for each step until pattern and registers begin anew, of each code";
            return self.sink.fail(d.hint(cure));
        }
        let codes = body.codes.into_iter().map(|c| c.code).collect();
        ok.then(|| Quantizer { name: name.name.clone(), codes, scale: body.scale, rotation: body.rotation })
    }
}

/// Operations of the program that decodes a unit of a code.
fn unit_operations(code: &Code) -> u64 {
    let weights = u64::from(Unit::of(code).operands) * 16;
    weights / u64::from(code.vector) * code.decode.nodes.len() as u64
}

//! The plan: which quantizer each layer gets, and which layers share one launch.
//!
//! A plan is one spec for all ([`Plan::uniform`]) or a TOML file ([`Plan::read`], described in `docs/checkpoint.md`).
//! It speaks of layers by pattern; [`Plan::resolve`] applies it to the layers that a model has. All problems of a
//! stage are collected and reported together, each with its place in the file and the cure.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_codegen::spec::{Definition, Quantizer, Rotation, Shape, file_of_palette, resolve_any, resolve_in, untrained};
use qp_codegen::syntax::diag::nearest;
use qp_codegen::syntax::{Diagnostic, Diagnostics, FileId, Sources, Span, diag};
use qp_codegen::text_file;
use regex::{Regex, RegexBuilder};
use toml::de::{DeTable, DeValue};

use crate::codec::FormatEncoder;
use crate::model::weights::EMBEDDING;

/// The word that leaves a layer as it is.
pub const KEEP: &str = "keep";

/// A linear layer or the embedding of a model, as a plan sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Name without `.weight`, e.g. `model.layers.0.mlp.down_proj`.
    pub name: String,
    /// Rows × columns = out × in features.
    pub shape: Shape,
    /// Whether `default` covers it. False for the output layer and the embedding, which are quantized only if a rule
    /// names them.
    pub by_default: bool,
    /// Which of the model's inputs of products it reads, if any: layers of one number may share a launch.
    pub input: Option<usize>,
}

/// A plan as written, not yet applied to a model.
#[derive(Clone, Debug)]
pub struct Plan {
    sources: Sources,
    folder: PathBuf,
    default: Option<Text>,
    rules: Vec<(Text, Text)>,
    groups: Vec<Vec<Text>>,
}

/// What a layer's weights become.
#[derive(Clone, Debug, PartialEq)]
pub enum Spec {
    /// Blocks of a trained quantizer.
    Quantizer(Arc<Quantizer>),
    /// Codes and fields of a format that can be made.
    Format(Arc<FormatEncoder>),
}

impl Spec {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Spec::Quantizer(q) => &q.name,
            Spec::Format(f) => &f.format().name,
        }
    }

    /// Its identity.
    pub fn hash(&self) -> String {
        match self {
            Spec::Quantizer(q) => q.hash(),
            Spec::Format(f) => f.format().hash(),
        }
    }

    /// Its self-contained text.
    pub fn canonical(&self) -> String {
        match self {
            Spec::Quantizer(q) => q.canonical(),
            Spec::Format(f) => f.format().canonical(),
        }
    }

    /// How weights and inputs are rotated.
    pub fn rotation(&self) -> Rotation {
        match self {
            Spec::Quantizer(q) => q.rotation,
            Spec::Format(_) => Rotation::None,
        }
    }
}

/// A plan applied to a model's layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The quantizers and formats in use, by name.
    pub specs: Vec<Spec>,
    /// For each layer, in the order given, the index of its quantizer in `specs`; `None` leaves it as it is.
    pub layers: Vec<Option<usize>>,
    /// Fusion groups: indices of layers, ascending.
    pub groups: Vec<Vec<usize>>,
}

/// A piece of the plan's text.
#[derive(Clone, Debug)]
struct Text {
    text: String,
    span: Span,
}

impl Plan {
    /// The plan that gives every linear layer of the blocks the quantizer `spec` (a palette name or a path).
    pub fn uniform(spec: &str) -> Plan {
        let mut sources = Sources::default();
        let span = place(sources.add("--spec", spec), 0..spec.len());
        Plan {
            sources,
            folder: PathBuf::new(),
            default: Some(Text { text: spec.to_owned(), span }),
            rules: Vec::new(),
            groups: Vec::new(),
        }
    }

    /// Adds a rule that wins over all others: the layer `name` gets `spec`, a palette name or a path relative to the
    /// working directory. `option` is what the user gave it by, for messages.
    pub fn set(&mut self, option: &str, name: &str, spec: &str) {
        let absolute = is_path(spec).then(|| std::path::absolute(spec).ok()).flatten();
        let built_in = file_of_palette(spec).filter(|name| !Path::new(spec).exists() && resolve_any(name).is_ok());
        let text = match (built_in, absolute) {
            (Some(name), _) => name.to_owned(),
            (None, Some(path)) => path.to_string_lossy().into_owned(),
            (None, None) => spec.to_owned(),
        };
        let span = place(self.sources.add(option, spec), 0..spec.len());
        self.rules.push((Text { text: name.to_owned(), span }, Text { text, span }));
    }

    /// Reads a plan file. Paths of specs in it are relative to its folder.
    pub fn read(path: &Path) -> Result<Plan, Diagnostics> {
        let text = text_file::read(path).map_err(|e| {
            let d = Diagnostic::plain(format!("cannot read the plan {}: {e}", path.display()));
            let d = d.hint("`qp plan -o FILE` writes one; --spec NAME gives all layers one quantizer");
            Diagnostics { list: vec![d], ..Diagnostics::default() }
        })?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Plan::parse(&path.display().to_string(), &text, folder)
    }

    /// Parses a plan's text; `name` stands in messages, spec paths are relative to `folder`.
    pub fn parse(name: &str, text: &str, folder: PathBuf) -> Result<Plan, Diagnostics> {
        let mut sources = Sources::default();
        let file = sources.add(name, text);
        let mut plan = Plan { sources, folder, default: None, rules: Vec::new(), groups: Vec::new() };
        let table = match DeTable::parse(text) {
            Ok(t) => t.into_inner(),
            Err(e) => {
                let span = place(file, e.span().unwrap_or(0..0));
                return plan.done(vec![problem(span, e.message().trim(), None)]).map(|()| plan);
            }
        };
        let mut problems = Vec::new();
        for (key, value) in in_order(&table) {
            match (key.text.as_str(), value.get_ref()) {
                ("default", DeValue::String(s)) => {
                    plan.default = Some(Text { text: s.to_string(), span: here(value.span()) });
                }
                ("layers", DeValue::Table(rules)) => plan.read_rules(rules, &mut problems),
                ("groups", DeValue::Array(groups)) => {
                    for group in groups.iter() {
                        plan.read_group(group, &mut problems);
                    }
                }
                ("default", _) => problems.push(problem(
                    here(value.span()),
                    "`default` must be a string: a palette name or a path",
                    None,
                )),
                ("layers", _) => problems.push(problem(
                    here(value.span()),
                    "`layers` must be a table",
                    Some("write `[layers]` and one `\"pattern\" = \"spec\"` a line".into()),
                )),
                ("groups", _) => problems.push(problem(
                    here(value.span()),
                    "`groups` must be an array of tables",
                    Some("write `[[groups]]` and `fuse = [\"pattern\", …]`".into()),
                )),
                (other, _) => {
                    let help = near(other, ["default", "layers", "groups"])
                        .unwrap_or("known are `default`, `[layers]` and `[[groups]]`".into());
                    problems.push(problem(key.span, format!("unknown key `{other}`"), Some(help)));
                }
            }
        }
        plan.done(problems)?;
        Ok(plan)
    }

    fn read_rules(&mut self, rules: &DeTable<'_>, problems: &mut Vec<Diagnostic>) {
        for (pattern, value) in in_order(rules) {
            if let Err(message) = Pattern::parse(&pattern.text) {
                problems.push(problem(pattern.span, message, None));
            }
            match value.get_ref() {
                DeValue::String(s) => {
                    self.rules.push((pattern, Text { text: s.to_string(), span: here(value.span()) }))
                }
                DeValue::Table(_) => problems.push(problem(
                    pattern.span,
                    format!("`{}` is a table, not a spec", pattern.text),
                    Some("a layer's name has dots: put it in quotes".into()),
                )),
                _ => problems.push(problem(
                    here(value.span()),
                    format!("the spec of a layer must be a string: a palette name, a path or \"{KEEP}\""),
                    None,
                )),
            }
        }
    }

    fn read_group(&mut self, group: &toml::Spanned<DeValue<'_>>, problems: &mut Vec<Diagnostic>) {
        let Some(table) = group.get_ref().as_table() else {
            problems.push(problem(
                here(group.span()),
                "a group must be a table",
                Some("write `[[groups]]` and `fuse = [\"pattern\", …]`".into()),
            ));
            return;
        };
        let mut patterns = Vec::new();
        for (key, value) in in_order(table) {
            if key.text != "fuse" {
                problems.push(problem(
                    key.span,
                    format!("unknown key `{}` in a group", key.text),
                    Some("a group has one key, `fuse`".into()),
                ));
                continue;
            }
            let items = match value.get_ref() {
                DeValue::Array(items) => items.iter().map(|i| (here(i.span()), i.get_ref())).collect(),
                one => vec![(here(value.span()), one)],
            };
            for (span, item) in items {
                match item.as_str().map(|s| (s, Pattern::parse(s))) {
                    Some((s, Ok(_))) => patterns.push(Text { text: s.to_owned(), span }),
                    Some((_, Err(message))) => problems.push(problem(span, message, None)),
                    None => problems.push(problem(span, "a pattern must be a string", None)),
                }
            }
        }
        self.groups.push(patterns);
    }

    /// Applies the plan to `layers`: later rules win over earlier ones, every rule over `default`.
    ///
    /// # Errors
    /// Patterns and specs that match nothing, layers left without a spec, two specs of one name, groups that do not
    /// share their input: all of them at once.
    pub fn resolve(&self, layers: &[Layer]) -> Result<Resolved, Diagnostics> {
        let mut problems = Vec::new();
        let mut choice: Vec<Option<&Text>> =
            layers.iter().map(|l| self.default.as_ref().filter(|_| l.by_default)).collect();
        for (pattern, spec) in &self.rules {
            let matcher = Pattern::parse(&pattern.text).expect("checked when parsed");
            let mut any = false;
            for (layer, slot) in layers.iter().zip(&mut choice) {
                if matcher.captures(&layer.name).is_some() {
                    *slot = Some(spec);
                    any = true;
                }
            }
            if !any {
                problems.push(self.no_match(pattern, layers));
            }
        }
        let bare: Vec<&str> = layers
            .iter()
            .zip(&choice)
            .filter(|(l, c)| l.by_default && c.is_none())
            .map(|(l, _)| l.name.as_str())
            .collect();
        if let Some(first) = bare.first() {
            let message = format!("no spec for {} of {} layers, the first being `{first}`", bare.len(), layers.len());
            problems.push(problem(
                here(0..0),
                message,
                Some(format!("add `default = \"…\"`, or a rule for them (\"{KEEP}\" leaves a layer as it is)")),
            ));
        }
        let (specs, index) = self.load_specs(&choice, &mut problems);
        let chosen: Vec<Option<usize>> =
            choice.iter().map(|c| c.and_then(|t| index.get(t.text.as_str()).copied())).collect();
        let kept = |i: usize| choice[i].is_none_or(|c| c.text == KEEP);
        let groups = self.resolve_groups(layers, &kept, &chosen, &specs, &mut problems);
        self.done(problems)?;
        Ok(Resolved { specs, layers: chosen, groups })
    }

    /// Loads each spec that a layer uses, once; equal ones under two names of the plan become one.
    fn load_specs<'a>(
        &self,
        choice: &[Option<&'a Text>],
        problems: &mut Vec<Diagnostic>,
    ) -> (Vec<Spec>, BTreeMap<&'a str, usize>) {
        let mut texts: BTreeMap<&str, &Text> = BTreeMap::new();
        for text in choice.iter().flatten().filter(|t| t.text != KEEP) {
            texts.entry(&text.text).or_insert(text);
        }
        let mut loaded: BTreeMap<String, (Spec, Vec<&str>)> = BTreeMap::new();
        for (&name, text) in &texts {
            match self.load(name) {
                Ok(spec) => match loaded.get_mut(spec.name()) {
                    None => {
                        loaded.insert(spec.name().to_owned(), (spec, vec![name]));
                    }
                    Some((other, names)) if *other == spec => names.push(name),
                    Some((_, names)) => problems.push(problem(
                        text.span,
                        format!("`{name}` and `{}` are different quantizers of one name, `{}`", names[0], spec.name()),
                        Some("rename one of them in its .qspec file".into()),
                    )),
                },
                Err(e) => problems.extend(spec_problems(text, &e)),
            }
        }
        let mut index = BTreeMap::new();
        let specs = loaded
            .into_values()
            .enumerate()
            .map(|(i, (q, names))| {
                index.extend(names.into_iter().map(|n| (n, i)));
                q
            })
            .collect();
        (specs, index)
    }

    /// Paths are relative to the plan's folder; all else is a name of the palette or of a format.
    fn load(&self, name: &str) -> Result<Spec, Diagnostics> {
        let path = is_path(name).then(|| self.folder.join(name).to_string_lossy().into_owned());
        let failed = |d| Diagnostics { list: vec![d], ..Diagnostics::default() };
        match resolve_in(&self.folder, name)? {
            Definition::Quantizer(q) => match untrained(&q, path.as_deref().unwrap_or(name)) {
                Some(d) => Err(failed(d)),
                None => Ok(Spec::Quantizer(Arc::new(q))),
            },
            Definition::Format(f) => match FormatEncoder::new(&f) {
                Ok(encoder) => Ok(Spec::Format(Arc::new(encoder))),
                Err(why) => {
                    let d = Diagnostic::plain(format!("`{}` cannot be made: {why}", f.name));
                    Err(failed(d.hint("`qp-codegen explain` says which formats can")))
                }
            },
        }
    }

    fn resolve_groups(
        &self,
        layers: &[Layer],
        kept: &dyn Fn(usize) -> bool,
        chosen: &[Option<usize>],
        specs: &[Spec],
        problems: &mut Vec<Diagnostic>,
    ) -> Vec<Vec<usize>> {
        let mut out: Vec<Vec<usize>> = Vec::new();
        for patterns in &self.groups {
            // Layers for which the stars stand for the same text belong together.
            let mut found: BTreeMap<Vec<String>, Vec<usize>> = BTreeMap::new();
            for pattern in patterns {
                let matcher = Pattern::parse(&pattern.text).expect("checked when parsed");
                let mut any = false;
                for (i, layer) in layers.iter().enumerate() {
                    if let Some(captures) = matcher.captures(&layer.name) {
                        any = true;
                        let members = found.entry(captures).or_default();
                        if !members.contains(&i) {
                            members.push(i);
                        }
                    }
                }
                if !any {
                    problems.push(self.no_match(pattern, layers));
                }
            }
            let span = patterns.first().map_or(here(0..0), |p| p.span);
            for mut members in found.into_values() {
                members.sort_unstable();
                let check = match members.iter().find(|&&m| kept(m)) {
                    Some(&m) => Err(format!("`{}` is not quantized, so it cannot be fused", layers[m].name)),
                    None => check_group(&members, layers, chosen, specs, &out),
                };
                if let Err(message) = check {
                    problems.push(problem(span, message, None));
                }
                out.push(members);
            }
        }
        out.sort();
        out
    }

    fn no_match(&self, pattern: &Text, layers: &[Layer]) -> Diagnostic {
        let help = near(&pattern.text, layers.iter().map(|l| l.name.as_str())).unwrap_or_else(|| {
            let some: Vec<String> = layers.iter().take(3).map(|l| format!("`{}`", l.name)).collect();
            format!("the model's layers are {}, …", some.join(", "))
        });
        problem(pattern.span, format!("`{}` matches no layer of the model", pattern.text), Some(help))
    }

    fn done(&self, mut problems: Vec<Diagnostic>) -> Result<(), Diagnostics> {
        if problems.is_empty() {
            return Ok(());
        }
        problems.sort_by_key(|p| p.labels[0].0);
        diag::limit(&mut problems);
        Err(Diagnostics { sources: self.sources.clone(), list: problems })
    }
}

/// A fusion group's layers read the same input (columns and rotation), and are in no other group.
fn check_group(
    members: &[usize],
    layers: &[Layer],
    chosen: &[Option<usize>],
    specs: &[Spec],
    others: &[Vec<usize>],
) -> Result<(), String> {
    let first = members[0];
    for &m in members {
        let name = &layers[m].name;
        if name == EMBEDDING {
            return Err(format!("`{name}` is looked up and not multiplied, so it cannot be fused"));
        }
        if others.iter().any(|g| g.contains(&m)) {
            return Err(format!("`{name}` is in two groups"));
        }
        if layers[m].shape.cols != layers[first].shape.cols {
            let (a, b) = (layers[first].shape.cols, layers[m].shape.cols);
            return Err(format!(
                "`{}` has {a} columns and `{name}` {b}: layers of a group read the same input",
                layers[first].name
            ));
        }
        if layers[m].input != layers[first].input {
            return Err(format!(
                "`{}` and `{name}` do not read the same input, so they cannot be fused",
                layers[first].name
            ));
        }
        if let Some(Spec::Format(f)) = chosen[m].map(|s| &specs[s]) {
            return Err(format!("`{name}` has the format `{}`, which has launches of its own", f.format().name));
        }
        match (chosen[m].map(|s| specs[s].rotation()), chosen[first].map(|s| specs[s].rotation())) {
            (Some(a), Some(b)) if a != b => {
                return Err(format!(
                    "`{}` and `{name}` are rotated differently: layers of a group read the same input",
                    layers[first].name
                ));
            }
            // A spec that could not be loaded has its own message.
            (Some(_) | None, Some(_) | None) => (),
        }
    }
    Ok(())
}

/// What is wrong with a spec, at the place where the plan names it.
fn spec_problems(name: &Text, errors: &Diagnostics) -> Vec<Diagnostic> {
    let (plain, inside): (Vec<_>, Vec<_>) = errors.list.iter().cloned().partition(|d| d.labels.is_empty());
    let mut out: Vec<Diagnostic> = plain.into_iter().map(|d| problem(name.span, d.message, d.hint)).collect();
    if !inside.is_empty() {
        let lines = Diagnostics { sources: errors.sources.clone(), list: inside }.to_string();
        out.push(problem(name.span, format!("the spec `{}` has errors", name.text), Some(lines)));
    }
    out
}

fn problem(span: Span, message: impl Into<String>, help: Option<String>) -> Diagnostic {
    let d = Diagnostic::error(span, message, "here");
    match help {
        Some(help) => d.hint(help),
        None => d,
    }
}

fn place(file: FileId, range: Range<usize>) -> Span {
    Span { file, start: range.start as u32, end: range.end as u32 }
}

/// A plan is one text.
fn here(range: Range<usize>) -> Span {
    place(FileId(0), range)
}

/// Keys and values in the order of the text.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<(Text, &'a toml::Spanned<DeValue<'i>>)> {
    let mut all: Vec<_> =
        table.iter().map(|(k, v)| (Text { text: k.get_ref().to_string(), span: here(k.span()) }, v)).collect();
    all.sort_by_key(|(k, _)| k.span);
    all
}

/// "did you mean …", if a name is near.
fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(name, known).map(|n| format!("did you mean `{n}`?"))
}

/// A pattern of layer names: `*` stands for any text without a dot, `{a,b}` for `a` or `b`. Matching takes time in
/// proportion to the name, whatever the pattern.
#[derive(Clone, Debug)]
struct Pattern(Regex);

/// Most bytes of a pattern; names of layers have a few dozen.
const MOST_PATTERN: usize = 1000;
/// Most bytes of a pattern made ready to match.
const MOST_COMPILED: usize = 4 << 20;

impl Pattern {
    fn parse(text: &str) -> Result<Pattern, String> {
        if text.len() > MOST_PATTERN {
            return Err(format!("a pattern of {} bytes is too long: it has {MOST_PATTERN} at most", text.len()));
        }
        let mut pattern = String::from("^");
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            match c {
                '*' => {
                    // Of all texts, the shortest first.
                    pattern.push_str(r"([^.]*?)");
                    rest = &rest[1..];
                }
                '{' => {
                    let end = rest.find('}').ok_or_else(|| format!("`{{` without `}}` in `{text}`"))?;
                    let all: Vec<String> = rest[1..end].split(',').map(|s| regex::escape(s.trim())).collect();
                    pattern.push_str(&format!("(?:{})", all.join("|")));
                    rest = &rest[end + 1..];
                }
                '}' => return Err(format!("`}}` without `{{` in `{text}`")),
                _ => {
                    let end = rest.find(['*', '{', '}']).unwrap_or(rest.len());
                    pattern.push_str(&regex::escape(&rest[..end]));
                    rest = &rest[end..];
                }
            }
        }
        if text.is_empty() {
            return Err("an empty pattern".to_owned());
        }
        pattern.push('$');
        let built = RegexBuilder::new(&pattern).size_limit(MOST_COMPILED).dot_matches_new_line(true).build();
        built.map(Pattern).map_err(|_| format!("the pattern `{text}` is too complex: use fewer stars and braces"))
    }

    /// What the stars stand for, if the pattern matches the whole of `name`.
    fn captures(&self, name: &str) -> Option<Vec<String>> {
        let found = self.0.captures(name)?;
        Some(found.iter().skip(1).map(|star| star.map_or("", |m| m.as_str()).to_owned()).collect())
    }
}

/// True if a quantizer is named by a file, not by its name in the palette.
pub fn is_path(spec: &str) -> bool {
    spec.contains(".qspec") || spec.contains(['/', '\\'])
}

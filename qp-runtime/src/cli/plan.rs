//! `qp plan`: the best quantizer and launch for every layer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_codegen::formats;
use qp_codegen::layout::Packed;
use qp_codegen::palette;
use qp_codegen::spec::{self, Definition, Format, Quantizer, ScaleKind, Shape};
use qp_codegen::syntax::Diagnostics;

use super::Error;
use super::output::{self, note, out, outln, write};
use crate::allocate::choice::{MEMORY, TIME};
use crate::allocate::problem::Times;
use crate::allocate::profile::{Origin, Profile, femtoseconds};
use crate::allocate::report::{self, Budget};
use crate::allocate::sensitivity::Sensitivities;
use crate::allocate::{Allocation, Candidate, Core, Effort, Freedom, Layer, Problem, Role, frontier, heatmap};
use crate::codec::{FormatEncoder, distortion};
use crate::model::weights::{EMBEDDING, HEAD};
use crate::plan::{Spec, is_path};

/// Choose a quantizer for every layer, and which layers share a launch, so that the predicted loss is least.
///
/// The plan is proven to be the best within its budgets. It goes straight into `qp quantize --plan`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("budget").multiple(true))]
pub struct Plan {
    /// What `qp sensitivity` measured
    #[arg(long, value_name = "FILE")]
    sensitivity: PathBuf,
    /// What `qp profile` measured; needed for budgets of time
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Quantizers of the palette to choose from, or formats that can be made (q4_k); `*` stands for any text. One's own are
    /// `file.qspec:name`, or `file.qspec` for all of a file. These and formats have no times, so that they are for budgets
    /// of memory alone
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "*")]
    quantizers: Vec<String>,
    /// Memory budget in bits a weight, scales included
    #[arg(long, value_name = "BITS", value_parser = positive, conflicts_with = "memory", group = "budget")]
    bits: Option<f64>,
    /// Memory budget in bytes, or with a unit: 900MB, 3.5GiB
    #[arg(long, value_name = "BYTES", value_parser = byte_count, group = "budget")]
    memory: Option<i64>,
    /// Memory budget: as much as this quantizer would take on every layer
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bits", "memory"], group = "budget")]
    as_uniform: Option<String>,
    /// Time budget as a rate of decoding
    #[arg(long, value_name = "RATE", value_parser = positive, conflicts_with = "milliseconds", requires = "profile", group = "budget")]
    tokens_per_second: Option<f64>,
    /// Time budget of a decode step
    #[arg(long, value_name = "MS", value_parser = positive, requires = "profile", group = "budget")]
    milliseconds: Option<f64>,
    /// Plan for the output layer too; without this it is left as it is
    #[arg(long)]
    lm_head: bool,
    /// Plan for the embedding too; without this it is left as it is. If the output layer is tied to it, one matrix is
    /// planned for both
    #[arg(long)]
    embedding: bool,
    /// One launch a layer
    #[arg(long)]
    no_fusion: bool,
    /// Kernels on tensor cores only
    #[arg(long)]
    tensor_cores: bool,
    /// Plan file to write (TOML)
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Picture to write: layers by matrices, colour by bits
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Say what one more percent of each budget would buy
    #[arg(long)]
    explain: bool,
    /// Instead of a plan, list the best plans for so many budgets: of time if there is a profile and a memory budget
    /// or none, else of memory
    #[arg(long, value_name = "POINTS", conflicts_with_all = ["out", "svg", "explain"], value_parser = clap::value_parser!(u16).range(2..))]
    frontier: Option<u16>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(v) if v.is_finite() && v > 0.0 => Ok(v),
        _ => Err("expected a positive number".to_owned()),
    }
}

fn byte_count(text: &str) -> Result<i64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        other => return Err(format!("unknown unit `{other}`: known are kB, MB, GB, KiB, MiB and GiB")),
    };
    let n = positive(digits)? * unit;
    if n < 9e15 { Ok(n as i64) } else { Err("too much".to_owned()) }
}

impl Plan {
    /// Runs the command.
    ///
    /// # Errors
    /// If a file cannot be read or written, or no plan keeps within the budgets.
    pub fn run(self) -> Result<(), Error> {
        let [out, svg] = [&self.out, &self.svg].map(|p| p.as_ref().and_then(|p| std::path::absolute(p).ok()));
        if out.is_some() && out == svg {
            return Err("the plan and its picture would be one file: give --out and --svg different names".into());
        }
        for path in self.out.iter().chain(&self.svg) {
            output::check(path)?;
        }
        let (problem, files) = self.problem()?;
        let budget = self.budget(&problem)?;
        let explained = |e| Error::from(report::infeasible(&problem, &e));
        let effort = Effort::default();
        if let Some(points) = self.frontier {
            let resource = if self.profile.is_some() && budget.time.is_none() { TIME } else { MEMORY };
            let other = if resource == TIME { budget.memory } else { budget.time };
            let plans = frontier::frontier(&problem, resource, other, points.into(), effort).map_err(explained)?;
            return print_frontier(&problem, &plans);
        }
        let plan = solve(&problem, budget)?;
        out!("{}\n{}", report::table(&problem, &plan), report::totals(&problem, &plan))?;
        outln!("In brackets: bits by the closed form, if any number of bits could be had.")?;
        if self.explain {
            out!("\n{}", report::explain(&problem, &plan, budget, effort).map_err(explained)?)?;
        }
        if let Some(path) = &self.out {
            let command: Vec<String> = std::env::args().skip(1).collect();
            let folder = std::path::absolute(path).ok().and_then(|p| Some(p.parent()?.to_owned()));
            let spec = |name: &str| files.called(name, folder.as_deref());
            let text = report::plan_file(&problem, &plan, &format!("qp {}", command.join(" ")), &spec);
            write(path, &text)?;
        }
        if let Some(path) = &self.svg {
            write(path, &picture(&problem, &plan))?;
        }
        Ok(())
    }

    /// The plan as data, with nothing printed and no file written.
    ///
    /// # Errors
    /// If a file cannot be read, or no plan keeps within the budgets.
    pub fn solved(&self) -> Result<Solved, Error> {
        let (problem, files) = self.problem()?;
        let plan = solve(&problem, self.budget(&problem)?)?;
        Ok(Solved {
            toml: report::plan_file(&problem, &plan, "qpalette.plan", &|name| files.called(name, None)),
            table: format!("{}\n{}", report::table(&problem, &plan), report::totals(&problem, &plan)),
            svg: picture(&problem, &plan),
            bits: bits(&problem, &plan),
            loss: plan.solution.cost,
        })
    }

    fn budget(&self, problem: &Problem) -> Result<Budget, Error> {
        let full = problem.full_bytes();
        Ok(Budget {
            memory: match &self.as_uniform {
                Some(name) => Some(uniform_bytes(problem, name)?),
                None => self.memory.or(self.bits.map(|b| (full as f64 * b / 16.0).floor() as i64)),
            },
            time: self
                .milliseconds
                .map(|ms| (ms * 1e12).floor() as i64)
                .or(self.tokens_per_second.map(|r| (1e15 / r).floor() as i64)),
        })
    }

    fn problem(&self) -> Result<(Problem, Files), Error> {
        let measured = Sensitivities::read(&self.sensitivity)?;
        let mut layers = measured.layers();
        if self.embedding && !layers.iter().any(|l| l.name == EMBEDDING) {
            let path = self.sensitivity.display();
            return Err(
                format!("{path} has no sensitivity of the embedding: add it with `qp sensitivity --resume`").into()
            );
        }
        // One matrix serves as embedding and output layer.
        let both = measured.tied && self.embedding;
        layers.retain(|l| match l.role {
            Role::Block { .. } => true,
            Role::Alone if l.name == EMBEDDING => self.embedding,
            Role::Alone if l.name == HEAD => self.lm_head && !both,
            // Experts, and layers that are several in one; but a router is left as it is.
            Role::Alone => !l.name.ends_with(".gate") && !l.name.ends_with(".router"),
        });
        if layers.is_empty() {
            return Err(format!("{} has no layers to plan for", self.sensitivity.display()).into());
        }
        let profile = self.profile.as_deref().map(Profile::read).transpose()?;
        if let Some(p) = profile.as_ref().filter(|p| p.origin == Origin::Predicted) {
            note(format_args!("the times for {} are predicted, not measured", p.device));
        }
        let quantizers = candidates(&self.quantizers)?;
        let list: Vec<Candidate> = quantizers
            .iter()
            .map(|m| Candidate { bits: m.bits, name: m.spec.name().to_owned(), distortion: m.distortion })
            .collect();
        let bytes = |layer: &Layer, c: usize| layer_bytes(&quantizers[c].spec, layer.shape);
        let freedom = Freedom { fusion: !self.no_fusion, cores: !self.tensor_cores };
        let names: Vec<String> = list.iter().map(|c| c.name.clone()).collect();
        let table = profile.as_ref().map(Profile::table);
        // An output layer that is left as it is takes its time all the same.
        let kept = if self.lm_head || both { 0.0 } else { profile.as_ref().map_or(0.0, Profile::kept_seconds) };
        let constant = profile.as_ref().map_or(0, |p| femtoseconds(p.rest_seconds + kept));
        let times = |layers: &[&Layer], c: usize, core: Core| match layers {
            // A profile knows the palette's by their names.
            _ if quantizers[c].file.is_some() => None,
            // A look-up is among what the profile calls the rest, whatever the quantizer.
            [layer] if layer.name == EMBEDDING && !both => (core == Core::Tensor).then_some(0),
            [layer] if layer.name == EMBEDDING => {
                let head = Layer { name: HEAD.to_owned(), ..(*layer).clone() };
                table.as_ref()?.get(&[&head], &names[c], core)
            }
            layers => table.as_ref()?.get(layers, &names[c], core),
        };
        let times: Option<Times> = if table.is_some() { Some(&times) } else { None };
        let problem = Problem::new(layers, list, freedom, constant, &bytes, times)?;
        let file = |m: &Member| Some((m.spec.name().to_owned(), m.file.clone()?));
        Ok((problem, Files(quantizers.iter().filter_map(file).collect())))
    }
}

/// Quantizers of one's own: what a command line calls each, by its name.
struct Files(BTreeMap<String, String>);

impl Files {
    /// What a plan in `folder` calls the quantizer `name`: the path of its file from there, the whole one if it lies elsewhere.
    fn called(&self, name: &str, folder: Option<&Path>) -> String {
        let Some(arg) = self.0.get(name) else { return name.to_owned() };
        let Ok(path) = std::path::absolute(arg) else { return arg.clone() };
        let inside = folder.and_then(|folder| path.strip_prefix(folder).ok());
        inside.unwrap_or(&path).to_string_lossy().into_owned()
    }
}

/// A plan as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// The plan file, for `qp quantize --plan`.
    pub toml: String,
    /// A line a block, and totals.
    pub table: String,
    /// Layers by matrices, colour by bits.
    pub svg: String,
    /// Bits a weight, scales included.
    pub bits: f64,
    /// The predicted loss.
    pub loss: f64,
}

fn solve(problem: &Problem, budget: Budget) -> Result<Allocation, Error> {
    if budget.memory.is_none() && budget.time.is_none() {
        let known = "--bits, --memory, --as-uniform, --tokens-per-second or --milliseconds";
        return Err(format!("no budget: give one of {known}, or one of memory and one of time").into());
    }
    let explained = |e| Error::from(report::infeasible(problem, &e));
    problem.solve(budget.memory, budget.time, Effort::default()).map_err(explained)
}

fn bits(problem: &Problem, plan: &Allocation) -> f64 {
    8.0 * plan.solution.uses[MEMORY] as f64 / (problem.full_bytes() / 2) as f64
}

fn picture(problem: &Problem, plan: &Allocation) -> String {
    let title = format!("{:.3} bits a weight, predicted loss {:.5}", bits(problem, plan), plan.solution.cost);
    heatmap::svg(problem, plan, &title)
}

/// Bytes of a packed layer with its scales or fields, as a checkpoint holds it; nothing if its sides do not fit. Tables are
/// shared by all layers and not counted.
fn layer_bytes(spec: &Spec, shape: Shape) -> Option<i64> {
    match spec {
        Spec::Quantizer(q) => {
            let scales = match q.scale {
                ScaleKind::Row => i64::from(shape.rows),
                ScaleKind::Matrix => 1,
            };
            Some(4 * Packed::new(q, shape).words() as i64 + 2 * scales)
        }
        Spec::Format(f) => Some(f.reader(shape).ok()?.tensors().iter().map(|t| t.bytes as i64).sum()),
    }
}

/// Bytes of all layers of `problem` under one quantizer or format.
fn uniform_bytes(problem: &Problem, name: &str) -> Result<i64, Error> {
    let spec = match spec::resolve_any(name)? {
        Definition::Quantizer(q) => Spec::Quantizer(Arc::new(q)),
        Definition::Format(f) => {
            Spec::Format(Arc::new(FormatEncoder::new(&f).map_err(|why| format!("`{name}`: {why}"))?))
        }
    };
    let of = |l: &Layer| {
        let bytes = layer_bytes(&spec, l.shape);
        bytes.ok_or_else(|| Error::from(format!("the sides of `{}` do not fit `{name}`", l.name)))
    };
    problem.layers.iter().map(of).sum()
}

/// The names in the palette that match a pattern, in its order.
///
/// # Errors
/// If a pattern matches none.
pub(super) fn choose(patterns: &[String]) -> Result<Vec<&'static str>, Error> {
    let names = palette::names();
    for pattern in patterns {
        if !names.iter().any(|n| matches(pattern, n)) {
            return Err(format!("`{pattern}` is no quantizer of the palette: it has {}", names.join(", ")).into());
        }
    }
    Ok(names.into_iter().filter(|n| patterns.iter().any(|p| matches(p, n))).collect())
}

/// What a plan may give to layers.
struct Member {
    spec: Spec,
    /// Bits a weight, with the fields that belong to a number of weights.
    bits: f64,
    distortion: f64,
    /// What a command line calls it, if it is one's own.
    file: Option<String>,
}

/// Columns and weights of the Gaussian matrix by which a format's error is found.
const FORMAT_SAMPLE: (u32, u64) = (4096, 1 << 18);
/// Gaussian weights by which the error of a quantizer of one's own is found.
const SAMPLE: u64 = 1 << 16;

/// Quantizers and formats that a plan may choose from, and those that it cannot.
#[derive(Default)]
struct Candidates {
    members: Vec<Member>,
    /// Why each was left out.
    left_out: Vec<String>,
}

impl Candidates {
    /// Adds a quantizer, with its distortion if that is known.
    fn quantizer(&mut self, q: Quantizer, file: Option<String>) -> Result<(), Error> {
        let known = palette::distortion(&q.name).filter(|_| palette::get(&q.name).as_ref() == Some(&q));
        match (known, &file) {
            _ if !q.is_trained() => match &file {
                Some(file) => {
                    let error = spec::untrained(&q, file).expect("a table is empty");
                    return Err(Diagnostics { list: vec![error], ..Diagnostics::default() }.into());
                }
                None => self.left_out.push(format!("{} (not trained)", q.name)),
            },
            (None, None) => self.left_out.push(format!("{} (no error in specs/distortion.toml)", q.name)),
            (known, _) => {
                let distortion = known.unwrap_or_else(|| distortion::measure(&q, SAMPLE, 0).mean);
                let file = file.filter(|_| known.is_none());
                self.add(Member { bits: q.rate(), spec: Spec::Quantizer(Arc::new(q)), distortion, file })?;
            }
        }
        Ok(())
    }

    /// Adds a format.
    fn format(&mut self, format: &Format, file: Option<String>) -> Result<(), Error> {
        match FormatEncoder::new(format) {
            Ok(encoder) => {
                let (columns, weights) = FORMAT_SAMPLE;
                let (_, d) = distortion::measure_format(&encoder, columns, weights, 0)?;
                let (spec, bits) = (Spec::Format(Arc::new(encoder)), format.rate().1);
                self.add(Member { spec, bits, distortion: d.mean, file })?;
            }
            Err(why) => self.left_out.push(format!("{} ({why})", format.name)),
        }
        Ok(())
    }

    fn add(&mut self, new: Member) -> Result<(), Error> {
        let name = new.spec.name();
        match self.members.iter().find(|m| m.spec.name() == name) {
            Some(other) if other.spec != new.spec => {
                Err(format!("two of --quantizers are called `{name}`, and differ: rename one in its .qspec file")
                    .into())
            }
            Some(_) => Ok(()),
            None => {
                self.members.push(new);
                Ok(())
            }
        }
    }
}

/// What may be chosen: of the palette what matches a pattern, or, if nothing does, of the formats; and what files define.
fn candidates(patterns: &[String]) -> Result<Vec<Member>, Error> {
    let mut all = Candidates::default();
    let (files, patterns): (Vec<String>, Vec<String>) = patterns.iter().cloned().partition(|p| is_path(p));
    let known = palette::names();
    let (own, other): (Vec<String>, Vec<String>) =
        patterns.into_iter().partition(|p| known.iter().any(|n| matches(p, n)));
    let names = if other.is_empty() { Vec::new() } else { formats::names() };
    if let Some(strange) = other.iter().find(|p| !names.iter().any(|n| matches(p, n))) {
        return Err(format!(
            "`{strange}` is no quantizer of the palette and no format: `qp-codegen list` shows both; one's own is \
             `file.qspec:name`"
        )
        .into());
    }
    for name in if own.is_empty() { Vec::new() } else { choose(&own)? } {
        all.quantizer(palette::get(name).expect("a name of the palette"), None)?;
    }
    for name in names.into_iter().filter(|n| other.iter().any(|p| matches(p, n))) {
        all.format(formats::get(name).expect("a name of a format"), None)?;
    }
    for (definition, file) in spec::resolve_each(&files)? {
        match definition {
            Definition::Quantizer(q) => all.quantizer(q, Some(file))?,
            Definition::Format(f) => all.format(&f, Some(file))?,
        }
    }
    if all.members.iter().any(|m| matches!(m.spec, Spec::Format(_))) {
        note(
            "formats do not rotate: on a model's own weights their errors may exceed those on Gaussian ones, which are planned with",
        );
    }
    if all.members.is_empty() {
        return Err(format!("nothing is left to choose from: {}; name others", all.left_out.join(", ")).into());
    }
    if !all.left_out.is_empty() {
        note(format_args!("left out: {}", all.left_out.join(", ")));
    }
    Ok(all.members)
}

/// Whether `name` is `pattern` with its stars replaced.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).filter(|&i| rest.is_char_boundary(i)).any(|i| matches(after, &rest[i..]))
        }),
    }
}

fn print_frontier(problem: &Problem, plans: &[Allocation]) -> Result<(), Error> {
    let weights: u64 = problem.layers.iter().map(Layer::weights).sum();
    outln!("{:>14}  {:>8}  {:>12}  {:>14}  {:>8}", "bytes", "bits", "ms a token", "predicted loss", "gap")?;
    for plan in plans {
        let s = &plan.solution;
        let timed = plan.launches.iter().any(|l| l.core.is_some());
        let time = if timed { format!("{:.4}", plan.time(problem) as f64 / 1e12) } else { "-".to_owned() };
        let bits = 8.0 * s.uses[MEMORY] as f64 / weights as f64;
        outln!("{:>14}  {bits:>8.4}  {time:>12}  {:>14.8}  {:>8.1e}", s.uses[MEMORY], s.cost, s.gap())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(matches("*", "tcq_2") && matches("tcq_*", "tcq_2.5") && matches("*2*", "vq2_3"));
        assert!(!matches("tcq_*", "htcq_2") && !matches("tcq_2", "tcq_2.5"));
    }

    #[test]
    fn byte_counts() {
        assert_eq!(byte_count("1000"), Ok(1000));
        assert_eq!(byte_count("1.5GiB"), Ok(3 << 29));
        assert_eq!(byte_count("2MB"), Ok(2_000_000));
        assert!(byte_count("2 parsecs").is_err() && byte_count("-1").is_err() && byte_count("1e300").is_err());
    }
}

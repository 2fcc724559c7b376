//! `qp bench jit`: how long it takes from a quantizer to machine code.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use clap::Args;
use qp_codegen::cuda::{Device, Target, check, print};
use qp_codegen::spec::Shape;
use rayon::prelude::*;
use serde::Serialize;

use super::shapes::ModelArgs;
use crate::cli::Error;
use crate::cli::output::{out, outln, write};
use crate::engine::Precision;
use crate::engine::cuda::layout::Layout;
use crate::engine::cuda::lower::{self, Op, Pick, Wanted};
use crate::jit::{self, Cache};

/// Time the making of kernels: lowering, validating, printing, compiling. Needs NVRTC, but no GPU.
///
/// Each kernel of a decode step, and each product of a single matrix, is made on its own, without a cache. Then a fresh
/// process makes all kernels of the step on all cores: once into an empty cache, then from what that left.
#[derive(Args)]
pub struct JitBench {
    #[command(flatten)]
    model: ModelArgs,
    /// What to compile for.
    #[arg(long, default_value = "sm_90a")]
    target: Target,
    /// Times that each kernel is made, of which the fastest counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Also write the table to this file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also write the results as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only make all kernels of the step, in the cache of the environment, and print the seconds.
    #[arg(long, hide = true)]
    once: bool,
}

/// Warm starts, of which the fastest counts.
const STARTS: usize = 3;

/// Milliseconds that one kernel took.
#[derive(Clone, Debug, Serialize)]
struct Row {
    kernel: String,
    lower: f64,
    validate: f64,
    print: f64,
    nvrtc: f64,
    all: f64,
    /// Of these on a core, not waiting for one; `None` where the system does not say.
    on_core: Option<f64>,
    registers: u32,
}

impl Row {
    /// What to judge by on a busy machine.
    fn cost(&self) -> f64 {
        self.on_core.unwrap_or(self.all)
    }
}

/// Milliseconds that this thread has spent on a core so far, as Linux counts them.
fn on_core() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse::<f64>().ok().map(|nanoseconds| nanoseconds / 1e6)
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Report {
    target: String,
    nvrtc: String,
    cores: usize,
    quantizers: String,
    kernels: Vec<Row>,
    /// Milliseconds of a fresh process for all kernels of a step.
    step: Step,
}

#[derive(Debug, Serialize)]
struct Step {
    kernels: usize,
    cold: f64,
    warm: f64,
}

impl JitBench {
    /// Runs it.
    ///
    /// # Errors
    /// No NVRTC, a model, quantizer or plan that cannot be read, a kernel that does not compile.
    pub(super) fn run(self) -> Result<(), Error> {
        if self.once {
            // What a process of an engine does before it can launch: from here on, all of it counts.
            let start = Instant::now();
            let layout = self.model.layout(Precision::default())?;
            let ops = kernels(&layout, &self.target.device());
            self.compile_all(&layout, &ops)?;
            outln!("{} {}", ops.len(), start.elapsed().as_secs_f64())?;
            return Ok(());
        }
        let version = jit::Nvrtc::get()?.version();
        let layout = self.model.layout(Precision::default())?;
        let (all, alone) = (kernels(&layout, &self.target.device()), alone(&layout));
        let named = all.iter().map(|k| (k, "")).chain(alone.iter().map(|k| (k, " (unfused)")));
        let mut rows = Vec::new();
        for (op, note) in named {
            let rounds = (0..self.rounds).map(|_| self.make(&layout, op)).collect::<Result<Vec<_>, _>>()?;
            let best = rounds.into_iter().min_by(|a, b| a.cost().total_cmp(&b.cost()));
            rows.extend(best.map(|row| Row { kernel: row.kernel + note, ..row }));
        }
        rows.sort_by(|a, b| b.cost().total_cmp(&a.cost()));
        let report = Report {
            target: self.target.to_string(),
            nvrtc: format!("{}.{}", version.0, version.1),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            quantizers: self.model.quantizers(),
            kernels: rows,
            step: starts()?,
        };
        let text = table(&report);
        out!("{text}")?;
        if let Some(path) = &self.out {
            write(path, &text)?;
        }
        if let Some(path) = &self.json {
            write(path, &(serde_json::to_string_pretty(&report)? + "\n"))?;
        }
        Ok(())
    }

    /// Makes a kernel, without a cache.
    fn make(&self, layout: &Layout, op: &Op) -> Result<Row, Error> {
        let (start, before) = (Instant::now(), on_core());
        let mut last = 0.0;
        let mut lap = || {
            let now = start.elapsed().as_secs_f64() * 1e3;
            now - std::mem::replace(&mut last, now)
        };
        let kernel = op.lower(layout, &self.target.device());
        let lower = lap();
        let checked = check(&kernel, self.target).map_err(|e| e.to_string())?;
        let validate = lap();
        let source = print(checked);
        let print = lap();
        let cubin = self.compile(&Cache::none(), &source, &kernel.name)?;
        let nvrtc = lap();
        let registers = cubin.usage.map_or(0, |u| u.registers);
        let all = lower + validate + print + nvrtc;
        let on_core = on_core().zip(before).map(|(now, before)| now - before);
        Ok(Row { kernel: kernel.name, lower, validate, print, nvrtc, all, on_core, registers })
    }

    fn compile(&self, cache: &Cache, source: &str, name: &str) -> Result<jit::Cubin, jit::JitError> {
        jit::compile_in(cache, source, name, self.target.nvrtc_arch(), &jit::Options::default())
    }

    /// Makes kernels as an engine does: in parallel, with the cache.
    fn compile_all(&self, layout: &Layout, ops: &[Op]) -> Result<(), Error> {
        let (device, cache) = (self.target.device(), Cache::of_user());
        ops.par_iter().try_for_each(|op| {
            let kernel = op.lower(layout, &device);
            let checked = check(&kernel, self.target).map_err(|e| e.to_string())?;
            self.compile(&cache, &print(checked), &kernel.name)?;
            Ok(())
        })
    }
}

/// The kernels of a decode step of one token.
fn kernels(layout: &Layout, device: &Device) -> Vec<Op> {
    let mut out: Vec<Op> = Vec::new();
    for launch in lower::step(layout, device, 1, Wanted { rows: 1, pick: Pick::Best }).launches {
        if !out.contains(&launch.op) {
            out.push(launch.op);
        }
    }
    out
}

/// Products of single matrices of the first decoder block that a step joins with others.
fn alone(layout: &Layout) -> Vec<Op> {
    let mut out: Vec<Op> = Vec::new();
    for stored in layout.matrices.iter().filter(|m| m.layers.len() > 1).take(2) {
        for id in &stored.layers {
            let layer = layout.program.layer(*id);
            let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
            let op = Op::Product { spec: stored.spec, shape, batch: 1, accumulate: false, prepare: None };
            if !out.contains(&op) {
                out.push(op);
            }
        }
    }
    out
}

/// All kernels of a step in fresh processes: into an empty cache, then out of it.
fn starts() -> Result<Step, Error> {
    let folder = tempfile::tempdir()?;
    let once = || -> Result<(usize, f64), Error> {
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.args(std::env::args_os().skip(1)).arg("--once").env(jit::CACHE_VARIABLE, folder.path());
        let output = output.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers = text.trim().split_once(' ').and_then(|(n, s)| Some((n.parse().ok()?, s.parse::<f64>().ok()?)));
        let failed = || format!("a process of its own failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        numbers.map(|(n, s)| (n, s * 1e3)).ok_or_else(|| failed().into())
    };
    let (kernels, cold) = once()?;
    let mut warm = f64::INFINITY;
    for _ in 0..STARTS {
        warm = warm.min(once()?.1);
    }
    Ok(Step { kernels, cold, warm })
}

fn table(report: &Report) -> String {
    let mut text = String::from("| kernel | lower | validate | print | NVRTC | all, ms | on a core | registers |\n");
    text += "|---|---|---|---|---|---|---|---|\n";
    for r in &report.kernels {
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} | {} | {} |",
            r.kernel,
            r.lower,
            r.validate,
            r.print,
            r.nvrtc,
            r.all,
            r.on_core.map_or("-".to_owned(), |ms| format!("{ms:.1}")),
            r.registers
        );
    }
    let range = |of: Vec<f64>| {
        let mut of = of;
        of.sort_by(f64::total_cmp);
        let at = |i: usize| of.get(i).copied().unwrap_or(f64::NAN);
        format!(
            "{:.0} ms at least, {:.0} in the middle, {:.0} at most",
            at(0),
            at(of.len() / 2),
            at(of.len().wrapping_sub(1))
        )
    };
    let _ = write!(
        text,
        "\n{} for {}, NVRTC {}, {} cores. A kernel, cold: {}",
        report.quantizers,
        report.target,
        report.nvrtc,
        report.cores,
        range(report.kernels.iter().map(|r| r.all).collect())
    );
    let on_core: Vec<f64> = report.kernels.iter().filter_map(|r| r.on_core).collect();
    if !on_core.is_empty() {
        let _ = write!(text, "; on a core, without waiting for one: {}", range(on_core));
    }
    text += ".\n";
    let _ = writeln!(
        text,
        "The {} kernels of a decode step, by a fresh process on all cores: {:.0} ms cold, {:.1} ms from the cache.",
        report.step.kernels, report.step.cold, report.step.warm
    );
    text
}

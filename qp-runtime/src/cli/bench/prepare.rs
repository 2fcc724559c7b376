//! `qp bench prepare`: the speed of preparing activations.

use std::path::PathBuf;

use clap::Args;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::prepare::{Gate, Prepare, Spread};
use qp_codegen::reference::{Activation, Activations, RmsNorm, activation_cells};
use qp_codegen::spec::Rotation;
use serde::Serialize;

use super::rounded;
use crate::check::activations::prepared;
use crate::check::synthetic::Random;
use crate::cli::Error;
use crate::cli::output::{outln, write};
use crate::device::ops::{DeviceActivations, Faults, PrepareInputs, PrepareKernel};
use crate::device::{Buffer, DeviceError, Executor};

/// Time the preparation of activations on a GPU: with a norm before, as the inputs of attention and of the feed-forward layer,
/// with a gated unit, as the input of its last matrix, and plain, without a rotation, as before products with others' formats.
///
/// Each kernel is first compared with the CPU. Then a graph of launches, each of which waits for the one before, is timed; the
/// time is that of the graph over its launches, the best of several runs.
#[derive(Args)]
pub struct PrepareBench {
    /// Columns.
    #[arg(long, value_delimiter = ',', default_value = "4096,8192,11008,14336,28672",
          value_parser = clap::value_parser!(u32).range(1..))]
    columns: Vec<u32>,
    /// What is prepared.
    #[arg(long, value_delimiter = ',', default_value = "norm,gate,plain", value_parser = ["norm", "gate", "plain"])]
    kind: Vec<String>,
    /// Tokens at once.
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=2048))]
    batch: Vec<u32>,
    /// Columns of a block of the rotation, a power of two; 0 for a rotation of all columns together.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    block: Vec<u32>,
    /// Columns over which the blocks are interleaved, a power of two.
    #[arg(long)]
    interleave: Option<u32>,
    /// Measure every way to spread the columns over blocks and warps, not only the one that an engine uses.
    #[arg(long)]
    all: bool,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Launches of a graph.
const LAUNCHES: usize = 256;
/// Runs of a graph, of which the fastest counts.
const ROUNDS: usize = 7;

/// What was measured.
#[derive(Debug, Serialize)]
struct Row {
    /// `norm`, `gate` or `plain`.
    kind: String,
    columns: u32,
    batch: u32,
    /// 0: all columns.
    block: u32,
    /// Blocks of a cluster.
    blocks: u32,
    /// Groups of 128 columns that a warp takes.
    per_warp: u32,
    /// Whether an engine would spread the columns so.
    used: bool,
    /// Microseconds of a launch.
    us: f64,
    registers: u32,
}

impl PrepareBench {
    /// Runs it.
    pub(super) fn run(self) -> Result<(), Error> {
        let on = Executor::cuda(self.gpu)?;
        let gpu = on.gpu().ok_or("no GPU")?;
        outln!("{} ({} SMs)", gpu.name, gpu.sms)?;
        outln!("{:>6} {:>8} {:>6} {:>6} {:>9}  spread", "", "columns", "tokens", "block", "us")?;
        let mut rows = Vec::new();
        for &columns in &self.columns {
            for &batch in &self.batch {
                for &block in &self.block {
                    if block != 0 && !(block.is_power_of_two() && (2..=1 << 16).contains(&block)) {
                        return Err(format!("a block of {block} columns is no power of two from 2 to 65536").into());
                    }
                    if let Some(span) = self.interleave
                        && (block < 16 || span <= block || !span.is_power_of_two())
                    {
                        return Err(format!("blocks of {block} columns are not interleaved over {span}").into());
                    }
                    for kind in &self.kind {
                        rows.extend(measure(&on, &op(kind, columns, batch, block, self.interleave), kind, self.all)?);
                    }
                }
            }
        }
        if let Some(path) = &self.json {
            write(path, &(serde_json::to_string_pretty(&rows)? + "\n"))?;
        }
        Ok(())
    }
}

fn op(kind: &str, columns: u32, batch: u32, block: u32, interleave: Option<u32>) -> Prepare {
    let (gated, normed) = (kind == "gate", kind == "norm");
    let up = Span { first: columns, stride: 2 * columns };
    Prepare {
        columns,
        batch,
        input: if gated { Span { first: 0, ..up } } else { Span::rows(columns) },
        gate: gated.then_some(Gate { activation: Activation::Silu, up }),
        norm: normed.then_some(RmsNorm { eps: 1e-5, add_one: false }),
        rotation: match kind {
            "plain" => Rotation::None,
            _ => Rotation::Hadamard { seed: 0, block: Some(block).filter(|b| *b > 0), interleave },
        },
        entering: None,
    }
}

/// Times an operation, spread as an engine does or in every way, after comparing it with the CPU.
fn measure(on: &Executor, op: &Prepare, kind: &str, all: bool) -> Result<Vec<Row>, Error> {
    let used = Spread::choose(op, &on.device());
    let spreads = if all { Spread::all(op, &on.device()) } else { vec![used] };
    let mut random = Random::of(kind);
    let (n, tokens) = (op.columns as usize, op.batch as usize);
    let values = random.values(2 * n * tokens, 3.0);
    let weights = random.values(n, 2.0);
    let expected = prepared(op, &values, &weights);
    let (input, norm) = (on.upload(&values)?, on.upload(&weights)?);
    let inputs = PrepareInputs { norm: &norm, ..PrepareInputs::plain(&input) };
    let mut out = DeviceActivations::new(on, op.columns, op.batch)?;
    let mut faults = on.zeroed(1)?;
    let mut rows = Vec::new();
    for spread in spreads {
        let mut kernel = PrepareKernel::load_as(on, op, spread)?;
        kernel.launch(on, inputs, &mut out, Faults { faults: &mut faults, layer: 0 })?;
        let what = format!("{kind} of {n} columns, {tokens} token(s), {spread:?}");
        check(&what, &out, &expected)?;
        let seconds = time(on, &mut kernel, inputs, &mut out, &mut faults)?;
        let row = Row {
            kind: kind.to_owned(),
            columns: op.columns,
            batch: op.batch,
            block: match op.rotation {
                Rotation::Hadamard { seed: _, block, .. } => block.unwrap_or(0),
                Rotation::None => 1,
            },
            blocks: spread.blocks,
            per_warp: spread.per_warp,
            used: spread == used,
            us: rounded(seconds * 1e6, 1e3),
            registers: kernel.loaded().usage().map_or(0, |u| u.registers),
        };
        outln!(
            "{:>6} {:>8} {:>6} {:>6} {:>9.2}  blocks {}, groups a warp {}, registers {}{}",
            row.kind,
            row.columns,
            row.batch,
            row.block,
            row.us,
            row.blocks,
            row.per_warp,
            row.registers,
            if row.used && all { ", used" } else { "" },
        )?;
        rows.push(row);
    }
    Ok(rows)
}

fn time(
    on: &Executor,
    kernel: &mut PrepareKernel,
    inputs: PrepareInputs<'_>,
    out: &mut DeviceActivations,
    faults: &mut Buffer<i32>,
) -> Result<f64, DeviceError> {
    let mut graph = on.record();
    for _ in 0..LAUNCHES {
        kernel.record(&mut graph, inputs, out, Faults { faults, layer: 0 })?;
    }
    let graph = graph.finish()?;
    Ok(on.time_best(ROUNDS, || graph.launch())? / LAUNCHES as f64)
}

/// Compares a launch's result with the CPU's.
fn check(what: &str, out: &DeviceActivations, expected: &[Activations]) -> Result<(), Error> {
    let scales: Vec<f32> = expected.iter().map(|a| a.scale).collect();
    let sums: Vec<i32> = expected.iter().map(|a| a.sum as i32).collect();
    let equal =
        out.x.to_vec()? == activation_cells(expected) && out.scale.to_vec()? == scales && out.sum.to_vec()? == sums;
    if equal { Ok(()) } else { Err(format!("{what}: the result is not the CPU's").into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_compared_with_the_cpu() {
        let on = Executor::interpreter();
        for (kind, block) in [("norm", 128), ("gate", 0), ("plain", 128)] {
            let op = op(kind, 1100, 2, block, None);
            let rows = measure(&on, &op, kind, true).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(rows.iter().filter(|r| r.used).count(), 1);
        }
        let out = DeviceActivations::new(&on, 256, 1).expect("memory");
        let mut expected = vec![qp_codegen::reference::quantize_activations(&[0.0; 256])];
        check("nothing", &out, &expected).expect("zeros");
        expected[0].q[255] = 1;
        let message = check("nothing", &out, &expected).expect_err("a column differs").to_string();
        assert_eq!(message, "nothing: the result is not the CPU's");
    }
}

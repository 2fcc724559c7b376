//! `qp bench kernels`: the speed of products with packed weights.

use std::path::PathBuf;

use clap::Args;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::{Launch, MAX_BATCH};
use qp_codegen::kernels::read::{self, Read};
use qp_codegen::layout::Packed;
use qp_codegen::reference::{self, Activations};
use qp_codegen::spec::{self, Quantizer, Shape};
use rayon::prelude::*;

use super::results::{Fp16, Kernel, Results};
use super::{COPIES, ROTATE, rounded, shape};
use crate::check::synthetic::{self, Random};
use crate::cli::Error;
use crate::cli::output::outln;
use crate::codec;
use crate::device::ops::{DeviceActivations, DeviceMatrix, GemvKernel};
use crate::device::tune::{self, Product};
use crate::device::{Buffer, DeviceError, Executor, launches};

/// Time matrix-vector products with packed weights on a GPU.
///
/// Each kernel is first compared with the CPU's decoder. Then a graph of launches rotates over copies of the weights
/// that together exceed the L2 cache; the time is that of the graph over its launches, the best of several runs.
///
/// Measured are the launch that an engine uses, chosen by a short measurement of a few (or remembered from one; see
/// QP_LAUNCHES), and the cost model's own choice. `model` is the time of that over the best.
#[derive(Args)]
pub struct KernelBench {
    /// Quantizers: names of the palette or spec files.
    #[arg(long, value_delimiter = ',', default_value = "fast_2,tcq_2,tcq_3,tcq_4")]
    spec: Vec<String>,
    /// Matrices, rows x columns.
    #[arg(long, value_delimiter = ',', value_parser = shape,
          default_value = "28672x4096,14336x4096,4096x14336,6144x4096,4096x4096,1024x4096")]
    shape: Vec<Shape>,
    /// Tokens at once (1 to 2048).
    #[arg(long, value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=MAX_BATCH as i64))]
    batch: Vec<u32>,
    /// Try this many launch shapes, the best by the cost model first, and print each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    launches: u16,
    /// What scripts/fp16-matmul printed on this GPU, to compare with and to keep with the results.
    #[arg(long, value_name = "FILE")]
    fp16: Option<PathBuf>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Launches of a graph, at least.
const LAUNCHES: usize = 256;
/// Runs of a graph, of which the fastest counts.
const ROUNDS: usize = 7;
/// Tokens of a product that are compared with the CPU's, at most.
const COMPARED: u32 = 64;

impl KernelBench {
    /// Runs it.
    pub(super) fn run(self) -> Result<(), Error> {
        let fp16 = self.fp16.as_deref().map(Fp16::read).transpose()?.unwrap_or_default();
        let on = Executor::cuda(self.gpu)?;
        let gpu = on.gpu().ok_or("no GPU")?;
        let (peak, read) = (on.device().bandwidth, bandwidth(&on, ROTATE)?);
        outln!(
            "{} ({} SMs); memory: {:.2} TB/s by its clock, {:.2} TB/s reading alone",
            gpu.name,
            gpu.sms,
            peak / 1e12,
            read / 1e12
        )?;
        outln!(
            "{:>10} {:>13} {:>4} {:>9} {:>9} {:>7} {:>8} {:>9} {:>6}  launch",
            "spec",
            "shape",
            "b",
            "us",
            "GB/s",
            "reading",
            "fp16",
            "expected",
            "model"
        )?;
        let mut results = Results {
            gpu: gpu.name.clone(),
            peak_bytes_per_second: peak.round(),
            read_bytes_per_second: Some(read.round()),
            fp16,
            kernels: Vec::new(),
        };
        let mut worst = Worst::default();
        for q in spec::resolve_all(&self.spec)? {
            for &shape in &self.shape {
                for &batch in &self.batch {
                    let rows = measure(&on, &q, shape, batch, self.launches.into())?;
                    let ratio = model_over_best(&rows);
                    worst.add(ratio, &rows[0]);
                    // Unless many are asked for, the model's choice is seen in the ratio.
                    for row in rows.iter().filter(|r| self.launches > 1 || r.used) {
                        print_row(&results, row, ratio)?;
                    }
                    results.kernels.extend(rows);
                }
            }
        }
        outln!("\n{worst}")?;
        if let Some(path) = &self.json {
            results.write(path)?;
        }
        Ok(())
    }
}

fn print_row(results: &Results, row: &Kernel, ratio: f64) -> Result<(), Error> {
    let fp16 = results.fp16_us(row.rows, row.cols).filter(|_| row.batch == 1);
    let share = results.read_bytes_per_second.map_or(f64::NAN, |read| row.gb_per_s * 1e9 / read * 100.0);
    outln!(
        "{:>10} {:>13} {:>4} {:>9.2} {:>9.0} {:>6.0}% {:>8} {:>9.2} {:>6.3}  {}registers {}{}",
        row.spec,
        format!("{}x{}", row.rows, row.cols),
        row.batch,
        row.us,
        row.gb_per_s,
        share,
        fp16.map_or("-".to_owned(), |us| format!("{:.2}x", us / row.us)),
        row.model_us,
        ratio,
        row.launch.iter().map(|(name, value)| format!("{name} {value}, ")).collect::<String>(),
        row.registers,
        if row.used { ", used" } else { "" },
    )
}

/// Time of the model's own choice, which is among `rows`, over the best.
fn model_over_best(rows: &[Kernel]) -> f64 {
    let best = rows.iter().map(|r| r.us).fold(f64::INFINITY, f64::min);
    rows.iter().find(|r| r.rank == 0).map_or(f64::NAN, |r| r.us / best)
}

/// How far the cost model's choices are from the best that was measured.
#[derive(Default)]
struct Worst {
    cases: usize,
    logarithms: f64,
    most: f64,
    of: String,
}

impl Worst {
    fn add(&mut self, ratio: f64, row: &Kernel) {
        self.cases += 1;
        self.logarithms += ratio.ln();
        if ratio > self.most {
            self.most = ratio;
            self.of = format!("{} {}x{}, {} token(s)", row.spec, row.rows, row.cols, row.batch);
        }
    }
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mean = (self.logarithms / self.cases.max(1) as f64).exp();
        write!(
            f,
            "the cost model's choice over the best measured, {} cases: {mean:.3} on average, {:.3} at most ({})",
            self.cases, self.most, self.of
        )
    }
}

/// Bytes a second that a kernel reads which does nothing else, from a buffer of about `bytes`.
pub(super) fn bandwidth(on: &Executor, bytes: usize) -> Result<f64, Error> {
    let blocks = 2 * on.device().sms;
    let round = Read { blocks, rounds: 1 }.words() as usize * 4;
    let op = Read { blocks, rounds: bytes.div_ceil(round) as u32 };
    let kernel = on.load::<launches::Read<'_>>(read::lower(&op))?;
    let (x, mut y) = (on.zeroed(op.words() as usize)?, on.zeroed(op.threads() as usize)?);
    let mut graph = on.record();
    const LAUNCHES: usize = 4;
    for _ in 0..LAUNCHES {
        graph.launch(&kernel, launches::Read { x: &x, y: &mut y })?;
    }
    let graph = graph.finish()?;
    let best = on.time_best(ROUNDS, || graph.launch())?;
    Ok(x.bytes() as f64 * LAUNCHES as f64 / best)
}

/// Times the launch of a product that an engine uses and the model's first `tried`, with random weights, after comparing
/// each with the CPU's decoder; in the model's order.
///
/// # Errors
/// Those of the executor, or a result that differs.
pub(super) fn measure(
    on: &Executor,
    q: &Quantizer,
    shape: Shape,
    batch: u32,
    tried: usize,
) -> Result<Vec<Kernel>, Error> {
    let name = format!("{}, {} x {}", q.name, shape.rows, shape.cols);
    let packed = synthetic::matrix(&name, q, shape);
    let layout = &packed.layout;
    let first = DeviceMatrix::upload(on, q, shape.cols, &[(shape.rows, &packed.words, &packed.scales)])?;
    let copies = tune::copies(on, &[&first], ROTATE, COPIES)?;
    let matrices: Vec<&DeviceMatrix> = std::iter::once(&first).chain(&copies).collect();
    let mut random = Random::of(&name);
    let inputs: Vec<Activations> =
        (0..batch).map(|_| reference::quantize_activations(&random.values(shape.cols as usize, 1.0))).collect();
    let compared = spread(batch);
    let some: Vec<Activations> = compared.iter().map(|&token| inputs[token as usize].clone()).collect();
    let products = codec::linear(q, &packed, &some);
    let x = DeviceActivations::upload(on, &inputs)?;
    let mut y = on.zeroed((layout.padded_rows() * batch) as usize)?;
    let op = Gemv { quantizer: q, shape, batch, accumulate: false };
    let used = tune::measured(on, &[Product { op, prepare: None, hash: &q.hash(), matrices: matrices.clone() }])?;
    let used = used.first().map(|(launch, _)| *launch).ok_or("no kernel")?;
    let ranked = Launch::ranked(&op, &on.device());
    let wanted = ranked.iter().enumerate().filter(|(rank, (_, launch))| *rank < tried || *launch == used);
    let wanted: Vec<(usize, f64, Launch)> =
        wanted.map(|(rank, &(expected, launch))| (rank, expected, launch)).collect();
    // On all cores: compiling takes longer than everything else.
    let load = |&(rank, expected, launch): &_| Ok((rank, expected, launch, GemvKernel::load(on, &op, &launch)?));
    let mut kernels = wanted.par_iter().map(load).collect::<Result<Vec<_>, DeviceError>>()?;
    for (.., kernel) in &mut kernels {
        kernel.launch(on, &first, &x, &mut y)?;
        check(q, layout, &y, &compared, &products)?;
    }
    let times = tune::time(on, kernels.iter_mut().map(|k| &mut k.3), &matrices, &x, &mut y, LAUNCHES, ROUNDS)?;
    let bytes = packed.words.len() as f64 * 4.0;
    let row = |((rank, expected, launch, kernel), seconds): ((usize, f64, Launch, GemvKernel), f64)| Kernel {
        spec: q.name.clone(),
        rate: q.rate(),
        rows: shape.rows,
        cols: shape.cols,
        batch,
        us: rounded(seconds * 1e6, 1e3),
        gb_per_s: rounded(bytes / seconds / 1e9, 10.0),
        model_us: rounded(expected * 1e6, 1e3),
        rank,
        used: launch == used,
        launch: named(&launch),
        registers: kernel.loaded().usage().map_or(0, |u| u.registers),
    };
    Ok(kernels.into_iter().zip(times).map(row).collect())
}

/// Up to [`COMPARED`] of `n` tokens, the first and the last among them.
fn spread(n: u32) -> Vec<u32> {
    let count = n.min(COMPARED);
    (0..count).map(|i| (u64::from(i) * u64::from(n - 1) / u64::from((count - 1).max(1))) as u32).collect()
}

/// A launch's kernel and numbers by name.
fn named(launch: &Launch) -> serde_json::Map<String, serde_json::Value> {
    let (kernel, fields) = launch.fields();
    let fields = fields.into_iter().map(|(name, n)| (name.to_owned(), n.into()));
    std::iter::once(("kernel".to_owned(), kernel.into())).chain(fields).collect()
}

/// Compares a launch's result, all tokens × padded rows, with the CPU's, `tokens` × rows, to the bit.
fn check(q: &Quantizer, layout: &Packed, y: &Buffer<f32>, tokens: &[u32], expected: &[f32]) -> Result<(), Error> {
    let rows = layout.shape.rows as usize;
    let mut got = vec![0f32; rows];
    for (&token, expected) in tokens.iter().zip(expected.chunks_exact(rows)) {
        y.read(token as usize * layout.padded_rows() as usize, &mut got)?;
        if let Some(row) = (0..rows).find(|&r| got[r].to_bits() != expected[r].to_bits()) {
            let (got, must) = (got[row], expected[row]);
            return Err(format!("{}: row {row}, token {token} is {got}, but must be {must}", q.name).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_compared_with_the_cpu() {
        let q = spec::resolve("htcq_2.25").expect("of the palette");
        let shape = Shape { rows: 24, cols: 300 };
        let on = Executor::interpreter();
        let rows = measure(&on, &q, shape, 2, 2).unwrap_or_else(|e| panic!("{e}"));
        let seen: Vec<_> = rows.iter().map(|r| (r.batch, r.rank, r.used)).collect();
        assert_eq!(seen, [(2, 0, true), (2, 1, false)]);
        assert!(model_over_best(&rows) >= 1.0);
        let y = on.upload(&[1.0f32; 32]).expect("memory");
        let layout = Packed::new(&q, Shape { rows: 24, cols: 300 });
        let mut expected = [1.0f32; 24];
        check(&q, &layout, &y, &[0], &expected).expect("equal but for padding");
        expected[23] = -1.0;
        let message = check(&q, &layout, &y, &[0], &expected).expect_err("a row differs").to_string();
        assert_eq!(message, "htcq_2.25: row 23, token 0 is 1, but must be -1");
    }

    #[test]
    fn tokens_to_compare_are_spread_from_the_first_to_the_last() {
        assert_eq!(spread(1), [0]);
        assert_eq!(spread(3), [0, 1, 2]);
        let many = spread(2048);
        assert_eq!((many.len(), many[0], many[63]), (64, 0, 2047));
        assert!(many.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn reading_alone_is_timed() {
        assert!(bandwidth(&Executor::interpreter(), 1).unwrap_or_else(|e| panic!("{e}")) > 0.0);
    }

    #[test]
    fn the_model_is_judged_by_its_worst_case() {
        let mut worst = Worst::default();
        let on = Executor::interpreter();
        let q = spec::resolve("nuq_3").expect("of the palette");
        let rows = measure(&on, &q, Shape { rows: 16, cols: 128 }, 1, 1).unwrap_or_else(|e| panic!("{e}"));
        worst.add(1.21, &rows[0]);
        worst.add(1.0, &rows[0]);
        let text = worst.to_string();
        assert!(text.ends_with("2 cases: 1.100 on average, 1.210 at most (nuq_3 16x128, 1 token(s))"), "{text}");
    }
}

//! `qp bench`: measurements to publish.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::{Launch, MAX_BATCH};
use qp_codegen::layout::Packed;
use qp_codegen::reference::{self, Activations};
use qp_codegen::spec::{self, Quantizer, Shape};

use super::Error;
use super::bench_encode::EncodeBench;
use super::distortion::DistortionBench;
use crate::check::synthetic::{self, Random};
use crate::codec;
use crate::device::ops::{DeviceActivations, DeviceMatrix, GemvKernel};
use crate::device::{Buffer, Executor};

/// Measure kernels and codes.
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Distortion(DistortionBench),
    Encode(EncodeBench),
    Kernels(Kernels),
}

/// Time matrix-vector products with packed weights on a GPU.
///
/// Each kernel is first compared with the CPU's decoder. Then a graph of launches rotates over copies of the weights
/// that together exceed the L2 cache; the time is that of the graph over its launches, the best of several runs.
#[derive(Args)]
struct Kernels {
    /// Quantizers: names of the palette or spec files.
    #[arg(long, value_delimiter = ',', default_value = "fast_2,tcq_2,tcq_3,tcq_4")]
    spec: Vec<String>,
    /// Matrices, rows x columns.
    #[arg(long, value_delimiter = ',', value_parser = shape,
          default_value = "28672x4096,14336x4096,4096x14336,6144x4096,4096x4096,1024x4096")]
    shape: Vec<Shape>,
    /// Tokens at once (1 to 64).
    #[arg(long, value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=MAX_BATCH as i64))]
    batch: Vec<u32>,
    /// Try this many launch shapes, the best by the cost model first, and print each.
    #[arg(long, default_value_t = 1)]
    launches: usize,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Bench {
    /// Runs it.
    pub fn run(self) -> Result<(), Error> {
        match self.what {
            What::Distortion(d) => d.run(),
            What::Encode(e) => e.run(),
            What::Kernels(k) => k.run(),
        }
    }
}

fn shape(text: &str) -> Result<Shape, String> {
    let (rows, cols) = text.split_once('x').ok_or("rows x columns, as in 4096x14336")?;
    let number = |s: &str| s.trim().parse().ok().filter(|n| *n > 0).ok_or(format!("`{s}` is no positive number"));
    Ok(Shape { rows: number(rows)?, cols: number(cols)? })
}

/// Bytes over which a graph rotates: several times any L2 cache.
const ROTATE: usize = 400 << 20;

/// One measurement.
pub(super) struct Row {
    spec: String,
    rate: f64,
    shape: Shape,
    batch: u32,
    launch: Launch,
    registers: u32,
    /// Seconds that the cost model expected, and that passed.
    expected: f64,
    pub(super) seconds: f64,
    bytes: usize,
}

impl Kernels {
    fn run(self) -> Result<(), Error> {
        let on = Executor::cuda(self.gpu)?;
        let gpu = on.gpu().ok_or("no GPU")?;
        let peak = on.device().bandwidth;
        println!("{} ({} SMs, {:.2} TB/s by its memory clock)", gpu.name, gpu.sms, peak / 1e12);
        println!(
            "{:>10} {:>13} {:>2} {:>9} {:>9} {:>6} {:>9}  launch",
            "spec", "shape", "b", "us", "GB/s", "peak", "model us"
        );
        let mut rows = Vec::new();
        for name in &self.spec {
            let q = spec::resolve(name).map_err(|d| d.to_string())?;
            for &shape in &self.shape {
                for &batch in &self.batch {
                    for row in measure(&on, &q, shape, batch, self.launches)? {
                        let (kernel, fields) = row.launch.fields();
                        let fields: Vec<String> = fields.iter().map(|(name, n)| format!("{name} {n}")).collect();
                        println!(
                            "{:>10} {:>13} {:>2} {:>9.2} {:>9.0} {:>5.0}% {:>9.2}  {kernel}: {}, registers {}",
                            row.spec,
                            format!("{}x{}", shape.rows, shape.cols),
                            batch,
                            row.seconds * 1e6,
                            row.bytes as f64 / row.seconds / 1e9,
                            row.bytes as f64 / row.seconds / peak * 100.0,
                            row.expected * 1e6,
                            fields.join(", "),
                            row.registers,
                        );
                        rows.push(row);
                    }
                }
            }
        }
        if let Some(path) = &self.json {
            std::fs::write(path, json(&gpu.name, peak, &rows)).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(())
    }
}

/// Times the `tried` best launches of a product with random weights, after comparing each with the CPU's decoder.
///
/// # Errors
/// Those of the executor, or a result that differs.
pub(super) fn measure(on: &Executor, q: &Quantizer, shape: Shape, batch: u32, tried: usize) -> Result<Vec<Row>, Error> {
    let name = format!("{}, {} x {}", q.name, shape.rows, shape.cols);
    let packed = synthetic::matrix(&name, q, shape);
    let layout = &packed.layout;
    let bytes = packed.words.len() * 4;
    let copies = (ROTATE / bytes).clamp(2, 200);
    let matrices: Vec<DeviceMatrix> = (0..copies)
        .map(|_| DeviceMatrix::upload(on, q, shape.cols, &[(shape.rows, &packed.words, &packed.scales)]))
        .collect::<Result<_, _>>()?;
    let mut random = Random::of(&name);
    let inputs: Vec<Activations> =
        (0..batch).map(|_| reference::quantize_activations(&random.values(shape.cols as usize, 1.0))).collect();
    let products = codec::linear(q, &packed, &inputs);
    let x = DeviceActivations::upload(on, &inputs, shape.cols)?;
    let op = Gemv { quantizer: q, shape, batch, accumulate: false };
    let ranked = Launch::ranked(&op, &on.device());
    let mut rows = Vec::new();
    for &(expected, launch) in ranked.iter().take(tried.max(1)) {
        let mut kernel = GemvKernel::load(on, &op, Some(launch))?;
        let mut y = on.zeroed((layout.padded_rows() * batch) as usize)?;
        kernel.launch(on, &matrices[0], &x, &mut y)?;
        check(q, layout, &y, &products)?;
        let mut graph = on.record();
        let launches = copies * (256 / copies).max(1);
        for i in 0..launches {
            kernel.record(&mut graph, &matrices[i % copies], &x, &mut y)?;
        }
        let graph = graph.finish()?;
        let mut best = f64::INFINITY;
        for _ in 0..7 {
            best = best.min(on.time(|| graph.launch())? / launches as f64);
        }
        rows.push(Row {
            spec: q.name.clone(),
            rate: q.rate(),
            shape,
            batch,
            launch,
            registers: kernel.loaded().usage().map_or(0, |u| u.registers),
            expected,
            seconds: best,
            bytes,
        });
    }
    Ok(rows)
}

/// Compares a launch's result, tokens × padded rows, with the CPU's, tokens × rows, to the bit.
fn check(q: &Quantizer, layout: &Packed, y: &Buffer<f32>, expected: &[f32]) -> Result<(), Error> {
    let rows = layout.shape.rows as usize;
    let y = y.to_vec()?;
    for (token, (got, expected)) in
        y.chunks_exact(layout.padded_rows() as usize).zip(expected.chunks_exact(rows)).enumerate()
    {
        if let Some(row) = (0..rows).find(|&r| got[r].to_bits() != expected[r].to_bits()) {
            let (got, must) = (got[row], expected[row]);
            return Err(format!("{}: row {row}, token {token} is {got}, but must be {must}", q.name).into());
        }
    }
    Ok(())
}

fn json(gpu: &str, peak: f64, rows: &[Row]) -> String {
    let mut out = format!("{{\n  \"gpu\": {gpu:?},\n  \"peak_bytes_per_second\": {peak:.0},\n  \"kernels\": [\n");
    for (i, r) in rows.iter().enumerate() {
        let (kernel, fields) = r.launch.fields();
        let fields: String = fields.iter().map(|(name, n)| format!("\"{name}\": {n}, ")).collect();
        let _ = writeln!(
            out,
            "    {{\"spec\": {:?}, \"rate\": {}, \"rows\": {}, \"cols\": {}, \"batch\": {}, \"us\": {:.3}, \
             \"gb_per_s\": {:.1}, \"model_us\": {:.3}, \"kernel\": {kernel:?}, {fields}\"registers\": {}}}{}",
            r.spec,
            r.rate,
            r.shape.rows,
            r.shape.cols,
            r.batch,
            r.seconds * 1e6,
            r.bytes as f64 / r.seconds / 1e9,
            r.expected * 1e6,
            r.registers,
            if i + 1 < rows.len() { "," } else { "" },
        );
    }
    out + "  ]\n}\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_compared_with_the_cpu() {
        let q = spec::resolve("htcq_2.25").expect("of the palette");
        let shape = Shape { rows: 24, cols: 300 };
        let rows = measure(&Executor::interpreter(), &q, shape, 2, 1).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((rows.len(), rows[0].batch), (1, 2));
        let on = Executor::interpreter();
        let y = on.upload(&[1.0f32; 32]).expect("memory");
        let layout = Packed::new(&q, Shape { rows: 24, cols: 300 });
        let mut expected = [1.0f32; 24];
        check(&q, &layout, &y, &expected).expect("equal but for padding");
        expected[23] = -1.0;
        let message = check(&q, &layout, &y, &expected).expect_err("a row differs").to_string();
        assert_eq!(message, "htcq_2.25: row 23, token 0 is 1, but must be -1");
    }
}

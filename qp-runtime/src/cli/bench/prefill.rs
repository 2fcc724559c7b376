//! `qp bench prefill`: packed weights decoded and multiplied with many tokens at once, beside half precision.

use std::path::PathBuf;

use clap::Args;
use half::f16;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::reference;
use qp_codegen::spec::{self, Quantizer, Shape};
use serde::Serialize;

use super::{COPIES, ROTATE, rounded, shape};
use crate::check::synthetic::{self, Random};
use crate::cli::Error;
use crate::cli::output::write;
use crate::codec::{Decoder, PackedMatrix};
use crate::device::ops::{DecodeKernel, DeviceMatrix, PrepareHalfKernel};
use crate::device::{Blas, Buffer, DeviceError, Element, Executor, HalfProduct, tune};

/// Time products of long prompts on a GPU: weights decoded to half precision, then cuBLAS.
///
/// `cublas` is cuBLAS alone with weights in half precision, outputs too, as PyTorch computes a linear layer. `product` is
/// what a packed matrix takes: decoding it, then cuBLAS with outputs in single precision, which is what an engine needs;
/// `to f16` is the same with outputs in half precision. Percentages are speeds, cuBLAS alone being 100 %. Rotating and
/// rounding the activations, `prepare`, is timed apart: matrices of one input share it.
///
/// Every product is first compared with the CPU's, some rows of some tokens; `error` is the largest over what rounding to
/// half precision may bring about.
#[derive(Args)]
pub struct PrefillBench {
    /// Quantizers: names of the palette or spec files.
    #[arg(long, value_delimiter = ',', default_value = "fast_2,tcq_2,tcq_3,tcq_4")]
    spec: Vec<String>,
    /// Matrices, rows x columns.
    #[arg(long, value_delimiter = ',', value_parser = shape, default_value = "28672x4096,14336x4096,4096x14336,4096x4096")]
    shape: Vec<Shape>,
    /// Tokens at once.
    #[arg(long, value_delimiter = ',', default_value = "2048", value_parser = clap::value_parser!(u32).range(1..=65535))]
    tokens: Vec<u32>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Launches of a run.
const LAUNCHES: usize = 24;
/// Runs, of which the fastest counts.
const ROUNDS: usize = 7;
/// Rows and tokens of a product that are compared with the CPU's.
const COMPARED: u32 = 32;

/// All of a call.
#[derive(Serialize)]
struct Results {
    gpu: String,
    blas: String,
    products: Vec<Row>,
}

/// One product. Times are microseconds of a launch.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// Name of the quantizer.
    spec: String,
    /// Its bits a weight.
    rate: f64,
    rows: u32,
    cols: u32,
    tokens: u32,
    /// Of cuBLAS alone, weights and outputs in half precision.
    cublas_us: f64,
    /// Of decoding the matrix.
    decode_us: f64,
    /// Decoded weights written a second.
    decode_gb_per_s: f64,
    /// Of rotating and rounding the activations.
    prepare_us: f64,
    /// Of decoding and cuBLAS, outputs in single precision.
    product_us: f64,
    /// Of decoding and cuBLAS, outputs in half precision.
    product_f16_us: f64,
    /// Operations a second of cuBLAS alone, in units of 10^12.
    cublas_tflops: f64,
    /// Largest difference from the CPU over what is allowed.
    error: f64,
}

impl Row {
    /// Speed of the product over that of cuBLAS alone, in percent.
    fn share(&self, us: f64) -> f64 {
        self.cublas_us / us * 100.0
    }
}

impl PrefillBench {
    /// Runs it.
    ///
    /// # Errors
    /// No GPU, no cuBLAS, a full GPU, a product that is wrong.
    pub fn run(self) -> Result<(), Error> {
        let on = Executor::cuda(self.gpu)?;
        let blas = Blas::open(&on)?;
        let gpu = on.gpu().map(|gpu| gpu.name.clone()).unwrap_or_default();
        println!("{gpu}; {}\n{}", blas.describe(), head());
        let mut products = Vec::new();
        for name in &self.spec {
            let q = spec::resolve(name).map_err(|d| d.to_string())?;
            for &shape in &self.shape {
                for &tokens in &self.tokens {
                    let row = measure(&on, &blas, &q, shape, tokens, ROTATE)?;
                    println!("{}", line(&row));
                    products.push(row);
                }
            }
        }
        if let Some(path) = &self.json {
            let results = Results { gpu, blas: blas.describe(), products };
            write(path, &(serde_json::to_string_pretty(&results)? + "\n"))?;
        }
        Ok(())
    }
}

fn head() -> String {
    format!(
        "{:>10} {:>13} {:>6} {:>9} {:>7} {:>9} {:>6} {:>9} {:>9} {:>6} {:>9} {:>6} {:>6}",
        "spec",
        "shape",
        "tokens",
        "cublas us",
        "TFLOP/s",
        "decode us",
        "GB/s",
        "prepare",
        "product",
        "speed",
        "to f16",
        "speed",
        "error"
    )
}

fn line(row: &Row) -> String {
    format!(
        "{:>10} {:>13} {:>6} {:>9.1} {:>7.0} {:>9.1} {:>6.0} {:>9.1} {:>9.1} {:>5.1}% {:>9.1} {:>5.1}% {:>6.2}",
        row.spec,
        format!("{}x{}", row.rows, row.cols),
        row.tokens,
        row.cublas_us,
        row.cublas_tflops,
        row.decode_us,
        row.decode_gb_per_s,
        row.prepare_us,
        row.product_us,
        row.share(row.product_us),
        row.product_f16_us,
        row.share(row.product_f16_us),
        row.error
    )
}

/// Times a product with random weights and activations, after comparing it with the CPU. Launches go through copies of
/// the weights that together take `rotate` bytes or more, as weights come from memory in a model.
///
/// # Errors
/// Those of the executor, or a result that is wrong.
fn measure(on: &Executor, blas: &Blas, q: &Quantizer, shape: Shape, tokens: u32, rotate: usize) -> Result<Row, Error> {
    let name = format!("{}, {} x {}", q.name, shape.rows, shape.cols);
    let packed = synthetic::matrix(&name, q, shape);
    let first = DeviceMatrix::upload(on, q, shape.cols, &[(shape.rows, &packed.words, &packed.scales)])?;
    let copies = tune::copies(on, &[&first], rotate, COPIES)?;
    let matrices: Vec<&DeviceMatrix> = std::iter::once(&first).chain(&copies).collect();
    let input = Random::of(&name).values((tokens * shape.cols) as usize, 1.0);

    let op = Prepare { columns: shape.cols, stride: shape.cols, batch: tokens, rotation: q.rotation, norm: None };
    let prepare = PrepareHalfKernel::load(on, &op)?;
    let (input_buffer, nothing) = (on.upload(&input)?, on.zeroed(1)?);
    let mut x = on.zeroed((tokens * shape.cols) as usize)?;
    prepare.launch(on, &input_buffer, &nothing, &mut x)?;

    let decode = DecodeKernel::<f16>::load(on, q, shape)?;
    let mut decoded = on.zeroed(shape.len() as usize)?;
    decode.launch(on, &first, &mut decoded)?;
    // Weights in half precision as they lie in an unquantized model, several matrices of them.
    let halves = (0..(rotate / decoded.bytes()).clamp(2, COPIES)).map(|_| on.copy(&decoded));
    let halves = halves.collect::<Result<Vec<_>, _>>()?;

    let op = HalfProduct { rows: shape.rows, cols: shape.cols, tokens, stride: shape.rows, accumulate: false };
    let outputs = shape.rows as usize * tokens as usize;
    let (mut y, mut y16) = (on.zeroed::<f32>(outputs)?, on.zeroed::<f16>(outputs)?);
    blas.launch(&op, &decoded, &x, &mut y)?;
    blas.launch(&op, &decoded, &x, &mut y16)?;
    let expected = Expected::new(q, &packed, &input, tokens);
    let error = expected.compare(&name, &y, 0.0)?.max(expected.compare(&name, &y16, HALF)?);

    let mut each = |what: Work, i: usize| -> Result<(), DeviceError> {
        let matrix = matrices[i % matrices.len()];
        match what {
            Work::Cublas => blas.launch(&op, &halves[i % halves.len()], &x, &mut y16),
            Work::Decode => decode.launch(on, matrix, &mut decoded),
            Work::Prepare => prepare.launch(on, &input_buffer, &nothing, &mut x),
            Work::Product => {
                decode.launch(on, matrix, &mut decoded)?;
                blas.launch(&op, &decoded, &x, &mut y)
            }
            Work::ProductHalf => {
                decode.launch(on, matrix, &mut decoded)?;
                blas.launch(&op, &decoded, &x, &mut y16)
            }
        }
    };
    // The kinds of work alternate, so that a change of the clock meets all of them.
    let mut best = [f64::INFINITY; Work::ALL.len()];
    for _ in 0..ROUNDS {
        for (what, best) in Work::ALL.into_iter().zip(&mut best) {
            *best = best.min(on.time(|| (0..LAUNCHES).try_for_each(|i| each(what, i)))? / LAUNCHES as f64);
        }
    }
    let us = |what: Work| rounded(best[what as usize] * 1e6, 1e2);
    let weights = f64::from(shape.rows) * f64::from(shape.cols);
    Ok(Row {
        spec: q.name.clone(),
        rate: q.rate(),
        rows: shape.rows,
        cols: shape.cols,
        tokens,
        cublas_us: us(Work::Cublas),
        decode_us: us(Work::Decode),
        decode_gb_per_s: rounded(2.0 * weights / best[Work::Decode as usize] / 1e9, 10.0),
        prepare_us: us(Work::Prepare),
        product_us: us(Work::Product),
        product_f16_us: us(Work::ProductHalf),
        cublas_tflops: rounded(2.0 * weights * f64::from(tokens) / best[Work::Cublas as usize] / 1e12, 10.0),
        error: rounded(error, 1e3),
    })
}

/// What is timed.
#[derive(Clone, Copy)]
enum Work {
    Cublas,
    Decode,
    Prepare,
    Product,
    ProductHalf,
}

impl Work {
    /// In the order of their numbers.
    const ALL: [Work; 5] = [Work::Cublas, Work::Decode, Work::Prepare, Work::Product, Work::ProductHalf];
}

/// Largest relative error of rounding to half precision.
const HALF: f64 = 1.0 / 2048.0;

/// Some outputs of a product, computed on the CPU in double precision from weights and rotated activations that are not
/// rounded to half precision.
struct Expected {
    rows: Vec<u32>,
    tokens: Vec<u32>,
    /// Of all rows of the matrix.
    stride: usize,
    /// Tokens × rows: an output, and what its error may be.
    outputs: Vec<(f64, f64)>,
}

impl Expected {
    /// Weights and activations are each rounded once, by up to [`HALF`] of themselves, so the error of an output is a sum of
    /// as many independent errors as there are columns. It may be eight times `HALF · √Σ(w·x)²`, ten times what is likely;
    /// a wrong term alone would be a larger error.
    fn new(q: &Quantizer, packed: &PackedMatrix, input: &[f32], tokens: u32) -> Expected {
        let Shape { rows, cols } = packed.layout.shape;
        let cols = cols as usize;
        let (rows_compared, tokens_compared) = (spread(rows), spread(tokens));
        let weights = Decoder::new(q).rows(packed, &rows_compared);
        let mut outputs = Vec::new();
        for &token in &tokens_compared {
            let mut x = input[token as usize * cols..][..cols].to_vec();
            reference::rotate(q.rotation, &mut x);
            for w in weights.chunks_exact(cols) {
                let terms = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, squares) = terms.fold((0.0, 0.0), |(sum, squares), t| (sum + t, squares + t * t));
                outputs.push((sum, 8.0 * HALF * squares.sqrt()));
            }
        }
        Expected { rows: rows_compared, tokens: tokens_compared, stride: rows as usize, outputs }
    }

    /// The largest error over what is allowed, outputs being rounded by up to `rounding` of themselves.
    ///
    /// # Errors
    /// The first output that is wrong, a failing device.
    fn compare<T: Element + Into<f64>>(&self, name: &str, y: &Buffer<T>, rounding: f64) -> Result<f64, Error> {
        let mut most = 0f64;
        let mut of_token = vec![T::zeroed(); self.stride];
        for (token, outputs) in self.tokens.iter().zip(self.outputs.chunks_exact(self.rows.len())) {
            y.read(*token as usize * self.stride, &mut of_token)?;
            for (row, (expected, allowed)) in self.rows.iter().zip(outputs) {
                let got: f64 = of_token[*row as usize].into();
                let error = (got - expected).abs() / (allowed + rounding * expected.abs());
                // A NaN is wrong too.
                if error.is_nan() || error > 1.0 {
                    return Err(format!(
                        "{name}: row {row}, token {token} is {got}, but must be {expected} to within {allowed:.3}"
                    )
                    .into());
                }
                most = most.max(error);
            }
        }
        Ok(most)
    }
}

/// Up to [`COMPARED`] of `n` places, the first and the last among them.
fn spread(n: u32) -> Vec<u32> {
    let count = n.min(COMPARED);
    (0..count).map(|i| (u64::from(i) * u64::from(n - 1) / u64::from((count - 1).max(1))) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_compared_with_the_cpu_and_timed() {
        let on = Executor::interpreter();
        let blas = Blas::open(&on).expect("the interpreter has a loop of its own");
        for name in ["fast_2", "htcq_2.25", "nuq_4"] {
            let q = spec::resolve(name).expect("of the palette");
            let row = measure(&on, &blas, &q, Shape { rows: 40, cols: 320 }, 5, 1).unwrap_or_else(|e| panic!("{e}"));
            assert!(row.error > 0.0 && row.error < 1.0, "{row:?}");
            assert!(row.product_us >= row.decode_us.min(row.cublas_us), "{row:?}");
            // Times of the interpreter are wide.
            assert!(line(&row).len() >= head().len(), "{}", line(&row));
        }
    }

    #[test]
    fn a_wrong_output_is_refused() {
        let on = Executor::interpreter();
        let q = spec::resolve("nuq_3").expect("of the palette");
        let shape = Shape { rows: 16, cols: 128 };
        let packed = synthetic::matrix("wrong", &q, shape);
        let input = vec![1.0; 256];
        let expected = Expected::new(&q, &packed, &input, 2);
        let right: Vec<f32> = expected.outputs.iter().map(|o| o.0 as f32).collect();
        assert!(expected.compare("it", &on.upload(&right).expect("memory"), 0.0).expect("right") < 0.01);
        for wrong in [f32::NAN, right[17] + 0.1 * right[17].abs().max(1.0)] {
            let mut y = right.clone();
            y[17] = wrong;
            let message = expected.compare("it", &on.upload(&y).expect("memory"), 0.0).expect_err("wrong").to_string();
            assert!(message.starts_with("it: row 1, token 1 is "), "{message}");
        }
    }

    #[test]
    fn places_are_spread_from_the_first_to_the_last() {
        assert_eq!(spread(1), [0]);
        assert_eq!(spread(3), [0, 1, 2]);
        let many = spread(28672);
        assert_eq!((many.len(), many[0], many[31]), (32, 0, 28671));
        assert!(many.is_sorted_by(|a, b| a < b));
    }
}

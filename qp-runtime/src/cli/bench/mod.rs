//! `qp bench`: measurements to publish.

mod attention;
mod distortion;
mod distortion_plot;
mod encode;
mod engine;
mod formats;
mod jit;
mod kernels;
mod museum;
mod prepare;
mod results;
mod roofline;
mod shapes;

use clap::{Args, Subcommand};
use qp_codegen::spec::Shape;

use super::Error;
use attention::AttentionBench;
use distortion::DistortionBench;
use encode::EncodeBench;
use engine::EngineBench;
use formats::FormatBench;
use jit::JitBench;
use kernels::KernelBench;
use museum::MuseumBench;
use prepare::PrepareBench;
use roofline::RooflineBench;

/// Measure kernels, codes and whole models.
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Attention(AttentionBench),
    Distortion(DistortionBench),
    Encode(EncodeBench),
    Engine(EngineBench),
    Formats(FormatBench),
    Jit(JitBench),
    Kernels(KernelBench),
    Museum(MuseumBench),
    Prepare(PrepareBench),
    Roofline(RooflineBench),
}

impl Bench {
    /// Runs it.
    pub fn run(self) -> Result<(), Error> {
        match self.what {
            What::Attention(a) => a.run(),
            What::Distortion(d) => d.run(),
            What::Encode(e) => e.run(),
            What::Engine(e) => e.run(),
            What::Formats(f) => f.run(),
            What::Jit(j) => j.run(),
            What::Kernels(k) => k.run(),
            What::Museum(m) => m.run(),
            What::Prepare(p) => p.run(),
            What::Roofline(r) => r.run(),
        }
    }
}

/// Bytes over which a graph rotates: several times any L2 cache.
const ROTATE: usize = 400 << 20;
/// Copies of a matrix, at most.
const COPIES: usize = 200;

/// A shape as people write it.
fn shape(text: &str) -> Result<Shape, String> {
    let (rows, cols) = text.split_once('x').ok_or("rows x columns, as in 4096x14336")?;
    let number = |s: &str| s.trim().parse().ok().filter(|n| *n > 0).ok_or(format!("`{s}` is no positive number"));
    Ok(Shape { rows: number(rows)?, cols: number(cols)? })
}

/// `x` to the nearest of `parts` parts of one.
fn rounded(x: f64, parts: f64) -> f64 {
    (x * parts).round() / parts
}

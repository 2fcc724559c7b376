//! `qp tune`: the launches of a model's products, measured on this GPU and remembered.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use indicatif::{ProgressBar, ProgressStyle};
use qp_codegen::cuda::Device;
use qp_codegen::kernels::product::MAX_BATCH;

use super::Error;
use super::output::outln;
use crate::check::synthetic::Random;
use crate::checkpoint::Checkpoint;
use crate::device::ops::DeviceMatrix;
use crate::device::tune::{self, Product};
use crate::device::{DeviceError, Executor};
use crate::engine::Precision;
use crate::engine::cuda::layout::{Form, Layout};
use crate::engine::cuda::lower::{self, Op, Pick, Wanted};
use crate::model::{Config, Weights, arch};

/// Measure how each product of a quantized model is launched best on this GPU, for steps of several sizes; later starts take
/// that from the cache of kernels.
///
/// Results do not depend on launches, only times do. Untuned, the cost model's choice is taken, which is some percent slower.
/// Takes seconds to minutes, most of it in the compiler.
#[derive(Debug, clap::Args)]
pub struct Tune {
    /// A checkpoint made by `qp quantize`; only its shapes and quantizers are read
    model: PathBuf,
    /// Tokens of the steps to tune for
    #[arg(long, value_name = "COUNTS", value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048",
          value_parser = clap::value_parser!(u32).range(1..=MAX_BATCH as i64))]
    tokens: Vec<u32>,
    /// Which GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
}

/// Random words, of which matrices repeat as many as they have.
const NOISE: usize = 1_048_573;
/// Rows of logits that a step of many tokens gives, at most.
const ROWS: u32 = 64;

impl Tune {
    /// Runs the command.
    ///
    /// # Errors
    /// No checkpoint, no GPU, a failing compiler or driver.
    pub fn run(self) -> Result<(), Error> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let program = Arc::new(arch::program(&Config::read(&self.model)?));
        let weights = Weights::load(&program, &checkpoint)?;
        let layout = Layout::new(&program, &Form::of(&weights), &[], Precision::default());
        let on = Executor::cuda(self.gpu)?;
        let start = Instant::now();
        let done = tune_all(&on, &layout, &self.tokens)?;
        outln!("{done} products of {} in {:.1} s", self.model.display(), start.elapsed().as_secs_f64())?;
        Ok(())
    }
}

/// The products of steps of so many tokens, those of one matrix together; each once.
fn products(layout: &Layout, device: &Device, tokens: &[u32]) -> Vec<Vec<Op>> {
    let mut out: Vec<Vec<Op>> = Vec::new();
    let wanted = |tokens: u32| [tokens.min(ROWS), 1].map(|rows| (tokens, Wanted { rows, pick: Pick::Best }));
    for (tokens, wanted) in tokens.iter().flat_map(|t| wanted(*t)) {
        let launches = lower::step(layout, device, tokens, wanted).launches;
        for op in launches.into_iter().map(|l| l.op) {
            let Op::Product { spec, shape, .. } = op else { continue };
            let same = |ops: &&mut Vec<Op>| matches!(ops[0], Op::Product { spec: s, shape: other, .. } if (s, other) == (spec, shape));
            match out.iter_mut().find(same) {
                Some(ops) if ops.contains(&op) => (),
                Some(ops) => ops.push(op),
                None => out.push(vec![op]),
            }
        }
    }
    out
}

/// Tunes them, on matrices of random bits. Gives their number.
fn tune_all(on: &Executor, layout: &Layout, tokens: &[u32]) -> Result<usize, DeviceError> {
    let all = products(layout, &on.device(), tokens);
    let count = all.iter().map(Vec::len).sum();
    let bar = ProgressBar::new(count as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} products").expect("a valid template"));
    let mut random = Random::of("noise");
    let noise: Vec<u32> = (0..NOISE).map(|_| random.word()).collect();
    for ops in all {
        let ops: Vec<_> = ops.iter().filter_map(|op| Some((op.product(layout)?, op.own_preparation()))).collect();
        let Some((first, _)) = ops.first() else { continue };
        let hash = first.quantizer.hash();
        let matrix = DeviceMatrix::repeating(on, first.quantizer, first.shape, &noise, bf16::ONE)?;
        let product = |&(op, prepare)| Product { op, prepare, hash: &hash, matrices: vec![&matrix] };
        let products = ops.iter().map(product);
        tune::measured(on, &products.collect::<Vec<_>>())?;
        bar.inc(ops.len() as u64);
    }
    bar.finish_and_clear();
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{shapes, synthetic};

    #[test]
    fn every_product_of_a_step_is_tuned_once() {
        let q = synthetic::trained(qp_codegen::palette::get("nuq_3").expect("of the palette"));
        let (_, weights) = synthetic::model(&shapes()[0].1, &|_| Some(q.clone())).unwrap();
        let layout = Layout::new(&weights.program, &Form::of(&weights), &[], Precision::default());
        let device = Executor::interpreter().device();
        let all = products(&layout, &device, &[1, 2]);
        // Of each matrix's shape, for one token and for two; the output layer for one row of two tokens, too.
        for ops in &all {
            assert_eq!(ops.len() % 2, 0, "{ops:?}");
            assert!(ops.iter().enumerate().all(|(i, op)| !ops[..i].contains(op)), "{ops:?}");
        }
        let count = all.iter().map(Vec::len).sum::<usize>();
        assert_eq!(tune_all(&Executor::interpreter(), &layout, &[1, 2]).unwrap(), count);
        let step = lower::step(&layout, &device, 2, Wanted { rows: 2, pick: Pick::Best });
        for launch in step.launches.iter().filter(|l| matches!(l.op, Op::Product { .. })) {
            assert!(all.iter().flatten().any(|op| *op == launch.op), "{:?}", launch.op);
        }
    }
}

//! `qp bench encode`: the speed of encoders.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use qp_codegen::spec::{self, Code, Quantizer};
use rayon::prelude::*;

use crate::check::synthetic;
use crate::cli::Error;
use crate::cli::output::{out, outln, write};
use crate::codec::Gaussian;
use crate::codec::plain::Plain;
use crate::codec::viterbi::{Scratch, Trellis};
use crate::device::{DeviceTrellis, Executor};

/// Time the encoder on unit-variance Gaussian samples: a plain loop and the fast encoder on one core, the fast encoder
/// on all cores, and a GPU where there is one.
///
/// All must find the same windows. Figures are weights a second; the GPU's are of its kernel alone, and with the
/// copies to and fro.
#[derive(Args)]
pub struct EncodeBench {
    /// Quantizers: names of the palette, spec files, or FILE:NAME; random tables stand for untrained ones.
    #[arg(required = true)]
    spec: Vec<String>,
    /// Blocks that the fast encoder encodes on each core.
    #[arg(long, default_value_t = 32)]
    blocks: usize,
    /// Blocks that the GPU encodes, rounded up so that all of it has work to the end.
    #[arg(long, default_value_t = 1 << 14)]
    gpu_blocks: usize,
    /// Where to encode: the CPU takes minutes for the largest codes. On one of them alone nothing is compared.
    #[arg(long)]
    only: Option<Only>,
    /// Also write the table to this file.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A part of the comparison.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    /// The CPU.
    Cpu,
    /// The first GPU.
    Gpu,
}

/// Weights a second on the CPU.
struct Cpu {
    plain: f64,
    core: f64,
    cores: f64,
}

/// Weights a second on a GPU: of the kernel alone, and in all.
struct Gpu {
    kernel: f64,
    all: f64,
}

impl EncodeBench {
    /// Runs it.
    pub(super) fn run(self) -> Result<(), Error> {
        let on = match self.only {
            Some(Only::Cpu) => None,
            Some(Only::Gpu) => Some(Executor::cuda(0)?),
            None => Executor::cuda(0).ok(),
        };
        let threads = rayon::current_num_threads();
        let gpu = on.as_ref().and_then(|on| Some(on.gpu()?.name.clone()));
        let mut text = format!(
            "| quantizer | L | KV | V | plain loop, 1 core | 1 core | ratio | {threads} cores | {} | with copies |\n",
            gpu.as_deref().unwrap_or("no GPU")
        );
        text += "|---|---|---|---|---|---|---|---|---|---|\n";
        outln!("Weights a second, millions.\n")?;
        out!("{text}")?;
        for (q, _) in spec::resolve_all_untrained(&self.spec)? {
            let q = synthetic::trained(q);
            for code in &q.codes {
                let (cpu, gpu) = self.measure(&q, code, on.as_ref())?;
                let steps: Vec<String> = code.steps.iter().map(u32::to_string).collect();
                let million = |x: f64| format!("{:.3}", x / 1e6);
                let cpu = cpu.map_or([const { String::new() }; 4], |c| {
                    [million(c.plain), million(c.core), format!("{:.1}", c.core / c.plain), million(c.cores)]
                });
                let gpu = gpu.map_or([const { String::new() }; 2], |g| [million(g.kernel), million(g.all)]);
                let line = format!(
                    "| {} | {} | {} | {} | {} | {} |\n",
                    q.name,
                    code.window,
                    steps.join(" "),
                    code.vector,
                    cpu.join(" | "),
                    gpu.join(" | "),
                );
                out!("{line}")?;
                text += &line;
            }
        }
        if let Some(path) = &self.out {
            write(path, &text)?;
        }
        Ok(())
    }

    fn measure(&self, q: &Quantizer, code: &Code, on: Option<&Executor>) -> Result<(Option<Cpu>, Option<Gpu>), Error> {
        let (len, steps) = (code.block.len() as usize, code.steps_per_block() as usize);
        let trellis = (self.only != Some(Only::Gpu)).then(|| Trellis::new(code));
        let at_once = trellis.as_ref().map_or(1, Trellis::blocks_at_once);
        let blocks = self.blocks.next_multiple_of(at_once).max(at_once);
        let samples = Gaussian::new(0xe9c0).samples(blocks * len);
        let (cpu, windows) = trellis.map(|t| Self::cpu(q, code, &t, &samples)).transpose()?.unzip();
        let gpu = |on: &Executor| -> Result<Gpu, Error> {
            let device = DeviceTrellis::new(on, code)?;
            let count = self.gpu_blocks.max(blocks).next_multiple_of(device.blocks_at_once());
            let many: Vec<f32> = samples.iter().copied().cycle().take(count * len).collect();
            let start = Instant::now();
            let (found, seconds) = device.encode(&many)?;
            let all = start.elapsed().as_secs_f64();
            let expected = windows.iter().flatten().cycle();
            if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
                let (block, step) = (at / steps, at % steps);
                return Err(format!("{}: the GPU's window {step} of block {block} differs", q.name).into());
            }
            Ok(Gpu { kernel: many.len() as f64 / seconds, all: many.len() as f64 / all })
        };
        Ok((cpu, on.map(gpu).transpose()?))
    }

    /// The CPU's speed, and the windows of all samples.
    fn cpu(q: &Quantizer, code: &Code, trellis: &Trellis, samples: &[f32]) -> Result<(Cpu, Vec<u32>), Error> {
        let (len, steps, at_once) = (trellis.block_len(), trellis.steps(), trellis.blocks_at_once());
        let blocks = samples.len() / len;
        let plain = Plain::with_length(code, len);
        let start = Instant::now();
        let first = plain.encode(&samples[..len]);
        let plain = len as f64 / start.elapsed().as_secs_f64();

        let encode = |scratch: &mut Scratch, windows: &mut [u32]| {
            let parts = samples.chunks(len * at_once).zip(windows.chunks_mut(steps * at_once));
            parts.for_each(|(samples, windows)| trellis.encode(samples, windows, scratch));
        };
        let mut windows = vec![0; blocks * steps];
        let mut scratch = Scratch::default();
        // Memory that is fresh would be timed too.
        trellis.encode(&samples[..len], &mut windows[..steps], &mut scratch);
        let start = Instant::now();
        encode(&mut scratch, &mut windows);
        let core = samples.len() as f64 / start.elapsed().as_secs_f64();
        if windows[..steps] != first {
            return Err(format!("{}: the plain loop and the fast encoder differ", q.name).into());
        }
        drop(scratch);
        let threads = rayon::current_num_threads();
        let start = Instant::now();
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
            encode(&mut Scratch::default(), &mut vec![0; blocks * steps]);
        });
        let cores = (samples.len() * threads) as f64 / start.elapsed().as_secs_f64();
        Ok((Cpu { plain, core, cores }, windows))
    }
}

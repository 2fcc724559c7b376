//! `qp bench engine`: a whole model, of given shapes and random weights, from the first token to full batches.

mod made;
mod report;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use qp_codegen::cuda;
use qp_codegen::kernels::grouped::layout::Relaid;
use qp_codegen::layout::Packed;

use self::made::Noise;
use self::report::{ALL, Decode, Kind, Memory, Prompt, Report, Start};
use super::shapes::ModelArgs;
use super::{ROTATE, kernels, rounded};
use crate::checkpoint::Checkpoint;
use crate::cli::Error;
use crate::cli::device::{Device, open};
use crate::cli::output::{out, outln, write};
use crate::device::{DeviceError, Executor};
use crate::engine::Precision;
use crate::engine::cuda::layout::{Form, Layout};
use crate::engine::cuda::lower::{self, Launch, Pick, Wanted};
use crate::engine::cuda::matrix::Matrix;
use crate::engine::cuda::{CudaEngine, Needs};
use crate::engine::{Chunk, Engine, Logits, PAGE, Room};
use crate::jit;
use crate::model::{Config, Weights, arch};

/// Time a whole model on a GPU: tokens a second for several sequences at several contexts, prompts, first tokens of fresh
/// processes, and where a step's time goes.
///
/// The model has random weights, made on the device, so nothing is downloaded. With --save it is also written as a
/// checkpoint, and opening that is timed: from the page cache, if it fits there.
#[derive(Args)]
pub struct EngineBench {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences of a step.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    sequences: Vec<usize>,
    /// Tokens of each sequence before the step.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192,32768")]
    contexts: Vec<usize>,
    /// Tokens of prompts.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192,32768")]
    prompts: Vec<usize>,
    /// Steps that are timed together.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Bits of a number of keys and values: 8 or 16.
    #[arg(long, default_value_t, value_name = "BITS")]
    cache_bits: Precision,
    /// Write the model as a checkpoint into this folder, if it is not there, and time opening it.
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cuda")]
    device: Device,
    /// Also write the tables to this file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also write the results as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only time a start, and print it as JSON; from the checkpoint, if it is saved.
    #[arg(long, hide = true)]
    start: bool,
}

/// Runs, of which the fastest counts.
const ROUNDS: usize = 3;
/// Steps before those that are timed: from then on each finds the next one launched, and none waits for one that was launched
/// in vain.
const LEAD: usize = 2;
/// Tokens of the prompt before a first token.
const SHORT: usize = 11;
/// Sizes of steps whose launches are timed by kind.
const KINDS: [u32; 4] = [1, 8, 64, 2048];
/// Starts with a filled cache, of which the fastest counts.
const STARTS: usize = 2;

impl EngineBench {
    /// Runs it.
    ///
    /// # Errors
    /// No device, a model or plan that cannot be read, a failing device.
    pub(super) fn run(self) -> Result<(), Error> {
        if self.start {
            outln!("{}", serde_json::to_string(&self.start()?)?)?;
            return Ok(());
        }
        let report = self.measure()?;
        let text = report.text();
        out!("{text}")?;
        if let Some(path) = &self.out {
            write(path, &text)?;
        }
        if let Some(path) = &self.json {
            write(path, &(serde_json::to_string_pretty(&report)? + "\n"))?;
        }
        Ok(())
    }

    fn open(&self) -> Result<Executor, Error> {
        Ok(open(self.device)?.ok_or("the engine of the CPU has no launches: choose --device cuda or interpreter")?)
    }

    fn measure(&self) -> Result<Report, Error> {
        let layout = self.model.layout(self.cache_bits)?;
        if let Some(dir) = self.save.as_ref().filter(|dir| !dir.exists()) {
            Noise::new().save(dir, &self.model.config_text()?, &layout)?;
        }
        // Before this process takes the GPU's memory.
        let starts = self.starts()?;
        let on = self.open()?;
        let before = on.free_memory()?.map(|m| m.0);
        let noise = Noise::new();
        let matrix = |m| noise.matrix(&on, &layout, m);
        let matrices: Vec<Matrix> = layout.matrices.iter().map(matrix).collect::<Result<_, DeviceError>>()?;
        let room = self.room(&layout, on.free_memory()?.map(|m| m.0 as u64));
        let mut next = matrices.iter().cloned();
        let mut engine =
            CudaEngine::made(on.clone(), layout.clone(), room, |_, _| Ok(next.next().expect("a matrix each")))?;
        let needs = Needs::of(&layout, room);
        let mut decode = Vec::new();
        for &context in &self.contexts {
            for &sequences in &self.sequences {
                let fits = sequences * pages(context + usize::from(self.steps)) <= room.pages;
                let seconds = fits.then(|| self.decode(&mut engine, sequences, context)).transpose()?;
                decode.push(Decode { sequences, context, seconds: seconds.map(|s| rounded(s, 1e7)) });
            }
        }
        let mut prompts = Vec::new();
        for &tokens in &self.prompts {
            let times = (pages(tokens) <= room.pages).then(|| prompt(&mut engine, tokens)).transpose()?;
            let (first, seconds) = times.map(|(a, b)| (rounded(a, 1e7), rounded(b, 1e7))).unzip();
            prompts.push(Prompt { tokens, first, seconds });
        }
        let most = u32::try_from(engine.most_tokens()).unwrap_or(u32::MAX);
        let position = self.contexts.first().copied().unwrap_or(0).min(room.pages * PAGE - 1);
        let mut of_kinds = Vec::new();
        for tokens in KINDS.into_iter().filter(|t| *t <= most) {
            of_kinds.extend(kinds(&mut engine, &layout, &on.device(), tokens, position)?);
        }
        let after = on.free_memory()?.map(|m| m.0);
        let planned = needs.weights + needs.pages * needs.page + needs.step;
        let memory = Memory {
            weights: needs.weights,
            cache: needs.pages * needs.page,
            step: needs.step,
            other: before.zip(after).map(|(before, after)| ((before - after) as u64).saturating_sub(planned)),
        };
        let (read_bytes, weights) = read(&layout);
        let gpu = on.gpu().map(|gpu| gpu.name.clone());
        Ok(Report {
            quantizers: self.model.quantizers(),
            cache_bits: 8 * self.cache_bits.planes(),
            bits: rounded(read_bytes as f64 * 8.0 / weights as f64, 1e3),
            read_bytes,
            token_bytes: needs.page / PAGE as u64,
            bandwidth: gpu.as_ref().map(|_| kernels::bandwidth(&on, ROTATE)).transpose()?,
            device: gpu.unwrap_or_else(|| "the interpreter".to_owned()),
            memory,
            decode,
            prompts,
            kinds: of_kinds,
            starts,
        })
    }

    /// Room for all that is wanted, or for as much of it as fits `free` bytes.
    fn room(&self, layout: &Layout, free: Option<u64>) -> Room {
        let steps = usize::from(self.steps);
        let decode = self.contexts.iter().flat_map(|c| self.sequences.iter().map(move |s| (c + steps, *s)));
        let wanted: Vec<(usize, usize)> = decode.chain(self.prompts.iter().map(|p| (*p, 1))).collect();
        let context = wanted.iter().map(|w| w.0).max().unwrap_or(1).min(layout.program.context);
        let fits = |pages: usize| {
            let needs = Needs::of(layout, Room { context, pages, cache: self.cache_bits });
            // The matrices are there already.
            free.is_none_or(|free| needs.check(free + needs.weights).is_ok())
        };
        let all = wanted.iter().map(|(context, sequences)| sequences * pages(*context));
        Room { context, pages: all.filter(|p| fits(*p)).max().unwrap_or(1), cache: self.cache_bits }
    }

    /// Seconds of a step that gives each of some sequences its next token.
    fn decode(&self, engine: &mut CudaEngine, sequences: usize, context: usize) -> Result<f64, Error> {
        let steps = usize::from(self.steps);
        let own = pages(context + steps) as u32;
        let tables: Vec<Vec<u32>> = (0..sequences as u32).map(|s| (s * own..(s + 1) * own).collect()).collect();
        let mut tokens: Vec<u32> = (0..sequences as u32).map(|s| s % engine.vocab() as u32).collect();
        let mut run = |steps: usize| -> Result<f64, Error> {
            let mut start = Instant::now();
            for position in context.saturating_sub(LEAD)..context + steps {
                if position == context {
                    start = Instant::now();
                }
                let chunk = |(token, pages)| Chunk {
                    tokens: std::slice::from_ref(token),
                    position,
                    pages,
                    logits: Logits::Last,
                };
                let chunks: Vec<Chunk<'_>> = tokens.iter().zip(tables.iter().map(Vec::as_slice)).map(chunk).collect();
                let mut next = Vec::new();
                engine.best(&chunks, &mut next)?;
                tokens = next;
            }
            Ok(start.elapsed().as_secs_f64() / steps as f64)
        };
        // Kernels are made and the graph is recorded now.
        run(2.min(steps))?;
        (0..ROUNDS).try_fold(f64::INFINITY, |best, _| Ok(run(steps)?.min(best)))
    }

    /// A start in this process, which is fresh.
    fn start(&self) -> Result<Start, Error> {
        let start = Instant::now();
        let mut last = start;
        let mut lap = || std::mem::replace(&mut last, Instant::now()).elapsed().as_secs_f64();
        let room = Room { cache: self.cache_bits, ..Room::one((SHORT + 2).next_multiple_of(PAGE)) };
        let (mut engine, device, weights, engine_seconds) = match &self.save {
            Some(dir) => {
                // Both at once, as commands do it.
                let load = || -> Result<Weights, Error> {
                    let checkpoint = Checkpoint::open(dir)?;
                    checkpoint.check()?;
                    let program = Arc::new(arch::program(&Config::read(dir)?));
                    Ok(Weights::load(&program, &checkpoint)?)
                };
                let (on, device, weights) = std::thread::scope(|scope| {
                    let on = scope.spawn(|| Ok::<_, Error>((self.open()?, Instant::now())));
                    let weights = load();
                    let (on, opened) = on.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                    Ok::<_, Error>((on, (opened - start).as_secs_f64(), weights?))
                })?;
                let read = (lap() - device).max(0.0);
                let engine = CudaEngine::new(on, &weights, room)?;
                (engine, device, read, lap())
            }
            None => {
                let on = self.open()?;
                let device = lap();
                let layout = self.model.layout(self.cache_bits)?;
                let noise = Noise::new();
                let matrices =
                    layout.matrices.iter().map(|m| noise.matrix(&on, &layout, m)).collect::<Result<Vec<_>, _>>()?;
                on.synchronize()?;
                lap();
                let mut next = matrices.into_iter();
                let engine = CudaEngine::made(on, layout, room, |_, _| Ok(next.next().expect("a matrix each")))?;
                (engine, device, 0.0, lap())
            }
        };
        let tokens: Vec<u32> = (1..=SHORT as u32).collect();
        let mut best = Vec::new();
        let logits = Logits::Last;
        engine.best(&[Chunk { tokens: &tokens, position: 0, pages: &[0], logits }], &mut best)?;
        let first = lap();
        engine.best(&[Chunk { tokens: &best.clone(), position: SHORT, pages: &[0], logits }], &mut best)?;
        let second = lap();
        Ok(Start { what: String::new(), device, weights, engine: engine_seconds, first, second })
    }

    /// Starts of fresh processes: with an empty cache of kernels, then with what that left.
    fn starts(&self) -> Result<Vec<Start>, Error> {
        let folder = tempfile::tempdir()?;
        let once = || -> Result<Start, Error> {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["bench", "engine", "--start"]).args(self.again()).env(jit::CACHE_VARIABLE, folder.path());
            let output = command.output()?;
            let failed = || format!("a process of its own failed: {}", String::from_utf8_lossy(&output.stderr).trim());
            serde_json::from_slice(&output.stdout).map_err(|_| failed().into())
        };
        let what = if self.save.is_some() { "a checkpoint" } else { "weights made up" };
        let cold = Start { what: format!("{what}, no kernel in the cache"), ..once()? };
        let mut warm = once()?;
        for _ in 1..STARTS {
            let other = once()?;
            warm = if other.all() < warm.all() { other } else { warm };
        }
        Ok(vec![cold, Start { what: format!("{what}, all kernels in the cache"), ..warm }])
    }

    /// The options that another process needs to do the same.
    fn again(&self) -> Vec<std::ffi::OsString> {
        let ModelArgs { shapes, model, spec, plan } = &self.model;
        let mut out: Vec<std::ffi::OsString> = Vec::new();
        let mut add = |option: &str, value: std::ffi::OsString| out.extend([option.into(), value]);
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map_or_else(Default::default, |v| v.get_name().to_owned())
        };
        use clap::ValueEnum;
        match model {
            Some(model) => add("--model", model.into()),
            None => add("--shapes", name(&|| shapes.to_possible_value()).into()),
        }
        add("--device", name(&|| self.device.to_possible_value()).into());
        spec.iter().for_each(|s| add("--spec", s.into()));
        plan.iter().for_each(|p| add("--plan", p.into()));
        add("--cache-bits", self.cache_bits.to_string().into());
        self.save.iter().for_each(|p| add("--save", p.into()));
        out
    }
}

/// Pages of so many tokens.
fn pages(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// Seconds of a prompt: of the first of its length, and of later ones.
fn prompt(engine: &mut CudaEngine, tokens: usize) -> Result<(f64, f64), Error> {
    let table: Vec<u32> = (0..pages(tokens) as u32).collect();
    let vocab = engine.vocab() as u32;
    let text: Vec<u32> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let mut run = || -> Result<f64, Error> {
        let start = Instant::now();
        let mut best = Vec::new();
        engine.best(&[Chunk { tokens: &text, position: 0, pages: &table, logits: Logits::Last }], &mut best)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let first = run()?;
    let later = (0..ROUNDS).try_fold(f64::INFINITY, |best, _| Ok::<_, Error>(run()?.min(best)))?;
    Ok((first, later))
}

/// The launches of a step of `tokens` tokens, by kind: each kind in a graph of its own, then all in one.
fn kinds(
    engine: &mut CudaEngine,
    layout: &Layout,
    device: &cuda::Device,
    tokens: u32,
    position: usize,
) -> Result<Vec<Kind>, Error> {
    let head = layout.program.nodes.len() - 1;
    let kind = |l: &Launch| if l.op.is_product() && l.node == head { "output layer" } else { l.op.kind() };
    let step = lower::step(layout, device, tokens, Wanted { rows: tokens.min(64), pick: Pick::Best });
    let mut names: Vec<(&'static str, usize)> = Vec::new();
    for launch in &step.launches {
        match names.iter_mut().find(|n| n.0 == kind(launch)) {
            Some(name) => name.1 += 1,
            None => names.push((kind(launch), 1)),
        }
    }
    let time = |(name, launches): (&'static str, usize)| {
        let seconds = engine.seconds(tokens, position, ROUNDS, &|l| kind(l) == name)?;
        Ok(Kind { tokens, kind: name.to_owned(), launches, seconds: rounded(seconds, 1e8) })
    };
    let mut all = names.into_iter().map(time).collect::<Result<Vec<Kind>, Error>>()?;
    let seconds = engine.seconds(tokens, position, ROUNDS, &|_| true)?;
    all.push(Kind { tokens, kind: ALL.to_owned(), launches: step.launches.len(), seconds: rounded(seconds, 1e8) });
    Ok(all)
}

/// Bytes of packed matrices that a step of one token reads, and their weights: of experts, as many as it goes through. Of an
/// embedding a row is looked up.
fn read(layout: &Layout) -> (u64, u64) {
    let multiplied = layout.matrices.iter().filter(|m| !layout.program.is_embedding(m.layers[0]));
    let sizes = multiplied.map(|m| {
        let weights = u64::from(m.shape.rows) * u64::from(m.shape.cols);
        let bytes = match &m.form {
            Form::Packed(q) => 4 * Packed::new(q, m.shape).words() as u64,
            Form::Grouped(terms) => Relaid::new(terms, m.shape).bytes(),
            Form::Dense(elem) => weights * u64::from(elem.bytes()),
            Form::Shared => 0,
        };
        let share = layout.program.share(m.layers[0]);
        ((bytes as f64 * share) as u64, (weights as f64 * share) as u64)
    });
    sizes.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
}

//! `qp bench attention`: the speed of attention over pages, and of putting keys and values into them.

use std::path::PathBuf;

use clap::Args;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::attend::{Append, Attend, Cache, PAGE, few, many};
use serde::Serialize;

use super::{ROTATE, rounded};
use crate::check::synthetic::Random;
use crate::cli::Error;
use crate::cli::output::{outln, write};
use crate::device::attend::{AppendInputs, AppendKernel, AttendKernel, Queries, Tokens};
use crate::device::ops::Faults;
use crate::device::{Buffer, DeviceError, Executor};

/// Time attention over pages on a GPU, one layer of it in a chain of layers.
///
/// Steps of few tokens are given as TOKENS@CONTEXT, each token of a sequence of its own; prompts by their length, which pass
/// in steps of 2048 tokens. Each layer of the chain has a cache of its own, so that none is found in the L2 cache. `GB/s`
/// counts the keys and values that are seen, each once a token (steps) or a step (prompts); `TOP/s` the multiplications and
/// additions of the scores and sums, as one product each, whatever the planes.
#[derive(Args)]
pub struct AttentionBench {
    /// Heads of queries.
    #[arg(long, default_value_t = 32)]
    heads: u32,
    /// Heads of keys and values.
    #[arg(long, default_value_t = 8)]
    kv_heads: u32,
    /// Columns of a head.
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    /// Bytes of a number in the cache: 2 or 1.
    #[arg(long, value_delimiter = ',', default_value = "2,1", value_parser = clap::value_parser!(u32).range(1..=2))]
    planes: Vec<u32>,
    /// Steps of few tokens.
    #[arg(long, value_delimiter = ',', value_parser = step,
          default_value = "1@128,1@1024,1@4096,1@8192,1@32768,8@1024,8@8192,64@1024")]
    steps: Vec<(u32, u32)>,
    /// Prompts.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192,32768")]
    prompts: Vec<u32>,
    /// Layers of the model whose time is told for prompts.
    #[arg(long, default_value_t = 32)]
    layers: u32,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn step(text: &str) -> Result<(u32, u32), String> {
    let (tokens, context) = text.split_once('@').ok_or("tokens@context, as in 8@1024")?;
    let number = |s: &str| s.parse().ok().filter(|n| *n > 0).ok_or(format!("`{s}` is no positive number"));
    Ok((number(tokens)?, number(context)?))
}

/// Launches of a graph, at least.
const LAUNCHES: usize = 32;
/// Runs of a graph, of which the fastest counts.
const ROUNDS: usize = 5;
/// Tokens of a step of a prompt.
const STEP: u32 = 2048;

/// What was measured.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    /// Bits of a number in the cache.
    bits: u32,
    tokens: u32,
    /// Positions that the last token sees.
    context: u32,
    /// Microseconds of a layer: of all steps of a prompt.
    us: f64,
    /// Keys and values read, 10^9 bytes a second.
    gb_per_s: f64,
    /// 10^12 operations a second.
    tops: f64,
    /// Registers of a thread, and bytes spilled.
    registers: u32,
    spilled: u32,
}

#[derive(Serialize)]
struct Results {
    gpu: String,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rows: Vec<Row>,
}

impl AttentionBench {
    /// Runs it.
    ///
    /// # Errors
    /// No GPU, a full one.
    pub fn run(self) -> Result<(), Error> {
        let on = Executor::cuda(self.gpu)?;
        let gpu = on.gpu().map(|gpu| gpu.name.clone()).unwrap_or_default();
        outln!("{gpu}; {} heads of {} on {} of keys and values", self.heads, self.head_dim, self.kv_heads)?;
        outln!(
            "{:>14} {:>4} {:>6} {:>7} {:>10} {:>7} {:>7} {:>9} {:>7}",
            "what",
            "bits",
            "tokens",
            "context",
            "us",
            "GB/s",
            "TOP/s",
            "registers",
            "spilled"
        )?;
        let mut rows = Vec::new();
        for &planes in &self.planes {
            let cache = Cache { kv_heads: self.kv_heads, head_dim: self.head_dim, planes };
            for &(tokens, context) in &self.steps {
                for row in measure_few(&on, self.heads, cache, tokens, context, ROTATE)? {
                    self.print(&row)?;
                    rows.push(row);
                }
            }
            for &prompt in &self.prompts {
                for row in measure_prompt(&on, self.heads, cache, prompt)? {
                    self.print(&row)?;
                    rows.push(row);
                }
            }
        }
        if let Some(path) = &self.json {
            let results = Results { gpu, heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim, rows };
            write(path, &(serde_json::to_string_pretty(&results)? + "\n"))?;
        }
        Ok(())
    }

    fn print(&self, row: &Row) -> Result<(), Error> {
        let Row { what, bits, tokens, context, us, gb_per_s, tops, registers, spilled } = row;
        let layers = if *tokens > few::MAX_TOKENS {
            format!("  {:.1} ms in {} layers", us * f64::from(self.layers) / 1e3, self.layers)
        } else {
            String::new()
        };
        outln!(
            "{what:>14} {bits:>4} {tokens:>6} {context:>7} {us:>10.2} {gb_per_s:>7.0} {tops:>7.0} {registers:>9} {spilled:>7}{layers}"
        )
    }
}

/// A cache of `pages` pages with random numbers of moderate scales in it.
fn random_cache(on: &Executor, cache: Cache, pages: u32) -> Result<Buffer<u8>, DeviceError> {
    let mut random = Random::of("cache");
    let mut page = Vec::with_capacity(cache.page_bytes() as usize);
    for _ in 0..cache.kv_heads {
        page.extend((0..cache.scales()).map(|_| random.word() as u8));
        for number in [0.02 / 128.0, -4.0, 16.0f32] {
            (0..PAGE).for_each(|_| page.extend(number.to_le_bytes()));
        }
    }
    on.upload(&page.repeat(pages as usize))
}

/// Sequences of `context` positions each, of which a step has the last `tokens` of each.
fn tokens(on: &Executor, sequences: u32, tokens: u32, context: u32, tiles: &[i32]) -> Result<Tokens, DeviceError> {
    let pages = context.div_ceil(PAGE);
    let all = || (0..sequences).flat_map(|s| (context - tokens..context).map(move |p| (s, p)));
    // Pages of sequences alternate.
    let page = |s: u32, i: u32| (i * sequences + s).cast_signed();
    let slot = |(s, p): (u32, u32)| page(s, p / PAGE) * PAGE as i32 + (p % PAGE) as i32;
    let table: Vec<i32> = (0..sequences).flat_map(|s| (0..pages).map(move |i| page(s, i))).collect();
    Ok(Tokens {
        positions: on.upload(&all().map(|(_, p)| p.cast_signed()).collect::<Vec<_>>())?,
        sequence: on.upload(&all().map(|(s, _)| s.cast_signed()).collect::<Vec<_>>())?,
        slots: on.upload(&all().map(slot).collect::<Vec<_>>())?,
        table: on.upload(&table)?,
        tiles: on.upload(tiles)?,
        stride: pages.cast_signed(),
    })
}

/// Random rounded queries of a step.
fn queries(on: &Executor, op: &Attend) -> Result<Queries, DeviceError> {
    let mut random = Random::of("queries");
    let rows = (op.tokens * op.heads) as usize;
    let planes: Vec<i8> = (0..rows * 2 * op.cache.columns() as usize).map(|_| random.word() as i8).collect();
    Ok(Queries { planes: on.upload(&planes)?, scale: on.upload(&vec![2e-4f32; rows])? })
}

/// The operations of `pairs` of a query and a position it sees, of all heads.
fn operations(op: &Attend, pairs: f64) -> f64 {
    pairs * f64::from(op.heads) * f64::from(op.cache.head_dim) * 4.0
}

/// Times a step of few tokens: its append, and its attention.
fn measure_few(
    on: &Executor,
    heads: u32,
    cache: Cache,
    count: u32,
    context: u32,
    rotate: usize,
) -> Result<Vec<Row>, Error> {
    let op = Attend { cache, heads, tokens: count, window: None, soft_cap: None, sinks: false };
    let pages = count * context.div_ceil(PAGE);
    let bytes = pages as usize * cache.page_bytes() as usize;
    let first = random_cache(on, cache, pages)?;
    let mut caches = vec![first];
    while caches.len() * bytes < rotate && caches.len() < LAUNCHES {
        caches.push(on.copy(&caches[0])?);
    }
    let step = tokens(on, count, 1, context, &[0, 0])?;
    let mut queries = queries(on, &op)?;
    let sinks = on.zeroed(1)?;
    let mut faults = on.zeroed::<i32>(1)?;
    let mut y = on.zeroed((count * heads * cache.head_dim) as usize)?;
    let launches = LAUNCHES.next_multiple_of(caches.len());

    let mut kernel = AttendKernel::few(on, &op)?;
    let mut graph = on.record();
    for i in 0..launches {
        let faults = Faults { faults: &mut faults, layer: 0 };
        kernel.record(&mut graph, (&queries, &sinks), &step, &caches[i % caches.len()], &mut y, faults)?;
    }
    let graph = graph.finish()?;
    let seconds = on.time_best(ROUNDS, || graph.launch())? / launches as f64;
    let usage = kernel.loaded().usage().unwrap_or_default();
    let seen = f64::from(count) * f64::from(context);
    let read = seen * f64::from(cache.page_bytes()) / f64::from(PAGE);
    let row = |what: &str, seconds: f64, bytes: f64, operations: f64| Row {
        what: what.into(),
        bits: 8 * cache.planes,
        tokens: count,
        context,
        us: rounded(seconds * 1e6, 1e2),
        gb_per_s: rounded(bytes / seconds / 1e9, 1.0),
        tops: rounded(operations / seconds / 1e12, 1e1),
        registers: usage.registers,
        spilled: usage.spill_stores,
    };
    let attend = row("attend", seconds, read, operations(&op, seen));
    let mut step = append_chain(on, &op, context, &step)?;
    let seconds = step.time(on, &mut caches, &mut queries, &mut faults)?;
    let append = Row { registers: step.registers, spilled: step.spilled, ..row("append", seconds, 0.0, 0.0) };
    Ok(vec![append, attend])
}

/// The append of a step, ready to be timed.
struct AppendChain<'a> {
    kernel: AppendKernel,
    qkv: Buffer<f32>,
    turns: [Buffer<f32>; 2],
    nothing: Buffer<f32>,
    tokens: &'a Tokens,
    registers: u32,
    spilled: u32,
}

fn append_chain<'a>(
    on: &Executor,
    op: &Attend,
    context: u32,
    tokens: &'a Tokens,
) -> Result<AppendChain<'a>, DeviceError> {
    let Cache { kv_heads, head_dim, .. } = op.cache;
    let stride = (op.heads + 2 * kv_heads) * head_dim;
    let span = |heads: u32| Span { first: heads * head_dim, stride };
    let append = Append {
        cache: op.cache,
        heads: op.heads,
        tokens: op.tokens,
        q: span(0),
        k: span(op.heads),
        v: span(op.heads + kv_heads),
        rotary: head_dim,
        interleaved: false,
        norm: None,
        scale: 1.0,
    };
    let kernel = AppendKernel::load(on, &append)?;
    let usage = kernel.loaded().usage().unwrap_or_default();
    let angles = vec![0.5f32; (context * head_dim / 2) as usize];
    Ok(AppendChain {
        kernel,
        qkv: on.upload(&Random::of("qkv").values((op.tokens * stride) as usize, 1.0))?,
        turns: [on.upload(&angles)?, on.upload(&angles)?],
        nothing: on.zeroed(1)?,
        tokens,
        registers: usage.registers,
        spilled: usage.spill_stores,
    })
}

impl AppendChain<'_> {
    /// Seconds of a launch in a chain of them over several caches.
    fn time(
        &mut self,
        on: &Executor,
        caches: &mut [Buffer<u8>],
        queries: &mut Queries,
        faults: &mut Buffer<i32>,
    ) -> Result<f64, DeviceError> {
        let inputs = AppendInputs {
            q: &self.qkv,
            k: &self.qkv,
            v: &self.qkv,
            norms: [&self.nothing, &self.nothing],
            turns: self.turns.each_ref(),
        };
        let mut graph = on.record();
        for i in 0..LAUNCHES {
            let cache = &mut caches[i % caches.len().max(1)];
            let faults = Faults { faults: &mut *faults, layer: 0 };
            self.kernel.record(&mut graph, inputs, self.tokens, cache, queries, faults)?;
        }
        let graph = graph.finish()?;
        Ok(on.time_best(ROUNDS, || graph.launch())? / LAUNCHES as f64)
    }
}

/// Times the attention of a prompt of one sequence, step by step, and the append of its last step.
fn measure_prompt(on: &Executor, heads: u32, cache: Cache, prompt: u32) -> Result<Vec<Row>, Error> {
    let count = prompt.min(STEP);
    let op = Attend { cache, heads, tokens: count, window: None, soft_cap: None, sinks: false };
    let launch = many::Launch::choose(&op, &on.device());
    let len = launch.most_tiles(&op, 1);
    let mut caches = vec![random_cache(on, cache, prompt.div_ceil(PAGE))?];
    let mut queries = queries(on, &op)?;
    let sinks = on.zeroed(1)?;
    let mut faults = on.zeroed::<i32>(1)?;
    let mut y = on.zeroed((count * heads * cache.head_dim) as usize)?;
    let mut kernel = AttendKernel::many(on, &op, len)?;
    let (mut seconds, mut pairs, mut read) = (0.0, 0.0, 0.0);
    for end in (count..=prompt).step_by(count as usize) {
        let run = many::Run { first: 0, tokens: count, position: end - count };
        let tiles = many::tiles(&[run], launch.tile_tokens(&op), len).ok_or("tiles of a prompt")?;
        let step = tokens(on, 1, count, end, &tiles)?;
        let mut graph = on.record();
        const EACH: usize = 4;
        for _ in 0..EACH {
            let faults = Faults { faults: &mut faults, layer: 0 };
            kernel.record(&mut graph, (&queries, &sinks), &step, &caches[0], &mut y, faults)?;
        }
        let graph = graph.finish()?;
        seconds += on.time_best(3, || graph.launch())? / EACH as f64;
        pairs += (f64::from(end) - f64::from(count - 1) / 2.0) * f64::from(count);
        read += f64::from(end) * f64::from(cache.page_bytes()) / f64::from(PAGE);
    }
    let usage = kernel.loaded().usage().unwrap_or_default();
    let row = |what: &str, seconds: f64, bytes: f64, operations: f64| Row {
        what: what.into(),
        bits: 8 * cache.planes,
        tokens: prompt,
        context: prompt,
        us: rounded(seconds * 1e6, 1e2),
        gb_per_s: rounded(bytes / seconds / 1e9, 1.0),
        tops: rounded(operations / seconds / 1e12, 1e1),
        registers: usage.registers,
        spilled: usage.spill_stores,
    };
    let attend = row("prompt", seconds, read, operations(&op, pairs));
    let step = tokens(on, 1, count, prompt, &[0, 0])?;
    let mut append = append_chain(on, &op, prompt, &step)?;
    let seconds = append.time(on, &mut caches, &mut queries, &mut faults)?;
    let append =
        Row { registers: append.registers, spilled: append.spilled, tokens: count, ..row("append", seconds, 0.0, 0.0) };
    Ok(vec![append, attend])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_prompts_are_timed() {
        let on = Executor::interpreter();
        let cache = Cache { kv_heads: 1, head_dim: 32, planes: 2 };
        let rows = measure_few(&on, 2, cache, 2, 70, 1).unwrap_or_else(|e| panic!("{e}"));
        let names: Vec<_> = rows.iter().map(|r| (r.what.as_str(), r.tokens, r.context)).collect();
        assert_eq!(names, [("append", 2, 70), ("attend", 2, 70)]);
        let rows = measure_prompt(&on, 2, cache, 66).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((rows[1].what.as_str(), rows[1].tokens), ("prompt", 66));
        assert_eq!(step("8@1024"), Ok((8, 1024)));
        assert!(step("8").is_err() && step("0@3").is_err());
    }
}

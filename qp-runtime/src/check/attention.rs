//! Attention over pages on a device, compared with its twin on the CPU to the bit: what is put into the cache, rounded
//! queries, and results of steps of few and of many tokens, however the work is cut.

use qp_codegen::kernels::Span;
use qp_codegen::kernels::attend::reference::{self, Norms, Query, Token};
use qp_codegen::kernels::attend::{Append, Attend, Cache, PAGE, few, many};
use rayon::prelude::*;

use super::synthetic::Random;
use super::{Failure, same, same_floats};
use crate::device::attend::{AppendInputs, AppendKernel, AttendKernel, Queries, Tokens};
use crate::device::ops::Faults;
use crate::device::{DeviceError, Executor};

/// Attention of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Heads of queries.
    pub heads: u32,
    /// The cache.
    pub cache: Cache,
    /// Columns that are turned.
    pub rotary: u32,
    /// Whether neighbours turn together.
    pub interleaved: bool,
    /// Epsilon of the norms of queries and keys.
    pub norm: Option<f32>,
    /// Positions seen.
    pub window: Option<u32>,
    /// Cap of scores.
    pub soft_cap: Option<f32>,
    /// Whether heads have sinks.
    pub sinks: bool,
    /// Tokens of each sequence; the last few of them are those of the step.
    pub lengths: &'static [u32],
    /// Tokens of each sequence in the step of many tokens, at most.
    pub prompt: u32,
}

/// What is compared; `small` for the interpreter.
pub fn shapes(small: bool) -> Vec<Shape> {
    let of = |heads, kv_heads, head_dim, planes, lengths: &'static [u32]| Shape {
        heads,
        cache: Cache { kv_heads, head_dim, planes },
        rotary: head_dim,
        interleaved: false,
        norm: None,
        window: None,
        soft_cap: None,
        sinks: false,
        lengths,
        prompt: if small { 20 } else { 200 },
    };
    if small {
        return vec![
            of(4, 1, 128, 2, &[130, 1]),
            Shape { sinks: true, window: Some(40), rotary: 16, ..of(3, 3, 64, 1, &[90, 20]) },
            Shape { rotary: 32, interleaved: true, ..of(2, 1, 64, 2, &[70]) },
        ];
    }
    let long: &[u32] = &[1, 64, 65, 300, 2049, 9000, 130];
    vec![
        of(32, 8, 128, 2, long),
        of(32, 8, 128, 1, long),
        of(9, 3, 64, 2, long),
        of(14, 2, 64, 2, &[700, 3000]),
        of(16, 16, 96, 2, &[700, 20]),
        Shape { norm: Some(1e-6), rotary: 20, ..of(8, 1, 80, 2, &[500, 90]) },
        Shape { norm: Some(1e-6), ..of(64, 4, 128, 2, &[1500, 64]) },
        Shape { rotary: 64, interleaved: true, ..of(32, 2, 128, 2, &[300, 20]) },
        Shape { window: Some(1000), soft_cap: Some(50.0), ..of(16, 8, 256, 2, &[2600, 40]) },
        Shape { window: Some(128), sinks: true, ..of(64, 8, 64, 2, &[700, 40]) },
    ]
}

/// Tokens of a step: sequence and position; `None` fills up.
type Step = Vec<Option<(usize, u32)>>;

/// The sequences of a shape, and what the CPU makes of them.
struct Cpu {
    shape: Shape,
    /// By sequence, tokens × (queries, keys, values).
    qkv: Vec<Vec<f32>>,
    norms: [Vec<f32>; 2],
    sinks: Vec<f32>,
    /// Cosines and sines.
    turns: [Vec<f32>; 2],
    /// By sequence.
    pages: Vec<Vec<i32>>,
    /// With all tokens in it, and rubbish behind them.
    cache: Vec<u8>,
    /// By sequence and token: rounded queries and their scales.
    queries: Vec<Vec<(Vec<i8>, Vec<f32>)>>,
}

impl Cpu {
    fn new(name: &str, shape: Shape) -> Cpu {
        let mut random = Random::of(name);
        let layout = shape.cache;
        let (d, columns) = (layout.head_dim as usize, layout.columns() as usize);
        let width = (shape.heads + 2 * layout.kv_heads) as usize * d;
        let longest = shape.lengths.iter().copied().max().unwrap_or(1) as usize;
        let half = shape.rotary as usize / 2;
        let angle = |i: usize| (i / half) as f32 * 0.7f32.powi((i % half) as i32 % 40);
        let turns = [f32::cos, f32::sin].map(|f| (0..longest * half).map(|i| f(angle(i))).collect::<Vec<f32>>());
        // Rough, but no tighter than a model's.
        let qkv: Vec<Vec<f32>> = shape.lengths.iter().map(|n| random.values(*n as usize * width, 3.0)).collect();
        let norms = [0, 1].map(|_| random.values(d, 2.0));
        let sinks = random.values(shape.heads as usize, 3.0);
        let mut next = 0..;
        let mut pages: Vec<Vec<i32>> = shape.lengths.iter().map(|_| Vec::new()).collect();
        // Pages of sequences alternate.
        for page in 0..longest.div_ceil(PAGE as usize) as u32 {
            for (pages, _) in pages.iter_mut().zip(shape.lengths).filter(|(_, n)| page * PAGE < **n) {
                pages.extend(next.next());
            }
        }
        let mut cpu = Cpu {
            cache: (0..next.start as usize * layout.page_bytes() as usize).map(|i| (i % 120) as u8).collect(),
            shape,
            qkv,
            norms,
            sinks,
            turns,
            pages,
            queries: Vec::new(),
        };
        let op = cpu.append_op(1);
        for (i, length) in shape.lengths.iter().enumerate() {
            let mut of_sequence = Vec::new();
            for position in 0..*length {
                let mut queries = vec![0; shape.heads as usize * 2 * columns];
                let mut scales = vec![0.0; shape.heads as usize];
                let mut cache = std::mem::take(&mut cpu.cache);
                let norms = Norms { q: &cpu.norms[0], k: &cpu.norms[1] };
                reference::append(&op, &cpu.token(i, position), norms, &mut cache, &mut queries, &mut scales);
                cpu.cache = cache;
                of_sequence.push((queries, scales));
            }
            cpu.queries.push(of_sequence);
        }
        cpu
    }

    /// Numbers of a token: queries, keys, values.
    fn width(&self) -> usize {
        ((self.shape.heads + 2 * self.shape.cache.kv_heads) * self.shape.cache.head_dim) as usize
    }

    fn append_op(&self, tokens: u32) -> Append {
        let Shape { heads, cache, rotary, interleaved, norm, .. } = self.shape;
        let span = |heads: u32| Span { first: heads * cache.head_dim, stride: self.width() as u32 };
        Append {
            cache,
            heads,
            tokens,
            q: span(0),
            k: span(heads),
            v: span(heads + cache.kv_heads),
            rotary,
            interleaved,
            norm,
            scale: 1.0 / (cache.head_dim as f32).sqrt(),
        }
    }

    fn attend_op(&self, tokens: u32) -> Attend {
        let Shape { heads, cache, window, soft_cap, sinks, .. } = self.shape;
        Attend { cache, heads, tokens, window, soft_cap, sinks }
    }

    fn slot(&self, sequence: usize, position: u32) -> i32 {
        self.pages[sequence][(position / PAGE) as usize] * PAGE as i32 + (position % PAGE) as i32
    }

    fn token(&self, sequence: usize, position: u32) -> Token<'_> {
        let (width, half) = (self.width(), self.shape.rotary as usize / 2);
        let row = &self.qkv[sequence][position as usize * width..][..width];
        let op = self.append_op(1);
        let (k, v) = (op.k.first as usize, op.v.first as usize);
        let [cos, sin] = self.turns.each_ref().map(|t| &t[position as usize * half..][..half]);
        Token { q: &row[..k], k: &row[k..v], v: &row[v..], cos, sin, slot: self.slot(sequence, position) as usize }
    }

    /// The results of a step.
    fn attend(&self, step: &Step) -> Vec<f32> {
        let (d, columns) = (self.shape.cache.head_dim as usize, self.shape.cache.columns() as usize);
        let heads = self.shape.heads as usize;
        let op = self.attend_op(step.len() as u32);
        let mut y = vec![0f32; step.len() * heads * d];
        y.par_chunks_exact_mut(d).enumerate().for_each(|(i, y)| {
            let (Some((sequence, position)), head) = (step[i / heads], i % heads) else { return };
            let (planes, scales) = &self.queries[sequence][position as usize];
            let query = Query {
                planes: &planes[head * 2 * columns..][..2 * columns],
                scale: scales[head],
                position,
                pages: &self.pages[sequence],
                kv_head: head as u32 / op.group(),
                sink: self.sinks[head],
            };
            reference::attend(&op, &self.cache, &query, y);
        });
        y
    }

    /// What the kernels read of a step.
    fn tokens(&self, on: &Executor, step: &Step, tiles: &[i32]) -> Result<Tokens, DeviceError> {
        let of = |f: &dyn Fn((usize, u32)) -> i32, none: i32| -> Vec<i32> {
            step.iter().map(|t| t.map_or(none, f)).collect()
        };
        let stride = self.pages.iter().map(Vec::len).max().unwrap_or(1);
        let mut table = vec![-1; self.pages.len() * stride];
        for (row, pages) in table.chunks_exact_mut(stride).zip(&self.pages) {
            row[..pages.len()].copy_from_slice(pages);
        }
        Ok(Tokens {
            positions: on.upload(&of(&|(_, p)| p.cast_signed(), 0))?,
            sequence: on.upload(&of(&|(i, _)| i as i32, -1))?,
            slots: on.upload(&of(&|(i, p)| self.slot(i, p), -1))?,
            table: on.upload(&table)?,
            tiles: on.upload(tiles)?,
            stride: stride as i32,
        })
    }

    /// A step's queries, as they are appended.
    fn queries(&self, on: &Executor, step: &Step) -> Result<Queries, DeviceError> {
        let (mut planes, mut scale) = (Vec::new(), Vec::new());
        let columns = self.shape.cache.columns() as usize;
        for token in step {
            match token {
                Some((sequence, position)) => {
                    let (p, s) = &self.queries[*sequence][*position as usize];
                    planes.extend_from_slice(p);
                    scale.extend_from_slice(s);
                }
                None => {
                    planes.resize(planes.len() + self.shape.heads as usize * 2 * columns, 0);
                    scale.resize(scale.len() + self.shape.heads as usize, 0.0);
                }
            }
        }
        Ok(Queries { planes: on.upload(&planes)?, scale: on.upload(&scale)? })
    }

    /// Compares a step's append: the cache before it has nothing of the step's tokens.
    fn same_append(&self, on: &Executor, what: &str, step: &Step) -> Result<(), Failure> {
        let layout = self.shape.cache;
        let width = self.width();
        let mut before = self.cache.clone();
        let mut qkv = vec![f32::NAN; step.len() * width];
        for (row, token) in qkv.chunks_exact_mut(width).zip(step) {
            let Some((sequence, position)) = *token else { continue };
            row.copy_from_slice(&self.qkv[sequence][position as usize * width..][..width]);
            let slot = self.slot(sequence, position) as u32;
            let page = &mut before[(slot / PAGE * layout.page_bytes()) as usize..][..layout.page_bytes() as usize];
            for piece in page.chunks_exact_mut(layout.piece_bytes() as usize) {
                for at in
                    (0..layout.columns()).flat_map(|c| [layout.key(0, slot % PAGE, c), layout.value(0, slot % PAGE, c)])
                {
                    piece[at as usize] ^= 0x5a;
                }
            }
        }
        let op = self.append_op(step.len() as u32);
        let run = || {
            let kernel = AppendKernel::load(on, &op)?;
            let mut cache = on.upload(&before)?;
            let mut queries = Queries::new(on, &self.attend_op(step.len() as u32))?;
            let mut faults = on.zeroed::<i32>(3)?;
            let qkv = on.upload(&qkv)?;
            let norms = [on.upload(&self.norms[0])?, on.upload(&self.norms[1])?];
            let turns = [on.upload(&self.turns[0])?, on.upload(&self.turns[1])?];
            let inputs = AppendInputs { q: &qkv, k: &qkv, v: &qkv, norms: norms.each_ref(), turns: turns.each_ref() };
            let tokens = self.tokens(on, step, &[0, 0])?;
            kernel.launch(on, inputs, &tokens, &mut cache, &mut queries, Faults { faults: &mut faults, layer: 2 })?;
            Ok::<_, DeviceError>((cache.to_vec()?, queries.planes.to_vec()?, queries.scale.to_vec()?, faults.to_vec()?))
        };
        let what = format!("{what}: appended");
        let (cache, planes, scale, faults) = run().map_err(Failure::of(&what))?;
        same(&what, &cache, &self.cache, |v| u32::from(*v))?;
        let queries = self.queries(on, step).map_err(Failure::of(&what))?;
        let of = |e: DeviceError| Failure::of(&what)(e);
        same(&what, &planes, &queries.planes.to_vec().map_err(of)?, |v| *v as u32)?;
        same_floats(&what, &scale, &queries.scale.to_vec().map_err(of)?)?;
        same(&what, &faults, &[0, 0, 0], |v| v.cast_unsigned())
    }

    /// Compares the results of a step, computed twice by a kernel.
    fn same_results(
        &self,
        on: &Executor,
        what: &str,
        step: &Step,
        tiles: &[i32],
        load: impl FnOnce(&Attend) -> Result<AttendKernel, DeviceError>,
    ) -> Result<(), Failure> {
        let run = || {
            let mut kernel = load(&self.attend_op(step.len() as u32))?;
            let (cache, sinks) = (on.upload(&self.cache)?, on.upload(&self.sinks)?);
            let (queries, tokens) = (self.queries(on, step)?, self.tokens(on, step, tiles)?);
            let mut faults = on.zeroed::<i32>(3)?;
            let width = (self.shape.heads * self.shape.cache.head_dim) as usize;
            let mut y = on.upload(&vec![f32::NAN; step.len() * width])?;
            for _ in 0..2 {
                let faults = Faults { faults: &mut faults, layer: 2 };
                kernel.launch(on, (&queries, &sinks), &tokens, &cache, &mut y, faults)?;
            }
            Ok::<_, DeviceError>((y.to_vec()?, faults.to_vec()?))
        };
        let (y, faults) = run().map_err(Failure::of(what))?;
        same_floats(what, &y, &self.attend(step))?;
        same(what, &faults, &[0, 0, 0], |v| v.cast_unsigned())
    }
}

/// Compares what `on` appends and computes for a shape with what the CPU does. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn attention(on: &Executor, shape: Shape) -> Result<usize, Failure> {
    let Shape { heads, cache: Cache { kv_heads, head_dim, planes }, window, .. } = shape;
    let name =
        format!("attention of {heads} heads of {head_dim} on {kv_heads}, {} bits, window {window:?}", 8 * planes);
    let cpu = Cpu::new(&name, shape);
    let mut done = 0;

    let mut step: Step = shape.lengths.iter().enumerate().map(|(i, n)| Some((i, n - 1))).collect();
    step.insert(1, None);
    let what = format!("{name}, {} tokens", step.len());
    cpu.same_append(on, &what, &step)?;
    let launch = few::Launch::choose(&cpu.attend_op(step.len() as u32), &on.device());
    let never = few::Launch { chunks: 4000, spans: 4000, most: 4000, ..launch };
    let cuts = [
        launch,
        never,
        few::Launch { chunks: 1, ..never },
        few::Launch { spans: 1, ..never },
        few::Launch { spans: 1, most: 1, stages: 1, ..never },
    ];
    for launch in cuts {
        let what = format!("{what}, {launch:?}");
        cpu.same_results(on, &what, &step, &[0, 0], |op| AttendKernel::few_as(on, op, &launch))?;
    }
    for token in &step[..1] {
        let step = vec![*token];
        cpu.same_results(on, &format!("{name}, one token"), &step, &[0, 0], |op| AttendKernel::few(on, op))?;
    }
    done += cuts.len() + 2;

    let mut step = Step::new();
    let mut runs = Vec::new();
    for (i, &n) in shape.lengths.iter().enumerate() {
        let tokens = n.min(shape.prompt);
        runs.push(many::Run { first: step.len() as u32, tokens, position: n - tokens });
        step.extend((n - tokens..n).map(|p| Some((i, p))));
        step.push(None);
    }
    let what = format!("{name}, prompts of {} tokens", step.len());
    cpu.same_append(on, &what, &step)?;
    let op = cpu.attend_op(step.len() as u32);
    let launch = many::Launch::choose(&op, &on.device());
    let len = launch.most_tiles(&op, runs.len() as u32);
    let tiles = many::tiles(&runs, launch.tile_tokens(&op), len).unwrap_or_default();
    cpu.same_results(on, &what, &step, &tiles, |op| AttendKernel::many(on, op, len))?;
    Ok(done + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_equals_the_cpu() {
        let on = Executor::interpreter();
        for shape in shapes(true) {
            assert_eq!(attention(&on, shape).unwrap_or_else(|e| panic!("{e}")), 9);
        }
    }
}

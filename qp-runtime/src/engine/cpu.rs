//! The engine that runs everywhere: `f32` arithmetic on all cores.
//!
//! Results do not depend on the number of threads: work is cut by shapes alone, and each output is summed by one
//! thread in a fixed order. For the products with quantized matrices, and for single tokens everywhere, that order is
//! the kernels' own (their twins in `qp_codegen` are called here), so that a quantized model yields the same bits on CPU
//! and GPU.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qp_codegen::kernels::attend::reference::{self as twin, Norms, Query, Token};
use qp_codegen::kernels::{Span, attend};
use qp_codegen::reference::{Activation, RmsNorm};
use rayon::prelude::*;

use super::linear::Linears;
use super::{Chunk, Engine, Error, PAGE, Room, attention_ops, check_chunks, check_pages, cut};
use crate::codec::simd::for_each_instruction_set;
use crate::model::program::{self, Attention, Mixture, Node, Norm, Value};
use crate::model::{LayerId, RopeTables, Weights, rope_tables};

/// Tokens that are computed at once: bounds the memory of a step.
const MOST_TOKENS: usize = 256;

/// A model on the CPU, with the keys and values of many sequences.
pub struct CpuEngine {
    weights: Arc<Weights>,
    linears: Linears,
    /// By [`RopeId`](program::RopeId).
    ropes: Vec<RopeTables>,
    room: Room,
    /// By [`CacheId`](program::CacheId).
    caches: Vec<Vec<u8>>,
    /// Of each node, the values that nothing reads after it.
    last_reads: Arc<[Vec<Value>]>,
}

/// The values of a step's tokens, by [`Value`]: tokens × width each. What is not read any more is empty.
#[derive(Debug)]
pub struct Values(Vec<Vec<f32>>);

impl Values {
    /// Takes a value out.
    pub fn take(&mut self, value: Value) -> Vec<f32> {
        std::mem::take(&mut self.0[value.0])
    }

    /// Puts a value in.
    pub fn put(&mut self, value: Value, x: Vec<f32>) {
        self.0[value.0] = x;
    }
}

impl CpuEngine {
    /// An engine with room for sequences.
    ///
    /// # Errors
    /// If the model has fewer positions.
    pub fn new(weights: Arc<Weights>, room: Room) -> Result<Self, Error> {
        let program = weights.program.clone();
        if room.context > program.context {
            return Err(Error::Positions { wanted: room.context, max: program.context });
        }
        let cache = |c: &program::Cache| {
            let layout = cache_layout(c, room);
            vec![0; room.pages * layout.page_bytes() as usize]
        };
        Ok(CpuEngine {
            linears: Linears::new(&weights),
            ropes: program.ropes.iter().map(|rope| rope_tables(rope, room.context)).collect(),
            room,
            caches: program.caches.iter().map(cache).collect(),
            last_reads: program.last_reads().into(),
            weights,
        })
    }

    /// No values yet.
    pub fn values(&self) -> Values {
        Values(vec![Vec::new(); self.weights.program.widths.len()])
    }

    /// Runs the nodes `nodes` of the program on the tokens of `chunks`, whose values lie in `values`. `see` is shown the
    /// layers and the input of each product before it is computed (of an expert, the tokens that go through it); if it
    /// breaks, the run ends there.
    ///
    /// # Errors
    /// If what is computed is not finite.
    pub fn run(
        &mut self,
        nodes: Range<usize>,
        chunks: &[Chunk<'_>],
        values: &mut Values,
        mut see: impl FnMut(&[LayerId], &[f32]) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let (weights, last_reads) = (self.weights.clone(), self.last_reads.clone());
        for at in nodes {
            let last = &last_reads[at];
            match &weights.program.nodes[at] {
                Node::Embed { layer, y } => {
                    let tokens: Vec<u32> = chunks.iter().flat_map(|c| c.tokens).copied().collect();
                    values.put(*y, self.linears.look_up(&weights[*layer], &tokens));
                }
                Node::Norm { x, norm, y } => {
                    let mut normed = values.0[x.0].clone();
                    normalize(&weights, norm, &mut normed);
                    values.put(*y, normed);
                }
                Node::Linear { x, layers } => {
                    let x = &values.0[x.0];
                    let ids: Vec<LayerId> = layers.iter().map(|l| l.0).collect();
                    if see(&ids, x).is_break() {
                        return Ok(());
                    }
                    let linear: Vec<_> = layers.iter().map(|(id, _)| &weights[*id]).collect();
                    let results = self.linears.apply(&linear, x).ok_or_else(|| not_finite(&weights, at))?;
                    for ((_, y), result) in layers.iter().zip(results) {
                        values.put(*y, result);
                    }
                }
                Node::Attend(attention) => {
                    let qkv = [attention.q, attention.k, attention.v].map(|value| values.0[value.0].as_slice());
                    let y = self.attend(&weights, attention, chunks, qkv);
                    values.put(attention.y, y.ok_or_else(|| not_finite(&weights, at))?);
                }
                Node::Gate { gate, up, activation, y } => {
                    let (mut gate, width) = (values.take(*gate), weights.program.widths[gate.0]);
                    let tokens = gate.par_chunks_exact_mut(width).zip(values.0[up.0].par_chunks_exact(width));
                    tokens.for_each(|(gate, up)| gated(*activation, gate, up));
                    values.put(*y, gate);
                }
                Node::Add { x, z, y } => {
                    let mut sum = if last.contains(x) { values.take(*x) } else { values.0[x.0].clone() };
                    sum.iter_mut().zip(&values.0[z.0]).for_each(|(x, z)| *x += z);
                    values.put(*y, sum);
                }
                Node::Mix(mixture) => {
                    let (x, scores) = (&values.0[mixture.x.0], &values.0[mixture.scores.0]);
                    match self.mix(&weights, mixture, x, scores, &mut see) {
                        None => return Err(not_finite(&weights, at)),
                        Some(ControlFlow::Break(())) => return Ok(()),
                        Some(ControlFlow::Continue(y)) => values.put(mixture.y, y),
                    }
                }
                Node::Map { x, map, y } => {
                    let mut mapped = if last.contains(x) { values.take(*x) } else { values.0[x.0].clone() };
                    mapped.chunks_exact_mut(weights.program.widths[x.0]).for_each(|row| map.apply(row));
                    values.put(*y, mapped);
                }
                Node::Shift { x, by, y } => {
                    let (mut shifted, by) = (values.take(*x), &weights[*by]);
                    shifted
                        .chunks_exact_mut(by.len())
                        .for_each(|row| row.iter_mut().zip(by).for_each(|(x, by)| *x += by));
                    values.put(*y, shifted);
                }
                Node::Part { x, first, y } => {
                    let (of, width) = (weights.program.widths[x.0], weights.program.widths[y.0]);
                    let rows = values.0[x.0].chunks_exact(of);
                    values.put(*y, rows.flat_map(|row| &row[*first..first + width]).copied().collect());
                }
                Node::Rows { x, y } => {
                    let (x, width) = (&values.0[x.0], weights.program.widths[x.0]);
                    let (mut rows, mut first) = (Vec::new(), 0);
                    for chunk in chunks {
                        let n = chunk.tokens.len();
                        let skipped = first + n - chunk.logits.rows(n);
                        rows.extend_from_slice(&x[skipped * width..(first + n) * width]);
                        first += n;
                    }
                    values.put(*y, rows);
                }
            }
            for value in last {
                values.take(*value);
            }
        }
        Ok(())
    }

    fn step_at_once(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        let program = self.weights.program.clone();
        let mut values = self.values();
        let wanted = chunks.iter().any(|c| c.logits.rows(c.tokens.len()) > 0);
        let nodes = 0..if wanted { program.nodes.len() } else { program.behind_blocks() };
        self.run(nodes, chunks, &mut values, |_, _| ControlFlow::Continue(()))?;
        out.extend(values.take(program.logits()));
        Ok(())
    }

    /// The experts' results for tokens whose inputs are `x`; broken off if `see` breaks, `None` if a number is not finite.
    fn mix(
        &self,
        weights: &Weights,
        mixture: &Mixture,
        x: &[f32],
        scores: &[f32],
        see: &mut impl FnMut(&[LayerId], &[f32]) -> ControlFlow<()>,
    ) -> Option<ControlFlow<(), Vec<f32>>> {
        let (width, count) = (weights.program.widths[mixture.x.0], mixture.experts.len());
        if !scores.iter().all(|s| s.is_finite()) {
            return None;
        }
        let correction = mixture.correction.map(|id| &weights[id]);
        let mut of_experts = vec![Vec::new(); count];
        for (token, scores) in scores.chunks_exact(count).enumerate() {
            for (expert, weight) in mixture.routing.choose(scores, correction) {
                of_experts[expert].push((token, weight));
            }
        }
        let mut y = vec![0f32; x.len()];
        for (expert, tokens) in mixture.experts.iter().zip(of_experts).filter(|(_, tokens)| !tokens.is_empty()) {
            let entering: Vec<f32> = tokens.iter().flat_map(|(t, _)| &x[t * width..(t + 1) * width]).copied().collect();
            if see(&[expert.gate, expert.up], &entering).is_break() {
                return Some(ControlFlow::Break(()));
            }
            let mut both = self.linears.apply(&[&weights[expert.gate], &weights[expert.up]], &entering)?;
            let (up, mut inner) = (both.pop()?, both.pop()?);
            inner.iter_mut().zip(&up).for_each(|(gate, up)| *gate = mixture.unit.apply(*gate, *up));
            if see(&[expert.down], &inner).is_break() {
                return Some(ControlFlow::Break(()));
            }
            let out = self.linears.apply(&[&weights[expert.down]], &inner)?.pop()?;
            for ((t, weight), out) in tokens.iter().zip(out.chunks_exact(width)) {
                y[t * width..(t + 1) * width].iter_mut().zip(out).for_each(|(y, out)| *y += weight * out);
            }
        }
        Some(ControlFlow::Continue(y))
    }

    /// Keys and values enter the cache; the results of attention, tokens × the queries' width. `None` if a number is not
    /// finite.
    fn attend(
        &mut self,
        weights: &Weights,
        attention: &Attention,
        chunks: &[Chunk<'_>],
        [q, k, v]: [&[f32]; 3],
    ) -> Option<Vec<f32>> {
        let tokens: usize = chunks.iter().map(|c| c.tokens.len()).sum();
        let spans = [q, k, v].map(|x| Span::rows((x.len() / tokens) as u32));
        let (append, op) = attention_ops(&weights.program, attention, self.room.cache, tokens as u32, spans);
        let (heads, d) = (attention.heads, op.cache.head_dim as usize);
        let weights_of = |norm: Option<Norm>| norm.map_or_else(Vec::new, |n| weights.of_heads(&n));
        let (q_norm, k_norm) = (weights_of(attention.q_norm), weights_of(attention.k_norm));
        let sinks = attention.sinks.map(|id| &weights[id]);
        let cache = &mut self.caches[attention.cache.0];
        let planes = 2 * op.cache.columns() as usize;
        let (mut queries, mut scales) = (vec![0i8; tokens * heads * planes], vec![0f32; tokens * heads]);
        let places = chunks.iter().flat_map(|c| (0..c.tokens.len()).map(move |i| (c, c.position + i)));
        let mut finite = true;
        for (t, (chunk, position)) in places.clone().enumerate() {
            let slot = chunk.pages[position / PAGE] as usize * PAGE + position % PAGE;
            let (cos, sin) = attention.rope.map_or((&[][..], &[][..]), |id| self.ropes[id.0].at(position));
            let row = |span: Span| t * span.stride as usize..(t + 1) * span.stride as usize;
            let (q, k, v) = (&q[row(spans[0])], &k[row(spans[1])], &v[row(spans[2])]);
            let token = Token { q, k, v, cos, sin, slot };
            finite &= twin::append(
                &append,
                &token,
                Norms { q: &q_norm, k: &k_norm },
                cache,
                &mut queries[t * heads * planes..(t + 1) * heads * planes],
                &mut scales[t * heads..(t + 1) * heads],
            );
        }
        if !finite {
            return None;
        }
        let pages: Vec<Vec<i32>> = chunks.iter().map(|c| c.pages.iter().map(|p| p.cast_signed()).collect()).collect();
        let of_token: Vec<(usize, usize)> = chunks
            .iter()
            .enumerate()
            .flat_map(|(i, c)| (c.position..c.position + c.tokens.len()).map(move |p| (i, p)))
            .collect();
        let mut out = vec![0f32; tokens * heads * d];
        let cache = &self.caches[attention.cache.0];
        let fine = out.par_chunks_exact_mut(d).enumerate().map(|(i, out)| {
            let (t, head) = (i / heads, i % heads);
            let (chunk, position) = of_token[t];
            let query = Query {
                planes: &queries[i * planes..(i + 1) * planes],
                scale: scales[i],
                position: position as u32,
                pages: &pages[chunk],
                kv_head: head as u32 / op.group(),
                sink: sinks.map_or(0.0, |sinks| sinks[head]),
            };
            twin::attend(&op, cache, &query, out)
        });
        fine.reduce(|| true, |a, b| a && b).then_some(out)
    }
}

/// How a cache lies in memory.
fn cache_layout(cache: &program::Cache, room: Room) -> attend::Cache {
    attend::Cache { kv_heads: cache.heads as u32, head_dim: cache.head_dim as u32, planes: room.cache.planes() }
}

impl Engine for CpuEngine {
    fn vocab(&self) -> usize {
        self.weights.program.vocab
    }

    fn context(&self) -> usize {
        self.room.context
    }

    fn pages(&self) -> usize {
        self.room.pages
    }

    fn most_tokens(&self) -> usize {
        MOST_TOKENS
    }

    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        check_chunks(self, chunks)?;
        out.clear();
        // Inside the pool, so that the many small parallel loops need not enter it one by one.
        let steps = cut(chunks, &|left| left.min(MOST_TOKENS), usize::MAX, usize::MAX);
        rayon::scope(|_| steps.iter().try_for_each(|step| self.step_at_once(step, out)))
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), Error> {
        check_pages(self, &[from, to])?;
        let pages = self.room.pages;
        for cache in &mut self.caches {
            let size = cache.len() / pages;
            cache.copy_within(from as usize * size..(from as usize + 1) * size, to as usize * size);
        }
        Ok(())
    }
}

/// Norms each row of `x` of as many values as there are weights.
fn normalize(weights: &Weights, norm: &Norm, x: &mut [f32]) {
    let weight = &weights[norm.weight];
    x.par_chunks_exact_mut(weight.len()).for_each(|row| normed(norm.norm, weight, row));
}

for_each_instruction_set! {
    /// Norms a row.
    fn normed[R](norm: RmsNorm, weight: &[f32], row: &mut [f32]) {
        let normed = norm.apply(row, weight);
        row.copy_from_slice(&normed);
    }
}

for_each_instruction_set! {
    /// `activation(gate) · up`, in place of the gates.
    fn gated[R](activation: Activation, gate: &mut [f32], up: &[f32]) {
        gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = activation.apply(*gate) * up);
    }
}

fn not_finite(weights: &Weights, node: usize) -> Error {
    Error::NotFinite { layer: weights.program.describe(node) }
}

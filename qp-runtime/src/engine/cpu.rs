//! The engine that runs everywhere: `f32` arithmetic on all cores.
//!
//! Results do not depend on the number of threads: work is cut by shapes alone, and each output is summed by one
//! thread in a fixed order. For the products with quantized matrices, and for single tokens everywhere, that order is
//! the kernels' own (their twins in `qp_codegen` are called here), so that a quantized model yields the same bits on CPU
//! and GPU.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qp_codegen::kernels::attention as attend;
use rayon::prelude::*;

use super::linear::Linears;
use super::{Chunk, Engine, Error, PAGE, Room, check_chunks, check_pages, cut};
use crate::model::program::{self, Attention, Node, Norm, Value};
use crate::model::{LayerId, RopeTables, Weights, rope_tables};

/// Tokens that are computed at once: bounds the memory of a step.
const MOST_TOKENS: usize = 256;

/// A model on the CPU, with the keys and values of many sequences.
pub struct CpuEngine {
    weights: Arc<Weights>,
    linears: Linears,
    rope: RopeTables,
    room: Room,
    caches: Vec<Cache>,
    /// Of each node, the values that nothing reads after it.
    last_reads: Arc<[Vec<Value>]>,
}

/// Keys and values of one attention, each `pages × heads × PAGE × head_dim`.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
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
            let size = room.pages * c.heads * PAGE * c.head_dim;
            Cache { keys: vec![0.0; size], values: vec![0.0; size] }
        };
        Ok(CpuEngine {
            linears: Linears::new(&weights),
            rope: rope_tables(&program.rope, room.context),
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
    /// layers and the input of each linear node before it is computed; if it breaks, the run ends there.
    pub fn run(
        &mut self,
        nodes: Range<usize>,
        chunks: &[Chunk<'_>],
        values: &mut Values,
        mut see: impl FnMut(&[(LayerId, Value)], &[f32]) -> ControlFlow<()>,
    ) {
        let (weights, last_reads) = (self.weights.clone(), self.last_reads.clone());
        for (node, last) in weights.program.nodes[nodes.clone()].iter().zip(&last_reads[nodes]) {
            match node {
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
                    if see(layers, x).is_break() {
                        return;
                    }
                    let linear: Vec<_> = layers.iter().map(|(id, _)| &weights[*id]).collect();
                    let results = self.linears.apply(&linear, x);
                    for ((_, y), result) in layers.iter().zip(results) {
                        values.put(*y, result);
                    }
                }
                Node::Attend(attention) => {
                    let [q, k, v] = [attention.q, attention.k, attention.v].map(|value| values.take(value));
                    let y = self.attend(&weights, attention, chunks, q, k, &v);
                    values.put(attention.y, y);
                }
                Node::Gate { gate, up, activation, y } => {
                    let mut gate = values.take(*gate);
                    gate.iter_mut().zip(&values.0[up.0]).for_each(|(g, u)| *g = activation.apply(*g) * u);
                    values.put(*y, gate);
                }
                Node::Add { x, z, y } => {
                    let mut sum = if last.contains(x) { values.take(*x) } else { values.0[x.0].clone() };
                    sum.iter_mut().zip(&values.0[z.0]).for_each(|(x, z)| *x += z);
                    values.put(*y, sum);
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
    }

    fn step_at_once(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) {
        let program = self.weights.program.clone();
        let mut values = self.values();
        let wanted = chunks.iter().any(|c| c.logits.rows(c.tokens.len()) > 0);
        let behind = program.cuts.last().expect("there is a cut before the head").node;
        let nodes = 0..if wanted { program.nodes.len() } else { behind };
        self.run(nodes, chunks, &mut values, |_, _| ControlFlow::Continue(()));
        out.extend(values.take(program.head().1));
    }

    /// Keys and values enter the cache; the results of attention, tokens × the queries' width.
    fn attend(
        &mut self,
        weights: &Weights,
        attention: &Attention,
        chunks: &[Chunk<'_>],
        mut q: Vec<f32>,
        mut k: Vec<f32>,
        v: &[f32],
    ) -> Vec<f32> {
        let program::Cache { heads: kv_heads, head_dim: d } = weights.program.caches[attention.cache.0];
        let heads = attention.heads;
        let positions: Vec<usize> = chunks.iter().flat_map(|c| c.position..c.position + c.tokens.len()).collect();
        for (heads, norm, x) in [(heads, attention.q_norm, &mut q), (kv_heads, attention.k_norm, &mut k)] {
            if let Some(norm) = norm {
                normalize(weights, &norm, x);
            }
            for (token, &position) in x.chunks_exact_mut(heads * d).zip(&positions) {
                let (cos, sin) = self.rope.at(position);
                token.chunks_exact_mut(d).for_each(|head| turn(head, cos, sin));
            }
        }
        let cache = &mut self.caches[attention.cache.0];
        let mut out = vec![0f32; q.len()];
        let mut first = 0;
        for chunk in chunks {
            let tokens = first..first + chunk.tokens.len();
            first = tokens.end;
            let at = |page: u32, head: usize| (page as usize * kv_heads + head) * PAGE * d;
            let new = tokens.start * kv_heads * d..tokens.end * kv_heads * d;
            for (new, cached) in [(&k[new.clone()], &mut cache.keys), (&v[new], &mut cache.values)] {
                for (i, head) in new.chunks_exact(d).enumerate() {
                    let position = chunk.position + i / kv_heads;
                    let at = at(chunk.pages[position / PAGE], i % kv_heads) + position % PAGE * d;
                    cached[at..at + d].copy_from_slice(head);
                }
            }
            let seen = chunk.position + chunk.tokens.len();
            let gather = |cached: &[f32], head: usize| -> Vec<f32> {
                let mut all = Vec::with_capacity(seen.next_multiple_of(PAGE) * d);
                for page in &chunk.pages[..seen.div_ceil(PAGE)] {
                    all.extend_from_slice(&cached[at(*page, head)..][..PAGE * d]);
                }
                all
            };
            let gathered: Vec<[Vec<f32>; 2]> = (0..kv_heads)
                .into_par_iter()
                .map(|head| [&cache.keys, &cache.values].map(|cached| gather(cached, head)))
                .collect();
            let own = tokens.start * heads * d..tokens.end * heads * d;
            let pairs = out[own.clone()].par_chunks_exact_mut(d).zip(q[own].par_chunks_exact(d)).enumerate();
            pairs.for_each(|(i, (out, q))| {
                let (t, h) = (i / heads, i % heads);
                let [keys, values] = &gathered[h / (heads / kv_heads)];
                let seen = (chunk.position + t + 1) * d;
                attend::reference(q, &keys[..seen], &values[..seen], out);
            });
        }
        out
    }
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
        rayon::scope(|_| steps.iter().for_each(|step| self.step_at_once(step, out)));
        Ok(())
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), Error> {
        check_pages(self, &[from, to])?;
        let pages = self.room.pages;
        for Cache { keys, values } in &mut self.caches {
            for cached in [keys, values] {
                let size = cached.len() / pages;
                cached.copy_within(from as usize * size..(from as usize + 1) * size, to as usize * size);
            }
        }
        Ok(())
    }
}

/// Norms each row of `x` of as many values as there are weights.
fn normalize(weights: &Weights, norm: &Norm, x: &mut [f32]) {
    let weight = &weights[norm.weight];
    for row in x.chunks_exact_mut(weight.len()) {
        let normed = norm.norm.apply(row, weight);
        row.copy_from_slice(&normed);
    }
}

/// Rotary embedding of one head: element `i` turns with element `i + cos.len()`.
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

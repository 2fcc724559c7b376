//! The engine that runs everywhere: `f32` arithmetic on all cores.
//!
//! Results do not depend on the number of threads: work is cut by shapes alone, and each output is summed by one
//! thread in a fixed order. For the products with quantized matrices, and for single tokens everywhere, that order is
//! the kernels' own (their twins in `qp_codegen` are called here), so that a quantized model yields the same bits on CPU
//! and GPU.

use std::sync::Arc;

use qp_codegen::kernels::attention as attend;
use qp_codegen::reference;
use rayon::prelude::*;

use super::linear::Linears;
use super::{Engine, Error, Logits, check_tokens};
use crate::model::{Config, Role, RopeTables, Weights, rope_tables};

/// A model on the CPU, with the keys and values of one sequence.
pub struct CpuEngine {
    config: Config,
    weights: Arc<Weights>,
    linears: Linears,
    rope: RopeTables,
    context: usize,
    position: usize,
    cache: Vec<Cache>,
}

/// Keys and values of one layer: `kv_heads × context × head_dim`.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl CpuEngine {
    /// An engine for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// If the model has fewer positions.
    pub fn new(config: &Config, weights: Arc<Weights>, context: usize) -> Result<Self, Error> {
        if context > config.max_positions {
            return Err(Error::Positions { wanted: context, max: config.max_positions });
        }
        let size = config.kv_heads * context * config.head_dim;
        let cache = (0..config.layers).map(|_| Cache { keys: vec![0.0; size], values: vec![0.0; size] }).collect();
        let linears = Linears::new(&weights);
        Ok(CpuEngine {
            linears,
            rope: rope_tables(config, context),
            config: config.clone(),
            weights,
            context,
            position: 0,
            cache,
        })
    }

    /// The embeddings of `tokens`: tokens × hidden.
    pub fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        self.linears.look_up(&self.weights.embed, tokens)
    }

    /// Decoder layer `i` on the residual stream `x` (tokens × hidden) of tokens that follow the sequence so far, whose
    /// position stays as it is. `see` is shown what enters the linear layers: of layers that share an input, the first.
    pub fn layer(&mut self, i: usize, x: &mut [f32], mut see: impl FnMut(Role, &[f32])) {
        let weights = self.weights.clone();
        let (layer, eps) = (&weights.layers[i], self.config.norm_eps);
        let mut normed = vec![0f32; x.len()];
        norm_rows(x, &layer.input_norm, eps, &mut normed);
        see(Role::Q, &normed);
        let [q, k, v] = self.linears.apply([&layer[Role::Q], &layer[Role::K], &layer[Role::V]], &normed);
        let attended = self.attention(i, q, k, &v);
        see(Role::O, &attended);
        let [o] = self.linears.apply([&layer[Role::O]], &attended);
        add(x, &o);
        norm_rows(x, &layer.post_norm, eps, &mut normed);
        see(Role::Gate, &normed);
        let [mut gate, up] = self.linears.apply([&layer[Role::Gate], &layer[Role::Up]], &normed);
        gate.iter_mut().zip(&up).for_each(|(g, u)| *g = reference::silu(*g) * u);
        see(Role::Down, &gate);
        let [down] = self.linears.apply([&layer[Role::Down]], &gate);
        add(x, &down);
    }

    /// What enters the output layer after the residual stream `x`: rows × hidden.
    pub fn last_norm(&self, x: &[f32]) -> Vec<f32> {
        let mut normed = vec![0f32; x.len()];
        norm_rows(x, &self.weights.norm, self.config.norm_eps, &mut normed);
        normed
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) {
        let mut x = self.embed(tokens);
        for i in 0..self.config.layers {
            self.layer(i, &mut x, |_, _| ());
        }
        self.position += tokens.len();
        let rows = logits.rows(tokens.len());
        out.clear();
        if rows > 0 {
            let normed = self.last_norm(&x[x.len() - rows * self.config.hidden..]);
            [*out] = self.linears.apply([&self.weights.head], &normed);
        }
    }

    /// Appends keys `k` and values `v` (tokens × kv_heads · head_dim) to the cache of layer `layer` and attends with the
    /// queries `q`. Returns tokens × heads · head_dim.
    fn attention(&mut self, layer: usize, mut q: Vec<f32>, mut k: Vec<f32>, v: &[f32]) -> Vec<f32> {
        let Config { heads, kv_heads, head_dim: d, .. } = self.config;
        let (context, position, cache) = (self.context, self.position, &mut self.cache[layer]);
        for (heads, x) in [(heads, &mut q), (kv_heads, &mut k)] {
            for (t, token) in x.chunks_exact_mut(heads * d).enumerate() {
                let (cos, sin) = self.rope.at(position + t);
                token.chunks_exact_mut(d).for_each(|head| turn(head, cos, sin));
            }
        }
        for (new, cached) in [(&k[..], &mut cache.keys), (v, &mut cache.values)] {
            for (i, head) in new.chunks_exact(d).enumerate() {
                let (t, h) = (i / kv_heads, i % kv_heads);
                let at = (h * context + position + t) * d;
                cached[at..at + d].copy_from_slice(head);
            }
        }
        let mut out = vec![0f32; q.len()];
        let pairs = out.par_chunks_exact_mut(d).zip(q.par_chunks_exact(d)).enumerate();
        pairs.for_each(|(i, (out, q))| {
            let (t, h) = (i / heads, i % heads);
            let first = h / (heads / kv_heads) * context * d;
            let seen = first..first + (position + t + 1) * d;
            attend::reference(q, &cache.keys[seen.clone()], &cache.values[seen], out);
        });
        out
    }
}

impl Engine for CpuEngine {
    fn vocab(&self) -> usize {
        self.config.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn position(&self) -> usize {
        self.position
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) -> Result<(), Error> {
        check_tokens(tokens, self.position, self.context, self.config.vocab)?;
        // Inside the pool, so that the many small parallel loops need not enter it one by one.
        rayon::scope(|_| self.run(tokens, logits, out));
        Ok(())
    }
}

fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        out.copy_from_slice(&reference::rms_norm(x, weight, eps));
    }
}

/// Rotary embedding of one head: element `i` turns with element `i + half`.
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

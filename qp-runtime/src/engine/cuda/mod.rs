//! The engine of GPUs: every step is one graph of launches, from token to logits.
//!
//! It runs on an [`Executor`], so on the interpreter too, launch by launch: that is how it is tested without a GPU
//! ([`crate::check`]).
//! Everything stays on the device between steps; a step takes the tokens and their position and gives logits. Tokens
//! are taken up to 64 at once. A quantized model gives the same bits as on the CPU, however its tokens are cut.
//!
//! * [`kernels`]: what a step launches, without a model at hand.
//! * [`linear`]: matrices on the device.
//! * [`step`]: one launch: kernel, inputs, output.
//! * [`rest`]: times of all but the products, without a model.

pub mod kernels;
mod linear;
pub mod rest;
mod step;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use qp_codegen::ir::Elem;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::add::Add;
use qp_codegen::kernels::append::Append;
use qp_codegen::kernels::argmax::Argmax;
use qp_codegen::kernels::attention::Attention;
use qp_codegen::kernels::dense::Dense;
use qp_codegen::kernels::embed::Embed;
use qp_codegen::kernels::embed_packed::EmbedPacked;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::glu::Glu;
use qp_codegen::kernels::norm::Norm;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::spec::Shape;
use rayon::prelude::*;

pub use self::linear::Uploads;
use self::linear::{Group, Matrix, Product};
use self::step::{Angles, Hand, Ready, State, Step};
use super::{Engine, Error, Logits, check_tokens};
use crate::device::ops::DeviceActivations;
use crate::device::tune;
use crate::device::{Buffer, DeviceError, Executor, Graph};
use crate::model::{Config, Role, Weights, rope_tables};

/// Numbers of tokens that steps are made for. Any number is a sum of few of them.
const BATCHES: [usize; 7] = [64, 32, 16, 8, 4, 2, 1];

/// A model on a device, with the keys and values of one sequence.
pub struct CudaEngine {
    executor: Executor,
    network: Network,
    state: State,
    kernels: BTreeMap<String, Ready>,
    /// By tokens and what is wanted of them.
    graphs: BTreeMap<(usize, Wanted), Graph>,
    position: usize,
}

/// What a step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    /// Logits of so many tokens, the last ones.
    Logits(usize),
    /// The likeliest token after the last.
    Best,
}

/// What does not change between steps.
struct Network {
    vocab: usize,
    context: usize,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    hidden: u32,
    inner: u32,
    eps: f32,
    /// Distance from one token to the next in the residual stream.
    stride: u32,
    embed: Matrix,
    layers: Vec<Layer>,
    norm: Buffer<f32>,
    head: Group,
    angles: Angles,
    /// Given where a kernel reads nothing.
    nothing: Buffer<f32>,
}

struct Layer {
    input_norm: Buffer<f32>,
    /// Queries, keys, values.
    qkv: Group,
    o: Group,
    post_norm: Buffer<f32>,
    /// Gate, up.
    gate_up: Group,
    down: Group,
}

/// Rows of activations, and the norm they are to pass first.
#[derive(Clone, Copy)]
struct Input<'n> {
    hand: Hand,
    rows: Span,
    norm: Option<&'n Buffer<f32>>,
}

impl CudaEngine {
    /// An engine on `executor` for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// If the model has fewer positions or does not fit the device.
    pub fn new(executor: Executor, config: &Config, weights: &Weights, context: usize) -> Result<Self, Error> {
        Self::sharing(executor, config, weights, context, &mut Uploads::default())
    }

    /// As [`CudaEngine::new`], with the matrices that are there already.
    ///
    /// # Errors
    /// As [`CudaEngine::new`].
    pub fn sharing(
        executor: Executor,
        config: &Config,
        weights: &Weights,
        context: usize,
        uploads: &mut Uploads,
    ) -> Result<Self, Error> {
        if context > config.max_positions {
            return Err(Error::Positions { wanted: context, max: config.max_positions });
        }
        let network = Network::upload(&executor, config, weights, context, uploads)?;
        let state = network.state(&executor)?;
        let on_gpu = executor.gpu().is_some();
        let (kernels, graphs) = (BTreeMap::new(), BTreeMap::new());
        let mut engine = CudaEngine { executor, network, state, kernels, graphs, position: 0 };
        if on_gpu {
            // Compiled now, so that the first tokens are not the slow ones.
            engine.graph(1, Wanted::Best)?;
        }
        Ok(engine)
    }

    /// The graph of a step of `batch` tokens.
    fn graph(&mut self, batch: usize, wanted: Wanted) -> Result<&Graph, DeviceError> {
        let CudaEngine { executor, network, state, kernels, graphs, .. } = self;
        let vacant = match graphs.entry((batch, wanted)) {
            Entry::Occupied(graph) => return Ok(graph.into_mut()),
            Entry::Vacant(vacant) => vacant,
        };
        let steps = network.steps(batch as u32, wanted);
        let mut needed: BTreeMap<String, &Step<'_>> = steps.iter().map(|s| (s.key(), s)).collect();
        needed.retain(|key, _| !kernels.contains_key(key));
        let mut products: BTreeMap<String, tune::Product<'_>> = BTreeMap::new();
        for step in &steps {
            if let (Step::Gemv { op, hash, matrix, .. }, key) = (step, step.key())
                && needed.contains_key(&key)
            {
                let product = || tune::Product { op: *op, hash, matrices: Vec::new() };
                products.entry(key).or_insert_with(product).matrices.push(matrix);
            }
        }
        needed.retain(|key, _| !products.contains_key(key));
        let (keys, products): (Vec<_>, Vec<_>) = products.into_iter().unzip();
        let others = needed.into_par_iter().map(|(key, s)| Ok((key, s.load(executor)?)));
        let (others, products) =
            rayon::join(|| others.collect::<Result<Vec<_>, DeviceError>>(), || tune::load(executor, &products));
        kernels.extend(others?);
        kernels.extend(keys.into_iter().zip(products?.into_iter().map(|(_, kernel)| Ready::Gemv(kernel))));
        let mut recorder = executor.record();
        for step in &steps {
            let kernel = kernels.get_mut(&step.key()).expect("loaded above");
            step.record(&mut recorder, kernel, state, &network.angles)?;
        }
        Ok(vacant.insert(recorder.finish()?))
    }

    fn step(&mut self, tokens: &[u32], position: usize, wanted: Wanted) -> Result<(), DeviceError> {
        let ids: Vec<i32> = tokens.iter().map(|t| t.cast_signed()).collect();
        self.state.tokens.write(0, &ids)?;
        self.state.position.write(0, &[position as i32])?;
        self.graph(tokens.len(), wanted)?.launch()
    }

    /// Appends `tokens`, of which the last `wanted` get logits; `None` for the likeliest token after them all.
    fn append(&mut self, tokens: &[u32], wanted: Option<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        check_tokens(tokens, self.position, self.network.context, self.network.vocab)?;
        let mut left = tokens;
        let mut position = self.position;
        while !left.is_empty() {
            let batch = BATCHES.into_iter().find(|b| *b <= left.len()).expect("one token at least");
            let (now, later) = left.split_at(batch);
            let rows = wanted.map_or(0, |w| w.saturating_sub(later.len()).min(batch));
            let best = wanted.is_none() && later.is_empty();
            self.step(now, position, if best { Wanted::Best } else { Wanted::Logits(rows) })?;
            let Network { vocab, head, .. } = &self.network;
            // The first row that was computed may lie before the first that is wanted.
            let first = self.network.rows(batch as u32, rows as u32) as usize - rows;
            for row in first..first + rows {
                let at = out.len();
                out.resize(at + vocab, 0.0);
                let from = row * head.products[0].stride as usize;
                self.state.hands[Hand::Logits.index()].read(from, &mut out[at..])?;
            }
            position += batch;
            left = later;
        }
        self.position = position;
        Ok(())
    }
}

impl Engine for CudaEngine {
    fn vocab(&self) -> usize {
        self.network.vocab
    }

    fn context(&self) -> usize {
        self.network.context
    }

    fn position(&self) -> usize {
        self.position
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits, out: &mut Vec<f32>) -> Result<(), Error> {
        out.clear();
        self.append(tokens, Some(logits.rows(tokens.len())), out)
    }

    fn greedy(&mut self, tokens: &[u32]) -> Result<u32, Error> {
        let before = self.position;
        if tokens.is_empty() {
            return Err(Error::NotANumber);
        }
        self.append(tokens, None, &mut Vec::new())?;
        let mut best = [0];
        self.state.best.read(0, &mut best)?;
        u32::try_from(best[0]).map_err(|_| {
            self.position = before;
            Error::NotANumber
        })
    }
}

impl From<DeviceError> for Error {
    fn from(e: DeviceError) -> Self {
        Error::Device(Box::new(e))
    }
}

impl Network {
    fn upload(
        on: &Executor,
        config: &Config,
        weights: &Weights,
        context: usize,
        uploads: &mut Uploads,
    ) -> Result<Network, DeviceError> {
        let mut group = |layer: &crate::model::Layer, roles: &[Role]| {
            Group::upload(on, &roles.iter().map(|r| &layer[*r]).collect::<Vec<_>>(), uploads)
        };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in &weights.layers {
            layers.push(Layer {
                input_norm: on.upload(&layer.input_norm)?,
                qkv: group(layer, &[Role::Q, Role::K, Role::V])?,
                o: group(layer, &[Role::O])?,
                post_norm: on.upload(&layer.post_norm)?,
                gate_up: group(layer, &[Role::Gate, Role::Up])?,
                down: group(layer, &[Role::Down])?,
            });
        }
        let embed = Matrix::upload(on, &weights.embed, uploads)?;
        // The same data twice would be a waste of the device's memory.
        let head = if weights.head.weight.is(&weights.embed.weight) {
            let product = Product::of(on, &weights.head, embed.clone())?;
            Group { cols: config.hidden as u32, products: vec![product], places: vec![(0, 0)] }
        } else {
            Group::upload(on, &[&weights.head], uploads)?
        };
        uploads.done();
        Network::of(on, config, context, embed, layers, on.upload(&weights.norm)?, head)
    }

    /// The network of a model's parts.
    fn of(
        on: &Executor,
        config: &Config,
        context: usize,
        embed: Matrix,
        layers: Vec<Layer>,
        norm: Buffer<f32>,
        head: Group,
    ) -> Result<Network, DeviceError> {
        let tables = rope_tables(config, context);
        let hidden = config.hidden as u32;
        let residual = layers.iter().flat_map(|l| l.o.products.iter().chain(&l.down.products));
        let stride = residual.map(|p| p.stride).fold(hidden, u32::max);
        Ok(Network {
            vocab: config.vocab,
            context,
            heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            hidden,
            inner: config.intermediate as u32,
            eps: config.norm_eps,
            stride,
            embed,
            layers,
            norm,
            head,
            angles: Angles { cos: on.upload(&tables.cos)?, sin: on.upload(&tables.sin)? },
            nothing: on.zeroed(1)?,
        })
    }

    fn groups(&self) -> impl Iterator<Item = &Group> {
        self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]).chain([&self.head])
    }

    fn state(&self, on: &Executor) -> Result<State, DeviceError> {
        let batch = BATCHES[0];
        let widest = |p: usize| self.groups().filter_map(|g| g.products.get(p)).map(|p| p.stride).max().unwrap_or(0);
        let attended = self.heads * self.head_dim;
        let head = self.head.products[0].stride;
        // In the order of `Hand::index`.
        let widths = [self.stride, self.hidden, attended, self.inner, head, widest(0), widest(1), widest(2)];
        const { assert!(Hand::COUNT == 8) };
        let columns = self.groups().map(|g| g.cols).max().unwrap_or(1);
        let cache = self.kv_heads as usize * self.context * self.head_dim as usize;
        Ok(State {
            tokens: on.zeroed(batch)?,
            position: on.zeroed(1)?,
            best: on.zeroed(1)?,
            hands: widths.iter().map(|w| on.zeroed(*w as usize * batch)).collect::<Result<_, _>>()?,
            activations: DeviceActivations::new(on, columns, batch as u32)?,
            cache: self
                .layers
                .iter()
                .map(|_| Ok((on.zeroed(cache)?, on.zeroed(cache)?)))
                .collect::<Result<_, DeviceError>>()?,
        })
    }

    /// Rows of logits that a step of `batch` tokens computes if `rows` are wanted: what prepares activations for a
    /// quantized head begins with the first token.
    fn rows(&self, batch: u32, rows: u32) -> u32 {
        match self.head.products[0].matrix {
            Matrix::Quantized { .. } if rows > 0 => batch,
            Matrix::Quantized { .. } | Matrix::Dense(_) => rows,
        }
    }

    /// The launches of a step of `batch` tokens.
    fn steps(&self, batch: u32, wanted: Wanted) -> Vec<Step<'_>> {
        let rows = match wanted {
            Wanted::Logits(rows) => self.rows(batch, rows as u32),
            Wanted::Best => self.rows(batch, 1),
        };
        let mut steps = Vec::new();
        let residual = Span::rows(self.stride);
        let (d, context, cache) = (self.head_dim, self.context as u32, Elem::F32);
        steps.push(match &self.embed {
            Matrix::Dense(table) => {
                let op = Embed { columns: self.hidden, elem: table.elem(), batch, y: residual };
                Step::Embed { op, table, y: Hand::Residual }
            }
            Matrix::Quantized { quantizer, hash, matrix } => {
                let op = EmbedPacked { quantizer, shape: matrix.layout.shape, batch, y: residual };
                Step::EmbedPacked { op, hash, matrix, y: Hand::Residual }
            }
        });
        for (i, layer) in self.layers.iter().enumerate() {
            let input = Input { hand: Hand::Residual, rows: residual, norm: Some(&layer.input_norm) };
            self.linear(&mut steps, &layer.qkv, batch, input, None);
            let place = |g: &Group, i: usize| {
                let (product, first) = g.places[i];
                (Hand::Product(product), Span { first, stride: g.products[product].stride })
            };
            let ((q, q_rows), (k, k_rows), (v, v_rows)) =
                (place(&layer.qkv, 0), place(&layer.qkv, 1), place(&layer.qkv, 2));
            let op = Append { heads: self.kv_heads, head_dim: d, batch, context, k: k_rows, v: v_rows, cache };
            steps.push(Step::Append { op, layer: i, k, v });
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            let op = Attention { heads, kv_heads, head_dim: d, batch, context, q: q_rows, cache };
            steps.push(Step::Attention { op, layer: i, q, y: Hand::Attended });
            let input = Input { hand: Hand::Attended, rows: Span::rows(heads * d), norm: None };
            self.linear(&mut steps, &layer.o, batch, input, Some(Hand::Residual));

            let input = Input { hand: Hand::Residual, rows: residual, norm: Some(&layer.post_norm) };
            self.linear(&mut steps, &layer.gate_up, batch, input, None);
            let ((gate, gate_rows), (up, up_rows)) = (place(&layer.gate_up, 0), place(&layer.gate_up, 1));
            let op = Glu { columns: self.inner, batch, gate: gate_rows, up: up_rows };
            steps.push(Step::Glu { op, gate, up, y: Hand::Inner });
            let input = Input { hand: Hand::Inner, rows: Span::rows(self.inner), norm: None };
            self.linear(&mut steps, &layer.down, batch, input, Some(Hand::Residual));
        }
        if rows > 0 {
            let last = Span { first: (batch - rows) * self.stride, stride: self.stride };
            let input = Input { hand: Hand::Residual, rows: last, norm: Some(&self.norm) };
            let from = steps.len();
            self.linear(&mut steps, &self.head, rows, input, None);
            for step in &mut steps[from..] {
                step.write_to(Hand::Logits);
            }
            if wanted == Wanted::Best {
                let product = &self.head.products[0];
                let logits = Span { first: (rows - 1) * product.stride, stride: product.stride };
                let op = Argmax { columns: self.vocab as u32, batch: 1, logits };
                steps.push(Step::Argmax { op, logits: Hand::Logits });
            }
        }
        steps
    }

    /// The layers of a group on `batch` rows: outputs of product `p` go to [`Hand::Product`]`(p)`, or are added to
    /// `onto`.
    fn linear<'n>(
        &'n self,
        steps: &mut Vec<Step<'n>>,
        group: &'n Group,
        batch: u32,
        input: Input<'n>,
        onto: Option<Hand>,
    ) {
        let mut normed = None;
        let mut prepared = None;
        for (p, product) in group.products.iter().enumerate() {
            let own = (Hand::Product(p), Span::rows(product.stride));
            let biased = product.parts.iter().any(|part| part.bias.is_some());
            let direct = onto.filter(|_| !biased).map(|hand| (hand, Span::rows(self.stride)));
            let (y, rows, accumulate) = match &product.matrix {
                Matrix::Quantized { quantizer, hash, matrix } => {
                    if prepared != Some(quantizer.rotation) {
                        prepared = Some(quantizer.rotation);
                        let op = Prepare {
                            columns: group.cols,
                            stride: input.rows.stride,
                            batch,
                            rotation: quantizer.rotation,
                            norm: input.norm.map(|_| self.eps),
                        };
                        let norm = input.norm.unwrap_or(&self.nothing);
                        steps.push(Step::Prepare { op, input: input.hand, norm });
                    }
                    // Its outputs lie at a distance of its own.
                    let direct = direct.filter(|_| product.stride == self.stride);
                    let (y, rows) = direct.unwrap_or(own);
                    let shape = Shape { rows: matrix.layout.shape.rows, cols: group.cols };
                    let op = Gemv { quantizer, shape, batch, accumulate: direct.is_some() };
                    steps.push(Step::Gemv { op, hash, matrix, y });
                    (y, rows, direct.is_some())
                }
                Matrix::Dense(weights) => {
                    let (x, x_rows) = *normed.get_or_insert_with(|| match input.norm {
                        None => (input.hand, input.rows),
                        Some(norm) => {
                            let op = Norm { columns: group.cols, batch, x: input.rows, eps: self.eps };
                            steps.push(Step::Norm { op, x: input.hand, norm, y: Hand::Normed });
                            (Hand::Normed, Span::rows(group.cols))
                        }
                    });
                    let (y, rows) = direct.unwrap_or(own);
                    let op = Dense {
                        rows: product.stride,
                        cols: group.cols,
                        elem: weights.elem(),
                        batch,
                        x: x_rows,
                        y: rows,
                        accumulate: direct.is_some(),
                    };
                    steps.push(Step::Dense { op, weights, x, y });
                    (y, rows, direct.is_some())
                }
            };
            for part in &product.parts {
                let at = Span { first: part.first, stride: rows.stride };
                if let Some(bias) = &part.bias {
                    let op = Add { columns: part.rows, batch, x: Span::rows(0), y: at };
                    steps.push(Step::Bias { op, x: bias, y });
                }
                if let Some(onto) = onto.filter(|_| !accumulate) {
                    let op = Add { columns: part.rows, batch, x: at, y: Span::rows(self.stride) };
                    steps.push(Step::Add { op, x: y, y: onto });
                }
            }
        }
    }
}

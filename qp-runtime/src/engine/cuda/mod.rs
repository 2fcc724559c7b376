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
use qp_codegen::reference::{Activation, RmsNorm};
use qp_codegen::spec::Shape;
use rayon::prelude::*;

pub use self::linear::Uploads;
use self::linear::{Group, Matrix, Product};
use self::step::{Angles, Hand, Ready, State, Step};
use super::{Chunk, Engine, Error, PAGE, Room, check_chunks};
use crate::device::ops::DeviceActivations;
use crate::device::tune;
use crate::device::{Buffer, DeviceError, Executor, Graph};
use crate::model::program::Node;
use crate::model::{Program, Weights, rope_tables};

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
    pages: usize,
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
    /// An engine on `executor` with room for sequences.
    ///
    /// # Errors
    /// If the model has fewer positions or does not fit the device.
    pub fn new(executor: Executor, weights: &Weights, room: Room) -> Result<Self, Error> {
        Self::sharing(executor, weights, room, &mut Uploads::default())
    }

    /// As [`CudaEngine::new`], with the matrices that are there already.
    ///
    /// # Errors
    /// As [`CudaEngine::new`].
    pub fn sharing(executor: Executor, weights: &Weights, room: Room, uploads: &mut Uploads) -> Result<Self, Error> {
        if room.context > weights.program.context {
            return Err(Error::Positions { wanted: room.context, max: weights.program.context });
        }
        if weights.program.nodes.iter().any(|n| matches!(n, Node::Attend(a) if a.q_norm.is_some())) {
            return Err(Error::Device("norms of heads run on the CPU only: --device cpu".into()));
        }
        let network = Network::upload(&executor, weights, room.context, uploads)?;
        let state = network.state(&executor)?;
        let on_gpu = executor.gpu().is_some();
        let (kernels, graphs) = (BTreeMap::new(), BTreeMap::new());
        let mut engine = CudaEngine { executor, network, state, kernels, graphs, pages: room.pages };
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

    fn launch(&mut self, tokens: &[u32], position: usize, wanted: Wanted) -> Result<(), DeviceError> {
        let ids: Vec<i32> = tokens.iter().map(|t| t.cast_signed()).collect();
        self.state.tokens.write(0, &ids)?;
        self.state.position.write(0, &[position as i32])?;
        self.graph(tokens.len(), wanted)?.launch()
    }

    /// Appends the tokens of `chunk`, of which the last `wanted` get logits; `None` for the likeliest token after them all.
    fn append(&mut self, chunk: &Chunk<'_>, wanted: Option<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let (mut left, mut position) = (chunk.tokens, chunk.position);
        while !left.is_empty() {
            let batch = BATCHES.into_iter().find(|b| *b <= left.len()).expect("one token at least");
            let (now, later) = left.split_at(batch);
            let rows = wanted.map_or(0, |w| w.saturating_sub(later.len()).min(batch));
            let best = wanted.is_none() && later.is_empty();
            self.launch(now, position, if best { Wanted::Best } else { Wanted::Logits(rows) })?;
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
        Ok(())
    }

    /// The only sequence there can be.
    fn one<'c, 'a>(&self, chunks: &'c [Chunk<'a>]) -> Result<&'c Chunk<'a>, Error> {
        check_chunks(self, chunks)?;
        match chunks {
            [chunk] if chunk.pages.iter().enumerate().all(|(i, p)| i == *p as usize) => Ok(chunk),
            _ => Err(Error::Device("this engine holds one sequence, in pages in order".into())),
        }
    }
}

impl Engine for CudaEngine {
    fn vocab(&self) -> usize {
        self.network.vocab
    }

    fn context(&self) -> usize {
        self.network.context
    }

    fn pages(&self) -> usize {
        self.network.context.div_ceil(PAGE).min(self.pages)
    }

    fn most_tokens(&self) -> usize {
        BATCHES[0]
    }

    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        let chunk = self.one(chunks)?;
        out.clear();
        self.append(chunk, Some(chunk.logits.rows(chunk.tokens.len())), out)
    }

    fn best(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<u32>) -> Result<(), Error> {
        let chunk = self.one(chunks)?;
        if chunk.tokens.is_empty() {
            return Err(Error::NotANumber);
        }
        self.append(chunk, None, &mut Vec::new())?;
        let mut best = [0];
        self.state.best.read(0, &mut best)?;
        out.clear();
        out.push(u32::try_from(best[0]).map_err(|_| Error::NotANumber)?);
        Ok(())
    }

    fn copy_page(&mut self, _: u32, _: u32) -> Result<(), Error> {
        Err(Error::Device("this engine holds one sequence, in pages in order".into()))
    }
}

impl From<DeviceError> for Error {
    fn from(e: DeviceError) -> Self {
        Error::Device(Box::new(e))
    }
}

impl Network {
    fn upload(on: &Executor, weights: &Weights, context: usize, uploads: &mut Uploads) -> Result<Network, DeviceError> {
        let program = &weights.program;
        let mut layers = Vec::with_capacity(program.caches.len());
        for block in program.blocks() {
            let (mut norms, mut groups) = (Vec::new(), Vec::new());
            for node in &program.nodes[block] {
                match node {
                    Node::Norm { norm, .. } => norms.push(on.upload(&weights[norm.weight])?),
                    Node::Linear { layers, .. } => {
                        let layers: Vec<_> = layers.iter().map(|l| &weights[l.0]).collect();
                        groups.push(Group::upload(on, &layers, uploads)?);
                    }
                    Node::Embed { .. } | Node::Attend(_) | Node::Gate { .. } | Node::Add { .. } | Node::Rows { .. } => {
                        ()
                    }
                }
            }
            let (Ok([input_norm, post_norm]), Ok([qkv, o, gate_up, down])) =
                (<[_; 2]>::try_from(norms), <[_; 4]>::try_from(groups))
            else {
                unreachable!("every architecture's blocks are alike")
            };
            layers.push(Layer { input_norm, qkv, o, post_norm, gate_up, down });
        }
        let embedding = program.ids().find(|id| program.is_embedding(*id)).expect("a program has an embedding");
        let (embedding, head) = (&weights[embedding], &weights[program.head().0]);
        let embed = Matrix::upload(on, embedding, uploads)?;
        // The same data twice would be a waste of the device's memory.
        let head = if head.weight.is(&embedding.weight) {
            let product = Product::of(on, head, embed.clone())?;
            Group { cols: head.cols as u32, products: vec![product], places: vec![(0, 0)] }
        } else {
            Group::upload(on, &[head], uploads)?
        };
        uploads.done();
        let norm = program.vectors.len() - 1;
        let norm = on.upload(&weights[crate::model::program::VectorId(norm)])?;
        Network::of(on, program, context, embed, layers, norm, head)
    }

    /// The network of a model's parts.
    fn of(
        on: &Executor,
        program: &Program,
        context: usize,
        embed: Matrix,
        layers: Vec<Layer>,
        norm: Buffer<f32>,
        head: Group,
    ) -> Result<Network, DeviceError> {
        let tables = rope_tables(&program.rope, context);
        let hidden = program.widths[0] as u32;
        let residual = layers.iter().flat_map(|l| l.o.products.iter().chain(&l.down.products));
        let stride = residual.map(|p| p.stride).fold(hidden, u32::max);
        let heads = program.nodes.iter().find_map(|n| if let Node::Attend(a) = n { Some(a.heads) } else { None });
        let eps =
            program.nodes.iter().find_map(|n| if let Node::Norm { norm, .. } = n { Some(norm.eps) } else { None });
        let inner = program.nodes.iter().find_map(|n| if let Node::Gate { y, .. } = n { Some(*y) } else { None });
        let (Some(heads), Some(eps), Some(inner)) = (heads, eps, inner) else {
            unreachable!("every architecture has attention, norms and gates")
        };
        let cache = program.caches[0];
        Ok(Network {
            vocab: program.vocab,
            context,
            heads: heads as u32,
            kv_heads: cache.heads as u32,
            head_dim: cache.head_dim as u32,
            hidden,
            inner: program.widths[inner.0] as u32,
            eps,
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
            fault: on.zeroed(1)?,
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
            let activation = Activation::Silu;
            let op = Glu { columns: self.inner, batch, activation, gate: gate_rows, up: up_rows };
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
                            batch,
                            input: input.rows,
                            gate: None,
                            norm: input.norm.map(|_| RmsNorm { eps: self.eps, add_one: false }),
                            rotation: quantizer.rotation,
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
                            let rms_norm = RmsNorm { eps: self.eps, add_one: false };
                            let op = Norm { columns: group.cols, batch, x: input.rows, norm: rms_norm };
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

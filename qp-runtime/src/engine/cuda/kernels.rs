//! The kernels of a decode step, known from a model's configuration and quantizers alone: for compiling them where there
//! is neither the model nor a GPU. That they are those of [`Network::steps`](super::Network) is tested below.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use qp_codegen::cuda::Device;
use qp_codegen::ir::{Elem, Kernel};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::Launch;
use qp_codegen::kernels::{
    Span, add, append, argmax, attention, dense, embed,
    embed_packed::{self, EmbedPacked},
    glu, norm,
    prepare::{self, Prepare},
};
use qp_codegen::layout::Packed;
use qp_codegen::reference::{Activation, RmsNorm};
use qp_codegen::spec::{Quantizer, Rotation, Shape};

use crate::device::ops::{first_rows, stacked};
use crate::model::{Config, Role};

/// Makes a kernel for a device.
pub type Lowering = Box<dyn Fn(&Device) -> Kernel + Send + Sync>;

/// What a decode step of one token launches.
pub struct DecodeStep<'a> {
    /// The model.
    pub config: &'a Config,
    /// Longest sequence.
    pub context: u32,
    /// Element type of what is not quantized.
    pub elem: Elem,
    /// Quantizer of a layer's matrix; `None` if it is left as it is.
    pub quantizer: &'a dyn Fn(usize, Role) -> Option<Arc<Quantizer>>,
    /// Quantizer of the embedding.
    pub embedding: Option<Arc<Quantizer>>,
    /// Quantizer of the output layer, if it has one of its own.
    pub head: Option<Arc<Quantizer>>,
}

/// A matrix that computes one layer, or several of one input: the twin of [`super::linear::Product`].
struct Product {
    quantizer: Option<Arc<Quantizer>>,
    /// Of its matrix.
    rows: u32,
    stride: u32,
    /// Which of the group's layers: index, rows, first row.
    parts: Vec<(usize, u32, u32)>,
}

/// The input of a group: rows, and whether they pass a norm first.
#[derive(Clone, Copy)]
struct Input {
    cols: u32,
    rows: Span,
    norm: bool,
}

/// Kernels, each once.
#[derive(Default)]
struct Kernels(BTreeMap<String, Lowering>);

impl Kernels {
    fn plain<O: Debug + Send + Sync + 'static>(&mut self, op: O, lower: fn(&O) -> Kernel) {
        self.0.entry(format!("{op:?}")).or_insert_with(|| Box::new(move |_| lower(&op)));
    }

    fn gemv(&mut self, quantizer: &Arc<Quantizer>, shape: Shape, accumulate: bool) {
        let key = format!("gemv {} {shape:?} {accumulate}", quantizer.hash());
        self.0.entry(key).or_insert_with(|| product(quantizer.clone(), shape, accumulate));
    }
}

/// A product with a quantized matrix, one token.
pub fn product(quantizer: Arc<Quantizer>, shape: Shape, accumulate: bool) -> Lowering {
    Box::new(move |device| {
        let op = Gemv { quantizer: &quantizer, shape, batch: 1, accumulate };
        Launch::choose(&op, device).lower(&op)
    })
}

impl DecodeStep<'_> {
    /// Its kernels, each once, products as the cost model lays them out.
    pub fn kernels(&self) -> Vec<Lowering> {
        let (config, elem, context, batch) = (self.config, self.elem, self.context, 1);
        let (hidden, inner) = (config.hidden as u32, config.intermediate as u32);
        let (heads, kv_heads, head_dim) = (config.heads as u32, config.kv_heads as u32, config.head_dim as u32);
        let attended = heads * head_dim;
        let layers = || 0..config.layers;
        let onto = layers().flat_map(|l| [self.products(l, &[Role::O]), self.products(l, &[Role::Down])]);
        let residual = Span::rows(onto.flatten().map(|p| p.stride).fold(hidden, u32::max));
        let mut out = Kernels::default();
        match self.embedding.clone() {
            None => out.plain(embed::Embed { columns: hidden, elem, batch, y: residual }, embed::lower),
            Some(q) => {
                let shape = Shape { rows: config.vocab as u32, cols: hidden };
                let lower =
                    move |_: &Device| embed_packed::lower(&EmbedPacked { quantizer: &q, shape, batch, y: residual });
                out.0.insert("embedding".to_owned(), Box::new(lower));
            }
        }
        for layer in layers() {
            let input = Input { cols: hidden, rows: residual, norm: true };
            let places = self.linear(&mut out, layer, &[Role::Q, Role::K, Role::V], input, None);
            let (q, k, v) = (places[0], places[1], places[2]);
            let op = append::Append { heads: kv_heads, head_dim, batch, context, k, v, cache: Elem::F32 };
            out.plain(op, append::lower);
            let op = attention::Attention { heads, kv_heads, head_dim, batch, context, q, cache: Elem::F32 };
            out.plain(op, attention::lower);
            let input = Input { cols: attended, rows: Span::rows(attended), norm: false };
            self.linear(&mut out, layer, &[Role::O], input, Some(residual));
            let input = Input { cols: hidden, rows: residual, norm: true };
            let places = self.linear(&mut out, layer, &[Role::Gate, Role::Up], input, None);
            let activation = Activation::Silu;
            let op = glu::Glu { columns: inner, batch, activation, gate: places[0], up: places[1] };
            out.plain(op, glu::lower);
            let input = Input { cols: inner, rows: Span::rows(inner), norm: false };
            self.linear(&mut out, layer, &[Role::Down], input, Some(residual));
        }
        // An output layer that is tied and has no quantizer of its own is the embedding.
        let head = self.head.clone().or(self.embedding.clone().filter(|_| config.tied));
        let head = joined(head, &[(0, config.vocab as u32)], hidden);
        let input = Input { cols: hidden, rows: residual, norm: true };
        let logits = Span::rows(head.stride);
        self.products_of(&mut out, &[head], input, None, &[false]);
        out.plain(argmax::Argmax { columns: config.vocab as u32, batch, logits }, argmax::lower);
        out.0.into_values().collect()
    }

    /// Layers of one input, those of equal quantizers together.
    fn products(&self, layer: usize, roles: &[Role]) -> Vec<Product> {
        let chosen: Vec<_> = roles.iter().map(|role| (self.quantizer)(layer, *role)).collect();
        let alike = |i: usize, j: usize| i == j || (chosen[i].is_some() && chosen[i] == chosen[j]);
        let firsts = (0..roles.len()).filter(|&i| !(0..i).any(|j| alike(i, j)));
        let product = |first: usize| {
            let parts = (first..roles.len()).filter(|&i| alike(first, i));
            let parts: Vec<_> = parts.map(|i| (i, self.config.shape(roles[i]).0 as u32)).collect();
            joined(chosen[first].clone(), &parts, self.config.shape(roles[first]).1 as u32)
        };
        firsts.map(product).collect()
    }

    /// Adds the kernels of layers of one input; gives where the outputs of each lie.
    fn linear(&self, out: &mut Kernels, layer: usize, roles: &[Role], input: Input, onto: Option<Span>) -> Vec<Span> {
        let products = self.products(layer, roles);
        let biased: Vec<bool> = roles.iter().map(|r| self.config.has_bias(*r)).collect();
        self.products_of(out, &products, input, onto, &biased);
        let place = |i| {
            let of = products.iter().flat_map(|p| p.parts.iter().map(move |part| (p.stride, part)));
            let mut own = of.filter(|(_, part)| part.0 == i);
            own.next().map_or(Span::rows(0), |(stride, part)| Span { first: part.2, stride })
        };
        (0..roles.len()).map(place).collect()
    }

    fn products_of(&self, out: &mut Kernels, products: &[Product], input: Input, onto: Option<Span>, biased: &[bool]) {
        let (eps, batch, elem) = (self.config.norm_eps, 1, self.elem);
        let mut prepared: Option<Rotation> = None;
        for product in products {
            let is_biased = product.parts.iter().any(|part| biased[part.0]);
            let direct = onto.filter(|_| !is_biased);
            let (rows, accumulate) = match &product.quantizer {
                Some(q) => {
                    if prepared != Some(q.rotation) {
                        prepared = Some(q.rotation);
                        let norm = input.norm.then_some(RmsNorm { eps, add_one: false });
                        let (columns, rotation) = (input.cols, q.rotation);
                        let op = Prepare { columns, batch, input: input.rows, gate: None, norm, rotation };
                        let lower: Lowering = Box::new(move |device| prepare::lower(&op, device));
                        out.0.entry(format!("{op:?}")).or_insert(lower);
                    }
                    let direct = direct.filter(|onto| onto.stride == product.stride);
                    out.gemv(q, Shape { rows: product.rows, cols: input.cols }, direct.is_some());
                    (direct.unwrap_or(Span::rows(product.stride)), direct.is_some())
                }
                None => {
                    let mut x = input.rows;
                    if input.norm {
                        let norm = RmsNorm { eps, add_one: false };
                        out.plain(norm::Norm { columns: input.cols, batch, x, norm }, norm::lower);
                        x = Span::rows(input.cols);
                    }
                    let y = direct.unwrap_or(Span::rows(product.stride));
                    let (rows, cols, accumulate) = (product.stride, input.cols, direct.is_some());
                    out.plain(dense::Dense { rows, cols, elem, batch, x, y, accumulate }, dense::lower);
                    (y, accumulate)
                }
            };
            for &(i, columns, first) in &product.parts {
                let at = Span { first, stride: rows.stride };
                if biased[i] {
                    out.plain(add::Add { columns, batch, x: Span::rows(0), y: at }, add::lower);
                }
                if let Some(y) = onto.filter(|_| !accumulate) {
                    out.plain(add::Add { columns, batch, x: at, y }, add::lower);
                }
            }
        }
    }
}

/// The product of layers (index and rows) of one quantizer.
fn joined(quantizer: Option<Arc<Quantizer>>, layers: &[(usize, u32)], cols: u32) -> Product {
    let rows: Vec<u32> = layers.iter().map(|l| l.1).collect();
    let (first, all, stride) = match &quantizer {
        Some(q) => {
            let shapes: Vec<Shape> = rows.iter().map(|&rows| Shape { rows, cols }).collect();
            let all = stacked(q, &shapes);
            (first_rows(q, cols, &rows), all.rows, Packed::new(q, all).padded_rows())
        }
        None => (vec![0; rows.len()], rows[0], rows[0]),
    };
    let parts = layers.iter().zip(first).map(|(&(i, rows), first)| (i, rows, first)).collect();
    Product { quantizer, rows: all, stride, parts }
}

#[cfg(test)]
mod tests {
    use super::super::{CudaEngine, Wanted};
    use super::*;
    use crate::check::{choices, shapes, synthetic};
    use crate::device::Executor;
    use crate::engine::Room;

    #[test]
    fn the_same_kernels_as_an_engine_launches() {
        let member = |name: &str| synthetic::trained(qp_codegen::palette::get(name).expect("in the palette"));
        let (a, b) = (member("nuq_3"), member("fast_1.5"));
        for (shape, shapes) in &shapes()[..2] {
            for (kind, choose) in choices(&a, &b) {
                let (config, weights) = synthetic::model(shapes, &*choose).unwrap();
                let on = Executor::interpreter();
                let mut engine = CudaEngine::new(on.clone(), &weights, Room::one(config.max_positions)).unwrap();
                let graph = engine.graph(1, Wanted::Best).unwrap();
                let mut launched: Vec<String> = graph.kernels().map(|k| k.kernel().to_string()).collect();
                let step = DecodeStep {
                    config: &config,
                    context: config.max_positions as u32,
                    elem: Elem::F32,
                    quantizer: &|layer, role| choose(&config.linear_name(layer, role)).map(Arc::new),
                    embedding: choose("model.embed_tokens").map(Arc::new),
                    head: choose("lm_head").map(Arc::new),
                };
                let mut known: Vec<String> = step.kernels().iter().map(|k| k(&on.device()).to_string()).collect();
                for list in [&mut launched, &mut known] {
                    list.sort();
                    list.dedup();
                }
                let names = |of: &[String]| of.iter().map(|k| k.lines().next().unwrap_or("").to_owned()).collect();
                let (launched_names, known_names): (Vec<String>, Vec<String>) = (names(&launched), names(&known));
                assert_eq!(known_names, launched_names, "{kind} {shape}");
                assert_eq!(known, launched, "{kind} {shape}");
            }
        }
    }
}

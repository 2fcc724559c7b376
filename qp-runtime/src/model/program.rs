//! What a model computes for each token, as a list of nodes over layers that are named but not there: no weights, no
//! device, no numbers of tokens.
//!
//! A [`Program`] is made from a configuration by one file of [`super::arch`]. Everything else walks it: engines compute
//! it, [`Weights`](super::Weights) holds what it names, plans and checkpoints choose a quantizer for each of its layers.
//! Nodes read and write [`Value`]s, each written once: a row of fixed width for each token.

use std::ops::Range;

use qp_codegen::reference::routing::{Routing, Unit};
use qp_codegen::reference::{Activation, Map, RmsNorm};

use super::rope::Rope;

/// A matrix of a model: index into [`Program::layers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub usize);

/// The weights of a norm: index into [`Program::vectors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VectorId(pub usize);

/// Keys and values of one attention: index into [`Program::caches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheId(pub usize);

/// How heads turn with their positions: index into [`Program::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RopeId(pub usize);

/// What a node writes: index into [`Program::widths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub usize);

/// A matrix that plans may quantize: a linear layer, or the embedding, of which rows are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Name in plans, checkpoints and measurements: that of the tensor, without `.weight`.
    pub name: String,
    /// Out features.
    pub rows: usize,
    /// In features.
    pub cols: usize,
    /// True if the tensor `NAME.bias`, one value a row, is added to the product.
    pub bias: bool,
    /// The layer whose matrix this one has, unless it is quantized by itself: the embedding, of a tied output layer.
    pub shares: Option<LayerId>,
}

/// The weights of a norm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vector {
    /// Name of the tensor.
    pub tensor: String,
    /// Values.
    pub len: usize,
}

/// A root-mean-square norm with its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The weights, of a whole row or of each head of it.
    pub weight: VectorId,
    /// What is computed with them.
    pub norm: RmsNorm,
}

/// Shape of the keys and values of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Heads of keys, and of values.
    pub heads: usize,
    /// Values of a head.
    pub head_dim: usize,
}

/// Attention of new tokens to all tokens of their sequences up to themselves. New keys and values enter the cache first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Where keys and values are kept.
    pub cache: CacheId,
    /// Queries: `heads · head_dim` values.
    pub q: Value,
    /// New keys: those of the cache's heads.
    pub k: Value,
    /// New values.
    pub v: Value,
    /// Results: as wide as the queries.
    pub y: Value,
    /// Heads of queries, a multiple of the cache's.
    pub heads: usize,
    /// Norm of each head of the queries, before they are turned.
    pub q_norm: Option<Norm>,
    /// The same of the keys.
    pub k_norm: Option<Norm>,
    /// How queries and keys turn; not at all in layers without positions.
    pub rope: Option<RopeId>,
    /// What scores, the products of queries and keys, are multiplied with.
    pub scale: f32,
    /// Positions that a token sees, its own included; all up to its own if there is no window.
    pub window: Option<usize>,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub soft_cap: Option<f32>,
    /// Logarithms of a weight without a value for each head: its sink.
    pub sinks: Option<VectorId>,
}

/// A mixture of experts: several feed-forward layers, of which each token goes through a few.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    /// What enters them.
    pub x: Value,
    /// The router's scores, one for each expert.
    pub scores: Value,
    /// The experts, in order.
    pub experts: Vec<Expert>,
    /// How a token's experts follow from its scores.
    pub routing: Routing,
    /// Added to what scores become, for choosing only.
    pub correction: Option<VectorId>,
    /// The gated unit of each.
    pub unit: Unit,
    /// The weighted sum of what the chosen give, in the order of the experts.
    pub y: Value,
}

/// One expert: `down(unit(gate(x), up(x)))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expert {
    /// Gates.
    pub gate: LayerId,
    /// What they gate.
    pub up: LayerId,
    /// Back to the width of the stream.
    pub down: LayerId,
}

/// A step of the computation.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// The tokens' rows of the embedding.
    Embed {
        /// The embedding.
        layer: LayerId,
        /// As wide as its columns.
        y: Value,
    },
    /// A norm.
    Norm {
        /// Input.
        x: Value,
        /// Which.
        norm: Norm,
        /// Output.
        y: Value,
    },
    /// Products with the matrices of one or several layers that read the same input, their biases added.
    Linear {
        /// Input.
        x: Value,
        /// Layers and their outputs.
        layers: Vec<(LayerId, Value)>,
    },
    /// Attention.
    Attend(Attention),
    /// A mixture of experts.
    Mix(Mixture),
    /// `activation(gate) · up`.
    Gate {
        /// What the function is applied to.
        gate: Value,
        /// What it is multiplied with.
        up: Value,
        /// The function.
        activation: Activation,
        /// Output.
        y: Value,
    },
    /// `x + z`.
    Add {
        /// One input: of a residual stream, the stream.
        x: Value,
        /// The other.
        z: Value,
        /// Output.
        y: Value,
    },
    /// A function of each row.
    Map {
        /// Input.
        x: Value,
        /// The function.
        map: Map,
        /// Output.
        y: Value,
    },
    /// A vector added to each row: the bias of a layer norm.
    Shift {
        /// Input, which nothing else reads.
        x: Value,
        /// What is added.
        by: VectorId,
        /// Output.
        y: Value,
    },
    /// Some neighbouring values of each row: what a layer that is several in one gives each.
    Part {
        /// Input.
        x: Value,
        /// The first of them.
        first: usize,
        /// Output.
        y: Value,
    },
    /// Only the tokens whose logits are wanted, in their order: values after this have no other rows.
    Rows {
        /// Rows of all tokens.
        x: Value,
        /// Rows of those that are wanted.
        y: Value,
    },
}

impl Node {
    /// The norms of heads of queries and keys.
    pub fn head_norms(&self) -> Vec<Norm> {
        match self {
            Node::Attend(a) => a.q_norm.into_iter().chain(a.k_norm).collect(),
            Node::Embed { .. }
            | Node::Norm { .. }
            | Node::Linear { .. }
            | Node::Gate { .. }
            | Node::Add { .. }
            | Node::Map { .. }
            | Node::Mix(_)
            | Node::Shift { .. }
            | Node::Part { .. }
            | Node::Rows { .. } => Vec::new(),
        }
    }

    /// The values that it reads.
    pub fn reads(&self) -> Vec<Value> {
        match self {
            Node::Embed { .. } => vec![],
            Node::Norm { x, .. }
            | Node::Linear { x, .. }
            | Node::Map { x, .. }
            | Node::Shift { x, .. }
            | Node::Part { x, .. }
            | Node::Rows { x, .. } => vec![*x],
            Node::Attend(a) => vec![a.q, a.k, a.v],
            Node::Mix(m) => vec![m.x, m.scores],
            Node::Gate { gate, up, .. } => vec![*gate, *up],
            Node::Add { x, z, .. } => vec![*x, *z],
        }
    }

    /// The values that it writes.
    pub fn writes(&self) -> Vec<Value> {
        match self {
            Node::Linear { layers, .. } => layers.iter().map(|l| l.1).collect(),
            Node::Attend(a) => vec![a.y],
            Node::Mix(m) => vec![m.y],
            Node::Embed { y, .. }
            | Node::Norm { y, .. }
            | Node::Gate { y, .. }
            | Node::Add { y, .. }
            | Node::Map { y, .. }
            | Node::Shift { y, .. }
            | Node::Part { y, .. }
            | Node::Rows { y, .. } => vec![*y],
        }
    }
}

impl Node {
    /// The layers that it multiplies with, those of one input together.
    pub fn groups(&self) -> Vec<Vec<LayerId>> {
        match self {
            Node::Linear { layers, .. } => vec![layers.iter().map(|l| l.0).collect()],
            Node::Mix(m) => m.experts.iter().flat_map(|e| [vec![e.gate, e.up], vec![e.down]]).collect(),
            Node::Embed { .. }
            | Node::Norm { .. }
            | Node::Attend(_)
            | Node::Gate { .. }
            | Node::Add { .. }
            | Node::Map { .. }
            | Node::Shift { .. }
            | Node::Part { .. }
            | Node::Rows { .. } => Vec::new(),
        }
    }

    /// True if it multiplies with a layer.
    fn computes(&self, id: LayerId) -> bool {
        match self {
            Node::Linear { layers, .. } => layers.iter().any(|l| l.0 == id),
            Node::Mix(m) => m.experts.iter().any(|e| [e.gate, e.up, e.down].contains(&id)),
            _ => false,
        }
    }
}

/// A place between nodes where all that is computed further on follows from one value: the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index of the node after it.
    pub node: usize,
    /// The value.
    pub stream: Value,
}

/// What a model computes. The last layer that is computed is the output layer, and the last value the logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// In order of execution. Each value is written before it is read, and by one node.
    pub nodes: Vec<Node>,
    /// Values of a token, by [`Value`].
    pub widths: Vec<usize>,
    /// Linear layers in order of execution, then the embedding.
    pub layers: Vec<Layer>,
    /// Weights of norms.
    pub vectors: Vec<Vector>,
    /// Keys and values.
    pub caches: Vec<Cache>,
    /// How queries and keys turn with their positions.
    pub ropes: Vec<Rope>,
    /// Before each decoder block, and behind the last.
    pub cuts: Vec<Cut>,
    /// Tokens known.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
}

impl Program {
    /// What it says of a layer.
    pub fn layer(&self, id: LayerId) -> &Layer {
        &self.layers[id.0]
    }

    /// All layers, in order.
    pub fn ids(&self) -> impl Iterator<Item = LayerId> + use<> {
        (0..self.layers.len()).map(LayerId)
    }

    /// The layer of a name.
    pub fn named(&self, name: &str) -> Option<LayerId> {
        self.layers.iter().position(|l| l.name == name).map(LayerId)
    }

    /// The layers that are looked up in, not multiplied with.
    pub fn is_embedding(&self, id: LayerId) -> bool {
        self.nodes.iter().any(|n| matches!(n, Node::Embed { layer, .. } if *layer == id))
    }

    /// For each layer, whether it is of a mixture's experts.
    pub fn expert_layers(&self) -> Vec<bool> {
        let mut out = vec![false; self.layers.len()];
        for node in &self.nodes {
            let Node::Mix(mixture) = node else { continue };
            mixture.experts.iter().flat_map(|e| [e.gate, e.up, e.down]).for_each(|id| out[id.0] = true);
        }
        out
    }

    /// True if the layer belongs to a decoder block and is no router: plans quantize those by default. A router is small,
    /// and a change of its scores chooses other experts.
    pub fn in_block(&self, id: LayerId) -> bool {
        let Some(node) = self.node_of(id) else { return false };
        let Some(block) = self.blocks().find(|b| b.contains(&node)) else { return false };
        let writes = match &self.nodes[node] {
            Node::Linear { layers, .. } => layers.iter().find(|l| l.0 == id).map(|l| l.1),
            _ => None,
        };
        let routes = |n: &Node| matches!(n, Node::Mix(m) if Some(m.scores) == writes);
        !self.nodes[block].iter().any(routes)
    }

    /// The node that computes a layer; `None` of an embedding.
    pub fn node_of(&self, id: LayerId) -> Option<usize> {
        self.nodes.iter().position(|n| n.computes(id))
    }

    /// The nodes of each decoder block.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        self.cuts.windows(2).map(|c| c[0].node..c[1].node)
    }

    /// The first node behind the decoder blocks.
    pub fn behind_blocks(&self) -> usize {
        self.cuts.last().expect("a program has a cut before its head").node
    }

    /// The layers that read one input, group by group: those may share a launch.
    pub fn groups(&self) -> impl Iterator<Item = Vec<LayerId>> {
        self.nodes.iter().flat_map(Node::groups)
    }

    /// The share of tokens that go through a layer, on average: of an expert's, as many as it is chosen by.
    pub fn share(&self, id: LayerId) -> f64 {
        match self.node_of(id).map(|node| &self.nodes[node]) {
            Some(Node::Mix(m)) => m.routing.chosen as f64 / m.experts.len() as f64,
            _ => 1.0,
        }
    }

    /// What a node computes, in words.
    pub fn describe(&self, node: usize) -> String {
        let block = self.blocks().position(|b| b.contains(&node));
        let place = block.map_or_else(String::new, |b| format!(" of decoder block {b}"));
        match &self.nodes[node] {
            Node::Linear { layers, .. } => format!("`{}`", self.layer(layers[0].0).name),
            Node::Embed { layer, .. } => format!("`{}`", self.layer(*layer).name),
            Node::Norm { norm, .. } => format!("`{}`", self.vectors[norm.weight.0].tensor),
            Node::Attend(_) => format!("the attention{place}"),
            Node::Gate { .. } => format!("the gated unit{place}"),
            Node::Mix(_) => format!("the experts{place}"),
            Node::Map { .. } | Node::Shift { .. } | Node::Part { .. } => format!("a function of values{place}"),
            Node::Add { .. } | Node::Rows { .. } => format!("the residual stream{place}"),
        }
    }

    /// The output layer.
    pub fn head(&self) -> LayerId {
        let last = self.nodes.iter().rev().find_map(|n| match n {
            Node::Linear { layers, .. } => Some(layers[0].0),
            _ => None,
        });
        last.expect("a program ends with its output layer")
    }

    /// The logits: what the last node writes.
    pub fn logits(&self) -> Value {
        self.nodes.last().expect("a program has nodes").writes()[0]
    }

    /// Of each node, the values that nothing reads after it.
    pub fn last_reads(&self) -> Vec<Vec<Value>> {
        let mut seen = vec![false; self.widths.len()];
        let mut out: Vec<Vec<Value>> = self
            .nodes
            .iter()
            .rev()
            .map(|n| {
                let mut last = n.reads();
                last.retain(|v| !std::mem::replace(&mut seen[v.0], true));
                last
            })
            .collect();
        out.reverse();
        out
    }
}

/// Writes a [`Program`] node by node.
#[derive(Debug)]
pub struct Builder(Program);

impl Builder {
    /// The program of a model with so many tokens and positions.
    pub fn new(vocab: usize, context: usize, ropes: Vec<Rope>) -> Self {
        Builder(Program {
            nodes: Vec::new(),
            widths: Vec::new(),
            layers: Vec::new(),
            vectors: Vec::new(),
            caches: Vec::new(),
            ropes,
            cuts: Vec::new(),
            vocab,
            context,
        })
    }

    fn value(&mut self, width: usize) -> Value {
        self.0.widths.push(width);
        Value(self.0.widths.len() - 1)
    }

    /// Names a matrix of `rows × cols`.
    pub fn layer(&mut self, name: impl Into<String>, rows: usize, cols: usize, bias: bool) -> LayerId {
        self.0.layers.push(Layer { name: name.into(), rows, cols, bias, shares: None });
        LayerId(self.0.layers.len() - 1)
    }

    /// Names a vector of `len` values.
    pub fn vector(&mut self, tensor: impl Into<String>, len: usize) -> VectorId {
        self.0.vectors.push(Vector { tensor: tensor.into(), len });
        VectorId(self.0.vectors.len() - 1)
    }

    /// Names the weights of a norm of `len` values.
    pub fn norm_of(&mut self, tensor: impl Into<String>, len: usize, norm: RmsNorm) -> Norm {
        Norm { weight: self.vector(tensor, len), norm }
    }

    /// Makes room for keys and values.
    pub fn cache(&mut self, heads: usize, head_dim: usize) -> CacheId {
        self.0.caches.push(Cache { heads, head_dim });
        CacheId(self.0.caches.len() - 1)
    }

    /// The first node: embeddings of `width`, whose layer is named by [`Builder::head`].
    pub fn embed(&mut self, width: usize) -> Value {
        let y = self.value(width);
        self.0.nodes.push(Node::Embed { layer: LayerId(usize::MAX), y });
        y
    }

    /// A norm whose weights are the tensor `name`.
    pub fn norm(&mut self, x: Value, name: impl Into<String>, norm: RmsNorm) -> Value {
        let width = self.0.widths[x.0];
        let norm = self.norm_of(name, width, norm);
        let y = self.value(width);
        self.0.nodes.push(Node::Norm { x, norm, y });
        y
    }

    /// Layers of one input: name, rows, whether there is a bias.
    pub fn linear<const N: usize>(&mut self, x: Value, layers: [(String, usize, bool); N]) -> [Value; N] {
        let cols = self.0.widths[x.0];
        let made = layers.map(|(name, rows, bias)| (self.layer(name, rows, cols, bias), self.value(rows)));
        self.0.nodes.push(Node::Linear { x, layers: made.to_vec() });
        made.map(|l| l.1)
    }

    /// Attention; `attention.y` is replaced by the value that is returned.
    pub fn attend(&mut self, attention: Attention) -> Value {
        let y = self.value(self.0.widths[attention.q.0]);
        self.0.nodes.push(Node::Attend(Attention { y, ..attention }));
        y
    }

    /// A mixture of experts; `mixture.y` is replaced by the value that is returned.
    pub fn mix(&mut self, mixture: Mixture) -> Value {
        let y = self.value(self.0.widths[mixture.x.0]);
        self.0.nodes.push(Node::Mix(Mixture { y, ..mixture }));
        y
    }

    /// A gated unit.
    pub fn gate(&mut self, gate: Value, up: Value, activation: Activation) -> Value {
        let y = self.value(self.0.widths[gate.0]);
        self.0.nodes.push(Node::Gate { gate, up, activation, y });
        y
    }

    /// A sum.
    pub fn add(&mut self, x: Value, z: Value) -> Value {
        let y = self.value(self.0.widths[x.0]);
        self.0.nodes.push(Node::Add { x, z, y });
        y
    }

    /// A function of each row.
    pub fn map(&mut self, x: Value, map: Map) -> Value {
        let y = self.value(self.0.widths[x.0]);
        self.0.nodes.push(Node::Map { x, map, y });
        y
    }

    /// A product with a number, unless it is 1.
    pub fn scaled(&mut self, x: Value, by: f32) -> Value {
        if by == 1.0 { x } else { self.map(x, Map::Scale(by)) }
    }

    /// A vector, the tensor `name`, added to each row of a value that nothing else reads.
    pub fn shift(&mut self, x: Value, name: impl Into<String>) -> Value {
        let width = self.0.widths[x.0];
        let by = self.vector(name, width);
        let y = self.value(width);
        self.0.nodes.push(Node::Shift { x, by, y });
        y
    }

    /// Neighbouring values of each row, `width` of them from `first` on.
    pub fn part(&mut self, x: Value, first: usize, width: usize) -> Value {
        let y = self.value(width);
        self.0.nodes.push(Node::Part { x, first, y });
        y
    }

    /// Values of a row.
    pub fn width(&self, x: Value) -> usize {
        self.0.widths[x.0]
    }

    /// Says that all that follows is computed from `stream`: before each decoder block, and behind the last.
    pub fn cut(&mut self, stream: Value) {
        self.0.cuts.push(Cut { node: self.0.nodes.len(), stream });
    }

    /// Only the rows of `x` that are wanted.
    pub fn rows(&mut self, x: Value) -> Value {
        let y = self.value(self.0.widths[x.0]);
        self.0.nodes.push(Node::Rows { x, y });
        y
    }

    /// The output layer `head` on `x`, the rows that are wanted, and the embedding's name. A tied output layer has the
    /// embedding's matrix. Gives the logits; they may be mapped before the program is [`done`](Builder::done).
    pub fn head(&mut self, x: Value, head: &str, embedding: &str, tied: bool) -> Value {
        let (vocab, width) = (self.0.vocab, self.0.widths[x.0]);
        let [logits] = self.linear(x, [(head.to_owned(), vocab, false)]);
        let embedding = self.layer(embedding, vocab, width, false);
        if let Some(Node::Embed { layer, .. }) = self.0.nodes.first_mut() {
            *layer = embedding;
        }
        self.0.layers[embedding.0 - 1].shares = tied.then_some(embedding);
        logits
    }

    /// The program.
    pub fn done(self) -> Program {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::Config;
    use crate::model::arch;

    fn small(architecture: &str) -> Program {
        let experts = match architecture {
            "MixtralForCausalLM" | "GptOssForCausalLM" => r#","num_local_experts":4,"num_experts_per_tok":2"#,
            "Qwen3MoeForCausalLM" => r#","num_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":16"#,
            "Glm4MoeForCausalLM" => {
                r#","n_routed_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":16,"first_k_dense_replace":1"#
            }
            _ => "",
        };
        let text = format!(
            r#"{{"architectures":["{architecture}"],"hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,
            "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":100,"max_position_embeddings":512,
            "rms_norm_eps":1e-5,"tie_word_embeddings":true{experts}}}"#
        );
        arch::program(&Config::parse(Path::new("config.json"), &text).unwrap())
    }

    #[test]
    fn every_program_is_written_before_it_is_read() {
        for architecture in arch::names() {
            let p = small(architecture);
            let mut written = vec![false; p.widths.len()];
            for node in &p.nodes {
                assert!(node.reads().iter().all(|v| written[v.0]), "{architecture}: {node:?}");
                for y in node.writes() {
                    assert!(!std::mem::replace(&mut written[y.0], true), "{architecture}: {node:?}");
                }
            }
            assert_eq!((p.blocks().count(), p.caches.len()), (2, 2), "{architecture}");
            // Nothing but the stream crosses a cut.
            let last = p.last_reads();
            for cut in &p.cuts {
                let before: Vec<Value> = (0..cut.node).flat_map(|n| p.nodes[n].reads()).chain([cut.stream]).collect();
                let after = last[cut.node..].iter().flatten().filter(|v| before.contains(v));
                assert_eq!(after.collect::<Vec<_>>(), [&cut.stream], "{architecture}");
            }
        }
    }

    #[test]
    fn experts_are_layers_and_routers_are_left_alone() {
        let p = small("MixtralForCausalLM");
        let named = |name: &str| p.named(&format!("model.layers.1.block_sparse_moe.{name}")).unwrap();
        let (router, gate, up, down) =
            (named("gate"), named("experts.3.w1"), named("experts.3.w3"), named("experts.3.w2"));
        assert!(!p.in_block(router) && p.in_block(gate) && p.in_block(down));
        assert_eq!(p.node_of(gate), p.node_of(down));
        let groups: Vec<_> = p.groups().filter(|g| g.contains(&up) || g.contains(&down)).collect();
        assert_eq!(groups, [vec![gate, up], vec![down]]);
        assert_eq!([router, gate, down].map(|id| p.share(id)), [1.0, 0.5, 0.5]);
    }

    #[test]
    fn layers_have_names_places_and_groups() {
        let p = small("Qwen2ForCausalLM");
        let names: Vec<&str> = p.layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names[..2], ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]);
        assert_eq!(names[13..], ["model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"]);
        let (q, down, head, embedding) = (LayerId(0), LayerId(13), LayerId(14), LayerId(15));
        assert_eq!(p.named("lm_head"), Some(head));
        assert!(p.layer(q).bias && !p.layer(down).bias && p.layer(head).shares == Some(embedding));
        assert!(p.in_block(q) && p.in_block(down) && !p.in_block(head) && !p.in_block(embedding));
        assert!(p.is_embedding(embedding) && !p.is_embedding(head) && p.node_of(embedding).is_none());
        let groups: Vec<usize> = p.groups().map(|g| g.len()).collect();
        assert_eq!(groups, [3, 1, 2, 1, 3, 1, 2, 1, 1]);
        assert_eq!((p.head(), p.logits()), (head, Value(p.widths.len() - 1)));
    }
}

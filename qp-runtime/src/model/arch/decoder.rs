//! The decoder that nearly all architectures are: blocks of attention and a feed-forward layer around a residual stream.
//! What differs is a [`Style`] and what the configuration says.

use qp_codegen::reference::routing::{Routing, Score, Unit};
use qp_codegen::reference::{Activation, Map, RmsNorm};

use crate::model::config::{self, Config};
use crate::model::program::{Attention, Builder, Expert, Mixture, Norm, Program, RopeId, Value};
use crate::model::weights::{EMBEDDING, HEAD};

/// How the blocks of an architecture are made.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// The kind of all norms of the residual stream.
    pub norm: Kind,
    /// Norm of what enters attention, if there is one.
    pub attention_in: Option<&'static str>,
    /// Norm of what attention adds to the stream.
    pub attention_out: Option<&'static str>,
    /// Norm of what enters the feed-forward layer; without one, of parallel blocks, what enters attention.
    pub feed_forward_in: Option<&'static str>,
    /// Norm of what the feed-forward layer adds to the stream.
    pub feed_forward_out: Option<&'static str>,
    /// Norms of queries and keys.
    pub heads: HeadNorms,
    /// True if queries, keys and values are one layer, `qkv_proj`.
    pub fused_qkv: bool,
    /// True if gates and what they gate are one layer, `gate_up_proj`.
    pub fused_gate: bool,
    /// True if attention and the feed-forward layer read the same norm of the stream.
    pub parallel: bool,
    /// False if the feed-forward layer is two layers, `c_fc` and `c_proj`, with an activation between them.
    pub gated: bool,
    /// True if neighbouring columns of a head turn together.
    pub interleaved: bool,
    /// Name of the last norm, without `.weight`.
    pub last: &'static str,
    /// True if each head has a sink.
    pub sinks: bool,
    /// How experts are named, in layers that [`Config::experts`] says have some.
    pub experts: Experts,
}

/// Names of a mixture of experts, within a block.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// The part of the block that has them.
    pub part: &'static str,
    /// The router.
    pub router: &'static str,
    /// Whether the router, and the experts' layers, have biases.
    pub biases: bool,
    /// Gates, what they gate, and the way back, of each expert.
    pub layers: [&'static str; 3],
    /// What is added to scores for choosing.
    pub correction: Option<&'static str>,
    /// Whether `shared_experts`, through which all tokens go, are added.
    pub shared: bool,
}

/// Kinds of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By the root of the mean square.
    Rms,
    /// The same, 1 added to the weights.
    RmsPlusOne,
    /// The mean is subtracted first.
    Layer,
    /// Then a bias is added.
    LayerWithBias,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorms {
    /// None.
    None,
    /// Each head by itself.
    Each,
    /// All heads together.
    Together,
}

/// Llama's.
pub const LLAMA: Style = Style {
    norm: Kind::Rms,
    attention_in: Some("input_layernorm"),
    attention_out: None,
    feed_forward_in: Some("post_attention_layernorm"),
    feed_forward_out: None,
    heads: HeadNorms::None,
    fused_qkv: false,
    fused_gate: false,
    parallel: false,
    gated: true,
    interleaved: false,
    last: "model.norm",
    sinks: false,
    experts: Experts {
        part: "mlp",
        router: "gate",
        biases: false,
        layers: ["gate_proj", "up_proj", "down_proj"],
        correction: None,
        shared: false,
    },
};

/// The program of a style.
pub fn decoder(config: &Config, style: &Style) -> Program {
    let (mut ropes, rope_of) = config.ropes();
    ropes.iter_mut().for_each(|rope| rope.interleaved = style.interleaved);
    let mut d = Decoder { b: Builder::new(config.vocab, config.max_positions, ropes), config, style };
    let embedded = d.b.embed(config.hidden);
    let mut stream = d.b.scaled(embedded, config.embedding_scale);
    for (i, rope) in rope_of.into_iter().enumerate() {
        d.b.cut(stream);
        stream = d.block(i, stream, rope.map(RopeId));
    }
    d.b.cut(stream);
    let rows = d.b.rows(stream);
    let normed = d.norm(rows, style.last);
    let mut logits = d.b.head(normed, HEAD, EMBEDDING, config.tied);
    logits = d.b.scaled(logits, config.logit_scale);
    if let Some(cap) = config.logit_cap {
        d.b.map(logits, Map::SoftCap(cap));
    }
    d.b.done()
}

struct Decoder<'c> {
    b: Builder,
    config: &'c Config,
    style: &'c Style,
}

impl Decoder<'_> {
    fn rms(&self) -> RmsNorm {
        RmsNorm { eps: self.config.norm_eps, add_one: self.style.norm == Kind::RmsPlusOne }
    }

    /// The norm of the stream `name`, without `.weight`.
    fn norm(&mut self, x: Value, name: &str) -> Value {
        let rms = self.rms();
        let weight = format!("{name}.weight");
        match self.style.norm {
            Kind::Rms | Kind::RmsPlusOne => self.b.norm(x, weight, rms),
            Kind::Layer | Kind::LayerWithBias => {
                let centered = self.b.map(x, Map::Center);
                let normed = self.b.norm(centered, weight, rms);
                if self.style.norm == Kind::Layer { normed } else { self.b.shift(normed, format!("{name}.bias")) }
            }
        }
    }

    fn norm_if(&mut self, x: Value, prefix: &str, name: Option<&str>) -> Value {
        name.map_or(x, |name| self.norm(x, &format!("{prefix}{name}")))
    }

    /// Block `i`: the stream behind it.
    fn block(&mut self, i: usize, stream: Value, rope: Option<RopeId>) -> Value {
        let (style, config) = (self.style, self.config);
        let prefix = format!("model.layers.{i}.");
        let entering = self.norm_if(stream, &prefix, style.attention_in);
        let attended = self.attention(i, &prefix, entering, rope);
        let attended = self.norm_if(attended, &prefix, style.attention_out);
        let attended = self.b.scaled(attended, config.residual_scale);
        let between = self.b.add(stream, attended);
        let entering = match (style.parallel, style.feed_forward_in) {
            (true, None) => entering,
            (true, name) => self.norm_if(stream, &prefix, name),
            (false, name) => self.norm_if(between, &prefix, name),
        };
        let fed = match &config.experts {
            Some(experts) if !experts.dense[i] => self.mixture(&prefix, entering, experts),
            _ => self.feed_forward(&prefix, entering),
        };
        let fed = self.norm_if(fed, &prefix, style.feed_forward_out);
        let fed = self.b.scaled(fed, config.residual_scale);
        self.b.add(between, fed)
    }

    fn attention(&mut self, i: usize, prefix: &str, x: Value, rope: Option<RopeId>) -> Value {
        let Config { hidden, heads, kv_heads, head_dim, qkv_bias, o_bias, .. } = *self.config;
        let name = |part: &str| format!("{prefix}self_attn.{part}");
        let (attended, cached) = (heads * head_dim, kv_heads * head_dim);
        let [mut q, mut k, v] = if self.style.fused_qkv {
            let [all] = self.b.linear(x, [(name("qkv_proj"), attended + 2 * cached, qkv_bias)]);
            [(0, attended), (attended, cached), (attended + cached, cached)].map(|(at, n)| self.b.part(all, at, n))
        } else {
            self.b.linear(
                x,
                [
                    (name("q_proj"), attended, qkv_bias),
                    (name("k_proj"), cached, qkv_bias),
                    (name("v_proj"), cached, qkv_bias),
                ],
            )
        };
        let rms = self.rms();
        let (mut q_norm, mut k_norm): (Option<Norm>, Option<Norm>) = (None, None);
        match self.style.heads {
            HeadNorms::None => (),
            HeadNorms::Each => {
                q_norm = Some(self.b.norm_of(name("q_norm.weight"), head_dim, rms));
                k_norm = Some(self.b.norm_of(name("k_norm.weight"), head_dim, rms));
            }
            HeadNorms::Together => {
                q = self.b.norm(q, name("q_norm.weight"), rms);
                k = self.b.norm(k, name("k_norm.weight"), rms);
            }
        }
        let cache = self.b.cache(kv_heads, head_dim);
        let sinks = self.style.sinks.then(|| self.b.vector(name("sinks"), heads));
        let y = self.b.attend(Attention {
            cache,
            q,
            k,
            v,
            y: Value(0),
            heads,
            q_norm,
            k_norm,
            rope,
            scale: self.config.score_scale,
            window: self.config.attends[i].window,
            soft_cap: self.config.score_cap,
            sinks,
        });
        let [o] = self.b.linear(y, [(name("o_proj"), hidden, o_bias)]);
        o
    }

    fn feed_forward(&mut self, prefix: &str, x: Value) -> Value {
        let Config { hidden, intermediate, mlp_bias, activation, .. } = *self.config;
        let name = |part: &str| format!("{prefix}mlp.{part}");
        if !self.style.gated {
            let [inner] = self.b.linear(x, [(name("c_fc"), intermediate, mlp_bias)]);
            let inner = self.b.map(inner, Map::Activate(activation));
            let [y] = self.b.linear(inner, [(name("c_proj"), hidden, mlp_bias)]);
            return y;
        }
        let inner = self.gated(x, &name(""), intermediate, activation);
        let [y] = self.b.linear(inner, [(name("down_proj"), hidden, mlp_bias)]);
        y
    }

    /// The gated unit of the layers whose names begin with `prefix`.
    fn gated(&mut self, x: Value, prefix: &str, width: usize, activation: Activation) -> Value {
        let bias = self.config.mlp_bias;
        let name = |part: &str| format!("{prefix}{part}");
        let [gate, up] = if self.style.fused_gate {
            let [all] = self.b.linear(x, [(name("gate_up_proj"), 2 * width, bias)]);
            [0, width].map(|at| self.b.part(all, at, width))
        } else {
            self.b.linear(x, [(name("gate_proj"), width, bias), (name("up_proj"), width, bias)])
        };
        self.b.gate(gate, up, activation)
    }

    fn mixture(&mut self, prefix: &str, x: Value, experts: &config::Experts) -> Value {
        let Config { hidden, activation, .. } = *self.config;
        let names = self.style.experts;
        let name = |part: &str| format!("{prefix}{}.{part}", names.part);
        let [scores] = self.b.linear(x, [(name(names.router), experts.count, names.biases)]);
        let correction = names.correction.map(|part| self.b.vector(name(part), experts.count));
        let made = (0..experts.count).map(|i| {
            let [gate, up, down] = names.layers.map(|layer| name(&format!("experts.{i}.{layer}")));
            Expert {
                gate: self.b.layer(gate, experts.inner, hidden, names.biases),
                up: self.b.layer(up, experts.inner, hidden, names.biases),
                down: self.b.layer(down, hidden, experts.inner, names.biases),
            }
        });
        let made = made.collect();
        let unit = match experts.clamped {
            Some((alpha, limit)) => Unit::Clamped { alpha, limit },
            None => Unit::Plain(activation),
        };
        let mixed = self.b.mix(Mixture {
            x,
            scores,
            experts: made,
            routing: Routing {
                chosen: experts.chosen,
                score: if experts.sigmoid { Score::Sigmoid } else { Score::Softmax },
                normalise: experts.normalise,
                scale: experts.scale,
            },
            correction,
            unit,
            y: Value(0),
        });
        if !names.shared || experts.shared == 0 {
            return mixed;
        }
        let inner = self.gated(x, &name("shared_experts."), experts.shared, activation);
        let [shared] = self.b.linear(inner, [(name("shared_experts.down_proj"), hidden, false)]);
        self.b.add(mixed, shared)
    }
}

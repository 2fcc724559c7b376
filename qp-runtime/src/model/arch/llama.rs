//! Llama, and what differs from it in biases alone: Mistral, Qwen2.
//!
//! Each decoder block adds two things to the residual stream: attention to a norm of it, and a feed-forward layer with a
//! gate on another norm of it.

use qp_codegen::reference::{Activation, RmsNorm};

use super::{Architecture, Window};
use crate::model::config::Config;
use crate::model::program::{Attention, Builder, Program, Rope, Value};
use crate::model::rope::frequencies;
use crate::model::weights::{EMBEDDING, HEAD};

/// Meta's Llama.
pub const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    kv_heads: None,
    head_dim: None,
    qkv_bias: false,
    attention_bias: true,
    mlp_bias: true,
    window: Window::Never,
    program: |config| decoder(config, Options::default()),
};

/// Mistral.
pub const MISTRAL: Architecture = Architecture {
    name: "MistralForCausalLM",
    model_type: "mistral",
    kv_heads: Some(8),
    attention_bias: false,
    mlp_bias: false,
    window: Window::Always(4096),
    ..LLAMA
};

/// Qwen 2 and 2.5.
pub const QWEN2: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    kv_heads: Some(32),
    qkv_bias: true,
    attention_bias: false,
    mlp_bias: false,
    window: Window::Flagged,
    ..LLAMA
};

/// What others of this kind add.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Norms of each head of queries and keys.
    pub head_norms: bool,
}

/// The decoder.
pub fn decoder(config: &Config, options: Options) -> Program {
    let Config { hidden, heads, kv_heads, head_dim, .. } = *config;
    let norm = RmsNorm { eps: config.norm_eps, add_one: false };
    let rope = Rope { frequencies: frequencies(config) };
    let mut b = Builder::new(config.vocab, config.max_positions, rope);
    let mut stream = b.embed(hidden);
    for i in 0..config.layers {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        b.cut(stream);
        let x = b.norm(stream, name("input_layernorm.weight"), norm);
        let (attended, cached) = (heads * head_dim, kv_heads * head_dim);
        let [q, k, v] = b.linear(
            x,
            [
                (name("self_attn.q_proj"), attended, config.qkv_bias),
                (name("self_attn.k_proj"), cached, config.qkv_bias),
                (name("self_attn.v_proj"), cached, config.qkv_bias),
            ],
        );
        let mut head_norm = |part: &str| options.head_norms.then(|| b.norm_of(name(part), head_dim, norm));
        let (q_norm, k_norm) = (head_norm("self_attn.q_norm.weight"), head_norm("self_attn.k_norm.weight"));
        let cache = b.cache(kv_heads, head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (window, soft_cap) = (None, None);
        let y = b.attend(Attention { cache, q, k, v, y: Value(0), heads, q_norm, k_norm, scale, window, soft_cap });
        let [o] = b.linear(y, [(name("self_attn.o_proj"), hidden, config.o_bias)]);
        stream = b.add(stream, o);
        let x = b.norm(stream, name("post_attention_layernorm.weight"), norm);
        let [gate, up] = b.linear(
            x,
            [
                (name("mlp.gate_proj"), config.intermediate, config.mlp_bias),
                (name("mlp.up_proj"), config.intermediate, config.mlp_bias),
            ],
        );
        let inner = b.gate(gate, up, Activation::Silu);
        let [down] = b.linear(inner, [(name("mlp.down_proj"), hidden, config.mlp_bias)]);
        stream = b.add(stream, down);
    }
    b.cut(stream);
    b.finish(stream, ("model.norm.weight", norm), HEAD, EMBEDDING, config.tied)
}

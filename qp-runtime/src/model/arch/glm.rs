//! Zhipu's GLM: one layer for gates and what they gate, half of each head turning, neighbouring columns together. GLM-4 of
//! 2025 adds norms behind attention and the feed-forward layer.

use super::Architecture;
use super::decoder::{self, Style, decoder};
use super::llama::LLAMA;

const STYLE: Style = Style { fused_gate: true, interleaved: true, ..decoder::LLAMA };

const STYLE_4: Style =
    Style { attention_out: Some("post_self_attn_layernorm"), feed_forward_out: Some("post_mlp_layernorm"), ..STYLE };

/// GLM-4 9B.
pub const GLM: Architecture = Architecture {
    name: "GlmForCausalLM",
    model_type: "glm",
    kv_heads: Some(2),
    head_dim: Some(128),
    attention_bias: false,
    mlp_bias: false,
    default_eps: 1.5625e-7,
    partial: Some(0.5),
    read: |keys, config| {
        config.qkv_bias = keys.truth("attention_bias")?.unwrap_or(true);
        Ok(())
    },
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

/// GLM-4-0414.
pub const GLM4: Architecture =
    Architecture { name: "Glm4ForCausalLM", model_type: "glm4", program: |config| decoder(config, &STYLE_4), ..GLM };

//! OpenAI's gpt-oss: experts with clamped gates, heads with sinks, windows in every other layer.

use super::decoder::{self, Experts, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::config;

const STYLE: Style = Style {
    sinks: true,
    experts: Experts { router: "router", biases: true, ..decoder::LLAMA.experts },
    ..decoder::LLAMA
};

/// Steepness of the gate.
const ALPHA: f32 = 1.702;

/// gpt-oss.
pub const GPT_OSS: Architecture = Architecture {
    name: "GptOssForCausalLM",
    model_type: "gpt_oss",
    kv_heads: Some(8),
    head_dim: Some(64),
    attention_bias: false,
    mlp_bias: false,
    window: Window::Alternating { width: 128, every: 2 },
    default_eps: 1e-5,
    theta: 150_000.0,
    mxfp4: true,
    stacked: true,
    read: |keys, config| {
        let bias = keys.truth("attention_bias")?.unwrap_or(true);
        (config.qkv_bias, config.o_bias) = (bias, bias);
        let chosen = if keys.has("experts_per_token") { "experts_per_token" } else { "num_experts_per_tok" };
        let names = ["num_local_experts", chosen, "intermediate_size"];
        let mut experts = config::Experts::new(keys, config.layers, names)?;
        experts.clamped = Some((ALPHA, keys.positive("swiglu_limit")?.unwrap_or(7.0) as f32));
        config.experts = Some(experts);
        keys.ignore(&["num_experts_per_tok", "initial_context_length", "output_router_logits", "router_aux_loss_coef"]);
        Ok(())
    },
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

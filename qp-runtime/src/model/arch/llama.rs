//! Llama, and what differs from it in biases, widths and windows alone: Mistral, Qwen 2, Seed-OSS.

use qp_codegen::reference::Activation;

use super::decoder::{self, decoder};
use super::{Architecture, Window};

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
    norm_eps: "rms_norm_eps",
    default_eps: 1e-6,
    theta: 10000.0,
    partial: None,
    activation: Activation::Silu,
    tied: false,
    mxfp4: false,
    stacked: false,
    read: |_, _| Ok(()),
    program: |config| decoder(config, &decoder::LLAMA),
};

/// Mistral.
pub const MISTRAL: Architecture = Architecture {
    name: "MistralForCausalLM",
    model_type: "mistral",
    kv_heads: Some(8),
    attention_bias: false,
    mlp_bias: false,
    window: Window::Always(Some(4096)),
    ..LLAMA
};

/// Ministral: a Mistral whose layers may differ in windows.
pub const MINISTRAL: Architecture = Architecture { name: "MinistralForCausalLM", model_type: "ministral", ..MISTRAL };

/// Ministral 3.
pub const MINISTRAL_3: Architecture =
    Architecture { name: "Ministral3ForCausalLM", model_type: "ministral3", window: Window::Always(None), ..MISTRAL };

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

/// ByteDance's Seed-OSS: biases of queries, keys and values, and by another key of attention's output.
pub const SEED_OSS: Architecture = Architecture {
    name: "SeedOssForCausalLM",
    model_type: "seed_oss",
    kv_heads: Some(8),
    head_dim: Some(128),
    attention_bias: false,
    read: |keys, config| {
        keys.ignore(&["residual_dropout"]);
        config.qkv_bias = keys.truth("attention_bias")?.unwrap_or(true);
        config.o_bias = keys.truth("attention_out_bias")?.unwrap_or(false);
        Ok(())
    },
    ..LLAMA
};

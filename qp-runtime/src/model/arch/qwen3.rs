//! Qwen 3: a Llama whose queries and keys pass a norm, head by head, before they turn.

use super::decoder::{self, HeadNorms, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};

/// Qwen 3, without experts.
pub const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    kv_heads: Some(32),
    head_dim: Some(128),
    mlp_bias: false,
    window: Window::Flagged,
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

/// Its blocks.
pub const STYLE: Style = Style { heads: HeadNorms::Each, ..decoder::LLAMA };

//! Phi 3 and 4: a Llama with one layer for queries, keys and values, one for gates and what they gate, of whose heads a
//! part may turn.

use super::decoder::{self, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};

const STYLE: Style = Style { fused_qkv: true, fused_gate: true, ..decoder::LLAMA };

/// Phi 3, 3.5, 4 and 4 mini.
pub const PHI3: Architecture = Architecture {
    name: "Phi3ForCausalLM",
    model_type: "phi3",
    attention_bias: false,
    mlp_bias: false,
    window: Window::Always(None),
    default_eps: 1e-5,
    partial: Some(1.0),
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

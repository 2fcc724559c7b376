//! Qwen 3: a Llama whose queries and keys pass a norm, head by head, before they turn.

use super::Architecture;
use super::llama::{Options, decoder};

/// Qwen 3, without experts.
pub const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    qkv_bias: false,
    window_by_flag: true,
    program: |config| decoder(config, Options { head_norms: true }),
};

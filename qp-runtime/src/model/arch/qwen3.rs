//! Qwen 3: a Llama whose queries and keys pass a norm, head by head, before they turn. Some have
//! mixtures of experts.

use super::decoder::{self, HeadNorms, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::config::Experts;

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

/// Qwen 3 with experts.
pub const QWEN3_MOE: Architecture = Architecture {
    name: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    kv_heads: Some(4),
    head_dim: None,
    read: |keys, config| {
        // Releases of transformers from the fifth on write another name.
        let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
        let names = [count, "num_experts_per_tok", "moe_intermediate_size"];
        let mut experts = Experts::new(keys, config.layers, names)?;
        experts.normalise = keys.truth("norm_topk_prob")?.unwrap_or(false);
        let (plain, step) = (keys.wholes("mlp_only_layers")?, keys.whole("decoder_sparse_step")?.unwrap_or(1).max(1));
        let plain = plain.unwrap_or_default();
        for (i, dense) in experts.dense.iter_mut().enumerate() {
            *dense = plain.contains(&i) || !(i + 1).is_multiple_of(step);
        }
        config.experts = Some(experts);
        keys.ignore(&["output_router_logits", "router_aux_loss_coef"]);
        Ok(())
    },
    ..QWEN3
};

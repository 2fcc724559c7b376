//! Zhipu's GLM: one layer for gates and what they gate, half of each head turning, neighbouring columns together. GLM-4 of
//! 2025 adds norms behind attention and the feed-forward layer. GLM-4.5 and its successors are mixtures of experts, of
//! another kind otherwise.

use super::Architecture;
use super::decoder::{self, Experts, HeadNorms, Style, decoder};
use super::llama::LLAMA;
use crate::model::{Error, config};

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

const STYLE_MOE: Style = Style {
    experts: Experts { correction: Some("gate.e_score_correction_bias"), shared: true, ..decoder::LLAMA.experts },
    ..decoder::LLAMA
};

/// GLM-4.5, 4.6 and 4.7.
pub const GLM4_MOE: Architecture = Architecture {
    name: "Glm4MoeForCausalLM",
    model_type: "glm4_moe",
    kv_heads: Some(8),
    head_dim: None,
    default_eps: 1e-5,
    read: |keys, config| {
        config.qkv_bias = keys.truth("attention_bias")?.unwrap_or(false);
        config.head_norms = keys.truth("use_qk_norm")?.unwrap_or(false);
        let names = ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"];
        let mut experts = config::Experts::new(keys, config.layers, names)?;
        let groups = keys.whole("n_group")?.unwrap_or(1);
        if groups != 1 {
            return Err(Error::Unsupported {
                path: keys.path().to_owned(),
                what: format!("n_group {groups}"),
                supported: "1".to_owned(),
            });
        }
        keys.ignore(&["topk_group", "output_router_logits", "router_aux_loss_coef"]);
        experts.sigmoid = true;
        experts.normalise = keys.truth("norm_topk_prob")?.unwrap_or(true);
        experts.scale = keys.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32;
        experts.shared = keys.whole("n_shared_experts")?.unwrap_or(1).saturating_mul(experts.inner).min(config::MOST);
        let first = keys.whole("first_k_dense_replace")?.unwrap_or(1);
        experts.dense.iter_mut().take(first).for_each(|dense| *dense = true);
        config.experts = Some(experts);
        // Layers behind the last guess further tokens.
        config.unused_layers = keys.whole("num_nextn_predict_layers")?.unwrap_or(0).min(1 << 10);
        Ok(())
    },
    program: |config| {
        let heads = if config.head_norms { HeadNorms::Each } else { HeadNorms::None };
        decoder(config, &Style { heads, ..STYLE_MOE })
    },
    ..GLM
};

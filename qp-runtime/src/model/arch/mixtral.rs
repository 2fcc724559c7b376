//! Mixtral: a Mistral whose feed-forward layer is a mixture of experts.

use super::decoder::{self, Experts, Style, decoder};
use super::llama::MISTRAL;
use super::{Architecture, Window};
use crate::model::config;

const STYLE: Style = Style {
    experts: Experts { part: "block_sparse_moe", layers: ["w1", "w3", "w2"], ..decoder::LLAMA.experts },
    ..decoder::LLAMA
};

/// Mixtral.
pub const MIXTRAL: Architecture = Architecture {
    name: "MixtralForCausalLM",
    model_type: "mixtral",
    window: Window::Always(None),
    default_eps: 1e-5,
    theta: 1e6,
    read: |keys, config| {
        let names = ["num_local_experts", "num_experts_per_tok", "intermediate_size"];
        config.experts = Some(config::Experts::new(keys, config.layers, names)?);
        keys.ignore(&["output_router_logits", "router_aux_loss_coef", "router_jitter_noise"]);
        Ok(())
    },
    program: |config| decoder(config, &STYLE),
    ..MISTRAL
};

//! OLMo 2 and 3: norms behind attention and the feed-forward layer instead of before them, and of all heads of queries and
//! of keys together. OLMo 3 has windows in three of four layers, where positions are not stretched.

use super::decoder::{self, HeadNorms, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::config::Turn;

const STYLE: Style = Style {
    attention_in: None,
    attention_out: Some("post_attention_layernorm"),
    feed_forward_in: None,
    feed_forward_out: Some("post_feedforward_layernorm"),
    heads: HeadNorms::Together,
    ..decoder::LLAMA
};

/// OLMo 2.
pub const OLMO2: Architecture = Architecture {
    name: "Olmo2ForCausalLM",
    model_type: "olmo2",
    mlp_bias: false,
    default_eps: 1e-5,
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

/// OLMo 3.
pub const OLMO3: Architecture = Architecture {
    name: "Olmo3ForCausalLM",
    model_type: "olmo3",
    window: Window::Alternating { width: 4096, every: 4 },
    read: |_, config| {
        config.local_theta.get_or_insert(config.rope_theta);
        for attends in config.attends.iter_mut().filter(|a| a.window.is_some()) {
            attends.turn = Turn::Local;
        }
        Ok(())
    },
    ..OLMO2
};

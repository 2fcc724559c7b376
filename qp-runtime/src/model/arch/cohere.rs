//! Cohere's Command: attention and the feed-forward layer beside each other behind one layer norm, neighbouring columns
//! turning together, scaled logits. The second has windows in three of four layers, and only those turn.

use super::decoder::{self, Kind, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::Error;
use crate::model::config::{Config, Turn};
use crate::model::keys::Keys;

const STYLE: Style =
    Style { norm: Kind::Layer, feed_forward_in: None, parallel: true, interleaved: true, ..decoder::LLAMA };

/// Command R.
pub const COHERE: Architecture = Architecture {
    name: "CohereForCausalLM",
    model_type: "cohere",
    mlp_bias: false,
    norm_eps: "layer_norm_eps",
    default_eps: 1e-5,
    tied: true,
    read: logits,
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};

/// Command R7B and Command A.
pub const COHERE2: Architecture = Architecture {
    name: "Cohere2ForCausalLM",
    model_type: "cohere2",
    window: Window::Alternating { width: 4096, every: 4 },
    read: |keys, config| {
        keys.ignore(&["order_of_interleaved_layers", "position_embedding_type", "rotary_pct"]);
        logits(keys, config)?;
        for attends in config.attends.iter_mut().filter(|a| a.window.is_none()) {
            attends.turn = Turn::Never;
        }
        Ok(())
    },
    ..COHERE
};

fn logits(keys: &Keys, config: &mut Config) -> Result<(), Error> {
    config.logit_scale = keys.positive("logit_scale")?.unwrap_or(0.0625) as f32;
    Ok(())
}

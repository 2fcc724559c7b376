//! Gemma: embeddings times the root of their width, norms that add 1 to their weights, a gated unit with GELU. Gemma 2
//! adds norms behind attention and the feed-forward layer, soft caps, and windows in every other layer; Gemma 3 has norms of
//! heads instead of caps, and layers with windows turn by a base of their own.

use qp_codegen::reference::Activation;

use super::decoder::{self, HeadNorms, Kind, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::Error;
use crate::model::config::{Config, Turn};
use crate::model::keys::Keys;
use crate::model::program::Program;

const STYLE: Style = Style { norm: Kind::RmsPlusOne, ..decoder::LLAMA };

const STYLE_2: Style = Style {
    attention_out: Some("post_attention_layernorm"),
    feed_forward_in: Some("pre_feedforward_layernorm"),
    feed_forward_out: Some("post_feedforward_layernorm"),
    ..STYLE
};

const STYLE_3: Style = Style { heads: HeadNorms::Each, ..STYLE_2 };

/// The first Gemma.
pub const GEMMA: Architecture = Architecture {
    name: "GemmaForCausalLM",
    model_type: "gemma",
    kv_heads: Some(16),
    head_dim: Some(256),
    mlp_bias: false,
    activation: Activation::GeluTanh,
    tied: true,
    read: |keys, config| {
        config.embedding_scale = (config.hidden as f32).sqrt();
        hold_one(keys, config)
    },
    program: |config| made(config, &STYLE),
    ..LLAMA
};

/// Gemma 2.
pub const GEMMA_2: Architecture = Architecture {
    name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    kv_heads: Some(4),
    window: Window::Alternating { width: 4096, every: 2 },
    read: |keys, config| caps(keys, config, (Some(50.0), Some(30.0))),
    program: |config| made(config, &STYLE_2),
    ..GEMMA
};

/// The text of Gemma 3.
pub const GEMMA_3: Architecture = Architecture {
    name: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    kv_heads: Some(4),
    window: Window::Alternating { width: 4096, every: 6 },
    theta: 1e6,
    read: |keys, config| {
        caps(keys, config, (None, None))?;
        if keys.truth("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(Error::Unsupported {
                path: keys.path().to_owned(),
                what: "use_bidirectional_attention".to_owned(),
                supported: "attention to earlier tokens".to_owned(),
            });
        }
        let theta = keys.number("rope_local_base_freq")?.unwrap_or(10_000.0);
        config.local_theta.get_or_insert(theta);
        for attends in config.attends.iter_mut().filter(|a| a.window.is_some()) {
            attends.turn = Turn::Local;
        }
        Ok(())
    },
    program: |config| made(config, &STYLE_3),
    ..GEMMA
};

/// What Gemma 2 and 3 say of scores and logits; caps have defaults where their keys are absent, and are none where they say
/// null.
fn caps(keys: &Keys, config: &mut Config, defaults: (Option<f64>, Option<f64>)) -> Result<(), Error> {
    config.embedding_scale = (config.hidden as f32).sqrt();
    config.score_scale = 1.0 / (keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0) as f32).sqrt();
    let cap = |key: &str, default: Option<f64>| {
        let default = default.filter(|_| !keys.has(key));
        Ok::<_, Error>(keys.positive(key)?.or(default).map(|cap| cap as f32))
    };
    config.score_cap = cap("attn_logit_softcapping", defaults.0)?;
    config.logit_cap = cap("final_logit_softcapping", defaults.1)?;
    hold_one(keys, config)
}

/// Weights of norms hold the 1 that is added to them where the model came from a GGUF file.
fn hold_one(keys: &Keys, config: &mut Config) -> Result<(), Error> {
    config.norms_hold_one = keys.truth("norms_hold_one")?.unwrap_or(false);
    Ok(())
}

fn made(config: &Config, style: &Style) -> Program {
    let norm = if config.norms_hold_one { Kind::Rms } else { style.norm };
    decoder(config, &Style { norm, ..*style })
}

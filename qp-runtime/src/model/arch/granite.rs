//! IBM's Granite 3: a Llama with multipliers.

use super::Architecture;
use super::llama::LLAMA;

/// Granite 3, dense.
pub const GRANITE: Architecture = Architecture {
    name: "GraniteForCausalLM",
    model_type: "granite",
    read: |keys, config| {
        let number = |key: &str| Ok::<_, crate::model::Error>(keys.positive(key)?.unwrap_or(1.0) as f32);
        config.embedding_scale = number("embedding_multiplier")?;
        config.residual_scale = number("residual_multiplier")?;
        config.score_scale = number("attention_multiplier")?;
        config.logit_scale = 1.0 / number("logits_scaling")?;
        Ok(())
    },
    ..LLAMA
};

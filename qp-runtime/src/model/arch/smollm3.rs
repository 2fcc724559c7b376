//! SmolLM 3: a Llama, some of whose layers do not turn queries and keys.

use super::llama::LLAMA;
use super::{Architecture, Window};
use crate::model::Error;
use crate::model::config::Turn;

/// SmolLM 3.
pub const SMOLLM3: Architecture = Architecture {
    name: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    kv_heads: Some(4),
    window: Window::Flagged,
    theta: 2e6,
    tied: true,
    read: |keys, config| {
        let interval = keys.whole("no_rope_layer_interval")?.unwrap_or(4).max(1);
        // The key says 1 of the layers that turn.
        let given = keys.truths("no_rope_layers")?;
        if let Some(given) = given.as_ref().filter(|g| g.len() != config.layers) {
            let what =
                format!("no_rope_layers has {} entries, but num_hidden_layers is {}", given.len(), config.layers);
            return Err(Error::file(keys.path(), what));
        }
        for (i, attends) in config.attends.iter_mut().enumerate() {
            let turns = given.as_ref().map_or(!(i + 1).is_multiple_of(interval), |g| g[i]);
            attends.turn = if turns { Turn::Main } else { Turn::Never };
        }
        Ok(())
    },
    ..LLAMA
};

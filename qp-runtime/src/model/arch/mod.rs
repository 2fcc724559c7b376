//! Architectures: from a configuration to a [`Program`], one file each.
//!
//! Adding one is adding a file with an [`Architecture`] and naming it in [`ALL`].

pub mod llama;
pub mod qwen3;

use super::config::Config;
use super::program::Program;

/// What differs between architectures.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Name in `config.json`.
    pub name: &'static str,
    /// The `model_type` that goes with it.
    pub model_type: &'static str,
    /// Heads of keys and values where `config.json` says nothing, if they are not as many as of queries.
    pub kv_heads: Option<usize>,
    /// Width of a head where `config.json` says nothing, if it is not the stream's width divided by the heads.
    pub head_dim: Option<usize>,
    /// True if queries, keys and values have biases, and nothing else in attention, whatever `config.json` says.
    pub qkv_bias: bool,
    /// True if `attention_bias` is read: of queries, keys, values and attention's output.
    pub attention_bias: bool,
    /// True if `mlp_bias` is read.
    pub mlp_bias: bool,
    /// How a sliding window is asked for.
    pub window: Window,
    /// What it computes.
    pub program: fn(&Config) -> Program,
}

/// How `config.json` asks for a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Not at all: its keys mean nothing.
    Never,
    /// By `sliding_window`, in all layers; so many tokens where the key is absent.
    Always(usize),
    /// By `sliding_window` if `use_sliding_window` is true, in layers from `max_window_layers` on.
    Flagged,
}

/// All that engines compute.
pub const ALL: [Architecture; 4] = [llama::LLAMA, llama::MISTRAL, llama::QWEN2, qwen3::QWEN3];

/// Their names.
pub fn names() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|a| a.name)
}

/// The architecture of a name.
pub fn find(name: &str) -> Option<&'static Architecture> {
    const { &ALL }.iter().find(|a| a.name == name)
}

/// The architecture of a `model_type`.
pub fn of_type(model_type: &str) -> Option<&'static Architecture> {
    const { &ALL }.iter().find(|a| a.model_type == model_type)
}

/// The program of a checked configuration.
///
/// # Panics
/// If its architecture is unknown, which no checked configuration's is.
pub fn program(config: &Config) -> Program {
    (find(&config.architecture).expect("a configuration names a known architecture").program)(config)
}

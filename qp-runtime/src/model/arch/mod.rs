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
    /// True if queries, keys and values have biases, and nothing else in attention, whatever `config.json` says.
    pub qkv_bias: bool,
    /// True if `sliding_window` counts only beside `use_sliding_window`.
    pub window_by_flag: bool,
    /// What it computes.
    pub program: fn(&Config) -> Program,
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

/// The program of a checked configuration.
///
/// # Panics
/// If its architecture is unknown, which no checked configuration's is.
pub fn program(config: &Config) -> Program {
    (find(&config.architecture).expect("a configuration names a known architecture").program)(config)
}

//! Architectures: from a configuration to a [`Program`], one file each.
//!
//! Adding one is adding a file with an [`Architecture`] and naming it in [`ALL`]. Nearly all are a style of the one
//! [`decoder`].

pub mod cohere;
pub mod decoder;
pub mod gemma;
pub mod glm;
pub mod gpt_oss;
pub mod granite;
pub mod llama;
pub mod mixtral;
pub mod olmo;
pub mod phi3;
pub mod qwen3;
pub mod smollm3;
pub mod starcoder2;

use qp_codegen::reference::Activation;

use super::Error;
use super::config::Config;
use super::keys::Keys;
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
    /// The key of what is added to the mean square in norms.
    pub norm_eps: &'static str,
    /// Its value where the key is absent.
    pub default_eps: f64,
    /// Base of the rotary frequencies where `config.json` says nothing.
    pub theta: f64,
    /// If `partial_rotary_factor` is read, its value where the key is absent.
    pub partial: Option<f64>,
    /// Activation of the feed-forward layer where `config.json` says nothing.
    pub activation: Activation,
    /// Whether the output layer is the embedding where `config.json` says nothing.
    pub tied: bool,
    /// Whether experts may be stored in MXFP4.
    pub mxfp4: bool,
    /// Whether the experts of a layer are stored as one tensor, gates and what they gate by turns.
    pub stacked: bool,
    /// Reads keys that only this architecture has, and changes what follows from them.
    pub read: fn(&Keys, &mut Config) -> Result<(), Error>,
    /// What it computes.
    pub program: fn(&Config) -> Program,
}

/// How `config.json` asks for a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Not at all: its keys mean nothing.
    Never,
    /// By `sliding_window`, in all layers; so many tokens where the key is absent.
    Always(Option<usize>),
    /// By `sliding_window` if `use_sliding_window` is true, in layers from `max_window_layers` on.
    Flagged,
    /// By `sliding_window`, in all layers but each so many-th.
    Alternating {
        /// Tokens where the key is absent.
        width: usize,
        /// The last of so many layers has none, where neither `layer_types` nor `sliding_window_pattern` is given.
        every: usize,
    },
}

/// All that engines compute.
pub const ALL: [Architecture; 24] = [
    llama::LLAMA,
    llama::MISTRAL,
    llama::MINISTRAL,
    llama::MINISTRAL_3,
    llama::QWEN2,
    llama::SEED_OSS,
    qwen3::QWEN3,
    qwen3::QWEN3_MOE,
    mixtral::MIXTRAL,
    gpt_oss::GPT_OSS,
    gemma::GEMMA,
    gemma::GEMMA_2,
    gemma::GEMMA_3,
    phi3::PHI3,
    smollm3::SMOLLM3,
    granite::GRANITE,
    olmo::OLMO2,
    olmo::OLMO3,
    cohere::COHERE,
    cohere::COHERE2,
    glm::GLM,
    glm::GLM4,
    glm::GLM4_MOE,
    starcoder2::STARCODER2,
];

/// Models of several parts, of which the text's is read: name and `model_type`. The text's own `model_type` says what its
/// architecture is.
pub const OF_PARTS: [(&str, &str); 2] =
    [("Mistral3ForConditionalGeneration", "mistral3"), ("Gemma3ForConditionalGeneration", "gemma3")];

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

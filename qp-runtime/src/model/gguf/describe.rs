//! What a GGUF file says of a model that comes from a directory: the keys of its architecture, and its names of tensors. The
//! inverse of what [`super::config`] and [`super::Gguf::tensors`] read.
//!
//! Nothing here decides whether the file says all: what it says is read again and compared ([`differences`]).

use serde_json::Value as Json;

use super::arch::{self, Architecture, STACKED};
use super::write::{Put, Values};
use super::{INNER, OUTER};
use crate::model::config::{Config, Turn};
use crate::model::rope::{Rope, RopeScaling};

/// Architectures whose keys are written, by Hugging Face's names.
const WRITTEN: [&str; 16] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "SeedOssForCausalLM",
    "Starcoder2ForCausalLM",
];

/// A model as a file has it.
pub struct Target<'c> {
    arch: &'static Architecture,
    config: &'c Config,
}

/// A tensor as a file has it.
#[derive(Debug, PartialEq)]
pub struct Called {
    /// Its name.
    pub name: String,
    /// Which expert it is of, if the file stacks it with those of others.
    pub expert: Option<usize>,
    /// Heads whose halves are interleaved, if they are.
    pub heads: Option<usize>,
    /// True if it is kept in 32-bit floats whatever it was.
    pub single: bool,
    /// True if 1 is added to it.
    pub one_more: bool,
}

impl<'c> Target<'c> {
    /// The file of a model with this configuration.
    ///
    /// # Errors
    /// Why there is none.
    pub fn new(config: &'c Config) -> Result<Self, String> {
        let name = config.architecture.as_str();
        let known = WRITTEN.contains(&name).then(|| arch::named(name)).flatten();
        let arch = known.ok_or_else(|| {
            format!("is of the architecture {name}, which is not written as GGUF; known are {}", WRITTEN.join(", "))
        })?;
        match config.of_parts {
            true => Err("is a part of a model of several parts, which is not written as GGUF".to_owned()),
            false => Ok(Target { arch, config }),
        }
    }

    /// The keys of the architecture. `json` is `config.json`.
    pub fn values(&self, json: &Json) -> Values {
        let c = self.config;
        let mut out = vec![("general.architecture".to_owned(), Put::Text(self.arch.prefix.to_owned()))];
        out.push(("general.type".to_owned(), Put::Text("model".to_owned())));
        // That of llama.cpp's blocks.
        out.push(("general.quantization_version".to_owned(), Put::U32(2)));
        let mut put = |key: &str, value: Put| out.push((format!("{}.{key}", self.arch.prefix), value));
        for (key, size) in [
            ("block_count", c.layers),
            ("context_length", c.max_positions),
            ("embedding_length", c.hidden),
            ("feed_forward_length", c.intermediate),
            ("attention.head_count", c.heads),
            ("attention.head_count_kv", c.kv_heads),
            ("attention.key_length", c.head_dim),
            ("attention.value_length", c.head_dim),
            ("rope.dimension_count", c.rotary),
            ("vocab_size", c.vocab),
        ] {
            put(key, Put::U32(size as u32));
        }
        put(self.arch.eps[0], Put::F32(c.norm_eps));
        put("rope.freq_base", Put::F32(c.rope_theta as f32));
        if let Some(theta) = c.local_theta {
            put("rope.freq_base_swa", Put::F32(theta as f32));
        }
        match &c.rope_scaling {
            RopeScaling::Linear { factor } => {
                put("rope.scaling.type", Put::Text("linear".to_owned()));
                put("rope.scaling.factor", Put::F32(*factor as f32));
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate: _, attention: _ } => {
                put("rope.scaling.type", Put::Text("yarn".to_owned()));
                put("rope.scaling.factor", Put::F32(*factor as f32));
                put("rope.scaling.original_context_length", Put::U32(*original as u32));
                put("rope.scaling.yarn_beta_fast", Put::F32(*beta_fast as f32));
                put("rope.scaling.yarn_beta_slow", Put::F32(*beta_slow as f32));
            }
            // Llama 3's is a tensor; that of LongRoPE is not written.
            RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Long { .. } => (),
        }
        if let Some(window) = c.attends.iter().find_map(|a| a.window) {
            put("attention.sliding_window", Put::U32(window as u32));
        }
        for (key, cap) in [("attn_logit_softcapping", c.score_cap), ("final_logit_softcapping", c.logit_cap)] {
            if let Some(cap) = cap {
                put(key, Put::F32(cap));
            }
        }
        if let Some(experts) = &c.experts {
            put("expert_count", Put::U32(experts.count as u32));
            put("expert_used_count", Put::U32(experts.chosen as u32));
            if experts.inner != c.intermediate {
                put("expert_feed_forward_length", Put::U32(experts.inner as u32));
            }
        }
        for (key, name) in [
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ] {
            if let Some(n) = json.get(name).and_then(Json::as_f64) {
                put(key, Put::F32(n as f32));
            }
        }
        out
    }

    /// What Llama 3 divides rotary frequencies by, if it does: the content of `rope_freqs.weight`.
    pub fn frequency_factors(&self) -> Option<Vec<f32>> {
        let c = self.config;
        let RopeScaling::Llama3 { .. } = &c.rope_scaling else { return None };
        let frequencies = |scaling: &RopeScaling| Rope::new(c.rope_theta, c.rotary, scaling).frequencies;
        let (plain, scaled) = (frequencies(&RopeScaling::None), frequencies(&c.rope_scaling));
        Some(plain.iter().zip(&scaled).map(|(p, s)| (p / s) as f32).collect())
    }

    /// What a file calls the tensor `name` of a shape with so many sides; nothing if it has no name for it.
    pub fn called(&self, name: &str, sides: usize) -> Option<Called> {
        let (stem, part) = name.rsplit_once('.')?;
        let find = |names: &[(&'static str, &str)], of: &str| names.iter().find(|(_, n)| *n == of).map(|(n, _)| *n);
        let called = |name: String, expert, heads| {
            let norm = name.ends_with("norm.weight");
            let single = sides == 1 || norm || name.contains(".ffn_gate_inp.");
            let one_more = norm && self.arch.norms_hold_one && !self.config.norms_hold_one;
            Called { name, expert, heads, single, one_more }
        };
        if let Some(outer) = find(&OUTER, stem) {
            return Some(called(format!("{outer}.{part}"), None, None));
        }
        let (block, inner) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        block.parse::<usize>().ok()?;
        if let Some(experts) = self.arch.experts
            && let Some(rest) = inner.strip_prefix(experts.part).and_then(|r| r.strip_prefix(".experts."))
        {
            let (expert, layer) = rest.split_once('.')?;
            let at = experts.layers.iter().position(|l| *l == layer)?;
            return Some(called(format!("blk.{block}.{}.{part}", STACKED[at]), Some(expert.parse().ok()?), None));
        }
        let inner = find(self.arch.names, inner).or_else(|| find(&INNER, inner))?;
        let heads = match inner {
            "attn_q" if self.arch.interleaved => Some(self.config.heads),
            "attn_k" if self.arch.interleaved => Some(self.config.kv_heads),
            _ => None,
        };
        Some(called(format!("blk.{block}.{inner}.{part}"), None, heads))
    }
}

/// What the file's configuration `read` says otherwise than the model's, by the names of `config.json` where they have one.
pub fn differences(model: &Config, read: &Config) -> Vec<&'static str> {
    let turns = |c: &Config| c.attends.iter().map(|a| a.turn).collect::<Vec<Turn>>();
    let windows = |c: &Config| c.attends.iter().map(|a| a.window).collect::<Vec<_>>();
    let ends = |c: &Config| {
        let mut ends = c.eos.clone();
        ends.sort_unstable();
        ends.dedup();
        ends
    };
    let (a, b) = (model, read);
    let all = [
        ("hidden_size", a.hidden == b.hidden),
        ("intermediate_size", a.intermediate == b.intermediate),
        ("num_hidden_layers", a.layers == b.layers),
        ("num_attention_heads", a.heads == b.heads),
        ("num_key_value_heads", a.kv_heads == b.kv_heads),
        ("head_dim", a.head_dim == b.head_dim),
        ("vocab_size", a.vocab == b.vocab),
        ("max_position_embeddings", a.max_positions == b.max_positions),
        ("the epsilon of norms", a.norm_eps == b.norm_eps),
        ("which layers turn", turns(a) == turns(b)),
        ("sliding windows", windows(a) == windows(b)),
        ("rope_theta", a.rope_theta == b.rope_theta && a.local_theta == b.local_theta),
        ("rope_scaling", a.rope_scaling == b.rope_scaling),
        ("partial_rotary_factor", a.rotary == b.rotary),
        ("the scale of scores", a.score_scale == b.score_scale),
        ("attn_logit_softcapping", a.score_cap == b.score_cap),
        ("the scale of embeddings", a.embedding_scale == b.embedding_scale),
        ("the scale of the residual stream", a.residual_scale == b.residual_scale),
        ("the scale of logits", a.logit_scale == b.logit_scale),
        ("final_logit_softcapping", a.logit_cap == b.logit_cap),
        ("hidden_act", a.activation == b.activation),
        ("tie_word_embeddings", a.tied == b.tied),
        ("biases", (a.qkv_bias, a.o_bias, a.mlp_bias) == (b.qkv_bias, b.o_bias, b.mlp_bias)),
        ("norms of heads", a.head_norms == b.head_norms),
        ("experts", a.experts == b.experts),
        ("num_nextn_predict_layers", a.unused_layers == b.unused_layers),
        ("bos_token_id", a.bos == b.bos),
        ("eos_token_id", ends(a) == ends(b)),
    ];
    all.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
}

//! What a GGUF file says of a model that comes from a directory: the keys of its architecture, and its names of tensors. The
//! inverse of what [`super::config`] and [`super::Gguf::tensors`] read.
//!
//! Nothing here decides whether the file says all: what it says is read again and compared ([`differences`]).

use serde_json::Value as Json;

use super::arch::{self, Architecture, STACKED};
use super::write::{Put, Values};
use super::{ALONE, FACTORS, INNER, LONG_FACTORS, OUTER, SHORT_FACTORS};
use crate::model::config::{Config, Experts, Turn};
use crate::model::rope::{Rope, RopeScaling, yarn_attention};

/// What a key says of a model with this configuration and this `config.json`, if anything.
type Says = fn(&Config, &Json) -> Option<Put>;

/// Keys that not all architectures have: each has those of [`Architecture::uses`].
const OWN: [(&str, Says); 9] = [
    ("attention.scale", |_, json| number(json, "attention_multiplier")),
    ("attention.sliding_window_pattern", |c, _| period(&windows(c)).map(|n| Put::U32(n as u32))),
    ("embedding_scale", |_, json| number(json, "embedding_multiplier")),
    ("expert_shared_count", |c, _| c.experts.as_ref().map(|e| Put::U32((e.shared / e.inner) as u32))),
    ("expert_weights_norm", |c, _| c.experts.as_ref().map(|e| Put::Bool(e.normalise))),
    ("expert_weights_scale", |c, _| c.experts.as_ref().map(|e| Put::F32(e.scale))),
    ("leading_dense_block_count", |c, _| {
        let dense = |e: &Experts| e.dense.iter().take_while(|dense| **dense).count();
        c.experts.as_ref().map(|e| Put::U32(dense(e) as u32))
    }),
    // Granite divides by what it calls so.
    ("logit_scale", |c, json| number(json, "logits_scaling").or(Some(Put::F32(c.logit_scale)))),
    ("residual_scale", |_, json| number(json, "residual_multiplier")),
];

/// The number that `config.json` has by this name.
fn number(json: &Json, name: &str) -> Option<Put> {
    json.get(name).and_then(Json::as_f64).map(|n| Put::F32(n as f32))
}

/// The window of each layer, where it is shorter than the longest context.
fn windows(config: &Config) -> Vec<Option<usize>> {
    config.attends.iter().map(|a| a.window.filter(|w| *w < config.max_positions)).collect()
}

/// The least number of layers of which all but the last have windows, over and over; nothing if there is none.
fn period(windows: &[Option<usize>]) -> Option<usize> {
    let fits = |every: usize| (1..).zip(windows).all(|(i, window)| window.is_none() == usize::is_multiple_of(i, every));
    (1..=windows.len() + 1).find(|every| fits(*every))
}

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
        let arch = arch::named(name);
        let arch = arch.ok_or_else(|| format!("is of the architecture {name}, for which GGUF files have no name"))?;
        Ok(Target { arch, config })
    }

    /// The keys of the architecture. `json` is `config.json`.
    pub fn values(&self, json: &Json) -> Values {
        let c = self.config;
        let json = json.get("text_config").filter(|_| c.of_parts).unwrap_or(json);
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
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate: _, attention } => {
                put("rope.scaling.type", Put::Text("yarn".to_owned()));
                put("rope.scaling.factor", Put::F32(*factor as f32));
                put("rope.scaling.original_context_length", Put::U32(*original as u32));
                put("rope.scaling.yarn_beta_fast", Put::F32(*beta_fast as f32));
                put("rope.scaling.yarn_beta_slow", Put::F32(*beta_slow as f32));
                let usual = yarn_attention(*factor, 1.0);
                if *attention != usual {
                    // What is multiplied with is the usual divided by this much of it.
                    let by = (usual / attention - 1.0) / (usual - 1.0);
                    put("rope.scaling.yarn_log_multiplier", Put::F32(by as f32));
                }
            }
            RopeScaling::Llama3 { original, .. } => {
                put("rope.scaling.original_context_length", Put::U32(*original as u32));
            }
            RopeScaling::Long { original, attention, .. } => {
                put("rope.scaling.original_context_length", Put::U32(*original as u32));
                put("rope.scaling.attn_factor", Put::F32(*attention as f32));
            }
            RopeScaling::None => (),
        }
        if let Some(window) = windows(c).into_iter().flatten().next() {
            put("attention.sliding_window", Put::U32(window as u32));
        }
        for (key, cap) in [("attn_logit_softcapping", c.score_cap), ("final_logit_softcapping", c.logit_cap)] {
            if let Some(cap) = cap {
                put(key, Put::F32(cap));
            }
        }
        if let (Some(experts), Some(named)) = (&c.experts, self.arch.experts) {
            put("expert_count", Put::U32(experts.count as u32));
            put("expert_used_count", Put::U32(experts.chosen as u32));
            put("expert_feed_forward_length", Put::U32(experts.inner as u32));
            put("expert_gating_func", Put::U32(named.gating));
        }
        for (key, says) in OWN.iter().filter(|(key, _)| self.arch.uses.contains(key)) {
            if let Some(value) = says(c, json) {
                put(key, value);
            }
        }
        out
    }

    /// Tensors of what rotary frequencies are divided by, with their names: of Llama 3 what the rule gives, of LongRoPE what the
    /// model has.
    pub fn frequency_factors(&self) -> Vec<(&'static str, Vec<f32>)> {
        let c = self.config;
        let single = |factors: &[f64]| factors.iter().map(|f| *f as f32).collect();
        match &c.rope_scaling {
            RopeScaling::Llama3 { .. } => {
                let frequencies = |scaling: &RopeScaling| Rope::new(c.rope_theta, c.rotary, scaling).frequencies;
                let (plain, scaled) = (frequencies(&RopeScaling::None), frequencies(&c.rope_scaling));
                vec![(FACTORS, plain.iter().zip(&scaled).map(|(p, s)| (p / s) as f32).collect())]
            }
            RopeScaling::Long { short, long, .. } => vec![(LONG_FACTORS, single(long)), (SHORT_FACTORS, single(short))],
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. } => Vec::new(),
        }
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
        let (block, whole) = name.strip_prefix("model.layers.")?.split_once('.')?;
        block.parse::<usize>().ok()?;
        if let Some(alone) = find(&ALONE, whole) {
            return Some(called(format!("blk.{block}.{alone}"), None, None));
        }
        let inner = whole.strip_suffix(part)?.strip_suffix('.')?;
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
        ("bos_token_id", a.bos == b.bos),
        ("eos_token_id", ends(a) == ends(b)),
    ];
    all.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
}

//! `config.json`: the architecture, and the names and shapes of its tensors.

mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use qp_codegen::reference::Activation;
use serde_json::Value;

use super::Error;
use super::arch::{self, Architecture, Window};
use super::files::Files;
use super::keys::{Keys, shown};
use super::rope::{Rope, RopeScaling};
use super::stored::Stored;
use crate::checkpoint::hugging;

/// Largest size that a model may have in any direction.
pub const MOST: usize = 1 << 28;
/// Widest head.
const MOST_HEAD: usize = 1 << 16;
/// Most experts of a layer.
pub(super) const MOST_EXPERTS: usize = 1 << 10;
/// Most experts of all layers.
const MOST_OF_ALL_LAYERS: usize = 1 << 16;
/// Most decoder layers.
pub(super) const MOST_LAYERS: usize = 1 << 12;

/// How one layer attends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attends {
    /// Positions that a token sees, its own included; all up to its own if there is no window.
    pub window: Option<usize>,
    /// How queries and keys turn.
    pub turn: Turn,
}

/// How queries and keys of a layer turn with their positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// As [`Config::rope_theta`] and [`Config::rope_scaling`] say.
    #[default]
    Main,
    /// By [`Config::local_theta`], not stretched.
    Local,
    /// Not at all.
    Never,
}

/// The experts of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many there are in a layer.
    pub count: usize,
    /// Through how many a token goes.
    pub chosen: usize,
    /// Width of each.
    pub inner: usize,
    /// Layers that have one feed-forward layer instead.
    pub dense: Vec<bool>,
    /// True if scores are taken each by itself, and not as shares of all.
    pub sigmoid: bool,
    /// True if the weights of the chosen are divided by their sum.
    pub normalise: bool,
    /// What weights are multiplied with.
    pub scale: f32,
    /// Width of the experts through which all tokens go, together; 0 if there are none.
    pub shared: usize,
    /// Steepness and limit of a clamped gated unit.
    pub clamped: Option<(f32, f32)>,
}

/// What `config.json` and `generation_config.json` say. All sizes are at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Name of the architecture, one of the supported ones.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Tokens known.
    pub vocab: usize,
    /// Longest context, in tokens.
    pub max_positions: usize,
    /// Added to the mean square in norms.
    pub norm_eps: f32,
    /// How each layer attends.
    pub attends: Vec<Attends>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Base of the frequencies of layers whose [`Turn`] is local.
    pub local_theta: Option<f64>,
    /// Columns of a head that turn, an even number.
    pub rotary: usize,
    /// What scores, the products of queries and keys, are multiplied with.
    pub score_scale: f32,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub score_cap: Option<f32>,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What is multiplied before it is added to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied with.
    pub logit_scale: f32,
    /// Then they become `cap · tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// True if the output layer is the embedding matrix.
    pub tied: bool,
    /// True if q, k and v have biases.
    pub qkv_bias: bool,
    /// True if o has a bias.
    pub o_bias: bool,
    /// True if gate, up and down have biases.
    pub mlp_bias: bool,
    /// First token of a text, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// True if weights of norms hold the 1 that is added to them otherwise.
    pub norms_hold_one: bool,
    /// True if queries and keys pass norms, where the architecture leaves that to `config.json`.
    pub head_norms: bool,
    /// Experts, if the model is a mixture of them.
    pub experts: Option<Experts>,
    /// Layers behind the last that the files may hold and that are not used: those that guess further tokens.
    pub unused_layers: usize,
    /// True if the experts of a layer are stored as one tensor.
    pub stacked: bool,
    /// True if the text is one part of a model of several, whose tensors have longer names.
    pub of_parts: bool,
    /// What `generation_config.json` suggests for sampling, as `KEY VALUE`: it is followed only where asked for.
    pub suggested: Vec<String>,
    /// How the files keep the matrices, if they are quantized.
    pub stored: Option<Stored>,
    /// True if `config.json` says that this program quantized the model: it is part of a checkpoint.
    pub of_checkpoint: bool,
    /// What the files say that is not used and changes nothing, for the user.
    pub notes: Vec<String>,
}

/// Keys that change what a model computes, in architectures that are not read here. A value that changes nothing is
/// accepted: false, zero, one for what multiplies, an empty list.
const CHANGING: [&str; 31] = [
    "alibi",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "cross_attention_layers",
    "dim_model_base",
    "embedding_multiplier",
    "embedding_scale",
    "final_logit_softcapping",
    "first_k_dense_replace",
    "kv_lora_rank",
    "logit_scale",
    "logits_scaling",
    "moe_intermediate_size",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "partial_rotary_factor",
    "qk_layernorm",
    "qk_norm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "residual_scale",
    "rope_interleaved",
    "scale_depth",
    "scale_emb",
    "use_parallel_residual",
    "use_qk_norm",
    "use_qkv_norm",
    "value_norm",
];

/// What Gemma 4 has that no other has.
const GEMMA_4: &str = "norms of values, heads of two widths, and in its small ones embeddings for each layer and layers that \
                       share keys and values";

/// Architectures that people run and that are not read, and what an engine would need for them.
const MISSING: [(&str, &str); 11] = [
    ("DeepseekV2ForCausalLM", "latent attention (keys and values of low rank)"),
    ("DeepseekV3ForCausalLM", "latent attention (keys and values of low rank)"),
    ("Qwen3NextForCausalLM", "a gated delta net (linear attention with a state)"),
    ("Qwen3_5ForConditionalGeneration", "a gated delta net (linear attention with a state)"),
    ("Qwen3_5MoeForConditionalGeneration", "a gated delta net (linear attention with a state)"),
    ("Gemma3nForConditionalGeneration", "several streams, embeddings for each layer, and layers that share keys"),
    ("Gemma4ForCausalLM", GEMMA_4),
    ("Gemma4ForConditionalGeneration", GEMMA_4),
    ("Llama4ForConditionalGeneration", "attention in chunks and scores scaled by position"),
    ("MambaForCausalLM", "a state space layer"),
    ("GPT2LMHeadModel", "learned positions"),
];

/// Keys that say how a model was made, trained or saved, and nothing of what it computes.
const SILENT: [&str; 30] = [
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "name",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "unsloth_version",
    "use_cache",
];

/// Keys of `generation_config.json` that neither change a text nor are followed.
const SILENT_GENERATION: [&str; 6] =
    ["_from_model_config", "do_sample", "pad_token_id", "return_dict_in_generate", "transformers_version", "use_cache"];

impl Config {
    /// Reads `config.json` and, if it is there, `generation_config.json` of a model directory or GGUF file.
    ///
    /// # Errors
    /// If a file cannot be read or parsed, or asks for something unsupported.
    pub fn read(model: &Path) -> Result<Self, Error> {
        Config::of(&Files::open(model)?)
    }

    /// As [`Config::read`], of a model that is open.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn of(files: &Files) -> Result<Self, Error> {
        let path = files.path("config.json");
        let missing = || Error::file(&path, "not found: it says what the model is; get the model again");
        let mut config = Config::parse(&path, &files.text("config.json")?.ok_or_else(missing)?)?;
        if let Some(text) = files.text("generation_config.json")? {
            let keys = Keys::parse(&files.path("generation_config.json"), &text)?;
            if let Some(bos) = first(&keys, "bos_token_id", &mut config.notes)? {
                config.bos = Some(bos);
            }
            if let Some(eos) = keys.tokens("eos_token_id")? {
                config.eos = eos;
            }
            keys.ignore(&SILENT_GENERATION);
            let changing = |v: &Value| !matches!(v, Value::Bool(false) | Value::Null);
            let suggested = keys.unasked().filter(|(_, v)| changing(v));
            config.suggested = suggested.map(|(k, v)| format!("{k} {}", shown(v))).collect();
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// If it is malformed or asks for something unsupported.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let whole = Keys::parse(path, text)?;
        let part = text_part(&whole)?;
        let (of_parts, keys) = (part.is_some(), part.unwrap_or(whole));
        let unsupported = |what: String, supported: &str| Error::Unsupported {
            path: path.to_owned(),
            what,
            supported: supported.to_owned(),
        };
        // First what the model is: of another kind, all else would be beside the point.
        let reading = architecture(&keys)?;
        let method = |q: &Value| q.get("quant_method").and_then(Value::as_str).map(str::to_owned);
        let of_checkpoint = keys.get("quantization_config").and_then(method).is_some_and(|m| m == hugging::METHOD);
        let stored = match keys.get("quantization_config").filter(|_| !of_checkpoint) {
            None => None,
            Some(q) => {
                let (stored, method) =
                    (Stored::find(q), method(q).unwrap_or_else(|| "of an unnamed method".to_owned()));
                // Whose experts `packing` finds by their tensors.
                let of_experts = reading.mxfp4 && method == "mxfp4";
                if stored.is_none() && !of_experts {
                    let what = format!("a checkpoint already quantized ({method}) so");
                    return Err(unsupported(what, &format!("the unquantized model, {}", Stored::known())));
                }
                stored
            }
        };
        let mut activation = reading.activation;
        for key in ["hidden_act", "hidden_activation"] {
            match keys.text(key)?.as_deref() {
                None => (),
                Some("silu" | "swish") => activation = Activation::Silu,
                Some("gelu_pytorch_tanh" | "gelu_new") => activation = Activation::GeluTanh,
                Some(other) => {
                    return Err(unsupported(format!("{key} '{other}'"), "silu, gelu_pytorch_tanh"));
                }
            }
        }
        let mut notes = Vec::new();
        let size = |name: &str, default: Option<usize>| match keys.whole(name)?.or(default) {
            None => Err(Error::file(path, format!("{name} is missing: get the model again"))),
            // The bound keeps every product of two sizes within usize and every size within u32.
            Some(0) => Err(Error::file(path, format!("{name} is 0: expected 1 to {MOST}"))),
            Some(n) if n > MOST => Err(Error::file(path, format!("{name} is {n}: expected 1 to {MOST}"))),
            Some(n) => Ok(n),
        };
        let (hidden, intermediate) = (size("hidden_size", None)?, size("intermediate_size", None)?);
        let (layers, heads) = (layers_of(&keys)?, size("num_attention_heads", None)?);
        let kv_heads = size("num_key_value_heads", Some(reading.kv_heads.unwrap_or(heads)))?;
        let (vocab, max_positions) = (size("vocab_size", None)?, size("max_position_embeddings", None)?);
        if !heads.is_multiple_of(kv_heads) {
            let what = format!("num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})");
            return Err(Error::file(path, what));
        }
        let by_default = reading.head_dim.or(hidden.is_multiple_of(heads).then_some(hidden / heads));
        if keys.get("head_dim").is_none() && by_default.is_none() {
            let what = format!(
                "hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), and head_dim is not given"
            );
            return Err(Error::file(path, what));
        }
        let head_dim = size("head_dim", by_default)?;
        if !head_dim.is_multiple_of(2) {
            return Err(Error::file(path, format!("head_dim is {head_dim}: rotary embedding needs an even one")));
        }
        // Each pair of a head's elements has a frequency of its own.
        if head_dim > MOST_HEAD {
            return Err(Error::file(path, format!("head_dim is {head_dim}: expected at most {MOST_HEAD}")));
        }
        // Widths of q and of the keys: products of two sizes, which are sizes too.
        if heads.checked_mul(head_dim).is_none_or(|n| n > MOST) {
            return Err(Error::file(path, format!("{heads} heads of {head_dim} are wider than {MOST}")));
        }
        let eps = keys.number(reading.norm_eps)?.unwrap_or(reading.default_eps);
        if eps < 0.0 {
            return Err(Error::file(path, format!("{} is {eps}: expected a small positive number", reading.norm_eps)));
        }
        let mut context = max_positions;
        let turns = rope::read(&keys, reading, head_dim, &mut context, &mut notes)?;
        let windows = windows(reading, &keys, layers)?;
        let bias = |read: bool, key: &str| Ok::<_, Error>(read && keys.truth(key)?.unwrap_or(false));
        let attention_bias = bias(reading.attention_bias, "attention_bias")?;
        let mlp_bias = bias(reading.mlp_bias, "mlp_bias")?;
        let mut config = Config {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab,
            max_positions: context,
            norm_eps: eps as f32,
            attends: windows.into_iter().map(|window| Attends { window, turn: Turn::Main }).collect(),
            rope_theta: turns.theta,
            rope_scaling: turns.scaling,
            local_theta: turns.local_theta,
            rotary: turns.columns,
            score_scale: 1.0 / (head_dim as f32).sqrt(),
            score_cap: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_cap: None,
            activation,
            tied: keys.truth("tie_word_embeddings")?.unwrap_or(reading.tied),
            qkv_bias: reading.qkv_bias || attention_bias,
            o_bias: attention_bias,
            mlp_bias,
            bos: first(&keys, "bos_token_id", &mut notes)?,
            eos: keys.tokens("eos_token_id")?.unwrap_or_default(),
            norms_hold_one: false,
            head_norms: false,
            experts: None,
            unused_layers: 0,
            stacked: reading.stacked,
            of_parts,
            architecture: reading.name.to_owned(),
            suggested: Vec::new(),
            stored,
            of_checkpoint,
            notes: Vec::new(),
        };
        (reading.read)(&keys, &mut config)?;
        for (key, value) in keys.unasked().filter(|(k, _)| CHANGING.contains(k)) {
            let neutral = |v: &Value| match v {
                Value::Bool(b) => !b,
                Value::Number(n) => n.as_f64() == Some(1.0) || n.as_f64() == Some(0.0),
                Value::Array(values) => values.is_empty(),
                _ => false,
            };
            if !neutral(value) {
                return Err(unsupported(format!("{key} {}", shown(value)), &format!("{} without it", reading.name)));
            }
        }
        keys.ignore(&CHANGING);
        keys.ignore(&SILENT);
        notes.append(&mut config.notes);
        let unknown: Vec<&str> = keys.unasked().filter(|(_, v)| **v != Value::Bool(false)).map(|(k, _)| k).collect();
        if !unknown.is_empty() {
            let name = reading.name;
            notes.push(format!("{}: {name} has no use for {}", path.display(), unknown.join(", ")));
        }
        Ok(Config { notes, ..config })
    }
}

/// The architecture that `keys` name: by `architectures`, which `model_type` must not contradict.
fn architecture(keys: &Keys) -> Result<&'static Architecture, Error> {
    let (names, kind) = (keys.texts("architectures")?.unwrap_or_default(), keys.text("model_type")?);
    let by_type = kind.as_deref().and_then(arch::of_type);
    match names.iter().find_map(|n| arch::find(n)) {
        Some(found) => {
            let Some(kind) = kind.filter(|k| k != found.model_type) else { return Ok(found) };
            let what = format!(
                "architectures says {}, whose model_type is '{}', but model_type says '{kind}': \
                 correct the one that is wrong",
                found.name, found.model_type
            );
            return Err(Error::file(keys.path(), what));
        }
        None => {
            if let Some(by_type) = by_type.filter(|_| names.is_empty()) {
                return Ok(by_type);
            }
        }
    }
    let mut what = match (names.as_slice(), kind) {
        ([], None) => "a model without 'architectures'".to_owned(),
        ([], Some(kind)) => format!("model_type '{kind}'"),
        (names, _) => format!("architecture {}", names.join(", ")),
    };
    if keys.object("text_config").is_ok_and(|c| c.is_some()) {
        what += ", a model of several parts (text_config),";
    }
    if let Some((_, missing)) = MISSING.iter().find(|(name, _)| names.iter().any(|n| n == name)) {
        what += &format!(", which needs {missing},");
    }
    let supported = arch::names().collect::<Vec<_>>().join(", ");
    Err(Error::Unsupported { path: keys.path().to_owned(), what, supported })
}

/// The number of decoder layers: bounded, since each takes memory before its tensors are looked for.
fn layers_of(keys: &Keys) -> Result<usize, Error> {
    match keys.whole("num_hidden_layers")? {
        None => Err(Error::file(keys.path(), "num_hidden_layers is missing: get the model again")),
        Some(n) if (1..=MOST_LAYERS).contains(&n) => Ok(n),
        Some(n) => Err(Error::file(keys.path(), format!("num_hidden_layers is {n}: expected 1 to {MOST_LAYERS}"))),
    }
}

/// The token of `key`, which may be in a list; of several the first, which is said.
fn first(keys: &Keys, key: &str, notes: &mut Vec<String>) -> Result<Option<u32>, Error> {
    let ids = keys.tokens(key)?.unwrap_or_default();
    if ids.len() > 1 {
        notes.push(format!("{}: {key} has {} ids; the first is used", keys.path().display(), ids.len()));
    }
    Ok(ids.first().copied())
}

impl Experts {
    /// Checked: `count` experts of which `chosen` are chosen, `inner` wide; all layers have them.
    ///
    /// # Errors
    /// If a number is missing or too large.
    pub fn new(keys: &Keys, layers: usize, names: [&str; 3]) -> Result<Self, Error> {
        let [count, chosen, inner] = names.map(|name| match keys.whole(name)? {
            Some(n) if (1..=MOST).contains(&n) => Ok(n),
            Some(n) => Err(Error::file(keys.path(), format!("{name} is {n}: expected 1 to {MOST}"))),
            None => Err(Error::file(keys.path(), format!("{name} is missing: get the model again"))),
        });
        let (count, chosen, inner) = (count?, chosen?, inner?);
        if count > MOST_EXPERTS || layers * count > MOST_OF_ALL_LAYERS || chosen > count {
            let what = format!(
                "{chosen} of {count} experts in {layers} layers: expected at most {MOST_EXPERTS} experts a layer, \
                 {MOST_OF_ALL_LAYERS} in all, and no more chosen than there are"
            );
            return Err(Error::file(keys.path(), what));
        }
        Ok(Experts {
            count,
            chosen,
            inner,
            dense: vec![false; layers],
            sigmoid: false,
            normalise: true,
            scale: 1.0,
            shared: 0,
            clamped: None,
        })
    }
}

/// The window of each layer.
fn windows(reading: &Architecture, keys: &Keys, layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let none = vec![None; layers];
    let default = match reading.window {
        Window::Never => return Ok(none),
        Window::Always(n) => n.filter(|_| !keys.has("sliding_window")),
        Window::Alternating { width, .. } => Some(width).filter(|_| !keys.has("sliding_window")),
        Window::Flagged if keys.truth("use_sliding_window")?.unwrap_or(false) => None,
        Window::Flagged => {
            // Read, and without meaning.
            keys.ignore(&["sliding_window", "max_window_layers", "layer_types"]);
            return Ok(none);
        }
    };
    let kinds = keys.texts("layer_types")?;
    if let Some(other) = kinds.iter().flatten().find(|k| !matches!(k.as_str(), "full_attention" | "sliding_attention"))
    {
        return Err(Error::Unsupported {
            path: keys.path().to_owned(),
            what: format!("layer_types '{other}'"),
            supported: "full_attention, sliding_attention".to_owned(),
        });
    }
    if let Some(kinds) = kinds.as_ref().filter(|k| k.len() != layers) {
        let what = format!("layer_types has {} entries, but num_hidden_layers is {layers}", kinds.len());
        return Err(Error::file(keys.path(), what));
    }
    let from = keys.whole("max_window_layers")?.filter(|_| matches!(reading.window, Window::Flagged)).unwrap_or(0);
    let every = match reading.window {
        Window::Alternating { every, .. } => {
            let named = keys.whole("sliding_window_pattern")?.or(keys.whole("_sliding_window_pattern")?);
            Some(named.unwrap_or(every).max(1))
        }
        Window::Never | Window::Always(_) | Window::Flagged => None,
    };
    let slides = |layer: usize| match (&kinds, every) {
        (Some(kinds), _) => kinds[layer] == "sliding_attention",
        (None, Some(every)) => !(layer + 1).is_multiple_of(every),
        (None, None) => layer >= from,
    };
    let window = keys.whole("sliding_window")?.or(default).filter(|&w| w > 0);
    Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
}

/// The keys of the text's part of a model of several parts, with those beside it that count for the text too.
fn text_part(keys: &Keys) -> Result<Option<Keys>, Error> {
    let names = keys.texts("architectures")?.unwrap_or_default();
    let kind = keys.text("model_type")?;
    let known = arch::OF_PARTS.iter().any(|(name, model_type)| {
        names.iter().any(|n| n == name) || (names.is_empty() && kind.as_deref() == Some(model_type))
    });
    if !known {
        return Ok(None);
    }
    let beside = ["bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings"];
    keys.object("text_config").map(|part| part.map(|p| p.with(keys, &beside)))
}

impl Config {
    /// How heads turn, and for each layer which of these it uses.
    pub fn ropes(&self) -> (Vec<Rope>, Vec<Option<usize>>) {
        let mut ropes = vec![Rope::new(self.rope_theta, self.rotary, &self.rope_scaling)];
        if let Some(theta) = self.local_theta {
            ropes.push(Rope::new(theta, self.rotary, &RopeScaling::None));
        }
        let of = |attends: &Attends| match attends.turn {
            Turn::Main => Some(0),
            Turn::Local => Some(ropes.len() - 1),
            Turn::Never => None,
        };
        let of_layers = self.attends.iter().map(of).collect();
        (ropes, of_layers)
    }
}

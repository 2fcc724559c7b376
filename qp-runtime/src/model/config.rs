//! `config.json`: the architecture, and the names and shapes of its tensors.

use std::path::Path;

use serde_json::Value;

use super::Error;
use super::arch::{self, Architecture, Window};
use super::files::Files;
use super::keys::{Keys, shown};
use super::stored::Stored;

/// Largest size that a model may have in any direction.
pub const MOST: usize = 1 << 28;
/// Widest head.
const MOST_HEAD: usize = 1 << 16;
/// Most decoder layers.
const MOST_LAYERS: usize = 1 << 12;

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every position divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths over `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths under `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original: f64,
    },
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
    /// Longest context, in tokens. Where a sliding window would begin to matter, the context ends.
    pub max_positions: usize,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
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
    /// What `generation_config.json` suggests for sampling, as `KEY VALUE`: it is followed only where asked for.
    pub suggested: Vec<String>,
    /// How the files keep the matrices, if they are quantized.
    pub stored: Option<Stored>,
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
            config.suggested = keys.unasked().map(|(k, v)| format!("{k} {}", shown(v))).collect();
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// If it is malformed or asks for something unsupported.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let keys = Keys::parse(path, text)?;
        let unsupported = |what: String, supported: &str| Error::Unsupported {
            path: path.to_owned(),
            what,
            supported: supported.to_owned(),
        };
        // First what the model is: of another kind, all else would be beside the point.
        let reading = architecture(&keys)?;
        let stored = match keys.get("quantization_config") {
            None => None,
            Some(q) => {
                let method = q.get("quant_method").and_then(Value::as_str).unwrap_or("of an unnamed method");
                let known = || format!("the unquantized model, or {}", Stored::known());
                let what = || format!("a checkpoint already quantized ({method}) so");
                Some(Stored::find(q).ok_or_else(|| unsupported(what(), &known()))?)
            }
        };
        for key in ["hidden_act", "hidden_activation"] {
            if let Some(act) = keys.text(key)?.filter(|a| a != "silu" && a != "swish") {
                return Err(unsupported(format!("{key} '{act}'"), "silu"));
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
        let eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        if eps < 0.0 {
            return Err(Error::file(path, format!("rms_norm_eps is {eps}: expected a small positive number")));
        }
        let (rope_theta, rope_scaling) = rope(&keys, max_positions, &mut notes)?;
        let window = window(reading, &keys, layers)?;
        let bias = |read: bool, key: &str| Ok::<_, Error>(read && keys.truth(key)?.unwrap_or(false));
        let attention_bias = bias(reading.attention_bias, "attention_bias")?;
        let mlp_bias = bias(reading.mlp_bias, "mlp_bias")?;
        for key in CHANGING {
            let neutral = |v: &Value| match v {
                Value::Bool(b) => !b,
                Value::Number(n) => n.as_f64() == Some(1.0) || n.as_f64() == Some(0.0),
                Value::Array(values) => values.is_empty(),
                _ => false,
            };
            if let Some(value) = keys.get(key).filter(|v| !neutral(v)) {
                return Err(unsupported(format!("{key} {}", shown(value)), &format!("{} without it", reading.name)));
            }
        }
        let config = Config {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab,
            max_positions: max_positions.min(window.unwrap_or(usize::MAX)),
            norm_eps: eps as f32,
            rope_theta,
            rope_scaling,
            tied: keys.truth("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: reading.qkv_bias || attention_bias,
            o_bias: attention_bias,
            mlp_bias,
            bos: first(&keys, "bos_token_id", &mut notes)?,
            eos: keys.tokens("eos_token_id")?.unwrap_or_default(),
            architecture: reading.name.to_owned(),
            suggested: Vec::new(),
            stored,
            notes: Vec::new(),
        };
        keys.ignore(&SILENT);
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

/// The narrowest window of a layer, if there is one.
fn window(reading: &Architecture, keys: &Keys, layers: usize) -> Result<Option<usize>, Error> {
    let default = match reading.window {
        Window::Never => return Ok(None),
        Window::Always(n) => Some(n).filter(|_| !keys.has("sliding_window")),
        Window::Flagged if keys.truth("use_sliding_window")?.unwrap_or(false) => None,
        Window::Flagged => {
            // Read, and without meaning.
            keys.ignore(&["sliding_window", "max_window_layers", "layer_types"]);
            return Ok(None);
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
    let from = keys.whole("max_window_layers")?.filter(|_| matches!(reading.window, Window::Flagged)).unwrap_or(0);
    let slides = match kinds {
        Some(kinds) => kinds.iter().any(|k| k == "sliding_attention"),
        None => from < layers,
    };
    Ok(keys.whole("sliding_window")?.or(default).filter(|&w| w > 0 && slides))
}

/// Base and scaling of the rotary frequencies: from `rope_scaling` or else `rope_parameters`, as transformers 5 has it,
/// with the base from the top level where they have none.
fn rope(keys: &Keys, max_positions: usize, notes: &mut Vec<String>) -> Result<(f64, RopeScaling), Error> {
    let path = keys.path();
    let full = |key: &str| keys.object(key).map(|o| o.filter(|o| o.unasked().next().is_some()));
    let (scaling, parameters) = (full("rope_scaling")?, full("rope_parameters")?);
    if let (Some(s), Some(p)) = (&scaling, &parameters)
        && !s.unasked().eq(p.unasked())
    {
        notes.push(format!("{}: rope_scaling is used, and rope_parameters beside it is not", path.display()));
    }
    let named = if scaling.is_some() { "rope_scaling" } else { "rope_parameters" };
    let source = scaling.or(parameters);
    let number = |name: &str| source.as_ref().map_or(Ok(None), |s| s.number(name));
    let (inner, outer) = (number("rope_theta")?, keys.number("rope_theta")?);
    let theta = inner.or(outer).unwrap_or(10000.0);
    if theta <= 0.0 {
        return Err(Error::file(path, format!("rope_theta is {theta}: expected a positive number")));
    }
    let outer_original = keys.number("original_max_position_embeddings")?;
    let Some(source) = &source else { return Ok((theta, RopeScaling::None)) };
    // Before transformers 4.43 the key was `type`.
    let (kind, old) = (source.text("rope_type")?, source.text("type")?);
    let kind = kind.or(old).unwrap_or("default".to_owned());
    let need = |name: &str| match number(name)? {
        Some(v) if v > 0.0 => Ok(v),
        Some(v) => {
            Err(Error::file(path, format!("{name} of rope scaling '{kind}' is {v}: expected a positive number")))
        }
        None => Err(Error::file(path, format!("rope scaling '{kind}' needs {name}"))),
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => {
            let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if high <= low {
                return Err(Error::file(
                    path,
                    format!("high_freq_factor ({high}) must be above low_freq_factor ({low})"),
                ));
            }
            let original = number("original_max_position_embeddings")?.or(outer_original);
            let original = original.unwrap_or(max_positions as f64);
            if original <= 0.0 {
                return Err(Error::file(path, format!("original_max_position_embeddings is {original}")));
            }
            RopeScaling::Llama3 { factor: need("factor")?, low_freq_factor: low, high_freq_factor: high, original }
        }
        other => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: format!("rope scaling '{other}'"),
                supported: "default, linear, llama3".to_owned(),
            });
        }
    };
    if let Some(part) = number("partial_rotary_factor")?.filter(|p| *p != 1.0) {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("partial_rotary_factor {part}"),
            supported: "1".to_owned(),
        });
    }
    if let Some((key, _)) = source.unasked().find(|(k, _)| k.contains("section")) {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("{key} of {named}"),
            supported: "one position for each token".to_owned(),
        });
    }
    let unused: Vec<&str> = source.unasked().map(|(k, _)| k).collect();
    if !unused.is_empty() {
        notes.push(format!("{}: rope scaling '{kind}' has no use for {}", path.display(), unused.join(", ")));
    }
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":128,
        "num_hidden_layers":2,"num_attention_heads":4,"vocab_size":100,"max_position_embeddings":512,"rms_norm_eps":1e-5"#;

    fn parse(rest: &str) -> Result<Config, String> {
        Config::parse(Path::new("m/config.json"), &format!("{BASE}{rest}}}")).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults() {
        let c = parse("").unwrap();
        assert_eq!((c.kv_heads, c.head_dim, c.tied, c.rope_theta), (4, 16, false, 10000.0));
        assert_eq!((c.rope_scaling, c.eos.len(), c.qkv_bias), (RopeScaling::None, 0, false));
    }

    #[test]
    fn both_spellings_of_rope_agree() {
        let llama3 =
            r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192"#;
        let old =
            parse(&format!(r#","rope_theta":500000.0,"rope_scaling":{{"rope_type":"llama3",{llama3}}}"#)).unwrap();
        let new =
            parse(&format!(r#","rope_parameters":{{"rope_theta":500000.0,"rope_type":"llama3",{llama3}}}"#)).unwrap();
        assert_eq!(old, new);
        let original = 8192.0;
        assert_eq!(
            old.rope_scaling,
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original }
        );
        assert_eq!(
            parse(r#","rope_scaling":{"type":"linear","factor":2}"#).unwrap().rope_scaling,
            RopeScaling::Linear { factor: 2.0 }
        );
        assert_eq!(parse(r#","rope_scaling":null"#).unwrap().rope_scaling, RopeScaling::None);
    }

    #[test]
    fn ends_of_text_and_windows() {
        assert_eq!(parse(r#","eos_token_id":[1,2]"#).unwrap().eos, [1, 2]);
        assert_eq!(parse(r#","eos_token_id":7"#).unwrap().eos, [7]);
        // Llama has no window, Mistral one of 4096 unless it says null, Qwen's has a switch.
        let of = |name: &str, rest: &str| {
            let text = format!("{BASE}{rest}}}").replace("Llama", name).replace(":512", ":5120");
            Config::parse(Path::new("c"), &text).unwrap().max_positions
        };
        assert_eq!(of("Llama", r#","sliding_window":100"#), 5120);
        assert_eq!(of("Mistral", r#","num_key_value_heads":4,"sliding_window":100"#), 100);
        assert_eq!(of("Mistral", r#","num_key_value_heads":4,"sliding_window":null"#), 5120);
        assert_eq!(of("Mistral", r#","num_key_value_heads":4"#), 4096);
        let qwen = |rest: &str| of("Qwen2", &format!(r#","num_key_value_heads":4,"sliding_window":100{rest}"#));
        assert_eq!(qwen(""), 5120);
        assert_eq!(qwen(r#","use_sliding_window":true"#), 100);
        assert_eq!(qwen(r#","use_sliding_window":true,"max_window_layers":2"#), 5120);
        assert_eq!(qwen(r#","use_sliding_window":true,"layer_types":["full_attention","full_attention"]"#), 5120);
    }

    /// Checked against `LlamaConfig` of transformers 5.24, but for `original_max_position_embeddings` at the top level,
    /// which it ignores there and takes the longest context.
    #[test]
    fn rope_parameters_by_rank() {
        let old = r#""rope_scaling":{"type":"linear","factor":2}"#;
        let new = r#""rope_parameters":{"rope_type":"linear","factor":4,"rope_theta":500000}"#;
        let of = |rest: &str| {
            let c = parse(rest).unwrap();
            (c.rope_scaling, c.rope_theta, c.notes.len())
        };
        let linear = |factor| RopeScaling::Linear { factor };
        assert_eq!(of(&format!(r#",{old},{new},"rope_theta":7"#)), (linear(2.0), 7.0, 1));
        assert_eq!(of(&format!(r#","rope_scaling":{{}},{new},"rope_theta":7"#)), (linear(4.0), 500000.0, 0));
        assert_eq!(of(r#","rope_parameters":{"rope_type":"linear","factor":4},"rope_theta":7"#), (linear(4.0), 7.0, 0));
        assert_eq!(of(r#","rope_scaling":{"rope_type":"default","factor":3}"#), (RopeScaling::None, 10000.0, 1));
        let llama3 = r#""rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0"#;
        let original = |rest: &str| match of(&format!(r#","rope_scaling":{{{llama3}{rest}"#)).0 {
            RopeScaling::Llama3 { original, .. } => original,
            other => panic!("{other:?}"),
        };
        assert_eq!(original(r#","original_max_position_embeddings":64},"original_max_position_embeddings":128"#), 64.0);
        assert_eq!(original(r#"},"original_max_position_embeddings":128"#), 128.0);
        assert_eq!(original("}"), 512.0);
    }

    #[test]
    fn biases_by_architecture() {
        let qwen = BASE.replace("Llama", "Qwen2");
        let c = Config::parse(Path::new("c"), &format!(r#"{qwen},"num_key_value_heads":4}}"#)).unwrap();
        assert!(c.qkv_bias && !c.o_bias && !c.mlp_bias);
        let c = parse(r#","attention_bias":true,"mlp_bias":true"#).unwrap();
        assert!(c.qkv_bias && c.o_bias && c.mlp_bias);
    }

    #[test]
    fn refusals_name_what_is_supported() {
        let gpt = BASE.replace("LlamaForCausalLM", "GPT2LMHeadModel");
        let message = Config::parse(Path::new("m/config.json"), &format!("{gpt}}}")).unwrap_err().to_string();
        assert_eq!(
            message,
            "m/config.json: architecture GPT2LMHeadModel is not supported \
             (supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)"
        );
        for (rest, part) in [
            (r#","rope_scaling":{"type":"yarn","factor":2}"#, "rope scaling 'yarn' is not supported"),
            (r#","rope_scaling":{"type":"llama3","factor":2}"#, "needs low_freq_factor"),
            (r#","hidden_act":"gelu""#, "hidden_act 'gelu'"),
            (r#","num_key_value_heads":3"#, "not a multiple of num_key_value_heads (3)"),
            (r#","num_key_value_heads":0"#, "num_key_value_heads is 0"),
            (r#","head_dim":7"#, "head_dim is 7"),
            (r#","quantization_config":{"quant_method":"gptq"}"#, "already quantized (gptq)"),
            (r#","hidden_size":64"#, "key 'hidden_size' is in it twice"),
            (r#","vocab"#, "m/config.json: "),
        ] {
            let message = parse(rest).unwrap_err();
            assert!(message.contains(part), "{rest}: {message}");
        }
    }
}

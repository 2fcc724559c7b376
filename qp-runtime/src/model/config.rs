//! `config.json`: the architecture, and the names and shapes of its tensors.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::files::Files;
use super::{Error, arch};

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
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RawGeneration {
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

impl Config {
    /// Reads `config.json` and, if it is there, `generation_config.json` of a model directory or GGUF file.
    ///
    /// # Errors
    /// If a file cannot be read or parsed, or asks for something unsupported.
    pub fn read(model: &Path) -> Result<Self, Error> {
        let files = Files::open(model)?;
        let path = files.path("config.json");
        let missing = || Error::file(&path, "not found: it says what the model is; get the model again");
        let mut config = Config::parse(&path, &files.text("config.json")?.ok_or_else(missing)?)?;
        if let Some(text) = files.text("generation_config.json")? {
            let path = files.path("generation_config.json");
            let raw: RawGeneration = serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
            config.bos = raw.bos_token_id.or(config.bos);
            if let Some(eos) = raw.eos_token_id {
                config.eos = eos.into_vec();
            }
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// If it is malformed or asks for something unsupported.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let raw: Raw = serde_json::from_str(text).map_err(|e| Error::file(path, e.to_string()))?;
        let unsupported = |what: String, supported: &str| Error::Unsupported {
            path: path.to_owned(),
            what,
            supported: supported.to_owned(),
        };
        let Some(architecture) = raw.architectures.iter().find_map(|a| arch::find(a)) else {
            let what = match raw.architectures.as_slice() {
                [] => "a model without 'architectures'".to_owned(),
                names => format!("architecture {}", names.join(", ")),
            };
            return Err(unsupported(what, &arch::names().collect::<Vec<_>>().join(", ")));
        };
        if let Some(q) = &raw.quantization_config {
            let method = q.get("quant_method").and_then(Value::as_str).unwrap_or("of an unnamed method");
            return Err(unsupported(format!("a checkpoint already quantized ({method})"), "the unquantized model"));
        }
        if let Some(act) = raw.hidden_act.filter(|a| a != "silu") {
            return Err(unsupported(format!("hidden_act '{act}'"), "silu"));
        }
        let (rope_theta, rope_scaling) = rope(
            path,
            raw.rope_parameters.as_ref(),
            raw.rope_theta,
            raw.rope_scaling.as_ref(),
            raw.max_position_embeddings,
        )?;

        let heads = raw.num_attention_heads;
        let sizes = [
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", raw.num_key_value_heads.unwrap_or(heads)),
            ("head_dim", raw.head_dim.unwrap_or(1)),
            ("vocab_size", raw.vocab_size),
            ("max_position_embeddings", raw.max_position_embeddings),
        ];
        for (name, value) in sizes {
            // The bound keeps every product of two sizes within usize and every size within u32.
            if value == 0 || value > 1 << 28 {
                return Err(Error::file(path, format!("{name} is {value}: expected 1 to {}", 1 << 28)));
            }
        }
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let what = format!("num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})");
            return Err(Error::file(path, what));
        }
        let head_dim = match raw.head_dim {
            Some(d) => d,
            None if raw.hidden_size.is_multiple_of(heads) => raw.hidden_size / heads,
            None => {
                let what = format!(
                    "hidden_size ({}) is not a multiple of num_attention_heads ({heads}), and head_dim is not given",
                    raw.hidden_size
                );
                return Err(Error::file(path, what));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::file(path, format!("head_dim is {head_dim}: rotary embedding needs an even one")));
        }
        if !raw.rms_norm_eps.is_finite() || raw.rms_norm_eps < 0.0 {
            return Err(Error::file(
                path,
                format!("rms_norm_eps is {}: expected a small positive number", raw.rms_norm_eps),
            ));
        }
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let window =
            raw.sliding_window.filter(|&w| w > 0 && raw.use_sliding_window.unwrap_or(!architecture.window_by_flag));
        Ok(Config {
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            vocab: raw.vocab_size,
            max_positions: raw.max_position_embeddings.min(window.unwrap_or(usize::MAX)),
            norm_eps: raw.rms_norm_eps as f32,
            rope_theta,
            rope_scaling,
            tied: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: architecture.qkv_bias || attention_bias,
            o_bias: !architecture.qkv_bias && attention_bias,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            bos: raw.bos_token_id,
            eos: raw.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
            architecture: architecture.name.to_owned(),
        })
    }
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

/// Base and scaling of the rotary frequencies, from `rope_parameters` (transformers 5) or else from top-level
/// `rope_theta` and `rope_scaling`.
fn rope(
    path: &Path,
    parameters: Option<&Value>,
    theta: Option<f64>,
    scaling: Option<&Value>,
    max_positions: usize,
) -> Result<(f64, RopeScaling), Error> {
    let number = |name: &str| [parameters, scaling].into_iter().flatten().find_map(|v| v.get(name)?.as_f64());
    let theta = number("rope_theta").or(theta).unwrap_or(10000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::file(path, format!("rope_theta is {theta}: expected a positive number")));
    }
    let source = parameters.or(scaling).unwrap_or(&Value::Null);
    // Before transformers 4.43 the key was `type`.
    let kind = source.get("rope_type").or(source.get("type")).and_then(Value::as_str).unwrap_or("default");
    let need = |name: &str| match number(name) {
        Some(v) if v.is_finite() && v > 0.0 => Ok(v),
        Some(v) => {
            Err(Error::file(path, format!("{name} of rope scaling '{kind}' is {v}: expected a positive number")))
        }
        None => Err(Error::file(path, format!("rope scaling '{kind}' needs {name}"))),
    };
    let scaling = match kind {
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
            let original = number("original_max_position_embeddings").unwrap_or(max_positions as f64);
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
        assert_eq!(parse(r#","sliding_window":100"#).unwrap().max_positions, 100);
        assert_eq!(parse(r#","sliding_window":null"#).unwrap().max_positions, 512);
        assert_eq!(parse(r#","sliding_window":100,"use_sliding_window":false"#).unwrap().max_positions, 512);
    }

    #[test]
    fn biases_by_architecture() {
        let qwen = BASE.replace("Llama", "Qwen2");
        let c = Config::parse(Path::new("c"), &format!("{qwen}}}")).unwrap();
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
            (r#","hidden_size":64"#, "duplicate field"),
            (r#","vocab"#, "m/config.json: "),
        ] {
            let message = parse(rest).unwrap_err();
            assert!(message.contains(part), "{rest}: {message}");
        }
    }
}

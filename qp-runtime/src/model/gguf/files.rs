//! `config.json` and `tokenizer.json` of a GGUF file.

use serde_json::{Map, json};

use super::container::Value;
use super::{FACTORS, Gguf};
use crate::model::config::Config;
use crate::model::{Error, rope};

/// Kinds of splitting a text before its bytes are merged, by `tokenizer.ggml.pre`.
#[derive(Clone, Copy, PartialEq)]
enum Split {
    /// GPT-2's.
    Gpt2,
    /// Digits one by one, then GPT-2's.
    Digits,
    /// Llama 3's.
    Llama3,
    /// Qwen 2's.
    Qwen2,
}

const SPLITS: [(&str, Split); 9] = [
    ("gpt-2", Split::Gpt2),
    ("smollm", Split::Digits),
    ("starcoder", Split::Digits),
    ("refact", Split::Digits),
    ("codeshell", Split::Digits),
    ("llama-bpe", Split::Llama3),
    ("llama3", Split::Llama3),
    ("llama-v3", Split::Llama3),
    ("qwen2", Split::Qwen2),
];

impl Gguf {
    fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        let found = match found {
            Value::Array(values) => format!("a list of {}", values.len()),
            Value::Text(text) => format!("'{text}'"),
            Value::Int(n) => n.to_string(),
            Value::Float(n) => n.to_string(),
            Value::Bool(b) => b.to_string(),
        };
        Error::file(self.path(), format!("{key} is {found}: expected {expected}"))
    }

    fn integer(&self, key: &str) -> Result<Option<u32>, Error> {
        self.file.values.get(key).map_or(Ok(None), |v| match v {
            Value::Int(n) => u32::try_from(*n).map(Some).map_err(|_| self.wrong(key, v, "a number below 2^32")),
            _ => Err(self.wrong(key, v, "a whole number")),
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.file.values.get(key).map_or(Ok(None), |v| match v {
            Value::Int(n) => Ok(Some(*n as f64)),
            Value::Float(n) => Ok(Some(*n)),
            _ => Err(self.wrong(key, v, "a number")),
        })
    }

    fn truth(&self, key: &str) -> Result<Option<bool>, Error> {
        self.file.values.get(key).map_or(Ok(None), |v| match v {
            Value::Bool(b) => Ok(Some(*b)),
            _ => Err(self.wrong(key, v, "true or false")),
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.file.values.get(key).map_or(Ok(None), |v| match v {
            Value::Text(text) => Ok(Some(text.as_str())),
            _ => Err(self.wrong(key, v, "text")),
        })
    }

    fn texts(&self, key: &str) -> Result<Vec<&str>, Error> {
        let v = self.need(key, self.file.values.get(key))?;
        let Value::Array(values) = v else { return Err(self.wrong(key, v, "a list of texts")) };
        let texts = values.iter().map(|v| match v {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(self.wrong(key, v, "texts only")),
        });
        texts.collect()
    }

    fn need<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| Error::file(self.path(), format!("has no key '{key}': convert the model again")))
    }

    /// A size of the architecture, at least 1.
    fn size(&self, key: &str) -> Result<usize, Error> {
        let key = format!("{}.{key}", self.prefix);
        match self.need(&key, self.integer(&key)?)? {
            0 => Err(self.wrong(&key, &Value::Int(0), "at least 1")),
            n => Ok(n as usize),
        }
    }

    pub(super) fn heads(&self) -> Result<usize, Error> {
        self.size("attention.head_count")
    }

    pub(super) fn kv_heads(&self) -> Result<usize, Error> {
        let key = "attention.head_count_kv";
        if self.file.values.contains_key(&format!("{}.{key}", self.prefix)) { self.size(key) } else { self.heads() }
    }

    fn unsupported(&self, what: String, supported: &str) -> Error {
        Error::Unsupported { path: self.path().to_owned(), what, supported: supported.to_owned() }
    }

    /// `config.json`.
    pub(super) fn config(&self) -> Result<serde_json::Value, Error> {
        let key = |name: &str| format!("{}.{name}", self.prefix);
        if let Some(n) = self.integer(&key("expert_count"))?.filter(|&n| n > 0) {
            return Err(self.unsupported(format!("a mixture of {n} experts"), "one feed-forward layer a block"));
        }
        let (hidden, heads) = (self.size("embedding_length")?, self.heads()?);
        let head_dim = match self.integer(&key("attention.key_length"))? {
            Some(n) => n as usize,
            None => hidden / heads,
        };
        for name in ["rope.dimension_count", "attention.value_length"] {
            if let Some(n) = self.integer(&key(name))?.filter(|&n| n as usize != head_dim) {
                return Err(
                    self.unsupported(format!("{} = {n}", key(name)), &format!("the width of a head, {head_dim}"))
                );
            }
        }
        let embedding = "token_embd.weight";
        let vocab = self
            .file
            .tensors
            .get(embedding)
            .map(|t| t.shape[0])
            .ok_or_else(|| Error::MissingTensor { name: embedding.to_owned(), path: self.path().to_owned() })?;
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let theta = self.number(&key("rope.freq_base"))?.unwrap_or(10000.0);
        let id = |name: &str| self.integer(&format!("tokenizer.ggml.{name}_token_id"));
        let eos: Vec<u32> = [id("eos")?, id("eot")?].into_iter().flatten().collect();
        let mut config = json!({
            "architectures": [self.architecture],
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads()?,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "max_position_embeddings": self.size("context_length")?,
            "rms_norm_eps": self.need(&epsilon, self.number(&epsilon)?)?,
            "hidden_act": "silu",
            "rope_theta": theta,
            "tie_word_embeddings": !self.file.tensors.contains_key("output.weight"),
            "attention_bias": self.file.tensors.contains_key("blk.0.attn_q.bias"),
            "bos_token_id": id("bos")?,
            "eos_token_id": eos,
        });
        if let Some(window) = self.integer(&key("attention.sliding_window"))? {
            config["sliding_window"] = json!(window);
        }
        let kind = self.text(&key("rope.scaling.type"))?.unwrap_or("none");
        // Older files give a factor without a type.
        let factor = self.number(&key("rope.scaling.factor"))?.or(self.number(&key("rope.scale_linear"))?);
        match (kind, factor) {
            ("none", None | Some(1.0)) => (),
            ("none" | "linear", Some(factor)) => {
                config["rope_scaling"] = json!({"rope_type": "linear", "factor": factor})
            }
            _ => return Err(self.unsupported(format!("{} '{kind}'", key("rope.scaling.type")), "none, linear")),
        }
        self.frequency_factors(&mut config)?;
        Ok(config)
    }

    /// Llama 3 stretches rotary frequencies by a rule; the file holds what the rule gives. Recognises the rule.
    fn frequency_factors(&self, config: &mut serde_json::Value) -> Result<(), Error> {
        if !self.file.tensors.contains_key(FACTORS) {
            return Ok(());
        }
        let parse = |config: &serde_json::Value| Config::parse(self.path(), &config.to_string());
        let plain = rope::frequencies(&parse(config)?);
        let found = self.factors()?;
        let factor = found.iter().copied().fold(1.0, f32::max);
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let scaled = rope::frequencies(&parse(config)?);
        let expected = plain.iter().zip(&scaled).map(|(p, s)| p / s);
        let close = |(e, f): (f64, &f32)| (e / f64::from(*f) - 1.0).abs() < 1e-3;
        if plain.len() == found.len() && expected.zip(&found).all(close) {
            return Ok(());
        }
        Err(self.unsupported(format!("rotary frequencies with the factors of '{FACTORS}'"), "none, Llama 3's"))
    }

    /// `tokenizer.json`, for byte-level BPE.
    pub(super) fn tokenizer(&self) -> Result<serde_json::Value, Error> {
        let model = "tokenizer.ggml.model";
        let kind = self.need(model, self.text(model)?)?;
        if kind != "gpt2" {
            return Err(self.unsupported(format!("tokenizer '{kind}'"), "gpt2 (byte-level BPE)"));
        }
        let pre = self.text("tokenizer.ggml.pre")?.unwrap_or("default");
        let Some((_, split)) = SPLITS.iter().find(|(name, _)| *name == pre) else {
            let supported = SPLITS.map(|(name, _)| name).join(", ");
            return Err(self.unsupported(format!("tokenizer.ggml.pre '{pre}'"), &supported));
        };
        let tokens = self.texts("tokenizer.ggml.tokens")?;
        let key = "tokenizer.ggml.token_type";
        let types = match self.file.values.get(key) {
            None => &[][..],
            Some(Value::Array(types)) if types.len() == tokens.len() => types,
            Some(other) => return Err(self.wrong(key, other, &format!("a list of {}", tokens.len()))),
        };
        // Types 3 and 4: control tokens, and tokens that the user added.
        let added = types.iter().zip(&tokens).enumerate().filter_map(|(id, (kind, token))| match kind {
            Value::Int(n @ (3 | 4)) => Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *n == 3,
            })),
            _ => None,
        });
        let added: Vec<serde_json::Value> = added.collect();
        let mut vocab = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if vocab.insert((*token).to_owned(), json!(id)).is_some() {
                let what = format!("token '{token}' is in tokenizer.ggml.tokens twice: convert the model again");
                return Err(Error::file(self.path(), what));
            }
        }
        let level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let words = |digits: &str| {
            let pattern = format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
        };
        let steps = match split {
            Split::Gpt2 => vec![level(true)],
            Split::Digits => vec![json!({"type": "Digits", "individual_digits": true}), level(true)],
            Split::Llama3 => vec![words(r"\p{N}{1,3}"), level(false)],
            Split::Qwen2 => vec![words(r"\p{N}"), level(false)],
        };
        let bos = self.integer("tokenizer.ggml.bos_token_id")?;
        let add_bos = self.truth("tokenizer.ggml.add_bos_token")?.unwrap_or(*split == Split::Llama3);
        let first = match bos.filter(|_| add_bos) {
            None => serde_json::Value::Null,
            Some(id) => {
                let token = tokens.get(id as usize).ok_or_else(|| {
                    self.wrong("tokenizer.ggml.bos_token_id", &Value::Int(id.into()), "the number of a token")
                })?;
                let text = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
                let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
                json!({
                    "type": "TemplateProcessing",
                    "single": [special, text("A", 0)],
                    "pair": [special, text("A", 0), text("B", 1)],
                    "special_tokens": {*token: {"id": token, "ids": [id], "tokens": [token]}},
                })
            }
        };
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added,
            "normalizer": if *split == Split::Qwen2 { json!({"type": "NFC"}) } else { json!(null) },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": first,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": *split == Split::Llama3,
                "vocab": vocab,
                "merges": self.texts("tokenizer.ggml.merges")?,
            },
        }))
    }

    fn factors(&self) -> Result<Vec<f32>, Error> {
        let place = &self.file.tensors[FACTORS];
        let bytes = &self.file.map[place.range.clone()];
        match place.kind {
            crate::model::tensors::Kind::Plain(safetensors::Dtype::F32) => {
                Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            kind => Err(self.unsupported(format!("tensor '{FACTORS}' of {kind:?}"), "F32")),
        }
    }
}

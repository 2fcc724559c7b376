//! `config.json` of a GGUF file.

use serde_json::json;

use super::container::Value;
use super::{ATTENTION, EMBEDDING, FACTORS, FEED_FORWARD, Gguf};
use crate::model::Error;
use crate::model::config::Config;

/// Keys of an architecture that change what is computed, and the values that change nothing.
const CHANGING: [(&str, f64); 18] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.kv_lora_rank", 0.0),
    ("attention.layer_norm_epsilon", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.q_lora_rank", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("attention.temperature_length", 0.0),
    ("embedding_scale", 1.0),
    ("final_logit_softcapping", 0.0),
    ("interleave_moe_layer_step", 0.0),
    ("logit_scale", 1.0),
    ("nextn_predict_layers", 0.0),
    ("residual_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("swin_norm", 0.0),
    ("use_parallel_residual", 0.0),
];

/// Keys of an architecture that say how a model was made, or what its tensors and other keys say too.
const SILENT: [&str; 8] = [
    "expert_used_count",
    "leading_dense_block_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
    "vocab_size",
    "attention.group_norm_epsilon",
];

impl Gguf {
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
        let vocab = self.file.tensors.get(EMBEDDING).map(|t| t.shape[0]);
        let vocab =
            vocab.ok_or_else(|| Error::MissingTensor { name: EMBEDDING.to_owned(), path: self.path().to_owned() })?;
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let theta = self.number(&key("rope.freq_base"))?.unwrap_or(10000.0);
        let id = |name: &str| self.integer(&format!("tokenizer.ggml.{name}_token_id"));
        let eos: Vec<u32> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect();
        let context = self.size("context_length")?;
        let window = self.integer(&key("attention.sliding_window"))?.filter(|&n| n > 0 && (n as usize) < context);
        let (attention_bias, mlp_bias) = (self.has_biases(&ATTENTION), self.has_biases(&FEED_FORWARD));
        // Hugging Face's Llama has no windows, and its Mistral no biases.
        let architecture = match (self.prefix, window) {
            ("llama", Some(_)) if attention_bias || mlp_bias => {
                return Err(self.unsupported("a sliding window beside biases".to_owned(), "one of them"));
            }
            ("llama", Some(_)) => "MistralForCausalLM",
            _ => self.architecture,
        };
        let mut config = json!({
            "architectures": [architecture],
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.blocks()?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads()?,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "max_position_embeddings": context,
            "rms_norm_eps": self.need(&epsilon, self.number(&epsilon)?)?,
            "hidden_act": "silu",
            "rope_theta": theta,
            "tie_word_embeddings": !self.file.tensors.contains_key("output.weight"),
            "bos_token_id": id("bos")?,
            "eos_token_id": eos,
        });
        if self.prefix == "llama" && window.is_none() {
            config["attention_bias"] = json!(attention_bias);
            config["mlp_bias"] = json!(mlp_bias);
        }
        if let Some(window) = window {
            config["sliding_window"] = json!(window);
            if self.prefix != "llama" {
                config["use_sliding_window"] = json!(true);
            }
        }
        // A factor without a type is linear; older files call it scale_linear.
        let kind = self.text(&key("rope.scaling.type"))?.unwrap_or("linear");
        let factor = self.number(&key("rope.scaling.factor"))?.or(self.number(&key("rope.scale_linear"))?);
        match (kind, factor) {
            ("none", _) | ("linear", None | Some(0.0 | 1.0)) => (),
            ("linear", Some(factor)) => config["rope_scaling"] = json!({"rope_type": "linear", "factor": factor}),
            _ => return Err(self.unsupported(format!("{} '{kind}'", key("rope.scaling.type")), "none, linear")),
        }
        self.frequency_factors(&mut config)?;
        for (name, neutral) in CHANGING {
            let (key, name) = (key(name), self.architecture);
            let same = match self.value(&key) {
                None => true,
                Some(Value::Int(n)) => *n as f64 == neutral,
                Some(Value::Float(n)) => *n == neutral,
                Some(Value::Bool(b)) => f64::from(u8::from(*b)) == neutral,
                Some(_) => false,
            };
            if !same {
                return Err(self.unsupported(format!("key '{key}'"), &format!("{name} without it")));
            }
        }
        self.asked().extend(SILENT.map(key));
        Ok(config)
    }

    /// What the keys of the architecture say that is not used, for the user. To be asked after [`Gguf::config`].
    pub(super) fn unused_keys(&self) -> Vec<String> {
        let (asked, mine) = (self.asked(), format!("{}.", self.prefix));
        let unused = self.file.values.keys().filter(|k| k.starts_with(&mine) && !asked.contains(*k));
        unused.map(|k| format!("{}: key '{k}' is not used", self.path().display())).collect()
    }

    /// Llama 3 stretches rotary frequencies by a rule; the file holds what the rule gives. Recognises the rule.
    fn frequency_factors(&self, config: &mut serde_json::Value) -> Result<(), Error> {
        if !self.file.tensors.contains_key(FACTORS) {
            return Ok(());
        }
        let frequencies = |config: &serde_json::Value| {
            let (mut ropes, _) = Config::parse(self.path(), &config.to_string())?.ropes();
            Ok::<_, Error>(ropes.swap_remove(0).frequencies)
        };
        let plain = frequencies(config)?;
        let found = self.factors()?;
        let factor = found.iter().copied().fold(1.0, f32::max);
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let scaled = frequencies(config)?;
        let expected = plain.iter().zip(&scaled).map(|(p, s)| p / s);
        let close = |(e, f): (f64, &f32)| (e / f64::from(*f) - 1.0).abs() < 1e-3;
        if plain.len() == found.len() && expected.zip(&found).all(close) {
            return Ok(());
        }
        Err(self.unsupported(format!("rotary frequencies with the factors of '{FACTORS}'"), "none, Llama 3's"))
    }

    fn factors(&self) -> Result<Vec<f32>, Error> {
        let place = &self.file.tensors[FACTORS];
        let bytes = place.bytes.as_slice();
        match &place.kind {
            crate::model::tensors::Kind::Plain(safetensors::Dtype::F32) => {
                Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            crate::model::tensors::Kind::Plain(other) => {
                Err(self.unsupported(format!("tensor '{FACTORS}' of {other:?}"), "F32"))
            }
            crate::model::tensors::Kind::Format(reader) => {
                Err(self.unsupported(format!("tensor '{FACTORS}' of {}", reader.format().name), "F32"))
            }
        }
    }
}

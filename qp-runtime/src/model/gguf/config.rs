//! `config.json` of a GGUF file.

use serde_json::json;

use super::container::Value;
use super::{EMBEDDING, FACTORS, Gguf, LONG_FACTORS, SHORT_FACTORS};
use crate::model::Error;
use crate::model::config::Config;
use crate::model::rope::long_attention;
use crate::model::tensors::Kind;

/// Keys of an architecture that change what is computed, and the values that change nothing.
const CHANGING: [(&str, f64); 27] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.kv_lora_rank", 0.0),
    ("attention.layer_norm_epsilon", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.q_lora_rank", 0.0),
    ("attention.scale", 0.0),
    ("attention.sliding_window_pattern", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("attention.temperature_length", 0.0),
    ("attention.temperature_scale", 0.0),
    ("embedding_scale", 1.0),
    ("expert_group_count", 1.0),
    ("expert_shared_count", 0.0),
    ("expert_shared_feed_forward_length", 0.0),
    ("expert_weights_norm", 1.0),
    ("expert_weights_scale", 1.0),
    ("final_logit_softcapping", 0.0),
    ("interleave_moe_layer_step", 0.0),
    ("logit_scale", 1.0),
    ("nextn_predict_layers", 0.0),
    ("residual_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
    ("swin_norm", 0.0),
    ("use_parallel_residual", 0.0),
];

/// Keys of an architecture that say how a model was made, or what its tensors and other keys say too.
const SILENT: [&str; 7] = [
    "expert_used_count",
    "leading_dense_block_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
    "attention.group_norm_epsilon",
];

/// The context length before stretching of all Llama 3's, whose files need not say it.
const LLAMA_3_CONTEXT: u32 = 8192;

impl Gguf {
    /// `config.json`.
    pub(super) fn config(&self) -> Result<serde_json::Value, Error> {
        let (arch, key) = (self.arch, |name: &str| self.key(name));
        let (hidden, heads) = (self.size("embedding_length")?, self.heads()?);
        let head_dim = match self.integer(&key("attention.key_length"))? {
            Some(n) => n as usize,
            None => hidden / heads,
        };
        let widths = ["attention.value_length", "rope.dimension_count"];
        for name in &widths[..if arch.partial { 1 } else { 2 }] {
            if let Some(n) = self.integer(&key(name))?.filter(|&n| n as usize != head_dim) {
                return Err(
                    self.unsupported(format!("{} = {n}", key(name)), &format!("the width of a head, {head_dim}"))
                );
            }
        }
        let vocab = self.file.tensors.get(EMBEDDING).map(|t| t.shape[0]);
        let vocab =
            vocab.ok_or_else(|| Error::MissingTensor { name: EMBEDDING.to_owned(), path: self.path().to_owned() })?;
        let theta = self.number(&key("rope.freq_base"))?.unwrap_or(10000.0);
        let id = |name: &str| self.integer(&format!("tokenizer.ggml.{name}_token_id"));
        let eos: Vec<u32> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect();
        let context = self.size("context_length")?;
        let mut config = json!({
            "architectures": [arch.name],
            "hidden_size": hidden,
            "num_hidden_layers": self.blocks()?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads()?,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "max_position_embeddings": context,
            "rope_theta": theta,
            "tie_word_embeddings": !self.file.tensors.contains_key("output.weight"),
            "bos_token_id": id("bos")?,
            "eos_token_id": eos,
        });
        let [eps, name] = arch.eps;
        config[name] = json!(self.need(&key(eps), self.number(&key(eps))?)?);
        if arch.norms_hold_one {
            config["norms_hold_one"] = json!(true);
        }
        if arch.partial {
            let turning = self.integer(&key("rope.dimension_count"))?.map_or(head_dim, |n| n as usize);
            let mut part = turning as f64 / head_dim as f64;
            // A width is this part rounded down.
            while ((head_dim as f64 * part) as usize) < turning {
                part = part.next_up();
            }
            config["partial_rotary_factor"] = json!(part);
        }
        self.widths(&mut config)?;
        for (name, layers) in arch.biases {
            if let Some(name) = name {
                config[name] = json!(self.has_biases(layers));
            }
        }
        let window = self.integer(&key("attention.sliding_window"))?.filter(|&n| n > 0 && (n as usize) < context);
        if let Some(window) = window {
            config["sliding_window"] = json!(window);
        }
        let long = self.scaling(&mut config)?;
        (arch.more)(self, &mut config)?;
        self.frequency_factors(&mut config)?;
        let changing = CHANGING.iter().filter(|(name, _)| !arch.uses.contains(name));
        for (name, neutral) in changing.filter(|(name, _)| !(long && *name == "rope.scaling.attn_factor")) {
            let (key, name) = (key(name), arch.name);
            let same = match self.value(&key) {
                None => true,
                Some(Value::Int(n)) => *n as f64 == *neutral,
                Some(Value::Float(n)) => *n == *neutral,
                Some(Value::Bool(b)) => f64::from(u8::from(*b)) == *neutral,
                Some(_) => false,
            };
            if !same {
                return Err(self.unsupported(format!("key '{key}'"), &format!("{name} without it")));
            }
        }
        self.asked().extend(SILENT.map(key));
        Ok(config)
    }

    /// Widths of the feed-forward layer, and what is said of experts.
    fn widths(&self, config: &mut serde_json::Value) -> Result<(), Error> {
        let key = |name: &str| self.key(name);
        let count = self.integer(&key("expert_count"))?.filter(|&n| n > 0);
        let Some(experts) = self.arch.experts else {
            if let Some(n) = count {
                return Err(self.unsupported(format!("a mixture of {n} experts"), "one feed-forward layer a block"));
            }
            config["intermediate_size"] = json!(self.size("feed_forward_length")?);
            return Ok(());
        };
        let inner = match self.integer(&key("expert_feed_forward_length"))? {
            Some(_) => self.size("expert_feed_forward_length")?,
            None => self.size("feed_forward_length")?,
        };
        let plain = match self.value(&key("feed_forward_length")) {
            Some(_) => self.size("feed_forward_length")?,
            None => inner,
        };
        config["intermediate_size"] = json!(plain);
        let [of_count, of_chosen, of_inner] = experts.keys;
        let (used, gating) = (self.integer(&key("expert_used_count"))?, key("expert_gating_func"));
        config[of_count] = json!(self.size("expert_count")?);
        config[of_chosen] = json!(self.need(&key("expert_used_count"), used)?);
        config[of_inner] = json!(inner);
        match self.integer(&gating)? {
            Some(n) if n != 0 && n != experts.gating => {
                Err(self.unsupported(format!("{gating} = {n}"), &experts.gating.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// How rotary frequencies are stretched; true if by factors that the file holds.
    fn scaling(&self, config: &mut serde_json::Value) -> Result<bool, Error> {
        let key = |name: &str| self.key(name);
        // A factor without a type is linear; older files call it scale_linear.
        let kind = self.text(&key("rope.scaling.type"))?.unwrap_or("linear");
        let factor = self.number(&key("rope.scaling.factor"))?.or(self.number(&key("rope.scale_linear"))?);
        let original = self.integer(&key("rope.scaling.original_context_length"))?;
        if self.file.tensors.contains_key(LONG_FACTORS) && kind != "none" {
            config["rope_scaling"] = json!({
                "rope_type": "longrope",
                "long_factor": self.factors(LONG_FACTORS)?,
                "short_factor": self.factors(SHORT_FACTORS)?,
                "original_max_position_embeddings": original,
            });
            let attention = self.number(&key("rope.scaling.attn_factor"))?.unwrap_or(1.0);
            let context = self.size("context_length")? as f64;
            let original = original.map_or(context, f64::from);
            // What follows from the contexts is in more bits than a file has.
            if long_attention(context / original, original) as f32 != attention as f32 {
                config["rope_scaling"]["attention_factor"] = json!(attention);
            }
            return Ok(true);
        }
        match (kind, factor) {
            ("none", _) | ("linear", None | Some(0.0 | 1.0)) => (),
            ("linear", Some(factor)) => config["rope_scaling"] = json!({"rope_type": "linear", "factor": factor}),
            ("yarn", factor) => {
                let factor = self.need(&key("rope.scaling.factor"), factor)?;
                let beta = |name: &str, default: f64| {
                    self.number(&key(&format!("rope.scaling.yarn_{name}"))).map(|n| n.unwrap_or(default))
                };
                config["rope_scaling"] = json!({
                    "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                    "beta_fast": beta("beta_fast", 32.0)?, "beta_slow": beta("beta_slow", 1.0)?,
                });
                let multiplier = self.number(&key("rope.scaling.yarn_log_multiplier"))?;
                if let Some(multiplier) = multiplier.filter(|n| *n != 0.0) {
                    config["rope_scaling"]["mscale"] = json!(1.0);
                    config["rope_scaling"]["mscale_all_dim"] = json!(multiplier);
                }
            }
            _ => return Err(self.unsupported(format!("{} '{kind}'", key("rope.scaling.type")), "none, linear, yarn")),
        }
        Ok(false)
    }

    /// What the keys of the architecture say that is not used, for the user. To be asked after [`Gguf::config`].
    pub(super) fn unused_keys(&self) -> Vec<String> {
        let (asked, mine) = (self.asked(), self.key(""));
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
        let found = self.factors(FACTORS)?;
        let factor = found.iter().copied().fold(1.0, f32::max);
        let original = self.integer(&self.key("rope.scaling.original_context_length"))?.filter(|&n| n > 0);
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original.unwrap_or(LLAMA_3_CONTEXT),
        });
        let scaled = frequencies(config)?;
        let expected = plain.iter().zip(&scaled).map(|(p, s)| p / s);
        let close = |(e, f): (f64, &f32)| (e / f64::from(*f) - 1.0).abs() < 1e-3;
        if plain.len() == found.len() && expected.zip(&found).all(close) {
            return Ok(());
        }
        Err(self.unsupported(format!("rotary frequencies with the factors of '{FACTORS}'"), "none, Llama 3's"))
    }

    /// The numbers of a small tensor beside the layers.
    fn factors(&self, name: &str) -> Result<Vec<f32>, Error> {
        let missing = || Error::MissingTensor { name: name.to_owned(), path: self.path().to_owned() };
        let place = self.file.tensors.get(name).ok_or_else(missing)?;
        let found = match &place.kind {
            Kind::Plain(safetensors::Dtype::F32) => {
                return Ok(place.bytes.as_slice().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
            }
            Kind::Plain(other) => format!("{other:?}"),
            Kind::Format(reader) => reader.format().name.clone(),
        };
        Err(self.unsupported(format!("tensor '{name}' of {found}"), "F32"))
    }
}

//! Architectures of GGUF files: how llama.cpp and its converter name and arrange what Hugging Face's directories hold. Adding
//! one is adding an entry.

use serde_json::{Value as Json, json};

use super::Gguf;
use super::container::Value;
use crate::model::Error;
use crate::model::config::MOST_LAYERS;

/// What a file of an architecture has otherwise than a directory.
#[derive(Debug)]
pub struct Architecture {
    /// Its name in files, with which keys begin.
    pub prefix: &'static str,
    /// Hugging Face's name.
    pub name: &'static str,
    /// True if rows of q and k are interleaved: where llama.cpp turns neighbouring elements and the model the halves of
    /// a head, its converter interleaves these.
    pub interleaved: bool,
    /// True if weights of norms hold the 1 that the model adds to them.
    pub norms_hold_one: bool,
    /// The key of what norms add, in files and in `config.json`.
    pub eps: [&'static str; 2],
    /// True if a part of each head may turn.
    pub partial: bool,
    /// Tensors of a block that have other names than [`super::INNER`] says.
    pub names: &'static [(&'static str, &'static str)],
    /// The key of `config.json` for the biases of some layers; without a key they are always there. Files may leave any of
    /// them out.
    pub biases: &'static [(Option<&'static str>, &'static [&'static str])],
    /// How its experts are named, if it is a mixture.
    pub experts: Option<&'static Experts>,
    /// Keys that not all architectures have, and that `more` reads; files that are written have these too.
    pub uses: &'static [&'static str],
    /// What `config.json` says beside what all say.
    pub more: fn(&Gguf, &mut Json) -> Result<(), Error>,
}

/// Experts, which files stack.
#[derive(Debug)]
pub struct Experts {
    /// The part of a block that has them.
    pub part: &'static str,
    /// Their layers: of `ffn_gate_exps`, `ffn_up_exps`, `ffn_down_exps`.
    pub layers: [&'static str; 3],
    /// Keys of `config.json` for how many there are, how many are chosen, and how wide they are.
    pub keys: [&'static str; 3],
    /// How scores become shares, as `expert_gating_func` numbers it.
    pub gating: u32,
}

/// Stacked layers of experts.
pub const STACKED: [&str; 3] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];
/// Linear layers of a block's attention.
const ATTENTION: &[&str] = &["attn_q", "attn_k", "attn_v", "attn_output"];
/// Without the last.
const QKV: &[&str] = &["attn_q", "attn_k", "attn_v"];
/// Linear layers of a block's feed-forward part.
const FEED_FORWARD: &[&str] = &["ffn_gate", "ffn_up", "ffn_down"];

const RMS: [&str; 2] = ["attention.layer_norm_rms_epsilon", "rms_norm_eps"];

const LLAMA: Architecture = Architecture {
    prefix: "llama",
    name: "LlamaForCausalLM",
    interleaved: true,
    norms_hold_one: false,
    eps: RMS,
    partial: false,
    names: &[],
    biases: &[(Some("attention_bias"), ATTENTION), (Some("mlp_bias"), FEED_FORWARD)],
    experts: None,
    uses: &[],
    more: |gguf, config| {
        // Hugging Face's Llama has no windows, and its Mistral no biases.
        if config.get("sliding_window").is_some() {
            if config["attention_bias"] == json!(true) || config["mlp_bias"] == json!(true) {
                return Err(gguf.unsupported("a sliding window beside biases".to_owned(), "one of them"));
            }
            config["architectures"] = json!(["MistralForCausalLM"]);
        }
        Ok(())
    },
};

const MISTRAL_3: Architecture = Architecture {
    prefix: "mistral3",
    name: "Ministral3ForCausalLM",
    biases: &[],
    uses: &["attention.temperature_scale"],
    more: |gguf, config| {
        let grows = gguf.number_of("attention.temperature_scale")?.filter(|n| *n != 0.0);
        if let (Some(grows), Some(scaling)) = (grows, config.get_mut("rope_scaling")) {
            scaling["llama_4_scaling_beta"] = json!(grows);
        }
        Ok(())
    },
    ..LLAMA
};

const MIXTRAL: Architecture = Architecture {
    name: "MixtralForCausalLM",
    names: &[("ffn_gate_inp", "block_sparse_moe.gate")],
    biases: &[],
    experts: Some(&Experts {
        part: "block_sparse_moe",
        layers: ["w1", "w3", "w2"],
        keys: ["num_local_experts", "num_experts_per_tok", "intermediate_size"],
        gating: 1,
    }),
    more: |_, _| Ok(()),
    ..LLAMA
};

const QWEN2: Architecture = Architecture {
    prefix: "qwen2",
    name: "Qwen2ForCausalLM",
    interleaved: false,
    biases: &[(None, QKV)],
    more: |_, config| {
        if config.get("sliding_window").is_some() {
            config["use_sliding_window"] = json!(true);
        }
        Ok(())
    },
    ..LLAMA
};

const QWEN3: Architecture =
    Architecture { prefix: "qwen3", name: "Qwen3ForCausalLM", biases: &[(Some("attention_bias"), ATTENTION)], ..QWEN2 };

const QWEN3_MOE: Architecture = Architecture {
    prefix: "qwen3moe",
    name: "Qwen3MoeForCausalLM",
    names: &[("ffn_gate_inp", "mlp.gate")],
    experts: Some(&Experts {
        part: "mlp",
        layers: ["gate_proj", "up_proj", "down_proj"],
        keys: ["num_experts", "num_experts_per_tok", "moe_intermediate_size"],
        gating: 1,
    }),
    more: |gguf, config| {
        (QWEN2.more)(gguf, config)?;
        let dense = |i: &usize| !gguf.file.tensors.contains_key(&format!("blk.{i}.ffn_gate_inp.weight"));
        // More blocks are refused where their number is read.
        config["mlp_only_layers"] = (0..gguf.blocks()?.min(MOST_LAYERS)).filter(dense).collect();
        // llama.cpp divides by the sum of the chosen, always.
        config["norm_topk_prob"] = json!(true);
        Ok(())
    },
    ..QWEN3
};

const GEMMA: Architecture = Architecture {
    prefix: "gemma",
    name: "GemmaForCausalLM",
    interleaved: false,
    norms_hold_one: true,
    biases: &[(Some("attention_bias"), ATTENTION)],
    more: |_, _| Ok(()),
    ..LLAMA
};

const GEMMA_2: Architecture = Architecture {
    prefix: "gemma2",
    name: "Gemma2ForCausalLM",
    names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ],
    uses: &["attention.scale", "attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern"],
    // Of the largest model the width of a head is not what scores are divided by, and its file does not say so.
    more: |gguf, config| gemma(gguf, config, 46),
    ..GEMMA
};

const GEMMA_3: Architecture = Architecture {
    prefix: "gemma3",
    name: "Gemma3ForCausalLM",
    more: |gguf, config| {
        gemma(gguf, config, 62)?;
        config["rope_local_base_freq"] = json!(gguf.number_of("rope.freq_base_swa")?.unwrap_or(10_000.0));
        Ok(())
    },
    ..GEMMA_2
};

/// What Gemma 2 and 3 have in common; that with so many blocks divides scores by the width of the stream over the heads.
fn gemma(gguf: &Gguf, config: &mut Json, largest: usize) -> Result<(), Error> {
    windows(gguf, config)?;
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = gguf.number_of(key)? {
            config[key] = json!(cap);
        }
    }
    let scale = gguf.number_of("attention.scale")?.filter(|scale| *scale > 0.0);
    config["query_pre_attn_scalar"] = match scale {
        Some(scale) => json!(1.0 / (scale * scale)),
        None if gguf.blocks()? == largest => json!(gguf.size("embedding_length")? as f64 / gguf.heads()? as f64),
        None => config["head_dim"].clone(),
    };
    Ok(())
}

/// Which layers have windows, if the file says so.
fn windows(gguf: &Gguf, config: &mut Json) -> Result<(), Error> {
    let key = gguf.key("attention.sliding_window_pattern");
    match gguf.value(&key) {
        Some(Value::Numbers(slide)) => {
            let kind = |i| if slide.get(i) == 0.0 { "full_attention" } else { "sliding_attention" };
            config["layer_types"] = (0..slide.len()).map(kind).collect();
        }
        _ => {
            if let Some(every) = gguf.integer(&key)? {
                config["sliding_window_pattern"] = json!(every);
            }
        }
    }
    if config.get("sliding_window").is_none() {
        config["sliding_window"] = Json::Null;
    }
    Ok(())
}

const PHI3: Architecture = Architecture {
    prefix: "phi3",
    name: "Phi3ForCausalLM",
    interleaved: false,
    partial: true,
    names: &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
    biases: &[],
    more: |_, _| Ok(()),
    ..LLAMA
};

const OLMO2: Architecture = Architecture {
    prefix: "olmo2",
    name: "Olmo2ForCausalLM",
    interleaved: false,
    names: &[("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")],
    biases: &[(Some("attention_bias"), ATTENTION)],
    uses: &["attention.sliding_window_pattern"],
    more: |gguf, config| {
        if config.get("sliding_window").is_some() {
            config["architectures"] = json!(["Olmo3ForCausalLM"]);
            windows(gguf, config)?;
        }
        Ok(())
    },
    ..LLAMA
};

const GRANITE: Architecture = Architecture {
    prefix: "granite",
    name: "GraniteForCausalLM",
    uses: &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"],
    more: |gguf, config| {
        let scale = |key: &str| gguf.number_of(key).map(|n| n.filter(|n| *n != 0.0));
        let head_dim = config["head_dim"].as_f64().unwrap_or(1.0);
        config["attention_multiplier"] = json!(scale("attention.scale")?.unwrap_or(1.0 / head_dim.sqrt()));
        for (key, name) in [
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ] {
            config[name] = json!(scale(key)?.unwrap_or(1.0));
        }
        Ok(())
    },
    ..LLAMA
};

const COMMAND_R: Architecture = Architecture {
    prefix: "command-r",
    name: "CohereForCausalLM",
    interleaved: false,
    eps: ["attention.layer_norm_epsilon", "layer_norm_eps"],
    biases: &[],
    uses: &["attention.layer_norm_epsilon", "logit_scale"],
    more: |gguf, config| {
        config["logit_scale"] = json!(gguf.number_of("logit_scale")?.filter(|n| *n != 0.0).unwrap_or(1.0));
        Ok(())
    },
    ..LLAMA
};

const COHERE2: Architecture = Architecture {
    prefix: "cohere2",
    name: "Cohere2ForCausalLM",
    uses: &["attention.layer_norm_epsilon", "logit_scale", "attention.sliding_window_pattern"],
    more: |gguf, config| {
        (COMMAND_R.more)(gguf, config)?;
        windows(gguf, config)
    },
    ..COMMAND_R
};

/// Of GLM-4 in Hugging Face's layout; files of the model's own code have one layer for queries, keys and values.
const CHATGLM: Architecture =
    Architecture { prefix: "chatglm", name: "GlmForCausalLM", names: &[("ffn_up", "mlp.gate_up_proj")], ..GLM4 };

const GLM4: Architecture = Architecture {
    prefix: "glm4",
    name: "Glm4ForCausalLM",
    interleaved: false,
    partial: true,
    names: &[
        ("post_attention_norm", "post_self_attn_layernorm"),
        ("post_ffw_norm", "post_mlp_layernorm"),
        ("ffn_up", "mlp.gate_up_proj"),
    ],
    biases: &[(Some("attention_bias"), QKV)],
    more: |_, _| Ok(()),
    ..LLAMA
};

const GLM4_MOE: Architecture = Architecture {
    prefix: "glm4moe",
    name: "Glm4MoeForCausalLM",
    names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_gate_inp", "mlp.gate"),
        ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
        ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
        ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
        ("nextn.eh_proj", "eh_proj"),
        ("nextn.embed_tokens", "embed_tokens"),
        ("nextn.enorm", "enorm"),
        ("nextn.hnorm", "hnorm"),
        ("nextn.shared_head_head", "shared_head.head"),
        ("nextn.shared_head_norm", "shared_head.norm"),
    ],
    experts: Some(&Experts {
        part: "mlp",
        layers: ["gate_proj", "up_proj", "down_proj"],
        keys: ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"],
        gating: 2,
    }),
    uses: &[
        "expert_shared_count",
        "expert_weights_norm",
        "expert_weights_scale",
        "leading_dense_block_count",
        "nextn_predict_layers",
    ],
    more: |gguf, config| {
        let whole = |key: &str| Ok::<_, Error>(gguf.integer(&gguf.key(key))?.unwrap_or(0));
        let further = whole("nextn_predict_layers")?;
        config["num_hidden_layers"] = json!(gguf.blocks()?.saturating_sub(further as usize));
        config["num_nextn_predict_layers"] = json!(further);
        config["n_shared_experts"] = json!(whole("expert_shared_count")?);
        config["first_k_dense_replace"] = json!(whole("leading_dense_block_count")?);
        config["norm_topk_prob"] = json!(gguf.truth(&gguf.key("expert_weights_norm"))?.unwrap_or(true));
        let scale = gguf.number_of("expert_weights_scale")?.filter(|n| *n != 0.0);
        config["routed_scaling_factor"] = json!(scale.unwrap_or(1.0));
        config["use_qk_norm"] = json!(gguf.file.tensors.contains_key("blk.0.attn_q_norm.weight"));
        Ok(())
    },
    ..GLM4
};

const SMOLLM3: Architecture =
    Architecture { prefix: "smollm3", name: "SmolLM3ForCausalLM", more: |_, _| Ok(()), ..LLAMA };

const STARCODER2: Architecture = Architecture {
    prefix: "starcoder2",
    name: "Starcoder2ForCausalLM",
    interleaved: false,
    eps: ["attention.layer_norm_epsilon", "norm_epsilon"],
    names: &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")],
    biases: &[(Some("use_bias"), &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"])],
    uses: &["attention.layer_norm_epsilon"],
    more: |_, _| Ok(()),
    ..LLAMA
};

const SEED_OSS: Architecture = Architecture {
    prefix: "seed_oss",
    name: "SeedOssForCausalLM",
    interleaved: false,
    names: &[("post_attention_norm", "post_attention_layernorm")],
    biases: &[
        (Some("attention_bias"), QKV),
        (Some("attention_out_bias"), &["attn_output"]),
        (Some("mlp_bias"), FEED_FORWARD),
    ],
    more: |_, _| Ok(()),
    ..LLAMA
};

const GPT_OSS: Architecture = Architecture {
    prefix: "gpt-oss",
    name: "GptOssForCausalLM",
    interleaved: false,
    names: &[("post_attention_norm", "post_attention_layernorm"), ("ffn_gate_inp", "mlp.router")],
    biases: &[(Some("attention_bias"), ATTENTION)],
    experts: Some(&Experts {
        part: "mlp",
        layers: ["gate_proj", "up_proj", "down_proj"],
        keys: ["num_local_experts", "num_experts_per_tok", "intermediate_size"],
        gating: 3,
    }),
    uses: &["attention.sliding_window_pattern"],
    more: |gguf, config| {
        windows(gguf, config)?;
        // The model does not round where frequencies begin to be stretched, and its file does not say so.
        if let Some(scaling) = config.get_mut("rope_scaling").filter(|s| s["rope_type"] == "yarn") {
            scaling["truncate"] = json!(false);
        }
        Ok(())
    },
    ..LLAMA
};

/// All that are read.
static ALL: [Architecture; 21] = [
    LLAMA, MIXTRAL, MISTRAL_3, QWEN2, QWEN3, QWEN3_MOE, GEMMA, GEMMA_2, GEMMA_3, PHI3, OLMO2, GRANITE, COMMAND_R,
    COHERE2, CHATGLM, GLM4, GLM4_MOE, SMOLLM3, STARCODER2, SEED_OSS, GPT_OSS,
];

/// The architecture that a file names, with experts or without.
pub fn find(prefix: &str, experts: bool) -> Option<&'static Architecture> {
    let mut named = ALL.iter().filter(|a| a.prefix == prefix).peekable();
    // Where there is but one, its keys are looked at later.
    let only = *named.peek()?;
    Some(named.find(|a| a.experts.is_some() == experts).unwrap_or(only))
}

/// The architecture that files have of the one that Hugging Face calls `name`: each that is read has one.
pub fn named(name: &str) -> Option<&'static Architecture> {
    let name = match name {
        "MistralForCausalLM" | "MinistralForCausalLM" => LLAMA.name,
        "Olmo3ForCausalLM" => OLMO2.name,
        other => other,
    };
    ALL.iter().find(|a| a.name == name)
}

/// Their names.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = ALL.iter().map(|a| a.prefix).collect();
    names.dedup();
    names
}

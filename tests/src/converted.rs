//! Models of `tests/data/conformance` as llama.cpp's converter writes them: its names of keys and tensors, weights of
//! norms with the 1 that Gemma adds, experts stacked, halves of heads by turns where it does so.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use serde_json::json;

use crate::conformance::Case;
use crate::gguf::{Gguf, Value, byte_vocabulary, interleaved};
use crate::models::RandomModel;

/// llama.cpp's name of an architecture, and whether it turns neighbouring elements of heads where the model turns halves.
fn architecture(name: &str) -> Option<(&'static str, bool)> {
    Some(match name {
        "LlamaForCausalLM" | "MistralForCausalLM" | "MixtralForCausalLM" => ("llama", true),
        "GraniteForCausalLM" => ("granite", true),
        "SmolLM3ForCausalLM" => ("smollm3", true),
        "Qwen2ForCausalLM" => ("qwen2", false),
        "Qwen3ForCausalLM" => ("qwen3", false),
        "Qwen3MoeForCausalLM" => ("qwen3moe", false),
        "GemmaForCausalLM" => ("gemma", false),
        "Gemma2ForCausalLM" => ("gemma2", false),
        "Gemma3ForCausalLM" => ("gemma3", false),
        "Phi3ForCausalLM" => ("phi3", false),
        "Olmo2ForCausalLM" | "Olmo3ForCausalLM" => ("olmo2", false),
        "CohereForCausalLM" => ("command-r", false),
        "Cohere2ForCausalLM" => ("cohere2", false),
        "GlmForCausalLM" => ("chatglm", false),
        "Glm4ForCausalLM" => ("glm4", false),
        "Glm4MoeForCausalLM" => ("glm4moe", false),
        "Starcoder2ForCausalLM" => ("starcoder2", false),
        "SeedOssForCausalLM" => ("seed_oss", false),
        "GptOssForCausalLM" => ("gpt-oss", false),
        _ => return None,
    })
}

/// The file of a model; nothing if llama.cpp's architectures here have none for it.
pub fn converted(model: &RandomModel) -> Option<Gguf> {
    let c = &model.config;
    let (prefix, interleave) = architecture(c["architectures"][0].as_str()?)?;
    let whole = |key: &str| c[key].as_u64().unwrap() as u32;
    let heads = whole("num_attention_heads");
    let head_dim = c["head_dim"].as_u64().map_or(whole("hidden_size") / heads, |n| n as u32);
    let mut values = BTreeMap::new();
    let mut put = |key: &str, value: Value| values.insert(format!("{prefix}.{key}"), value);
    for (key, name) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.sliding_window", "sliding_window"),
        ("attention.sliding_window_pattern", "sliding_window_pattern"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_count", "num_experts"),
        ("expert_count", "num_local_experts"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_shared_count", "n_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
    ] {
        if let Some(n) = c[name].as_u64() {
            put(key, Value::U32(n as u32));
        }
    }
    for (key, name) in [
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("attention.layer_norm_epsilon", "layer_norm_eps"),
        ("attention.layer_norm_epsilon", "norm_epsilon"),
        ("rope.freq_base", "rope_theta"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
        ("logit_scale", "logit_scale"),
        ("expert_weights_scale", "routed_scaling_factor"),
    ] {
        if let Some(n) = c[name].as_f64() {
            put(key, Value::F32(n as f32));
        }
    }
    put("attention.key_length", Value::U32(head_dim));
    put("attention.value_length", Value::U32(head_dim));
    if let Some(part) = c["partial_rotary_factor"].as_f64() {
        put("rope.dimension_count", Value::U32((f64::from(head_dim) * part) as u32));
    }
    if let Some(scalar) = c["query_pre_attn_scalar"].as_f64().filter(|n| *n != f64::from(head_dim)) {
        put("attention.scale", Value::F32(1.0 / (scalar as f32).sqrt()));
    }
    let gating = match prefix {
        "qwen3moe" => Some(1),
        "glm4moe" => Some(2),
        _ => None,
    };
    if let Some(n) = gating {
        put("expert_gating_func", Value::U32(n));
    }
    if prefix == "glm4moe" {
        put("expert_weights_norm", Value::Bool(true));
    }
    let mut tensors = BTreeMap::new();
    let mut tensor = |name: &str, shape: &[usize], weights: &[f32]| {
        let bytes = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        tensors.insert(name.to_owned(), (shape.to_vec(), 0, bytes));
    };
    let scaling = &c["rope_scaling"];
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str());
    if let Some(n) = scaling["original_max_position_embeddings"].as_u64() {
        put("rope.scaling.original_context_length", Value::U32(n as u32));
    }
    match kind {
        Some(kind @ ("linear" | "yarn")) => {
            put("rope.scaling.type", Value::Text(kind.to_owned()));
            put("rope.scaling.factor", Value::F32(scaling["factor"].as_f64().unwrap() as f32));
        }
        Some("longrope") => {
            let original = c["original_max_position_embeddings"].as_u64().unwrap();
            put("rope.scaling.original_context_length", Value::U32(original as u32));
            let context = f64::from(whole("max_position_embeddings"));
            let attention = (1.0 + (context / original as f64).ln() / (original as f64).ln()).sqrt();
            put("rope.scaling.attn_factor", Value::F32(attention as f32));
            for length in ["long", "short"] {
                let factors = scaling[format!("{length}_factor")].as_array().unwrap();
                let factors: Vec<f32> = factors.iter().map(|f| f.as_f64().unwrap() as f32).collect();
                tensor(&format!("rope_factors_{length}.weight"), &[factors.len()], &factors);
            }
        }
        Some("llama3") => {
            let number = |key: &str| scaling[key].as_f64().unwrap();
            let (factor, original) = (number("factor"), number("original_max_position_embeddings"));
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let theta = c["rope_theta"].as_f64().unwrap();
            let divisors = (0..head_dim / 2).map(|i| {
                let wave = TAU * theta.powf(f64::from(2 * i) / f64::from(head_dim));
                let kept = ((original / wave - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - kept) / factor + kept)) as f32
            });
            tensor("rope_freqs.weight", &[head_dim as usize / 2], &divisors.collect::<Vec<_>>());
        }
        None => (),
        Some(other) => panic!("{other}"),
    }
    /// Shapes and weights by expert.
    type Stack = BTreeMap<usize, (Vec<usize>, Vec<f32>)>;
    let mut stacks: BTreeMap<String, Stack> = BTreeMap::new();
    for (name, (shape, weights)) in &model.tensors {
        let of_heads = match name {
            n if !interleave || !n.contains("layers") => None,
            n if n.contains("q_proj") => Some(heads as usize),
            n if n.contains("k_proj") => Some(whole("num_key_value_heads") as usize),
            _ => None,
        };
        let weights = match of_heads {
            Some(heads) => interleaved(weights, shape[0], heads),
            None if prefix.starts_with("gemma") && name.ends_with("norm.weight") => {
                weights.iter().map(|w| w + 1.0).collect()
            }
            None => weights.clone(),
        };
        for (name, expert, shape, weights) in pieces(prefix, name, shape, &weights) {
            match expert {
                Some(i) => drop(stacks.entry(name).or_default().insert(i, (shape, weights))),
                None => tensor(&name, &shape, &weights),
            }
        }
    }
    for (name, experts) in stacks {
        let shape = [&[experts.len()], experts[&0].0.as_slice()].concat();
        tensor(&name, &shape, &experts.into_values().flat_map(|(_, weights)| weights).collect::<Vec<_>>());
    }
    values.extend(byte_vocabulary(prefix));
    Some(Gguf { version: 3, values, tensors })
}

/// Name in the file, expert, shape and weights.
type Piece = (String, Option<usize>, Vec<usize>, Vec<f32>);

/// What a tensor becomes.
fn pieces(prefix: &str, name: &str, shape: &[usize], weights: &[f32]) -> Vec<Piece> {
    // gpt-oss has all experts in one tensor, turned over, gates and what they gate by turns.
    if let (&[count, cols, rows], Some((block, what))) = (shape, name.split_once(".mlp.experts.")) {
        let parts: &[&str] = if what.starts_with("gate_up") { &["gate", "up"] } else { &["down"] };
        let block = block.replace("model.layers", "blk");
        return (0..parts.len() * count)
            .map(|i| {
                let (e, part) = (i / parts.len(), i % parts.len());
                let own = (0..rows / parts.len()).flat_map(|r| {
                    let row = r * parts.len() + part;
                    (0..cols).map(move |c| weights[(e * cols + c) * rows + row])
                });
                let name = format!("{block}.ffn_{}_exps.weight", parts[part]);
                (name, Some(e), vec![rows / parts.len(), cols], own.collect())
            })
            .collect();
    }
    if let (&[count, rows], Some((block, what))) = (shape, name.split_once(".mlp.experts."))
        && what.ends_with("_bias")
    {
        let parts: &[&str] = if what.starts_with("gate_up") { &["gate", "up"] } else { &["down"] };
        let block = block.replace("model.layers", "blk");
        return (0..parts.len() * count)
            .map(|i| {
                let (e, part) = (i / parts.len(), i % parts.len());
                let own = (0..rows / parts.len()).map(|r| weights[e * rows + r * parts.len() + part]).collect();
                (format!("{block}.ffn_{}_exps.bias", parts[part]), Some(e), vec![rows / parts.len()], own)
            })
            .collect();
    }
    let (name, expert) = match name.split_once(".experts.") {
        Some((before, after)) => {
            let (expert, layer) = after.split_once('.').unwrap();
            (format!("{before}.experts.{layer}"), Some(expert.parse().unwrap()))
        }
        None => (name.to_owned(), None),
    };
    vec![(translated(prefix, &name), expert, shape.to_vec(), weights.to_vec())]
}

/// Names within a block, by what each is called in a directory: first those of one architecture.
const NAMES: [(&[&str], &str, &str); 34] = [
    (
        &["gemma2", "gemma3", "olmo2", "gpt-oss", "seed_oss", "glm4moe"],
        "post_attention_layernorm",
        "post_attention_norm",
    ),
    (&["gemma2", "gemma3"], "pre_feedforward_layernorm", "ffn_norm"),
    (&["gemma2", "gemma3", "olmo2"], "post_feedforward_layernorm", "post_ffw_norm"),
    (&["glm4"], "post_self_attn_layernorm", "post_attention_norm"),
    (&["glm4"], "post_mlp_layernorm", "post_ffw_norm"),
    (&["chatglm", "glm4", "phi3"], "mlp.gate_up_proj", "ffn_up"),
    (&["phi3"], "self_attn.qkv_proj", "attn_qkv"),
    (&["starcoder2"], "mlp.c_fc", "ffn_up"),
    (&["starcoder2"], "mlp.c_proj", "ffn_down"),
    (&["gpt-oss"], "self_attn.sinks", "attn_sinks.weight"),
    (&["gpt-oss"], "mlp.router", "ffn_gate_inp"),
    (&["glm4moe"], "mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    (&["glm4moe"], "mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    (&["glm4moe"], "mlp.shared_experts.up_proj", "ffn_up_shexp"),
    (&["glm4moe"], "mlp.shared_experts.down_proj", "ffn_down_shexp"),
    (&["llama"], "block_sparse_moe.gate", "ffn_gate_inp"),
    (&["llama"], "block_sparse_moe.experts.w1", "ffn_gate_exps"),
    (&["llama"], "block_sparse_moe.experts.w3", "ffn_up_exps"),
    (&["llama"], "block_sparse_moe.experts.w2", "ffn_down_exps"),
    (&["qwen3moe", "glm4moe"], "mlp.experts.gate_proj", "ffn_gate_exps"),
    (&["qwen3moe", "glm4moe"], "mlp.experts.up_proj", "ffn_up_exps"),
    (&["qwen3moe", "glm4moe"], "mlp.experts.down_proj", "ffn_down_exps"),
    (&["qwen3moe", "glm4moe"], "mlp.gate", "ffn_gate_inp"),
    (&[], "input_layernorm", "attn_norm"),
    (&[], "post_attention_layernorm", "ffn_norm"),
    (&[], "self_attn.q_norm", "attn_q_norm"),
    (&[], "self_attn.k_norm", "attn_k_norm"),
    (&[], "self_attn.q_proj", "attn_q"),
    (&[], "self_attn.k_proj", "attn_k"),
    (&[], "self_attn.v_proj", "attn_v"),
    (&[], "self_attn.o_proj", "attn_output"),
    (&[], "mlp.gate_proj", "ffn_gate"),
    (&[], "mlp.up_proj", "ffn_up"),
    (&[], "mlp.down_proj", "ffn_down"),
];

fn translated(prefix: &str, name: &str) -> String {
    for (from, to) in [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")] {
        if let Some(part) = name.strip_prefix(from) {
            return format!("{to}{part}");
        }
    }
    let (block, inner) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let of = |names: &[&str], from: &str| {
        let rest = inner.strip_prefix(from)?;
        let known = (names.is_empty() || names.contains(&prefix)) && ["", ".weight", ".bias"].contains(&rest);
        known.then_some(rest)
    };
    let found = NAMES.iter().find_map(|(names, from, to)| Some((to, of(names, from)?)));
    let (to, rest) = found.unwrap_or_else(|| panic!("{prefix} has no name for {name}"));
    format!("blk.{block}.{to}{rest}")
}

/// The case `name` as files can say it; nothing if they cannot. What the format has no key for is as llama.cpp has it, and of a model
/// of several parts the text's is left.
pub fn sayable(name: &str) -> Option<Case> {
    let mut case = Case::named(name);
    if let Some(text) = case.model.config.get("text_config").cloned() {
        case.model.config = text;
        let architecture = match case.model.config["model_type"].as_str() {
            Some("mistral") => "MistralForCausalLM",
            Some("gemma3_text") => "Gemma3ForCausalLM",
            other => panic!("{other:?}"),
        };
        case.model.config["architectures"] = json!([architecture]);
        let tensors = std::mem::take(&mut case.model.tensors);
        let text = |name: &str| name.strip_prefix("language_model.").map(str::to_owned);
        case.model.tensors = tensors.into_iter().filter_map(|(name, tensor)| Some((text(&name)?, tensor))).collect();
    }
    let config = case.model.config.as_object_mut()?;
    let head_dim = config.get("head_dim").cloned();
    if let Some(scalar) = config.get_mut("query_pre_attn_scalar") {
        *scalar = head_dim?;
    }
    match name {
        // The rule would change with the length of the text.
        "llama-dynamic" => return None,
        // Of Llama 3's context, and with a base of which some frequencies are divided by the whole factor.
        "llama" => {
            config["rope_scaling"]["original_max_position_embeddings"] = json!(8192);
            config["rope_theta"] = json!(500_000.0);
        }
        // A window that begins in the middle.
        "qwen2" => {
            config["use_sliding_window"] = json!(false);
            config.remove("sliding_window");
        }
        "smollm3" => {
            config["no_rope_layer_interval"] = json!(4);
            config.remove("no_rope_layers");
        }
        _ => (),
    }
    Some(case)
}

//! What is read of `config.json`, and what is refused.

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
    let llama3 = r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192"#;
    let old = parse(&format!(r#","rope_theta":500000.0,"rope_scaling":{{"rope_type":"llama3",{llama3}}}"#)).unwrap();
    let new = parse(&format!(r#","rope_parameters":{{"rope_theta":500000.0,"rope_type":"llama3",{llama3}}}"#)).unwrap();
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
        let config = Config::parse(Path::new("c"), &text).unwrap();
        assert_eq!(config.max_positions, 5120);
        config.attends.iter().map(|a| a.window.unwrap_or(0)).collect::<Vec<_>>()
    };
    assert_eq!(of("Llama", r#","sliding_window":100"#), [0, 0]);
    assert_eq!(of("Mistral", r#","num_key_value_heads":4,"sliding_window":100"#), [100, 100]);
    assert_eq!(of("Mistral", r#","num_key_value_heads":4,"sliding_window":null"#), [0, 0]);
    assert_eq!(of("Mistral", r#","num_key_value_heads":4"#), [4096, 4096]);
    let qwen = |rest: &str| of("Qwen2", &format!(r#","num_key_value_heads":4,"sliding_window":100{rest}"#));
    assert_eq!(qwen(""), [0, 0]);
    assert_eq!(qwen(r#","use_sliding_window":true"#), [100, 100]);
    assert_eq!(qwen(r#","use_sliding_window":true,"max_window_layers":1"#), [0, 100]);
    let kinds = r#","use_sliding_window":true,"layer_types":["sliding_attention","full_attention"]"#;
    assert_eq!(qwen(kinds), [100, 0]);
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
fn what_kinds_of_layers_turn_by() {
    let of = |name: &str, rest: &str| {
        let text = format!("{BASE}{rest}}}").replace("LlamaForCausalLM", name);
        Config::parse(Path::new("c"), &text).map_err(|e| e.to_string())
    };
    let gemma = of("Gemma3ForCausalLM", r#","sliding_window":64,"sliding_window_pattern":2,"head_dim":16"#).unwrap();
    let turns: Vec<_> = gemma.attends.iter().map(|a| (a.window, a.turn)).collect();
    assert_eq!(turns, [(Some(64), Turn::Local), (None, Turn::Main)]);
    assert_eq!((gemma.rope_theta, gemma.local_theta, gemma.tied), (1e6, Some(1e4), true));
    let both = r#","sliding_window":64,"layer_types":["full_attention","sliding_attention"],"rope_parameters":{
        "full_attention":{"rope_type":"linear","factor":8,"rope_theta":5e5},
        "sliding_attention":{"rope_type":"default","rope_theta":7e3}}"#;
    let new = of("Gemma3ForCausalLM", both).unwrap();
    assert_eq!((new.rope_theta, new.local_theta), (5e5, Some(7e3)));
    assert_eq!(new.rope_scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(new.attends[1].turn, Turn::Local);
    let wrong = of("Gemma3ForCausalLM", &both.replace("\"default\"", "\"linear\"")).unwrap_err();
    assert!(wrong.contains("rope scaling 'linear' of layers with windows"), "{wrong}");
    let short = of("Gemma2ForCausalLM", r#","layer_types":["full_attention"]"#).unwrap_err();
    assert!(short.contains("layer_types has 1 entries, but num_hidden_layers is 2"), "{short}");
    let command = of("Cohere2ForCausalLM", r#","sliding_window_pattern":2"#).unwrap();
    assert_eq!([Turn::Main, Turn::Never], [0, 1].map(|i| command.attends[i].turn));
}

#[test]
fn the_context_ends_where_a_rule_would_change() {
    let dynamic = parse(r#","rope_scaling":{"type":"dynamic","factor":2}"#).unwrap();
    assert_eq!((dynamic.max_positions, dynamic.rope_scaling, dynamic.notes.len()), (512, RopeScaling::None, 1));
    let yarn = r#""rope_type":"yarn","factor":4,"original_max_position_embeddings":128"#;
    let text = format!(r#"{BASE},"num_key_value_heads":4,"rope_parameters":{{{yarn},"llama_4_scaling_beta":0.1}}}}"#)
        .replace("LlamaForCausalLM", "Ministral3ForCausalLM");
    let ministral = Config::parse(Path::new("c"), &text).unwrap();
    assert_eq!((ministral.max_positions, ministral.notes.len()), (128, 1));
    let RopeScaling::Yarn { attention, .. } = ministral.rope_scaling else { panic!("yarn") };
    assert!((attention - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn the_text_of_a_model_of_several_parts() {
    let text = BASE.replace(r#""architectures":["LlamaForCausalLM"]"#, r#""model_type":"mistral""#);
    let whole = format!(
        r#"{{"architectures":["Mistral3ForConditionalGeneration"],"model_type":"mistral3","eos_token_id":9,
        "vision_config":{{}},"text_config":{text},"num_key_value_heads":2}}}}"#
    );
    let c = Config::parse(Path::new("c"), &whole).unwrap();
    assert_eq!((c.architecture.as_str(), c.kv_heads, c.of_parts), ("MistralForCausalLM", 2, true));
    assert_eq!(c.eos, [9]);
    let other = whole.replace("\"model_type\":\"mistral\"", "\"model_type\":\"mamba\"");
    let message = Config::parse(Path::new("c"), &other).unwrap_err().to_string();
    assert!(message.contains("model_type 'mamba'"), "{message}");
}

#[test]
fn experts_and_how_they_are_stored() {
    let of = |name: &str, rest: &str| {
        let text = format!("{BASE},\"num_key_value_heads\":4{rest}}}").replace("LlamaForCausalLM", name);
        Config::parse(Path::new("c"), &text).map_err(|e| e.to_string())
    };
    let experts = |name: &str, rest: &str| of(name, rest).map(|c| c.experts.expect("experts"));
    let mixtral = experts("MixtralForCausalLM", r#","num_local_experts":8,"num_experts_per_tok":2"#).unwrap();
    assert_eq!((mixtral.count, mixtral.chosen, mixtral.inner, mixtral.dense), (8, 2, 128, vec![false; 2]));
    for count in ["num_experts", "num_local_experts"] {
        let rest = format!(r#","{count}":8,"num_experts_per_tok":2,"moe_intermediate_size":16"#);
        assert_eq!(experts("Qwen3MoeForCausalLM", &rest).unwrap().count, 8);
    }
    let missing = of("MixtralForCausalLM", "").unwrap_err();
    assert!(missing.contains("num_local_experts is missing"), "{missing}");
    let few = of("MixtralForCausalLM", r#","num_local_experts":2,"num_experts_per_tok":3"#).unwrap_err();
    assert!(few.contains("3 of 2 experts"), "{few}");
    let stored = |name, rest: &str| of(name, rest).unwrap().stored.is_some();
    for block in ["", r#","weight_block_size":[128,64]"#] {
        assert!(stored("MistralForCausalLM", &format!(r#","quantization_config":{{"quant_method":"fp8"{block}}}"#)));
    }
    let none = of("MistralForCausalLM", r#","quantization_config":{"quant_method":"fp8","weight_block_size":[0,1]}"#);
    assert!(none.unwrap_err().contains("already quantized (fp8)"));
    let mxfp4 = r#","quantization_config":{"quant_method":"mxfp4"}"#;
    assert!(of("MistralForCausalLM", mxfp4).is_err());
    let oss = format!(r#","num_local_experts":4,"num_experts_per_tok":2{mxfp4}"#);
    assert!(!stored("GptOssForCausalLM", &oss));
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
    let expected = "m/config.json: architecture GPT2LMHeadModel, which needs learned positions, is not supported \
                    (supported: LlamaForCausalLM, MistralForCausalLM, ";
    assert!(message.starts_with(expected), "{message}");
    for (rest, part) in [
        (r#","rope_scaling":{"type":"spiral","factor":2}"#, "rope scaling 'spiral' is not supported"),
        (r#","rope_scaling":{"type":"yarn"}"#, "rope scaling 'yarn' needs factor"),
        (
            r#","rope_scaling":{"type":"longrope","short_factor":[1]}"#,
            "short_factor of rope scaling 'longrope': expected 8",
        ),
        (r#","partial_rotary_factor":0.5"#, "partial_rotary_factor 0.5 is not supported"),
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

//! Model directories as they are found: every tensor, key, file and token is used, refused or named.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qp_runtime::checkpoint::Checkpoint;
use qp_runtime::engine::{self, Logits};
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::models::{RandomModel, write_spec};
use serde_json::{Value, json};

fn llama() -> RandomModel {
    RandomModel::new("LlamaForCausalLM")
}

fn open_in(dir: &Path) -> Result<Model, String> {
    Model::open(dir).map_err(|e| e.to_string().replace(&dir.display().to_string(), "DIR"))
}

fn open(model: &RandomModel) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    open_in(dir.path())
}

/// What is said of the model, changed by `change`.
fn notes(change: impl Fn(&mut RandomModel)) -> Vec<String> {
    let mut model = llama();
    change(&mut model);
    open(&model).unwrap().notes
}

/// Why the model, changed by `change`, is refused.
fn refusal(change: impl Fn(&mut RandomModel)) -> String {
    let mut model = llama();
    change(&mut model);
    open(&model).unwrap_err()
}

fn logits(model: Model) -> Vec<f32> {
    let mut engine = engine::open(None, &Arc::new(model.weights), 16).unwrap();
    let mut out = Vec::new();
    engine.forward(&[3, 200, 77, 5, 5, 130, 9], Logits::All, &mut out).unwrap();
    out
}

fn insert(m: &mut RandomModel, name: &str, shape: &[usize], value: f32) {
    m.tensors.insert(name.to_owned(), (shape.to_vec(), vec![value; shape.iter().product()]));
}

#[test]
fn tensors_that_nothing_uses() {
    let bias = "model.layers.0.self_attn.q_proj.bias";
    assert_eq!(
        refusal(|m| m.bias("self_attn.q_proj")),
        "DIR: tensor 'model.layers.0.self_attn.q_proj.bias' and 1 more would not be used: by config.json \
         (attention_bias, mlp_bias) LlamaForCausalLM adds no such biases; correct it, or remove the tensors"
    );
    // Zeros change nothing.
    assert!(notes(|m| insert(m, bias, &[32], 0.0))[0].ends_with("change nothing and are not used"));
    let old = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert!(notes(|m| insert(m, old, &[4], 1.0))[0].contains("inv_freq' change nothing"));
    assert_eq!(
        refusal(|m| m.config["num_hidden_layers"] = json!(1)),
        "DIR: tensor 'model.layers.1.input_layernorm.weight' and 8 more would not be used: \
         config.json has num_hidden_layers 1; correct it, or remove the tensors"
    );
    let other = refusal(|m| insert(m, "model.layers.0.self_attn.q_norm.weight", &[8], 1.0));
    assert!(other.contains("q_norm.weight' would not be used: LlamaForCausalLM has no such tensors"), "{other}");
}

#[test]
fn an_output_layer_beside_a_tied_embedding() {
    let untied = logits(open(&llama()).unwrap());
    let mut model = llama();
    model.config["tie_word_embeddings"] = json!(true);
    let read = open(&model).unwrap();
    assert!(!read.config.tied && read.notes[0].contains("'lm_head.weight' differs"), "{:?}", read.notes);
    assert_eq!(logits(read), untied);
    // A checkpoint of it is untied too, whether its embedding is quantized or not.
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let spec = write_spec(dir.path(), "small", 4).display().to_string();
    for embedding in [false, true] {
        let mut plan = Plan::uniform(&spec);
        if embedding {
            plan.set("--embedding", "model.embed_tokens", &spec);
        }
        let out = dir.path().join(format!("out-{embedding}"));
        Job::new(dir.path(), plan, &out).run(&Silent).unwrap();
        let read = Model::open(&out).unwrap();
        assert!(!read.config.tied, "embedding quantized: {embedding}");
    }
    let twin = model.tensors["model.embed_tokens.weight"].clone();
    model.tensors.insert("lm_head.weight".to_owned(), twin);
    let read = open(&model).unwrap();
    assert!(read.config.tied && read.notes.is_empty(), "{:?}", read.notes);
}

#[test]
fn what_is_not_used_is_not_copied() {
    let mut model = llama();
    insert(&mut model, "model.layers.0.self_attn.rotary_emb.inv_freq", &[4], 1.0);
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let spec = write_spec(dir.path(), "small", 3).display().to_string();
    let out = dir.path().join("out");
    Job::new(dir.path(), Plan::uniform(&spec), &out).run(&Silent).unwrap();
    assert!(!Checkpoint::open(&out).unwrap().contains("model.layers.0.self_attn.rotary_emb.inv_freq"));
    assert!(Model::open(&out).unwrap().notes.is_empty());
}

#[test]
fn every_tensor_is_looked_at() {
    let names: Vec<String> = RandomModel::new("Qwen2ForCausalLM").tensors.into_keys().collect();
    let dir = tempfile::tempdir().unwrap();
    for name in names.iter().filter(|n| !n.contains(".1.")) {
        let mut model = RandomModel::new("Qwen2ForCausalLM");
        model.tensors.get_mut(name).unwrap().1[7] = f32::NAN;
        let error = open(&model).unwrap_err();
        assert!(
            error.starts_with(&format!("tensor '{name}' has 1 values that are not finite, the first (NaN)")),
            "{error}"
        );
        // Before anything is written.
        model.write(dir.path());
        let out = dir.path().join("out");
        let job = Job::new(dir.path(), Plan::uniform("nuq_3"), &out);
        assert_eq!(job.run(&Silent).unwrap_err().to_string(), error);
        assert!(
            !fs::read_dir(dir.path()).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().starts_with("out"))
        );
    }
}

#[test]
fn weights_too_large_to_rotate_are_called_so() {
    let mut model = llama();
    model.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().1[64..128].fill(3e38);
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let error = Job::new(dir.path(), Plan::uniform("nuq_3"), dir.path().join("out")).run(&Silent).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("'model.layers.0.mlp.up_proj': its weights are too large") && error.contains("row 1"),
        "{error}"
    );
}

#[test]
fn what_the_model_is_comes_first() {
    let config = |value: Value| move |m: &mut RandomModel| m.config = value.clone();
    let several = json!({ "architectures": ["Qwen2_5_VLModel"], "text_config": {}, "vision_config": {} });
    assert!(refusal(config(several)).starts_with(
        "DIR/config.json: architecture Qwen2_5_VLModel, a model of several parts (text_config), is not supported \
         (supported: LlamaForCausalLM, MistralForCausalLM, "
    ));
    let latent = refusal(config(json!({ "architectures": ["DeepseekV3ForCausalLM"] })));
    assert!(latent.contains("DeepseekV3ForCausalLM, which needs latent attention"), "{latent}");
    assert!(refusal(config(json!({ "model_type": "mamba" }))).contains("model_type 'mamba' is not supported"));
    assert!(refusal(config(json!({}))).contains("a model without 'architectures' is not supported"));
    assert_eq!(
        refusal(config(json!({ "architectures": ["LlamaForCausalLM"] }))),
        "DIR/config.json: hidden_size is missing: get the model again"
    );
    assert!(refusal(|m| m.config["model_type"] = json!("qwen2")).contains("but model_type says 'qwen2'"));
    let by_type = |m: &mut RandomModel| {
        m.config.as_object_mut().unwrap().remove("architectures");
        m.config["model_type"] = json!("llama");
    };
    assert!(notes(by_type).is_empty());
}

#[test]
fn keys_that_nothing_uses() {
    assert!(refusal(|m| m.config["attn_logit_softcapping"] = json!(50.0)).contains("attn_logit_softcapping 50.0"));
    assert!(refusal(|m| m.config["num_local_experts"] = json!(8)).contains("num_local_experts 8 is not supported"));
    assert!(refusal(|m| m.config["partial_rotary_factor"] = json!(0.5)).contains("partial_rotary_factor 0.5"));
    assert!(refusal(|m| m.config["num_hidden_layers"] = json!(1u64 << 40)).contains("expected 1 to 4096"));
    assert!(
        refusal(|m| m.config["hidden_size"] = json!(64.5)).contains("hidden_size is 64.5: expected a whole number")
    );
    let notes = notes(|m| m.config["novelty"] = json!(1));
    assert!(
        notes.len() == 1 && notes[0].ends_with("config.json: LlamaForCausalLM has no use for novelty"),
        "{notes:?}"
    );
}

/// A model whose tokenizer is all of the bytes, in a directory with more files.
fn with_files(files: &[(&str, Value)]) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let mut model = llama();
    // Room for tokens that the files add.
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (shape, values) = model.tensors.get_mut(name).unwrap();
        shape[0] += 8;
        values.extend([0.0; 8 * 64]);
    }
    model.config["vocab_size"] = json!(264);
    model.write(dir.path());
    for (name, value) in files {
        fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    open_in(dir.path())
}

#[test]
fn tokens_that_other_files_know() {
    let start = json!({ "content": "<|im_start|>", "special": true });
    let listed =
        json!({ "added_tokens_decoder": { "257": { "content": "<|im_end|>", "special": true }, "256": start } });
    let model = with_files(&[("tokenizer_config.json", listed)]).unwrap();
    assert_eq!(model.tokenizer.encode("<|im_start|>a<|im_end|>").unwrap(), [256, 97, 257]);
    assert_eq!(model.config.eos, [257]);
    assert_eq!(model.tokenizer.decode(&[256, 97, 257]).unwrap(), "a");

    let model = with_files(&[
        ("added_tokens.json", json!({ "<two>": 257, "<one>": 256 })),
        (
            "special_tokens_map.json",
            json!({ "eos_token": { "content": "<stop>" }, "additional_special_tokens": ["<x>"] }),
        ),
    ]);
    let model = model.unwrap();
    assert_eq!(model.tokenizer.encode("<one><two><stop><x>").unwrap(), [256, 257, 258, 259]);
    assert_eq!(model.config.eos, [258]);

    // Names by configuration alone.
    let model = with_files(&[("tokenizer_config.json", json!({ "bos_token": "<b>", "eos_token": "a" }))]).unwrap();
    assert_eq!((model.tokenizer.encode("<b>").unwrap(), model.config.eos), (vec![256], vec![97]));

    let wrong = with_files(&[("added_tokens.json", json!({ "<one>": 300 }))]).unwrap_err();
    assert_eq!(wrong, "DIR/added_tokens.json: token '<one>' is number 300, but by tokenizer.json it is number 256");
    let wrong = with_files(&[("tokenizer_config.json", json!({ "added_tokens_decoder": { "256": 7 } }))]).unwrap_err();
    assert!(wrong.contains("added_tokens_decoder has the token 7: expected a text"), "{wrong}");
}

#[test]
fn first_and_last_tokens() {
    let generation = |value: Value| with_files(&[("generation_config.json", value)]).unwrap();
    let model = generation(json!({ "bos_token_id": [4, 5], "eos_token_id": [7, -1] }));
    assert_eq!((model.config.bos, model.config.eos.as_slice()), (Some(4), &[7][..]));
    assert!(model.notes[0].contains("bos_token_id has 2 ids"), "{:?}", model.notes);
    let model = generation(json!({ "bos_token_id": -1, "temperature": 0.6, "do_sample": true }));
    assert_eq!((model.config.bos, model.config.suggested), (None, vec!["temperature 0.6".to_owned()]));
    let model = generation(json!({ "bos_token_id": 5000, "eos_token_id": 6000 }));
    assert_eq!((model.config.bos, model.config.eos.len()), (None, 0));
    assert!(model.notes[0].contains("2 tokens are beyond the model's vocab_size 264"), "{:?}", model.notes);

    let follows = json!({ "bos_token": "a", "add_bos_token": true });
    let notes = with_files(&[("tokenizer_config.json", follows)]).unwrap().notes;
    assert!(notes[0].contains("says add_bos_token true, but tokenizer.json puts none before a text"), "{notes:?}");
    // Where other tokens end a message, <|end|> parts its pieces.
    let tokens = |names: &[&str]| json!({ "additional_special_tokens": names });
    let ends = |names: &[&str]| with_files(&[("tokenizer_config.json", tokens(names))]).unwrap().config.eos;
    assert_eq!(ends(&["<|end|>"]), [256]);
    assert_eq!(ends(&["<|end|>", "<|return|>", "<|call|>"]), [257, 258]);
}

#[test]
fn a_broken_tokenizer_is_found_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    llama().write(dir.path());
    let out = dir.path().join("out");
    for text in [
        r#"{"version":"1.0","model":{"type":"Novelty"}}"#,
        // Found by fuzzing: the end is missing, within the decoder.
        r#"{"version":"1.0","truncation":null,"padding":null,"decoder":{"type":"ByteLevel","#,
        r#"{"version":"1.0","decoder":{"type" 5}}"#,
        "",
    ] {
        fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let error = Job::new(dir.path(), Plan::uniform("nuq_3"), &out).run(&Silent).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: ") && error.contains("of a kind that is not read"), "{error}");
    }
    assert!(!fs::read_dir(dir.path()).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().starts_with("out")));
}

//! GGUF files: the same model as a directory of safetensors, and what is said of bad ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::checkpoint::Checkpoint;
use qp_runtime::engine::{self, Logits};
use qp_runtime::model::config::RopeScaling;
use qp_runtime::model::{Config, Model, TensorDir, Tokenizer};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::gguf::{Gguf, Value, snap};
use qp_tests::models::{RandomModel, write_spec};
use serde_json::json;

fn model(architecture: &str) -> RandomModel {
    let mut model = RandomModel::new(architecture);
    snap(&mut model.tensors.get_mut("model.embed_tokens.weight").unwrap().1);
    model
}

fn write(dir: &Path, file: &Gguf) -> PathBuf {
    let path = dir.join("m.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    path
}

fn logits(model: Model) -> Vec<f32> {
    let mut engine = engine::open(None, &Arc::new(model.weights), 16).unwrap();
    let mut out = Vec::new();
    engine.forward(&[3, 200, 77, 5, 5, 130, 9], Logits::All, &mut out).unwrap();
    out
}

#[test]
fn the_same_logits_as_a_directory() {
    for (architecture, prefix, interleave, tied) in [
        ("LlamaForCausalLM", "llama", true, false),
        ("LlamaForCausalLM", "llama", true, true),
        ("Qwen2ForCausalLM", "qwen2", false, false),
    ] {
        let mut model = model(architecture);
        model.config["tie_word_embeddings"] = json!(tied);
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        for version in [2, 3] {
            let file = write(dir.path(), &Gguf { version, ..Gguf::of(&model, prefix, interleave) });
            let (a, b) = (Model::open(dir.path()).unwrap(), Model::open(&file).unwrap());
            assert_eq!((b.config.bos, b.config.eos.as_slice(), b.config.tied), (Some(1), &[2][..], tied));
            assert_eq!(a.tokenizer.encode("In 1611, é\n").unwrap(), b.tokenizer.encode("In 1611, é\n").unwrap());
            assert_eq!(logits(a), logits(b), "{architecture}");
        }
    }
    // Rows of q and k in the wrong order are another model.
    let model = model("LlamaForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let file = write(dir.path(), &Gguf::of(&model, "llama", false));
    assert_ne!(logits(Model::open(dir.path()).unwrap()), logits(Model::open(&file).unwrap()));
}

#[test]
fn quantized_like_a_directory() {
    let model = model("LlamaForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let file = write(dir.path(), &Gguf::of(&model, "llama", true));
    let spec = write_spec(dir.path(), "small", 3).display().to_string();
    let quantize = |model: &Path, out: &str| {
        let out = dir.path().join(out);
        Job::new(model, Plan::uniform(&spec), &out).run(&Silent).unwrap();
        (Checkpoint::open(&out).unwrap(), Model::open(&out).unwrap())
    };
    let (a, from_dir) = quantize(dir.path(), "a");
    let (b, from_file) = quantize(&file, "b");
    for layer in &a.manifest().layers {
        let (x, y) = (a.linear(&layer.name).unwrap().1, b.linear(&layer.name).unwrap().1);
        assert_eq!((x.words, x.scales), (y.words, y.scales), "{}", layer.name);
    }
    // The embedding's blocks were copied as halves, which hold these values exactly.
    assert_eq!(logits(from_dir), logits(from_file));
}

/// A tokenizer with one merge, of '1' and '2'.
fn tokens(pre: &str, text: &str, change: impl Fn(&mut Gguf)) -> Result<Vec<u32>, String> {
    let mut file = Gguf::of(&RandomModel::new("LlamaForCausalLM"), "llama", true);
    let Some(Value::Texts(names)) = file.values.get_mut("tokenizer.ggml.tokens") else { panic!("tokens") };
    names.extend(["12".to_owned(), "<|x|>".to_owned()]);
    let mut types = vec![1; 256];
    types.extend([1, 3]);
    file.values.insert("tokenizer.ggml.token_type".to_owned(), Value::I32s(types));
    file.values.insert("tokenizer.ggml.merges".to_owned(), Value::Texts(vec!["1 2".to_owned()]));
    file.values.insert("tokenizer.ggml.pre".to_owned(), Value::Text(pre.to_owned()));
    change(&mut file);
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &file);
    let read = Tokenizer::read(&path).map_err(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR"))?;
    Ok(read.encode(text).unwrap())
}

#[test]
fn tokenizers() {
    let same = |_: &mut Gguf| ();
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    assert_eq!(tokens("gpt-2", "12", same).unwrap(), [256]);
    assert_eq!(tokens("smollm", "a 12", same).unwrap(), bytes("a 12"));
    assert_eq!(tokens("llama-bpe", "012", same).unwrap(), [1, 48, 256]);
    // Llama 3 takes three digits together: the pair within "0 012" stays, that across a group does not.
    assert_eq!(tokens("llama-bpe", "0012", same).unwrap(), [vec![1], bytes("0012")].concat());
    assert_eq!(tokens("qwen2", "12", same).unwrap(), bytes("12"));
    assert_eq!(tokens("gpt-2", "é<|x|>é", same).unwrap(), [0xC3, 0xA9, 257, 0xC3, 0xA9]);
    let bos = |file: &mut Gguf| {
        file.values.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true));
    };
    assert_eq!(tokens("smollm", "a", bos).unwrap(), [1, 97]);
    let spm = |file: &mut Gguf| {
        file.values.insert("tokenizer.ggml.model".to_owned(), Value::Text("llama".to_owned()));
    };
    assert_eq!(
        tokens("smollm", "", spm).unwrap_err(),
        "DIR/m.gguf: tokenizer 'llama' is not supported (supported: gpt2 (byte-level BPE))"
    );
    assert!(tokens("bert", "", same).unwrap_err().contains("tokenizer.ggml.pre 'bert' is not supported"));
}

#[test]
fn bad_files_are_refused_by_name() {
    let base = Gguf::of(&model("LlamaForCausalLM"), "llama", true);
    let dir = tempfile::tempdir().unwrap();
    let message = |change: &dyn Fn(&mut Gguf)| {
        let mut file = base.clone();
        change(&mut file);
        let path = write(dir.path(), &file);
        Model::open(&path).unwrap_err().to_string().replace(&dir.path().display().to_string(), "DIR")
    };
    let set =
        |key: &'static str, value: Value| move |f: &mut Gguf| drop(f.values.insert(key.to_owned(), value.clone()));
    assert_eq!(
        message(&|f| f.tensors.get_mut("blk.1.ffn_up.weight").unwrap().1 = 20),
        "DIR/m.gguf: tensor 'blk.1.ffn_up.weight' holds IQ4_NL, which is not supported \
         (supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K)"
    );
    assert_eq!(
        message(&set("general.architecture", Value::Text("mamba".to_owned()))),
        "DIR/m.gguf: architecture mamba is not supported (supported: llama, qwen2)"
    );
    assert_eq!(
        message(&|f| drop(f.values.remove("llama.block_count"))),
        "DIR/m.gguf: has no key 'llama.block_count': convert the model again"
    );
    assert_eq!(
        message(&set("llama.block_count", Value::Texts(Vec::new()))),
        "DIR/m.gguf: llama.block_count is a list of 0: expected a whole number"
    );
    assert_eq!(
        message(&|f| drop(f.tensors.remove("blk.0.attn_k.weight"))),
        "tensor 'model.layers.0.self_attn.k_proj.weight' is missing from DIR/m.gguf"
    );
    assert!(message(&|f| f.version = 1).contains("GGUF version 1 is not supported"));
    assert!(message(&|f| f.version = 3u32.swap_bytes()).contains("big-endian GGUF is not supported"));
    assert!(message(&set("llama.expert_count", Value::U32(8))).contains("a mixture of 8 experts is not supported"));
    assert!(
        message(&set("llama.rope.scaling.type", Value::Text("yarn".to_owned()))).contains("'yarn' is not supported")
    );
    assert!(
        message(&|f| f.tensors.get_mut("blk.0.ffn_up.weight").unwrap().1 = 12)
            .contains("rows that are not whole blocks")
    );
    let path = dir.path().join("other.gguf");
    std::fs::write(&path, "text that is long enough").unwrap();
    assert!(Model::open(&path).unwrap_err().to_string().contains("it does not begin with 'GGUF'"));
}

#[test]
fn llama_3_frequencies_are_recognised() {
    let mut file = Gguf::of(&model("LlamaForCausalLM"), "llama", true);
    file.values.insert("llama.rope.freq_base".to_owned(), Value::F32(1e6));
    let dir = tempfile::tempdir().unwrap();
    // Wavelengths τ · 10^(1.5 i): the third is between 8192 / 4 and 8192, the fourth beyond.
    let turns = 8192.0 / (std::f64::consts::TAU * 1000.0);
    let keep = (turns - 1.0) / 3.0;
    let third = 1.0 / (keep + (1.0 - keep) / 8.0);
    let mut config = |values: [f64; 4]| {
        let bytes = values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect();
        file.tensors.insert("rope_freqs.weight".to_owned(), (vec![4], 0, bytes));
        Config::read(&write(dir.path(), &file))
    };
    let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192.0 };
    assert_eq!(config([1.0, 1.0, third, 8.0]).unwrap().rope_scaling, expected);
    let error = config([1.0, 2.0, third, 8.0]).unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight' is not supported"), "{error}");
}

/// Whatever the damage, an error and no panic.
#[test]
fn damage() {
    let dir = tempfile::tempdir().unwrap();
    let file = Gguf::of(&model("LlamaForCausalLM"), "llama", true);
    let whole = file.bytes();
    let path = write(dir.path(), &file);
    let header = whole.len() - file.tensors.values().map(|(_, _, b)| b.len().next_multiple_of(32)).sum::<usize>();
    let cuts = (0..header).step_by(11).chain((header..whole.len()).step_by(whole.len() / 50)).chain([whole.len() - 1]);
    for keep in cuts {
        std::fs::write(&path, &whole[..keep]).unwrap();
        let error = TensorDir::open(&path).err().unwrap_or_else(|| panic!("{keep} bytes are a model")).to_string();
        assert!(error.contains("m.gguf: ") && error.contains("download it again"), "{keep} bytes: {error}");
    }
    for at in (0..header).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        std::fs::write(&path, &bytes).unwrap();
        let _ = (Config::read(&path), TensorDir::open(&path));
    }
}

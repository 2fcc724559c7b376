//! Files of models: safetensors, GGUF, configurations, tokenizers, checkpoints.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use qp_runtime::checkpoint::{self, Checkpoint, Manifest};
use qp_runtime::model::{Config, Model, TensorDir, Tokenizer, arch};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::gguf::{Gguf, Value};
use qp_tests::models::{RandomModel, write_spec};
use serde_json::json;

use super::Target;

pub fn targets() -> Vec<Target> {
    vec![
        Target { name: "safetensors", seeds: safetensors, words: TENSOR_WORDS, run: safetensor },
        Target { name: "indexes", seeds: indexes, words: TENSOR_WORDS, run: index },
        Target { name: "gguf", seeds: ggufs, words: GGUF_WORDS, run: gguf },
        Target { name: "configs", seeds: configs, words: CONFIG_WORDS, run: config },
        Target { name: "tokenizers", seeds: tokenizers, words: TOKENIZER_WORDS, run: tokenizer },
        Target { name: "tokens", seeds: tokens, words: TOKENIZER_WORDS, run: token },
        Target { name: "manifests", seeds: manifests, words: TENSOR_WORDS, run: manifest },
    ]
}

const TENSOR_WORDS: &[&str] = &[
    "\"dtype\":\"F32\"",
    "\"F16\"",
    "\"BF16\"",
    "\"I64\"",
    "\"F8_E4M3\"",
    "\"shape\":[2,2]",
    "\"shape\":[0]",
    "[]",
    "\"data_offsets\":[0,16]",
    "\"__metadata__\":{}",
    "{",
    "}",
    ",",
    "\"weight_map\":{",
    "../a",
    "sub/b.safetensors",
    "\"rows\": 64",
    "\"cols\": 64",
    "\"spec\": \"small\"",
    "\"files\": []",
    "\"format\": 1",
    "4294967295",
    "18446744073709551615",
];
const GGUF_WORDS: &[&str] = &[
    "GGUF",
    "general.architecture",
    "llama",
    "qwen2",
    "qwen3",
    "llama.block_count",
    "llama.attention.head_count",
    "general.alignment",
    "split.count",
    "split.no",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "blk.0.attn_q.bias",
    "output.weight",
    "rope_freqs.weight",
    "\u{2581}",
    "<0x0A>",
    "\0\0\0\0\0\0\0\0",
    "\x09\0\0\0",
    "\x08\0\0\0",
];
const CONFIG_WORDS: &[&str] = &[
    "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}",
    "\"rope_parameters\":{}",
    "\"sliding_window\":4",
    "\"use_sliding_window\":true",
    "\"layer_types\":[\"sliding_attention\"]",
    "\"architectures\":[\"Qwen3ForCausalLM\"]",
    "\"model_type\":\"qwen2\"",
    "\"head_dim\":",
    "\"num_hidden_layers\":",
    "\"eos_token_id\":[1,-1]",
    "null",
    "true",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "1e400",
];
const TOKENIZER_WORDS: &[&str] = &[
    "\"normalizer\":{\"type\":\"NFC\"}",
    "\"Replace\"",
    "\"Prepend\"",
    "\"Split\"",
    "\"Regex\":\"(a*)*b\"",
    "\"ByteLevel\"",
    "\"Metaspace\"",
    "\"Unigram\"",
    "\"WordPiece\"",
    "\"WordLevel\"",
    "\"BPE\"",
    "\"merges\":[\"a b\"]",
    "\"byte_fallback\":true",
    "\"unk_token\":\"a\"",
    "\"added_tokens_decoder\":{\"256\":{\"content\":\"<x>\"}}",
    "\"eos_token\":\"<x>\"",
    "\"add_bos_token\":true",
    "\"TemplateProcessing\"",
    "\"id\":4294967295",
    "null",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "\"precompiled_charsmap\":\"AAAA\"",
    "\"max_length\":0",
    "\"direction\":\"Left\"",
];

/// A folder of this thread, filled once with what `fill` writes.
fn folder(fill: fn(&Path)) -> PathBuf {
    thread_local! {
        static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
    }
    FOLDER.with(|cell| {
        let memory = Path::new("/dev/shm");
        let root = cell.get_or_init(|| {
            let new = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            new.expect("a folder can be made")
        });
        let place = root.path().join(format!("{:x}", fill as usize));
        if !place.is_dir() {
            fs::create_dir(&place).expect("it can be written");
            fill(&place);
        }
        place
    })
}

fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the folder can be written");
}

fn model() -> RandomModel {
    RandomModel::new("LlamaForCausalLM")
}

fn nothing(_: &Path) {}

fn safetensors() -> Vec<Vec<u8>> {
    let mut small = model();
    small.tensors.retain(|name, _| name.contains("norm"));
    let dir = tempfile::tempdir().expect("a folder");
    small.write(dir.path());
    vec![fs::read(dir.path().join("model.safetensors")).expect("just written")]
}

fn safetensor(input: &[u8]) -> bool {
    let dir = folder(nothing);
    let path = dir.join("model.safetensors");
    put(&path, input);
    let Ok(tensors) = TensorDir::from_files(&dir, &[path]) else { return false };
    tensors.names().for_each(|n| drop((tensors.tensor(n), tensors.raw(n).map(|r| r.2))));
    true
}

fn indexes() -> Vec<Vec<u8>> {
    vec![br#"{"metadata":{"total_size":64},"weight_map":{"x":"a.safetensors","y":"sub/b.safetensors"}}"#.to_vec()]
}

fn index(input: &[u8]) -> bool {
    let dir = folder(|dir| {
        let file = safetensors().remove(0);
        fs::create_dir(dir.join("sub")).expect("a folder");
        put(&dir.join("a.safetensors"), &file);
        put(&dir.join("sub/b.safetensors"), &safetensors().remove(0)[..0]);
    });
    put(&dir.join("model.safetensors.index.json"), input);
    TensorDir::open(&dir).is_ok()
}

fn ggufs() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (architecture, prefix, interleave) in [
        ("LlamaForCausalLM", "llama", true),
        ("Qwen2ForCausalLM", "qwen2", false),
        ("Qwen3ForCausalLM", "qwen3", false),
    ] {
        let mut file = Gguf::of(&RandomModel::new(architecture), prefix, interleave);
        // What is behind the header says little: the data are of a few tensors.
        file.tensors.retain(|name, _| name == "token_embd.weight" || name.contains("norm") || name.contains("attn_k"));
        file.tensors.values_mut().for_each(|(shape, kind, bytes)| {
            (*shape, *kind) = (vec![8], 0);
            bytes.truncate(32);
            bytes.resize(32, 0);
        });
        all.push(file.bytes());
        let set =
            |file: &mut Gguf, key: &str, value: Value| drop(file.values.insert(format!("tokenizer.ggml.{key}"), value));
        let pieces = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "ab", "\u{2581}ab"].map(str::to_owned).to_vec();
        set(&mut file, "model", Value::Text("llama".to_owned()));
        set(&mut file, "scores", Value::F32s(vec![0.0, 0.0, 0.0, -4.0, -3.0, -2.0, -1.0, -5.0]));
        set(&mut file, "token_type", Value::I32s(vec![2, 3, 3, 1, 1, 1, 1, 1]));
        set(&mut file, "tokens", Value::Texts(pieces));
        all.push(file.bytes());
    }
    all
}

fn gguf(input: &[u8]) -> bool {
    let path = folder(nothing).join("m.gguf");
    put(&path, input);
    let config = Config::read(&path).map(|c| drop(arch::program(&c)));
    let tensors = TensorDir::open(&path);
    if let Ok(tensors) = &tensors {
        tensors.names().for_each(|n| drop((tensors.tensor(n), tensors.raw(n).map(|r| r.2))));
    }
    let tokenizer = Tokenizer::read(&path);
    config.is_ok() && tensors.is_ok() && tokenizer.is_ok()
}

fn configs() -> Vec<Vec<u8>> {
    let mut full = model().config;
    full["rope_scaling"] =
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    full["generation"] = json!({ "eos_token_id": [1, 2], "bos_token_id": -1 });
    vec![full.to_string().into_bytes(), RandomModel::new("Qwen2ForCausalLM").config.to_string().into_bytes()]
}

fn config(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    Config::parse(Path::new("config.json"), &text).map(|c| drop(arch::program(&c))).is_ok()
}

fn tokenizers() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a folder");
    model().write(dir.path());
    let mut all = vec![fs::read(dir.path().join("tokenizer.json")).expect("just written")];
    let template = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } });
    let pieces = json!({ "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{ "id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false }],
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "_" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "_" }, { "type": "NFKC" }] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [{ "type": "Split", "pattern": { "Regex": "\\s+" },
            "behavior": "Isolated", "invert": false }, { "type": "Digits", "individual_digits": true }] },
        "post_processor": template,
        "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "unk_token": "u", "fuse_unk": true, "byte_fallback": true,
            "vocab": { "u": 0, "<s>": 1, "_": 2, "a": 3, "b": 4, "ab": 5 }, "merges": [["a", "b"]] } });
    let unigram = json!({ "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": { "type": "Metaspace",
        "replacement": "_", "prepend_scheme": "always", "split": true }, "post_processor": null,
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": { "type": "Unigram", "unk_id": 0, "vocab": [["u", 0.0], ["a", -1.5], ["_a", -2.0]] } });
    all.extend([pieces, unigram].map(|t| t.to_string().into_bytes()));
    all
}

const TEXT: &str = "In the beginning, 12 é\u{301} <s> \n\n\u{2581}a b\0c";

fn tokenizer(input: &[u8]) -> bool {
    let dir = folder(nothing);
    put(&dir.join("tokenizer.json"), input);
    read_tokens(&dir)
}

fn read_tokens(dir: &Path) -> bool {
    let Ok(tokenizer) = Tokenizer::read(dir) else { return false };
    if let Ok(tokens) = tokenizer.encode(TEXT) {
        let mut stream = tokenizer.stream(&tokens[..tokens.len().min(2)]);
        tokens.iter().take(30).for_each(|t| drop(stream.push(*t)));
        drop(stream.finish());
    }
    drop(tokenizer.decode(&[0, 1, u32::MAX]));
    true
}

fn tokens() -> Vec<Vec<u8>> {
    let listed = json!({ "added_tokens_decoder": { "256": { "content": "<a>", "special": true, "lstrip": true },
        "257": { "content": "<b>", "normalized": false } }, "bos_token": "<a>", "eos_token": { "content": "<b>" },
        "add_bos_token": true, "additional_special_tokens": ["<c>", { "content": "<d>" }], "model_max_length": 1e30 });
    vec![listed.to_string().into_bytes()]
}

fn token(input: &[u8]) -> bool {
    let dir = folder(|dir| model().write(dir));
    put(&dir.join("tokenizer_config.json"), input);
    read_tokens(&dir)
}

/// A checkpoint, as files.
fn whole() -> &'static [(String, Vec<u8>)] {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder");
        let out = dir.path().join("out");
        model().write(dir.path());
        let spec = write_spec(dir.path(), "small", 3).display().to_string();
        Job::new(dir.path(), Plan::uniform(&spec), &out).run(&Silent).expect("a checkpoint");
        let manifest = Checkpoint::open(&out).expect("a checkpoint").manifest().clone();
        let names = manifest.files.iter().map(|f| f.name.clone()).chain(["qp.json".to_owned()]);
        names.map(|n| (n.clone(), fs::read(out.join(&n)).expect("just written"))).collect()
    })
}

/// The manifest without its seal, which every input gets anew.
fn manifests() -> Vec<Vec<u8>> {
    let (_, text) = whole().last().expect("a manifest");
    let text = String::from_utf8_lossy(text);
    vec![text.rsplit_once(",\n  \"seal\"").expect("a seal").0.as_bytes().to_vec()]
}

fn manifest(input: &[u8]) -> bool {
    let dir = folder(|dir| {
        fs::create_dir(dir.join("specs")).expect("a folder");
        whole().iter().for_each(|(name, bytes)| put(&dir.join(name), bytes));
    });
    let body = String::from_utf8_lossy(input);
    let seal = checkpoint::sha256(body.as_bytes());
    let text = format!("{body},\n  \"seal\": \"{seal}\"\n}}\n");
    let path = dir.join("qp.json");
    put(&path, text.as_bytes());
    let Ok(read) = Manifest::from_text(&path, &text) else { return false };
    let Ok(checkpoint) = Checkpoint::open(&dir) else { return false };
    read.layers.iter().for_each(|l| drop(checkpoint.linear(&l.name)));
    drop(checkpoint.verify(&mut |_| ()));
    Model::open(&dir).is_ok()
}

//! GGUF files: the same model as a directory of safetensors, and what is said of bad ones.

use std::path::Path;

use qp_runtime::checkpoint::Checkpoint;
use qp_runtime::model::rope::RopeScaling;
use qp_runtime::model::{Config, Model, TensorDir, Tokenizer};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::gguf::{Gguf, Value, snap, write};
use qp_tests::models::{RandomModel, logits, write_spec};
use serde_json::json;

fn model(architecture: &str) -> RandomModel {
    let mut model = RandomModel::new(architecture);
    snap(&mut model.tensors.get_mut("model.embed_tokens.weight").unwrap().1);
    model
}

#[test]
fn the_same_logits_as_a_directory() {
    for (architecture, prefix, interleave, tied) in [
        ("LlamaForCausalLM", "llama", true, false),
        ("LlamaForCausalLM", "llama", true, true),
        ("Qwen2ForCausalLM", "qwen2", false, false),
        ("Qwen3ForCausalLM", "qwen3", false, false),
    ] {
        let mut model = model(architecture);
        model.config["tie_word_embeddings"] = json!(tied);
        if tied {
            model.tensors.remove("lm_head.weight");
        }
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        for version in [2, 3] {
            let file = write(dir.path(), &Gguf { version, ..Gguf::of(&model, prefix, interleave) });
            let (a, b) = (Model::open(dir.path()).unwrap(), Model::open(&file).unwrap());
            assert_eq!((b.config.bos, b.config.eos.as_slice(), b.config.tied), (Some(1), &[2][..], tied));
            assert_eq!(a.tokenizer.encode("In 1611, é\n").unwrap(), b.tokenizer.encode("In 1611, é\n").unwrap());
            let (a, b) = (logits(a), logits(b));
            if tied {
                // The output layer is the embedding's Q8_0 here, whose products take rounded activations.
                let size = a.iter().fold(0f32, |m, x| m.max(x.abs()));
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 2e-3 * size), "{architecture}: {a:?} {b:?}");
            } else {
                assert_eq!(a, b, "{architecture}");
            }
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
    assert_eq!(tokens("seed-coder", "12", same).unwrap(), bytes("12"));
    assert_eq!(tokens("gpt-2", "é<|x|>é", same).unwrap(), [0xC3, 0xA9, 257, 0xC3, 0xA9]);
    let bos = |file: &mut Gguf| {
        file.values.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true));
    };
    assert_eq!(tokens("smollm", "a", bos).unwrap(), [1, 97]);
    // The same pattern under another name.
    for (other, known) in [("deepseek-r1-qwen", "qwen2"), ("falcon3", "llama-bpe"), ("pixtral", "llama-bpe")] {
        let text = "It's 0012 or 12,\n\n  don't  you\tthink?";
        assert_eq!(tokens(other, text, same).unwrap(), tokens(known, text, same).unwrap(), "{other}");
    }
    // Single digits; a capital begins a word.
    assert_eq!(tokens("tekken", "12", same).unwrap(), [vec![1], bytes("12")].concat());
    assert_eq!(tokens("gpt-4o", "12", same).unwrap(), [256]);
    assert_eq!(tokens("deepseek-coder", "12", same).unwrap(), bytes("12"));
    assert_eq!(tokens("deepseek-v3", "12", same).unwrap(), [256]);
    let eos = |file: &mut Gguf| {
        file.values.insert("tokenizer.ggml.add_eos_token".to_owned(), Value::Bool(true));
    };
    assert_eq!(tokens("smollm", "a", eos).unwrap(), [97, 2]);
    let other = |file: &mut Gguf| {
        file.values.insert("tokenizer.ggml.model".to_owned(), Value::Text("bert".to_owned()));
    };
    assert_eq!(
        tokens("smollm", "", other).unwrap_err(),
        "DIR/m.gguf: tokenizer 'bert' is not supported (supported: gpt2 (byte-level BPE), llama (SentencePiece BPE))"
    );
    assert!(tokens("bert", "", same).unwrap_err().contains("tokenizer.ggml.pre 'bert' is not supported"));
}

#[test]
fn sentence_piece_merges_by_score() {
    let space = "\u{2581}";
    let mut names: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut kinds = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..256 {
        names.push(format!("<0x{byte:02X}>"));
        kinds.push(6);
        scores.push(0.0);
    }
    // Of "abc", "bc" is merged first; "ab" only where no "c" follows.
    let pieces = [(space, -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", -2.0), ("bc", -1.0), ("ca", -3.0)];
    let words = [(format!("{space}a"), -4.0), (format!("{space}ab"), -2.5)];
    for (name, score) in pieces.map(|(n, s)| (n.to_owned(), s)).into_iter().chain(words) {
        names.push(name);
        kinds.push(1);
        scores.push(score);
    }
    let id = |name: &str| names.iter().position(|n| n == name).unwrap() as u32;
    let set = |file: &mut Gguf, prefix: bool| {
        let values = &mut file.values;
        let mut set = |key: &str, value: Value| values.insert(format!("tokenizer.ggml.{key}"), value);
        set("model", Value::Text("llama".to_owned()));
        set("tokens", Value::Texts(names.clone()));
        set("token_type", Value::I32s(kinds.clone()));
        set("scores", Value::F32s(scores.clone()));
        set("add_space_prefix", Value::Bool(prefix));
    };
    let encode = |text: &str, prefix: bool| tokens("default", text, |file| set(file, prefix)).unwrap();
    let ids = |names: &[&str]| names.iter().map(|n| id(n)).collect::<Vec<_>>();
    assert_eq!(encode("abc", true), ids(&["<s>", &format!("{space}a"), "bc"]));
    assert_eq!(encode("ab", true), ids(&["<s>", &format!("{space}ab")]));
    assert_eq!(encode("ab", false), ids(&["<s>", "ab"]));
    // What no piece has is spelt in bytes; special tokens are found in a text.
    assert_eq!(encode("é", false), ids(&["<s>", "<0xC3>", "<0xA9>"]));
    assert_eq!(encode("a</s>", false), ids(&["<s>", "a", "</s>"]));
    let error = tokens("default", "", |file| {
        set(file, true);
        file.values.remove("tokenizer.ggml.scores");
    });
    assert_eq!(error.unwrap_err(), "DIR/m.gguf: has no key 'tokenizer.ggml.scores': convert the model again");
}

#[test]
fn biases_are_used_or_refused() {
    let with = |kinds: &[&str]| {
        let mut model = model("LlamaForCausalLM");
        kinds.iter().for_each(|kind| model.bias(kind));
        model
    };
    let from_file = |model: &RandomModel| {
        let dir = tempfile::tempdir().unwrap();
        Model::open(&write(dir.path(), &Gguf::of(model, "llama", true)))
    };
    let feed_forward = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
    let plain = logits(from_file(&with(&[])).unwrap());
    for kinds in [&feed_forward[..], &attention, &feed_forward[2..], &attention[3..], &attention[..3]] {
        let model = with(kinds);
        let mut whole = model.clone();
        let is_attention = attention.contains(&kinds[0]);
        let (all, key) =
            if is_attention { (&attention[..], "attention_bias") } else { (&feed_forward[..], "mlp_bias") };
        // A directory has all biases of a kind, or none.
        for kind in all.iter().filter(|kind| !kinds.contains(kind)) {
            whole.bias(kind);
            for i in 0..2 {
                whole.tensors.get_mut(&format!("model.layers.{i}.{kind}.bias")).unwrap().1.fill(0.0);
            }
        }
        whole.config[key] = json!(true);
        let dir = tempfile::tempdir().unwrap();
        whole.write(dir.path());
        let expected = logits(Model::open(dir.path()).unwrap());
        assert_eq!(logits(from_file(&model).unwrap()), expected, "{kinds:?}");
        assert_ne!(expected, plain);
    }
    for (name, values) in [("lm_head.bias", 256), ("model.norm.bias", 64), ("model.layers.1.input_layernorm.bias", 64)]
    {
        let mut model = with(&[]);
        model.tensors.insert(name.to_owned(), (vec![values], vec![0.5; values]));
        let error = from_file(&model).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor '{name}' would not be used")), "{error}");
    }
}

#[test]
fn parts_of_a_model_are_read_together() {
    let model = model("LlamaForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    let whole = Gguf::of(&model, "llama", true);
    let expected = logits(Model::open(&write(dir.path(), &whole)).unwrap());
    let names: Vec<String> = whole.tensors.keys().cloned().collect();
    let path = |part: usize| dir.path().join(format!("m-{part:05}-of-00003.gguf"));
    for (part, names) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let mut file = whole.clone();
        file.tensors.retain(|name, _| names.contains(name));
        if part > 0 {
            file.values.retain(|key, _| key == "general.architecture");
        }
        file.values.insert("split.no".to_owned(), Value::U32(part as u32));
        file.values.insert("split.count".to_owned(), Value::U32(3));
        std::fs::write(path(part + 1), file.bytes()).unwrap();
    }
    for part in 1..=3 {
        assert_eq!(logits(Model::open(&path(part)).unwrap()), expected, "by part {part}");
    }
    let message = |path: &Path| {
        let error = Model::open(path).unwrap_err().to_string();
        error.replace(&dir.path().display().to_string(), "DIR")
    };
    std::fs::copy(path(1), dir.path().join("first.gguf")).unwrap();
    assert_eq!(
        message(&dir.path().join("first.gguf")),
        "DIR/first.gguf: is part 1 of 3, but its name does not end in -00001-of-00003.gguf: give its name back"
    );
    std::fs::copy(path(2), path(3)).unwrap();
    assert!(message(&path(1)).contains("says that it is part 2, not 3"));
    std::fs::remove_file(path(2)).unwrap();
    assert_eq!(message(&path(1)), "DIR/m-00002-of-00003.gguf: part 2 of 3 is missing: get it again");
}

#[test]
fn keys_are_used_refused_or_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |values: &[(&str, Value)]| {
        let mut file = Gguf::of(&model("LlamaForCausalLM"), "llama", true);
        file.values.extend(values.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
        Model::open(&write(dir.path(), &file))
    };
    let text = |t: &str| Value::Text(t.to_owned());
    let scaling = |values: &[(&str, Value)]| open(values).unwrap().config.rope_scaling;
    let (kind, factor) = ("llama.rope.scaling.type", ("llama.rope.scaling.factor", Value::F32(4.0)));
    assert_eq!(scaling(&[(kind, text("none")), factor.clone()]), RopeScaling::None);
    assert_eq!(scaling(&[(kind, text("linear")), factor.clone()]), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(std::slice::from_ref(&factor)), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&[("llama.rope.scaling.factor", Value::F32(0.0))]), RopeScaling::None);

    let error = |key: &str, value: Value| open(&[(key, value)]).unwrap_err().to_string();
    assert!(error("llama.attn_logit_softcapping", Value::F32(50.0)).contains("key 'llama.attn_logit_softcapping'"));
    assert!(error("llama.logit_scale", Value::F32(0.5)).contains("LlamaForCausalLM without it"));
    assert!(error("llama.attention.causal", Value::Bool(false)).contains("not supported"));
    assert!(
        open(&[("llama.logit_scale", Value::F32(1.0)), ("llama.vocab_size", Value::U32(256))])
            .unwrap()
            .notes
            .is_empty()
    );
    let notes = open(&[("llama.novelty", Value::U32(3))]).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].ends_with("key 'llama.novelty' is not used"), "{notes:?}");

    let ends = open(&[("tokenizer.ggml.eot_token_id", Value::U32(5)), ("tokenizer.ggml.eom_token_id", Value::U32(6))]);
    assert_eq!(ends.unwrap().config.eos, [2, 5, 6]);
    let window = open(&[("llama.attention.sliding_window", Value::U32(32))]).unwrap().config;
    assert_eq!((window.architecture.as_str(), window.attends[0].window), ("MistralForCausalLM", Some(32)));
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
        message(&|f| f.tensors.get_mut("blk.1.ffn_up.weight").unwrap().1 = 9),
        "DIR/m.gguf: tensor 'blk.1.ffn_up.weight' holds Q8_1, which is not supported \
         (supported: F32, F16, BF16, IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, IQ4_XS, MXFP4, \
         NVFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TQ1_0, TQ2_0)"
    );
    assert_eq!(
        message(&set("general.architecture", Value::Text("mamba".to_owned()))),
        "DIR/m.gguf: architecture mamba is not supported (supported: llama, mistral3, qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, \
         phi3, olmo2, granite, command-r, cohere2, chatglm, glm4, glm4moe, smollm3, starcoder2, seed_oss, gpt-oss)"
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
    assert!(message(&set("llama.expert_count", Value::U32(8))).contains("has no key 'llama.expert_used_count'"));
    let scaling = |kind: &str| message(&set("llama.rope.scaling.type", Value::Text(kind.to_owned())));
    assert!(scaling("yarn").contains("has no key 'llama.rope.scaling.factor'"));
    assert!(scaling("spiral").contains("'spiral' is not supported (supported: none, linear, yarn)"));
    assert!(
        message(&|f| f.tensors.get_mut("blk.0.ffn_up.weight").unwrap().1 = 12)
            .contains("rows that are not whole blocks")
    );
    assert_eq!(
        message(&set("llama.block_count", Value::U32(1))),
        "DIR/m.gguf: tensor 'blk.1.attn_k.weight' is of block 1, but llama.block_count is 1: convert the model again"
    );
    assert!(message(&set("llama.block_count", Value::U32(u32::MAX))).contains("expected 1 to 4096"));
    assert_eq!(
        message(&|f| f.tensors.get_mut("blk.0.attn_q.weight").unwrap().0 = vec![0, 64]),
        "DIR/m.gguf: tensor 'blk.0.attn_q.weight' of shape [0, 64] has no elements: convert the model again"
    );
    let nan = |f: &mut Gguf| {
        let bytes = &mut f.tensors.get_mut("blk.1.attn_norm.weight").unwrap().2;
        bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    };
    assert_eq!(
        message(&nan),
        "tensor 'model.layers.1.input_layernorm.weight' has 1 values that are not finite, the first (NaN) at [3]: \
         the model is damaged, get it again"
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

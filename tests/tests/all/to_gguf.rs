//! Checkpoints written as GGUF files: what is read from them is the same model, to the bit.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::checkpoint::Begin;
use qp_runtime::engine::{self, Logits};
use qp_runtime::import::{export, import};
use qp_runtime::model::gguf::describe::{Target, differences};
use qp_runtime::model::gguf::write::{Planned, Put, header};
use qp_runtime::model::{Config, Files, Model};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::conformance::{Case, dirs};
use qp_tests::converted::{converted, sayable};
use qp_tests::gguf::{Gguf, Value, write};
use qp_tests::models::RandomModel;
use serde_json::json;

/// Logits of a whole prompt.
fn all_logits(path: &Path, prompt: &[u32]) -> Vec<f32> {
    let model = Model::open(path).unwrap_or_else(|e| panic!("{e}"));
    let mut session = engine::open(None, &Arc::new(model.weights), prompt.len()).unwrap();
    let mut out = Vec::new();
    session.forward(prompt, Logits::All, &mut out).unwrap();
    out
}

/// The checkpoint of `model` by a plan.
fn quantized(model: &Path, plan: &str) -> Result<PathBuf, String> {
    let out = model.with_extension("out");
    let plan = Plan::parse("plan", plan, PathBuf::new()).unwrap();
    let mut job = Job::new(model, plan, &out);
    job.begin = Begin { force: true, ..Begin::default() };
    job.run(&Silent).map_err(|e| e.to_string()).map(|_| out)
}

fn written(checkpoint: &Path) -> Result<PathBuf, String> {
    let paths = export(checkpoint, &checkpoint.with_extension("gguf"), true, &mut |_, _, _| ());
    paths.map(|mut p| p.remove(0)).map_err(|e| e.to_string())
}

/// The checkpoint of a case, by a plan or, where its matrices are too narrow for that, unquantized; and the file of it.
fn of_case(case: &Case, dir: &Path, plan: &str) -> (PathBuf, Result<PathBuf, String>) {
    let model = dir.join("model");
    std::fs::create_dir_all(&model).unwrap();
    case.model.write(&model);
    // Routers and norms stay floats.
    let made = quantized(&model, plan).or_else(|_| quantized(&model, "default = \"keep\""));
    let checkpoint = made.unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let file = written(&checkpoint);
    (checkpoint, file)
}

#[test]
fn every_architecture_computes_the_same_from_the_file_that_is_written() {
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for case in dirs().iter().map(|d| Case::read(d)) {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, file) = of_case(&case, dir.path(), "default = \"q8_0\"");
        match file {
            Ok(file) => {
                assert!(all_logits(&file, &case.prompt) == all_logits(&checkpoint, &case.prompt), "{}", case.name);
                same.push(case.name);
            }
            Err(why) => {
                let why = why.replace(&dir.path().display().to_string(), "DIR");
                let why = why.split_once(": ").unwrap().1;
                assert!(!checkpoint.with_extension("gguf").exists());
                refused.push(format!("{}: {}", case.name, why.split(';').next().unwrap()));
            }
        }
    }
    insta::assert_snapshot!(format!("{}\n\n{}", same.join(" "), refused.join("\n")));
}

#[test]
fn files_have_the_keys_names_and_numbers_of_llama_cpps_converter() {
    let mut architectures = BTreeSet::new();
    for case in dirs().iter().filter_map(|d| sayable(d.file_name().unwrap().to_str().unwrap())) {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, file) = of_case(&case, dir.path(), "default = \"keep\"");
        let file = file.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert!(all_logits(&file, &case.prompt) == all_logits(&checkpoint, &case.prompt), "{}", case.name);
        let found = Gguf::parse(&std::fs::read(&file).unwrap());
        let expected = converted(&case.model).unwrap();
        for (key, value) in &expected.values {
            // The vocabulary there has a first and a last token for all.
            let token = key.strip_prefix("tokenizer.ggml.").filter(|k| k.ends_with("_token_id"));
            if token.is_none_or(|token| case.model.config[token].is_number()) {
                assert_eq!(found.values.get(key), Some(value), "{}: {key}", case.name);
            }
        }
        let names = |file: &Gguf| file.tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "{}", case.name);
        for (name, (shape, _, _)) in &expected.tensors {
            let (of_found, kind, _) = &found.tensors[name];
            assert_eq!(of_found, shape, "{}: {name}", case.name);
            assert!(found.floats(name) == expected.floats(name), "{}: {name}", case.name);
            // llama.cpp adds and multiplies with these in single precision only.
            assert!(*kind == 0 || shape.len() > 1 && !name.contains("ffn_gate_inp"), "{}: {name}", case.name);
        }
        architectures.insert(format!("{:?}", found.values["general.architecture"]));
    }
    assert_eq!(architectures.len(), 19, "{architectures:?}");
}

/// Ministral 3, whose scores grow beyond the original context: the engine's context and the file's end there.
#[test]
fn a_context_ends_where_scores_would_grow() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir_all(&model).unwrap();
    RandomModel::ministral3().write(&model);
    let checkpoint = quantized(&model, "default = \"keep\"").unwrap();
    let file = written(&checkpoint).unwrap();
    let prompt: Vec<u32> = (40..70).collect();
    assert!(all_logits(&file, &prompt) == all_logits(&checkpoint, &prompt));
    let mut found = Gguf::parse(&std::fs::read(&file).unwrap());
    let key = |name: &str| format!("mistral3.{name}");
    assert_eq!(found.values["general.architecture"], Value::Text("mistral3".to_owned()));
    assert_eq!(found.values[&key("context_length")], Value::U32(64));
    assert_eq!(found.values[&key("rope.scaling.yarn_log_multiplier")], Value::F32(1.0));
    // llama.cpp's converter says how scores grow instead.
    found.values.insert(key("context_length"), Value::U32(128));
    found.values.insert(key("attention.temperature_scale"), Value::F32(0.1));
    let path = write(dir.path(), &found);
    assert_eq!(Model::open(&path).unwrap().config.max_positions, 64);
    assert!(all_logits(&path, &prompt) == all_logits(&checkpoint, &prompt));
}

/// Layers that guess further tokens are in no checkpoint, and so in no file of it.
#[test]
fn layers_that_guess_further_tokens_are_left_out() {
    let mut case = Case::named("glm4-moe");
    case.model.config["num_nextn_predict_layers"] = json!(1);
    let width = case.model.config["hidden_size"].as_u64().unwrap() as usize;
    case.model.tensors.insert("model.layers.3.enorm.weight".to_owned(), (vec![width], vec![1.0; width]));
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, file) = of_case(&case, dir.path(), "default = \"keep\"");
    let file = file.unwrap();
    assert!(all_logits(&file, &case.prompt) == all_logits(&checkpoint, &case.prompt));
    let found = Gguf::parse(&std::fs::read(&file).unwrap());
    assert_eq!(found.values["glm4moe.block_count"], Value::U32(3));
    assert!(found.tensors.keys().all(|name| !name.starts_with("blk.3.")));
}

/// The configurations of models that are used are said whole by the headers of their files.
#[test]
fn released_models_are_said_by_their_files() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/released.json");
    let all: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (name, json) in &all {
        let config = Config::parse(&path, &json.to_string()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let target = Target::new(&config).unwrap();
        // Of the tensors those that say something of the configuration.
        let mut tensors = vec![planned("token_embd.weight", &[config.vocab, config.hidden])];
        let biases = [
            ("self_attn.q_proj.bias", config.qkv_bias, config.heads * config.head_dim),
            ("self_attn.o_proj.bias", config.o_bias, config.hidden),
            ("self_attn.q_norm.weight", config.head_norms, config.head_dim),
        ];
        for (tensor, _, rows) in biases.iter().filter(|b| b.1) {
            let called = target.called(&format!("model.layers.0.{tensor}"), 1).unwrap();
            tensors.push(planned(&called.name, &[*rows]));
        }
        if let Some(experts) = &config.experts {
            for i in (0..config.layers).filter(|i| !experts.dense[*i]) {
                tensors.push(planned(&format!("blk.{i}.ffn_gate_inp.weight"), &[experts.count, config.hidden]));
            }
        }
        if !config.tied {
            tensors.push(planned("output.weight", &[config.vocab, config.hidden]));
        }
        let factors = target.frequency_factors();
        tensors.extend(factors.iter().map(|(name, factors)| planned(name, &[factors.len()])));
        let mut values = target.values(json);
        let first = config.bos.map(|id| ("tokenizer.ggml.bos_token_id".to_owned(), Put::U32(id)));
        let kinds = ["eos", "eot", "eom"].iter().zip(&config.eos);
        values.extend(
            first.into_iter().chain(kinds.map(|(k, id)| (format!("tokenizer.ggml.{k}_token_id"), Put::U32(*id)))),
        );
        let (bytes, offsets) = header(&values, &tensors);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        let mut to = std::fs::File::create(&file).unwrap();
        to.write_all(&bytes).unwrap();
        let end = offsets.iter().zip(&tensors).map(|(offset, t)| offset + t.bytes).max().unwrap();
        to.set_len(end).unwrap();
        for (name, factors) in &factors {
            let at = tensors.iter().position(|t| t.name == *name).unwrap();
            to.seek(SeekFrom::Start(offsets[at])).unwrap();
            to.write_all(&factors.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        }
        let read = Files::open(&file).and_then(|files| Config::of(&files));
        match read {
            Ok(read) => {
                let others = differences(&config, &read);
                if !others.is_empty() {
                    wrong.push(format!("{name}: {}", others.join(", ")));
                }
            }
            Err(e) => wrong.push(format!("{name}: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(all.len() >= 20);
}

/// A tensor of single precision.
fn planned(name: &str, shape: &[usize]) -> Planned {
    let bytes = shape.iter().product::<usize>() as u64 * 4;
    Planned { name: name.to_owned(), shape: shape.to_vec(), code: 0, bytes }
}

/// The bundled model, with a tokenizer of bytes.
fn bundled(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir_all(&model).unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama");
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    {
        std::fs::copy(from.join(name), model.join(name)).unwrap();
    }
    std::fs::copy(from.join("model.safetensors"), model.join("model.safetensors")).unwrap();
    model
}

/// Blocks of several types, and the embedding as the output layer.
const MIXED: &str = r#"
default = "q4_k"
[layers]
"model.layers.*.self_attn.v_proj" = "q6_k"
"model.layers.*.mlp.down_proj" = "q5_0"
"model.layers.0.self_attn.{q,k}_proj" = "iq4_nl"
"model.layers.1.mlp.gate_proj" = "keep"
"model.embed_tokens" = "q8_0"
"#;

#[test]
fn the_bundled_model_is_the_same_and_so_are_its_texts() {
    let dir = tempfile::tempdir().unwrap();
    let model = bundled(dir.path());
    let checkpoint = quantized(&model, MIXED).unwrap();
    let file = written(&checkpoint).unwrap();
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama/valid.txt")).unwrap();
    let beginning: String = text.chars().take(2000).collect();
    let (a, b) = (Model::open(&checkpoint).unwrap(), Model::open(&file).unwrap());
    assert!(b.notes.is_empty(), "{:?}", b.notes);
    for text in [beginning.as_str(), "And it came to pass, that 40 days <|end|> later…"] {
        assert_eq!(a.tokenizer.encode(text).unwrap(), b.tokenizer.encode(text).unwrap());
    }
    assert_eq!((a.config.bos, &a.config.eos), (b.config.bos, &b.config.eos));
    let prompt = a.tokenizer.encode("And God said, Let there be light").unwrap();
    assert!(all_logits(&file, &prompt) == all_logits(&checkpoint, &prompt));
    // It is imported, and given back, as any other; under its own name, too.
    let again = dir.path().join("again");
    import(&file, &again, Begin::default(), &mut |_, _, _| ()).unwrap();
    let back = dir.path().join("back.gguf");
    assert_eq!(export(&again, &back, false, &mut |_, _, _| ()).unwrap(), std::slice::from_ref(&back));
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&file).unwrap());
    // Nothing is left beside it.
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|n| !n.to_string_lossy().contains("partial")), "{names:?}");
}

#[test]
fn what_a_file_cannot_say_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = bundled(dir.path());
    let refused = |plan: &str| {
        let checkpoint = quantized(&model, plan).unwrap();
        let error = written(&checkpoint).unwrap_err();
        assert!(!checkpoint.with_extension("gguf").exists());
        error.split_once(": ").unwrap().1.to_owned()
    };
    let change = |file: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = model.join(file);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
    };
    let mut said = vec![
        refused("default = \"keep\"\n[layers]\n\"model.layers.2.mlp.up_proj\" = \"nuq_4\""),
        refused("default = \"gptq_int4_g128\""),
        refused("default = \"q8_0\"\n[layers]\n\"model.layers.0.mlp.up_proj\" = \"tq1_0\""),
    ];
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let theta = |theta: f64| move |c: &mut serde_json::Value| c["rope_parameters"]["rope_theta"] = json!(theta);
    let prefix = |is: bool| move |t: &mut serde_json::Value| t["pre_tokenizer"]["add_prefix_space"] = json!(is);
    let normalizer = |to: serde_json::Value| move |t: &mut serde_json::Value| t["normalizer"] = to.clone();
    let (other, same) = (theta(10000.3), theta(10000.0));
    let (with, without) = (prefix(true), prefix(false));
    let lower = normalizer(json!({"type": "Lowercase"}));
    let changes: [&[(&str, Change)]; 3] = [
        &[("config.json", &other)],
        &[("config.json", &same), ("tokenizer.json", &with)],
        &[("tokenizer.json", &without), ("tokenizer.json", &lower)],
    ];
    for changes in changes {
        changes.iter().for_each(|(file, to)| change(file, to));
        match quantized(&model, "default = \"q8_0\"").map(|c| written(&c)) {
            Ok(Err(error)) => said.push(error.split_once(": ").unwrap().1.to_owned()),
            Ok(Ok(_)) => panic!("it was written"),
            Err(e) => panic!("{e}"),
        }
        let _ = std::fs::remove_file(dir.path().join("model.gguf"));
    }
    insta::assert_snapshot!(said.join("\n"));
    // A folder and a file.
    let checkpoint = dir.path().join("model.out");
    let of = |out: &str| {
        let error = export(&checkpoint, &dir.path().join(out), false, &mut |_, _, _| ()).unwrap_err();
        error.to_string().replace(&dir.path().display().to_string(), "DIR")
    };
    std::fs::create_dir(dir.path().join("folder.gguf")).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(of("folder.gguf"), "DIR/folder.gguf: is a folder: name the file in it, as in FOLDER/model.gguf");
    assert_eq!(of("file"), "DIR/file: is a file: give the folder to write to");
    assert!(of("back").starts_with("DIR/model.out: was not imported"));
}

/// A `tokenizer.json` of pieces, as Llama 2 has it, whose tokens are `<unk>`, `<s>`, `</s>`, 256 bytes and some pieces.
fn pieces() -> serde_json::Value {
    let mut names: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    names.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let letters = ["\u{2581}", "t", "h", "e", "a", "n", "d"].map(str::to_owned);
    let whole = ["he", "the", "\u{2581}the", "an", "and", "\u{2581}a", "\u{2581}and", "nd"].map(str::to_owned);
    names.extend(letters);
    names.extend(whole);
    let merges = [
        ["h", "e"],
        ["t", "he"],
        ["\u{2581}", "the"],
        ["a", "n"],
        ["an", "d"],
        ["a", "nd"],
        ["\u{2581}", "a"],
        ["\u{2581}", "and"],
        ["\u{2581}a", "nd"],
        ["n", "d"],
    ];
    let vocab: serde_json::Map<_, _> = names.iter().enumerate().map(|(i, n)| (n.clone(), json!(i))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": merges},
    })
}

#[test]
fn pieces_have_scores_in_place_of_merges() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, tokenizer: &serde_json::Value| {
        let model = dir.path().join(name);
        std::fs::create_dir_all(&model).unwrap();
        let mut random = RandomModel::new("LlamaForCausalLM");
        let vocab = 280;
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let (shape, values) = random.tensors.get_mut(name).unwrap();
            shape[0] = vocab;
            values.resize(vocab * shape[1], 0.25);
        }
        random.config["vocab_size"] = json!(vocab);
        (random.config["bos_token_id"], random.config["eos_token_id"]) = (json!(1), json!(2));
        random.write(&model);
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let checkpoint = quantized(&model, "default = \"q8_0\"").unwrap();
        (checkpoint.clone(), written(&checkpoint))
    };
    let mut tokenizer = pieces();
    let same = |checkpoint: &Path, file: &Path| {
        let (a, b) = (Model::open(checkpoint).unwrap(), Model::open(file).unwrap());
        for text in ["the hand and then", "  an\nand </s> the", "né the 中"] {
            let tokens = a.tokenizer.encode(text).unwrap();
            assert_eq!(tokens, b.tokenizer.encode(text).unwrap(), "{text}");
            assert_eq!(a.tokenizer.decode(&tokens).unwrap(), b.tokenizer.decode(&tokens).unwrap());
        }
        assert_eq!(a.tokenizer.encode("and").unwrap()[0], 1);
    };
    let (checkpoint, file) = of("prepended", &tokenizer);
    same(&checkpoint, &file.unwrap());
    // Without a space before a text, as Gemma.
    tokenizer["normalizer"] = tokenizer["normalizer"]["normalizers"][1].clone();
    tokenizer["decoder"]["decoders"].as_array_mut().unwrap().pop();
    let (checkpoint, file) = of("bare", &tokenizer);
    same(&checkpoint, &file.unwrap());
    // A piece that is made in some ways only: a score is for all.
    tokenizer["model"]["merges"].as_array_mut().unwrap().retain(|m| *m != json!(["a", "nd"]));
    let (_, refused) = of("other", &tokenizer);
    let why = refused.unwrap_err();
    assert!(
        why.contains("has a tokenizer that does not merge \"a\" and \"nd\" to \"and\", as a GGUF file would"),
        "{why}"
    );
}

//! Checkpoints written as GGUF files: what is read from them is the same model, to the bit.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::checkpoint::Begin;
use qp_runtime::engine::{self, Logits};
use qp_runtime::import::{export, import};
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::conformance::{Case, dirs};
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

#[test]
fn every_architecture_computes_the_same_from_the_file_that_is_written() {
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for case in dirs().iter().map(|d| Case::read(d)) {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir_all(&model).unwrap();
        case.model.write(&model);
        // Few of them are wide enough for blocks throughout; routers and norms stay floats.
        let made = quantized(&model, "default = \"q8_0\"").or_else(|_| quantized(&model, "default = \"keep\""));
        let Ok(checkpoint) = made else { continue };
        match written(&checkpoint) {
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

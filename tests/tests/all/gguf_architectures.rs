//! GGUF files of every architecture: the same logits as of a directory.

use std::sync::Arc;

use qp_runtime::checkpoint::Begin;
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits};
use qp_runtime::import::{export, import};
use qp_runtime::model::{Linear, Model};
use qp_tests::conformance::{Case, dirs};
use qp_tests::converted::{converted, sayable};
use qp_tests::gguf::{Gguf, Value, q8, snap, write};
use qp_tests::models::RandomModel;

/// Logits of a whole prompt.
fn all_logits(model: &Model, prompt: &[u32]) -> Vec<f32> {
    logits_on(None, model, prompt)
}

/// The same on a device.
fn logits_on(device: Option<&Executor>, model: &Model, prompt: &[u32]) -> Vec<f32> {
    let mut session = engine::open(device, &Arc::new(model.weights.clone()), prompt.len()).unwrap();
    let mut out = Vec::new();
    session.forward(prompt, Logits::All, &mut out).unwrap();
    out
}

fn names() -> Vec<String> {
    dirs().iter().map(|d| d.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn every_architecture_computes_the_same_from_a_file() {
    let (mut read, mut wrong) = (Vec::new(), Vec::new());
    for name in names() {
        let Some(case) = sayable(&name) else { continue };
        let file = converted(&case.model).unwrap_or_else(|| panic!("{name} has no converter"));
        let dir = tempfile::tempdir().unwrap();
        let from_file = match Model::open(&write(dir.path(), &file)) {
            Ok(model) => model,
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let from_dir = case.open(&case.model.config).unwrap();
        let (a, b) = (all_logits(&from_dir, &case.prompt), all_logits(&from_file, &case.prompt));
        if a != b {
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            wrong.push(format!("{name}: logits differ by {worst}"));
        }
        if !from_file.notes.is_empty() {
            wrong.push(format!("{name}: {:?}", from_file.notes));
        }
        read.push(file.values["general.architecture"].clone());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut kinds: Vec<String> = read.iter().map(|v| format!("{v:?}")).collect();
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds.len(), 19, "{kinds:?}");
}

/// The file of a case, changed.
fn with(name: &str, change: impl Fn(&mut Gguf)) -> Result<Model, String> {
    let mut file = converted(&sayable(name).unwrap().model).unwrap();
    change(&mut file);
    let dir = tempfile::tempdir().unwrap();
    Model::open(&write(dir.path(), &file)).map_err(|e| e.to_string())
}

#[test]
fn keys_of_architectures_count() {
    // Each of these keys changes what is computed.
    for (name, key, value) in [
        ("gemma2", "gemma2.attn_logit_softcapping", Value::F32(2.0)),
        ("gemma2", "gemma2.attention.scale", Value::F32(0.125)),
        ("gemma3", "gemma3.rope.freq_base_swa", Value::F32(50.0)),
        ("gemma3", "gemma3.attention.sliding_window_pattern", Value::U32(2)),
        ("gemma3", "gemma3.attention.sliding_window_pattern", Value::I32s(vec![0, 1, 1, 0])),
        ("granite", "granite.residual_scale", Value::F32(0.8)),
        ("cohere", "command-r.logit_scale", Value::F32(0.8)),
        ("glm4", "glm4.rope.dimension_count", Value::U32(12)),
        ("glm4-moe", "glm4moe.expert_weights_scale", Value::F32(1.0)),
        ("gpt-oss", "gpt-oss.expert_used_count", Value::U32(3)),
        ("gpt-oss", "gpt-oss.rope.scaling.yarn_beta_fast", Value::F32(4.0)),
        ("mixtral", "llama.expert_used_count", Value::U32(1)),
        ("phi4-long", "phi3.rope.scaling.attn_factor", Value::F32(1.5)),
    ] {
        let prompt = Case::named(name).prompt;
        let plain = all_logits(&with(name, |_| ()).unwrap(), &prompt);
        let changed = with(name, |f| drop(f.values.insert(key.to_owned(), value.clone())));
        assert_ne!(all_logits(&changed.unwrap(), &prompt), plain, "{key}");
    }
    // And these are refused.
    for (name, key, value, words) in [
        ("qwen3-moe", "qwen3moe.expert_weights_scale", Value::F32(2.5), "key 'qwen3moe.expert_weights_scale'"),
        ("qwen3-moe", "qwen3moe.expert_gating_func", Value::U32(2), "qwen3moe.expert_gating_func = 2"),
        ("glm4-moe", "glm4moe.expert_group_count", Value::U32(4), "key 'glm4moe.expert_group_count'"),
        ("mixtral", "llama.expert_count", Value::U32(5), "is not of 5 experts"),
        ("qwen3", "qwen3.expert_count", Value::U32(4), "a mixture of 4 experts"),
        ("granite", "granite.rope.scaling.type", Value::Text("spiral".into()), "'spiral' is not supported"),
        ("olmo3", "olmo2.rope.scaling.yarn_ext_factor", Value::F32(0.5), "key 'olmo2.rope.scaling.yarn_ext_factor'"),
        ("cohere", "command-r.attn_logit_softcapping", Value::F32(5.0), "key 'command-r.attn_logit_softcapping'"),
    ] {
        let error = with(name, |f| drop(f.values.insert(key.to_owned(), value.clone()))).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let error = with("qwen3", |f| {
        let q = f.tensors["blk.0.attn_q.weight"].clone();
        f.tensors.insert("blk.0.attn_qkv.weight".to_owned(), q);
    });
    assert!(error.unwrap_err().contains("tensor 'blk.0.attn_qkv.weight' is not supported"));
}

#[test]
fn experts_in_blocks_and_norms_that_hold_one_move_in_and_out() {
    for name in ["mixtral", "gpt-oss", "gemma3", "phi4-long"] {
        let mut case = sayable(name).unwrap();
        for (_, weights) in case.model.tensors.values_mut() {
            snap(weights);
        }
        let mut file = converted(&case.model).unwrap();
        let mut blocks = 0;
        for (_, (_, kind, bytes)) in file.tensors.iter_mut().filter(|(n, _)| n.ends_with("_exps.weight")) {
            let weights: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (*kind, *bytes) = (8, q8(&weights));
            blocks += 1;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &file);
        let out = dir.path().join("out");
        let manifest = import(&path, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
        // Each expert's matrix is a layer.
        assert_eq!(manifest.layers.len(), blocks * 6, "{name}");
        let model = Model::open(&path).unwrap();
        let expected = all_logits(&model, &case.prompt);
        let kept = |layer: &&Linear| layer.weight.dense().is_some_and(|tensor| tensor.exact().is_some());
        assert_eq!(model.weights.layers().iter().filter(kept).count(), blocks * 6, "{name}");
        if blocks > 0 {
            assert_eq!(logits_on(Some(&Executor::interpreter()), &model, &case.prompt), expected, "{name}");
        }
        assert_eq!(all_logits(&Model::open(&out).unwrap(), &case.prompt), expected, "{name}");
        if blocks == 0 {
            let plain = RandomModel { config: case.model.config.clone(), ..case.model.clone() };
            plain.write(dir.path());
            assert_eq!(all_logits(&Model::open(dir.path()).unwrap(), &case.prompt), expected, "{name}");
        }
        let back = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap();
        assert_eq!(std::fs::read(&back[0]).unwrap(), std::fs::read(&path).unwrap(), "{name}");
    }
}

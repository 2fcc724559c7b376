//! Checkpoints whose weights are written out as floats.

use std::path::Path;

use qp_runtime::checkpoint::Begin;
use qp_runtime::import::{Float, import, write_out};
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::models::{RandomModel, logits};
use serde_json::Value;

use super::import_packed::bitsandbytes;

/// Largest difference, over the largest value.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let size = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / size
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn weights_of_our_quantizers_are_written_in_the_space_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, quantized) = (dir.path().join("plain"), dir.path().join("quantized"));
    std::fs::create_dir_all(&plain).unwrap();
    RandomModel::new("LlamaForCausalLM").write(&plain);
    // Rotated in blocks, and by codes that take turns; the embedding and the output layer too.
    let mut plan = Plan::uniform("htcq_2.25");
    plan.set("--lm-head", "lm_head", "tcq_4");
    plan.set("--embedding", "model.embed_tokens", "nuq_4");
    Job::new(&plain, plan, &quantized).run(&Silent).unwrap_or_else(|e| panic!("{e}"));
    let expected = logits(Model::open(&quantized).unwrap());
    let write = |ty, name: &str| {
        let out = dir.path().join(name);
        let paths = write_out(&quantized, &out, ty, false, &mut |_, _, _| ()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(paths, [out.join("model.safetensors")]);
        let config = config(&out);
        assert!(config.get("quantization_config").is_none(), "{config}");
        let bytes = std::fs::metadata(&paths[0]).unwrap().len();
        (difference(&logits(Model::open(&out).unwrap()), &expected), config["torch_dtype"].clone(), bytes)
    };
    // What is left is the rounding of activations, which exact products have; it is far below that of the weights.
    let (apart, name, bytes) = write(Float::F32, "f32");
    assert!(apart < 2e-3 && name == "float32", "{apart} {name}");
    let from_plain = difference(&logits(Model::open(&plain).unwrap()), &expected);
    assert!(from_plain > 20.0 * apart, "{from_plain} {apart}");
    let (apart, name, half) = write(Float::F16, "f16");
    assert!(apart < 5e-3 && name == "float16" && half < bytes * 6 / 10, "{apart} {name} {half} {bytes}");
    let (apart, name, _) = write(Float::Bf16, "bf16");
    assert!(apart < 3e-2 && name == "bfloat16", "{apart} {name}");
    // What is there stays.
    let error = write_out(&quantized, &dir.path().join("f32"), Float::F16, false, &mut |_, _, _| ()).unwrap_err();
    assert!(error.to_string().ends_with("model.safetensors: exists; --force replaces it"), "{error}");
    write_out(&quantized, &dir.path().join("f32"), Float::F16, true, &mut |_, _, _| ()).unwrap();
    assert_eq!(config(&dir.path().join("f32"))["torch_dtype"], "float16");
    // No checkpoint is written into, its own least of all.
    for force in [false, true] {
        let error = write_out(&quantized, &quantized, Float::F16, force, &mut |_, _, _| ()).unwrap_err().to_string();
        assert!(error.ends_with("is a checkpoint, which is not written into; choose another output"), "{error}");
    }
    assert_eq!(logits(Model::open(&quantized).unwrap()), expected);
    // Only a checkpoint is written out.
    assert!(write_out(&plain, &dir.path().join("no"), Float::F16, false, &mut |_, _, _| ()).is_err());
    assert!(!dir.path().join("no").exists());
}

#[test]
fn weights_of_others_formats_are_written_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, plain) = bitsandbytes(dir.path(), "nf4", true, |_| ());
    let (checkpoint, out) = (dir.path().join("checkpoint"), dir.path().join("out"));
    import(&quantized, &checkpoint, Begin::default(), &mut |_, _, _| ()).unwrap();
    write_out(&checkpoint, &out, Float::F32, false, &mut |_, _, _| ()).unwrap();
    let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    let (ours, theirs) = (read(&out), read(&plain));
    let [ours, theirs] = [&ours, &theirs].map(|b| safetensors::SafeTensors::deserialize(b).unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in theirs.tensors().iter().filter(|t| t.0.contains("_proj")) {
        assert!(ours.tensor(name).unwrap().data() == tensor.data(), "{name}");
    }
}

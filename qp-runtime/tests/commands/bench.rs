//! `qp bench` as a user sees it, as far as no GPU is needed.

use std::path::Path;
use std::process::{Command, Output};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qp")).arg("bench").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_kernel_of_a_step_is_timed() {
    if qp_runtime::jit::nvrtc_for_tests().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (json, model) = (dir.path().join("jit.json"), format!("{ROOT}/models/kjv-llama"));
    let o = bench(&["jit", "--model", &model, "--spec", "nuq_3", "--rounds", "1", "--json", json.to_str().unwrap()]);
    assert!(o.status.success(), "{}", text(&o.stderr));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let kernels = report["kernels"].as_array().unwrap();
    let unfused = kernels.iter().filter(|k| k["kernel"].as_str().unwrap().ends_with("(unfused)")).count();
    assert_eq!(kernels.len(), report["step"]["kernels"].as_u64().unwrap() as usize + unfused);
    let positive = |v: &serde_json::Value| v.as_f64().unwrap() > 0.0;
    assert!(kernels.iter().all(|k| positive(&k["all"])) && positive(&report["step"]["warm"]), "{report}");
    let lines: Vec<&str> = text(&o.stdout).lines().collect();
    assert_eq!(lines.len(), kernels.len() + 5, "{}", text(&o.stdout));
    assert!(lines.last().unwrap().ends_with("from the cache."));
}

#[test]
fn a_whole_model_is_timed_and_saved() {
    if qp_runtime::jit::nvrtc_for_tests().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (json, saved) = (dir.path().join("engine.json"), dir.path().join("saved"));
    let small = ["engine", "--shapes", "tiny", "--device", "interpreter", "--steps", "2", "--sequences", "1,3"];
    let sizes = ["--contexts", "20,70", "--prompts", "17", "--json", json.to_str().unwrap()];
    let o = bench(&[&small[..], &sizes, &["--save", saved.to_str().unwrap()]].concat());
    assert!(o.status.success(), "{}", text(&o.stderr));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let decode = report["decode"].as_array().unwrap();
    let sizes: Vec<_> = decode.iter().map(|d| (d["sequences"].as_u64(), d["context"].as_u64())).collect();
    assert_eq!(sizes, [(Some(1), Some(20)), (Some(3), Some(20)), (Some(1), Some(70)), (Some(3), Some(70))]);
    let positive = |v: &serde_json::Value| v.as_f64().is_some_and(|v| v > 0.0);
    assert!(decode.iter().all(|d| positive(&d["seconds"])), "{report}");
    assert!(report["prompts"].as_array().unwrap().iter().all(|p| positive(&p["first"]) && positive(&p["seconds"])));
    let kinds = report["kinds"].as_array().unwrap();
    for kind in ["embedding", "prepare", "product", "attention", "append", "output layer", "argmax"] {
        assert!(kinds.iter().any(|k| k["tokens"] == 1 && k["kind"] == kind && positive(&k["seconds"])), "{kind}");
    }
    let starts = report["starts"].as_array().unwrap();
    assert!(starts.len() == 2 && starts.iter().all(|s| positive(&s["weights"]) && positive(&s["first"])), "{report}");
    let tables = text(&o.stdout);
    assert!(tables.contains("| 3 | 70 | ") && tables.contains("a checkpoint, no kernel in the cache"), "{tables}");
    // What was saved is a whole checkpoint, and a model that can be asked.
    let inspect = Command::new(env!("CARGO_BIN_EXE_qp")).args(["inspect", "--verify"]).arg(&saved).output().unwrap();
    assert!(inspect.status.success(), "{}", text(&inspect.stderr));
    let ask = ["--prompt", "Ask \u{e9}", "--tokens", "3", "--device", "cpu"];
    let said = Command::new(env!("CARGO_BIN_EXE_qp")).arg("generate").arg(&saved).args(ask).output().unwrap();
    assert!(said.status.success() && text(&said.stderr).contains("prompt: 6 tokens"), "{}", text(&said.stderr));
}

#[test]
fn a_picture_of_stored_results() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("roofline.svg");
    let stored = format!("{ROOT}/benches/results/kernels-h100.json");
    let draw = |file: &str, more: &[&str]| bench(&[&["roofline", file, "-o", out.to_str().unwrap()], more].concat());
    assert!(draw(&stored, &[]).status.success());
    let drawn = std::fs::read_to_string(&out).unwrap();
    assert_eq!(drawn, std::fs::read_to_string(Path::new(ROOT).join("docs/roofline.svg")).unwrap(), "draw it anew");
    for (file, more, message) in [
        (stored.as_str(), &["--batch", "7"][..], "holds no products of 7 token(s)"),
        ("/nowhere.json", &[], "/nowhere.json: No such file"),
        (concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), &[], "is no result of `qp bench kernels --json`"),
    ] {
        let o = draw(file, more);
        assert_eq!(o.status.code(), Some(1));
        assert!(text(&o.stderr).contains(message), "{}", text(&o.stderr));
    }
}

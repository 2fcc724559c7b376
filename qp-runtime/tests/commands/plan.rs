//! `qp plan` as a user sees it: output layer and embedding.

use std::path::Path;
use std::process::{Command, Output};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn qp(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qp")).current_dir(ROOT).args(args).output().unwrap()
}

/// What `qp plan` says for the bundled model, at 3.3 bits a weight.
fn plan(profile: &Path, more: &[&str]) -> String {
    let sensitivity = "benches/results/allocation/kjv-llama.sensitivity.json";
    let profile = profile.to_str().unwrap();
    let names = ["--quantizers", "tcq_3,tcq_4", "--bits", "3.3"];
    let o = qp(&[&["plan", "--sensitivity", sensitivity, "--profile", profile][..], &names, more].concat());
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

/// The number after `name` at the beginning of a line.
fn number(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line[name.len()..].split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn output_layer_and_embedding_are_planned_for_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let profile = dir.path().join("profile.json");
    let made = ["profile", "models/kjv-llama", "--target", "sm_90a", "--quantizers", "tcq_3,tcq_4", "-o"];
    assert!(qp(&[&made[..], &[profile.to_str().unwrap()]].concat()).status.success());

    let neither = plan(&profile, &[]);
    assert!(!neither.contains("lm_head") && !neither.contains("embed_tokens"), "{neither}");
    let head = plan(&profile, &["--lm-head"]);
    assert!(head.contains("\nlm_head: tcq_4") && !head.contains("embed_tokens"), "{head}");
    // They are tied: one matrix for both, which costs more loss than the output layer alone, and the same time.
    let both = plan(&profile, &["--embedding"]);
    assert!(both.contains("\nmodel.embed_tokens: tcq_4") && !both.contains("lm_head"), "{both}");
    assert_eq!(plan(&profile, &["--embedding", "--lm-head"]), both);
    assert_eq!(number(&both, "time"), number(&head, "time"));
    assert!(number(&both, "predicted loss") > number(&head, "predicted loss"), "{both}{head}");
}

#[test]
fn a_file_without_the_embedding_says_how_to_add_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.json");
    let text = r#"{"format":1,"model":"m","layers":[{"name":"lm_head","rows":4,"cols":2,"sensitivity":0.5}]}"#;
    std::fs::write(&file, text).unwrap();
    let o = qp(&["plan", "--sensitivity", file.to_str().unwrap(), "--embedding", "--bits", "4"]);
    let message = String::from_utf8(o.stderr).unwrap();
    assert!(message.contains("no sensitivity of the embedding: add it with `qp sensitivity --resume`"), "{message}");
}

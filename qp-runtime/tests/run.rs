//! `qp generate` and `qp eval` as a user sees them.

use std::path::Path;
use std::process::{Command, Output};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama");

fn qp(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qp")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The message and exit code of a command that must fail and print nothing else.
fn fails(args: &[&str]) -> (String, i32) {
    let o = qp(args);
    assert_eq!(text(&o.stdout), "", "{args:?}");
    (text(&o.stderr).to_owned(), o.status.code().unwrap())
}

#[test]
fn generate_prints_prompt_and_continuation() {
    let o =
        qp(&["generate", MODEL, "--prompt", "And it came to pass in those days, that", "-n", "6", "--device", "cpu"]);
    assert_eq!(text(&o.stdout), "And it came to pass in those days, that the king said unto the king\n");
    assert!(text(&o.stderr).starts_with("prompt: 11 tokens in "), "{}", text(&o.stderr));
    assert!(o.status.success());
    let again = |seed| qp(&["generate", MODEL, "-n", "20", "--temperature", "1", "--seed", seed]).stdout;
    assert_eq!(again("4"), again("4"));
    assert_ne!(again("4"), again("5"));
}

#[test]
fn eval_reports_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    let valid = std::fs::read_to_string(Path::new(MODEL).join("valid.txt")).unwrap();
    std::fs::write(&path, &valid[..4000]).unwrap();
    let path = path.to_str().unwrap();
    let o = qp(&["eval", MODEL, "--text", path, "--window", "256", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    let perplexity = json["perplexity"].as_f64().unwrap();
    assert!((10.0..25.0).contains(&perplexity), "{perplexity}");
    assert_eq!(json["scored"].as_u64().unwrap() % 255, 0);
    let o = qp(&["eval", MODEL, "--text", path, "--limit", "600", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((json["tokens"].as_u64(), json["scored"].as_u64()), (Some(600), Some(510)));
    let o = qp(&["eval", MODEL, "--text", path]);
    assert!(text(&o.stdout).starts_with(&format!("perplexity {perplexity:.4}\n")), "{}", text(&o.stdout));
}

#[test]
fn failures_of_the_work_exit_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let none = dir.path().join("none").to_str().unwrap().to_owned();
    let latin = file("latin", b"abc\xE9def");
    let short = file("short", b"In the beginning");
    let long = "word ".repeat(2000);
    for (args, part) in [
        (vec!["generate", &none, "-p", "a"], "none: No such file"),
        (vec!["generate", MODEL, "-n", "1025"], "1025 tokens were asked for, but the model's context ends at 1024"),
        (vec!["generate", MODEL, "-p", &long], "the model's context ends at 1024"),
        (vec!["eval", MODEL, "--text", &none], "none: No such file"),
        (vec!["eval", MODEL, "--text", &latin], "latin is not UTF-8 (byte 3)"),
        (vec!["eval", MODEL, "--text", &short], "fewer than one window of 256"),
        (vec!["eval", MODEL, "--text", &short, "--window", "5000"], "the model's context ends at 1024"),
    ] {
        let (message, code) = fails(&args);
        assert!(message.starts_with("error: ") && message.contains(part), "{args:?}: {message}");
        assert_eq!(code, 1, "{args:?}");
    }
}

#[test]
fn bad_flags_exit_with_2() {
    for args in [
        vec!["generate"],
        vec!["generate", MODEL, "--temperature", "-1"],
        vec!["generate", MODEL, "--temperature", "warm"],
        vec!["generate", MODEL, "--top-p", "1.5"],
        vec!["generate", MODEL, "-n", "0"],
        vec!["generate", MODEL, "--device", "tpu"],
        vec!["eval", MODEL],
        vec!["eval", MODEL, "--text", "x", "--window", "1"],
    ] {
        assert_eq!(fails(&args).1, 2, "{args:?}");
    }
}

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
fn a_draft_model_makes_no_other_text() {
    const PROMPT: &str = "And it came to pass in those days, that";
    let written = |more: &[&str]| {
        let base = ["generate", MODEL, "--device", "cpu", "-n", "16", "-p", PROMPT];
        let o = qp(&[&base, more].concat());
        assert!(o.status.success(), "{}", text(&o.stderr));
        (text(&o.stdout).to_owned(), text(&o.stderr).lines().last().unwrap_or_default().to_owned())
    };
    for drawn in [&[][..], &["--temperature", "1", "--seed", "5"], &["--repetition-penalty", "1.3"]] {
        let plain = written(drawn).0;
        let (guessed, said) = written(&[drawn, &["--draft-model", MODEL]].concat());
        assert_eq!(guessed, plain);
        assert!(said.starts_with("guessed: "), "{said}");
        // It guesses what it says, if penalties do not make it say another thing.
        assert_eq!(said, if drawn.len() == 2 { said.clone() } else { "guessed: 12 tokens, 12 of them right".into() });
        assert_eq!(written(&[drawn, &["--drafts", "3"]].concat()).0, plain);
        assert_eq!(written(&[drawn, &["--draft-model", MODEL, "--drafts", "0"]].concat()).0, plain);
    }
    // One whose tokens are others is refused.
    let other = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(MODEL).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, other.path().join(path.file_name().unwrap())).unwrap();
    }
    let tokens = std::fs::read_to_string(other.path().join("tokenizer.json")).unwrap();
    assert!(tokens.contains("\"<|begin|>\""));
    std::fs::write(other.path().join("tokenizer.json"), tokens.replace("<|begin|>", "<|other|>")).unwrap();
    let (message, code) =
        fails(&["generate", MODEL, "--device", "cpu", "-p", "a", "--draft-model", other.path().to_str().unwrap()]);
    assert!(message.contains("token 0 is \"<|other|>\" in it, and \"<|begin|>\" in the model"), "{message}");
    assert!(message.contains("give a draft model of its family") && code == 1, "{message}");
}

#[test]
fn prompts_come_from_anywhere_and_texts_may_end_what_follows() {
    const PROMPT: &str = "And it came to pass in those days, that";
    let arguments = |more: &[&'static str]| [&["generate", MODEL, "--device", "cpu"], more].concat();
    let o = qp(&arguments(&["-p", "-5 degrees", "-n", "1"]));
    assert!(text(&o.stdout).starts_with("-5 degrees"), "{o:?}");
    let plain = qp(&arguments(&["-p", PROMPT, "-n", "6"])).stdout;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt");
    std::fs::write(&file, format!("{PROMPT}\r\n")).unwrap();
    let mut of_file = arguments(&["-n", "6", "--prompt-file"]);
    of_file.push(file.to_str().unwrap());
    assert_eq!(qp(&of_file).stdout, plain);
    for from_input in [["--prompt-file", "-"], ["-p", "-"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
        command.args(arguments(&["-n", "6"])).args(from_input).stdin(std::fs::File::open(&file).unwrap());
        assert_eq!(command.output().unwrap().stdout, plain);
    }
    let o = qp(&arguments(&["-p", PROMPT, "-n", "60", "--stop", "nowhere", "--stop", "id unto"]));
    assert_eq!(text(&o.stdout), format!("{PROMPT} the king sa\n"));
    assert!(text(&o.stderr).ends_with("(stopped at a text)\n"), "{}", text(&o.stderr));
    let (message, code) = fails(&["generate", MODEL, "-p", "a", "--prompt-file", "b"]);
    assert!(message.contains("cannot be used with") && code == 2, "{message}");
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
    // What keys and values lose in 8 bits; in 16 the model is compared with itself.
    let divergence = |more: &[&str]| {
        let base = ["eval", MODEL, "--device", "cpu", "--text", path, "--limit", "256", "--against", MODEL, "--json"];
        let json: serde_json::Value = serde_json::from_slice(&qp(&[&base, more].concat()).stdout).unwrap();
        json["divergence"].as_f64().unwrap()
    };
    assert_eq!(divergence(&[]), 0.0);
    let in_8 = divergence(&["--cache-bits", "8"]);
    assert!(in_8 > 0.0 && in_8 < 0.05, "{in_8}");
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
    let one = file("one", b".");
    let long = "word ".repeat(2000);
    for (args, part) in [
        (vec!["generate", &none, "-p", "a"], "none: No such file"),
        (vec!["generate", MODEL, "-n", "1025"], "1025 tokens were asked for, but the model's context ends at 1024"),
        (vec!["generate", MODEL, "-p", &long], "the model's context ends at 1024"),
        (vec!["eval", MODEL, "--text", &none], "none: No such file"),
        (vec!["eval", MODEL, "--text", &latin], "latin is not UTF-8 (byte 3)"),
        (vec!["eval", MODEL, "--text", &one], "fewer than one window of 256"),
        (vec!["chat", MODEL, "--context", "5000"], "context ends at 1024: give a --context"),
        (vec!["train-codebook", "tcq_3.qspec"], "cannot read tcq_3.qspec: there is no such file"),
        (
            vec!["plan", "--sensitivity", &none, "-o", "same.x", "--svg", "same.x"],
            "would be one file: give --out and --svg different names",
        ),
        (vec!["eval", MODEL, "--text", "/dev/zero"], "cannot read /dev/zero: it is a device"),
    ] {
        let (message, code) = fails(&args);
        assert!(message.starts_with("error: ") && message.contains(part), "{args:?}: {message}");
        assert_eq!(code, 1, "{args:?}");
    }
    let (message, code) = fails(&["quantize", MODEL, "--spec", "nope/tcq_3.qspec", "-o", &none]);
    assert!(
        message.starts_with("Error: cannot read nope/tcq_3.qspec: there is no such file") && code == 1,
        "{message}"
    );
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
        // What would be ignored.
        vec!["eval", MODEL, "--questions", "x", "--window", "7"],
        vec!["eval", MODEL, "--questions", "x", "--against", MODEL],
        vec!["plan", "--sensitivity", "x", "--frontier", "2", "-o", "x.toml"],
        vec!["chat", MODEL, "--context", "0"],
    ] {
        assert_eq!(fails(&args).1, 2, "{args:?}");
    }
    for option in ["--seed", "--temperature", "--tokens", "--threads"] {
        let (message, _) = fails(&["generate", MODEL, option, "-1"]);
        assert!(message.contains("invalid value '-1'") && !message.contains("-- -1"), "{option}: {message}");
    }
}

#[test]
fn a_conversation_replaces_a_file_only_if_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hist.json");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "mine").unwrap();
    let say = |line: String| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qp"))
            .args(["chat", MODEL, "--device", "cpu"])
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), line.as_bytes()).unwrap();
        text(&child.wait_with_output().unwrap().stderr).to_owned()
    };
    let said = say(format!("/save {path}\n"));
    assert!(said.contains(&format!("There is a file {path} already; /save! {path} replaces it.")), "{said}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    let said = say(format!("/save! {path}\n"));
    assert!(said.contains("Written to"), "{said}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "[]\n");
}

#[test]
fn a_run_of_other_settings_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s1.json");
    let other = r#"{"format":1,"model":"odd","texts":"x","layers":[]}"#;
    std::fs::write(&file, other).unwrap();
    let args = ["sensitivity", MODEL, "-o", file.to_str().unwrap(), "--quick", "--tokens", "2", "--sequences", "1"];
    let (message, code) = fails(&[&args[..], &["--resume", "--device", "cpu"]].concat());
    assert!(message.contains("s1.json is of another model or other settings") && code == 1, "{message}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), other);
}

#[test]
fn windows_fit_the_model_and_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    let valid = std::fs::read_to_string(Path::new(MODEL).join("valid.txt")).unwrap();
    std::fs::write(&path, &valid[..6000]).unwrap();
    let o = qp(&["eval", MODEL, "--text", path.to_str().unwrap(), "--window", "5000", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!(json["window"], 1024, "{}", text(&o.stderr));
    assert!(text(&o.stderr).starts_with("note: the window is 1024 tokens, not 5000: the model's context has no more"));
    // A byte order mark is no text; `-` is standard input.
    let with_mark = [b"\xef\xbb\xbf", "In the beginning God created".as_bytes()].concat();
    let run = |bytes: &[u8]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qp"))
            .args(["eval", MODEL, "--text", "-", "--json", "--threads", "1"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), bytes).unwrap();
        let o = child.wait_with_output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
        (json["loss"].clone(), json["tokens"].clone())
    };
    assert_eq!(run(&with_mark), run(&with_mark[3..]));
}

/// What is written where nobody reads, or nothing can be written.
#[cfg(target_os = "linux")]
#[test]
fn closed_pipes_and_full_disks() {
    let plan = ["doctor"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_qp"))
        .args(plan)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let o = child.wait_with_output().unwrap();
    assert_eq!((o.status.code(), text(&o.stderr)), (Some(0), ""));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let o = Command::new(env!("CARGO_BIN_EXE_qp")).args(plan).stdout(full).output().unwrap();
    assert_eq!(o.status.code(), Some(1));
    assert!(text(&o.stderr).starts_with("error: cannot write to standard output: No space"), "{}", text(&o.stderr));
    let o = qp(&["sensitivity", MODEL, "-o", "/dev/full", "--quick", "--tokens", "2", "--sequences", "1"]);
    assert_eq!(o.status.code(), Some(1), "{}", text(&o.stderr));
}

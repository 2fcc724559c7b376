//! `qp quantize` and `qp inspect` as a user sees them; and killed in the middle.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::Duration;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama");

/// A quantizer that takes a second or two for the bundled model, table included.
const SPEC: &str = "quantizer small {
    window 8
    vector 1
    step   3
    block  2 x 128
    values i8 + 1/2
    unit   1/8
    table  t[32] = [
        -20, -16, -14, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -2, -1,
        0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 19,
    ]
    decode w {
        t[(w * 37) >> 2]
    }
    scale  row
    rotate hadamard(seed = 0)
}
";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("small.qspec"), SPEC).unwrap();
        Place(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_qp"));
        c.current_dir(self.0.path()).args(["quantize", MODEL, "--spec", "./small.qspec", "-o", out]).args(more);
        c
    }

    fn run(&self, out: &str, more: &[&str]) -> Output {
        self.command(out, more).output().unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut all: Vec<String> =
            fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Names and contents of all files of a directory.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for e in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = e.file_name().into_string().unwrap();
        if e.path().is_dir() {
            all.extend(contents(&e.path()).into_iter().map(|(k, v)| (format!("{name}/{k}"), v)));
        } else {
            all.insert(name, fs::read(e.path()).unwrap());
        }
    }
    all
}

#[test]
fn killed_twice_and_resumed_it_becomes_the_same() {
    let place = Place::new();
    let whole = place.run("whole", &[]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    assert!(text(&whole.stdout).starts_with("whole: 42 layers quantized, "), "{}", text(&whole.stdout));
    // The head and 14 tensors that are copied; then layers.
    for records in [20, 30] {
        let mut child = place.command("out", &["--resume", "--threads", "1"]).spawn().unwrap();
        loop {
            assert!(child.try_wait().unwrap().is_none(), "ended before it could be killed");
            let journal = place.names().into_iter().find(|n| n.starts_with("out.partial-"));
            let lines = journal.and_then(|n| fs::read(place.path(&n).join("journal")).ok());
            if lines.is_some_and(|l| l.iter().filter(|b| **b == b'\n').count() > records) {
                break;
            }
            sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!place.path("out").exists());
    }
    let refused = place.run("out", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("continue it with --resume"), "{}", text(&refused.stderr));
    let resumed = place.run("out", &["--resume"]);
    assert!(resumed.status.success(), "{}", text(&resumed.stderr));
    assert_eq!(contents(&place.path("out")), contents(&place.path("whole")));
    assert_eq!(place.names(), ["out", "small.qspec", "whole"]);
}

#[test]
fn what_exists_is_replaced_only_by_force_and_inspect_tells() {
    let place = Place::new();
    assert!(place.run("out", &["--quiet"]).status.success());
    let before = contents(&place.path("out"));
    let refused = place.run("out", &[]);
    assert_eq!((refused.status.code(), text(&refused.stdout)), (Some(1), ""));
    assert!(text(&refused.stderr).ends_with("choose another output, or replace it with --force\n"));
    assert!(place.run("out", &["--force"]).status.success());
    assert_eq!(contents(&place.path("out")), before);

    let inspect = |more: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_qp"));
        c.current_dir(place.0.path()).args(["inspect", "out"]).args(more).output().unwrap()
    };
    let table = inspect(&["--verify"]);
    let table = text(&table.stdout);
    assert!(table.contains("model.layers.5.mlp.down_proj     small      256 x 768     3.021"), "{table}");
    assert!(table.contains("4718592 weights in 42 layers: 3.052 bits a weight"), "{table}");
    assert!(table.ends_with("verified: every byte is as it was written\n"), "{table}");
    let json: serde_json::Value = serde_json::from_slice(&inspect(&["--json"]).stdout).unwrap();
    assert_eq!(json["totals"]["quantized_weights"], 4718592);
    assert_eq!(json["layers"][0]["name"], "model.layers.0.self_attn.q_proj");
    assert_eq!(json["specs"][0]["rate"], 3.0);

    let weights = place.path("out/weights-00001.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&weights, bytes).unwrap();
    assert!(inspect(&[]).status.success());
    let damaged = inspect(&["--verify"]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(text(&damaged.stderr).contains("was changed after it was written"), "{}", text(&damaged.stderr));
}

#[test]
fn templates_go_along() {
    let place = Place::new();
    let model = place.path("model");
    fs::create_dir_all(model.join("additional_chat_templates")).unwrap();
    for file in fs::read_dir(MODEL).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    let template = "additional_chat_templates/tool_use.jinja";
    fs::write(model.join(template), "tools").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
    command.current_dir(place.0.path()).args(["quantize", "model", "--spec", "./small.qspec", "-o", "out"]);
    let made = command.output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert_eq!(contents(&place.path("out"))[template], b"tools");
    let inspect = Command::new(env!("CARGO_BIN_EXE_qp")).args(["inspect", "--verify"]).arg(place.path("out")).output();
    assert!(text(&inspect.unwrap().stdout).ends_with("verified: every byte is as it was written\n"));
}

/// Names of files steer no terminal, through a pipe neither.
#[test]
fn exported_names_are_shown_without_what_steers_a_terminal() {
    let place = Place::new();
    let qp = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_qp")).current_dir(place.0.path()).args(args).output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout).to_owned()
    };
    qp(&["quantize", MODEL, "--spec", "q8_0", "-o", "out"]);
    assert_eq!(qp(&["export", "out", "-o", "a\u{1b}[2J.gguf", "-q"]), "a\\u{1b}[2J.gguf\n");
    assert!(place.path("a\u{1b}[2J.gguf").exists());
}

#[test]
fn failures_and_bad_usage() {
    let place = Place::new();
    let fails = |args: &[&str]| {
        let o = Command::new(env!("CARGO_BIN_EXE_qp")).current_dir(place.0.path()).args(args).output().unwrap();
        assert_eq!(text(&o.stdout), "", "{args:?}");
        (text(&o.stderr).to_owned(), o.status.code().unwrap())
    };
    let (message, code) = fails(&["quantize", MODEL, "--spec", "tqc_3", "-o", "out"]);
    assert!(message.contains("did you mean `tcq_3`?") && code == 1, "{message}");
    let (message, code) = fails(&["quantize", MODEL, "--plan", "none.toml", "-o", "out"]);
    assert!(message.contains("cannot read the plan none.toml") && code == 1, "{message}");
    for args in [&["quantize", MODEL, "-o", "out"][..], &["quantize", MODEL, "--spec", "a", "--plan", "b", "-o", "out"]]
    {
        assert_eq!(fails(args).1, 2);
    }
    for other in [MODEL, "small.qspec", "nothing"] {
        let (message, code) = fails(&["inspect", other]);
        assert!(
            message.ends_with("is not a quantized checkpoint: it has no qp.json; `qp quantize` makes one of a model, `qp import` of a file that is quantized already\n"),
            "{message}"
        );
        assert_eq!(code, 1);
    }
    assert_eq!(place.names(), ["small.qspec"]);
}

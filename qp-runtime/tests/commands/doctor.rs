//! `qp doctor` as a user sees it, on machines with and without anything.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn doctor(cache: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
    command.arg("doctor").args(args).env("QP_CACHE_DIR", cache).env("QP_NVRTC", cache.join("no such file"));
    command.output().unwrap()
}

fn text(output: &Output) -> &str {
    assert!(output.status.success(), "{output:?}");
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn what_is_missing_is_named_with_its_cure() {
    let dir = tempfile::tempdir().unwrap();
    let output = doctor(dir.path(), &[]);
    let text = text(&output);
    assert!(text.contains("no such file cannot be used as NVRTC"), "{text}");
    assert!(text.contains("kernel cache") && text.contains("(0 kernels, 0 measured launches, 0.0 MiB)"), "{text}");
    assert!(text.lines().last().unwrap().contains("models run on"), "{text}");
}

#[test]
fn json_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let output = doctor(dir.path(), &["--json"]);
    let report: serde_json::Value = serde_json::from_str(text(&output)).unwrap();
    assert!(report["nvrtc"]["missing"].is_string(), "{report}");
    assert!(report["driver"].is_object());
    assert_eq!((&report["cache"]["entries"], &report["cache"]["launches"]), (&0.into(), &0.into()));
    assert_eq!(report["cache"]["folder"], dir.path().to_str().unwrap());
    assert!(report["cache"]["problem"].is_null());
}

#[test]
fn clearing_takes_kernels_and_launches_only() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join(format!("{}.cubin", "0a".repeat(32)));
    fs::write(&kernel, "whatever it holds").unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let launch = kernel.with_extension("launch");
    fs::write(&launch, "whatever it holds").unwrap();
    assert!(text(&doctor(dir.path(), &[])).contains("(1 kernels, 1 measured launches"));
    assert!(text(&doctor(dir.path(), &["--clear-cache"])).contains("removed 2 compiled kernels"));
    assert!(!kernel.exists() && !launch.exists() && dir.path().join("notes.txt").exists());
}

#[test]
fn how_launches_are_chosen_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let said = |word: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
        let output = command.arg("doctor").env("QP_CACHE_DIR", dir.path()).env("QP_LAUNCHES", word).output().unwrap();
        text(&output).to_owned()
    };
    assert!(said("").contains("as measured before"));
    assert!(said("measured").contains("measured at first use on a GPU (QP_LAUNCHES=measured)"));
    assert!(said("model").contains("as the cost model chooses (QP_LAUNCHES=model)"));
    assert!(
        said("fast").contains("QP_LAUNCHES is `fast`: it must be `remembered` (the default), `measured` or `model`")
    );
}

#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let output = doctor(&file.join("below"), &[]);
    assert!(text(&output).contains("compiled anew each time"), "{output:?}");
}

#[test]
fn a_gpu_that_is_not_there_is_refused_in_words() {
    // On a machine with a GPU the library that is missing comes next.
    let output = Command::new(env!("CARGO_BIN_EXE_qp")).arg("check-gpu").env("QP_NVRTC", "/nowhere").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.starts_with("error: ") && !message.contains("panicked"), "{message}");
}

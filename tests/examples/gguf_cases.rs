//! Writes the small models of `tests/data/conformance` as GGUF files, each with a prompt and the likeliest tokens that follow it here,
//! for other programs to read (`scripts/gguf-beside`).
//!
//!     cargo run --release -p qp-tests --example gguf_cases DIR

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::checkpoint::Begin;
use qp_runtime::engine;
use qp_runtime::import::export;
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::conformance::dirs;
use qp_tests::converted::sayable;
use qp_tests::models::RandomModel;
use serde_json::json;

/// Tokens that follow a prompt.
const COUNT: usize = 30;

fn write(to: &Path, name: &str, model: &RandomModel, prompt: &[u32]) {
    let dir = tempfile::tempdir().expect("a folder for the model");
    let (from, checkpoint) = (dir.path().join("model"), dir.path().join("checkpoint"));
    std::fs::create_dir(&from).expect("a new folder");
    model.write(&from);
    let plan = Plan::parse("plan", "default = \"keep\"", PathBuf::new()).expect("a plan");
    let mut job = Job::new(&from, plan, &checkpoint);
    job.begin = Begin::default();
    job.run(&Silent).unwrap_or_else(|e| panic!("{name}: {e}"));
    let file = to.join(name).with_extension("gguf");
    export(&checkpoint, &file, true, &mut |_, _, _| ()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let model = Model::open(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut engine = engine::open(None, &Arc::new(model.weights), prompt.len() + COUNT).expect("an engine");
    let mut tokens = vec![engine.greedy(prompt).expect("a token")];
    while tokens.len() < COUNT {
        tokens.push(engine.greedy(&tokens[tokens.len() - 1..]).expect("a token"));
    }
    let said = json!({ "prompt": prompt, "tokens": tokens }).to_string();
    std::fs::write(file.with_extension("json"), said).expect("a file in the folder");
}

fn main() {
    let to = PathBuf::from(std::env::args_os().nth(1).expect("a folder to write to"));
    for case in dirs().iter().filter_map(|d| sayable(d.file_name()?.to_str()?)) {
        write(&to, &case.name, &case.model, &case.prompt);
    }
    write(&to, "ministral3", &RandomModel::ministral3(), &(40..62).collect::<Vec<_>>());
}

//! The engine of GPUs, run by the interpreter, on the bundled model.

use std::path::Path;
use std::sync::Arc;

use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits};
use qp_runtime::model::Model;
use serde_json::Value;

#[test]
fn the_bundled_model_gives_its_reference_tokens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama");
    let reference: Value = serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        reference[name].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    };
    let model = Model::open(&dir).unwrap();
    let prompt = ids("prompt_ids");
    let mut engine = engine::open(Some(&Executor::interpreter()), &Arc::new(model.weights.clone()), 40).unwrap();
    let mut tokens = vec![engine.greedy(&prompt).unwrap()];
    while tokens.len() < 12 {
        tokens.push(engine.greedy(&tokens[tokens.len() - 1..]).unwrap());
    }
    assert_eq!(tokens, ids("greedy_ids")[..12]);

    // One token at a time, the CPU's engine has the same bits.
    let mut cpu = engine::open(None, &Arc::new(model.weights), 40).unwrap();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    engine.truncate(0);
    for token in &prompt[..3] {
        engine.forward(&[*token], Logits::Last, &mut a).unwrap();
        cpu.forward(&[*token], Logits::Last, &mut b).unwrap();
        assert_eq!(a, b);
    }
}

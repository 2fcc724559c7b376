//! The bundled model quantized with uniform TCQ: from `.qspec` to perplexity and text, all on the CPU.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits, Sampler, Sampling, Session};
use qp_runtime::eval::perplexity;
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};

/// Tokens of `valid.txt` that are scored: 48 windows of 256, about a third.
const SCORED: usize = 48 * 256;

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama")
}

/// The bundled model by one quantizer of the palette, and the directory that it lies in.
fn quantize(spec: &str) -> (Model, tempfile::TempDir) {
    carry_out(Plan::uniform(spec))
}

fn carry_out(plan: Plan) -> (Model, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    Job::new(bundled(), plan, &out).run(&Silent).unwrap_or_else(|e| panic!("{e}"));
    (Model::open(&out).unwrap(), dir)
}

fn engine(model: &Model, context: usize) -> Session {
    engine::open(None, &Arc::new(model.weights.clone()), context).unwrap()
}

fn perplexity_of(model: &Model) -> f64 {
    let text = std::fs::read_to_string(bundled().join("valid.txt")).unwrap();
    let tokens = model.tokenizer.encode(&text).unwrap();
    perplexity(&mut engine(model, 256), &tokens[..SCORED], 256, |_| ()).unwrap().perplexity()
}

/// Loss of perplexity, relative, must be at most `bar`: Gaussian noise of the code's mean squared error in each layer
/// loses 12.4, 2.9 and 0.9 % at 2, 3 and 4 bits. A much smaller loss would mean that the layers are not quantized.
fn check_perplexity(spec: &str, bar: f64) {
    static UNQUANTIZED: OnceLock<f64> = OnceLock::new();
    let unquantized = UNQUANTIZED.get_or_init(|| perplexity_of(&Model::open(&bundled()).unwrap()));
    let (model, _dir) = quantize(spec);
    let loss = perplexity_of(&model) / unquantized - 1.0;
    assert!((0.3 * bar..bar).contains(&loss), "{spec}: perplexity is {:.2} % above", 100.0 * loss);
}

#[test]
fn perplexity_at_2_bits() {
    check_perplexity("tcq_2", 0.14);
}

#[test]
fn perplexity_at_3_bits() {
    check_perplexity("tcq_3", 0.035);
}

#[test]
fn perplexity_at_4_bits() {
    check_perplexity("tcq_4", 0.012);
}

#[test]
fn text_from_a_mix_of_codes() {
    let (model, _dir) = quantize("htcq_3.75");
    let prompt = model.tokenizer.encode("And it came to pass in those days, that").unwrap();
    let mut engine = engine(&model, 71);
    let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
    let mut sampler = Sampler::new(Sampling::default());
    let g = engine::generate(&mut engine, &prompt, 60, &[], &mut sampler, go).unwrap();
    let text = model.tokenizer.decode(&g.tokens).unwrap();
    assert!(text.contains("king") || text.contains("LORD"), "{text}");
    // All at once and one by one are the same sums of integers; only the embedding and the head are not.
    let all: Vec<u32> = prompt.iter().chain(&g.tokens).copied().collect();
    let (mut at_once, mut by_one) = (Vec::new(), Vec::new());
    engine.truncate(0);
    engine.forward(&all, Logits::Last, &mut at_once).unwrap();
    engine.truncate(0);
    all.iter().for_each(|t| engine.forward(&[*t], Logits::Last, &mut by_one).unwrap());
    assert!(at_once == by_one);
}

#[test]
fn kernels_yield_the_bits_of_the_cpu() {
    let mut plan = Plan::uniform("tcq_2.5");
    // The bundled model's output layer is tied: one matrix serves both.
    plan.set("--embedding", "model.embed_tokens", "tcq_4");
    let (model, _dir) = carry_out(plan);
    let tokens = model.tokenizer.encode("And it came to pass in those days, that the king").unwrap();
    let mut cpu = engine(&model, tokens.len());
    let mut kernels =
        engine::open(Some(&Executor::interpreter()), &Arc::new(model.weights.clone()), tokens.len()).unwrap();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (prompt, rest) = tokens.split_at(tokens.len() - 2);
    for part in [prompt, &rest[..1], &rest[1..]] {
        cpu.forward(part, Logits::Last, &mut ours).unwrap();
        kernels.forward(part, Logits::Last, &mut theirs).unwrap();
        assert!(ours.iter().zip(&theirs).all(|(a, b)| a.to_bits() == b.to_bits()), "after {} tokens", cpu.position());
    }
}

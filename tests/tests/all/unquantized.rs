//! The unquantized bundled model against what the Hugging Face implementation computes (`reference.json`).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::engine::{self, Logits, Sampler, Sampling, Session, Stop};
use qp_runtime::eval::{nll, perplexity};
use qp_runtime::model::Model;
use serde_json::Value;

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama")
}

fn reference() -> Value {
    serde_json::from_slice(&std::fs::read(bundled().join("reference.json")).unwrap()).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn engine(model: &Model, context: usize) -> Session {
    engine::open(None, &Arc::new(model.weights.clone()), context).unwrap()
}

fn greedy(engine: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(Sampling::default());
    let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
    let g = engine::generate(engine, prompt, count, &[], &mut sampler, go).unwrap();
    assert_eq!(g.stop, Stop::Count);
    g.tokens
}

#[test]
fn greedy_tokens_and_streamed_text() {
    let (model, reference) = (Model::open(&bundled()).unwrap(), reference());
    let text = reference["prompt"].as_str().unwrap();
    let prompt = model.tokenizer.encode(text).unwrap();
    assert_eq!(prompt, ids(&reference["prompt_ids"]));
    let tokens = greedy(&mut engine(&model, 71), &prompt, 60);
    assert_eq!(tokens, ids(&reference["greedy_ids"]));
    let mut stream = model.tokenizer.stream(&prompt);
    let mut streamed = text.to_owned();
    for &t in &tokens {
        streamed += &stream.push(t).unwrap();
    }
    streamed += &stream.finish().unwrap();
    assert_eq!(streamed, reference["greedy_text"].as_str().unwrap());
}

#[test]
fn first_window() {
    let (model, reference) = (Model::open(&bundled()).unwrap(), reference());
    let text = std::fs::read_to_string(bundled().join("valid.txt")).unwrap();
    let tokens = model.tokenizer.encode(&text).unwrap()[..256].to_vec();
    assert_eq!(tokens, ids(&reference["valid_first_256_ids"]));
    let (mut engine, mut logits) = (engine(&model, 256), Vec::new());
    engine.forward(&tokens, Logits::All, &mut logits).unwrap();
    let rows: Vec<&[f32]> = logits.chunks_exact(2048).collect();
    let loss = rows.iter().zip(&tokens[1..]).map(|(row, &t)| nll(row, t)).sum::<f64>() / 255.0;
    let expect = reference["mean_nll_valid_first_256"].as_f64().unwrap();
    // The reference's own products carry about 11 bits: rounding activations to as many moves these logits as far.
    assert!((loss - expect).abs() < 2e-4, "{loss}, reference {expect}");
    for (i, v) in reference["logits_pos255_first16"].as_array().unwrap().iter().enumerate() {
        let (ours, theirs) = (f64::from(rows[255][i]), v.as_f64().unwrap());
        assert!((ours - theirs).abs() < 5e-3, "logit {i}: {ours}, reference {theirs}");
    }
    // One token at a time, from the cache, they come out the same but for the order of sums.
    engine.truncate(250);
    for (t, expect) in tokens.iter().zip(&rows).skip(250) {
        let mut one = Vec::new();
        engine.forward(&[*t], Logits::Last, &mut one).unwrap();
        let worst = one.iter().zip(*expect).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{worst}");
    }
}

#[test]
fn perplexity_of_the_whole_text() {
    let (model, reference) = (Model::open(&bundled()).unwrap(), reference());
    let text = std::fs::read_to_string(bundled().join("valid.txt")).unwrap();
    let tokens = model.tokenizer.encode(&text).unwrap();
    let p = perplexity(&mut engine(&model, 256), &tokens, 256, |_| ()).unwrap();
    assert_eq!(p.scored as u64, reference["valid_scored_tokens"].as_u64().unwrap());
    let expect = reference["valid_perplexity"].as_f64().unwrap();
    assert!((p.perplexity() / expect - 1.0).abs() < 5e-4, "{}, reference {expect}", p.perplexity());
}

#[test]
fn threads_do_not_change_a_bit() {
    let model = Model::open(&bundled()).unwrap();
    let tokens: Vec<u32> = (0..100).map(|i| i * 37 % 2048).collect();
    let logits = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (mut engine, mut out) = (engine(&model, 100), Vec::new());
        pool.install(|| engine.forward(&tokens, Logits::All, &mut out).unwrap());
        out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    let one = logits(1);
    assert!(one == logits(3));
}

#[test]
fn sampling_repeats_with_its_seed() {
    let model = Model::open(&bundled()).unwrap();
    let prompt = model.tokenizer.encode("In the beginning").unwrap();
    let mut engine = engine(&model, 64);
    let mut draw = |seed| {
        let mut sampler = Sampler::new(Sampling { temperature: 0.9, top_k: 50, top_p: 0.95, min_p: 0.0, seed });
        let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
        engine::generate(&mut engine, &prompt, 20, &[], &mut sampler, go).unwrap().tokens
    };
    let (a, b) = (draw(1), draw(2));
    assert_eq!(a, draw(1));
    assert_ne!(a, b);
}

//! Mixtures of experts, Gemma's shapes and fused layers on the whole way: sensitivities, a plan, fitted rounding, text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::allocate::sensitivity::{Error, Progress, Sensitivities, Settings, measure};
use qp_runtime::allocate::{Candidate, Effort, Freedom, Layer, Problem, report};
use qp_runtime::check::synthetic::Random;
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits, Sampler, Sampling, Session};
use qp_runtime::model::{Config, Model, arch};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::calibrate::{Calibrate, Texts};
use qp_runtime::quantize::{Job, Silent};
use qp_tests::conformance::Case;
use qp_tests::models::RandomModel;
use serde_json::{Value as Json, json};

struct Quiet;

impl Progress for Quiet {
    fn trial(&mut self, _: usize, _: usize, _: &str) {}

    fn measured(&mut self, _: &Sensitivities) -> Result<(), Error> {
        Ok(())
    }
}

/// Half of the layers by more bits, chosen by how much they matter.
fn plan(model: &Model) -> String {
    let settings = Settings { sequences: 1, tokens: 16, levels: 1, draws: 1, seed: 3 };
    let measured =
        measure(None, "random", model.config.bos, &model.weights, settings, None, &mut Quiet).expect("measured");
    let candidates = [("tcq_2", 2.0, 0.07), ("tcq_4", 4.0, 0.006)];
    let candidates = candidates.map(|(name, bits, distortion)| Candidate { name: name.to_owned(), bits, distortion });
    let bytes = |layer: &Layer, c: usize| Some(layer.weights() as i64 * [2, 4][c] / 8);
    let free = Freedom { fusion: false, cores: false };
    let p = Problem::new(measured.layers(), candidates.to_vec(), free, 0, &bytes, None).expect("usable");
    let a = p.solve(Some(p.least_memory() * 3 / 2), None, Effort::default()).expect("feasible");
    report::plan_file(&p, &a, "a test", &str::to_owned)
}

fn session(on: Option<&Executor>, model: &Model, context: usize) -> Session {
    engine::open(on, &Arc::new(model.weights.clone()), context).unwrap()
}

fn logits(model: &Model, prompt: &[u32]) -> Vec<f32> {
    let mut out = Vec::new();
    session(None, model, prompt.len()).forward(prompt, Logits::All, &mut out).unwrap();
    out
}

/// Mean squared difference, over the mean square.
fn difference(a: &[f32], of: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    a.iter().zip(of).map(|(a, b)| square(a - b)).sum::<f64>() / of.iter().map(|v| square(*v)).sum::<f64>()
}

fn quantize(dir: &Path, plan: &str, calibrate: Option<Calibrate>) -> Model {
    let out = dir.join(if calibrate.is_some() { "fitted" } else { "plain" });
    let plan = Plan::parse("plan.toml", plan, PathBuf::new()).unwrap_or_else(|e| panic!("{e}"));
    let job = Job { calibrate, ..Job::new(dir, plan, &out) };
    let manifest = job.run(&Silent).unwrap_or_else(|e| panic!("{e}"));
    assert!(manifest.layers.iter().any(|l| l.spec == "tcq_2") && manifest.layers.iter().any(|l| l.spec == "tcq_4"));
    Model::open(&out).unwrap()
}

/// Printable characters, each of which is a token.
fn letters(n: usize, seed: u32) -> String {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
        char::from(b' ' + (x >> 16) as u8 % 95)
    };
    (0..n).map(|_| next()).collect()
}

/// A model of the kind of a case, wide enough for errors to move on to other columns; with what is to be changed.
fn wide(name: &str, change: Json) -> RandomModel {
    let mut config = Case::named(name).model.config;
    config.as_object_mut().unwrap().remove("layer_types");
    let all = json!({"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 384});
    for more in [all, change] {
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    }
    let read = Config::parse(Path::new("config.json"), &config.to_string()).unwrap_or_else(|e| panic!("{e}"));
    let program = arch::program(&read);
    let mut tensors = std::collections::BTreeMap::new();
    for layer in program.layers.iter().filter(|l| l.shares.is_none()) {
        let tensor = format!("{}.weight", layer.name);
        // Embeddings are as large as what blocks add, Gemma's once they are scaled; columns differ, as they do in models.
        let width = (layer.cols as f32).sqrt();
        let most = match layer.name.contains("embed") {
            true if name.contains("gemma") => 1.0 / width,
            true => 1.0,
            false => 2.5 / width,
        };
        let mut values = Random::of(&tensor).values(layer.rows * layer.cols, most);
        for (i, v) in values.iter_mut().enumerate() {
            *v *= [1.5, 1.0, 0.5, 0.25][i % layer.cols % 4];
        }
        tensors.insert(tensor, (vec![layer.rows, layer.cols], values));
    }
    let middle = if name.starts_with("gemma") { 0.0 } else { 1.0 };
    for vector in &program.vectors {
        let values = Random::of(&vector.tensor).values(vector.len, 0.3).iter().map(|v| middle + v).collect();
        tensors.insert(vector.tensor.clone(), (vec![vector.len], values));
    }
    RandomModel { config, tensors }
}

#[test]
fn experts_gemma_and_fused_layers_are_planned_and_fitted() {
    for (name, change, layer, count) in [
        ("mixtral", json!({"num_local_experts": 4}), "model.layers.1.block_sparse_moe.experts.3.w2", 2 * (4 + 4 * 3)),
        ("gemma3", json!({"sliding_window_pattern": 2}), "model.layers.1.mlp.gate_proj", 2 * 7),
        ("phi3", json!({}), "model.layers.1.self_attn.qkv_proj", 2 * 4),
    ] {
        let model = wide(name, change);
        let prompt: Vec<u32> = letters(40, 2).bytes().map(u32::from).collect();
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        let dense = Model::open(dir.path()).unwrap();
        let plan = plan(&dense);
        let expected = logits(&dense, &prompt);
        let text = dir.path().join("text");
        std::fs::write(&text, letters(4096, 1)).unwrap();
        let calibrate = Calibrate { texts: Texts::File(text), tokens: 2048 };
        let plain = difference(&logits(&quantize(dir.path(), &plan, None), &prompt), &expected);
        let model = quantize(dir.path(), &plan, Some(calibrate));
        let fitted = difference(&logits(&model, &prompt), &expected);
        let quantized: Vec<&str> =
            model.weights.layers().iter().filter(|l| l.weight.dense().is_none()).map(|l| l.name.as_str()).collect();
        assert!(quantized.contains(&layer), "{name}: {quantized:?}");
        assert!(quantized.len() >= count, "{name}: {} layers are quantized", quantized.len());
        assert!(fitted > 0.0 && fitted < plain, "{name}: fitted {fitted}, plain {plain}");
        // The same text with guesses, however it is cut; and on a device.
        let write = |on: Option<&Executor>, drafts: Option<engine::Drafts>, count: usize| {
            let mut session = session(on, &model, 8 + count);
            session.set_drafts(drafts);
            let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
            let mut sampler = Sampler::new(Sampling::default());
            engine::generate(&mut session, &prompt[..8], count, &[], &mut sampler, go).unwrap().tokens
        };
        let text = write(None, None, 12);
        assert_eq!(write(None, Some(engine::Drafts::look_up(4)), 12), text, "{name}");
        assert_eq!(write(Some(&Executor::interpreter()), None, 2), text[..2], "{name}");
    }
}

//! Mixtures of experts, Gemma's shapes and fused layers on the whole way: sensitivities, a plan, fitted rounding, text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::allocate::sensitivity::{Error, Progress, Sensitivities, Settings, measure};
use qp_runtime::allocate::{Candidate, Effort, Freedom, Layer, Problem, report};
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits, Sampler, Sampling, Session};
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::calibrate::{Calibrate, Texts};
use qp_runtime::quantize::{Job, Silent};
use qp_tests::conformance::Case;

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
    let bytes = |layer: &Layer, c: usize| layer.weights() as i64 * [2, 4][c] / 8;
    let free = Freedom { fusion: false, cores: false };
    let p = Problem::new(measured.layers(), candidates.to_vec(), free, 0, &bytes, None).expect("usable");
    let a = p.solve(Some(p.least_memory() * 3 / 2), None, Effort::default()).expect("feasible");
    report::plan_file(&p, &a, "a test")
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

#[test]
fn experts_gemma_and_fused_layers_are_planned_and_fitted() {
    for (name, layer, count) in [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w2", 3 * (4 + 6 * 3)),
        ("gemma3", "model.layers.3.mlp.gate_proj", 4 * 7),
        ("phi3", "model.layers.1.self_attn.qkv_proj", 3 * 4),
    ] {
        let case = Case::named(name);
        let dir = tempfile::tempdir().unwrap();
        case.model.write(dir.path());
        let dense = Model::open(dir.path()).unwrap();
        let plan = plan(&dense);
        let expected = logits(&dense, &case.prompt);
        let calibrate = Calibrate { texts: Texts::Own, tokens: 2048 };
        let plain = difference(&logits(&quantize(dir.path(), &plan, None), &case.prompt), &expected);
        let model = quantize(dir.path(), &plan, Some(calibrate));
        let fitted = difference(&logits(&model, &case.prompt), &expected);
        let quantized: Vec<&str> =
            model.weights.layers().iter().filter(|l| l.weight.dense().is_none()).map(|l| l.name.as_str()).collect();
        assert!(quantized.contains(&layer), "{name}: {quantized:?}");
        assert!(quantized.len() >= count, "{name}: {} layers are quantized", quantized.len());
        assert!(fitted > 0.0 && fitted < plain, "{name}: fitted {fitted}, plain {plain}");
        // The same text with guesses, however it is cut; and on a device, where it computes such layers.
        let write = |on: Option<&Executor>, drafts: Option<engine::Drafts>, count: usize| {
            let mut session = session(on, &model, case.prompt.len() + count);
            session.set_drafts(drafts);
            let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
            let mut sampler = Sampler::new(Sampling::default());
            engine::generate(&mut session, &case.prompt, count, &[], &mut sampler, go).unwrap().tokens
        };
        let text = write(None, None, 12);
        assert_eq!(write(None, Some(engine::Drafts::look_up(4)), 12), text, "{name}");
        if model.weights.program.device_lacks().is_none() {
            assert_eq!(write(Some(&Executor::interpreter()), None, 3), text[..3], "{name}");
        }
    }
}

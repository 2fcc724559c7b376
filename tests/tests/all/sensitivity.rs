//! Sensitivities of a small random model, and the way from them to a plan that `qp quantize` takes.

use std::path::PathBuf;

use qp_runtime::allocate::sensitivity::{Error, Progress, Sensitivities, Settings, measure};
use qp_runtime::allocate::{Candidate, Core, Effort, Freedom, Layer, Problem, report};
use qp_runtime::device::Executor;
use qp_runtime::engine;
use qp_runtime::model::Model;
use qp_runtime::plan;
use qp_tests::models::RandomModel;
use serde_json::json;

const SETTINGS: Settings = Settings { sequences: 2, tokens: 16, levels: 2, draws: 1, seed: 3 };

/// Stops after so many layers; keeps what was saved.
struct Until {
    layers: usize,
    saved: Option<Sensitivities>,
}

impl Progress for Until {
    fn trial(&mut self, done: usize, total: usize, _: &str) {
        assert!(done < total);
    }

    fn measured(&mut self, so_far: &Sensitivities) -> Result<(), Error> {
        self.saved = Some(so_far.clone());
        match so_far.layers.len() == self.layers {
            true => Err(Error::Other("stopped".to_owned())),
            false => Ok(()),
        }
    }
}

fn model(change: impl FnOnce(&mut RandomModel)) -> Model {
    let folder = tempfile::tempdir().expect("a folder");
    let mut random = RandomModel::new("LlamaForCausalLM");
    random.config["bos_token_id"] = json!(0);
    change(&mut random);
    random.write(folder.path());
    Model::open(folder.path()).expect("a model")
}

fn run(model: &Model, settings: Settings, earlier: Option<Sensitivities>) -> Result<Sensitivities, Error> {
    let mut all = Until { layers: usize::MAX, saved: None };
    measure(None, "random", model.config.bos, &model.weights, settings, earlier, &mut all)
}

#[test]
fn a_run_that_was_stopped_is_continued_to_the_same_result() {
    let model = model(|_| ());
    let whole = run(&model, SETTINGS, None).expect("measured");
    assert_eq!(whole.layers.len(), 16);
    assert_eq!([14, 15].map(|i| whole.layers[i].name.as_str()), ["lm_head", "model.embed_tokens"]);
    assert!(whole.layers.iter().all(|l| l.sensitivity > 0.0 && l.points.len() == 2));

    let mut until = Until { layers: 4, saved: None };
    measure(None, "random", model.config.bos, &model.weights, SETTINGS, None, &mut until).expect_err("stopped");
    let part = until.saved.expect("saved");
    assert_eq!(part.layers.len(), 4);
    assert_eq!(run(&model, SETTINGS, Some(part.clone())).expect("continued"), whole);

    let other = Settings { seed: 4, ..SETTINGS };
    assert!(matches!(run(&model, other, Some(part.clone())), Err(Error::Other(_))));
    // Files of earlier versions do not tell the weights.
    let unknown = Sensitivities { weights: String::new(), ..part.clone() };
    assert_eq!(run(&model, SETTINGS, Some(unknown)).expect("continued"), whole);
    let twin = Sensitivities { weights: "of a model that writes the same".to_owned(), ..part };
    assert!(matches!(run(&model, SETTINGS, Some(twin)), Err(Error::Other(_))));
}

#[test]
fn a_device_measures_the_same() {
    let model = model(|_| ());
    let settings = Settings { sequences: 1, tokens: 8, levels: 1, ..SETTINGS };
    let cpu = run(&model, settings, None).expect("measured");
    let mut all = Until { layers: usize::MAX, saved: None };
    let on = Executor::interpreter();
    let device =
        measure(Some(&on), "random", model.config.bos, &model.weights, settings, None, &mut all).expect("measured");
    assert_eq!(cpu.texts, device.texts);
    for (a, b) in cpu.layers.iter().zip(&device.layers) {
        assert!((a.sensitivity / b.sensitivity - 1.0).abs() < 1e-2, "{}: {} {}", a.name, a.sensitivity, b.sensitivity);
    }
}

#[test]
fn a_layer_of_zeros_does_not_matter() {
    let name = "model.layers.1.mlp.up_proj";
    let model = model(|m| {
        let up = m.tensors.get_mut(&format!("{name}.weight")).expect("there");
        up.1.fill(0.0);
    });
    let measured = run(&model, SETTINGS, None).expect("measured");
    let layer = measured.layers.iter().find(|l| l.name == name).expect("measured");
    assert_eq!(layer.sensitivity, 0.0);
    // What is multiplied with its output does not matter either.
    let gate = measured.layers.iter().find(|l| l.name == "model.layers.1.mlp.gate_proj").expect("measured");
    assert_eq!(gate.sensitivity, 0.0);
}

#[test]
fn a_tied_embedding_is_measured_with_the_output_layer() {
    let tied = model(|m| {
        m.config["tie_word_embeddings"] = true.into();
        m.tensors.remove("lm_head.weight");
    });
    let measured = run(&tied, SETTINGS, None).expect("measured");
    let [.., head, embedding] = &measured.layers[..] else { panic!("layers") };
    assert!(measured.tied && head.name == "lm_head");
    assert!(embedding.sensitivity > head.sensitivity, "{} {}", embedding.sensitivity, head.sensitivity);
}

#[test]
fn a_model_must_be_able_to_begin() {
    let model = model(|m| {
        m.config.as_object_mut().expect("an object").remove("bos_token_id");
    });
    assert!(matches!(run(&model, SETTINGS, None), Err(Error::Engine(engine::Error::NoFirstToken))));
}

#[test]
fn plans_are_taken_by_qp_quantize() {
    let measured = run(&model(|_| ()), SETTINGS, None).expect("measured");
    let candidates = vec![
        Candidate { name: "tcq_2".to_owned(), bits: 2.0, distortion: 0.07 },
        Candidate { name: "tcq_3".to_owned(), bits: 3.0, distortion: 0.02 },
    ];
    let bytes = |layer: &Layer, c: usize| Some(layer.weights() as i64 * [2, 3][c] / 8);
    // A launch costs as much as half a thousand weights at 2 bits, so fusing pays.
    let times = |layers: &[&Layer], c: usize, core: Core| {
        let weights: i64 = layers.iter().map(|l| l.weights() as i64).sum();
        (core == Core::Tensor).then_some(1000 + weights * [2, 3][c])
    };
    let free = Freedom { fusion: true, cores: true };
    let p = Problem::new(measured.layers(), candidates, free, 0, &bytes, Some(&times)).expect("usable");
    let budget = p.least_time() * 5 / 4;
    let a = p.solve(None, Some(budget), Effort::default()).expect("feasible");
    let chosen = a.candidates();
    assert!(chosen.contains(&0) && chosen.contains(&1), "a mixed plan");

    let text = report::plan_file(&p, &a, "a test", &str::to_owned);
    let plan = plan::Plan::parse("plan.toml", &text, PathBuf::new()).unwrap_or_else(|e| panic!("{e}"));
    let layers: Vec<plan::Layer> = p
        .layers
        .iter()
        .map(|l| plan::Layer {
            name: l.name.clone(),
            shape: l.shape,
            by_default: l.name.starts_with("model.layers"),
            input: None,
        })
        .collect();
    let resolved = plan.resolve(&layers).unwrap_or_else(|e| panic!("{e}"));
    for (layer, &c) in resolved.layers.iter().zip(&chosen) {
        let spec = layer.map(|s| resolved.specs[s].name());
        assert_eq!(spec, Some(p.candidates[c].name.as_str()));
    }
    let fused: Vec<Vec<usize>> = a.launches.iter().map(|l| l.layers.clone()).filter(|l| l.len() > 1).collect();
    assert!(!fused.is_empty());
    assert_eq!(resolved.groups, fused);
}

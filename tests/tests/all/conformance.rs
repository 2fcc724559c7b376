//! Small random models of every architecture against what transformers computes (`scripts/conformance`).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::check::synthetic::Random;
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits, Sampler, Sampling, Session};
use qp_runtime::model::Model;
use qp_tests::models::RandomModel;
use rayon::prelude::*;
use serde_json::Value;

/// Largest difference of a logit, over the largest logit: attention rounds keys, values and weights to 16 bits.
const CLOSE: f32 = 1e-3;
/// What an ignored key must change at least, over the largest logit.
const DIFFERENT: f32 = 1e-2;
/// Greedy tokens that the interpreter computes.
const FEW: usize = 3;

/// A case, read.
struct Case {
    name: String,
    model: RandomModel,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Positions of the prompt.
    rows: Vec<usize>,
    /// Their logits.
    logits: Vec<f32>,
    /// Merge patches of `config.json` that must change the logits.
    ignoring: Vec<Value>,
}

fn list<T>(v: &Value, of: impl Fn(u64) -> T) -> Vec<T> {
    v.as_array().unwrap().iter().map(|v| of(v.as_u64().unwrap())).collect()
}

impl Case {
    fn read(dir: &Path) -> Case {
        let json = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap() };
        let case = json("case.json");
        let mut model = RandomModel { config: json("config.json"), tensors: Default::default() };
        for tensor in case["tensors"].as_array().unwrap() {
            let (name, shape) = (tensor["name"].as_str().unwrap(), list(&tensor["shape"], |n| n as usize));
            let number = |key: &str| tensor[key].as_f64().unwrap() as f32;
            let (middle, width) = (number("middle"), number("width"));
            let values = Random::of(name).values(shape.iter().product(), 1.0);
            let values = values.iter().map(|v| half::bf16::from_f32(middle + width * v).to_f32()).collect();
            model.tensors.insert(tensor["file"].as_str().unwrap().to_owned(), (shape, values));
        }
        let logits = std::fs::read(dir.join("logits.f32")).unwrap();
        Case {
            name: dir.file_name().unwrap().to_str().unwrap().to_owned(),
            model,
            prompt: list(&case["prompt"], |t| t as u32),
            greedy: list(&case["greedy"], |t| t as u32),
            rows: list(&case["rows"], |r| r as usize),
            logits: logits.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            ignoring: case["ignoring"].as_array().unwrap().clone(),
        }
    }

    fn open(&self, config: &Value) -> Result<Model, String> {
        let dir = tempfile::tempdir().unwrap();
        RandomModel { config: config.clone(), ..self.model.clone() }.write(dir.path());
        Model::open(dir.path()).map_err(|e| format!("{}: {e}", self.name))
    }

    /// Largest difference of the logits of a whole prompt, over the largest logit.
    fn difference(&self, engine: &mut Session) -> Result<f32, String> {
        let mut all = Vec::new();
        engine.truncate(0);
        engine.forward(&self.prompt, Logits::All, &mut all).map_err(|e| format!("{}: {e}", self.name))?;
        let vocab = self.logits.len() / self.rows.len();
        let ours = self.rows.iter().flat_map(|row| &all[row * vocab..(row + 1) * vocab]);
        let worst = ours.zip(&self.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        Ok(worst / self.logits.iter().map(|v| v.abs()).fold(0.0, f32::max))
    }

    /// The greedy tokens that follow the prompt.
    fn greedy(&self, engine: &mut Session, count: usize) -> Vec<u32> {
        engine.truncate(0);
        let mut tokens = vec![engine.greedy(&self.prompt).unwrap()];
        while tokens.len() < count {
            tokens.push(engine.greedy(&tokens[tokens.len() - 1..]).unwrap());
        }
        tokens
    }
}

fn cases() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/conformance");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    assert!(dirs.len() > 10);
    dirs
}

/// Every case, and all that is wrong with any of them.
fn each(check: impl Fn(&Case) -> Result<(), String> + Sync) {
    let wrong: Vec<String> = cases().par_iter().filter_map(|dir| check(&Case::read(dir)).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn session(on: Option<&Executor>, model: &Model, tokens: usize) -> Session {
    engine::open(on, &Arc::new(model.weights.clone()), tokens).unwrap()
}

#[test]
fn the_cpu_computes_what_transformers_does() {
    each(|case| {
        let model = case.open(&case.model.config)?;
        let mut engine = session(None, &model, case.prompt.len() + case.greedy.len());
        let difference = case.difference(&mut engine)?;
        let greedy = case.greedy(&mut engine, case.greedy.len());
        if difference < CLOSE && greedy == case.greedy {
            return Ok(());
        }
        Err(format!("{}: {difference:e}; {greedy:?}, reference {:?}", case.name, case.greedy))
    });
}

#[test]
fn the_interpreter_computes_what_transformers_does() {
    on_device(&Executor::interpreter());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_computes_what_transformers_does() {
    on_device(&Executor::cuda(0).unwrap());
}

fn on_device(on: &Executor) {
    each(|case| {
        let model = case.open(&case.model.config)?;
        let room = case.prompt.len() + case.greedy.len();
        let (mut device, mut cpu) = (session(Some(on), &model, room), session(None, &model, room));
        let difference = case.difference(&mut device)?;
        let greedy = case.greedy(&mut device, FEW);
        if difference >= CLOSE || greedy != case.greedy[..FEW] {
            return Err(format!("{}: {difference:e}; {greedy:?}, reference {:?}", case.name, case.greedy));
        }
        // One token at a time, the CPU's engine has the same bits.
        let (mut a, mut b) = (Vec::new(), Vec::new());
        device.truncate(0);
        for token in &case.prompt[..4] {
            device.forward(&[*token], Logits::Last, &mut a).unwrap();
            cpu.forward(&[*token], Logits::Last, &mut b).unwrap();
            if a != b {
                return Err(format!("{}: other bits than the CPU's", case.name));
            }
        }
        Ok(())
    });
}

#[test]
fn guesses_do_not_change_a_text() {
    each(|case| {
        let model = case.open(&case.model.config)?;
        let text = |drafts: usize| {
            let mut engine = session(None, &model, case.prompt.len() + case.greedy.len());
            engine.set_drafts(drafts);
            let mut sampler = Sampler::new(Sampling::default());
            let go = |_| Ok::<_, engine::Error>(ControlFlow::Continue(()));
            engine::generate(&mut engine, &case.prompt, case.greedy.len(), &[], &mut sampler, go).unwrap()
        };
        let guessed = text(5);
        if guessed.tokens != case.greedy || text(0).tokens != case.greedy {
            return Err(format!("{}: {:?}, reference {:?}", case.name, guessed.tokens, case.greedy));
        }
        // Some of these texts repeat themselves.
        if case.name == "qwen3" && guessed.drafted.1 < 10 {
            return Err(format!("{}: {:?}", case.name, guessed.drafted));
        }
        Ok(())
    });
}

#[test]
fn what_is_ignored_changes_the_logits() {
    each(|case| {
        for patch in &case.ignoring {
            let mut config = case.model.config.clone();
            merge(&mut config, patch);
            let model = case.open(&config).map_err(|e| format!("{patch}: {e}"))?;
            let difference = case.difference(&mut session(None, &model, case.prompt.len() + case.greedy.len()))?;
            if difference < DIFFERENT {
                return Err(format!("{}: {patch} changes only {difference:e}", case.name));
            }
        }
        Ok(())
    });
}

/// A JSON merge patch.
fn merge(value: &mut Value, patch: &Value) {
    match (value, patch) {
        (Value::Object(value), Value::Object(patch)) => {
            for (key, patch) in patch {
                merge(value.entry(key).or_insert(Value::Null), patch);
            }
        }
        (value, patch) => *value = patch.clone(),
    }
}

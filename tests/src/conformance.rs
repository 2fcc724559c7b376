//! Small random models of every architecture with what transformers computes (`tests/data/conformance`).

use std::path::{Path, PathBuf};

use qp_runtime::check::synthetic::Random;
use qp_runtime::model::Model;
use serde_json::Value;

use crate::models::RandomModel;

/// A case, read.
pub struct Case {
    /// The name of its folder.
    pub name: String,
    /// The model.
    pub model: RandomModel,
    /// Tokens that it is asked with.
    pub prompt: Vec<u32>,
    /// The likeliest tokens that follow.
    pub greedy: Vec<u32>,
    /// Positions of the prompt.
    pub rows: Vec<usize>,
    /// Their logits.
    pub logits: Vec<f32>,
    /// Merge patches of `config.json` that must change the logits.
    pub ignoring: Vec<Value>,
}

fn list<T>(v: &Value, of: impl Fn(u64) -> T) -> Vec<T> {
    v.as_array().unwrap().iter().map(|v| of(v.as_u64().unwrap())).collect()
}

/// The folders of all cases.
pub fn dirs() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/conformance");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    assert!(dirs.len() > 10);
    dirs
}

impl Case {
    /// The case `name`.
    pub fn named(name: &str) -> Case {
        Case::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/conformance").join(name))
    }

    /// The case of a folder.
    pub fn read(dir: &Path) -> Case {
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

    /// The model with another `config.json`.
    ///
    /// # Errors
    /// If it is refused.
    pub fn open(&self, config: &Value) -> Result<Model, String> {
        let dir = tempfile::tempdir().unwrap();
        RandomModel { config: config.clone(), ..self.model.clone() }.write(dir.path());
        Model::open(dir.path()).map_err(|e| format!("{}: {e}", self.name))
    }
}

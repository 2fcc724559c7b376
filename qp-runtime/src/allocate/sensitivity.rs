//! How much a model's predictions suffer from noise in one layer.
//!
//! No data is needed: the model itself writes the texts. To the weights of one layer at a time, Gaussian noise is
//! added whose mean square is a fraction x (the **level**) of the row's own, as a quantizer of distortion x would.
//! With D the mean Kullback-Leibler divergence of the noisy model's predictions from the model's own, the growth
//! y = exp(D) − 1 is nearly proportional to x for small x; the layer's **sensitivity** a is the slope of the line
//! through the origin that fits best.
//!
//! The predicted loss of a plan is then Σ a · distortion, the relative growth of perplexity on the model's own texts.

use std::path::Path;
use std::sync::Arc;

use qp_codegen::spec::Shape;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::problem::{Layer, Role};
use crate::codec::gaussian::Gaussian;
use crate::device::Executor;
use crate::engine::{self, Logits, Room, Session, SharedWeights};
use crate::model::{self, Linear, Tensor, Weight, Weights};

/// Version of the file format.
const FORMAT: u32 = 1;
/// The highest noise level; the others divide it evenly.
const HIGHEST: f64 = 0.0625;

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Texts to sample from the model.
    pub sequences: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Noise levels.
    pub levels: usize,
    /// Independent draws of noise at each level.
    pub draws: usize,
    /// Seed of texts and noise.
    pub seed: u64,
}

/// One layer's measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Name without `.weight`.
    pub name: String,
    /// Out features.
    pub rows: u32,
    /// In features.
    pub cols: u32,
    /// a.
    pub sensitivity: f64,
    /// Each trial: relative mean square of the noise, exp(D) − 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub points: Vec<[f64; 2]>,
}

/// The file that `qp sensitivity` writes and `qp plan` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// Version of the format.
    pub format: u32,
    /// Name of the model's directory.
    pub model: String,
    /// How they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// SHA-256 of the sampled tokens: equal for equal models and settings.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub texts: String,
    /// BLAKE3 of the weights; files of earlier versions have none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub weights: String,
    /// True if the output layer is tied to the embedding: the embedding is then measured with the noise in both.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tied: bool,
    /// The linear layers in the order of execution, then the embedding.
    pub layers: Vec<Measured>,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot run.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The model's files are not as they should be.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A quantized layer.
    #[error("layer `{0}` is quantized already: measure the model that the checkpoint was made from")]
    Quantized(String),
    /// The noisy model computes nonsense.
    #[error("the predictions of the model are not numbers once layer `{0}` is noisy: its weights are damaged")]
    NotANumber(String),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not of this kind.
    #[error("{path} is not a sensitivity file of this version: {why}; make it anew with `qp sensitivity`")]
    Format {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// An earlier run, of this model or in this file, was of something else.
    #[error("{0} is of another model or other settings: use another output, or leave out --resume to start anew")]
    Other(String),
}

impl Sensitivities {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is of another version, or holds a sensitivity that is negative or not finite.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let shown = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: shown(), source })?;
        let read: Sensitivities =
            serde_json::from_str(&text).map_err(|e| Error::Format { path: shown(), why: e.to_string() })?;
        if read.format != FORMAT {
            return Err(Error::Format { path: shown(), why: format!("its format is {}, not {FORMAT}", read.format) });
        }
        if let Some(l) = read.layers.iter().find(|l| !(l.sensitivity >= 0.0 && l.sensitivity.is_finite())) {
            let why = format!("the sensitivity of `{}` is {}", l.name, l.sensitivity);
            return Err(Error::Format { path: shown(), why });
        }
        Ok(read)
    }

    /// Writes a file, replacing it at once or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.display().to_string(), source };
        let mut text = serde_json::to_string_pretty(self).map_err(|e| io(e.into()))?;
        text.push('\n');
        qp_codegen::output::write(path, text.as_bytes()).map_err(io)
    }

    /// The layers as the allocator wants them.
    pub fn layers(&self) -> Vec<Layer> {
        let layer = |m: &Measured| Layer {
            name: m.name.clone(),
            role: Role::of(&m.name),
            shape: Shape { rows: m.rows, cols: m.cols },
            sensitivity: m.sensitivity,
        };
        self.layers.iter().map(layer).collect()
    }
}

/// Is told how the work goes.
pub trait Progress {
    /// `done` of `total` trials are done; the next is of `layer`.
    fn trial(&mut self, done: usize, total: usize, layer: &str);
    /// A layer is measured.
    ///
    /// # Errors
    /// If what there is cannot be saved.
    fn measured(&mut self, so_far: &Sensitivities) -> Result<(), Error>;
}

/// Measures every linear layer, the output layer included, and the embedding. An output layer that is tied to the
/// embedding is measured apart from it first, and then with it, as one matrix for both. The model runs on `on`, by default on
/// the CPU, and begins its texts with `bos`; each trial has an engine of its own, which shares with the others all matrices but one. Layers that `earlier`
/// has are not measured again.
///
/// # Errors
/// If the model cannot run, or `earlier` is of another model or of other settings.
pub fn measure(
    on: Option<&Executor>,
    name: &str,
    bos: Option<u32>,
    weights: &Weights,
    settings: Settings,
    earlier: Option<Sensitivities>,
    progress: &mut dyn Progress,
) -> Result<Sensitivities, Error> {
    let base = Arc::new(weights.clone());
    let mut texts = Vec::new();
    for i in 0..settings.sequences {
        progress.trial(0, 1, "texts");
        texts.push(engine::texts::write(on, bos, &base, settings.tokens, settings.seed, i)?);
    }
    let mut hash = Sha256::new();
    texts.iter().flatten().for_each(|t| hash.update(t.to_le_bytes()));
    let mut out = Sensitivities {
        format: FORMAT,
        model: name.to_owned(),
        settings: Some(settings),
        texts: hash.finalize().iter().map(|b| format!("{b:02x}")).collect(),
        weights: identity(weights),
        tied: weights.program.layer(weights.program.head()).shares.is_some(),
        layers: Vec::new(),
    };
    let mut known = Vec::new();
    if let Some(earlier) = earlier {
        let other_weights = !earlier.weights.is_empty() && earlier.weights != out.weights;
        if (earlier.settings, &earlier.texts) != (out.settings, &out.texts) || other_weights {
            return Err(Error::Other(earlier.model));
        }
        known = earlier.layers;
    }
    let mut engines = SharedWeights::on(on);
    let expected = predictions(&mut engines, &base, &texts)?;
    let trials = settings.levels * settings.draws;
    let total = weights.layers().len() * trials;
    for (i, id) in weights.program.ids().enumerate() {
        let linear = &weights[id];
        if let Some(done) = known.iter().find(|m| m.name == linear.name) {
            out.layers.push(done.clone());
            continue;
        }
        let mut points = Vec::new();
        for t in 0..trials {
            progress.trial(i * trials + t, total, &linear.name);
            let level = HIGHEST * (t / settings.draws + 1) as f64 / settings.levels as f64;
            let seed = settings.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ ((i * trials + t) as u64 + 1);
            let (noisy, noise) = disturb(linear, level, seed)?;
            let mut changed = weights.clone();
            changed.replace(id, noisy);
            let divergence = divergence(&mut engines, &Arc::new(changed), &texts, &expected)?;
            if !divergence.is_finite() {
                return Err(Error::NotANumber(linear.name.clone()));
            }
            points.push([noise, divergence.exp_m1()]);
        }
        out.layers.push(Measured {
            name: linear.name.clone(),
            rows: linear.rows as u32,
            cols: linear.cols as u32,
            sensitivity: slope(&points).max(0.0),
            points,
        });
        progress.measured(&out)?;
    }
    Ok(out)
}

/// What tells the weights of a model from those of another that writes the same texts.
fn identity(weights: &Weights) -> String {
    let mut hash = blake3::Hasher::new();
    for tensor in weights.layers().iter().filter_map(|l| l.weight.dense()) {
        hash.update_rayon(tensor.bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// Slope of the line through the origin with the least squared distance from the points.
pub fn slope(points: &[[f64; 2]]) -> f64 {
    let (xy, xx) = points.iter().fold((0.0, 0.0), |(xy, xx), [x, y]| (xy + x * y, xx + x * x));
    if xx > 0.0 { xy / xx } else { 0.0 }
}

/// The layer's matrix with noise of relative mean square `level` in each row, and the relative mean square that came out.
fn disturb(linear: &Linear, level: f64, seed: u64) -> Result<(Weight, f64), Error> {
    let mut values = linear.weight.dense().ok_or_else(|| Error::Quantized(linear.name.clone()))?.to_f32();
    let sums: Vec<(f64, f64)> = values
        .par_chunks_exact_mut(linear.cols)
        .enumerate()
        .map(|(r, row)| {
            let square: f64 = row.iter().map(|&w| f64::from(w).powi(2)).sum();
            let scale = (level * square / row.len() as f64).sqrt() as f32;
            let noise = Gaussian::new(seed ^ (r as u64).wrapping_mul(0xA24B_AED4_963E_E407)).samples(row.len());
            let mut added = 0.0;
            for (w, n) in row.iter_mut().zip(noise) {
                *w += scale * n;
                added += f64::from(scale * n).powi(2);
            }
            (added, square)
        })
        .collect();
    let (added, square) = sums.iter().fold((0.0, 0.0), |(a, s), (x, y)| (a + x, s + y));
    let tensor = Tensor::from_f32(&[linear.rows, linear.cols], &values).expect("as many values as before");
    Ok((Weight::Dense(tensor), if square > 0.0 { added / square } else { 0.0 }))
}

/// Log-probabilities of every next token of every text: one row of `vocab` a token.
fn predictions(
    engines: &mut SharedWeights<'_>,
    weights: &Arc<Weights>,
    texts: &[Vec<u32>],
) -> Result<Vec<Vec<f32>>, Error> {
    let mut out = Vec::new();
    each_row_block(engines, weights, texts, |logits, vocab| {
        let mut rows = logits.to_vec();
        rows.par_chunks_exact_mut(vocab).for_each(log_softmax);
        out.push(rows);
    })?;
    Ok(out)
}

/// Mean divergence, in nats a token, of a model's predictions from `expected`.
fn divergence(
    engines: &mut SharedWeights<'_>,
    weights: &Arc<Weights>,
    texts: &[Vec<u32>],
    expected: &[Vec<f32>],
) -> Result<f64, Error> {
    let (mut total, mut count, mut blocks) = (0.0, 0, expected.iter());
    each_row_block(engines, weights, texts, |logits, vocab| {
        let Some(expected) = blocks.next() else { return };
        let rows = logits.par_chunks_exact(vocab).zip(expected.par_chunks_exact(vocab));
        let each: Vec<f64> = rows
            .map(|(q, p)| {
                let mut q = q.to_vec();
                log_softmax(&mut q);
                p.iter().zip(&q).map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum()
            })
            .collect();
        count += each.len();
        total += each.iter().sum::<f64>();
    })?;
    Ok(total / count as f64)
}

/// Runs the model over all texts and shows the logits as they come, some rows at a time.
fn each_row_block(
    engines: &mut SharedWeights<'_>,
    weights: &Arc<Weights>,
    texts: &[Vec<u32>],
    mut see: impl FnMut(&[f32], usize),
) -> Result<(), Error> {
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let mut session = Session::new(engines.open(weights, Room::one(longest))?);
    let (vocab, most) = (session.vocab(), session.most_tokens());
    let mut logits = Vec::new();
    for text in texts {
        session.truncate(0);
        for tokens in text.chunks(most) {
            session.forward(tokens, Logits::All, &mut logits)?;
            see(&logits, vocab);
        }
    }
    Ok(())
}

fn log_softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
    let norm = f64::from(max) + sum.ln();
    row.iter_mut().for_each(|v| *v = (f64::from(*v) - norm) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes() {
        assert_eq!(slope(&[[1.0, 2.0], [2.0, 4.0]]), 2.0);
        assert_eq!(slope(&[[1.0, 1.0], [2.0, 4.0]]), 9.0 / 5.0);
        assert_eq!(slope(&[]), 0.0);
    }

    #[test]
    fn files_are_checked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s.json");
        let layer =
            Measured { name: "lm_head".to_owned(), rows: 4, cols: 2, sensitivity: 0.5, points: vec![[0.1, 0.05]] };
        let all = Sensitivities {
            format: FORMAT,
            model: "m".to_owned(),
            settings: None,
            texts: String::new(),
            weights: String::new(),
            tied: false,
            layers: vec![layer],
        };
        all.write(&path).expect("written");
        assert_eq!(Sensitivities::read(&path).expect("read"), all);
        for (from, to, message) in [
            ("\"format\": 1", "\"format\": 2", "its format is 2, not 1"),
            ("0.5", "-0.5", "the sensitivity of `lm_head` is -0.5"),
            ("\"rows\"", "\"row\"", "missing field `rows`"),
        ] {
            let text = serde_json::to_string_pretty(&all).expect("text").replace(from, to);
            std::fs::write(&path, text).expect("written");
            let error = Sensitivities::read(&path).expect_err("bad").to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}

//! What enters the linear layers: the model runs over texts, decoder layer by decoder layer, and leaves the Hessians
//! of each.
//!
//! In memory are the residual streams of all texts, and one decoder layer's Hessians. Nothing is written: a resumed run
//! computes what it needs again, to the same bits. The layers before are taken as they are in the model, unquantized,
//! so no layer's bytes depend on another's quantizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_codegen::reference::Rotator;
use qp_codegen::spec::{Quantizer, Rotation};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::Error;
use crate::checkpoint::{self, CalibrationEntry};
use crate::codec::feedback::{Feedback, Hessian, Pieces};
use crate::engine::{self, CpuEngine, texts};
use crate::model::{Config, Role, Tokenizer, Weights};

/// Tokens of a text, unless the model's context is shorter.
const WINDOW: usize = 512;

/// The texts that a model is calibrated with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Texts {
    /// The model writes them itself.
    Own,
    /// A file of UTF-8 text.
    File(PathBuf),
}

/// How a model is calibrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibrate {
    /// The texts.
    pub texts: Texts,
    /// Tokens of all texts together, at most.
    pub tokens: usize,
}

/// A model on its way through the texts.
pub struct Calibration {
    config: Config,
    engine: CpuEngine,
    entry: CalibrationEntry,
    /// The residual stream of each text, before decoder layer `next`.
    streams: Vec<Vec<f32>>,
    next: usize,
    /// Of decoder layer `next - 1`, or, after the last, of the output layer: what enters the layers of a role, rotated.
    hessians: Vec<(Role, Rotation, Hessian)>,
    /// The last one made: layers that share an input often share it.
    last: Option<(Role, Rotation, Pieces, Option<Arc<Feedback>>)>,
}

impl Calibration {
    /// Prepares the texts for the model in `dir`. `progress` is told how many of all texts are there.
    ///
    /// # Errors
    /// If the texts cannot be read or written, or are shorter than one window.
    pub fn new(
        how: &Calibrate,
        dir: &Path,
        config: &Config,
        weights: &Arc<Weights>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, Error> {
        let window = WINDOW.min(config.max_positions);
        let wanted = how.tokens.div_ceil(window).max(1);
        let (name, texts) = match &how.texts {
            Texts::Own => {
                let mut all = Vec::new();
                for i in 0..wanted {
                    progress(i, wanted);
                    all.push(texts::write(None, config, weights, window, 0, i)?);
                }
                ("self", all)
            }
            Texts::File(path) => {
                let tokens = Tokenizer::read(dir)?.encode(&read_text(path)?)?;
                engine::check_tokens(&tokens, 0, tokens.len(), config.vocab)?;
                let windows: Vec<&[u32]> = tokens.chunks_exact(window).collect();
                if windows.is_empty() {
                    return Err(Error::ShortText { path: path.clone(), tokens: tokens.len(), window });
                }
                // Spread over the file.
                let count = wanted.min(windows.len());
                ("file", (0..count).map(|i| windows[i * windows.len() / count].to_vec()).collect())
            }
        };
        let mut hash = Sha256::new();
        texts.iter().flatten().for_each(|t| hash.update(t.to_le_bytes()));
        let entry = CalibrationEntry {
            texts: name.to_owned(),
            tokens: texts.len() * window,
            sha256: checkpoint::hex(&hash.finalize()),
        };
        let engine = CpuEngine::new(config, weights.clone(), window)?;
        let streams = texts.iter().map(|t| engine.embed(t)).collect();
        Ok(Calibration { config: config.clone(), engine, entry, streams, next: 0, hessians: vec![], last: None })
    }

    /// What the manifest says of it.
    pub fn entry(&self) -> &CalibrationEntry {
        &self.entry
    }

    /// What linear layer number `layer` (in the order of the plan) needs to be encoded by `q`; `None` if its inputs are
    /// all zero. `rotations` tells of each layer by what rotation it is still to be encoded, if at all; layers
    /// are asked for in their order.
    ///
    /// # Errors
    /// If its inputs are not finite.
    pub fn feedback(
        &mut self,
        layer: usize,
        name: &str,
        q: &Quantizer,
        rotations: &[Option<Rotation>],
    ) -> Result<Option<Arc<Feedback>>, Error> {
        let (block, role) = (layer / Role::ALL.len(), entrance(Role::ALL[layer % Role::ALL.len()]));
        while self.next <= block {
            self.last = None;
            let first = self.next * Role::ALL.len();
            self.advance(if self.next == block { &rotations[first..] } else { &[] });
        }
        let pieces = Pieces::new(&q.codes[0]);
        if let Some((r, rotation, p, made)) = &self.last
            && (*r, *rotation, p) == (role, q.rotation, &pieces)
        {
            return Ok(made.clone());
        }
        let of = |h: &&(Role, Rotation, Hessian)| (h.0, h.1) == (role, q.rotation);
        let (_, _, hessian) = self.hessians.iter().find(of).expect("asked for in order");
        if !hessian.mean().is_finite() {
            return Err(Error::Inputs { layer: name.to_owned() });
        }
        let made = Feedback::new(hessian, &pieces).map(Arc::new);
        self.last = Some((role, q.rotation, pieces, made.clone()));
        Ok(made)
    }

    /// Runs decoder layer `next`, or the last norm after them all, and sums Hessians for the linear layers that
    /// `rotations` has.
    fn advance(&mut self, rotations: &[Option<Rotation>]) {
        self.hessians.clear();
        let in_block = self.next < self.config.layers;
        for (role, rotation) in Role::ALL.into_iter().zip(rotations) {
            let role = entrance(role);
            let Some(rotation) = *rotation else { continue };
            if !self.hessians.iter().any(|(r, o, _)| (*r, *o) == (role, rotation)) {
                let columns = if in_block { self.config.shape(role).1 } else { self.config.hidden };
                self.hessians.push((role, rotation, Hessian::new(columns)));
            }
        }
        let Calibration { engine, hessians, .. } = self;
        let mut see = |role: Role, x: &[f32]| {
            for (_, rotation, hessian) in hessians.iter_mut().filter(|h| h.0 == role) {
                let columns = hessian.columns();
                let rotator = Rotator::new(*rotation, columns as u32);
                let mut x = x.to_vec();
                x.par_chunks_exact_mut(columns).for_each(|token| rotator.apply(token));
                hessian.add(&x);
            }
        };
        for x in &mut self.streams {
            if in_block {
                engine.layer(self.next, x, &mut see);
            } else {
                see(Role::Q, &engine.last_norm(x));
            }
        }
        self.next += 1;
    }
}

/// The first of the roles that read the same input.
fn entrance(role: Role) -> Role {
    match role {
        Role::Q | Role::K | Role::V => Role::Q,
        Role::O => Role::O,
        Role::Gate | Role::Up => Role::Gate,
        Role::Down => Role::Down,
    }
}

fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = std::fs::read(path).map_err(checkpoint::Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|e| Error::Text { path: path.to_owned(), at: e.utf8_error().valid_up_to() })
}

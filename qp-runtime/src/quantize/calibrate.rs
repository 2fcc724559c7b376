//! What enters the linear layers: the model runs over texts, decoder block by decoder block, and leaves the Hessians
//! of each.
//!
//! In memory are the residual streams of all texts, and one decoder block's Hessians. Nothing is written: a resumed run
//! computes what it needs again, to the same bits. The layers before are taken as they are in the model, unquantized,
//! so no layer's bytes depend on another's quantizer.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_codegen::reference::Rotator;
use qp_codegen::spec::Rotation;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::Error;
use crate::checkpoint::{self, CalibrationEntry};
use crate::codec::feedback::{Feedback, Hessian, Pieces};
use crate::engine::{self, Chunk, CpuEngine, Logits, PAGE, Room, texts};
use crate::input;
use crate::model::program::Node;
use crate::model::{Config, LayerId, Program, Tokenizer, Weights};
use crate::plan::Spec;

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
    program: Arc<Program>,
    engine: CpuEngine,
    entry: CalibrationEntry,
    texts: Vec<Vec<u32>>,
    /// Pages of a text: each begins anew in the same ones.
    pages: Vec<u32>,
    /// The residual stream of each text, before piece `next` of the program: a decoder block, or what follows the last.
    streams: Vec<Vec<f32>>,
    next: usize,
    /// Of piece `next - 1`: what enters the layers of one input, of which this is the first, rotated.
    hessians: Vec<(LayerId, Rotation, Hessian)>,
    /// The last one made: layers that share an input often share it.
    last: Option<(LayerId, Rotation, Pieces, Option<Arc<Feedback>>)>,
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
                    all.push(texts::write(None, config.bos, weights, window, 0, i)?);
                }
                ("self", all)
            }
            Texts::File(path) => {
                let tokens = Tokenizer::read(dir)?.encode(&input::text(path).map_err(Error::Text)?)?;
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
        let program = weights.program.clone();
        let mut engine = CpuEngine::new(weights.clone(), Room::one(window))?;
        let (first, pages) = (program.cuts[0], (0..window.div_ceil(PAGE) as u32).collect::<Vec<_>>());
        let streams = texts.iter().map(|text| {
            let mut values = engine.values();
            engine.run(0..first.node, &[chunk(text, &pages)], &mut values, |_, _| ControlFlow::Continue(()))?;
            Ok(values.take(first.stream))
        });
        let streams = streams.collect::<Result<_, engine::Error>>()?;
        Ok(Calibration { program, engine, entry, texts, pages, streams, next: 0, hessians: vec![], last: None })
    }

    /// What the manifest says of it.
    pub fn entry(&self) -> &CalibrationEntry {
        &self.entry
    }

    /// What a layer needs to be encoded by `spec`; `None` if its inputs are all zero. `rotations` tells of each layer of the
    /// program by what rotation it is still to be encoded, if at all; layers are asked for in their order.
    ///
    /// # Errors
    /// If its inputs are not finite.
    pub fn feedback(
        &mut self,
        layer: LayerId,
        name: &str,
        spec: &Spec,
        rotations: &[Option<Rotation>],
    ) -> Result<Option<Arc<Feedback>>, Error> {
        let node = self.program.node_of(layer).expect("an embedding has no inputs");
        let piece = self.program.cuts.iter().take_while(|c| c.node <= node).count() - 1;
        while self.next <= piece {
            self.last = None;
            self.advance(if self.next == piece { rotations } else { &[] })?;
        }
        let groups = self.program.nodes[node].groups();
        let first = groups.iter().find(|g| g.contains(&layer)).expect("a layer of the node")[0];
        let (rotation, pieces) = match spec {
            Spec::Quantizer(q) => (q.rotation, Pieces::new(&q.codes[0])),
            Spec::Format(f) => (spec.rotation(), f.pieces()),
        };
        if let Some((f, r, p, made)) = &self.last
            && (*f, *r, p) == (first, rotation, &pieces)
        {
            return Ok(made.clone());
        }
        let of = |h: &&(LayerId, Rotation, Hessian)| (h.0, h.1) == (first, rotation);
        let (_, _, hessian) = self.hessians.iter().find(of).expect("asked for in order");
        if !hessian.mean().is_finite() {
            return Err(Error::Inputs { layer: name.to_owned() });
        }
        let made = Feedback::new(hessian, &pieces).map(Arc::new);
        self.last = Some((first, rotation, pieces, made.clone()));
        Ok(made)
    }

    /// Runs piece `next` of the program, and sums Hessians for its layers that `rotations` has.
    fn advance(&mut self, rotations: &[Option<Rotation>]) -> Result<(), engine::Error> {
        self.hessians.clear();
        let Calibration { program, engine, hessians, texts, pages, streams, next, .. } = self;
        let (cut, behind) = (program.cuts[*next], program.cuts.get(*next + 1));
        let nodes = cut.node..behind.map_or(program.nodes.len(), |c| c.node);
        for group in program.nodes[nodes.clone()].iter().flat_map(Node::groups) {
            let first = group[0];
            for rotation in group.iter().filter_map(|id| *rotations.get(id.0)?) {
                if !hessians.iter().any(|(f, r, _)| (*f, *r) == (first, rotation)) {
                    hessians.push((first, rotation, Hessian::new(program.layer(first).cols)));
                }
            }
        }
        let head = program.head();
        for (text, stream) in texts.iter().zip(streams) {
            let mut values = engine.values();
            values.put(cut.stream, std::mem::take(stream));
            engine.run(nodes.clone(), &[chunk(text, pages)], &mut values, |layers, x| {
                for (_, rotation, hessian) in hessians.iter_mut().filter(|h| h.0 == layers[0]) {
                    let columns = hessian.columns();
                    let rotator = Rotator::new(*rotation, columns as u32);
                    let mut x = x.to_vec();
                    x.par_chunks_exact_mut(columns).for_each(|token| rotator.apply(token));
                    hessian.add(&x);
                }
                // Nobody asks for the logits.
                if layers[0] == head { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            if let Some(behind) = behind {
                *stream = values.take(behind.stream);
            }
        }
        *next += 1;
        Ok(())
    }
}

/// A whole text.
fn chunk<'a>(tokens: &'a [u32], pages: &'a [u32]) -> Chunk<'a> {
    Chunk { tokens, position: 0, pages, logits: Logits::All }
}

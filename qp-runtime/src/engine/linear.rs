//! Linear layers on the CPU.
//!
//! Where memory allows, the entries of quantized layers are decoded once, at a layer's first use, and kept: then a product
//! reads a byte a weight. So are the integers of formats whose products are exact; the weights of other formats are kept as floats,
//! at four bytes each. Results are the same either way, whatever the number of tokens and threads: sums are of integers, or in one
//! fixed order.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use qp_codegen::reference::{Activations, Rotator, quantize_activations};
use qp_codegen::spec::{Quantizer, Rotation};
use rayon::prelude::*;

use crate::codec::{Decoder, Entries, Lines, PackedMatrix, by_token, linear_of_lines, row_products};
use crate::memory::{self, arena::Arena, arena::Piece};
use crate::model::{Dtype, Linear, Tensor, Weight, Weights};

/// Weights of an unquantized matrix that one task multiplies, about.
const TASK: usize = 1 << 15;
/// Of the memory that is free, the part that decoded entries may take: one in so many.
const SHARE: u64 = 2;

/// What the quantized layers of a model need besides their weights, each made once.
#[derive(Debug, Default)]
pub struct Linears {
    decoders: Vec<(Arc<Quantizer>, Decoder)>,
    rotators: Vec<(Rotation, usize, Rotator)>,
    /// Entries of matrices, by the matrix' address, written out at its first use.
    kept: HashMap<usize, OnceLock<Option<Entries>>>,
    /// Weights of matrices of other formats, by the address of their bytes, written out at their first use.
    floats: HashMap<usize, OnceLock<Option<Piece<f32>>>>,
    /// The same where products are exact.
    lines: HashMap<usize, OnceLock<Option<Lines>>>,
    /// Where all of them lie.
    arena: Option<Arc<Arena>>,
    /// Turns the rows of a quantized embedding back.
    back: Option<Rotator>,
}

impl Linears {
    /// Prepares the layers of `weights`.
    pub fn new(weights: &Weights) -> Self {
        let mut out = Linears::default();
        weights.layers().iter().for_each(|layer| out.add(layer));
        out.keep(weights.layers().iter(), memory::available() / SHARE);
        for id in weights.program.ids().filter(|id| weights.program.is_embedding(*id)) {
            let embed = &weights[id];
            if let Weight::Quantized { quantizer, .. } = &embed.weight {
                out.back = Some(Rotator::inverse(quantizer.rotation, embed.cols as u32));
            }
        }
        out
    }

    /// Decides which of `layers` keep their entries or floats: the first that fit `bytes` together.
    fn keep<'w>(&mut self, layers: impl Iterator<Item = &'w Linear>, bytes: u64) {
        let mut taken = 0;
        for layer in layers {
            let (size, is_new) = match &layer.weight {
                Weight::Quantized { quantizer, matrix } => {
                    let is_new = !self.kept.contains_key(&address(matrix));
                    (Entries::bytes(quantizer, layer.rows, layer.cols), is_new)
                }
                Weight::Dense(tensor) if matches!(tensor.dtype, Dtype::Format(_)) => {
                    let address = address_of_bytes(tensor);
                    let is_new = !self.floats.contains_key(&address) && !self.lines.contains_key(&address);
                    match tensor.exact() {
                        Some((reader, _)) => (Lines::bytes(reader, layer.rows, layer.cols), is_new),
                        None => (Arena::bytes_of::<f32>(layer.rows * layer.cols), is_new),
                    }
                }
                Weight::Dense(_) => continue,
            };
            if !is_new || (taken + size) as u64 > bytes {
                continue;
            }
            taken += size;
            match &layer.weight {
                Weight::Quantized { matrix, .. } => drop(self.kept.insert(address(matrix), OnceLock::new())),
                Weight::Dense(tensor) if tensor.exact().is_some() => {
                    drop(self.lines.insert(address_of_bytes(tensor), OnceLock::new()));
                }
                Weight::Dense(tensor) => drop(self.floats.insert(address_of_bytes(tensor), OnceLock::new())),
            }
        }
        self.arena = Arena::new(taken);
    }

    fn add(&mut self, layer: &Linear) {
        let rotation = match &layer.weight {
            Weight::Dense(tensor) if tensor.exact().is_some() => Rotation::None,
            Weight::Dense(_) => return,
            Weight::Quantized { quantizer, .. } => {
                if self.decoder(quantizer).is_none() {
                    self.decoders.push((quantizer.clone(), Decoder::new(quantizer)));
                }
                quantizer.rotation
            }
        };
        if self.rotator(rotation, layer.cols).is_none() {
            // Shapes of a checked configuration fit u32.
            self.rotators.push((rotation, layer.cols, Rotator::new(rotation, layer.cols as u32)));
        }
    }

    fn decoder(&self, quantizer: &Arc<Quantizer>) -> Option<&Decoder> {
        self.decoders.iter().find(|(q, _)| Arc::ptr_eq(q, quantizer)).map(|(_, d)| d)
    }

    fn rotator(&self, rotation: Rotation, cols: usize) -> Option<&Rotator> {
        self.rotators.iter().find(|(r, n, _)| (*r, *n) == (rotation, cols)).map(|(_, _, r)| r)
    }

    /// The embeddings of `tokens`, which lie within `embed`: tokens × columns.
    pub fn look_up(&self, embed: &Linear, tokens: &[u32]) -> Vec<f32> {
        match &embed.weight {
            Weight::Dense(table) => {
                let mut x = vec![0f32; tokens.len() * embed.cols];
                for (row, &t) in x.chunks_exact_mut(embed.cols).zip(tokens) {
                    table.read(t as usize * embed.cols, row);
                }
                x
            }
            Weight::Quantized { quantizer, matrix } => {
                let mut x = self.decoder(quantizer).expect("added by new").rows(matrix, tokens);
                let back = self.back.as_ref().expect("made by new");
                x.par_chunks_exact_mut(embed.cols).for_each(|row| back.apply(row));
                x
            }
        }
    }

    /// Several linear layers of one input `x` (tokens × columns): tokens × rows each. The input is rotated and rounded
    /// once for all layers that share a rotation.
    pub fn apply(&self, layers: &[&Linear], x: &[f32]) -> Option<Vec<Vec<f32>>> {
        let mut prepared: Vec<(Rotation, Vec<Activations>)> = Vec::new();
        let one = |layer: &&Linear| {
            let rotation = match &layer.weight {
                Weight::Dense(w) => w.exact().map(|_| Rotation::None),
                Weight::Quantized { quantizer, .. } => Some(quantizer.rotation),
            };
            let tokens = rotation.map(|rotation| {
                let at = prepared.iter().position(|(r, _)| *r == rotation).unwrap_or_else(|| {
                    prepared.push((rotation, self.prepare(rotation, layer.cols, x)));
                    prepared.len() - 1
                });
                &prepared[at].1[..]
            });
            if tokens.is_some_and(|tokens| tokens.iter().any(|token| !token.scale.is_finite())) {
                return None;
            }
            let mut y = match (&layer.weight, tokens) {
                (Weight::Quantized { quantizer, matrix }, Some(tokens)) => {
                    let decoder = self.decoder(quantizer).expect("added by new");
                    let all = || decoder.entries(matrix, self.arena.as_ref()?);
                    let kept = self.kept.get(&address(matrix)).and_then(|k| k.get_or_init(all).as_ref());
                    decoder.linear(matrix, kept, tokens)
                }
                (Weight::Dense(w), Some(tokens)) => {
                    let (reader, tensors) = w.exact()?;
                    let all = || Lines::new(reader, &tensors, self.arena.as_ref()?);
                    let kept = self.lines.get(&address_of_bytes(w)).and_then(|k| k.get_or_init(all).as_ref());
                    linear_of_lines(reader, &tensors, kept, tokens)
                }
                (Weight::Dense(w), None) => {
                    let all = || all(w, layer.cols, self.arena.as_ref()?);
                    let kept = self.floats.get(&address_of_bytes(w)).and_then(|k| k.get_or_init(all).as_deref());
                    dense(w, kept, layer.rows, layer.cols, x)
                }
                (Weight::Quantized { .. }, None) => return None,
            };
            if let Some(bias) = &layer.bias {
                y.chunks_exact_mut(layer.rows).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
            Some(y)
        };
        layers.iter().map(one).collect()
    }

    fn prepare(&self, rotation: Rotation, cols: usize, x: &[f32]) -> Vec<Activations> {
        let rotator = self.rotator(rotation, cols).expect("added by new");
        let one = |x: &[f32]| {
            let mut x = x.to_vec();
            rotator.apply(&mut x);
            quantize_activations(&x)
        };
        x.par_chunks_exact(cols).map(one).collect()
    }
}

/// Where a matrix lies: what tells it from others.
fn address(matrix: &Arc<PackedMatrix>) -> usize {
    Arc::as_ptr(matrix).addr()
}

/// Where a tensor's bytes lie, which live as long as the model.
fn address_of_bytes(tensor: &Tensor) -> usize {
    tensor.bytes().as_ptr().addr()
}

/// All weights of a matrix, if `arena` has room for them.
fn all(w: &Tensor, cols: usize, arena: &Arc<Arena>) -> Option<Piece<f32>> {
    let mut out = arena.take(w.len())?;
    let task = (TASK / cols.max(1)).max(1).next_multiple_of(w.band()) * cols.max(1);
    out.par_chunks_mut(task).enumerate().for_each(|(i, part)| w.read(i * task, part));
    Some(out)
}

/// `x·Wᵀ`: tokens × rows. `kept` are the weights, if they were written out.
fn dense(w: &Tensor, kept: Option<&[f32]>, rows: usize, cols: usize, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / cols;
    // Rows that are read together, and how many bands of them are a task.
    let band = if kept.is_some() { 1 } else { w.band() };
    let task = (TASK / cols.max(1)).max(1).next_multiple_of(band);
    // Rows × tokens, so that the rows of tasks are apart.
    let mut by_row = vec![0f32; rows * tokens];
    by_row.par_chunks_mut((task * tokens).max(1)).enumerate().for_each_init(
        || vec![0f32; band * cols],
        |buffer, (i, out)| {
            for (b, out) in out.chunks_mut((band * tokens).max(1)).enumerate() {
                let (start, len) = ((i * task + b * band) * cols, out.len() / tokens * cols);
                let weights = match kept {
                    Some(kept) => &kept[start..start + len],
                    None => {
                        w.read(start, &mut buffer[..len]);
                        &buffer[..len]
                    }
                };
                for (weights, out) in weights.chunks_exact(cols).zip(out.chunks_exact_mut(tokens)) {
                    row_products(weights, x, out);
                }
            }
        },
    );
    by_token(by_row, tokens)
}

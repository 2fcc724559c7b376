//! Linear layers on the CPU.
//!
//! Where memory allows, the integers of quantized layers, and of formats whose products are exact, are decoded once, at a layer's
//! first use, and kept as [`Strips`]: then a product reads a byte a weight or less. The weights of other formats are kept as floats,
//! at four bytes each. Results are the same either way, whatever the number of tokens and threads: sums are of integers, or in one
//! fixed order.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use qp_codegen::reader::Turned;
use qp_codegen::reference::{Activations, Rotator, quantize_activations};
use qp_codegen::spec::{Quantizer, Rotation};
use rayon::prelude::*;

use crate::codec::simd::for_each_instruction_set;
use crate::codec::{Decoded, Decoder, Inputs, Lines, Product, Source, Strips, by_token, products, row_products};
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
    /// What is done to activations and results of matrices of formats, by [`address`].
    turned: HashMap<usize, [Turned; 2]>,
    /// Matrices that are kept decoded, by [`address`]; each is written out at its first use.
    kept: HashMap<usize, OnceLock<Option<Kept>>>,
    /// Where all of them lie.
    arena: Option<Arc<Arena>>,
    /// Turns the rows of a quantized embedding back.
    back: Option<Rotator>,
}

/// A matrix, decoded.
#[derive(Debug)]
enum Kept {
    /// Integers, where products are exact.
    Strips(Strips),
    /// Weights.
    Floats(Piece<f32>),
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

    /// Decides which of `layers` are kept decoded: the first that fit `bytes` together.
    fn keep<'w>(&mut self, layers: impl Iterator<Item = &'w Linear>, bytes: u64) {
        let mut taken = 0;
        for layer in layers {
            let size = match &layer.weight {
                Weight::Quantized { quantizer, .. } => Decoded::form(quantizer, layer.rows, layer.cols).bytes(),
                Weight::Dense(tensor) => match (&tensor.dtype, tensor.exact()) {
                    (_, Some((reader, _))) => Lines::form(reader).expect("products are exact").bytes(),
                    (Dtype::Format(_), None) => Arena::bytes_of::<f32>(layer.rows * layer.cols),
                    (Dtype::F32 | Dtype::F16 | Dtype::Bf16, None) => continue,
                },
            };
            let address = address(&layer.weight);
            if !self.kept.contains_key(&address) && (taken + size) as u64 <= bytes {
                taken += size;
                self.kept.insert(address, OnceLock::new());
            }
        }
        self.arena = Arena::new(taken);
    }

    fn add(&mut self, layer: &Linear) {
        let rotation = match &layer.weight {
            Weight::Dense(tensor) => {
                let Some((reader, tensors)) = tensor.exact() else { return };
                if reader.terms().is_some_and(|terms| !terms.sides.is_empty()) {
                    self.turned.extend(reader.turned(&tensors).map(|turned| (address(&layer.weight), turned)));
                    return;
                }
                Rotation::None
            }
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
    /// once for all layers that share a rotation, and their products are computed together. `None` if what is rounded is not
    /// finite.
    pub fn apply(&self, layers: &[&Linear], x: &[f32]) -> Option<Vec<Vec<f32>>> {
        let sources: Vec<Option<(Entry<'_>, Box<dyn Source + '_>)>> = layers.iter().map(|l| self.source(l)).collect();
        let mut prepared: Vec<(Entry<'_>, Inputs)> = Vec::new();
        for (layer, (entry, _)) in layers.iter().zip(&sources).filter_map(|(l, s)| Some((l, s.as_ref()?))) {
            if prepared.iter().all(|(e, _)| e != entry) {
                prepared.push((*entry, self.prepare(*entry, layer.cols, x)));
            }
        }
        if !prepared.iter().all(|(_, inputs)| inputs.are_finite()) {
            return None;
        }
        let exact = layers.iter().zip(&sources).filter_map(|(layer, source)| {
            let (entry, source) = source.as_ref()?;
            let kept = self.kept(layer, |arena| Strips::new(&**source, arena).map(Kept::Strips));
            let kept = kept.and_then(|kept| if let Kept::Strips(strips) = kept { Some(strips) } else { None });
            let (_, inputs) = prepared.iter().find(|(e, _)| e == entry)?;
            Some(Product { source: &**source, kept, inputs })
        });
        let mut exact = products(&exact.collect::<Vec<_>>()).into_iter();
        let one = |(layer, source): (&&Linear, &Option<_>)| {
            let mut y = match (&layer.weight, source) {
                (Weight::Dense(w), None) => {
                    let kept = self.kept(layer, |arena| all(w, layer.cols, arena).map(Kept::Floats));
                    let kept = kept.and_then(|kept| if let Kept::Floats(all) = kept { Some(&all[..]) } else { None });
                    dense(w, kept, layer.rows, layer.cols, x)
                }
                _ => exact.next()?,
            };
            if let Some((Entry::Turned([_, turned]), _)) = source {
                y.par_chunks_exact_mut(layer.rows).for_each(|y| turned.leave(y));
            }
            if let Some(bias) = &layer.bias {
                y.chunks_exact_mut(layer.rows).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
            Some(y)
        };
        layers.iter().zip(&sources).map(one).collect()
    }

    /// The matrix of a layer whose products are exact, and what is done to its inputs.
    fn source<'a>(&'a self, layer: &'a Linear) -> Option<(Entry<'a>, Box<dyn Source + 'a>)> {
        Some(match &layer.weight {
            Weight::Quantized { quantizer, matrix } => {
                let decoder = self.decoder(quantizer).expect("added by new");
                (Entry::Rotated(quantizer.rotation), Box::new(decoder.matrix(matrix)))
            }
            Weight::Dense(tensor) => {
                let (reader, tensors) = tensor.exact()?;
                let turned = self.turned.get(&address(&layer.weight));
                let entry = turned.map_or(Entry::Rotated(Rotation::None), Entry::Turned);
                (entry, Box::new(Lines::new(reader, tensors)))
            }
        })
    }

    /// The layer's matrix, decoded, if it is kept; at its first use `write` writes it out.
    fn kept(&self, layer: &Linear, write: impl FnOnce(&Arc<Arena>) -> Option<Kept>) -> Option<&Kept> {
        self.kept.get(&address(&layer.weight))?.get_or_init(|| write(self.arena.as_ref()?)).as_ref()
    }

    fn prepare(&self, entry: Entry<'_>, cols: usize, x: &[f32]) -> Inputs {
        let tokens = x.par_chunks_exact(cols);
        let rounded: Vec<Activations> = match entry {
            Entry::Rotated(rotation) => {
                let rotator = self.rotator(rotation, cols).expect("added by new");
                tokens.map(|x| rounded(rotator, x)).collect()
            }
            Entry::Turned([turned, _]) => tokens.map(|x| turned.entered(x)).collect(),
        };
        Inputs::new(rounded, cols)
    }
}

/// What is done to a layer's inputs before they are rounded.
#[derive(Clone, Copy)]
enum Entry<'a> {
    /// A rotation, which layers may share.
    Rotated(Rotation),
    /// What a format does for this matrix; and to its results.
    Turned(&'a [Turned; 2]),
}

impl PartialEq for Entry<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Entry::Rotated(a), Entry::Rotated(b)) => a == b,
            (Entry::Turned(a), Entry::Turned(b)) => std::ptr::eq(*a, *b),
            (Entry::Rotated(_), Entry::Turned(_)) | (Entry::Turned(_), Entry::Rotated(_)) => false,
        }
    }
}

for_each_instruction_set! {
    /// A token's input, rotated and rounded.
    fn rounded[R](rotator: &Rotator, x: &[f32]) -> Activations {
        let mut x = x.to_vec();
        rotator.apply(&mut x);
        quantize_activations(&x)
    }
}

/// Where a matrix lies, which tells it from others as long as the model lives.
fn address(weight: &Weight) -> usize {
    match weight {
        Weight::Quantized { matrix, .. } => Arc::as_ptr(matrix).addr(),
        Weight::Dense(tensor) => tensor.bytes().as_ptr().addr(),
    }
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

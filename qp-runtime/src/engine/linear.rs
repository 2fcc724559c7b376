//! Linear layers on the CPU.

use std::sync::Arc;

use qp_codegen::kernels::dense as row_product;
use qp_codegen::reference::{Activations, Rotator, quantize_activations};
use qp_codegen::spec::{Quantizer, Rotation};
use rayon::prelude::*;

use crate::codec::Decoder;
use crate::matrix::{View, multiply};
use crate::model::{Linear, Tensor, Weight, Weights};

/// Rows of a matrix that one task multiplies.
const ROWS: usize = 64;
/// Up to so many tokens, rows are multiplied one dot product at a time; beyond, by `gemm`.
const FEW_TOKENS: usize = 4;

/// What the quantized layers of a model need besides their weights, each made once.
#[derive(Debug, Default)]
pub struct Linears {
    decoders: Vec<(Arc<Quantizer>, Decoder)>,
    rotators: Vec<(Rotation, usize, Rotator)>,
    /// Turns the rows of a quantized embedding back.
    back: Option<Rotator>,
}

impl Linears {
    /// Prepares the layers of `weights`.
    pub fn new(weights: &Weights) -> Self {
        let mut out = Linears::default();
        weights.layers().iter().for_each(|layer| out.add(layer));
        for id in weights.program.ids().filter(|id| weights.program.is_embedding(*id)) {
            let embed = &weights[id];
            if let Weight::Quantized { quantizer, .. } = &embed.weight {
                out.back = Some(Rotator::inverse(quantizer.rotation, embed.cols as u32));
            }
        }
        out
    }

    fn add(&mut self, layer: &Linear) {
        match &layer.weight {
            Weight::Dense(_) => (),
            Weight::Quantized { quantizer, .. } => {
                if self.decoder(quantizer).is_none() {
                    self.decoders.push((quantizer.clone(), Decoder::new(quantizer)));
                }
                if self.rotator(quantizer.rotation, layer.cols).is_none() {
                    // Shapes of a checked configuration fit u32.
                    let rotator = Rotator::new(quantizer.rotation, layer.cols as u32);
                    self.rotators.push((quantizer.rotation, layer.cols, rotator));
                }
            }
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
    pub fn apply(&self, layers: &[&Linear], x: &[f32]) -> Vec<Vec<f32>> {
        let mut prepared: Vec<(Rotation, Vec<Activations>)> = Vec::new();
        let one = |layer: &&Linear| {
            let mut y = match &layer.weight {
                Weight::Dense(w) => dense(w, layer.rows, layer.cols, x),
                Weight::Quantized { quantizer, matrix } => {
                    let rotation = quantizer.rotation;
                    let at = prepared.iter().position(|(r, _)| *r == rotation).unwrap_or_else(|| {
                        prepared.push((rotation, self.prepare(rotation, layer.cols, x)));
                        prepared.len() - 1
                    });
                    self.decoder(quantizer).expect("added by new").linear(matrix, &prepared[at].1)
                }
            };
            if let Some(bias) = &layer.bias {
                y.chunks_exact_mut(layer.rows).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
            y
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

/// `x·Wᵀ`: tokens × rows.
fn dense(w: &Tensor, rows: usize, cols: usize, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / cols;
    let starts: Vec<usize> = (0..rows).step_by(ROWS).collect();
    // One tile a task, tokens × its rows.
    let tiles: Vec<Vec<f32>> = starts
        .par_iter()
        .map_init(Vec::new, |weights, &start| {
            let n = ROWS.min(rows - start);
            weights.resize(n * cols, 0f32);
            w.read(start * cols, weights);
            let mut tile = vec![0f32; tokens * n];
            if tokens <= FEW_TOKENS {
                for (x, out) in x.chunks_exact(cols).zip(tile.chunks_exact_mut(n)) {
                    for (o, w) in out.iter_mut().zip(weights.chunks_exact(cols)) {
                        *o = row_product::reference(w, x);
                    }
                }
            } else {
                let (x, w) = (View::rows(x, cols), View::rows(weights, cols).transposed());
                multiply([tokens, n, cols], &mut tile, n, 0.0, x, w, 1.0);
            }
            tile
        })
        .collect();
    let mut y = vec![0f32; tokens * rows];
    for (&start, tile) in starts.iter().zip(&tiles) {
        let n = tile.len() / tokens;
        for (y, part) in y.chunks_exact_mut(rows).zip(tile.chunks_exact(n)) {
            y[start..start + n].copy_from_slice(part);
        }
    }
    y
}

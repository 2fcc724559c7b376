//! A model's tensors, each in its place.

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use qp_codegen::spec::Quantizer;

use super::program::{Layer, LayerId, Norm, Program, VectorId};
use super::{Error, Tensor, TensorDir};
use crate::codec::PackedMatrix;

/// Name of the output layer.
pub const HEAD: &str = "lm_head";
/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens";

/// Where tensors come from: a plain model directory or a quantized checkpoint.
pub trait Source {
    /// The dense tensor `name`.
    ///
    /// # Errors
    /// If it is missing or not of floats.
    fn tensor(&self, name: &str) -> Result<Tensor, Error>;

    /// The weight of the linear layer `name` (without `.weight`), of `rows × cols`.
    ///
    /// # Errors
    /// If it is missing, damaged or of another shape.
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, Error>;

    /// Names of the tensors of the layer `name`, if a format has it.
    fn tensors_of(&self, name: &str) -> Vec<String> {
        let _ = name;
        Vec::new()
    }

    /// Names of layers that a plan launches together, group by group.
    fn groups(&self) -> Vec<Vec<String>> {
        Vec::new()
    }

    /// Names of all tensors.
    fn names(&self) -> Vec<String>;

    /// Checks beforehand and on all cores what is checked otherwise when it is first read.
    ///
    /// # Errors
    /// If something is damaged.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// True if the layer `name` is quantized by itself. So may be an output layer that is tied to the embedding.
    fn is_quantized(&self, name: &str) -> bool {
        let _ = name;
        false
    }
}

impl Source for TensorDir {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        TensorDir::tensor(self, name)
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, Error> {
        shaped(self, &format!("{name}.weight"), &[rows, cols]).map(Weight::Dense)
    }

    fn names(&self) -> Vec<String> {
        TensorDir::names(self).map(str::to_owned).collect()
    }
}

/// The matrix of a layer.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Floats, rows × columns.
    Dense(Tensor),
    /// Rotated along its columns, divided by its scales and packed.
    Quantized {
        /// By what.
        quantizer: Arc<Quantizer>,
        /// Words and scales.
        matrix: Arc<PackedMatrix>,
    },
}

impl Weight {
    /// True if both are one matrix in memory.
    pub fn is(&self, other: &Weight) -> bool {
        match (self, other) {
            (Weight::Dense(a), Weight::Dense(b)) => a.bytes().as_ptr() == b.bytes().as_ptr(),
            (Weight::Quantized { matrix: a, .. }, Weight::Quantized { matrix: b, .. }) => Arc::ptr_eq(a, b),
            (Weight::Dense(_), Weight::Quantized { .. }) | (Weight::Quantized { .. }, Weight::Dense(_)) => false,
        }
    }

    /// The matrix itself, unless it is quantized.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Weight::Dense(t) => Some(t),
            Weight::Quantized { .. } => None,
        }
    }
}

/// A linear layer: `y = W·x + bias`. Also an embedding, of which rows are looked up.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Full name, without `.weight`.
    pub name: String,
    /// Out features.
    pub rows: usize,
    /// In features.
    pub cols: usize,
    /// W.
    pub weight: Weight,
    /// `rows` values, if there is a bias.
    pub bias: Option<Vec<f32>>,
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// What is computed with them.
    pub program: Arc<Program>,
    layers: Vec<Linear>,
    vectors: Vec<Vec<f32>>,
    /// Layers that the plan launches together, group by group.
    pub groups: Vec<Vec<LayerId>>,
}

impl Index<LayerId> for Weights {
    type Output = Linear;

    fn index(&self, id: LayerId) -> &Linear {
        &self.layers[id.0]
    }
}

impl IndexMut<LayerId> for Weights {
    fn index_mut(&mut self, id: LayerId) -> &mut Linear {
        &mut self.layers[id.0]
    }
}

impl Index<VectorId> for Weights {
    type Output = [f32];

    fn index(&self, id: VectorId) -> &[f32] {
        &self.vectors[id.0]
    }
}

impl Weights {
    /// Collects what `program` names from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape than `program` says.
    pub fn load(program: &Arc<Program>, source: &dyn Source) -> Result<Self, Error> {
        let vector = |name: &str, len: usize| shaped(source, name, &[len]).map(|t| t.to_f32());
        let shared = |layer: &Layer| layer.shares.filter(|_| !source.is_quantized(&layer.name));
        let mut own = Vec::with_capacity(program.layers.len());
        for layer in &program.layers {
            let load = || source.linear(&layer.name, layer.rows, layer.cols);
            own.push(if shared(layer).is_some() { None } else { Some(load()?) });
        }
        let weight_of = |id: LayerId| own[id.0].clone().expect("a shared matrix is another layer's own");
        let experts = program.expert_layers();
        let mut layers = Vec::with_capacity(program.layers.len());
        for id in program.ids() {
            let layer = program.layer(id);
            let Layer { name, rows, cols, bias, shares: _ } = layer.clone();
            let weight = match weight_of(shared(layer).unwrap_or(id)) {
                // What a matrix has of its own, factors of activations or a table, products of pairs of tokens and experts have not.
                Weight::Dense(tensor) if experts[id.0] && tensor.is_apart() => Weight::Dense(tensor.as_floats()),
                weight => weight,
            };
            let bias = bias.then(|| vector(&format!("{name}.bias"), rows)).transpose()?;
            layers.push(Linear { name, rows, cols, weight, bias });
        }
        let vectors = program.vectors.iter().map(|v| vector(&v.tensor, v.len)).collect::<Result<_, _>>()?;
        let ids = |group: Vec<String>| group.iter().filter_map(|name| program.named(name)).collect();
        let groups = source.groups().into_iter().map(ids).collect();
        Ok(Weights { program: program.clone(), layers, vectors, groups })
    }

    /// The weights of a norm of heads as attention takes them: with the 1 that some norms add.
    pub fn of_heads(&self, norm: &Norm) -> Vec<f32> {
        self[norm.weight].iter().map(|w| if norm.norm.add_one { w + 1.0 } else { *w }).collect()
    }

    /// Replaces the matrix of a layer, and of those that have the same.
    pub fn replace(&mut self, id: LayerId, weight: Weight) {
        let before = std::mem::replace(&mut self[id].weight, weight.clone());
        for other in self.program.ids() {
            if self.program.layer(other).shares == Some(id) && self[other].weight.is(&before) {
                self[other].weight = weight.clone();
            }
        }
    }

    /// All layers, in the order of the program.
    pub fn layers(&self) -> &[Linear] {
        &self.layers
    }
}

/// The dense tensor `name`, which must have `shape`.
pub(crate) fn shaped(source: &dyn Source, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
    let t = source.tensor(name)?;
    if t.shape != shape {
        return Err(Error::Shape { name: name.to_owned(), found: t.shape, expected: shape.to_vec() });
    }
    Ok(t)
}

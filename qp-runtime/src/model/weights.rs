//! A model's tensors, each in its place.

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use qp_codegen::spec::Quantizer;

use super::config::{Config, Role};
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

/// A decoder layer; its linear layers by [`Role`].
#[derive(Clone, Debug)]
pub struct Layer {
    /// Weight of the RMS norm before attention, `hidden` values.
    pub input_norm: Vec<f32>,
    /// Weight of the RMS norm before the feed-forward layer, `hidden` values.
    pub post_norm: Vec<f32>,
    linears: [Linear; 7],
}

impl Index<Role> for Layer {
    type Output = Linear;

    fn index(&self, role: Role) -> &Linear {
        &self.linears[role as usize]
    }
}

impl IndexMut<Role> for Layer {
    fn index_mut(&mut self, role: Role) -> &mut Linear {
        &mut self.linears[role as usize]
    }
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Token embeddings, vocab × hidden, a row a token.
    pub embed: Linear,
    /// Decoder layers.
    pub layers: Vec<Layer>,
    /// Weight of the last RMS norm, `hidden` values.
    pub norm: Vec<f32>,
    /// Output layer, vocab × hidden. If it is tied and not quantized by itself, its matrix is that of `embed`.
    pub head: Linear,
}

impl Weights {
    /// Collects what `config` asks for from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape than `config` says.
    pub fn load(config: &Config, source: &dyn Source) -> Result<Self, Error> {
        let vector = |name: &str, len: usize| shaped(source, name, &[len]).map(|t| t.to_f32());
        let linear = |name: String, role: Role| {
            let (rows, cols) = config.shape(role);
            let weight = source.linear(&name, rows, cols)?;
            let bias = config.has_bias(role).then(|| vector(&format!("{name}.bias"), rows)).transpose()?;
            Ok::<_, Error>(Linear { name, rows, cols, weight, bias })
        };
        let layers = (0..config.layers).map(|i| {
            let [q, k, v, o, gate, up, down] = Role::ALL.map(|role| linear(config.linear_name(i, role), role));
            Ok(Layer {
                input_norm: vector(&format!("model.layers.{i}.input_layernorm.weight"), config.hidden)?,
                post_norm: vector(&format!("model.layers.{i}.post_attention_layernorm.weight"), config.hidden)?,
                linears: [q?, k?, v?, o?, gate?, up?, down?],
            })
        });
        let layers = layers.collect::<Result<Vec<_>, Error>>()?;
        let (rows, cols) = (config.vocab, config.hidden);
        let of_tokens = |name: &str, weight| Linear { name: name.to_owned(), rows, cols, weight, bias: None };
        let embed = of_tokens(EMBEDDING, source.linear(EMBEDDING, rows, cols)?);
        let weight = match config.tied && !source.is_quantized(HEAD) {
            true => embed.weight.clone(),
            false => source.linear(HEAD, rows, cols)?,
        };
        let head = of_tokens(HEAD, weight);
        Ok(Weights { embed, layers, norm: vector("model.norm.weight", config.hidden)?, head })
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

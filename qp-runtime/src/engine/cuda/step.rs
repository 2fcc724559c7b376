//! One step of a model as a list of launches: what each is, which kernel it takes, what it reads and writes.

use std::ops::Index;

use qp_codegen::kernels::add::{self, Add};
use qp_codegen::kernels::append::{self, Append};
use qp_codegen::kernels::argmax::{self, Argmax};
use qp_codegen::kernels::attention::{self, Attention};
use qp_codegen::kernels::dense::{self, Dense};
use qp_codegen::kernels::embed::{self, Embed};
use qp_codegen::kernels::embed_packed::EmbedPacked;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::glu::{self, Glu};
use qp_codegen::kernels::norm::{self, Norm};
use qp_codegen::kernels::prepare::Prepare;

use super::linear::Floats;
use crate::device::ops::{
    DeviceActivations, DeviceMatrix, EmbedPackedKernel, Faults, GemvKernel, PrepareInputs, PrepareKernel,
};
use crate::device::{Buffer, DeviceError, Executor, Loaded, Recorder, launches};

/// A buffer of `f32` that launches hand on to each other, a row a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hand {
    /// The residual stream.
    Residual,
    /// After a norm, for unquantized layers.
    Normed,
    /// What attention gives.
    Attended,
    /// Inside the feed-forward layer.
    Inner,
    /// Logits.
    Logits,
    /// Outputs of product 0, 1 or 2 of a group.
    Product(usize),
}

impl Hand {
    /// Number of buffers.
    pub const COUNT: usize = 8;

    /// Its place among them.
    pub fn index(self) -> usize {
        match self {
            Hand::Residual => 0,
            Hand::Normed => 1,
            Hand::Attended => 2,
            Hand::Inner => 3,
            Hand::Logits => 4,
            Hand::Product(p) => 5 + p,
        }
    }
}

/// What launches write.
pub struct State {
    /// One a token.
    pub tokens: Buffer<i32>,
    /// Position of token 0.
    pub position: Buffer<i32>,
    /// The likeliest next token.
    pub best: Buffer<i32>,
    /// By [`Hand::index`].
    pub hands: Vec<Buffer<f32>>,
    /// Activations as integers.
    pub activations: DeviceActivations,
    /// Not 0 once values were not finite.
    pub fault: Buffer<i32>,
    /// Keys and values of each layer: `kv_heads × context × head_dim`.
    pub cache: Vec<(Buffer<f32>, Buffer<f32>)>,
}

/// All hands but the one that is written.
struct Others<'a> {
    before: &'a [Buffer<f32>],
    after: &'a [Buffer<f32>],
}

impl Index<Hand> for Others<'_> {
    type Output = Buffer<f32>;

    fn index(&self, hand: Hand) -> &Buffer<f32> {
        let (i, n) = (hand.index(), self.before.len());
        if i < n { &self.before[i] } else { &self.after[i - n - 1] }
    }
}

/// The hand that a launch writes, and those it may read.
fn split(hands: &mut [Buffer<f32>], written: Hand) -> (&mut Buffer<f32>, Others<'_>) {
    let (before, rest) = hands.split_at_mut(written.index());
    let (written, after) = rest.split_first_mut().expect("a hand");
    (written, Others { before, after })
}

/// One launch. Fields named as the kernel's parameters are what those are given.
pub enum Step<'n> {
    /// The tokens' embeddings.
    Embed { op: Embed, table: &'n Floats, y: Hand },
    /// The same from a quantized matrix.
    EmbedPacked { op: EmbedPacked<'n>, hash: &'n str, matrix: &'n DeviceMatrix, y: Hand },
    /// A norm before unquantized layers.
    Norm { op: Norm, x: Hand, norm: &'n Buffer<f32>, y: Hand },
    /// Activations to integers; `norm` is any buffer if the operation has none.
    Prepare { op: Prepare, input: Hand, norm: &'n Buffer<f32> },
    /// A product with a quantized matrix.
    Gemv { op: Gemv<'n>, hash: &'n str, matrix: &'n DeviceMatrix, y: Hand },
    /// A product with an unquantized one.
    Dense { op: Dense, weights: &'n Floats, x: Hand, y: Hand },
    /// One hand onto another.
    Add { op: Add, x: Hand, y: Hand },
    /// A bias onto a hand.
    Bias { op: Add, x: &'n Buffer<f32>, y: Hand },
    /// New keys and values into the cache of a layer.
    Append { op: Append, layer: usize, k: Hand, v: Hand },
    /// Attention of a layer.
    Attention { op: Attention, layer: usize, q: Hand, y: Hand },
    /// The gated unit.
    Glu { op: Glu, gate: Hand, up: Hand, y: Hand },
    /// The likeliest token.
    Argmax { op: Argmax, logits: Hand },
}

/// A kernel that is ready to be launched, with what belongs to it.
pub enum Ready {
    /// Nothing.
    Plain(Loaded),
    /// Where blocks meet.
    Gemv(GemvKernel),
    /// The rotation.
    Prepare(PrepareKernel),
    /// The rotation's inverse.
    EmbedPacked(EmbedPackedKernel),
}

/// Cosines and sines of all positions.
pub struct Angles {
    /// Positions × half the width of a head.
    pub cos: Buffer<f32>,
    /// The same.
    pub sin: Buffer<f32>,
}

impl Step<'_> {
    /// Turns the outputs of a linear layer to another hand.
    pub fn write_to(&mut self, hand: Hand) {
        match self {
            Step::Gemv { y, .. } | Step::Dense { y, .. } | Step::Bias { y, .. } => *y = hand,
            Step::Prepare { .. }
            | Step::Norm { .. }
            | Step::Embed { .. }
            | Step::EmbedPacked { .. }
            | Step::Add { .. }
            | Step::Append { .. }
            | Step::Attention { .. }
            | Step::Glu { .. }
            | Step::Argmax { .. } => (),
        }
    }

    /// Equal for launches of the same kernel.
    pub fn key(&self) -> String {
        match self {
            Step::Embed { op, .. } => format!("{op:?}"),
            Step::EmbedPacked { op, hash, .. } => format!("embed {hash} {:?} {} {:?}", op.shape, op.batch, op.y),
            Step::Norm { op, .. } => format!("{op:?}"),
            Step::Prepare { op, .. } => format!("{op:?}"),
            Step::Gemv { op, hash, .. } => format!("gemv {hash} {:?} {} {}", op.shape, op.batch, op.accumulate),
            Step::Dense { op, .. } => format!("{op:?}"),
            Step::Add { op, .. } | Step::Bias { op, .. } => format!("{op:?}"),
            Step::Append { op, .. } => format!("{op:?}"),
            Step::Attention { op, .. } => format!("{op:?}"),
            Step::Glu { op, .. } => format!("{op:?}"),
            Step::Argmax { op, .. } => format!("{op:?}"),
        }
    }

    /// Makes its kernel ready, unless it is a product: see [`tune::load`](crate::device::tune::load).
    ///
    /// # Errors
    /// Those of the executor.
    ///
    /// # Panics
    /// If it is a product.
    pub fn load(&self, on: &Executor) -> Result<Ready, DeviceError> {
        use launches as args;
        Ok(Ready::Plain(match self {
            Step::Prepare { op, .. } => return PrepareKernel::load(on, op).map(Ready::Prepare),
            Step::Gemv { .. } => unreachable!("products are loaded with all their matrices at hand"),
            Step::EmbedPacked { op, .. } => return EmbedPackedKernel::load(on, op).map(Ready::EmbedPacked),
            Step::Embed { op, table: Floats::F16(_), .. } => on.load::<args::Embed<'_, half::f16>>(embed::lower(op))?,
            Step::Embed { op, table: Floats::Bf16(_), .. } => {
                on.load::<args::Embed<'_, half::bf16>>(embed::lower(op))?
            }
            Step::Embed { op, table: Floats::F32(_), .. } => on.load::<args::Embed<'_, f32>>(embed::lower(op))?,
            Step::Norm { op, .. } => on.load::<args::Norm<'_>>(norm::lower(op))?,
            Step::Dense { op, weights: Floats::F16(_), .. } => {
                on.load::<args::Dense<'_, half::f16>>(dense::lower(op))?
            }
            Step::Dense { op, weights: Floats::Bf16(_), .. } => {
                on.load::<args::Dense<'_, half::bf16>>(dense::lower(op))?
            }
            Step::Dense { op, weights: Floats::F32(_), .. } => on.load::<args::Dense<'_, f32>>(dense::lower(op))?,
            Step::Add { op, .. } | Step::Bias { op, .. } => on.load::<args::Add<'_>>(add::lower(op))?,
            Step::Append { op, .. } => on.load::<args::Append<'_>>(append::lower(op))?,
            Step::Attention { op, .. } => on.load::<args::Attention<'_>>(attention::lower(op))?,
            Step::Glu { op, .. } => on.load::<args::Glu<'_>>(glu::lower(op))?,
            Step::Argmax { op, .. } => on.load::<args::Argmax<'_>>(argmax::lower(op))?,
        }))
    }

    /// Adds its launch to a graph.
    ///
    /// # Errors
    /// A kernel of other parameters.
    ///
    /// # Panics
    /// If `kernel` is not that of [`Step::load`].
    pub fn record(
        &self,
        to: &mut Recorder,
        kernel: &mut Ready,
        state: &mut State,
        angles: &Angles,
    ) -> Result<(), DeviceError> {
        let State { tokens, position, best, hands, activations, fault, cache } = state;
        let Angles { cos, sin } = angles;
        let kernel = match (self, kernel) {
            (Step::Prepare { input, norm, .. }, Ready::Prepare(kernel)) => {
                let inputs = PrepareInputs { norm, ..PrepareInputs::plain(&hands[input.index()]) };
                return kernel.record(to, inputs, activations, Faults { faults: fault, layer: 0 });
            }
            (Step::Gemv { matrix, y, .. }, Ready::Gemv(kernel)) => {
                return kernel.record(to, matrix, activations, &mut hands[y.index()]);
            }
            (Step::EmbedPacked { matrix, y, .. }, Ready::EmbedPacked(kernel)) => {
                return kernel.record(to, matrix, tokens, &mut hands[y.index()]);
            }
            (_, Ready::Plain(kernel)) => kernel,
            (_, Ready::Gemv(_) | Ready::Prepare(_) | Ready::EmbedPacked(_)) => unreachable!("a kernel of another step"),
        };
        match *self {
            Step::Prepare { .. } | Step::Gemv { .. } | Step::EmbedPacked { .. } => unreachable!("recorded above"),
            Step::Embed { table, y, .. } => {
                let (tokens, y) = (&*tokens, &mut hands[y.index()]);
                match table {
                    Floats::F16(table) => to.launch(kernel, launches::Embed { tokens, table, y }),
                    Floats::Bf16(table) => to.launch(kernel, launches::Embed { tokens, table, y }),
                    Floats::F32(table) => to.launch(kernel, launches::Embed { tokens, table, y }),
                }
            }
            Step::Norm { x, norm, y, .. } => {
                let (y, others) = split(hands, y);
                to.launch(kernel, launches::Norm { x: &others[x], norm, y })
            }
            Step::Dense { weights, x, y, .. } => {
                let (y, others) = split(hands, y);
                let x = &others[x];
                match weights {
                    Floats::F16(weights) => to.launch(kernel, launches::Dense { weights, x, y }),
                    Floats::Bf16(weights) => to.launch(kernel, launches::Dense { weights, x, y }),
                    Floats::F32(weights) => to.launch(kernel, launches::Dense { weights, x, y }),
                }
            }
            Step::Add { x, y, .. } => {
                let (y, others) = split(hands, y);
                to.launch(kernel, launches::Add { x: &others[x], y })
            }
            Step::Bias { x, y, .. } => to.launch(kernel, launches::Add { x, y: &mut hands[y.index()] }),
            Step::Append { layer, k, v, .. } => {
                let (keys, values) = &mut cache[layer];
                let (k, v) = (&hands[k.index()], &hands[v.index()]);
                to.launch(kernel, launches::Append { k, v, cos, sin, position, keys, values })
            }
            Step::Attention { layer, q, y, .. } => {
                let (keys, values) = &cache[layer];
                let (y, others) = split(hands, y);
                to.launch(kernel, launches::Attention { q: &others[q], cos, sin, position, keys, values, y })
            }
            Step::Glu { gate, up, y, .. } => {
                let (y, others) = split(hands, y);
                to.launch(kernel, launches::Glu { gate: &others[gate], up: &others[up], y })
            }
            Step::Argmax { logits, .. } => to.launch(kernel, launches::Argmax { logits: &hands[logits.index()], best }),
        }
    }
}

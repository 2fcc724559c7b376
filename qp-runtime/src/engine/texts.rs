//! Texts that a model writes itself: what stands in for data where none is given.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::{Error, Sampler, Sampling, generate};
use crate::device::Executor;
use crate::engine;
use crate::model::Weights;

/// A text of `tokens` tokens that begins with `bos`: number `i` of those with `seed`, the same on every device. Where the model ends it, it goes
/// on with whatever follows.
///
/// # Errors
/// If the model has no first token, or cannot run.
pub fn write(
    on: Option<&Executor>,
    bos: Option<u32>,
    weights: &Arc<Weights>,
    tokens: usize,
    seed: u64,
    i: usize,
) -> Result<Vec<u32>, Error> {
    let first = bos.ok_or(Error::NoFirstToken)?;
    let mut session = engine::open(on, weights, tokens)?;
    // Tokens far out in the tail would make texts unlike any that the model was made for.
    let sampling = Sampling {
        temperature: 1.0,
        top_k: 50,
        top_p: 0.98,
        min_p: 0.0,
        seed: seed.wrapping_add((i as u64 + 1).wrapping_mul(0xD134_2543_DE82_EF95)),
    };
    let mut sampler = Sampler::new(sampling);
    let go_on = |_| Ok::<_, Error>(ControlFlow::Continue(()));
    let written = generate(&mut session, &[first], tokens - 1, &[], &mut sampler, go_on)?;
    Ok([vec![first], written.tokens].concat())
}

//! The keys and values of a step's tokens, turned by their positions and rounded, put into the cache; their queries,
//! turned and rounded.

use super::Cache;
use crate::kernels::Span;

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Append {
    /// The cache.
    pub cache: Cache,
    /// Heads of queries.
    pub heads: u32,
    /// Tokens of the step, those that fill it up included.
    pub tokens: u32,
    /// Where a token's queries lie, head after head.
    pub q: Span,
    /// Where its keys lie.
    pub k: Span,
    /// Where its values lie.
    pub v: Span,
    /// Columns of a head, from the first on, that are turned; column `i` with `i + rotary / 2`.
    pub rotary: u32,
    /// Root-mean-square norm of each head of queries and keys before it is turned: its epsilon.
    pub norm: Option<f32>,
    /// What scores are multiplied with, often `1 / √head_dim`.
    pub scale: f32,
}

impl Append {
    /// What the scale of a query is multiplied with: scores are in base 2, and integer sums of two planes are over 256.
    pub(super) fn query_factor(&self) -> f32 {
        let factor = self.scale * std::f32::consts::LOG2_E;
        if self.cache.planes == 2 { factor * 256.0 } else { factor }
    }
}

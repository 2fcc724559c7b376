//! Attention over pages of keys and values, exact: keys, values, queries and weights are integers, and what is summed in
//! `f32` is summed in an order that depends on positions alone.
//!
//! # What is computed
//!
//! For one head of one token at position `n`, with the keys and values of positions up to `n` (or of the last `window`):
//!
//! 1. The query, turned by its position, is rounded to two planes of signed bytes with one scale, which takes up the scale
//!    of scores and `log2 e`; so are keys, and values with a scale from a grid of powers of `2^(1/4)`
//!    ([`reference::append`]).
//! 2. Positions come in *tiles*, the pages of the sequence. A score is the exact integer sum of three of the four products
//!    of planes (the two low planes' product is left out), converted once, and scaled; the logarithm of the value's scale is
//!    added. The tile's *high* is the largest, rounded to the whole number above.
//! 3. `2^(score − high)`, a weight with its value's scale in it, is rounded to 16 bits ([`WEIGHT_ONE`]), and the tile's
//!    values are summed with it, exactly, again by three products of planes. The weights without the values' scales are
//!    summed in `f32`: of each 16 positions by four lanes, then the 16s of a lane, then the lanes.
//! 4. What tiles give, a high, a total and a sum for each column, is folded: brought to the larger high by a power of two,
//!    then added. Tiles fold in order to chunks of [`CHUNK`], chunks in order to spans of [`SPAN`], spans in order.
//! 5. A sink, if the model has one, is folded in at the end, and the sums are divided by the total.
//!
//! So the bits depend on nothing but the query and the keys and values before it: not on other tokens of the step, how a
//! prompt is cut, where pages lie, how work is laid over the GPU, or on which GPU or CPU it is done. Positions after `n`
//! may hold anything finite.
//!
//! # Kernels
//!
//! [`append`] puts keys and values into the cache and rounds queries. [`few`] is for steps of few tokens: each token's tiles
//! are spread over the GPU, and what they give is folded by the block that comes last. [`many`] is for prompts: blocks take
//! tiles of queries that share keys. Both take the same parameters ([`Attend`]) and give the same bits as [`reference`].

pub mod append;
mod cache;
mod emit;
pub mod few;
pub mod many;
pub mod reference;

pub use append::Append;
pub use cache::{Cache, LARGEST_OF_TWO_PLANES, PAGE, planes};

/// Tiles (pages) of a chunk: 256 positions.
pub const CHUNK: u32 = 4;
/// Tiles of a span: 2048 positions.
pub const SPAN: u32 = 32;

/// The weight 1 as an integer: two unsigned bytes, with some room for what rounding adds.
pub const WEIGHT_ONE: f32 = 65280.0;
/// Base-2 logarithm of the smallest weight, relative to the tile's high, that is not counted as zero.
pub const SMALLEST: f32 = -100.0;
/// The score of a position that is not seen.
pub const UNSEEN: f32 = -1_048_576.0;
/// The high of a tile of which no position is seen.
pub const LOWEST: f32 = -131_072.0;
/// Scores (in base 2) must stay below this in magnitude; the kernels note a fault otherwise.
pub const HIGHEST: f32 = 16384.0;

/// Attention of a step's tokens in one layer.
///
/// # Parameters of the kernels
///
/// In order:
///
/// * `queries`: `i8`, `tokens × heads × 2 × columns`, and `query_scale`: `f32`, `tokens × heads`; as [`append`] leaves
///   them (`columns` is [`Cache::columns`]);
/// * `sinks`: `f32`, `heads`: the logarithm (natural) of each head's sink; read only if there are sinks;
/// * `positions`, `sequence`, `slots`: `i32`, one a token: its position in its sequence, the row of the table, and where its
///   key lies ([`Append`]); a token whose slot is negative fills the step up, and its results are zeros;
/// * `table`: `i32`, rows of `stride` pages: page `i` of a row holds positions `64·i` and up of a sequence;
/// * `tiles`: `i32`, pairs of a first token and a number of tokens ([`many::tiles`]); not read by [`few`];
/// * `stride`: `i32` scalar;
/// * `cache`: `u8`, see [`Cache`];
/// * `y`: `f32`, `tokens × heads · head_dim`;
/// * `partial`: `f32`, and `arrived`: `i32`, zero before and after; see [`few::meeting_place`]; not touched by [`many`];
/// * `faults`: `i32`, one a layer, set to 1 where scores leave the range of numbers ([`HIGHEST`]); results are then unspecified;
/// * `layer`: `i32` scalar, which of `faults` is this layer's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attend {
    /// The cache.
    pub cache: Cache,
    /// Heads of queries, a multiple of the cache's heads.
    pub heads: u32,
    /// Tokens of the step, those that fill it up included.
    pub tokens: u32,
    /// Positions that a token sees, its own included; `None`: all up to its own.
    pub window: Option<u32>,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub soft_cap: Option<f32>,
    /// True if each head has a sink: a weight without a value.
    pub sinks: bool,
}

impl Attend {
    /// Heads of queries that share a head of keys and values.
    pub fn group(&self) -> u32 {
        self.heads / self.cache.kv_heads
    }

    /// The first position that a token at `position` sees.
    pub fn first(&self, position: u32) -> u32 {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// What sums over totals are divided by, so that weights count as they should.
    fn one(&self) -> f32 {
        if self.cache.planes == 2 { WEIGHT_ONE / 256.0 } else { WEIGHT_ONE }
    }
}

/// `2^(k/4)` of `k` 0 to 3: the mantissas of values' scales.
const QUARTERS: [f32; 4] = [1.0, 1.189_207_1, std::f32::consts::SQRT_2, 1.681_792_9];
/// The inverses of [`QUARTERS`].
const INVERSE_QUARTERS: [f32; 4] = [1.0, 0.840_896_4, std::f32::consts::FRAC_1_SQRT_2, 0.594_603_54];
/// Bounds of the base-2 logarithm of a value's scale.
const SCALE_RANGE: (i32, i32) = (-60, 60);

#[cfg(test)]
mod tests;

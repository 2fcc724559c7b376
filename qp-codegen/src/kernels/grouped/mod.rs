//! Products with matrices of formats: `y[token, row] (+)= W[row, ·] · x[token, ·]`, exactly as [`crate::spec::terms`] says.
//!
//! The matrix lies as [`layout`] says. Two kernels multiply with it:
//!
//! * [`few`] for a few tokens: the warps of a block share its columns, and each keeps the activations of its own;
//! * [`many`] for up to 64 in a block: warps have rows of their own and go over the columns together, whose activations pass by
//!   in shared memory; a decoded tile serves all tokens of the block.
//!
//! Both take the same parameters ([`lower`]) and give the same bits, for all sums are of integers: which of them computes a
//! product is a matter of time alone, and [`Launch::choose`] asks the cost model.

pub mod few;
mod launch;
pub mod layout;
pub mod many;
mod operands;
mod windows;

pub use self::launch::Launch;
use self::layout::Relaid;
use super::span::Span;
use crate::ir::{Builder, Kernel};
use crate::spec::Shape;
use crate::spec::terms::{TILE, Terms};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product<'t> {
    /// The format's weight.
    pub terms: &'t Terms,
    /// Rows × columns.
    pub shape: Shape,
    /// Tokens.
    pub batch: u32,
    /// Outputs.
    pub y: Span,
    /// Add to the outputs instead of overwriting them.
    pub accumulate: bool,
}

impl Product<'_> {
    /// How the matrix lies.
    pub fn layout(&self) -> Relaid {
        Relaid::new(self.terms, self.shape)
    }

    /// Runs of a tile: groups of columns that share slope and rest.
    fn runs(&self) -> u32 {
        TILE / self.terms.run.unwrap_or(TILE)
    }

    /// Whether sums of activations over runs are needed, with operands that are integers themselves (`signed`) or their digits.
    fn has_offsets(&self, signed: bool) -> bool {
        self.terms.rest.is_some() || !signed && (self.terms.lowest != 0 || self.terms.zero.is_some())
    }

    /// A builder of a kernel of `blocks` blocks of `threads` threads, `min_blocks` of which an SM must hold at once.
    fn builder(&self, kind: &str, blocks: u32, threads: u32, min_blocks: u32) -> Builder {
        let Shape { rows, cols } = self.shape;
        let (bits, run) = (self.terms.bits, self.terms.run.unwrap_or(cols));
        let name = format!("format_{kind}_{bits}_{run}_{rows}x{cols}_b{}", self.batch);
        let b = Builder::new(&name, [blocks, 1], threads);
        b.doc(format!(
            "y[token, row] {}= W[row, :] . x[token, :] with W {rows} x {cols} of {bits} bits in runs of {run} columns, {} token(s).",
            if self.accumulate { "+" } else { "" },
            self.batch,
        ));
        b.min_blocks(min_blocks);
        b.dependent_launch();
        b.apart();
        b
    }
}

/// Makes the kernel. Its parameters, in order:
///
/// * `weights`, `numbers`, `factors`: the matrix ([`layout::Stored`]);
/// * `x`: signed bytes in cells and `x_scale` (`f32`, one a token), as [`super::gemv::lower`] takes them;
/// * `y`: `f32`.
///
/// # Panics
/// For launches that are none; see [`few::lower`] and [`many::lower`].
pub fn lower(op: &Product, launch: &Launch) -> Kernel {
    match launch {
        Launch::Few(launch) => few::lower(op, launch),
        Launch::Many(launch) => many::lower(op, launch),
    }
}

#[cfg(test)]
mod tests;

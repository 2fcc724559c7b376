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
use super::experts::Experts;
use super::operands::Form;
use super::prepare::Prepare;
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

    /// How the matrices of experts lie, one below the other: as one of all their rows, each padded to whole tiles.
    fn layout_of_all(&self, experts: Option<&Experts>) -> Relaid {
        let one = self.layout();
        let all = |e: &Experts| Shape { rows: e.matrices * one.padded_rows(), cols: self.shape.cols };
        experts.map_or_else(|| one.clone(), |e| Relaid::new(self.terms, all(e)))
    }

    /// Runs of a tile: groups of columns that share slope and rest.
    fn runs(&self) -> u32 {
        TILE / self.terms.run.unwrap_or(TILE)
    }

    /// Whether sums of activations over runs are needed, with operands that are integers themselves (`signed`) or their digits.
    fn has_offsets(&self, signed: bool) -> bool {
        self.terms.rest.is_some() || !signed && (self.terms.lowest != 0 || self.terms.zero.is_some())
    }

    /// A builder of a kernel of `blocks` blocks (of experts, for each unit) of `threads` threads, `min_blocks` of which an SM must hold
    /// at once.
    fn builder(&self, kind: &str, blocks: u32, threads: u32, min_blocks: u32, form: Form) -> Builder {
        let (Shape { rows, cols }, experts) = (self.shape, form.experts());
        let (bits, run) = (self.terms.bits, self.terms.run.unwrap_or(cols));
        let name = format!("format_{kind}_{bits}_{run}_{rows}x{cols}_b{}", self.batch);
        let b = Builder::new(&name, [blocks, experts.map_or(1, Experts::units)], threads);
        let matrix = format!("{rows} x {cols} of {bits} bits in runs of {run} columns");
        b.doc(match experts {
            None => format!(
                "y[token, row] {}= W[row, :] . x[token, :] with W {matrix}, {} token(s){}.",
                if self.accumulate { "+" } else { "" },
                self.batch,
                form.by_each_block(),
            ),
            Some(Experts { count, pairs, most, .. }) => format!(
                "y[pair, row] = W[expert, row, :] . x[pair, :] with W {matrix}, {pairs} pairs of tokens with {count} experts, in units \
                 of up to {most}.",
            ),
        });
        b.min_blocks(min_blocks);
        b.dependent_launch();
        if experts.is_none() {
            b.apart();
        }
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
    lower_for(op, launch, Form::Results)
}

/// [`lower`]; with a preparation, the kernel whose blocks do that themselves. Its parameters are `input`, `up`, `norm`, `flips`, `base`,
/// `faults` and `layer` of [`prepare::lower`](super::prepare::lower), its `factors`, which are read if the format has some, then those of
/// [`lower`] without `x` and `x_scale`.
///
/// # Panics
/// If the launch is none of [`Launch::ranked_with`].
pub fn lower_with(op: &Product, launch: &Launch, prepare: Option<&Prepare>) -> Kernel {
    let Some(prepare) = prepare else { return lower(op, launch) };
    assert!(matches!(launch, Launch::Few(_)), "no other way of multiplying prepares");
    lower_for(op, launch, Form::Preparing(prepare))
}

/// Makes the kernel of the products of experts: `op` is that of one of them with the pairs of a unit, as many as
/// [`Experts::most`]. The parameters are those of [`lower`], where `x` and `x_scale` have as many rows as [`Experts::rows`], and the
/// rows of `op.y` are pairs; the experts' matrices are one of all their rows, each padded to whole tiles. Behind them are
/// `units`, `pairs` and `places`: see [`super::product::Launch::lower_for_experts`].
///
/// # Panics
/// As [`lower`]; if the products are added to what is there, or a format does something to activations or results that is each matrix's
/// own, or so is the table in which digits are looked up.
pub fn lower_for_experts(op: &Product, launch: &Launch, experts: &Experts) -> Kernel {
    assert!(!op.terms.is_apart(), "what is done to activations, and a table, are a matrix's own");
    assert!(!op.accumulate && op.batch == experts.most, "the products of a unit");
    lower_for(op, launch, Form::Experts(experts))
}

fn lower_for(op: &Product, launch: &Launch, form: Form) -> Kernel {
    match launch {
        Launch::Few(launch) => few::lower(op, launch, form),
        Launch::Many(launch) => many::lower(op, launch, form),
    }
}

#[cfg(test)]
mod tests;

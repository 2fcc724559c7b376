//! What the launches of a step compute, and the kernels for it.

use std::sync::Arc;

use qp_codegen::cuda::Device;
use qp_codegen::ir::Kernel;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::add::{self, Add};
use qp_codegen::kernels::argmax::{self, Argmax};
use qp_codegen::kernels::attend::{Append, Attend, append, few, many};
use qp_codegen::kernels::dense::{self, Dense};
use qp_codegen::kernels::embed::{self, Embed};
use qp_codegen::kernels::embed_packed::{self, EmbedPacked};
use qp_codegen::kernels::experts::Experts;
use qp_codegen::kernels::experts::combine::{self, Combine};
use qp_codegen::kernels::experts::group::{self, Group};
use qp_codegen::kernels::experts::route::{self, Route};
use qp_codegen::kernels::experts::unit::{self, GateExperts};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::glu::{self, Glu};
use qp_codegen::kernels::grouped;
use qp_codegen::kernels::leave::{self, Leave};
use qp_codegen::kernels::map::{self, Map};
use qp_codegen::kernels::norm::{self, Norm};
use qp_codegen::kernels::prepare::{self, Prepare};
use qp_codegen::kernels::product;
use qp_codegen::kernels::rows::{self, Rows};
use qp_codegen::kernels::sample::{self, Sample};
use qp_codegen::spec::Shape;
use qp_codegen::spec::terms::Terms;

use super::most_tiles;
use crate::engine::cuda::layout::Layout;

/// What a kernel computes. Equal operations are one kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Rows of a dense embedding.
    Embed(Embed),
    /// Rows of a packed embedding.
    EmbedPacked {
        /// Its quantizer, among [`Layout::specs`].
        spec: usize,
        /// Of the matrix.
        shape: Shape,
        /// Tokens.
        batch: u32,
        /// Where they go.
        y: Span,
    },
    /// A norm before dense layers.
    Norm(Norm),
    /// Activations to integers.
    Prepare(Prepare),
    /// A product with a packed matrix.
    Product {
        /// Its quantizer, among [`Layout::specs`].
        spec: usize,
        /// Of the matrix.
        shape: Shape,
        /// Tokens.
        batch: u32,
        /// Whether outputs are added to what is there.
        accumulate: bool,
        /// The preparation of activations, if blocks do that themselves; otherwise a launch before has done it.
        prepare: Option<Prepare>,
    },
    /// An exact product with a matrix of a format.
    Grouped {
        /// The format's weight.
        terms: Arc<Terms>,
        /// Of the matrix.
        shape: Shape,
        /// Tokens.
        batch: u32,
        /// Where outputs go.
        y: Span,
        /// Whether outputs are added to what is there.
        accumulate: bool,
        /// The preparation of activations, if blocks do that themselves; otherwise a launch before has done it.
        prepare: Option<Prepare>,
    },
    /// What a format does to the results of a product.
    Leave(Leave),
    /// A product with a dense matrix.
    Dense(Dense),
    /// The choice of each token's experts.
    Route(Route),
    /// Pairs of tokens and experts, sorted into units.
    Group(Group),
    /// Products with the packed matrices of experts.
    Experts {
        /// Their quantizer, among [`Layout::specs`].
        spec: usize,
        /// Of each expert's matrix.
        shape: Shape,
        /// Pairs and units.
        experts: Experts,
    },
    /// Exact products with the matrices of experts of a format.
    GroupedExperts {
        /// The format's weight.
        terms: Arc<Terms>,
        /// Of each expert's matrix.
        shape: Shape,
        /// Pairs and units.
        experts: Experts,
    },
    /// Products with the dense matrices of experts.
    DenseExperts {
        /// That of one expert with the pairs of a unit.
        op: Dense,
        /// Pairs and units.
        experts: Experts,
    },
    /// The gated unit of experts.
    GateExperts(GateExperts),
    /// The weighted sum of what experts give.
    Combine(Combine),
    /// One slot onto another, or a bias onto a slot.
    Add(Add),
    /// New keys and values into the cache, queries rounded.
    Append(Append),
    /// Attention, each token for itself.
    AttendFew(Attend),
    /// Attention, tokens of up to [`super::MOST_CHUNKS`] sequences in tiles.
    AttendMany(Attend),
    /// A gated unit before dense layers.
    Glu(Glu),
    /// A function of rows.
    Map(Map),
    /// The rows whose logits are wanted.
    Rows(Rows),
    /// The likeliest tokens.
    Argmax(Argmax),
    /// Tokens drawn.
    Sample(Sample),
}

impl Op {
    /// What kind of work it is, for tables of times.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Embed(_) | Op::EmbedPacked { .. } => "embedding",
            Op::Norm(_) => "norm",
            Op::Prepare(_) | Op::Leave(_) => "prepare",
            Op::Product { .. } | Op::Grouped { .. } => "product",
            Op::Dense(_) => "dense product",
            Op::Route(_) | Op::Group(_) => "routing",
            Op::Experts { .. } | Op::GroupedExperts { .. } => "product of experts",
            Op::DenseExperts { .. } => "dense product of experts",
            Op::GateExperts(_) => "gated unit of experts",
            Op::Combine(_) => "sum of experts",
            Op::Add(_) => "add",
            Op::Append(_) => "append",
            Op::AttendFew(_) | Op::AttendMany(_) => "attention",
            Op::Glu(_) => "gated unit",
            Op::Map(_) => "map",
            Op::Rows(_) => "rows",
            Op::Argmax(_) => "argmax",
            Op::Sample(_) => "sample",
        }
    }

    /// True of products with matrices: what plans choose, and all else is beside.
    pub fn is_product(&self) -> bool {
        matches!(
            self,
            Op::Product { .. }
                | Op::Grouped { .. }
                | Op::Dense(_)
                | Op::Experts { .. }
                | Op::GroupedExperts { .. }
                | Op::DenseExperts { .. }
        )
    }

    /// The operation of a packed product.
    pub fn product<'l>(&self, layout: &'l Layout) -> Option<Gemv<'l>> {
        match *self {
            Op::Product { spec, shape, batch, accumulate, prepare: _ } => {
                Some(Gemv { quantizer: &layout.specs[spec], shape, batch, accumulate })
            }
            _ => None,
        }
    }

    /// The preparation that a product's blocks do themselves.
    pub fn own_preparation(&self) -> Option<&Prepare> {
        match self {
            Op::Product { prepare, .. } | Op::Grouped { prepare, .. } => prepare.as_ref(),
            _ => None,
        }
    }

    /// The operation of one expert with the pairs of a unit, of packed products of experts.
    pub fn product_of_experts<'l>(&self, layout: &'l Layout) -> Option<(Gemv<'l>, Experts)> {
        match *self {
            Op::Experts { spec, shape, experts } => {
                let quantizer = &layout.specs[spec];
                Some((Gemv { quantizer, shape, batch: experts.most, accumulate: false }, experts))
            }
            _ => None,
        }
    }

    /// The exact product with a matrix of a format; of experts, of one of them with the pairs of a unit.
    pub fn grouped(&self) -> Option<(grouped::Product<'_>, Option<Experts>)> {
        match *self {
            Op::Grouped { ref terms, shape, batch, y, accumulate, prepare: _ } => {
                Some((grouped::Product { terms, shape, batch, y, accumulate }, None))
            }
            Op::GroupedExperts { ref terms, shape, experts } => {
                let y = Span::rows(experts.stride);
                Some((grouped::Product { terms, shape, batch: experts.most, y, accumulate: false }, Some(experts)))
            }
            _ => None,
        }
    }

    /// The operation of a packed embedding.
    pub fn embed_packed<'l>(&self, layout: &'l Layout) -> Option<EmbedPacked<'l>> {
        match *self {
            Op::EmbedPacked { spec, shape, batch, y } => {
                Some(EmbedPacked { quantizer: &layout.specs[spec], shape, batch, y })
            }
            _ => None,
        }
    }

    /// Makes the kernel; that of a product with the launch that the cost model chooses.
    pub fn lower(&self, layout: &Layout, device: &Device) -> Kernel {
        match self {
            Op::Embed(op) => embed::lower(op),
            Op::Norm(op) => norm::lower(op),
            Op::Prepare(op) => prepare::lower(op, device),
            Op::Leave(op) => leave::lower(op),
            Op::Grouped { .. } | Op::GroupedExperts { .. } => match self.grouped().expect("of a format") {
                (op, None) => {
                    let prepare = self.own_preparation();
                    grouped::lower_with(&op, &grouped::Launch::ranked_with(&op, prepare, device)[0].1, prepare)
                }
                (op, Some(experts)) => {
                    let launch = grouped::Launch::ranked_for_experts(&op, &experts, device)[0].1;
                    grouped::lower_for_experts(&op, &launch, &experts)
                }
            },
            Op::Dense(op) => dense::lower(op),
            Op::Route(op) => route::lower(op),
            Op::Group(op) => group::lower(op),
            Op::Experts { .. } => {
                let (op, experts) = self.product_of_experts(layout).expect("of experts");
                product::Launch::ranked_for_experts(&op, &experts, device)[0].lower_for_experts(&op, &experts)
            }
            Op::DenseExperts { op, experts } => dense::lower_for_experts(op, experts),
            Op::GateExperts(op) => unit::lower(op),
            Op::Combine(op) => combine::lower(op),
            Op::Add(op) => add::lower(op),
            Op::Append(op) => append::lower(op),
            Op::AttendFew(op) => few::lower(op, &few::Launch::choose(op, device)),
            Op::AttendMany(op) => {
                let launch = many::Launch::choose(op, device);
                many::lower(op, &launch, most_tiles(layout, device, op.tokens))
            }
            Op::Glu(op) => glu::lower(op),
            Op::Map(op) => map::lower(op),
            Op::Rows(op) => rows::lower(op),
            Op::Argmax(op) => argmax::lower(op, device),
            Op::Sample(op) => sample::lower(op),
            Op::Product { .. } => {
                let (op, prepare) = (self.product(layout).expect("a product"), self.own_preparation());
                let launch = product::Launch::ranked_with(&op, prepare, device)[0].1;
                launch.lower_with(&op, prepare)
            }
            Op::EmbedPacked { .. } => embed_packed::lower(&self.embed_packed(layout).expect("an embedding")),
        }
    }
}

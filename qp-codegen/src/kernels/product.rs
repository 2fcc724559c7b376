//! Products with packed weights: which kernel computes one and how it is launched.
//!
//! * [`gemv`] for a few tokens: the warps of a block share its columns, and each reads the activations of its own.
//! * [`gemm`] for up to [`MAX_BATCH`]: warps have row tiles of their own and go over the columns together, whose
//!   activations pass by in shared memory; a decoded tile serves all tokens.
//!
//! Both take the same parameters ([`gemv::lower`]) and give the same bits, so which of them computes a product is a
//! matter of time alone: [`Launch::choose`] asks the cost model.

use std::collections::HashSet;

use super::operands::Gemv;
use super::{gemm, gemv};
use crate::cuda::Device;
use crate::ir::Kernel;

/// Most tokens of one launch.
pub const MAX_BATCH: u32 = gemm::MAX_BATCH;

/// Up to so many tokens, whose planes one tensor-core product holds, nothing is gained by sharing activations.
const ONE_PRODUCT: u32 = 4;

/// Which kernel computes a product, and how it is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launch {
    /// Warps share the columns.
    Gemv(gemv::Launch),
    /// Warps have rows of their own.
    Gemm(gemm::Launch),
}

/// Ways of multiplying, of which a [`Launch`] takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// [`gemv`].
    Gemv,
    /// [`gemm`], each warp for itself.
    Gemm,
    /// [`gemm`], warps in groups of four (Hopper).
    Groups,
}

impl Launch {
    /// The launch that the cost model likes best on `device`.
    ///
    /// # Panics
    /// If no launch fits, which no checked code and no device of [`crate::cuda::Target`] brings about.
    pub fn choose(op: &Gemv, device: &Device) -> Launch {
        Launch::ranked(op, device).first().expect("some launch fits every device").1
    }

    /// All launches worth trying, with the seconds that the model expects, best first.
    pub fn ranked(op: &Gemv, device: &Device) -> Vec<(f64, Launch)> {
        let mut out: Vec<(f64, Launch)> = Vec::new();
        if op.batch <= gemv::MAX_BATCH {
            out.extend(gemv::Launch::estimated(op, device).into_iter().map(|(t, l)| (t, Launch::Gemv(l))));
        }
        if op.batch > ONE_PRODUCT {
            out.extend(gemm::Launch::estimated(op, device).into_iter().map(|(t, l)| (t, Launch::Gemm(l))));
        }
        // Equal estimates keep the order above, so the choice is a function of the input alone.
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut seen = HashSet::new();
        out.retain(|x| seen.insert(x.1));
        out
    }

    /// Makes the kernel; its parameters are those of [`gemv::lower`].
    pub fn lower(&self, op: &Gemv) -> Kernel {
        match self {
            Launch::Gemv(launch) => gemv::lower(op, launch),
            Launch::Gemm(launch) => gemm::lower(op, launch),
        }
    }

    /// Elements of the parameters `partial` and `arrived`, at least 1 each.
    pub fn meeting_place(&self, op: &Gemv) -> (usize, usize) {
        match self {
            Launch::Gemv(launch) => gemv::meeting_place(op, launch),
            Launch::Gemm(launch) => gemm::meeting_place(op, launch),
        }
    }

    /// Its name and numbers, for those who read measurements.
    pub fn fields(&self) -> (&'static str, Vec<(&'static str, u32)>) {
        match *self {
            Launch::Gemv(gemv::Launch { warps, split, blocks, ahead, min_blocks, table_bytes }) => {
                let fields = vec![
                    ("warps", warps),
                    ("split", split),
                    ("blocks", blocks),
                    ("ahead", ahead),
                    ("min_blocks", min_blocks),
                    ("table_bytes", table_bytes),
                ];
                ("gemv", fields)
            }
            Launch::Gemm(gemm::Launch {
                group,
                row_warps,
                col_warps,
                row_tiles,
                chunk,
                token_parts,
                split,
                blocks,
                min_blocks,
                table_bytes,
            }) => {
                let fields = vec![
                    ("group", group.into()),
                    ("row_warps", row_warps),
                    ("col_warps", col_warps),
                    ("row_tiles", row_tiles),
                    ("chunk", chunk),
                    ("token_parts", token_parts),
                    ("split", split),
                    ("blocks", blocks),
                    ("min_blocks", min_blocks),
                    ("table_bytes", table_bytes),
                ];
                ("gemm", fields)
            }
        }
    }

    /// How it multiplies.
    pub fn way(&self) -> Way {
        match self {
            Launch::Gemv(_) => Way::Gemv,
            Launch::Gemm(launch) if launch.group => Way::Groups,
            Launch::Gemm(_) => Way::Gemm,
        }
    }

    /// True if sums of several blocks or warps meet.
    pub fn splits_columns(&self) -> bool {
        match self {
            Launch::Gemv(launch) => launch.split > 1,
            Launch::Gemm(launch) => launch.split * launch.col_warps > 1,
        }
    }
}

//! Products with packed weights: which kernel computes one and how it is launched.
//!
//! * [`gemv`] for a few tokens: the warps of a block share its columns, and each reads the activations of its own.
//! * [`gemm`] for up to [`MAX_BATCH`]: warps have row tiles of their own and go over the columns together, whose
//!   activations pass by in shared memory; a decoded tile serves all tokens.
//! * [`walk`] where neither fits: codes of large blocks or long expressions.
//!
//! All take the same parameters ([`gemv::lower`]) and give the same bits, so which of them computes a product is a
//! matter of time alone: [`Launch::choose`] asks the cost model. There is a launch for every checked quantizer, every shape
//! that [`crate::layout::Packed::check`] accepts, every batch and every device.

use std::collections::HashSet;

use super::experts::Experts;
pub use super::operands::TOTAL_BITS;
use super::operands::{Form, Gemv};
use super::prepare::Prepare;
use super::{decode, gemm, gemv, launch, walk};
use crate::cuda::Device;
use crate::ir::Kernel;

/// Most tokens of one launch.
pub const MAX_BATCH: u32 = gemm::MAX_BATCH;

/// Up to so many tokens, whose planes one tensor-core product holds, nothing is gained by sharing activations.
const ONE_PRODUCT: u32 = 4;

/// Products prepare their token themselves if they are expected to take less than this share of the time: of long ones the model
/// errs by more than what a launch takes.
const CLEARLY: f64 = 0.98;

/// Which kernel computes a product, and how it is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launch {
    /// Warps share the columns.
    Gemv(gemv::Launch),
    /// Warps have rows of their own.
    Gemm(gemm::Launch),
    /// A strip of rows at a time, for any code.
    Walk(walk::Launch),
}

/// Seconds that a product of one token is expected to take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// If its blocks prepare the token themselves; `None` if they cannot.
    pub own: Option<f64>,
    /// If a launch before it has prepared the token, without that launch.
    pub apart: f64,
}

/// Whether the products that read what `prepare` prepares, of which these times are expected, take less time if their blocks do that
/// themselves than with a launch for it before them.
pub fn prepares(expected: &[Expected], prepare: &Prepare) -> bool {
    // What a gated unit reads is twice as much, and computed in each block.
    if prepare.gate.is_some() {
        return false;
    }
    let own: Option<f64> = expected.iter().map(|e| e.own).sum();
    let apart: f64 = expected.iter().map(|e| e.apart).sum();
    own.is_some_and(|own| own < CLEARLY * (apart + launch::PREPARATION))
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
    /// [`walk`].
    Walk,
}

impl Launch {
    /// The launch that the cost model likes best on `device`.
    pub fn choose(op: &Gemv, device: &Device) -> Launch {
        Launch::ranked(op, device)[0].1
    }

    /// All launches worth trying, with the seconds that the model expects, best first: at least one.
    pub fn ranked(op: &Gemv, device: &Device) -> Vec<(f64, Launch)> {
        let walk = || {
            let (seconds, launch) = walk::Launch::estimated(op, device);
            vec![(seconds, Launch::Walk(launch))]
        };
        if !decode::is_small(op.quantizer) {
            return walk();
        }
        let mut out: Vec<(f64, Launch)> = Vec::new();
        if op.batch <= gemv::MAX_BATCH {
            out.extend(gemv::Launch::estimated(op, None, device).into_iter().map(|(t, l)| (t, Launch::Gemv(l))));
        }
        if op.batch > ONE_PRODUCT {
            out.extend(gemm::Launch::estimated(op, device).into_iter().map(|(t, l)| (t, Launch::Gemm(l))));
        }
        // Equal estimates keep the order above, so the choice is a function of the input alone.
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut seen = HashSet::new();
        out.retain(|x| seen.insert(x.1));
        if out.is_empty() { walk() } else { out }
    }

    /// [`Launch::ranked`]; with a preparation, the launches whose blocks do that themselves: none where they cannot, of several tokens,
    /// of rotations or columns that take more than registers.
    pub fn ranked_with(op: &Gemv, prepare: Option<&Prepare>, device: &Device) -> Vec<(f64, Launch)> {
        let Some(prepare) = prepare else { return Launch::ranked(op, device) };
        if op.batch != 1 || !decode::is_small(op.quantizer) {
            return Vec::new();
        }
        let launches = gemv::Launch::estimated(op, Some(prepare), device).into_iter();
        let mut out: Vec<(f64, Launch)> = launches.map(|(t, l)| (t, Launch::Gemv(l))).collect();
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        out
    }

    /// What the product is expected to take with `prepare` done by its blocks, and by a launch before it.
    pub fn expected(op: &Gemv, prepare: &Prepare, device: &Device) -> Expected {
        let own = Launch::ranked_with(op, Some(prepare), device).first().map(|r| r.0);
        Expected { own, apart: Launch::ranked(op, device)[0].0 }
    }

    /// Makes the kernel; its parameters are those of [`gemv::lower`].
    pub fn lower(&self, op: &Gemv) -> Kernel {
        match self {
            Launch::Gemv(launch) => gemv::lower(op, launch),
            Launch::Gemm(launch) => gemm::lower(op, launch),
            Launch::Walk(launch) => walk::lower(op, launch),
        }
    }

    /// The launches of products of experts, best first: at least one. `op` is the product of one expert with a unit's pairs.
    pub fn ranked_for_experts(op: &Gemv, of: &Experts, device: &Device) -> Vec<Launch> {
        let share = of.share(device);
        // Blocks that share columns have no place to meet.
        let alone = |launch: &Launch| match launch {
            Launch::Gemv(launch) => launch.split == 1,
            Launch::Gemm(launch) => launch.split == 1,
            Launch::Walk(_) => true,
        };
        let mut ranked = Launch::ranked(op, &share);
        if decode::is_small(op.quantizer) && !ranked.iter().any(|r| alone(&r.1)) {
            ranked = gemm::Launch::estimated(op, &share).into_iter().map(|(t, l)| (t, Launch::Gemm(l))).collect();
            ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        let walk = Launch::Walk(walk::Launch::estimated(op, &share).1);
        let mut out: Vec<Launch> = ranked.into_iter().map(|r| r.1).filter(alone).collect();
        if !out.contains(&walk) {
            out.push(walk);
        }
        out
    }

    /// Makes the kernel of the products of experts; `op` is as in [`Launch::ranked_for_experts`]. The parameters are those of
    /// [`gemv::lower`], where what has a row a token has one for each of [`Experts::rows`], and `y` one a pair; the experts'
    /// matrices lie one below the other. Behind them, in order:
    ///
    /// * `units`: `i32`, four a unit ([`super::experts::group`]); where each pair is a unit, the pairs' experts;
    /// * `pairs`: `i32`, the units' pairs; not read where each pair is a unit;
    /// * `places`: `i32`, for each expert the place of its matrix, or −1; not read if the launch has all.
    ///
    /// # Panics
    /// If blocks share columns, whose sums have no place to meet.
    pub fn lower_for_experts(&self, op: &Gemv, experts: &Experts) -> Kernel {
        self.lower_form(op, Form::Experts(experts))
    }

    /// Makes the kernel of the product's totals, the integers that become results where a matrix is cut by columns and parts of
    /// the sums come from several devices. As [`Launch::lower`], but that `y` is `i32`, two numbers a result: the total is
    /// 2^[`TOTAL_BITS`] times the first and the second, which is not negative; the scales are not used.
    ///
    /// # Panics
    /// If `op` adds to what is there.
    pub fn lower_totals(&self, op: &Gemv) -> Kernel {
        self.lower_form(op, Form::Totals)
    }

    /// [`Launch::lower`]; with a preparation, the kernel whose blocks do that themselves. Its parameters are `input`, `up`, `norm`,
    /// `flips`, `base`, `faults` and `layer` of [`prepare::lower`](super::prepare::lower), then those of [`gemv::lower`] without `x`,
    /// `x_scale` and `x_sum`.
    ///
    /// # Panics
    /// If the launch is none of [`Launch::ranked_with`].
    pub fn lower_with(&self, op: &Gemv, prepare: Option<&Prepare>) -> Kernel {
        let Some(prepare) = prepare else { return self.lower(op) };
        assert!(matches!(self, Launch::Gemv(_)), "no other way of multiplying prepares");
        self.lower_form(op, Form::Preparing(prepare))
    }

    fn lower_form(&self, op: &Gemv, form: Form) -> Kernel {
        match self {
            Launch::Gemv(launch) => gemv::lower_for(op, launch, form),
            Launch::Gemm(launch) => gemm::lower_for(op, launch, form),
            Launch::Walk(launch) => walk::lower_for(op, launch, form),
        }
    }

    /// Elements of the parameters `partial` and `arrived`, at least 1 each.
    pub fn meeting_place(&self, op: &Gemv) -> (usize, usize) {
        match self {
            Launch::Gemv(launch) => gemv::meeting_place(op, launch),
            Launch::Gemm(launch) => gemm::meeting_place(op, launch),
            Launch::Walk(_) => (1, 1),
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
            Launch::Walk(walk::Launch { warps, table_bytes }) => {
                ("walk", vec![("warps", warps), ("table_bytes", table_bytes)])
            }
        }
    }

    /// How it multiplies.
    pub fn way(&self) -> Way {
        match self {
            Launch::Gemv(_) => Way::Gemv,
            Launch::Gemm(launch) if launch.group => Way::Groups,
            Launch::Gemm(_) => Way::Gemm,
            Launch::Walk(_) => Way::Walk,
        }
    }

    /// True if sums of several blocks or warps meet.
    pub fn splits_columns(&self) -> bool {
        match self {
            Launch::Gemv(launch) => launch.split > 1,
            Launch::Gemm(launch) => launch.split * launch.col_warps > 1,
            Launch::Walk(_) => true,
        }
    }
}

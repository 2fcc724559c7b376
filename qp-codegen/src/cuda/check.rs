//! What a kernel must be to be printed: valid, and within what its target can do.

use super::Target;
use crate::ir::{Invalid, Kernel, Problem, Problems, Stmt, validate};

/// A valid kernel that its target can run: what [`super::print`] takes, so that every kernel that was accepted prints and
/// compiles. Made by [`check`].
#[derive(Clone, Copy, Debug)]
pub struct Checked<'k> {
    kernel: &'k Kernel,
    target: Target,
}

impl<'k> Checked<'k> {
    /// The kernel.
    pub fn kernel(self) -> &'k Kernel {
        self.kernel
    }

    /// What it was checked for.
    pub fn target(self) -> Target {
        self.target
    }
}

/// Checks a kernel for a target.
///
/// # Errors
/// What [`validate`] finds, and what the target has not: clusters, products of warp groups, so much shared memory.
pub fn check(kernel: &Kernel, target: Target) -> Result<Checked<'_>, Problems> {
    let mut problems = validate(kernel).map_or_else(|found| found.problems, |()| Vec::new());
    let mut refuse = |what: Invalid| problems.push(Problem { at: None, what });
    let lacks = |what| Invalid::Target { target: target.name(), what };
    if kernel.cluster > 1 && !target.has_clusters() {
        refuse(lacks("clusters"));
    }
    if !target.has_wgmma() && any(&kernel.body, &|s| matches!(s, Stmt::MmaGroup { .. })) {
        refuse(lacks("products of warp groups"));
    }
    let (bytes, most) = (kernel.shared_bytes(), target.device().shared_per_block);
    if bytes > most {
        refuse(Invalid::SharedOfTarget { target: target.name(), bytes, most });
    }
    if problems.is_empty() {
        return Ok(Checked { kernel, target });
    }
    Err(Problems { kernel: kernel.name.clone(), problems })
}

/// Whether `f` holds for a statement, those within others included.
fn any(stmts: &[Stmt], f: &impl Fn(&Stmt) -> bool) -> bool {
    stmts.iter().any(|s| f(s) || s.nested().any(|block| any(block, f)))
}

//! What products of warp groups leave unfinished: nothing may read or set an accumulator that a [`Stmt::MmaGroup`] still
//! adds to, and nothing may still run where threads meet or the kernel ends.
//!
//! Any number of products may follow each other; only a [`Stmt::GroupWait`] with none pending finishes them.

use std::collections::BTreeSet;

use super::*;

/// Where a valid kernel has not waited for its products, in the order of the text.
pub(super) fn problems(kernel: &Kernel) -> Vec<Problem> {
    let mut walk = Walk { kernel, next: 0, running: BTreeSet::new(), problems: Vec::new() };
    walk.block(&kernel.body);
    if !walk.running.is_empty() {
        walk.problems.push(Problem { at: None, what: Invalid::GroupWait });
    }
    walk.problems
}

struct Walk<'k> {
    kernel: &'k Kernel,
    next: u32,
    /// Accumulators that some way to here has left unfinished.
    running: BTreeSet<Var>,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn block(&mut self, stmts: &[Stmt]) {
        for s in stmts {
            let place = self.next;
            self.next += 1;
            match s {
                Stmt::MmaGroup { acc, .. } => self.running.extend(acc),
                Stmt::GroupWait { pending: 0 } => self.running.clear(),
                Stmt::Let(v) => {
                    if let Op::Get(x) = &self.kernel.value(*v).op {
                        self.finished(*x, place, s);
                    }
                }
                Stmt::Set(x, _) => self.finished(*x, place, s),
                Stmt::Barrier | Stmt::ClusterBarrier if !self.running.is_empty() => {
                    self.problem(Invalid::GroupWait, place, s);
                }
                Stmt::If { cond: _, then, els } => {
                    let before = self.running.clone();
                    self.block(then);
                    let after = std::mem::replace(&mut self.running, before);
                    self.block(els);
                    self.running.extend(after);
                }
                Stmt::For { body, .. } => {
                    // Not at all, once, and after itself.
                    let first = self.next;
                    for _ in 0..2 {
                        self.next = first;
                        let before = self.running.clone();
                        self.block(body);
                        self.running.extend(before);
                    }
                }
                Stmt::Barrier
                | Stmt::ClusterBarrier
                | Stmt::GroupWait { .. }
                | Stmt::Store { .. }
                | Stmt::WarpSync
                | Stmt::Fence
                | Stmt::Prefetch { .. }
                | Stmt::AsyncCopy { .. }
                | Stmt::AsyncCommit
                | Stmt::AsyncWait { .. }
                | Stmt::GroupFence
                | Stmt::GridWait
                | Stmt::GridLaunch
                | Stmt::Comment(_) => {}
            }
        }
    }

    fn finished(&mut self, x: Var, place: u32, s: &Stmt) {
        if self.running.contains(&x) {
            self.problem(Invalid::Unfinished(x), place, s);
        }
    }

    fn problem(&mut self, what: Invalid, place: u32, s: &Stmt) {
        let problem = Problem { at: Some((place, statement(self.kernel, s))), what };
        // A loop is walked twice.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

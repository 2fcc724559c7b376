//! What products of warp groups leave unfinished: nothing may read or set an accumulator that a [`Stmt::MmaGroup`] still
//! adds to, and nothing may still run where threads meet or the kernel ends.
//!
//! Any number of products may follow each other. A [`Stmt::GroupWait`] with `n` pending finishes those behind which `n` or more
//! others were started, whichever way led there.

use std::collections::BTreeMap;

use super::*;

/// Where a valid kernel has not waited for its products, in the order of the text.
pub(super) fn problems(kernel: &Kernel) -> Vec<Problem> {
    let mut walk = Walk { kernel, next: 0, running: BTreeMap::new(), problems: Vec::new() };
    walk.block(&kernel.body);
    if !walk.running.is_empty() {
        walk.problems.push(Problem { at: None, what: Invalid::GroupWait });
    }
    walk.problems
}

struct Walk<'k> {
    kernel: &'k Kernel,
    next: u32,
    /// Accumulators that some way to here has left unfinished, and how many products were at least started behind theirs.
    running: BTreeMap<Var, u32>,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn block(&mut self, stmts: &[Stmt]) {
        for s in stmts {
            let place = self.next;
            self.next += 1;
            match s {
                Stmt::MmaGroup { acc, .. } => {
                    self.running.values_mut().for_each(|behind| *behind += 1);
                    self.running.extend(acc.iter().map(|&x| (x, 0)));
                }
                Stmt::GroupWait { pending } => self.running.retain(|_, behind| *behind < *pending),
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
                    self.join(after);
                }
                Stmt::For { body, .. } => {
                    // Not at all, once, and after itself.
                    let first = self.next;
                    for _ in 0..2 {
                        self.next = first;
                        let before = self.running.clone();
                        self.block(body);
                        self.join(before);
                    }
                }
                Stmt::Barrier
                | Stmt::ClusterBarrier
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

    /// What may be unfinished on another way to here.
    fn join(&mut self, other: BTreeMap<Var, u32>) {
        for (x, behind) in other {
            let least = self.running.entry(x).or_insert(behind);
            *least = behind.min(*least);
        }
    }

    fn finished(&mut self, x: Var, place: u32, s: &Stmt) {
        if self.running.contains_key(&x) {
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

//! Which values and which control flow are the same for all threads of a cluster, of a block, or of a warp.
//!
//! Levels only rise: a variable is as divergent as the worst that is written to it and the worst control flow that
//! writes it, so the analysis walks the program until nothing changes. Structured control flow meets again after each
//! statement: what diverges inside a branch or loop does not outlive it except through variables.

use super::*;

/// How far a value or the control flow agrees; later is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The same for all threads of a cluster.
    Cluster,
    /// The same for all threads of a block.
    Block,
    /// The same for all lanes of a warp.
    Warp,
    /// Anything.
    Divergent,
}

/// Levels of a kernel's values.
#[derive(Debug)]
pub(super) struct Uniformity {
    values: Vec<Level>,
    vars: Vec<Level>,
    changed: bool,
}

impl Uniformity {
    /// Analyses a kernel whose indices are all in range.
    pub(super) fn of(kernel: &Kernel) -> Self {
        let mut u = Uniformity {
            values: vec![Level::Cluster; kernel.values.len()],
            vars: vec![Level::Cluster; kernel.vars.len()],
            changed: true,
        };
        while u.changed {
            u.changed = false;
            u.block(kernel, &kernel.body, Level::Cluster);
        }
        u
    }

    /// The level of a value, where it is visible.
    pub(super) fn value(&self, v: Val) -> Level {
        self.values[v.0 as usize]
    }

    /// The level of control flow inside a loop.
    pub(super) fn trip(&self, start: Val, end: Val, step: Val) -> Level {
        self.value(start).max(self.value(end)).max(self.value(step))
    }

    fn block(&mut self, kernel: &Kernel, stmts: &[Stmt], control: Level) {
        for s in stmts {
            match s {
                Stmt::Let(v) => {
                    let level = self.operation(kernel, *v);
                    self.raise(*v, level);
                }
                Stmt::Set(x, v) => self.assign(*x, self.value(*v).max(control)),
                Stmt::MmaGroup { acc, .. } => acc.iter().for_each(|x| self.assign(*x, Level::Divergent)),
                Stmt::If { cond, then, els } => {
                    let control = control.max(self.value(*cond));
                    self.block(kernel, then, control);
                    self.block(kernel, els, control);
                }
                Stmt::For { index, start, end, step, unroll: _, body } => {
                    // Of the threads that are still in the loop all have made the same number of rounds.
                    let level = self.value(*start).max(self.value(*step));
                    self.raise(*index, level);
                    self.block(kernel, body, control.max(self.trip(*start, *end, *step)));
                }
                Stmt::Store { .. }
                | Stmt::Barrier
                | Stmt::ClusterBarrier
                | Stmt::WarpSync
                | Stmt::Fence
                | Stmt::Prefetch { .. }
                | Stmt::AsyncCopy { .. }
                | Stmt::AsyncCommit
                | Stmt::AsyncWait { .. }
                | Stmt::GroupFence
                | Stmt::GroupWait { .. }
                | Stmt::GridWait
                | Stmt::GridLaunch
                | Stmt::Comment(_) => {}
            }
        }
    }

    fn assign(&mut self, x: Var, level: Level) {
        let old = &mut self.vars[x.0 as usize];
        self.changed |= level > *old;
        *old = level.max(*old);
    }

    fn raise(&mut self, v: Val, level: Level) {
        let old = &mut self.values[v.0 as usize];
        self.changed |= level > *old;
        *old = level.max(*old);
    }

    fn operation(&self, kernel: &Kernel, v: Val) -> Level {
        let op = &kernel.value(v).op;
        let mut worst = Level::Cluster;
        op.operands(&mut |a| worst = worst.max(self.value(a)));
        match op {
            Op::Special(s) => match s {
                Special::Thread | Special::Lane => Level::Divergent,
                Special::Warp => Level::Warp,
                Special::BlockX | Special::Rank => Level::Block,
                Special::BlockY | Special::Cluster => Level::Cluster,
            },
            Op::Get(x) => self.vars[x.0 as usize],
            Op::Load { mem: Mem::Global(i), .. } => match kernel.params[*i as usize].kind {
                // Another block may write between two threads' reads.
                ParamKind::Buffer { writable: true, .. } => Level::Divergent,
                ParamKind::Buffer { writable: false, .. } | ParamKind::Scalar(_) => worst,
            },
            // Each block has its own.
            Op::Load { mem: Mem::Shared(_), .. } => worst.max(Level::Block),
            Op::LoadMatrix { .. } | Op::AtomicAdd { .. } | Op::MmaI8 { .. } => Level::Divergent,
            Op::Across(_, value) => self.value(*value).min(Level::Warp),
            Op::Shuffle { mode, value, arg } => match mode {
                ShuffleMode::Index if self.value(*arg) <= Level::Warp => self.value(*value).min(Level::Warp),
                ShuffleMode::Index | ShuffleMode::Xor => self.value(*value),
            },
            Op::Const(_)
            | Op::Param(_)
            | Op::LoopIndex
            | Op::Unary(..)
            | Op::Binary(..)
            | Op::Compare(..)
            | Op::Fma(..)
            | Op::Select(..)
            | Op::Convert(..)
            | Op::Bitcast(..)
            | Op::FunnelShr { .. }
            | Op::Permute { .. }
            | Op::Dot4 { .. }
            | Op::Dot2 { .. }
            | Op::Halves(..)
            | Op::AddMin(..)
            | Op::PermuteBy(..)
            | Op::Vector(_)
            | Op::Extract(..) => worst,
        }
    }
}

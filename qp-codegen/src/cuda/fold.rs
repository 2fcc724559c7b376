//! What is printed inside another expression, what gets a line and a name, and where variables are declared.
//!
//! A value is printed where it is used if that is cheap to read and changes nothing: constants, parameters and
//! components always; pure arithmetic and reads of variables if used once, in the block of statements that defines
//! them, and (variables) not written in between. Loads, shuffles, products and atomics keep their place. What nobody
//! uses is not printed, except for what acts on others.

use std::collections::BTreeMap;

use crate::ir::*;

/// Operations that one printed expression may hold.
const LONGEST: u32 = 8;

/// How a value is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Not at all.
    Dead,
    /// Inside the expression that uses it.
    Inline,
    /// By a statement of its own, which names it.
    Named,
}

/// The printer's decisions on one kernel.
pub(super) struct Plan {
    pub form: Vec<Form>,
    /// Times each value is used by what is printed.
    pub uses: Vec<u32>,
    /// Variables that their first [`Stmt::Set`] declares; the others are declared at the head.
    pub declared_at_set: Vec<bool>,
}

#[derive(Clone, Copy)]
struct User {
    /// The block of statements, and the place in it, of the statement that uses the value.
    block: u32,
    place: usize,
    /// The value it defines.
    value: Option<Val>,
    /// It heads a loop: what it prints is evaluated in every round.
    repeats: bool,
}

struct Folder<'k> {
    kernel: &'k Kernel,
    plan: Plan,
    user: Vec<Option<User>>,
    /// Values that must have a name, because their user mentions them several times.
    must_name: Vec<bool>,
    /// For folded values, the place of the statement that prints them and whether that repeats it.
    root: Vec<Option<(usize, bool)>>,
    /// Operations printed in each statement, by block and place.
    sizes: BTreeMap<(u32, usize), u32>,
    blocks: u32,
}

/// Decides for all values of a valid kernel.
pub(super) fn plan(kernel: &Kernel) -> Plan {
    let n = kernel.values.len();
    let mut f = Folder {
        kernel,
        plan: Plan { form: vec![Form::Dead; n], uses: vec![0; n], declared_at_set: declarations(kernel) },
        user: vec![None; n],
        must_name: vec![false; n],
        root: vec![None; n],
        sizes: BTreeMap::new(),
        blocks: 0,
    };
    f.block(&kernel.body);
    f.plan
}

impl Folder<'_> {
    /// Last statement first: every use is seen before the definition.
    fn block(&mut self, stmts: &[Stmt]) {
        let block = self.blocks;
        self.blocks += 1;
        for (place, s) in stmts.iter().enumerate().rev() {
            let user = User { block, place, value: None, repeats: false };
            match s {
                Stmt::Let(v) => self.define(*v, user, stmts),
                Stmt::Set(_, v) => self.used(*v, user),
                Stmt::Store { mem: _, index, value, elem } => {
                    self.used(*index, user);
                    self.used(*value, user);
                    if self.kernel.value(*value).ty.lanes > 1 && elem.bytes() < 4 {
                        self.must_name[value.0 as usize] = true;
                    }
                }
                Stmt::If { cond, then, els } => {
                    self.block(els);
                    self.block(then);
                    self.used(*cond, user);
                }
                Stmt::For { index: _, start, end, step, unroll: _, body } => {
                    self.block(body);
                    for v in [start, end, step] {
                        self.used(*v, User { repeats: true, ..user });
                    }
                }
                Stmt::Prefetch { src: _, index } => self.used(*index, user),
                Stmt::AsyncCopy { dst: _, dst_index, src: _, src_index, bytes: _ } => {
                    self.used(*dst_index, user);
                    self.used(*src_index, user);
                }
                Stmt::MmaGroup { signed_a: _, fresh: _, a, acc: _, mem: _, first, stride: _ } => {
                    a.iter().flatten().chain([first]).for_each(|v| self.used(*v, user));
                }
                Stmt::Barrier
                | Stmt::ClusterBarrier
                | Stmt::WarpSync
                | Stmt::Fence
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

    fn used(&mut self, v: Val, by: User) {
        self.plan.uses[v.0 as usize] += 1;
        self.user[v.0 as usize] = Some(by);
    }

    fn define(&mut self, v: Val, here: User, stmts: &[Stmt]) {
        let i = v.0 as usize;
        let Value { op, ty, name } = self.kernel.value(v);
        if self.plan.uses[i] == 0 && !matches!(op, Op::AtomicAdd { .. }) {
            return;
        }
        let foldable = match op {
            Op::Const(_) | Op::Param(_) | Op::Special(_) => {
                self.plan.form[i] = Form::Inline;
                return;
            }
            Op::LoopIndex
            | Op::Load { .. }
            | Op::LoadMatrix { .. }
            | Op::AtomicAdd { .. }
            | Op::Shuffle { .. }
            | Op::Across(..)
            | Op::MmaI8 { .. } => false,
            Op::Extract(base, _) => {
                if !self.fold(v, here, stmts) {
                    // A component of a named vector is as short as a name.
                    self.must_name[base.0 as usize] = true;
                }
                self.plan.form[i] = Form::Inline;
                self.used(*base, User { value: Some(v), ..here });
                return;
            }
            Op::Unary(..)
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
            | Op::Get(_) => name.is_none() && !self.must_name[i],
        };
        let inline = foldable && self.fold(v, here, stmts);
        self.plan.form[i] = if inline { Form::Inline } else { Form::Named };
        let by_component = ty.lanes > 1 && matches!(op, Op::Unary(..) | Op::Binary(..) | Op::Fma(..));
        let saturates = matches!(op, Op::Convert(Scalar::I64, _));
        op.operands(&mut |a| {
            self.used(a, User { value: Some(v), ..here });
            if by_component || saturates {
                self.must_name[a.0 as usize] = true;
            }
        });
    }

    /// Whether `v` can be printed in its one user; notes where if so.
    fn fold(&mut self, v: Val, here: User, stmts: &[Stmt]) -> bool {
        let i = v.0 as usize;
        let Some(user) = self.user[i] else { return false };
        if self.plan.uses[i] != 1 || user.block != here.block {
            return false;
        }
        let (place, repeats) = match user.value.filter(|u| self.plan.form[u.0 as usize] == Form::Inline) {
            None => (user.place, user.repeats),
            Some(u) => match self.root[u.0 as usize] {
                Some(root) => root,
                // A component that is printed at several places.
                None => return false,
            },
        };
        if let Op::Get(var) = self.kernel.value(v).op {
            let written = stmts[here.place + 1..place].iter().any(|s| writes(s, var));
            if written || repeats {
                return false;
            }
        }
        let size = self.sizes.entry((here.block, place)).or_default();
        if *size >= LONGEST {
            return false;
        }
        *size += 1;
        self.root[i] = Some((place, repeats));
        true
    }
}

fn writes(s: &Stmt, var: Var) -> bool {
    let itself = match s {
        Stmt::Set(x, _) => *x == var,
        Stmt::MmaGroup { acc, .. } => acc.contains(&var),
        _ => false,
    };
    itself || s.nested().flatten().any(|s| writes(s, var))
}

/// A variable can be declared by its first `Set` if all else about it lies in the block that holds that.
fn declarations(kernel: &Kernel) -> Vec<bool> {
    // The block of each variable's first mention if that is a `Set`, and whether all later ones lie within.
    struct Seen {
        block: u32,
        good: bool,
    }
    fn walk(kernel: &Kernel, stmts: &[Stmt], next: &mut u32, open: &mut Vec<u32>, seen: &mut [Option<Seen>]) {
        open.push(*next);
        *next += 1;
        let block = open[open.len() - 1];
        for s in stmts {
            let (mentions, set): (&[Var], bool) = match s {
                Stmt::Set(x, _) => (std::slice::from_ref(x), true),
                Stmt::Let(v) => match &kernel.value(*v).op {
                    Op::Get(x) => (std::slice::from_ref(x), false),
                    _ => (&[], false),
                },
                Stmt::MmaGroup { acc, .. } => (acc, false),
                _ => (&[], false),
            };
            s.nested().for_each(|b| walk(kernel, b, next, open, seen));
            for x in mentions {
                match &mut seen[x.0 as usize] {
                    Some(s) => s.good &= open.contains(&s.block),
                    first => *first = Some(Seen { block, good: set }),
                }
            }
        }
        open.pop();
    }
    let mut seen: Vec<Option<Seen>> = kernel.vars.iter().map(|_| None).collect();
    walk(kernel, &kernel.body, &mut 0, &mut Vec::new(), &mut seen);
    seen.iter().map(|s| s.as_ref().is_some_and(|s| s.good)).collect()
}

//! Kernel → program: every value gets registers, one per component, so that execution is a walk over flat operations.
//!
//! Taking a vector apart or together, and reading 32 bits as another type, only rename registers. A register is reused
//! once its value is dead: the working set of a block stays in the CPU's cache.

use std::collections::BTreeMap;

use super::OpKind;
use crate::ir::*;

/// A register: one word (or one `i64`) for each thread of a cluster. Words and `i64`s are numbered apart; an
/// operation's type says which is meant.
pub(super) type Reg = u32;

/// An operation on scalars.
#[derive(Debug)]
pub(super) enum Code {
    Unary {
        op: UnaryOp,
        ty: Scalar,
        d: Reg,
        a: Reg,
    },
    Binary {
        op: BinaryOp,
        ty: Scalar,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    Compare {
        op: CompareOp,
        ty: Scalar,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    Fma {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    Select {
        ty: Scalar,
        d: Reg,
        cond: Reg,
        a: Reg,
        b: Reg,
    },
    Convert {
        from: Scalar,
        to: Scalar,
        d: Reg,
        a: Reg,
    },
    FunnelShr {
        d: Reg,
        lo: Reg,
        hi: Reg,
        shift: Reg,
    },
    Permute {
        d: Reg,
        a: Reg,
        b: Reg,
        selector: u32,
    },
    Dot4 {
        d: Reg,
        a: Reg,
        b: Reg,
        acc: Reg,
    },
    Dot2 {
        d: Reg,
        a: Reg,
        b: Reg,
        high: bool,
        acc: Reg,
    },
    Halves {
        op: HalvesOp,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    PermuteBy {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    AddMin {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    Load {
        mem: Mem,
        elem: Elem,
        /// Bytes from one index to the next.
        unit: u32,
        index: Reg,
        d: Vec<Reg>,
    },
    Store {
        mem: Mem,
        elem: Elem,
        index: Reg,
        value: Vec<Reg>,
    },
    LoadMatrix {
        mem: Mem,
        row: Reg,
        /// Where each lane's word lies.
        at: Reg,
        d: Vec<Reg>,
    },
    AtomicAdd {
        mem: Mem,
        ty: Scalar,
        d: Reg,
        index: Reg,
        value: Reg,
    },
    Shuffle {
        mode: ShuffleMode,
        d: Reg,
        value: Reg,
        arg: Reg,
    },
    Across {
        op: AcrossOp,
        d: Reg,
        value: Reg,
    },
    Mma {
        signed_a: bool,
        a: [Reg; 4],
        b: [Reg; 2],
        acc: [Reg; 4],
        d: [Reg; 4],
    },
    MmaGroup {
        signed_a: bool,
        fresh: bool,
        a: Vec<[Reg; 4]>,
        acc: Vec<[Reg; 4]>,
        array: u32,
        first: Reg,
        stride: u32,
    },
    /// Active lanes only: but for sums of warp groups, the one way a register is written twice.
    Copy {
        ty: Scalar,
        d: Reg,
        a: Reg,
    },
    If {
        cond: Reg,
        then: Vec<Instr>,
        els: Vec<Instr>,
    },
    For {
        index: Reg,
        start: Reg,
        end: Reg,
        step: Reg,
        body: Vec<Instr>,
    },
    Barrier,
    ClusterBarrier,
    WarpSync,
    AsyncCopy {
        dst: u32,
        dst_index: Reg,
        src: u32,
        src_index: Reg,
        bytes: u32,
    },
    AsyncCommit,
    AsyncWait {
        pending: u32,
    },
    GroupFence,
}

/// An operation with what reports need.
#[derive(Debug)]
pub(super) struct Instr {
    pub code: Code,
    /// Number of its statement, in the order of the text.
    pub at: u32,
    pub kind: OpKind,
}

/// A compiled kernel.
#[derive(Debug)]
pub(super) struct Program {
    pub body: Vec<Instr>,
    /// Number of registers of words.
    pub words: u32,
    /// Number of registers of `i64`.
    pub longs: u32,
    /// Registers that hold the same for all threads and blocks.
    pub word_constants: Vec<(Reg, u32)>,
    pub long_constants: Vec<(Reg, i64)>,
    pub specials: Vec<(Reg, Special)>,
    /// Register, index of the parameter.
    pub scalars: Vec<(Reg, u32)>,
}

/// Compiles a kernel that the validator accepts.
pub(super) fn compile(kernel: &Kernel) -> Program {
    let mut c = Compiler {
        kernel,
        regs: vec![None; kernel.values.len()],
        vars: Vec::new(),
        virtuals: Vec::new(),
        words: BTreeMap::new(),
        longs: BTreeMap::new(),
        specials: Vec::new(),
        scalars: Vec::new(),
        at: 0,
    };
    for v in &kernel.vars {
        let regs = c.fresh(v.ty, true);
        c.vars.push(regs);
    }
    let mut body = c.block(&kernel.body);
    allocate(c, &mut body)
}

struct Virtual {
    long: bool,
    /// Lives throughout: variables, constants, built-ins.
    pinned: bool,
    /// Number of loops around the definition.
    depth: usize,
    last_use: u32,
    place: Reg,
}

struct Compiler<'k> {
    kernel: &'k Kernel,
    /// Registers of each value's components.
    regs: Vec<Option<Vec<Reg>>>,
    vars: Vec<Vec<Reg>>,
    virtuals: Vec<Virtual>,
    words: BTreeMap<u32, Reg>,
    longs: BTreeMap<i64, Reg>,
    specials: Vec<(Reg, Special)>,
    scalars: Vec<(Reg, u32)>,
    /// Number of the present statement.
    at: u32,
}

impl Compiler<'_> {
    fn fresh(&mut self, ty: Type, pinned: bool) -> Vec<Reg> {
        let long = ty.scalar == Scalar::I64;
        let first = self.virtuals.len() as Reg;
        self.virtuals.extend((0..ty.lanes).map(|_| Virtual { long, pinned, depth: 0, last_use: 0, place: 0 }));
        (first..first + ty.lanes).collect()
    }

    fn of(&self, v: Val) -> &[Reg] {
        self.regs[v.0 as usize].as_deref().expect("the validator checked that values are defined before their use")
    }

    fn one(&self, v: Val) -> Reg {
        self.of(v)[0]
    }

    fn word(&mut self, bits: u32) -> Reg {
        if let Some(r) = self.words.get(&bits) {
            return *r;
        }
        let r = self.fresh(Type::U32, true)[0];
        self.words.insert(bits, r);
        r
    }

    fn block(&mut self, stmts: &[Stmt]) -> Vec<Instr> {
        let mut out = Vec::new();
        for s in stmts {
            self.statement(s, &mut out);
        }
        out
    }

    fn statement(&mut self, s: &Stmt, out: &mut Vec<Instr>) {
        let at = self.at;
        self.at += 1;
        let mut push = |code, kind| out.push(Instr { code, at, kind });
        match s {
            Stmt::Let(v) => {
                let regs = self.define(*v, &mut push);
                self.regs[v.0 as usize] = Some(regs);
            }
            Stmt::Set(x, v) => {
                let ty = self.kernel.var(*x).ty.scalar;
                for (&d, &a) in self.vars[x.0 as usize].iter().zip(self.of(*v)) {
                    push(Code::Copy { ty, d, a }, OpKind::Move);
                }
            }
            Stmt::Store { mem, index, value, elem } => push(
                Code::Store { mem: *mem, elem: *elem, index: self.one(*index), value: self.of(*value).to_vec() },
                match mem {
                    Mem::Global(_) => OpKind::GlobalStore,
                    Mem::Shared(_) => OpKind::SharedStore,
                },
            ),
            Stmt::If { cond, then, els } => {
                let cond = self.one(*cond);
                let (then, els) = (self.block(then), self.block(els));
                push(Code::If { cond, then, els }, OpKind::Control);
            }
            Stmt::For { index, start, end, step, unroll: _, body } => {
                let [start, end, step] = [start, end, step].map(|v| self.one(*v));
                let regs = self.fresh(Type::I32, false);
                let i = regs[0];
                self.regs[index.0 as usize] = Some(regs);
                let body = self.block(body);
                push(Code::For { index: i, start, end, step, body }, OpKind::Control);
            }
            Stmt::Barrier => push(Code::Barrier, OpKind::Sync),
            Stmt::ClusterBarrier => push(Code::ClusterBarrier, OpKind::Sync),
            Stmt::WarpSync => push(Code::WarpSync, OpKind::Sync),
            // Nothing that a program can see.
            Stmt::Prefetch { .. } => {}
            Stmt::AsyncCopy { dst, dst_index, src, src_index, bytes } => {
                let (dst_index, src_index) = (self.one(*dst_index), self.one(*src_index));
                push(Code::AsyncCopy { dst: *dst, dst_index, src: *src, src_index, bytes: *bytes }, OpKind::AsyncCopy);
            }
            Stmt::AsyncCommit => push(Code::AsyncCommit, OpKind::Sync),
            Stmt::AsyncWait { pending } => push(Code::AsyncWait { pending: *pending }, OpKind::Sync),
            Stmt::GroupFence => push(Code::GroupFence, OpKind::Sync),
            Stmt::MmaGroup { signed_a, fresh, a, acc, mem, first, stride } => {
                let code = Code::MmaGroup {
                    signed_a: *signed_a,
                    fresh: *fresh,
                    a: a.iter().map(|a| a.map(|v| self.one(v))).collect(),
                    acc: acc.iter().map(|x| four(&self.vars[x.0 as usize])).collect(),
                    array: *mem,
                    first: self.one(*first),
                    stride: *stride,
                };
                push(code, OpKind::Mma);
            }
            // Clusters run one after the other, kernels too; products are finished at once.
            Stmt::Fence | Stmt::GroupWait { .. } | Stmt::GridWait | Stmt::GridLaunch | Stmt::Comment(_) => {}
        }
    }

    /// The registers of a value, after pushing what computes them.
    fn define(&mut self, v: Val, push: &mut impl FnMut(Code, OpKind)) -> Vec<Reg> {
        let Value { op, ty, name: _ } = self.kernel.value(v);
        let scalar = ty.scalar;
        match op {
            Op::Const(c) => match *c {
                Const::Bool(x) => vec![self.word(x.into())],
                Const::I32(x) => vec![self.word(x as u32)],
                Const::U32(x) => vec![self.word(x)],
                Const::F32(x) => vec![self.word(x.to_bits())],
                Const::I64(x) => {
                    let r = self.longs.get(&x).copied().unwrap_or_else(|| self.fresh(Type::I64, true)[0]);
                    self.longs.insert(x, r);
                    vec![r]
                }
            },
            Op::Param(i) => {
                let d = self.fresh(*ty, true);
                self.scalars.push((d[0], *i));
                d
            }
            Op::Special(s) => match self.specials.iter().find(|(_, t)| t == s) {
                Some((r, _)) => vec![*r],
                None => {
                    let d = self.fresh(*ty, true);
                    self.specials.push((d[0], *s));
                    d
                }
            },
            Op::LoopIndex => unreachable!("the validator refuses a `Let` of a loop index"),
            Op::Get(x) => {
                let d = self.fresh(*ty, false);
                for (&d, &a) in d.iter().zip(&self.vars[x.0 as usize]) {
                    push(Code::Copy { ty: scalar, d, a }, OpKind::Move);
                }
                d
            }
            Op::Unary(op, a) => {
                let d = self.fresh(*ty, false);
                for (&d, &a) in d.iter().zip(self.of(*a)) {
                    push(Code::Unary { op: *op, ty: scalar, d, a }, arithmetic(scalar));
                }
                d
            }
            Op::Binary(op, a, b) => {
                let d = self.fresh(*ty, false);
                let kind = match op {
                    BinaryOp::Mul if scalar != Scalar::F32 => OpKind::IntMul,
                    BinaryOp::Div | BinaryOp::Rem => OpKind::Div,
                    _ => arithmetic(scalar),
                };
                for ((&d, &a), &b) in d.iter().zip(self.of(*a)).zip(self.of(*b)) {
                    push(Code::Binary { op: *op, ty: scalar, d, a, b }, kind);
                }
                d
            }
            Op::Compare(op, a, b) => {
                let ty = self.kernel.value(*a).ty.scalar;
                let d = self.fresh(Type::BOOL, false);
                push(Code::Compare { op: *op, ty, d: d[0], a: self.one(*a), b: self.one(*b) }, arithmetic(ty));
                d
            }
            Op::Fma(a, b, c) => {
                let d = self.fresh(*ty, false);
                for (i, &d) in d.iter().enumerate() {
                    let [a, b, c] = [a, b, c].map(|v| self.of(*v)[i]);
                    push(Code::Fma { d, a, b, c }, OpKind::Float);
                }
                d
            }
            Op::Select(cond, a, b) => {
                let d = self.fresh(*ty, false);
                for (i, &d) in d.iter().enumerate() {
                    let (a, b) = (self.of(*a)[i], self.of(*b)[i]);
                    push(Code::Select { ty: scalar, d, cond: self.one(*cond), a, b }, arithmetic(scalar));
                }
                d
            }
            Op::Convert(to, a) => {
                let from = self.kernel.value(*a).ty.scalar;
                let word = |s| matches!(s, Scalar::I32 | Scalar::U32 | Scalar::Bool);
                if from == *to || (word(from) && word(*to)) {
                    return self.of(*a).to_vec();
                }
                let d = self.fresh(*ty, false);
                push(Code::Convert { from, to: *to, d: d[0], a: self.one(*a) }, OpKind::Convert);
                d
            }
            Op::Bitcast(_, a) => self.of(*a).to_vec(),
            Op::FunnelShr { lo, hi, shift } => {
                let d = self.fresh(*ty, false);
                let [lo, hi, shift] = [lo, hi, shift].map(|v| self.one(*v));
                push(Code::FunnelShr { d: d[0], lo, hi, shift }, OpKind::Int);
                d
            }
            Op::Permute { a, b, selector } => {
                let d = self.fresh(*ty, false);
                push(Code::Permute { d: d[0], a: self.one(*a), b: self.one(*b), selector: *selector }, OpKind::Int);
                d
            }
            Op::Dot4 { a, b, acc } => {
                let d = self.fresh(*ty, false);
                push(Code::Dot4 { d: d[0], a: self.one(*a), b: self.one(*b), acc: self.one(*acc) }, OpKind::Dot4);
                d
            }
            Op::Dot2 { a, b, high, acc } => {
                let d = self.fresh(*ty, false);
                let (a, b, acc) = (self.one(*a), self.one(*b), self.one(*acc));
                push(Code::Dot2 { d: d[0], a, b, high: *high, acc }, OpKind::Dot2);
                d
            }
            Op::Halves(op, a, b) => {
                let d = self.fresh(*ty, false);
                push(Code::Halves { op: *op, d: d[0], a: self.one(*a), b: self.one(*b) }, OpKind::Float);
                d
            }
            Op::PermuteBy(a, b, c) => {
                let d = self.fresh(*ty, false);
                push(Code::PermuteBy { d: d[0], a: self.one(*a), b: self.one(*b), c: self.one(*c) }, OpKind::Int);
                d
            }
            Op::AddMin(a, b, c) => {
                let d = self.fresh(*ty, false);
                push(Code::AddMin { d: d[0], a: self.one(*a), b: self.one(*b), c: self.one(*c) }, OpKind::Int);
                d
            }
            Op::Vector(parts) => parts.iter().map(|p| self.one(*p)).collect(),
            Op::Extract(a, i) => vec![self.of(*a)[*i as usize]],
            Op::Load { mem, index, elem, lanes: _, cache: _ } => {
                let d = self.fresh(*ty, false);
                let kind = match mem {
                    Mem::Global(_) => OpKind::GlobalLoad,
                    Mem::Shared(_) => OpKind::SharedLoad,
                };
                let unit = if self.kernel.value(*index).ty == Type::U32 { 1 } else { elem.bytes() };
                push(Code::Load { mem: *mem, elem: *elem, unit, index: self.one(*index), d: d.clone() }, kind);
                d
            }
            Op::LoadMatrix { mem, row, lanes: _ } => {
                let (d, at) = (self.fresh(*ty, false), self.fresh(Type::I32, false)[0]);
                push(Code::LoadMatrix { mem: *mem, row: self.one(*row), at, d: d.clone() }, OpKind::SharedLoad);
                d
            }
            Op::AtomicAdd { mem, index, value } => {
                let d = self.fresh(*ty, false);
                let (index, value) = (self.one(*index), self.one(*value));
                push(Code::AtomicAdd { mem: *mem, ty: scalar, d: d[0], index, value }, OpKind::Atomic);
                d
            }
            Op::Shuffle { mode, value, arg } => {
                let d = self.fresh(*ty, false);
                let (value, arg) = (self.one(*value), self.one(*arg));
                push(Code::Shuffle { mode: *mode, d: d[0], value, arg }, OpKind::Shuffle);
                d
            }
            Op::Across(op, value) => {
                let d = self.fresh(*ty, false);
                let value = self.one(*value);
                push(Code::Across { op: *op, d: d[0], value }, OpKind::Shuffle);
                d
            }
            Op::MmaI8 { signed_a, a, b, acc } => {
                let d = self.fresh(*ty, false);
                let (a, b) = (a.map(|v| self.one(v)), b.map(|v| self.one(v)));
                let code = Code::Mma { signed_a: *signed_a, a, b, acc: four(self.of(*acc)), d: four(&d) };
                push(code, OpKind::Mma);
                d
            }
        }
    }
}

fn four(r: &[Reg]) -> [Reg; 4] {
    r.try_into().expect("four components")
}

fn arithmetic(ty: Scalar) -> OpKind {
    match ty {
        Scalar::Bool | Scalar::I32 | Scalar::U32 | Scalar::I64 => OpKind::Int,
        Scalar::F32 => OpKind::Float,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    Use,
    Def,
}

impl Code {
    /// Visits its own registers, uses before definitions; not those of nested code.
    fn registers(&mut self, f: &mut impl FnMut(&mut Reg, Access)) {
        use Access::{Def, Use};
        match self {
            Code::Unary { d, a, .. } | Code::Convert { d, a, .. } | Code::Copy { d, a, .. } => {
                f(a, Use);
                f(d, Def);
            }
            Code::Binary { d, a, b, .. }
            | Code::Compare { d, a, b, .. }
            | Code::Halves { d, a, b, .. }
            | Code::Permute { d, a, b, .. } => {
                f(a, Use);
                f(b, Use);
                f(d, Def);
            }
            Code::Fma { d, a, b, c }
            | Code::AddMin { d, a, b, c }
            | Code::PermuteBy { d, a, b, c }
            | Code::Select { d, cond: c, a, b, .. }
            | Code::FunnelShr { d, lo: a, hi: b, shift: c }
            | Code::Dot4 { d, a, b, acc: c }
            | Code::Dot2 { d, a, b, high: _, acc: c } => {
                f(a, Use);
                f(b, Use);
                f(c, Use);
                f(d, Def);
            }
            Code::Load { index, d, .. } => {
                f(index, Use);
                d.iter_mut().for_each(|d| f(d, Def));
            }
            Code::LoadMatrix { row, at, d, .. } => {
                f(row, Use);
                f(at, Def);
                d.iter_mut().for_each(|d| f(d, Def));
            }
            Code::Store { index, value, .. } => {
                f(index, Use);
                value.iter_mut().for_each(|v| f(v, Use));
            }
            Code::AtomicAdd { d, index, value, .. } => {
                f(index, Use);
                f(value, Use);
                f(d, Def);
            }
            Code::Shuffle { d, value, arg, .. } => {
                f(value, Use);
                f(arg, Use);
                f(d, Def);
            }
            Code::Across { op: _, d, value } => {
                f(value, Use);
                f(d, Def);
            }
            Code::Mma { a, b, acc, d, .. } => {
                a.iter_mut().chain(b).chain(acc).for_each(|r| f(r, Use));
                d.iter_mut().for_each(|d| f(d, Def));
            }
            // Accumulators are registers of variables, which live throughout.
            Code::MmaGroup { a, acc, first, .. } => {
                a.iter_mut().chain(acc).flatten().chain([first]).for_each(|r| f(r, Use));
            }
            Code::AsyncCopy { dst_index, src_index, .. } => {
                f(dst_index, Use);
                f(src_index, Use);
            }
            Code::If { cond, .. } => f(cond, Use),
            Code::For { index, start, end, step, .. } => {
                f(start, Use);
                f(end, Use);
                f(step, Use);
                f(index, Def);
            }
            Code::Barrier
            | Code::ClusterBarrier
            | Code::WarpSync
            | Code::AsyncCommit
            | Code::AsyncWait { .. }
            | Code::GroupFence => {}
        }
    }
}

/// Positions that `code` takes: one an operation, and one more for the end of a loop.
fn positions(code: &[Instr]) -> u32 {
    let of = |i: &Instr| match &i.code {
        Code::If { then, els, .. } => 1 + positions(then) + positions(els),
        Code::For { body, .. } => 2 + positions(body),
        _ => 1,
    };
    code.iter().map(of).sum()
}

/// Finds each register's last use: `loops` holds the end positions of the loops around `code`.
fn live(code: &mut [Instr], at: &mut u32, loops: &mut Vec<u32>, virtuals: &mut [Virtual]) {
    for i in code {
        let here = *at;
        i.code.registers(&mut |r, access| {
            let v = &mut virtuals[*r as usize];
            if access == Access::Def && !v.pinned {
                v.depth = loops.len();
            }
            // Used in a loop that the definition is outside of: needed again in the next round.
            let end = loops.get(v.depth).map_or(here, |end| *end);
            v.last_use = v.last_use.max(end);
        });
        *at += 1;
        match &mut i.code {
            Code::If { then, els, .. } => {
                live(then, at, loops, virtuals);
                live(els, at, loops, virtuals);
            }
            Code::For { index, end, step, body, .. } => {
                let last = here + 1 + positions(body);
                virtuals[*index as usize].depth = loops.len() + 1;
                for r in [*index, *end, *step] {
                    let v = &mut virtuals[r as usize];
                    v.last_use = v.last_use.max(last);
                }
                loops.push(last);
                live(body, at, loops, virtuals);
                loops.pop();
                *at += 1;
            }
            _ => {}
        }
    }
}

struct Places {
    /// Free registers and the number ever used, for words and `i64`s.
    free: [Vec<Reg>; 2],
    used: [u32; 2],
    /// Registers to give back after each position.
    ends: Vec<Vec<Reg>>,
}

impl Places {
    fn take(&mut self, long: bool) -> Reg {
        let k = usize::from(long);
        self.free[k].pop().unwrap_or_else(|| {
            self.used[k] += 1;
            self.used[k] - 1
        })
    }

    fn release(&mut self, at: u32, virtuals: &[Virtual]) {
        for r in std::mem::take(&mut self.ends[at as usize]) {
            let v = &virtuals[r as usize];
            self.free[usize::from(v.long)].push(v.place);
        }
    }

    fn assign(&mut self, code: &mut [Instr], at: &mut u32, virtuals: &mut [Virtual]) {
        for i in code {
            let here = *at;
            i.code.registers(&mut |r, access| {
                let v = &mut virtuals[*r as usize];
                if access == Access::Def && !v.pinned {
                    v.place = self.take(v.long);
                }
                *r = v.place;
            });
            self.release(here, virtuals);
            *at += 1;
            match &mut i.code {
                Code::If { then, els, .. } => {
                    self.assign(then, at, virtuals);
                    self.assign(els, at, virtuals);
                }
                Code::For { body, .. } => {
                    self.assign(body, at, virtuals);
                    self.release(*at, virtuals);
                    *at += 1;
                }
                _ => {}
            }
        }
    }
}

fn allocate(c: Compiler<'_>, body: &mut Vec<Instr>) -> Program {
    let mut virtuals = c.virtuals;
    live(body, &mut 0, &mut Vec::new(), &mut virtuals);
    let mut places =
        Places { free: [Vec::new(), Vec::new()], used: [0; 2], ends: vec![Vec::new(); positions(body) as usize] };
    for (r, v) in virtuals.iter_mut().enumerate() {
        if v.pinned {
            v.place = places.take(v.long);
        } else {
            places.ends[v.last_use as usize].push(r as Reg);
        }
    }
    places.assign(body, &mut 0, &mut virtuals);
    let place = |r: Reg| virtuals[r as usize].place;
    Program {
        body: std::mem::take(body),
        words: places.used[0],
        longs: places.used[1],
        word_constants: c.words.iter().map(|(x, r)| (place(*r), *x)).collect(),
        long_constants: c.longs.iter().map(|(x, r)| (place(*r), *x)).collect(),
        specials: c.specials.iter().map(|(r, s)| (place(*r), *s)).collect(),
        scalars: c.scalars.iter().map(|(r, i)| (place(*r), *i)).collect(),
    }
}

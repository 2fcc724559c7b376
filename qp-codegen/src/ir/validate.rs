//! The validator: what it accepts the printer prints, and the interpreter runs until bad data stops it.
//!
//! All problems of a kernel are found in one walk. They are mistakes of a lowering, not of a user's spec.

use std::collections::BTreeSet;

use super::uniform::{Level, Uniformity};
use super::*;

/// Checks a kernel.
///
/// # Errors
/// Everything that is wrong with it.
pub fn validate(kernel: &Kernel) -> Result<(), Problems> {
    let mut v = Validator {
        kernel,
        problems: Vec::new(),
        visible: vec![false; kernel.values.len()],
        defined: vec![false; kernel.values.len()],
        set: vec![false; kernel.vars.len()],
        waited: !kernel.dependent_launch,
        at: None,
        next: 0,
    };
    v.head();
    v.block(&kernel.body, true);
    if !v.waited {
        v.at = None;
        v.problem(Invalid::GridWait);
    }
    // The rest is only known of what is otherwise in order.
    if v.problems.is_empty() {
        v.next = 0;
        v.control(&kernel.body, Level::Cluster, &Uniformity::of(kernel));
        v.problems.extend(unfinished::problems(kernel));
    }
    if v.problems.is_empty() {
        return Ok(());
    }
    Err(Problems { kernel: kernel.name.clone(), problems: v.problems })
}

struct Validator<'k> {
    kernel: &'k Kernel,
    problems: Vec<Problem>,
    visible: Vec<bool>,
    defined: Vec<bool>,
    /// Variables that every way to here has set.
    set: Vec<bool>,
    /// The grid wait is behind us, or there is none.
    waited: bool,
    at: Option<(u32, &'k Stmt)>,
    next: u32,
}

type Check<T = ()> = Result<T, Invalid>;

impl<'k> Validator<'k> {
    fn problem(&mut self, what: Invalid) {
        let at = self.at.map(|(n, s)| (n, statement(self.kernel, s)));
        self.problems.push(Problem { at, what });
    }

    fn check(&mut self, result: Check) {
        if let Err(what) = result {
            self.problem(what);
        }
    }

    fn head(&mut self) {
        let k = self.kernel;
        let mut names = BTreeSet::new();
        let all = k.params.iter().map(|p| &p.name).chain(k.shared.iter().map(|s| &s.name));
        for name in [&k.name].into_iter().chain(all) {
            let mut chars = name.chars();
            let starts = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            if !starts || !chars.all(|c| c.is_ascii_alphanumeric() || c == '_') {
                self.problem(Invalid::Name(name.clone()));
            }
            if !names.insert(name) && *name != k.name {
                self.problem(Invalid::SameName(name.clone()));
            }
        }
        if k.threads == 0 || k.threads > 1024 || !k.threads.is_multiple_of(32) {
            self.problem(Invalid::Threads(k.threads));
        }
        let [x, y] = k.grid;
        if x == 0 || y == 0 || x > i32::MAX as u32 || y > 65535 {
            self.problem(Invalid::Grid(x, y));
        }
        if k.cluster == 0 || k.cluster > MAX_CLUSTER || !x.is_multiple_of(k.cluster) {
            self.problem(Invalid::Cluster(k.cluster));
        }
        if k.min_blocks == 0 || u64::from(k.min_blocks) * u64::from(k.threads) > 2048 {
            self.problem(Invalid::MinBlocks(k.min_blocks));
        }
        let bytes: u64 = k.shared.iter().map(|s| u64::from(s.len) * u64::from(s.elem.bytes())).sum();
        if bytes > 227 << 10 || k.shared.iter().any(|s| s.len == 0) {
            self.problem(Invalid::Shared(bytes));
        }
        for p in &k.params {
            if let Some(len) = p.len.filter(|len| *len > i32::MAX as u64) {
                self.problem(Invalid::Length { name: p.name.clone(), len });
            }
            if let ParamKind::Scalar(s @ (Scalar::Bool | Scalar::I64)) = p.kind {
                self.problem(Invalid::Parameter(s));
            }
        }
        for ty in k.values.iter().map(|v| v.ty).chain(k.vars.iter().map(|v| v.ty)) {
            let words = matches!(ty.scalar, Scalar::I32 | Scalar::U32 | Scalar::F32);
            if ty.lanes != 1 && !(words && matches!(ty.lanes, 2 | 4)) {
                self.problem(Invalid::NoType(ty));
            }
        }
    }

    fn block(&mut self, stmts: &'k [Stmt], top: bool) {
        let mut made = Vec::new();
        for s in stmts {
            self.at = Some((self.next, s));
            self.next += 1;
            match s {
                Stmt::Let(v) => {
                    let result = self.define(*v, &mut made).and_then(|()| self.operation(*v));
                    self.check(result);
                }
                Stmt::Set(x, v) => {
                    let result = self.assign(*x, *v);
                    self.check(result);
                }
                Stmt::Store { mem, index, value, elem } => {
                    let result = self.store(*mem, *index, *value, *elem);
                    self.check(result);
                }
                Stmt::If { cond, then, els } => {
                    let result = self.of(*cond, Type::BOOL, "bool");
                    self.check(result);
                    let before = self.set.clone();
                    self.block(then, false);
                    let after = std::mem::replace(&mut self.set, before);
                    self.block(els, false);
                    self.set.iter_mut().zip(after).for_each(|(a, b)| *a &= b);
                }
                Stmt::For { index, start, end, step, unroll: _, body } => {
                    for v in [start, end, step] {
                        let result = self.of(*v, Type::I32, "i32");
                        self.check(result);
                    }
                    if let Some(by) = self.constant(*step).filter(|by| *by <= 0) {
                        self.problem(Invalid::Operand(by));
                    }
                    let mut own = Vec::new();
                    let result = self.define(*index, &mut own).and_then(|()| match self.kernel.value(*index) {
                        Value { op: Op::LoopIndex, ty: Type::I32, name: _ } => Ok(()),
                        _ => Err(Invalid::LoopIndex),
                    });
                    self.check(result);
                    let before = self.set.clone();
                    self.block(body, false);
                    self.set = before;
                    own.into_iter().for_each(|v| self.hide(v));
                }
                Stmt::Prefetch { src, index } => {
                    let index = self.of(*index, Type::I32, "i32");
                    let result = index.and_then(|()| self.memory(Mem::Global(*src), Elem::U32, 1));
                    self.check(result);
                }
                Stmt::AsyncCopy { dst, dst_index, src, src_index, bytes } => {
                    let result = self.copy((*dst, *dst_index), (*src, *src_index), *bytes);
                    self.check(result);
                }
                Stmt::MmaGroup { signed_a: _, fresh: _, a, acc, mem, first, stride } => {
                    let result = self.group(a, acc, (*mem, *first), *stride);
                    self.check(result);
                }
                Stmt::GridWait => {
                    if self.kernel.dependent_launch && (!top || self.waited) {
                        self.problem(Invalid::GridWait);
                    }
                    self.waited = true;
                }
                Stmt::ClusterBarrier if self.kernel.cluster == 1 => self.problem(Invalid::NoCluster),
                Stmt::Barrier
                | Stmt::ClusterBarrier
                | Stmt::WarpSync
                | Stmt::Fence
                | Stmt::AsyncCommit
                | Stmt::AsyncWait { .. }
                | Stmt::GroupFence
                | Stmt::GroupWait { .. }
                | Stmt::GridLaunch
                | Stmt::Comment(_) => {}
            }
        }
        made.into_iter().for_each(|v| self.hide(v));
    }

    fn hide(&mut self, v: Val) {
        self.visible[v.0 as usize] = false;
    }

    fn define(&mut self, v: Val, made: &mut Vec<Val>) -> Check {
        let i = v.0 as usize;
        if i >= self.defined.len() {
            return Err(Invalid::Undefined(v));
        }
        if std::mem::replace(&mut self.defined[i], true) {
            return Err(Invalid::Redefined(v));
        }
        // It may not mention itself, which its own check, later, would then allow.
        let mut itself = false;
        self.kernel.value(v).op.operands(&mut |a| itself |= a == v);
        self.visible[i] = true;
        made.push(v);
        if itself { Err(Invalid::Undefined(v)) } else { Ok(()) }
    }

    /// The type of a visible value.
    fn ty(&self, v: Val) -> Check<Type> {
        match self.visible.get(v.0 as usize) {
            Some(true) => Ok(self.kernel.value(v).ty),
            Some(false) | None => Err(Invalid::Undefined(v)),
        }
    }

    fn of(&self, v: Val, ty: Type, wanted: &'static str) -> Check {
        let found = self.ty(v)?;
        if found == ty { Ok(()) } else { Err(Invalid::Type { value: v, found, wanted }) }
    }

    /// A scalar of one of `kinds`.
    fn scalar(&self, v: Val, kinds: &[Scalar], wanted: &'static str) -> Check<Scalar> {
        let found = self.ty(v)?;
        if found.lanes == 1 && kinds.contains(&found.scalar) {
            return Ok(found.scalar);
        }
        Err(Invalid::Type { value: v, found, wanted })
    }

    fn same(&self, v: Val, ty: Type) -> Check {
        self.of(v, ty, "value of the same type as its partner")
    }

    fn var(&self, x: Var) -> Check<Type> {
        self.kernel.vars.get(x.0 as usize).map(|v| v.ty).ok_or(Invalid::NoVariable(x))
    }

    fn assign(&mut self, x: Var, v: Val) -> Check {
        let ty = self.var(x)?;
        self.of(v, ty, "value of the variable's type")?;
        self.set[x.0 as usize] = true;
        Ok(())
    }

    /// The type that an operation's result has; its operands are checked.
    fn result(&self, op: &Op) -> Check<Type> {
        const WORDS: &[Scalar] = &[Scalar::I32, Scalar::U32, Scalar::F32];
        match op {
            Op::Const(c) => Ok(match c {
                Const::Bool(_) => Type::BOOL,
                Const::I32(_) => Type::I32,
                Const::U32(_) => Type::U32,
                Const::I64(_) => Type::I64,
                Const::F32(_) => Type::F32,
            }),
            Op::Param(i) => match self.kernel.params.get(*i as usize).map(|p| p.kind) {
                Some(ParamKind::Scalar(scalar)) => Ok(Type { scalar, lanes: 1 }),
                Some(ParamKind::Buffer { .. }) | None => Err(Invalid::NoMemory),
            },
            Op::Special(_) => Ok(Type::I32),
            Op::LoopIndex => Err(Invalid::LoopIndex),
            Op::Get(x) => {
                let ty = self.var(*x)?;
                if self.set[x.0 as usize] { Ok(ty) } else { Err(Invalid::Unset(*x)) }
            }
            Op::Unary(op, a) => {
                let ty = self.ty(*a)?;
                let fine = match op {
                    UnaryOp::Neg | UnaryOp::Abs => matches!(ty.scalar, Scalar::I32 | Scalar::I64 | Scalar::F32),
                    UnaryOp::Not => ty.scalar != Scalar::F32,
                    UnaryOp::Sqrt => ty.scalar == Scalar::F32,
                };
                if fine { Ok(ty) } else { Err(Invalid::NoOperation(ty)) }
            }
            Op::Binary(op, a, b) => {
                let ty = self.ty(*a)?;
                self.same(*b, ty)?;
                let fine = match op {
                    BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div | BinaryOp::Min | BinaryOp::Max => {
                        ty.scalar != Scalar::Bool
                    }
                    BinaryOp::Rem | BinaryOp::Shl | BinaryOp::Shr => !matches!(ty.scalar, Scalar::Bool | Scalar::F32),
                    BinaryOp::And | BinaryOp::Or | BinaryOp::Xor => ty.scalar != Scalar::F32,
                };
                if !fine {
                    return Err(Invalid::NoOperation(ty));
                }
                self.operand(*op, ty, *b)?;
                Ok(ty)
            }
            Op::Compare(op, a, b) => {
                let ty = self.ty(*a)?;
                self.same(*b, ty)?;
                let equality = matches!(op, CompareOp::Eq | CompareOp::Ne);
                if ty.lanes == 1 && (ty.scalar != Scalar::Bool || equality) {
                    return Ok(Type::BOOL);
                }
                Err(Invalid::NoOperation(ty))
            }
            Op::Fma(a, b, c) => {
                let ty = self.ty(*a)?;
                self.same(*b, ty)?;
                self.same(*c, ty)?;
                if ty.scalar == Scalar::F32 { Ok(ty) } else { Err(Invalid::NoOperation(ty)) }
            }
            Op::Select(c, a, b) => {
                self.of(*c, Type::BOOL, "bool")?;
                let ty = self.ty(*a)?;
                self.same(*b, ty)?;
                Ok(ty)
            }
            Op::Convert(to, a) => {
                let all = &[Scalar::Bool, Scalar::I32, Scalar::U32, Scalar::I64, Scalar::F32];
                self.scalar(*a, all, "scalar")?;
                let ty = Type { scalar: *to, lanes: 1 };
                if *to == Scalar::Bool { Err(Invalid::NoOperation(ty)) } else { Ok(ty) }
            }
            Op::Bitcast(to, a) => {
                self.scalar(*a, WORDS, "scalar of 32 bits")?;
                let ty = Type { scalar: *to, lanes: 1 };
                if WORDS.contains(to) { Ok(ty) } else { Err(Invalid::NoOperation(ty)) }
            }
            Op::FunnelShr { lo: a, hi: b, shift: c } | Op::AddMin(a, b, c) | Op::PermuteBy(a, b, c) => {
                [a, b, c].into_iter().try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
                Ok(Type::U32)
            }
            Op::Permute { a, b, selector } => {
                [a, b].into_iter().try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
                if *selector > 0xffff { Err(Invalid::Selector(*selector)) } else { Ok(Type::U32) }
            }
            Op::Halves(_, a, b) => {
                [a, b].into_iter().try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
                Ok(Type::U32)
            }
            Op::Dot4 { a, b, acc } | Op::Dot2 { a, b, high: _, acc } => {
                [a, b].into_iter().try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
                self.of(*acc, Type::I32, "i32")?;
                Ok(Type::I32)
            }
            Op::Vector(parts) => {
                let first = *parts.first().ok_or(Invalid::Component(0))?;
                let scalar = self.scalar(first, WORDS, "scalar of 32 bits")?;
                parts.iter().try_for_each(|p| self.same(*p, Type { scalar, lanes: 1 }))?;
                let ty = Type { scalar, lanes: parts.len() as u32 };
                if matches!(parts.len(), 2 | 4) { Ok(ty) } else { Err(Invalid::NoType(ty)) }
            }
            Op::Extract(a, i) => {
                let ty = self.ty(*a)?;
                let fine = ty.lanes > 1 && *i < ty.lanes;
                if fine { Ok(Type { lanes: 1, ..ty }) } else { Err(Invalid::Component(*i)) }
            }
            Op::Load { mem, index, elem, lanes, cache } => {
                // A `U32` index counts bytes; whether those are in bounds and aligned, only a run can tell.
                let in_bytes = self.ty(*index)? == Type::U32;
                self.memory(*mem, *elem, *lanes)?;
                if !in_bytes {
                    self.access(*mem, *index, *elem, *lanes)?;
                }
                let coherent = *cache == Cache::Default;
                if !coherent && self.writable(*mem)? {
                    return Err(Invalid::CacheMode(self.kernel.mem(*mem).0.into()));
                }
                if coherent && matches!(mem, Mem::Global(_)) && !self.waited {
                    return Err(Invalid::BeforeWait);
                }
                Ok(Type { scalar: elem.scalar(), lanes: *lanes })
            }
            Op::LoadMatrix { mem, row, lanes } => {
                if matches!(mem, Mem::Global(_)) {
                    return Err(Invalid::NoMemory);
                }
                if !matches!(lanes, 2 | 4) {
                    return Err(Invalid::Width { lanes: *lanes, elem: Elem::U32 });
                }
                self.access(*mem, *row, Elem::U32, 4)?;
                Ok(Type { scalar: Scalar::U32, lanes: *lanes })
            }
            Op::AtomicAdd { mem, index, value } => {
                self.access(*mem, *index, Elem::U32, 1)?;
                self.written(*mem)?;
                let scalar = self.scalar(*value, &[Scalar::I32, Scalar::U32], "i32 or u32")?;
                Ok(Type { scalar, lanes: 1 })
            }
            Op::Shuffle { mode, value, arg } => {
                let scalar = self.scalar(*value, WORDS, "scalar of 32 bits")?;
                self.of(*arg, Type::I32, "i32")?;
                match (mode, self.constant(*arg)) {
                    (ShuffleMode::Xor, Some(mask)) if !(0..32).contains(&mask) => Err(Invalid::Operand(mask)),
                    (ShuffleMode::Xor | ShuffleMode::Index, _) => Ok(Type { scalar, lanes: 1 }),
                }
            }
            Op::Across(_, value) => {
                self.of(*value, Type::U32, "u32")?;
                Ok(Type::U32)
            }
            Op::MmaI8 { signed_a: _, a, b, acc } => {
                a.iter().chain(b).try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
                self.of(*acc, Type::I32X4, "i32x4")?;
                Ok(Type::I32X4)
            }
        }
    }

    fn operation(&self, v: Val) -> Check {
        let Value { op, ty, name: _ } = self.kernel.value(v);
        let actual = self.result(op)?;
        if actual == *ty { Ok(()) } else { Err(Invalid::Noted { noted: *ty, actual }) }
    }

    /// A constant divisor or shift that always traps.
    fn operand(&self, op: BinaryOp, ty: Type, b: Val) -> Check {
        let bits = if ty.scalar == Scalar::I64 { 64 } else { 32 };
        let Some(b) = self.constant(b) else { return Ok(()) };
        let traps = match op {
            BinaryOp::Div => b == 0,
            BinaryOp::Rem => b <= 0,
            BinaryOp::Shl | BinaryOp::Shr => !(0..bits).contains(&b),
            BinaryOp::Add
            | BinaryOp::Sub
            | BinaryOp::Mul
            | BinaryOp::And
            | BinaryOp::Or
            | BinaryOp::Xor
            | BinaryOp::Min
            | BinaryOp::Max => false,
        };
        if traps { Err(Invalid::Operand(b)) } else { Ok(()) }
    }

    /// An integer constant, also of a few sums and products of such.
    fn constant(&self, v: Val) -> Option<i64> {
        self.constant_within(v, 4)
    }

    fn constant_within(&self, v: Val, depth: u32) -> Option<i64> {
        match &self.kernel.values.get(v.0 as usize)?.op {
            Op::Const(Const::I32(x)) => Some((*x).into()),
            Op::Const(Const::U32(x)) => Some((*x).into()),
            Op::Const(Const::I64(x)) => Some(*x),
            Op::Binary(op, a, b) if depth > 0 => {
                let (a, b) = (self.constant_within(*a, depth - 1)?, self.constant_within(*b, depth - 1)?);
                match op {
                    BinaryOp::Add => a.checked_add(b),
                    BinaryOp::Sub => a.checked_sub(b),
                    BinaryOp::Mul => a.checked_mul(b),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// That a memory can be accessed in this width at all.
    fn memory(&self, mem: Mem, elem: Elem, lanes: u32) -> Check {
        if !matches!(lanes, 1 | 2 | 4) || lanes * elem.bytes() > 16 {
            return Err(Invalid::Width { lanes, elem });
        }
        match mem {
            Mem::Global(i) => match self.kernel.params.get(i as usize).map(|p| p.kind) {
                Some(ParamKind::Buffer { .. }) => {}
                Some(ParamKind::Scalar(_)) | None => return Err(Invalid::NoMemory),
            },
            Mem::Shared(i) if i as usize >= self.kernel.shared.len() => return Err(Invalid::NoMemory),
            Mem::Shared(_) => {}
        }
        Ok(())
    }

    fn access(&self, mem: Mem, index: Val, elem: Elem, lanes: u32) -> Check {
        self.of(index, Type::I32, "i32")?;
        self.memory(mem, elem, lanes)?;
        let Some(at) = self.constant(index) else { return Ok(()) };
        let size = match mem {
            Mem::Global(i) => match self.kernel.params[i as usize].len {
                Some(_) => i64::try_from(self.kernel.least_bytes(i as usize)).unwrap_or(i64::MAX),
                None => i64::MAX,
            },
            Mem::Shared(i) => {
                let s = &self.kernel.shared[i as usize];
                i64::from(s.len) * i64::from(s.elem.bytes())
            }
        };
        let inside = at >= 0 && (at + i64::from(lanes)) * i64::from(elem.bytes()) <= size;
        if inside && at % i64::from(lanes) == 0 {
            return Ok(());
        }
        Err(Invalid::Index { memory: self.kernel.mem(mem).0.into(), index: at })
    }

    fn writable(&self, mem: Mem) -> Check<bool> {
        match mem {
            Mem::Shared(_) => Ok(true),
            Mem::Global(i) => match self.kernel.params.get(i as usize).map(|p| p.kind) {
                Some(ParamKind::Buffer { writable, .. }) => Ok(writable),
                Some(ParamKind::Scalar(_)) | None => Err(Invalid::NoMemory),
            },
        }
    }

    fn written(&self, mem: Mem) -> Check {
        if !self.writable(mem)? {
            return Err(Invalid::ReadOnly(self.kernel.mem(mem).0.into()));
        }
        if matches!(mem, Mem::Global(_)) && !self.waited { Err(Invalid::BeforeWait) } else { Ok(()) }
    }

    fn store(&self, mem: Mem, index: Val, value: Val, elem: Elem) -> Check {
        let found = self.ty(value)?;
        self.access(mem, index, elem, found.lanes)?;
        self.written(mem)?;
        if found.scalar == elem.scalar() {
            return Ok(());
        }
        Err(Invalid::Type { value, found, wanted: "value of the element's type" })
    }

    fn copy(&self, dst: (u32, Val), src: (u32, Val), bytes: u32) -> Check {
        if !matches!(bytes, 4 | 8 | 16) {
            return Err(Invalid::CopyWidth(bytes));
        }
        self.access(Mem::Global(src.0), src.1, Elem::U32, 1)?;
        self.of(dst.1, Type::I32, "i32")?;
        let array = self.kernel.shared.get(dst.0 as usize).ok_or(Invalid::NoMemory)?;
        let size = i64::from(array.len) * i64::from(array.elem.bytes());
        match self.constant(dst.1) {
            Some(at) if at < 0 || (at + 1) * i64::from(bytes) > size => {
                Err(Invalid::Index { memory: array.name.clone(), index: at })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn group(&self, a: &[[Val; 4]], acc: &[Var], b: (u32, Val), stride: u32) -> Check {
        if !self.kernel.threads.is_multiple_of(128) {
            return Err(Invalid::GroupThreads(self.kernel.threads));
        }
        let columns = acc.len() as u64 * 8;
        if acc.is_empty() || columns > MAX_GROUP_COLUMNS.into() || u64::from(group_columns(columns as u32)) != columns {
            return Err(Invalid::GroupColumns(columns));
        }
        a.iter().flatten().try_for_each(|v| self.of(*v, Type::U32, "u32"))?;
        for (i, x) in acc.iter().enumerate() {
            if self.var(*x)? != Type::I32X4 {
                return Err(Invalid::NoOperation(self.var(*x)?));
            }
            if !self.set[x.0 as usize] {
                return Err(Invalid::Unset(*x));
            }
            if acc[..i].contains(x) {
                return Err(Invalid::SameAccumulator(*x));
            }
        }
        self.of(b.1, Type::I32, "i32")?;
        let array = self.kernel.shared.get(b.0 as usize).ok_or(Invalid::NoMemory)?;
        let Some(units) = (2 * a.len() as u64).checked_sub(1) else { return Err(Invalid::Operand(0)) };
        // It is told in 14 bits.
        if stride == 0 || stride >= 1 << 14 {
            return Err(Invalid::Operand(stride.into()));
        }
        let (cells, size) =
            (units * u64::from(stride) + columns, u64::from(array.len) * u64::from(array.elem.bytes()) / 16);
        match self.constant(b.1) {
            Some(at) if at < 0 || at as u64 + cells > size => {
                Err(Invalid::Index { memory: array.name.clone(), index: at })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Looks for what needs threads together where they may have parted.
    fn control(&mut self, stmts: &'k [Stmt], control: Level, uniform: &Uniformity) {
        for s in stmts {
            self.at = Some((self.next, s));
            self.next += 1;
            match s {
                Stmt::ClusterBarrier if control > Level::Cluster => self.problem(Invalid::Divergent("cluster")),
                Stmt::Barrier if control > Level::Block => self.problem(Invalid::Divergent("block")),
                Stmt::WarpSync if control > Level::Warp => self.problem(Invalid::Divergent("warp")),
                Stmt::MmaGroup { .. } | Stmt::GroupWait { .. } if control > Level::Block => {
                    self.problem(Invalid::Divergent("block"))
                }
                Stmt::MmaGroup { first, .. } if uniform.value(*first) > Level::Warp => {
                    self.problem(Invalid::Divergent("warp"));
                }
                Stmt::Let(v) => {
                    let op = &self.kernel.value(*v).op;
                    let together =
                        matches!(op, Op::Shuffle { .. } | Op::Across(..) | Op::LoadMatrix { .. } | Op::MmaI8 { .. });
                    if together && control > Level::Warp {
                        self.problem(Invalid::Divergent("warp"));
                    }
                }
                Stmt::If { cond, then, els } => {
                    let control = control.max(uniform.value(*cond));
                    self.control(then, control, uniform);
                    self.control(els, control, uniform);
                }
                Stmt::For { index: _, start, end, step, unroll: _, body } => {
                    self.control(body, control.max(uniform.trip(*start, *end, *step)), uniform);
                }
                Stmt::Barrier
                | Stmt::ClusterBarrier
                | Stmt::WarpSync
                | Stmt::Set(..)
                | Stmt::Store { .. }
                | Stmt::Fence
                | Stmt::Prefetch { .. }
                | Stmt::AsyncCopy { .. }
                | Stmt::AsyncCommit
                | Stmt::AsyncWait { .. }
                | Stmt::GroupFence
                | Stmt::GroupWait { .. }
                | Stmt::MmaGroup { .. }
                | Stmt::GridWait
                | Stmt::GridLaunch
                | Stmt::Comment(_) => {}
            }
        }
    }
}

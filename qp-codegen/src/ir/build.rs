//! Building kernels: a lowering written with [`Builder`] reads like the kernel it makes.
//!
//! [`V`] is a value with its builder, so that operators and literals work:
//!
//! ```
//! use qp_codegen::ir::{Builder, Elem, Special};
//!
//! let b = Builder::new("double", [1, 1], 32);
//! let x = b.buffer("x", Elem::F32, true);
//! let i = b.special(Special::Thread);
//! let v = b.load(x, i, Elem::F32);
//! b.if_(i.lt(20), || b.store(x, i, v * 2.0, Elem::F32));
//! let kernel = b.finish();
//! assert_eq!(kernel.params.len(), 1);
//! ```
//!
//! Operations on integer constants, and on what leaves the other operand as it is (`+ 0`, `* 1`), are folded at once.
//! The builder panics on ill-typed use: that is a mistake in a lowering, never in a user's spec.

use std::cell::RefCell;
use std::ops;

use super::*;

/// Makes one [`Kernel`].
pub struct Builder {
    kernel: RefCell<Kernel>,
    /// Open statement lists, innermost last.
    blocks: RefCell<Vec<Block>>,
}

/// A value of a [`Builder`].
#[derive(Clone, Copy)]
pub struct V<'b> {
    b: &'b Builder,
    /// Its index.
    pub val: Val,
}

/// Something that can be an operand beside a value: a value or a literal of its type.
pub trait Operand<'b> {
    /// The value, made a constant of `like`'s type if a literal.
    fn operand(self, like: V<'b>) -> V<'b>;
}

impl<'b> Operand<'b> for V<'b> {
    fn operand(self, _: V<'b>) -> V<'b> {
        self
    }
}

impl<'b> Operand<'b> for i32 {
    fn operand(self, like: V<'b>) -> V<'b> {
        let c = match like.ty().scalar {
            Scalar::I32 => Const::I32(self),
            Scalar::U32 => Const::U32(u32::try_from(self).expect("a non-negative literal")),
            Scalar::I64 => Const::I64(self.into()),
            Scalar::F32 | Scalar::Bool => panic!("an integer literal beside {:?}", like.ty()),
        };
        like.b.constant(c)
    }
}

impl<'b> Operand<'b> for u32 {
    fn operand(self, like: V<'b>) -> V<'b> {
        let c = match like.ty().scalar {
            Scalar::I32 => Const::I32(i32::try_from(self).expect("literal fits i32")),
            Scalar::U32 => Const::U32(self),
            Scalar::I64 => Const::I64(self.into()),
            Scalar::F32 | Scalar::Bool => panic!("an integer literal beside {:?}", like.ty()),
        };
        like.b.constant(c)
    }
}

impl<'b> Operand<'b> for f32 {
    fn operand(self, like: V<'b>) -> V<'b> {
        assert_eq!(like.ty().scalar, Scalar::F32, "a float literal beside an integer");
        like.b.constant(Const::F32(self))
    }
}

impl Builder {
    /// Starts a kernel of `grid` blocks of `threads` threads.
    pub fn new(name: &str, grid: [u32; 2], threads: u32) -> Self {
        let kernel = Kernel {
            name: name.into(),
            doc: String::new(),
            params: Vec::new(),
            shared: Vec::new(),
            grid,
            threads,
            cluster: 1,
            min_blocks: 1,
            dependent_launch: false,
            apart: false,
            values: Vec::new(),
            vars: Vec::new(),
            body: Vec::new(),
        };
        Builder { kernel: RefCell::new(kernel), blocks: RefCell::new(vec![Vec::new()]) }
    }

    /// Sets the text at the kernel's head.
    pub fn doc(&self, text: impl Into<String>) {
        self.kernel.borrow_mut().doc = text.into();
    }

    /// Joins each `n` blocks along x in a cluster.
    pub fn cluster(&self, n: u32) {
        self.kernel.borrow_mut().cluster = n;
    }

    /// Asks that `n` blocks fit on one SM.
    pub fn min_blocks(&self, n: u32) {
        self.kernel.borrow_mut().min_blocks = n;
    }

    /// Launches with programmatic stream serialization; see [`Stmt::GridWait`].
    pub fn dependent_launch(&self) {
        self.kernel.borrow_mut().dependent_launch = true;
    }

    /// Keeps blocks apart: no SM should take more of them than its share.
    pub fn apart(&self) {
        self.kernel.borrow_mut().apart = true;
    }

    /// Adds a buffer parameter of which the kernel touches up to `len` elements.
    pub fn sized(&self, name: &str, elem: Elem, writable: bool, len: u64) -> Mem {
        self.add_buffer(name, elem, writable, Some(len))
    }

    /// Adds a buffer parameter of a length that the launch's scalars decide.
    pub fn buffer(&self, name: &str, elem: Elem, writable: bool) -> Mem {
        self.add_buffer(name, elem, writable, None)
    }

    fn add_buffer(&self, name: &str, elem: Elem, writable: bool, len: Option<u64>) -> Mem {
        let params = &mut self.kernel.borrow_mut().params;
        params.push(Param { name: name.into(), kind: ParamKind::Buffer { elem, writable }, len });
        Mem::Global(params.len() as u32 - 1)
    }

    /// Adds a scalar parameter.
    pub fn scalar(&self, name: &str, ty: Scalar) -> V<'_> {
        let i = {
            let params = &mut self.kernel.borrow_mut().params;
            params.push(Param { name: name.into(), kind: ParamKind::Scalar(ty), len: None });
            params.len() as u32 - 1
        };
        self.emit(Op::Param(i), Type { scalar: ty, lanes: 1 })
    }

    /// Adds a shared array.
    pub fn shared(&self, name: &str, elem: Elem, len: u32) -> Mem {
        let shared = &mut self.kernel.borrow_mut().shared;
        shared.push(Shared { name: name.into(), elem, len });
        Mem::Shared(shared.len() as u32 - 1)
    }

    /// The finished kernel.
    pub fn finish(self) -> Kernel {
        let mut kernel = self.kernel.into_inner();
        let mut blocks = self.blocks.into_inner();
        assert_eq!(blocks.len(), 1, "a block was left open");
        kernel.body = blocks.pop().expect("one block");
        sweep(&mut kernel);
        kernel
    }

    fn define(&self, op: Op, ty: Type) -> V<'_> {
        let values = &mut self.kernel.borrow_mut().values;
        values.push(Value { op, ty, name: None });
        V { b: self, val: Val(values.len() as u32 - 1) }
    }

    fn emit(&self, op: Op, ty: Type) -> V<'_> {
        let v = self.define(op, ty);
        self.push(Stmt::Let(v.val));
        v
    }

    fn push(&self, s: Stmt) {
        self.blocks.borrow_mut().last_mut().expect("an open block").push(s);
    }

    fn block(&self, f: impl FnOnce()) -> Block {
        self.blocks.borrow_mut().push(Vec::new());
        f();
        self.blocks.borrow_mut().pop().expect("the block just opened")
    }

    /// A constant.
    pub fn constant(&self, c: Const) -> V<'_> {
        let ty = match c {
            Const::Bool(_) => Type::BOOL,
            Const::I32(_) => Type::I32,
            Const::U32(_) => Type::U32,
            Const::I64(_) => Type::I64,
            Const::F32(_) => Type::F32,
        };
        self.emit(Op::Const(c), ty)
    }

    /// An `I32` constant.
    pub fn i32(&self, x: i32) -> V<'_> {
        self.constant(Const::I32(x))
    }

    /// A `U32` constant.
    pub fn u32(&self, x: u32) -> V<'_> {
        self.constant(Const::U32(x))
    }

    /// An `F32` constant.
    pub fn f32(&self, x: f32) -> V<'_> {
        self.constant(Const::F32(x))
    }

    /// A built-in value.
    pub fn special(&self, s: Special) -> V<'_> {
        self.emit(Op::Special(s), Type::I32)
    }

    /// Declares a variable and sets it.
    pub fn var(&self, init: V<'_>) -> Var {
        let ty = init.ty();
        let var = {
            let vars = &mut self.kernel.borrow_mut().vars;
            vars.push(Variable { ty, name: None });
            Var(vars.len() as u32 - 1)
        };
        self.set(var, init);
        var
    }

    /// Declares a variable that the text calls `name`, and sets it.
    pub fn named_var(&self, name: &str, init: V<'_>) -> Var {
        let var = self.var(init);
        self.kernel.borrow_mut().vars[var.0 as usize].name = Some(name.into());
        var
    }

    /// The variable's present value.
    pub fn get(&self, var: Var) -> V<'_> {
        let ty = self.kernel.borrow().var(var).ty;
        self.emit(Op::Get(var), ty)
    }

    /// Writes a variable.
    pub fn set(&self, var: Var, v: V<'_>) {
        assert_eq!(self.kernel.borrow().var(var).ty, v.ty(), "type of the variable");
        self.push(Stmt::Set(var, v.val));
    }

    /// Reads one element.
    pub fn load<'b>(&'b self, mem: Mem, index: V<'b>, elem: Elem) -> V<'b> {
        self.load_as(mem, index, elem, 1, Cache::Default)
    }

    /// Reads `lanes` elements with a cache hint. An `I32` index counts elements, a `U32` index bytes.
    pub fn load_as<'b>(&'b self, mem: Mem, index: V<'b>, elem: Elem, lanes: u32, cache: Cache) -> V<'b> {
        assert!([Type::I32, Type::U32].contains(&index.ty()), "an index");
        self.emit(Op::Load { mem, index: index.val, elem, lanes, cache }, Type { scalar: elem.scalar(), lanes })
    }

    /// Reads 2 or 4 matrices of 8 × 16 bytes, the lanes naming rows; see [`Op::LoadMatrix`].
    pub fn load_matrix<'b>(&'b self, mem: Mem, row: V<'b>, lanes: u32) -> V<'b> {
        assert_eq!(row.ty(), Type::I32, "an index");
        self.emit(Op::LoadMatrix { mem, row: row.val, lanes }, Type { scalar: Scalar::U32, lanes })
    }

    /// Writes one element or vector.
    pub fn store(&self, mem: Mem, index: V<'_>, value: V<'_>, elem: Elem) {
        assert_eq!(index.ty(), Type::I32, "an index");
        assert_eq!(value.ty().scalar, elem.scalar(), "type of the stored value");
        self.push(Stmt::Store { mem, index: index.val, value: value.val, elem });
    }

    /// Adds atomically, giving the old value.
    pub fn atomic_add<'b>(&'b self, mem: Mem, index: V<'b>, value: V<'b>) -> V<'b> {
        self.emit(Op::AtomicAdd { mem, index: index.val, value: value.val }, value.ty())
    }

    /// Runs `then` where `cond` holds.
    pub fn if_(&self, cond: V<'_>, then: impl FnOnce()) {
        self.if_else(cond, then, || ());
    }

    /// Runs `then` where `cond` holds and `els` elsewhere.
    pub fn if_else(&self, cond: V<'_>, then: impl FnOnce(), els: impl FnOnce()) {
        assert_eq!(cond.ty(), Type::BOOL, "a condition");
        let (then, els) = (self.block(then), self.block(els));
        self.push(Stmt::If { cond: cond.val, then, els });
    }

    /// `for index in (start..end).step_by(step)`.
    pub fn for_<'b>(
        &'b self,
        start: impl Operand<'b>,
        end: impl Operand<'b>,
        step: impl Operand<'b>,
        body: impl FnOnce(V<'b>),
    ) {
        self.loop_(start, end, step, false, body);
    }

    /// The same, unrolled by the CUDA compiler.
    pub fn unrolled<'b>(
        &'b self,
        start: impl Operand<'b>,
        end: impl Operand<'b>,
        step: impl Operand<'b>,
        body: impl FnOnce(V<'b>),
    ) {
        self.loop_(start, end, step, true, body);
    }

    fn loop_<'b>(
        &'b self,
        start: impl Operand<'b>,
        end: impl Operand<'b>,
        step: impl Operand<'b>,
        unroll: bool,
        body: impl FnOnce(V<'b>),
    ) {
        let index = self.define(Op::LoopIndex, Type::I32);
        let (start, end, step) = (start.operand(index).val, end.operand(index).val, step.operand(index).val);
        let body = self.block(|| body(index));
        self.push(Stmt::For { index: index.val, start, end, step, unroll, body });
    }

    /// All threads of the block meet.
    pub fn barrier(&self) {
        self.push(Stmt::Barrier);
    }

    /// All threads of the cluster meet.
    pub fn cluster_barrier(&self) {
        self.push(Stmt::ClusterBarrier);
    }

    /// The lanes of each warp meet.
    pub fn warp_sync(&self) {
        self.push(Stmt::WarpSync);
    }

    /// Orders global writes for other blocks.
    pub fn fence(&self) {
        self.push(Stmt::Fence);
    }

    /// Asks for a line of a buffer; `index` in words.
    pub fn prefetch(&self, src: Mem, index: V<'_>) {
        let Mem::Global(src) = src else { panic!("of global memory") };
        self.push(Stmt::Prefetch { src, index: index.val });
    }

    /// Starts an asynchronous copy; indices in units of `bytes`.
    pub fn async_copy(&self, dst: Mem, dst_index: V<'_>, src: Mem, src_index: V<'_>, bytes: u32) {
        let (Mem::Shared(dst), Mem::Global(src)) = (dst, src) else { panic!("global to shared") };
        self.push(Stmt::AsyncCopy { dst, dst_index: dst_index.val, src, src_index: src_index.val, bytes });
    }

    /// Closes a group of asynchronous copies.
    pub fn async_commit(&self) {
        self.push(Stmt::AsyncCommit);
    }

    /// Waits for all but the last `pending` groups.
    pub fn async_wait(&self, pending: u32) {
        self.push(Stmt::AsyncWait { pending });
    }

    /// Shows this thread's shared writes to products of warp groups; see [`Stmt::GroupFence`].
    pub fn group_fence(&self) {
        self.push(Stmt::GroupFence);
    }

    /// Starts products of warp groups, added to `acc`; see [`Stmt::MmaGroup`].
    pub fn mma_group(&self, signed_a: bool, a: &[[V<'_>; 4]], acc: &[Var], mem: Mem, first: V<'_>, stride: u32) {
        self.start_group(signed_a, false, a, acc, (mem, first, stride));
    }

    /// Starts products of warp groups that take the place of what is in `acc`.
    pub fn mma_group_fresh(&self, signed_a: bool, a: &[[V<'_>; 4]], acc: &[Var], mem: Mem, first: V<'_>, stride: u32) {
        self.start_group(signed_a, true, a, acc, (mem, first, stride));
    }

    fn start_group(&self, signed_a: bool, fresh: bool, a: &[[V<'_>; 4]], acc: &[Var], b: (Mem, V<'_>, u32)) {
        let (Mem::Shared(mem), first, stride) = b else { panic!("from shared memory") };
        let a = a.iter().map(|a| a.map(|v| v.val)).collect();
        self.push(Stmt::MmaGroup { signed_a, fresh, a, acc: acc.to_vec(), mem, first: first.val, stride });
    }

    /// Waits for all but the last `pending` products of warp groups.
    pub fn group_wait(&self, pending: u32) {
        self.push(Stmt::GroupWait { pending });
    }

    /// Waits for the kernels before this one.
    pub fn grid_wait(&self) {
        self.push(Stmt::GridWait);
    }

    /// Lets the next kernel start.
    pub fn grid_launch(&self) {
        self.push(Stmt::GridLaunch);
    }

    /// A remark in the text.
    pub fn comment(&self, text: impl Into<String>) {
        self.push(Stmt::Comment(text.into()));
    }

    /// A vector of 2 or 4 scalars.
    pub fn vector<'b>(&'b self, parts: &[V<'b>]) -> V<'b> {
        let ty = Type { scalar: parts[0].ty().scalar, lanes: parts.len() as u32 };
        self.emit(Op::Vector(parts.iter().map(|p| p.val).collect()), ty)
    }

    /// `acc + A·B`; see [`Op::MmaI8`].
    pub fn mma_i8<'b>(&'b self, signed_a: bool, a: [V<'b>; 4], b: [V<'b>; 2], acc: V<'b>) -> V<'b> {
        self.emit(Op::MmaI8 { signed_a, a: a.map(|v| v.val), b: b.map(|v| v.val), acc: acc.val }, Type::I32X4)
    }
}

impl<'b> V<'b> {
    /// Its type.
    pub fn ty(self) -> Type {
        self.b.kernel.borrow().values[self.val.0 as usize].ty
    }

    /// The same value; the text calls it `name`, with a number where that is taken.
    pub fn named(self, name: &str) -> V<'b> {
        self.b.kernel.borrow_mut().values[self.val.0 as usize].name = Some(name.into());
        self
    }

    /// Its constant, if it is a literal.
    pub fn as_const(self) -> Option<Const> {
        match self.b.kernel.borrow().values[self.val.0 as usize].op {
            Op::Const(c) => Some(c),
            _ => None,
        }
    }

    fn unary(self, op: UnaryOp) -> V<'b> {
        self.b.emit(Op::Unary(op, self.val), self.ty())
    }

    fn binary(self, op: BinaryOp, rhs: impl Operand<'b>) -> V<'b> {
        let rhs = rhs.operand(self);
        assert_eq!(self.ty(), rhs.ty(), "operands of {op:?}");
        match (self.as_const(), rhs.as_const()) {
            (Some(x), Some(y)) if fold(op, x, y).is_some() => {
                self.b.constant(fold(op, x, y).expect("looked at just now"))
            }
            (_, Some(y)) if neutral(op, y) => self,
            (Some(x), _) if matches!(op, BinaryOp::Add | BinaryOp::Mul) && neutral(op, x) => rhs,
            (Some(_) | None, Some(_) | None) => self.b.emit(Op::Binary(op, self.val, rhs.val), self.ty()),
        }
    }

    fn compare(self, op: CompareOp, rhs: impl Operand<'b>) -> V<'b> {
        let rhs = rhs.operand(self);
        assert_eq!(self.ty(), rhs.ty(), "operands of {op:?}");
        self.b.emit(Op::Compare(op, self.val, rhs.val), Type::BOOL)
    }

    /// `self == rhs`.
    pub fn eq(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Eq, rhs)
    }

    /// `self != rhs`.
    pub fn ne(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Ne, rhs)
    }

    /// `self < rhs`.
    pub fn lt(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Lt, rhs)
    }

    /// `self <= rhs`.
    pub fn le(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Le, rhs)
    }

    /// `self > rhs`.
    pub fn gt(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Gt, rhs)
    }

    /// `self >= rhs`.
    pub fn ge(self, rhs: impl Operand<'b>) -> V<'b> {
        self.compare(CompareOp::Ge, rhs)
    }

    /// The smaller.
    pub fn min(self, rhs: impl Operand<'b>) -> V<'b> {
        self.binary(BinaryOp::Min, rhs)
    }

    /// The larger.
    pub fn max(self, rhs: impl Operand<'b>) -> V<'b> {
        self.binary(BinaryOp::Max, rhs)
    }

    /// Absolute value.
    pub fn abs(self) -> V<'b> {
        self.unary(UnaryOp::Abs)
    }

    /// Square root.
    pub fn sqrt(self) -> V<'b> {
        self.unary(UnaryOp::Sqrt)
    }

    /// `self·m + a`, rounded once.
    pub fn fma(self, m: impl Operand<'b>, a: impl Operand<'b>) -> V<'b> {
        let (m, a) = (m.operand(self), a.operand(self));
        self.b.emit(Op::Fma(self.val, m.val, a.val), self.ty())
    }

    /// `self ? a : b` (self is `Bool`).
    pub fn select(self, a: V<'b>, b: impl Operand<'b>) -> V<'b> {
        let b = b.operand(a);
        assert_eq!(a.ty(), b.ty(), "branches of a select");
        self.b.emit(Op::Select(self.val, a.val, b.val), a.ty())
    }

    /// Numeric conversion.
    pub fn to(self, scalar: Scalar) -> V<'b> {
        if self.ty().scalar == scalar {
            return self;
        }
        self.b.emit(Op::Convert(scalar, self.val), Type { scalar, lanes: 1 })
    }

    /// The same 32 bits as another type.
    pub fn bits(self, scalar: Scalar) -> V<'b> {
        if self.ty().scalar == scalar {
            return self;
        }
        self.b.emit(Op::Bitcast(scalar, self.val), Type { scalar, lanes: 1 })
    }

    /// The low word of `(hi:self) >> shift`.
    pub fn funnel_shr(self, hi: V<'b>, shift: impl Operand<'b>) -> V<'b> {
        let shift = shift.operand(self);
        self.b.emit(Op::FunnelShr { lo: self.val, hi: hi.val, shift: shift.val }, Type::U32)
    }

    /// Picks four bytes of `(b:self)`; see [`Op::Permute`].
    pub fn permute(self, b: V<'b>, selector: u32) -> V<'b> {
        self.b.emit(Op::Permute { a: self.val, b: b.val, selector }, Type::U32)
    }

    /// Picks four bytes of `(b:self)` by a selector; see [`Op::PermuteBy`].
    pub fn permute_by(self, b: V<'b>, selector: V<'b>) -> V<'b> {
        self.b.emit(Op::PermuteBy(self.val, b.val, selector.val), Type::U32)
    }

    /// Four byte products summed onto `acc`.
    pub fn dot4(self, b: V<'b>, acc: V<'b>) -> V<'b> {
        self.b.emit(Op::Dot4 { a: self.val, b: b.val, acc: acc.val }, Type::I32)
    }

    /// Two products of 16-bit numbers and the low or high bytes of `b`, summed onto `acc`; see [`Op::Dot2`].
    pub fn dot2(self, b: V<'b>, high: bool, acc: V<'b>) -> V<'b> {
        self.b.emit(Op::Dot2 { a: self.val, b: b.val, high, acc: acc.val }, Type::I32)
    }

    /// Differences of half-precision numbers, two in a word; see [`Op::Halves`].
    pub fn sub_halves(self, b: V<'b>) -> V<'b> {
        self.b.emit(Op::Halves(HalvesOp::Sub, self.val, b.val), Type::U32)
    }

    /// Products of half-precision numbers, two in a word.
    pub fn mul_halves(self, b: V<'b>) -> V<'b> {
        self.b.emit(Op::Halves(HalvesOp::Mul, self.val, b.val), Type::U32)
    }

    /// `min(self + b, c)` of two 16-bit numbers in a word; see [`Op::AddMin`].
    pub fn add_min(self, b: V<'b>, c: V<'b>) -> V<'b> {
        self.b.emit(Op::AddMin(self.val, b.val, c.val), Type::U32)
    }

    /// Component `i`.
    pub fn lane(self, i: u32) -> V<'b> {
        if self.ty().lanes == 1 {
            assert_eq!(i, 0, "component of a scalar");
            return self;
        }
        self.b.emit(Op::Extract(self.val, i), Type { scalar: self.ty().scalar, lanes: 1 })
    }

    /// All components.
    pub fn lanes(self) -> Vec<V<'b>> {
        (0..self.ty().lanes).map(|i| self.lane(i)).collect()
    }

    /// The value of lane `lane mod 32`.
    pub fn shuffle(self, lane: V<'b>) -> V<'b> {
        self.b.emit(Op::Shuffle { mode: ShuffleMode::Index, value: self.val, arg: lane.val }, self.ty())
    }

    /// The sum of all lanes' values, modulo 2^32; see [`Op::Across`].
    pub fn sum_across(self) -> V<'b> {
        self.b.emit(Op::Across(AcrossOp::Add, self.val), Type::U32)
    }

    /// The largest of all lanes' values.
    pub fn max_across(self) -> V<'b> {
        self.b.emit(Op::Across(AcrossOp::Max, self.val), Type::U32)
    }

    /// The value of lane `own xor mask`.
    pub fn shuffle_xor(self, mask: i32) -> V<'b> {
        let arg = self.b.i32(mask);
        self.b.emit(Op::Shuffle { mode: ShuffleMode::Xor, value: self.val, arg: arg.val }, self.ty())
    }
}

/// The result of an operation on integer constants, unless it traps or a pass is no place to decide it.
fn fold(op: BinaryOp, x: Const, y: Const) -> Option<Const> {
    match (x, y) {
        (Const::I32(x), Const::I32(y)) => match op {
            BinaryOp::Add => x.checked_add(y),
            BinaryOp::Sub => x.checked_sub(y),
            BinaryOp::Mul => x.checked_mul(y),
            BinaryOp::Div => x.checked_div(y),
            BinaryOp::Rem => (x >= 0 && y > 0).then(|| x % y),
            BinaryOp::Min => Some(x.min(y)),
            BinaryOp::Max => Some(x.max(y)),
            BinaryOp::And | BinaryOp::Or | BinaryOp::Xor | BinaryOp::Shl | BinaryOp::Shr => None,
        }
        .map(Const::I32),
        (Const::U32(x), Const::U32(y)) => match op {
            BinaryOp::Add => Some(x.wrapping_add(y)),
            BinaryOp::Sub => Some(x.wrapping_sub(y)),
            BinaryOp::Mul => Some(x.wrapping_mul(y)),
            BinaryOp::And => Some(x & y),
            BinaryOp::Or => Some(x | y),
            BinaryOp::Xor => Some(x ^ y),
            BinaryOp::Shl => x.checked_shl(y),
            BinaryOp::Shr => x.checked_shr(y),
            BinaryOp::Div | BinaryOp::Rem | BinaryOp::Min | BinaryOp::Max => None,
        }
        .map(Const::U32),
        (Const::Bool(_) | Const::I32(_) | Const::U32(_) | Const::I64(_) | Const::F32(_), _) => None,
    }
}

/// Whether the operation leaves every left operand as it is. Not of floats: −0 + 0 is 0.
fn neutral(op: BinaryOp, right: Const) -> bool {
    let x = match right {
        Const::I32(x) => x.into(),
        Const::U32(x) => x.into(),
        Const::I64(x) => x,
        Const::Bool(_) | Const::F32(_) => return false,
    };
    match op {
        BinaryOp::Add | BinaryOp::Sub | BinaryOp::Or | BinaryOp::Xor | BinaryOp::Shl | BinaryOp::Shr => x == 0,
        BinaryOp::Mul | BinaryOp::Div => x == 1,
        BinaryOp::Rem | BinaryOp::And | BinaryOp::Min | BinaryOp::Max => false,
    }
}

/// Drops statements that define what nobody uses: mostly literals that folding has made superfluous. What can trap
/// stays, so that no mistake is hidden.
fn sweep(kernel: &mut Kernel) {
    fn block(kernel: &Kernel, stmts: &mut Block, used: &mut [bool]) {
        let mut keep: Vec<Stmt> = Vec::with_capacity(stmts.len());
        for mut s in std::mem::take(stmts).into_iter().rev() {
            match &mut s {
                Stmt::Let(v) => {
                    let op = &kernel.value(*v).op;
                    let harmless = matches!(
                        op,
                        Op::Const(_) | Op::Param(_) | Op::Special(_) | Op::Get(_) | Op::Vector(_) | Op::Extract(..)
                    );
                    if harmless && !used[v.0 as usize] {
                        continue;
                    }
                    op.operands(&mut |a| used[a.0 as usize] = true);
                }
                Stmt::Set(_, v) => used[v.0 as usize] = true,
                Stmt::Store { mem: _, index, value, elem: _ } => {
                    used[index.0 as usize] = true;
                    used[value.0 as usize] = true;
                }
                Stmt::If { cond, then, els } => {
                    used[cond.0 as usize] = true;
                    block(kernel, els, used);
                    block(kernel, then, used);
                }
                Stmt::For { index: _, start, end, step, unroll: _, body } => {
                    [start, end, step].into_iter().for_each(|v| used[v.0 as usize] = true);
                    block(kernel, body, used);
                }
                Stmt::AsyncCopy { dst: _, dst_index, src: _, src_index, bytes: _ } => {
                    used[dst_index.0 as usize] = true;
                    used[src_index.0 as usize] = true;
                }
                Stmt::Prefetch { src: _, index } => used[index.0 as usize] = true,
                Stmt::MmaGroup { signed_a: _, fresh: _, a, acc: _, mem: _, first, stride: _ } => {
                    a.iter().flatten().chain([&*first]).for_each(|v| used[v.0 as usize] = true);
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
            keep.push(s);
        }
        keep.reverse();
        *stmts = keep;
    }
    let mut used = vec![false; kernel.values.len()];
    let mut body = std::mem::take(&mut kernel.body);
    block(kernel, &mut body, &mut used);
    kernel.body = body;
}

macro_rules! operators {
    ($($trait:ident $method:ident $op:ident;)*) => { $(
        impl<'b, R: Operand<'b>> ops::$trait<R> for V<'b> {
            type Output = V<'b>;
            fn $method(self, rhs: R) -> V<'b> {
                self.binary(BinaryOp::$op, rhs)
            }
        }
    )* };
}

operators! {
    Add add Add;
    Sub sub Sub;
    Mul mul Mul;
    Div div Div;
    Rem rem Rem;
    BitAnd bitand And;
    BitOr bitor Or;
    BitXor bitxor Xor;
    Shl shl Shl;
    Shr shr Shr;
}

impl<'b> ops::Neg for V<'b> {
    type Output = V<'b>;
    fn neg(self) -> V<'b> {
        self.unary(UnaryOp::Neg)
    }
}

impl<'b> ops::Not for V<'b> {
    type Output = V<'b>;
    fn not(self) -> V<'b> {
        self.unary(UnaryOp::Not)
    }
}

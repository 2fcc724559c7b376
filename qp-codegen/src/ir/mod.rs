//! The kernel IR: what every lowering produces and the validator, the interpreter and the CUDA printer read.
//!
//! # The model
//!
//! A [`Kernel`] is the program of one thread, run by `grid.x × grid.y` blocks of `threads` threads (a multiple of 32).
//! Each `cluster` blocks that lie side by side along x form a cluster: they run at the same time and can wait for each other.
//! Shapes, batch and target are constants of the kernel; at launch it takes only [`Param`]s: buffers and scalars.
//!
//! **Values** ([`Val`]) are immutable and defined once, by the statement [`Stmt::Let`] that evaluates their [`Op`]. A
//! value is visible from its definition to the end of the block of statements that holds it, nested blocks included.
//! A value is a scalar ([`Scalar`]) or a short vector of 2 or 4 equal scalars; its [`Type`] is computed once, when it
//! is made. **Variables** ([`Var`]) are mutable registers: read by [`Op::Get`], written by [`Stmt::Set`]. There are no
//! arrays of registers: a lowering unrolls at generation time and keeps handles in a `Vec`.
//!
//! **Memory** ([`Mem`]) is a buffer parameter (global) or a shared array. An access names the element type it reads
//! or writes as ([`Elem`]) and an index in units of that element; vectors must be aligned to their size. Loading an
//! `I8`, `U8`, `I16`, `U16`, `F16` or `BF16` element widens it to `I32`, `U32` or `F32`; storing narrows (integers
//! truncate, floats round to nearest even). There are no pointers, so every access can be checked against its buffer.
//!
//! **Arithmetic** is exact or IEEE-754 single precision, round to nearest even, without contraction or
//! approximation: the interpreter and every GPU give the same bits. Index arithmetic is `I32` and must not overflow
//! (the interpreter traps); `U32` wraps. `U32` and `I32` shifts by 32 or more are traps.
//!
//! **Lanes.** A value is *cluster-uniform*, *block-uniform*, *warp-uniform* or *divergent* (see `validate`).
//! [`Stmt::ClusterBarrier`] stands only under cluster-uniform control flow; [`Stmt::Barrier`], [`Stmt::MmaGroup`] and
//! [`Stmt::GroupWait`] only under block-uniform; [`Op::Shuffle`], [`Op::Across`], [`Op::LoadMatrix`] and [`Op::MmaI8`]
//! only under warp-uniform. Threads of a block may see each other's shared writes only across a barrier (or, within a warp,
//! [`Stmt::WarpSync`]); the interpreter reports a race otherwise. Blocks of a cluster may see each other's global
//! writes across a cluster barrier. Clusters run in any order and meet only in atomics.
//!
//! The validator accepts ⇒ the printer does not fail, and the interpreter fails only on bad data
//! (an index out of bounds, an overflow, a race), with the place.

mod build;
pub mod interpret;
mod narrow;
mod problem;
#[cfg(test)]
mod tests;
mod text;
mod unfinished;
mod uniform;
mod validate;

pub use build::{Builder, V};
pub use problem::{Invalid, Problem, Problems};
pub use text::statement;
pub use validate::validate;

/// Index of a value in [`Kernel::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Val(pub u32);

/// Index of a variable in [`Kernel::vars`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(pub u32);

/// Scalar register types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// A predicate.
    Bool,
    /// Signed 32-bit; overflow is an error.
    I32,
    /// Unsigned 32-bit; wraps.
    U32,
    /// Signed 64-bit; overflow is an error.
    I64,
    /// IEEE single precision.
    F32,
}

/// Type of a value or variable: a scalar (`lanes` 1) or a vector of 2 or 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Type {
    /// Component type.
    pub scalar: Scalar,
    /// 1, 2 or 4.
    pub lanes: u32,
}

/// Element types of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elem {
    /// Signed 8-bit, loads as `I32`.
    I8,
    /// Unsigned 8-bit, loads as `U32`.
    U8,
    /// Signed 16-bit, loads as `I32`.
    I16,
    /// Unsigned 16-bit, loads as `U32`.
    U16,
    /// Signed 32-bit.
    I32,
    /// Unsigned 32-bit.
    U32,
    /// IEEE half precision, loads as `F32`.
    F16,
    /// bfloat16, loads as `F32`.
    BF16,
    /// IEEE single precision.
    F32,
}

impl Elem {
    /// Size in bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Elem::I8 | Elem::U8 => 1,
            Elem::I16 | Elem::U16 | Elem::F16 | Elem::BF16 => 2,
            Elem::I32 | Elem::U32 | Elem::F32 => 4,
        }
    }

    /// The register type it loads as.
    pub fn scalar(self) -> Scalar {
        match self {
            Elem::I8 | Elem::I16 | Elem::I32 => Scalar::I32,
            Elem::U8 | Elem::U16 | Elem::U32 => Scalar::U32,
            Elem::F16 | Elem::BF16 | Elem::F32 => Scalar::F32,
        }
    }
}

/// What a kernel takes at launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Name, unique in the kernel.
    pub name: String,
    /// Buffer or scalar.
    pub kind: ParamKind,
    /// Of a buffer, the elements that the kernel may touch, counted in its natural type: a launch refuses a shorter one,
    /// and the interpreter an access beyond. `None` where the launch's scalars decide.
    pub len: Option<u64>,
}

/// Kind of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// A buffer in global memory, aligned to 16 bytes.
    Buffer {
        /// Its natural element type (accesses may use another).
        elem: Elem,
        /// True if the kernel writes it.
        writable: bool,
    },
    /// A scalar passed by value: `I32`, `U32` or `F32`.
    Scalar(Scalar),
}

/// A shared-memory array of constant length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Name, unique in the kernel.
    pub name: String,
    /// Natural element type (accesses may use another).
    pub elem: Elem,
    /// Elements.
    pub len: u32,
}

impl Shared {
    /// Bytes, rounded up to 16.
    pub fn bytes(&self) -> u32 {
        (self.len * self.elem.bytes()).next_multiple_of(16)
    }
}

/// A memory that can be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mem {
    /// Buffer parameter `i` of [`Kernel::params`].
    Global(u32),
    /// Array `i` of [`Kernel::shared`].
    Shared(u32),
}

/// How a global load treats the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cache {
    /// Coherent with other writers.
    Default,
    /// Read only for the whole launch. Before a [`Stmt::GridWait`] it must not be written by the kernels that may
    /// still run, either; after it, it may have been written by them.
    ReadOnly,
    /// The same, read once by the whole grid: do not keep in L1.
    Stream,
}

/// Built-in values of a thread. All are `I32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// Thread in its block.
    Thread,
    /// Thread in its warp (0..32).
    Lane,
    /// Warp in its block; warp-uniform.
    Warp,
    /// Block in the grid, first axis; block-uniform.
    BlockX,
    /// Block in the grid, second axis; cluster-uniform.
    BlockY,
    /// Cluster in the grid, first axis; cluster-uniform.
    Cluster,
    /// Block in its cluster; block-uniform.
    Rank,
}

/// Operations on one value, component by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnaryOp {
    /// Arithmetic negation (not `Bool`, not `U32`).
    Neg,
    /// Bitwise complement (`I32`, `U32`), logical not (`Bool`).
    Not,
    /// Absolute value (`F32`, `I32`).
    Abs,
    /// Square root (`F32`), correctly rounded.
    Sqrt,
}

/// Operations on two values of equal type, component by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BinaryOp {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient: `F32` correctly rounded; integers truncate, a zero divisor traps.
    Div,
    /// Remainder (integers, non-negative operands).
    Rem,
    /// Bitwise (integers) or logical (`Bool`) and.
    And,
    /// Bitwise or logical or.
    Or,
    /// Bitwise or logical exclusive or.
    Xor,
    /// Shift left (integers).
    Shl,
    /// Shift right: logical for `U32`, arithmetic for `I32` and `I64`.
    Shr,
    /// Smaller (for `F32`: the other operand if one is NaN).
    Min,
    /// Larger (for `F32`: the other operand if one is NaN).
    Max,
}

/// Operations on the two halves of words, each a half-precision number: PTX `f16x2`. Rounded to nearest even, numbers
/// below the normal range are kept, a NaN is `0x7fff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HalvesOp {
    /// Difference.
    Sub,
    /// Product.
    Mul,
}

/// Comparisons; the result is `Bool`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompareOp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

/// Which lane a shuffle reads from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShuffleMode {
    /// Lane `arg mod 32`.
    Index,
    /// Own lane xor `arg`.
    Xor,
}

/// How the values of a warp's lanes become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AcrossOp {
    /// Their sum, modulo 2^32.
    Add,
    /// The largest.
    Max,
}

/// Literal constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Const {
    /// Predicate.
    Bool(bool),
    /// Signed.
    I32(i32),
    /// Unsigned.
    U32(u32),
    /// Signed 64-bit.
    I64(i64),
    /// Float.
    F32(f32),
}

/// What a value is.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A literal.
    Const(Const),
    /// Scalar parameter `i`.
    Param(u32),
    /// A built-in.
    Special(Special),
    /// The index of an enclosing [`Stmt::For`]; never in a `Let`.
    LoopIndex,
    /// The present value of a variable.
    Get(Var),
    /// Component-wise.
    Unary(UnaryOp, Val),
    /// Component-wise.
    Binary(BinaryOp, Val, Val),
    /// Of scalars.
    Compare(CompareOp, Val, Val),
    /// `a·b + c` with one rounding (`F32`).
    Fma(Val, Val, Val),
    /// `cond ? a : b`; both are evaluated.
    Select(Val, Val, Val),
    /// Numeric conversion of a scalar. `F32` → integer rounds to nearest even and saturates, NaN gives 0; integer →
    /// `F32` rounds to nearest even; integers extend by their own sign or truncate.
    Convert(Scalar, Val),
    /// Reinterprets 32 bits (`I32`, `U32`, `F32`).
    Bitcast(Scalar, Val),
    /// The low 32 bits of `(hi:lo) >> (shift mod 32)`, all `U32`.
    FunnelShr {
        /// Low word.
        lo: Val,
        /// High word.
        hi: Val,
        /// Bits.
        shift: Val,
    },
    /// PTX `prmt`: each of the four nibbles of `selector` picks a byte of `(b:a)` (0..8); bit 3 of the nibble
    /// replicates that byte's sign instead. All `U32`.
    Permute {
        /// Bytes 0..4.
        a: Val,
        /// Bytes 4..8.
        b: Val,
        /// Constant selector.
        selector: u32,
    },
    /// The same by a selector that is a value, of which the low 16 bits count: the bytes of `a` and `b`, which a selector looks up.
    PermuteBy(Val, Val, Val),
    /// Four products of signed 8-bit components, summed onto `acc`: PTX `dp4a.s32.s32`. `a`, `b`: `U32`, `acc`: `I32`.
    Dot4 {
        /// Four packed bytes.
        a: Val,
        /// Four packed bytes.
        b: Val,
        /// `I32`.
        acc: Val,
    },
    /// Two products of signed 16-bit components of `a` and the low or the high two signed bytes of `b`, summed onto
    /// `acc`: PTX `dp2a.s32.s32`. `a`, `b`: `U32`, `acc`: `I32`.
    Dot2 {
        /// Two packed 16-bit numbers.
        a: Val,
        /// Four packed bytes.
        b: Val,
        /// True for the high two bytes.
        high: bool,
        /// `I32`.
        acc: Val,
    },
    /// Of `U32`.
    Halves(HalvesOp, Val, Val),
    /// `min(a + b, c)` of the two unsigned 16-bit halves of words, each on its own and modulo 2^16: CUDA's
    /// `__viaddmin_u16x2`, one instruction from `sm_90` on. All `U32`.
    AddMin(Val, Val, Val),
    /// Makes a vector of 2 or 4 scalars.
    Vector(Vec<Val>),
    /// Component `i` of a vector.
    Extract(Val, u32),
    /// Reads memory. The value has `elem.scalar()` and `lanes` components.
    Load {
        /// From where.
        mem: Mem,
        /// In units of `elem` if `I32`; in bytes if `U32`, for addresses that fall out of bits as they are.
        index: Val,
        /// Element type.
        elem: Elem,
        /// 1, 2 or 4; at most 16 bytes in all.
        lanes: u32,
        /// Caching; `Default` for shared memory.
        cache: Cache,
    },
    /// PTX `ldmatrix`: `lanes` (2 or 4) matrices of 8 rows of 16 bytes, from shared memory. Lane `8·j + i` names row
    /// `i` of matrix `j`; component `j` of lane `l` is word `l mod 4` of row `l / 4` of matrix `j`: as a product takes
    /// its second operand. `U32`.
    LoadMatrix {
        /// A shared array.
        mem: Mem,
        /// First word of the row that this lane names, a multiple of 4 (`I32`). Of 2 matrices, lanes 16 and up name none.
        row: Val,
        /// 2 or 4.
        lanes: u32,
    },
    /// Adds to memory atomically and gives the old value. `I32`, `U32`.
    AtomicAdd {
        /// Where.
        mem: Mem,
        /// In units of 4 bytes (`I32`).
        index: Val,
        /// What to add.
        value: Val,
    },
    /// Another lane's value (32-bit scalars); all 32 lanes take part.
    Shuffle {
        /// Which lane.
        mode: ShuffleMode,
        /// Own value.
        value: Val,
        /// Lane or mask (`I32`).
        arg: Val,
    },
    /// One value of those of all 32 lanes (`U32`), which each of them gets: PTX `redux.sync`.
    Across(AcrossOp, Val),
    /// `mma.m16n8k32.s32`: acc + A·B with A 16 × 32 (bytes, signed or not), B 32 × 8 signed bytes.
    /// `a`: four `U32`, `b`: two `U32`, `acc` and result: `I32 × 4`, in PTX's fragment layout.
    MmaI8 {
        /// True if A's bytes are signed.
        signed_a: bool,
        /// A fragment.
        a: [Val; 4],
        /// B fragment.
        b: [Val; 2],
        /// Accumulator.
        acc: Val,
    },
}

impl Op {
    /// Visits the values it is made of.
    pub fn operands(&self, f: &mut impl FnMut(Val)) {
        match self {
            Op::Const(_) | Op::Param(_) | Op::Special(_) | Op::LoopIndex | Op::Get(_) => {}
            Op::Unary(_, a) | Op::Convert(_, a) | Op::Bitcast(_, a) | Op::Extract(a, _) | Op::Across(_, a) => f(*a),
            Op::Binary(_, a, b) | Op::Compare(_, a, b) | Op::Halves(_, a, b) | Op::Permute { a, b, selector: _ } => {
                [*a, *b].into_iter().for_each(f)
            }
            Op::Fma(a, b, c)
            | Op::AddMin(a, b, c)
            | Op::PermuteBy(a, b, c)
            | Op::Select(a, b, c)
            | Op::FunnelShr { lo: a, hi: b, shift: c }
            | Op::Dot4 { a, b, acc: c }
            | Op::Dot2 { a, b, high: _, acc: c } => {
                [*a, *b, *c].into_iter().for_each(f);
            }
            Op::Vector(parts) => parts.iter().copied().for_each(f),
            Op::Load { index, .. } => f(*index),
            Op::LoadMatrix { mem: _, row, lanes: _ } => f(*row),
            Op::AtomicAdd { mem: _, index, value } => [*index, *value].into_iter().for_each(f),
            Op::Shuffle { mode: _, value, arg } => [*value, *arg].into_iter().for_each(f),
            Op::MmaI8 { signed_a: _, a, b, acc } => a.iter().chain(b).chain([acc]).copied().for_each(f),
        }
    }
}

/// The fewest columns, `columns` or more, that a [`Stmt::MmaGroup`] can have: 8, 16, 24, 32, then whole 16s.
pub fn group_columns(columns: u32) -> u32 {
    columns.max(1).next_multiple_of(if columns <= 32 { 8 } else { 16 })
}

/// Most blocks of a cluster that every GPU with clusters takes.
pub const MAX_CLUSTER: u32 = 8;

/// Most columns of a [`Stmt::MmaGroup`].
pub const MAX_GROUP_COLUMNS: u32 = 256;

/// A list of statements.
pub type Block = Vec<Stmt>;

/// Statements.
#[derive(Clone, Debug, PartialEq)]
pub enum Stmt {
    /// Evaluates the value's operation here.
    Let(Val),
    /// Writes a variable.
    Set(Var, Val),
    /// Writes memory; the vector width is the value's.
    Store {
        /// To where.
        mem: Mem,
        /// In units of `elem` (`I32`).
        index: Val,
        /// What.
        value: Val,
        /// Element type.
        elem: Elem,
    },
    /// Both branches may be empty.
    If {
        /// `Bool`.
        cond: Val,
        /// If true.
        then: Block,
        /// If false.
        els: Block,
    },
    /// `for index in (start..end).step_by(step)`, all `I32`, step > 0.
    For {
        /// A value whose op is [`Op::LoopIndex`].
        index: Val,
        /// First.
        start: Val,
        /// Past the last.
        end: Val,
        /// Increment.
        step: Val,
        /// Ask the CUDA compiler to unroll fully.
        unroll: bool,
        /// Statements.
        body: Block,
    },
    /// All threads of the block meet; shared and global writes before are visible after.
    Barrier,
    /// All threads of the cluster meet; global writes before, and shared writes within each block, are visible after. Only
    /// in kernels with clusters.
    ClusterBarrier,
    /// The lanes of each warp meet; shared writes before are visible to the warp after.
    WarpSync,
    /// Orders this thread's global writes before its later ones, for all blocks.
    Fence,
    /// Asks for the line of global memory that holds a 32-bit word, so that the L2 cache has it when it is read: PTX
    /// `prefetch.global.L2`. The word need not exist.
    Prefetch {
        /// Buffer parameter.
        src: u32,
        /// `I32`, in units of 4 bytes.
        index: Val,
    },
    /// Starts an asynchronous copy of `bytes` (4, 8 or 16) from global to shared memory. Indices in units of
    /// `bytes`.
    AsyncCopy {
        /// Shared array.
        dst: u32,
        /// `I32`.
        dst_index: Val,
        /// Buffer parameter.
        src: u32,
        /// `I32`.
        src_index: Val,
        /// 4, 8 or 16.
        bytes: u32,
    },
    /// Closes a group of this thread's asynchronous copies.
    AsyncCommit,
    /// Waits until at most `pending` of this thread's groups are unfinished.
    AsyncWait {
        /// Groups that may still be in flight.
        pending: u32,
    },
    /// Shows what this thread has written to shared memory, copies that it has waited for included, to
    /// [`Stmt::MmaGroup`], which reads it past the thread's own path. It takes effect at the next barrier: PTX
    /// `fence.proxy.async`.
    GroupFence,
    /// Starts PTX `wgmma.m64nNk32.s32`: each four warps multiply 64 rows, 16 a warp, with N columns onto `acc`, once for
    /// each of `a`, which lie one behind the other along K. Only for targets that have it.
    ///
    /// Until a [`Stmt::GroupWait`] for it the accumulators may only be added to by further products; and until one with none
    /// pending the block's threads may not meet: others could then write B.
    ///
    /// Warp `w` of four holds rows `16·w..` of A and of the sums, as the operands and accumulators of [`Op::MmaI8`].
    /// B lies in shared memory in cells of 16 bytes: bytes `16·u..` of column `n` in cell `first + u·stride + n`. All of
    /// it must have been shown ([`Stmt::GroupFence`]) before a barrier.
    MmaGroup {
        /// True if A's bytes are signed; B's are.
        signed_a: bool,
        /// True if the accumulators begin at 0, whatever they hold.
        fresh: bool,
        /// For each 32 bytes of K: the A fragment, four `U32`.
        a: Vec<[Val; 4]>,
        /// For each 8 of the N columns: the accumulator, `I32 × 4`. N is [`group_columns`] of itself.
        acc: Vec<Var>,
        /// The shared array of B.
        mem: u32,
        /// First cell (`I32`), the same for the four warps.
        first: Val,
        /// Cells from one 16 bytes of K to the next.
        stride: u32,
    },
    /// Waits until at most `pending` of the last [`Stmt::MmaGroup`]s are unfinished.
    GroupWait {
        /// Those that may still run.
        pending: u32,
    },
    /// Waits until the kernels this one depends on have finished (programmatic dependent launch). Without the
    /// feature, or below `sm_90`, nothing.
    GridWait,
    /// Lets dependent kernels start.
    GridLaunch,
    /// A remark carried into the text.
    Comment(String),
}

impl Stmt {
    /// The blocks of statements inside it.
    pub fn nested(&self) -> impl Iterator<Item = &Block> {
        let (first, second) = match self {
            Stmt::If { cond: _, then, els } => (Some(then), Some(els)),
            Stmt::For { body, .. } => (Some(body), None),
            Stmt::Let(_)
            | Stmt::Set(..)
            | Stmt::Store { .. }
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
            | Stmt::MmaGroup { .. }
            | Stmt::GridWait
            | Stmt::GridLaunch
            | Stmt::Comment(_) => (None, None),
        };
        first.into_iter().chain(second)
    }
}

/// A value's operation and type.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// What it is.
    pub op: Op,
    /// Computed when made.
    pub ty: Type,
    /// What the text may call it; no meaning.
    pub name: Option<String>,
}

/// A variable's type.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// Never changes.
    pub ty: Type,
    /// What the text may call it; no meaning.
    pub name: Option<String>,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// C identifier.
    pub name: String,
    /// One paragraph for the head of the text: what, for which shape and target.
    pub doc: String,
    /// Launch parameters in order.
    pub params: Vec<Param>,
    /// Shared arrays, laid out in order.
    pub shared: Vec<Shared>,
    /// Blocks of the grid: x, y.
    pub grid: [u32; 2],
    /// Threads of a block, a multiple of 32, at most 1024.
    pub threads: u32,
    /// Blocks of a cluster, which lie side by side along x; 1: no clusters. Only for targets that have them.
    pub cluster: u32,
    /// Blocks that must fit on one SM at once (a bound on registers).
    pub min_blocks: u32,
    /// True if launched with programmatic stream serialization.
    pub dependent_launch: bool,
    /// True if no SM should take more blocks than its share of the grid, though more would fit.
    pub apart: bool,
    /// All values.
    pub values: Vec<Value>,
    /// All variables.
    pub vars: Vec<Variable>,
    /// The program.
    pub body: Block,
}

impl Kernel {
    /// The value's definition.
    pub fn value(&self, v: Val) -> &Value {
        &self.values[v.0 as usize]
    }

    /// The variable's declaration.
    pub fn var(&self, v: Var) -> &Variable {
        &self.vars[v.0 as usize]
    }

    /// Byte offset of shared array `i` in the block's shared memory.
    pub fn shared_offset(&self, i: u32) -> u32 {
        self.shared[..i as usize].iter().map(Shared::bytes).sum()
    }

    /// Name and natural element type of a memory.
    ///
    /// # Panics
    /// If `mem` names a scalar parameter: the validator refuses that.
    pub fn mem(&self, mem: Mem) -> (&str, Elem) {
        match mem {
            Mem::Shared(i) => (&self.shared[i as usize].name, self.shared[i as usize].elem),
            Mem::Global(i) => match &self.params[i as usize] {
                Param { name, kind: ParamKind::Buffer { elem, .. }, .. } => (name, *elem),
                Param { name, kind: ParamKind::Scalar(_), .. } => panic!("`{name}` is no buffer"),
            },
        }
    }

    /// Bytes that a launch's buffer for parameter `i` must have; 0 if the parameter does not say, or is a scalar.
    pub fn least_bytes(&self, i: usize) -> u64 {
        match &self.params[i] {
            Param { kind: ParamKind::Buffer { elem, .. }, len: Some(len), .. } => len * u64::from(elem.bytes()),
            Param { .. } => 0,
        }
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> u32 {
        self.shared.iter().map(Shared::bytes).sum()
    }
}

impl Type {
    /// A predicate.
    pub const BOOL: Type = Type { scalar: Scalar::Bool, lanes: 1 };
    /// Signed 32-bit.
    pub const I32: Type = Type { scalar: Scalar::I32, lanes: 1 };
    /// Unsigned 32-bit.
    pub const U32: Type = Type { scalar: Scalar::U32, lanes: 1 };
    /// Signed 64-bit.
    pub const I64: Type = Type { scalar: Scalar::I64, lanes: 1 };
    /// Single precision.
    pub const F32: Type = Type { scalar: Scalar::F32, lanes: 1 };
    /// Four signed 32-bit: a tensor-core accumulator.
    pub const I32X4: Type = Type { scalar: Scalar::I32, lanes: 4 };
}

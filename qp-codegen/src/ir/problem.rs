//! What can be wrong with a kernel, as [`super::validate()`] says it.

use std::fmt;

use super::*;

/// One thing wrong with a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The statement in text form and its number in the order of the text; `None`: the kernel's head.
    pub at: Option<(u32, String)>,
    /// What is wrong.
    pub what: Invalid,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            None => write!(f, "{}", self.what),
            Some((n, s)) => write!(f, "statement {n}, `{s}`: {}", self.what),
        }
    }
}

/// All that is wrong with a kernel.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel `{kernel}` is invalid: {}", problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; "))]
pub struct Problems {
    /// Its name.
    pub kernel: String,
    /// At least one, in the order of the text.
    pub problems: Vec<Problem>,
}

/// What can be wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// A name that is no C identifier.
    #[error("`{0}` is no identifier")]
    Name(String),
    /// Two parameters or arrays of one name.
    #[error("the name `{0}` is used twice")]
    SameName(String),
    /// The number of threads.
    #[error("{0} threads: not a multiple of 32 from 32 to 1024")]
    Threads(u32),
    /// The grid.
    #[error("a grid of {0} x {1} blocks: both from 1, to 2^31 - 1 and 65535")]
    Grid(u32, u32),
    /// The clusters.
    #[error("clusters of {0} blocks: from 1 to {MAX_CLUSTER}, and whole clusters along x")]
    Cluster(u32),
    /// A barrier of clusters where there are none.
    #[error("there are no clusters")]
    NoCluster,
    /// Resident blocks.
    #[error("{0} resident blocks: from 1, with at most 2048 threads in all")]
    MinBlocks(u32),
    /// Too much shared memory, or an empty array.
    #[error("shared memory: {0} bytes; arrays must not be empty and hold at most 232448 bytes in all")]
    Shared(u64),
    /// A parameter of a type that cannot be passed.
    #[error("a parameter cannot be a {0}")]
    Parameter(Scalar),
    /// A buffer longer than an index can count.
    #[error("`{name}` has {len} elements: an index counts up to 2^31 - 1")]
    Length {
        /// The parameter.
        name: String,
        /// Its elements.
        len: u64,
    },
    /// Something that a target has not.
    #[error("{target} has no {what}")]
    Target {
        /// The target.
        target: &'static str,
        /// What it lacks.
        what: &'static str,
    },
    /// More shared memory than a block of a target has.
    #[error("{bytes} bytes of shared memory, more than the {most} of a block on {target}")]
    SharedOfTarget {
        /// The target.
        target: &'static str,
        /// Bytes of the arrays.
        bytes: u32,
        /// Bytes that there are.
        most: u32,
    },
    /// A vector of other than 2 or 4 words.
    #[error("there is no type {0}")]
    NoType(Type),
    /// A use before the definition, or out of its scope.
    #[error("%{} is not defined here", .0.0)]
    Undefined(Val),
    /// A second definition.
    #[error("%{} is defined twice", .0.0)]
    Redefined(Val),
    /// A variable that does not exist.
    #[error("there is no variable ${}", .0.0)]
    NoVariable(Var),
    /// A variable that some way to here does not set.
    #[error("${} may be read before it is set", .0.0)]
    Unset(Var),
    /// A parameter, buffer or array that does not exist.
    #[error("there is no such parameter, buffer or array")]
    NoMemory,
    /// A loop index outside the head of its loop, or a loop over something else.
    #[error("a loop index is defined by its loop, and only by it")]
    LoopIndex,
    /// A value of the wrong type.
    #[error("%{} is a {found}, not a {wanted}", value.0)]
    Type {
        /// The value.
        value: Val,
        /// Its type.
        found: Type,
        /// What should stand here.
        wanted: &'static str,
    },
    /// A value whose noted type is not that of its operation.
    #[error("the value is noted as {noted}, but is a {actual}")]
    Noted {
        /// In [`Value::ty`].
        noted: Type,
        /// By the type rules.
        actual: Type,
    },
    /// An operation that the type does not have.
    #[error("no such operation on {0}")]
    NoOperation(Type),
    /// A component beyond the vector's.
    #[error("component {0} does not exist")]
    Component(u32),
    /// A width that memory has no access of.
    #[error("an access of {lanes} x {elem}: 1, 2 or 4 elements, at most 16 bytes")]
    Width {
        /// Elements.
        lanes: u32,
        /// Of this type.
        elem: Elem,
    },
    /// A copy of a width that does not exist.
    #[error("asynchronous copies move 4, 8 or 16 bytes, not {0}")]
    CopyWidth(u32),
    /// A write to a read-only buffer.
    #[error("`{0}` is read-only")]
    ReadOnly(String),
    /// A load that bypasses coherence from what the kernel writes, or a cache mode on shared memory.
    #[error("`{0}` cannot be loaded with this cache mode: the kernel writes it, or it is shared memory")]
    CacheMode(String),
    /// A constant index outside its array.
    #[error("constant index {index} is outside `{memory}`, or misaligned")]
    Index {
        /// The array.
        memory: String,
        /// In elements of the access.
        index: i64,
    },
    /// A constant operand that always traps.
    #[error("constant operand {0} always traps")]
    Operand(i64),
    /// A permute selector beyond 16 bits.
    #[error("selector {0:#x} has more than four nibbles")]
    Selector(u32),
    /// A product of warp groups that does not exist.
    #[error("products of groups of four warps take 8, 16, 24 or 32 columns, or multiples of 16 up to 256: not {0}")]
    GroupColumns(u64),
    /// A block that is not made of groups of four warps.
    #[error("{0} threads are not whole groups of four warps")]
    GroupThreads(u32),
    /// A variable that is an accumulator twice.
    #[error("${} is an accumulator twice", .0.0)]
    SameAccumulator(Var),
    /// An accumulator that is read or set while products add to it.
    #[error("products onto ${} may be unfinished here", .0.0)]
    Unfinished(Var),
    /// A barrier, or the end, while products run.
    #[error("products of warp groups may be unfinished here")]
    GroupWait,
    /// Something that threads must reach together where they may not.
    #[error("threads may not all be here: the control flow is not uniform over the {0}")]
    Divergent(&'static str),
    /// A dependent kernel without its wait, or a wait inside of other statements.
    #[error("a kernel with dependent launch waits once, outside of branches and loops")]
    GridWait,
    /// An access before the wait that may meet the kernel before.
    #[error("before the grid wait the kernel before may still run: only read-only and streaming loads may stand there")]
    BeforeWait,
}

//! The interpreter: runs a whole grid on the CPU, lane by lane, and traps on what a GPU would silently get wrong.
//!
//! Clusters (without them, blocks) run one after the other (in either order, [`Options::reverse`]). The threads of a
//! cluster run in step, each operation for all active threads before the next; nothing observable depends on that, since
//! what would is a trap, but for races in global memory, which are not watched:
//!
//! - an access outside its buffer or array, or a vector not aligned to its size;
//! - a signed overflow, a division by zero, a shift by the width or more;
//! - in shared memory, a read of what was never written, of what another thread wrote (or the reverse) without a
//!   barrier between, or of an asynchronous copy that was not waited for; two unordered writes trap even if equal;
//! - a product of warp groups that reads what was not shown to it;
//! - a barrier that not all threads of the block, or of the cluster, reach; a shuffle, product or `warp_sync` that not all lanes reach.
//!
//! ```
//! use qp_codegen::ir::interpret::{Arg, Options, run};
//! use qp_codegen::ir::{Builder, Elem, Special};
//!
//! let b = Builder::new("square", [1, 1], 32);
//! let x = b.buffer("x", Elem::I32, true);
//! let i = b.special(Special::Thread);
//! let v = b.load(x, i, Elem::I32);
//! b.store(x, i, v * v, Elem::I32);
//! let kernel = b.finish();
//!
//! let mut bytes: Vec<u8> = (0..32).flat_map(|i: i32| i.to_le_bytes()).collect();
//! let report = run(&kernel, &mut [Arg::Buffer(&mut bytes)], &Options::default()).unwrap();
//! assert_eq!(bytes[4 * 5..][..4], 25i32.to_le_bytes());
//! assert_eq!(report.global_loaded, 128);
//!
//! let trap = run(&kernel, &mut [Arg::Buffer(&mut bytes[..64])], &Options::default()).unwrap_err();
//! assert_eq!(trap.thread, 16);
//! ```

mod arithmetic;
mod execute;
mod float;
mod mask;
mod memory;
mod program;
mod tensor;

use std::borrow::Cow;

use super::*;
use execute::Machine;

/// An argument of a launch.
#[derive(Debug)]
pub enum Arg<'a> {
    /// A buffer the kernel may write. Little-endian elements; the address counts as aligned to 16 bytes.
    Buffer(&'a mut [u8]),
    /// A buffer the kernel only reads.
    ReadOnly(&'a [u8]),
    /// A scalar.
    I32(i32),
    /// A scalar.
    U32(u32),
    /// A scalar.
    F32(f32),
}

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Watch shared memory for races, reads of what was never written and of copies in flight. Costs about as much as
    /// the accesses themselves.
    pub races: bool,
    /// Run the clusters last to first.
    pub reverse: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { races: true, reverse: false }
    }
}

/// Kinds of executed operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OpKind {
    /// Reads and writes of variables.
    Move,
    /// Integer and logical arithmetic other than products and quotients, 32 and 64 bits; permutes, funnel shifts.
    Int,
    /// Integer products.
    IntMul,
    /// Quotients and remainders of integers and floats.
    Div,
    /// Float arithmetic.
    Float,
    /// Conversions between floats, 32-bit and 64-bit integers.
    Convert,
    /// Four-byte dot products.
    Dot4,
    /// Two-component dot products.
    Dot2,
    /// Tensor-core products, counted once a lane.
    Mma,
    /// Loads from global memory.
    GlobalLoad,
    /// Stores to global memory.
    GlobalStore,
    /// Loads from shared memory.
    SharedLoad,
    /// Stores to shared memory.
    SharedStore,
    /// Atomic additions.
    Atomic,
    /// Asynchronous copies.
    AsyncCopy,
    /// Shuffles, and values of all lanes.
    Shuffle,
    /// Barriers and waits.
    Sync,
    /// Branches and loop heads.
    Control,
}

impl OpKind {
    /// Every kind.
    pub const ALL: [OpKind; 18] = [
        OpKind::Move,
        OpKind::Int,
        OpKind::IntMul,
        OpKind::Div,
        OpKind::Float,
        OpKind::Convert,
        OpKind::Dot4,
        OpKind::Dot2,
        OpKind::Mma,
        OpKind::GlobalLoad,
        OpKind::GlobalStore,
        OpKind::SharedLoad,
        OpKind::SharedStore,
        OpKind::Atomic,
        OpKind::AsyncCopy,
        OpKind::Shuffle,
        OpKind::Sync,
        OpKind::Control,
    ];
}

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    counts: [u64; OpKind::ALL.len()],
    /// Bytes read from buffers, asynchronous copies and atomics included.
    pub global_loaded: u64,
    /// Bytes written to buffers, atomics included.
    pub global_stored: u64,
    /// Bytes read from shared memory.
    pub shared_loaded: u64,
    /// Bytes written to shared memory.
    pub shared_stored: u64,
}

impl Report {
    /// Executed operations of a kind, summed over threads: a scalar operation of one thread counts one, an access of
    /// any width too.
    pub fn count(&self, kind: OpKind) -> u64 {
        self.counts[kind as usize]
    }

    /// All executed operations.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// What stopped a launch.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel `{kernel}`, block ({}, {}), thread {thread}: {fault}, at `{statement}`", block[0], block[1])]
pub struct Trap {
    /// Name of the kernel.
    pub kernel: String,
    /// Block: x, y.
    pub block: [u32; 2],
    /// Thread in its block.
    pub thread: u32,
    /// The statement in text form.
    pub statement: String,
    /// Why.
    pub fault: Fault,
}

/// Why a launch stopped.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// A kernel that the validator refuses.
    #[error(transparent)]
    Invalid(Problems),
    /// Wrong number or kinds of arguments.
    #[error("{0}")]
    Arguments(String),
    /// An access outside.
    #[error("{lanes} x {elem} at element {index} lies outside `{memory}` of {bytes} bytes")]
    OutOfBounds {
        /// Buffer or array.
        memory: String,
        /// First element.
        index: i64,
        /// Elements.
        lanes: u32,
        /// Element type.
        elem: Elem,
        /// Size.
        bytes: u64,
    },
    /// A vector not aligned to its size.
    #[error("{lanes} elements at element {index} of `{memory}` are not aligned to their size")]
    Misaligned {
        /// Buffer or array.
        memory: String,
        /// First element.
        index: i64,
        /// Elements.
        lanes: u32,
    },
    /// A signed result that does not fit.
    #[error("the result overflows (operands {0} and {1})")]
    Overflow(i64, i64),
    /// A zero divisor, or a remainder of a negative number.
    #[error("{0} cannot be divided by {1} here")]
    Division(i64, i64),
    /// A shift by a negative number, or by the width or more.
    #[error("shift by {0}")]
    Shift(i64),
    /// Shared accesses of two threads, one of them a write, without a barrier between.
    #[error("race on byte {byte} of `{memory}`: {what}")]
    Race {
        /// The array.
        memory: String,
        /// Byte in it.
        byte: u32,
        /// What met.
        what: String,
    },
    /// A read of shared memory that was never written.
    #[error("byte {byte} of `{memory}` was never written")]
    Uninitialised {
        /// The array.
        memory: String,
        /// Byte in it.
        byte: u32,
    },
    /// An access to the goal of an asynchronous copy before the wait.
    #[error("byte {byte} of `{memory}` is the goal of an unfinished copy of thread {owner}")]
    InFlight {
        /// The array.
        memory: String,
        /// Byte in it.
        byte: u32,
        /// Who started the copy.
        owner: u32,
    },
    /// A barrier, shuffle or product that some threads do not reach.
    #[error("only {active} of {all} threads are here")]
    Divergent {
        /// Threads that are.
        active: u32,
        /// Threads that should.
        all: u32,
    },
    /// A product of warp groups reads what its writer did not show to it.
    #[error(
        "byte {byte} of `{memory}` is read by warp groups, but thread {writer} has not shown it (group_fence) before a barrier"
    )]
    Hidden {
        /// The array.
        memory: String,
        /// Byte in it.
        byte: u32,
        /// Who wrote it.
        writer: u32,
    },
    /// Threads of a warp group that name different operands.
    #[error("not all threads of the four warps name the same place")]
    Parted,
    /// A loop whose step is not positive.
    #[error("loop step {0}")]
    Step(i32),
}

/// A trap without the kernel's names.
struct Stop {
    thread: u32,
    fault: Box<Fault>,
    /// Number of the statement.
    at: u32,
}

impl Stop {
    fn at(thread: usize, fault: Fault) -> Stop {
        Stop { thread: thread as u32, fault: Box::new(fault), at: 0 }
    }
}

/// Runs the whole grid.
///
/// # Errors
/// The first [`Trap`]; buffers then hold what was written until there.
pub fn run(kernel: &Kernel, args: &mut [Arg<'_>], options: &Options) -> Result<Report, Trap> {
    match Prepared::new(kernel) {
        Ok(prepared) => prepared.run(args, options),
        Err(problems) => Err(trap(kernel, [0, 0], 0, "launch".into(), Fault::Invalid(problems))),
    }
}

/// A kernel that is validated and compiled for the interpreter, to be run many times.
#[derive(Debug)]
pub struct Prepared<'k> {
    kernel: Cow<'k, Kernel>,
    program: program::Program,
}

impl<'k> Prepared<'k> {
    /// Prepares a kernel, borrowed or owned.
    ///
    /// # Errors
    /// What the validator finds.
    pub fn new(kernel: impl Into<Cow<'k, Kernel>>) -> Result<Self, Problems> {
        let kernel = kernel.into();
        validate(&kernel)?;
        let program = program::compile(&kernel);
        Ok(Prepared { kernel, program })
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Runs the whole grid.
    ///
    /// # Errors
    /// The first [`Trap`]; buffers then hold what was written until there.
    pub fn run(&self, args: &mut [Arg<'_>], options: &Options) -> Result<Report, Trap> {
        let kernel = self.kernel();
        check_arguments(kernel, args)
            .map_err(|text| trap(kernel, [0, 0], 0, "launch".into(), Fault::Arguments(text)))?;
        let mut machine = Machine::new(kernel, &self.program, args, options);
        let [nx, ny] = kernel.grid.map(u64::from);
        let nx = nx / u64::from(kernel.cluster);
        let clusters = nx * ny;
        for i in 0..clusters {
            let i = if options.reverse { clusters - 1 - i } else { i };
            let (x, y) = ((i % nx) as u32 * kernel.cluster, (i / nx) as u32);
            machine.cluster([x, y]).map_err(|stop| {
                let s = nth_statement(&kernel.body, &mut { stop.at }).map(|s| statement(kernel, s));
                let (rank, thread) = (stop.thread / kernel.threads, stop.thread % kernel.threads);
                trap(kernel, [x + rank, y], thread, s.unwrap_or_default(), *stop.fault)
            })?;
        }
        Ok(machine.report)
    }
}

impl<'k> From<&'k Kernel> for Cow<'k, Kernel> {
    fn from(kernel: &'k Kernel) -> Self {
        Cow::Borrowed(kernel)
    }
}

impl From<Kernel> for Cow<'_, Kernel> {
    fn from(kernel: Kernel) -> Self {
        Cow::Owned(kernel)
    }
}

fn trap(kernel: &Kernel, block: [u32; 2], thread: u32, statement: String, fault: Fault) -> Trap {
    Trap { kernel: kernel.name.clone(), block, thread, statement, fault }
}

/// Statement `n` in the order of the text.
fn nth_statement<'k>(block: &'k [Stmt], n: &mut u32) -> Option<&'k Stmt> {
    for s in block {
        if *n == 0 {
            return Some(s);
        }
        *n -= 1;
        let found = s.nested().find_map(|b| nth_statement(b, n));
        if found.is_some() {
            return found;
        }
    }
    None
}

fn check_arguments(kernel: &Kernel, args: &[Arg<'_>]) -> Result<(), String> {
    if kernel.params.len() != args.len() {
        return Err(format!("{} arguments for {} parameters", args.len(), kernel.params.len()));
    }
    for (i, (p, a)) in kernel.params.iter().zip(args).enumerate() {
        let fits = match (p.kind, a) {
            (ParamKind::Buffer { .. }, Arg::Buffer(_)) => true,
            (ParamKind::Buffer { writable, .. }, Arg::ReadOnly(_)) => !writable,
            (ParamKind::Scalar(Scalar::I32), Arg::I32(_)) => true,
            (ParamKind::Scalar(Scalar::U32), Arg::U32(_)) => true,
            (ParamKind::Scalar(Scalar::F32), Arg::F32(_)) => true,
            (ParamKind::Buffer { .. } | ParamKind::Scalar(_), _) => false,
        };
        if !fits {
            return Err(format!("the argument for `{}` is of another kind", p.name));
        }
        let (bytes, least) = match a {
            Arg::Buffer(bytes) => (bytes.len(), kernel.least_bytes(i)),
            Arg::ReadOnly(bytes) => (bytes.len(), kernel.least_bytes(i)),
            Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => (0, 0),
        };
        if (bytes as u64) < least {
            return Err(format!(
                "the buffer for `{}` has {bytes} bytes, fewer than the {least} that it must have",
                p.name
            ));
        }
    }
    Ok(())
}

//! Reads a buffer and does nothing else that takes time: the bandwidth that other kernels are measured against.

use crate::ir::{Builder, Cache, Elem, Kernel, Special};

/// What to read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Read {
    /// Blocks of the grid.
    pub blocks: u32,
    /// Rounds of the loop; the whole grid reads [`Read::words`].
    pub rounds: u32,
}

const THREADS: u32 = 512;
/// Loads of 4 words that a thread has in flight.
const AHEAD: u32 = 8;

impl Read {
    /// Threads of the grid.
    pub fn threads(&self) -> u32 {
        self.blocks * THREADS
    }

    /// Words that are read.
    pub fn words(&self) -> u32 {
        self.rounds * AHEAD * 4 * self.threads()
    }
}

/// Makes the kernel. Its parameters, in order:
///
/// * `x`: `u32`, [`Read::words`];
/// * `y`: `u32`, one a thread: the wrapping sum of the words that the thread read. All of them together are the sum of `x`.
pub fn lower(op: &Read) -> Kernel {
    let b = Builder::new("read", [op.blocks, 1], THREADS);
    b.doc(format!("Reads {} words.", op.words()));
    let (x, y) =
        (b.sized("x", Elem::U32, false, op.words().into()), b.sized("y", Elem::U32, true, op.threads().into()));
    let thread = b.special(Special::BlockX) * THREADS + b.special(Special::Thread);
    let sum = b.var(b.u32(0));
    let apart = 4 * op.threads();
    b.for_(thread * 4, op.words(), AHEAD * apart, |i| {
        let loads: Vec<_> =
            (0..AHEAD).map(|k| b.load_as(x, i + k * apart, Elem::U32, 4, Cache::Stream).lanes()).collect();
        for word in loads.into_iter().flatten() {
            b.set(sum, b.get(sum) + word);
        }
    });
    b.store(y, thread, b.get(sum), Elem::U32);
    b.finish()
}

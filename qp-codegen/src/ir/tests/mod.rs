//! Tests of the IR: every operation against a scalar reference, what traps, what is refused.

mod clusters;
mod invalid;
mod operations;
mod traps;

use super::interpret::{Arg, Options, run};
use super::*;

/// A deterministic stream of random words.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
}

fn bytes(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Runs `f` on each row of `inputs`, one thread a row, and gives the words it makes.
fn each<const N: usize>(inputs: &[[u32; N]], f: impl for<'b> Fn(&'b Builder, [V<'b>; N]) -> V<'b>) -> Vec<u32> {
    let threads = 64;
    let blocks = inputs.len().div_ceil(threads as usize) as u32;
    let b = Builder::new("each", [blocks, 1], threads);
    let x = b.buffer("x", Elem::U32, false);
    let y = b.buffer("y", Elem::U32, true);
    let i = b.special(Special::BlockX) * 64 + b.special(Special::Thread);
    b.if_(i.lt(inputs.len() as i32), || {
        let args = std::array::from_fn(|n| b.load(x, i * N as i32 + n as i32, Elem::U32));
        b.store(y, i, f(&b, args), Elem::U32);
    });
    let kernel = b.finish();
    let mut out = vec![0; inputs.len() * 4];
    let args = bytes(inputs.iter().flatten().copied());
    run(&kernel, &mut [Arg::ReadOnly(&args), Arg::Buffer(&mut out)], &Options::default())
        .unwrap_or_else(|t| panic!("{t}\n{kernel}"));
    words(&out)
}

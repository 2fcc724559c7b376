//! Lowerings: one file an operation, each from a quantizer, a shape and a target to kernel IR.

pub mod add;
pub mod argmax;
pub mod attend;
pub mod decode;
pub mod dense;
pub mod dequantize;
mod each;
pub mod embed;
pub mod embed_packed;
pub mod encode;
pub mod experts;
pub mod gemm;
pub mod gemv;
pub mod glu;
pub mod grouped;
mod launch;
pub mod leave;
pub mod map;
pub mod math;
mod mean;
pub mod norm;
mod operands;
pub mod prepare;
pub mod product;
pub mod read;
pub mod rotate;
pub mod rows;
pub mod sample;
mod span;
pub mod walk;

use crate::ir::{Builder, V};
pub use span::Span;

/// A name as part of a C identifier.
fn c_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// Handles the items `0..len`, all `threads` of a block together, of which this is number `thread`: of up to `most` of a
/// thread's, `load` is on its way before the first is stored. So the time does not grow with the number of loads, and it
/// does not matter whether the threads divide the items.
fn copy_all<'b, T>(
    b: &'b Builder,
    thread: V<'b>,
    [len, threads, most]: [u32; 3],
    load: impl Fn(V<'b>) -> T,
    store: impl Fn(V<'b>, &T),
) {
    let of_thread = len.div_ceil(threads);
    let chunks = of_thread.div_ceil(most);
    let rounds = of_thread.div_ceil(chunks);
    b.for_(thread, len, rounds * threads, |first| {
        // Whether there are items for all threads in the last chunk's round, too.
        let full = |r: u32| ((chunks - 1) * rounds + r + 1) * threads <= len;
        let at: Vec<(V, bool)> = (0..rounds).map(|r| (first + r * threads, full(r))).collect();
        let loaded: Vec<T> = at.iter().map(|&(i, full)| load(if full { i } else { i.min(len as i32 - 1) })).collect();
        for (&(i, full), loaded) in at.iter().zip(&loaded) {
            if full { store(i, loaded) } else { b.if_(i.lt(len), || store(i, loaded)) }
        }
    });
}

#[cfg(test)]
mod step_tests;
#[cfg(test)]
mod tests;

//! Tests that cross crates; see the files beside this folder. Here: what several of them need.

pub mod anchors;
pub mod conformance;
pub mod converted;
pub mod gguf;
pub mod models;
pub mod random_specs;

use std::sync::LazyLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Does long pieces of work, such as compiling kernels, on threads of their own: among those that all share, the many short pieces
/// of other tests would wait for them.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    static THREADS: LazyLock<ThreadPool> = LazyLock::new(|| ThreadPoolBuilder::new().build().expect("threads start"));
    THREADS.install(work)
}

//! Kernels with clusters of blocks.

use super::*;
use crate::cuda::{self, Target, print};

/// Two clusters of two blocks. In each cluster block 0 writes its threads' numbers and those of the cluster; block 1 reads
/// them after the cluster's barrier, and what its own block has in shared memory.
fn relay(between: impl Fn(&Builder)) -> Kernel {
    let b = Builder::new("relay", [4, 1], 64);
    b.cluster(2);
    let x = b.buffer("x", Elem::I32, true);
    let s = b.shared("s", Elem::I32, 64);
    let (t, rank, cluster) = (b.special(Special::Thread), b.special(Special::Rank), b.special(Special::Cluster));
    let first = cluster * 128;
    b.store(s, t, rank * 1000 + t, Elem::I32);
    b.if_(rank.eq(0), || {
        b.store(x, first + t, cluster * 100 + t, Elem::I32);
        // Of this block alone.
        b.barrier();
    });
    between(&b);
    b.if_(rank.eq(1), || {
        let theirs = b.load(x, first + (t ^ 40), Elem::I32);
        b.store(x, first + 64 + t, theirs + b.load(s, t ^ 40, Elem::I32), Elem::I32);
    });
    b.finish()
}

#[test]
fn blocks_of_a_cluster_meet() {
    let kernel = relay(Builder::cluster_barrier);
    for reverse in [false, true] {
        let mut out = vec![0; 4 * 256];
        run(&kernel, &mut [Arg::Buffer(&mut out)], &Options { races: true, reverse }).unwrap_or_else(|t| panic!("{t}"));
        let want = (0..2).flat_map(|c| {
            let written = (0..64).map(move |t| 100 * c + t);
            written.chain((0..64u32).map(move |t| 100 * c + (t ^ 40) + 1000 + (t ^ 40)))
        });
        assert_eq!(words(&out), want.collect::<Vec<u32>>());
    }
}

#[test]
fn traps_name_the_block_of_the_cluster() {
    let trap = |kernel: &Kernel, memory: usize| {
        run(kernel, &mut [Arg::Buffer(&mut vec![0; memory])], &Options::default()).unwrap_err().to_string()
    };
    insta::assert_snapshot!(
        [
            // Shared memory is each block's own: block 0's barrier orders nothing in block 1.
            trap(&relay(|_| ()), 4 * 256),
            // Beyond the end: the second cluster's second block.
            trap(&relay(Builder::cluster_barrier), 4 * 200),
        ]
        .join("\n")
    );
}

#[test]
fn control_flow_of_the_whole_cluster_is_accepted() {
    let b = Builder::new("uniform", [4, 2], 32);
    b.cluster(2);
    let x = b.buffer("x", Elem::I32, false);
    let n = b.load(x, b.special(Special::BlockY), Elem::I32);
    b.for_(b.special(Special::Cluster), n, 2, |i| b.if_(i.gt(3), || b.cluster_barrier()));
    assert_eq!(validate(&b.finish()), Ok(()));
}

#[test]
fn the_text_says_what_a_cluster_does() {
    let kernel = relay(Builder::cluster_barrier);
    insta::assert_snapshot!(format!("{kernel}\n{}", print(cuda::check(&kernel, Target::Sm90a).expect("valid"))));
}

#[test]
fn targets_without_clusters_refuse_them() {
    let problems = cuda::check(&relay(Builder::cluster_barrier), Target::Sm89).map(|_| ()).unwrap_err().to_string();
    assert!(problems.contains("sm_89 has no clusters"), "{problems}");
}

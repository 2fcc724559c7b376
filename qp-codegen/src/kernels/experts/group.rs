//! Sorting the pairs of a step by their experts, so that a product decodes an expert's weights once for many of them.

use super::units;
use crate::ir::{Builder, Elem, Kernel, Special};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Experts.
    pub count: u32,
    /// Pairs.
    pub pairs: u32,
    /// Most pairs of a unit.
    pub most: u32,
}

/// Most threads of the block.
const THREADS: u32 = 1024;

/// Makes the kernel, one block. Its parameters, in order:
///
/// * `experts`: `i32`, the expert of each pair;
/// * `pairs`: `i32`, the pairs, those of an expert one behind the other, in any order;
/// * `units`: `i32`, four for each of [`units`] units, expert by expert: the expert, the place of its first pair in `pairs`,
///   how many pairs it has, and 0. Units that there is nothing left for have no pairs.
pub fn lower(op: &Group) -> Kernel {
    let Group { count, pairs, most } = *op;
    let all = units(count, pairs, most);
    let threads = pairs.max(count).next_multiple_of(32).min(THREADS);
    let b = Builder::new(&format!("group_{pairs}_by_{count}_m{most}"), [1, 1], threads);
    b.doc(format!("{pairs} pairs by their experts, of {count}, in units of up to {most}."));
    b.dependent_launch();
    let experts = b.sized("experts", Elem::I32, false, pairs.into());
    let sorted = b.sized("pairs", Elem::I32, true, pairs.into());
    let made = b.sized("units", Elem::I32, true, 4 * u64::from(all));
    let (counts, next) = (b.shared("counts", Elem::I32, count), b.shared("next", Elem::I32, count));
    let used = b.shared("used", Elem::I32, 1);
    let thread = b.special(Special::Thread);
    let (zero, one) = (b.i32(0), b.i32(1));
    b.for_(thread, count, threads, |e| b.store(counts, e, zero, Elem::I32));
    b.barrier();
    b.grid_wait();
    b.grid_launch();
    b.for_(thread, pairs, threads, |p| {
        b.atomic_add(counts, b.load(experts, p, Elem::I32), one);
    });
    b.barrier();
    b.for_(thread, count, threads, |e| {
        let (first, unit) = (b.var(zero), b.var(zero));
        b.for_(0, e, 1, |i| {
            let n = b.load(counts, i, Elem::I32);
            b.set(first, b.get(first) + n);
            b.set(unit, b.get(unit) + (n + (most - 1)) / most);
        });
        let (first, unit) = (b.get(first), b.get(unit));
        let n = b.load(counts, e, Elem::I32);
        let own = (n + (most - 1)) / most;
        b.store(next, e, first, Elem::I32);
        b.for_(0, own, 1, |i| {
            let done = i * most;
            let of_unit = b.vector(&[e, first + done, (n - done).min(most), zero]);
            b.store(made, (unit + i) * 4, of_unit, Elem::I32);
        });
        b.if_(e.eq(count - 1), || b.store(used, zero, unit + own, Elem::I32));
    });
    b.barrier();
    b.for_(b.load(used, zero, Elem::I32) + thread, all, threads, |unit| {
        b.store(made, unit * 4, b.vector(&[zero; 4]), Elem::I32);
    });
    b.for_(thread, pairs, threads, |p| {
        let place = b.atomic_add(next, b.load(experts, p, Elem::I32), one);
        b.store(sorted, place, p, Elem::I32);
    });
    b.finish()
}

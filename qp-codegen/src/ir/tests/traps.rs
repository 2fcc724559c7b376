//! What a GPU would get wrong, caught by the interpreter; and what looks alike but is right.

use super::*;

/// A kernel of two warps with a buffer of 64 words that count up from 0, and a shared array of 64.
fn attempt(body: impl for<'b> Fn(&'b Builder, Mem, Mem, V<'b>)) -> Result<Vec<u32>, String> {
    let b = Builder::new("attempt", [2, 1], 64);
    let x = b.buffer("x", Elem::I32, true);
    let s = b.shared("s", Elem::I32, 64);
    let t = b.special(Special::Thread);
    body(&b, x, s, t);
    let mut memory = bytes(0..64);
    run(&b.finish(), &mut [Arg::Buffer(&mut memory)], &Options::default()).map_err(|t| t.to_string())?;
    Ok(words(&memory))
}

macro_rules! traps {
    ($($name:ident: |$b:pat_param, $x:pat_param, $s:pat_param, $t:pat_param| $body:expr;)*) => {
        #[test]
        fn traps() {
            let mut text = String::new();
            $(
                let trap = attempt(|$b, $x, $s, $t| { let _ = $body; });
                let trap = trap.expect_err(concat!(stringify!($name), " must trap"));
                text += &format!("{}\n    {trap}\n", stringify!($name));
            )*
            insta::assert_snapshot!(text);
        }
    };
}

traps! {
    load_outside: |b, x, _, t| b.load(x, t + 60, Elem::I32);
    load_below: |b, x, _, t| b.load(x, t - 1, Elem::I32);
    store_outside: |b, x, _, t| b.store(x, t * 100, t, Elem::I32);
    shared_outside: |b, _, s, t| b.store(s, t + 1, t, Elem::I32);
    misaligned: |b, x, _, t| b.load_as(x, t + 1 - 1, Elem::I32, 2, Cache::Default);
    misaligned_row: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.barrier();
        b.load_matrix(s, (t & 7) * 4 + t / 63, 4)
    };
    sum: |b, _, _, t| { let big = b.i32(i32::MAX - 40); t + big };
    difference: |b, _, _, t| { let small = b.i32(i32::MIN + 40); small - t };
    product: |b, x, _, t| b.load(x, t, Elem::I32) * 100_000_000;
    negation: |b, _, _, t| -(t + b.i32(i32::MIN));
    magnitude: |b, _, _, t| (t + b.i32(i32::MIN)).abs();
    shifted_out: |_, _, _, t| t << 27;
    wide_product: |_, _, _, t| t.to(Scalar::I64) * (1 << 30) * (1 << 30);
    no_divisor: |_, _, _, t| (t + 7) / (t - 9);
    no_remainder: |_, _, _, t| (t - 3) % 5;
    far_shift: |_, _, _, t| t.to(Scalar::U32) << t.to(Scalar::U32);
    shift_back: |_, _, _, t| (t & 1) >> (t - 2);
    dot: |b, _, _, t| {
        let ones = b.u32(0x7f7f_7f7f);
        ones.dot4(ones, t + (i32::MAX - 64520));
    };
    pair: |b, _, _, t| {
        let ones = b.u32(0x7fff_7fff);
        ones.dot2(b.u32(0x7f7f_0000), true, t + (i32::MAX - 2 * 32767 * 127 - 8));
    };
    tensor_product: |b, _, _, t| {
        let (ones, zero) = (b.u32(0x7f7f_7f7f), b.i32(i32::MAX - 100));
        b.mma_i8(true, [ones; 4], [ones; 2], b.vector(&[zero, zero, zero, t]));
    };
    atomic: |b, x, _, _| b.atomic_add(x, b.i32(3), b.i32(i32::MAX / 10));
    endless: |b, _, _, t| b.for_(0, 10, t - 1, |_| ());
    loop_index: |b, _, _, _| b.for_(0, i32::MAX, 1 << 30, |_| ());
    never_written: |b, _, s, t| b.load(s, t, Elem::I32);
    never_written_in_this_block: |b, _, s, t| {
        b.if_(b.special(Special::BlockX).eq(0), || b.store(s, t, t, Elem::I32));
        b.load(s, t, Elem::I32);
    };
    read_after_write: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.load(s, t ^ 1, Elem::I32);
    };
    read_after_write_over_warps: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.warp_sync();
        b.load(s, t ^ 32, Elem::I32);
    };
    write_after_read: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.barrier();
        let v = b.load(s, t ^ 1, Elem::I32);
        b.store(s, t, v, Elem::I32);
    };
    write_after_reads_of_other_warps: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.barrier();
        b.load(s, b.i32(0), Elem::I32);
        b.warp_sync();
        b.if_(t.eq(0), || b.store(s, t, t, Elem::I32));
    };
    equal_writes: |b, _, s, _| b.store(s, b.i32(0), b.i32(7), Elem::I32);
    equal_writes_over_warps: |b, _, s, t| {
        b.if_((t & 31).eq(0), || b.store(s, b.i32(0), b.i32(7), Elem::I32));
    };
    byte_of_another_thread: |b, _, s, t| {
        b.store(s, t * 4, t, Elem::I8);
        b.store(s, (t ^ 1) * 4 + 1, t, Elem::I8);
        b.load(s, t * 2, Elem::I16)
    };
    read_beside_atomic: |b, _, s, t| {
        b.store(s, t, t, Elem::I32);
        b.barrier();
        b.atomic_add(s, b.i32(0), b.i32(1));
        b.load(s, b.i32(0), Elem::I32);
    };
    copy_not_waited_for: |b, x, s, t| {
        b.async_copy(s, t, x, t, 4);
        b.async_commit();
        b.load(s, t, Elem::I32);
    };
    copy_not_committed: |b, x, s, t| {
        b.async_copy(s, t, x, t, 4);
        b.async_wait(0);
        b.load(s, t, Elem::I32);
    };
    copy_of_a_later_group: |b, x, s, t| {
        b.async_copy(s, t, x, t, 4);
        b.async_commit();
        b.async_wait(1);
        b.load(s, t, Elem::I32);
    };
    copy_of_another_thread: |b, x, s, t| {
        b.async_copy(s, t, x, t, 4);
        b.async_commit();
        b.async_wait(0);
        b.load(s, t ^ 1, Elem::I32);
    };
    copy_over_what_is_read: |b, x, s, t| {
        b.store(s, t, t, Elem::I32);
        b.barrier();
        b.load(s, t ^ 1, Elem::I32);
        b.async_copy(s, t, x, t, 4);
    };
    copy_outside: |b, x, s, t| b.async_copy(s, t, x, t, 16);
}

#[test]
fn ordered_accesses_are_no_race() {
    // A warp passes values on by `warp_sync`, the block by barriers, and reads of one place need nothing.
    let out = attempt(|b, x, s, t| {
        b.store(s, t, t * 2, Elem::I32);
        b.warp_sync();
        let near = b.load(s, t ^ 1, Elem::I32);
        b.warp_sync();
        b.store(s, t, near + 1, Elem::I32);
        b.barrier();
        let far = b.load(s, t ^ 32, Elem::I32) + b.load(s, b.i32(0), Elem::I32);
        b.barrier();
        b.store(s, t ^ 1, far, Elem::I32);
        b.barrier();
        b.store(x, t, b.load(s, t, Elem::I32), Elem::I32);
    });
    let want: Vec<u32> = (0..64).map(|t: u32| ((t ^ 1 ^ 32) ^ 1) * 2 + 1 + 3).collect();
    assert_eq!(out.unwrap(), want);
}

#[test]
fn copies_arrive_group_by_group() {
    let out = attempt(|b, x, s, t| {
        b.if_(t.lt(16), || {
            b.async_copy(s, t, x, b.i32(15) - t, 8);
            b.async_commit();
            b.async_copy(s, t + 16, x, t, 8);
            b.async_commit();
            b.async_wait(1);
        });
        b.barrier();
        let early = b.var(b.i32(0));
        b.if_(t.lt(32), || b.set(early, b.load(s, t, Elem::I32)));
        b.async_wait(0);
        b.barrier();
        let late = b.load(s, (t & 31) + 32, Elem::I32);
        b.barrier();
        b.store(x, t, t.lt(32).select(b.get(early), late), Elem::I32);
    });
    let out = out.unwrap();
    // The second block copies what the first wrote, so follow both.
    let mut want: Vec<u32> = (0..64).collect();
    for _ in 0..2 {
        let reversed = (0..32).map(|i: usize| want[2 * (15 - i / 2) + i % 2]);
        want = reversed.chain((0..32).map(|i: usize| want[i])).collect();
    }
    assert_eq!(out, want);
}

#[test]
fn without_the_watch_races_pass() {
    let b = Builder::new("race", [1, 1], 64);
    let s = b.shared("s", Elem::I32, 1);
    b.store(s, b.i32(0), b.i32(7), Elem::I32);
    let kernel = b.finish();
    assert!(run(&kernel, &mut [], &Options::default()).is_err());
    assert!(run(&kernel, &mut [], &Options { races: false, reverse: false }).is_ok());
}

#[test]
fn arguments_are_checked() {
    let b = Builder::new("arguments", [1, 1], 32);
    b.buffer("x", Elem::I32, true);
    b.scalar("n", Scalar::I32);
    let kernel = b.finish();
    let (mut memory, fixed) = (vec![0; 4], vec![0; 4]);
    let fail = |args: &mut [Arg<'_>]| run(&kernel, args, &Options::default()).unwrap_err().to_string();
    insta::assert_snapshot!(
        [
            fail(&mut []),
            fail(&mut [Arg::ReadOnly(&fixed), Arg::I32(1)]),
            fail(&mut [Arg::Buffer(&mut memory), Arg::U32(1)]),
        ]
        .join("\n")
    );
}

/// Four warps write B, do `between`, and multiply with it, from the cell that `first` makes of the thread's index.
fn attempt_group(between: impl Fn(&Builder), first: impl for<'b> Fn(V<'b>) -> V<'b>) -> Result<(), String> {
    let b = Builder::new("attempt", [1, 1], 128);
    let s = b.shared("s", Elem::U32, 128);
    let t = b.special(Special::Thread);
    let acc = b.var(b.vector(&[b.i32(0); 4]));
    b.store(s, t, t.to(Scalar::U32), Elem::U32);
    between(&b);
    b.mma_group(true, &[[b.u32(1); 4]], &[acc], s, first(b.special(Special::Warp)), 16);
    b.group_wait(0);
    b.store(s, t, b.u32(7), Elem::U32);
    run(&b.finish(), &mut [], &Options::default()).map(|_| ()).map_err(|t| t.to_string())
}

#[test]
fn what_warp_groups_read_must_be_shown() {
    let shown = |b: &Builder| {
        b.group_fence();
        b.barrier();
    };
    let fail = |between: &dyn Fn(&Builder), first: fn(V) -> V| attempt_group(between, first).unwrap_err();
    insta::assert_snapshot!(
        [
            // The write after the product meets the product's reading.
            fail(&shown, |w| w / 4),
            fail(&|b| b.barrier(), |w| w / 4),
            fail(&|b| b.group_fence(), |w| w / 4),
            // Shown to nobody: the fence takes effect at the next barrier.
            fail(
                &|b| {
                    b.barrier();
                    b.group_fence();
                },
                |w| w / 4
            ),
            fail(&shown, |w| w),
            fail(&shown, |w| w / 4 + 9),
        ]
        .join("\n")
    );
}

//! Kernels that the validator must refuse, with the messages.

use super::*;

/// A small valid kernel to spoil.
fn sound() -> Kernel {
    let b = Builder::new("spoiled", [1, 1], 64);
    let x = b.buffer("x", Elem::I32, true);
    let w = b.buffer("w", Elem::U32, false);
    let gain = b.scalar("gain", Scalar::F32);
    let s = b.shared("s", Elem::I32, 64);
    let t = b.special(Special::Thread);
    let v = b.load(w, t, Elem::U32);
    let total = b.var(t);
    b.for_(0, 4, 1, |i| b.set(total, b.get(total) + i));
    b.store(s, t, b.get(total) + v.bits(Scalar::I32), Elem::I32);
    b.barrier();
    b.store(x, t, b.load(s, t, Elem::I32) + gain.to(Scalar::I32), Elem::I32);
    b.finish()
}

/// Adds a statement, with a value of this operation and type where it is a `Let`.
fn add(k: &mut Kernel, op: Op, ty: Type) -> Val {
    k.values.push(Value { op, ty, name: None });
    let v = Val(k.values.len() as u32 - 1);
    k.body.push(Stmt::Let(v));
    v
}

fn number(k: &mut Kernel, x: i32) -> Val {
    add(k, Op::Const(Const::I32(x)), Type::I32)
}

/// Adds a product of warp groups that takes 16 cells of the shared array, spoiled by `f`, and the wait for it.
fn group(k: &mut Kernel, f: impl FnOnce(&mut Vec<Var>, &mut u32)) {
    let (first, x) = (number(k, 0), add(k, Op::Const(Const::U32(4)), Type::U32));
    let sum = add(k, Op::Vector(vec![first; 4]), Type::I32X4);
    k.vars.push(Variable { ty: Type::I32X4, name: None });
    let var = Var(k.vars.len() as u32 - 1);
    k.body.push(Stmt::Set(var, sum));
    let (mut acc, mut stride) = (vec![var], 8);
    f(&mut acc, &mut stride);
    k.body.push(Stmt::MmaGroup { signed_a: true, fresh: false, a: vec![[x; 4]], acc, mem: 0, first, stride });
    k.body.push(Stmt::GroupWait { pending: 0 });
}

/// Adds a product of warp groups that is not waited for; gives its accumulator.
fn unfinished(k: &mut Kernel) -> Var {
    k.threads = 128;
    group(k, |_, _| ());
    k.body.pop();
    Var(k.vars.len() as u32 - 1)
}

/// Adds a loop of four rounds over the statements from `from` on.
fn repeat(k: &mut Kernel, from: usize) {
    let body = k.body.split_off(from);
    let (zero, one, four) = (number(k, 0), number(k, 1), number(k, 4));
    k.values.push(Value { op: Op::LoopIndex, ty: Type::I32, name: None });
    let index = Val(k.values.len() as u32 - 1);
    k.body.push(Stmt::For { index, start: zero, end: four, step: one, unroll: false, body });
}

macro_rules! refused {
    ($($name:ident: |$k:ident| $body:expr;)*) => {
        #[test]
        fn spoiled_kernels_are_refused() {
            let mut text = String::new();
            $(
                let mut kernel = sound();
                { let $k = &mut kernel; $body; }
                let problems = validate(&kernel).expect_err(concat!(stringify!($name), " must be refused"));
                text += &format!("{}\n", stringify!($name));
                for p in problems.problems {
                    text += &format!("    {p}\n");
                }
            )*
            insta::assert_snapshot!(text);
        }
    };
}

const DIVERGENT: Op = Op::Special(Special::Thread);

refused! {
    name: |k| k.name = "2x".into();
    parameter_name: |k| k.params[0].name = "a-b".into();
    same_name: |k| k.shared[0].name = "x".into();
    threads: |k| k.threads = 48;
    many_threads: |k| k.threads = 2048;
    grid: |k| k.grid = [1, 70000];
    min_blocks: |k| k.min_blocks = 40;
    shared: |k| k.shared[0].len = 60000;
    huge_shared: |k| k.shared[0].len = u32::MAX;
    scalar: |k| k.params[2].kind = ParamKind::Scalar(Scalar::Bool);
    no_such_type: |k| { let a = number(k, 1); add(k, Op::Vector(vec![a; 3]), Type { scalar: Scalar::I32, lanes: 3 }) };
    undefined: |k| add(k, Op::Unary(UnaryOp::Neg, Val(1000)), Type::I32);
    itself: |k| { let v = Val(k.values.len() as u32); add(k, Op::Unary(UnaryOp::Neg, v), Type::I32) };
    out_of_scope: |k| {
        let Some(Stmt::For { index, .. }) = k.body.iter().find(|s| matches!(s, Stmt::For { .. })) else { panic!() };
        let index = *index;
        add(k, Op::Unary(UnaryOp::Neg, index), Type::I32);
    };
    twice: |k| { let v = number(k, 1); k.body.push(Stmt::Let(v)) };
    loop_over_a_constant: |k| {
        let one = number(k, 1);
        k.values.push(Value { op: Op::Const(Const::I32(0)), ty: Type::I32, name: None });
        let index = Val(k.values.len() as u32 - 1);
        k.body.push(Stmt::For { index, start: one, end: one, step: one, unroll: false, body: vec![] });
    };
    loop_without_step: |k| {
        let zero = number(k, 0);
        k.values.push(Value { op: Op::LoopIndex, ty: Type::I32, name: None });
        let index = Val(k.values.len() as u32 - 1);
        k.body.push(Stmt::For { index, start: zero, end: zero, step: zero, unroll: false, body: vec![] });
    };
    index_without_loop: |k| add(k, Op::LoopIndex, Type::I32);
    unset: |k| {
        k.vars.push(Variable { ty: Type::I32, name: Some("late".into()) });
        let var = Var(k.vars.len() as u32 - 1);
        let one = number(k, 1);
        let yes = add(k, Op::Const(Const::Bool(true)), Type::BOOL);
        k.body.push(Stmt::If { cond: yes, then: vec![Stmt::Set(var, one)], els: vec![] });
        add(k, Op::Get(var), Type::I32);
    };
    no_variable: |k| { let one = number(k, 1); k.body.push(Stmt::Set(Var(9), one)) };
    variable_type: |k| { let yes = add(k, Op::Const(Const::Bool(true)), Type::BOOL); k.body.push(Stmt::Set(Var(0), yes)) };
    operands: |k| {
        let one = number(k, 1);
        let other = add(k, Op::Const(Const::U32(1)), Type::U32);
        add(k, Op::Binary(BinaryOp::Add, one, other), Type::I32);
    };
    float_shift: |k| { let x = add(k, Op::Const(Const::F32(1.0)), Type::F32); add(k, Op::Binary(BinaryOp::Shl, x, x), Type::F32) };
    bool_order: |k| { let x = add(k, Op::Const(Const::Bool(true)), Type::BOOL); add(k, Op::Compare(CompareOp::Lt, x, x), Type::BOOL) };
    integer_root: |k| { let x = number(k, 4); add(k, Op::Unary(UnaryOp::Sqrt, x), Type::I32) };
    to_bool: |k| { let x = number(k, 4); add(k, Op::Convert(Scalar::Bool, x), Type::BOOL) };
    wide_bits: |k| { let x = add(k, Op::Const(Const::I64(4)), Type::I64); add(k, Op::Bitcast(Scalar::F32, x), Type::F32) };
    noted_type: |k| add(k, Op::Special(Special::Lane), Type::U32);
    condition: |k| { let x = number(k, 4); k.body.push(Stmt::If { cond: x, then: vec![], els: vec![] }) };
    component: |k| { let x = number(k, 4); add(k, Op::Extract(x, 0), Type::I32) };
    fifth_component: |k| {
        let x = number(k, 4);
        let v = add(k, Op::Vector(vec![x; 4]), Type::I32X4);
        add(k, Op::Extract(v, 4), Type::I32);
    };
    selector: |k| { let x = add(k, Op::Const(Const::U32(4)), Type::U32); add(k, Op::Permute { a: x, b: x, selector: 0x12345 }, Type::U32) };
    fragment: |k| {
        let x = add(k, Op::Const(Const::U32(4)), Type::U32);
        add(k, Op::MmaI8 { signed_a: true, a: [x; 4], b: [x; 2], acc: x }, Type::I32X4);
    };
    group_threads: |k| group(k, |_, _| ());
    group_columns: |k| { k.threads = 128; group(k, |acc, _| { let more = [acc[0]; 5]; *acc = more.into() }) };
    group_without_columns: |k| { k.threads = 128; group(k, |acc, _| acc.clear()) };
    group_accumulator: |k| { k.threads = 128; group(k, |acc, _| acc[0] = Var(0)) };
    group_same_accumulator: |k| { k.threads = 128; group(k, |acc, _| { acc.push(acc[0]) }) };
    group_unset: |k| {
        k.threads = 128;
        k.vars.push(Variable { ty: Type::I32X4, name: None });
        let late = Var(k.vars.len() as u32 - 1);
        group(k, |acc, _| acc[0] = late);
    };
    group_outside: |k| { k.threads = 128; group(k, |_, stride| *stride = 9) };
    group_stride: |k| { k.threads = 128; group(k, |_, stride| *stride = 1 << 14) };
    group_by_warp: |k| {
        k.threads = 128;
        group(k, |_, _| ());
        let product = k.body.split_off(k.body.len() - 2);
        let w = add(k, Op::Special(Special::Warp), Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, w, w), Type::BOOL);
        k.body.push(Stmt::If { cond, then: product, els: vec![] });
    };
    group_of_lanes: |k| {
        k.threads = 128;
        group(k, |_, _| ());
        let t = add(k, DIVERGENT, Type::I32);
        let at = k.body.iter().position(|s| matches!(s, Stmt::MmaGroup { .. })).expect("the product");
        let mut product = k.body.remove(at);
        if let Stmt::MmaGroup { first, .. } = &mut product { *first = t }
        k.body.extend([product, Stmt::GroupWait { pending: 0 }]);
    };
    group_read: |k| { let x = unfinished(k); add(k, Op::Get(x), Type::I32X4); k.body.push(Stmt::GroupWait { pending: 0 }) };
    group_read_with_one_pending: |k| {
        let x = unfinished(k);
        k.body.push(Stmt::GroupWait { pending: 1 });
        add(k, Op::Get(x), Type::I32X4);
        k.body.push(Stmt::GroupWait { pending: 0 });
    };
    group_read_of_the_last_of_two: |k| {
        unfinished(k);
        let x = unfinished(k);
        k.body.push(Stmt::GroupWait { pending: 1 });
        add(k, Op::Get(x), Type::I32X4);
        k.body.push(Stmt::GroupWait { pending: 0 });
    };
    group_set: |k| {
        let x = unfinished(k);
        let zero = number(k, 0);
        let zeros = add(k, Op::Vector(vec![zero; 4]), Type::I32X4);
        k.body.extend([Stmt::Set(x, zeros), Stmt::GroupWait { pending: 0 }]);
    };
    group_at_a_barrier: |k| { unfinished(k); k.body.extend([Stmt::Barrier, Stmt::GroupWait { pending: 0 }]) };
    group_at_a_cluster_barrier: |k| {
        unfinished(k);
        (k.grid, k.cluster) = ([2, 1], 2);
        k.body.extend([Stmt::ClusterBarrier, Stmt::GroupWait { pending: 0 }]);
    };
    group_at_the_end: |k| unfinished(k);
    group_on_one_branch: |k| {
        let x = unfinished(k);
        let yes = add(k, Op::Const(Const::Bool(true)), Type::BOOL);
        k.body.push(Stmt::If { cond: yes, then: vec![], els: vec![Stmt::GroupWait { pending: 0 }] });
        add(k, Op::Get(x), Type::I32X4);
        k.body.push(Stmt::GroupWait { pending: 0 });
    };
    group_of_the_round_before: |k| {
        let x = unfinished(k);
        let product = k.body.pop().expect("the product");
        let from = k.body.len();
        add(k, Op::Get(x), Type::I32X4);
        k.body.push(product);
        repeat(k, from);
        k.body.push(Stmt::GroupWait { pending: 0 });
    };
    group_wait_in_no_round: |k| {
        let x = unfinished(k);
        let from = k.body.len();
        k.body.push(Stmt::GroupWait { pending: 0 });
        repeat(k, from);
        add(k, Op::Get(x), Type::I32X4);
        k.body.push(Stmt::GroupWait { pending: 0 });
    };
    group_wait_by_warp: |k| {
        group(k, |_, _| ());
        k.threads = 128;
        let w = add(k, Op::Special(Special::Warp), Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, w, w), Type::BOOL);
        k.body.push(Stmt::If { cond, then: vec![Stmt::GroupWait { pending: 0 }], els: vec![] });
    };
    matrix_of_global: |k| { let i = number(k, 0); add(k, Op::LoadMatrix { mem: Mem::Global(1), row: i, lanes: 4 }, Type { scalar: Scalar::U32, lanes: 4 }) };
    three_matrices: |k| { let i = number(k, 0); add(k, Op::LoadMatrix { mem: Mem::Shared(0), row: i, lanes: 3 }, Type { scalar: Scalar::U32, lanes: 3 }) };
    zero_divisor: |k| { let x = number(k, 0); add(k, Op::Binary(BinaryOp::Div, x, x), Type::I32) };
    far_shift: |k| { let x = number(k, 32); add(k, Op::Binary(BinaryOp::Shr, x, x), Type::I32) };
    store_to_read_only: |k| { let i = number(k, 0); k.body.push(Stmt::Store { mem: Mem::Global(1), index: i, value: i, elem: Elem::I32 }) };
    atomic_to_read_only: |k| { let i = number(k, 0); add(k, Op::AtomicAdd { mem: Mem::Global(1), index: i, value: i }, Type::I32) };
    store_to_scalar: |k| { let i = number(k, 0); k.body.push(Stmt::Store { mem: Mem::Global(2), index: i, value: i, elem: Elem::I32 }) };
    store_to_nothing: |k| { let i = number(k, 0); k.body.push(Stmt::Store { mem: Mem::Shared(7), index: i, value: i, elem: Elem::I32 }) };
    prefetch_of_scalar: |k| { let index = number(k, 0); k.body.push(Stmt::Prefetch { src: 2, index }) };
    prefetch_by_float: |k| {
        let index = add(k, Op::Const(Const::F32(1.0)), Type::F32);
        k.body.push(Stmt::Prefetch { src: 0, index });
    };
    halves_of_numbers: |k| { let x = number(k, 1); add(k, Op::Halves(HalvesOp::Sub, x, x), Type::U32) };
    smaller_of_numbers: |k| { let x = number(k, 1); add(k, Op::AddMin(x, x, x), Type::U32) };
    stored_type: |k| { let i = number(k, 0); k.body.push(Stmt::Store { mem: Mem::Shared(0), index: i, value: i, elem: Elem::F32 }) };
    cached_load_of_written: |k| {
        let index = number(k, 0);
        add(k, Op::Load { mem: Mem::Global(0), index, elem: Elem::I32, lanes: 1, cache: Cache::ReadOnly }, Type::I32);
    };
    streaming_shared: |k| {
        let index = number(k, 0);
        add(k, Op::Load { mem: Mem::Shared(0), index, elem: Elem::I32, lanes: 1, cache: Cache::Stream }, Type::I32);
    };
    three_lanes: |k| {
        let index = number(k, 0);
        let ty = Type { scalar: Scalar::I32, lanes: 2 };
        add(k, Op::Load { mem: Mem::Shared(0), index, elem: Elem::I32, lanes: 3, cache: Cache::Default }, ty);
    };
    constant_outside: |k| {
        let (a, b) = (number(k, 60), number(k, 4));
        let index = add(k, Op::Binary(BinaryOp::Add, a, b), Type::I32);
        k.body.push(Stmt::Store { mem: Mem::Shared(0), index, value: a, elem: Elem::I32 });
    };
    constant_misaligned: |k| {
        let index = number(k, 2);
        let cache = Cache::Default;
        add(k, Op::Load { mem: Mem::Shared(0), index, elem: Elem::I32, lanes: 4, cache }, Type::I32X4);
    };
    copy_width: |k| { let i = number(k, 0); k.body.push(Stmt::AsyncCopy { dst: 0, dst_index: i, src: 1, src_index: i, bytes: 12 }) };
    copy_outside: |k| { let i = number(k, 16); k.body.push(Stmt::AsyncCopy { dst: 0, dst_index: i, src: 1, src_index: i, bytes: 16 }) };
    copy_from_scalar: |k| { let i = number(k, 0); k.body.push(Stmt::AsyncCopy { dst: 0, dst_index: i, src: 2, src_index: i, bytes: 16 }) };
    shuffle_mask: |k| {
        let i = number(k, 32);
        add(k, Op::Shuffle { mode: ShuffleMode::Xor, value: i, arg: i }, Type::I32);
    };
    barrier_in_branch: |k| {
        let t = add(k, DIVERGENT, Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, t, t), Type::BOOL);
        k.body.push(Stmt::If { cond, then: vec![Stmt::Barrier], els: vec![Stmt::WarpSync] });
    };
    barrier_by_warp: |k| {
        let w = add(k, Op::Special(Special::Warp), Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, w, w), Type::BOOL);
        k.body.push(Stmt::If { cond, then: vec![Stmt::WarpSync], els: vec![Stmt::Barrier] });
    };
    barrier_in_loop: |k| {
        let (t, one) = (add(k, DIVERGENT, Type::I32), number(k, 1));
        k.values.push(Value { op: Op::LoopIndex, ty: Type::I32, name: None });
        let index = Val(k.values.len() as u32 - 1);
        k.body.push(Stmt::For { index, start: one, end: t, step: one, unroll: false, body: vec![Stmt::Barrier] });
    };
    large_cluster: |k| (k.grid, k.cluster) = ([9, 1], 9);
    cluster_of_none: |k| k.cluster = 0;
    broken_cluster: |k| (k.grid, k.cluster) = ([6, 1], 4);
    cluster_barrier_without_clusters: |k| k.body.push(Stmt::ClusterBarrier);
    cluster_barrier_by_rank: |k| {
        (k.grid, k.cluster) = ([2, 1], 2);
        let r = add(k, Op::Special(Special::Rank), Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, r, r), Type::BOOL);
        k.body.push(Stmt::If { cond, then: vec![Stmt::Barrier, Stmt::ClusterBarrier], els: vec![] });
    };
    cluster_barrier_by_block: |k| {
        (k.grid, k.cluster) = ([2, 1], 2);
        let x = add(k, Op::Special(Special::BlockX), Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, x, x), Type::BOOL);
        k.body.push(Stmt::If { cond, then: vec![], els: vec![Stmt::ClusterBarrier] });
    };
    cluster_barrier_by_shared_memory: |k| {
        (k.grid, k.cluster) = ([2, 1], 2);
        let index = number(k, 0);
        let cache = Cache::Default;
        let n = add(k, Op::Load { mem: Mem::Shared(0), index, elem: Elem::I32, lanes: 1, cache }, Type::I32);
        let one = number(k, 1);
        k.values.push(Value { op: Op::LoopIndex, ty: Type::I32, name: None });
        let index = Val(k.values.len() as u32 - 1);
        k.body.push(Stmt::For { index, start: one, end: n, step: one, unroll: false, body: vec![Stmt::ClusterBarrier] });
    };
    shuffle_in_branch: |k| {
        let t = add(k, DIVERGENT, Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, t, t), Type::BOOL);
        add(k, Op::Shuffle { mode: ShuffleMode::Index, value: t, arg: t }, Type::I32);
        let Some(shuffle) = k.body.pop() else { panic!() };
        k.body.push(Stmt::If { cond, then: vec![shuffle], els: vec![] });
    };
    across_in_branch: |k| {
        let t = add(k, DIVERGENT, Type::I32);
        let cond = add(k, Op::Compare(CompareOp::Lt, t, t), Type::BOOL);
        let word = add(k, Op::Bitcast(Scalar::U32, t), Type::U32);
        add(k, Op::Across(AcrossOp::Max, word), Type::U32);
        let Some(across) = k.body.pop() else { panic!() };
        k.body.push(Stmt::If { cond, then: vec![across], els: vec![] });
    };
    across_of_signed: |k| {
        let t = add(k, DIVERGENT, Type::I32);
        add(k, Op::Across(AcrossOp::Add, t), Type::U32);
    };
    dependent_without_wait: |k| k.dependent_launch = true;
    wait_in_branch: |k| {
        k.dependent_launch = true;
        k.body = vec![];
        let yes = add(k, Op::Const(Const::Bool(true)), Type::BOOL);
        k.body.push(Stmt::If { cond: yes, then: vec![Stmt::GridWait], els: vec![] });
    };
}

#[test]
fn divergence_reaches_variables_by_loops_and_branches() {
    // The variable is uniform on paper when the branch is first seen; the loop's second round makes it divergent.
    let b = Builder::new("later", [1, 1], 64);
    let t = b.special(Special::Thread);
    let zero = b.i32(0);
    let (x, y) = (b.var(zero), b.var(zero));
    b.for_(0, 4, 1, |_| {
        b.if_(b.get(y).gt(3), || b.barrier());
        b.set(y, b.get(x));
        b.if_(t.lt(7), || b.set(x, zero));
    });
    let problems = validate(&b.finish()).unwrap_err();
    assert!(problems.problems.iter().all(|p| matches!(p.what, Invalid::Divergent("block"))));
    assert_eq!(problems.problems.len(), 1);
}

#[test]
fn uniform_control_flow_is_accepted() {
    let b = Builder::new("uniform", [4, 1], 64);
    let x = b.buffer("x", Elem::I32, false);
    let s = b.shared("s", Elem::I32, 2);
    let n = b.load(x, b.special(Special::BlockX), Elem::I32);
    let count = b.var(n);
    b.for_(0, b.get(count), 1, |i| {
        b.if_(b.special(Special::Thread).eq(0), || b.store(s, i & 1, i, Elem::I32));
        b.barrier();
        b.if_(b.load(s, i & 1, Elem::I32).gt(2), || b.barrier());
        b.set(count, b.get(count) + 1);
    });
    let warp = b.special(Special::Warp);
    b.if_(warp.eq(1), || {
        let first = b.special(Special::Lane).shuffle(warp);
        b.for_(0, first, 1, |_| b.warp_sync());
    });
    assert_eq!(validate(&b.finish()), Ok(()));
}

#[test]
fn the_product_of_warp_groups_was_sound() {
    let mut kernel = sound();
    kernel.threads = 128;
    group(&mut kernel, |_, _| ());
    assert_eq!(validate(&kernel), Ok(()));
}

#[test]
fn the_spoiled_kernel_was_sound() {
    assert_eq!(validate(&sound()), Ok(()));
}

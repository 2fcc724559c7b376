//! The kernel IR across its three readers: one kernel that has everything is printed, run and compiled.

use qp_codegen::cuda::{self, Target};
use qp_codegen::ir::interpret::{Arg, Options, run};
use qp_codegen::ir::{Builder, Cache, Const, Elem, Kernel, Scalar, Special, V};
use qp_runtime::jit;

/// Every operation, element type, width and cache mode, on two blocks of 64 threads.
fn everything() -> Kernel {
    let b = Builder::new("everything", [2, 1], 64);
    b.doc(
        "Every operation of the IR once. The remark is long enough to be wrapped, which happens at a width of about \
         one hundred and ten columns, and it ends in a backslash \\",
    );
    b.min_blocks(2);
    b.dependent_launch();
    let words = b.buffer("words", Elem::U32, false);
    let halves = b.buffer("halves", Elem::F16, false);
    let out = b.buffer("out", Elem::F32, true);
    let sums = b.buffer("int", Elem::I32, true);
    let bytes = b.buffer("bytes", Elem::U8, true);
    let gain = b.scalar("gain", Scalar::F32);
    let bias = b.scalar("bias", Scalar::I32);
    let mask = b.scalar("mask", Scalar::U32);
    let table = b.shared("table", Elem::U32, 256);
    let tile = b.shared("tile", Elem::I8, 1024);

    let thread = b.special(Special::Thread);
    let lane = b.special(Special::Lane);
    let warp = b.special(Special::Warp);
    let block = b.special(Special::BlockX) + b.special(Special::BlockY);

    b.comment("Copies in flight while other work goes on.");
    b.async_copy(tile, thread, words, thread, 16);
    b.async_commit();
    let first = b.load_as(words, thread * 4, Elem::U32, 4, Cache::Stream).named("first");
    let second = b.load_as(words, thread * 2, Elem::U32, 2, Cache::ReadOnly);
    let third = b.load_as(halves, thread * 4, Elem::U16, 4, Cache::ReadOnly);
    b.for_(thread, 256, 64, |i| b.store(table, i, i.to(Scalar::U32) * 3, Elem::U32));
    b.grid_wait();
    b.async_wait(0);
    b.barrier();
    b.grid_launch();

    b.comment("Words.");
    let h = ((first.lane(0) * 0x9E37_79B1u32) ^ second.lane(1)).named("h");
    let picked = b.load(table, (h >> 24).to(Scalar::I32), Elem::U32);
    let signs = h.permute(picked, 0xFEDC);
    let mixed = h.permute(picked, 0x5140) ^ (((signs & mask) | !picked) + first.lane(3) % 7);
    let turned = mixed.funnel_shr(h, lane.to(Scalar::U32)) - ((h / 3) << 5).min(mixed).max(second.lane(0));
    let offset = (turned & 0x3fc) + ((third.lane(3) & 1) << 4);
    let dot = turned.dot4(mixed ^ b.load(table, offset, Elem::U32), bias);
    let dot = dot + (turned & 0x3fff_3fff).dot2(mixed, true, lane).min((turned & 0x7fff).dot2(h, false, dot));

    b.comment("Signed integers, narrow and wide.");
    let small = dot.abs().min(1 << 20) - (-lane) + (lane << 2) / 3 % 5;
    let wide = small.to(Scalar::I64) * 1_000_000 + h.to(Scalar::I64) - (small.to(Scalar::I64) >> 2);
    let wide = wide.ge(0).select(wide.max(1), -wide);
    let back = ((wide % (1 << 30)).to(Scalar::I32) & !bias) | (small ^ 1);
    let rounded = gain.to(Scalar::I64) + gain.to(Scalar::U32).to(Scalar::I64);

    b.comment("Floats.");
    let x = back.to(Scalar::F32) * gain / 3.5 - wide.to(Scalar::F32) + h.to(Scalar::F32);
    let y = x.fma(0.1f32, -x).abs().sqrt().min(1e30f32).max(x);
    let truth = (x.lt(y) & back.ne(7)) | (!h.eq(9) ^ y.le(f32::INFINITY));
    let z = truth.select(y.bits(Scalar::U32).bits(Scalar::F32), x.bits(Scalar::I32).bits(Scalar::F32));
    let flag = b.constant(Const::Bool(true));
    let z = (truth & flag).select(z, x);

    b.comment("Vectors.");
    let v = b.vector(&[x, y, z, gain]);
    let v = truth.select(v + v * v, -v);
    let u = first & !first.max(first + first);

    b.comment("Lanes.");
    let other = z.shuffle_xor(16);
    let near = back.shuffle((lane + 1) & 31);
    let zero = b.i32(0);
    let mut acc = b.vector(&[zero, zero, zero, zero]);
    let a: [V<'_>; 4] = u.lanes().try_into().ok().unwrap();
    for signed in [true, false] {
        acc = b.mma_i8(signed, a, [first.lane(0), first.lane(1)], acc);
    }

    let row = (lane & 7) * 4 + (lane >> 3) * 32;
    let four = b.load_matrix(table, row, 4);
    let two = b.load_matrix(table, (lane & 15) * 4, 2);
    let near = near ^ (four.lane(0) + four.lane(3) + two.lane(1)).bits(Scalar::I32);

    b.comment("Variables and loops.");
    let total = b.named_var("total", zero);
    let late = b.named_var("late", zero);
    let vector = b.var(acc);
    b.for_(0, lane, 1, |k| {
        let term = b.load(table, k, Elem::U32).bits(Scalar::I32);
        b.set(total, b.get(total) + term);
        b.if_else(k.gt(3), || b.set(late, k), || b.set(total, b.get(total) + 1));
    });
    b.unrolled(0, 4, 1, |_| b.set(vector, b.get(vector) + acc));

    b.comment("Narrow elements, through shared memory.");
    b.barrier();
    let at = thread * 8;
    for (k, elem) in [Elem::I8, Elem::I16].into_iter().enumerate() {
        let pair = b.load_as(tile, at + 4 * k as i32, elem, if k == 0 { 4 } else { 2 }, Cache::Default);
        b.barrier();
        b.store(tile, at + 4 * k as i32, pair, elem);
        b.barrier();
    }
    let scalar = b.load(tile, at, Elem::I8) + b.load(tile, thread * 4, Elem::I16);
    let unsigned = b.load(bytes, thread, Elem::U8) + b.load(bytes, thread, Elem::U16);
    let quad = b.load_as(bytes, thread * 4, Elem::U8, 4, Cache::Default);
    b.warp_sync();

    let base = block * 64 + thread;
    let half2 = b.load_as(halves, thread * 2, Elem::F16, 2, Cache::Stream);
    let half1 = b.load_as(halves, thread, Elem::BF16, 1, Cache::ReadOnly) + b.load(halves, thread, Elem::F16);
    let half4 = b.load_as(halves, thread * 4, Elem::BF16, 4, Cache::Default);
    let byte4 = b.load_as(halves, thread * 4, Elem::I8, 4, Cache::Stream);
    let short4 = b.load_as(halves, thread * 4, Elem::U16, 4, Cache::ReadOnly);
    let float4 = b.load_as(halves, thread * 4 % 64, Elem::F32, 4, Cache::Stream);
    let byte = b.load_as(words, thread, Elem::U8, 1, Cache::Stream);
    let float = half2.lane(0) + half2.lane(1) + half1 + half4.lane(3) + float4.lane(1) + other + byte.to(Scalar::F32);

    b.comment("Results.");
    b.store(out, base * 4, v, Elem::F32);
    b.barrier();
    let int = b.get(total) + b.get(late) + near + scalar + byte4.lane(2) + rounded.to(Scalar::I32);
    b.store(bytes, base * 4, b.vector(&[unsigned, quad.lane(0), quad.lane(3), short4.lane(0)]), Elem::U8);
    b.store(bytes, base + 512, short4.lane(1), Elem::U8);
    b.store(bytes, (base + 512) * 2, b.vector(&[float, x]), Elem::BF16);
    b.store(bytes, base + 1024, float, Elem::F16);
    b.fence();
    b.atomic_add(sums, zero, (int & 255).min(7));
    let old = b.atomic_add(sums, b.i32(1), b.get(vector).lane(2) & 1);
    b.if_(warp.eq(1) & lane.eq(5), || b.store(sums, b.i32(2), old, Elem::I32));
    b.finish()
}

/// Products of groups of warps, with bytes of either kind and two steps, which only some targets have.
fn groups() -> Kernel {
    let b = Builder::new("groups", [1, 1], 256);
    let words = b.buffer("words", Elem::U32, false);
    let out = b.buffer("out", Elem::I32, true);
    let staged = b.shared("staged", Elem::U32, 2 * 4 * 20 * 4);
    let (thread, warp) = (b.special(Special::Thread), b.special(Special::Warp));
    b.if_(thread.lt(160), || b.async_copy(staged, thread, words, thread, 16));
    b.async_commit();
    b.async_wait(0);
    b.group_fence();
    b.barrier();
    let a: [V<'_>; 4] = b.load_as(words, thread * 4, Elem::U32, 4, Cache::ReadOnly).lanes().try_into().ok().unwrap();
    let none = b.vector(&[b.i32(0); 4]);
    let acc = [b.named_var("low", none), b.named_var("high", none)];
    for signed in [false, true] {
        b.mma_group(signed, &[a, a], &acc, staged, warp / 4 * 80, 20);
    }
    b.group_wait(1);
    b.mma_group(true, &[a], &acc[..1], staged, b.i32(8), 20);
    b.group_wait(0);
    for (i, var) in acc.into_iter().enumerate() {
        b.store(out, (thread * 2 + i as i32) * 4, b.get(var), Elem::I32);
    }
    b.finish()
}

/// The source of a kernel that must be valid for `target`.
fn print(kernel: &Kernel, target: Target) -> String {
    cuda::print(cuda::check(kernel, target).unwrap_or_else(|e| panic!("{e}")))
}

#[test]
fn products_of_warp_groups_are_printed_and_compile_where_there_are_any() {
    let kernel = groups();
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|t| t.has_wgmma()).collect();
    assert_eq!(targets, [Target::Sm90a]);
    let source = print(&kernel, Target::Sm90a);
    insta::assert_snapshot!("groups_sm_90a", source);
    insta::assert_snapshot!("groups_ir", kernel.to_string());
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let (arch, options) = (Target::Sm90a.nvrtc_arch(), jit::Options::default());
    let cubin = jit::compile_in(&jit::Cache::none(), &source, "groups", arch, &options);
    let usage = cubin.unwrap_or_else(|e| panic!("{e}")).usage.expect("the compiler says");
    assert_eq!((usage.spill_stores, usage.spill_loads, usage.stack), (0, 0, 0));
}

#[test]
fn a_kernel_is_refused_where_its_target_lacks_something() {
    let kernel = groups();
    let refused = |kernel: &Kernel, target| cuda::check(kernel, target).map(|_| ()).unwrap_err().to_string();
    assert!(refused(&kernel, Target::Sm100).contains("sm_100 has no products of warp groups"));
    let b = Builder::new("large", [1, 1], 32);
    b.shared("all", Elem::U32, 30_000);
    let kernel = b.finish();
    assert!(cuda::check(&kernel, Target::Sm80).is_ok());
    assert!(refused(&kernel, Target::Sm89).contains("120000 bytes of shared memory, more than the 101376"));
}

#[test]
fn everything_is_printed() {
    for target in [Target::Sm80, Target::Sm90a] {
        insta::assert_snapshot!(format!("everything_{target}"), print(&everything(), target));
    }
    insta::assert_snapshot!("everything_ir", everything().to_string());
}

#[test]
fn everything_compiles_for_every_target() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    for target in Target::ALL {
        let source = print(&everything(), target);
        let cubin = jit::compile_in(
            &jit::Cache::at(cache.path()),
            &source,
            "everything",
            target.nvrtc_arch(),
            &jit::Options::default(),
        );
        let usage = cubin.unwrap_or_else(|e| panic!("{e}")).usage.expect("the compiler says");
        eprintln!("{target}: {usage:?}");
    }
}

#[test]
fn everything_runs_in_either_order_of_blocks() {
    let kernel = everything();
    let words: Vec<u8> = (0..1024u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let halves: Vec<u8> = (0..512u16).flat_map(|i| (0x3c00 + i).to_le_bytes()).collect();
    let mut results = Vec::new();
    for reverse in [false, true] {
        let (mut out, mut sums, mut bytes) = (vec![0; 4096], vec![0; 16], vec![7; 4096]);
        let mut args = [
            Arg::ReadOnly(&words),
            Arg::ReadOnly(&halves),
            Arg::Buffer(&mut out),
            Arg::Buffer(&mut sums),
            Arg::Buffer(&mut bytes),
            Arg::F32(1.5),
            Arg::I32(-3),
            Arg::U32(0xf0f0_f0f0),
        ];
        let report =
            run(&kernel, &mut args, &Options { reverse, ..Options::default() }).unwrap_or_else(|t| panic!("{t}"));
        // The old value of an atomic depends on the order.
        sums[8..12].fill(0);
        results.push((out, sums[..8].to_vec(), report));
    }
    assert_eq!(results[0], results[1]);
}

//! The kernels of every quantizer of the palette: run by the interpreter against the CPU, compiled for every target.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use qp_codegen::cuda::{self, Target};
use qp_codegen::formats;
use qp_codegen::ir::{Elem, Kernel};
use qp_codegen::kernels::dense::{self, Dense};
use qp_codegen::kernels::dequantize::{self, Dequantize};
use qp_codegen::kernels::embed_packed::{self, EmbedPacked};
use qp_codegen::kernels::experts::combine::{self, Combine};
use qp_codegen::kernels::experts::group::{self, Group};
use qp_codegen::kernels::experts::route::{self, Route};
use qp_codegen::kernels::experts::unit::{self, GateExperts};
use qp_codegen::kernels::experts::{Experts, most_pairs};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::grouped::{self, Product};
use qp_codegen::kernels::leave::{self, Leave};
use qp_codegen::kernels::prepare::{self, Gate, Prepare};
use qp_codegen::kernels::product::{Launch, Way};
use qp_codegen::kernels::{Span, encode};
use qp_codegen::palette;
use qp_codegen::reference::routing::{Routing, Score, Unit};
use qp_codegen::reference::{Activation, RmsNorm};
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{Quantizer, Rotation, Shape};
use qp_runtime::check;
use qp_runtime::device::Executor;
use qp_runtime::jit::{self, launches};
use rayon::iter::Either;
use rayon::prelude::*;

fn palette() -> Vec<Quantizer> {
    palette::names().iter().map(|name| palette::get(name).expect("listed and trained")).collect()
}

/// The source of a kernel that must be valid for `target`.
fn print(kernel: &Kernel, target: Target) -> String {
    cuda::print(cuda::check(kernel, target).unwrap_or_else(|e| panic!("{e}")))
}

#[test]
fn every_member_runs_on_the_interpreter_as_on_the_cpu() {
    let on = Executor::interpreter();
    palette().par_iter().for_each(|q| {
        // Rows and columns that fill no whole tiles, and more tokens than one tensor-core product holds.
        for (shape, batches) in [(Shape { rows: 40, cols: 576 }, [1, 3]), (Shape { rows: 16, cols: 1024 }, [2, 8])] {
            let done = check::quantizer(&on, q, shape, &batches).unwrap_or_else(|e| panic!("{e}"));
            assert!(done > 4, "{}: {done} comparisons", q.name);
        }
    });
}

#[test]
fn many_tokens_run_on_the_interpreter_as_on_the_cpu() {
    let on = Executor::interpreter();
    // One of each kind.
    let names = ["fast_2", "tcq_3", "tcq_1.5", "htcq_3.25", "nuq_4", "vq2_3"];
    let batches = [(Shape { rows: 40, cols: 576 }, [9, 33, 70]), (Shape { rows: 24, cols: 300 }, [16, 64, 129])];
    let work: Vec<_> = names.iter().flat_map(|name| batches.iter().map(move |b| (name, b))).collect();
    work.par_iter().for_each(|(name, (shape, batches))| {
        let q = palette::get(name).expect("of the palette");
        let done = check::quantizer(&on, &q, *shape, batches).unwrap_or_else(|e| panic!("{e}"));
        // The matrix, rows of it, and for each batch its activations, products with and without columns split.
        assert_eq!(done, 2 + batches.len() * 3, "{name}");
    });
}

/// Whether to compile everything for everything (the environment variable `QP_SWEEP`), which takes many minutes. Without it each
/// member is compiled for Hopper and for one other target, and for one each of the larger shapes and numbers of tokens: which, goes
/// around among them.
fn sweep() -> bool {
    std::env::var_os("QP_SWEEP").is_some()
}

/// Of `all`, those that member `i` is compiled for.
fn of_member<T: Copy>(i: usize, all: &[T]) -> Vec<T> {
    if sweep() { all.to_vec() } else { vec![all[i % all.len()]] }
}

/// Kernels of `q`, the palette's member `i`, for `target`: products of few tokens at several shapes, the decoded matrix, an
/// embedding, and the encoder.
fn kernels(i: usize, q: &Quantizer, target: Target) -> Vec<Kernel> {
    let device = target.device();
    let gemv = |rows, cols, batch, accumulate| {
        let op = Gemv { quantizer: q, shape: Shape { rows, cols }, batch, accumulate };
        Launch::choose(&op, &device).lower(&op)
    };
    let dequantize = Dequantize { quantizer: q, shape: Shape { rows: 4096, cols: 4096 }, output: Elem::F16 };
    let mut out = vec![gemv(4096, 4096, 1, false), dequantize::lower(&dequantize, device.sms)];
    // Those of a mix are members themselves.
    if let [code] = &q.codes[..] {
        let plan = encode::Plan::new(code, &device).expect("few states");
        out.push(plan.lower(plan.searches(&device)));
    }
    if target == Target::Sm90a {
        out.push(embed(q, 4096));
        // Of one token whose blocks prepare it themselves, where they can.
        let op = Gemv { quantizer: q, shape: Shape { rows: 6144, cols: 4096 }, batch: 1, accumulate: false };
        let norm = Some(RmsNorm { eps: 1e-5, add_one: false });
        let input = Span::rows(4096);
        let own = Prepare { columns: 4096, batch: 1, input, gate: None, norm, rotation: q.rotation, entering: None };
        let ranked = Launch::ranked_with(&op, Some(&own), &target.device());
        out.extend(ranked.first().map(|(_, launch)| launch.lower_with(&op, Some(&own))));
        let more = [(28672, 4096, 1, false), (4096, 14336, 8, true), (1536, 576, 3, false)];
        out.extend(of_member(i, &more).into_iter().map(|(rows, cols, batch, adds)| gemv(rows, cols, batch, adds)));
    } else if ["fast_2", "tcq_3", "htcq_3.25", "nuq_4"].contains(&q.name.as_str()) {
        out.push(gemv(3584, 18944, 64, true));
    }
    out
}

/// One token's embedding.
fn embed(quantizer: &Quantizer, cols: u32) -> Kernel {
    let shape = Shape { rows: 128256, cols };
    embed_packed::lower(&EmbedPacked { quantizer, shape, batch: 1, y: Span::rows(cols) })
}

#[test]
fn every_member_compiles_for_every_target_without_spills() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let (members, others) = (palette(), Target::ALL.into_iter().filter(|t| *t != Target::Sm90a).collect::<Vec<_>>());
    let targets = |i: usize| [vec![Target::Sm90a], of_member(i, &others)].concat();
    let work: Vec<_> =
        members.iter().enumerate().flat_map(|(i, q)| targets(i).into_iter().map(move |t| (i, q, t))).collect();
    fine(work.par_iter().flat_map_iter(|&(i, q, t)| kernels(i, q, t).into_iter().map(move |k| compile(&k, t))));
}

/// By groups of warps, and by warps each for itself, as everywhere else. The cost model does not foresee every register: what is
/// compiled first may spill if one of the next does not, which is then taken (`jit::launches::choose`).
#[test]
fn products_of_many_tokens_have_launches_that_do_not_spill() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let (members, target) = (palette(), Target::Sm90a);
    let long = Shape { rows: 28672, cols: 4096 };
    let all = [(long, 64), (long, 2048), (Shape { rows: 4096, cols: 14336 }, 16)];
    let work: Vec<_> =
        members.iter().enumerate().flat_map(|(i, q)| of_member(i, &all).into_iter().map(move |of| (q, of))).collect();
    fine(work.par_iter().flat_map_iter(|&(quantizer, (shape, batch))| {
        let op = Gemv { quantizer, shape, batch, accumulate: false };
        let ranked = Launch::ranked(&op, &target.device());
        let best = |way| {
            let of_way: Vec<_> = ranked.iter().copied().filter(|r| r.1.way() == way).collect();
            let mut candidates = launches::candidates(&of_way);
            candidates.reverse();
            let first = candidates.pop().expect("a launch of each way");
            let compile = |launch: Launch| compile(&launch.lower(&op), target).map_err(|e| format!("{way:?}: {e}"));
            compile(first).or_else(|e| candidates.into_iter().rev().find_map(|l| compile(l).ok()).ok_or(e))
        };
        [Way::Groups, Way::Gemm].map(best)
    }));
}

#[test]
fn products_of_formats_compile_for_every_target() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let mut work = Vec::new();
    let all: Vec<_> = formats::names().into_iter().filter_map(|n| Terms::of(formats::get(n)?).ok()).collect();
    for (i, terms) in all.iter().enumerate() {
        let shape = if i % 2 == 0 { Shape { rows: 28672, cols: 4096 } } else { Shape { rows: 4096, cols: 14336 } };
        // Each for the target that matters most, and for one other.
        for target in [Target::Sm90a, Target::ALL[i % Target::ALL.len()]] {
            for batch in if target == Target::Sm90a && i % 4 == 0 { vec![1, 8, 64] } else { vec![1] } {
                let op = Product { terms, shape, batch, y: Span::rows(shape.rows), accumulate: false };
                let kernel = grouped::lower(&op, &grouped::Launch::choose(&op, &target.device()));
                let (needed, available) = (kernel.shared_bytes(), target.device().shared_per_block);
                assert!(needed <= available, "{} needs {needed} bytes of {available} on {target}", kernel.name);
                // The cost model does not foresee every register of short runs and of several tokens.
                let may_spill = terms.run.is_some_and(|run| run < 128) || terms.bits != 4 || batch > 1;
                work.push((kernel, target, may_spill));
                let prepare = Prepare::entering(terms, shape.cols, batch);
                let own = grouped::Launch::ranked_with(&op, Some(&prepare), &target.device());
                let own = own.first().filter(|_| target == Target::Sm90a);
                work.extend(own.map(|(_, l)| (grouped::lower_with(&op, l, Some(&prepare)), target, may_spill)));
            }
        }
    }
    fine(work.par_iter().map(|(kernel, target, may_spill)| match compile(kernel, *target) {
        Err(why) if *may_spill && why.contains(": spills: ") => Ok(()),
        made => made,
    }));
}

#[test]
fn preparing_compiles_for_every_target_without_spills() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let norm = Some(RmsNorm { eps: 1e-5, add_one: true });
    let gate = |columns| Some(Gate { activation: Activation::GeluTanh, up: Span::rows(columns) });
    let mut kernels = Vec::new();
    for target in Target::ALL {
        for (columns, norm, gate, block) in [
            (576, norm, None, Some(128)),
            (4096, norm, None, Some(128)),
            (4096, norm, None, Some(512)),
            (4096, norm, None, None),
            (8192, norm, None, Some(128)),
            (14336, None, gate(14336), Some(128)),
            (14336, None, gate(14336), Some(1024)),
            (14336, None, gate(14336), None),
            (18944, None, gate(18944), Some(128)),
            (28672, None, gate(28672), Some(128)),
            // Values in shared memory.
            (53248, None, gate(53248), Some(128)),
        ] {
            let interleave = (block == Some(128)).then_some(1024);
            let rotation = Rotation::Hadamard { seed: 0, block, interleave };
            let op = Prepare { columns, batch: 1, input: Span::rows(columns), gate, norm, rotation, entering: None };
            let kernel = prepare::lower(&op, &target.device());
            // Memory that a GPU lacks is another matter.
            if kernel.shared_bytes() <= target.device().shared_per_block {
                kernels.push((Kernel { name: format!("{op:?}"), ..kernel }, target));
            }
        }
    }
    // What formats do to results.
    for (target, rows) in Target::ALL.into_iter().flat_map(|t| [128, 4096, 1 << 14].map(|rows| (t, rows))) {
        let (x, y) = (Span::rows(rows), Span::rows(rows));
        let op = Leave { rows, batch: 3, mixed: Some(rows), factors: true, x, y, accumulate: false };
        kernels.push((leave::lower(&op), target));
    }
    fine(kernels.par_iter().map(|(kernel, target)| compile(kernel, *target)));
}

/// Products of few and of many pairs, of codes of each kind, and all that is around them.
#[test]
fn mixtures_of_experts_compile_for_every_target_without_spills() {
    if jit::nvrtc_for_tests().is_none() {
        return;
    }
    let (count, chosen, inner, hidden) = (128, 8, 768, 2048);
    let all = [1, 8, 64, 2048];
    let mut kernels = Vec::new();
    for (i, target) in Target::ALL.into_iter().enumerate() {
        let few = target != Target::Sm90a;
        for tokens in if few { of_member(i, &all) } else { all.to_vec() } {
            let (pairs, most) = (tokens * chosen, most_pairs(tokens, chosen, count));
            let experts = |rows, stride| Experts { count, matrices: count - 1, rows, pairs, most, stride };
            let (of_tokens, of_pairs) = (experts(tokens, 2 * inner), experts(pairs, hidden));
            for name in &["tcq_3", "nuq_4", "fast_1.5", "vq2_3"][..if few { 2 } else { 4 }] {
                let quantizer = &palette::get(name).expect("of the palette");
                for (shape, experts) in [
                    (Shape { rows: 2 * inner, cols: hidden }, of_tokens),
                    (Shape { rows: hidden, cols: inner }, of_pairs),
                ] {
                    let op = Gemv { quantizer, shape, batch: most, accumulate: false };
                    let launch = Launch::ranked_for_experts(&op, &experts, &target.device())[0];
                    let kernel = launch.lower_for_experts(&op, &experts);
                    kernels.push((Kernel { name: format!("{name} {experts:?} {launch:?}"), ..kernel }, target));
                }
            }
            for name in &["mxfp4", "q4_k", "gptq_int4_g128", "q8_0"][..if few { 2 } else { 4 }] {
                let terms = &Terms::of(formats::get(name).expect("a format")).expect("exact products");
                for (shape, experts) in [
                    (Shape { rows: 2 * inner, cols: hidden }, of_tokens),
                    (Shape { rows: hidden, cols: inner }, of_pairs),
                ] {
                    let y = Span::rows(experts.stride);
                    let op = Product { terms, shape, batch: most, y, accumulate: false };
                    let launch = grouped::Launch::ranked_for_experts(&op, &experts, &target.device())[0].1;
                    let kernel = grouped::lower_for_experts(&op, &launch, &experts);
                    kernels.push((Kernel { name: format!("{name} {experts:?} {launch:?}"), ..kernel }, target));
                }
            }
            let (x, y) = (Span::rows(hidden), Span::rows(2 * inner));
            let op = Dense { rows: inner, cols: hidden, elem: Elem::BF16, batch: most, x, y, accumulate: false };
            kernels.push((dense::lower_for_experts(&op, &of_tokens), target));
            let unit = Unit::Clamped { alpha: 1.7, limit: 7.0 };
            let op = GateExperts { columns: inner, pairs, count, unit, gate: y, up: y, biased: true };
            kernels.push((unit::lower(&op), target));
            let op = Combine { columns: hidden, batch: tokens, chosen, count, x, y: x, biased: true, accumulate: true };
            kernels.push((combine::lower(&op), target));
            for (score, corrected) in [(Score::Softmax, false), (Score::Sigmoid, true)] {
                let routing = Routing { chosen: chosen as usize, score, normalise: true, scale: 2.5 };
                let scores = Span::rows(count);
                kernels
                    .push((route::lower(&Route { experts: count, batch: tokens, scores, routing, corrected }), target));
            }
            if most > 1 {
                kernels.push((group::lower(&Group { count, pairs, most }), target));
            }
        }
    }
    fine(kernels.par_iter().map(|(kernel, target)| compile(kernel, *target)));
}

/// What an encoder may spill: addresses of its outer loops, while a search takes all registers.
const SPILLED: u32 = 160;

/// Collects what is wrong.
fn fine(compiled: impl ParallelIterator<Item = Result<(), String>>) {
    let (bad, good): (Vec<String>, Vec<()>) = qp_tests::apart(|| compiled.partition_map(Either::from));
    assert!(bad.is_empty(), "{} kernels of {}:\n{}", bad.len(), bad.len() + good.len(), bad.join("\n"));
}

/// Compiles a kernel, which must not spill or make groups of warps wait for each product. Many are the same but for their names,
/// and are compiled once.
fn compile(kernel: &Kernel, target: Target) -> Result<(), String> {
    type Compiled = Arc<OnceLock<Result<(), String>>>;
    static KNOWN: Mutex<BTreeMap<(String, &str), Compiled>> = Mutex::new(BTreeMap::new());
    let name = format!("{} for {target}", kernel.name);
    let allowed = if kernel.name.starts_with("encode") { SPILLED } else { 0 };
    let source = print(&Kernel { name: "kernel".to_owned(), ..kernel.clone() }, target);
    let key = (source.clone(), target.nvrtc_arch());
    let known = KNOWN.lock().expect("no thread panics with it").entry(key).or_default().clone();
    let made = known.get_or_init(|| {
        let (cache, options) = (jit::Cache::none(), jit::Options::default());
        let cubin = jit::compile_in(&cache, &source, "kernel", target.nvrtc_arch(), &options);
        let cubin = cubin.map_err(|e| e.to_string())?;
        let usage = cubin.usage.ok_or("the compiler does not say")?;
        if let Some(line) = cubin.log.lines().find(|l| l.contains("serialized")) {
            return Err(line.into());
        }
        if usage.spill_stores.max(usage.stack) > allowed {
            return Err(format!("spills: {usage:?}"));
        }
        Ok(())
    });
    made.clone().map_err(|e| format!("{name}: {e}"))
}

#[test]
fn cuda_of_representative_members() {
    let shape = Shape { rows: 4096, cols: 4096 };
    for (name, target, batch) in [
        ("fast_2", Target::Sm90a, 1),
        ("tcq_3", Target::Sm90a, 1),
        ("tcq_3", Target::Sm80, 4),
        ("htcq_3.25", Target::Sm89, 1),
        ("nuq_4", Target::Sm120, 1),
        ("vq2_3", Target::Sm100, 1),
        ("tcq_3", Target::Sm90a, 16),
    ] {
        let q = palette::get(name).expect("of the palette");
        let op = Gemv { quantizer: &q, shape, batch, accumulate: false };
        let kernel = Launch::choose(&op, &target.device()).lower(&op);
        insta::assert_snapshot!(format!("product_{name}_{target}_b{batch}"), print(&kernel, target));
    }
    let q = palette::get("tcq_2.5").expect("of the palette");
    let kernel = dequantize::lower(&Dequantize { quantizer: &q, shape, output: Elem::F16 }, 132);
    insta::assert_snapshot!("dequantize_tcq_2.5_sm_90a", print(&kernel, Target::Sm90a));
    insta::assert_snapshot!("embed_tcq_2.5_sm_90a", print(&embed(&q, 768), Target::Sm90a));
    let op = Prepare {
        columns: 768,
        batch: 1,
        input: Span::rows(768),
        gate: None,
        norm: Some(RmsNorm { eps: 1e-5, add_one: false }),
        rotation: Rotation::Hadamard { seed: 0, block: Some(128), interleave: None },
        entering: None,
    };
    let prepare = |op| print(&prepare::lower(&op, &Target::Sm90a.device()), Target::Sm90a);
    insta::assert_snapshot!("prepare_768_sm_90a", prepare(op));
    let rotation = Rotation::Hadamard { seed: 0, block: None, interleave: None };
    insta::assert_snapshot!("prepare_768_whole_sm_90a", prepare(Prepare { rotation, ..op }));
    let gate = Some(Gate { activation: Activation::Silu, up: Span::rows(14336) });
    let (columns, input) = (14336, Span::rows(14336));
    insta::assert_snapshot!("prepare_14336_sm_90a", prepare(Prepare { columns, input, gate, norm: None, ..op }));
}

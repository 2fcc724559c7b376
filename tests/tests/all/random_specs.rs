//! What the checker accepts works: random specs, shapes, batches and targets, every operation on the interpreter with the CPU's
//! bits, and for a part of them compiled by NVRTC.
//!
//! `QP_CASES` and `QP_SEED` choose how many cases, and which.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use qp_codegen::cuda::{self, Target};
use qp_codegen::ir::interpret::Options;
use qp_codegen::ir::{Elem, Kernel};
use qp_codegen::kernels::dequantize::{self, Dequantize};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::Launch;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape, load_str};
use qp_runtime::check;
use qp_runtime::check::synthetic;
use qp_runtime::device::Executor;
use qp_runtime::jit;
use qp_tests::random_specs::{Random, text};
use rayon::prelude::*;

/// One case of so many is compiled, too.
const COMPILED: u64 = 25;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// A quantizer with a shape, a number of tokens and a target.
struct Case {
    text: String,
    quantizer: Quantizer,
    shape: Shape,
    batch: u32,
    target: Target,
}

/// Case number `i`: `None` if the checker refuses its spec.
fn case(i: u64) -> Option<Case> {
    let mut r = Random::new(i);
    let text = text(&mut r);
    let target = r.pick(&Target::ALL);
    let library = load_str("random", &text).ok()?;
    let quantizer = synthetic::trained(library.get("q")?.clone());
    let tile = Packed::new(&quantizer, Shape { rows: 1, cols: 1 }).tile;
    // A tile at most where tiles are large.
    let most = if tile.len() > 1 << 15 { 1 } else { 3 };
    let shape = Shape {
        rows: r.within(1, (tile.rows * most).min(200 + tile.rows / 2)),
        cols: r.within(1, (tile.cols * most * quantizer.codes.len() as u32).min(800)),
    };
    let batch = match r.below(12) {
        0 => r.within(65, 160),
        1..4 => r.within(9, 64),
        _ => r.within(1, 8),
    };
    Some(Case { text, quantizer, shape, batch, target })
}

fn run(case: &Case) -> Result<usize, String> {
    let Case { quantizer, shape, batch, target, .. } = case;
    let on = Executor::interpreter_of(*target, Options { races: true, reverse: true });
    let mut done = check::quantizer(&on, quantizer, *shape, &[*batch]).map_err(|e| e.to_string())?;
    // Long searches would take the interpreter minutes.
    let code = &quantizer.codes[0];
    let work = code.block.len() << code.window;
    if quantizer.codes.len() == 1 && work <= 1 << 18 {
        done += check::encoder(&on, quantizer, 2).map_err(|e| e.to_string())?;
    }
    Ok(done)
}

/// Compiles what a case launches; `None` without NVRTC, or where it does not know the target.
fn compile(case: &Case) -> Option<Result<(), String>> {
    let Case { quantizer, shape, batch, target, .. } = case;
    jit::nvrtc_for_tests()?.supports(target.nvrtc_arch()).then_some(())?;
    let op = Gemv { quantizer, shape: *shape, batch: *batch, accumulate: true };
    let device = target.device();
    let kernels = [
        Launch::choose(&op, &device).lower(&op),
        dequantize::lower(&Dequantize { quantizer, shape: *shape, output: Elem::F16 }, device.sms),
    ];
    let make = |kernel: &Kernel| {
        let source = cuda::print(cuda::check(kernel, *target).map_err(|e| e.to_string())?);
        let (arch, options) = (target.nvrtc_arch(), jit::Options::default());
        let cubin = jit::compile_in(&jit::Cache::none(), &source, &kernel.name, arch, &options);
        cubin.map(|_| ()).map_err(|e| e.to_string())
    };
    Some(kernels.iter().try_for_each(make))
}

#[test]
fn what_the_checker_accepts_works_on_every_target() {
    let (first, count) = (number("QP_SEED", 0), number("QP_CASES", 200));
    let (accepted, compared, compiled) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let cases = (first..first + count).into_par_iter().filter_map(|i| {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let case = case(i)?;
            let ran = run(&case);
            if i % COMPILED == 0 && ran.is_ok() {
                match compile(&case) {
                    Some(Ok(())) => compiled.fetch_add(1, Ordering::Relaxed),
                    Some(Err(e)) => return Some((Err(e), case)),
                    None => 0,
                };
            }
            Some((ran, case))
        }));
        match outcome {
            Ok(None) => None,
            Ok(Some((Ok(done), _))) => {
                accepted.fetch_add(1, Ordering::Relaxed);
                compared.fetch_add(done, Ordering::Relaxed);
                None
            }
            Ok(Some((Err(e), Case { text, shape, batch, target, .. }))) => {
                let failure = format!("case {i}, {shape:?}, {batch} tokens, {target}: {e}\n{text}");
                println!("{failure}");
                Some(failure)
            }
            Err(_) => {
                println!("case {i} panics");
                Some(format!("case {i} panics: {}", text(&mut Random::new(i))))
            }
        }
    });
    let failed: Vec<String> = qp_tests::apart(|| cases.collect());
    let (accepted, compared) = (accepted.into_inner(), compared.into_inner());
    let compiled = compiled.into_inner();
    println!(
        "{count} specs, {accepted} accepted, {compared} comparisons, {compiled} compiled, {} failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{} of {count} cases fail, the first: {}", failed.len(), failed[0]);
    assert!(accepted * 10 >= count as usize * 7, "only {accepted} of {count} specs are accepted");
}

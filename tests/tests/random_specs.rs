//! What the checker accepts works: random specs, shapes, batches and targets, every operation on the interpreter with the CPU's
//! bits, and for a part of them compiled by NVRTC.
//!
//! `QP_CASES` and `QP_SEED` choose how many cases, and which.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use qp_codegen::cuda::Target;
use qp_codegen::ir::interpret::Options;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape, load_str};
use qp_runtime::check;
use qp_runtime::check::synthetic;
use qp_runtime::device::Executor;
use qp_tests::random_specs::{Random, text};
use rayon::prelude::*;

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
    let batch = if r.once_in(3) { r.within(9, 64) } else { r.within(1, 8) };
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

#[test]
fn what_the_checker_accepts_works_on_every_target() {
    let (first, count) = (number("QP_SEED", 0), number("QP_CASES", 300));
    let (accepted, compared) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failed: Vec<String> = (first..first + count)
        .into_par_iter()
        .filter_map(|i| {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let case = case(i)?;
                Some((run(&case), case))
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
        })
        .collect();
    let (accepted, compared) = (accepted.into_inner(), compared.into_inner());
    println!("{count} specs, {accepted} accepted, {compared} comparisons, {} failed", failed.len());
    assert!(failed.is_empty(), "{} of {count} cases fail, the first: {}", failed.len(), failed[0]);
    assert!(accepted * 10 >= count as usize * 7, "only {accepted} of {count} specs are accepted");
}

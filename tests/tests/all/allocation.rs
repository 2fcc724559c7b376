//! The allocator on the published problem of Llama-3.1-8B (224 layers, RTX 4090).

use qp_runtime::allocate::choice::TIME;
use qp_runtime::allocate::{Effort, Freedom, Infeasible, Problem};
use qp_tests::anchors::{Choice, femtoseconds, problem};

const FREE: Freedom = Freedom { fusion: true, cores: true };
const FUSION_ONLY: Freedom = Freedom { fusion: true, cores: false };
const CORES_ONLY: Freedom = Freedom { fusion: false, cores: true };
/// 200 tokens a second.
const STEP: f64 = 1.0 / 200.0;

/// Solves and checks the proof; gives the predicted loss.
fn loss(p: &Problem, memory: Option<i64>, time: Option<i64>) -> f64 {
    let a = p.solve(memory, time, Effort::default()).expect("feasible");
    assert!(a.solution.gap() <= 1e-6, "gap {:e}", a.solution.gap());
    assert!(memory.is_none_or(|m| a.solution.uses[0] <= m));
    assert!(time.is_none_or(|t| a.time(p) <= t));
    let sum: f64 = a
        .launches
        .iter()
        .flat_map(|l| l.layers.iter().map(|&i| p.layers[i].sensitivity * p.candidates[l.candidate].distortion))
        .sum();
    assert!((sum - a.solution.cost).abs() <= 1e-12);
    let mut layers: Vec<usize> = a.launches.iter().flat_map(|l| l.layers.clone()).collect();
    layers.sort_unstable();
    assert!(layers.into_iter().eq(0..p.layers.len()), "every layer is in exactly one launch");
    a.solution.cost
}

#[test]
fn memory_of_3_25_bits() {
    let p = problem(Choice::Trellis, FREE, false, 32, 0);
    assert_eq!(p.candidates.len(), 15);
    let found = loss(&p, Some(p.full_bytes() * 13 / 64), None);
    assert!(found <= 0.0670748, "{found}");
}

#[test]
fn two_hundred_tokens_a_second() {
    let solve = |freedom, step| loss(&problem(Choice::All, freedom, true, 32, 0), None, Some(femtoseconds(step)));
    let both = solve(FREE, STEP);
    assert!(both <= 0.0998001 + 1e-7, "{both}");
    let cores = solve(CORES_ONLY, STEP);
    assert!(cores <= 0.142672, "{cores}");
    // The published .101646 is below the Lagrangian bound at 5 ms, so no choice within 5 ms reaches it. It exceeds the
    // budget by 31 ns: the reference states the constraint in seconds, and its solver allows 1e-6 of them.
    let fusion = problem(Choice::All, FUSION_ONLY, true, 32, 0);
    let exact = fusion.solve(None, Some(femtoseconds(STEP)), Effort::default()).expect("feasible");
    assert!(exact.solution.relaxed > 0.101646, "{}", exact.solution.relaxed);
    assert!(exact.solution.cost < 0.1016653, "{}", exact.solution.cost);
    let with_tolerance = solve(FUSION_ONLY, STEP + 31e-9);
    assert!(with_tolerance <= 0.101646, "{with_tolerance}");
}

#[test]
fn eighty_blocks_and_sixty_quantizers() {
    let p = problem(Choice::All, FREE, true, 80, 28);
    assert_eq!(p.candidates.len(), 60);
    let memory = p.full_bytes() * 13 / 64;
    let by_memory = p.solve(Some(memory), None, Effort::default()).expect("feasible");
    assert!(by_memory.solution.gap() <= 1e-6);
    let time = p.least_time() * 3 / 2;
    loss(&p, None, Some(time));
    loss(&p, Some(memory), Some(by_memory.time(&p) * 99 / 100));
}

#[test]
fn budgets_at_the_edge() {
    let p = problem(Choice::All, FREE, true, 32, 0);
    let (memory, time) = (p.least_memory(), p.least_time());
    loss(&p, Some(memory), None);
    loss(&p, None, Some(time));
    let too_little = p.solve(Some(memory - 1), None, Effort::default()).expect_err("infeasible");
    assert_eq!(too_little, Infeasible::Resource { resource: 0, budget: memory - 1, smallest: memory });
    let too_fast = p.solve(None, Some(time - 1), Effort::default()).expect_err("infeasible");
    assert_eq!(too_fast, Infeasible::Resource { resource: TIME, budget: time - 1, smallest: time });

    // The 1.5-bit vector quantizer, fully fused, is both the smallest and the fastest.
    loss(&p, Some(memory), Some(time));

    // A loose budget gives every layer the best quantizer.
    let least = p.candidates.iter().map(|c| c.distortion).fold(f64::INFINITY, f64::min);
    let all: f64 = p.layers.iter().map(|l| l.sensitivity * least).sum();
    let loose = loss(&p, Some(p.full_bytes()), Some(1_000 * time));
    assert!((loose - all).abs() <= 1e-9 * all);
}

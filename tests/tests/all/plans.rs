//! What is made of an allocation: table, plan file, picture, messages, frontier.

use qp_runtime::allocate::choice::{MEMORY, TIME};
use qp_runtime::allocate::report::{self, Budget};
use qp_runtime::allocate::{Allocation, Effort, Freedom, Problem, frontier, heatmap};
use qp_tests::anchors::{Choice, problem};

const FREE: Freedom = Freedom { fusion: true, cores: true };

/// Three blocks of Llama-3.1-8B, at most 3 bits a weight and 2 ms.
fn small() -> (Problem, Allocation, Budget) {
    let p = problem(Choice::All, FREE, true, 3, 0);
    let budget = Budget { memory: Some(p.full_bytes() * 3 / 16), time: Some(1_910_000_000_000) };
    let a = p.solve(budget.memory, budget.time, Effort::default()).expect("feasible");
    (p, a, budget)
}

#[test]
fn table_and_totals() {
    let (p, a, budget) = small();
    insta::assert_snapshot!("table", report::table(&p, &a) + &report::totals(&p, &a));
    insta::assert_snapshot!("explain", report::explain(&p, &a, budget, Effort::default()).expect("feasible"));
}

#[test]
fn plan_file() {
    let (p, a, _) = small();
    insta::assert_snapshot!("plan_file", report::plan_file(&p, &a, "a test", &str::to_owned));
}

#[test]
fn picture() {
    let (p, a, _) = small();
    let svg = heatmap::svg(&p, &a, "three blocks & a <title>");
    assert_eq!(svg.matches("</title></rect>").count(), p.layers.len(), "a cell a layer");
    let fused: usize = a.launches.iter().filter(|l| l.layers.len() > 1).map(|l| l.layers.len()).sum();
    assert!(fused > 0 && svg.matches("<circle").count() == fused, "a dot a fused layer");
    assert!(svg.contains("three blocks &amp; a &lt;title&gt;") && svg.ends_with("</svg>\n"));
}

#[test]
fn messages() {
    let (p, _, _) = small();
    let message = |memory, time| {
        let why = p.solve(memory, time, Effort::default()).expect_err("infeasible");
        report::infeasible(&p, &why)
    };
    let all = [
        message(Some(1_000_000), None),
        message(None, Some(1_000_000_000_000)),
        message(None, Some(1_600_000_000_000)),
    ];
    insta::assert_snapshot!("messages", all.join("\n"));
}

#[test]
fn frontiers_descend() {
    let p = problem(Choice::All, FREE, true, 3, 0);
    for (resource, other) in [(MEMORY, None), (TIME, None), (TIME, Some(p.least_memory() * 3 / 2))] {
        let plans = frontier::frontier(&p, resource, other, 12, Effort::default()).expect("feasible");
        assert!(plans.len() > 8);
        for pair in plans.windows(2) {
            assert!(pair[0].solution.cost > pair[1].solution.cost);
            assert!(pair[0].solution.uses[resource] < pair[1].solution.uses[resource]);
        }
        if other.is_none() {
            let least = if resource == MEMORY { p.least_memory() } else { p.least_time() - p.constant };
            assert_eq!(plans[0].solution.uses[resource], least);
        }
    }
}

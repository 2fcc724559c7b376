//! The Pareto frontier: the least loss for every budget.

use super::choice::{Infeasible, MEMORY};
use super::problem::{Allocation, Problem};
use super::search::Effort;

/// Plans for `points` budgets of one resource, evenly from the least that is feasible to the most that is of use, the
/// other budget as given. Each is the best of all plans within its budget; equal ones are listed once.
///
/// # Errors
/// If the other budget is not feasible.
pub fn frontier(
    problem: &Problem,
    resource: usize,
    other: Option<i64>,
    points: usize,
    effort: Effort,
) -> Result<Vec<Allocation>, Infeasible> {
    let solve = |budget: Option<i64>| match resource == MEMORY {
        true => problem.solve(budget, other, effort),
        false => problem.solve(other, budget, effort),
    };
    let used = |a: &Allocation| if resource == MEMORY { a.solution.uses[MEMORY] } else { a.time(problem) };
    let most = solve(None)?;
    let least = if resource == MEMORY { problem.least_memory() } else { problem.least_time() };
    // With the other budget in force, more than the least may be needed.
    let least = match solve(Some(least)) {
        Ok(_) => least,
        Err(Infeasible::Together { smallest, .. }) if resource != MEMORY => smallest,
        Err(_) => least,
    };
    let mut out: Vec<Allocation> = Vec::new();
    for i in 0..points {
        let budget = least + ((used(&most) - least) as f64 * i as f64 / (points.max(2) - 1) as f64).ceil() as i64;
        match solve(Some(budget)) {
            Ok(a) if out.last().is_none_or(|last| a.solution.cost < last.solution.cost) => out.push(a),
            // No better than the one before, or not feasible together with the other budget.
            Ok(_) | Err(_) => (),
        }
    }
    Ok(out)
}

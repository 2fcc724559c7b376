//! A plan in words: the table, the plan file, what more would buy.

use std::fmt::Write;

use qp_codegen::spec::Matrix;

use super::choice::{Infeasible, MEMORY, TIME};
use super::continuous;
use super::problem::{Allocation, Problem, Role};
use super::search::Effort;

/// Budgets of a plan: bytes, and femtoseconds of a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// At most so many bytes.
    pub memory: Option<i64>,
    /// At most so many femtoseconds.
    pub time: Option<i64>,
}

/// The bits that the closed form would give each layer of the plan's payload.
pub fn wanted(problem: &Problem, allocation: &Allocation) -> Vec<f64> {
    let chosen = allocation.candidates();
    let total = problem.layers.iter().zip(&chosen).map(|(l, &c)| l.weights() as f64 * problem.candidates[c].bits).sum();
    let bits = || problem.candidates.iter().map(|c| c.bits);
    continuous::bits(&problem.layers, total, (bits().fold(f64::INFINITY, f64::min), bits().fold(0.0, f64::max)))
}

/// The plan as a table: a line a block, and a cell a matrix with its quantizer and the bits that the closed form
/// would give; then the launches, if times are known.
pub fn table(problem: &Problem, allocation: &Allocation) -> String {
    let (chosen, wanted) = (allocation.candidates(), wanted(problem, allocation));
    let cell = |i: usize| format!("{} ({:.2})", problem.candidates[chosen[i]].name, wanted[i]);
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut head = vec!["block".to_owned()];
    head.extend(Matrix::ALL.iter().map(|m| m.name().to_owned()));
    let timed = allocation.launches.iter().any(|l| l.core.is_some());
    if timed {
        head.push("launches".to_owned());
    }
    let columns = head.len();
    lines.push(head);
    let mut others = String::new();
    for (i, layer) in problem.layers.iter().enumerate() {
        let Role::Block { block, matrix } = layer.role else {
            let _ = writeln!(others, "{}: {}", layer.name, cell(i));
            continue;
        };
        let name = block.to_string();
        let at = match lines.iter().position(|l| l[0] == name) {
            Some(at) => at,
            None => {
                lines.push(vec![String::new(); columns]);
                let at = lines.len() - 1;
                lines[at][0] = name;
                at
            }
        };
        lines[at][1 + matrix as usize] = cell(i);
    }
    if timed {
        for launch in &allocation.launches {
            let Role::Block { block, matrix: _ } = problem.layers[launch.layers[0]].role else { continue };
            let name = block.to_string();
            let names: Vec<&str> = launch.layers.iter().map(|&i| problem.layers[i].short()).collect();
            if let Some(line) = lines.iter_mut().find(|l| l[0] == name) {
                let cell = &mut line[columns - 1];
                if !cell.is_empty() {
                    cell.push(' ');
                }
                cell.push_str(&names.join("+"));
            }
        }
    }
    let width = |c: usize| lines.iter().map(|l| l[c].len()).max().unwrap_or(0);
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().enumerate().map(|(c, text)| format!("{text:<w$}", w = width(c))).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out + &others
}

/// Totals of a plan, one a line.
pub fn totals(problem: &Problem, allocation: &Allocation) -> String {
    let s = &allocation.solution;
    let weights: u64 = problem.layers.iter().map(|l| l.weights()).sum();
    let mut out = String::new();
    let bits = 8.0 * s.uses[MEMORY] as f64 / weights as f64;
    let _ = writeln!(out, "memory          {} ({bits:.4} bits a weight)", bytes(s.uses[MEMORY]));
    if allocation.launches.iter().any(|l| l.core.is_some()) {
        let time = allocation.time(problem);
        let rate = 1e15 / time as f64;
        let _ = writeln!(out, "time            {} a token ({rate:.1} tokens/s)", duration(time));
    }
    let _ = writeln!(out, "predicted loss  {:.7}", s.cost);
    let proof = if s.gap() == 0.0 { "optimal".to_owned() } else { format!("within {:.1e} of the optimum", s.gap()) };
    let _ = writeln!(out, "proof           {proof}: no plan is below {:.7}", s.bound);
    out
}

/// What one more percent of each budget would buy: by the multiplier, and by solving again.
///
/// # Errors
/// None in practice: a larger budget is feasible if the smaller one is.
pub fn explain(
    problem: &Problem,
    allocation: &Allocation,
    budget: Budget,
    effort: Effort,
) -> Result<String, Infeasible> {
    let mut out = String::new();
    let base = &allocation.solution;
    for (resource, amount) in [(MEMORY, budget.memory), (TIME, budget.time)] {
        let Some(amount) = amount else { continue };
        let more = amount / 100;
        let raised = |r: usize, b: Option<i64>| if r == resource { b.map(|b| b + more) } else { b };
        let better = problem.solve(raised(MEMORY, budget.memory), raised(TIME, budget.time), effort)?;
        let (name, shown) = if resource == MEMORY { ("memory", bytes(more)) } else { ("time", duration(more)) };
        let percent = |saved: f64| 100.0 * saved / base.cost.max(f64::MIN_POSITIVE);
        let marginal = base.multipliers[resource] * more as f64;
        let saved = base.cost - better.solution.cost;
        let _ = writeln!(
            out,
            "1 % more {name} ({shown}) lowers the predicted loss by {:.2} % to {:.7} (by the multiplier: {:.2} %)",
            percent(saved),
            better.solution.cost,
            percent(marginal)
        );
        let (before, after) = (allocation.candidates(), better.candidates());
        let changed: Vec<usize> = (0..before.len()).filter(|&i| before[i] != after[i]).collect();
        for &i in changed.iter().take(8) {
            let name = |c: usize| &problem.candidates[c].name;
            let _ = writeln!(out, "  {}: {} -> {}", problem.layers[i].name, name(before[i]), name(after[i]));
        }
        if changed.len() > 8 {
            let _ = writeln!(out, "  and {} other layers", changed.len() - 8);
        }
    }
    Ok(out)
}

/// The plan as the file that `qp quantize --plan` takes.
pub fn plan_file(problem: &Problem, allocation: &Allocation, made_by: &str, spec: &dyn Fn(&str) -> String) -> String {
    let mut out = String::new();
    for line in made_by.lines().chain(totals(problem, allocation).lines()) {
        let _ = writeln!(out, "# {line}");
    }
    let _ = writeln!(out, "\n[layers]");
    for (layer, c) in problem.layers.iter().zip(allocation.candidates()) {
        let _ = writeln!(out, "{} = {}", quoted(&layer.name), quoted(&spec(&problem.candidates[c].name)));
    }
    for launch in allocation.launches.iter().filter(|l| l.layers.len() > 1) {
        let names: Vec<String> = launch.layers.iter().map(|&i| quoted(&problem.layers[i].name)).collect();
        let _ = writeln!(out, "\n[[groups]]\nfuse = [{}]", names.join(", "));
    }
    out
}

/// Why there is no plan, in units that people use.
pub fn infeasible(problem: &Problem, why: &Infeasible) -> String {
    let weights: u64 = problem.layers.iter().map(|l| l.weights()).sum();
    let bits = |b: i64| format!("{} ({:.4} bits a weight)", bytes(b), 8.0 * b as f64 / weights as f64);
    let step = |t: i64| format!("{} a token ({:.1} tokens/s)", duration(t), 1e15 / t as f64);
    match *why {
        Infeasible::Resource { resource: TIME, budget, smallest } => {
            let least = if budget < 0 { "less than nothing".to_owned() } else { step(budget) };
            format!(
                "no plan is as fast as {least}: the fastest takes {}; allow that, or profile faster kernels",
                step(smallest)
            )
        }
        Infeasible::Resource { resource: _, budget, smallest } => format!(
            "no plan fits in {}: the smallest needs {}; allow that, or offer smaller quantizers",
            bits(budget),
            bits(smallest)
        ),
        Infeasible::Together { memory, time, smallest } => format!(
            "no plan of at most {} is as fast as {}: the fastest takes {}; allow that, or more memory",
            bits(memory),
            step(time),
            step(smallest)
        ),
    }
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Bytes as people read them, with the exact number.
fn bytes(n: i64) -> String {
    let n = n.max(0) as u64;
    match n {
        0..1024 => format!("{n} bytes"),
        _ => format!("{} = {n} bytes", indicatif::BinaryBytes(n)),
    }
}

/// Femtoseconds in milliseconds or microseconds.
fn duration(femtoseconds: i64) -> String {
    let t = femtoseconds as f64;
    if t >= 1e12 { format!("{:.4} ms", t / 1e12) } else { format!("{:.3} µs", t / 1e9) }
}

//! Times the allocator on the published problem of Llama-3.1-8B and on one of 80 blocks and 60 quantizers; prints a
//! table in Markdown.
//!
//!     cargo run --release -p qp-tests --example allocation

use std::time::Instant;

use qp_runtime::allocate::{Effort, Freedom, Problem};
use qp_tests::anchors::{Choice, femtoseconds, problem};

/// Seconds that this thread has had of a core, or, where the system does not tell, seconds on the clock since `start`.
fn seconds(start: Instant) -> f64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.and_then(|t| t.split_whitespace().next()?.parse::<f64>().ok()).filter(|n| *n > 0.0);
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |n| n * 1e-9)
}

fn row(name: &str, p: &Problem, memory: Option<i64>, time: Option<i64>) {
    // The system counts in ticks of some milliseconds: the mean of several runs.
    let (start, mut runs) = (Instant::now(), 0);
    let before = seconds(start);
    let (ms, solved) = loop {
        let solved = p.solve(memory, time, Effort::default());
        runs += 1;
        let taken = seconds(start) - before;
        if runs >= 3 && taken > 0.2 {
            break (taken / f64::from(runs) * 1e3, solved);
        }
    };
    match solved {
        Ok(a) => {
            let s = a.solution;
            println!(
                "| {name} | {:.7} | {:.7} | {:.7} | {:.1e} | {} | {ms:.1} |",
                s.cost,
                s.relaxed,
                s.bound,
                s.gap(),
                s.states
            );
        }
        Err(e) => println!("| {name} | {e} | | | | | {ms:.1} |"),
    }
}

fn main() {
    let free = Freedom { fusion: true, cores: true };
    let step = Some(femtoseconds(1.0 / 200.0));
    println!("| problem | loss | Lagrangian bound | proven bound | gap | partial plans | ms |");
    println!("|---|---|---|---|---|---|---|");
    let trellis = problem(Choice::Trellis, free, false, 32, 0);
    let bits = |p: &Problem, b: f64| Some((p.full_bytes() as f64 * b / 16.0) as i64);
    row("8B, 3.25 bits, 15 TCQ rates", &trellis, bits(&trellis, 3.25), None);
    for (name, freedom) in [
        ("fusion and cores", free),
        ("fusion", Freedom { cores: false, ..free }),
        ("cores", Freedom { fusion: false, ..free }),
    ] {
        let p = problem(Choice::All, freedom, true, 32, 0);
        row(&format!("8B, 200 tokens/s, {name}"), &p, None, step);
        if name == "fusion" {
            row("the same and 31 ns", &p, None, step.map(|s| s + 31_000_000));
        }
        if name == "fusion and cores" {
            row("8B, 200 tokens/s and 3 bits", &p, bits(&p, 3.0), step);
        }
    }
    let large = problem(Choice::All, free, true, 80, 28);
    for b in [2.0, 2.5, 3.0, 3.5, 4.0] {
        row(&format!("80 blocks, {b} bits"), &large, bits(&large, b), None);
        let fastest = large.solve(bits(&large, b), None, Effort::default()).map(|a| a.time(&large)).ok();
        let time = fastest.map(|t| t / 100 * 98);
        row("and 98 % of that plan's time", &large, bits(&large, b), time);
        row("that time alone", &large, None, time);
    }
}

//! Tests that cannot run on a machine: they are counted and named when the program that holds them ends.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::io::Write as _;
use std::sync::Mutex;

/// Reasons, with the tests that were skipped for each.
static SKIPPED: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());

unsafe extern "C" {
    /// C's function of that name: what it is given runs when the process ends in the ordinary way.
    safe fn atexit(end: extern "C" fn()) -> c_int;
}

/// Notes that the running test does nothing, and why. The test runner keeps to itself what passing tests print; this is said after
/// its own last line.
pub fn note(why: &str) {
    let mut all = SKIPPED.lock().unwrap_or_else(|e| e.into_inner());
    if all.is_empty() {
        atexit(say);
    }
    // The runner names each test's thread after it.
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let tests = all.entry(why.to_owned()).or_default();
    if !tests.contains(&name) {
        tests.push(name);
    }
}

extern "C" fn say() {
    let all = SKIPPED.lock().unwrap_or_else(|e| e.into_inner());
    for (why, tests) in all.iter() {
        // Nobody can be told that standard error is closed.
        let _ = writeln!(std::io::stderr(), "{}", line(why, tests));
    }
}

fn line(why: &str, tests: &[String]) -> String {
    let mut names = tests.to_vec();
    names.sort();
    let tests = if names.len() == 1 { "test was" } else { "tests were" };
    format!("{} {tests} skipped: {why}\n    {}", names.len(), names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_and_named() {
        let one = ["b".to_owned()];
        assert_eq!(line("no GPU", &one), "1 test was skipped: no GPU\n    b");
        let two = ["b".to_owned(), "a".to_owned()];
        assert_eq!(line("no GPU", &two), "2 tests were skipped: no GPU\n    a, b");
    }
}

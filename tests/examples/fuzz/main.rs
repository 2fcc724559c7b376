//! Fuzzing on stable Rust: random and mutated inputs for everything that reads what a stranger may have written.
//!
//! ```sh
//! cargo run --release -p qp-tests --example fuzz -- --seconds 60           # every target, a minute each
//! cargo run --release -p qp-tests --example fuzz -- --count 100000 specs plans
//! cargo run --release -p qp-tests --example fuzz -- specs FILE             # one input again
//! ```
//!
//! An input fails if the target panics, takes longer than [`SLOW`], or holds more than [`LARGE`] bytes at once. What fails is
//! kept in `target/fuzz/TARGET-…`; a slow or a large input ends the run, as it cannot be stopped otherwise. Inputs begin
//! with the files of `tests/corpus/TARGET` and what the target itself names; each is changed a few times, and parts of
//! others are put into it. The same seed gives the same inputs, whatever the number of threads. At the end the table of
//! `docs/reliability.md` is printed.

mod files;
mod mutate;
mod specs;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mutate::Mutator;

/// Something that reads inputs.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, that of its folder in `tests/corpus`.
    pub name: &'static str,
    /// Inputs to begin with, beside those of the folder.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Pieces of its language.
    pub words: &'static [&'static str],
    /// Reads an input; true if it was accepted.
    pub run: fn(&[u8]) -> bool,
}

/// Every target.
fn targets() -> Vec<Target> {
    [specs::targets(), files::targets()].concat()
}

/// Longest that an input may take.
const SLOW: Duration = Duration::from_secs(10);
/// Most bytes that may be held at once.
const LARGE: usize = 1 << 30;
/// Longest input that is made.
const LONGEST: usize = 64 << 10;

/// The system's memory, with the bytes in use counted.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        if held > LARGE && held - layout.size() <= LARGE {
            LARGEST_SEEN.store(held, Ordering::Relaxed);
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static MEMORY: Counting = Counting;
/// The bytes held when they were first too many; 0 before.
static LARGEST_SEEN: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What a thread is at.
struct Work {
    since: Instant,
    input: Vec<u8>,
}

struct Run<'a> {
    target: &'a Target,
    corpus: Vec<Vec<u8>>,
    seed: u64,
    count: u64,
    until: Option<Instant>,
    next: AtomicU64,
    accepted: AtomicU64,
    failed: AtomicU64,
    slowest: AtomicU64,
    at: Vec<Mutex<Option<Work>>>,
}

impl Run<'_> {
    fn thread(&self, place: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.count || self.until.is_some_and(|end| Instant::now() >= end) {
                return;
            }
            // The corpus itself, then changes of it.
            let input = match self.corpus.get(i as usize) {
                Some(input) => input.clone(),
                None => Mutator::new(self.seed ^ i).input(&self.corpus, self.target.words, LONGEST),
            };
            let since = Instant::now();
            *self.at[place].lock().expect("no thread panics with it") = Some(Work { since, input });
            let input = self.at[place].lock().expect("no thread panics with it").as_ref().map(|w| w.input.clone());
            let input = input.expect("just put there");
            match catch_unwind(AssertUnwindSafe(|| (self.target.run)(&input))) {
                Ok(accepted) => {
                    self.accepted.fetch_add(u64::from(accepted), Ordering::Relaxed);
                }
                Err(_) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    let why = MESSAGE.with(|m| m.borrow().clone());
                    println!("{}: panic: {why}; kept in {}", self.target.name, self.keep("panic", &input));
                }
            }
            self.slowest.fetch_max(since.elapsed().as_micros() as u64, Ordering::Relaxed);
        }
    }

    /// Looks for inputs that take too long or too much, until all threads are done.
    fn watch(&self, running: &AtomicUsize) {
        while running.load(Ordering::Relaxed) > 0 {
            std::thread::sleep(Duration::from_millis(100));
            let large = LARGEST_SEEN.load(Ordering::Relaxed);
            for work in &self.at {
                let work = work.lock().expect("no thread panics with it");
                let Some(work) = work.as_ref() else { continue };
                let slow = work.since.elapsed() > SLOW;
                if slow || large > 0 {
                    let what = if slow { "more than 10 s" } else { "more than 1 GiB" };
                    println!("{}: {what}; kept in {}", self.target.name, self.keep("bound", &work.input));
                }
                if slow {
                    std::process::exit(1);
                }
            }
            if large > 0 {
                std::process::exit(1);
            }
        }
    }

    /// Keeps an input; its path.
    fn keep(&self, what: &str, input: &[u8]) -> String {
        let hash =
            input.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
        let folder = PathBuf::from("target/fuzz");
        let path = folder.join(format!("{}-{what}-{hash:016x}", self.target.name));
        match std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, input)) {
            Ok(()) => path.display().to_string(),
            Err(e) => format!("nothing ({e})"),
        }
    }
}

/// The folder of this package: where it was built, or, on a machine to which the program was carried, in the current folder.
pub fn package() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    if built.is_dir() { built.to_owned() } else { PathBuf::from("tests") }
}

/// The files of `tests/corpus/NAME`, by name.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = package().join("corpus").join(name);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter_map(|f| std::fs::read(f).ok()).collect()
}

struct Options {
    count: Option<u64>,
    seconds: Option<u64>,
    seed: u64,
    threads: usize,
    names: Vec<String>,
}

fn options() -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options { count: None, seconds: None, seed: 1, threads, names: Vec::new() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            options.names.push(arg);
            continue;
        }
        let value = args.next().and_then(|v| v.parse::<u64>().ok()).ok_or(format!("{arg} takes a number"))?;
        match arg.as_str() {
            "--count" => options.count = Some(value),
            "--seconds" => options.seconds = Some(value),
            "--seed" => options.seed = value,
            "--threads" => options.threads = value.max(1) as usize,
            _ => return Err(format!("there is no option {arg}; there are --count, --seconds, --seed and --threads")),
        }
    }
    Ok(options)
}

/// What a run over a target saw.
struct Done {
    name: &'static str,
    inputs: u64,
    accepted: u64,
    failed: u64,
    seconds: f64,
    /// Milliseconds that the slowest input took.
    slowest: f64,
}

/// `n` with its thousands apart.
fn thousands(n: u64) -> String {
    match n {
        0..1000 => n.to_string(),
        _ => format!("{},{:03}", thousands(n / 1000), n % 1000),
    }
}

/// The table of `docs/reliability.md`.
fn table(all: &[Done]) -> String {
    let mut out =
        "| target | inputs | accepted | failed | seconds | slowest, ms |\n|---|---|---|---|---|---|\n".to_owned();
    let row = |name: &str, inputs, accepted, failed, seconds: f64, slowest: f64| {
        let [inputs, accepted, failed] = [inputs, accepted, failed].map(thousands);
        format!("| {name} | {inputs} | {accepted} | {failed} | {seconds:.0} | {slowest:.0} |\n")
    };
    for d in all {
        out += &row(&format!("`{}`", d.name), d.inputs, d.accepted, d.failed, d.seconds, d.slowest);
    }
    let sum = |f: fn(&Done) -> u64| all.iter().map(f).sum();
    let (seconds, slowest) = (all.iter().map(|d| d.seconds).sum(), all.iter().map(|d| d.slowest).fold(0.0, f64::max));
    out + &row("all", sum(|d| d.inputs), sum(|d| d.accepted), sum(|d| d.failed), seconds, slowest)
}

fn fuzz(target: &Target, options: &Options) -> Done {
    let corpus = [corpus(target.name), (target.seeds)()].concat();
    let start = Instant::now();
    let seconds = options.seconds.or(options.count.is_none().then_some(10));
    let run = Run {
        target,
        corpus,
        seed: options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15),
        count: options.count.unwrap_or(u64::MAX),
        until: seconds.map(|s| start + Duration::from_secs(s)),
        next: AtomicU64::new(0),
        accepted: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        slowest: AtomicU64::new(0),
        at: (0..options.threads).map(|_| Mutex::new(None)).collect(),
    };
    let running = AtomicUsize::new(options.threads);
    std::thread::scope(|scope| {
        for place in 0..options.threads {
            let (run, running) = (&run, &running);
            // Readers that recurse do so within the stack of an ordinary thread.
            let work = move || {
                run.thread(place);
                *run.at[place].lock().expect("no thread panics with it") = None;
                running.fetch_sub(1, Ordering::Relaxed);
            };
            scope.spawn(work);
        }
        run.watch(&running);
    });
    let done = run
        .next
        .into_inner()
        .min(options.count.unwrap_or(u64::MAX))
        .saturating_sub(if options.count.is_none() { options.threads as u64 } else { 0 });
    let done = Done {
        name: target.name,
        inputs: done,
        accepted: run.accepted.into_inner(),
        failed: run.failed.into_inner(),
        seconds: start.elapsed().as_secs_f64(),
        slowest: run.slowest.into_inner() as f64 / 1e3,
    };
    let Done { name, inputs, accepted, failed, seconds, slowest } = &done;
    println!(
        "{name}: {inputs} inputs, {accepted} accepted, {failed} failed, {seconds:.1} s, the slowest {slowest:.0} ms"
    );
    done
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::FAILURE;
        }
    };
    std::panic::set_hook(Box::new(|info| MESSAGE.with(|m| *m.borrow_mut() = info.to_string().replace('\n', " "))));
    let all = targets();
    // A target and files: those again.
    if let [name, files @ ..] = &options.names[..]
        && files.iter().any(|f| Path::new(f).is_file())
        && let Some(target) = all.iter().find(|t| t.name == name)
    {
        for file in files {
            let accepted = (target.run)(&std::fs::read(file).unwrap_or_default());
            println!("{file}: {}", if accepted { "accepted" } else { "refused" });
        }
        return ExitCode::SUCCESS;
    }
    let known: Vec<&str> = all.iter().map(|t| t.name).collect();
    if let Some(unknown) = options.names.iter().find(|n| !known.contains(&n.as_str())) {
        eprintln!("error: there is no target {unknown}; there is {}", known.join(", "));
        return ExitCode::FAILURE;
    }
    let chosen = all.iter().filter(|t| options.names.is_empty() || options.names.iter().any(|n| n == t.name));
    let all: Vec<Done> = chosen.map(|t| fuzz(t, &options)).collect();
    print!("\n{}", table(&all));
    if all.iter().all(|d| d.failed == 0) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! Launches chosen by measurement, and remembered.
//!
//! The cost model ([`Launch::ranked`]) ranks the launches of a product. Where it is asked for, its first few [`candidates`]
//! are compiled, timed on the GPU that is to run them, and the fastest is kept on disk beside the compiled kernels, so that
//! later starts take it without measuring. Results do not depend on the launch, so a choice can be wrong about speed only.
//!
//! Nothing here needs a GPU: [`choose`] is given what loads and what times a kernel. `docs/decisions/launches.md` says
//! what was decided and why.

use qp_codegen::cuda::Target;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product::Launch;
use rayon::prelude::*;

use super::cache::{Cache, Key, Kind};
use super::{JitError, nvrtc_version};

/// The environment variable that says how launches are chosen: see [`Choice`].
pub const VARIABLE: &str = "QP_LAUNCHES";

/// Candidates measured for a product.
const MOST: usize = 6;
/// Candidates that differ in tables and prefetching only.
const ALIKE: usize = 3;
/// Candidates that differ in prefetching only.
const SAME_TABLES: usize = 2;
/// Expected to take at most this many times what the best does.
const WITHIN: f64 = 1.15;
/// The best of each way of multiplying is measured too if it is expected to take at most this many times what the best
/// of all does: the model compares launches of one way better than different ways.
const OTHER_WAY: f64 = 2.0;
/// A launch that the model likes less must take less than this share of the other's time: timing is not that exact.
const CLEARLY: f64 = 0.99;

/// How launches are chosen on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// As they were measured to be best before, else by the cost model (`remembered`, or nothing at all).
    Remembered,
    /// By measurement, at the first use of a product (`measured`).
    Measured,
    /// By the cost model alone (`model`).
    Model,
}

/// A value of [`VARIABLE`] that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE} is `{0}`: it must be `remembered` (the default), `measured` or `model`")]
pub struct UnknownChoice(String);

impl Choice {
    /// What the user's environment says.
    ///
    /// # Errors
    /// Another word than those two.
    pub fn of_user() -> Result<Choice, UnknownChoice> {
        Choice::parse(&std::env::var_os(VARIABLE).unwrap_or_default().to_string_lossy())
    }

    fn parse(text: &str) -> Result<Choice, UnknownChoice> {
        match text {
            "" | "remembered" => Ok(Choice::Remembered),
            "measured" => Ok(Choice::Measured),
            "model" => Ok(Choice::Model),
            other => Err(UnknownChoice(other.to_owned())),
        }
    }
}

/// A product that needs a launch.
pub struct Wanted {
    key: Key,
    /// All that may be chosen, in the model's order.
    ranked: Vec<Launch>,
    candidates: Vec<Launch>,
}

impl Wanted {
    /// A product, with the preparation that its blocks do themselves, on a GPU, which is known by `gpu`: its name and number of SMs.
    /// `hash` is the quantizer's.
    ///
    /// # Errors
    /// No NVRTC: its version is part of what a choice is remembered for.
    ///
    /// # Panics
    /// If `ranked`, from [`Launch::ranked_with`], is empty.
    pub fn new(
        (op, prepare): (&Gemv, Option<&Prepare>),
        hash: &str,
        target: Target,
        gpu: (&str, u32),
        ranked: &[(f64, Launch)],
    ) -> Result<Wanted, JitError> {
        assert!(!ranked.is_empty(), "some launch fits every device");
        let (version, sms) = (nvrtc_version()?, gpu.1.to_string());
        let mut product =
            format!("{} x {}, {} tokens, added: {}", op.shape.rows, op.shape.cols, op.batch, op.accumulate);
        if let Some(prepare) = prepare {
            product += &format!(", prepared, gated: {}, normed: {}", prepare.gate.is_some(), prepare.norm.is_some());
        }
        let key = [qp_codegen::GENERATOR, &version, target.name(), gpu.0, &sms, hash, &product];
        Ok(Wanted {
            key: Key::new(Kind::Launch, key),
            ranked: ranked.iter().map(|r| r.1).collect(),
            candidates: candidates(ranked),
        })
    }

    /// What was chosen before, if it is one of the launches that could be chosen today.
    fn remembered(&self, cache: &Cache) -> Option<Launch> {
        let (text, _) = cache.get(&self.key)?;
        self.ranked.iter().copied().find(|l| written(l) == text)
    }
}

/// A launch as an entry holds it: its kernel's name, and each number with its name.
fn written(launch: &Launch) -> String {
    let (kernel, fields) = launch.fields();
    fields.iter().fold(kernel.to_owned(), |text, (name, n)| text + &format!(" {name}={n}"))
}

/// A launch's kernel and numbers by name.
type Layout = (&'static str, Vec<(&'static str, u32)>);

/// How a launch lays the work out, but for tables and prefetching; and the bytes of its tables.
fn laid_out(l: &Launch) -> (Layout, u32) {
    let (kernel, mut fields) = l.fields();
    let tables = fields.iter().find(|(name, _)| *name == "table_bytes").map_or(0, |f| f.1);
    fields.retain(|(name, _)| !["ahead", "min_blocks", "table_bytes"].contains(name));
    ((kernel, fields), tables)
}

/// The launches worth measuring, of those that [`Launch::ranked`] gives: the best, others that are expected to take
/// little longer and are laid out differently, and the best of each other way of multiplying.
pub fn candidates(ranked: &[(f64, Launch)]) -> Vec<Launch> {
    let mut out: Vec<Launch> = Vec::new();
    let Some(&(best, _)) = ranked.first() else { return out };
    for (_, launch) in ranked.iter().take_while(|r| r.0 <= best * WITHIN) {
        if out.len() == MOST {
            break;
        }
        let (layout, tables) = laid_out(launch);
        let alike: Vec<u32> = out.iter().map(laid_out).filter(|l| l.0 == layout).map(|l| l.1).collect();
        if alike.len() < ALIKE && alike.iter().filter(|t| **t == tables).count() < SAME_TABLES {
            out.push(*launch);
        }
    }
    for (_, launch) in ranked.iter().take_while(|r| r.0 <= best * OTHER_WAY) {
        if !out.iter().any(|l| l.way() == launch.way()) {
            out.push(*launch);
        }
    }
    out
}

/// A product's kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen<K> {
    /// How it is laid out.
    pub launch: Launch,
    /// What was loaded.
    pub kernel: K,
    /// Its time, if it was measured now.
    pub seconds: Option<f64>,
}

/// A kernel for each product, with its launch: the one remembered; else, if `measure` is set, the fastest candidate, which is
/// then remembered, or else the model's first that does not spill, for the model does not foresee every register.
///
/// `load` makes the kernel of product `i`, many at once on all cores; `spills` tells whether it ran out of registers;
/// `time` gives the seconds of each kernel of product `i`, one product after the other. Where nothing can be remembered
/// the model's first candidate is taken, as measuring would make every start slower, and where `time` fails.
///
/// # Errors
/// Those of `load`, if it fails for every candidate of a product.
pub fn choose<K: Send, E: Send>(
    cache: &Cache,
    wanted: &[Wanted],
    measure: bool,
    load: impl Fn(usize, Launch) -> Result<K, E> + Sync,
    spills: impl Fn(&K) -> bool,
    mut time: impl FnMut(usize, &mut [(Launch, K)]) -> Result<Vec<f64>, E>,
) -> Result<Vec<Chosen<K>>, E> {
    let remembered: Vec<Option<Launch>> = wanted.iter().map(|w| w.remembered(cache)).collect();
    let measure = measure && remembered.contains(&None) && cache.problem().is_none();
    let tried = wanted.iter().zip(&remembered).map(|(wanted, remembered)| match remembered {
        Some(launch) => std::slice::from_ref(launch),
        None if measure => &wanted.candidates,
        None => &wanted.candidates[..1],
    });
    let tried: Vec<(usize, Launch)> = tried.enumerate().flat_map(|(i, l)| l.iter().map(move |l| (i, *l))).collect();
    let loaded: Vec<Result<K, E>> = tried.par_iter().map(|&(i, launch)| load(i, launch)).collect();
    let mut loaded = tried.into_iter().zip(loaded).peekable();
    let mut out = Vec::with_capacity(wanted.len());
    for (i, wanted) in wanted.iter().enumerate() {
        let own = std::iter::from_fn(|| loaded.next_if(|((of, _), _)| *of == i));
        let mut kernels = usable(own.map(|((_, launch), kernel)| Ok((launch, kernel?))), |(_, k)| spills(k))?;
        if !measure && remembered[i].is_none() && spills(&kernels[0].1) {
            let sound = |&launch: &Launch| load(i, launch).ok().filter(|k| !spills(k)).map(|k| (launch, k));
            kernels = wanted.candidates[1..].iter().find_map(sound).map_or(kernels, |sound| vec![sound]);
        }
        let times = if kernels.len() == 1 { Ok(None) } else { time(i, &mut kernels).map(Some) };
        let decided = times.is_ok();
        let times = times.ok().flatten();
        let best = times.as_deref().map_or(0, fastest);
        let (launch, kernel) = kernels.swap_remove(best);
        if measure && remembered[i].is_none() && decided {
            cache.put(&wanted.key, &written(&launch), &[]);
        }
        out.push(Chosen { launch, kernel, seconds: times.map(|t| t[best]) });
    }
    Ok(out)
}

/// What was made and does not spill; if all spill, all that was made.
fn usable<T, E>(made: impl Iterator<Item = Result<T, E>>, spills: impl Fn(&T) -> bool) -> Result<Vec<T>, E> {
    let (mut sound, mut spilling, mut failed) = (Vec::new(), Vec::new(), None);
    for made in made {
        match made {
            Ok(kernel) if spills(&kernel) => spilling.push(kernel),
            Ok(kernel) => sound.push(kernel),
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    match failed {
        Some(e) if sound.is_empty() && spilling.is_empty() => Err(e),
        _ if sound.is_empty() => Ok(spilling),
        _ => Ok(sound),
    }
}

/// The first of those that none takes clearly less time than.
fn fastest(times: &[f64]) -> usize {
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    times.iter().position(|t| t * CLEARLY <= least).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use qp_codegen::kernels::{gemm, gemv};
    use qp_codegen::spec::Shape;

    use super::super::nvrtc_for_tests;
    use super::*;

    /// A product of `rows` x 4096, of a quantizer whose hash is `hash`.
    fn wanted(rows: u32, hash: &str) -> Wanted {
        let q = qp_codegen::palette::get("fast_2").expect("of the palette");
        let op = Gemv { quantizer: &q, shape: Shape { rows, cols: 4096 }, batch: 1, accumulate: false };
        let ranked = Launch::ranked(&op, &Target::Sm90a.device());
        Wanted::new((&op, None), hash, Target::Sm90a, ("A GPU", 132), &ranked).unwrap()
    }

    /// Chooses with kernels that are their launches, timed by `time`; gives the launches, and how many were loaded and
    /// timed.
    fn run(
        cache: &Cache,
        wanted: &[Wanted],
        spills: impl Fn(&Launch) -> bool,
        time: impl Fn(&Launch) -> Result<f64, String>,
    ) -> Result<(Vec<Launch>, usize, usize), String> {
        let (loaded, mut timed) = (AtomicUsize::new(0), 0);
        let load = |_, launch| {
            loaded.fetch_add(1, Ordering::Relaxed);
            Ok(launch)
        };
        let chosen = choose(cache, wanted, true, load, spills, |_, kernels| {
            timed += kernels.len();
            kernels.iter().map(|(launch, _)| time(launch)).collect()
        })?;
        assert!(chosen.iter().all(|c| c.launch == c.kernel), "each launch with its kernel");
        assert!(chosen.iter().all(|c| c.seconds.is_none_or(|s| time(&c.launch) == Ok(s))), "each with its time");
        Ok((chosen.into_iter().map(|c| c.launch).collect(), loaded.into_inner(), timed))
    }

    /// The second candidate is fastest.
    fn second(wanted: &Wanted) -> impl Fn(&Launch) -> Result<f64, String> {
        let best = wanted.candidates[1];
        move |l| Ok(if *l == best { 1e-6 } else { 2e-6 })
    }

    fn never(_: &Launch) -> Result<f64, String> {
        panic!("nothing is to be timed")
    }

    #[test]
    fn candidates_are_few_near_and_differ() {
        let with = |warps, ahead, table_bytes| {
            Launch::Gemv(gemv::Launch { warps, split: 1, blocks: 132, ahead, min_blocks: 1, table_bytes })
        };
        let launch = |warps, ahead| with(warps, ahead, 1);
        let ranked = [
            (10.0, launch(16, 1)),
            (10.1, launch(16, 2)),
            (10.2, launch(16, 4)),
            (10.2, with(16, 1, 2)),
            (10.2, with(16, 2, 2)),
            (10.3, launch(8, 1)),
            (11.0, launch(4, 1)),
            (11.6, launch(2, 1)),
        ];
        assert_eq!(candidates(&ranked), [launch(16, 1), launch(16, 2), with(16, 1, 2), launch(8, 1), launch(4, 1)]);
        let many: Vec<_> = (1..=20).map(|w| (10.0, launch(w, 1))).collect();
        assert_eq!(candidates(&many).len(), MOST);
        let other = |group, row_warps| {
            Launch::Gemm(gemm::Launch {
                group,
                row_warps,
                col_warps: 1,
                row_tiles: 1,
                chunk: 1,
                token_parts: 1,
                split: 1,
                blocks: 132,
                min_blocks: 1,
                table_bytes: 1,
            })
        };
        let ways = [(15.0, other(true, 4)), (16.0, other(true, 8)), (20.1, other(false, 4))];
        let with_ways: Vec<_> = many.iter().copied().chain(ways).collect();
        assert_eq!(candidates(&with_ways)[MOST..], [other(true, 4)], "the best of each way that is not far behind");
        assert_eq!(candidates(&[]), []);
    }

    #[test]
    fn the_fastest_is_kept_and_found_again() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let two = [wanted(28672, "a"), wanted(4096, "a")];
        let best = [two[0].candidates[1], two[1].candidates[1]];
        let all = two[0].candidates.len() + two[1].candidates.len();
        let time = |l: &Launch| Ok(if best.contains(l) { 1.0 } else { 2.0 });
        assert_eq!(run(&cache, &two, |_| false, time).unwrap(), (best.to_vec(), all, all));
        assert_eq!(cache.status().launches, 2);
        assert_eq!(run(&cache, &two, |_| false, never).unwrap(), (best.to_vec(), 2, 0));
        // Another quantizer of that name, another GPU: other entries.
        let other = [wanted(4096, "b")];
        assert_eq!(run(&cache, &other, |_| false, |_| Ok(1.0)).unwrap().0, [other[0].candidates[0]]);
        assert_eq!((cache.status().launches, cache.status().entries), (3, 0));
        // Together with one that is not known, those that are stay.
        let mixed = [wanted(4096, "a"), wanted(1024, "a")];
        assert_eq!(run(&cache, &mixed, |_| false, |_| Ok(1.0)).unwrap().0, [best[1], mixed[1].candidates[0]]);
        assert_eq!(cache.clear().unwrap(), 4);
    }

    #[test]
    fn what_spills_is_not_timed_unless_all_do() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let product = wanted(4096, "a");
        let (first, n) = (product.candidates[0], product.candidates.len());
        let cache = Cache::at(dir.path().join("some"));
        let one = std::slice::from_ref(&product);
        let (chosen, loaded, timed) = run(&cache, one, |l| *l != first, never).unwrap();
        assert_eq!((chosen, loaded, timed), (vec![first], n, 0));
        assert_eq!(cache.status().launches, 1, "the only one left is the choice");
        let cache = Cache::at(dir.path().join("all"));
        assert_eq!(run(&cache, one, |_| true, second(&product)).unwrap(), (vec![product.candidates[1]], n, n));
    }

    #[test]
    fn noise_does_not_overrule_the_model() {
        assert_eq!(fastest(&[1.005, 1.0, 1.2]), 0);
        assert_eq!(fastest(&[1.02, 1.005, 1.0]), 1);
        assert_eq!(fastest(&[f64::NAN, f64::NAN]), 0);
    }

    #[test]
    fn damaged_and_foreign_entries_are_made_anew() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let product = wanted(4096, "a");
        let (one, best) = (std::slice::from_ref(&product), product.candidates[1]);
        let again = |what: &str| {
            let (chosen, _, timed) = run(&cache, one, |_| false, second(&product)).unwrap();
            assert_eq!((chosen, timed), (vec![best], product.candidates.len()), "{what}");
            assert_eq!(run(&cache, one, |_| false, never).unwrap().0, [best], "{what}: healed");
        };
        again("nothing there");
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        std::fs::write(&file, b"not an entry").unwrap();
        again("not an entry");
        // Whole, but not a launch, or none that fits.
        let Launch::Gemv(huge) = best else { panic!("one token is no matter of gemm") };
        let huge = Launch::Gemv(gemv::Launch { warps: 1000, ..huge });
        for text in ["", "Launch", &written(&best).replace("warps", "wraps"), &written(&huge)] {
            cache.put(&product.key, text, &[]);
            again(text);
        }
    }

    #[test]
    fn where_nothing_can_be_kept_the_model_chooses() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let product = wanted(4096, "a");
        for cache in [Cache::none(), Cache::at(dir.path().join("file/below"))] {
            let one = std::slice::from_ref(&product);
            assert_eq!(run(&cache, one, |_| false, never).unwrap(), (vec![product.candidates[0]], 1, 0));
        }
    }

    #[test]
    fn failures() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let product = wanted(4096, "a");
        let one = std::slice::from_ref(&product);
        // A measurement that fails chooses nothing for next time.
        let broken = |_: &Launch| Err("a full GPU".to_owned());
        assert_eq!(run(&cache, one, |_| false, broken).unwrap().0, [product.candidates[0]]);
        assert_eq!(cache.status().launches, 0);
        // A candidate that cannot be made is left out; one must remain.
        let (first, last) = (product.candidates[0], *product.candidates.last().unwrap());
        let only = |keep: Option<Launch>| {
            let load = |_, l| if Some(l) == keep { Ok(l) } else { Err(format!("{l:?}")) };
            choose(&cache, one, true, load, |_| false, |_, _| unreachable!("one at most is left"))
        };
        assert_eq!(only(None).unwrap_err(), format!("{first:?}"));
        assert_eq!(only(Some(last)).unwrap(), [Chosen { launch: last, kernel: last, seconds: None }]);
    }

    #[test]
    fn those_who_race_find_one_choice_afterwards() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let product = wanted(4096, "a");
        let one = std::slice::from_ref(&product);
        // Each has its own idea of what is fastest.
        std::thread::scope(|s| {
            for own in &product.candidates {
                let cache = &cache;
                s.spawn(move || {
                    for _ in 0..20 {
                        let time = |l: &Launch| Ok(if l == own { 1.0 } else { 2.0 });
                        let (chosen, ..) = run(cache, one, |_| false, time).unwrap();
                        assert!(one[0].candidates.contains(&chosen[0]));
                    }
                });
            }
        });
        let (chosen, ..) = run(&cache, one, |_| false, never).unwrap();
        assert_eq!(run(&cache, one, |_| false, never).unwrap().0, chosen);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "one entry, no temporary file");
    }

    #[test]
    fn what_the_model_likes_best_gives_way_if_it_spills() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let product = wanted(4096, "a");
        let (one, first) = (std::slice::from_ref(&product), product.candidates[0]);
        let chosen = |spills: &dyn Fn(&Launch) -> bool| {
            let load = |_, launch| Ok::<_, String>(launch);
            let never = |_: usize, _: &mut [(Launch, Launch)]| unreachable!("nothing is to be timed");
            choose(&Cache::none(), one, false, load, spills, never).unwrap()[0].launch
        };
        assert_eq!(chosen(&|l| *l == first), product.candidates[1]);
        assert_eq!(chosen(&|_| true), first, "if all do");
    }

    #[test]
    fn without_a_wish_to_measure_the_model_chooses_and_what_is_remembered_counts() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let product = wanted(4096, "a");
        let one = std::slice::from_ref(&product);
        let (first, best) = (product.candidates[0], product.candidates[1]);
        let chosen = || {
            let load = |_, launch| Ok::<_, String>(launch);
            choose(&cache, one, false, load, |_| false, |_, _| unreachable!("nothing is to be timed")).unwrap()
        };
        assert_eq!(chosen(), [Chosen { launch: first, kernel: first, seconds: None }]);
        assert_eq!(cache.status().launches, 0, "the model's choice is nothing to remember");
        run(&cache, one, |_| false, second(&product)).unwrap();
        assert_eq!(chosen(), [Chosen { launch: best, kernel: best, seconds: None }]);
    }

    #[test]
    fn launches_are_kept_by_name() {
        let launch =
            Launch::Gemv(gemv::Launch { warps: 8, split: 1, blocks: 132, ahead: 2, min_blocks: 1, table_bytes: 64 });
        assert_eq!(written(&launch), "gemv warps=8 split=1 blocks=132 ahead=2 min_blocks=1 table_bytes=64");
    }

    #[test]
    fn the_environment_has_three_words() {
        assert_eq!(Choice::parse(""), Ok(Choice::Remembered));
        assert_eq!(Choice::parse("remembered"), Ok(Choice::Remembered));
        assert_eq!(Choice::parse("measured"), Ok(Choice::Measured));
        assert_eq!(Choice::parse("model"), Ok(Choice::Model));
        let message = Choice::parse("fast").unwrap_err().to_string();
        assert_eq!(message, "QP_LAUNCHES is `fast`: it must be `remembered` (the default), `measured` or `model`");
    }
}

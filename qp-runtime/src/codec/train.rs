//! Training of tables: Lloyd's iteration on the trellis itself.
//!
//! Each round encodes Gaussian samples and moves every table value to the mean of the weights that were mapped to it.
//! What a window maps to is found by evaluating the decode expression on marked tables, so any expression will do in
//! which each component of the result is a table value or its complement (a value whose sign was turned by `signs`).
//! For a code without memory this is the classical Lloyd algorithm (k-means).

use qp_codegen::spec::{Code, Table, TableSource, Training};

use super::Gaussian;
use super::search::Search;
use crate::device::{DeviceError, Executor};

/// Why a code's tables cannot be trained.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nothing to train.
    #[error("the code has no table that the spec calls `trained(..)`")]
    NoTable,
    /// The expression is no plain look-up.
    #[error(
        "component {component} of window {window:#x} is neither a table value nor its complement: only expressions of the \
         form `table[..]` or `table[..] ^ signs(..)` can be trained; write the table inline or in a file instead"
    )]
    NotALookup {
        /// The window.
        window: u32,
        /// Component of the result, 0..V.
        component: u32,
    },
}

/// Where a component of a window's entry comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// Index into the values of all tables, one after the other.
    value: u32,
    /// True if it is the value's complement, −1 − value.
    complement: bool,
}

/// How the tables of `code` are to be trained, if any is: the first one's wish, for they are trained together.
pub fn training(code: &Code) -> Option<Training> {
    code.tables.iter().find_map(|t| match &t.source {
        TableSource::Trained { training, file: _ } => Some(*training),
        TableSource::Inline | TableSource::File(_) => None,
    })
}

/// Trains those tables of `code` whose source is [`TableSource::Trained`] on `training.samples` Gaussian samples a
/// round; returns the values of all tables. Samples are encoded on `device`, or on the CPU if there is none; the result
/// is the same.
///
/// The trained tables' present values, if any, do not matter. `progress` is called in each round with its number and
/// the mean squared error that the values *before* the round have on the samples; rounds are counted anew if training
/// starts from several first tables, of which the best result is taken.
///
/// # Errors
/// A code that has no such table, or whose expression cannot be inverted; a failing device.
pub fn train(
    code: &Code,
    training: Training,
    device: Option<&Executor>,
    progress: &mut dyn FnMut(u32, f64),
) -> Result<Vec<Vec<i16>>, TrainError> {
    if self::training(code).is_none() {
        return Err(TrainError::NoTable);
    }
    let sources = sources(code)?;
    let mut random = Gaussian::new(training.seed);
    // Quantiles of the source, from samples.
    let mut quantiles = random.samples(1 << 18);
    quantiles.sort_by(f32::total_cmp);
    // Without memory, samples may be drawn where the entries are and weighted by how likely the source is there: then
    // outer entries, which few samples of the source would choose, are as well placed as inner ones.
    let width = if code.is_memoryless() { entry_spread(code) } else { 1.0 };
    let block = code.block.len() as usize;
    let blocks = (training.samples as usize).div_ceil(block).max(1);
    let mut samples = random.samples(blocks * block);
    samples.iter_mut().for_each(|x| *x *= width as f32);

    let mut best: Option<(f64, Code)> = None;
    for &start in starts(code, &sources) {
        let mut code = code.clone();
        initialise(&mut code, &sources, start, &quantiles);
        let mut last = f64::INFINITY;
        for round in 0..training.rounds {
            let windows = Search::roomy(device, &code)?.windows(&samples)?;
            last = improve(&mut code, &sources, &samples, &windows, width);
            progress(round, last);
        }
        if best.as_ref().is_none_or(|b| last < b.0) {
            best = Some((last, code));
        }
    }
    let (_, code) = best.expect("at least one start");
    Ok(code.tables.into_iter().map(|t| t.values).collect())
}

/// One round of Lloyd's iteration: every trained value moves to the mean of the samples that `windows` map to it. Returns
/// the mean squared error of the values before.
fn improve(code: &mut Code, sources: &[Source], samples: &[f32], windows: &[u32], width: f64) -> f64 {
    let v = code.vector as usize;
    let offset = if code.half_offset { 0.5 } else { 0.0 };
    let (min, max) = code.value.range();
    let values: Vec<i16> = code.tables.iter().flat_map(|t| t.values.iter().copied()).collect();
    let mut sums = vec![(0f64, 0f64); values.len()];
    let mut error = 0.0;
    for (&w, x) in windows.iter().zip(samples.chunks_exact(v)) {
        let weight = if code.is_memoryless() { likelihood_ratio(x, width) } else { 1.0 };
        for (source, &x) in sources[w as usize * v..].iter().zip(x) {
            // The value, a real number here, that would give `x`.
            let x = f64::from(x) / f64::from(code.unit) - offset;
            let ideal = if source.complement { -1.0 - x } else { x };
            let (sum, count) = &mut sums[source.value as usize];
            *sum += weight * ideal;
            *count += weight;
            error += weight * (ideal - f64::from(values[source.value as usize])).powi(2);
        }
    }
    let mut new = sums.iter().zip(&values).map(|(&(sum, count), &old)| {
        // What no sample chose stays where it is.
        if count == 0.0 { old } else { (sum / count).round().clamp(min.into(), max.into()) as i16 }
    });
    for t in &mut code.tables {
        let new: Vec<i16> = new.by_ref().take(t.values.len()).collect();
        if is_trained_here(t) {
            t.values = new;
        }
    }
    error / samples.len() as f64 * f64::from(code.unit).powi(2)
}

/// Standard deviation of the density that the best entries of a code without memory have: the source's density to the
/// power V / (V + 2), a wider Gaussian.
pub(super) fn entry_spread(code: &Code) -> f64 {
    let v = f64::from(code.vector);
    ((v + 2.0) / v).sqrt()
}

/// How much likelier `x` is under the source than under a Gaussian of standard deviation `width`.
pub(super) fn likelihood_ratio(x: &[f32], width: f64) -> f64 {
    let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
    width.powi(x.len() as i32) * (-0.5 * square * (1.0 - width.powi(-2))).exp()
}

fn is_trained_here(t: &Table) -> bool {
    matches!(t.source, TableSource::Trained { .. })
}

/// For each window its V sources.
fn sources(code: &Code) -> Result<Vec<Source>, TrainError> {
    let v = code.vector as usize;
    let total: usize = code.tables.iter().map(|t| t.entries as usize * v).sum();
    let mut marked = code.clone();
    // Tables of the digits of each value's own index: seven bits at a time, so that a complement shows in the sign.
    let mut out = vec![Source { value: 0, complement: false }; v << code.window];
    let digits = (usize::BITS - total.leading_zeros()).div_ceil(7);
    for digit in 0..digits {
        fill(&mut marked.tables, v, |i| (i >> (7 * digit) & 127) as i16);
        for (source, &e) in out.iter_mut().zip(&marked.codebook()) {
            let found = if e < 0 { -1 - i32::from(e) } else { i32::from(e) };
            source.value |= (found as u32 & 127) << (7 * digit);
            source.complement = e < 0;
        }
    }
    // Then the claim is put to the test with values of all kinds.
    for seed in 1..4u32 {
        let range = code.value.range();
        let value = |i: usize| ((i as u32 ^ seed << 20).wrapping_mul(0x9E37_79B1) >> 16) as i16;
        let value = |i: usize| if range.1 < 128 { value(i) as i8 as i16 } else { value(i) };
        fill(&mut marked.tables, v, value);
        for (i, (source, &e)) in out.iter().zip(&marked.codebook()).enumerate() {
            let expect = value(source.value as usize);
            if source.value as usize >= total || e != if source.complement { -1 - expect } else { expect } {
                return Err(TrainError::NotALookup { window: (i / v) as u32, component: (i % v) as u32 });
            }
        }
    }
    Ok(out)
}

/// Sets value `i` of all tables together to `f(i)`.
fn fill(tables: &mut [Table], v: usize, f: impl Fn(usize) -> i16) {
    let mut i = 0;
    for t in tables {
        t.values.clear();
        t.values.extend((i..i + t.entries as usize * v).map(&f));
        i += t.values.len();
    }
}

/// How entries lie at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// At the points of a sequence of low discrepancy.
    Sequence,
    /// In the plane: a sunflower's golden spiral, nearly the best lattice everywhere.
    Spiral,
}

/// Where to start from. Small tables end in different optima; of a large one every part is nearly a lattice.
fn starts(code: &Code, sources: &[Source]) -> &'static [Start] {
    let entries = code.tables.iter().map(|t| t.entries).max().unwrap_or(0);
    let planar = code.vector == 2 && code.is_memoryless() && sources.iter().all(|s| !s.complement);
    match (planar, entries <= 256) {
        (true, true) => &[Start::Sequence, Start::Spiral],
        (true, false) => &[Start::Spiral],
        (false, _) => &[Start::Sequence],
    }
}

/// First values: entries spread evenly under the density that the best codebook of many entries has, the source's own
/// for a trellis code and [`entry_spread`]'s for one without memory.
fn initialise(code: &mut Code, sources: &[Source], start: Start, quantiles: &[f32]) {
    let v = code.vector as usize;
    let total: usize = code.tables.iter().map(|t| t.entries as usize * v).sum();
    // Values of which both signs are in use are magnitudes.
    let mut used = vec![[false; 2]; total];
    for s in sources {
        used[s.value as usize][usize::from(s.complement)] = true;
    }
    let width = if code.is_memoryless() { entry_spread(code) } else { 1.0 };
    let quantile = |u: f64| quantiles[(u * quantiles.len() as f64) as usize];
    // The sequence R_V: multiples, modulo 1, of the powers of the root of g^(V+1) = g + 1.
    let mut g = 1.5f64;
    for _ in 0..64 {
        g = (1.0 + g).powf(1.0 / (v as f64 + 1.0));
    }
    let offset = if code.half_offset { 0.5 } else { 0.0 };
    let (min, max) = code.value.range();
    let unit = f64::from(code.unit);
    let to_value = |x: f64| (x / unit - offset).round().clamp(min.into(), max.into()) as i16;
    let mut index = 0;
    for t in &mut code.tables {
        let entries = t.entries as usize;
        if !is_trained_here(t) {
            index += t.values.len();
            continue;
        }
        t.values = (0..entries * v)
            .map(|i| {
                let (entry, component) = (i / v, i % v);
                if start == Start::Spiral {
                    // Golden angles, radii by the quantiles of a Gaussian of two dimensions.
                    let inside = (entry as f64 + 0.5) / entries as f64;
                    let radius = width * (-2.0 * (1.0 - inside).ln()).sqrt();
                    let angle = entry as f64 * std::f64::consts::PI * (3.0 - 5f64.sqrt());
                    return to_value(radius * if component == 0 { angle.cos() } else { angle.sin() });
                }
                let u = if v == 1 {
                    (entry as f64 + 0.5) / entries as f64
                } else {
                    (0.5 + (entry as f64 + 1.0) * g.powi(-(component as i32 + 1))).fract()
                };
                let x = match used[index + i] {
                    [true, true] => quantile(0.5 + 0.5 * u),
                    [true, false] | [false, false] => quantile(u),
                    [false, true] => -quantile(u),
                };
                to_value(f64::from(x) * width)
            })
            .collect();
        index += t.values.len();
    }
}

//! Exact products of small integers with activations, sixteen rows at a time.
//!
//! A matrix lies in memory in *strips* of [`ROWS`] rows, and a strip in units of [`UNIT`] columns: the four digits of its first
//! row, then those of the second, and so on. So a vector register has a part of each row's sum, a product takes the same four
//! activations for all of them, and nothing is ever summed across a register. A *digit* is an entry's integer less the smallest
//! ([`Form::lowest`]), which is brought in with the activations' sum.

mod sums;

use qp_codegen::reference::Activations;
use qp_codegen::spec::terms::Numbers;
use rayon::prelude::*;
use std::sync::Arc;

use crate::memory::arena::{Arena, Piece};
use sums::{Token, Way};

/// Rows of a strip.
pub(super) const ROWS: usize = 16;
/// Columns whose digits of a row lie side by side.
const UNIT: usize = 4;
/// Columns of a strip come in multiples of so many; digits and activations of those that are added are zeros.
const PAD: usize = 2 * UNIT;

/// Weights times tokens that a task multiplies, about.
const TASK: usize = 1 << 17;

/// Bits of a digit in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Digits {
    /// Two digits a byte: unit 2k in the low bits, unit 2k + 1 in the high bits.
    Four,
    /// A byte each.
    Eight,
    /// A strip of high bytes, behind it one of low bytes.
    Sixteen,
    /// The same of three bytes.
    TwentyFour,
}

impl Digits {
    /// Bytes of a strip of so many columns.
    fn strip_bytes(self, columns: usize) -> usize {
        let bytes = columns.next_multiple_of(PAD) * ROWS;
        match self {
            Digits::Four => bytes / 2,
            Digits::Eight => bytes,
            Digits::Sixteen | Digits::TwentyFour => self.planes() * bytes,
        }
    }

    /// Strips of bytes, each of which is multiplied on its own.
    fn planes(self) -> usize {
        match self {
            Digits::Four | Digits::Eight => 1,
            Digits::Sixteen => 2,
            Digits::TwentyFour => 3,
        }
    }
}

/// Runs of columns that have a slope of their own, and perhaps a rest ([`qp_codegen::spec::terms`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Runs {
    /// Columns of a run, 16 to 128; the last may have fewer.
    pub(super) columns: usize,
    /// Whether there are rests.
    pub(super) rests: bool,
    /// Whether a run's sum needs more than 32 bits.
    pub(super) wide: bool,
    /// Whether slopes and rests are kept in half precision, and become integers on their way into the product.
    pub(super) halves: bool,
}

/// What there is to know of a matrix besides its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) digits: Digits,
    /// The integer of the digit 0.
    pub(super) lowest: i32,
    /// What digits are multiplied with, before the smallest integer is added; of matrices without runs.
    pub(super) times: i32,
    /// Nothing if the sum of a whole row is all that counts.
    pub(super) runs: Option<Runs>,
    /// Whether weights are twice their integers plus one.
    pub(super) half_offset: bool,
    /// What a token's results are multiplied with besides its scale.
    pub(super) unit: f32,
}

impl Form {
    fn strips(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// What is kept of the runs of a strip: integers, and numbers of half precision.
    fn numbers(&self) -> (usize, usize) {
        let Some(runs) = self.runs else { return (0, 0) };
        let all = self.columns.div_ceil(runs.columns) * ROWS * if runs.rests { 2 } else { 1 };
        if runs.halves { (0, all) } else { (all, 0) }
    }

    /// Bytes that [`Strips`] take in an arena.
    pub fn bytes(&self) -> usize {
        let (strips, (integers, halves)) = (self.strips(), self.numbers());
        Arena::bytes_of::<u8>(strips * self.digits.strip_bytes(self.columns))
            + Arena::bytes_of::<f32>(strips * ROWS)
            + Arena::bytes_of::<i32>(strips * integers)
            + Arena::bytes_of::<u16>(strips * halves)
    }
}

/// A matrix whose strips can be written out.
pub trait Source: Sync {
    /// Its form.
    fn form(&self) -> Form;

    /// Writes the strip `strip`, all of whose numbers are zero.
    fn write(&self, strip: usize, scratch: &mut Scratch, to: &mut StripMut<'_>);
}

/// Memory of a [`Source`] from one strip to the next.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Entries of the row tile that was decoded last: of the matrix at this address, the tile of this number.
    pub(super) entries: Vec<i16>,
    pub(super) tile: Option<(usize, usize)>,
    pub(super) digits: Vec<u8>,
    pub(super) numbers: Numbers,
    strip: Owned,
}

/// A strip to be written.
#[derive(Debug)]
pub struct StripMut<'a> {
    kind: Digits,
    digits: &'a mut [u8],
    factors: &'a mut [f32],
    integers: &'a mut [i32],
    halves: &'a mut [u16],
}

impl StripMut<'_> {
    /// Writes the digits of a row of the strip: of several bytes those of a `plane`, the highest first.
    pub(super) fn put(&mut self, row: usize, plane: usize, digits: &[u8]) {
        let strip = match self.kind {
            Digits::Four => {
                for (pair, digits) in self.digits.chunks_exact_mut(UNIT * ROWS).zip(digits.chunks(2 * UNIT)) {
                    let (low, high) = digits.split_at(digits.len().min(UNIT));
                    let to = &mut pair[UNIT * row..][..UNIT];
                    to.iter_mut().zip(low).for_each(|(to, d)| *to |= d);
                    to.iter_mut().zip(high).for_each(|(to, d)| *to |= d << 4);
                }
                return;
            }
            Digits::Eight => &mut self.digits[..],
            Digits::Sixteen | Digits::TwentyFour => {
                let size = self.digits.len() / self.kind.planes();
                &mut self.digits[plane * size..][..size]
            }
        };
        for (unit, digits) in strip.chunks_exact_mut(UNIT * ROWS).zip(digits.chunks(UNIT)) {
            unit[UNIT * row..][..digits.len()].copy_from_slice(digits);
        }
    }

    /// Writes what the sums of a row are multiplied with at the end.
    pub(super) fn put_factor(&mut self, row: usize, factor: f32) {
        self.factors[row] = factor;
    }

    /// Writes the slopes and rests of a row's runs, which are kept as integers.
    pub(super) fn put_runs(&mut self, row: usize, slopes: &[i32], rests: &[i32]) {
        put_numbers(self.integers, row, slopes, rests);
    }

    /// Writes the slopes and rests of a row's runs, which are kept in half precision.
    pub(super) fn put_halves(&mut self, row: usize, slopes: &[u16], rests: &[u16]) {
        put_numbers(self.halves, row, slopes, rests);
    }
}

/// The numbers of a row's runs; run by run those of all rows, first slopes, then rests.
fn put_numbers<T: Copy>(to: &mut [T], row: usize, slopes: &[T], rests: &[T]) {
    let size = if rests.is_empty() { ROWS } else { 2 * ROWS };
    to.iter_mut().skip(row).step_by(size).zip(slopes).for_each(|(to, slope)| *to = *slope);
    to.iter_mut().skip(ROWS + row).step_by(size).zip(rests).for_each(|(to, rest)| *to = *rest);
}

/// A strip to be multiplied.
#[derive(Clone, Copy, Debug)]
struct Strip<'a> {
    kind: Digits,
    columns: usize,
    digits: &'a [u8],
    factors: &'a [f32; ROWS],
    runs: Option<RunsOf<'a>>,
    /// What sums of digits are multiplied with: 2 where weights have a half offset.
    times: i64,
}

/// The numbers of a strip's runs.
#[derive(Clone, Copy, Debug)]
struct RunsOf<'a> {
    columns: usize,
    lowest: i32,
    count: usize,
    /// Numbers of a run: a slope, and perhaps a rest.
    each: usize,
    /// Whether the smallest integer and the rests come in with a run's products, and not at last.
    at_once: bool,
    numbers: OfRuns<'a>,
}

/// Run by run, each for all rows.
#[derive(Clone, Copy, Debug)]
enum OfRuns<'a> {
    Integers(&'a [[i32; ROWS]]),
    /// Half precision, and what makes integers of them: the inverses of the rows' factors.
    Halves(&'a [[u16; ROWS]], [f32; ROWS]),
}

impl<'a> Strip<'a> {
    fn new(form: &Form, digits: &'a [u8], factors: &'a [f32], integers: &'a [i32], halves: &'a [u16]) -> Strip<'a> {
        let factors: &[f32; ROWS] = factors.first_chunk().expect("a factor for each row");
        let runs = form.runs.map(|runs| RunsOf {
            columns: runs.columns,
            lowest: form.lowest,
            count: form.columns.div_ceil(runs.columns),
            each: if runs.rests { 2 } else { 1 },
            at_once: !runs.wide && form.digits.planes() == 1,
            numbers: if runs.halves {
                // Powers of two; what a strip has too many of are zeros.
                OfRuns::Halves(halves.as_chunks().0, factors.map(|f| if f > 0.0 { 1.0 / f } else { 0.0 }))
            } else {
                OfRuns::Integers(integers.as_chunks().0)
            },
        });
        let times = if form.half_offset { 2 } else { form.times.into() };
        Strip { kind: form.digits, columns: form.columns, digits, factors, runs, times }
    }
}

/// A strip with memory of its own.
#[derive(Debug, Default)]
struct Owned {
    digits: Vec<u8>,
    factors: [f32; ROWS],
    integers: Vec<i32>,
    halves: Vec<u16>,
}

impl Owned {
    /// All zeros, for a strip of `form`.
    fn clear(&mut self, form: &Form) {
        let (integers, halves) = form.numbers();
        self.digits.clear();
        self.digits.resize(form.digits.strip_bytes(form.columns), 0);
        self.integers.clear();
        self.integers.resize(integers, 0);
        self.halves.clear();
        self.halves.resize(halves, 0);
        self.factors = [0.0; ROWS];
    }
}

/// The strips of a matrix, written out.
#[derive(Debug)]
pub struct Strips {
    form: Form,
    digits: Piece<u8>,
    factors: Piece<f32>,
    integers: Piece<i32>,
    halves: Piece<u16>,
}

impl Strips {
    /// Those of `source` in `arena`; `None` if they do not fit.
    pub fn new(source: &dyn Source, arena: &Arc<Arena>) -> Option<Strips> {
        let form = source.form();
        let (strips, (integers, halves)) = (form.strips(), form.numbers());
        let bytes = form.digits.strip_bytes(form.columns);
        let mut out = Strips {
            form,
            digits: arena.take(strips * bytes)?,
            factors: arena.take(strips * ROWS)?,
            integers: arena.take(strips * integers)?,
            halves: arena.take(strips * halves)?,
        };
        let digits = out.digits.par_chunks_exact_mut(bytes.max(1)).zip(out.factors.par_chunks_exact_mut(ROWS));
        let numbers = parts(&mut out.integers, strips).into_par_iter().zip(parts(&mut out.halves, strips));
        digits.zip(numbers).enumerate().for_each_init(
            Scratch::default,
            |scratch, (strip, ((digits, factors), (integers, halves)))| {
                let mut to = StripMut { kind: form.digits, digits, factors, integers, halves };
                source.write(strip, scratch, &mut to);
            },
        );
        Some(out)
    }

    fn strip(&self, at: usize) -> Strip<'_> {
        let (bytes, (integers, halves)) = (self.form.digits.strip_bytes(self.form.columns), self.form.numbers());
        Strip::new(
            &self.form,
            &self.digits[at * bytes..][..bytes],
            &self.factors[at * ROWS..][..ROWS],
            &self.integers[at * integers..][..integers],
            &self.halves[at * halves..][..halves],
        )
    }
}

/// `count` equal parts of `all`, which may be empty.
fn parts<T>(all: &mut [T], count: usize) -> Vec<&mut [T]> {
    let (size, mut rest) = (all.len() / count.max(1), all);
    let mut next = || {
        let (part, others) = std::mem::take(&mut rest).split_at_mut(size);
        rest = others;
        part
    };
    (0..count).map(|_| next()).collect()
}

/// Tokens' activations, ready for products.
#[derive(Debug)]
pub struct Inputs {
    tokens: Vec<Activations>,
    way: Way,
    /// Units of a token's columns, padded.
    units: usize,
    /// Of each token, its units as the way reads them.
    cells: Vec<u64>,
}

impl Inputs {
    /// Of tokens with `columns` activations each.
    pub fn new(tokens: Vec<Activations>, columns: usize) -> Inputs {
        Inputs::of(Way::fastest(), tokens, columns)
    }

    fn of(way: Way, tokens: Vec<Activations>, columns: usize) -> Inputs {
        assert!(tokens.iter().all(|a| a.q.len() == columns), "activations of a token");
        let units = columns.next_multiple_of(PAD) / UNIT;
        let mut cells = vec![0; tokens.len() * units];
        for (cells, token) in cells.chunks_exact_mut(units.max(1)).zip(&tokens) {
            let (whole, rest) = token.q.as_chunks::<UNIT>();
            cells.iter_mut().zip(whole).for_each(|(cell, q)| *cell = way.cell(*q));
            let mut last = [0; UNIT];
            last[..rest.len()].copy_from_slice(rest);
            if !rest.is_empty() {
                cells[whole.len()] = way.cell(last);
            }
        }
        Inputs { tokens, way, units, cells }
    }

    /// True unless an input was not finite.
    pub fn are_finite(&self) -> bool {
        self.tokens.iter().all(|token| token.scale.is_finite())
    }

    /// The activations' sums over runs of `columns`, token by token.
    fn sums(&self, columns: usize) -> Vec<i32> {
        let of_run = |q: &[i16]| q.iter().map(|&q| i32::from(q)).sum();
        self.tokens.iter().flat_map(|t| t.q.chunks(columns).map(of_run)).collect()
    }
}

/// A product to be computed.
pub struct Product<'a> {
    /// The matrix.
    pub source: &'a dyn Source,
    /// Its strips, if they were written out; without them each is written on its way.
    pub kept: Option<&'a Strips>,
    /// The tokens' activations, as many each as the matrix has columns.
    pub inputs: &'a Inputs,
}

/// What becomes of the integer that a product is.
pub trait Outcome: Copy + Default + Send + Sync {
    /// Of the integer, with the row's factor and the token's.
    fn of(total: i64, of_row: f32, of_token: f32) -> Self;
}

/// The result of a layer.
impl Outcome for f32 {
    #[inline(always)]
    fn of(total: i64, of_row: f32, of_token: f32) -> f32 {
        total as f32 * of_row * of_token
    }
}

/// The integer itself.
impl Outcome for i64 {
    #[inline(always)]
    fn of(total: i64, _: f32, _: f32) -> i64 {
        total
    }
}

/// The products with each token's activations, tokens × rows each, as [`qp_codegen::spec::terms`] and [`qp_codegen::reference`]
/// define them. All are computed together.
pub fn products<T: Outcome>(all: &[Product<'_>]) -> Vec<Vec<T>> {
    let forms: Vec<Form> = all.iter().map(|p| p.source.form()).collect();
    // Strips × tokens × rows, so that what tasks write is apart.
    let zeros = |(p, form): (&Product<'_>, &Form)| vec![[T::default(); ROWS]; form.strips() * p.inputs.tokens.len()];
    let mut results: Vec<Vec<[T; ROWS]>> = all.iter().zip(&forms).map(zeros).collect();
    let sums: Vec<Vec<i32>> =
        all.iter().zip(&forms).map(|(p, f)| f.runs.map_or_else(Vec::new, |runs| p.inputs.sums(runs.columns))).collect();
    let mut tokens: Vec<Vec<Token<'_>>> = Vec::new();
    for ((p, form), sums) in all.iter().zip(&forms).zip(&sums) {
        let runs = form.runs.map_or(0, |runs| form.columns.div_ceil(runs.columns));
        let one = |(t, a): (usize, &Activations)| Token {
            cells: &p.inputs.cells[t * p.inputs.units..][..p.inputs.units],
            sums: &sums[t * runs..][..runs],
            // Runs have brought in the lowest integer already.
            add: match (form.runs, form.half_offset) {
                (Some(_), _) => 0,
                (None, false) => i64::from(form.lowest) * a.sum,
                (None, true) => (2 * i64::from(form.lowest) + 1) * a.sum,
            },
            factor: a.scale * form.unit,
        };
        tokens.push(p.inputs.tokens.iter().enumerate().map(one).collect());
    }
    let mut tasks = Vec::new();
    for (i, results) in results.iter_mut().enumerate() {
        let n = tokens[i].len();
        let strips = (TASK / (ROWS * forms[i].columns * n).max(1)).max(1);
        for (task, results) in results.chunks_mut((strips * n).max(1)).enumerate() {
            tasks.push((i, task * strips, results));
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (i, first, results)| {
        let (p, form, tokens) = (&all[i], &forms[i], &tokens[i]);
        for (strip, results) in (first..).zip(results.chunks_exact_mut(tokens.len().max(1))) {
            match p.kept {
                Some(kept) => p.inputs.way.results(&kept.strip(strip), tokens, results),
                None => {
                    let mut own = std::mem::take(&mut scratch.strip);
                    own.clear(form);
                    let Owned { digits, factors, integers, halves } = &mut own;
                    let mut to = StripMut { kind: form.digits, digits, factors, integers, halves };
                    p.source.write(strip, scratch, &mut to);
                    let strip = Strip::new(form, &own.digits, &own.factors, &own.integers, &own.halves);
                    p.inputs.way.results(&strip, tokens, results);
                    scratch.strip = own;
                }
            }
        }
    });
    results.iter().zip(&forms).zip(&tokens).map(|((r, form), tokens)| by_token(r, form.rows, tokens.len())).collect()
}

/// Results of strips × `tokens` as tokens × `rows`.
fn by_token<T: Outcome>(results: &[[T; ROWS]], rows: usize, tokens: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows * tokens];
    out.par_chunks_exact_mut(rows.max(1)).enumerate().for_each(|(t, out)| {
        for (out, result) in out.chunks_mut(ROWS).zip(results[t..].iter().step_by(tokens)) {
            out.copy_from_slice(&result[..out.len()]);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Numbers that look random.
    struct Random(u32);

    impl Random {
        /// One of `-most..=most`, the ends more often than others.
        fn within(&mut self, most: i32) -> i32 {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match self.0 >> 28 {
                0 => -most,
                1 => most,
                _ => (self.0 >> 4).cast_signed() % (most + 1),
            }
        }
    }

    /// A matrix of any digits.
    struct Made {
        form: Form,
        /// Rows × columns.
        digits: Vec<u32>,
        factors: Vec<f32>,
        /// Rows × runs; numbers of half precision if they are kept so.
        slopes: Vec<i32>,
        rests: Vec<i32>,
    }

    /// The integer of a number of half precision in a row with this factor.
    fn integer_of(half: i32, factor: f32) -> i32 {
        (f16::from_bits(half as u16).to_f32() * (1.0 / factor)).round_ties_even() as i32
    }

    impl Made {
        fn new(form: Form, random: &mut Random) -> Made {
            let most = match form.digits {
                Digits::Four => 15,
                Digits::Eight => 255,
                Digits::Sixteen => 65535,
                Digits::TwentyFour => (1 << 19) - 1,
            };
            // Of wider digits slopes have fewer bits.
            let steepest = (1 << 22) >> (8 * (form.digits.planes() - 1));
            let runs = form.runs.map_or(0, |r| form.rows * form.columns.div_ceil(r.columns));
            let rests = if form.runs.is_some_and(|r| r.rests) { runs } else { 0 };
            let mut some = |n: usize, most| -> Vec<i32> { (0..n).map(|_| random.within(most)).collect() };
            let digits = some(form.rows * form.columns, most).iter().map(|d| d.unsigned_abs()).collect();
            let (factors, slopes, rests) = (some(form.rows, 3), some(runs, steepest), some(rests, 1 << 30));
            let half = |x: &i32| i32::from(f16::from_f32(*x as f32 / 2f32.powi(24)).to_bits());
            if form.runs.is_some_and(|runs| runs.halves) {
                let factors = factors.iter().map(|f| 2f32.powi(f - 17)).collect();
                let [slopes, rests] = [&slopes, &rests].map(|x| x.iter().map(half).collect());
                return Made { form, digits, factors, slopes, rests };
            }
            Made { form, digits, factors: factors.iter().map(|f| *f as f32 / 512.0).collect(), slopes, rests }
        }

        /// The results by the definition.
        fn results(&self, tokens: &[Activations]) -> Vec<f32> {
            let (form, mut out) = (&self.form, Vec::new());
            let run = form.runs.map_or(form.columns, |r| r.columns);
            let runs = form.columns.div_ceil(run);
            for token in tokens {
                for row in 0..form.rows {
                    let digits = &self.digits[row * form.columns..][..form.columns];
                    let mut sum = 0i64;
                    for (column, (digit, q)) in digits.iter().zip(&token.q).enumerate() {
                        let integer = i64::from(*digit) * i64::from(form.times) + i64::from(form.lowest);
                        let at = row * runs + column / run;
                        let number = |x: i32| match form.runs {
                            Some(Runs { halves: true, .. }) => i64::from(integer_of(x, self.factors[row])),
                            _ => i64::from(x),
                        };
                        let weight = match (form.runs, form.half_offset) {
                            (Some(_), _) => {
                                integer * number(self.slopes[at]) + self.rests.get(at).map_or(0, |r| number(*r))
                            }
                            (None, false) => integer,
                            (None, true) => 2 * integer + 1,
                        };
                        sum += weight * i64::from(*q);
                    }
                    out.push(sum as f32 * self.factors[row] * (token.scale * form.unit));
                }
            }
            out
        }
    }

    impl Source for Made {
        fn form(&self) -> Form {
            self.form
        }

        fn write(&self, strip: usize, _: &mut Scratch, to: &mut StripMut<'_>) {
            let Form { rows, columns, .. } = self.form;
            for (i, row) in (strip * ROWS..rows.min((strip + 1) * ROWS)).enumerate() {
                let digits = &self.digits[row * columns..][..columns];
                let bytes = |shift| digits.iter().map(|d| (d >> shift) as u8).collect::<Vec<_>>();
                let planes = self.form.digits.planes();
                (0..planes).for_each(|plane| to.put(i, plane, &bytes(8 * (planes - 1 - plane))));
                to.put_factor(i, self.factors[row]);
                let of = |all: &[i32]| all[row * (all.len() / rows)..][..all.len() / rows].to_vec();
                let (slopes, rests) = (of(&self.slopes), of(&self.rests));
                if self.form.runs.is_some_and(|runs| runs.halves) {
                    let [slopes, rests] = [slopes, rests].map(|x| x.iter().map(|x| *x as u16).collect::<Vec<_>>());
                    to.put_halves(i, &slopes, &rests);
                } else {
                    to.put_runs(i, &slopes, &rests);
                }
            }
        }
    }

    fn form(rows: usize, columns: usize, digits: Digits, runs: Option<(usize, bool, bool)>) -> Form {
        let wide = |columns| digits.planes() > 1 || columns == 64;
        let runs = runs.map(|(columns, rests, halves)| Runs { columns, rests, wide: wide(columns), halves });
        let lowest = match digits {
            Digits::Four | Digits::Eight => -77,
            Digits::Sixteen => -32768,
            Digits::TwentyFour => -245_760,
        };
        let half_offset = runs.is_none() && rows % 2 == 1;
        let times = if runs.is_none() && !half_offset { 887 } else { 1 };
        Form { rows, columns, digits, lowest, times, runs, half_offset, unit: 0.25 }
    }

    #[test]
    fn every_way_is_exact() {
        let mut random = Random(1);
        let kinds = [
            (Digits::Eight, None),
            (Digits::Sixteen, None),
            (Digits::Four, None),
            (Digits::Four, Some((32, true, false))),
            (Digits::Four, Some((32, true, true))),
            (Digits::Eight, Some((32, false, true))),
            (Digits::Eight, Some((16, true, false))),
            (Digits::Four, Some((128, true, true))),
            (Digits::Eight, Some((64, false, false))),
            (Digits::Eight, Some((64, true, true))),
            (Digits::Sixteen, Some((64, true, false))),
            (Digits::Sixteen, Some((32, false, true))),
            (Digits::TwentyFour, Some((128, true, true))),
            (Digits::TwentyFour, Some((32, false, false))),
            (Digits::TwentyFour, None),
        ];
        for (rows, columns) in [(1, 1), (16, 8), (17, 100), (33, 288), (5, 1300), (48, 129)] {
            for (digits, runs) in kinds {
                let made = Made::new(form(rows, columns, digits, runs), &mut random);
                let q = |random: &mut Random| (0..columns).map(|_| random.within(16256) as i16).collect::<Vec<_>>();
                let token = |random: &mut Random| {
                    let q = q(random);
                    Activations { sum: q.iter().map(|q| i64::from(*q)).sum(), q, scale: 0.125 }
                };
                let tokens: Vec<Activations> = (0..7).map(|_| token(&mut random)).collect();
                let arena = Arena::new(made.form.bytes()).unwrap();
                let strips = Strips::new(&made, &arena).unwrap();
                assert!(arena.take::<u8>(1).is_none(), "all is used");
                for &way in Way::all() {
                    for n in [7, 1, 0] {
                        let expected = made.results(&tokens[..n]);
                        let inputs = Inputs::of(way, tokens[..n].to_vec(), columns);
                        for kept in [None, Some(&strips)] {
                            let product = || Product { source: &made, kept, inputs: &inputs };
                            let results: Vec<Vec<f32>> = products(&[product(), product()]);
                            assert_eq!(results, [&expected[..], &expected], "{way:?}, {:?}", made.form);
                            let totals: Vec<Vec<i64>> = products(&[product()]);
                            let of = |i: usize| (made.factors[i % rows], tokens[i / rows].scale * made.form.unit);
                            let scaled = totals[0].iter().enumerate().map(|(i, x)| f32::of(*x, of(i).0, of(i).1));
                            assert_eq!(scaled.collect::<Vec<_>>(), expected);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_sums_fit() {
        let mut random = Random(1);
        for (digits, runs, columns) in [
            (Digits::Eight, None, 131_072),
            (Digits::Sixteen, None, 60_000),
            (Digits::Eight, Some((128, true, false)), 20_000),
        ] {
            let mut made = Made::new(form(1, columns, digits, runs), &mut random);
            made.form.half_offset = false;
            made.digits.fill(if digits == Digits::Sixteen { u16::MAX.into() } else { 255 });
            for sign in [1, -1] {
                let tokens = [Activations {
                    q: vec![sign * 16256; columns],
                    scale: 1.0,
                    sum: i64::from(sign) * 16256 * columns as i64,
                }];
                for &way in Way::all() {
                    let inputs = Inputs::of(way, tokens.to_vec(), columns);
                    let results: Vec<Vec<f32>> = products(&[Product { source: &made, kept: None, inputs: &inputs }]);
                    assert_eq!(results, [made.results(&tokens)], "{way:?}, {digits:?}");
                }
            }
        }
    }
}

//! Products with matrices of a format, exactly: the weight brought into the form `slope × integer + rest`.
//!
//! # The meaning of a product
//!
//! The entries of many formats are small integers, and their weights are a straight line through these whose slope and
//! rest are made of fields alone. Then a row's sum of products with the integers `q` of a token's activations
//! ([`crate::reference::quantize_activations`]) is
//!
//! ```text
//! Σ over runs of columns   slope · Σ integer·q  +  rest · Σ q
//! ```
//!
//! where a run is of columns that share their fields. Slope and rest are computed as written, each operation rounded to
//! single precision, and then rounded to whole multiples of a power of two of the row's own ([`Numbers`]): such that the
//! largest weight of the row has 30 bits ([`Terms::precision`]). So the sum is one of integers, in 64 bits, which no order of summing changes.
//! It is converted to single precision once, and multiplied by the power of two and by the token's scale.
//!
//! Numbers of half precision lose nothing where they lie within a factor of 2^11 (for entries of 8 bits) or more of the
//! row's largest; what others lose is less than what a sum in single precision loses by rounding once.
//!
//! Integers of up to 24 bits are taken as they are, as one to three bytes that are multiplied each on its own. Those of more, which
//! floats in a table of entries are, are rounded to 16 bits, about as activations are.
//!
//! Where fields that are small integers are added to the entry before it is multiplied, as zero points are, `(entry - z) * s`, the weight is
//! `slope × (integer + zero)`: the rest is the slope, rounded, times an integer, and need not be multiplied apart.
//!
//! If slopes are those of whole rows and there is no rest, the sum is that of the integers and the slope is multiplied
//! with it at the end, as the scales of the palette's quantizers are.
//!
//! What does not lie in runs is made when a matrix is stored again. Small fields for fewer columns than a run has, and fractions of
//! them, that are added to the entry become a part of the integer ([`Terms::near`]). Slopes and rests that look something up in a
//! table of the matrix, or whose fields' columns are no runs, are stored as numbers of runs ([`Origin::Value`]). The entries of codes that look up
//! tables of the matrix are rounded to 16 bits, to multiples of a power of two of the matrix's own, which the row's factor
//! has beside ([`Terms::own`]).

mod covers;
mod range;
mod stream;

use super::Shape;
use super::expr::Room;
use super::format::{Arithmetic, Cover, FRACTION, Field, Format, Number, Step, Weight, WeightOp};
use crate::syntax::number::Rational;
pub use stream::{BLOCK, Book, Digits, RUN, Runs, Stream};

/// Columns of a tile of a matrix that is stored again for products; runs are of so many, or of a part of them.
pub const TILE: u32 = 128;
/// Columns of the shortest run.
pub const SHORTEST: u32 = 16;
/// Most columns of a matrix, for which sums fit 64 bits.
pub const MOST_COLUMNS: u32 = 1 << 17;
/// Bits of the largest weight of a row, as a multiple of the row's power of two.
const PRECISION: i32 = 30;
/// Most bits of the difference of two integers that are taken as they are.
const WIDEST: u32 = 24;
/// Magnitudes up to 2 to this have sums over a run within 32 bits.
const NARROW: u32 = 8;
/// Bits that integers of more are rounded to.
const ROUNDED: u32 = 16;
/// Bits of a code that is stored as it is where the integer that it stands for has more.
pub const CODE: u32 = 4;
/// Bits that are left for the largest weight of a row and the number of its columns: 64 less those of an activation and of the signs.
const SUM: i32 = 47;
/// The least exponent of a row's power of two: of it and of its inverse single precision holds all bits.
const LEAST: i32 = -126;

/// Why products of a format are not computed exactly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Inexact {
    /// Entries far from 0.
    #[error("its entries are {lowest} to {highest}, too far from 0")]
    Far {
        /// The smallest integer.
        lowest: i32,
        /// The largest.
        highest: i32,
    },
    /// A weight that is no straight line through the entries.
    #[error("its weight is not the entry times fields, plus fields")]
    NoLine,
    /// Steps of input or output.
    #[error("its activations or results are transformed, and not by a field and one transform, of up to {most} results", most = MOST_MIXED)]
    Sides,
    /// Codes that are too many to write out.
    #[error("codes of {0} bits are too many to write out what they look up in tables of the matrix")]
    Long(u32),
    /// Columns that share a number hold no whole runs.
    #[error("`{field}` is for {cover}: runs are of 16, 32, 64 or 128 columns")]
    Cover {
        /// The field.
        field: String,
        /// Which weights share a number.
        cover: String,
    },
}

/// A format's weight as `slope × integer + rest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// Bits by which the format's integers are rounded; the others here are of what is left.
    pub rounded: u32,
    /// The smallest integer of an entry.
    pub lowest: i32,
    /// Bits of the difference of an integer from the smallest, its *digits*.
    pub bits: u32,
    /// The digits of each code of [`CODE`] bits, where these have more: then codes are stored.
    pub table: Option<Vec<u32>>,
    /// Whether entries are made of tables of the matrix: then integers are rounded to multiples of a power of two of its own.
    pub own: bool,
    /// What is added to the integers before they are stored.
    pub near: Option<Near>,
    /// Integers' magnitudes are at most 2 to this.
    pub span: u32,
    /// The fields of slope, rest and zero, and where their numbers come from.
    pub fields: Vec<(Origin, Field)>,
    /// An expression of fields; its fields are indices into [`Terms::fields`].
    pub slope: Weight,
    /// The same, if there is one.
    pub rest: Option<Weight>,
    /// What is added to the integer before it is multiplied, if something is; then there is no rest. The expression is of fields and
    /// constants that are integers.
    pub zero: Option<Weight>,
    /// Columns of a run; nothing if the slope is that of a whole row, and neither rest nor zero.
    pub run: Option<u32>,
    /// What the digits are multiplied with: an integer is so many times its digits, plus the smallest.
    pub times: i32,
    /// How digits follow from streams, or from codes that are looked up, in kernels.
    pub stream: Option<Stream>,
    /// What is done to activations and results.
    pub sides: Sides,
}

/// Where the numbers of a field come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A field of the format.
    Field(usize),
    /// An expression of the format's fields and tables, whose value is stored.
    Value(Weight),
}

/// Small fields that are a part of the integer: an integer is so many times that of the code, plus as many times the value of the
/// expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Near {
    /// What both are multiplied with, so that they are whole.
    pub times: i32,
    /// An expression of the format's fields.
    pub add: Weight,
}

/// What is done to the activations that enter a product, and to its results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sides {
    /// First the field, then the transform.
    pub input: Side,
    /// First the transform, then the field.
    pub output: Side,
}

/// A product with the numbers of a field, and transforms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Side {
    /// The field, among the format's.
    pub field: Option<usize>,
    /// Numbers that a transform mixes; all of them where it does not say.
    pub hadamard: Option<Option<u32>>,
}

/// Most results that a transform mixes: a block has them in shared memory.
pub const MOST_MIXED: u32 = 1 << 14;

impl Sides {
    /// Those of a format.
    fn of(format: &Format) -> Result<Sides, Inexact> {
        let side = |steps: &mut dyn Iterator<Item = &Step>| {
            let mut side = Side::default();
            for step in steps {
                match *step {
                    Step::Field(f) if side == Side::default() => side.field = Some(f),
                    Step::Hadamard(n) if side.hadamard.is_none() => side.hadamard = Some(n),
                    Step::Field(_) | Step::Hadamard(_) | Step::Signs(_) | Step::Permute(_) => return None,
                }
            }
            Some(side)
        };
        let (input, output) = (side(&mut format.input.iter()), side(&mut format.output.iter().rev()));
        let short = |s: &Side| s.hadamard.flatten().is_none_or(|n| n <= MOST_MIXED);
        input.zip(output.filter(short)).map(|(input, output)| Sides { input, output }).ok_or(Inexact::Sides)
    }

    /// True if nothing is done.
    pub fn is_empty(&self) -> bool {
        *self == Sides::default()
    }
}

/// A value that is a straight line through the integer.
#[derive(Clone, Debug, Default)]
struct Line {
    slope: Option<Vec<WeightOp>>,
    rest: Option<Vec<WeightOp>>,
    /// Small integers of which the rest is a product with the slope.
    zero: Option<Vec<WeightOp>>,
}

/// The least and the greatest value of an expression of small integers; `None` if it is none.
fn whole(ops: &[WeightOp], ty: &dyn Fn(usize) -> Number) -> Option<(i64, i64)> {
    let mut nodes: Vec<(i64, i64)> = Vec::new();
    for op in ops {
        nodes.push(match *op {
            WeightOp::Const(c) => c.integer().and_then(|c| i64::try_from(c).ok()).map(|c| (c, c))?,
            WeightOp::Field(f) => match ty(f) {
                // A layout may store a number less one.
                Number::Unsigned(n) if n <= 8 => (0, 1 << n),
                Number::Signed(n) if n <= 8 => (-(1 << (n - 1)), 1 << (n - 1)),
                _ => return None,
            },
            WeightOp::Neg(a) => (-nodes[a].1, -nodes[a].0),
            WeightOp::Binary(Arithmetic::Add, a, b) => (nodes[a].0 + nodes[b].0, nodes[a].1 + nodes[b].1),
            WeightOp::Binary(Arithmetic::Sub, a, b) => (nodes[a].0 - nodes[b].1, nodes[a].1 - nodes[b].0),
            WeightOp::Binary(..) | WeightOp::Entry | WeightOp::Lookup(..) => return None,
        });
        let (least, most) = nodes[nodes.len() - 1];
        if least < -(1 << NARROW) || most > 1 << NARROW {
            return None;
        }
    }
    nodes.pop()
}

/// `a op b`, the nodes of `b` behind those of `a`.
fn join(op: Arithmetic, a: &[WeightOp], b: &[WeightOp]) -> Vec<WeightOp> {
    if let (Arithmetic::Mul, [WeightOp::Const(one)]) = (op, a)
        && *one == Rational::from(1)
    {
        return b.to_vec();
    }
    if let (Arithmetic::Mul | Arithmetic::Div, [WeightOp::Const(one)]) = (op, b)
        && *one == Rational::from(1)
    {
        return a.to_vec();
    }
    let n = a.len();
    let moved = b.iter().map(|o| match *o {
        WeightOp::Neg(x) => WeightOp::Neg(x + n),
        WeightOp::Binary(op, x, y) => WeightOp::Binary(op, x + n, y + n),
        WeightOp::Entry | WeightOp::Const(_) | WeightOp::Field(_) | WeightOp::Lookup(..) => o.clone(),
    });
    let mut out: Vec<WeightOp> = a.iter().cloned().chain(moved).collect();
    out.push(WeightOp::Binary(op, n - 1, n + b.len() - 1));
    out
}

fn negative(a: &[WeightOp]) -> Vec<WeightOp> {
    let mut out = a.to_vec();
    out.push(WeightOp::Neg(a.len() - 1));
    out
}

/// The sum or difference of what may be absent.
fn sum(op: Arithmetic, a: Option<Vec<WeightOp>>, b: Option<Vec<WeightOp>>) -> Option<Vec<WeightOp>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(join(op, &a, &b)),
        (None, Some(b)) if op == Arithmetic::Sub => Some(negative(&b)),
        (a, b) => a.or(b),
    }
}

impl Terms {
    /// The terms of `format`.
    ///
    /// # Errors
    /// If its products are not computed exactly, why.
    pub fn of(format: &Format) -> Result<Terms, Inexact> {
        // Weights are stored as integers, each alone, where kernels do not decode streams or look up codes.
        let stream = stream::Line::of(format);
        let times = stream.as_ref().map_or(1, |line| line.times);
        match Terms::decoded_from(format, stream) {
            Ok(terms) if times != 1 && terms.run.is_some() => Terms::decoded_from(format, None),
            terms => terms,
        }
    }

    /// The terms of `format`, whose digits follow from streams in kernels, or are stored.
    fn decoded_from(format: &Format, stream: Option<stream::Line>) -> Result<Terms, Inexact> {
        let sides = Sides::of(format)?;
        let own = !format.numbers.is_empty();
        let bits_of = |lowest: i32, highest: i32| 32 - highest.abs_diff(lowest).max(1).leading_zeros();
        let (mut rounded, mut times) = (0, 1);
        let (mut lowest, mut highest, mut bits);
        let stream = if let Some(line) = stream {
            (lowest, highest, bits, times) = (line.lowest, line.highest, line.bits, line.times);
            Some(line.stream)
        } else {
            (lowest, highest) = range::of(format)?;
            if bits_of(lowest, highest) > WIDEST {
                let of = |by| (round(lowest, by), round(highest, by));
                rounded = (1..31).find(|&by| bits_of(of(by).0, of(by).1) <= ROUNDED).unwrap_or(31);
                (lowest, highest) = of(rounded);
            }
            bits = bits_of(lowest, highest);
            None
        };
        let mut line = line(format, rounded)?;
        let ty = |f: usize| format.fields[f].ty;
        let mut near = None;
        if let Some(zero) = line.zero.take_if(|zero| !covers::is_stored(format, zero)) {
            // Digits of streams are not added to.
            let fraction = covers::fraction(&zero, &ty).filter(|_| rounded == 0 && !own && stream.is_none());
            let part =
                fraction.and_then(|(_, _, parts)| Some((i32::try_from(parts).ok()?, Rational::new(1, parts.into())?)));
            if let (Some((least, most, _)), Some((times, part)), Some(slope)) = (fraction, part, &line.slope) {
                line.slope = Some(join(Arithmetic::Mul, slope, &[WeightOp::Const(part)]));
                line.rest = None;
                (lowest, highest) = (lowest * times + least as i32, highest * times + most as i32);
                bits = bits_of(lowest, highest);
                near = Some(Near { times, add: Weight { ops: zero } });
            }
        }
        let table =
            (format.window == CODE && format.vector == 1 && bits > CODE && near.is_none() && !own && stream.is_none())
                .then(|| {
                    let (mut integers, mut room) = ([0], Room::default());
                    let digits = |code| {
                        format.integers(code, &[], &mut room, &mut integers);
                        round(integers[0] as i32, rounded).abs_diff(lowest)
                    };
                    (0..1 << CODE).map(digits).collect()
                });
        let zeros = line.zero.as_ref().and_then(|zero| whole(zero, &ty)).filter(|(least, most)| {
            let sums = [i64::from(lowest) + least, i64::from(highest) + most];
            let narrow = rounded == 0 && bits <= 8 && stream.is_none();
            narrow && sums.iter().all(|x| x.unsigned_abs() <= 1 << NARROW)
        });
        match zeros {
            Some(_) => line.rest = None,
            None => line.zero = None,
        }
        // A zero by itself has its place beside the slope as well.
        let (least, largest) = zeros.unwrap_or_default();
        let all = [0, lowest.into(), highest.into()].map(|x: i64| [x, x + least, x + largest]);
        let most = all.as_flattened().iter().fold(1, |most, x| most.max(x.unsigned_abs()));
        let span = most.next_power_of_two().trailing_zeros();
        if span > WIDEST {
            return Err(Inexact::Far { lowest, highest });
        }
        let mut fields: Vec<(Origin, Field)> = Vec::new();
        let mut named = |name: &str, ops: Vec<WeightOp>| -> Result<Weight, Inexact> {
            if !covers::is_stored(format, &ops) {
                fields.push(covers::made(format, name, ops)?);
                return Ok(Weight { ops: vec![WeightOp::Field(fields.len() - 1)] });
            }
            let of = |op: WeightOp| match op {
                WeightOp::Field(f) => WeightOp::Field(match fields.iter().position(|x| x.0 == Origin::Field(f)) {
                    Some(at) => at,
                    None => {
                        // How a field is made is not a matter of products.
                        fields.push((Origin::Field(f), Field { formula: None, ..format.fields[f].clone() }));
                        fields.len() - 1
                    }
                }),
                other => other,
            };
            Ok(Weight { ops: ops.into_iter().map(of).collect() })
        };
        let slope = named("slope", line.slope.ok_or(Inexact::NoLine)?)?;
        // What is rounded to multiples of a power of two of the matrix's own is the integers alone.
        if own && (line.rest.is_some() || line.zero.is_some()) {
            return Err(Inexact::NoLine);
        }
        let rest = line.rest.map(|rest| named("rest", rest)).transpose()?;
        let zero = line.zero.map(|zero| named("zero", zero)).transpose()?;
        let runs = fields.iter().filter_map(|(_, f)| covers::stored(f.cover).flatten());
        let run = (rest.is_some() || zero.is_some()).then_some(TILE).into_iter().chain(runs).min();
        Ok(Terms {
            rounded,
            lowest,
            bits,
            table,
            own,
            near,
            span,
            fields,
            slope,
            rest,
            zero,
            run,
            times,
            stream,
            sides,
        })
    }

    /// The digits of all codes of the format whose terms these are, code by code; none where codes are too many, or digits are not a
    /// matter of the code alone.
    pub fn book(&self, format: &Format) -> Vec<u32> {
        if let Some(stream) = &self.stream {
            return stream.book().into_iter().map(u32::from).collect();
        }
        if !format.has_book() || self.near.is_some() {
            return Vec::new();
        }
        let (mut integers, mut room) = (vec![0; format.vector as usize], Room::default());
        let mut out = Vec::with_capacity((format.vector as usize) << format.window);
        for code in 0..1u32 << format.window {
            format.integers(code, &[], &mut room, &mut integers);
            // The integers of a checked format are of its entries' type.
            out.extend(integers.iter().map(|&i| round(i as i32, self.rounded).abs_diff(self.lowest)));
        }
        out
    }

    /// The integers of all codes, as multiples of 2^-24, of a format whose entries are made of the matrix's tables, as digits, and the power
    /// of two of which these are multiples.
    pub fn own_book(&self, integers: &[i64]) -> (Vec<u32>, f32) {
        let most = integers.iter().fold(0, |most: i64, x| most.max(x.saturating_abs()));
        let round = |x: i64, by: u32| (x + ((1 << by) >> 1)) >> by;
        let by = (0..62).find(|&by| round(most, by) <= i64::from(self.highest())).unwrap_or(62);
        let digit = |&x: &i64| (round(x, by) - i64::from(self.lowest)) as u32;
        (integers.iter().map(digit).collect(), power(by as i32 - FRACTION as i32))
    }

    /// The columns of each 16 in the order in which products take them, if it is not theirs.
    pub fn order(&self) -> Option<[u8; BLOCK as usize]> {
        let columns = self.stream.as_ref().map(|s| s.runs.columns);
        columns.filter(|columns| !columns.is_sorted())
    }

    /// The largest integer that digits make.
    pub fn highest(&self) -> i32 {
        let most = match self.stream.as_ref().map(|s| &s.digits) {
            Some(Digits::Bytes { .. }) => 4 * i32::from(u8::MAX),
            Some(Digits::Book(_)) | None => (1 << self.bits) - 1,
        };
        self.lowest + self.times * most
    }

    /// Bytes of the digits, each of which is multiplied on its own.
    pub fn planes(&self) -> u32 {
        self.bits.div_ceil(8)
    }

    /// The expression that says the rests of a row's runs: of the rest, or of the zero, which is a part of it.
    pub fn of_rests(&self) -> Option<&Weight> {
        self.rest.as_ref().or(self.zero.as_ref())
    }

    /// The least and the greatest integer, zeros added.
    pub fn integers(&self) -> (i64, i64) {
        let fields = |zero: &Weight| whole(&zero.ops, &|f| self.fields[f].1.ty);
        let (least, most) = self.zero.as_ref().and_then(fields).unwrap_or_default();
        let lowest = i64::from(self.lowest);
        (lowest + least, i64::from(self.highest()) + most)
    }

    /// True if a launch multiplies one matrix alone: what is done to activations and results, and a table in which kernels look digits up, are a
    /// matrix's own.
    pub fn is_apart(&self) -> bool {
        !self.sides.is_empty() || self.own && self.stream.is_some()
    }

    /// True of integers whose sums over a run need more than 32 bits.
    pub fn is_wide(&self) -> bool {
        self.span > NARROW
    }

    /// True if a matrix of this shape is multiplied so: sums fit 64 bits, numbers for weights counted through the matrix
    /// are those of runs, and a block holds the results that are transformed together.
    pub fn fits(&self, shape: Shape) -> bool {
        let whole = |f: &Field| !matches!(f.cover, Cover::Flat(n) if !shape.cols.is_multiple_of(n));
        let mixed = self.sides.output.hadamard.map_or(0, |n| n.unwrap_or(shape.rows));
        shape.cols <= MOST_COLUMNS && mixed <= MOST_MIXED && self.fields.iter().all(|(_, f)| whole(f))
    }

    /// Bits of the largest weight of a row of `cols` columns, as a multiple of the row's power of two. Integers of more than a byte
    /// leave fewer of 30 to a slope: then it is as many as sums have room for.
    pub fn precision(&self, cols: u32) -> i32 {
        if !self.is_wide() || self.rest.is_some() {
            return PRECISION;
        }
        (SUM - cols.next_power_of_two().trailing_zeros() as i32).min(PRECISION + self.span as i32)
    }

    /// Runs of a row of `cols` columns; the last may be cut short.
    pub fn runs(&self, cols: u32) -> usize {
        self.run.map_or(1, |run| cols.div_ceil(run) as usize)
    }

    /// The numbers of a row of `cols` columns from the slope of each of its runs, and the rest or zero, which [`Terms::of_rests`] says.
    pub fn numbers(&self, cols: u32, slopes: &[f32], rests: &[f32], out: &mut Numbers) {
        out.slopes.clear();
        out.rests.clear();
        if self.run.is_none() {
            out.factor = slopes[0];
            out.slopes.push(1);
            return;
        }
        let span = self.span as i32;
        let of_rests = if self.zero.is_some() { &[] } else { rests };
        let largest = slopes.iter().map(|&x| exponent(x) + span).chain(of_rests.iter().map(|&x| exponent(x)));
        out.grid = (largest.max().unwrap_or(0) + 1 - self.precision(cols)).max(LEAST);
        out.factor = power(out.grid);
        let inverse = power(-out.grid);
        let whole = |x: &f32| (x * inverse).round_ties_even() as i32;
        out.slopes.extend(slopes.iter().map(whole));
        if self.zero.is_some() {
            out.rests.extend(out.slopes.iter().zip(rests).map(|(slope, &zero)| slope * zero as i32));
        } else {
            out.rests.extend(rests.iter().map(whole));
        }
    }
}

/// `integer / 2^by`, rounded to the nearest, halves up.
pub(crate) fn round(integer: i32, by: u32) -> i32 {
    let half = (1i64 << by) >> 1;
    ((i64::from(integer) + half) >> by) as i32
}

/// The exponent of a number's leading bit, or more.
fn exponent(x: f32) -> i32 {
    ((x.to_bits() >> 23 & 0xff) as i32).max(1) - 127
}

/// 2 to the power of `n`, -126 to 127.
fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// What a row's sums are multiplied with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Numbers {
    /// The exponent of the power of two whose multiples slopes and rests are; 0 for slopes of whole rows.
    pub grid: i32,
    /// What the sum is multiplied with at the end.
    pub factor: f32,
    /// One a run.
    pub slopes: Vec<i32>,
    /// One a run, or none.
    pub rests: Vec<i32>,
}

/// The format's weight as a line through the integer of its entry, of which `rounded` bits are left out.
fn line(format: &Format, rounded: u32) -> Result<Line, Inexact> {
    let constant = |c: Rational| vec![WeightOp::Const(c)];
    let rest = format.offset.checked_mul(format.unit).ok_or(Inexact::NoLine)?;
    let unit = format.unit.checked_mul(Rational::from(1i64 << rounded)).ok_or(Inexact::NoLine)?;
    let entry = Line { slope: Some(constant(unit)), rest: (rest != 0.into()).then(|| constant(rest)), zero: None };
    let one = constant(1.into());
    let small = |ops: &Vec<WeightOp>| covers::fraction(ops, &|f| format.fields[f].ty).is_some();
    // A line times a factor. Small integers and fractions beside the entry stay there.
    let times = |line: &Line, by: &dyn Fn(&[WeightOp]) -> Vec<WeightOp>| {
        let of = |ops: &Option<Vec<WeightOp>>| ops.as_deref().map(by);
        let zero = if line.slope.as_ref() == Some(&one) { line.rest.clone().filter(small) } else { line.zero.clone() };
        Line { slope: of(&line.slope), rest: of(&line.rest), zero }
    };
    let mut nodes: Vec<Line> = Vec::new();
    for op in &format.weight.ops {
        let node = match *op {
            WeightOp::Entry => entry.clone(),
            WeightOp::Const(c) => Line { rest: Some(constant(c)), ..Line::default() },
            WeightOp::Field(f) => Line { rest: Some(vec![WeightOp::Field(f)]), ..Line::default() },
            WeightOp::Lookup(table, f) => Line { rest: Some(vec![WeightOp::Lookup(table, f)]), ..Line::default() },
            WeightOp::Neg(a) => {
                let a = &nodes[a];
                Line {
                    slope: a.slope.as_deref().map(negative),
                    rest: a.rest.as_deref().map(negative),
                    zero: a.zero.clone(),
                }
            }
            WeightOp::Binary(op @ (Arithmetic::Add | Arithmetic::Sub), a, b) => {
                let (a, b) = (nodes[a].clone(), nodes[b].clone());
                Line { slope: sum(op, a.slope, b.slope), rest: sum(op, a.rest, b.rest), zero: None }
            }
            WeightOp::Binary(op, a, b) => {
                // One of a product's factors, and what is divided by, has no slope.
                let (a, b) = (&nodes[a], &nodes[b]);
                match (op, a, b) {
                    (_, a, Line { slope: None, rest: Some(b), .. }) => times(a, &|a| join(op, a, b)),
                    (Arithmetic::Mul, Line { slope: None, rest: Some(a), .. }, b) => times(b, &|b| join(op, a, b)),
                    _ => return Err(Inexact::NoLine),
                }
            }
        };
        nodes.push(node);
    }
    // Without a weight the entry is it.
    Ok(nodes.pop().unwrap_or(entry))
}

impl Weight {
    /// The fields that it names beside tables.
    pub fn fields(&self) -> impl Iterator<Item = usize> {
        covers::fields(&self.ops)
    }

    /// The value of an expression of constants, fields and what is looked up, which `leaf` gives, each operation rounded to single
    /// precision.
    pub fn value(&self, leaf: &dyn Fn(&WeightOp) -> f32, nodes: &mut Vec<f32>) -> f32 {
        nodes.clear();
        for op in &self.ops {
            let value = match *op {
                WeightOp::Const(c) => c.to_f32(),
                WeightOp::Entry | WeightOp::Field(_) | WeightOp::Lookup(..) => leaf(op),
                WeightOp::Neg(a) => -nodes[a],
                WeightOp::Binary(op, a, b) => op.apply(nodes[a], nodes[b]),
            };
            nodes.push(value);
        }
        nodes.last().copied().unwrap_or(f32::NAN)
    }
}

/// How a field's numbers are stored again: the narrowest of a few types that holds all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Unsigned bytes.
    U8,
    /// Signed bytes.
    I8,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

impl Kept {
    /// The type for numbers of `ty`.
    pub fn of(ty: Number) -> Kept {
        match ty {
            Number::Unsigned(n) if n <= 8 => Kept::U8,
            Number::Signed(n) if n <= 8 => Kept::I8,
            Number::F16 | Number::E4m3 | Number::E5m2 => Kept::F16,
            Number::Bf16 | Number::E8m0 => Kept::Bf16,
            Number::Unsigned(_) | Number::Signed(_) | Number::F32 => Kept::F32,
        }
    }

    /// Bytes of a number.
    pub fn bytes(self) -> u32 {
        match self {
            Kept::U8 | Kept::I8 => 1,
            Kept::F16 | Kept::Bf16 => 2,
            Kept::F32 => 4,
        }
    }

    /// The bits of `value`, which the type holds.
    pub fn bits(self, value: f32) -> u32 {
        match self {
            Kept::U8 => value as u32,
            Kept::I8 => (value as i32 as u32) & 0xff,
            Kept::F16 => half::f16::from_f32(value).to_bits().into(),
            Kept::Bf16 => half::bf16::from_f32(value).to_bits().into(),
            Kept::F32 => value.to_bits(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats;

    #[test]
    fn formats_become_lines() {
        let of = |name: &str| Terms::of(formats::get(name).unwrap());
        let t = of("gptq_int4_g128").unwrap();
        assert_eq!((t.lowest, t.bits, t.span, t.run), (0, 4, 4, Some(128)));
        assert_eq!(t.slope.ops, [WeightOp::Field(0)]);
        // (e - z) * s
        assert_eq!(t.rest, None);
        assert_eq!(t.integers(), (-16, 15));
        assert_eq!(t.zero.unwrap().ops, [WeightOp::Field(1), WeightOp::Neg(0)]);
        // With a zero of 8 bits, integers of 8 bits still have sums within 32.
        let t = of("gptq_int8_g128").unwrap();
        assert_eq!((t.integers(), t.span, t.is_wide()), ((-256, 255), 8, false));
        let t = of("q8_0").unwrap();
        assert_eq!((t.lowest, t.bits, t.span, t.run, t.rest), (-128, 8, 7, Some(32), None));
        let t = of("q4_k").unwrap();
        assert_eq!((t.bits, t.run, t.fields.len(), t.rest.is_some()), (4, Some(32), 4, true));
        let t = of("q6_k").unwrap();
        assert_eq!((t.lowest, t.bits, t.run), (-32, 6, Some(16)));
        let t = of("int8_channel").unwrap();
        assert_eq!((t.bits, t.run, t.rest), (8, None, None));
        let t = of("mxfp4").unwrap();
        assert_eq!((t.lowest, t.bits, t.run), (-12, 5, Some(32)));
        assert_eq!(of("nvfp4").unwrap().run, Some(16));
        let t = of("fp8_128").unwrap();
        assert_eq!((t.lowest, t.bits, t.span, t.planes(), t.run), (-245_760, 19, 18, 3, Some(128)));
        let t = of("nf4").unwrap();
        assert_eq!((t.rounded, t.lowest, t.bits, t.planes(), t.run), (14, -16_384, 16, 2, Some(64)));
        // Small fields for fewer columns than a run are a part of the integer: 8 · e + 1 - 2 · down.
        let t = of("iq1_m").unwrap();
        assert_eq!((t.lowest, t.bits, t.run, t.near.as_ref().map(|n| n.times)), (-11, 5, Some(16), Some(8)));
        // What is looked up is stored as the number of a run.
        let t = of("nf4_double").unwrap();
        assert_eq!((t.bits, t.run, t.fields.len()), (16, Some(64), 1));
        assert!(matches!(t.fields[0].0, Origin::Value(_)), "{:?}", t.fields);
        assert!(t.fits(Shape { rows: 3, cols: 192 }) && !t.fits(Shape { rows: 3, cols: 96 }));
        let t = of("aqlm_2x8").unwrap();
        assert_eq!((t.own, t.lowest, t.bits, t.run), (true, -32_768, 16, None));
        let t = of("higgs_4").unwrap();
        assert_eq!((t.own, t.run), (true, Some(128)));
        let t = of("iq3_xxs").unwrap();
        assert_eq!((t.lowest, t.bits, t.run), (-63, 7, Some(32)));
        // What a window gives depends on as few bits as these.
        let book = |name: &str| match of(name).unwrap().stream.map(|s| (s.step, s.vector, s.digits)) {
            Some((step, vector, Digits::Book(book))) => Some((step, vector, book.first, book.bits)),
            Some((.., Digits::Bytes { .. })) | None => None,
        };
        assert_eq!(book("qtip_hyb_3"), Some((6, 2, 6, 10)));
        assert_eq!(book("qpalette_tcq_1.5"), Some((3, 2, 6, 10)));
        assert_eq!(book("qpalette_tcq_5"), Some((10, 2, 4, 12)));
        assert_eq!(book("exl3_mcg_3"), Some((3, 1, 0, 16)));
        assert_eq!(book("aqlm_2x8"), Some((16, 8, 0, 16)));
        assert_eq!(book("higgs_4"), Some((8, 2, 0, 8)));
        assert_eq!(book("qtip_3inst_3"), Some((3, 1, 0, 16)));
        assert_eq!(["qtip_1mad_2", "e8p", "exl3_mul1_2"].map(book), [None; 3]);
        let t = of("qtip_1mad_2").unwrap();
        let runs = t.stream.map(|s| (s.runs.shared, s.runs.hop, s.runs.turn, s.runs.places[0]));
        assert_eq!((runs, t.times, t.lowest), (Some((true, 30, 0, (1, 3))), 1, -510));
        // A transform of all results is one of as many as a block has room for.
        let t = of("e8p").unwrap();
        assert!(t.fits(Shape { rows: 1 << 14, cols: 4096 }) && !t.fits(Shape { rows: 1 << 15, cols: 4096 }));
        let exact = formats::names().into_iter().filter(|n| of(n).is_ok()).count();
        assert_eq!((exact, formats::names().len()), (107, 107));
    }

    #[test]
    fn what_cannot_be_exact_says_why() {
        let why = |text: &str| {
            let library = crate::spec::load_str("test", text).unwrap_or_else(|e| panic!("{e}"));
            Terms::of(&library.formats[0]).unwrap_err().to_string()
        };
        let code = "bits 4 values i8 decode w { [w] }";
        assert_eq!(
            why(&format!("quantizer q {{ {code} field s : f16 per 1 x 8 weight e {{ e * s }} }}")),
            "`s` is for 1 x 8: runs are of 16, 32, 64 or 128 columns"
        );
        assert_eq!(
            why(&format!(
                "quantizer q {{ {code} field s : f16 per row input signs(seed = 1), hadamard weight e {{ e * s }} }}"
            )),
            "its activations or results are transformed, and not by a field and one transform, of up to 16384 results"
        );
    }

    #[test]
    fn integers_of_a_matrix_have_a_power_of_two_of_its_own() {
        let t = Terms::of(formats::get("aqlm_2x8").unwrap()).unwrap();
        // In multiples of 2^-24.
        assert_eq!(t.own_book(&[0, 32_767, -32_767]), (vec![32_768, 65_535, 1], 2f32.powi(-24)));
        assert_eq!(t.own_book(&[0, 32_766, -32_768]), (vec![32_768, 49_151, 16_384], 2f32.powi(-23)));
        assert_eq!(
            t.own_book(&[5 << 24, -3 << 24, 3]),
            (vec![32_768 + 20_480, 32_768 - 12_288, 32_768], 2f32.powi(-12))
        );
        assert_eq!(t.own_book(&[65_535]), (vec![32_768 + 16_384], 2f32.powi(-22)));
        assert_eq!(t.own_book(&[0]).0, [32_768]);
    }

    #[test]
    fn numbers_have_thirty_bits_with_the_largest_integer() {
        let t = Terms::of(formats::get("gptq_int4_g128").unwrap()).unwrap();
        let mut n = Numbers::default();
        t.numbers(4096, &[0.5, -0.25, 0.0], &[-6.0, 0.0, -16.0], &mut n);
        // 0.5 · 16 = 8 = 2^3: a number below 2^4 is below 2^30 times 2^-26.
        assert_eq!((n.grid, n.factor), (-26, 2f32.powi(-26)));
        assert_eq!(n.slopes, [1 << 25, -(1 << 24), 0]);
        assert_eq!(n.rests, [-(3 << 26), 0, 0]);
        // A zero multiplies the slope as it was rounded.
        t.numbers(4096, &[1.0, 1.0000001 * 2f32.powi(-20)], &[0.0, -3.0], &mut n);
        assert_eq!((n.grid, n.slopes[1], n.rests[1]), (-25, 1 << 5, -3 << 5));
        let t = Terms::of(formats::get("q4_1").unwrap()).unwrap();
        t.numbers(4096, &[0.5, -0.25, 0.0], &[-3.0, 0.0, 7.75], &mut n);
        assert_eq!((n.grid, n.factor), (-26, 2f32.powi(-26)));
        assert_eq!(n.slopes, [1 << 25, -(1 << 24), 0]);
        assert_eq!(n.rests, [-(3 << 26), 0, 31 << 24]);
        t.numbers(4096, &[0.0], &[0.0], &mut n);
        assert_eq!((n.grid, &n.slopes[..], &n.rests[..]), (LEAST, &[0][..], &[0][..]));
        // Nothing leaves 32 bits, whatever the fields are.
        t.numbers(4096, &[f32::MAX, f32::MIN_POSITIVE], &[f32::MIN, 1e-45], &mut n);
        assert!(n.slopes.iter().chain(&n.rests).all(|x| x.unsigned_abs() <= 1 << 30), "{n:?}");
        // Integers of 16 bits leave a slope 20 of what 4096 columns leave of 47.
        let t = Terms::of(formats::get("nf4").unwrap()).unwrap();
        t.numbers(4096, &[0.5, 0.25], &[], &mut n);
        assert_eq!((n.grid, &n.slopes[..]), (14 - 35, &[1 << 20, 1 << 19][..]));
        let t = Terms::of(formats::get("int8_channel").unwrap()).unwrap();
        t.numbers(4096, &[0.3], &[], &mut n);
        assert_eq!((n.factor, &n.slopes[..], n.rests.len()), (0.3, &[1][..], 0));
    }
}

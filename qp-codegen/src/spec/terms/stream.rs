//! Codes with memory as kernels take them: which lane of a warp has which weights of a block's stream, and how an integer
//! follows from its window.

use super::Inexact;
use crate::spec::expr::{Decode, Node, Op, Room, Type};
use crate::spec::format::{Format, Trellis};

/// Weights of a run: neighbours in a stream that one lane has.
pub const RUN: u32 = 8;
/// Rows and columns of a block.
pub const BLOCK: u32 = 16;
/// Lanes of a warp.
const LANES: usize = 32;
/// Most bits of a window that entries are looked up by.
const LOOKED_UP: u32 = 16;
/// Most bits of what is looked up.
const WIDTH: u32 = 16;
/// The part of a number, one in so many, by which rounding it to half precision changes it at most.
const HALF: u64 = 1 << 11;

/// How integers lie in streams and follow from windows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// Bits of a window.
    pub window: u32,
    /// Bits that it moves forward; bytes of a run.
    pub step: u32,
    /// What an integer's digits are.
    pub digits: Digits,
    /// Who has which weights.
    pub runs: Runs,
}

/// What the digits of an integer are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Digits {
    /// The sum of the four bytes of a word that the decode expression computes: these bytes are multiplied, not their sum.
    Bytes {
        /// The expression.
        decode: Decode,
        /// The word.
        word: Node,
    },
    /// What stands in a table at the place that the window is.
    Book(Vec<u16>),
}

/// How a block's stream is shared among the lanes of a warp: as runs, each with four weights of a row and four of the row
/// eight below, as operands of tensor-core products have them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Runs {
    /// The lane of each run.
    pub lanes: Vec<u32>,
    /// The lane of the run that follows, from the lane of a run on, modulo 32.
    pub hop: u32,
    /// Of each weight of a run: 1 if it is in the lower row, and which of the four.
    pub places: [(u32, u32); RUN as usize],
    /// The columns of a block, four of each quad of lanes.
    pub columns: [u8; BLOCK as usize],
}

impl Runs {
    /// Those of a trellis, if its order allows it.
    fn of(trellis: &Trellis) -> Option<Runs> {
        if (trellis.block.rows, trellis.block.cols) != (BLOCK, BLOCK) {
            return None;
        }
        let order = trellis.places().ok()?;
        let runs: Vec<&[(u32, u32)]> = order.chunks_exact(RUN as usize).collect();
        // Of each run its first row, and its columns, which both rows have.
        let mut heads: Vec<(u32, [u32; 4])> = Vec::new();
        for run in &runs {
            let row = run[0].0 % 8;
            let columns = |half: u32| {
                let mut all: Vec<u32> = run.iter().filter(|p| p.0 == row + 8 * half).map(|p| p.1).collect();
                all.sort_unstable();
                <[u32; 4]>::try_from(all).ok()
            };
            let of_row = columns(0)?;
            (columns(1) == Some(of_row)).then(|| heads.push((row, of_row)))?;
        }
        let quads = |row: u32| {
            let mut all: Vec<[u32; 4]> = heads.iter().filter(|h| h.0 == row).map(|h| h.1).collect();
            all.sort_unstable();
            all
        };
        let first = quads(0);
        if first.len() != 4 || (1..8).any(|row| quads(row) != first) {
            return None;
        }
        let lane =
            |(row, columns): &(u32, [u32; 4])| 4 * row + first.iter().position(|q| q == columns).unwrap_or(0) as u32;
        let lanes: Vec<u32> = heads.iter().map(lane).collect();
        let places = |run: usize| {
            let place = |p: &(u32, u32)| (p.0 / 8, heads[run].1.iter().position(|c| *c == p.1).unwrap_or(0) as u32);
            runs[run].iter().map(place).collect::<Vec<_>>()
        };
        let hop = |run: usize| (lanes[(run + 1) % LANES] + LANES as u32 - lanes[run]) % LANES as u32;
        let alike = (1..LANES).all(|run| places(run) == places(0) && hop(run) == hop(0));
        let columns: Vec<u8> = first.iter().flatten().map(|c| *c as u8).collect();
        alike.then_some(Runs {
            hop: hop(0),
            places: places(0).try_into().ok()?,
            columns: columns.try_into().ok()?,
            lanes,
        })
    }
}

/// Integers as lines through their digits.
pub(super) struct Line {
    pub(super) stream: Stream,
    /// An integer is so many times its digits plus the smallest.
    pub(super) times: i32,
    pub(super) lowest: i32,
    pub(super) highest: i32,
    /// Bits of digits.
    pub(super) bits: u32,
}

impl Line {
    /// Those of a format whose codes have memory.
    pub(super) fn of(format: &Format, trellis: &Trellis) -> Result<Line, Inexact> {
        if format.vector != 1 {
            return Err(Inexact::Memory("a step gives several weights"));
        }
        let runs = Runs::of(trellis).ok_or(Inexact::Memory("lanes do not find their weights side by side"))?;
        let (window, step) = (format.window, trellis.step);
        let stream = |digits| Stream { window, step, digits, runs: runs.clone() };
        let integers = integers(format);
        for node in (0..format.decode.nodes.len() as u32).map(Node) {
            let Op::ByteSum(word) = *format.decode.op(node) else { continue };
            if let Some((times, lowest, highest)) = line(&integers, &words(format, node)) {
                let (last, decode) = (word.0 as usize + 1, &format.decode.nodes);
                let decode = Decode { nodes: decode[..last].to_vec() };
                let bits = u32::BITS - (4 * u32::from(u8::MAX)).leading_zeros();
                return Ok(Line { stream: stream(Digits::Bytes { decode, word }), times, lowest, highest, bits });
            }
        }
        let (lowest, highest) = integers.iter().fold((i32::MAX, i32::MIN), |(l, h), &i| (l.min(i), h.max(i)));
        let bits = u32::BITS - highest.abs_diff(lowest).max(1).leading_zeros();
        if window > LOOKED_UP || bits > WIDTH {
            return Err(Inexact::Memory("its entries are too many, or too wide, for a table"));
        }
        let book = integers.iter().map(|i| i.abs_diff(lowest) as u16).collect();
        Ok(Line { stream: stream(Digits::Book(book)), times: 1, lowest, highest, bits })
    }
}

impl Stream {
    /// The digits of every window.
    pub fn book(&self) -> Vec<u16> {
        match &self.digits {
            Digits::Book(book) => book.clone(),
            Digits::Bytes { decode, word } => {
                let mut room = Room::default();
                let bytes = |w| decode.word(w, *word, &mut room).to_le_bytes();
                (0..1u32 << self.window).map(bytes).map(|b| b.iter().map(|b| u16::from(*b)).sum()).collect()
            }
        }
    }

    /// Bytes behind a run that its windows reach.
    pub fn beyond(&self) -> u32 {
        (self.window - self.step).div_ceil(8)
    }
}

/// The integer of each window.
fn integers(format: &Format) -> Vec<i32> {
    let (mut out, mut room) = ([0], Room::default());
    let mut integer = |w| {
        format.integers(w, &[], &mut room, &mut out);
        // The integers of a checked format are of its entries' type.
        out[0] as i32
    };
    (0..1u32 << format.window).map(&mut integer).collect()
}

/// The value of a word of the decode expression for each window; none if the expression looks something up before.
fn words(format: &Format, node: Node) -> Vec<u32> {
    let nodes = &format.decode.nodes[..=node.0 as usize];
    if nodes.iter().any(|op| op.ty() == Type::Vector) {
        return Vec::new();
    }
    let (decode, mut room) = (Decode { nodes: nodes.to_vec() }, Room::default());
    (0..1u32 << format.window).map(|w| decode.word(w, node, &mut room)).collect()
}

/// Slope, smallest and largest value of the line through sums that the integers are: exactly, or before they were rounded to
/// half precision.
fn line(integers: &[i32], sums: &[u32]) -> Option<(i32, i32, i32)> {
    let mut of_sum: Vec<Option<i32>> = vec![None; 4 * usize::from(u8::MAX) + 1];
    for (&integer, &sum) in integers.iter().zip(sums) {
        let known = of_sum.get_mut(sum as usize)?.get_or_insert(integer);
        (*known == integer).then_some(())?;
    }
    // Next to 0 nothing is rounded.
    let size = |s: &usize| Some(of_sum[*s]?.unsigned_abs() + of_sum[s + 1]?.unsigned_abs());
    let at = (0..of_sum.len() - 1).filter(|s| size(s).is_some()).min_by_key(size)?;
    let (here, next) = (i64::from(of_sum[at]?), i64::from(of_sum[at + 1]?));
    let times = next - here;
    let value = |s: usize| here + times * (s as i64 - at as i64);
    let near = |(s, integer): (usize, &Option<i32>)| {
        integer.is_none_or(|i| value(s).abs_diff(i.into()) * HALF <= u64::from(i.unsigned_abs()))
    };
    let (first, last) = (value(0), value(of_sum.len() - 1));
    let fits = times > 0 && of_sum.iter().enumerate().all(near);
    Some((times.try_into().ok()?, first.try_into().ok()?, last.try_into().ok()?)).filter(|_| fits)
}

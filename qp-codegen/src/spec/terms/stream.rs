//! Codes with memory as kernels take them: which lane of a warp has which weights of a block's stream, and how an integer
//! follows from its window.

use super::range;
use crate::spec::expr::{Decode, Node, Op, Room, Type};
use crate::spec::format::{Format, Trellis};
use crate::spec::mask;

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
    /// Bits that it moves forward; as many for codes without memory.
    pub step: u32,
    /// Weights of a window.
    pub vector: u32,
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
    /// What stands in a table.
    Book(Book),
}

/// A table of digits, in which the digits of a window's weights lie side by side, at the place that some bits of a word of the decode
/// expression are: those bits, of the word that has fewest, on which the window's weights depend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Book {
    /// The expression.
    pub decode: Decode,
    /// The word.
    pub word: Node,
    /// The first of its bits.
    pub first: u32,
    /// How many there are.
    pub bits: u32,
    /// The digits; none where they are the matrix's own.
    pub digits: Option<Vec<u16>>,
}

impl Book {
    /// Without digits.
    fn of(format: &Format) -> Book {
        let entries = |table: u32| match format.tables.get(table as usize) {
            Some(table) => table.entries,
            None => format.fields[format.numbers[table as usize - format.tables.len()]].entries.unwrap_or(1),
        };
        let place = |word: Node| {
            let needed = format.decode.needed(Some(word), u32::BITS, &entries);
            let outside = |n: u32| matches!(format.decode.op(Node(n)), Op::Window) && needed[n as usize] != 0;
            let others = (0..needed.len() as u32).any(|n| n != word.0 && outside(n));
            let all = needed[word.0 as usize]
                & if format.decode.op(word) == &Op::Window { mask(format.window) } else { u32::MAX };
            (!others && all != 0)
                .then(|| (all.trailing_zeros(), u32::BITS - all.leading_zeros() - all.trailing_zeros(), word))
        };
        let words = (0..format.decode.nodes.len() as u32).map(Node).filter(|n| format.decode.op(*n).ty() == Type::Word);
        // The window itself has no operations, and comes first.
        let (first, bits, word) = words.filter_map(place).min_by_key(|p| p.1).unwrap_or((0, format.window, Node(0)));
        let decode = Decode { nodes: format.decode.nodes[..=word.0 as usize].to_vec() };
        Book { decode, word, first, bits, digits: None }
    }

    /// The table, from the digits of all windows, `vector` of each.
    pub fn filled(&self, vector: u32, windows: &[u16]) -> Vec<u16> {
        let (v, mut room) = (vector as usize, Room::default());
        let mut out = vec![0; v << self.bits];
        for (window, digits) in (0..).zip(windows.chunks_exact(v)) {
            out[self.place(window, &mut room) * v..][..v].copy_from_slice(digits);
        }
        out
    }

    /// The place of a window.
    fn place(&self, window: u32, room: &mut Room) -> usize {
        (self.decode.word(window, self.word, room) >> self.first & mask(self.bits)) as usize
    }
}

/// How a block's weights are shared among the lanes of a warp: as runs, each with four weights of a row and four of the row
/// eight below, as operands of tensor-core products have them; or as runs of eight weights of a row, which two lanes share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Runs {
    /// The lane of each run of a block's stream; none for codes without memory.
    pub lanes: Vec<u32>,
    /// The lane of the run that follows, from the lane of a run on, modulo 32.
    pub hop: u32,
    /// Of each weight of a run: 1 if it is in the lower row, and which of the four. Of runs that two lanes share: 1 if the odd lane has it.
    pub places: [(u32, u32); RUN as usize],
    /// The columns of a block, four of each quad of lanes.
    pub columns: [u8; BLOCK as usize],
    /// Whether two lanes share runs: the even one has that of the upper row, the odd one that of the lower.
    pub shared: bool,
    /// Of these, the even lane behind whose runs, of either row, those of the other row follow.
    pub turn: u32,
}

impl Runs {
    /// Those of codes without memory, whose weights are neighbours in a row.
    fn of_codes(vector: u32) -> Runs {
        let places = std::array::from_fn(|w| (w as u32 / 4, w as u32 % 4));
        let columns = std::array::from_fn(|c| c as u8);
        Runs { lanes: Vec::new(), hop: 0, places, columns, shared: vector == RUN, turn: 0 }
    }

    /// Those of a trellis, if its order allows it.
    fn of(trellis: &Trellis) -> Option<Runs> {
        if (trellis.block.rows, trellis.block.cols) != (BLOCK, BLOCK) {
            return None;
        }
        let order = trellis.places().ok()?;
        let runs: Vec<&[(u32, u32)]> = order.chunks_exact(RUN as usize).collect();
        Runs::of_lanes(&runs).or_else(|| Runs::of_rows(&runs))
    }

    /// Those of runs of eight weights of a row.
    fn of_rows(runs: &[&[(u32, u32)]]) -> Option<Runs> {
        let columns = |run: &[(u32, u32)]| {
            let mut all: Vec<u32> = run.iter().map(|p| p.1).collect();
            all.sort_unstable();
            all
        };
        // The run's two halves of columns, in the first row.
        let mut sets: Vec<Vec<u32>> = runs.iter().filter(|run| run[0].0 == 0).map(|run| columns(run)).collect();
        sets.sort_unstable();
        let one_row = runs.iter().all(|run| run.iter().all(|p| p.0 == run[0].0));
        if !one_row || sets.len() != 2 {
            return None;
        }
        let set = |run: &[(u32, u32)]| sets.iter().position(|set| *set == columns(run));
        let lane = |run: &&[(u32, u32)]| Some(run[0].0 % 8 * 4 + set(run)? as u32 * 2 + run[0].0 / 8);
        let lanes: Vec<u32> = runs.iter().map(lane).collect::<Option<_>>()?;
        let places = |run: usize| -> Option<Vec<(u32, u32)>> {
            let set = &sets[set(runs[run])?];
            let place = |p: &(u32, u32)| set.iter().position(|c| *c == p.1).map(|at| (at as u32 / 4, at as u32 % 4));
            runs[run].iter().map(place).collect()
        };
        let places: [(u32, u32); RUN as usize] =
            (0..LANES).map(places).reduce(|a, b| if a == b { a } else { None })??.try_into().ok()?;
        // Each lane has four neighbours of the stream, in one order.
        let half = RUN as usize / 2;
        let alike = (0..half).all(|w| places[w].0 == places[0].0 && places[w + half] == (1 - places[0].0, places[w].1));
        let next = |run: usize| (lanes[run], lanes[(run + 1) % LANES]);
        let even = |lane: u32| lane & !1;
        let hop = |run: usize| (even(next(run).1) + LANES as u32 - even(next(run).0)) % LANES as u32;
        let turns: Vec<u32> =
            (0..LANES).filter(|&run| (next(run).0 ^ next(run).1) & 1 == 1).map(|run| even(lanes[run])).collect();
        let [turn, other] = turns[..] else { return None };
        let fits = alike && turn == other && (1..LANES).all(|run| hop(run) == hop(0));
        let columns: Vec<u8> = sets.iter().flatten().map(|c| *c as u8).collect();
        fits.then_some(Runs { hop: hop(0), places, columns: columns.try_into().ok()?, lanes, shared: true, turn })
    }

    /// Those of runs of four weights of a row and four of the row eight below.
    fn of_lanes(runs: &[&[(u32, u32)]]) -> Option<Runs> {
        // Of each run its first row, and its columns, which both rows have.
        let mut heads: Vec<(u32, [u32; 4])> = Vec::new();
        for run in runs {
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
            shared: false,
            turn: 0,
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
    /// Those of a format whose codes have memory, or look up tables of the matrix; none where lanes do not find their weights side by side,
    /// or digits are too many, or too wide, for a table.
    pub(super) fn of(format: &Format) -> Option<Line> {
        let (window, vector) = (format.window, format.vector);
        let (step, runs) = match &format.trellis {
            Some(trellis) if matches!(vector, 1 | 2 | 4) => (trellis.step, Runs::of(trellis)?),
            None if !format.numbers.is_empty() && matches!((vector, window % 8), (2 | 4 | 8, 0)) => {
                (window, Runs::of_codes(vector))
            }
            _ => return None,
        };
        if window > LOOKED_UP || !(RUN / vector * step).is_multiple_of(4) {
            return None;
        }
        // Two lanes find the windows of theirs in one word each.
        if runs.shared && vector != RUN && (vector != 1 || 3 * step + window > 32 || window - step > RUN * step) {
            return None;
        }
        let stream = |digits| Stream { window, step, vector, digits, runs: runs.clone() };
        let (lowest, highest) = range::of(format).ok()?;
        let bits = u32::BITS - highest.abs_diff(lowest).max(1).leading_zeros();
        let mut book = Book::of(format);
        if format.numbers.is_empty() {
            let integers = integers(format);
            if vector == 1
                && let Some(line) = Line::of_bytes(format, &integers, &stream)
            {
                return Some(line);
            }
            let digits: Vec<u16> = integers.iter().map(|i| i.abs_diff(lowest) as u16).collect();
            book.digits = Some(book.filled(vector, &digits));
        }
        (bits <= WIDTH).then(|| Line { stream: stream(Digits::Book(book)), times: 1, lowest, highest, bits })
    }

    /// Those of integers that are a line through the sum of four bytes.
    fn of_bytes(format: &Format, integers: &[i32], stream: &dyn Fn(Digits) -> Stream) -> Option<Line> {
        (0..format.decode.nodes.len() as u32).map(Node).find_map(|node| {
            let Op::ByteSum(word) = *format.decode.op(node) else { return None };
            let (times, lowest, highest) = line(integers, &words(format, node))?;
            let (last, decode) = (word.0 as usize + 1, &format.decode.nodes);
            let decode = Decode { nodes: decode[..last].to_vec() };
            let bits = u32::BITS - (4 * u32::from(u8::MAX)).leading_zeros();
            Some(Line { stream: stream(Digits::Bytes { decode, word }), times, lowest, highest, bits })
        })
    }
}

impl Stream {
    /// The digits of every window's weights; none where they are the matrix's own.
    pub fn book(&self) -> Vec<u16> {
        let mut room = Room::default();
        match &self.digits {
            Digits::Book(book) => {
                let Some(digits) = &book.digits else { return Vec::new() };
                let v = self.vector as usize;
                let of = |w| book.place(w, &mut room) * v;
                (0..1u32 << self.window).map(of).flat_map(|at| digits[at..at + v].iter().copied()).collect()
            }
            Digits::Bytes { decode, word } => {
                let bytes = |w| decode.word(w, *word, &mut room).to_le_bytes();
                (0..1u32 << self.window).map(bytes).map(|b| b.iter().map(|b| u16::from(*b)).sum()).collect()
            }
        }
    }

    /// Windows of a run.
    pub fn steps(&self) -> u32 {
        RUN / self.vector
    }

    /// Bits of a run.
    pub fn run_bits(&self) -> u32 {
        self.steps() * self.step
    }

    /// Bits behind a run that its windows reach.
    pub fn beyond(&self) -> u32 {
        self.window - self.step
    }
}

/// The integers of each window's weights.
fn integers(format: &Format) -> Vec<i32> {
    let (v, mut room) = (format.vector as usize, Room::default());
    let mut out = vec![0; v << format.window];
    for (w, out) in (0..).zip(out.chunks_exact_mut(v)) {
        format.integers(w, &[], &mut room, out);
    }
    // The integers of a checked format are of its entries' type.
    out.into_iter().map(|i| i as i32).collect()
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

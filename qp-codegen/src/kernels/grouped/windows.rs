//! From a lane's words of a tile of streams to windows, and to what is multiplied of them.
//!
//! A run's bytes and those behind it, which other lanes have, are put side by side in **views** of four bytes, so that each of its
//! windows lies in one of them.

use super::layout::RunBits;
use crate::ir::{Builder, Cache, Elem, Mem, Scalar, V};
use crate::kernels::decode::word_of;
use crate::spec::expr::{Decode, Node, Op};
use crate::spec::mask;
use crate::spec::terms::{BLOCK, Digits, RUN, Stream, TILE};

/// Runs of a lane in a tile.
pub(super) const RUNS: u32 = TILE / BLOCK;

/// Where the table of digits is looked up.
#[derive(Clone, Copy)]
pub(super) enum Book {
    /// In an array of its own in shared memory.
    Shared(Mem),
    /// Where it is stored, in global memory, through the caches.
    Global {
        /// The matrix' numbers.
        mem: Mem,
        /// The table's first word there.
        first: u32,
    },
}

impl Book {
    /// The digits at a place, side by side: of one, two or four weights, of which a word holds two.
    fn digits<'b>(self, b: &'b Builder, place: V<'b>, count: u32) -> Vec<V<'b>> {
        let place = place.bits(Scalar::I32);
        let (elem, width) = if count == 1 { (Elem::U16, 1) } else { (Elem::U32, count / 2) };
        let at = if width == 1 { place } else { place * width };
        let words = match self {
            Book::Shared(mem) => b.load_as(mem, at, elem, width, Cache::Default),
            Book::Global { mem, first } => {
                b.load_as(mem, at + first * (4 / elem.bytes()), elem, width, Cache::ReadOnly)
            }
        };
        if width == 1 { vec![words] } else { (0..width).map(|i| words.lane(i)).collect() }
    }
}

/// Windows of a tile.
pub(super) struct Windows<'b, 'a> {
    b: &'b Builder,
    stream: &'a Stream,
    bits: RunBits,
    lane: V<'b>,
    book: Option<Book>,
}

impl<'b, 'a> Windows<'b, 'a> {
    pub(super) fn new(b: &'b Builder, stream: &'a Stream, bits: RunBits, lane: V<'b>, book: Option<Book>) -> Self {
        Windows { b, stream, bits, lane, book }
    }

    /// The words whose bytes are multiplied, as registers of products of 8 columns.
    pub(super) fn words(&self, decode: &Decode, word: Node, tile: &[V<'b>]) -> Vec<V<'b>> {
        let mut out = vec![None; (RUNS * RUN) as usize];
        for (run, windows) in (0..).zip(self.of_tile(tile)) {
            for (window, (half, column)) in windows.into_iter().zip(self.stream.runs.places) {
                let register = 4 * (2 * run + column / 2) + half + 2 * (column % 2);
                out[register as usize] = Some(self.computed(decode, word, window));
            }
        }
        out.into_iter().map(|v| v.expect("a run has all places")).collect()
    }

    /// The registers of digits, by plane.
    pub(super) fn digits(&self, planes: u32, tile: &[V<'b>]) -> Vec<Vec<V<'b>>> {
        let mut out = vec![Vec::new(); planes as usize];
        // Of four weights each the word of its digits, and which half of it they are.
        let mut put = |four: [(V<'b>, u32); 4]| {
            let selectors;
            let [first, second] = match four {
                [(a, 0), (b, 1), (c, 0), (d, 1)] if (a.val, c.val) == (b.val, d.val) => {
                    selectors = [0x6420, 0x7531];
                    [a, c]
                }
                _ => {
                    selectors = [0x5410, 0x7632];
                    [0, 2].map(|i| {
                        let ((a, first), (b, second)) = (four[i], four[i + 1]);
                        // Low bytes, then high ones.
                        let two = (2 * first) | ((4 + 2 * second) << 4);
                        a.permute(b, two | ((two + 0x11) << 8))
                    })
                }
            };
            out.iter_mut().zip(selectors).for_each(|(out, selector)| out.push(first.permute(second, selector)));
        };
        if self.stream.vector == RUN {
            for rows in self.of_two_rows(tile) {
                for window in rows {
                    let digits = self.digit(window);
                    put([0, 1, 2, 3].map(|i| (digits[i / 2], i as u32 % 2)));
                }
            }
            return out;
        }
        for windows in self.of_tile(tile) {
            let digits: Vec<Vec<V<'b>>> = windows.into_iter().map(|window| self.digit(window)).collect();
            for half in 0..2 {
                put([0, 1, 2, 3].map(|column| {
                    let at = self.stream.runs.places.iter().position(|p| *p == (half, column));
                    let at = at.expect("a run has all places");
                    let (step, k) = (at / self.stream.vector as usize, at % self.stream.vector as usize);
                    (digits[step][k / 2], k as u32 % 2)
                }));
            }
        }
        out
    }

    /// Of codes for eight weights of a row, which two lanes share, the codes of a lane's two rows in each run: it has one of them.
    fn of_two_rows(&self, tile: &[V<'b>]) -> Vec<[V<'b>; 2]> {
        let odd = (self.lane & 1).eq(1);
        let other: Vec<V<'b>> = tile.iter().map(|word| word.shuffle_xor(1)).collect();
        let pairs = || tile.iter().zip(&other);
        let upper: Vec<V<'b>> = pairs().map(|(&own, &other)| odd.select(other, own)).collect();
        let lower: Vec<V<'b>> = pairs().map(|(&own, &other)| odd.select(own, other)).collect();
        let [upper, lower] = [upper, lower].map(|words| self.of_tile(&words));
        upper.into_iter().zip(lower).map(|(upper, lower)| [upper[0], lower[0]]).collect()
    }

    /// The digits of a window's weights, side by side; of one of eight weights, those of the lane's four.
    fn digit(&self, window: V<'b>) -> Vec<V<'b>> {
        let b = self.b;
        match &self.stream.digits {
            Digits::Bytes { decode, word } => {
                // The product takes signed bytes: flip the top bits (each byte less 128), add 4·128.
                let flipped = self.computed(decode, *word, window) ^ 0x8080_8080_u32;
                vec![flipped.dot4(b.u32(0x0101_0101), b.i32(512)).bits(Scalar::U32)]
            }
            Digits::Book(table) => {
                let word = self.computed(&table.decode, table.word, window);
                let whole =
                    table.decode.op(table.word) == &Op::Window && (table.first, table.bits) == (0, self.stream.window);
                let place = if whole { word } else { self.bits_of(word, table.first, table.bits) };
                let book = self.book.expect("declared where it is looked up");
                if self.stream.vector == RUN {
                    return book.digits(b, place * 2_u32 + (self.lane & 1).bits(Scalar::U32), RUN / 2);
                }
                book.digits(b, place, self.stream.vector)
            }
        }
    }

    /// A word of the decode expression.
    fn computed(&self, decode: &Decode, word: Node, window: V<'b>) -> V<'b> {
        if let Op::Window = decode.op(word) {
            return window;
        }
        word_of(self.b, decode, word, &mut |n| self.computed(decode, n, window))
    }

    /// The windows of each run of a lane's tile.
    fn of_tile(&self, tile: &[V<'b>]) -> Vec<Vec<V<'b>>> {
        let RunBits { all, first } = self.bits;
        // The first bits of the runs behind, of as many lanes as windows reach.
        let lanes = self.stream.beyond().div_ceil(all);
        let firsts = &tile[..(RUNS * first / 32) as usize];
        let behind: Vec<Vec<V<'b>>> = (1..=lanes)
            .map(|n| {
                let lane = (self.lane + n * self.stream.runs.hop % 32) & 31;
                firsts.iter().map(|word| word.shuffle(lane)).collect()
            })
            .collect();
        let words = |lane: u32| if lane == 0 { tile } else { &behind[lane as usize - 1] };
        let run = |run: u32| {
            let byte = |at: u32| {
                let place = self.bits.place(run, 8 * at % all);
                (words(8 * at / all)[(place / 32) as usize], place % 32 / 8)
            };
            let mut view: Option<(u32, V<'b>)> = None;
            let window = |step: u32| {
                let begin = step * self.stream.step;
                let end = begin + self.stream.window;
                let (from, word) = match view {
                    Some((from, word)) if end <= from + 32 => (from, word),
                    _ if all.is_multiple_of(8) => {
                        let from = begin / 8;
                        let last = all / 8 + self.stream.beyond().div_ceil(8);
                        (from * 8, gathered(&(from..last.min(from + 4)).map(byte).collect::<Vec<_>>()))
                    }
                    _ => (begin, self.joined(run, begin, &words)),
                };
                view = Some((from, word));
                self.bits_of(word, begin - from, self.stream.window)
            };
            (0..self.stream.steps()).map(window).collect()
        };
        (0..RUNS).map(run).collect()
    }

    /// A view of a run that is no whole bytes, from bit `from` on: pieces of this lane's words and of those behind, `words`, shifted to
    /// their places.
    fn joined<'w>(&self, run: u32, from: u32, words: &dyn Fn(u32) -> &'w [V<'b>]) -> V<'b>
    where
        'b: 'w,
    {
        let all = self.bits.all;
        let end = (from + 32).min(all + self.stream.beyond());
        let (mut at, mut out): (u32, Option<V<'b>>) = (from, None);
        while at < end {
            let (words, first) = (words(at / all), self.bits.place(run, at % all));
            // To the end of the run, the word or the view.
            let bits = (all - at % all).min(32 - first % 32).min(end - at);
            let word = words[(first / 32) as usize];
            let piece = match (first % 32, bits) {
                (0, 32) => word,
                (first, bits) if first + bits == 32 => word >> first,
                (first, bits) => (word >> first) & mask(bits),
            };
            let moved = if at == from { piece } else { piece << (at - from) };
            out = Some(out.map_or(moved, |out| out | moved));
            at += bits;
        }
        out.expect("a view has bits")
    }

    /// So many bits of a word from bit `at` on.
    fn bits_of(&self, word: V<'b>, at: u32, bits: u32) -> V<'b> {
        let above = 32 - at - bits;
        match (at, above) {
            (0, 0) => word,
            (0, _) => word & mask(bits),
            (_, 0) => word >> at,
            // The product is not of the pipe that is full first, as a mask would be.
            _ => (word * (1_u32 << above)) >> (32 - bits),
        }
    }
}

/// Up to four bytes of words, side by side.
fn gathered<'b>(bytes: &[(V<'b>, u32)]) -> V<'b> {
    let mut words: Vec<V<'b>> = Vec::new();
    for (word, _) in bytes {
        if words.iter().all(|w| w.val != word.val) {
            words.push(*word);
        }
    }
    if words.len() == 1 && (0..).zip(bytes).all(|(i, b)| b.1 == i) {
        return words[0];
    }
    let mut out = words[0];
    let others = if words.len() == 1 { &words[..] } else { &words[1..] };
    for (n, other) in others.iter().enumerate() {
        let nibble = |(i, (word, byte)): (u32, &(V<'b>, u32))| {
            let byte = match word.val {
                v if v == other.val => 4 + byte,
                v if n == 0 && v == words[0].val => *byte,
                // In its place already, or not there yet.
                _ => i,
            };
            byte << (4 * i)
        };
        out = out.permute(*other, (0..).zip(bytes).map(nibble).sum());
    }
    out
}

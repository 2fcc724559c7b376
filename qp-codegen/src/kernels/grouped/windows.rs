//! From a lane's words of a tile of streams to windows, and to what is multiplied of them.
//!
//! A run's bytes and those behind it, which other lanes have, are put side by side in **views** of four bytes, so that each of its
//! windows lies in one of them.

use super::layout::RunBytes;
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
    /// The digits of a window.
    fn digits<'b>(self, b: &'b Builder, window: V<'b>) -> V<'b> {
        let window = window.bits(Scalar::I32);
        match self {
            Book::Shared(mem) => b.load(mem, window, Elem::U16),
            Book::Global { mem, first } => b.load_as(mem, window + 2 * first, Elem::U16, 1, Cache::ReadOnly),
        }
    }
}

/// Windows of a tile.
pub(super) struct Windows<'b, 'a> {
    b: &'b Builder,
    stream: &'a Stream,
    bytes: RunBytes,
    lane: V<'b>,
    book: Option<Book>,
}

impl<'b, 'a> Windows<'b, 'a> {
    pub(super) fn new(b: &'b Builder, stream: &'a Stream, bytes: RunBytes, lane: V<'b>, book: Option<Book>) -> Self {
        Windows { b, stream, bytes, lane, book }
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
        let all: Vec<[V<'b>; RUN as usize]> = self.of_tile(tile);
        for register in 0..RUNS * RUN / 4 {
            let (run, half) = (register / 4 * 2 + register % 4 / 2, register % 2);
            let four = [0, 1, 2, 3].map(|column| {
                let at = self.stream.runs.places.iter().position(|p| *p == (half, column));
                self.digit(all[run as usize][at.expect("a run has all places")])
            });
            let pair = |i: usize| four[i].permute(four[i + 1], 0x5140);
            let (first, second) = (pair(0), pair(2));
            for (out, selector) in out.iter_mut().zip([0x5410, 0x7632]) {
                out.push(first.permute(second, selector));
            }
        }
        out
    }

    /// The digits of a window.
    fn digit(&self, window: V<'b>) -> V<'b> {
        let b = self.b;
        match &self.stream.digits {
            Digits::Bytes { decode, word } => {
                // The product takes signed bytes: flip the top bits (each byte less 128), add 4·128.
                let flipped = self.computed(decode, *word, window) ^ 0x8080_8080_u32;
                flipped.dot4(b.u32(0x0101_0101), b.i32(512)).bits(Scalar::U32)
            }
            Digits::Book(_) => self.book.expect("declared where it is looked up").digits(b, window),
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
    fn of_tile(&self, tile: &[V<'b>]) -> Vec<[V<'b>; RUN as usize]> {
        let RunBytes { all, first } = self.bytes;
        // The first bytes of the runs behind, of as many lanes as windows reach.
        let lanes = self.stream.beyond().div_ceil(all);
        let firsts = &tile[..(RUNS * first / 4) as usize];
        let behind: Vec<Vec<V<'b>>> = (1..=lanes)
            .map(|n| {
                let lane = (self.lane + n * self.stream.runs.hop % 32) & 31;
                firsts.iter().map(|word| word.shuffle(lane)).collect()
            })
            .collect();
        let run = |run: u32| {
            let byte = |at: u32| {
                let (word, byte) = self.bytes.place(run, at % all);
                let words = if at < all { tile } else { &behind[(at / all) as usize - 1] };
                (words[word as usize], byte)
            };
            let mut view: Option<(u32, V<'b>)> = None;
            std::array::from_fn(|weight| {
                let begin = weight as u32 * self.stream.step;
                let end = begin + self.stream.window;
                let (from, word) = match view {
                    Some((from, word)) if end <= from + 32 => (from, word),
                    _ => {
                        let from = begin / 8;
                        let last = all + self.stream.beyond();
                        (from * 8, gathered(&(from..last.min(from + 4)).map(byte).collect::<Vec<_>>()))
                    }
                };
                view = Some((from, word));
                self.cut(word, begin - from)
            })
        };
        (0..RUNS).map(run).collect()
    }

    /// The window that begins at bit `at` of a word.
    fn cut(&self, word: V<'b>, at: u32) -> V<'b> {
        let bits = self.stream.window;
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

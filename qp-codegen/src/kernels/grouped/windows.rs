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
        let mut out = Vec::with_capacity((RUNS * RUN) as usize);
        for rows in self.by_place(tile) {
            for pair in [0, 2] {
                // Of columns 0 and 1, or 2 and 3: the upper and the lower row.
                for (column, half) in [(pair, 0), (pair, 1), (pair + 1, 0), (pair + 1, 1)] {
                    out.push(self.computed(decode, word, rows[half][column].0));
                }
            }
        }
        out
    }

    /// The registers of digits, by plane.
    pub(super) fn digits(&self, planes: u32, tile: &[V<'b>]) -> Vec<Vec<V<'b>>> {
        let mut out = vec![Vec::new(); planes as usize];
        for rows in self.by_place(tile) {
            // Those of a window are looked up once.
            let mut known: Vec<(V<'b>, Vec<V<'b>>)> = Vec::new();
            for four in rows {
                // The word of a weight's digits, and which half of it they are.
                let four = four.map(|(window, k)| {
                    let at = known.iter().position(|(w, _)| w.val == window.val).unwrap_or_else(|| {
                        known.push((window, self.digit(window)));
                        known.len() - 1
                    });
                    (known[at].1[k as usize / 2], k % 2)
                });
                let (selectors, [first, second]) = match four {
                    [(a, 0), (b, 1), (c, 0), (d, 1)] if (a.val, c.val) == (b.val, d.val) => ([0x6420, 0x7531], [a, c]),
                    _ => {
                        let pair = |i: usize| {
                            let ((a, first), (b, second)) = (four[i], four[i + 1]);
                            // Low bytes, then high ones.
                            let two = (2 * first) | ((4 + 2 * second) << 4);
                            a.permute(b, two | ((two + 0x11) << 8))
                        };
                        ([0x5410, 0x7632], [pair(0), pair(2)])
                    }
                };
                out.iter_mut().zip(selectors).for_each(|(out, selector)| out.push(first.permute(second, selector)));
            }
        }
        out
    }

    /// Of each run of a lane's tile the weights of the upper and of the lower row, four each: the window, and which of its weights it is.
    fn by_place(&self, tile: &[V<'b>]) -> Vec<[[(V<'b>, u32); 4]; 2]> {
        let Stream { runs, vector, .. } = self.stream;
        if runs.shared {
            return self.of_two_rows(tile);
        }
        let of_run = |windows: Vec<V<'b>>| {
            [0, 1].map(|half| {
                [0, 1, 2, 3].map(|column| {
                    let at =
                        runs.places.iter().position(|p| *p == (half, column)).expect("a run has all places") as u32;
                    (windows[(at / vector) as usize], at % vector)
                })
            })
        };
        self.of_tile(tile).into_iter().map(of_run).collect()
    }

    /// The same of runs of eight weights of a row, which two lanes share: each has one of the two rows.
    fn of_two_rows(&self, tile: &[V<'b>]) -> Vec<[[(V<'b>, u32); 4]; 2]> {
        let Stream { runs, step, window, vector, .. } = self.stream;
        let odd = (self.lane & 1).eq(1);
        let chosen = |by: V<'b>, a: &[V<'b>], b: &[V<'b>]| -> Vec<V<'b>> {
            a.iter().zip(b).map(|(&a, &b)| by.select(a, b)).collect()
        };
        let other: Vec<V<'b>> = tile.iter().map(|word| word.shuffle_xor(1)).collect();
        let rows = [chosen(odd, &other, tile), chosen(odd, tile, &other)];
        if *vector == RUN {
            // A lane's weights are half of those of the code: see [`Windows::digit`].
            let [upper, lower] = rows.map(|words| self.of_tile(&words));
            let four = |windows: Vec<V<'b>>| [0, 1, 2, 3].map(|k| (windows[0], k));
            return upper.into_iter().zip(lower).map(|(upper, lower)| [four(upper), four(lower)]).collect();
        }
        // The runs behind, of the same row but for one pair of lanes.
        let lane = (self.lane + runs.hop) & 31;
        let [upper, lower] = [0, 1].map(|row: usize| rows[row].iter().map(|w| w.shuffle(lane)).collect::<Vec<V<'b>>>());
        let turns = (self.lane & !1).eq(runs.turn as i32);
        let behind = [chosen(turns, &lower, &upper), chosen(turns, &upper, &lower)];
        let of = |run: u32, half: usize| {
            let words = |n: u32| if n == 0 { &rows[half][..] } else { &behind[half][..] };
            // The lane's four windows, of either end of the run.
            let [first, second] = [0, RUN / 2 * step].map(|from| self.joined(run, from, &words));
            let view = if runs.places[0].0 == 1 { odd.select(first, second) } else { odd.select(second, first) };
            [0, 1, 2, 3].map(|column| {
                let at = runs.places.iter().position(|p| p.1 == column).expect("a run has all places") as u32;
                (self.bits_of(view, at * step, *window), 0)
            })
        };
        (0..RUNS).map(|run| [of(run, 0), of(run, 1)]).collect()
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

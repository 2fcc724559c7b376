//! Drawing the next token of each row of logits: temperature, limits and penalty, each row by settings of its own.
//!
//! The twin of [`crate::reference::sampling`], token for token. One block a row; each of its warps has a run of tokens. What
//! the limits keep is found by digits: the block counts, or weighs, tokens by the leading bits of their distance from the
//! largest logit, finds the value where the limit is reached, and goes on with the next bits among the tokens that have these.
//! So what is kept are the tokens nearer than some distance, and the first few of those at it. The draw is a sum over the
//! warps and then over the run of one.

use super::argmax::ordered;
use super::math::exp;
use super::span::Span;
use crate::ir::{Builder, Cache, Const, Elem, Kernel, Mem, Scalar, Special, V, Var};
use crate::reference::INFINITY_BITS;
use crate::reference::sampling::{MIX, MOST_TOKENS, RANDOM_BITS, SHARE_BITS, WEIGHT_BITS, WORDS};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Logits of a row, at most [`MOST_TOKENS`].
    pub columns: u32,
    /// Rows.
    pub batch: u32,
    /// Where they lie.
    pub logits: Span,
}

const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / 32;
/// Loads that a thread has in flight.
const AHEAD: u32 = 4;
/// Lowest bit and number of bits of each digit of a distance, which has 31.
const DIGITS: [(u32, u32); 3] = [(20, 11), (10, 10), (0, 10)];
/// Values of the longest digit.
const BINS: u32 = 1 << 11;
/// Bits of the lower of the two parts in which weights are summed.
const LOW_BITS: u32 = WEIGHT_BITS / 2;

/// Words of a row of the mask of seen tokens.
pub fn mask_words(columns: u32) -> u32 {
    columns.div_ceil(32)
}

/// Makes the kernel. Its parameters, in order:
///
/// * `logits`: `f32`;
/// * `settings`: 32-bit words, [`WORDS`] a row: [`crate::reference::sampling::Sampling::words`];
/// * `draws`: `i32`, one a row: number of the draw among those of the row's seed;
/// * `seen`: 32-bit words, [`mask_words`] a slot: bit `i mod 32` of word `i / 32` is set if token `i` was seen. Rows with a
///   penalty other than 1 read the mask of their slot, and unless it is 0 set the bit of the token that is drawn. Such rows
///   must have slots of their own;
/// * `tokens`: `i32`, one a row: the token; −1 if a logit is not a number, or none is finite.
///
/// # Panics
/// If there are more than [`MOST_TOKENS`] columns, or none.
pub fn lower(op: &Sample) -> Kernel {
    assert!(op.columns > 0 && op.columns as usize <= MOST_TOKENS, "{} tokens", op.columns);
    let b = Builder::new(&format!("sample_{}_b{}", op.columns, op.batch), [op.batch, 1], THREADS);
    b.doc(format!("A token of {} logits, {} row(s).", op.columns, op.batch));
    b.dependent_launch();
    Emit::new(&b, op).kernel();
    b.finish()
}

struct Emit<'a, 'b> {
    b: &'b Builder,
    op: &'a Sample,
    logits: Mem,
    settings: Mem,
    draws: Mem,
    seen: Mem,
    tokens: Mem,
    /// One word a warp.
    of_warps: [Mem; 3],
    /// Counts or weights by digit, in two parts, a word of padding after each lane's.
    bins: [Mem; 2],
    /// What one thread found for all: three words.
    found: Mem,
    row: V<'b>,
    thread: V<'b>,
    lane: V<'b>,
    warp: V<'b>,
}

/// The settings of the row.
#[derive(Clone, Copy)]
struct Settings<'b> {
    temperature: V<'b>,
    top_k: V<'b>,
    top_p: V<'b>,
    least: V<'b>,
    penalty: V<'b>,
    /// First word of the slot's mask.
    mask: V<'b>,
}

/// Which tokens are kept: those of smaller keys than `key`, and the first `ties` of those of `key`.
#[derive(Clone, Copy)]
struct Cut {
    key: Var,
    ties: Var,
}

impl<'a, 'b> Emit<'a, 'b> {
    fn new(b: &'b Builder, op: &'a Sample) -> Self {
        let words = |name: &str, len| b.shared(name, Elem::U32, len);
        Emit {
            b,
            op,
            logits: b.sized("logits", Elem::F32, false, op.logits.len(op.batch, op.columns)),
            settings: b.sized("settings", Elem::U32, false, u64::from(op.batch) * WORDS as u64),
            draws: b.sized("draws", Elem::I32, false, op.batch.into()),
            seen: b.buffer("seen", Elem::U32, true),
            tokens: b.sized("tokens", Elem::I32, true, op.batch.into()),
            of_warps: [words("low", WARPS), words("high", WARPS), words("ties", WARPS)],
            bins: [words("bins_low", BINS + 32), words("bins_high", BINS + 32)],
            found: words("found", 3),
            row: b.special(Special::BlockX),
            thread: b.special(Special::Thread),
            lane: b.special(Special::Lane),
            warp: b.special(Special::Warp),
        }
    }

    fn long(&self, x: i64) -> V<'b> {
        self.b.constant(Const::I64(x))
    }

    /// First token of a warp's run.
    fn run(&self) -> (V<'b>, u32) {
        let length = self.op.columns.div_ceil(WARPS).next_multiple_of(32);
        (self.warp * length, length)
    }

    /// The logit of a token, its penalty included.
    fn logit(&self, s: &Settings<'b>, i: V<'b>) -> V<'b> {
        let b = self.b;
        let v = b.var(b.load(self.logits, self.op.logits.at(self.row) + i, Elem::F32));
        b.if_(s.penalty.ne(1.0), || {
            let word = b.load(self.seen, s.mask + (i >> 5), Elem::U32);
            let bit = (word >> (i & 31).bits(Scalar::U32)) & 1;
            b.if_(bit.ne(0), || {
                let old = b.get(v);
                let penalized = old.gt(0.0).select(old / s.penalty, old * s.penalty);
                b.set(v, s.penalty.eq(0.0).select(old - f32::INFINITY, penalized));
            });
        });
        b.get(v)
    }

    /// For each token of the warp's run, this lane's.
    fn each(&self, s: &Settings<'b>, f: impl Fn(V<'b>, V<'b>)) {
        let b = self.b;
        let (first, length) = self.run();
        let end = (first + length).min(self.op.columns);
        b.for_(first + self.lane, end, 32 * AHEAD, |from| {
            let at: Vec<V> = (0..AHEAD).map(|k| from + 32 * k).collect();
            let load = |i: &V<'b>| self.logit(s, i.min(self.op.columns - 1));
            let loaded: Vec<V> = at.iter().map(load).collect();
            for (i, v) in at.into_iter().zip(loaded) {
                b.if_(i.lt(end), || f(i, v));
            }
        });
    }

    /// The bits of a logit's distance from the largest.
    fn key(&self, largest: V<'b>, v: V<'b>) -> V<'b> {
        let finite = (v.bits(Scalar::U32) & (i32::MAX as u32)).lt(INFINITY_BITS);
        finite.select(largest - v, f32::INFINITY).bits(Scalar::U32)
    }

    fn weight(&self, s: &Settings<'b>, key: V<'b>) -> V<'b> {
        let power = -key.bits(Scalar::F32) / s.temperature;
        (exp(self.b, power) * (1u32 << WEIGHT_BITS) as f32).to(Scalar::I32).bits(Scalar::U32)
    }

    /// `low + high · 2^LOW_BITS`.
    fn joined(&self, low: V<'b>, high: V<'b>) -> V<'b> {
        (high.to(Scalar::I64) << LOW_BITS) + low.to(Scalar::I64)
    }

    /// Stores a sum for all threads.
    fn share(&self, at: i32, sum: V<'b>) {
        let b = self.b;
        b.store(self.found, b.i32(at), sum.to(Scalar::U32), Elem::U32);
        b.store(self.found, b.i32(at + 1), (sum >> 32).to(Scalar::U32), Elem::U32);
    }

    /// What was shared.
    fn shared(&self, at: i32) -> V<'b> {
        let b = self.b;
        let [low, high] = [at, at + 1].map(|at| b.load(self.found, b.i32(at), Elem::U32).to(Scalar::I64));
        (high << 32) + low
    }

    fn kernel(&self) {
        let b = self.b;
        b.grid_wait();
        b.grid_launch();
        let word = |i: u32| b.load_as(self.settings, self.row * WORDS as u32 + i, Elem::U32, 1, Cache::Default);
        let s = Settings {
            temperature: word(0).bits(Scalar::F32),
            top_k: word(1),
            top_p: word(2),
            least: word(3),
            penalty: word(4).bits(Scalar::F32),
            mask: word(7).bits(Scalar::I32) * mask_words(self.op.columns),
        };

        b.comment(
            "The largest finite logit, by words that are ordered as numbers are; what is not a number lies above all.",
        );
        let largest = b.var(b.u32(0));
        self.each(&s, |_, v| {
            b.set(largest, b.get(largest).max(ordered(b, v)));
        });
        let of_warp = b.get(largest).max_across();
        b.if_(self.lane.eq(0), || b.store(self.of_warps[0], self.warp, of_warp, Elem::U32));
        b.barrier();
        let all = b.load(self.of_warps[0], self.lane, Elem::U32).max_across();
        b.if_(self.thread.eq(0), || b.store(self.found, b.i32(0), all, Elem::U32));
        b.barrier();
        let word_of = b.load(self.found, b.i32(0), Elem::U32);
        b.if_else(
            word_of.eq(0) | word_of.eq(u32::MAX),
            || b.if_(self.thread.eq(0), || b.store(self.tokens, self.row, b.i32(-1), Elem::I32)),
            || {
                let flip = word_of.ge(1u32 << 31).select(b.u32(1 << 31), u32::MAX);
                self.draw(&s, (word_of ^ flip).bits(Scalar::F32), word(5), word(6));
            },
        );
    }

    fn draw(&self, s: &Settings<'b>, largest: V<'b>, seed_low: V<'b>, seed_high: V<'b>) {
        let (b, columns) = (self.b, self.op.columns);
        let cut = Cut { key: b.var(b.u32(INFINITY_BITS)), ties: b.var(b.i32(i32::MAX)) };
        // Those who read what was found have it before others are found.
        b.barrier();
        b.comment("The first tokens, so many.");
        b.if_(s.top_k.gt(0) & s.top_k.lt(columns), || {
            let (key, rest) = self.select(s, largest, false, s.top_k.to(Scalar::I64));
            b.set(cut.key, key);
            b.set(cut.ties, rest.to(Scalar::I32));
        });
        b.comment("The first of these, so much of their weight.");
        b.if_(s.top_p.lt(1u32 << SHARE_BITS), || {
            let (before, _) = self.sums(s, largest, cut, self.long(0));
            self.store_sums(before, self.b.u32(0));
            b.barrier();
            let nearer = self.total();
            let ties = b.get(cut.ties).to(Scalar::I64);
            let all = nearer + ties * self.weight(s, b.get(cut.key)).to(Scalar::I64);
            let share = s.top_p.to(Scalar::I64);
            let part = (all & ((1i32 << SHARE_BITS) - 1)) * share;
            let target = (all >> SHARE_BITS) * share + (part >> SHARE_BITS);
            let (key, rest) = self.select(s, largest, true, target.max(1));
            let weight = self.weight(s, key).to(Scalar::I64);
            b.set(cut.key, key);
            b.set(cut.ties, ((rest + weight - 1) / weight).to(Scalar::I32));
        });

        b.comment("The weight of what is kept, warp by warp.");
        let tie = self.weight(s, b.get(cut.key));
        let tie = tie.ge(s.least).select(tie, 0u32).to(Scalar::I64);
        let (sum, ties) = self.sums(s, largest, cut, s.least.to(Scalar::I64));
        self.store_sums(sum, ties);
        b.barrier();
        // Of each warp: the weight of what comes before it, and how many of the ties.
        let (all, before, own) = (b.var(self.long(0)), b.var(self.long(0)), b.var(self.long(0)));
        let (seen, seen_before) = (b.var(b.i32(0)), b.var(b.i32(0)));
        b.for_(0, WARPS, 1, |w| {
            let [low, high, ties] = self.of_warps.map(|mem| b.load(mem, w, Elem::U32));
            let ties = ties.bits(Scalar::I32);
            let taken = (b.get(cut.ties) - b.get(seen)).max(0).min(ties);
            let sum = self.joined(low, high) + taken.to(Scalar::I64) * tie;
            b.if_(w.eq(self.warp), || {
                b.set(before, b.get(all));
                b.set(own, sum);
                b.set(seen_before, b.get(seen));
            });
            b.set(all, b.get(all) + sum);
            b.set(seen, b.get(seen) + ties);
        });
        let draw = b.load(self.draws, self.row, Elem::I32).bits(Scalar::U32);
        let random = mix(mix(mix(draw) ^ seed_low) ^ seed_high) >> (32 - RANDOM_BITS);
        let (all, random) = (b.get(all), random.to(Scalar::I64));
        // all · random / 2^31, in two parts that fit 64 bits.
        let low = all & self.long(u32::MAX.into());
        let target = (((all >> 32) * random) << (32 - RANDOM_BITS)) + ((low * random) >> RANDOM_BITS);
        let (before, own) = (b.get(before), b.get(own));
        b.if_(before.le(target) & target.lt(before + own), || {
            self.walk(s, largest, cut, [before, target, tie], b.get(seen_before));
        });
    }

    /// This warp's weight of tokens nearer than the cut, of at least `least` each, and its tokens at the cut.
    fn sums(&self, s: &Settings<'b>, largest: V<'b>, cut: Cut, least: V<'b>) -> (V<'b>, V<'b>) {
        let b = self.b;
        let [low, high, ties] = [0; 3].map(|_| b.var(b.u32(0)));
        self.each(s, |_, v| {
            let key = self.key(largest, v);
            b.if_(key.lt(b.get(cut.key)), || {
                let weight = self.weight(s, key);
                b.if_(weight.to(Scalar::I64).ge(least), || {
                    b.set(low, b.get(low) + (weight & ((1u32 << LOW_BITS) - 1)));
                    b.set(high, b.get(high) + (weight >> LOW_BITS));
                });
            });
            b.if_(key.eq(b.get(cut.key)), || b.set(ties, b.get(ties) + 1));
        });
        let [low, high, ties] = [low, high, ties].map(|v| b.get(v).sum_across());
        (self.joined(low, high), ties)
    }

    /// Writes a warp's sum and ties where all threads read them.
    fn store_sums(&self, sum: V<'b>, ties: V<'b>) {
        let b = self.b;
        b.if_(self.lane.eq(0), || {
            let low = sum & ((1i32 << LOW_BITS) - 1);
            let parts = [low.to(Scalar::U32), (sum >> LOW_BITS).to(Scalar::U32), ties];
            for (mem, part) in self.of_warps.into_iter().zip(parts) {
                b.store(mem, self.warp, part, Elem::U32);
            }
        });
    }

    /// The sum of all warps' sums.
    fn total(&self) -> V<'b> {
        let b = self.b;
        let sum = b.var(self.long(0));
        b.for_(0, WARPS, 1, |w| {
            let [low, high] = [0, 1].map(|part| b.load(self.of_warps[part], w, Elem::U32));
            b.set(sum, b.get(sum) + self.joined(low, high));
        });
        b.get(sum)
    }

    /// The key at which the tokens, in their order, reach `target`, counted or weighed, and how much of it they have to make
    /// up at that key. All threads take part; a barrier stands before and after.
    fn select(&self, s: &Settings<'b>, largest: V<'b>, weigh: bool, target: V<'b>) -> (V<'b>, V<'b>) {
        let b = self.b;
        let (key, rest) = (b.var(b.u32(0)), b.var(target));
        for (shift, bits) in DIGITS {
            b.for_(self.thread, BINS + 32, THREADS, |i| {
                for mem in self.bins {
                    b.store(mem, i, b.u32(0), Elem::U32);
                }
            });
            b.barrier();
            self.each(s, |_, v| {
                let own = self.key(largest, v);
                b.if_(((own ^ b.get(key)) >> (shift + bits)).eq(0), || {
                    let bin = ((own >> shift) & ((1u32 << bits) - 1)).bits(Scalar::I32);
                    let at = bin + (bin >> 6);
                    let add = |mem, value: V<'b>| {
                        b.atomic_add(mem, at, value);
                    };
                    if weigh {
                        let weight = self.weight(s, own);
                        b.if_(weight.gt(0), || {
                            add(self.bins[0], weight & ((1u32 << LOW_BITS) - 1));
                            add(self.bins[1], weight >> LOW_BITS);
                        });
                    } else {
                        add(self.bins[0], b.u32(1));
                    }
                });
            });
            b.barrier();
            b.if_(self.warp.eq(0), || self.find(b.get(rest), shift, weigh));
            b.barrier();
            b.set(key, b.get(key) | b.load(self.found, b.i32(2), Elem::U32));
            b.set(rest, self.shared(0));
        }
        b.barrier();
        (b.get(key), b.get(rest))
    }

    /// One warp finds the digit at which the bins reach `target`, and shares it, shifted to its place, with what of the target
    /// the bins before do not make up.
    fn find(&self, target: V<'b>, shift: u32, weigh: bool) {
        let b = self.b;
        let each = BINS / 32;
        let bin = |i: V<'b>| {
            let at = i + (i >> 6);
            let low = b.load(self.bins[0], at, Elem::U32);
            if weigh { self.joined(low, b.load(self.bins[1], at, Elem::U32)) } else { low.to(Scalar::I64) }
        };
        let first = self.lane * each;
        let own = b.var(self.long(0));
        b.for_(first, first + each, 1, |i| b.set(own, b.get(own) + bin(i)));
        let own = b.get(own);
        let halves = [own.to(Scalar::U32), (own >> 32).to(Scalar::U32)];
        let before = b.var(self.long(0));
        b.for_(0, 32, 1, |other| {
            let [low, high] = halves.map(|half| half.shuffle(other).to(Scalar::I64));
            b.if_(other.lt(self.lane), || b.set(before, b.get(before) + ((high << 32) + low)));
        });
        let start = b.get(before);
        b.if_(start.lt(target) & target.le(start + own), || {
            b.for_(first, first + each, 1, |i| {
                let (sum, size) = (b.get(before), bin(i));
                b.if_(sum.lt(target) & target.le(sum + size), || {
                    b.store(self.found, b.i32(2), i.bits(Scalar::U32) << shift, Elem::U32);
                    self.share(0, target - sum);
                });
                b.set(before, sum + size);
            });
        });
    }

    /// The warp in whose run the target lies goes through it. `before` and `seen` are the weight of the kept tokens before the
    /// run, and the number of tokens at the cut.
    fn walk(&self, s: &Settings<'b>, largest: V<'b>, cut: Cut, [before, target, tie]: [V<'b>; 3], seen: V<'b>) {
        let b = self.b;
        let (first, length) = self.run();
        let (sum, seen, done) = (b.var(before), b.var(seen), b.var(b.i32(0)));
        b.for_(0, length / 32, 1, |step| {
            b.if_(b.get(done).eq(0), || {
                let from = first + step * 32;
                let i = from + self.lane;
                let (weight, at_cut) = (b.var(b.u32(0)), b.var(b.u32(0)));
                b.if_(i.lt(self.op.columns), || {
                    let key = self.key(largest, self.logit(s, i));
                    b.if_(key.lt(b.get(cut.key)), || {
                        let own = self.weight(s, key);
                        b.if_(own.ge(s.least), || b.set(weight, own));
                    });
                    b.if_(key.eq(b.get(cut.key)), || b.set(at_cut, b.u32(1)));
                });
                let (weight, at_cut) = (b.get(weight), b.get(at_cut));
                let ties = at_cut.sum_across().bits(Scalar::I32);
                let low = (weight & ((1u32 << LOW_BITS) - 1)).sum_across();
                let high = (weight >> LOW_BITS).sum_across();
                let taken = (b.get(cut.ties) - b.get(seen)).max(0).min(ties);
                let all = self.joined(low, high) + taken.to(Scalar::I64) * tie;
                b.if_else(
                    target.lt(b.get(sum) + all),
                    || {
                        b.set(done, b.i32(1));
                        b.for_(0, 32, 1, |other| {
                            let (weight, at_cut) = (weight.shuffle(other), at_cut.shuffle(other).bits(Scalar::I32));
                            let left = b.get(cut.ties).gt(b.get(seen));
                            let tied = at_cut.gt(0).select(tie, self.long(0));
                            let own = weight.to(Scalar::I64) + left.select(tied, self.long(0));
                            let (old, new) = (b.get(sum), b.get(sum) + own);
                            b.if_(old.le(target) & target.lt(new) & self.lane.eq(0), || self.take(s, from + other));
                            b.set(sum, new);
                            b.set(seen, b.get(seen) + at_cut);
                        });
                    },
                    || {
                        b.set(sum, b.get(sum) + all);
                        b.set(seen, b.get(seen) + ties);
                    },
                );
            });
        });
    }

    /// The token is taken.
    fn take(&self, s: &Settings<'b>, token: V<'b>) {
        let b = self.b;
        b.store(self.tokens, self.row, token, Elem::I32);
        b.if_(s.penalty.ne(1.0) & s.penalty.ne(0.0), || {
            let at = s.mask + (token >> 5);
            let bit = b.u32(1) << (token & 31).bits(Scalar::U32);
            b.store(self.seen, at, b.load(self.seen, at, Elem::U32) | bit, Elem::U32);
        });
    }
}

/// The twin of the reference's mix of bits.
fn mix(x: V<'_>) -> V<'_> {
    let x = x + 0x9E37_79B9u32;
    let x = (x ^ (x >> 16)) * MIX[0];
    let x = (x ^ (x >> 15)) * MIX[1];
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::interpret::{Arg, Options, run};
    use crate::ir::validate;
    use crate::reference::sampling::Sampling;

    /// Draws tokens of rows of `logits` by all `settings`, and compares them with the reference's.
    fn check(columns: usize, logits: &[f32], settings: &[(Sampling, f32)]) {
        let rows = settings.len();
        let op = Sample {
            columns: columns as u32,
            batch: rows as u32,
            logits: Span { first: 3, stride: columns as u32 + 5 },
        };
        let kernel = lower(&op);
        validate(&kernel).unwrap_or_else(|problems| panic!("{problems}"));
        let words = mask_words(op.columns) as usize;
        // Every third token was seen; row r has slot rows − r.
        let seen = |i: usize| i % 3 == 1;
        let mut mask = vec![0u32; words * (rows + 1)];
        for (i, word) in mask.iter_mut().enumerate() {
            *word = (0..32).filter(|bit| seen(i % words * 32 + bit)).fold(0, |w, bit| w | 1 << bit);
        }
        let mut memory = vec![f32::NAN; 3 + rows * op.logits.stride as usize];
        let row = |r: usize| &logits[r % (logits.len() / columns) * columns..][..columns];
        for r in 0..rows {
            memory[3 + r * op.logits.stride as usize..][..columns].copy_from_slice(row(r));
        }
        let bytes = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let memory: Vec<u32> = memory.iter().map(|v| v.to_bits()).collect();
        let all: Vec<u32> =
            settings.iter().enumerate().flat_map(|(r, (s, penalty))| s.words(*penalty, (rows - r) as u32)).collect();
        let draws: Vec<u32> = (0..rows as u32).map(|r| 1000 + r).collect();
        let (mut masks, mut tokens) = (bytes(&mask), vec![0xee; 4 * rows]);
        let (memory, all, draws_bytes) = (bytes(&memory), bytes(&all), bytes(&draws));
        let mut args = [
            Arg::ReadOnly(&memory),
            Arg::ReadOnly(&all),
            Arg::ReadOnly(&draws_bytes),
            Arg::Buffer(&mut masks),
            Arg::Buffer(&mut tokens),
        ];
        run(&kernel, &mut args, &Options::default()).unwrap_or_else(|trap| panic!("{trap}"));
        for (r, ((s, penalty), got)) in settings.iter().zip(tokens.as_chunks::<4>().0).enumerate() {
            let expect = s.choose(row(r), *penalty, seen, draws[r]);
            let expect = expect.map_or(-1, |token| token as i32);
            assert_eq!(i32::from_le_bytes(*got), expect, "row {r} of {columns}: {s:?} {penalty}");
            let forbidden = *penalty == 0.0 && usize::try_from(expect).is_ok_and(seen);
            assert!(!forbidden, "row {r}: {expect} is forbidden");
            if let (Ok(token), true) = (usize::try_from(expect), ![0.0, 1.0].contains(penalty)) {
                mask[(rows - r) * words + token / 32] |= 1 << (token % 32);
            }
        }
        assert_eq!(masks, bytes(&mask));
    }

    fn settings() -> Vec<(Sampling, f32)> {
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let kinds = [
            Sampling::default(),
            base,
            Sampling { temperature: 0.3, ..base },
            Sampling { temperature: 40.0, ..base },
            Sampling { top_k: 1, ..base },
            Sampling { top_k: 7, ..base },
            Sampling { top_k: 200, temperature: 3.0, ..base },
            Sampling { top_p: 0.0, ..base },
            Sampling { top_p: 0.5, ..base },
            Sampling { top_p: 0.95, ..base },
            Sampling { min_p: 0.05, ..base },
            Sampling { min_p: 1.0, ..base },
            Sampling { top_k: 20, top_p: 0.7, min_p: 0.1, ..base },
        ];
        let limited = Sampling { top_k: 50, top_p: 0.9, temperature: 0.8, ..base };
        let penalized = [(kinds[0], 1.7), (limited, 1.2), (kinds[0], 0.0), (base, 0.0), (limited, 0.0)];
        let seeds = [0, u64::MAX, 12_345_678_901_234];
        let kinds = kinds.map(|kind| (kind, 1.0)).into_iter().chain(penalized);
        kinds.flat_map(|(kind, penalty)| seeds.map(|seed| (Sampling { seed, ..kind }, penalty))).collect()
    }

    /// Numbers like logits, many of them equal if `coarse`.
    fn random(seed: u32, n: usize, coarse: bool) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let one = |_| (next() + next() + next() - 1.5) * 12.0;
        (0..n).map(one).map(|v| if coarse { v.round() } else { v }).collect()
    }

    #[test]
    fn tokens_are_the_references() {
        for columns in [1, 2, 33, 300, 5000] {
            for coarse in [false, true] {
                check(columns, &random(columns as u32, 3 * columns, coarse), &settings());
            }
        }
    }

    #[test]
    fn tokens_of_a_large_vocabulary() {
        check(128_256, &random(5, 128_256, true), &[settings()[36], settings()[25]]);
    }

    #[test]
    fn logits_that_are_all_alike() {
        check(700, &[1.0; 700], &settings());
        check(700, &[-0.0; 700], &settings());
    }

    #[test]
    fn logits_that_are_not_finite() {
        let mut logits = vec![f32::NEG_INFINITY; 3 * 400];
        logits[123] = -1e30;
        logits[77] = f32::INFINITY;
        logits[399] = f32::MIN;
        logits[400 + 5] = f32::NAN;
        check(400, &logits, &settings());
    }

    #[test]
    #[should_panic(expected = "262145 tokens")]
    fn more_tokens_than_sums_hold() {
        lower(&Sample { columns: 262_145, batch: 1, logits: Span::rows(262_145) });
    }
}

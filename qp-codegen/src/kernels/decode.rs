//! Decoding: from a lane's words of a tile to packed registers, for any code.
//!
//! A **register** holds four weights of one lane, the operand of a tensor-core product: 4 / V steps. Words, bits and
//! look-ups of the decode expression are computed per step; vectors of the 4 / V steps are computed together, packed:
//!
//! * an exclusive or of vectors is one instruction for all four weights;
//! * [`Op::Signs`] becomes one sign-replicating byte permute when its bits lie at the tops of bytes of at most two
//!   words (otherwise up to two more permutes, and a shift for each other bit position);
//! * look-ups of several steps are merged by permutes.
//!
//! Tables lie in shared memory, each entry repeated `copies` times across the banks, so that lanes that look up
//! different entries rarely meet in a bank. Tables too large for that stay in global memory.
//!
//! A tile is decoded at once ([`Decoder::tile`]), unless it is so large that its program would be ([`is_small`]): then
//! in a loop over its [`Unit`]s ([`Decoder::unit`]).

use std::cmp::Ordering;
use std::collections::HashMap;

use super::copy_all;
use crate::ir::{self, BinaryOp, Builder, Cache, Elem, Mem, Scalar, Special, V};
use crate::layout;
use crate::spec::expr::{Decode, Node, Op, VectorOp, WordOp};
use crate::spec::{Code, Quantizer, Table, Value, mask};

/// Shared memory for the copies of all tables of a kernel for which speed is not everything.
pub const TABLE_BYTES: u32 = 32 << 10;

/// Entries of a table that a thread loads at once, at most.
pub const FILL: u32 = 16;

/// Words of one table entry in shared memory: V entries, padded to 4 bytes.
fn entry_words(code: &Code) -> u32 {
    (code.vector * code.value.bytes()).div_ceil(4)
}

/// All tables of a quantizer as the kernels take them: code by code, table by table, entry by entry, each entry
/// packed into one word (two if V = 4 and entries are 16-bit), component 0 lowest.
pub fn pack_tables(q: &Quantizer) -> Vec<u32> {
    let mut out = Vec::new();
    for code in &q.codes {
        let bits = code.value.bytes() * 8;
        for table in &code.tables {
            for entry in table.values.chunks_exact(code.vector as usize) {
                let packed = entry
                    .iter()
                    .enumerate()
                    .fold(0u64, |acc, (i, &x)| acc | u64::from(u32::from(x as u16) & mask(bits)) << (i as u32 * bits));
                out.push(packed as u32);
                if entry_words(code) == 2 {
                    out.push((packed >> 32) as u32);
                }
            }
        }
    }
    out
}

/// A table where it is looked up. In shared memory, entry `e` for lane `l` lies at `(e·copies + l mod copies)·words`; in
/// global memory, in the `tables` buffer, at `first + e·words`.
struct LookupTable<'b> {
    mem: Mem,
    /// First word in the `tables` buffer.
    first: u32,
    entries: u32,
    copies: u32,
    words: u32,
    /// Byte offset of the lane's copy; `None` in global memory.
    bank: Option<V<'b>>,
}

impl LookupTable<'_> {
    /// Copies of an entry that one store writes: several words, if an entry is one.
    fn wide(&self) -> u32 {
        if self.words == 1 { self.copies.min(4) } else { 1 }
    }

    /// Stores of whole entries that fill it.
    fn stores(&self) -> u32 {
        self.entries * self.copies / self.wide()
    }
}

/// Decoders of all codes of a quantizer within one kernel.
pub struct Decoder<'b, 'q> {
    b: &'b Builder,
    q: &'q Quantizer,
    tables: Vec<Vec<LookupTable<'b>>>,
    buffer: Mem,
    lane: V<'b>,
}

/// Four weights of a lane as bytes: one register, or low and high bytes apart for 16-bit entries.
#[derive(Clone, Copy)]
pub struct Register<'b> {
    /// The bytes, or the unsigned low bytes of 16-bit entries.
    pub low: V<'b>,
    /// The signed high bytes of 16-bit entries.
    pub high: Option<V<'b>>,
}

impl<'b, 'q> Decoder<'b, 'q> {
    /// Declares the tables and the parameter `tables` (which is there even for a code without tables, so that all
    /// kernels of an operation take the same parameters). The tables' copies take up to `table_bytes` of shared memory;
    /// if not even one copy of each fits, they are looked up in global memory.
    pub fn new(b: &'b Builder, q: &'q Quantizer, table_bytes: u32) -> Self {
        let count = |c: &Code| c.tables.iter().map(|t| t.entries * entry_words(c)).sum::<u32>();
        let total: u32 = q.codes.iter().map(count).sum();
        let fits = total <= table_bytes / 4;
        let buffer = b.sized("tables", Elem::U32, false, total.into());
        let lane = b.special(Special::Lane);
        let mut first = 0;
        let mut tables = Vec::new();
        for (i, code) in q.codes.iter().enumerate() {
            let words = entry_words(code);
            let declare = |t: &Table| {
                let (at, entries) = (first, t.entries);
                first += entries * words;
                if !fits {
                    return LookupTable { mem: buffer, first: at, entries, copies: 1, words, bank: None };
                }
                let copies = copies(code, t, table_bytes / 4 / total * entries * words);
                let mem = b.shared(&format!("table_{i}_{}", t.name), Elem::U32, entries * copies * words);
                let bank = (lane & (copies as i32 - 1)).bits(Scalar::U32) * (4 * words);
                // A zero-extended byte: as it is, but no longer a mask that the assembler would fold into every
                // look-up's mask-and-or, making two instructions of one.
                let bank = Some(bank.permute(b.u32(0), 0x4440));
                LookupTable { mem, first: at, entries, copies, words, bank }
            };
            tables.push(code.tables.iter().map(declare).collect());
        }
        Decoder { b, q, tables, buffer, lane }
    }

    /// What the kernel is built with.
    pub fn builder(&self) -> &'b Builder {
        self.b
    }

    /// What is decoded.
    pub fn quantizer(&self) -> &'q Quantizer {
        self.q
    }

    /// The tables in shared memory.
    fn shared(&self) -> impl Iterator<Item = &LookupTable<'b>> {
        self.tables.iter().flatten().filter(|t| t.bank.is_some())
    }

    /// Copies the tables into shared memory, all threads of the block together. A barrier must follow.
    pub fn fill(&self, threads: u32) {
        let b = self.b;
        let thread = b.special(Special::Thread);
        for t in self.shared() {
            let (wide, per_entry) = (t.wide(), t.copies / t.wide());
            let load = |i: V<'b>| -> Vec<V<'b>> {
                let first = i / per_entry * t.words + t.first;
                (0..t.words).map(|w| b.load_as(self.buffer, first + w, Elem::U32, 1, Cache::ReadOnly)).collect()
            };
            let store = |i: V<'b>, words: &Vec<V<'b>>| {
                if wide > 1 {
                    b.store(t.mem, i * wide, b.vector(&vec![words[0]; wide as usize]), Elem::U32);
                } else {
                    words.iter().enumerate().for_each(|(w, &v)| b.store(t.mem, i * t.words + w as u32, v, Elem::U32));
                }
            };
            copy_all(b, thread, [t.stores(), threads, FILL], load, store);
        }
    }

    /// Decodes a tile of code `code` from the lane's `words`: its T / 16 registers, in order.
    pub fn tile(&self, code: usize, words: &[V<'b>]) -> Vec<Register<'b>> {
        let mut steps = self.begin(code, words);
        (0..self.q.codes[code].weights() / 16).map(|r| steps.register(r)).collect()
    }

    /// Begins to decode a tile: its registers are decoded when they are asked for.
    pub fn begin<'a>(&'a self, code: usize, words: &'a [V<'b>]) -> Steps<'a, 'b, 'q> {
        let c = &self.q.codes[code];
        // The windows at the end of a lane's part reach into the first word of the block's next lane.
        let next = (!c.is_memoryless()).then(|| words[0].shuffle((self.lane & !3) | ((self.lane + 1) & 3)));
        self.steps(code, words, next)
    }

    /// Begins to decode a unit of a tile, of which `words` are all that its windows reach, its first bit the lowest.
    pub fn unit<'a>(&'a self, code: usize, words: &'a [V<'b>]) -> Steps<'a, 'b, 'q> {
        self.steps(code, words, None)
    }

    fn steps<'a>(&'a self, code: usize, words: &'a [V<'b>], next: Option<V<'b>>) -> Steps<'a, 'b, 'q> {
        let c = &self.q.codes[code];
        let needed = c.decode.window_bits(c.value, &c.tables);
        Steps { d: self, c, tables: &self.tables[code], words, next, needed, memo: HashMap::new() }
    }

    /// Loads the words that the windows of a lane's unit `index` of a tile reach, shifted so that its first bit is the lowest:
    /// what [`Decoder::unit`] takes. `at` is the tile's first word.
    pub fn unit_words(&self, code: usize, weights: Mem, at: V<'b>, index: V<'b>) -> Vec<V<'b>> {
        let (b, c, lane) = (self.b, &self.q.codes[code], self.lane);
        let of_lane = layout::lane_words(c);
        let bits = Unit::of(c).bits;
        let (first, shift) = if bits.is_multiple_of(32) {
            (index * (bits / 32), None)
        } else {
            let bit = index * bits;
            (bit >> 5, Some((bit & 31).bits(Scalar::U32)))
        };
        let next = (lane & !3) | ((lane + 1) & 3);
        let load = |i: u32| {
            let word = first + i;
            // Windows at the end of a lane's part reach into the next lane's first word; what lies beyond is not looked at.
            let beyond = word.ge(of_lane);
            let (lane, word) = (beyond.select(next, lane), beyond.select(b.i32(0), word));
            b.load_as(weights, at + word_in_tile(b, of_lane, lane, word), Elem::U32, 1, Cache::Stream)
        };
        let reached = (bits + c.window).div_ceil(32);
        let Some(shift) = shift else { return (0..reached).map(load).collect() };
        let loaded: Vec<V<'b>> = (0..reached + 2).map(load).collect();
        loaded.windows(2).map(|two| two[0].funnel_shr(two[1], shift)).collect()
    }
}

/// [`layout::word_in_tile`] of a lane and a word that the program does not know.
fn word_in_tile<'b>(b: &'b Builder, lane_words: u32, lane: V<'b>, word: V<'b>) -> V<'b> {
    let chunks = layout::chunks(lane_words);
    let at = |width: u32, first: V<'b>| first * 32 + lane * width + (word - first);
    let fours = chunks.iter().filter(|c| c.1 == 4).count() as u32 * 4;
    let tail = chunks.iter().filter(|c| c.1 < 4).map(|&(first, width)| (first, at(width, b.i32(first as i32))));
    let whole = (fours > 0).then(|| (0, at(4, word & !3)));
    // Of the chunks that begin at the word or before, the last.
    let mut parts = whole.into_iter().chain(tail);
    let (_, first) = parts.next().expect("a lane has words");
    parts.fold(first, |before, (begin, place)| word.ge(begin).select(place, before))
}

/// The smallest run of a lane's weights, whole operands of tensor-core products (16 weights), after which a code's pattern of
/// steps begins anew. Tiles are made of whole units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Operands of tensor-core products.
    pub operands: u32,
    /// Bits of the stream.
    pub bits: u32,
}

impl Unit {
    /// That of a code.
    pub fn of(code: &Code) -> Unit {
        let pattern = code.vector * code.steps.len() as u32;
        let operands = (1..).find(|n| (n * OPERAND).is_multiple_of(pattern)).expect("the pattern's own length will do");
        let bits = operands * OPERAND / pattern * code.steps.iter().sum::<u32>();
        Unit { operands, bits }
    }
}

/// Weights of a lane in an operand of a tensor-core product: four registers.
const OPERAND: u32 = 16;

/// Most registers of a tile that is decoded in one go, and most operations of the decode expression for all its steps.
const SMALL: (u32, u32) = (64, 1 << 12);

/// Whether the program that decodes a tile of `q` in one go is of a reasonable size.
pub fn is_small(q: &Quantizer) -> bool {
    let steps = |c: &Code| c.weights() / layout::LANES_PER_BLOCK / c.vector;
    let operations: u32 = q.codes.iter().map(|c| steps(c) * c.decode.nodes.len() as u32).sum();
    q.codes[0].weights() / OPERAND <= SMALL.0 && operations <= SMALL.1
}

/// How often to repeat a table: so often that no two lanes meet in a bank if that fits into `budget` words; otherwise as
/// often as fits, or somewhat less often if an index `x >> k` then needs no shift to become an address.
fn copies(code: &Code, table: &Table, budget: u32) -> u32 {
    let words = entry_words(code);
    let most = (budget / (table.entries * words)).clamp(1, 32 / words);
    let most = 1 << most.ilog2();
    if most * words == 32 {
        return most;
    }
    let shifts = code.decode.nodes.iter().filter_map(|op| match op {
        Op::Lookup { table: t, index } if code.tables[*t as usize].name == table.name => match code.decode.op(*index) {
            Op::Binary(WordOp::Shr, _, k) => match code.decode.op(*k) {
                Op::Const(k) => Some(*k),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    });
    // Address bits begin at log2(4·words·copies).
    shifts.map(|k| (1u32 << k.min(16)) / (4 * words)).find(|c| (4..=most).contains(c)).unwrap_or(most)
}

/// The steps of one lane's part of a block.
pub struct Steps<'a, 'b, 'q> {
    d: &'a Decoder<'b, 'q>,
    c: &'q Code,
    tables: &'a [LookupTable<'b>],
    words: &'a [V<'b>],
    next: Option<V<'b>>,
    /// Bits of a window that matter; if none lies beyond L, it need not be cut off there.
    needed: u32,
    /// Words and bits already computed, by node and step.
    memo: HashMap<(Node, u32), V<'b>>,
}

impl<'b> Steps<'_, 'b, '_> {
    /// Decodes register `r`.
    pub fn register(&mut self, r: u32) -> Register<'b> {
        let per = 4 / self.c.vector;
        let steps: Vec<u32> = (r * per..(r + 1) * per).collect();
        let packed = self.vector(self.c.decode.result(), &steps);
        match self.c.value {
            Value::I8 => Register { low: packed[0], high: None },
            Value::I16 => {
                Register { low: packed[0].permute(packed[1], 0x6420), high: Some(packed[0].permute(packed[1], 0x7531)) }
            }
        }
    }

    /// The window of step `s` of the lane, zero-extended, unless the expression does not look at what lies above.
    fn window(&self, s: u32) -> V<'b> {
        if self.needed & !mask(self.c.window) == 0 {
            return self.bits_from(s, 32 - self.needed.leading_zeros());
        }
        let bits = self.c.window;
        let (at, shift) = ((self.c.step_offset(s) / 32) as usize, self.c.step_offset(s) % 32);
        let lo = self.words[at];
        if shift + bits > 32 {
            let hi = self.words.get(at + 1).copied().or(self.next).expect("a next word");
            return lo.funnel_shr(hi, shift) & mask(bits);
        }
        if shift > 0 && shift.is_multiple_of(8) && bits.is_multiple_of(8) {
            // Whole bytes: one permute picks them, and zeros (byte 4: the low byte of a zero word) above.
            let nibble = |i| if i < bits / 8 { shift / 8 + i } else { 4 };
            return lo.permute(self.d.b.u32(0), (0..4).map(|i| nibble(i) << (4 * i)).sum());
        }
        let shifted = if shift == 0 { lo } else { lo >> shift };
        if shift + bits == 32 { shifted } else { shifted & mask(bits) }
    }

    /// At least `bits` bits from the beginning of step `s` on, and above them anything.
    fn bits_from(&self, s: u32, bits: u32) -> V<'b> {
        let (at, shift) = ((self.c.step_offset(s) / 32) as usize, self.c.step_offset(s) % 32);
        let lo = self.words[at];
        if shift + bits > 32 {
            let hi = self.words.get(at + 1).copied().or(self.next).expect("a next word");
            return lo.funnel_shr(hi, shift);
        }
        if shift == 0 { lo } else { lo >> shift }
    }

    /// A word or a bit (as 0 or 1) of step `s`.
    fn word(&mut self, n: Node, s: u32) -> V<'b> {
        if let Some(&v) = self.memo.get(&(n, s)) {
            return v;
        }
        let (b, decode) = (self.d.b, &self.c.decode);
        let v = match decode.op(n) {
            Op::Window => self.window(s),
            _ => word_of(b, decode, n, &mut |n| self.word(n, s)),
        };
        self.memo.insert((n, s), v);
        v
    }

    /// The packed vectors of `steps`, which fill one register (8-bit entries) or two (16-bit).
    fn vector(&mut self, n: Node, steps: &[u32]) -> Vec<V<'b>> {
        match self.c.decode.op(n) {
            Op::Lookup { table, index } => {
                let parts: Vec<_> = steps.iter().flat_map(|&s| self.lookup(*table, *index, s)).collect();
                if self.tables[*table as usize].words == 2 { parts } else { self.merge(parts, self.c.vector) }
            }
            Op::Signs(bits) => {
                let bits: Vec<_> = steps.iter().flat_map(|&s| bits.iter().map(move |&n| (n, s))).collect();
                self.replicate(&bits)
            }
            Op::Pack(words) => {
                let parts: Vec<_> = steps.iter().flat_map(|&s| words.iter().map(move |&n| (n, s))).collect();
                let parts: Vec<_> = parts.into_iter().map(|(n, s)| self.word(n, s)).collect();
                self.merge(parts, 1)
            }
            Op::Vector(VectorOp::Xor, x, y) => {
                let (x, y) = (self.vector(*x, steps), self.vector(*y, steps));
                x.into_iter().zip(y).map(|(x, y)| x ^ y).collect()
            }
            Op::Vector(VectorOp::Add, x, y) => {
                let top = match self.c.value {
                    Value::I8 => 0x8080_8080_u32,
                    Value::I16 => 0x8000_8000,
                };
                let (x, y) = (self.vector(*x, steps), self.vector(*y, steps));
                // No carry may leave an entry: add without the top bits, then put them in.
                x.into_iter().zip(y).map(|(x, y)| ((x & !top) + (y & !top)) ^ ((x ^ y) & top)).collect()
            }
            Op::Window | Op::Const(_) | Op::Not(_) | Op::Binary(..) | Op::Byte(..) | Op::ByteSum(_) | Op::Bit(..) => {
                unreachable!("a word among vectors")
            }
        }
    }

    /// The words of the entry that step `s` looks up.
    fn lookup(&mut self, table: u32, index: Node, s: u32) -> Vec<V<'b>> {
        let d = self.d;
        let t = &self.tables[table as usize];
        // Addresses in bytes, made with as few instructions as the index's bits allow: a shift unless they lie right,
        // and one mask-and-or.
        let scale = (4 * t.words * t.copies).ilog2();
        let field = (t.entries - 1) << scale;
        let shifted = match *self.c.decode.op(index) {
            Op::Binary(WordOp::Shr, x, k) => match *self.c.decode.op(k) {
                Op::Const(k) if k < 32 => Some((x, k)),
                _ => None,
            },
            _ => None,
        };
        let (x, right) = shifted.unwrap_or((index, 0));
        let x = self.word(x, s);
        let x = match right.cmp(&scale) {
            Ordering::Less => x << (scale - right),
            Ordering::Equal => x,
            Ordering::Greater => x >> (right - scale),
        };
        let at = x & field;
        match t.bank {
            Some(bank) => {
                let at = if t.copies > 1 { at | bank } else { at };
                d.b.load_as(t.mem, at, Elem::U32, t.words, Cache::Default).lanes()
            }
            // Entries of two words need not be aligned there.
            None => {
                let word = |w: u32| d.b.load_as(t.mem, at + 4 * (t.first + w), Elem::U32, 1, Cache::ReadOnly);
                (0..t.words).map(word).collect()
            }
        }
    }

    /// Merges words that each hold `entries` entries in their low bits into full registers.
    fn merge(&self, mut parts: Vec<V<'b>>, entries: u32) -> Vec<V<'b>> {
        let mut bytes = entries * self.c.value.bytes();
        while bytes < 4 {
            let selector = if bytes == 1 { 0x0040 } else { 0x5410 };
            parts = parts.chunks_exact(2).map(|p| p[0].permute(p[1], selector)).collect();
            bytes *= 2;
        }
        parts
    }

    /// All-ones entries where the bits are set, in order.
    fn replicate(&mut self, bits: &[(Node, u32)]) -> Vec<V<'b>> {
        // Each bit's word, shifted so that the bit is at the top of a byte, and that byte.
        let mut slots: Vec<(V<'b>, u32)> = Vec::new();
        let mut shifted: HashMap<(Node, u32, u32), V<'b>> = HashMap::new();
        for &(n, s) in bits {
            let Op::Bit(w, i) = *self.c.decode.op(n) else { unreachable!("signs take bits") };
            let (byte, up) = (i / 8, 7 - i % 8);
            let word = self.word(w, s);
            let word = if up == 0 { word } else { *shifted.entry((w, s, up)).or_insert_with(|| word << up) };
            slots.extend((0..self.c.value.bytes()).map(|_| (word, byte)));
        }
        slots.chunks_exact(4).map(gather).collect()
    }
}

/// The value of a node that is a word or a bit (as 0 or 1), but not the window, from those of others.
pub(super) fn word_of<'b>(b: &'b Builder, decode: &Decode, n: Node, word: &mut dyn FnMut(Node) -> V<'b>) -> V<'b> {
    match decode.op(n) {
        Op::Const(c) => b.u32(*c),
        Op::Not(a) => !word(*a),
        Op::Binary(op, x, y) => {
            let (a, c) = (word(*x), word(*y));
            let constant = match decode.op(*y) {
                Op::Const(k) => Some(*k),
                _ => None,
            };
            binary(b, *op, a, c, constant)
        }
        Op::Byte(a, i) => (word(*a) >> (8 * i)) & 0xff_u32,
        Op::ByteSum(a) => {
            // The product takes signed bytes: flip the top bits (each byte less 128), add 4·128.
            let flipped = word(*a) ^ 0x8080_8080_u32;
            flipped.dot4(b.u32(0x0101_0101), b.i32(512)).bits(Scalar::U32)
        }
        Op::Bit(a, i) => (word(*a) >> *i) & 1_u32,
        Op::Window | Op::Lookup { .. } | Op::Signs(_) | Op::Pack(_) | Op::Vector(..) => {
            unreachable!("a window, or a vector among words")
        }
    }
}

fn binary<'b>(b: &'b Builder, op: WordOp, a: V<'b>, c: V<'b>, constant: Option<u32>) -> V<'b> {
    // A shift by 32 or more gives 0, which the hardware's (and the IR's) shifts do not promise.
    let shift = |f: &dyn Fn(V<'b>) -> V<'b>| match constant {
        Some(k) if k >= 32 => b.u32(0),
        Some(_) => f(c),
        None => c.lt(32_u32).select(f(c & 31_u32), 0_u32),
    };
    match op {
        WordOp::Add => a + c,
        WordOp::Sub => a - c,
        WordOp::Mul => a * c,
        WordOp::And => a & c,
        WordOp::Or => a | c,
        WordOp::Xor => a ^ c,
        WordOp::Shl => shift(&|k| a << k),
        WordOp::Shr => shift(&|k| a >> k),
    }
}

/// One register whose byte `i` is filled with the top bit of byte `four[i].1` of word `four[i].0`.
fn gather<'b>(four: &[(V<'b>, u32)]) -> V<'b> {
    let pick = |slots: &[(V<'b>, u32)], a: V<'b>, b: V<'b>| {
        let nibble = |&(v, byte): &(V<'b>, u32)| 8 + byte + if v.val == a.val { 0 } else { 4 };
        a.permute(b, slots.iter().enumerate().map(|(i, s)| nibble(s) << (4 * i)).sum())
    };
    let a = four[0].0;
    let b = four.iter().map(|s| s.0).find(|v| v.val != a.val).unwrap_or(a);
    if four.iter().all(|s| s.0.val == a.val || s.0.val == b.val) {
        return pick(four, a, b);
    }
    let low = pick(&four[..2], four[0].0, four[1].0);
    let high = pick(&four[2..], four[2].0, four[3].0);
    low.permute(high, 0x5410)
}

/// Work of decoding one tile of a code, for one warp.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Integer and bit operations but products and left shifts: those of the pipe that is first full.
    pub alu: u32,
    /// Products and left shifts, of another pipe.
    pub multiply: u32,
    /// Cycles that look-ups take of the shared memory.
    pub lookup: f64,
}

/// The work of decoding a tile of code `code`, with tables of `table_bytes`.
pub fn tile_cost(q: &Quantizer, code: usize, table_bytes: u32) -> Cost {
    let b = Builder::new("cost", [1, 1], 32);
    let decoder = Decoder::new(&b, q, table_bytes);
    let weights = b.buffer("weights", Elem::U32, false);
    let words = load_words(&b, weights, b.i32(0), decoder.lane, layout::lane_words(&q.codes[code]));
    let passes = |t: &LookupTable| match t.bank {
        Some(_) => f64::from(t.words) * wavefronts(t.copies * t.words),
        None => GLOBAL_PASSES,
    };
    let wavefronts: HashMap<_, _> = decoder.tables[code].iter().map(|t| (t.mem, passes(t))).collect();
    let words = flatten(&words);
    let before = words.last().map_or(0, |w| w.val.0 as usize + 1);
    decoder.tile(code, &words);
    let _ = (decoder, words);
    let kernel = b.finish();
    let mut cost = Cost::default();
    for v in &kernel.values[before..] {
        match v.op {
            ir::Op::Const(_) | ir::Op::Bitcast(..) | ir::Op::Extract(..) => (),
            ir::Op::Binary(BinaryOp::Mul | BinaryOp::Shl, ..) => cost.multiply += 1,
            // The assembler joins two bitwise operations in one.
            ir::Op::Binary(BinaryOp::And, ..) => (),
            ir::Op::Load { mem, .. } => cost.lookup += wavefronts.get(&mem).copied().unwrap_or(0.0),
            _ => cost.alu += 1,
        }
    }
    cost
}

/// The same for a word of a table in global memory, if it is in the L1 cache: nearly every lane meets a line of its own.
const GLOBAL_PASSES: f64 = 16.0;

/// Passes through shared memory that 32 lanes take to look up random entries, each in its own of `copies` copies of one
/// word: the most lanes that meet in one of the 32 / copies banks of a copy.
fn wavefronts(copies: u32) -> f64 {
    match copies {
        32.. => 1.0,
        16..32 => 2.0,
        8..16 => 3.0,
        _ => 3.5,
    }
}

/// Bytes of shared memory that the tables of a quantizer take, of `table_bytes` that they may; and for each table the
/// stores that fill it, of which a thread has [`FILL`] loads on their way at a time.
pub fn shared_tables(q: &Quantizer, table_bytes: u32) -> (u32, Vec<u32>) {
    let b = Builder::new("tables", [1, 1], 32);
    let stores = Decoder::new(&b, q, table_bytes).shared().map(LookupTable::stores).collect();
    (b.finish().shared_bytes(), stores)
}

/// Loads a lane's words of one tile: chunk by chunk, each a coalesced vector. `at` is the tile's first word.
pub fn load_words<'b>(b: &'b Builder, weights: Mem, at: V<'b>, lane: V<'b>, lane_words: u32) -> Vec<V<'b>> {
    let load = |&(first, width): &(u32, u32)| {
        let index = at + lane * width + first * 32;
        b.load_as(weights, index, Elem::U32, width, Cache::Stream)
    };
    layout::chunks(lane_words).iter().map(load).collect()
}

/// The single words of loaded chunks.
pub fn flatten<'b>(chunks: &[V<'b>]) -> Vec<V<'b>> {
    chunks.iter().flat_map(|c| c.lanes()).collect()
}

//! Making inputs of other inputs.

use qp_tests::random_specs::Random;

/// Makes one input.
pub struct Mutator(Random);

/// Values that numbers are replaced by.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "-1",
    "2",
    "7",
    "31",
    "32",
    "33",
    "255",
    "65536",
    "1048576",
    "2147483647",
    "4294967296",
    "9223372036854775807",
    "1e308",
    "0.5",
];

/// Bytes that mean something to many readers.
const BYTES: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b'\n', b'\r', b'"', b'\\', 0x1b];

impl Mutator {
    /// The mutator of a seed.
    pub fn new(seed: u64) -> Self {
        Mutator(Random::new(seed))
    }

    /// An input of at most `longest` bytes, made of one of `corpus` by a few changes.
    pub fn input(&mut self, corpus: &[Vec<u8>], words: &[&str], longest: usize) -> Vec<u8> {
        let r = &mut self.0;
        let mut out = match corpus.len() as u32 {
            0 => Vec::new(),
            n => corpus[r.below(n) as usize].clone(),
        };
        for _ in 0..1 << r.below(5) {
            self.change(&mut out, corpus, words);
        }
        out.truncate(longest);
        out
    }

    fn change(&mut self, out: &mut Vec<u8>, corpus: &[Vec<u8>], words: &[&str]) {
        let r = &mut self.0;
        let len = out.len() as u32;
        let at = r.below(len + 1) as usize;
        let run = |r: &mut Random, from: usize, len: usize| {
            let most = (len - from).min(if r.once_in(4) { len } else { 32 });
            from..from + r.below(most as u32 + 1) as usize
        };
        match r.below(10) {
            0 if at < out.len() => out[at] ^= 1 << r.below(8),
            1 if at < out.len() => out[at] = r.pick(&BYTES),
            2 => {
                let range = run(r, at, out.len());
                out.drain(range);
            }
            3 => {
                let piece = out[run(r, at, out.len())].to_vec();
                let to = r.below(len + 1) as usize;
                let times = if r.once_in(8) { r.within(2, 200) } else { 1 };
                for _ in 0..times {
                    out.splice(to..to, piece.iter().copied());
                }
            }
            4 if !corpus.is_empty() => {
                let other = &corpus[r.below(corpus.len() as u32) as usize];
                let from = r.below(other.len() as u32 + 1) as usize;
                let piece = other[run(r, from, other.len())].to_vec();
                out.splice(at..at, piece);
            }
            5 | 6 if !words.is_empty() => {
                let word = r.pick(words);
                out.splice(at..at, word.bytes());
            }
            7 | 8 => {
                // The number at or after a place becomes another.
                let digit = |b: &u8| b.is_ascii_digit();
                let Some(from) = out[at..].iter().position(digit).map(|i| at + i) else { return };
                let to = out[from..].iter().position(|b| !digit(b)).map_or(out.len(), |i| from + i);
                let number = if r.once_in(2) { r.below(300).to_string() } else { r.pick(&NUMBERS).to_string() };
                out.splice(from..to, number.bytes());
            }
            _ => out.truncate(at),
        }
    }
}

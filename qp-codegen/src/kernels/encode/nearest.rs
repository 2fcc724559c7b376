//! Codes without memory: each step's nearest entry, by [`crate::metric::Nearest`].

use super::{Emit, Plan};
use crate::ir::{Cache, Elem, Scalar, Special, V, Var};
use crate::spec::Value;

/// Steps that a thread encodes at once.
const STEPS: u32 = 4;

impl Plan {
    /// [`Plan::weights`]: for each step its numbers, two in a word.
    pub(super) fn nearest_weights(&self, blocks: &[f32], words: &mut [u32]) {
        let (v, per) = (self.code.vector as usize, self.weight_words() as usize);
        words.fill(0);
        for (words, x) in words.chunks_exact_mut(per).zip(blocks.chunks_exact(v)) {
            for (i, &x) in x.iter().enumerate() {
                words[i / 2] |= u32::from(self.nearest.weight(x).cast_unsigned()) << (16 * (i % 2));
            }
        }
    }

    /// Bits of an entry: with its energy if entries have 16 bits.
    fn entry_bits(&self) -> u32 {
        match (self.code.value, self.code.vector) {
            (Value::I8, 1 | 2) => 16,
            (Value::I8, _) => 32,
            (Value::I16, 1 | 2) => 64,
            (Value::I16, _) => 128,
        }
    }

    /// [`Plan::book`]: window after window.
    pub(super) fn nearest_book(&self) -> Vec<u32> {
        let (v, per) = (self.code.vector as usize, self.entry_bits() as usize / 16);
        let mut halves = vec![0u16; per << self.code.window];
        for (out, entry) in halves.chunks_exact_mut(per).zip(self.code.codebook().chunks_exact(v)) {
            match self.code.value {
                Value::I8 => {
                    let byte = |i: usize| entry.get(i).map_or(0, |&c| u16::from(c as i8 as u8));
                    out.iter_mut().enumerate().for_each(|(i, o)| *o = byte(2 * i) | byte(2 * i + 1) << 8);
                }
                Value::I16 => {
                    out.iter_mut().zip(entry).for_each(|(o, &c)| *o = c.cast_unsigned());
                    let energy = self.nearest.energy(entry).cast_unsigned();
                    let at = if per == 4 { 2 } else { 4 };
                    (out[at], out[at + 1]) = (energy as u16, (energy >> 16) as u16);
                }
            }
        }
        halves.chunks(2).map(|h| u32::from(h[0]) | u32::from(h.get(1).copied().unwrap_or(0)) << 16).collect()
    }
}

/// An entry in registers: for 8-bit entries its bytes, for 16-bit entries its components.
struct Entry<'b> {
    parts: Vec<V<'b>>,
    energy: V<'b>,
}

impl<'b> Emit<'b> {
    fn entry(&self, at: V<'b>) -> Entry<'b> {
        let (b, plan) = (self.b, self.plan);
        match plan.code.value {
            Value::I8 => {
                let elem = if plan.entry_bits() == 16 { Elem::U16 } else { Elem::U32 };
                let bytes = b.load_as(self.book, at, elem, 1, Cache::ReadOnly);
                Entry { parts: vec![bytes], energy: bytes.dot4(bytes, b.i32(0)) << plan.nearest.fraction }
            }
            Value::I16 => {
                let words = plan.entry_bits() / 32;
                let words = b.load_as(self.book, at * words, Elem::U32, words, Cache::ReadOnly).lanes();
                let packed = plan.weight_words() as usize;
                let parts = words[..packed].iter().flat_map(|&w| halves(w)).take(plan.code.vector as usize);
                Entry { parts: parts.collect(), energy: words[packed].bits(Scalar::I32) }
            }
        }
    }

    fn distance(&self, weights: &[V<'b>], entry: &Entry<'b>) -> V<'b> {
        weights.iter().enumerate().fold(entry.energy, |d, (i, &x)| match self.plan.code.value {
            Value::I8 => x.dot2(entry.parts[0], i == 1, d),
            Value::I16 => d + x * entry.parts[i],
        })
    }

    pub(super) fn nearest(&self, groups: V<'b>, blocks: u32) {
        let (b, plan) = (self.b, self.plan);
        let (per, all) = (plan.weight_words(), groups * plan.steps());
        let first = (b.special(Special::BlockX) * plan.threads + b.special(Special::Thread)) * STEPS;
        b.for_(first, all, blocks * plan.threads * STEPS, |first| {
            // Steps come in multiples of 32.
            let weights: Vec<Vec<V<'b>>> = (0..STEPS)
                .map(|k| {
                    let load = |i| b.load_as(self.weights, (first + k) * per + i, Elem::U32, 1, Cache::ReadOnly);
                    let words = (0..per).map(load);
                    match plan.code.value {
                        Value::I8 => words.collect(),
                        Value::I16 => words.flat_map(halves).take(plan.code.vector as usize).collect(),
                    }
                })
                .collect();
            let best: Vec<(Var, Var)> = weights.iter().map(|_| (b.var(b.i32(i32::MAX)), b.var(b.i32(0)))).collect();
            b.for_(0, 1u32 << plan.code.window, 1, |window| {
                let entry = self.entry(window);
                for (weights, &(best, found)) in weights.iter().zip(&best) {
                    let distance = self.distance(weights, &entry);
                    b.if_(distance.lt(b.get(best)), || {
                        b.set(best, distance);
                        b.set(found, window);
                    });
                }
            });
            let found: Vec<V<'b>> = best.iter().map(|(_, found)| b.get(*found).bits(Scalar::U32)).collect();
            b.store(self.windows, first, b.vector(&found), Elem::U32);
        });
    }
}

/// The two signed halves of a word.
fn halves(word: V<'_>) -> [V<'_>; 2] {
    let word = word.bits(Scalar::I32);
    [(word.bits(Scalar::U32) << 16_u32).bits(Scalar::I32) >> 16, word >> 16]
}

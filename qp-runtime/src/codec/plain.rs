//! The search of [`super::viterbi`] as a plain loop: one block, one state after the other, every decision kept. What
//! the fast encoders are compared with, for their results and for their speed.

use qp_codegen::metric::{Metric, UNREACHABLE};
use qp_codegen::spec::Code;

/// A code made ready to encode.
#[derive(Debug)]
pub struct Plain<'c> {
    code: &'c Code,
    steps: usize,
    book: Vec<i16>,
    energies: Vec<i32>,
    metric: Metric,
}

impl<'c> Plain<'c> {
    /// Prepares `code`, whose tables must be filled, for streams of `weights` weights.
    pub fn with_length(code: &'c Code, weights: usize) -> Self {
        let (book, steps) = (code.codebook(), weights / code.vector as usize);
        let metric = Metric::new(code, steps as u32);
        let energies = book.chunks_exact(code.vector as usize).map(|e| metric.energy(e)).collect();
        Plain { code, steps, book, energies, metric }
    }

    /// The windows that [`super::viterbi::Trellis::encode`] finds for a block of finite weights.
    pub fn encode(&self, block: &[f32]) -> Vec<u32> {
        let n: Vec<i16> = block.iter().map(|&x| self.metric.weight(x)).collect();
        if self.code.is_memoryless() {
            let nearest = |s| (0..1u32 << self.code.window).min_by_key(|&w| self.branch(&n, s, w));
            return (0..self.steps).map(|s| nearest(s).expect("a window")).collect();
        }
        let reach = self.code.reach(self.steps as u32) as usize;
        let around = self.search(&n, self.steps - reach, (2 * reach).min(self.steps), None);
        let seam = around[reach % self.steps] & (self.states(0) - 1);
        self.search(&n, 0, self.steps, Some(seam))
    }

    fn branch(&self, n: &[i16], s: usize, w: u32) -> i32 {
        let v = self.code.vector as usize;
        self.metric.branch(&n[s * v..][..v], &self.book[w as usize * v..][..v], self.energies[w as usize])
    }

    /// States before step `s`.
    fn states(&self, s: usize) -> u32 {
        1 << (self.code.window - self.code.step_bits(((s + self.steps - 1) % self.steps) as u32))
    }

    fn search(&self, n: &[i16], first: usize, count: usize, seam: Option<u32>) -> Vec<u32> {
        let mut costs = vec![if seam.is_some() { UNREACHABLE } else { 0 }; self.states(first) as usize];
        seam.iter().for_each(|&o| costs[o as usize] = 0);
        let mut decisions: Vec<Vec<u32>> = vec![];
        for s in (0..count).map(|i| (first + i) % self.steps) {
            let bits = self.code.step_bits(s as u32);
            let mask = self.states(s) - 1;
            let (mut next, mut chosen) = (vec![], vec![]);
            for o in 0..1u32 << (self.code.window - bits) {
                let mut best = (i32::MAX, 0);
                for w in o << bits..(o + 1) << bits {
                    let cost = costs[(w & mask) as usize] + self.branch(n, s, w);
                    if cost < best.0 {
                        best = (cost, w);
                    }
                }
                next.push(best.0);
                chosen.push(best.1);
            }
            costs = next;
            decisions.push(chosen);
        }
        let best = (0..costs.len() as u32).min_by_key(|&o| costs[o as usize]).expect("a state");
        let mut state = seam.unwrap_or(best);
        let mut path = vec![0; count];
        for i in (0..count).rev() {
            path[i] = decisions[i][state as usize];
            state = path[i] & (self.states((first + i) % self.steps) - 1);
        }
        path
    }
}

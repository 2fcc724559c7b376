//! The search of [`super::viterbi`] as a plain loop: one block, one state after the other, every decision kept. What
//! the fast encoders are compared with, for their results and for their speed.

use half::f16;
use qp_codegen::metric::{Metric, Nearest, REBASE};
use qp_codegen::spec::Code;

/// A code made ready to encode.
#[derive(Debug)]
pub struct Plain<'c> {
    code: &'c Code,
    steps: usize,
    book: Vec<i16>,
}

impl<'c> Plain<'c> {
    /// Prepares `code`, whose tables must be filled, for streams of `weights` weights.
    pub fn with_length(code: &'c Code, weights: usize) -> Self {
        Plain { code, steps: weights / code.vector as usize, book: code.codebook() }
    }

    /// The windows that [`super::viterbi::Trellis::encode`] finds for a block of finite weights.
    pub fn encode(&self, block: &[f32]) -> Vec<u32> {
        if self.code.is_memoryless() {
            return self.nearest(block);
        }
        let metric = Metric::new(self.code);
        let mut components = self.book.clone();
        components.sort_unstable();
        components.dedup();
        let search = Search {
            plain: self,
            points: block.iter().map(|&x| metric.weight(x)).collect(),
            ranks: self.book.iter().map(|c| components.binary_search(c).expect("a component")).collect(),
            components: components.into_iter().map(|c| metric.entry(c)).collect(),
            metric,
        };
        let reach = self.code.reach(self.steps as u32) as usize;
        let around = search.run(self.steps - reach, (2 * reach).min(self.steps), None);
        let seam = around[reach % self.steps] & (self.states(0) - 1);
        search.run(0, self.steps, Some(seam))
    }

    fn nearest(&self, block: &[f32]) -> Vec<u32> {
        let (nearest, v) = (Nearest::new(self.code), self.code.vector as usize);
        let entries: Vec<(&[i16], i32)> = self.book.chunks_exact(v).map(|e| (e, nearest.energy(e))).collect();
        let n: Vec<i16> = block.iter().map(|&x| nearest.weight(x)).collect();
        let best = |n| (0..entries.len()).min_by_key(|&w| nearest.distance(n, entries[w].0, entries[w].1));
        n.chunks_exact(v).map(|n| best(n).expect("a window") as u32).collect()
    }

    /// States before step `s`.
    fn states(&self, s: usize) -> u32 {
        1 << (self.code.window - self.code.step_bits(((s + self.steps - 1) % self.steps) as u32))
    }
}

/// The weights and entries of a trellis code as its metric takes them.
struct Search<'p> {
    plain: &'p Plain<'p>,
    metric: Metric,
    points: Vec<f16>,
    /// All that there are, each once.
    components: Vec<f16>,
    /// For each window which components its entry has.
    ranks: Vec<usize>,
}

impl Search<'_> {
    /// The best path of `count` steps from step `first` on, through the state `seam` at both ends if there is one.
    fn run(&self, first: usize, count: usize, seam: Option<u32>) -> Vec<u32> {
        let (plain, code, v) = (self.plain, self.plain.code, self.plain.code.vector as usize);
        let mut costs = vec![if seam.is_some() { self.metric.limit } else { 0 }; plain.states(first) as usize];
        seam.iter().for_each(|&o| costs[o as usize] = 0);
        let mut decisions: Vec<Vec<u32>> = vec![];
        for s in (0..count).map(|i| (first + i) % plain.steps) {
            let (bits, mask) = (code.step_bits(s as u32), plain.states(s) - 1);
            let of_point = |&p| self.components.iter().map(|&c| self.metric.component(p, c)).collect();
            let metrics: Vec<Vec<u16>> = self.points[s * v..][..v].iter().map(of_point).collect();
            let least = costs.iter().min().expect("a state");
            let less = if (s as u32).is_multiple_of(REBASE) { *least } else { 0 };
            let (mut next, mut chosen) = (vec![], vec![]);
            for o in 0..1u32 << (code.window - bits) {
                let mut best = (u16::MAX, o << bits);
                for w in o << bits..(o + 1) << bits {
                    let ranks = &self.ranks[w as usize * v..][..v];
                    let metric: u16 = metrics.iter().zip(ranks).map(|(m, &rank)| m[rank]).sum();
                    let cost = costs[(w & mask) as usize] + metric;
                    if cost < best.0 {
                        best = (cost, w);
                    }
                }
                next.push(best.0.min(self.metric.limit) - less);
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
            state = path[i] & (plain.states((first + i) % plain.steps) - 1);
        }
        path
    }
}

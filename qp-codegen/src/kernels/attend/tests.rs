//! The twin on the CPU against attention in double precision, and the kernels against the twin.

use super::reference::{self, Norms, Query, Token};
use super::*;
use crate::kernels::Span;

/// Random numbers.
struct Random(u64);

impl Random {
    /// Uniform in 0..1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Gaussian.
    fn normal(&mut self) -> f32 {
        let (a, b) = (self.uniform(), self.uniform());
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    fn below(&mut self, n: u32) -> u32 {
        (self.uniform() * f64::from(n)) as u32
    }
}

/// Angles of a position: cosines and sines of `half` pairs.
fn angles(position: usize, half: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |i: usize| position as f32 * 0.7f32.powi(i as i32);
    ((0..half).map(|i| angle(i).cos()).collect(), (0..half).map(|i| angle(i).sin()).collect())
}

/// What a model asks of attention.
#[derive(Clone, Copy)]
struct Model {
    heads: u32,
    cache: Cache,
    rotary: u32,
    norm: Option<f32>,
    window: Option<u32>,
    soft_cap: Option<f32>,
    sinks: bool,
}

const PLAIN: Model = Model {
    heads: 4,
    cache: Cache { kv_heads: 2, head_dim: 64, planes: 2 },
    rotary: 64,
    norm: None,
    window: None,
    soft_cap: None,
    sinks: false,
};

impl Model {
    fn scale(&self) -> f32 {
        1.0 / (self.cache.head_dim as f32).sqrt()
    }

    fn qkv(&self) -> usize {
        ((self.heads + 2 * self.cache.kv_heads) * self.cache.head_dim) as usize
    }

    fn append(&self, tokens: u32) -> Append {
        let d = self.cache.head_dim;
        let span = |first| Span { first, stride: self.qkv() as u32 };
        Append {
            cache: self.cache,
            heads: self.heads,
            tokens,
            q: span(0),
            k: span(self.heads * d),
            v: span((self.heads + self.cache.kv_heads) * d),
            rotary: self.rotary,
            norm: self.norm,
            scale: self.scale(),
        }
    }

    fn attend(&self, tokens: u32) -> Attend {
        let Model { heads, cache, window, soft_cap, sinks, .. } = *self;
        Attend { cache, heads, tokens, window, soft_cap, sinks }
    }
}

/// A sequence's numbers before attention, of each token one behind the other: queries, keys, values.
struct Sequence {
    qkv: Vec<f32>,
    norms: [Vec<f32>; 2],
    sinks: Vec<f32>,
    pages: Vec<i32>,
}

impl Sequence {
    /// Of `tokens` tokens, whose pages are some of `pages`.
    fn new(model: &Model, random: &mut Random, tokens: usize, pages: Vec<i32>) -> Sequence {
        let d = model.cache.head_dim as usize;
        let mut norm = || random.normals(d).iter().map(|x| 1.0 + 0.1 * x).collect();
        let norms = [norm(), norm()];
        let sinks = random.normals(model.heads as usize);
        Sequence { qkv: random.normals(model.qkv() * tokens), norms, sinks, pages }
    }

    /// Appends token `position` by the twin; gives its queries and scales.
    fn append(&self, model: &Model, position: usize, cache: &mut [u8]) -> (Vec<i8>, Vec<f32>) {
        let op = model.append(1);
        let qkv = &self.qkv[position * model.qkv()..][..model.qkv()];
        let (k, v) = (op.k.first as usize, op.v.first as usize);
        let (cos, sin) = angles(position, model.rotary as usize / 2);
        let slot = self.pages[position / 64] as usize * 64 + position % 64;
        let token = Token { q: &qkv[..k], k: &qkv[k..v], v: &qkv[v..], cos: &cos, sin: &sin, slot };
        let norms = Norms { q: &self.norms[0], k: &self.norms[1] };
        let heads = model.heads as usize;
        let mut queries = vec![0; heads * 2 * model.cache.columns() as usize];
        let mut scales = vec![0.0; heads];
        assert!(reference::append(&op, &token, norms, cache, &mut queries, &mut scales));
        (queries, scales)
    }

    /// Attention of a token in double precision from the numbers before rounding.
    fn exact(&self, model: &Model, position: usize) -> Vec<f64> {
        let d = model.cache.head_dim as usize;
        let at = |p: usize, head: usize, norm: Option<&[f32]>, turn: bool| -> Vec<f64> {
            let x: Vec<f64> =
                self.qkv[p * model.qkv() + head * d..][..d].iter().map(|x| f64::from(*x)).collect();
            let mut x = match (norm, model.norm) {
                (Some(w), Some(eps)) => {
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                    x.iter().zip(w).map(|(x, w)| x / (mean + f64::from(eps)).sqrt() * f64::from(*w)).collect()
                }
                _ => x,
            };
            if turn {
                let half = model.rotary as usize / 2;
                let (cos, sin) = angles(p, half);
                for i in 0..half {
                    let (a, b, c, s) = (x[i], x[i + half], f64::from(cos[i]), f64::from(sin[i]));
                    (x[i], x[i + half]) = (a * c - b * s, b * c + a * s);
                }
            }
            x
        };
        let first = model.attend(1).first(position as u32) as usize;
        let (heads, kv_heads) = (model.heads as usize, model.cache.kv_heads as usize);
        let mut out = Vec::new();
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let q = at(position, head, Some(&self.norms[0]), true);
            let mut scores = Vec::new();
            for p in first..=position {
                let k = at(p, heads + kv, Some(&self.norms[1]), true);
                let s = q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() * f64::from(model.scale());
                scores.push(model.soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh()));
            }
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sink = if model.sinks { (f64::from(self.sinks[head]) - most).exp() } else { 0.0 };
            let total = weights.iter().sum::<f64>() + sink;
            let mut sums = vec![0.0; d];
            for (p, w) in (first..).zip(&weights) {
                let v = at(p, heads + kv_heads + kv, None, false);
                sums.iter_mut().zip(v).for_each(|(s, v)| *s += w * v / total);
            }
            out.extend(sums);
        }
        out
    }
}

/// Attention of token `position` by the twin.
fn twin(model: &Model, s: &Sequence, position: usize, cache: &[u8], queries: &[i8], scales: &[f32]) -> Vec<f32> {
    let (d, columns) = (model.cache.head_dim as usize, model.cache.columns() as usize);
    let op = model.attend(1);
    let mut out = vec![0f32; model.heads as usize * d];
    for (head, out) in out.chunks_exact_mut(d).enumerate() {
        let query = Query {
            planes: &queries[head * 2 * columns..][..2 * columns],
            scale: scales[head],
            position: position as u32,
            pages: &s.pages,
            kv_head: head as u32 / op.group(),
            sink: s.sinks[head],
        };
        assert!(reference::attend(&op, cache, &query, out));
    }
    out
}

/// Relative error of the twin, in the mean square over the last tokens of a sequence, against double precision.
fn error(model: &Model, s: &Sequence, tokens: usize) -> f64 {
    let pages = s.pages.iter().max().expect("pages") + 1;
    let mut cache = vec![0u8; pages as usize * model.cache.page_bytes() as usize];
    let (mut wrong, mut all) = (0.0, 0.0);
    for position in 0..tokens {
        let (queries, scales) = s.append(model, position, &mut cache);
        if position + 4 < tokens {
            continue;
        }
        let out = twin(model, s, position, &cache, &queries, &scales);
        for (x, y) in out.iter().zip(s.exact(model, position)) {
            wrong += (f64::from(*x) - y).powi(2);
            all += y * y;
        }
    }
    (wrong / all).sqrt()
}

#[test]
fn the_twin_is_near_attention_in_double_precision() {
    let mut random = Random(1);
    let eight = |m: Model| Model { cache: Cache { planes: 1, ..m.cache }, ..m };
    let of = |heads, kv_heads, head_dim| Model {
        heads,
        cache: Cache { kv_heads, head_dim, planes: 2 },
        rotary: head_dim,
        ..PLAIN
    };
    for (tokens, model) in [
        (1, PLAIN),
        (70, PLAIN),
        (700, Model { window: Some(100), ..PLAIN }),
        (300, Model { soft_cap: Some(2.0), ..PLAIN }),
        (300, Model { sinks: true, rotary: 16, ..PLAIN }),
        (2300, of(2, 2, 64)),
        (90, Model { norm: Some(1e-6), ..of(3, 1, 80) }),
        (260, of(4, 1, 96)),
        (520, of(4, 1, 128)),
        (140, of(2, 1, 256)),
    ] {
        let pages = (0..tokens as i32 / 64 + 1).rev().collect();
        let s = Sequence::new(&model, &mut random, tokens, pages);
        let (two, one) = (error(&model, &s, tokens), error(&eight(model), &s, tokens));
        println!("{tokens} tokens, {:?}: {two:.2e} {one:.2e}", model.cache);
        assert!(two < 1.5e-4, "{tokens} tokens, {:?}: {two:e}", model.cache);
        assert!(one < 2e-2, "{tokens} tokens, {:?}, 8 bits: {one:e}", model.cache);
    }
}

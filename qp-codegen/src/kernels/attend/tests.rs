//! The twin on the CPU against attention in double precision, and the kernels against the twin.

use super::reference::{self, Norms, Query, Token};
use super::*;
use crate::cuda::Target;
use crate::ir::interpret::{Arg, Options, Report, Trap, run};
use crate::ir::{Kernel, Stmt, validate};
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
    interleaved: bool,
    norm: Option<f32>,
    window: Option<u32>,
    soft_cap: Option<f32>,
    sinks: bool,
}

const PLAIN: Model = Model {
    heads: 4,
    cache: Cache { kv_heads: 2, head_dim: 64, planes: 2 },
    rotary: 64,
    interleaved: false,
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
            interleaved: self.interleaved,
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
#[derive(Clone)]
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

    /// The same with outliers: a few columns of keys and of values, and a few tokens, are large.
    fn with_outliers(mut self, model: &Model) -> Sequence {
        let d = model.cache.head_dim as usize;
        let (keys, values) = (model.heads as usize * d, (model.heads + model.cache.kv_heads) as usize * d);
        for (p, row) in self.qkv.chunks_exact_mut(model.qkv()).enumerate() {
            let token = if p % 61 == 7 { 4.0 } else { 1.0 };
            row[keys..values].iter_mut().enumerate().filter(|(i, _)| i % d % 37 == 5).for_each(|(_, x)| *x *= 12.0);
            row[values..].iter_mut().enumerate().filter(|(i, _)| i % d % 29 == 3).for_each(|(_, x)| *x *= 20.0);
            row[keys..].iter_mut().for_each(|x| *x *= token);
        }
        self
    }

    /// Attention of a token in double precision, with numbers as they are before rounding, or with queries, keys and values
    /// in half precision.
    fn exact(&self, model: &Model, position: usize, half: bool) -> Vec<f64> {
        let d = model.cache.head_dim as usize;
        let at = |p: usize, head: usize, norm: Option<&[f32]>, turn: bool| -> Vec<f64> {
            let x: Vec<f64> = self.qkv[p * model.qkv() + head * d..][..d].iter().map(|x| f64::from(*x)).collect();
            let mut x = match (norm, model.norm) {
                (Some(w), Some(eps)) => {
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                    x.iter().zip(w).map(|(x, w)| x / (mean + f64::from(eps)).sqrt() * f64::from(*w)).collect()
                }
                _ => x,
            };
            if turn {
                let pairs = model.rotary as usize / 2;
                let (cos, sin) = angles(p, pairs);
                for i in 0..pairs {
                    let (j, k) = if model.interleaved { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                    let (a, b, c, s) = (x[j], x[k], f64::from(cos[i]), f64::from(sin[i]));
                    (x[j], x[k]) = (a * c - b * s, b * c + a * s);
                }
            }
            if half {
                x.iter_mut().for_each(|x| *x = half::f16::from_f64(*x).to_f64());
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

/// Relative error in the mean square, over the last tokens of a sequence, against double precision: of the twin, and of half
/// precision.
fn errors(model: &Model, s: &Sequence, tokens: usize) -> [f64; 2] {
    let pages = s.pages.iter().max().expect("pages") + 1;
    let mut cache = vec![0u8; pages as usize * model.cache.page_bytes() as usize];
    let (mut wrong, mut all) = ([0.0; 2], 0.0);
    for position in 0..tokens {
        let (queries, scales) = s.append(model, position, &mut cache);
        if position + 4 < tokens {
            continue;
        }
        let out = twin(model, s, position, &cache, &queries, &scales);
        let (exact, half) = (s.exact(model, position, false), s.exact(model, position, true));
        for ((x, half), y) in out.iter().zip(half).zip(exact) {
            wrong[0] += (f64::from(*x) - y).powi(2);
            wrong[1] += (half - y).powi(2);
            all += y * y;
        }
    }
    wrong.map(|wrong| (wrong / all).sqrt())
}

#[test]
fn the_twin_is_near_attention_in_double_precision() {
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
        (90, Model { interleaved: true, rotary: 40, ..of(3, 1, 80) }),
        (90, Model { rotary: 0, ..PLAIN }),
        (260, of(4, 1, 96)),
        (520, of(4, 1, 128)),
        (140, of(2, 1, 256)),
    ] {
        let pages = (0..tokens as i32 / 64 + 1).rev().collect();
        // Each model has numbers of its own, so that another one in the list does not change them.
        let s = Sequence::new(&model, &mut Random(1), tokens, pages);
        for (s, kind, most) in
            [(s.clone().with_outliers(&model), "outliers", [1e-3, 1e-1]), (s, "Gaussian", [1.5e-4, 1.5e-2])]
        {
            let ([two, half], [one, _]) = (errors(&model, &s, tokens), errors(&eight(model), &s, tokens));
            let what = format!("{tokens} tokens of {}, {kind}", model.cache.head_dim);
            println!("{what}: {two:.1e} of 16 bits, {one:.1e} of 8, {half:.1e} of half precision");
            assert!(two < most[0] && one < most[1], "{what}: {two:e} of 16 bits, {one:e} of 8");
        }
    }
}

/// A step: tokens of several sequences, and those that fill it up (`None`).
struct Step<'a> {
    model: Model,
    sequences: &'a [Sequence],
    /// Each token's sequence and position.
    tokens: Vec<Option<(usize, usize)>>,
    /// The cache with all positions before the step's in it, and rubbish elsewhere.
    before: Vec<u8>,
    /// What the twin computes.
    after: Vec<u8>,
    queries: Vec<i8>,
    scales: Vec<f32>,
    y: Vec<f32>,
}

fn ints(v: impl IntoIterator<Item = i32>) -> Vec<u8> {
    v.into_iter().flat_map(i32::to_le_bytes).collect()
}

fn floats(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl<'a> Step<'a> {
    fn new(model: Model, sequences: &'a [Sequence], tokens: Vec<Option<(usize, usize)>>) -> Step<'a> {
        let pages = sequences.iter().flat_map(|s| &s.pages).max().expect("pages") + 1;
        let mut before = vec![0x91u8; pages as usize * model.cache.page_bytes() as usize];
        let scales = model.cache.scales() as usize;
        for piece in before.chunks_exact_mut(model.cache.piece_bytes() as usize) {
            piece[scales..].as_chunks_mut::<4>().0.iter_mut().for_each(|x| *x = 1e9f32.to_le_bytes());
        }
        for (i, s) in sequences.iter().enumerate() {
            let first = tokens.iter().flatten().filter(|t| t.0 == i).map(|t| t.1).min();
            (0..first.unwrap_or(0)).for_each(|p| drop(s.append(&model, p, &mut before)));
        }
        let mut after = before.clone();
        let columns = model.cache.columns() as usize;
        let (heads, d) = (model.heads as usize, model.cache.head_dim as usize);
        let (mut queries, mut scales) = (vec![0; tokens.len() * heads * 2 * columns], vec![0.0; tokens.len() * heads]);
        let appended: Vec<_> =
            tokens.iter().map(|t| t.map(|(i, p)| sequences[i].append(&model, p, &mut after))).collect();
        let mut y = vec![0.0; tokens.len() * heads * d];
        for (t, appended) in appended.iter().enumerate() {
            if let (Some((q, s)), Some((i, p))) = (appended, tokens[t]) {
                queries[t * heads * 2 * columns..][..q.len()].copy_from_slice(q);
                scales[t * heads..][..heads].copy_from_slice(s);
                y[t * heads * d..][..heads * d].copy_from_slice(&twin(&model, &sequences[i], p, &after, q, s));
            }
        }
        Step { model, sequences, tokens, before, after, queries, scales, y }
    }

    fn slots(&self) -> Vec<u8> {
        ints(self.tokens.iter().map(|t| t.map_or(-1, |(i, p)| self.sequences[i].pages[p / 64] * 64 + (p % 64) as i32)))
    }

    fn positions(&self) -> Vec<u8> {
        ints(self.tokens.iter().map(|t| t.map_or(77, |t| t.1 as i32)))
    }

    /// The kernel that appends, against the twin.
    fn check_append(&self) {
        let (model, tokens) = (&self.model, self.tokens.len());
        let mut qkv = vec![f32::NAN; tokens * model.qkv()];
        for (row, t) in qkv.chunks_exact_mut(model.qkv()).zip(&self.tokens) {
            if let Some((i, p)) = *t {
                row.copy_from_slice(&self.sequences[i].qkv[p * model.qkv()..][..model.qkv()]);
            }
        }
        let half = model.rotary as usize / 2;
        let longest = self.sequences.iter().map(|s| s.pages.len() * 64).max().expect("sequences");
        let turns: Vec<_> = (0..longest).map(|p| angles(p, half)).collect();
        let cos: Vec<f32> = turns.iter().flat_map(|t| t.0.clone()).collect();
        let sin: Vec<f32> = turns.iter().flat_map(|t| t.1.clone()).collect();
        let qkv = floats(&qkv);
        let norms = self.sequences[0].norms.each_ref().map(|n| floats(n));
        let mut cache = self.before.clone();
        let mut queries = vec![0u8; self.queries.len()];
        let mut scales = vec![0u8; 4 * self.scales.len()];
        let mut faults = ints([0, 0]);
        let kernel = append::lower(&model.append(tokens as u32));
        let args = &mut [
            Arg::ReadOnly(&qkv),
            Arg::ReadOnly(&qkv),
            Arg::ReadOnly(&qkv),
            Arg::ReadOnly(&norms[0]),
            Arg::ReadOnly(&norms[1]),
            Arg::ReadOnly(&floats(&cos)),
            Arg::ReadOnly(&floats(&sin)),
            Arg::ReadOnly(&self.positions()),
            Arg::ReadOnly(&self.slots()),
            Arg::Buffer(&mut cache),
            Arg::Buffer(&mut queries),
            Arg::Buffer(&mut scales),
            Arg::Buffer(&mut faults),
            Arg::I32(1),
        ];
        launch(&kernel, args);
        assert!(cache == self.after, "{}: the cache", kernel.name);
        assert_eq!(queries.iter().map(|x| *x as i8).collect::<Vec<_>>(), self.queries, "{}", kernel.name);
        assert_eq!(scales, floats(&self.scales), "{}", kernel.name);
        assert_eq!(faults, ints([0, 0]));
    }

    /// Runs a kernel that attends on a cache; `memory`: results, parts, arrivals, faults.
    fn run(
        &self,
        kernel: &Kernel,
        tiles: &[i32],
        cache: &[u8],
        [y, partial, arrived, faults]: [&mut Vec<u8>; 4],
        reverse: bool,
    ) -> Result<Report, Trap> {
        let stride = self.sequences.iter().map(|s| s.pages.len()).max().expect("sequences");
        let mut table = vec![-1i32; self.sequences.len() * stride];
        for (row, s) in table.chunks_exact_mut(stride).zip(self.sequences) {
            row[..s.pages.len()].copy_from_slice(&s.pages);
        }
        let queries: Vec<u8> = self.queries.iter().map(|x| *x as u8).collect();
        let sequence = ints(self.tokens.iter().map(|t| t.map_or(-1, |t| t.0 as i32)));
        let args = &mut [
            Arg::ReadOnly(&queries),
            Arg::ReadOnly(&floats(&self.scales)),
            Arg::ReadOnly(&floats(&self.sequences[0].sinks)),
            Arg::ReadOnly(&self.positions()),
            Arg::ReadOnly(&sequence),
            Arg::ReadOnly(&self.slots()),
            Arg::ReadOnly(&ints(table.iter().copied())),
            Arg::ReadOnly(&ints(tiles.iter().copied())),
            Arg::I32(stride as i32),
            Arg::ReadOnly(cache),
            Arg::Buffer(y),
            Arg::Buffer(partial),
            Arg::Buffer(arrived),
            Arg::Buffer(faults),
            Arg::I32(1),
        ];
        validate(kernel).unwrap_or_else(|problems| panic!("{problems}"));
        run(kernel, args, &Options { reverse, ..Options::default() })
    }

    /// A kernel that attends, against the twin. It is run twice: it leaves the places where parts meet as it found them.
    fn check(&self, kernel: &Kernel, tiles: &[i32], (partial, arrived): (usize, usize), what: &str) {
        let (mut partial, mut arrived) = (vec![0xffu8; 4 * partial], vec![0u8; 4 * arrived]);
        let mut faults = ints([0, 0]);
        for reverse in [false, true] {
            let mut y = vec![0xffu8; 4 * self.y.len()];
            let memory = [&mut y, &mut partial, &mut arrived, &mut faults];
            self.run(kernel, tiles, &self.after, memory, reverse)
                .unwrap_or_else(|trap| panic!("{what}, {}: {trap}", kernel.name));
            let expected = floats(&self.y);
            if let Some(i) = y.chunks(4).zip(expected.chunks(4)).position(|(a, b)| a != b) {
                let of = |v: &[u8]| f32::from_le_bytes([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]);
                panic!("{what}, {}: value {i} is {}, not {}", kernel.name, of(&y), of(&expected));
            }
            assert!(arrived.iter().all(|x| *x == 0), "{what}: arrivals");
            assert_eq!(faults, ints([0, 0]), "{what}");
        }
    }

    fn check_few(&self, launch: few::Launch) {
        let op = self.model.attend(self.tokens.len() as u32);
        let kernel = few::lower(&op, &launch);
        self.check(&kernel, &[0, 0], few::meeting_place(&op, &launch), &format!("{launch:?}"));
    }

    fn check_many(&self, launch: many::Launch) {
        let op = self.model.attend(self.tokens.len() as u32);
        let mut runs: Vec<many::Run> = Vec::new();
        for (t, token) in self.tokens.iter().enumerate() {
            let Some((i, p)) = *token else { continue };
            match runs.last_mut() {
                Some(r) if t > 0 && self.tokens[t - 1].is_some_and(|before| before == (i, p.wrapping_sub(1))) => {
                    r.tokens += 1;
                }
                _ => runs.push(many::Run { first: t as u32, tokens: 1, position: p as u32 }),
            }
        }
        let len = launch.most_tiles(&op, runs.len() as u32);
        let tiles = many::tiles(&runs, launch.tile_tokens(&op), len).expect("room");
        self.check(&many::lower(&op, &launch, len), &tiles, (1, 1), &format!("{launch:?}"));
    }
}

fn launch(kernel: &Kernel, args: &mut [Arg<'_>]) {
    validate(kernel).unwrap_or_else(|problems| panic!("{problems}"));
    run(kernel, args, &Options::default()).unwrap_or_else(|trap| panic!("{trap}"));
}

/// Sequences of so many tokens, whose pages lie mixed.
fn sequences(model: &Model, random: &mut Random, lengths: &[usize]) -> Vec<Sequence> {
    let pages: Vec<usize> = lengths.iter().map(|n| n.div_ceil(64)).collect();
    let mut all: Vec<i32> = (0..pages.iter().sum::<usize>() as i32).collect();
    for i in (1..all.len()).rev() {
        all.swap(i, random.below(i as u32 + 1) as usize);
    }
    let mut of: Vec<Sequence> = Vec::new();
    for (n, pages) in lengths.iter().zip(&pages) {
        let mut s = Sequence::new(model, random, *n, all.split_off(all.len() - pages));
        if let Some(first) = of.first() {
            (s.norms, s.sinks) = (first.norms.clone(), first.sinks.clone());
        }
        of.push(s);
    }
    of
}

const FEW: few::Launch = few::Launch { blocks: 5, stages: 3, min_blocks: 1, chunks: 1000, spans: 1000, most: 1000 };

#[test]
fn few_tokens_equal_the_twin_however_they_are_cut() {
    let mut random = Random(2);
    let model = Model { heads: 2, cache: Cache { kv_heads: 1, head_dim: 32, planes: 2 }, rotary: 32, ..PLAIN };
    let all = sequences(&model, &mut random, &[2200, 300, 64, 65]);
    let step = Step::new(model, &all, vec![Some((0, 2199)), Some((1, 299)), None, Some((2, 63)), Some((3, 64))]);
    step.check_append();
    for launch in [
        FEW,
        few::Launch { chunks: 1, stages: 2, ..FEW },
        few::Launch { chunks: 1, spans: 1, blocks: 3, stages: 1, ..FEW },
        few::Launch { chunks: 1, spans: 1, most: 1, blocks: 2, ..FEW },
    ] {
        step.check_few(launch);
    }
    let step = Step::new(model, &all[..1], vec![Some((0, 2198))]);
    for launch in [FEW, few::Launch { chunks: 1, ..FEW }, few::Launch { spans: 1, ..FEW }] {
        step.check_few(launch);
    }
    Step::new(model, &all[..1], vec![None]).check_few(FEW);
    Step::new(model, &all[1..2], vec![Some((0, 0))]).check_few(FEW);
}

/// Of a step that begins at position 252, page 3 and what comes after it is written; pages before are copied before the wait.
#[test]
fn what_the_step_writes_is_not_read_before_the_wait() {
    let model = Model { heads: 2, cache: Cache { kv_heads: 1, head_dim: 32, planes: 2 }, rotary: 32, ..PLAIN };
    let all = [Sequence::new(&model, &mut Random(5), 300, (0..5).collect())];
    let step = Step::new(model, &all, (252..260).map(|p| Some((0, p))).collect());
    let launch = few::Launch { blocks: 64, ..FEW };
    let op = model.attend(8);
    let mut kernel = few::lower(&op, &launch);
    let wait = kernel.body.iter().position(|s| *s == Stmt::GridWait).expect("a wait");
    kernel.body.truncate(wait + 1);
    let (partial, arrived) = few::meeting_place(&op, &launch);
    let (mut y, mut faults) = (vec![0u8; 4 * step.y.len()], ints([0, 0]));
    let (mut partial, mut arrived) = (vec![0u8; 4 * partial], vec![0u8; 4 * arrived]);
    let page = model.cache.page_bytes() as usize;
    let mut before_wait = |pages: usize| {
        let memory = [&mut y, &mut partial, &mut arrived, &mut faults];
        step.run(&kernel, &[0, 0], &step.after[..pages * page], memory, false)
    };
    let read = before_wait(3).unwrap_or_else(|trap| panic!("{trap}")).global_loaded;
    assert!(read >= 3 * 8 * page as u64, "{read} bytes: each token has three old pages of {page}");
    assert!(before_wait(2).is_err(), "page 2 is old");
}

#[test]
fn prompts_equal_the_twin_however_they_are_cut() {
    let mut random = Random(3);
    let model = Model { heads: 2, cache: Cache { kv_heads: 1, head_dim: 32, planes: 2 }, rotary: 32, ..PLAIN };
    let all = sequences(&model, &mut random, &[2150, 300, 70, 65]);
    let run = |i: usize, positions: std::ops::Range<usize>| positions.map(move |p| Some((i, p)));
    let mut tokens: Vec<_> = run(0, 2100..2120).chain(run(1, 290..300)).chain([None, None]).collect();
    tokens.extend(run(2, 0..70).chain([Some((3, 64)), None]));
    let step = Step::new(model, &all, tokens);
    for (warps, stages) in [(8, 3), (4, 2), (1, 1)] {
        step.check_many(many::Launch { warps, stages });
    }
    // The same tokens one by one.
    step.check_few(few::Launch { chunks: 1, blocks: 16, ..FEW });
}

#[test]
fn every_kind_of_model_equals_the_twin() {
    let mut random = Random(4);
    let of = |heads, kv_heads, head_dim, planes| Model {
        heads,
        cache: Cache { kv_heads, head_dim, planes },
        rotary: head_dim,
        ..PLAIN
    };
    for model in [
        of(4, 1, 128, 2),
        of(2, 2, 64, 1),
        Model { norm: Some(1e-6), rotary: 20, ..of(3, 1, 80, 2) },
        Model { norm: Some(1e-6), rotary: 40, interleaved: true, ..of(3, 1, 80, 2) },
        Model { rotary: 0, ..of(2, 1, 32, 2) },
        Model { window: Some(70), ..of(7, 1, 96, 1) },
        Model { soft_cap: Some(2.0), sinks: true, window: Some(100), ..of(2, 1, 256, 2) },
        Model { sinks: true, ..of(9, 1, 64, 2) },
    ] {
        let all = sequences(&model, &mut random, &[300, 40]);
        let mut tokens: Vec<_> = (295..300).map(|p| Some((0, p))).collect();
        tokens.extend([None, Some((1, 38)), Some((1, 39))]);
        let step = Step::new(model, &all, tokens);
        step.check_append();
        step.check_few(FEW);
        step.check_few(few::Launch { chunks: 1, stages: 1, ..FEW });
        step.check_many(many::Launch { warps: 2, stages: 2 });
    }
}

#[test]
fn numbers_that_are_not_finite_are_noted() {
    let mut random = Random(5);
    let model = PLAIN;
    let mut all = sequences(&model, &mut random, &[3]);
    let at = |position: usize, column: usize| position * model.qkv() + column;
    // A key, whose fault the append notes; it counts as zero.
    all[0].qkv[at(1, 4 * 64 + 3)] = f32::NAN;
    let op = model.append(1);
    let (cos, sin) = angles(1, 32);
    let qkv = &all[0].qkv[at(1, 0)..at(2, 0)];
    let token = Token { q: &qkv[..256], k: &qkv[256..384], v: &qkv[384..], cos: &cos, sin: &sin, slot: 0 };
    let mut cache = vec![0; model.cache.page_bytes() as usize];
    let (mut queries, mut scales) = (vec![0; 4 * 2 * 64], vec![0.0; 4]);
    assert!(!reference::append(&op, &token, Norms::default(), &mut cache, &mut queries, &mut scales));
    let mut on_device = vec![0u8; cache.len()];
    let mut faults = ints([0, 0]);
    let bytes = floats(qkv);
    let args = &mut [
        Arg::ReadOnly(&bytes),
        Arg::ReadOnly(&bytes),
        Arg::ReadOnly(&bytes),
        Arg::ReadOnly(&[0; 4]),
        Arg::ReadOnly(&[0; 4]),
        Arg::ReadOnly(&floats(&cos)),
        Arg::ReadOnly(&floats(&sin)),
        Arg::ReadOnly(&ints([0])),
        Arg::ReadOnly(&ints([0])),
        Arg::Buffer(&mut on_device),
        Arg::Buffer(&mut vec![0; 4 * 2 * 64]),
        Arg::Buffer(&mut [0; 16]),
        Arg::Buffer(&mut faults),
        Arg::I32(1),
    ];
    launch(&append::lower(&op), args);
    assert_eq!(faults, ints([0, 1]));
    assert!(on_device == cache);
}

#[test]
fn tiles_of_queries_begin_with_those_that_see_most() {
    let run = |first, tokens, position| many::Run { first, tokens, position };
    let runs = [run(0, 70, 10), run(70, 1, 500), run(80, 32, 0)];
    assert_eq!(many::tiles(&runs, 32, 6), Some(vec![70, 1, 64, 6, 32, 32, 0, 32, 80, 32, 0, 0]));
    assert_eq!(many::tiles(&runs, 32, 4), None);
}

/// Bytes that a prompt's kernel may spill: what its loop over pages hardly touches, while sums take all registers.
const SPILLED: u32 = 160;

#[test]
fn kernels_compile_without_spills() {
    if crate::nvrtc::for_tests().is_none() {
        return;
    }
    let of = |heads, kv_heads, head_dim, planes, tokens| Attend {
        cache: Cache { kv_heads, head_dim, planes },
        heads,
        tokens,
        window: None,
        soft_cap: None,
        sinks: false,
    };
    let ops = [
        of(32, 8, 128, 2, 1),
        of(9, 3, 64, 2, 8),
        of(32, 2, 96, 1, 4),
        Attend { window: Some(4096), sinks: true, soft_cap: Some(50.0), ..of(16, 8, 256, 2, 1) },
    ];
    let mut bad = Vec::new();
    for op in ops {
        for target in [Target::Sm89, Target::Sm90a] {
            let device = target.device();
            let launch = few::Launch::choose(&op, &device);
            let plan = many::Launch::choose(&op, &device);
            let prompt = Attend { tokens: 512, ..op };
            let kernels = [
                (format!("{launch:?}"), few::lower(&op, &launch), launch.min_blocks),
                (format!("{plan:?}"), many::lower(&prompt, &plan, 64), 1),
            ];
            for (launch, kernel, resident) in kernels {
                let checked = crate::cuda::check(&kernel, target).unwrap_or_else(|problems| panic!("{problems}"));
                let source = crate::cuda::print(checked);
                let cubin = crate::nvrtc::compile(&source, &kernel.name, target.nvrtc_arch(), &Default::default())
                    .unwrap_or_else(|e| panic!("{e}"));
                let usage = cubin.usage.expect("the compiler says");
                let shared = kernel.shared_bytes();
                println!("{} {target}: {} registers, {shared} bytes, {launch}", kernel.name, usage.registers);
                let registers = usage.registers * kernel.threads * resident;
                let allowed = if kernel.name.starts_with("attend_many") { SPILLED } else { 0 };
                if usage.spill_stores.max(usage.stack) > allowed
                    || shared > device.shared_per_block
                    || registers > device.registers_per_sm
                {
                    bad.push(format!("{} {target}: {usage:?}, {shared} bytes, {launch}", kernel.name));
                }
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

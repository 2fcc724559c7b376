//! The rotation of a token's values within a kernel: what preparing activations and looking up a packed row share.
//!
//! A lane of a warp holds four neighbouring columns, a warp a **group** of 128: butterflies of stride 1 and 2 run within a
//! lane, those of stride 4 to 64 between lanes ([`Transforms::in_warp`]). Longer ones and dense parts go through shared
//! memory ([`Transforms::across_warps`]). The order of operations is the one that [`crate::reference`] fixes, so that every
//! device gives the same bits.

use crate::ir::{Builder, Cache, Elem, Mem, Scalar, Special, V};
use crate::layout;
use crate::reference::{Hadamard, INTERLEAVED, Interleave, transforms};
use crate::spec::Rotation;

/// Columns of a group: four for each lane of a warp.
pub(super) const GROUP: u32 = 128;
/// Strides of butterflies within a group: 1, 2, 4, … 64.
pub(super) const GROUP_LEVELS: u32 = GROUP.ilog2();
/// log2 of the elements that a thread transforms at once in shared memory.
const RADIX_BITS: u32 = 3;
/// Larger dense parts read their signs from memory rather than from the program.
const MAX_UNROLLED_BASE: u32 = 60;

/// The signs of a rotation as the kernel takes them; one word that is not read without a rotation.
pub fn flips(rotation: Rotation, columns: u32) -> Vec<u32> {
    match rotation {
        Rotation::None => vec![0],
        Rotation::Hadamard { seed, .. } => pack_bits(&layout::signs(seed, columns)),
    }
}

/// The signs of the rotation's dense part as the kernel takes them, each row padded to whole words; one word that is not
/// read if there is no such part or the program holds it.
pub fn base(rotation: Rotation, columns: u32) -> Vec<u32> {
    base_of(&transforms(rotation, columns))
}

/// As [`base`], of the rotation's inverse.
pub fn inverse_base(rotation: Rotation, columns: u32) -> Vec<u32> {
    base_of(&transforms(rotation, columns).into_iter().map(Hadamard::transposed).collect::<Vec<_>>())
}

fn base_of(transforms: &[Hadamard]) -> Vec<u32> {
    match transforms.iter().find(|h| h.m > MAX_UNROLLED_BASE) {
        None => vec![0],
        Some(h) => h.base.chunks_exact(h.m as usize).flat_map(pack_bits).collect(),
    }
}

fn pack_bits(bits: &[bool]) -> Vec<u32> {
    bits.chunks(32).map(|c| c.iter().enumerate().fold(0, |w, (i, &bit)| w | u32::from(bit) << i)).collect()
}

/// The values, four of them from `column` on, negated where the rotation negates a column. `word` is that of the flips
/// that holds the columns.
pub(super) fn flip<'b>(word: V<'b>, column: V<'b>, v: [V<'b>; 4]) -> [V<'b>; 4] {
    let bits = word >> (column & 31).bits(Scalar::U32);
    let mut j = 0;
    v.map(|v| {
        let sign = (bits << (31 - j)) & (1u32 << 31);
        j += 1;
        (v.bits(Scalar::U32) ^ sign).bits(Scalar::F32)
    })
}

/// The word of the flips that holds four columns from `column` on; columns past the last one get any word.
pub(super) fn flip_word<'b>(b: &'b Builder, flips: Mem, columns: u32, column: V<'b>) -> V<'b> {
    b.load_as(flips, (column >> 5).min(columns.div_ceil(32) - 1), Elem::U32, 1, Cache::ReadOnly)
}

/// Where a cell of a row of `columns` columns, padded to whole groups, goes when blocks are interleaved.
pub(super) fn place<'b>(interleave: Option<Interleave>, columns: u32, cell: V<'b>) -> V<'b> {
    let Some(Interleave { span, block, tail, blocks, rest }) = interleave else { return cell };
    let parts = |within: V<'b>| (within >> block.ilog2(), within & (block - 1));
    let whole = || {
        let within = cell & (span - 1);
        let (number, at) = parts(within);
        (cell - within) + at * (span / block) + number
    };
    let last = || {
        let within = cell - tail;
        let (number, at) = parts(within);
        within.lt(blocks * block + rest).select(number + at * blocks + at.min(rest) + tail, cell)
    };
    of_part((tail, blocks), columns, cell, whole, last)
}

/// The cell that [`place`] puts at `at`.
pub(super) fn placed<'b>(interleave: Option<Interleave>, columns: u32, at: V<'b>) -> V<'b> {
    let Some(Interleave { span, block, tail, blocks, rest }) = interleave else { return at };
    let whole = || {
        let (within, each) = (at & (span - 1), span / block);
        (at - within) + (within & (each - 1)) * block + (within >> each.ilog2())
    };
    let last = || {
        let (within, longer) = (if tail == 0 { at } else { (at - tail).max(0) }, rest * (blocks + 1));
        let turned = |within: V<'b>, blocks: u32| within % blocks * block + within / blocks;
        let cell = match rest {
            0 => turned(within, blocks),
            _ => {
                let behind = turned((within - longer).max(0), blocks) + rest;
                within.lt(longer).select(turned(within, blocks + 1), behind)
            }
        };
        within.lt(blocks * block + rest).select(cell + tail, at)
    };
    of_part((tail, blocks), columns, at, whole, last)
}

/// For a cell of the whole spans, which are `tail` cells, `whole`; behind them, if there are `blocks` to interleave, `last`.
fn of_part<'b>(
    (tail, blocks): (u32, u32),
    columns: u32,
    cell: V<'b>,
    whole: impl Fn() -> V<'b>,
    last: impl Fn() -> V<'b>,
) -> V<'b> {
    let last = || if blocks == 0 { cell } else { last() };
    match tail {
        0 => last(),
        _ if tail == columns.next_multiple_of(GROUP) / INTERLEAVED => whole(),
        _ => cell.lt(tail).select(whole(), last()),
    }
}

/// The transforms of a row, side by side.
pub(super) struct Transforms {
    /// Each with its first column.
    parts: Vec<(u32, Hadamard)>,
    columns: u32,
}

/// 1 for lanes that hold the sums of butterflies of stride 4, 8, … 64, −1 for those that hold the differences.
pub(super) struct LaneSigns<'b>(Vec<V<'b>>);

impl<'b> LaneSigns<'b> {
    /// Those of the present lane.
    pub fn new(b: &'b Builder) -> Self {
        let lane = b.special(Special::Lane);
        LaneSigns([1, 2, 4, 8, 16].map(|bit| (lane & bit).eq(0).select(b.f32(1.0), -1.0)).into())
    }
}

impl Transforms {
    /// Those of a rotation.
    pub fn of(rotation: Rotation, columns: u32) -> Self {
        Transforms::new(transforms(rotation, columns), columns)
    }

    /// Those of its inverse.
    pub fn inverse_of(rotation: Rotation, columns: u32) -> Self {
        Transforms::new(transforms(rotation, columns).into_iter().map(Hadamard::transposed).collect(), columns)
    }

    fn new(all: Vec<Hadamard>, columns: u32) -> Self {
        let mut first = 0;
        let parts = all.into_iter().map(|h| {
            let part = (first, h);
            first += part.1.columns;
            part
        });
        Transforms { parts: parts.collect(), columns }
    }

    /// True without a rotation.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// log2 of the longest power-of-two transform.
    pub fn levels(&self) -> u32 {
        self.parts.iter().map(|p| p.1.log2).max().unwrap_or(0)
    }

    /// Whether a part has a dense matrix.
    pub fn has_dense(&self) -> bool {
        self.parts.iter().any(|p| p.1.m > 1)
    }

    /// The first column past those that butterflies of stride 2^`level` mix: parts are in order of size.
    fn end(&self, level: u32) -> u32 {
        let mixed = self.parts.iter().filter(|p| p.1.log2 > level);
        mixed.map(|p| p.0 + p.1.columns).max().unwrap_or(0)
    }

    /// Whether butterflies of stride 2^`level` mix the value at `column`; nothing if they mix all.
    pub fn mixes<'b>(&self, level: u32, column: V<'b>) -> Option<V<'b>> {
        let end = self.end(level);
        (end < self.columns).then(|| column.lt(end))
    }

    /// The butterflies of stride 1 to 64 of a group of columns, of which this lane holds those from `column` on. Columns
    /// past the last one are zero.
    pub fn in_warp<'b>(&self, signs: &LaneSigns<'b>, column: V<'b>, mut v: [V<'b>; 4]) -> [V<'b>; 4] {
        for level in 0..self.levels().min(GROUP_LEVELS) {
            let keep = |mixed: V<'b>, old: V<'b>, column: V<'b>| match self.mixes(level, column) {
                None => mixed,
                Some(mixes) => mixes.select(mixed, old),
            };
            if level < 2 {
                for j in (0..4usize).filter(|j| j >> level & 1 == 0) {
                    let k = j + (1 << level);
                    let column = column + j as u32;
                    (v[j], v[k]) = (keep(v[j] + v[k], v[j], column), keep(v[j] - v[k], v[k], column));
                }
            } else {
                let sign = signs.0[level as usize - 2];
                v = v.map(|v| keep(v.fma(sign, v.shuffle_xor(1 << (level - 2))), v, column));
            }
        }
        v
    }

    /// The factor that makes the transform of the value at `column` orthonormal.
    pub fn factor<'b>(&self, b: &'b Builder, column: V<'b>) -> V<'b> {
        let mut parts = self.parts.iter().rev();
        let last = parts.next().expect("a rotation has a transform");
        parts.fold(b.f32(last.1.norm()), |rest, (first, h)| column.lt(first + h.columns).select(b.f32(h.norm()), rest))
    }

    /// Whether the factor can change within four columns that begin at a multiple of four.
    pub fn factor_varies(&self) -> bool {
        self.parts.iter().skip(1).any(|(first, _)| !first.is_multiple_of(4))
    }

    /// The whole transform, without its factor, of `values`: shared memory of whole groups, zero past the last column. All
    /// threads of the block take part; a barrier stands before and after.
    pub fn transform(&self, b: &Builder, values: Mem, base: Mem, threads: u32) {
        let signs = LaneSigns::new(b);
        b.for_(b.special(Special::Warp), self.columns.div_ceil(GROUP), threads / 32, |group| {
            let column = group * GROUP + b.special(Special::Lane) * 4;
            let v = b.load_as(values, column, Elem::F32, 4, Cache::Default);
            let v = self.in_warp(&signs, column, [0, 1, 2, 3].map(|j| v.lane(j)));
            b.store(values, column, b.vector(&v), Elem::F32);
        });
        b.barrier();
        self.across_warps(b, values, base, threads);
    }

    /// What remains after [`Transforms::in_warp`] of each group, in shared memory: longer butterflies and dense parts. A
    /// barrier stands before and after.
    pub fn across_warps(&self, b: &Builder, values: Mem, base: Mem, threads: u32) {
        for (first, h) in &self.parts {
            butterflies(b, values, *first, h, threads);
            if h.m > MAX_UNROLLED_BASE {
                dense_by_warps(b, values, h, base, threads);
            } else if h.m > 1 {
                dense_unrolled(b, values, h, threads);
            }
        }
    }
}

/// Butterflies of stride 128, 256, … of a transform whose values lie from `first` on.
fn butterflies(b: &Builder, values: Mem, first: u32, h: &Hadamard, threads: u32) {
    let mut done = GROUP_LEVELS;
    while done < h.log2 {
        let bits = (h.log2 - done).min(RADIX_BITS);
        let (stride, radix) = (1u32 << done, 1u32 << bits);
        b.for_(b.special(Special::Thread), h.columns / radix, threads, |i| {
            let from = (i >> done) * (stride * radix) + (i & (stride as i32 - 1)) + first;
            let at: Vec<V> = (0..radix).map(|j| from + j * stride).collect();
            let mut v: Vec<V> = at.iter().map(|&i| b.load(values, i, Elem::F32)).collect();
            for bit in 0..bits {
                for j in (0..radix as usize).filter(|j| j >> bit & 1 == 0) {
                    let k = j + (1 << bit);
                    (v[j], v[k]) = (v[j] + v[k], v[j] - v[k]);
                }
            }
            at.iter().zip(v).for_each(|(&i, v)| b.store(values, i, v, Elem::F32));
        });
        b.barrier();
        done += bits;
    }
}

/// The dense `m × m` part across the power-of-two parts, its signs in the program: a thread for each column of these.
fn dense_unrolled(b: &Builder, values: Mem, h: &Hadamard, threads: u32) {
    let two = 1u32 << h.log2;
    b.for_(b.special(Special::Thread), two, threads, |i| {
        let v: Vec<V> = (0..h.m).map(|j| b.load(values, i + j * two, Elem::F32)).collect();
        for (r, row) in h.base.chunks_exact(h.m as usize).enumerate() {
            let first = if row[0] { -v[0] } else { v[0] };
            let sum = v.iter().zip(row).skip(1).fold(first, |s, (&v, &neg)| if neg { s - v } else { s + v });
            b.store(values, i + r as u32 * two, sum, Elem::F32);
        }
    });
    b.barrier();
}

/// The same with its signs in memory: a warp for each column of the power-of-two parts, a lane for each 32nd row.
fn dense_by_warps(b: &Builder, values: Mem, h: &Hadamard, base: Mem, threads: u32) {
    let (m, two, words) = (h.m, 1u32 << h.log2, h.m.div_ceil(32));
    let lane = b.special(Special::Lane);
    b.for_(b.special(Special::Warp), two, threads / 32, |i| {
        let rows: Vec<V> = (0..words).map(|k| lane + k * 32).collect();
        let sums: Vec<_> = rows.iter().map(|_| b.var(b.f32(-0.0))).collect();
        b.for_(0, words, 1, |word| {
            // Rows past the last one add up what nobody takes.
            let at = rows.iter().map(|row| row.min(m - 1) * words + word);
            let signs: Vec<V> = at.map(|at| b.load_as(base, at, Elem::U32, 1, Cache::ReadOnly)).collect();
            b.for_(word * 32, (word * 32 + 32).min(m), 1, |j| {
                let v = b.load(values, i + j * two, Elem::F32).bits(Scalar::U32);
                for (&sum, &signs) in sums.iter().zip(&signs) {
                    let sign = (signs >> (j & 31).bits(Scalar::U32)) << 31;
                    b.set(sum, b.get(sum) + (v ^ sign).bits(Scalar::F32));
                }
            });
        });
        b.warp_sync();
        for (&row, &sum) in rows.iter().zip(&sums) {
            b.if_(row.lt(m), || b.store(values, i + row * two, b.get(sum), Elem::F32));
        }
    });
    b.barrier();
}

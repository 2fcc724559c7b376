//! The rotation of rows of weights and of activations: random signs, then Hadamard transforms.

use crate::layout;
use crate::spec::Rotation;

/// An orthonormal Hadamard transform of any even length.
///
/// `columns = blocks · m · 2^log2` where an `m × m` Hadamard matrix (Paley's constructions over a prime field) takes up
/// the odd part. If no such `m` exists, `blocks > 1` separate power-of-two transforms run side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hadamard {
    /// Length of the transform.
    pub columns: u32,
    /// Independent transforms side by side; 1 unless the odd part has no known matrix.
    pub blocks: u32,
    /// log2 of the butterfly part.
    pub log2: u32,
    /// The `m × m` matrix, row-major, true for −1. Just `[false]` for powers of two.
    pub base: Vec<bool>,
    /// Order of `base`.
    pub m: u32,
}

impl Hadamard {
    /// The transform of `columns` > 0 values.
    pub fn new(columns: u32) -> Self {
        let odd = columns >> columns.trailing_zeros();
        let two = columns.trailing_zeros();
        if odd == 1 {
            return Hadamard::side_by_side(1, columns);
        }
        // Orders are multiples of 4; beyond 512 the dense part would cost more than it mixes.
        for e in 2..=two {
            let m = odd << e;
            if m > 512 {
                break;
            }
            if let Some(base) = paley(m) {
                return Hadamard { columns, blocks: 1, log2: two - e, base, m };
            }
        }
        Hadamard::side_by_side(odd, 1 << two)
    }

    /// `blocks` transforms of `size` values each, a power of two.
    fn side_by_side(blocks: u32, size: u32) -> Self {
        Hadamard { columns: blocks * size, blocks, log2: size.trailing_zeros(), base: vec![false], m: 1 }
    }

    /// The transform's inverse, which is its transpose: `base` is transposed, butterflies are symmetric.
    pub fn transposed(mut self) -> Self {
        let m = self.m as usize;
        self.base = (0..m * m).map(|i| self.base[i % m * m + i / m]).collect();
        self
    }

    /// `1 / √(columns / blocks)`, which makes the transform orthonormal.
    pub fn norm(&self) -> f32 {
        (1.0 / f64::from(self.columns / self.blocks).sqrt()) as f32
    }

    /// `x ← H·x / √n`: butterflies of stride 1, 2, 4, …, then the dense part in order of its columns, then the norm. It is
    /// inlined into its callers, so that those compiled for vector instructions use them.
    #[inline(always)]
    pub fn apply(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.columns as usize, "length of the transform");
        let two = 1usize << self.log2;
        for group in x.chunks_exact_mut(two) {
            let mut stride = 1;
            if two >= 16 {
                for part in group.as_chunks_mut::<16>().0 {
                    *part = stage::<8>(stage::<4>(stage::<2>(stage::<1>(*part))));
                }
                stride = 16;
            }
            while stride < two {
                for pair in group.chunks_exact_mut(2 * stride) {
                    let (lo, hi) = pair.split_at_mut(stride);
                    for (u, v) in lo.iter_mut().zip(hi) {
                        (*u, *v) = (*u + *v, *u - *v);
                    }
                }
                stride *= 2;
            }
        }
        let m = self.m as usize;
        if m > 1 {
            let mut out = vec![0f32; two];
            let input = x.to_vec();
            for (row, dst) in self.base.chunks_exact(m).zip(x.chunks_exact_mut(two)) {
                for (j, (&neg, src)) in row.iter().zip(input.chunks_exact(two)).enumerate() {
                    for (o, &s) in out.iter_mut().zip(src) {
                        let s = if neg { -s } else { s };
                        *o = if j == 0 { s } else { *o + s };
                    }
                }
                dst.copy_from_slice(&out);
            }
        }
        let norm = self.norm();
        x.iter_mut().for_each(|v| *v *= norm);
    }
}

/// The butterflies of stride `S` of sixteen values.
#[inline(always)]
fn stage<const S: usize>(x: [f32; 16]) -> [f32; 16] {
    std::array::from_fn(|i| if i & S == 0 { x[i] + x[i ^ S] } else { x[i ^ S] - x[i] })
}

/// An `m × m` Hadamard matrix by Paley's first or second construction over a prime field, true for −1.
fn paley(m: u32) -> Option<Vec<bool>> {
    let prime = |q: u32| q > 2 && (2..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d));
    // Quadratic character: 0, 1 or −1.
    let chi = |q: u32, a: u32| {
        if a == 0 {
            0
        } else if (1..q).any(|b| b * b % q == a) {
            1
        } else {
            -1
        }
    };
    let size = m as usize;
    let mut h = vec![0i32; size * size];
    if prime(m - 1) && (m - 1) % 4 == 3 {
        let q = m - 1;
        let row: Vec<i32> = (0..q).map(|a| chi(q, a)).collect();
        for i in 0..m {
            for j in 0..m {
                let s = match (i, j) {
                    (0, 0) => 0,
                    (0, _) => 1,
                    (_, 0) => -1,
                    _ => row[((i + q - j) % q) as usize],
                };
                h[(i * m + j) as usize] = s + i32::from(i == j);
            }
        }
    } else if m.is_multiple_of(4) && prime(m / 2 - 1) && (m / 2 - 1) % 4 == 1 {
        let q = m / 2 - 1;
        let row: Vec<i32> = (0..q).map(|a| chi(q, a)).collect();
        for i in 0..q + 1 {
            for j in 0..q + 1 {
                let s = match (i, j) {
                    (0, 0) => 0,
                    (0, _) | (_, 0) => 1,
                    _ => row[((i + q - j) % q) as usize],
                };
                let d = i32::from(i == j);
                let cell = [[s + d, s - d], [s - d, -s - d]];
                for (a, r) in cell.iter().enumerate() {
                    for (b, &v) in r.iter().enumerate() {
                        h[(2 * i as usize + a) * size + 2 * j as usize + b] = v;
                    }
                }
            }
        }
    } else {
        return None;
    }
    Some(h.into_iter().map(|v| v < 0).collect())
}

/// The transforms of a rotation, side by side from the first column on; none without a rotation.
///
/// A rotation without a block transforms all columns at once, as [`Hadamard::new`] does. One in blocks cuts the columns
/// into blocks of that many; what remains is cut into powers of two, the largest first. So 172 columns in blocks of 64 are
/// transformed as 64, 64, 32, 8 and 4. Each of the transforms given holds all blocks of one size.
///
/// ```
/// use qp_codegen::reference::transforms;
/// use qp_codegen::spec::Rotation;
///
/// let all = transforms(Rotation::Hadamard { seed: 0, block: Some(64), interleave: None }, 172);
/// let blocks: Vec<(u32, u32)> = all.iter().map(|h| (h.blocks, h.columns / h.blocks)).collect();
/// assert_eq!(blocks, [(2, 64), (1, 32), (1, 8), (1, 4)]);
/// ```
pub fn transforms(rotation: Rotation, columns: u32) -> Vec<Hadamard> {
    match rotation {
        Rotation::None => Vec::new(),
        Rotation::Hadamard { block: None, .. } => vec![Hadamard::new(columns)],
        Rotation::Hadamard { block: Some(block), .. } => {
            let whole = (columns >= block).then(|| Hadamard::side_by_side(columns / block, block));
            let rest = columns % block;
            let pieces = (0..32).rev().map(|bit| rest & (1 << bit)).filter(|&size| size > 0);
            whole.into_iter().chain(pieces.map(|size| Hadamard::side_by_side(1, size))).collect()
        }
    }
}

/// Columns that stay neighbours when blocks are interleaved: a **cell**.
pub const INTERLEAVED: u32 = 16;

/// How the blocks of a rotation are interleaved: of each `interleave` columns the first cell of every block, then the second
/// of every block, and so on, so that each block's columns are spread evenly over all of them.
///
/// A group of columns that a trellis encodes together then has some of each block. Where inputs are large in one direction, which
/// the rotation spreads over a block alone, data-aware rounding can make good the errors along it, since groups that
/// come later have a part of it too.
///
/// What remains behind the last whole `interleave` columns is interleaved by itself, its last block smaller; columns behind the
/// last whole cell stay where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interleave {
    /// Cells of a whole span.
    pub span: u32,
    /// Cells of a block.
    pub block: u32,
    /// First cell behind the whole spans.
    pub tail: u32,
    /// Whole blocks there.
    pub blocks: u32,
    /// Cells of the smaller block behind them.
    pub rest: u32,
}

impl Interleave {
    /// That of a rotation of rows of `columns` values; nothing if no column moves.
    pub fn of(rotation: Rotation, columns: u32) -> Option<Self> {
        let Rotation::Hadamard { seed: _, block: Some(block), interleave: Some(span) } = rotation else { return None };
        let (span, block, cells) = (span / INTERLEAVED, block / INTERLEAVED, columns / INTERLEAVED);
        let tail = cells / span * span;
        let all = Interleave { span, block, tail, blocks: (cells - tail) / block, rest: (cells - tail) % block };
        (tail > 0 || all.blocks > 0).then_some(all)
    }

    /// Where cell `cell` goes.
    pub fn place(self, cell: u32) -> u32 {
        let Interleave { span, block, tail, blocks, rest } = self;
        if cell < tail {
            let (first, within) = (cell / span * span, cell % span);
            return first + within % block * (span / block) + within / block;
        }
        let within = cell - tail;
        if within >= blocks * block + rest {
            return cell;
        }
        let (number, at) = (within / block, within % block);
        tail + at * blocks + at.min(rest) + number
    }

    fn cells(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.tail + self.blocks * self.block + self.rest)
            .map(move |cell| (cell as usize, self.place(cell) as usize))
    }

    fn apply(self, x: &mut [f32]) {
        let (from, to) = (x.to_vec(), x.as_chunks_mut::<{ INTERLEAVED as usize }>().0);
        let from = from.as_chunks::<{ INTERLEAVED as usize }>().0;
        self.cells().for_each(|(cell, place)| to[place] = from[cell]);
    }

    fn undo(self, x: &mut [f32]) {
        let (from, to) = (x.to_vec(), x.as_chunks_mut::<{ INTERLEAVED as usize }>().0);
        let from = from.as_chunks::<{ INTERLEAVED as usize }>().0;
        self.cells().for_each(|(cell, place)| to[cell] = from[place]);
    }
}

/// A [`Rotation`], or its inverse, made ready for rows of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotator(Option<Turn>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Turn {
    signs: Vec<bool>,
    transforms: Vec<Hadamard>,
    interleave: Option<Interleave>,
    back: bool,
}

impl Rotator {
    /// Prepares `rotation` for rows of `columns` > 0 values.
    pub fn new(rotation: Rotation, columns: u32) -> Self {
        match rotation {
            Rotation::None => Rotator(None),
            Rotation::Hadamard { seed, .. } => Rotator(Some(Turn {
                signs: layout::signs(seed, columns),
                transforms: transforms(rotation, columns),
                interleave: Interleave::of(rotation, columns),
                back: false,
            })),
        }
    }

    /// Prepares the inverse of `rotation`: columns where they were, the transposed transforms, then the signs.
    pub fn inverse(rotation: Rotation, columns: u32) -> Self {
        let turn = Rotator::new(rotation, columns).0;
        Rotator(turn.map(|t| Turn {
            transforms: t.transforms.into_iter().map(Hadamard::transposed).collect(),
            back: true,
            ..t
        }))
    }

    /// Rotates one row of weights or one token's activations, in place. Inlined as [`Hadamard::apply`] is.
    #[inline(always)]
    pub fn apply(&self, x: &mut [f32]) {
        let Some(Turn { signs, transforms, interleave, back }) = &self.0 else { return };
        let transform = |x: &mut [f32]| {
            let mut rest = x;
            for h in transforms {
                let (part, others) = rest.split_at_mut(h.columns as usize);
                h.apply(part);
                rest = others;
            }
        };
        if *back {
            interleave.iter().for_each(|i| i.undo(x));
            transform(x);
        }
        for (v, neg) in x.iter_mut().zip(signs) {
            if *neg {
                *v = -*v;
            }
        }
        if !*back {
            transform(x);
            interleave.iter().for_each(|i| i.apply(x));
        }
    }
}

/// Applies `rotation` to one row of weights or one token's activations, in place. For many rows, see [`Rotator`].
pub fn rotate(rotation: Rotation, x: &mut [f32]) {
    Rotator::new(rotation, u32::try_from(x.len()).expect("columns fit u32")).apply(x);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hadamard_is_orthonormal_and_mixes() {
        for (n, m, blocks) in [
            (2, 1, 1),
            (256, 1, 1),
            (768, 12, 1),
            (576, 36, 1),
            (1536, 12, 1),
            (3584, 28, 1),
            (18944, 148, 1),
            (160, 20, 1),
            (344, 1, 43),
            (6, 1, 3),
        ] {
            let h = Hadamard::new(n);
            assert_eq!((h.m, h.blocks), (m, blocks), "order of {n}");
            let dense = |j: u32| {
                let mut x = vec![0f32; n as usize];
                x[j as usize] = 1.0;
                h.apply(&mut x);
                x
            };
            let a = dense(0);
            for j in [0, 1, n / 3, n - 1] {
                let b = dense(j);
                let dot: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                let expect = if j == 0 { 1.0 } else { 0.0 };
                assert!((dot - expect).abs() < 1e-5, "{n} column {j}: {dot}");
            }
        }
    }

    #[test]
    fn every_pair_of_rows_of_a_paley_matrix_is_orthogonal() {
        for m in [4, 12, 20, 28, 36, 44, 60, 76, 108, 140, 148] {
            let h = paley(m).unwrap_or_else(|| panic!("order {m}"));
            let row = |i: usize| &h[i * m as usize..(i + 1) * m as usize];
            for i in 0..m as usize {
                for j in 0..i {
                    let equal = row(i).iter().zip(row(j)).filter(|(a, b)| a == b).count();
                    assert_eq!(equal * 2, m as usize, "order {m}, rows {i} {j}");
                }
            }
        }
    }

    #[test]
    fn interleaved_blocks_are_spread_over_all_groups() {
        for (columns, block, span) in [
            (4096, 128, 1024),
            (14336, 128, 1024),
            (576, 128, 1024),
            (1536, 128, 1024),
            (333, 16, 64),
            (5000, 64, 4096),
        ] {
            let of = |interleave| Rotation::Hadamard { seed: 7, block: Some(block), interleave };
            let what = format!("{columns} columns, blocks of {block}, over {span}");
            let x: Vec<f32> = (0..columns).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
            let (mut plain, mut moved) = (x.clone(), x.clone());
            rotate(of(None), &mut plain);
            rotate(of(Some(span)), &mut moved);
            let interleave = Interleave::of(of(Some(span)), columns).expect("columns move");
            let place = |c: u32| interleave.place(c / INTERLEAVED) * INTERLEAVED + c % INTERLEAVED;
            let mut groups_of: Vec<Vec<u32>> = vec![Vec::new(); columns.div_ceil(block) as usize];
            for c in 0..columns {
                assert_eq!(moved[place(c) as usize], plain[c as usize], "{what}: {c}");
                groups_of[(c / block) as usize].push(place(c) / 128);
            }
            // A block reaches as many groups of 128 as it has cells, or all that its span has, but for what rounding takes.
            for (number, groups) in groups_of.iter_mut().enumerate() {
                groups.dedup();
                let first = number as u32 * block / span * span;
                let (cells, wide) =
                    ((columns - number as u32 * block).min(block) / INTERLEAVED, (columns - first).min(span));
                let rest = columns % span % block;
                if cells * INTERLEAVED == block && rest == 0 {
                    assert!(groups.len() as u32 >= cells.min(wide / 128), "{what}: block {number} in {groups:?}");
                }
            }
            Rotator::inverse(of(Some(span)), columns).apply(&mut moved);
            assert!(moved.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-3), "{what}");
        }
        assert_eq!(Interleave::of(Rotation::Hadamard { seed: 0, block: Some(128), interleave: Some(1024) }, 100), None);
    }

    #[test]
    fn rotation_keeps_products() {
        let mut a: Vec<f32> = (0..768).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut b: Vec<f32> = (0..768).map(|i| (i as f32 * 0.11).cos()).collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let before = dot(&a, &b);
        let r = Rotation::Hadamard { seed: 7, block: None, interleave: None };
        rotate(r, &mut a);
        rotate(r, &mut b);
        assert!((dot(&a, &b) - before).abs() < 1e-3, "{} {before}", dot(&a, &b));
    }

    #[test]
    fn rotations_are_undone() {
        for columns in [1, 6, 7, 172, 256, 344, 576, 768, 4864] {
            for block in [None, Some(2), Some(16), Some(128), Some(512)] {
                let x: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.37).sin()).collect();
                let rotation = Rotation::Hadamard { seed: 7, block, interleave: None };
                let mut y = x.clone();
                rotate(rotation, &mut y);
                Rotator::inverse(rotation, columns).apply(&mut y);
                assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5), "{columns} in {block:?}");
            }
        }
    }

    #[test]
    fn blocks_are_transformed_alone() {
        let rotation = Rotation::Hadamard { seed: 7, block: Some(128), interleave: None };
        // 300 = 2 · 128 + 32 + 8 + 4.
        let ends = [128, 256, 288, 296, 300];
        for column in [0usize, 130, 255, 270, 290, 299] {
            let mut x = vec![0f32; 300];
            x[column] = 1.0;
            rotate(rotation, &mut x);
            let block = ends.iter().position(|&end| column < end).expect("of a block");
            let first = if block == 0 { 0 } else { ends[block - 1] };
            let size = ends[block] - first;
            for (i, v) in x.iter().enumerate() {
                let inside = (first..ends[block]).contains(&i);
                let expect = if inside { 1.0 / (size as f32).sqrt() } else { 0.0 };
                assert!((v.abs() - expect).abs() < 1e-6, "column {column}, value {i}: {v}");
            }
        }
        // A block as large as a power of two of columns is the whole transform.
        let x: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
        let turned = |block| {
            let mut x = x.clone();
            rotate(Rotation::Hadamard { seed: 7, block, interleave: None }, &mut x);
            x
        };
        assert_eq!(turned(None), turned(Some(256)));
    }
}

//! The twin of the kernels on the CPU: the same bits, and what the CPU engine runs.

use super::append::Append;
use super::emit::BIAS;
use super::{
    Attend, CHUNK, Cache, HIGHEST, INVERSE_QUARTERS, LARGEST_OF_TWO_PLANES, LOWEST, PAGE, QUARTERS, SCALE_RANGE,
    SMALLEST, SPAN, UNSEEN, WEIGHT_ONE, planes,
};
use crate::kernels::math::{across_lanes_reference, power_reference, whole_reference};
use crate::layout::CELL;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Positions of a tile.
const TILE: usize = PAGE as usize;
/// Columns, or positions, that lie side by side.
const UNIT: usize = CELL as usize;

/// One token of a step: what [`append`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Its heads of queries, not turned, one behind the other.
    pub q: &'a [f32],
    /// Its heads of keys, not turned.
    pub k: &'a [f32],
    /// Its heads of values.
    pub v: &'a [f32],
    /// Cosines of its position, `rotary / 2`.
    pub cos: &'a [f32],
    /// Sines of its position.
    pub sin: &'a [f32],
    /// Where its key and value go: `page · 64 + offset`.
    pub slot: usize,
}

/// Weights of the norms of queries and keys, `head_dim` each; empty without norms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Norms<'a> {
    /// Of queries.
    pub q: &'a [f32],
    /// Of keys.
    pub k: &'a [f32],
}

/// Puts a token's keys and values into `cache`, and its queries, rounded, into `queries` (`heads × 2 × columns`) and
/// `scales` (`heads`). False if a number is not finite.
pub fn append(
    op: &Append,
    token: &Token<'_>,
    norms: Norms<'_>,
    cache: &mut [u8],
    queries: &mut [i8],
    scales: &mut [f32],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has the instructions.
        return unsafe { x86::append_avx2(op, token, norms, cache, queries, scales) };
    }
    append_here(op, token, norms, cache, queries, scales)
}

/// The body of [`append`], compiled for each set of instructions.
#[inline(always)]
fn append_here(
    op: &Append,
    token: &Token<'_>,
    norms: Norms<'_>,
    cache: &mut [u8],
    queries: &mut [i8],
    scales: &mut [f32],
) -> bool {
    let layout = &op.cache;
    let (d, columns) = (layout.head_dim as usize, layout.columns() as usize);
    let mut finite = true;
    let mut head = [0f32; 256];
    for ((q, planes_of), scale) in token.q.chunks_exact(d).zip(queries.chunks_exact_mut(2 * columns)).zip(scales) {
        turned(op, q, norms.q, token, &mut head[..d]);
        let most = largest(&head[..d], &mut finite);
        let inverse = inverse(LARGEST_OF_TWO_PLANES, most);
        let (high, low) = planes_of.split_at_mut(columns);
        for (i, (high, low)) in high.iter_mut().zip(low).enumerate() {
            (*high, *low) = if i < d { planes(whole_reference(head[i] * inverse) as i16) } else { (0, 0) };
        }
        *scale = most / LARGEST_OF_TWO_PLANES * op.query_factor();
    }
    let (page, offset) = (token.slot / TILE, (token.slot % TILE) as u32);
    let pieces = cache[page * layout.page_bytes() as usize..][..layout.page_bytes() as usize]
        .chunks_exact_mut(layout.piece_bytes() as usize);
    for ((piece, k), v) in pieces.zip(token.k.chunks_exact(d)).zip(token.v.chunks_exact(d)) {
        turned(op, k, norms.k, token, &mut head[..d]);
        let most = largest(&head[..d], &mut finite);
        let rounded = Planes::new(&head[..d], inverse(layout.largest(), most), layout);
        for (plane, bytes) in (0..layout.planes).zip(&rounded.0) {
            for (column, unit) in (0..columns).step_by(UNIT).zip(bytes.as_chunks::<UNIT>().0) {
                piece[layout.key(plane, offset, column as u32) as usize..][..UNIT].copy_from_slice(unit);
            }
        }
        let key_scale = most / layout.largest();
        let most = largest(v, &mut finite);
        let (logarithm, inverse) = value_scale(most / layout.largest());
        let rounded = Planes::new(v, inverse, layout);
        for (plane, bytes) in (0..layout.planes).zip(&rounded.0) {
            let cells = piece[layout.value(plane, offset, 0) as usize..].iter_mut().step_by(UNIT);
            cells.zip(&bytes[..columns]).for_each(|(to, byte)| *to = *byte);
        }
        for (i, number) in [key_scale, logarithm, inverse].into_iter().enumerate() {
            let at = layout.scales() as usize + 4 * (i * TILE + offset as usize);
            piece[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
    }
    finite
}

/// The norm and the turn of a head.
#[inline(always)]
fn turned(op: &Append, x: &[f32], weights: &[f32], token: &Token<'_>, out: &mut [f32]) {
    out.copy_from_slice(x);
    if let Some(eps) = op.norm {
        let mut lanes = [0f32; 32];
        for (i, x) in x.iter().enumerate() {
            lanes[i % 32] += x * x;
        }
        let mean = across_lanes_reference(lanes, |a, b| a + b) / x.len() as f32;
        let factor = 1.0 / (mean + eps).sqrt();
        out.iter_mut().zip(weights).for_each(|(x, w)| *x = *x * factor * w);
    }
    let half = op.rotary as usize / 2;
    if op.interleaved {
        for ((pair, c), s) in out[..2 * half].as_chunks_mut::<2>().0.iter_mut().zip(token.cos).zip(token.sin) {
            let [a, b] = *pair;
            *pair = [a * c - b * s, b * c + a * s];
        }
        return;
    }
    let (low, high) = out.split_at_mut(half);
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(token.cos).zip(token.sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// The largest magnitude, 0 if one is not finite.
#[inline(always)]
fn largest(x: &[f32], finite: &mut bool) -> f32 {
    let bits = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let fine = bits < f32::INFINITY.to_bits();
    *finite &= fine;
    if fine { f32::from_bits(bits) } else { 0.0 }
}

fn inverse(largest: f32, most: f32) -> f32 {
    if most > 0.0 { (largest / most).min(f32::MAX) } else { 0.0 }
}

/// Logarithm and inverse of the scale of a value: the smallest `2^(k/4)` of at least `scale`, within [`SCALE_RANGE`].
fn value_scale(scale: f32) -> (f32, f32) {
    let bits = scale.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let mantissa = f32::from_bits((bits & 0x7f_ffff) | 0x3f80_0000);
    let quarter = QUARTERS.iter().filter(|q| mantissa > **q).count() as i32;
    let (exponent, quarter) = (exponent + quarter / 4, quarter % 4);
    let clamped = exponent.clamp(SCALE_RANGE.0, SCALE_RANGE.1);
    let quarter = if clamped == exponent { quarter } else { 0 };
    let inverse = INVERSE_QUARTERS[quarter as usize] * f32::from_bits(((127 - clamped) as u32) << 23);
    (clamped as f32 + quarter as f32 * 0.25, inverse)
}

/// The planes of a head's rounded numbers; the columns beyond the head are zero.
struct Planes([[u8; 256]; 2]);

impl Planes {
    #[inline(always)]
    fn new(x: &[f32], inverse: f32, layout: &Cache) -> Planes {
        let mut out = [[0; 256]; 2];
        let [first, second] = &mut out;
        for ((x, first), second) in x.iter().zip(first).zip(second) {
            let q = whole_reference(x * inverse) as i16;
            let (high, low) = if layout.planes == 2 { planes(q) } else { (q as i8, 0) };
            (*first, *second) = (high.cast_unsigned(), low.cast_unsigned());
        }
        Planes(out)
    }
}

/// One head of one token: what [`attend`] reads beside the cache.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Two planes, `2 × columns`.
    pub planes: &'a [i8],
    /// The scale.
    pub scale: f32,
    /// The token's position.
    pub position: u32,
    /// The pages of its sequence, at least up to its position.
    pub pages: &'a [i32],
    /// The head of keys and values that it sees.
    pub kv_head: u32,
    /// The logarithm (natural) of the head's sink, if the model has sinks.
    pub sink: f32,
}

/// Sums over the positions seen so far, all relative to `2^high`.
#[derive(Clone)]
struct Sums {
    high: f32,
    total: f32,
    columns: [f32; 256],
}

impl Sums {
    const NONE: Sums = Sums { high: LOWEST, total: 0.0, columns: [0.0; 256] };

    #[inline(always)]
    fn fold(&mut self, other: &Sums, columns: usize) {
        let high = self.high.max(other.high);
        let (own, others) = (power_reference(self.high - high), power_reference(other.high - high));
        self.high = high;
        self.total = other.total.mul_add(others, self.total * own);
        for (own_sum, sum) in self.columns[..columns].iter_mut().zip(&other.columns) {
            *own_sum = sum.mul_add(others, *own_sum * own);
        }
    }
}

/// Writes the attention of one head of one token, `head_dim` values, to `out`. False if scores leave the range of numbers;
/// then what is written is unspecified.
pub fn attend(op: &Attend, cache: &[u8], query: &Query<'_>, out: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the CPU has the instructions.
            return unsafe { x86::attend_avx512(op, cache, query, out) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the instructions.
            return unsafe { x86::attend_avx2(op, cache, query, out) };
        }
    }
    attend_here::<Plain>(op, cache, query, out)
}

/// The body of [`attend`], compiled for each set of instructions.
#[inline(always)]
fn attend_here<I: Integers>(op: &Attend, cache: &[u8], query: &Query<'_>, out: &mut [f32]) -> bool {
    let layout = &op.cache;
    let columns = layout.columns() as usize;
    let q = Rounded::new(query, columns);
    let (first, last) = (op.first(query.position) as usize, query.position as usize);
    let (mut all, mut span, mut chunk, mut sums) = (Sums::NONE, Sums::NONE, Sums::NONE, Sums::NONE);
    let mut fine = true;
    for tile in first / TILE..=last / TILE {
        let seen = first.saturating_sub(tile * TILE)..(last + 1 - tile * TILE).min(TILE);
        let piece = (query.pages[tile] as usize * layout.kv_heads as usize + query.kv_head as usize)
            * layout.piece_bytes() as usize;
        let piece = &cache[piece..][..layout.piece_bytes() as usize];
        q.tile::<I>(op, piece, seen, &mut sums);
        fine &= sums.high.abs() < HIGHEST;
        chunk.fold(&sums, columns);
        let next = tile as u32 + 1;
        if next.is_multiple_of(CHUNK) || tile == last / TILE {
            span.fold(&chunk, columns);
            chunk = Sums::NONE;
        }
        if next.is_multiple_of(SPAN) || tile == last / TILE {
            all.fold(&span, columns);
            span = Sums::NONE;
        }
    }
    if op.sinks {
        let score = query.sink * std::f32::consts::LOG2_E;
        let high = whole_reference(score + 0.5).max(LOWEST);
        fine &= high.abs() < HIGHEST;
        all.fold(&Sums { high, total: weight(score - high), ..Sums::NONE }, columns);
    }
    let total = all.total * op.one();
    for (out, sum) in out.iter_mut().zip(&all.columns) {
        *out = sum / total;
    }
    fine
}

/// `2^x` of `x` up to 0, 0 below [`SMALLEST`].
#[inline(always)]
fn weight(x: f32) -> f32 {
    crate::kernels::math::weight_reference(x, SMALLEST)
}

/// A query as the CPU multiplies it.
struct Rounded<'a> {
    /// The numbers, then their high planes.
    whole: [i16; 256],
    high: [i16; 256],
    /// Both planes as they are.
    planes: &'a [i8],
    scale: f32,
    columns: usize,
}

/// The integers of a tile, computed by some instructions.
///
/// # Safety
/// All functions need the instructions of the implementation: call them only from functions compiled for these, into which they
/// are inlined.
trait Integers {
    /// The products of the query with the keys of a tile, but for that of low planes, over 256 if there are two.
    unsafe fn scores(query: &Rounded<'_>, layout: &Cache, keys: &[u8]) -> [i32; TILE];

    /// The high and the low bytes of a tile's weights, each 16 in the order of [`Cache::place`].
    unsafe fn bytes(weights: &[u32; TILE]) -> [[u8; TILE]; 2];

    /// The values of a tile, weighted, but for the product of low planes, over 256 if there are two.
    unsafe fn values(layout: &Cache, values: &[u8], weights: &[[u8; TILE]; 2], sums: &mut [f32; 256]);
}

impl<'a> Rounded<'a> {
    #[inline(always)]
    fn new(query: &Query<'a>, columns: usize) -> Rounded<'a> {
        let (high, low) = query.planes.split_at(columns);
        let (planes, scale) = (query.planes, query.scale);
        let mut q = Rounded { whole: [0; 256], high: [0; 256], planes, scale, columns };
        for (((whole, of_high), high), low) in q.whole.iter_mut().zip(&mut q.high).zip(high).zip(low) {
            *whole = i16::from(*high) * 256 + i16::from(*low);
            *of_high = (*high).into();
        }
        q
    }

    /// Writes the sums of a tile, of which the positions `seen` are seen.
    #[inline(always)]
    fn tile<I: Integers>(&self, op: &Attend, piece: &[u8], seen: std::ops::Range<usize>, sums: &mut Sums) {
        let (integers, numbers) = piece.split_at(op.cache.scales() as usize);
        let (keys, values) = integers.split_at(op.cache.values() as usize);
        let (mut scales, mut logarithms, mut inverses) = ([0f32; TILE], [0f32; TILE], [0f32; TILE]);
        let (of_keys, of_values) = numbers.as_chunks::<4>().0.split_at(TILE);
        let (of_values, of_inverses) = of_values.split_at(TILE);
        scales.iter_mut().zip(of_keys).for_each(|(to, bytes)| *to = f32::from_le_bytes(*bytes));
        logarithms.iter_mut().zip(of_values).for_each(|(to, bytes)| *to = f32::from_le_bytes(*bytes));
        inverses.iter_mut().zip(of_inverses).for_each(|(to, bytes)| *to = f32::from_le_bytes(*bytes));
        // SAFETY: this function's caller is compiled for the instructions.
        let mut scores = unsafe { I::scores(self, &op.cache, keys) }.map(|sum| sum as f32);
        for (position, score) in scores.iter_mut().enumerate() {
            let (scaled, logarithm) = (*score * scales[position], logarithms[position]);
            *score = match op.soft_cap {
                None => scaled.mul_add(self.scale, logarithm),
                Some(cap) => soft_cap(scaled * self.scale, cap) + logarithm,
            };
        }
        scores[..seen.start].fill(UNSEEN);
        scores[seen.end..].fill(UNSEEN);
        let mut most = [UNSEEN; UNIT];
        for scores in scores.as_chunks::<UNIT>().0 {
            most.iter_mut().zip(scores).for_each(|(most, score)| *most = most.max(*score));
        }
        let high = whole_reference(most.iter().copied().fold(UNSEEN, f32::max) + 0.5).max(LOWEST);
        let weights = scores.map(|score| weight(score - high));
        // Lane t of four has positions 2t and 2t + 1 of each eight, and sums those of 16 positions first.
        let mut lanes = [0f32; 4];
        for (unit, (weights, inverses)) in weights.chunks_exact(UNIT).zip(inverses.chunks_exact(UNIT)).enumerate() {
            let mut sums = [0f32; 4];
            for (i, (weight, inverse)) in weights.iter().zip(inverses).enumerate() {
                sums[i % 8 / 2] = weight.mul_add(*inverse, sums[i % 8 / 2]);
            }
            for (lane, sum) in lanes.iter_mut().zip(sums) {
                *lane = if unit == 0 { sum } else { *lane + sum };
            }
        }
        (sums.high, sums.total) = (high, (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
        let rounded = weights.map(|weight| weight.mul_add(WEIGHT_ONE, BIAS).to_bits());
        // SAFETY: as above.
        unsafe { I::values(&op.cache, values, &I::bytes(&rounded), &mut sums.columns) };
    }
}

/// By no instructions of their own.
struct Plain;

impl Integers for Plain {
    #[inline(always)]
    unsafe fn scores(query: &Rounded<'_>, layout: &Cache, keys: &[u8]) -> [i32; TILE] {
        let mut sums = [0i32; TILE];
        let (high, low) = keys.split_at(layout.plane_bytes() as usize);
        for (of_query, plane) in [(&query.whole, high), (&query.high, low)] {
            // There may be no low plane.
            for (i, cells) in plane.chunks_exact(TILE * UNIT).enumerate() {
                let q: &[i16; UNIT] = of_query[i * UNIT..].first_chunk().expect("columns come in units");
                add_products(q, cells, &mut sums);
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn bytes(weights: &[u32; TILE]) -> [[u8; TILE]; 2] {
        let (mut high, mut low) = ([0u8; TILE], [0u8; TILE]);
        for (position, weight) in weights.iter().enumerate() {
            let at = position / UNIT * UNIT + Cache::place((position % UNIT) as u32) as usize;
            (high[at], low[at]) = ((weight >> 8) as u8, *weight as u8);
        }
        [high, low]
    }

    #[inline(always)]
    unsafe fn values(layout: &Cache, values: &[u8], [high, low]: &[[u8; TILE]; 2], sums: &mut [f32; 256]) {
        let columns = layout.columns() as usize;
        let (of_high, of_low) = values.split_at(layout.plane_bytes() as usize);
        let (mut of_highs, mut of_both) = ([0i32; 256], [0i32; 256]);
        for (unit, cells) in of_high.chunks_exact(columns * UNIT).enumerate() {
            add_weighted(&high[unit * UNIT..], cells, &mut of_highs);
            add_weighted(&low[unit * UNIT..], cells, &mut of_both);
        }
        for (unit, cells) in of_low.chunks_exact(columns * UNIT).enumerate() {
            add_weighted(&high[unit * UNIT..], cells, &mut of_both);
        }
        for (sum, (high, both)) in sums[..columns].iter_mut().zip(of_highs.iter().zip(&of_both)) {
            *sum = (high * 256 + both) as f32;
        }
    }
}

/// Adds the product of a query's unit with each position's to that position's sum.
#[inline(always)]
fn add_products(q: &[i16; UNIT], cells: &[u8], sums: &mut [i32; TILE]) {
    for (cell, sum) in cells.as_chunks::<UNIT>().0.iter().zip(sums) {
        *sum = sum.wrapping_add(unit_product(cell, q));
    }
}

/// Adds the product of a unit of weights with each column's values to that column's sum.
#[inline(always)]
fn add_weighted(weights: &[u8], cells: &[u8], sums: &mut [i32; 256]) {
    let weights: [i16; UNIT] = std::array::from_fn(|i| weights[i].into());
    for (cell, sum) in cells.as_chunks::<UNIT>().0.iter().zip(sums) {
        *sum = sum.wrapping_add(unit_product(cell, &weights));
    }
}

/// The product of a unit of signed bytes with a unit of numbers. All sums stay below 2^31; that they are not checked for it lets
/// the compiler use vectors.
#[inline(always)]
fn unit_product(bytes: &[u8; UNIT], numbers: &[i16; UNIT]) -> i32 {
    let products = bytes.iter().zip(numbers).map(|(b, n)| i32::from(*b as i8).wrapping_mul(i32::from(*n)));
    products.fold(0, i32::wrapping_add)
}

/// `cap · tanh(score / cap)` in base 2: scores and caps are times `log2 e`.
fn soft_cap(score: f32, cap: f32) -> f32 {
    let (factor, cap) = soft_cap_constants(cap);
    let e = crate::kernels::math::exp2_reference((score * factor).clamp(-100.0, 100.0));
    cap - (cap + cap) / (e + 1.0)
}

/// What a score is multiplied with to become the exponent of `tanh`'s power of two, and the cap in base 2.
pub(super) fn soft_cap_constants(cap: f32) -> (f32, f32) {
    (2.0 / cap, cap * std::f32::consts::LOG2_E)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look random.
    fn bytes(len: usize, seed: u32) -> Vec<u8> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// A cache of `pages` pages of any integers, whose scales are of moderate size.
    fn cache(layout: &Cache, pages: usize, seed: u32) -> Vec<u8> {
        let mut out = bytes(pages * layout.page_bytes() as usize, seed);
        for piece in out.chunks_exact_mut(layout.piece_bytes() as usize) {
            let numbers = piece[layout.scales() as usize..].as_chunks_mut::<4>().0;
            for (i, number) in numbers.iter_mut().enumerate() {
                let x = f32::from(number[0]) / 256.0;
                let value = if i < TILE { 1e-3 * (x + 0.1) } else { x - 2.0 };
                *number = value.to_le_bytes();
            }
        }
        out
    }

    #[test]
    fn all_instructions_give_the_same_bits() {
        for (head_dim, planes, window, soft_cap) in [
            (64, 2, None, None),
            (64, 1, Some(70), None),
            (80, 2, None, Some(30.0)),
            (256, 2, Some(3), None),
            (6, 1, None, None),
        ] {
            let layout = Cache { kv_heads: 2, head_dim, planes };
            let cache = cache(&layout, 5, head_dim + planes);
            let op = Attend { cache: layout, heads: 4, tokens: 1, window, soft_cap, sinks: head_dim == 80 };
            for position in [0, 1, 63, 64, 200, 319] {
                // A high byte is never -128.
                let plane = |b: u8| b.cast_signed().max(-127);
                let planes: Vec<i8> = bytes(2 * layout.columns() as usize, position).into_iter().map(plane).collect();
                let (pages, kv_head) = ([3, 1, 4, 0, 2], position % 2);
                let query = Query { planes: &planes, scale: 1e-3, position, pages: &pages, kv_head, sink: 0.3 };
                let of = |attend: &dyn Fn(&mut [f32]) -> bool| {
                    let mut out = vec![0f32; head_dim as usize];
                    (attend(&mut out), out.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                };
                let expected = of(&|out| attend_here::<Plain>(&op, &cache, &query, out));
                assert!(expected.0 && expected.1.iter().any(|x| *x != 0), "{head_dim} columns, position {position}");
                assert_eq!(of(&|out| attend(&op, &cache, &query, out)), expected);
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the CPU has the instructions.
                    assert_eq!(of(&|out| unsafe { x86::attend_avx2(&op, &cache, &query, out) }), expected);
                }
            }
        }
    }
}

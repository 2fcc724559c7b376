//! The arithmetic of the CPU engine that is not in [`qp_codegen::reference`]: `f32`, in an order that depends on shapes
//! alone, so that results do not depend on the number of threads.

use qp_codegen::reference::exp;

/// Partial sums that run side by side in [`dot`].
const LANES: usize = 16;

/// Sum of products: element `i` goes to partial sum `i mod 16`; these are then added in pairs.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for ((s, a), b) in sums.iter_mut().zip(a).zip(b) {
            *s += a * b;
        }
    }
    for ((s, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *s += a * b;
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        let (lo, hi) = sums.split_at_mut(width);
        for (l, h) in lo.iter_mut().zip(hi) {
            *l += *h;
        }
    }
    sums[0]
}

/// Rotary embedding of one head, in place: element `i` turns with element `i + half`.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// One query against `keys.len() / d` positions (`d` = width of a head): `out = softmax(q·kᵀ / √d)·v`.
///
/// `scores` is scratch.
pub fn attend(q: &[f32], keys: &[f32], values: &[f32], scores: &mut Vec<f32>, out: &mut [f32]) {
    let d = q.len();
    let scale = 1.0 / (d as f32).sqrt();
    scores.clear();
    scores.extend(keys.chunks_exact(d).map(|k| dot(q, k) * scale));
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0f32;
    for s in scores.iter_mut() {
        *s = exp(*s - max);
        total += *s;
    }
    out.fill(0.0);
    for (s, v) in scores.iter().zip(values.chunks_exact(d)) {
        for (o, v) in out.iter_mut().zip(v) {
            *o += s * v;
        }
    }
    let factor = 1.0 / total;
    out.iter_mut().for_each(|o| *o *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_of_every_length() {
        for n in 0..70usize {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 3) as f32).collect();
            let expect: usize = (0..n).map(|i| i * (i % 3)).sum();
            assert_eq!(dot(&a, &b), expect as f32, "length {n}");
        }
    }

    #[test]
    fn rope_turns_by_the_angle() {
        let (s, c) = 0.5f32.sin_cos();
        let mut head = [1.0, 5.0, 0.0, 0.0];
        rope(&mut head, &[c, 1.0], &[s, 0.0]);
        assert_eq!(head, [c, 5.0, s, 0.0]);
    }

    #[test]
    fn attention_is_a_weighted_mean() {
        let (mut scores, mut out) = (Vec::new(), [0.0; 2]);
        // Equal scores: the plain mean of the values.
        attend(&[0.0, 0.0], &[1.0, 2.0, 3.0, 4.0], &[2.0, 0.0, 4.0, 2.0], &mut scores, &mut out);
        assert_eq!(out, [3.0, 1.0]);
        // One score far above the others: its value, and no overflow.
        attend(&[1000.0, 0.0], &[1.0, 0.0, -1.0, 0.0], &[2.0, 0.5, 4.0, 2.0], &mut scores, &mut out);
        assert_eq!(out, [2.0, 0.5]);
    }
}

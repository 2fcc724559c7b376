//! Exact inner products of a row's entries with activations, by the machine's vector instructions.
//!
//! A vector's lane sums two products at a time in 32 bits; before a lane could overflow, all lanes move to 64 bits. Integers
//! are exact, so every way gives the same.

/// Tokens whose activations are multiplied with entries that are loaded once.
const TOGETHER: usize = 4;

/// Products that a 32-bit sum holds: `512 · 2^7 · 16256` and `512 · 2^15 · 127` are below 2^31.
const TERMS: usize = 512;

/// Entries of 8 or 16 bits. Activations have up to 16 bits beside the first, 8 beside the second.
pub(super) trait Entry: Copy + Into<i32> {
    /// The products of `row` with each of `tokens`, which are as long.
    ///
    /// # Safety
    /// The machine has AVX-512 (F, BW).
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx512<const N: usize>(row: &[Self], tokens: [&[i16]; N]) -> [i64; N];

    /// As [`Entry::avx512`].
    ///
    /// # Safety
    /// The machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2<const N: usize>(row: &[Self], tokens: [&[i16]; N]) -> [i64; N];
}

/// The products of a row with each token's activations, which are as many as the row's entries.
pub(super) fn dots<E: Entry, X: AsRef<[i16]>>(row: &[E], tokens: &[X], out: &mut [i64]) {
    let (groups, rest) = tokens.as_chunks::<TOGETHER>();
    let (out_groups, out_rest) = out.as_chunks_mut::<TOGETHER>();
    for (out, group) in out_groups.iter_mut().zip(groups) {
        *out = together(row, group.each_ref().map(AsRef::as_ref));
    }
    for (out, token) in out_rest.iter_mut().zip(rest) {
        [*out] = together(row, [token.as_ref()]);
    }
}

fn together<E: Entry, const N: usize>(row: &[E], tokens: [&[i16]; N]) -> [i64; N] {
    assert!(tokens.iter().all(|x| x.len() == row.len()), "activations of a token");
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: both were just found.
            return unsafe { E::avx512(row, tokens) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: it was just found.
            return unsafe { E::avx2(row, tokens) };
        }
    }
    plain(row, tokens)
}

/// Without instructions that are known here.
fn plain<E: Entry, const N: usize>(row: &[E], tokens: [&[i16]; N]) -> [i64; N] {
    tokens.map(|x| {
        let parts = row.chunks(TERMS).zip(x.chunks(TERMS));
        let part = |(row, x): (&[E], &[i16])| -> i32 {
            row.iter().zip(x).fold(0, |s: i32, (&e, &x)| s.wrapping_add(e.into().wrapping_mul(i32::from(x))))
        };
        parts.map(|p| i64::from(part(p))).sum()
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Entry, TERMS, plain};

    /// The loop over a row: `$width` entries a step, widened to 16 bits by `$widen`, from which follow the sums in `$lanes` lanes.
    macro_rules! way {
        ($name:ident, $entry:ty, $feature:literal, $register:ty, $width:literal, $zero:ident, $load:ident, $madd:ident, $add:ident, $total:ident, $widen:expr) => {
            #[target_feature(enable = $feature)]
            unsafe fn $name<const N: usize>(row: &[$entry], tokens: [&[i16]; N]) -> [i64; N] {
                let mut out = [0i64; N];
                let whole = row.len() / $width * $width;
                // Two products a lane and step.
                let stretch = TERMS / 2 * $width;
                for from in (0..whole).step_by(stretch) {
                    let mut sums = [$zero(); N];
                    for at in (from..whole.min(from + stretch)).step_by($width) {
                        // SAFETY: `at + $width` entries and activations are there.
                        unsafe {
                            let entries: $register = $widen(row.as_ptr().add(at));
                            for (sum, x) in sums.iter_mut().zip(&tokens) {
                                *sum = $add(*sum, $madd(entries, $load(x.as_ptr().add(at).cast())));
                            }
                        }
                    }
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out += $total(sum);
                    }
                }
                let rest = plain(&row[whole..], tokens.map(|x| &x[whole..]));
                out.iter_mut().zip(rest).for_each(|(out, rest)| *out += rest);
                out
            }
        };
    }

    /// The sum of all lanes.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn total512(lanes: __m512i) -> i64 {
        let (low, high) = (_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
        _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(low), _mm512_cvtepi32_epi64(high)))
    }

    /// As [`total512`].
    #[target_feature(enable = "avx2")]
    fn total256(lanes: __m256i) -> i64 {
        let (low, high) = (_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
        let four = _mm256_add_epi64(_mm256_cvtepi32_epi64(low), _mm256_cvtepi32_epi64(high));
        let two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256::<1>(four));
        _mm_cvtsi128_si64(two) + _mm_extract_epi64::<1>(two)
    }

    macro_rules! ways {
        ($entry:ty, $wide:ident, $narrow:ident, $widen512:expr, $widen256:expr) => {
            way!(
                $wide,
                $entry,
                "avx512f,avx512bw",
                __m512i,
                32,
                _mm512_setzero_si512,
                _mm512_loadu_si512,
                _mm512_madd_epi16,
                _mm512_add_epi32,
                total512,
                $widen512
            );
            way!(
                $narrow,
                $entry,
                "avx2",
                __m256i,
                16,
                _mm256_setzero_si256,
                _mm256_loadu_si256,
                _mm256_madd_epi16,
                _mm256_add_epi32,
                total256,
                $widen256
            );

            impl Entry for $entry {
                unsafe fn avx512<const N: usize>(row: &[$entry], tokens: [&[i16]; N]) -> [i64; N] {
                    // SAFETY: the caller's promise.
                    unsafe { $wide(row, tokens) }
                }

                unsafe fn avx2<const N: usize>(row: &[$entry], tokens: [&[i16]; N]) -> [i64; N] {
                    // SAFETY: the caller's promise.
                    unsafe { $narrow(row, tokens) }
                }
            }
        };
    }

    ways!(i8, bytes512, bytes256, |p: *const i8| _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())), |p: *const i8| {
        _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()))
    });
    ways!(i16, halves512, halves256, |p: *const i16| _mm512_loadu_si512(p.cast()), |p: *const i16| _mm256_loadu_si256(
        p.cast()
    ));
}

#[cfg(not(target_arch = "x86_64"))]
impl Entry for i8 {}
#[cfg(not(target_arch = "x86_64"))]
impl Entry for i16 {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, the least and the largest of their type among them.
    fn numbers(len: usize, seed: u32, largest: i32) -> Vec<i16> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match x >> 28 {
                0 => -largest,
                1 => largest,
                _ => (x >> 8).cast_signed() % (largest + 1),
            }
        };
        (0..len).map(|_| next() as i16).collect()
    }

    fn check<E: Entry>(row: &[E], largest: i32) {
        let tokens: Vec<Vec<i16>> = (0..7).map(|t| numbers(row.len(), t + 1, largest)).collect();
        let exact = |x: &Vec<i16>| row.iter().zip(x).map(|(&e, &x)| i64::from(e.into()) * i64::from(x)).sum::<i64>();
        let expected: Vec<i64> = tokens.iter().map(exact).collect();
        let mut out = vec![0; 7];
        dots(row, &tokens, &mut out);
        assert_eq!(out, expected);
        let all: [&[i16]; 7] = std::array::from_fn(|t| &tokens[t][..]);
        assert_eq!(plain(row, all).to_vec(), expected);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: it was just found.
            assert_eq!(unsafe { E::avx2(row, all) }.to_vec(), expected);
        }
    }

    #[test]
    fn every_way_is_exact() {
        for len in [0, 1, 15, 16, 31, 32, 33, 576, 1000, 8192, 8200, 20_000] {
            let bytes: Vec<i8> = numbers(len, 99, 127).into_iter().map(|x| x as i8).collect();
            check(&bytes, 16_256);
            check(&numbers(len, 98, 32_767), 127);
        }
    }

    #[test]
    fn the_largest_sums_fit() {
        let len = 20_000;
        check(&vec![i8::MIN; len], 16_256);
        let (row, x) = (vec![i8::MIN; len], vec![-16_256i16; len]);
        let mut out = [0];
        dots(&row, &[x], &mut out);
        assert_eq!(out, [len as i64 * 128 * 16_256]);
        let (row, x) = (vec![i16::MIN; len], vec![-127i16; len]);
        dots(&row, &[x], &mut out);
        assert_eq!(out, [len as i64 * 32_768 * 127]);
    }
}

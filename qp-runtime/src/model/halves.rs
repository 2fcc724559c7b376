//! Half-precision numbers as single ones, by the machine's vector instructions. Every way is exact.

use half::f16;

/// The values of numbers that lie in memory from the low byte on.
pub(super) fn widen(halves: &[[u8; 2]], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: it was just found.
        return unsafe { avx512(halves, out) };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") && is_x86_feature_detected!("avx") {
        // SAFETY: both were just found.
        return unsafe { f16c(halves, out) };
    }
    plain(halves, out);
}

fn plain(halves: &[[u8; 2]], out: &mut [f32]) {
    out.iter_mut().zip(halves).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32());
}

/// # Safety
/// The machine has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(halves: &[[u8; 2]], out: &mut [f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    let (to, to_rest) = out.as_chunks_mut::<16>();
    let (from, from_rest) = halves.as_chunks::<16>();
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: both have sixteen numbers.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) };
    }
    plain(from_rest, to_rest);
}

/// # Safety
/// The machine has AVX and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
unsafe fn f16c(halves: &[[u8; 2]], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let (to, to_rest) = out.as_chunks_mut::<8>();
    let (from, from_rest) = halves.as_chunks::<8>();
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: both have eight numbers.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
    }
    plain(from_rest, to_rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_keeps_its_value() {
        let all: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).chain([[0, 0x3C]; 5]).collect();
        let mut expected = vec![0f32; all.len()];
        plain(&all, &mut expected);
        let same = |out: &[f32]| {
            out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
        };
        let mut out = vec![0f32; all.len()];
        widen(&all, &mut out);
        assert!(same(&out));
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("f16c") {
            let mut out = vec![0f32; all.len()];
            // SAFETY: it was just found; it does not come without AVX.
            unsafe { f16c(&all, &mut out) };
            assert!(same(&out));
        }
    }
}

//! Attention by the vector instructions of x86-64.

use std::arch::x86_64::*;

use super::{Append, Attend, Cache, Integers, Norms, Plain, Query, Rounded, TILE, Token, UNIT};

#[target_feature(enable = "avx2")]
pub(super) fn append_avx2(
    op: &Append,
    token: &Token<'_>,
    norms: Norms<'_>,
    cache: &mut [u8],
    queries: &mut [i8],
    scales: &mut [f32],
) -> bool {
    super::append_here(op, token, norms, cache, queries, scales)
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn attend_avx2(op: &Attend, cache: &[u8], query: &Query<'_>, out: &mut [f32]) -> bool {
    super::attend_here::<Plain>(op, cache, query, out)
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn attend_avx512(op: &Attend, cache: &[u8], query: &Query<'_>, out: &mut [f32]) -> bool {
    super::attend_here::<Vnni>(op, cache, query, out)
}

/// By products of unsigned with signed bytes: four positions, or columns, of 16 bytes a register.
struct Vnni;

/// Registers of 16 positions or columns.
const PARTS: usize = 4;

impl Integers for Vnni {
    #[inline(always)]
    unsafe fn scores(query: &Rounded<'_>, layout: &Cache, keys: &[u8]) -> [i32; TILE] {
        let (plane, units) = (layout.plane_bytes() as usize, query.columns / UNIT);
        assert!(keys.len() == layout.planes as usize * plane && plane == units * TILE * UNIT, "keys of a tile");
        let (of_high, of_low) = query.planes.split_at(query.columns);
        assert_eq!(of_low.len(), query.columns, "planes of a query");
        let mut out = [0; TILE];
        // SAFETY: the caller's promise; the parts that are read lie within the planes, as was just asserted.
        unsafe {
            // Keys become unsigned by 128 more, which is taken away with the query's sums.
            let more = _mm512_set1_epi8(i8::MIN);
            let sum = |plane: &[i8]| plane.iter().map(|q| i32::from(*q)).sum::<i32>();
            let (sum_of_high, sum_of_low) = (sum(of_high), sum(of_low));
            let both = if layout.planes == 2 { sum_of_high + sum_of_low } else { sum_of_low };
            let surplus = _mm512_set1_epi32(128 * (256 * sum_of_high + both));
            for (i, out) in out.as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
                let mut high = [_mm512_setzero_si512(); PARTS];
                let mut both = [_mm512_setzero_si512(); PARTS];
                for unit in 0..units {
                    let q_high = four_times(of_high.as_ptr().add(unit * UNIT).cast());
                    let q_low = four_times(of_low.as_ptr().add(unit * UNIT).cast());
                    let cells = keys.as_ptr().add((unit * TILE + i * UNIT) * UNIT);
                    for part in 0..PARTS {
                        let k_high = _mm512_xor_si512(_mm512_loadu_si512(cells.add(64 * part).cast()), more);
                        high[part] = _mm512_dpbusd_epi32(high[part], k_high, q_high);
                        both[part] = _mm512_dpbusd_epi32(both[part], k_high, q_low);
                        if layout.planes == 2 {
                            let k_low = _mm512_loadu_si512(cells.add(plane + 64 * part).cast());
                            both[part] = _mm512_dpbusd_epi32(both[part], _mm512_xor_si512(k_low, more), q_high);
                        }
                    }
                }
                let sums = _mm512_sub_epi32(across(high, both), surplus);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), sums);
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn bytes(weights: &[u32; TILE]) -> [[u8; TILE]; 2] {
        /// The position whose byte comes in each place.
        const POSITIONS: [u8; UNIT] = {
            let mut out = [0; UNIT];
            let mut position = 0;
            while position < UNIT {
                out[Cache::place(position as u32) as usize] = position as u8;
                position += 1;
            }
            out
        };
        let mut out = [[0; TILE]; 2];
        let [high, low] = &mut out;
        let units = high.as_chunks_mut::<UNIT>().0.iter_mut().zip(low.as_chunks_mut::<UNIT>().0);
        for ((high, low), weights) in units.zip(weights.as_chunks::<UNIT>().0) {
            // SAFETY: the caller's promise; each has sixteen numbers.
            unsafe {
                let order = _mm_loadu_si128(POSITIONS.as_ptr().cast());
                let weights = _mm512_loadu_si512(weights.as_ptr().cast());
                let of_high = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(weights));
                _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_shuffle_epi8(of_high, order));
                _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(weights), order));
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn values(layout: &Cache, values: &[u8], [high, low]: &[[u8; TILE]; 2], sums: &mut [f32; 256]) {
        let (plane, columns) = (layout.plane_bytes() as usize, layout.columns() as usize);
        assert!(values.len() == layout.planes as usize * plane && plane == columns * TILE, "values of a tile");
        // Columns come in multiples of 32, at most 256.
        for (i, sums) in sums[..columns].as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
            // SAFETY: the caller's promise; the parts that are read lie within the planes, as was just asserted.
            unsafe {
                let mut of_high = [_mm512_setzero_si512(); PARTS];
                let mut of_both = [_mm512_setzero_si512(); PARTS];
                for unit in 0..TILE / UNIT {
                    let w_high = four_times(high.as_ptr().add(unit * UNIT));
                    let w_low = four_times(low.as_ptr().add(unit * UNIT));
                    let cells = values.as_ptr().add((unit * columns + i * UNIT) * UNIT);
                    for part in 0..PARTS {
                        let v_high = _mm512_loadu_si512(cells.add(64 * part).cast());
                        of_high[part] = _mm512_dpbusd_epi32(of_high[part], w_high, v_high);
                        of_both[part] = _mm512_dpbusd_epi32(of_both[part], w_low, v_high);
                        if layout.planes == 2 {
                            let v_low = _mm512_loadu_si512(cells.add(plane + 64 * part).cast());
                            of_both[part] = _mm512_dpbusd_epi32(of_both[part], w_high, v_low);
                        }
                    }
                }
                _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_cvtepi32_ps(across(of_high, of_both)));
            }
        }
    }
}

/// Sixteen bytes, four times.
#[inline(always)]
unsafe fn four_times(bytes: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.cast())) }
}

/// `256 · high + both`, summed over four neighbouring lanes: part `p` has those of numbers `4p` to `4p + 3`.
#[inline(always)]
unsafe fn across(high: [__m512i; PARTS], both: [__m512i; PARTS]) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = |p: usize| _mm512_add_epi32(_mm512_slli_epi32::<8>(high[p]), both[p]);
        let [a, b, c, d] = [whole(0), whole(1), whole(2), whole(3)];
        // In each 128 bits: two sums of two lanes of both, then the sum of four lanes of all parts.
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_permutexvar_epi32(order, abcd)
    }
}

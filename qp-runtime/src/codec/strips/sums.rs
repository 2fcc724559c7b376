//! The sums of a strip's rows, by the machine's vector instructions. Integers are exact, so every way gives the same.

use std::sync::LazyLock;

use half::f16;
use qp_codegen::reference::split_activation;

use super::{Digits, OfRuns, Outcome, PAD, ROWS, RunsOf, Strip, UNIT};

/// How sums are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// AVX-512 with products of bytes: four columns of sixteen rows an instruction, for each byte of the activations.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// AVX2 and F16C: four columns of four rows an instruction.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Without instructions that are known here.
    Plain,
}

/// A token's activations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    /// Units of columns, see [`Way::cell`].
    pub(super) cells: &'a [u64],
    /// Sums over the runs of columns, if there are any.
    pub(super) sums: &'a [i32],
    /// What is added to a row's sum before it is converted.
    pub(super) add: i64,
    /// What its results are multiplied with.
    pub(super) factor: f32,
}

impl Way {
    /// The fastest that this machine has.
    pub(super) fn fastest() -> Way {
        Way::all()[0]
    }

    /// All that this machine has, the fastest first.
    pub(super) fn all() -> &'static [Way] {
        static ALL: LazyLock<Vec<Way>> = LazyLock::new(|| {
            let mut all = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    all.push(Way::Vnni);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                    all.push(Way::Avx2);
                }
            }
            all.push(Way::Plain);
            all
        });
        &ALL
    }

    /// Four activations as this way reads them: the numbers, or their high bytes and then their low bytes.
    pub(super) fn cell(self, q: [i16; UNIT]) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Way::Vnni => {
                let [a, b, c, d] = q.map(split_activation);
                u64::from_le_bytes([a.0, b.0, c.0, d.0, a.1, b.1, c.1, d.1].map(i8::cast_unsigned))
            }
            _ => q.iter().rev().fold(0, |cell, q| cell << 16 | u64::from(q.cast_unsigned())),
        }
    }

    /// The results of a strip for each token, whose cells are this way's.
    pub(super) fn results<T: Outcome>(self, strip: &Strip<'_>, tokens: &[Token<'_>], out: &mut [[T; ROWS]]) {
        let cells = strip.columns.next_multiple_of(PAD) / UNIT;
        let runs = strip.runs.map_or(0, |runs| runs.count);
        let fits = |t: &Token<'_>| t.cells.len() == cells && t.sums.len() == runs;
        assert!(tokens.iter().all(fits) && tokens.len() == out.len(), "activations of a token");
        assert_eq!(strip.digits.len(), strip.kind.strip_bytes(strip.columns), "digits of a strip");
        if let Some(runs) = strip.runs {
            assert!(runs.columns.is_multiple_of(PAD) && runs.columns <= 128, "runs of some units");
            assert_eq!(runs.count, strip.columns.div_ceil(runs.columns), "runs of all columns");
            let numbers = match runs.numbers {
                OfRuns::Integers(all) => all.len(),
                OfRuns::Halves(all, _) => all.len(),
            };
            assert_eq!(numbers, runs.count * runs.each, "numbers of all runs");
        }
        match self {
            // SAFETY: the machine has the way's instructions; the lengths fit.
            #[cfg(target_arch = "x86_64")]
            Way::Vnni => unsafe { x86::vnni(strip, tokens, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Way::Avx2 => unsafe { x86::avx2(strip, tokens, out) },
            Way::Plain => {
                for (token, out) in tokens.iter().zip(out) {
                    let sums = |digits: &[u8]| match strip.kind {
                        Digits::Four => plain::<true>(digits, token, strip.runs),
                        Digits::Eight | Digits::Sixteen | Digits::TwentyFour => {
                            plain::<false>(digits, token, strip.runs)
                        }
                    };
                    *out = result(strip, token, of_planes(strip, sums));
                }
            }
        }
    }
}

/// The sums of a strip from those of its planes of digits.
#[inline(always)]
fn of_planes<T: Plus>(strip: &Strip<'_>, sums: impl Fn(&[u8]) -> T) -> T {
    let planes = strip.kind.planes();
    if planes == 1 {
        return sums(strip.digits);
    }
    let size = strip.digits.len() / planes;
    let first = sums(&strip.digits[..size]);
    (1..planes).fold(first, |above, plane| above.plus(256, sums(&strip.digits[plane * size..][..size])))
}

/// Sums, or several of them.
trait Plus {
    /// `self · times + other`.
    fn plus(self, times: i64, other: Self) -> Self;
}

impl Plus for [i64; ROWS] {
    #[inline(always)]
    fn plus(self, times: i64, other: Self) -> Self {
        std::array::from_fn(|r| self[r] * times + other[r])
    }
}

impl<const N: usize> Plus for [[i64; ROWS]; N] {
    #[inline(always)]
    fn plus(self, times: i64, other: Self) -> Self {
        std::array::from_fn(|t| self[t].plus(times, other[t]))
    }
}

/// The results of a token from its sums.
#[inline(always)]
fn result<T: Outcome>(strip: &Strip<'_>, token: &Token<'_>, sums: [i64; ROWS]) -> [T; ROWS] {
    let later = match &strip.runs {
        Some(runs) if !runs.at_once => offsets(runs, token),
        _ => [0; ROWS],
    };
    std::array::from_fn(|r| T::of(strip.times * sums[r] + later[r] + token.add, strip.factors[r], token.factor))
}

/// What the smallest integer and the rests add to the rows' sums.
fn offsets(runs: &RunsOf<'_>, token: &Token<'_>) -> [i64; ROWS] {
    let mut out = [0i64; ROWS];
    for (k, &sum) in token.sums.iter().enumerate() {
        let slopes = runs.integers(runs.each * k);
        let rests = if runs.each == 2 { runs.integers(2 * k + 1) } else { [0; ROWS] };
        for (r, out) in out.iter_mut().enumerate() {
            *out += (i64::from(runs.lowest) * i64::from(slopes[r]) + i64::from(rests[r])) * i64::from(sum);
        }
    }
    out
}

impl RunsOf<'_> {
    /// The integers that the numbers at `at` are, row by row.
    #[inline(always)]
    fn integers(&self, at: usize) -> [i32; ROWS] {
        match self.numbers {
            OfRuns::Integers(all) => all[at],
            OfRuns::Halves(all, inverses) => {
                std::array::from_fn(|r| (f16::from_bits(all[at][r]).to_f32() * inverses[r]).round_ties_even() as i32)
            }
        }
    }

    /// The integer that comes in with a run's products.
    #[inline(always)]
    fn lowest_now(&self) -> i32 {
        if self.at_once { self.lowest } else { 0 }
    }

    /// Whether rests come in with a run's products.
    #[inline(always)]
    fn rests_now(&self) -> bool {
        self.at_once && self.each == 2
    }
}

/// Pairs of units of which 32 bits hold a row's sum: `512 · 255 · 16256` is below 2^31.
const PLAIN_PAIRS: usize = 512 / PAD;

/// The sums of digits, each of which has four bits if they are `FOUR`.
fn plain<const FOUR: bool>(digits: &[u8], token: &Token<'_>, runs: Option<RunsOf<'_>>) -> [i64; ROWS] {
    let (pairs, mut out) = (token.cells.as_chunks::<2>().0, [0i64; ROWS]);
    let Some(runs) = runs else {
        for (i, pairs) in pairs.chunks(PLAIN_PAIRS).enumerate() {
            let sums = plain_part::<FOUR>(digits, i * PLAIN_PAIRS, pairs);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += i64::from(sum));
        }
        return out;
    };
    let of_run = runs.columns / PAD;
    for (k, pairs) in pairs.chunks(of_run).enumerate() {
        let sums = plain_part::<FOUR>(digits, k * of_run, pairs);
        let slopes = runs.integers(runs.each * k);
        for (r, out) in out.iter_mut().enumerate() {
            let sum = sums[r].wrapping_add(runs.lowest_now() * token.sums[k]);
            *out += i64::from(slopes[r]) * i64::from(sum);
        }
        if runs.rests_now() {
            out.iter_mut()
                .zip(runs.integers(2 * k + 1))
                .for_each(|(out, rest)| *out += i64::from(rest) * i64::from(token.sums[k]));
        }
    }
    out
}

/// The sums over `pairs`, whose digits begin with those of pair `first`.
fn plain_part<const FOUR: bool>(digits: &[u8], first: usize, pairs: &[[u64; 2]]) -> [i32; ROWS] {
    const ALL: usize = UNIT * ROWS;
    let numbers = |cell: u64| -> [i32; UNIT] { std::array::from_fn(|i| i32::from((cell >> (16 * i)) as i16)) };
    let size = if FOUR { ALL } else { 2 * ALL };
    let mut sums = [0i32; ROWS];
    for (digits, cells) in digits[first * size..].chunks_exact(size).zip(pairs) {
        let (a, b) = (&digits[..ALL], &digits[size - ALL..]);
        let [p, q] = cells.map(numbers);
        for ((sum, a), b) in sums.iter_mut().zip(a.as_chunks::<UNIT>().0).zip(b.as_chunks::<UNIT>().0) {
            let a = a.map(|a| if FOUR { a & 15 } else { a });
            let b = b.map(|b| if FOUR { b >> 4 } else { b });
            for i in 0..UNIT {
                *sum = sum.wrapping_add(i32::from(a[i]) * p[i] + i32::from(b[i]) * q[i]);
            }
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::array::from_fn;
    use std::ops::Range;

    use super::super::{Digits, OfRuns, Outcome, PAD, ROWS, RunsOf, Strip};
    use super::{Token, of_planes, result};

    /// Calls `$sums` for four tokens at a time, then for two, then for one, and writes their results.
    macro_rules! by_tokens {
        ($strip:ident, $tokens:ident, $out:ident, $sums:ident, [$($n:literal),*]) => {{
            let (mut tokens, mut out) = ($tokens, $out);
            $(
                while let (Some(some), Some(to)) = (tokens.first_chunk::<$n>(), out.first_chunk_mut::<$n>()) {
                    // SAFETY: the caller's promise.
                    let sums = of_planes($strip, |digits| unsafe {
                        match $strip.kind {
                            Digits::Four => $sums::<$n, true>(digits, some, $strip.runs),
                            Digits::Eight | Digits::Sixteen | Digits::TwentyFour => {
                                $sums::<$n, false>(digits, some, $strip.runs)
                            }
                        }
                    });
                    *to = from_fn(|t| result($strip, &some[t], sums[t]));
                    (tokens, out) = (&tokens[$n..], &mut out[$n..]);
                }
            )*
        }};
    }

    /// Pairs of units for which lanes of 32 bits hold all sums: `2^16 · 255 · 127` is below 2^31.
    const VNNI_PAIRS: usize = (1 << 16) / PAD;

    /// The results of a strip for each token.
    ///
    /// # Safety
    /// The machine has AVX-512 (F, BW, DQ, VL, VNNI); the strip's parts and the tokens' are as long as they must be.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn vnni<T: Outcome>(strip: &Strip<'_>, tokens: &[Token<'_>], out: &mut [[T; ROWS]]) {
        by_tokens!(strip, tokens, out, vnni_sums, [4, 2, 1]);
    }

    /// The sums of all rows of `N` tokens.
    ///
    /// # Safety
    /// That of [`vnni`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn vnni_sums<const N: usize, const FOUR: bool>(
        digits: &[u8],
        tokens: &[Token<'_>; N],
        runs: Option<RunsOf<'_>>,
    ) -> [[i64; ROWS]; N] {
        let pairs = tokens[0].cells.len() / 2;
        let mut out = [[0i64; ROWS]; N];
        let Some(runs) = runs else {
            for from in (0..pairs).step_by(VNNI_PAIRS) {
                // SAFETY: the caller's promise.
                let sums = unsafe { vnni_part::<N, FOUR>(digits, tokens, from..pairs.min(from + VNNI_PAIRS)) };
                for (out, (high, low)) in out.iter_mut().zip(sums) {
                    let wide = |half: i32| {
                        let of =
                            |x| if half == 0 { _mm512_castsi512_si256(x) } else { _mm512_extracti64x4_epi64::<1>(x) };
                        let high = _mm512_slli_epi64::<7>(_mm512_cvtepi32_epi64(of(high)));
                        _mm512_add_epi64(high, _mm512_cvtepi32_epi64(of(low)))
                    };
                    let mut sums = [0i64; ROWS];
                    // SAFETY: there are sixteen sums.
                    unsafe {
                        _mm512_storeu_si512(sums.as_mut_ptr().cast(), wide(0));
                        _mm512_storeu_si512(sums.as_mut_ptr().add(8).cast(), wide(1));
                    }
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
            return out;
        };
        // Rows with even numbers, and with odd ones.
        let (mut even, mut odd) = ([_mm512_setzero_si512(); N], [_mm512_setzero_si512(); N]);
        let of_run = runs.columns / PAD;
        for k in 0..runs.count {
            let run = k * of_run..pairs.min((k + 1) * of_run);
            // SAFETY: the caller's promise.
            let sums = unsafe { vnni_part::<N, FOUR>(digits, tokens, run) };
            let slopes = vnni_numbers(&runs, runs.each * k);
            let odd_slopes = _mm512_srli_epi64::<32>(slopes);
            for (t, (high, low)) in sums.into_iter().enumerate() {
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
                let sum = _mm512_add_epi32(sum, _mm512_set1_epi32(runs.lowest_now() * tokens[t].sums[k]));
                even[t] = _mm512_add_epi64(even[t], _mm512_mul_epi32(sum, slopes));
                odd[t] = _mm512_add_epi64(odd[t], _mm512_mul_epi32(_mm512_srli_epi64::<32>(sum), odd_slopes));
            }
            if runs.rests_now() {
                let rests = vnni_numbers(&runs, 2 * k + 1);
                let odd_rests = _mm512_srli_epi64::<32>(rests);
                for t in 0..N {
                    let sum = _mm512_set1_epi32(tokens[t].sums[k]);
                    even[t] = _mm512_add_epi64(even[t], _mm512_mul_epi32(sum, rests));
                    odd[t] = _mm512_add_epi64(odd[t], _mm512_mul_epi32(sum, odd_rests));
                }
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            let (low, high) = (_mm512_unpacklo_epi64(even[t], odd[t]), _mm512_unpackhi_epi64(even[t], odd[t]));
            let (first, second) =
                (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
            // SAFETY: there are sixteen sums.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutex2var_epi64(low, first, high));
                _mm512_storeu_si512(out.as_mut_ptr().add(8).cast(), _mm512_permutex2var_epi64(low, second, high));
            }
        }
        out
    }

    /// Integers of runs: those of number `at`, of all rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn vnni_numbers(runs: &RunsOf<'_>, at: usize) -> __m512i {
        // SAFETY: there are sixteen numbers.
        unsafe {
            match &runs.numbers {
                OfRuns::Integers(all) => _mm512_loadu_si512(all[at].as_ptr().cast()),
                OfRuns::Halves(all, inverses) => {
                    let numbers = _mm512_cvtph_ps(_mm256_loadu_si256(all[at].as_ptr().cast()));
                    _mm512_cvtps_epi32(_mm512_mul_ps(numbers, _mm512_loadu_ps(inverses.as_ptr())))
                }
            }
        }
    }

    /// The sums over some pairs of units, which fit 32 bits: of each token with its high bytes, and with its low bytes.
    ///
    /// # Safety
    /// That of [`vnni`]; the pairs exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn vnni_part<const N: usize, const FOUR: bool>(
        digits: &[u8],
        tokens: &[Token<'_>; N],
        pairs: Range<usize>,
    ) -> [(__m512i, __m512i); N] {
        let cells: [*const i32; N] = from_fn(|t| tokens[t].cells.as_ptr().cast());
        let nibble = _mm512_set1_epi8(15);
        // Of the first units and of the second, so that products need not wait for one another.
        let (mut first, mut second) = ([[_mm512_setzero_si512(); 2]; N], [[_mm512_setzero_si512(); 2]; N]);
        for pair in pairs {
            // SAFETY: the pair's digits and cells are there.
            unsafe {
                let (a, b) = if FOUR {
                    let both = _mm512_loadu_si512(digits.as_ptr().add(64 * pair).cast());
                    (_mm512_and_si512(both, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble))
                } else {
                    let of_pair = digits.as_ptr().add(128 * pair);
                    (_mm512_loadu_si512(of_pair.cast()), _mm512_loadu_si512(of_pair.add(64).cast()))
                };
                for t in 0..N {
                    let activations = |i| _mm512_set1_epi32(cells[t].add(4 * pair + i).read_unaligned());
                    first[t][0] = _mm512_dpbusd_epi32(first[t][0], a, activations(0));
                    first[t][1] = _mm512_dpbusd_epi32(first[t][1], a, activations(1));
                    if N == 1 {
                        second[t][0] = _mm512_dpbusd_epi32(second[t][0], b, activations(2));
                        second[t][1] = _mm512_dpbusd_epi32(second[t][1], b, activations(3));
                    } else {
                        first[t][0] = _mm512_dpbusd_epi32(first[t][0], b, activations(2));
                        first[t][1] = _mm512_dpbusd_epi32(first[t][1], b, activations(3));
                    }
                }
            }
        }
        from_fn(|t| {
            let sum = |i: usize| if N == 1 { _mm512_add_epi32(first[t][i], second[t][i]) } else { first[t][i] };
            (sum(0), sum(1))
        })
    }

    /// Pairs of units for which lanes of 32 bits hold all sums: of 1024 columns a lane has half, and `512 · 255 · 16256` is
    /// below 2^31.
    const AVX2_PAIRS: usize = 1024 / PAD;

    /// The results of a strip for each token.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C; the strip's parts and the tokens' are as long as they must be.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn avx2<T: Outcome>(strip: &Strip<'_>, tokens: &[Token<'_>], out: &mut [[T; ROWS]]) {
        by_tokens!(strip, tokens, out, avx2_sums, [2, 1]);
    }

    /// The sums of all rows of `N` tokens.
    ///
    /// # Safety
    /// That of [`avx2`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn avx2_sums<const N: usize, const FOUR: bool>(
        digits: &[u8],
        tokens: &[Token<'_>; N],
        runs: Option<RunsOf<'_>>,
    ) -> [[i64; ROWS]; N] {
        let pairs = tokens[0].cells.len() / 2;
        // Four rows a vector.
        let mut sums = [[_mm256_setzero_si256(); N]; 4];
        match runs {
            None => {
                let one = _mm256_set1_epi64x(1);
                for from in (0..pairs).step_by(AVX2_PAIRS) {
                    // SAFETY: the caller's promise.
                    let part = unsafe { avx2_part::<N, FOUR>(digits, tokens, from..pairs.min(from + AVX2_PAIRS)) };
                    for (sum, part) in sums.as_flattened_mut().iter_mut().zip(part.as_flattened()) {
                        // Products with 1 widen.
                        let odd = _mm256_mul_epi32(_mm256_srli_epi64::<32>(*part), one);
                        *sum = _mm256_add_epi64(*sum, _mm256_add_epi64(_mm256_mul_epi32(*part, one), odd));
                    }
                }
            }
            Some(runs) => {
                let of_run = runs.columns / PAD;
                for k in 0..runs.count {
                    let run = k * of_run..pairs.min((k + 1) * of_run);
                    // SAFETY: the caller's promise.
                    let part = unsafe { avx2_part::<N, FOUR>(digits, tokens, run) };
                    for rows in 0..4 {
                        let slopes = avx2_numbers(&runs, runs.each * k, rows);
                        for t in 0..N {
                            let sum = _mm256_add_epi32(part[rows][t], _mm256_srli_epi64::<32>(part[rows][t]));
                            let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(runs.lowest_now() * tokens[t].sums[k]));
                            sums[rows][t] = _mm256_add_epi64(sums[rows][t], _mm256_mul_epi32(sum, slopes));
                        }
                        if runs.rests_now() {
                            let rests = avx2_numbers(&runs, 2 * k + 1, rows);
                            for t in 0..N {
                                let rest = _mm256_mul_epi32(rests, _mm256_set1_epi32(tokens[t].sums[k]));
                                sums[rows][t] = _mm256_add_epi64(sums[rows][t], rest);
                            }
                        }
                    }
                }
            }
        }
        from_fn(|t| {
            let mut out = [0i64; ROWS];
            for (out, sums) in out.as_chunks_mut::<4>().0.iter_mut().zip(&sums) {
                // SAFETY: four sums fit.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sums[t]) };
            }
            out
        })
    }

    /// Integers of runs: those of number `at`, of four rows.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn avx2_numbers(runs: &RunsOf<'_>, at: usize, rows: usize) -> __m256i {
        // SAFETY: there are sixteen numbers, of which these are four.
        let four = unsafe {
            match &runs.numbers {
                OfRuns::Integers(all) => _mm_loadu_si128(all[at].as_ptr().add(4 * rows).cast()),
                OfRuns::Halves(all, inverses) => {
                    let numbers = _mm_cvtph_ps(_mm_loadl_epi64(all[at].as_ptr().add(4 * rows).cast()));
                    _mm_cvtps_epi32(_mm_mul_ps(numbers, _mm_loadu_ps(inverses.as_ptr().add(4 * rows))))
                }
            }
        };
        _mm256_cvtepi32_epi64(four)
    }

    /// The sums over some pairs of units, which fit 32 bits: of each four rows and each token, two lanes a row.
    ///
    /// # Safety
    /// That of [`avx2`]; the pairs exist.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn avx2_part<const N: usize, const FOUR: bool>(
        digits: &[u8],
        tokens: &[Token<'_>; N],
        pairs: Range<usize>,
    ) -> [[__m256i; N]; 4] {
        let nibble = _mm_set1_epi8(15);
        let mut sums = [[_mm256_setzero_si256(); N]; 4];
        for pair in pairs {
            let cells: [[__m256i; 2]; N] =
                from_fn(|t| from_fn(|i| _mm256_set1_epi64x(tokens[t].cells[2 * pair + i].cast_signed())));
            for (rows, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the pair's digits are there.
                let (a, b) = unsafe {
                    if FOUR {
                        let both = _mm_loadu_si128(digits.as_ptr().add(64 * pair + 16 * rows).cast());
                        (_mm_and_si128(both, nibble), _mm_and_si128(_mm_srli_epi16::<4>(both), nibble))
                    } else {
                        let of_pair = digits.as_ptr().add(128 * pair + 16 * rows);
                        (_mm_loadu_si128(of_pair.cast()), _mm_loadu_si128(of_pair.add(64).cast()))
                    }
                };
                let (a, b) = (_mm256_cvtepu8_epi16(a), _mm256_cvtepu8_epi16(b));
                for (sum, cells) in sums.iter_mut().zip(&cells) {
                    let products = _mm256_add_epi32(_mm256_madd_epi16(a, cells[0]), _mm256_madd_epi16(b, cells[1]));
                    *sum = _mm256_add_epi32(*sum, products);
                }
            }
        }
        sums
    }
}

//! One source, compiled for several instruction sets, chosen when it runs.
//!
//! All arithmetic is on integers, so all versions return the same bits.

/// Numbers in a [`Lanes`].
pub(super) const LANES: usize = 16;

/// One number for each of [`LANES`] blocks that are worked on together.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Lanes(pub(super) [i32; LANES]);

/// A [`Lanes`] in registers.
///
/// # Safety
/// All functions need the instruction set of the implementation: call them only from functions compiled for it, into
/// which they are inlined.
pub(super) trait Register: Copy {
    unsafe fn splat(x: i32) -> Self;
    unsafe fn load(x: &Lanes) -> Self;
    unsafe fn store(self, to: &mut Lanes);
    unsafe fn add(self, b: Self) -> Self;
    /// The sum of the products of the low and of the high 16 bits, all signed.
    unsafe fn dot(self, b: Self) -> Self;
    /// Arithmetic shift right.
    unsafe fn shift(self, by: u32) -> Self;
    unsafe fn min(self, b: Self) -> Self;
    /// `value` where `a < b`, else `self`.
    unsafe fn replace_if_less(self, a: Self, b: Self, value: Self) -> Self;
}

/// The sum of the products of the low and of the high 16 bits.
pub(super) fn dot(a: i32, b: i32) -> i32 {
    i32::from(a as i16) * i32::from(b as i16) + (a >> 16) * (b >> 16)
}

/// Without vector instructions that are known here.
impl Register for Lanes {
    #[inline(always)]
    unsafe fn splat(x: i32) -> Self {
        Lanes([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(x: &Lanes) -> Self {
        *x
    }
    #[inline(always)]
    unsafe fn store(self, to: &mut Lanes) {
        *to = self;
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].wrapping_add(b.0[i])))
    }
    #[inline(always)]
    unsafe fn dot(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| dot(self.0[i], b.0[i])))
    }
    #[inline(always)]
    unsafe fn shift(self, by: u32) -> Self {
        Lanes(self.0.map(|x| x >> by))
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].min(b.0[i])))
    }
    #[inline(always)]
    unsafe fn replace_if_less(self, a: Self, b: Self, value: Self) -> Self {
        Lanes(std::array::from_fn(|i| if a.0[i] < b.0[i] { value.0[i] } else { self.0[i] }))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes, Register};

    /// `N` registers of type `R`.
    macro_rules! registers {
        ($name:ident, $register:ty, $set1:ident, $load:ident, $store:ident, $add:ident, $dot:ident, $shift:ident,
         $min:expr, $select:expr) => {
            #[derive(Clone, Copy)]
            pub struct $name([$register; LANES * 4 / size_of::<$register>()]);

            impl $name {
                const WIDTH: usize = size_of::<$register>() / 4;
            }

            // SAFETY of each: the caller has the instruction set; pointers stay inside a `Lanes`, which is aligned to
            // the widest register.
            impl Register for $name {
                #[inline(always)]
                unsafe fn splat(x: i32) -> Self {
                    $name(std::array::from_fn(|_| unsafe { $set1(x) }))
                }
                #[inline(always)]
                unsafe fn load(x: &Lanes) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $load(x.0.as_ptr().add(i * Self::WIDTH).cast()) }))
                }
                #[inline(always)]
                unsafe fn store(self, to: &mut Lanes) {
                    for (i, r) in self.0.into_iter().enumerate() {
                        unsafe { $store(to.0.as_mut_ptr().add(i * Self::WIDTH).cast(), r) }
                    }
                }
                #[inline(always)]
                unsafe fn add(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $add(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn dot(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $dot(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn shift(self, by: u32) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $shift(self.0[i], _mm_cvtsi32_si128(by as i32)) }))
                }
                #[inline(always)]
                unsafe fn min(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $min(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn replace_if_less(self, a: Self, b: Self, value: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $select(self.0[i], a.0[i], b.0[i], value.0[i]) }))
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn select128(old: __m128i, a: __m128i, b: __m128i, new: __m128i) -> __m128i {
        unsafe {
            let less = _mm_cmplt_epi32(a, b);
            _mm_or_si128(_mm_and_si128(less, new), _mm_andnot_si128(less, old))
        }
    }

    /// The baseline has no minimum of 32-bit integers.
    #[inline(always)]
    unsafe fn min128(a: __m128i, b: __m128i) -> __m128i {
        unsafe { select128(a, b, a, b) }
    }

    #[inline(always)]
    unsafe fn select256(old: __m256i, a: __m256i, b: __m256i, new: __m256i) -> __m256i {
        unsafe { _mm256_blendv_epi8(old, new, _mm256_cmpgt_epi32(b, a)) }
    }

    #[inline(always)]
    unsafe fn select512(old: __m512i, a: __m512i, b: __m512i, new: __m512i) -> __m512i {
        unsafe { _mm512_mask_mov_epi32(old, _mm512_cmplt_epi32_mask(a, b), new) }
    }

    registers!(
        R128,
        __m128i,
        _mm_set1_epi32,
        _mm_load_si128,
        _mm_store_si128,
        _mm_add_epi32,
        _mm_madd_epi16,
        _mm_sra_epi32,
        min128,
        select128
    );
    registers!(
        R256,
        __m256i,
        _mm256_set1_epi32,
        _mm256_load_si256,
        _mm256_store_si256,
        _mm256_add_epi32,
        _mm256_madd_epi16,
        _mm256_sra_epi32,
        _mm256_min_epi32,
        select256
    );
    registers!(
        R512,
        __m512i,
        _mm512_set1_epi32,
        _mm512_load_si512,
        _mm512_store_si512,
        _mm512_add_epi32,
        _mm512_madd_epi16,
        _mm512_sra_epi32,
        _mm512_min_epi32,
        select512
    );
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{R128, R256, R512};

/// Defines a function compiled for AVX-512, for AVX2 and for the baseline, that calls the widest one this machine has.
///
/// The body sees the type `R`, the [`Register`] of the instruction set, and is `unsafe` with the contract of its
/// functions. Plain loops in it are vectorised by the compiler.
macro_rules! for_each_instruction_set {
    ($(#[$meta:meta])* fn $name:ident [$r:ident $(, const $n:ident: $nt:ty)*] ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name<$(const $n: $nt),*>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            unsafe fn generic<$r: $crate::codec::simd::Register $(, const $n: $nt)*>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::codec::simd::{R128, R256, R512};

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512<$(const $n: $nt),*>($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is compiled for the registers.
                    unsafe { generic::<R512 $(, $n)*>($($arg),*) }
                }
                #[target_feature(enable = "avx2")]
                fn avx2<$(const $n: $nt),*>($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is compiled for the registers.
                    unsafe { generic::<R256 $(, $n)*>($($arg),*) }
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were just found on this machine.
                    return unsafe { avx512::<$($n),*>($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2::<$($n),*>($($arg),*) };
                }
                // SAFETY: every x86-64 machine has these registers.
                unsafe { generic::<R128 $(, $n)*>($($arg),*) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: arrays need no instructions of their own.
            unsafe {
                generic::<$crate::codec::simd::Lanes $(, $n)*>($($arg),*)
            }
        }
    };
}

pub(super) use for_each_instruction_set;

#[cfg(test)]
mod tests {
    use super::*;

    for_each_instruction_set! {
        fn best[R](a: &Lanes, b: &Lanes) -> [Lanes; 2] {
            let mut out = [*a; 2];
            // SAFETY: the contract of this function.
            unsafe {
                let (x, y) = (R::load(a), R::load(b));
                x.min(y).add(R::splat(1)).dot(y).shift(3).store(&mut out[0]);
                x.replace_if_less(y, x, R::splat(7)).store(&mut out[1]);
            }
            out
        }
    }

    #[test]
    fn registers_do_what_arrays_do() {
        let a = Lanes(std::array::from_fn(|i| (i as i32 + 3).wrapping_mul(0x5E37_79B1) >> 4));
        let b = Lanes(std::array::from_fn(|i| (i as i32 + 7).wrapping_mul(0x3C6E_F372) >> 4));
        let [product, replaced] = best(&a, &b);
        for i in 0..LANES {
            let (x, y) = (a.0[i], b.0[i]);
            let low = i64::from((x.min(y) + 1) as i16) * i64::from(y as i16);
            let high = i64::from((x.min(y) + 1) >> 16) * i64::from(y >> 16);
            assert_eq!(i64::from(product.0[i]), (low + high) >> 3);
            assert_eq!(replaced.0[i], if y < x { 7 } else { x });
        }
    }
}

//! One source, compiled for several instruction sets, chosen when it runs.
//!
//! No operation is contracted or reordered, so all versions return the same bits.

/// Numbers in a [`Lanes`].
pub(super) const LANES: usize = 16;

/// One number for each of [`LANES`] blocks that are worked on together.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

/// A [`Lanes`] in registers.
///
/// # Safety
/// All functions need the instruction set of the implementation: call them only from functions compiled for it, into
/// which they are inlined.
pub(super) trait Register: Copy {
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(x: &Lanes) -> Self;
    unsafe fn store(self, to: &mut Lanes);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `b` where it is less, else `self`.
    unsafe fn min(self, b: Self) -> Self;
    /// `value` where `a < b`, else `self`.
    unsafe fn replace_if_less(self, a: Self, b: Self, value: Self) -> Self;
}

/// Without vector instructions that are known here.
impl Register for Lanes {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
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
        Lanes(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| if b.0[i] < self.0[i] { b.0[i] } else { self.0[i] }))
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
        ($name:ident, $register:ty, $set1:ident, $load:ident, $store:ident, $add:ident, $mul:ident, $min:ident, $select:expr) => {
            #[derive(Clone, Copy)]
            pub struct $name([$register; LANES * 4 / size_of::<$register>()]);

            impl $name {
                const WIDTH: usize = size_of::<$register>() / 4;
            }

            // SAFETY of each: the caller has the instruction set; pointers stay inside a `Lanes`, which is aligned to
            // the widest register.
            impl Register for $name {
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    $name(std::array::from_fn(|_| unsafe { $set1(x) }))
                }
                #[inline(always)]
                unsafe fn load(x: &Lanes) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $load(x.0.as_ptr().add(i * Self::WIDTH)) }))
                }
                #[inline(always)]
                unsafe fn store(self, to: &mut Lanes) {
                    for (i, r) in self.0.into_iter().enumerate() {
                        unsafe { $store(to.0.as_mut_ptr().add(i * Self::WIDTH), r) }
                    }
                }
                #[inline(always)]
                unsafe fn add(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $add(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn mul(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $mul(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn min(self, b: Self) -> Self {
                    // The instruction returns its second operand unless the first is less.
                    $name(std::array::from_fn(|i| unsafe { $min(b.0[i], self.0[i]) }))
                }
                #[inline(always)]
                unsafe fn replace_if_less(self, a: Self, b: Self, value: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $select(self.0[i], a.0[i], b.0[i], value.0[i]) }))
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn select128(old: __m128, a: __m128, b: __m128, new: __m128) -> __m128 {
        unsafe {
            let less = _mm_cmplt_ps(a, b);
            _mm_or_ps(_mm_and_ps(less, new), _mm_andnot_ps(less, old))
        }
    }

    #[inline(always)]
    unsafe fn select256(old: __m256, a: __m256, b: __m256, new: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(old, new, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }

    #[inline(always)]
    unsafe fn select512(old: __m512, a: __m512, b: __m512, new: __m512) -> __m512 {
        unsafe { _mm512_mask_mov_ps(old, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), new) }
    }

    registers!(R128, __m128, _mm_set1_ps, _mm_load_ps, _mm_store_ps, _mm_add_ps, _mm_mul_ps, _mm_min_ps, select128);
    registers!(
        R256,
        __m256,
        _mm256_set1_ps,
        _mm256_load_ps,
        _mm256_store_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_min_ps,
        select256
    );
    registers!(
        R512,
        __m512,
        _mm512_set1_ps,
        _mm512_load_ps,
        _mm512_store_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_min_ps,
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
    ($(#[$meta:meta])* fn $name:ident [$r:ident $(, const $n:ident: usize)?] ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            unsafe fn generic<$r: $crate::codec::simd::Register $(, const $n: usize)?>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::codec::simd::{R128, R256, R512};

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is compiled for the registers.
                    unsafe { generic::<R512 $(, $n)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is compiled for the registers.
                    unsafe { generic::<R256 $(, $n)?>($($arg),*) }
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were just found on this machine.
                    return unsafe { avx512 $(::<$n>)? ($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2 $(::<$n>)? ($($arg),*) };
                }
                // SAFETY: every x86-64 machine has these registers.
                unsafe { generic::<R128 $(, $n)?>($($arg),*) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: arrays need no instructions of their own.
            unsafe {
                generic::<$crate::codec::simd::Lanes $(, $n)?>($($arg),*)
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
                x.min(y).add(R::splat(1.0)).mul(y).store(&mut out[0]);
                x.replace_if_less(y, x, R::splat(7.0)).store(&mut out[1]);
            }
            out
        }
    }

    #[test]
    fn registers_do_what_arrays_do() {
        let a = Lanes(std::array::from_fn(|i| (i as f32 * 1.7).sin()));
        let b = Lanes(std::array::from_fn(|i| (i as f32 * 2.3).cos()));
        let [product, replaced] = best(&a, &b);
        for i in 0..LANES {
            let (x, y) = (a.0[i], b.0[i]);
            assert_eq!(product.0[i], (x.min(y) + 1.0) * y);
            assert_eq!(replaced.0[i], if y < x { 7.0 } else { x });
        }
    }
}

//! One source, compiled for several instruction sets, chosen when it runs.
//!
//! All arithmetic is on integers, so all versions return the same bits.

/// Numbers in a [`Lanes`].
pub(super) const LANES: usize = 32;

/// One number for each of [`LANES`] blocks that are worked on together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(crate) struct Lanes(pub(crate) [u16; LANES]);

/// A [`Lanes`] in registers.
///
/// # Safety
/// All functions need the instruction set of the implementation: call them only from functions compiled for it, into
/// which they are inlined.
pub(crate) trait Register: Copy {
    unsafe fn splat(x: u16) -> Self;
    unsafe fn load(x: &Lanes) -> Self;
    unsafe fn store(self, to: &mut Lanes);
    /// Wrapping.
    unsafe fn add(self, b: Self) -> Self;
    /// Wrapping.
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn min(self, b: Self) -> Self;
}

/// Without vector instructions that are known here.
impl Register for Lanes {
    #[inline(always)]
    unsafe fn splat(x: u16) -> Self {
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
    unsafe fn sub(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].wrapping_sub(b.0[i])))
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].min(b.0[i])))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes, Register};

    /// `N` registers of type `R`.
    macro_rules! registers {
        ($name:ident, $register:ty, $set1:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $min:ident) => {
            #[derive(Clone, Copy)]
            pub struct $name([$register; size_of::<Lanes>() / size_of::<$register>()]);

            impl $name {
                const WIDTH: usize = LANES * size_of::<$register>() / size_of::<Lanes>();
            }

            // SAFETY of each: the caller has the instruction set; pointers stay inside a `Lanes`, which is aligned to
            // the widest register.
            impl Register for $name {
                #[inline(always)]
                unsafe fn splat(x: u16) -> Self {
                    $name(std::array::from_fn(|_| unsafe { $set1(x.cast_signed()) }))
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
                unsafe fn sub(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $sub(self.0[i], b.0[i]) }))
                }
                #[inline(always)]
                unsafe fn min(self, b: Self) -> Self {
                    $name(std::array::from_fn(|i| unsafe { $min(self.0[i], b.0[i]) }))
                }
            }
        };
    }

    /// The baseline has no minimum of unsigned 16-bit integers, but a difference that stops at 0.
    #[inline(always)]
    unsafe fn min128(a: __m128i, b: __m128i) -> __m128i {
        unsafe { _mm_sub_epi16(a, _mm_subs_epu16(a, b)) }
    }

    registers!(R128, __m128i, _mm_set1_epi16, _mm_load_si128, _mm_store_si128, _mm_add_epi16, _mm_sub_epi16, min128);
    registers!(
        R256,
        __m256i,
        _mm256_set1_epi16,
        _mm256_load_si256,
        _mm256_store_si256,
        _mm256_add_epi16,
        _mm256_sub_epi16,
        _mm256_min_epu16
    );
    registers!(
        R512,
        __m512i,
        _mm512_set1_epi16,
        _mm512_load_si512,
        _mm512_store_si512,
        _mm512_add_epi16,
        _mm512_sub_epi16,
        _mm512_min_epu16
    );
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{R128, R256, R512};

/// Defines a function compiled for AVX-512, for AVX2 and for the baseline, that calls the widest one this machine has.
///
/// The body sees the type `R`, the [`Register`] of the instruction set, and is `unsafe` with the contract of its
/// functions. Plain loops in it are vectorised by the compiler.
macro_rules! for_each_instruction_set {
    ($(#[$meta:meta])* $vis:vis fn $name:ident [$r:ident $(, const $n:ident: $nt:ty)*] ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name<$(const $n: $nt),*>($($arg: $ty),*) $(-> $ret)? {
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

pub(crate) use for_each_instruction_set;

#[cfg(test)]
mod tests {
    use super::*;

    /// What each function makes of `a` and `b`.
    #[inline(always)]
    unsafe fn results<R: Register>(a: &Lanes, b: &Lanes) -> [Lanes; 4] {
        let mut out = [*a; 4];
        // SAFETY: the contract of this function.
        unsafe {
            let (x, y) = (R::load(a), R::load(b));
            R::splat(0x9ABC).store(&mut out[0]);
            x.add(y).store(&mut out[1]);
            x.sub(y).store(&mut out[2]);
            x.min(y).store(&mut out[3]);
        }
        out
    }

    for_each_instruction_set! {
        fn of_widest[R](a: &Lanes, b: &Lanes) -> [Lanes; 4] {
            // SAFETY: the contract of this function.
            unsafe { results::<R>(a, b) }
        }
    }

    #[test]
    fn registers_do_what_arrays_do() {
        let a = Lanes(std::array::from_fn(|i| ((i as u32 + 3).wrapping_mul(0x5E37_79B1) >> 16) as u16));
        let mut b = Lanes(std::array::from_fn(|i| ((i as u32 + 7).wrapping_mul(0x3C6E_F372) >> 16) as u16));
        b.0[5] = a.0[5];
        // SAFETY: arrays need no instructions of their own.
        let expected = unsafe { results::<Lanes>(&a, &b) };
        let less = a.0.iter().zip(&b.0).filter(|(a, b)| a < b).count();
        assert!((4..28).contains(&less), "{less}");
        assert_eq!(of_widest(&a, &b), expected);
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: every x86-64 machine has the first registers; the others were just found.
            assert_eq!(unsafe { results::<R128>(&a, &b) }, expected);
            if is_x86_feature_detected!("avx2") {
                assert_eq!(unsafe { results::<R256>(&a, &b) }, expected);
            }
        }
    }
}

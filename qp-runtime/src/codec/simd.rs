//! One source, compiled for several instruction sets, chosen when it runs.

/// Defines a function whose body is compiled for AVX-512, for AVX2 and for the baseline, and that calls the widest one
/// that this machine has. The body is plain Rust, written so that the compiler vectorises it; no operation is
/// contracted or reordered, so all versions return the same bits.
macro_rules! for_each_instruction_set {
    ($(#[$meta:meta])* fn $name:ident $([const $n:ident: usize])? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn generic $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
                    generic $(::<$n>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $ret)? {
                    generic $(::<$n>)? ($($arg),*)
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
            }
            generic $(::<$n>)? ($($arg),*)
        }
    };
}

pub(super) use for_each_instruction_set;

//! Compiles one plain loop for several instruction sets and picks the best at run time. The bits do not depend on the
//! pick: rustc neither fuses nor reorders floating-point operations.
#![allow(unsafe_code)]

/// `dispatched! { fn name(args) -> result = body; }` defines `name`, which runs the `#[inline(always)]` function `body`
/// compiled for AVX-512 or AVX2 where the processor has them.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident : $bound:path>)? ($($arg:ident : $type:ty),* $(,)?) $(-> $result:ty)? = $body:path;) => {
        $(#[$meta])*
        #[allow(unsafe_code)]
        $vis fn $name $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw")]
                fn avx512 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the processor has every feature that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the feature that the function is compiled for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use dispatched;

/// `x` as an integer where it is one below 2^63 in magnitude, else 0. Unlike `as`, which saturates, this is one
/// instruction per vector where the processor has it: 0.2 ns per element against 1.1.
#[inline(always)]
pub(crate) fn integer(x: f32) -> i64 {
    const LIMIT: f32 = (1u64 << 63) as f32;
    let inside = if x.abs() < LIMIT { x } else { 0.0 };
    // SAFETY: `inside` is not NaN, and its magnitude is below 2^63.
    unsafe { inside.to_int_unchecked() }
}

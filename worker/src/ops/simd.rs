//! What the fused host loops are made of: loops that the compiler vectorises, sums in sixteen fixed lanes, and an
//! exponential. The bits do not depend on the instruction set: every clone does the same IEEE operations in the same
//! order, and `mul_add` is one rounding everywhere.

#![allow(unsafe_code)]

use crate::ops::view::Element;
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Lanes of every reduction: one AVX-512 register of fp32.
pub const LANES: usize = 16;

/// An instruction set for which vectorised loops are compiled.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Base,
    Avx2,
    Avx512,
}

/// The widest [`Level`] of this machine, found once.
#[cfg(target_arch = "x86_64")]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (fma, wide) {
            (true, true) => Level::Avx512,
            (true, false) => Level::Avx2,
            _ => Level::Base,
        }
    })
}

/// Compiles a function once per [`Level`] and calls the widest that this machine has. Functions that it calls must be
/// `#[inline(always)]`, or they are compiled for the base instruction set; closures written in it are compiled with it.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident : $b:path),+>)? ($($arg:ident : $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code, clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $b),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($g: $b),+>)? ($($arg: $ty),*) $(-> $ret)? $body
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($g: $b),+>)? ($($arg: $ty),*) $(-> $ret)? $body
                match $crate::ops::simd::level() {
                    // SAFETY: `level` found every feature of the clone on this machine.
                    $crate::ops::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::ops::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::simd::Level::Base => {}
                }
            }
            $body
        }
    };
}
pub(crate) use vectorised;

/// A kind that fused loops read and write, computing in fp32.
pub trait Narrow: Element + Default {
    fn load(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn store(value: f32) -> Self;
}

impl Narrow for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(value: f32) -> f32 {
        value
    }
}

impl Narrow for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // Rounding could carry a NaN's payload into the sign; a NaN stays one.
        bf16::from_bits(if value.is_nan() { 0x7fc0 } else { rounded })
    }
}

/// `x` as an integer where it is one below 2^63 in magnitude, else 0. Unlike `as`, which saturates, this is one
/// instruction per vector where the processor has it: 0.2 ns per element against 1.1.
#[inline(always)]
pub fn integer(x: f32) -> i64 {
    const LIMIT: f32 = (1u64 << 63) as f32;
    let inside = if x.abs() < LIMIT { x } else { 0.0 };
    // SAFETY: `inside` is not NaN, and its magnitude is below 2^63.
    unsafe { inside.to_int_unchecked() }
}

/// The sum of sixteen lanes, in a fixed tree.
#[inline(always)]
pub fn fold(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of products of two equally long rows.
#[inline(always)]
pub fn dot<A: Narrow, B: Narrow>(a: &[A], b: &[B]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] = a[l].load().mul_add(b[l].load(), lanes[l]);
        }
    }
    for (l, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        lanes[l] = a.load().mul_add(b.load(), lanes[l]);
    }
    fold(lanes)
}

/// The largest element of a row; -inf for an empty one. A NaN is passed over: it comes back through [`exp`].
#[inline(always)]
pub fn max<A: Narrow>(row: &[A]) -> f32 {
    let (whole, tail) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    for chunk in whole {
        for l in 0..LANES {
            lanes[l] = larger(chunk[l].load(), lanes[l]);
        }
    }
    let most = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    tail.iter().map(|v| v.load()).fold(most, larger)
}

/// `exp(value)` to within 2 units in the last place; 0 below -87.3, held at `exp(88.3)` above; NaN stays NaN.
/// Range reduction by Cody and Waite, polynomial of degree 6 as in Cephes `expf`.
#[inline(always)]
pub fn exp(value: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.3;
    /// Adding 1.5 * 2^23 rounds to a whole number, which the lowest bits then hold.
    const ROUND: f32 = 12_582_912.0;
    let x = if value > HIGH { HIGH } else { value };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if value < LOW {
        0.0
    } else {
        scaled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst: f64 = 0.0;
        let mut x = -87.3f32;
        while x < 88.2 {
            let exact = (x as f64).exp();
            let unit = (exact as f32).next_up() as f64 - (exact as f32) as f64;
            worst = worst.max(((exp(x) as f64 - exact) / unit).abs());
            x += 1.7e-4;
        }
        assert!(worst <= 2.0, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-100.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
        assert!(exp(1000.0).is_finite() && exp(1000.0) > 1e38);
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        let mut state = 1u32;
        for _ in 0..200_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(state);
            let (ours, theirs) = (<bf16 as Narrow>::store(value), bf16::from_f32(value));
            assert!(ours.to_bits() == theirs.to_bits() || (value.is_nan() && ours.is_nan()), "{value}");
            assert!(ours.load() == theirs.to_f32() || value.is_nan());
        }
    }

    vectorised! {
        fn dot_here(a: &[f32], b: &[bf16]) -> f32 { dot(a, b) }
    }

    #[test]
    fn clones_give_the_bits_of_the_base_instruction_set() {
        let a: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<bf16> = (0..1003).map(|i| bf16::from_f32((i as f32 * 0.11).cos())).collect();
        assert_eq!(dot_here(&a, &b).to_bits(), dot(&a, &b).to_bits());
    }
}

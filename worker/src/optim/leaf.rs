//! Adding leaves to the sums on the host: one pass over the sums for up to [`TOGETHER`] leaves.

use super::exact::UNIT;
use crate::model::TOGETHER;
use crate::ops::simd::{integer, vectorised, Narrow};
use crate::ops::view::{self, Element};
use half::bf16;
use std::ops::Range;
use tch::{Kind, Tensor};

const UNITS_PER_ONE: f32 = (1.0 / UNIT) as f32;

/// Adds elements `part` of each leaf, or sets the sums to the `first` one; the largest magnitude of each, NaN if it holds
/// one.
pub fn add(sums: &mut [i64], leaves: &[&Tensor], part: Range<usize>, first: bool) -> Vec<f64> {
    let mut peaks = Vec::with_capacity(leaves.len());
    for (i, some) in leaves.chunks(TOGETHER).enumerate() {
        let (first, part) = (first && i == 0, part.clone());
        match some[0].kind() {
            Kind::Float => peaks.extend(add_f32(sums, &elements(some, part), first)),
            Kind::BFloat16 => peaks.extend(add_bf16(sums, &elements(some, part), first)),
            Kind::Double => {
                if first {
                    sums.fill(0);
                }
                peaks.extend(elements(some, part).into_iter().map(|leaf| add_f64(sums, leaf)));
            }
            kind => unreachable!("leaves are fp32, bf16 or fp64, not {kind:?}"),
        }
    }
    peaks.truncate(leaves.len());
    peaks
}

fn elements<'a, T: Element>(leaves: &[&'a Tensor], part: Range<usize>) -> Vec<&'a [T]> {
    leaves.iter().map(|leaf| &view::elements::<T>(leaf)[part.clone()]).collect()
}

/// Multiplying by 2^48 is exact in fp32: the product only overflows where the bound refuses the leaf.
#[cfg(not(feature = "float-sum"))]
#[inline(always)]
fn accumulate(sum: i64, leaf: f32) -> i64 {
    sum.wrapping_add(integer((leaf * UNITS_PER_ONE).round_ties_even()))
}

/// The negative control: leaves are added as fp32, so the result depends on who adds what.
#[cfg(feature = "float-sum")]
#[inline(always)]
fn accumulate(sum: i64, leaf: f32) -> i64 {
    let rounded = (sum as f64 * UNIT) as f32 + leaf;
    integer((rounded * UNITS_PER_ONE).round_ties_even())
}

/// Adds `N` leaves (sets the sums to the first of them) and returns the largest magnitude of each, NaN if it holds one.
/// Magnitudes compare as integers: the bits of non-negative floats ascend with their values, infinity and then NaN above
/// them.
#[inline(always)]
fn add_some<T: Narrow, const N: usize, const FIRST: bool>(sums: &mut [i64], leaves: &[&[T]]) -> [f64; TOGETHER] {
    let leaves: [&[T]; N] = std::array::from_fn(|n| &leaves[n][..sums.len()]);
    let mut peaks = [0u32; N];
    for (i, sum) in sums.iter_mut().enumerate() {
        let mut total = if FIRST { 0 } else { *sum };
        for n in 0..N {
            let x = leaves[n][i].load();
            peaks[n] = peaks[n].max(x.to_bits() & 0x7fff_ffff);
            total = accumulate(total, x);
        }
        *sum = total;
    }
    std::array::from_fn(|n| peaks.get(n).map_or(0.0, |&bits| f64::from(f32::from_bits(bits))))
}

#[inline(always)]
fn add_narrow<T: Narrow>(sums: &mut [i64], leaves: &[&[T]], first: bool) -> [f64; TOGETHER] {
    match (leaves.len(), first) {
        (1, true) => add_some::<T, 1, true>(sums, leaves),
        (1, false) => add_some::<T, 1, false>(sums, leaves),
        (2, true) => add_some::<T, 2, true>(sums, leaves),
        (2, false) => add_some::<T, 2, false>(sums, leaves),
        (3, true) => add_some::<T, 3, true>(sums, leaves),
        (3, false) => add_some::<T, 3, false>(sums, leaves),
        (4, true) => add_some::<T, 4, true>(sums, leaves),
        (4, false) => add_some::<T, 4, false>(sums, leaves),
        (n, _) => unreachable!("at most {TOGETHER} leaves at one time, not {n}"),
    }
}

vectorised! { fn add_f32(sums: &mut [i64], leaves: &[&[f32]], first: bool) -> [f64; TOGETHER] { add_narrow(sums, leaves, first) } }
vectorised! { fn add_bf16(sums: &mut [i64], leaves: &[&[bf16]], first: bool) -> [f64; TOGETHER] { add_narrow(sums, leaves, first) } }

/// Leaves in fp64 occur only where a test compares with an oracle.
fn add_f64(sums: &mut [i64], leaf: &[f64]) -> f64 {
    let mut peak = 0u64;
    for (sum, x) in sums.iter_mut().zip(leaf) {
        peak = peak.max(x.abs().to_bits());
        *sum = sum.wrapping_add((x * f64::from(UNITS_PER_ONE)).round_ties_even() as i64);
    }
    f64::from_bits(peak)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_plain_loop_s_bits(
            leaves in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 131), 1..=TOGETHER),
            start in -(1i64 << 60)..(1i64 << 60),
            first: bool,
        ) {
            let (mut fast, mut plain) = (vec![start; 131], vec![start; 131]);
            let wide: Vec<&[f32]> = leaves.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(add_f32(&mut fast, &wide, first), add_narrow(&mut plain, &wide, first));
            prop_assert_eq!(&fast, &plain);
            let narrow: Vec<Vec<bf16>> =
                leaves.iter().map(|leaf| leaf.iter().map(|&x| bf16::from_f32(x)).collect()).collect();
            let narrow: Vec<&[bf16]> = narrow.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(add_bf16(&mut fast, &narrow, first), add_narrow(&mut plain, &narrow, first));
            prop_assert_eq!(&fast, &plain);
        }
    }
}

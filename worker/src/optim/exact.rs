//! The exact sum: gradients of micro-batches ("leaves") are added as integers, so that neither order, nor ownership, nor
//! the number of workers can change a bit of the result. A leaf `x` counts as `round_ties_even(x * 2^48)`.

use super::dispatch::{dispatched, integer};
use crate::model::{BadNumber, Leaves};
use crate::ops::view;
use half::bf16;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::Layout;

/// A sum counts in units of 2^-48.
pub const UNIT: f64 = 1.0 / (1u64 << 48) as f64;
const UNITS_PER_ONE: f32 = (1u64 << 48) as f32;

/// Every leaf must stay below this magnitude, so that `leaves` of them cannot overflow 63 bits.
pub fn bound(leaves: usize) -> f64 {
    f64::from(1u32 << 15) / leaves.max(1) as f64
}

/// Full-length integer accumulators for every bucket, on the host.
#[derive(Debug)]
pub struct ExactSum {
    layout: Arc<Layout>,
    /// For each bucket its sums in units of [`UNIT`]: `[elements]` i64.
    buckets: Vec<Tensor>,
    bound: f64,
}

impl ExactSum {
    /// `leaves` is the largest number of leaves that any element receives in one step.
    pub fn new(layout: Arc<Layout>, leaves: usize) -> Self {
        let zeros = |elements: usize| Tensor::zeros([elements as i64], (Kind::Int64, Device::Cpu));
        let buckets = layout.buckets.iter().map(|b| zeros(b.elements)).collect();
        ExactSum { layout, buckets, bound: bound(leaves) }
    }

    pub fn bucket(&self, bucket: usize) -> &[i64] {
        view::elements(&self.buckets[bucket])
    }

    pub fn bucket_mut(&mut self, bucket: usize) -> &mut [i64] {
        view::elements_mut(&mut self.buckets[bucket])
    }

    /// Forgets all leaves.
    pub fn clear(&mut self) {
        for bucket in 0..self.buckets.len() {
            self.bucket_mut(bucket).fill(0);
        }
    }

    fn add(
        &mut self,
        bucket: usize,
        offset: usize,
        gradient: &Tensor,
        from: usize,
        length: usize,
    ) -> Result<(), BadNumber> {
        let bound = self.bound;
        let sums = &mut self.bucket_mut(bucket)[offset..offset + length];
        let part = from..from + length;
        let peak = match gradient.kind() {
            Kind::Float => add_f32(sums, &view::elements::<f32>(gradient)[part]),
            Kind::BFloat16 => add_bf16(sums, &view::elements::<bf16>(gradient)[part]),
            Kind::Double => add_f64(sums, &view::elements::<f64>(gradient)[part]),
            kind => unreachable!("leaves are fp32, bf16 or fp64, not {kind:?}"),
        };
        // A NaN fails this comparison too.
        if peak < bound {
            Ok(())
        } else {
            Err(BadNumber { bucket: self.layout.buckets[bucket].name.clone(), value: peak })
        }
    }
}

impl Leaves for ExactSum {
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        self.add(bucket, offset, gradient, 0, gradient.numel())
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        if rows.is_empty() {
            return Ok(());
        }
        let width = gradient.numel() / rows.len();
        rows.iter()
            .enumerate()
            .try_for_each(|(i, &row)| self.add(bucket, offset + row as usize * width, gradient, i * width, width))
    }
}

/// A leaf's element as fp32, exactly.
trait Narrow: Copy {
    fn value(self) -> f32;
}

impl Narrow for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Narrow for bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
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

/// Adds a leaf and returns its largest magnitude (NaN if it holds one). Magnitudes compare as integers: the bits of
/// non-negative floats ascend with their values, infinity and then NaN above them.
#[inline(always)]
fn add_narrow<T: Narrow>(sums: &mut [i64], leaf: &[T]) -> f64 {
    assert_eq!(sums.len(), leaf.len(), "a leaf covers exactly its sums");
    let mut peak = 0u32;
    for (sum, x) in sums.iter_mut().zip(leaf) {
        let x = x.value();
        peak = peak.max(x.to_bits() & 0x7fff_ffff);
        *sum = accumulate(*sum, x);
    }
    f64::from(f32::from_bits(peak))
}

dispatched! { fn add_f32(sums: &mut [i64], leaf: &[f32]) -> f64 = add_narrow; }
dispatched! { fn add_bf16(sums: &mut [i64], leaf: &[bf16]) -> f64 = add_narrow; }

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
#[path = "exact_tests.rs"]
mod tests;

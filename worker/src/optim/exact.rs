//! The exact sum: gradients of micro-batches ("leaves") are added as integers, so that neither order, nor ownership, nor
//! the number of workers can change a bit of the result. A leaf `x` counts as `round_ties_even(x * 2^48)`.

use super::{leaf, on_device};
use crate::model::{BadNumber, Leaves};
use crate::ops::simd::{self, vectorised};
use crate::ops::view;
use half::bf16;
use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::Layout;

/// A sum counts in units of 2^-48.
pub const UNIT: f64 = 1.0 / (1u64 << 48) as f64;

/// One element of a gradient: still a sum, or rounded from it. Both stand for the same fp32 number, so neither who keeps
/// which nor when it is rounded changes a bit.
pub trait Reduced: Copy {
    fn gradient(self) -> f32;
}

impl Reduced for i64 {
    /// The product is exact in fp64 up to 53 bits and rounded there beyond; then rounded to fp32.
    #[inline(always)]
    fn gradient(self) -> f32 {
        (self as f64 * UNIT) as f32
    }
}

impl Reduced for f32 {
    #[inline(always)]
    fn gradient(self) -> f32 {
        self
    }
}

impl Reduced for bf16 {
    #[inline(always)]
    fn gradient(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// What becomes of a gradient before it is used.
pub trait Rounding: Copy {
    fn round(self, gradient: f32) -> f32;
}

/// It stays fp32.
#[derive(Clone, Copy)]
pub struct Exactly;

impl Rounding for Exactly {
    #[inline(always)]
    fn round(self, gradient: f32) -> f32 {
        gradient
    }
}

/// It is kept as bf16: rounded to nearest, ties to even.
#[derive(Clone, Copy)]
pub struct Nearest;

impl Rounding for Nearest {
    #[inline(always)]
    fn round(self, gradient: f32) -> f32 {
        <bf16 as simd::Narrow>::store(gradient).gradient()
    }
}

vectorised! {
    /// Rounds the `sums` of a step to gradients.
    pub fn round(sums: &[i64], gradients: &mut [f32]) {
        assert_eq!(sums.len(), gradients.len(), "a gradient for each sum");
        gradients.iter_mut().zip(sums).for_each(|(g, q)| *g = q.gradient());
    }
}

vectorised! {
    /// The same to bf16.
    pub fn round_narrow(sums: &[i64], gradients: &mut [bf16]) {
        assert_eq!(sums.len(), gradients.len(), "a gradient for each sum");
        gradients.iter_mut().zip(sums).for_each(|(g, q)| *g = <bf16 as simd::Narrow>::store(q.gradient()));
    }
}

/// Every leaf must stay below this magnitude, so that `leaves` of them cannot overflow 63 bits.
pub fn bound(leaves: usize) -> f64 {
    f64::from(1u32 << 15) / leaves.max(1) as f64
}

/// Integer accumulators of the buckets that are open: on the host, or where the model computes.
#[derive(Debug)]
pub struct ExactSum {
    layout: Arc<Layout>,
    buckets: Vec<Option<Sums>>,
    bound: f64,
    away: Option<Away>,
}

/// Accumulators on a device: leaves need not leave it, and nobody waits for them.
#[derive(Debug)]
struct Away {
    /// Of each micro-batch of a step and each bucket the bits of the largest magnitude so far: `[micro-batches, buckets]` i32.
    peaks: Tensor,
    /// The micro-batches of the next leaves, in their wave.
    whose: Vec<usize>,
    /// Micro-batches of the step's waves before.
    before: usize,
}

impl Away {
    /// The place of the peak of leaf number `which` of those that come now.
    fn peak(&self, which: usize, bucket: usize) -> Tensor {
        let micro_batch = self.before + self.whose.get(which).map_or(0, |&index| index);
        self.peaks.select(0, (micro_batch as i64).min(self.peaks.size()[0] - 1)).narrow(0, bucket as i64, 1)
    }
}

/// Accumulators of one bucket.
#[derive(Debug)]
struct Sums {
    /// In units of [`UNIT`]: i64, at least as many as the bucket has elements.
    memory: Tensor,
    /// For each tensor of the bucket: no leaf of this step has come yet, and the sums are something else's. The first leaf
    /// then overwrites them, which spares zeroing them and reading them back.
    stale: Vec<bool>,
}

/// Memory for `elements` sums.
pub fn memory(elements: usize) -> Tensor {
    Tensor::zeros([elements as i64], (Kind::Int64, Device::Cpu))
}

impl ExactSum {
    /// All buckets are open. `leaves` is the largest number of leaves that any element receives in one step.
    pub fn new(layout: Arc<Layout>, leaves: usize) -> Self {
        let mut sums = ExactSum::closed(layout, leaves);
        for bucket in 0..sums.buckets.len() {
            sums.open(bucket, memory(sums.layout.buckets[bucket].elements));
        }
        sums
    }

    /// No bucket is open.
    pub fn closed(layout: Arc<Layout>, leaves: usize) -> Self {
        let buckets = layout.buckets.iter().map(|_| None).collect();
        ExactSum { layout, buckets, bound: bound(leaves), away: None }
    }

    /// From now on leaves are added on `device`, by its kernels, at most `leaves` of each bucket before they are judged, in
    /// memory there that [`ExactSum::open`] brings. The same bits as on the host.
    pub fn move_to(&mut self, device: Device, leaves: usize) -> Result<(), tch::TchError> {
        let shape = [leaves.max(1) as i64, self.layout.buckets.len() as i64];
        self.away = Some(Away { peaks: Tensor::f_zeros(shape, (Kind::Int, device))?, whose: vec![0], before: 0 });
        Ok(())
    }

    /// The first wave of a step begins, whatever became of the one before.
    pub fn begin(&mut self) {
        if let Some(away) = &mut self.away {
            away.before = 0;
            let _ = away.peaks.zero_();
        }
    }

    /// All leaves of a wave of so many micro-batches have come.
    pub fn end_wave(&mut self, micro_batches: usize) {
        if let Some(away) = &mut self.away {
            away.before += micro_batches;
        }
    }

    /// Whether all leaves of the step so far could be added, or the first of its micro-batches that has a bad one; waits for the
    /// device that adds them. On the host that is known at once.
    pub fn check(&self) -> Result<(), (usize, BadNumber)> {
        let Some(away) = &self.away else { return Ok(()) };
        let peaks = Vec::<i32>::try_from(away.peaks.view([-1])).expect("a vector of i32");
        for (micro_batch, peaks) in peaks.chunks(self.layout.buckets.len()).enumerate() {
            for (bucket, bits) in self.layout.buckets.iter().zip(peaks) {
                let judged = self.judge(&bucket.name, f64::from(f32::from_bits(*bits as u32)));
                judged.map_err(|bad| (micro_batch, bad))?;
            }
        }
        Ok(())
    }

    /// A NaN fails this comparison too.
    fn judge(&self, bucket: &str, peak: f64) -> Result<(), BadNumber> {
        match peak.partial_cmp(&self.bound) {
            Some(Ordering::Less) => Ok(()),
            _ => Err(BadNumber { bucket: bucket.to_owned(), value: peak }),
        }
    }

    /// From now on `bucket` takes leaves, in `memory` of at least its length, whatever that holds.
    pub fn open(&mut self, bucket: usize, memory: Tensor) {
        let stale = vec![true; self.layout.buckets[bucket].tensors.len()];
        self.buckets[bucket] = Some(Sums { memory, stale });
    }

    /// Every leaf must stay below it.
    pub fn bound(&self) -> f64 {
        self.bound
    }

    pub fn is_open(&self, bucket: usize) -> bool {
        self.buckets[bucket].is_some()
    }

    /// Ends the leaves of `bucket`, if it is open: its sums where they are added, in memory that may be longer.
    pub fn close(&mut self, bucket: usize) -> Option<Tensor> {
        self.settle_bucket(bucket);
        Some(self.buckets[bucket].take()?.memory)
    }

    /// The sums of an open bucket, once [`ExactSum::settle`] has been called.
    pub fn bucket(&self, bucket: usize) -> &[i64] {
        let sums = self.buckets[bucket].as_ref().expect("open while it is looked at");
        debug_assert!(!sums.stale.contains(&true), "settled before it is read");
        &view::elements(&sums.memory)[..self.layout.buckets[bucket].elements]
    }

    /// Ends the leaves of all open buckets: what received none is zero.
    pub fn settle(&mut self) {
        (0..self.buckets.len()).for_each(|bucket| self.settle_bucket(bucket));
    }

    fn settle_bucket(&mut self, bucket: usize) {
        let Some(Sums { memory, stale }) = &mut self.buckets[bucket] else { return };
        for (slot, stale) in self.layout.buckets[bucket].tensors.iter().zip(stale) {
            if std::mem::take(stale) {
                clear(memory, slot.range());
            }
        }
    }

    /// Forgets all leaves.
    pub fn clear(&mut self) {
        self.buckets.iter_mut().flatten().for_each(|sums| sums.stale.fill(true));
    }

    /// Adds elements `part` of each of the `gradients` to those of the bucket from `offset` on; an error says whose.
    fn add(
        &mut self,
        bucket: usize,
        offset: usize,
        gradients: &[&Tensor],
        part: Range<usize>,
    ) -> Result<(), (usize, BadNumber)> {
        let whole = offset..offset + part.len();
        let Sums { memory, stale } = self.buckets[bucket].as_mut().expect("open before its leaves come");
        for (slot, stale) in self.layout.buckets[bucket].tensors.iter().zip(stale) {
            let range = slot.range();
            let (begin, end) = (range.start.max(whole.start), range.end.min(whole.end));
            if begin >= end {
                continue;
            }
            let fresh = std::mem::take(stale);
            let first = fresh && (begin, end) == (range.start, range.end);
            if fresh && !first {
                clear(memory, range);
            }
            let part = part.start + begin - offset..part.start + end - offset;
            if let Some(away) = &self.away {
                let sums = view::part(memory, &(begin..end));
                for (i, gradient) in gradients.iter().enumerate() {
                    let leaf = view::part(&gradient.view([-1]), &part);
                    on_device::add_leaf(&sums, &leaf, first && i == 0, &away.peak(i, bucket));
                }
                continue;
            }
            let sums = &mut view::elements_mut::<i64>(memory)[begin..end];
            let peaks = leaf::add(sums, gradients, part, first);
            for (which, value) in peaks.into_iter().enumerate() {
                if !matches!(value.partial_cmp(&self.bound), Some(Ordering::Less)) {
                    return Err((which, BadNumber { bucket: self.layout.buckets[bucket].name.clone(), value }));
                }
            }
        }
        Ok(())
    }
}

/// Zeroes part of the accumulators.
fn clear(memory: &mut Tensor, range: Range<usize>) {
    match memory.device() {
        Device::Cpu => view::elements_mut::<i64>(memory)[range].fill(0),
        _ => drop(view::part(memory, &range).zero_()),
    }
}

/// The leaf in host memory, where the sums are.
fn on_host(gradient: &Tensor) -> Tensor {
    match gradient.device() {
        Device::Cpu => gradient.shallow_clone(),
        _ => gradient.to_device(Device::Cpu),
    }
}

impl ExactSum {
    /// Rows lie within one tensor of the bucket.
    fn add_rows_away(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) {
        let Sums { memory, stale } = self.buckets[bucket].as_mut().expect("open before its leaves come");
        let slots = self.layout.buckets[bucket].tensors.iter().zip(stale);
        let (slot, stale) =
            slots.into_iter().find(|(slot, _)| slot.range().contains(&offset)).expect("a matrix is there");
        if std::mem::take(stale) {
            clear(memory, slot.range());
        }
        let sums = view::part(memory, &(offset..slot.range().end));
        let peak = self.away.as_ref().expect("looked at before").peak(0, bucket);
        on_device::add_rows(&sums, rows, gradient, &peak);
    }
}

impl Leaves for ExactSum {
    fn come_from(&mut self, micro_batches: &[usize]) {
        if let Some(away) = &mut self.away {
            away.whose.clear();
            away.whose.extend_from_slice(micro_batches);
        }
    }

    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        self.together(bucket, offset, &[gradient]).map_err(|(_, bad)| bad)
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        if rows.is_empty() {
            return Ok(());
        }
        if self.away.is_some() {
            self.add_rows_away(bucket, offset, rows, gradient);
            return Ok(());
        }
        let (gradient, width) = (&on_host(gradient), gradient.numel() / rows.len());
        rows.iter().enumerate().try_for_each(|(i, &row)| {
            let at = offset + row as usize * width;
            self.add(bucket, at, &[gradient], i * width..(i + 1) * width).map_err(|(_, bad)| bad)
        })
    }

    fn together(&mut self, bucket: usize, offset: usize, gradients: &[&Tensor]) -> Result<(), (usize, BadNumber)> {
        let elements = gradients.first().map_or(0, |gradient| gradient.numel());
        if self.away.is_some() {
            return self.add(bucket, offset, gradients, 0..elements);
        }
        let here: Vec<Tensor> = gradients.iter().map(|gradient| on_host(gradient)).collect();
        self.add(bucket, offset, &here.iter().collect::<Vec<_>>(), 0..elements)
    }
}

#[cfg(test)]
#[path = "exact_tests.rs"]
mod tests;

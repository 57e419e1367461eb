//! The gradient norm: fp64 partials per chunk over 16 fixed lanes, added in chunk order. A chunk's partial depends on
//! nothing but the chunk, so the norm does not depend on who owns it.

use super::exact::{Reduced, Rounding};
use super::shard::Shard;
use crate::ops::simd::vectorised;
use unisono_configs::model::CHUNK;

const LANES: usize = 16;

vectorised! {
    /// Sum of squares of one chunk's gradients.
    pub fn partial<G: Reduced, R: Rounding>(chunk: &[G], rounding: R) -> f64 {
        sum_of_squares(chunk, rounding)
    }
}

#[inline(always)]
fn sum_of_squares<G: Reduced, R: Rounding>(chunk: &[G], rounding: R) -> f64 {
    let mut lanes = [0f64; LANES];
    let groups = chunk.chunks_exact(LANES);
    let rest = groups.remainder();
    for group in groups {
        for (lane, &q) in lanes.iter_mut().zip(group) {
            let x = f64::from(rounding.round(q.gradient()));
            *lane += x * x;
        }
    }
    for (lane, &q) in lanes.iter_mut().zip(rest) {
        let x = f64::from(rounding.round(q.gradient()));
        *lane += x * x;
    }
    lanes.iter().fold(0.0, |sum, lane| sum + lane)
}

/// All ranks' partials in (bucket, chunk) order, from what each has sent: the fp64 partials of its own chunks. The rank that
/// sent another number of them is the error.
pub fn in_order(all: &[Vec<u8>], shard: &Shard) -> Result<Vec<f64>, usize> {
    for (rank, bytes) in all.iter().enumerate() {
        let chunks = |bucket| -> usize { shard.owners(bucket)[rank].len().div_ceil(CHUNK) };
        if bytes.len() != 8 * (0..shard.buckets()).map(chunks).sum::<usize>() {
            return Err(rank);
        }
    }
    let mut cursors: Vec<_> = all.iter().map(|bytes| bytes.as_chunks::<8>().0.iter()).collect();
    let mut partials = Vec::new();
    for bucket in 0..shard.buckets() {
        // Ranks own ascending chunk ranges of a bucket, so rank order is chunk order.
        for (owned, cursor) in shard.owners(bucket).iter().zip(&mut cursors) {
            partials.extend(cursor.take(owned.len().div_ceil(CHUNK)).map(|bytes| f64::from_le_bytes(*bytes)));
        }
    }
    Ok(partials)
}

/// Euclidean norm from all partials in (bucket, chunk) order.
pub fn norm(partials: impl Iterator<Item = f64>) -> f64 {
    partials.fold(0.0, |sum, partial| sum + partial).sqrt()
}

/// What the gradient is multiplied with so that its norm is at most `max_norm`; 0 means no clipping.
/// As `torch.nn.utils.clip_grad_norm_`.
pub fn clip(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 {
        (max_norm / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::exact::{Exactly, Nearest};
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_partial_is_the_sum_of_squares(chunk in prop::collection::vec(-(1i64 << 52)..(1i64 << 52), 0..200)) {
            let gradients: Vec<f32> = chunk.iter().map(|q| q.gradient()).collect();
            let expected: f64 = gradients.iter().map(|&g| f64::from(g).powi(2)).sum();
            let exactly = partial(&chunk, Exactly);
            prop_assert!((exactly - expected).abs() <= 1e-13 * expected);
            prop_assert_eq!(exactly.to_bits(), sum_of_squares(&chunk, Exactly).to_bits());
            prop_assert_eq!(exactly.to_bits(), partial(&gradients, Exactly).to_bits());
            let narrow: Vec<bf16> = gradients.iter().map(|g| bf16::from_f32(*g)).collect();
            prop_assert_eq!(partial(&chunk, Nearest).to_bits(), partial(&narrow, Exactly).to_bits());
        }
    }

    #[test]
    fn clipping_follows_torch() {
        assert_eq!(clip(0.5, 1.0), 1.0);
        assert_eq!(clip(3.0, 1.0), 1.0 / (3.0 + 1e-6));
        assert_eq!(clip(1e9, 0.0), 1.0);
    }
}

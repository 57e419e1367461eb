//! Random bits for stochastic rounding: Philox4x32-7 (Salmon et al. 2011), a function of seed, step and element. No
//! stream exists that somebody could read out of order: whoever owns an element rounds it alike.

use half::bf16;
use std::ops::Range;

/// Counters computed at once: an AVX-512 register of words.
const LANES: usize = 16;
/// Elements that these serve: two for each counter.
pub const GROUP: usize = 2 * LANES;
/// Elements served at once.
pub const BLOCK: usize = 1024;

const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
/// The fewest that pass every test of its authors.
const ROUNDS: usize = 7;

/// Words of 32 bits in places of 64, whatever stands above them: so that a product needs neither widening nor narrowing.
type Words = [u64; LANES];

/// All rounds over sixteen counters.
#[inline(always)]
fn philox(counters: [Words; 4], key: [u32; 2]) -> [Words; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counters;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        for l in 0..LANES {
            let p0 = (c0[l] & 0xffff_ffff) * MULTIPLIERS[0];
            let p1 = (c2[l] & 0xffff_ffff) * MULTIPLIERS[1];
            c0[l] = p1 >> 32 ^ c1[l] ^ u64::from(k0);
            c2[l] = p0 >> 32 ^ c3[l] ^ u64::from(k1);
            c1[l] = p1;
            c3[l] = p0;
        }
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// Where bits are for: one update of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    pub seed: u64,
    pub step: u64,
    pub bucket: usize,
}

/// Bits for up to [`BLOCK`] elements: sixteen for the parameter in the lower half of `first`, for the first moment in its
/// upper half, for the second moment in the lower half of `second`.
pub struct Bits {
    pub first: [u32; BLOCK],
    pub second: [u32; BLOCK],
}

impl Default for Bits {
    fn default() -> Self {
        Bits { first: [0; BLOCK], second: [0; BLOCK] }
    }
}

impl Noise {
    /// Bits for all groups that elements `range` of the bucket touch. What belongs to the first element comes back as a
    /// place in `bits`.
    #[inline(always)]
    pub fn fill(&self, range: &Range<usize>, bits: &mut Bits) -> usize {
        let begin = range.start / GROUP;
        let groups = range.end.div_ceil(GROUP) - begin;
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let (first, _) = bits.first.as_chunks_mut::<GROUP>();
        let (second, _) = bits.second.as_chunks_mut::<GROUP>();
        for (i, (first, second)) in first[..groups].iter_mut().zip(&mut second[..groups]).enumerate() {
            let start = ((begin + i) * LANES) as u64;
            let (mut low, mut high) = ([0; LANES], [0; LANES]);
            for l in 0..LANES {
                // A bucket's counters fill 40 bits; its number the rest.
                let counter = start + l as u64;
                low[l] = counter;
                high[l] = counter >> 32 | (self.bucket as u64) << 8;
            }
            let [a, b, c, d] = philox([low, high, [self.step; LANES], [self.step >> 32; LANES]], key);
            for l in 0..LANES {
                (first[l], second[l]) = (a[l] as u32, b[l] as u32);
                (first[LANES + l], second[LANES + l]) = (c[l] as u32, d[l] as u32);
            }
        }
        range.start - begin * GROUP
    }
}

/// `value` rounded to one of its two neighbours in bf16, to each as often as it is near: `bits` are sixteen random ones.
#[inline(always)]
pub fn round(value: f32, bits: u32) -> bf16 {
    // A NaN of arithmetic has zeros below, so it stays one, as infinity stays infinity.
    bf16::from_bits((value.to_bits().wrapping_add(bits & 0xffff) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's known answers for philox4x32-7.
    #[test]
    fn known_answers_come_out() {
        let run = |counter: [u32; 4], key| {
            // What stands above a word does not count.
            philox(counter.map(|c| [u64::from(c) | 77 << 32; LANES]), key).map(|words| words[3] as u32)
        };
        assert_eq!(run([0; 4], [0; 2]), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
        assert_eq!(run([u32::MAX; 4], [u32::MAX; 2]), [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(run(pi, [0xa409_3822, 0x299f_31d0]), [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a]);
    }

    #[test]
    fn an_element_has_its_bits_wherever_a_range_begins() {
        let noise = Noise { seed: 7, step: 3, bucket: 2 };
        let (mut whole, mut part) = (Bits::default(), Bits::default());
        assert_eq!(noise.fill(&(0..BLOCK), &mut whole), 0);
        for range in [0..1, 5..40, 31..33, 32..64, 100..1000] {
            let at = noise.fill(&range, &mut part);
            for (i, e) in range.enumerate() {
                assert_eq!((part.first[at + i], part.second[at + i]), (whole.first[e], whole.second[e]));
            }
        }
        for other in [Noise { seed: 8, ..noise }, Noise { step: 4, ..noise }, Noise { bucket: 3, ..noise }] {
            other.fill(&(0..BLOCK), &mut part);
            let same = part.first.iter().zip(&whole.first).filter(|(a, b)| a == b).count();
            assert!(same < 4, "{other:?}");
        }
    }

    #[test]
    fn rounding_takes_neighbours_as_often_as_they_are_near() {
        for value in [1.0039f32, -2.6183, 1e-30, 3.3e-41, 0.0, -0.0, 384.0] {
            let (mut sum, mut bits) = (0f64, Bits::default());
            let blocks = 64;
            for b in 0..blocks {
                Noise { seed: 1, step: b, bucket: 0 }.fill(&(0..BLOCK), &mut bits);
                sum += bits.first.iter().map(|r| round(value, *r).to_f64()).sum::<f64>();
            }
            let mean = sum / (blocks as usize * BLOCK) as f64;
            let below = f32::from_bits(value.to_bits() & 0xffff_0000);
            let gap = f64::from(f32::from_bits((value.to_bits() & 0xffff_0000) + 0x1_0000) - below).abs();
            // The mean of 65,536 draws strays by a gap / 512 at most, four times of five hundred.
            assert!((mean - f64::from(value)).abs() <= gap / 128.0, "{value:e}: {mean:e}");
        }
        assert!(round(f32::NAN, 0xffff).is_nan());
    }
}

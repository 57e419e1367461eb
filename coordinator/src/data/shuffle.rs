//! The order of the rows within an epoch: a pure function of seed, epoch and number of rows, fixed forever.

/// Names the derivation of the keys. A change here changes every run.
const CONTEXT: &str = "unisono 1 order of training rows";

/// Indices `0..n` in the order of `epoch` (from 0). With `shuffle` the rows are sorted by the words of BLAKE3's
/// extendable output keyed by (seed, epoch), equal words by index: no generator's version can change it.
pub fn order(seed: u64, epoch: u64, n: usize, shuffle: bool) -> Vec<u32> {
    let count = u32::try_from(n).expect("a data set holds fewer than 2^32 rows");
    let mut indices: Vec<u32> = (0..count).collect();
    if !shuffle {
        return indices;
    }
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
    let mut bytes = vec![0u8; n * 8];
    hasher.finalize_xof().fill(&mut bytes);
    let keys: Vec<u64> =
        bytes.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).collect();
    indices.sort_unstable_by_key(|&i| (keys[i as usize], i));
    indices
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_occurs_once(seed: u64, epoch: u64, n in 0usize..3000, shuffle: bool) {
            let mut seen = order(seed, epoch, n, shuffle);
            prop_assert_eq!(&seen, &order(seed, epoch, n, shuffle));
            seen.sort_unstable();
            prop_assert!(seen.iter().enumerate().all(|(i, &v)| i == v as usize));
        }
    }

    #[test]
    fn the_order_never_changes() {
        assert_eq!(order(0, 0, 12, true), [2, 8, 7, 1, 11, 4, 0, 10, 6, 5, 9, 3]);
        assert_eq!(order(0, 0, 4, false), [0, 1, 2, 3]);
        assert_ne!(order(0, 0, 64, true), order(0, 1, 64, true));
        assert_ne!(order(0, 0, 64, true), order(1, 0, 64, true));
    }

    #[test]
    fn the_first_place_is_uniform() {
        let mut counts = [0u32; 8];
        (0..8000).for_each(|seed| counts[order(seed, 0, 8, true)[0] as usize] += 1);
        // 1000 expected in each, with a standard deviation of 30.
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
    }
}

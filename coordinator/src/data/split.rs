//! Which rows are held out: decided by the hash of the source row alone, so that neither its position, nor the
//! template, nor rows added later move it.

use std::ops::Range;

/// Most rows that a share holds out of one table.
pub const CAP: usize = 1000;
/// A table with at least this many different rows gives one of them to every share above zero.
pub const SMALL: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Train,
    Validation,
    Test,
}

/// For each row, given by its hash, the part it belongs to. Hashes are read as fractions of 2^128: those below `test`
/// are tested on, the next below `test + validation` validated on; of each the [`CAP`] smallest, the rest is trained on.
/// Where a table of [`SMALL`] rows has none in a share, the next larger hash is held out. Equal rows stay together.
pub fn split(hashes: &[u128], validation: f64, test: f64) -> Vec<Part> {
    let mut sorted = hashes.to_vec();
    sorted.sort_unstable();
    let distinct = sorted.chunk_by(|a, b| a == b).count();
    // The upper 53 bits are what an f64 holds exactly.
    let below = |share: f64| sorted.partition_point(|&hash| ((hash >> 75) as f64) < share * (1u64 << 53) as f64);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(u128::MAX);
    let hold = |begin: usize, end: usize, share: f64| -> (Range<u128>, usize) {
        let end = match end > begin {
            false if share > 0.0 && distinct >= SMALL => sorted.partition_point(|&hash| hash <= at(begin)),
            false => begin,
            true => end,
        };
        (at(begin)..at(end.min(begin + CAP)), end)
    };
    let (tested, end) = hold(0, below(test), test);
    let (validated, _) = hold(end, below(test + validation), validation);
    hashes
        .iter()
        .map(|hash| match (tested.contains(hash), validated.contains(hash)) {
            (true, _) => Part::Test,
            (_, true) => Part::Validation,
            _ => Part::Train,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(i: u64) -> u128 {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&blake3::hash(&i.to_le_bytes()).as_bytes()[..16]);
        u128::from_be_bytes(bytes)
    }

    fn count(parts: &[Part], part: Part) -> usize {
        parts.iter().filter(|&&p| p == part).count()
    }

    proptest! {
        #[test]
        fn a_row_moves_neither_with_its_place_nor_with_more_rows(seed: u64, n in 10usize..600, more in 0usize..300) {
            let hashes: Vec<u128> = (0..(n + more) as u64).map(|i| hash(seed.wrapping_add(i))).collect();
            let few = split(&hashes[..n], 0.1, 0.2);
            let all = split(&hashes, 0.1, 0.2);
            let reversed = split(&hashes.iter().rev().copied().collect::<Vec<_>>(), 0.1, 0.2);
            prop_assert!(all.iter().eq(reversed.iter().rev()));
            // Only the one row that a small table must give may move.
            let moved = few.iter().zip(&all).filter(|(a, b)| a != b).count();
            prop_assert!(moved <= 2, "{moved} rows moved");
        }

        #[test]
        fn equal_rows_stay_together(values in prop::collection::vec(0u64..30, 1..200)) {
            let hashes: Vec<u128> = values.iter().map(|&v| hash(v)).collect();
            let parts = split(&hashes, 0.2, 0.2);
            for i in 0..values.len() {
                for j in 0..i {
                    prop_assert!(values[i] != values[j] || parts[i] == parts[j]);
                }
            }
        }
    }

    #[test]
    fn shares_are_met_and_capped() {
        let hashes: Vec<u128> = (0..50_000).map(hash).collect();
        let parts = split(&hashes[..8000], 0.05, 0.1);
        assert!((300..500).contains(&count(&parts, Part::Validation)), "{}", count(&parts, Part::Validation));
        assert!((700..900).contains(&count(&parts, Part::Test)), "{}", count(&parts, Part::Test));
        let parts = split(&hashes, 0.05, 0.1);
        assert_eq!((count(&parts, Part::Validation), count(&parts, Part::Test)), (CAP, CAP));
        assert_eq!(count(&split(&hashes, 0.0, 0.0), Part::Train), hashes.len());
    }

    #[test]
    fn ten_rows_give_one_to_each_share_and_nine_give_none() {
        let hashes: Vec<u128> = (100..110).map(hash).collect();
        let parts = split(&hashes, 1e-9, 1e-9);
        assert_eq!((count(&parts, Part::Validation), count(&parts, Part::Test)), (1, 1));
        assert_eq!(count(&split(&hashes[..9], 1e-9, 1e-9), Part::Train), 9);
    }
}

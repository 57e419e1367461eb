//! Who computes what: micro-batches dealt to ranks. It decides speed and never a bit, because sums over micro-batches are
//! exact.

use std::collections::BTreeSet;
use unisono_configs::run::Assignment;

/// For each rank the micro-batches that it computes, in that order.
pub type Shares = Vec<Vec<u32>>;

/// Deals micro-batches with these `costs` to `world` ranks. `turn` (the step) rotates ties, so that no rank is always
/// the one with the larger share; `seed` matters to shuffled assignment only.
pub fn assign(assignment: Assignment, costs: &[u64], world: u32, turn: u64, seed: u64) -> Shares {
    match assignment {
        Assignment::Balanced => balanced(costs, world, turn),
        Assignment::Shuffled => shuffled(costs.len() as u32, world, turn, seed),
    }
}

/// Longest processing time first.
fn balanced(costs: &[u64], world: u32, turn: u64) -> Shares {
    let mut order: Vec<u32> = (0..costs.len() as u32).collect();
    order.sort_by_key(|&m| (std::cmp::Reverse(costs[m as usize]), m));
    let world = u64::from(world);
    let mut shares = vec![Vec::new(); world as usize];
    // (load, tie, rank): the first has the least to do.
    let mut by_load: BTreeSet<(u64, u64, u64)> = (0..world).map(|rank| (0, (rank + turn) % world, rank)).collect();
    for micro_batch in order {
        let (load, tie, rank) = by_load.pop_first().expect("a world has ranks");
        by_load.insert((load + costs[micro_batch as usize].max(1), tie, rank));
        shares[rank as usize].push(micro_batch);
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

/// Micro-batches in random order to random ranks.
fn shuffled(count: u32, world: u32, turn: u64, seed: u64) -> Shares {
    let mut hasher = blake3::Hasher::new_derive_key("unisono 1 shuffled assignment");
    hasher.update(&seed.to_le_bytes()).update(&turn.to_le_bytes());
    let mut reader = hasher.finalize_xof();
    let mut word = || {
        let mut bytes = [0; 8];
        reader.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    };
    let mut order: Vec<(u64, u32)> = (0..count).map(|m| (word(), m)).collect();
    order.sort_unstable();
    let mut shares = vec![Vec::new(); world as usize];
    for (_, micro_batch) in order {
        shares[(word() % u64::from(world)) as usize].push(micro_batch);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_micro_batch_once(
            costs in prop::collection::vec(0u64..1000, 0..40), world in 1u32..10, turn: u64, seed: u64, shuffle: bool,
        ) {
            let assignment = if shuffle { Assignment::Shuffled } else { Assignment::Balanced };
            let turn = turn % 1_000_000;
            let shares = assign(assignment, &costs, world, turn, seed);
            prop_assert_eq!(shares.len(), world as usize);
            let mut seen: Vec<u32> = shares.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..costs.len() as u32).collect::<Vec<_>>());
            prop_assert_eq!(shares, assign(assignment, &costs, world, turn, seed));
        }

        #[test]
        fn two_workers_share_evenly(costs in prop::collection::vec(900u64..1100, 8..17), turn in 0u64..1000) {
            let shares = assign(Assignment::Balanced, &costs, 2, turn, 0);
            let first: u64 = shares[0].iter().map(|&m| costs[m as usize]).sum();
            let share = first as f64 / costs.iter().sum::<u64>() as f64;
            prop_assert!((0.4..=0.6).contains(&share), "{}", share);
        }
    }
}

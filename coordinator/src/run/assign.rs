//! Who computes what: micro-batches dealt to ranks, and lined up into passes. It decides speed and never a bit, because
//! sums over micro-batches are exact.

use unisono_configs::run::Assignment;
use unisono_proto::v1::{Pass, Share};

/// Deals micro-batches with these `costs` to `world` ranks. `turn` (the step) rotates ties, so that no rank is always
/// the one with the larger share; `seed` matters to shuffled assignment only.
pub fn assign(assignment: Assignment, costs: &[u64], world: u32, turn: u64, seed: u64) -> Vec<Pass> {
    let shares = match assignment {
        Assignment::Balanced => balanced(costs, world, turn),
        Assignment::Shuffled => shuffled(costs.len() as u32, world, turn, seed),
    };
    line_up(&shares)
}

/// For each rank its micro-batches in the order of computing: longest processing time first.
fn balanced(costs: &[u64], world: u32, turn: u64) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..costs.len() as u32).collect();
    order.sort_by_key(|&m| (std::cmp::Reverse(costs[m as usize]), m));
    let world = u64::from(world);
    let mut loads = vec![0u64; world as usize];
    let mut shares = vec![Vec::new(); world as usize];
    for micro_batch in order {
        let rank = (0..world).min_by_key(|&r| (loads[r as usize], (r + turn) % world)).expect("a world has ranks");
        loads[rank as usize] += costs[micro_batch as usize].max(1);
        shares[rank as usize].push(micro_batch);
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

/// Micro-batches in random order to random ranks.
fn shuffled(count: u32, world: u32, turn: u64, seed: u64) -> Vec<Vec<u32>> {
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

/// Pass k holds everyone's k-th micro-batch.
fn line_up(shares: &[Vec<u32>]) -> Vec<Pass> {
    let passes = shares.iter().map(Vec::len).max().unwrap_or(0);
    let share = |pass: usize| {
        let with = |(rank, list): (usize, &Vec<u32>)| {
            list.get(pass).map(|&micro_batch| Share { rank: rank as u32, micro_batch })
        };
        shares.iter().enumerate().filter_map(with).collect()
    };
    (0..passes).map(|pass| Pass { shares: share(pass) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_micro_batch_once_and_one_a_rank_and_pass(
            costs in prop::collection::vec(0u64..1000, 0..40), world in 1u32..10, turn: u64, seed: u64, shuffle: bool,
        ) {
            let assignment = if shuffle { Assignment::Shuffled } else { Assignment::Balanced };
            let turn = turn % 1_000_000;
            let passes = assign(assignment, &costs, world, turn, seed);
            let mut seen: Vec<u32> = passes.iter().flat_map(|p| &p.shares).map(|s| s.micro_batch).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..costs.len() as u32).collect::<Vec<_>>());
            for pass in &passes {
                prop_assert!(pass.shares.windows(2).all(|w| w[0].rank < w[1].rank));
                prop_assert!(pass.shares.iter().all(|s| s.rank < world));
            }
            prop_assert_eq!(passes, assign(assignment, &costs, world, turn, seed));
        }

        #[test]
        fn two_workers_share_evenly(costs in prop::collection::vec(900u64..1100, 8..17), turn in 0u64..1000) {
            let passes = assign(Assignment::Balanced, &costs, 2, turn, 0);
            let first: u64 = passes.iter().flat_map(|p| &p.shares).filter(|s| s.rank == 0)
                .map(|s| costs[s.micro_batch as usize]).sum();
            let share = first as f64 / costs.iter().sum::<u64>() as f64;
            prop_assert!((0.4..=0.6).contains(&share), "{}", share);
        }
    }
}

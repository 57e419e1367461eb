//! Who computes what: micro-batches dealt to ranks. It decides speed and never a bit, because sums over micro-batches are
//! exact.

use super::pace::FULL;
use std::collections::BTreeSet;
use unisono_configs::run::Assignment;

/// For each rank the micro-batches that it computes, in that order.
pub type Shares = Vec<Vec<u32>>;

/// Deals micro-batches with these `costs` to ranks of these `speeds` ([`FULL`] is the usual one). `turn` (the step) rotates
/// ties, so that no rank is always the one with the larger share; `seed` matters to shuffled assignment only.
pub fn assign(assignment: Assignment, costs: &[u64], speeds: &[u32], turn: u64, seed: u64) -> Shares {
    let even = speeds.iter().all(|&speed| speed == FULL);
    match assignment {
        Assignment::Balanced if even => balanced(costs, speeds.len() as u32, turn),
        Assignment::Balanced => by_speed(costs, speeds, turn),
        Assignment::Shuffled => shuffled(costs.len() as u32, speeds.len() as u32, turn, seed),
    }
}

/// Micro-batches from the dearest to the cheapest.
fn by_cost(costs: &[u64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..costs.len() as u32).collect();
    order.sort_by_key(|&m| (std::cmp::Reverse(costs[m as usize]), m));
    order
}

/// Longest processing time first.
fn balanced(costs: &[u64], world: u32, turn: u64) -> Shares {
    let world = u64::from(world);
    let mut shares = vec![Vec::new(); world as usize];
    // (load, tie, rank): the first has the least to do.
    let mut by_load: BTreeSet<(u64, u64, u64)> = (0..world).map(|rank| (0, (rank + turn) % world, rank)).collect();
    for micro_batch in by_cost(costs) {
        let (load, tie, rank) = by_load.pop_first().expect("a world has ranks");
        by_load.insert((load + costs[micro_batch as usize].max(1), tie, rank));
        shares[rank as usize].push(micro_batch);
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

/// Each micro-batch to the rank that would be done with it first. Everyone gets one where there are enough, so that it shows
/// when a slow rank has recovered.
fn by_speed(costs: &[u64], speeds: &[u32], turn: u64) -> Shares {
    let world = speeds.len() as u64;
    let mut shares = vec![Vec::new(); speeds.len()];
    let mut loads = vec![0u64; speeds.len()];
    for micro_batch in by_cost(costs) {
        let cost = costs[micro_batch as usize].max(1);
        let done =
            |rank: usize| u128::from(loads[rank] + cost) * u128::from(FULL) * 1024 / u128::from(speeds[rank].max(1));
        let first = (0..speeds.len()).min_by_key(|&rank| (done(rank), (rank as u64 + turn) % world));
        let rank = first.expect("a world has ranks");
        loads[rank] += cost;
        shares[rank].push(micro_batch);
    }
    while costs.len() >= speeds.len() {
        let Some(idle) = shares.iter().position(Vec::is_empty) else { break };
        let most = (0..shares.len()).max_by_key(|&rank| (shares[rank].len(), rank)).expect("a world has ranks");
        // The cheapest came last.
        let cheapest = shares[most].pop();
        shares[idle].extend(cheapest);
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
            costs in prop::collection::vec(0u64..1000, 0..40), speeds in prop::collection::vec(1..=FULL, 1..10),
            turn: u64, seed: u64, shuffle: bool,
        ) {
            let assignment = if shuffle { Assignment::Shuffled } else { Assignment::Balanced };
            let turn = turn % 1_000_000;
            let shares = assign(assignment, &costs, &speeds, turn, seed);
            prop_assert_eq!(shares.len(), speeds.len());
            let idle = shares.iter().any(Vec::is_empty) && costs.len() >= speeds.len();
            prop_assert!(shuffle || !idle, "somebody has nothing to do: {:?}", shares);
            let mut seen: Vec<u32> = shares.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..costs.len() as u32).collect::<Vec<_>>());
            prop_assert_eq!(shares, assign(assignment, &costs, &speeds, turn, seed));
        }

        #[test]
        fn two_workers_share_evenly(costs in prop::collection::vec(900u64..1100, 8..17), turn in 0u64..1000) {
            let shares = assign(Assignment::Balanced, &costs, &[FULL; 2], turn, 0);
            let first: u64 = shares[0].iter().map(|&m| costs[m as usize]).sum();
            let share = first as f64 / costs.iter().sum::<u64>() as f64;
            prop_assert!((0.4..=0.6).contains(&share), "{}", share);
        }

        #[test]
        fn a_slow_worker_gets_as_much_less_as_it_is_slower(
            costs in prop::collection::vec(900u64..1100, 16..33), turn in 0u64..1000,
        ) {
            let shares = assign(Assignment::Balanced, &costs, &[FULL, FULL / 4], turn, 0);
            let slow: u64 = shares[1].iter().map(|&m| costs[m as usize]).sum();
            let share = slow as f64 / costs.iter().sum::<u64>() as f64;
            prop_assert!((0.12..=0.27).contains(&share), "{}", share);
        }
    }
}

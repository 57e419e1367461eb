//! Tests of mixing: shares, passes, and that an epoch depends on nothing but rows, rates and seed.

use super::*;
use proptest::prelude::*;

fn tasks(sizes: &[usize], rates: &[f64]) -> Vec<Task> {
    let mut next = 0;
    let task = |(&size, &rate): (&usize, &f64)| {
        let rows = (next..next + size as u32).collect();
        next += size as u32;
        Task { rows, rate }
    };
    sizes.iter().zip(rates).map(task).collect()
}

fn task_of(sizes: &[usize], row: u32) -> usize {
    let mut end = 0;
    let inside = |&size: &usize| {
        end += size as u32;
        row < end
    };
    sizes.iter().position(inside).unwrap()
}

fn counts(sizes: &[usize], rows: &[u32]) -> Vec<usize> {
    let mut counts = vec![0; sizes.len()];
    rows.iter().for_each(|&row| counts[task_of(sizes, row)] += 1);
    counts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn counts_are_within_one_of_the_shares(
        parts in prop::collection::vec((1usize..60, 0.01f64..10.0), 1..8), length in 1usize..400, seed: u64, epoch in 0u64..4,
    ) {
        let (sizes, rates): (Vec<usize>, Vec<f64>) = parts.into_iter().unzip();
        let mix = Mix::new(tasks(&sizes, &rates), length, seed, true, vec![]);
        let rows = mix.epoch(epoch);
        prop_assert_eq!(rows.len(), length);
        for (count, share) in counts(&sizes, &rows).into_iter().zip(shares(&rates)) {
            prop_assert!((count as f64 - share * length as f64).abs() <= 1.0 + 1e-9 * length as f64, "{} {}", count, share * length as f64);
        }
        // Asked for in another order, by another instance: the same.
        let other = Mix::new(tasks(&sizes, &rates), length, seed, true, vec![]);
        for epoch in (0..=epoch).rev() {
            prop_assert_eq!(other.epoch(epoch), mix.epoch(epoch));
        }
    }

    /// No row comes an (n+1)-th time before every row of its task has come n times, over all epochs.
    #[test]
    fn passes_go_on_from_epoch_to_epoch(
        parts in prop::collection::vec((1usize..30, 0.1f64..10.0), 1..5), length in 1usize..60, seed: u64,
    ) {
        let (sizes, rates): (Vec<usize>, Vec<f64>) = parts.into_iter().unzip();
        let total: usize = sizes.iter().sum();
        let costs: Vec<u32> = (0..total as u32).map(|row| 1 + row * 7 % 11).collect();
        let mix = Mix::new(tasks(&sizes, &rates), length, seed, true, costs);
        let mut seen = vec![0u32; total];
        for epoch in 0..5 {
            mix.epoch(epoch).into_iter().for_each(|row| seen[row as usize] += 1);
            let mut begin = 0;
            for &size in &sizes {
                let part = &seen[begin..begin + size];
                prop_assert!(part.iter().max().unwrap() - part.iter().min().unwrap() <= 1, "{:?}", part);
                begin += size;
            }
        }
    }
}

#[test]
fn completion_tokens_are_shared_within_a_thousandth() {
    let sizes = [3000, 500, 10_000];
    let (tokens, rates) = ([5, 220, 60], [1.0, 3.0, 6.0]);
    let costs: Vec<u32> =
        (0..13_500).map(|row| tokens[task_of(&sizes, row)] * (1 + row * 31 % 9) / 5).map(|cost| cost.max(1)).collect();
    let mix = Mix::new(tasks(&sizes, &rates), 20_000, 7, true, costs.clone());
    for epoch in 0..2 {
        let rows = mix.epoch(epoch);
        let mut had = [0u64; 3];
        rows.iter().for_each(|&row| had[task_of(&sizes, row)] += u64::from(costs[row as usize]));
        let sum: u64 = had.iter().sum();
        for (had, share) in had.iter().zip(shares(&rates)) {
            let realised = *had as f64 / sum as f64;
            assert!((realised - share).abs() < 0.001, "{realised} {share}");
        }
    }
}

#[test]
fn rates_follow_the_papers() {
    assert_eq!(rate(50_000, None, 1.0), 50_000.0);
    assert_eq!(rate(50_000, Some(3000), 1.0), 3000.0);
    assert_eq!(rate(10_000, Some(3000), 2.0), 3000f64.sqrt());
    assert_eq!(shares(&[1.0, 3.0]), [0.25, 0.75]);
    let none = Mix::new(tasks(&[3, 0, 2], &[1.0, 1.0, 0.0]), 6, 0, false, vec![]);
    let mut rows = none.epoch(0);
    rows.sort_unstable();
    assert_eq!(rows, [0, 0, 1, 1, 2, 2], "a task without rows or rate never occurs");
}

//! Tests of the plan, and rows for the tests of its neighbours.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use unisono_configs::run::OnBadNumbers;

pub const COST: CostModel = CostModel { token: 1000, pair: 3, target: 500 };

pub fn sizes(rows: usize) -> Vec<Size> {
    let size = |i: u32| Size { tokens: 8 + i * 37 % 90, targets: 1 + i % 7, task: i % 3 };
    (0..rows as u32).map(size).collect()
}

pub fn reversed(rows: usize) -> Order {
    let epoch = Arc::new(move |epoch| {
        let forward = 0..rows as u32;
        if epoch % 2 == 0 {
            forward.collect()
        } else {
            forward.rev().collect()
        }
    });
    Order { length: rows, epoch }
}

pub fn train(batch: usize, micro_batches: usize) -> Train {
    Train { global_batch_size: batch, micro_batches, max_tokens_per_micro_batch: 256, ..Train::default() }
}

proptest! {
    #[test]
    fn an_epoch_trains_on_every_row_once(rows in 1usize..150, batch in 1usize..40, bins in 1usize..10, epochs in 1u64..4) {
        let train = Train { epochs, ..train(batch, bins) };
        let plan = Plan::new(Arc::new(sizes(rows)), reversed(rows), &train, COST).unwrap();
        prop_assert_eq!(plan.steps(), epochs * rows.div_ceil(batch) as u64);
        for epoch in 0..epochs {
            let steps: Vec<StepPlan> = (1..=plan.steps()).map(|s| plan.step(s)).filter(|s| s.epoch == epoch).collect();
            let trained: Vec<u32> = steps.iter().flat_map(|s| s.examples.clone()).collect();
            prop_assert_eq!(&trained, &(reversed(rows).epoch)(epoch));
            for step in &steps {
                let mut dealt: Vec<u32> = step.micro_batches.iter().flat_map(|m| m.rows.clone()).collect();
                dealt.sort_unstable();
                let mut examples = step.examples.clone();
                examples.sort_unstable();
                prop_assert_eq!(dealt, examples);
                prop_assert!(step.micro_batches.len() >= bins.min(step.examples.len()));
                prop_assert!(step.micro_batches.len() <= plan.worst().micro_batches as usize);
                prop_assert!(step.micro_batches.iter().all(|m| m.tokens <= plan.worst().tokens && m.tokens <= 256));
                let mut tokens: Vec<u32> = step.micro_batches.iter().map(|m| m.tokens).collect();
                tokens.sort_unstable_by(|a, b| b.cmp(a));
                prop_assert!(tokens.len() <= plan.sizes().len());
                prop_assert!(tokens.iter().zip(plan.sizes()).all(|(tokens, most)| tokens <= most));
                let targets: u64 = step.examples.iter().map(|&e| u64::from(sizes(rows)[e as usize].targets)).sum();
                prop_assert_eq!(step.target_tokens, targets);
            }
        }
        let all: Vec<u32> = (1..=plan.steps()).flat_map(|s| plan.step(s).examples).collect();
        prop_assert_eq!(plan.committed_rows(plan.steps()), all);
        prop_assert_eq!(plan.totals().unwrap().examples, rows as u64 * epochs);
    }
}

#[test]
fn steps_override_epochs_and_wrap_into_the_next() {
    let train = Train { steps: Some(5), ..train(4, 2) };
    let plan = Plan::new(Arc::new(sizes(10)), reversed(10), &train, COST).unwrap();
    assert_eq!(plan.step(3).examples, [8, 9]);
    assert_eq!((plan.step(4).epoch, plan.step(4).examples), (1, vec![9, 8, 7, 6]));
    assert_eq!(plan.place_after(3), (1, 0));
    assert_eq!(plan.place_after(4), (1, 4));
}

#[test]
fn bad_values_are_refused_by_name() {
    let refuse = |sizes: Vec<Size>, train: Train| {
        let rows = sizes.len();
        Plan::new(Arc::new(sizes), reversed(rows), &train, COST).err().unwrap().to_string()
    };
    assert!(refuse(vec![], train(4, 2)).contains("[[data]]"));
    assert!(refuse(sizes(3), train(0, 2)).contains("train.global_batch_size = 0"));
    assert!(refuse(sizes(3), train(4, 0)).contains("train.micro_batches = 0"));
    assert!(refuse(sizes(3), Train { epochs: 0, ..train(4, 2) }).contains("train.epochs = 0"));
    let long = vec![Size { tokens: 300, targets: 1, task: 0 }];
    assert!(refuse(long, train(4, 2)).contains("to at least 300"));
}

/// Rows of which every one in `gone` is left out, and whose sizes are not known at first.
struct Holes {
    sizes: Vec<Size>,
    gone: BTreeSet<u32>,
    known: bool,
}

impl Rows for Holes {
    fn count(&self) -> usize {
        self.sizes.len()
    }

    fn size(&self, row: u32) -> Option<Size> {
        (!self.gone.contains(&row)).then(|| self.sizes[row as usize])
    }

    fn is_left_out(&self, row: u32) -> bool {
        self.gone.contains(&row)
    }

    fn all_known(&self) -> bool {
        self.known
    }
}

fn holes(rows: usize, gone: &BTreeSet<u32>, known: bool) -> Arc<Holes> {
    Arc::new(Holes { sizes: sizes(rows), gone: gone.clone(), known })
}

proptest! {
    #[test]
    fn what_is_known_at_the_start_changes_no_step(
        rows in 2usize..80, batch in 1usize..12, bins in 1usize..5, gone in prop::collection::btree_set(1u32..80, 0..40),
    ) {
        let train = Train { epochs: 2, max_length: 98, ..train(batch, bins) };
        let early = Plan::new(holes(rows, &gone, true), reversed(rows), &train, COST).unwrap();
        let late = Plan::new(holes(rows, &gone, false), reversed(rows), &train, COST).unwrap();
        prop_assert_eq!((early.steps(), late.totals()), (late.steps(), None));
        let (exact, permitted) = (early.worst(), late.worst());
        prop_assert_eq!(exact.micro_batches, permitted.micro_batches);
        prop_assert!(exact.tokens <= permitted.tokens && exact.document <= permitted.document);
        for step in 1..=early.steps() {
            let dealt = late.step(step);
            prop_assert!(dealt.micro_batches.len() <= permitted.micro_batches as usize);
            prop_assert!(!dealt.examples.is_empty() && dealt.examples.iter().all(|row| !gone.contains(row)));
            prop_assert_eq!(early.step(step), dealt);
        }
    }

    #[test]
    fn whatever_is_left_out_later_nothing_is_larger_than_was_planned_for(
        rows in 4usize..120, batch in 4usize..30, bins in 1usize..8, max in 98usize..256,
        gone in prop::collection::btree_set(0u32..120, 1..60), from in 1u64..6,
    ) {
        let on_bad_numbers = OnBadNumbers::Quarantine;
        let train = Train { epochs: 2, on_bad_numbers, max_tokens_per_micro_batch: max, ..train(batch, bins) };
        let plan = Plan::new(Arc::new(sizes(rows)), reversed(rows), &train, COST).unwrap();
        let left_out: Vec<u32> = gone.into_iter().filter(|&row| (row as usize) < rows - 1).collect();
        plan.quarantine(from, &left_out);
        let worst = plan.worst();
        for step in 1..=plan.steps() {
            let dealt = plan.step(step);
            let mut tokens: Vec<u32> = dealt.micro_batches.iter().map(|m| m.tokens).collect();
            tokens.sort_unstable_by(|a, b| b.cmp(a));
            prop_assert!(tokens.len() <= plan.sizes().len() && tokens.len() <= worst.micro_batches as usize);
            prop_assert!(tokens.iter().zip(plan.sizes()).all(|(tokens, most)| tokens <= most));
            prop_assert!(tokens[0] <= worst.tokens);
            prop_assert!(dealt.micro_batches.iter().all(|m| m.rows.len() <= worst.documents as usize));
            prop_assert!(dealt.examples.iter().all(|&e| sizes(rows)[e as usize].tokens <= worst.document));
        }
    }

    #[test]
    fn rows_left_out_are_recalled(
        rows in 2usize..60, batch in 1usize..9, gone in prop::collection::btree_set(1u32..60, 0..30), wrong: u16,
    ) {
        let train = Train { epochs: 2, ..train(batch, 2) };
        let plan = Plan::new(holes(rows, &gone, true), reversed(rows), &train, COST).unwrap();
        let id = |row: u32| u64::from(row) + 1000;
        let mut trained: Vec<u64> = plan.committed_rows(plan.steps()).into_iter().map(id).collect();
        let recalled = plan.recall(plan.steps(), &trained, id, |_| true).unwrap();
        let expected: Vec<u32> = gone.iter().copied().filter(|&row| (row as usize) < rows).collect();
        prop_assert_eq!(&recalled, &expected);
        prop_assert_eq!(plan.recall(plan.steps(), &trained, id, |_| false).is_some(), expected.is_empty());
        let at = wrong as usize % trained.len();
        trained[at] += 100_000;
        prop_assert_eq!(plan.recall(plan.steps(), &trained, id, |_| true), None);
    }
}

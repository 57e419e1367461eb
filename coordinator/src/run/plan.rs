//! The plan of a training run: which rows every step trains on and how they are dealt into micro-batches. A pure
//! function of the rows' sizes, the `[train]` table and the model's shape; nothing about the cluster enters.

use super::cost::CostModel;
use super::deal::{deal, Document};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use unisono_configs::run::Train;

/// More would not fit the 1 MiB that a micro-batch may take on the wire.
pub const MAX_TOKENS: usize = 120_000;

/// Epoch orders kept: steps are asked for near each other, so the running epoch and its neighbour suffice.
const ORDERS_KEPT: usize = 2;

/// Why a plan cannot be made. Each is one sentence for a person.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    #[error("no row is left to train on; check the files under [[data]] and the shares under [split]")]
    NoRows,
    #[error("train.{key} = {value} must be {demand}")]
    Value { key: &'static str, value: String, demand: String },
    #[error("{suite} row {row} has {tokens} tokens, more than train.max_tokens_per_micro_batch = {max}; set max_tokens_per_micro_batch to at least {tokens}, or max_length to at most {max}")]
    TooLong { suite: &'static str, row: usize, tokens: u32, max: usize },
}

/// What the plan needs to know of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Tokens fed to the model.
    pub tokens: u32,
    /// Completion tokens asked of it, at least 1.
    pub targets: u32,
    /// Index of its `[[data]]` table.
    pub task: u32,
}

/// Row indexes of an epoch (from 0) in training order: a pure function of the seed.
pub type Order = Arc<dyn Fn(u64) -> Vec<u32> + Send + Sync>;

/// Which rows each step trains on. Steps are dealt when asked for; nothing is kept per step.
pub struct Plan {
    sizes: Vec<Size>,
    order: Order,
    orders: Mutex<VecDeque<(u64, Arc<Vec<u32>>)>>,
    cost: CostModel,
    batch: usize,
    micro_batches: usize,
    max_tokens: u32,
    steps: u64,
    worst: Worst,
    totals: Totals,
}

/// The largest that any step of the plan brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Worst {
    /// Tokens of the largest micro-batch.
    pub tokens: u32,
    /// Tokens of the longest document.
    pub document: u32,
    /// Micro-batches of the step that has most.
    pub micro_batches: u32,
}

/// Sums over the whole plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub examples: u64,
    pub tokens: u64,
    pub target_tokens: u64,
}

impl Worst {
    pub fn join(self, other: Worst) -> Worst {
        Worst {
            tokens: self.tokens.max(other.tokens),
            document: self.document.max(other.document),
            micro_batches: self.micro_batches.max(other.micro_batches),
        }
    }
}

/// One global batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Counts from 1.
    pub step: u64,
    /// Counts from 0.
    pub epoch: u64,
    /// Place of the first example within the epoch.
    pub position: u64,
    /// Training rows in the order of the epoch.
    pub examples: Vec<u32>,
    pub micro_batches: Vec<MicroBatch>,
    pub tokens: u64,
    pub target_tokens: u64,
}

/// Rows packed side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Row indexes, in the order in which they are packed.
    pub rows: Vec<u32>,
    pub tokens: u32,
    pub targets: u32,
    pub cost: u64,
}

impl Plan {
    /// Plans the whole run and walks it once to find its worst micro-batch.
    pub fn new(sizes: Vec<Size>, order: Order, train: &Train, cost: CostModel) -> Result<Self, Error> {
        let max_tokens = limits(train)?;
        if sizes.is_empty() {
            return Err(Error::NoRows);
        }
        fits("training", &sizes, train.max_tokens_per_micro_batch)?;
        let per_epoch = sizes.len().div_ceil(train.global_batch_size) as u64;
        let steps = train.steps.unwrap_or_else(|| train.epochs.saturating_mul(per_epoch));
        if steps == 0 {
            let key = if train.steps.is_some() { "steps" } else { "epochs" };
            return Err(Error::Value { key, value: "0".into(), demand: "at least 1".into() });
        }
        let mut plan = Plan {
            sizes,
            order,
            orders: Mutex::default(),
            cost,
            batch: train.global_batch_size,
            micro_batches: train.micro_batches,
            max_tokens,
            steps,
            worst: Worst::default(),
            totals: Totals::default(),
        };
        for step in 1..=steps {
            let dealt = plan.step(step);
            plan.totals.examples += dealt.examples.len() as u64;
            plan.totals.tokens += dealt.tokens;
            plan.totals.target_tokens += dealt.target_tokens;
            plan.worst = plan.worst.join(Worst {
                tokens: dealt.micro_batches.iter().map(|m| m.tokens).max().unwrap_or(0),
                document: dealt.examples.iter().map(|&e| plan.sizes[e as usize].tokens).max().unwrap_or(0),
                micro_batches: dealt.micro_batches.len() as u32,
            });
        }
        Ok(plan)
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.sizes.len().div_ceil(self.batch) as u64
    }

    pub fn rows(&self) -> usize {
        self.sizes.len()
    }

    pub fn worst(&self) -> Worst {
        self.worst
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The global batch of `step` (from 1 to [`Plan::steps`]).
    pub fn step(&self, step: u64) -> StepPlan {
        assert!((1..=self.steps).contains(&step), "step {step} lies outside a plan of {} steps", self.steps);
        let (epoch, position) = self.place(step);
        let order = self.epoch_order(epoch);
        let end = (position as usize + self.batch).min(order.len());
        let examples = order[position as usize..end].to_vec();
        let micro_batches = pack_rows(&self.sizes, &examples, self.micro_batches, self.max_tokens, self.cost);
        let tokens = micro_batches.iter().map(|m| u64::from(m.tokens)).sum();
        let target_tokens = micro_batches.iter().map(|m| u64::from(m.targets)).sum();
        StepPlan { step, epoch, position, examples, micro_batches, tokens, target_tokens }
    }

    /// Epoch and place of the first example that has not been trained on after `steps` steps.
    pub fn place_after(&self, steps: u64) -> (u64, u64) {
        self.place(steps + 1)
    }

    /// Training rows of steps 1 to `steps`, in the order in which they were trained on.
    pub fn committed_rows(&self, steps: u64) -> Vec<u64> {
        (1..=steps)
            .flat_map(|step| {
                let (epoch, position) = self.place(step);
                let order = self.epoch_order(epoch);
                let end = (position as usize + self.batch).min(order.len());
                order[position as usize..end].iter().map(|&row| u64::from(row)).collect::<Vec<_>>()
            })
            .collect()
    }

    fn place(&self, step: u64) -> (u64, u64) {
        let per_epoch = self.steps_per_epoch();
        ((step - 1) / per_epoch, (step - 1) % per_epoch * self.batch as u64)
    }

    fn epoch_order(&self, epoch: u64) -> Arc<Vec<u32>> {
        let mut orders = self.orders.lock().expect("nobody panics while holding it");
        if let Some((_, order)) = orders.iter().find(|(kept, _)| *kept == epoch) {
            return order.clone();
        }
        let order = Arc::new((self.order)(epoch));
        assert_eq!(order.len(), self.sizes.len(), "an epoch trains on every row once");
        if orders.len() == ORDERS_KEPT {
            orders.pop_front();
        }
        orders.push_back((epoch, order.clone()));
        order
    }
}

/// Checks the limits that every dealing needs; returns the cap on tokens.
pub(super) fn limits(train: &Train) -> Result<u32, Error> {
    let value = |key, value: usize, demand: &str| Error::Value { key, value: value.to_string(), demand: demand.into() };
    if train.global_batch_size == 0 {
        return Err(value("global_batch_size", 0, "at least 1"));
    }
    if train.micro_batches == 0 {
        return Err(value("micro_batches", 0, "at least 1"));
    }
    let max = train.max_tokens_per_micro_batch;
    if max == 0 || max > MAX_TOKENS {
        return Err(value("max_tokens_per_micro_batch", max, &format!("between 1 and {MAX_TOKENS}")));
    }
    Ok(max as u32)
}

/// Refuses rows that are longer than a micro-batch may be.
pub(super) fn fits(suite: &'static str, sizes: &[Size], max: usize) -> Result<(), Error> {
    match sizes.iter().position(|size| size.tokens as usize > max) {
        Some(row) => Err(Error::TooLong { suite, row, tokens: sizes[row].tokens, max }),
        None => Ok(()),
    }
}

fn pack_rows(sizes: &[Size], rows: &[u32], bins: usize, max_tokens: u32, cost: CostModel) -> Vec<MicroBatch> {
    let document = |row: &u32| {
        let size = sizes[*row as usize];
        Document { tokens: size.tokens, cost: cost.document(size.tokens, size.targets) }
    };
    let documents: Vec<Document> = rows.iter().map(document).collect();
    let dealt = deal(&documents, bins, max_tokens);
    dealt
        .into_iter()
        .map(|bin| MicroBatch::new(sizes, bin.into_iter().map(|i| rows[i as usize]).collect(), cost))
        .collect()
}

impl MicroBatch {
    /// Sums the sizes of `rows`.
    pub(super) fn new(sizes: &[Size], rows: Vec<u32>, cost: CostModel) -> Self {
        let mut micro_batch = MicroBatch { rows: Vec::new(), tokens: 0, targets: 0, cost: 0 };
        for size in rows.iter().map(|&row| sizes[row as usize]) {
            micro_batch.tokens += size.tokens;
            micro_batch.targets += size.targets;
            micro_batch.cost += cost.document(size.tokens, size.targets);
        }
        micro_batch.rows = rows;
        micro_batch
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub const COST: CostModel = CostModel { token: 1000, pair: 3, target: 500 };

    pub fn sizes(rows: usize) -> Vec<Size> {
        let size = |i: u32| Size { tokens: 8 + i * 37 % 90, targets: 1 + i % 7, task: i % 3 };
        (0..rows as u32).map(size).collect()
    }

    pub fn reversed(rows: usize) -> Order {
        Arc::new(move |epoch| {
            let forward = 0..rows as u32;
            if epoch % 2 == 0 {
                forward.collect()
            } else {
                forward.rev().collect()
            }
        })
    }

    pub fn train(batch: usize, micro_batches: usize) -> Train {
        Train { global_batch_size: batch, micro_batches, max_tokens_per_micro_batch: 256, ..Train::default() }
    }

    proptest! {
        #[test]
        fn an_epoch_trains_on_every_row_once(rows in 1usize..150, batch in 1usize..40, bins in 1usize..10, epochs in 1u64..4) {
            let train = Train { epochs, ..train(batch, bins) };
            let plan = Plan::new(sizes(rows), reversed(rows), &train, COST).unwrap();
            prop_assert_eq!(plan.steps(), epochs * rows.div_ceil(batch) as u64);
            for epoch in 0..epochs {
                let steps: Vec<StepPlan> = (1..=plan.steps()).map(|s| plan.step(s)).filter(|s| s.epoch == epoch).collect();
                let trained: Vec<u32> = steps.iter().flat_map(|s| s.examples.clone()).collect();
                prop_assert_eq!(&trained, &reversed(rows)(epoch));
                for step in &steps {
                    let mut dealt: Vec<u32> = step.micro_batches.iter().flat_map(|m| m.rows.clone()).collect();
                    dealt.sort_unstable();
                    let mut examples = step.examples.clone();
                    examples.sort_unstable();
                    prop_assert_eq!(dealt, examples);
                    prop_assert!(step.micro_batches.len() >= bins.min(step.examples.len()));
                    prop_assert!(step.micro_batches.len() <= plan.worst().micro_batches as usize);
                    prop_assert!(step.micro_batches.iter().all(|m| m.tokens <= plan.worst().tokens && m.tokens <= 256));
                    let targets: u64 = step.examples.iter().map(|&e| u64::from(sizes(rows)[e as usize].targets)).sum();
                    prop_assert_eq!(step.target_tokens, targets);
                }
            }
            let all: Vec<u64> = (1..=plan.steps()).flat_map(|s| plan.step(s).examples).map(u64::from).collect();
            prop_assert_eq!(plan.committed_rows(plan.steps()), all);
            prop_assert_eq!(plan.totals().examples, rows as u64 * epochs);
        }
    }

    #[test]
    fn steps_override_epochs_and_wrap_into_the_next() {
        let train = Train { steps: Some(5), ..train(4, 2) };
        let plan = Plan::new(sizes(10), reversed(10), &train, COST).unwrap();
        assert_eq!(plan.step(3).examples, [8, 9]);
        assert_eq!((plan.step(4).epoch, plan.step(4).examples), (1, vec![9, 8, 7, 6]));
        assert_eq!(plan.place_after(3), (1, 0));
        assert_eq!(plan.place_after(4), (1, 4));
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let refuse = |sizes: Vec<Size>, train: Train| {
            let rows = sizes.len();
            Plan::new(sizes, reversed(rows), &train, COST).err().unwrap().to_string()
        };
        assert!(refuse(vec![], train(4, 2)).contains("[[data]]"));
        assert!(refuse(sizes(3), train(0, 2)).contains("train.global_batch_size = 0"));
        assert!(refuse(sizes(3), train(4, 0)).contains("train.micro_batches = 0"));
        assert!(refuse(sizes(3), Train { epochs: 0, ..train(4, 2) }).contains("train.epochs = 0"));
        let long = vec![Size { tokens: 300, targets: 1, task: 0 }];
        assert!(refuse(long, train(4, 2)).contains("to at least 300"));
    }
}

//! The order of a run's training rows: the epochs that `[mix]` and `train.shuffle` ask for.

use super::dataset::Dataset;
use super::mix::{rate, shares, Mix, Task};
use super::shuffle::order;
use crate::run::plan::{Order, Rows};
use std::sync::Arc;
use unisono_configs::run::{Mixing, RunConfig, Unit};

/// The shares of the tasks in an epoch, in `mix.unit`; `None` where every row occurs once.
pub fn planned_shares(dataset: &Dataset, config: &RunConfig) -> Option<Vec<f64>> {
    let tasks = tasks(dataset, config)?;
    let rates: Vec<f64> = tasks.iter().map(|task| if task.rows.is_empty() { 0.0 } else { task.rate }).collect();
    Some(shares(&rates))
}

/// The tasks with their rates; `None` where every row occurs once.
fn tasks(dataset: &Dataset, config: &RunConfig) -> Option<Vec<Task>> {
    let mix = &config.mix;
    if mix.by == Mixing::All {
        return None;
    }
    let mut tasks: Vec<Task> = config.data.iter().map(|data| Task { rows: Vec::new(), rate: data.weight }).collect();
    (0..dataset.train_rows() as u32).for_each(|row| tasks[dataset.task_of(row)].rows.push(row));
    for task in &mut tasks {
        let count = task.rows.len();
        task.rate = match mix.by {
            Mixing::Proportional => rate(count, cap(config), 1.0),
            Mixing::Temperature => rate(count, cap(config), mix.temperature),
            Mixing::All | Mixing::Weights => task.rate,
        };
    }
    Some(tasks)
}

fn cap(config: &RunConfig) -> Option<u64> {
    (config.mix.cap > 0).then_some(config.mix.cap)
}

/// The order of the rows of `dataset` as `config` has it.
pub fn ordering(dataset: &Dataset, config: &RunConfig) -> Order {
    let (seed, rows, shuffle) = (config.train.seed, dataset.train_rows(), config.train.shuffle);
    let Some(tasks) = tasks(dataset, config) else {
        return Order { length: rows, epoch: Arc::new(move |epoch| order(seed, epoch, rows, shuffle)) };
    };
    let mix = &config.mix;
    let counts = tasks.iter().map(|task| task.rows.len() as u64);
    let length: u64 = match (mix.examples, mix.by, cap(config)) {
        (0, Mixing::Weights, _) | (0, _, None) => counts.sum(),
        (0, _, Some(cap)) => counts.map(|count| count.min(cap)).sum(),
        (examples, ..) => examples,
    };
    let costs = match mix.unit {
        Unit::Examples => Vec::new(),
        // Known by now: all rows were tokenized because of it.
        Unit::CompletionTokens => {
            (0..rows as u32).map(|row| dataset.size(row).map_or(0, |size| size.targets)).collect()
        }
    };
    let mixed = Mix::new(tasks, length as usize, seed, shuffle, costs);
    Order { length: mixed.length(), epoch: Arc::new(move |epoch| mixed.epoch(epoch)) }
}

//! How often each task occurs in an epoch: a pure function of the tasks' sizes, the `[mix]` table and the seed.
//!
//! With `e_m` training rows of task m:
//!
//! - proportional with a cap K: `r_m = min(e_m, K)`, the examples-proportional mixing of T5 (Raffel et al. 2020, section
//!   3.5.2) and FLAN (Wei et al. 2022, section 2.1, K = 3,000);
//! - temperature T: `r_m = min(e_m, K)^(1/T)`, T5's temperature-scaled mixing; T = 1 is proportional, a large T equal;
//! - weights: `r_m` is the table's own `data.weight`.
//!
//! Shares are `r_m / sum r`, of examples or of completion tokens. An epoch is filled by deficit: each place goes to the
//! task that is furthest behind its share, which is within one row of it throughout (a stride scheduler; for examples its
//! counts are a largest-remainder apportionment). Which row of the task it is follows from the task's own passes: each
//! pass brings every row once in an order of its own, and goes on where the epoch before ended. So a small task repeats
//! and a large one is subsampled, without a row coming twice before all have come once.

use super::shuffle::order;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;

/// Tells a task's passes from the order of an epoch: they must not be alike.
const PASSES: u64 = 0x7061_7373;

/// One task.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Indexes of its training rows.
    pub rows: Vec<u32>,
    /// Its part of an epoch, in any unit.
    pub rate: f64,
}

/// Mixes tasks into epochs.
pub struct Mix {
    tasks: Vec<Task>,
    /// Examples of an epoch.
    length: usize,
    seed: u64,
    shuffle: bool,
    /// What each row counts towards its task's share; empty: each row one.
    costs: Vec<u32>,
    /// For each epoch that is known, how many rows of each task came before it.
    before: Mutex<Vec<Vec<u64>>>,
}

/// The shares that rates stand for.
pub fn shares(rates: &[f64]) -> Vec<f64> {
    let sum: f64 = rates.iter().sum();
    rates.iter().map(|rate| rate / sum).collect()
}

/// min(rows, cap)^(1/temperature).
pub fn rate(rows: usize, cap: Option<u64>, temperature: f64) -> f64 {
    let capped = cap.map_or(rows as u64, |cap| cap.min(rows as u64));
    (capped as f64).powf(temperature.recip())
}

impl Mix {
    /// Tasks without rows or rate never occur.
    pub fn new(tasks: Vec<Task>, length: usize, seed: u64, shuffle: bool, costs: Vec<u32>) -> Self {
        let before = Mutex::new(vec![vec![0; tasks.len()]]);
        Mix { tasks, length, seed, shuffle, costs, before }
    }

    pub fn length(&self) -> usize {
        self.length
    }

    /// The rows of an epoch (from 0) in training order.
    pub fn epoch(&self, epoch: u64) -> Vec<u32> {
        let mut before = self.before.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while before.len() as u64 <= epoch + 1 {
            let at = before.len() as u64 - 1;
            let (rows, after) = self.fill(&before[before.len() - 1]);
            before.push(after);
            if at == epoch {
                return self.arrange(epoch, rows);
            }
        }
        let (rows, _) = self.fill(&before[epoch as usize]);
        self.arrange(epoch, rows)
    }

    fn arrange(&self, epoch: u64, rows: Vec<u32>) -> Vec<u32> {
        order(self.seed, epoch, rows.len(), self.shuffle).into_iter().map(|i| rows[i as usize]).collect()
    }

    /// The rows of the epoch before which `before` rows of each task have come, and how many have come after it.
    fn fill(&self, before: &[u64]) -> (Vec<u32>, Vec<u64>) {
        let rates: Vec<f64> = self.tasks.iter().map(|t| if t.rows.is_empty() { 0.0 } else { t.rate }).collect();
        let shares = shares(&rates);
        let mut streams: Vec<Stream<'_>> =
            (0..).zip(&self.tasks).zip(before).map(|((index, task), &at)| Stream::new(self, index, task, at)).collect();
        // What a task has had, divided by its share: the lowest is furthest behind. A half in advance makes the counts of
        // examples those of the largest remainders rather than of the first tasks.
        let behind = |had: f64, share: f64| Key((had + 0.5) / share);
        let mut queue: BinaryHeap<Reverse<(Key, usize)>> = BinaryHeap::new();
        let mut had = vec![0.0; self.tasks.len()];
        for (index, &share) in shares.iter().enumerate().filter(|(_, &share)| share > 0.0) {
            queue.push(Reverse((behind(0.0, share), index)));
        }
        let mut rows = Vec::with_capacity(self.length);
        while rows.len() < self.length {
            let Some(Reverse((_, index))) = queue.pop() else { break };
            let row = streams[index].next();
            rows.push(row);
            had[index] += self.costs.get(row as usize).map_or(1.0, |&cost| f64::from(cost));
            queue.push(Reverse((behind(had[index], shares[index]), index)));
        }
        (rows, streams.iter().map(|stream| stream.at).collect())
    }
}

/// A finite number in order.
#[derive(PartialEq)]
struct Key(f64);

impl Eq for Key {}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A task's rows, pass after pass.
struct Stream<'m> {
    mix: &'m Mix,
    index: u64,
    task: &'m Task,
    /// Rows that have come.
    at: u64,
    pass: Vec<u32>,
}

impl<'m> Stream<'m> {
    fn new(mix: &'m Mix, index: u64, task: &'m Task, at: u64) -> Self {
        let mut this = Stream { mix, index, task, at, pass: Vec::new() };
        if !task.rows.is_empty() {
            this.turn();
        }
        this
    }

    /// The order of the pass that the next row belongs to.
    fn turn(&mut self) {
        let pass = self.at / self.task.rows.len() as u64;
        let seed = self.mix.seed ^ PASSES.rotate_left(self.index as u32 % 64).wrapping_mul(2 * self.index + 1);
        self.pass = order(seed, pass, self.task.rows.len(), self.mix.shuffle);
    }

    fn next(&mut self) -> u32 {
        let count = self.task.rows.len() as u64;
        let row = self.task.rows[self.pass[(self.at % count) as usize] as usize];
        self.at += 1;
        if self.at.is_multiple_of(count) {
            self.turn();
        }
        row
    }
}

#[cfg(test)]
#[path = "mix_tests.rs"]
mod tests;

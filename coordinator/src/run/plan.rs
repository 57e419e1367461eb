//! The plan of a training run: which rows every step trains on and how they are dealt into micro-batches. A pure
//! function of the rows' sizes, the `[train]` table and the model's shape; nothing about the cluster enters.

use super::bounds::{self, fits, limits};
use super::cost::CostModel;
use super::deal::{deal, Document};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use unisono_configs::run::Train;

/// More would not fit the 1 MiB that a micro-batch may take on the wire.
pub const MAX_TOKENS: usize = 120_000;

/// Epoch orders kept: steps are asked for near each other, so the running epoch and its neighbour suffice.
const ORDERS_KEPT: usize = 2;

/// Dealt steps kept: workers ask for their micro-batches of the few steps under way, one by one.
const STEPS_KEPT: usize = 8;

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

/// The training rows, as far as a plan has to know them. What they answer is a pure function of the rows: a size that is
/// asked for early makes the caller wait, no more.
pub trait Rows: Send + Sync {
    /// How many there are, those that are left out included.
    fn count(&self) -> usize;
    /// `None`: the row cannot be trained on and is left out. Waits until the row is tokenized.
    fn size(&self, row: u32) -> Option<Size>;
    /// Whether the row is known to be left out. Never waits.
    fn is_left_out(&self, row: u32) -> bool;
    /// Whether every size is known, so that asking for all of them costs nothing.
    fn all_known(&self) -> bool;
}

impl Rows for Vec<Size> {
    fn count(&self) -> usize {
        self.len()
    }

    fn size(&self, row: u32) -> Option<Size> {
        Some(self[row as usize])
    }

    fn is_left_out(&self, _: u32) -> bool {
        false
    }

    fn all_known(&self) -> bool {
        true
    }
}

/// The rows of each epoch in training order: a pure function of the seed and, where tasks are mixed, of the rows.
#[derive(Clone)]
pub struct Order {
    /// Rows of an epoch, alike for all.
    pub length: usize,
    /// Row indexes of an epoch (from 0).
    pub epoch: Arc<dyn Fn(u64) -> Vec<u32> + Send + Sync>,
}

/// Which rows each step trains on. Steps are dealt when asked for; nothing is kept per step.
pub struct Plan {
    rows: Arc<dyn Rows>,
    order: Order,
    orders: Mutex<VecDeque<(u64, Arc<Vec<u32>>)>>,
    /// The steps asked for last.
    dealt: Mutex<VecDeque<Arc<StepPlan>>>,
    cost: CostModel,
    batch: usize,
    micro_batches: usize,
    max_tokens: u32,
    steps: u64,
    worst: Worst,
    sizes: Vec<u32>,
    totals: Option<Totals>,
    /// Rows that are left out from a step on.
    quarantined: Mutex<BTreeMap<u32, u64>>,
    /// How often that has grown.
    quarantines: AtomicU64,
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
    /// Documents of the micro-batch that has most.
    pub documents: u32,
    /// Positions of all prompts that are continued side by side, with what may follow them.
    pub positions: u64,
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
            documents: self.documents.max(other.documents),
            positions: self.positions.max(other.positions),
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
    /// Plans the whole run. Where all sizes are known, it is walked once to find its worst micro-batch and its totals;
    /// else the worst is what the configuration permits. Neither changes what a step consists of.
    pub fn new(rows: Arc<dyn Rows>, order: Order, train: &Train, cost: CostModel) -> Result<Self, Error> {
        let max_tokens = limits(train)?;
        if rows.count() == 0 || order.length == 0 {
            return Err(Error::NoRows);
        }
        let per_epoch = order.length.div_ceil(train.global_batch_size) as u64;
        let steps = train.steps.unwrap_or_else(|| train.epochs.saturating_mul(per_epoch));
        if steps == 0 {
            let key = if train.steps.is_some() { "steps" } else { "epochs" };
            return Err(Error::Value { key, value: "0".into(), demand: "at least 1".into() });
        }
        let mut plan = Plan {
            rows,
            order,
            orders: Mutex::default(),
            dealt: Mutex::default(),
            cost,
            batch: train.global_batch_size,
            micro_batches: train.micro_batches,
            max_tokens,
            steps,
            worst: bounds::permitted(train),
            sizes: Vec::new(),
            totals: None,
            quarantined: Mutex::default(),
            quarantines: AtomicU64::new(0),
        };
        if plan.rows.all_known() {
            plan.walk(train)?;
        }
        Ok(plan)
    }

    /// Finds the worst micro-batch and the totals.
    fn walk(&mut self, train: &Train) -> Result<(), Error> {
        let sizes: Vec<Option<Size>> = (0..self.rows.count() as u32).map(|row| self.rows.size(row)).collect();
        fits("training", sizes.iter().flatten(), train.max_tokens_per_micro_batch)?;
        let (mut worst, mut totals, mut most) = (Worst::default(), Totals::default(), Vec::new());
        let mut largest = 0;
        for step in 1..=self.steps {
            let dealt = self.step(step);
            if dealt.examples.is_empty() {
                return Err(Error::NoRows);
            }
            let mut tokens: Vec<u32> = dealt.micro_batches.iter().map(|m| m.tokens).collect();
            tokens.sort_unstable_by(|a, b| b.cmp(a));
            most.resize(tokens.len().max(most.len()), 0);
            most.iter_mut().zip(&tokens).for_each(|(most, tokens)| *most = *tokens.max(most));
            totals.examples += dealt.examples.len() as u64;
            totals.tokens += dealt.tokens;
            largest = dealt.tokens.max(largest);
            totals.target_tokens += dealt.target_tokens;
            let document = dealt.examples.iter().filter_map(|&e| sizes[e as usize]).map(|size| size.tokens).max();
            worst = worst.join(Worst {
                tokens: tokens.first().copied().unwrap_or(0),
                document: document.unwrap_or(0),
                documents: dealt.micro_batches.iter().map(|m| m.rows.len()).max().unwrap_or(0) as u32,
                ..Worst::default()
            });
        }
        // Bounds the magnitude of a leaf: whether one is refused must not depend on how much was known at the start.
        let micro_batches = self.worst.micro_batches;
        if train.may_leave_out() {
            let longest = sizes.iter().flatten().map(|size| size.tokens).max().unwrap_or(0);
            (worst, most) = bounds::dealt_again(train, micro_batches, longest, largest);
        }
        self.sizes = most;
        (self.worst, self.totals) = (Worst { micro_batches, ..worst }, Some(totals));
        Ok(())
    }

    /// Leaves `rows` out from `step` on, as rows are that cannot be trained on: their places stay empty.
    pub fn quarantine(&self, step: u64, rows: &[u32]) {
        let mut quarantined = self.quarantined.lock().expect("nobody panics while holding it");
        for &row in rows {
            let from = quarantined.entry(row).or_insert(step);
            *from = step.min(*from);
        }
        drop(quarantined);
        self.quarantines.fetch_add(1, Ordering::SeqCst);
        self.dealt.lock().expect("nobody panics while holding it").clear();
    }

    fn is_quarantined(&self, row: u32, step: u64) -> bool {
        let quarantined = self.quarantined.lock().expect("nobody panics while holding it");
        quarantined.get(&row).is_some_and(|&from| from <= step)
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.order.length.div_ceil(self.batch) as u64
    }

    /// The most tokens that a micro-batch may have.
    pub fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    /// The size of a row that is trained on. Waits until it is tokenized.
    pub fn size(&self, row: u32) -> Option<Size> {
        self.rows.size(row)
    }

    /// Exact where every size was known when the plan was made and no row may be left out of a step later; else an upper bound.
    pub fn worst(&self) -> Worst {
        self.worst
    }

    /// Tokens of the largest micro-batch of any step, of the second largest of any, and so on, or as many as they may have where
    /// rows may be left out; none where not every size was known when the plan was made.
    pub fn sizes(&self) -> &[u32] {
        &self.sizes
    }

    /// Known where every size was known when the plan was made.
    pub fn totals(&self) -> Option<Totals> {
        self.totals
    }

    /// The global batch of `step` (from 1 to [`Plan::steps`]). Waits for rows that are not tokenized yet. Without
    /// examples only where the whole epoch has none.
    pub fn step(&self, step: u64) -> StepPlan {
        assert!((1..=self.steps).contains(&step), "step {step} lies outside a plan of {} steps", self.steps);
        let (epoch, position) = self.place(step);
        let examples = self.examples(step, |row| self.rows.size(row).is_none());
        let sized = |&row: &u32| self.rows.size(row).map(|size| (row, size));
        let sized: Vec<(u32, Size)> = examples.iter().filter_map(sized).collect();
        let micro_batches = pack_rows(&sized, self.micro_batches, self.max_tokens, self.cost);
        let tokens = micro_batches.iter().map(|m| u64::from(m.tokens)).sum();
        let target_tokens = micro_batches.iter().map(|m| u64::from(m.targets)).sum();
        StepPlan { step, epoch, position, examples, micro_batches, tokens, target_tokens }
    }

    /// As [`Plan::step`], dealt once for all who ask for it in a row.
    pub fn dealt(&self, step: u64) -> Arc<StepPlan> {
        let kept = || self.dealt.lock().expect("nobody panics while holding it");
        loop {
            if let Some(plan) = kept().iter().find(|plan| plan.step == step) {
                return plan.clone();
            }
            let quarantines = self.quarantines.load(Ordering::SeqCst);
            let plan = Arc::new(self.step(step));
            let mut kept = kept();
            // Rows that were left out meanwhile are not brought back.
            if self.quarantines.load(Ordering::SeqCst) == quarantines {
                if kept.len() == STEPS_KEPT {
                    kept.pop_front();
                }
                kept.push_back(plan.clone());
                return plan;
            }
        }
    }

    /// The rows at the places of `step`, those that are left out included.
    pub fn places(&self, step: u64) -> Vec<u32> {
        let (epoch, position) = self.place(step);
        let order = self.epoch_order(epoch);
        let end = (position as usize + self.batch).min(order.len());
        order[position as usize..end].to_vec()
    }

    /// The rows at the places of a `step` of which all are left out, and those after them up to one that is not. Waits.
    pub fn reach(&self, step: u64) -> Vec<u32> {
        let mut rows = self.places(step);
        for row in self.following(step) {
            rows.push(row);
            if !self.is_quarantined(row, step) && self.rows.size(row).is_some() {
                break;
            }
        }
        rows
    }

    /// The rows after the places of `step`, to the end of its epoch and around.
    fn following(&self, step: u64) -> impl Iterator<Item = u32> {
        let (epoch, position) = self.place(step);
        let order = self.epoch_order(epoch);
        let (length, first) = (order.len(), (position as usize + self.batch).min(order.len()));
        (0..length).map(move |i| order[(first + i) % length])
    }

    /// The rows of `step` that are trained on. A row that is left out leaves its place empty; a step without any row takes
    /// the next one of its epoch, so that every step has an update.
    fn examples(&self, step: u64, is_left_out: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut rows = self.places(step);
        let is_left_out = |row: u32| self.is_quarantined(row, step) || is_left_out(row);
        rows.retain(|&row| !is_left_out(row));
        if rows.is_empty() {
            rows.extend(self.following(step).find(|&row| !is_left_out(row)));
        }
        rows
    }

    /// Epoch and place of the first example that has not been trained on after `steps` steps.
    pub fn place_after(&self, steps: u64) -> (u64, u64) {
        self.place(steps + 1)
    }

    /// Training rows of steps 1 to `steps`, in the order in which they were trained on. Never waits: rows of committed
    /// steps that are left out are known to be.
    pub fn committed_rows(&self, steps: u64) -> Vec<u32> {
        (1..=steps).flat_map(|step| self.examples(step, |row| self.rows.is_left_out(row))).collect()
    }

    /// The rows that were left out of steps 1 to `steps`, given what those steps were `trained` on, in order; `None` where
    /// this plan cannot have led to it. `id` names a row as `trained` does; `may_drop` tells whether it may be left out.
    pub fn recall(
        &self,
        steps: u64,
        trained: &[u64],
        id: impl Fn(u32) -> u64,
        may_drop: impl Fn(u32) -> bool,
    ) -> Option<Vec<u32>> {
        let (mut left_out, mut trained) = (BTreeSet::new(), trained.iter().peekable());
        for step in 1..=steps {
            let mut taken = 0;
            for row in self.places(step).into_iter().filter(|&row| !self.is_quarantined(row, step)) {
                match trained.next_if(|&&next| next == id(row)) {
                    Some(_) if left_out.contains(&row) => return None,
                    Some(_) => taken += 1,
                    None if may_drop(row) => drop(left_out.insert(row)),
                    None => return None,
                }
            }
            if taken == 0 {
                let next = *trained.next()?;
                let mut passed: Vec<u32> = self.following(step).take_while(|&row| id(row) != next).collect();
                if passed.len() == self.order.length {
                    return None;
                }
                passed.retain(|&row| !self.is_quarantined(row, step));
                if !passed.iter().all(|&row| may_drop(row)) {
                    return None;
                }
                left_out.extend(passed);
            }
        }
        trained.next().is_none().then(|| left_out.into_iter().collect())
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
        let order = Arc::new((self.order.epoch)(epoch));
        assert_eq!(order.len(), self.order.length, "epochs are equally long");
        if orders.len() == ORDERS_KEPT {
            orders.pop_front();
        }
        orders.push_back((epoch, order.clone()));
        order
    }
}

fn pack_rows(rows: &[(u32, Size)], bins: usize, max_tokens: u32, cost: CostModel) -> Vec<MicroBatch> {
    let document =
        |(_, size): &(u32, Size)| Document { tokens: size.tokens, cost: cost.document(size.tokens, size.targets) };
    let documents: Vec<Document> = rows.iter().map(document).collect();
    let dealt = deal(&documents, bins, max_tokens);
    dealt.into_iter().map(|bin| MicroBatch::new(bin.into_iter().map(|i| rows[i as usize]), cost)).collect()
}

impl MicroBatch {
    /// Sums the sizes of `rows`.
    pub(super) fn new(rows: impl IntoIterator<Item = (u32, Size)>, cost: CostModel) -> Self {
        let mut micro_batch = MicroBatch { rows: Vec::new(), tokens: 0, targets: 0, cost: 0 };
        for (row, size) in rows {
            micro_batch.rows.push(row);
            micro_batch.tokens += size.tokens;
            micro_batch.targets += size.targets;
            micro_batch.cost += cost.document(size.tokens, size.targets);
        }
        micro_batch
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;

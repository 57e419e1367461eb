//! What earlier starts of the coordinator put into the ledger. A step that was committed after the checkpoint is computed
//! again: it must give the same loss and norm, to the bit, and says nothing a second time.

use super::program::Program;
use std::collections::BTreeMap;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{Evaluated, Fingerprint, Quarantined, StepCommitted};

/// What counts of a committed step when it is computed again.
#[derive(Debug, Clone, Copy)]
struct Known {
    loss: f64,
    grad_norm: f64,
    lr: f64,
    tokens: u64,
}

impl Known {
    fn of(step: &StepCommitted) -> Self {
        Known { loss: step.loss, grad_norm: step.grad_norm, lr: step.lr, tokens: step.tokens }
    }

    fn bits(&self) -> (u64, u64) {
        (self.loss.to_bits(), self.grad_norm.to_bits())
    }
}

#[derive(Debug, Clone, Default)]
pub struct Recorded {
    generation: u64,
    /// The arithmetic of the newest generation that told it.
    fingerprint: Option<Fingerprint>,
    steps: BTreeMap<u64, Known>,
    /// By step, split and task.
    evaluations: BTreeMap<(u64, String, String), Evaluated>,
    /// In the order of the ledger.
    quarantined: Vec<Quarantined>,
}

impl Recorded {
    /// Takes the next entry of the ledger.
    pub fn note(&mut self, entry: &Entry) {
        match entry {
            Entry::Step(step) => {
                // A step is recorded again only when it was another one: whatever followed the old one is history.
                self.steps.split_off(&step.step);
                self.evaluations.retain(|(at, ..), _| *at < step.step);
                self.steps.insert(step.step, Known::of(step));
            }
            Entry::Eval(eval) => {
                self.evaluations.insert(key(eval), eval.clone());
            }
            // A new timeline: what followed is history.
            Entry::Quarantined(quarantined) => {
                self.steps.split_off(&quarantined.step);
                self.evaluations.retain(|(at, ..), _| *at < quarantined.step);
                self.quarantined.push(quarantined.clone());
            }
            Entry::Membership(membership) => {
                self.generation = self.generation.max(membership.generation);
                self.fingerprint = membership.fingerprint.clone().or(self.fingerprint.take());
            }
            Entry::Lost(lost) => self.generation = self.generation.max(lost.generation),
            _ => {}
        }
    }

    /// The arithmetic that the run was computed with so far.
    pub fn fingerprint(&self) -> Option<&Fingerprint> {
        self.fingerprint.as_ref()
    }

    /// Rows that the run goes on without, oldest first.
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// The newest generation that there was.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Forgets what `program` will not compute again alike: where the number of steps has changed, learning rates may
    /// have, and from the first step with another one on, all is new.
    pub fn follow(&mut self, program: &Program) {
        let Program::Train(training) = program else {
            let fingerprint = self.fingerprint.take();
            return *self = Recorded { generation: self.generation, fingerprint, ..Recorded::default() };
        };
        let same = |step: &u64| {
            let recorded = self.steps.get(step).map(|s| s.lr.to_bits());
            *step <= training.plan.steps() && recorded == Some(training.rate.at(*step).to_bits())
        };
        let last = (training.start + 1..).take_while(same).last().unwrap_or(training.start);
        self.steps.split_off(&(last + 1));
        self.evaluations.retain(|(at, ..), _| *at <= last);
    }

    /// The newest step that is known.
    pub fn newest(&self) -> u64 {
        self.steps.last_key_value().map_or(0, |(step, _)| *step)
    }

    /// Whether the validation after `step` is known.
    pub fn is_evaluated(&self, step: u64) -> bool {
        self.evaluations.keys().any(|(at, split, _)| *at == step && split == "validation")
    }

    /// Losses of the steps up to `step`, oldest first.
    pub fn losses(&self, step: u64) -> impl Iterator<Item = f64> + '_ {
        self.steps.range(..=step).map(|(_, s)| s.loss)
    }

    /// Tokens of the steps up to `step`.
    pub fn tokens(&self, step: u64) -> u64 {
        self.steps.range(..=step).map(|(_, s)| s.tokens).sum()
    }

    /// Whether the step was recorded before; an error where it came out differently.
    pub fn knows_step(&self, entry: &StepCommitted) -> Result<bool, String> {
        let Some(before) = self.steps.get(&entry.step) else { return Ok(false) };
        if before.bits() == Known::of(entry).bits() {
            return Ok(true);
        }
        Err(format!(
            "computed again after the checkpoint, the step gave loss {} and gradient norm {} where {} and {} are on record; use the same machine type, unisono-worker, model and data as before, or start a new run",
            entry.loss, entry.grad_norm, before.loss, before.grad_norm
        ))
    }

    /// Whether the evaluation was recorded before; an error where it came out differently.
    pub fn knows_evaluation(&self, entry: &Evaluated) -> Result<bool, String> {
        let Some(before) = self.evaluations.get(&key(entry)) else { return Ok(false) };
        if before.loss.to_bits() == entry.loss.to_bits() {
            return Ok(true);
        }
        Err(format!(
            "computed again after the checkpoint, the {} loss is {} where {} is on record; use the same machine type, unisono-worker, model and data as before, or start a new run",
            entry.split, entry.loss, before.loss
        ))
    }
}

fn key(eval: &Evaluated) -> (u64, String, String) {
    (eval.step, eval.split.clone(), eval.task.clone())
}

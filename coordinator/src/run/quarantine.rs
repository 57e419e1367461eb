//! Rows that the run goes on without. A step that gives a bad number, or whose loss is a spike, is never committed: everyone
//! goes back before it, and its rows are left out from it on. Which ones decides a barrier that stands before the step in every
//! run, whoever computes: all of its micro-batches are tried, and every one that is bad counts, whoever found one first.
//!
//! ```text
//! bad number in step s --(the generation is over)--> newest state before s --> ... --> step s - 1
//!     --> Probe(s): every micro-batch by itself --(bad ones)--> Quarantined in the ledger --> step s without their rows
//! spike in step s --> Quarantined (its highest micro-batch) --(the generation is over)--> newest state before s --> ...
//! ```

use super::event::Effect;
use super::faults::tell_spike;
use super::machine::Machine;
use super::outstanding::{step_of, Outstanding};
use super::program::{Item, Program};
use super::settle::Fault;
use std::collections::BTreeSet;
use unisono_configs::run::{OnBadNumbers, OnSpike};
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{self as wire, Failure, Quarantined, StepCommitted, Suite, Warning};

/// Spikes of one step whose rows are left out; one more, and it is not the rows.
const SPIKES: usize = 3;

impl Machine {
    /// A rank found a bad number in the oldest step, and the run is to go on without its rows: everyone goes back before it.
    pub(super) fn suspected(&mut self, now: f64, failure: &Failure) -> Option<Vec<Effect>> {
        let quarantines = self.settings.on_bad_numbers == OnBadNumbers::Quarantine;
        if !quarantines || failure.micro_batch.is_none() {
            return None;
        }
        let Some(Item::Step(step)) = self.queue.front().map(|o| o.item) else { return None };
        if self.is_stopping() {
            return Some(self.stopped(now));
        }
        if self.cleared == Some(step) {
            let tried = "; tried one by one, its micro-batches gave none: look at the machine that did";
            let message = format!("{}{tried}, and {}", failure.message, self.again());
            return Some(self.fail(now, Failure { message, ..failure.clone() }));
        }
        self.suspect = Some(step);
        let told = &failure.message;
        let message = format!("{told}. Everyone goes back before step {step}, and all of its micro-batches are tried");
        let warning = Warning { kind: "bad-number".into(), step: Some(step), message };
        let mut effects = vec![Effect::Append(Entry::Warning(warning))];
        effects.extend(self.disband(now, failure));
        Some(effects)
    }

    /// What is next where a step is suspect; `None`: what would be.
    pub(super) fn probe_item(&mut self) -> Option<Option<Item>> {
        let step = self.suspect?;
        if self.queue.iter().any(|o| o.item == Item::Probe(step)) {
            // What follows depends on it.
            return Some(None);
        }
        let due = self.agenda.peek(&self.program) == Some(Item::Step(step)) && step <= self.prepared;
        due.then_some(Some(Item::Probe(step)))
    }

    /// Every rank has tried its micro-batches of `step`.
    pub(super) fn probed(&mut self, step: u64, settled: &Outstanding) -> Result<Vec<Effect>, Fault> {
        let count = settled.expected.owners.len();
        let reports = settled.reports().iter().flatten().filter_map(step_of);
        let bad: BTreeSet<u32> = reports.flat_map(|r| r.bad).filter(|&m| (m as usize) < count).collect();
        self.suspect = None;
        if bad.is_empty() {
            self.cleared = Some(step);
            let message =
                format!("no micro-batch of step {step} gives a bad number again; look at the machine that did");
            let warning = Warning { kind: "bad-number".into(), step: Some(step), message };
            return Ok(vec![Effect::Append(Entry::Warning(warning))]);
        }
        if step <= self.settings.recorded.newest() {
            let message = format!(
                "step {step} gives bad numbers now, and gave none when it was committed; look at the machines, and go on from an earlier checkpoint"
            );
            return Err(Fault { rank: None, message });
        }
        if bad.len() == count {
            let message = format!(
                "every micro-batch of step {step} gives a bad number, so it is not the rows: lower train.learning_rate, and go on from an earlier checkpoint"
            );
            return Err(Fault { rank: None, message });
        }
        let bad: Vec<u32> = bad.into_iter().collect();
        let message = format!(
            "{} of the {count} micro-batches of step {step} came to numbers that are not finite or too large; the run goes on from there without these rows",
            bad.len()
        );
        Ok(vec![self.quarantine(step, bad, false, message)])
    }

    /// Leaves the rows of these micro-batches of `step` out from it on.
    fn quarantine(&mut self, step: u64, micro_batches: Vec<u32>, spike: bool, message: String) -> Effect {
        let Program::Train(training) = &self.program else { unreachable!("only a training program has steps") };
        let dealt = training.plan.dealt(step);
        let of = |&m: &u32| dealt.micro_batches[m as usize].rows.clone();
        let rows: Vec<u32> = micro_batches.iter().flat_map(of).collect();
        let key = |&micro_batch: &u32| wire::BatchKey { suite: Suite::Train.into(), step, micro_batch };
        let names = micro_batches.iter().flat_map(|m| (self.settings.rows.0)(key(m))).collect();
        training.plan.quarantine(step, &rows);
        // This step is another one now, and a later one was dealt with them; whether it is bad without them is found anew.
        (self.suspect, self.cleared) = (None, None);
        self.settings.snapshots.branch(step, &rows);
        self.new_entry(Entry::Quarantined(Quarantined { step, micro_batches, rows, names, message, spike }))
    }

    /// What happens instead of committing a step whose loss is a spike; `None`: it is committed.
    pub(super) fn instead_of_a_spike(
        &mut self,
        now: f64,
        entry: &StepCommitted,
        worst: u32,
        known: bool,
    ) -> Result<Option<Vec<Effect>>, Fault> {
        let policy = self.settings.on_spike;
        let Some(spike) = self.spikes.judge(entry.loss).filter(|_| !known && policy != OnSpike::Warn) else {
            return Ok(None);
        };
        let (step, told) = (entry.step, tell_spike(entry, spike, worst));
        let rows = self.name_rows(Suite::Train, step, worst);
        if policy == OnSpike::Stop {
            // As it is, it would come to the same.
            let remedy = format!("set train.on_spike to \"quarantine\" or \"warn\", and {}", self.again());
            return Err(Fault { rank: None, message: format!("{told}{rows}; {remedy}") });
        }
        let before = self.settings.recorded.quarantined().iter().filter(|q| q.step == step && q.spike).count();
        let Program::Train(training) = &self.program else { unreachable!("only a training program has steps") };
        if before >= SPIKES || training.plan.dealt(step).micro_batches.len() < 2 {
            let message = format!(
                "{told}{rows}; rows of this step were left out {before} times before, so it is not the rows: lower train.learning_rate, and go on from an earlier checkpoint"
            );
            return Err(Fault { rank: None, message });
        }
        if self.is_stopping() {
            // Found again, and left out, by whoever goes on.
            return Ok(Some(self.stopped(now)));
        }
        let failure = self.failure(None, wire::Phase::Forward, Some(step), told.clone());
        let message = format!("{told}. The run goes back before step {step}, and on without these rows");
        let mut effects = vec![self.quarantine(step, vec![worst], true, message)];
        effects.extend(self.disband(now, &failure));
        Ok(Some(effects))
    }
}

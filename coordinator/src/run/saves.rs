//! Checkpoints under way: copied at a barrier, written and committed behind training.
//!
//! ```text
//! directive --(every rank has copied: it is settled)--> training goes on
//!    every rank's files are on disk --> commit --> Checkpoint in the ledger
//!    any rank's are not, or the commit fails --> Warning, and another attempt at a later barrier
//! ```
//!
//! A failed attempt costs nothing but itself. Attempts are numbered, so that no file name is ever used twice. While
//! training goes on, the next attempt comes at the next barrier, and further ones at twice the distance each; where
//! there is no later barrier, after the last step, after pauses, until [`ATTEMPTS`] have failed.

use super::event::{Effect, NotCommitted, PendingCheckpoint};
use super::machine::Machine;
use super::phases::Phase;
use super::program::Item;
use std::collections::VecDeque;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{self as wire, CheckpointCommitted, CheckpointFile, CheckpointReport, Warning};

/// Saves of the same state that may fail before the run does.
const ATTEMPTS: u32 = 5;
/// Seconds before the second attempt at saving the same state; doubles with each further one.
const PAUSE: f64 = 0.5;

/// What one rank came to.
type Written = Result<Vec<CheckpointFile>, String>;

struct Save {
    step: u64,
    attempt: u32,
    /// When the directive was sent.
    since: f64,
    /// By rank.
    written: Vec<Option<Written>>,
    /// The coordinator's own.
    problem: Option<String>,
    committing: bool,
}

/// When the next attempt comes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Again {
    /// At the first barrier after this many steps.
    After(u64),
    /// Of the state after `step`, which stays as it is.
    At { step: u64, time: f64 },
}

/// The saves under way, in the order of their attempts.
#[derive(Default)]
pub(super) struct Saves {
    under_way: VecDeque<Save>,
    attempts: u32,
    /// Failures since the last success.
    failures: u32,
    again: Option<Again>,
    /// One that was due was given up with its generation.
    voided: bool,
    /// One that could have gone was kept because workers were loading it.
    spared: bool,
    /// The newest committed one.
    pub(super) newest: u64,
}

impl Saves {
    pub(super) fn new(newest: u64) -> Self {
        Saves { newest, ..Saves::default() }
    }

    /// Nothing is under way, and nothing has to be done again.
    pub(super) fn are_done(&self) -> bool {
        self.under_way.is_empty() && self.again.is_none()
    }

    /// The state after `step` is saved or being saved, or a later one: a commit may outlive a generation that had got
    /// further than this one.
    pub(super) fn cover(&self, step: u64) -> bool {
        self.newest >= step || self.under_way.iter().any(|save| save.step >= step)
    }

    /// Numbers a new attempt, which every rank of `world` is about to be told.
    pub(super) fn begin(&mut self, now: f64, step: u64, world: u32) -> u32 {
        self.attempts += 1;
        self.again = None;
        self.under_way.push_back(Save {
            step,
            attempt: self.attempts,
            since: now,
            written: vec![None; world as usize],
            problem: None,
            committing: false,
        });
        self.attempts
    }

    /// The barrier after `step` steps is one at which a save is tried again.
    pub(super) fn is_due_after(&self, step: u64) -> bool {
        self.under_way.is_empty() && matches!(self.again, Some(Again::After(due)) if step >= due)
    }

    /// The step whose state is to be saved again now.
    pub(super) fn is_due_at(&self, now: f64) -> Option<u64> {
        match self.again {
            Some(Again::At { step, time }) if now >= time => Some(step),
            _ => None,
        }
    }

    /// The next attempt comes, but not yet.
    pub(super) fn is_waiting(&self, now: f64) -> bool {
        matches!(self.again, Some(Again::At { time, .. }) if now < time)
    }

    /// Forgets the save after `step`, which no worker has begun.
    pub(super) fn forget(&mut self, step: u64) {
        self.under_way.retain(|save| save.step != step);
    }

    /// The generation is over: what is not being committed is void.
    pub(super) fn void(&mut self) {
        self.voided |= self.under_way.iter().any(|save| !save.committing);
        self.under_way.retain(|save| save.committing);
        self.give_up_again();
    }

    /// The next attempt was to be at a place that will not come any more.
    pub(super) fn give_up_again(&mut self) {
        self.voided |= self.again.take().is_some();
    }

    /// Whether one that was due was given up since this was asked last.
    pub(super) fn take_voided(&mut self) -> bool {
        std::mem::take(&mut self.voided)
    }

    /// Of what is under way, every rank has written its part.
    pub(super) fn are_written(&self) -> bool {
        let all = |save: &Save| save.written.iter().all(|written| matches!(written, Some(Ok(_))));
        self.under_way.iter().all(|save| save.committing || all(save))
    }

    /// Forgets that an attempt was to come.
    pub(super) fn stop_trying(&mut self) {
        self.again = None;
    }

    fn find(&mut self, attempt: u32) -> Option<&mut Save> {
        self.under_way.iter_mut().find(|save| save.attempt == attempt)
    }
}

impl Machine {
    /// Numbers a save of the state after `step` and asks for its directory.
    pub(super) fn begin_save(&mut self, now: f64, step: u64, effects: &mut Vec<Effect>) -> u32 {
        let attempt = self.saves.begin(now, step, self.roster.len() as u32);
        effects.push(Effect::MakeCheckpoint { step, attempt });
        attempt
    }

    /// The directory of an attempt could not be made; its workers will say that they cannot write.
    pub(super) fn unprepared(&mut self, attempt: u32, problem: String) -> Vec<Effect> {
        if let Some(save) = self.saves.find(attempt) {
            save.problem = Some(problem);
        }
        Vec::new()
    }

    /// A rank has written its files, or could not.
    pub(super) fn written(&mut self, now: f64, rank: usize, report: CheckpointReport) -> Vec<Effect> {
        let CheckpointReport { step, attempt, files, problem } = report;
        let slot = self.saves.find(attempt).filter(|s| s.step == step).and_then(|s| s.written.get_mut(rank));
        let Some(slot @ None) = slot else {
            return self.blame(now, rank, format!("it wrote a checkpoint after step {step} that nobody waits for"));
        };
        *slot = Some(if problem.is_empty() { Ok(files) } else { Err(problem) });
        self.advance_saves(now)
    }

    /// Hands over what every rank has written, and ends what failed.
    fn advance_saves(&mut self, now: f64) -> Vec<Effect> {
        let wire::Epoch { term, generation } = self.epoch();
        let Some(save) = self.saves.under_way.front_mut() else { return Vec::new() };
        if save.committing || save.written.iter().any(Option::is_none) {
            return Vec::new();
        }
        let written = || (0..).zip(save.written.iter().flatten());
        let failed = written().find_map(|(rank, w)| w.as_ref().err().map(|problem| (rank, problem.clone())));
        let (step, attempt, since) = (save.step, save.attempt, save.since);
        if failed.is_none() && save.problem.is_none() {
            let files = written().filter_map(|(_, w)| w.clone().ok()).collect();
            save.committing = true;
            return vec![Effect::CommitCheckpoint(PendingCheckpoint { step, attempt, term, generation, files, since })];
        }
        let left = written().filter_map(|(_, w)| w.clone().ok()).collect();
        let (rank, problem) = match (save.problem.take(), failed) {
            (None, Some((rank, problem))) => (Some(rank), problem),
            (own, _) => (None, own.unwrap_or_default()),
        };
        let mut effects = vec![Effect::DiscardCheckpoint { step, files: left }];
        effects.extend(self.save_failed(now, rank, problem));
        effects
    }

    /// An attempt was committed, or why not. `None`: nobody waits for it.
    pub(super) fn save_committed(
        &mut self,
        now: f64,
        attempt: u32,
        result: Result<CheckpointCommitted, NotCommitted>,
    ) -> Option<Vec<Effect>> {
        let step = self.saves.under_way.front().filter(|s| s.committing && s.attempt == attempt)?.step;
        Some(match result {
            Ok(entry) => {
                let Saves { under_way, failures, newest, .. } = &mut self.saves;
                (*failures, *newest) = (0, step.max(*newest));
                under_way.pop_front();
                let mut effects = vec![Effect::Append(Entry::Checkpoint(entry)), self.prune()];
                effects.extend(self.advance_saves(now));
                if self.is_bereft() {
                    effects.extend(self.stop_bereft(now));
                    return Some(effects);
                }
                effects.extend(self.grow(now));
                effects.extend(self.queue_ahead(now));
                effects.extend(self.conclude(now));
                effects
            }
            Err(NotCommitted { message, fatal: true }) => {
                self.fail(now, self.failure(None, wire::Phase::Checkpoint, Some(step), message))
            }
            Err(NotCommitted { message, fatal: false }) => self.save_failed(now, None, message),
        })
    }

    /// The oldest attempt has failed: says so and plans the next.
    fn save_failed(&mut self, now: f64, rank: Option<u32>, problem: String) -> Vec<Effect> {
        let Some(save) = self.saves.under_way.pop_front() else { return Vec::new() };
        self.saves.failures += 1;
        let (step, failures) = (save.step, self.saves.failures);
        // Another save of a later state may be under way: then that is the next attempt.
        let superseded = !self.saves.under_way.is_empty();
        // Only where everyone stands after this very step can its state be saved again: a generation that goes back, or has
        // yet to begin, does not stand there any more.
        let stands = self.phase == Phase::Running && self.committed == step;
        let stays = (step == self.program.steps() || self.is_stopping()) && stands;
        let doubled = |exponent: u32| 1u64 << exponent.min(20);
        if stays && !superseded && failures >= ATTEMPTS {
            let message = format!("the checkpoint after step {step} failed {failures} times: {problem}");
            return self.fail(now, self.failure(rank, wire::Phase::Checkpoint, Some(step), message));
        }
        let bereft = self.is_bereft();
        let next = match (superseded, stays) {
            (false, _) if bereft => "when the run goes on".to_owned(),
            (true, _) => "with the save that follows".to_owned(),
            (false, true) => {
                let pause = PAUSE * doubled(failures - 1) as f64;
                self.saves.again = Some(Again::At { step, time: now + pause });
                format!("in {pause} s")
            }
            (false, false) => {
                let due = self.committed.max(step) + doubled(failures - 1);
                self.saves.again = Some(Again::After(due.min(self.program.steps())));
                "at a later step".to_owned()
            }
        };
        let newest = match self.saves.newest {
            0 => "there is no earlier one".to_owned(),
            newest => format!("the one after step {newest} stands"),
        };
        let place = match rank.and_then(|rank| self.roster.workers().get(rank as usize).zip(Some(rank))) {
            Some((worker, rank)) => format!("rank {rank} on {}: ", worker.join.host),
            None => String::new(),
        };
        let message = format!(
            "the checkpoint after step {step} failed; training goes on, it is tried again {next}, and {newest}: {place}{problem}"
        );
        let mut effects =
            vec![Effect::Append(Entry::Warning(Warning { kind: "checkpoint".into(), step: Some(step), message }))];
        effects.extend(self.advance_saves(now));
        match bereft {
            true => effects.extend(self.stop_bereft(now)),
            false => effects.extend(self.queue_ahead(now)),
        }
        effects
    }

    /// Somebody who would be needed for more is lost: the run stops once nothing is under way any more.
    pub(super) fn stop_bereft(&mut self, now: f64) -> Vec<Effect> {
        match self.saves.under_way.is_empty() {
            true => self.stopped(now),
            false => Vec::new(),
        }
    }

    /// A checkpoint more is in the ledger: older ones may go, except for the one that workers are loading.
    fn prune(&mut self) -> Effect {
        let loading = self.phase == Phase::Loading && !self.kept.is_start() && self.committed > 0;
        let spare = loading.then_some(self.committed);
        self.saves.spared = spare.is_some();
        Effect::Prune { spare }
    }

    /// Everybody has loaded: what was spared may go.
    pub(super) fn prune_spared(&mut self) -> Option<Effect> {
        std::mem::take(&mut self.saves.spared).then_some(Effect::Prune { spare: None })
    }

    /// What comes next on the agenda, saves that are tried again included; `None`: nothing yet, or nothing any more.
    pub(super) fn next_item(&mut self, now: f64) -> Option<Item> {
        if let Some(item) = self.stop_item(now) {
            return item;
        }
        if let Some(step) = self.saves.is_due_at(now) {
            return Some(Item::Checkpoint(step));
        }
        if let Some(step) = self.agenda.barrier().filter(|&step| self.saves.is_due_after(step)) {
            return Some(Item::Checkpoint(step));
        }
        // Workers leave once everybody's work is known to be done and every checkpoint is committed: until then it can be
        // done again.
        let done = self.saves.are_done() && self.queue.is_empty();
        if self.agenda.peek(&self.program) == Some(Item::Finish) && !done {
            // One of an earlier generation was to do for the last step's and has failed since: everybody stands there.
            let last = self.program.steps();
            let due = self.queue.is_empty() && self.saves.is_due_after(last);
            return due.then_some(Item::Checkpoint(last));
        }
        if let Some(item) = self.probe_item() {
            return item;
        }
        loop {
            if let Some(Item::Step(step)) = self.agenda.peek(&self.program) {
                if self.awaits_snapshot(now, step) {
                    return None;
                }
            }
            match self.agenda.next(&self.program, self.prepared)? {
                // Computed again after a loss: it was saved, or is being saved, by the generation before.
                Item::Checkpoint(step) if step <= self.saves.newest || self.saves.cover(step) => {}
                item => return Some(item),
            }
        }
    }
}

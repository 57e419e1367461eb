//! What follows a lost worker: the generation is over, the others join again, and everyone goes on from the newest
//! checkpoint. Steps that were committed after it are computed again; they say nothing a second time.

use super::event::Effect;
use super::gathering::Regrouping;
use super::machine::Machine;
use super::phases::Phase;
use super::program::{Agenda, Item, Program};
use super::spike::Spikes;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{Abort, CoordinatorMessage, Failure, WorkerLost};

impl Machine {
    /// Worker `rank` is lost, as `failure` tells: the rest regroup, unless this has happened too often at this place.
    pub(super) fn regroup(&mut self, now: f64, rank: usize, mut failure: Failure) -> Vec<Effect> {
        if self.is_stopping() {
            return self.lost_while_stopping(now, rank);
        }
        self.stumbles += 1;
        if self.stumbles > self.settings.restarts {
            if self.stumbles > 1 {
                failure.message += &format!("; {} losses in a row without anything new between them", self.stumbles);
            }
            failure.message += &format!("; then {}", self.again());
            return self.fail(now, failure);
        }
        self.generation += 1;
        self.phase = Phase::Gathering;
        self.queue.clear();
        self.complaints.clear();
        self.saves.void();
        let workers = std::mem::take(&mut self.roster).into_workers();
        let left = |(other, w): &(usize, super::roster::Worker)| *other != rank && !w.gone;
        let expected = workers.iter().cloned().enumerate().filter(left).map(|(_, w)| w.join.listen).collect();
        self.regrouping = Some(Regrouping { since: now, expected });
        let lost = WorkerLost {
            generation: self.generation,
            failure: Some(failure.clone()),
            pid: workers.get(rank).map_or(0, |w| w.join.pid),
            resume_step: self.saves.newest,
        };
        let mut effects = vec![Effect::Append(Entry::Lost(lost))];
        // The lost one too: should it only have slept, it wakes up to this.
        for worker in workers {
            let abort = Order::Abort(Abort { failure: Some(failure.clone()), regroup: true });
            let message = CoordinatorMessage { epoch: Some(self.epoch()), body: Some(abort) };
            effects.push(Effect::Send { to: worker.connection, message });
            effects.push(Effect::Close { to: worker.connection });
        }
        effects.extend(self.take_spares());
        effects
    }

    /// Back to the state after step `held`, which workers have in memory; without one, to the newest checkpoint or the
    /// beginning.
    pub(super) fn rewind(&mut self, held: Option<u64>) {
        let start = held.unwrap_or(self.saves.newest);
        if let Program::Train(training) = &mut self.program {
            training.start = start;
        }
        self.agenda = match held {
            // A checkpoint comes last of what belongs to its step; a snapshot first.
            Some(_) => Agenda::after_step(&self.program, |step| self.settings.recorded.is_evaluated(step)),
            None => Agenda::new(&self.program),
        };
        self.kept.begin(held);
        // A commit of the generation before may have failed meanwhile.
        self.saves.give_up_again();
        // A checkpoint that was due before is not waited for until the next one is.
        if self.saves.take_voided() && held.is_some() {
            self.agenda.save_now();
        }
        self.queue.clear();
        self.next_id = 1;
        self.committed = start;
        self.spikes = Spikes::new(self.settings.spike, self.settings.recorded.losses(start));
        self.outcome.continuations.clear();
        self.outcome.tokens = self.settings.recorded.tokens(start);
        let trains = matches!(self.program, Program::Train(_));
        self.outcome.evaluations.retain(|e| trains && e.step <= start && e.split != "test");
    }

    /// Whether the run goes on with fewer workers than it should have, and somebody waits.
    pub(super) fn is_short_handed(&self) -> bool {
        !self.is_stopping()
            && self.phase == Phase::Running
            && self.roster.len() < self.settings.world as usize
            && !self.spares.is_empty()
    }

    /// Somebody waits for a place: a checkpoint is taken as soon as may be, after which nothing is computed twice.
    pub(super) fn make_room(&mut self, now: f64) -> Vec<Effect> {
        if !self.is_short_handed() || !matches!(self.program, Program::Train(_)) {
            return Vec::new();
        }
        self.agenda.save_now();
        self.queue_ahead(now)
    }

    /// A checkpoint is committed, and somebody waits for a place: a generation begins in which they have it.
    pub(super) fn grow(&mut self, now: f64) -> Vec<Effect> {
        if !self.is_short_handed() || self.queue.iter().any(|o| o.item == Item::Finish) {
            return Vec::new();
        }
        let message = "a worker joined, and everyone regroups".to_owned();
        let failure = self.failure(None, unisono_proto::v1::Phase::Join, None, message);
        self.disband(now, &failure)
    }

    /// The generation is over, and nobody is lost: everyone joins again.
    pub(super) fn disband(&mut self, now: f64, failure: &Failure) -> Vec<Effect> {
        self.generation += 1;
        self.saves.void();
        self.queue.clear();
        self.complaints.clear();
        self.phase = Phase::Gathering;
        let workers = std::mem::take(&mut self.roster).into_workers();
        let expected = workers.iter().filter(|w| !w.gone).map(|w| w.join.listen.clone()).collect();
        self.regrouping = Some(Regrouping { since: now, expected });
        let mut effects = Vec::new();
        for worker in workers {
            let abort = Order::Abort(Abort { failure: Some(failure.clone()), regroup: true });
            effects.push(self.send(worker.connection, abort));
            effects.push(Effect::Close { to: worker.connection });
        }
        effects.extend(self.take_spares());
        effects
    }
}

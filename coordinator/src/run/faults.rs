//! How a run fails: who is blamed, where, and what everyone else hears.

use super::event::{Connection, Effect};
use super::machine::Machine;
use super::phases::Phase;
use super::program::{Item, Program};
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{self as wire, Abort, Failure};

/// Seconds that a worker's complaint about a collective waits for the news that a peer was lost, who is then the culprit.
const COMPLAINT_WAITS: f64 = 2.0;

impl Machine {
    pub(super) fn ended(&mut self, now: f64, from: Connection, reason: &str) -> Vec<Effect> {
        let Some(rank) = self.roster.rank_of(from) else { return Vec::new() };
        if self.phase == Phase::Gathering {
            self.roster.forget(from);
            return Vec::new();
        }
        let worker = &self.roster.workers()[rank];
        if worker.drained || worker.complained {
            return Vec::new();
        }
        let failure = self.lost(rank, &format!("its connection {reason}"));
        self.fail(now, failure)
    }

    /// A worker says that it cannot go on. When it stumbled in a collective, a peer may be the cause: wait for that news.
    pub(super) fn complained(&mut self, now: f64, rank: usize, told: Failure) -> Vec<Effect> {
        let (phase, step) = self.place_of(rank);
        let named = wire::Phase::try_from(told.phase).unwrap_or_default();
        let phase = if named == wire::Phase::Unspecified { phase } else { named };
        let culprit = told.rank.filter(|&r| (r as usize) < self.roster.len()).unwrap_or(rank as u32);
        let mut failure = self.failure(Some(culprit), phase, told.step.or(step), told.message);
        failure.bad_input = told.bad_input;
        if self.phase == Phase::Gathering {
            failure.rank = None;
        }
        self.roster.get_mut(rank).complained = true;
        // Peers meet while loading, and the norm is summed while updating.
        let in_collective =
            matches!(phase, wire::Phase::Load | wire::Phase::Reduce | wire::Phase::Update | wire::Phase::Gather);
        if in_collective && !failure.bad_input {
            self.complaint.get_or_insert((now, failure));
            return Vec::new();
        }
        self.fail(now, failure)
    }

    pub(super) fn tick(&mut self, now: f64) -> Vec<Effect> {
        if let Some(rank) = self.roster.silent(now, self.settings.silence) {
            let silent = now - self.roster.workers()[rank].heard;
            let failure = self.lost(rank, &format!("it has been silent for {silent:.0} s"));
            return self.fail(now, failure);
        }
        match self.complaint.clone() {
            Some((since, failure)) if now - since > COMPLAINT_WAITS => self.fail(now, failure),
            _ => Vec::new(),
        }
    }

    fn lost(&self, rank: usize, how: &str) -> Failure {
        let (phase, step) = self.place_of(rank);
        let run = self.settings.run_dir.display();
        let again = match self.program {
            Program::Train(_) => format!("go on with --resume {run}"),
            _ => "start it again".into(),
        };
        let advice = format!("look at its log for the cause (out of memory, killed), then {again}");
        self.failure(Some(rank as u32), phase, step, format!("the worker was lost: {how}; {advice}"))
    }

    pub(super) fn blame(&mut self, now: f64, rank: usize, message: String) -> Vec<Effect> {
        let (phase, step) = self.place_of(rank);
        let advice = "run the unisono-worker that belongs to this coordinator";
        self.fail(now, self.failure(Some(rank as u32), phase, step, format!("{message}; {advice}")))
    }

    pub(super) fn failure(&self, rank: Option<u32>, phase: wire::Phase, step: Option<u64>, message: String) -> Failure {
        let worker = rank.and_then(|r| self.roster.workers().get(r as usize));
        let host = worker.map(|w| w.join.host.clone()).unwrap_or_default();
        Failure { rank, host, phase: phase.into(), step, message, bad_input: false }
    }

    /// The run is over: everyone who is left hears why.
    pub(super) fn fail(&mut self, now: f64, failure: Failure) -> Vec<Effect> {
        self.phase = Phase::Failed;
        self.queue.clear();
        self.close_outcome(now);
        self.outcome.failure = Some(failure.clone());
        let mut effects = vec![Effect::Append(Entry::Failed(failure.clone()))];
        effects.extend(self.broadcast(Order::Abort(Abort { failure: Some(failure) })));
        effects.extend(self.roster.workers().iter().map(|w| Effect::Close { to: w.connection }));
        effects.push(Effect::Done(self.outcome.clone()));
        effects
    }

    /// Where a rank is: as it said itself, else by the directive that is its turn.
    fn place_of(&self, rank: usize) -> (wire::Phase, Option<u64>) {
        let worker = &self.roster.workers()[rank];
        match self.phase {
            Phase::Gathering => (wire::Phase::Join, None),
            Phase::Loading => (wire::Phase::Load, None),
            _ => {
                let turn = self.queue.iter().find(|o| o.id == worker.answered + 1);
                let (phase, step) = turn.map_or((wire::Phase::Drain, None), |o| o.item.place());
                // A heartbeat is up to a second old: it counts only if it is about this very turn.
                let told = worker.phase();
                let current = worker.heartbeat.step == step
                    && !matches!(told, wire::Phase::Unspecified | wire::Phase::Join | wire::Phase::Load);
                (if current { told } else { phase }, step)
            }
        }
    }

    /// Where the run is.
    pub(super) fn under_way(&self) -> (wire::Phase, Option<u64>) {
        match self.phase {
            Phase::Gathering => (wire::Phase::Join, None),
            Phase::Loading => (wire::Phase::Load, None),
            _ => self.queue.front().map_or((wire::Phase::Drain, None), |o| o.item.place()),
        }
    }
}

impl Item {
    /// Phase and step that a failure names.
    pub(super) fn place(self) -> (wire::Phase, Option<u64>) {
        match self {
            Item::Step(step) => (wire::Phase::Forward, Some(step)),
            Item::Evaluate { step, .. } => (wire::Phase::Evaluate, Some(step).filter(|&s| s > 0)),
            Item::Checkpoint(step) => (wire::Phase::Checkpoint, Some(step)),
            Item::Generate => (wire::Phase::Generate, None),
            Item::Finish => (wire::Phase::Drain, None),
        }
    }
}

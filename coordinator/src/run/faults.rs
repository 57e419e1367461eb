//! How a run fails: who is blamed, where, and what everyone else hears.

use super::event::{Connection, Effect};
use super::machine::Machine;
use super::pace::Straggler;
use super::phases::Phase;
use super::program::{Item, Program};
use super::spike::Spike;
use unisono_configs::run::OnBadNumbers;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{self as wire, directive, Abort, BatchKey, Directive, Failure, StepCommitted, Suite, Warning};

/// Seconds that a worker's complaint about a peer waits for the news that one was lost, who is then the culprit.
const COMPLAINT_WAITS: f64 = 2.0;

/// Rows that a sentence names.
const SHOWN: usize = 8;

impl Machine {
    pub(super) fn ended(&mut self, now: f64, from: Connection, reason: &str) -> Vec<Effect> {
        self.spares.forget(from);
        let Some(rank) = self.roster.rank_of(from) else { return Vec::new() };
        if self.phase == Phase::Gathering {
            self.roster.forget(from);
            return Vec::new();
        }
        let worker = self.roster.get_mut(rank);
        worker.gone = true;
        if worker.drained || worker.complained {
            return Vec::new();
        }
        self.lost(now, rank, &format!("its connection {reason}"))
    }

    /// A worker says that it cannot go on. When it stumbled over a peer, that one may be the cause: wait for that news.
    pub(super) fn complained(&mut self, now: f64, rank: usize, told: Failure) -> Vec<Effect> {
        let (phase, step) = self.place_of(rank);
        let named = wire::Phase::try_from(told.phase).unwrap_or_default();
        let phase = if named == wire::Phase::Unspecified { phase } else { named };
        let culprit = told.rank.map(|r| r as usize).filter(|&r| r < self.roster.len()).unwrap_or(rank);
        let (phase, step, message) = match culprit == rank {
            true => (phase, told.step.or(step), told.message),
            false => {
                let (theirs, step) = self.place_of(culprit);
                let host = &self.roster.workers()[rank].join.host;
                (theirs, step, format!("{} (rank {rank} on {host} says so, in {})", told.message, phase.word()))
            }
        };
        let mut failure = self.failure(Some(culprit as u32), phase, step, message);
        (failure.bad_input, failure.recoverable) = (told.bad_input, told.recoverable);
        (failure.snapshot, failure.norm) = (told.snapshot, told.norm);
        if let Some(micro_batch) = told.micro_batch {
            failure.message += &self.rows_at_fault(rank, micro_batch);
            failure.micro_batch = Some(micro_batch);
        }
        if self.phase == Phase::Gathering {
            failure.rank = None;
        }
        self.roster.get_mut(rank).complained = true;
        if self.is_number(&failure) {
            let turn = self.roster.workers()[rank].answered + 1;
            self.complaints.note_number(turn, failure);
            return self.settle_answered(now);
        }
        if failure.recoverable && self.phase != Phase::Gathering {
            self.complaints.hear(now, rank, culprit, failure);
            return Vec::new();
        }
        self.fail(now, failure)
    }

    /// Whether the work itself came to this, whoever does it: a bad number in a micro-batch, or a norm that is none.
    fn is_number(&self, failure: &Failure) -> bool {
        (failure.micro_batch.is_some() || failure.norm) && self.phase == Phase::Running
    }

    /// The oldest directive gave a bad number, and all before it are settled: a spike of an earlier step, or what else it came to, is
    /// known by now, whoever was the first to say something.
    pub(super) fn heed_number(&mut self, now: f64) -> Option<Vec<Effect>> {
        let oldest = self.queue.front()?.id;
        let failure = self.complaints.take_number(oldest)?;
        Some(self.suspected(now, &failure).unwrap_or_else(|| self.fail(now, failure)))
    }

    pub(super) fn tick(&mut self, now: f64) -> Vec<Effect> {
        if self.stop_is_due(now) {
            return self.stopped(now);
        }
        // Who has not looked for a while has heard nobody.
        let slept = now - std::mem::replace(&mut self.ticked, now) > self.settings.lease / 2.0;
        if slept {
            self.roster.renew(now);
            self.spares.renew(now);
        }
        let lease = self.settings.lease;
        let silent = self.spares.silent(now, lease);
        silent.iter().for_each(|&from| self.spares.forget(from));
        let mut effects: Vec<Effect> = silent.into_iter().map(|to| Effect::Close { to }).collect();
        if self.phase == Phase::Gathering {
            effects.extend(self.muster(now));
            return effects;
        }
        let silent = self.roster.silent(now, lease).first().and_then(|&from| self.roster.rank_of(from));
        if let Some(rank) = silent {
            let silent = now - self.roster.workers()[rank].heard;
            effects.extend(self.lost(now, rank, &format!("it has been silent for {silent:.1} s")));
            return effects;
        }
        if let Some((rank, how)) = self.hanging() {
            effects.extend(self.lost(now, rank, &how));
            return effects;
        }
        if let Some((rank, message)) = self.standstill() {
            effects.extend(self.given_up(now, rank, message));
            return effects;
        }
        // Whether or not anybody says anything more of snapshots; what follows may end the run.
        effects.extend(self.warn_of_lateness());
        let ripe = self.complaints.are_ripe(now, COMPLAINT_WAITS);
        if let Some((rank, failure)) = self.blamed().filter(|_| ripe) {
            if failure.snapshot {
                self.pass_over();
            }
            effects.extend(self.regroup(now, rank, failure));
        }
        // A save that failed may be due again.
        effects.extend(self.queue_ahead(now));
        effects
    }

    /// Which rows made a bad number, by the directive that is `rank`'s turn; begins with a separator.
    fn rows_at_fault(&self, rank: usize, micro_batch: u32) -> String {
        let turn = self.roster.workers()[rank].answered + 1;
        match self.queue.iter().find(|o| o.id == turn).map(|o| o.item) {
            Some(Item::Step(step)) => {
                let rows = self.name_rows(Suite::Train, step, micro_batch);
                match self.settings.on_bad_numbers {
                    OnBadNumbers::Quarantine => rows,
                    // As it is, it would come to the same.
                    OnBadNumbers::Stop => {
                        format!(
                            "{rows}; to go on without them, set train.on_bad_numbers to \"quarantine\" and {}",
                            self.again()
                        )
                    }
                }
            }
            Some(Item::Evaluate { suite, .. }) => self.name_rows(suite, 0, micro_batch),
            _ => String::new(),
        }
    }

    pub(super) fn name_rows(&self, suite: Suite, step: u64, micro_batch: u32) -> String {
        let rows = self.settings.rows.0(BatchKey { suite: suite.into(), step, micro_batch });
        if rows.is_empty() {
            return String::new();
        }
        let more = rows.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("; its rows are {}{more}", rows[..rows.len().min(SHOWN)].join(", "))
    }

    /// A loss far above those before it: most likely the learning rate, or rows that are unlike the others.
    pub(super) fn warn_of_spike(&self, entry: &StepCommitted, spike: Spike, worst: u32) -> Effect {
        let rows = self.name_rows(Suite::Train, entry.step, worst);
        let message = format!("{}{rows}", tell_spike(entry, spike, worst));
        Effect::Append(Entry::Warning(Warning { kind: "loss-spike".into(), step: Some(entry.step), message }))
    }

    /// A rank that all others wait for: it is named, and gets less to compute.
    pub(super) fn warn_of_straggler(&self, step: u64, straggler: Straggler) -> Effect {
        let Straggler { rank, ratio, cause } = straggler;
        let host = &self.roster.workers()[rank].join.host;
        let message = format!(
            "rank {rank} on {host} takes {ratio:.1} times as long for a token as the others, {}; as long as that is so, it is dealt fewer micro-batches where there are enough of them, and the result stays the same",
            cause.words()
        );
        Effect::Append(Entry::Warning(Warning { kind: "straggler".into(), step: Some(step), message }))
    }

    fn lost(&mut self, now: f64, rank: usize, how: &str) -> Vec<Effect> {
        let message = format!("the worker was lost: {how}; look at its log for the cause (out of memory, killed)");
        self.given_up(now, rank, message)
    }

    /// The generation is over because of `rank`.
    fn given_up(&mut self, now: f64, rank: usize, message: String) -> Vec<Effect> {
        // Everything is settled: all that it could still have said is farewell.
        if let Some(last) = self.queue.front_mut().filter(|o| o.item == Item::Finish) {
            last.answer(rank, Report::Drained(wire::Drained {}));
            self.roster.get_mut(rank).drained = true;
            return self.settle_answered(now);
        }
        let (phase, step) = self.place_of(rank);
        let failure = self.failure(Some(rank as u32), phase, step, message);
        self.regroup(now, rank, failure)
    }

    /// How a person goes on with a run that has failed.
    pub(super) fn again(&self) -> String {
        match self.program {
            Program::Train(_) => format!("go on with --resume {}", self.settings.run_dir.display()),
            _ => "start it again".into(),
        }
    }

    pub(super) fn blame(&mut self, now: f64, rank: usize, message: String) -> Vec<Effect> {
        let (phase, step) = self.place_of(rank);
        let advice = "run the unisono-worker that belongs to this coordinator";
        self.fail(now, self.failure(Some(rank as u32), phase, step, format!("{message}; {advice}")))
    }

    pub(super) fn failure(&self, rank: Option<u32>, phase: wire::Phase, step: Option<u64>, message: String) -> Failure {
        let worker = rank.and_then(|r| self.roster.workers().get(r as usize));
        let host = worker.map(|w| w.join.host.clone()).unwrap_or_default();
        Failure { rank, host, phase: phase.into(), step, message, ..Failure::default() }
    }

    /// The run is over: everyone who is left hears why.
    pub(super) fn fail(&mut self, now: f64, failure: Failure) -> Vec<Effect> {
        self.phase = Phase::Failed;
        self.queue.clear();
        self.close_outcome(now);
        self.outcome.failure = Some(failure.clone());
        let mut effects = vec![Effect::Append(Entry::Failed(failure.clone()))];
        effects.extend(self.broadcast(Order::Abort(Abort { failure: Some(failure), regroup: false })));
        effects.extend(self.dismiss_spares());
        effects.extend(self.roster.workers().iter().map(|w| Effect::Close { to: w.connection }));
        effects.push(Effect::Done(self.outcome.clone()));
        effects
    }

    /// Those that still waited for a place need wait no longer.
    pub(super) fn dismiss_spares(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        for spare in std::mem::take(&mut self.spares).into_workers() {
            let to = spare.connection;
            let finish = Directive { id: 1, body: Some(directive::Body::Finish(wire::Finish {})) };
            effects.extend([self.send(to, Order::Directive(finish)), Effect::Close { to }]);
        }
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

/// What a spike is, but for the rows of the `worst` micro-batch.
pub(super) fn tell_spike(entry: &StepCommitted, spike: Spike, worst: u32) -> String {
    let StepCommitted { step, loss, grad_norm, .. } = *entry;
    let Spike { median, limit } = spike;
    format!(
        "the loss of step {step}, {loss:.4}, is above {limit:.4} where the steps before it have a median of {median:.4} (gradient norm {grad_norm:.3}); if that stays so, lower train.learning_rate. Highest is micro-batch {worst}"
    )
}

impl Item {
    /// Phase and step that a failure names.
    pub(super) fn place(self) -> (wire::Phase, Option<u64>) {
        match self {
            Item::Step(step) | Item::Probe(step) => (wire::Phase::Forward, Some(step)),
            Item::Evaluate { step, .. } => (wire::Phase::Evaluate, Some(step).filter(|&s| s > 0)),
            Item::Checkpoint(step) => (wire::Phase::Checkpoint, Some(step)),
            Item::Generate(_) => (wire::Phase::Generate, None),
            Item::Finish => (wire::Phase::Drain, None),
        }
    }
}

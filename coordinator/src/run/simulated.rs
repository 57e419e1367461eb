//! Simulated workers and a world around the machine, for its tests: no clock, no network.

use super::event::{Connection, Effect, Event, NotCommitted, PendingCheckpoint, Refusal};
use super::machine::{Machine, Settings};
use super::phases::Phase;
use super::program::Program;
use super::recorded::Recorded;
use super::storm::Crash;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use unisono_configs::run::Assignment;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    Assign, Checkpoint, CheckpointCommitted, CheckpointCopied, CheckpointReport, Drained, Epoch, EvaluateReport,
    Failure, Halted, Heartbeat, Held, Join, LossPart, Proceed, Ready, SnapshotKept, StepReport, WorkerMessage,
};

pub(super) use super::rehearsal::{join, layout, machine, program, quarantining, settings, snapshotting, State};

/// A worker that does what it is told, and what it has not said yet.
#[derive(Default)]
pub(super) struct Simulated {
    pub(super) rank: u32,
    pub(super) epoch: Option<Epoch>,
    /// What it has not said yet, each with the directive that it belongs to.
    pub(super) outbox: VecDeque<(u64, Report)>,
    pub(super) steps: Vec<u64>,
    pub(super) acknowledged: u64,
    pub(super) begun: u64,
    /// The step after which its state is.
    state: u64,
    /// It has been asked what it has begun, and begins nothing until it hears how far to go.
    halted: bool,
    /// It has said that it cannot go on, and waits for what becomes of it.
    pub(super) complained: bool,
    pub(super) aborted: bool,
    pub(super) listen: String,
    /// It was told that its generation is over, and joins again.
    pub(super) regroups: bool,
    assign: Assign,
    /// After each step, as it was dealt when the worker was told.
    states: BTreeMap<u64, State>,
    snapshot_every: u64,
}

/// The world around a machine: workers, ledger and committer.
pub(super) struct World {
    pub(super) machine: Machine,
    pub(super) now: f64,
    pub(super) workers: BTreeMap<Connection, Simulated>,
    pub(super) ledger: Vec<Entry>,
    pub(super) commits: VecDeque<PendingCheckpoint>,
    /// Commits that will fail, though another attempt may not.
    pub(super) refusals: u32,
    /// Problems that the next writes have, one a rank and save.
    pub(super) disk: VecDeque<Option<String>>,
    /// The newest checkpoint when older ones were let go, and which one was not.
    pub(super) pruned: Option<(Option<u64>, Option<u64>)>,
    pub(super) concluding: bool,
    pub(super) over: bool,
    next: u64,
    /// Addresses of processes that are about to join.
    pub(super) joining: VecDeque<String>,
    /// Snapshots by the address of the process that holds them.
    pub(super) memory: BTreeMap<String, Vec<Held>>,
    /// Rank and step of snapshots that do not reach the neighbour.
    pub(super) unsent: Vec<(u32, u64)>,
    /// Where nobody can fetch anything.
    pub(super) unreachable: Option<String>,
    /// Those that are stopped, and what they will hear when they wake up.
    pub(super) asleep: BTreeSet<Connection>,
    pub(super) mail: BTreeMap<Connection, Vec<(Epoch, Order)>>,
    /// How the coordinator dies in the middle of its next decision.
    pub(super) crash: Option<Crash>,
    /// Rows that give bad numbers, and rows that give high losses.
    pub(super) poison: BTreeSet<u32>,
    pub(super) spiky: BTreeSet<u32>,
}

/// Snapshots of one owner that a worker keeps at a time.
const KEPT: usize = 2;

pub(super) fn loss(step: u64, micro_batch: u32) -> f64 {
    1.0 + step as f64 * 0.37 + f64::from(micro_batch) * 0.011
}

impl World {
    pub(super) fn new(world: u32, steps: u64, assignment: Assignment) -> Self {
        Self::with(machine(world, steps, assignment), world, Vec::new())
    }

    pub(super) fn with(machine: Machine, world: u32, ledger: Vec<Entry>) -> Self {
        Self::remembering(machine, world, ledger, BTreeMap::new())
    }

    fn remembering(machine: Machine, world: u32, ledger: Vec<Entry>, memory: BTreeMap<String, Vec<Held>>) -> Self {
        let mut this = World {
            machine,
            now: 100.0,
            workers: BTreeMap::new(),
            ledger,
            commits: VecDeque::new(),
            refusals: 0,
            pruned: None,
            disk: VecDeque::new(),
            concluding: false,
            over: false,
            next: 0,
            joining: VecDeque::new(),
            memory,
            unsent: Vec::new(),
            unreachable: None,
            asleep: BTreeSet::new(),
            mail: BTreeMap::new(),
            crash: None,
            poison: BTreeSet::new(),
            spiky: BTreeSet::new(),
        };
        let effects = this.machine.start();
        this.carry_out(effects);
        for id in 0..world {
            this.joins(format!("ada:{id}"));
        }
        this
    }

    /// A process joins on a new stream.
    pub(super) fn joins(&mut self, listen: String) -> Connection {
        let from = Connection(self.next);
        self.next += 1;
        let held = self.memory.get(&listen).cloned().unwrap_or_default();
        let join = Join { held, snapshots: listen.clone(), ..join(&listen) };
        let joined = Event::Joined { from, join };
        self.workers.insert(from, Simulated { listen, ..Simulated::default() });
        self.apply(joined).unwrap();
        from
    }

    /// The worker's process dies; another one is started in its place.
    pub(super) fn dies(&mut self, from: Connection) {
        let Some(worker) = self.workers.remove(&from) else { return };
        // It may have a newer stream: then this was only the old one.
        if !self.workers.values().any(|w| w.listen == worker.listen) {
            self.memory.remove(&worker.listen);
        }
        self.joining.retain(|listen| *listen != worker.listen);
        self.joining.push_back(format!("{}'", worker.listen));
        // Refused after the end.
        self.apply(Event::Ended { from, reason: "broke off".into() }).ok();
    }

    /// The next one of those that are about to join does.
    pub(super) fn next_joins(&mut self) -> bool {
        if self.machine.phase().is_final() {
            self.joining.clear();
        }
        let Some(listen) = self.joining.pop_front() else { return false };
        self.joins(listen);
        true
    }

    /// A run that goes on after `start` steps; `ledger` is what it committed before it ended.
    pub(super) fn resumed(world: u32, steps: u64, start: u64, ledger: &[Entry]) -> Self {
        Self::resumed_with(world, steps, start, 0, ledger, BTreeMap::new())
    }

    /// The same with a snapshot every `every` steps, by workers that hold what is in `memory`.
    pub(super) fn resumed_with(
        world: u32,
        steps: u64,
        start: u64,
        every: u64,
        ledger: &[Entry],
        memory: BTreeMap<String, Vec<Held>>,
    ) -> Self {
        let Program::Train(mut training) = program(steps) else { unreachable!() };
        training.start = start;
        let program = Program::Train(training);
        let mut recorded = Recorded::default();
        ledger.iter().for_each(|entry| recorded.note(entry));
        recorded.follow(&program);
        let settings = Settings { recorded, ..snapshotting(world, steps, Assignment::Balanced, every).settings };
        Self::remembering(Machine::new(settings, program), world, ledger.to_vec(), memory)
    }

    pub(super) fn apply(&mut self, event: Event) -> Result<(), Refusal> {
        let effects = self.machine.apply(self.now, event)?;
        self.carry_out(effects);
        Ok(())
    }

    pub(super) fn carry_out(&mut self, effects: Vec<Effect>) {
        let durable = |effect: &Effect| match self.crash {
            None => true,
            Some(Crash::AfterAppend) => matches!(effect, Effect::Append(_)),
            Some(Crash::BeforeAppend) => false,
        };
        let effects: Vec<Effect> = effects.into_iter().filter(durable).collect();
        for effect in effects {
            assert!(!self.over, "{effect:?} after the end");
            match effect {
                Effect::Append(entry) => self.ledger.push(entry),
                Effect::Send { to, message } => self.deliver(to, message.epoch.unwrap(), message.body.unwrap()),
                Effect::Assign { to, epoch, assign, .. } => self.deliver(to, epoch, Order::Assign(*assign)),
                Effect::Prune { spare } => {
                    let newest = self.ledger.iter().rev().find_map(|entry| match entry {
                        Entry::Checkpoint(checkpoint) => Some(checkpoint.step),
                        _ => None,
                    });
                    self.pruned = Some((newest, spare));
                }
                Effect::Close { .. } | Effect::MakeCheckpoint { .. } | Effect::DiscardCheckpoint { .. } => {}
                Effect::CommitCheckpoint(pending) => self.commits.push_back(pending),
                Effect::Conclude { step } => {
                    assert!(self.commits.is_empty() && !self.concluding);
                    assert_eq!(step, self.machine.status(self.now).steps);
                    self.concluding = true;
                }
                Effect::Done(_) => self.over = true,
            }
        }
    }

    pub(super) fn deliver(&mut self, to: Connection, epoch: Epoch, order: Order) {
        if self.asleep.contains(&to) {
            return self.mail.entry(to).or_default().push((epoch, order));
        }
        // What is sent to a process that is no more reaches nobody.
        let Some(worker) = self.workers.get_mut(&to) else { return };
        match order {
            Order::Assign(assign) => {
                worker.rank = assign.rank;
                worker.epoch = Some(epoch);
                let images = || assign.snapshot.iter().flat_map(|s| &s.images);
                let holders = || images().filter_map(|image| image.holder.as_ref());
                let (memory, unreachable) = (&self.memory, self.unreachable.as_ref());
                let is_gone = |address: &String| Some(address) == unreachable || !memory.contains_key(address);
                let elsewhere = |address: &String| *address != worker.listen && is_gone(address);
                let word = match holders().find(|holder| elsewhere(&holder.address)) {
                    None => Report::Ready(Ready { snapshots: true, ..Ready::default() }),
                    Some(holder) => Report::Failure(Failure {
                        rank: Some(holder.rank),
                        message: "it cannot be reached for a snapshot".into(),
                        recoverable: true,
                        snapshot: true,
                        ..Failure::default()
                    }),
                };
                worker.outbox.push_back((0, word));
                let resumed = assign.snapshot.as_ref().map(|s| s.step);
                worker.state = resumed.or(assign.resume.as_ref().map(|r| r.step)).unwrap_or(0);
                for image in assign.snapshot.iter().flat_map(|s| &s.images) {
                    let (held, holder) = (image.held.as_ref().unwrap(), image.holder.as_ref().unwrap());
                    assert_eq!(Some(held.step), resumed, "never a mix of steps");
                    let memory = self.memory.get(&holder.address);
                    assert!(memory.is_none_or(|memory| memory.contains(held)), "whoever is named has it, or is gone");
                    let Program::Train(training) = &self.machine.program else { unreachable!() };
                    let state = State::of(training, held.step, Default::default());
                    let shard = state.shard(held.step, held.rank, held.world);
                    assert_eq!(held.blake3, shard, "what was trained on is what counts");
                }
                // Everybody forgets what the new generation has no use for.
                self.memory.entry(worker.listen.clone()).or_default().retain(|held| Some(held.step) == resumed);
                worker.assign = assign;
            }
            Order::Go(go) => worker.snapshot_every = go.snapshot_every,
            Order::Forget(forget) => {
                let memory = self.memory.entry(worker.listen.clone()).or_default();
                memory.retain(|held| held.step != forget.step);
            }
            Order::Retain(retain) => {
                let committed = |e: &Entry| matches!(e, Entry::Step(s) if s.step == retain.step);
                assert!(self.ledger.iter().any(committed), "what goes is needed until its successor is committed");
                let memory = self.memory.entry(worker.listen.clone()).or_default();
                memory.retain(|held| held.step >= retain.step);
            }
            // It has begun what it said last, and perhaps what it would say next; it says so before anything else.
            Order::Halt(_) => {
                let next = worker.outbox.front().map_or(0, |(id, _)| *id);
                let begun = if next % 2 == 0 { next.max(worker.begun) } else { worker.begun };
                (worker.begun, worker.halted) = (begun, true);
                worker.outbox.push_front((0, Report::Halted(Halted { begun })));
            }
            Order::Proceed(Proceed { last }) => {
                assert!(last >= worker.begun, "what was begun is not forgotten");
                worker.outbox.retain(|(id, _)| *id <= last);
                worker.halted = false;
            }
            Order::Acknowledge(acknowledge) => {
                // Nothing is acknowledged before it is in the ledger.
                assert!(self.ledger.iter().any(|e| matches!(e, Entry::Step(s) if s.step == acknowledge.step)));
                worker.acknowledged = acknowledge.step;
            }
            Order::Abort(abort) if abort.regroup => {
                worker.outbox.clear();
                if !std::mem::replace(&mut worker.regroups, true) {
                    self.joining.push_back(worker.listen.clone());
                }
            }
            Order::Abort(_) => worker.aborted = true,
            Order::Directive(directive) => {
                assert!(!worker.aborted && !worker.regroups, "a directive after the abort");
                let report = match directive.body.unwrap() {
                    Task::Step(step) => {
                        worker.steps.push(step.step);
                        let Program::Train(training) = self.machine.program.clone() else { unreachable!() };
                        let dealt = training.plan.step(step.step);
                        if step.target_tokens != dealt.target_tokens {
                            // Heard too late: its rows are no more, and neither is its generation.
                            assert_ne!(epoch, self.machine.epoch());
                            return;
                        }
                        worker.states.insert(step.step, State::after(&training, &step));
                        let holds = |rows: &BTreeSet<u32>, m: u32| {
                            dealt.micro_batches[m as usize].rows.iter().any(|row| rows.contains(row))
                        };
                        let bad: Vec<u32> =
                            step.micro_batches.iter().copied().filter(|&m| holds(&self.poison, m)).collect();
                        assert!(step.micro_batches.len() <= step.passes as usize);
                        let part = |micro_batch: u32| LossPart {
                            micro_batch,
                            loss_sum: loss(step.step, micro_batch)
                                + if holds(&self.spiky, micro_batch) { 1e4 } else { 0.0 },
                            targets: u64::from(dealt.micro_batches[micro_batch as usize].targets),
                            correct: 0,
                        };
                        let parts = step.micro_batches.into_iter().map(part).collect();
                        let (number, micro_batch) = (step.step, bad.first().copied());
                        let failure =
                            Failure { step: Some(number), micro_batch, message: "bad".into(), ..Default::default() };
                        if step.probe {
                            Report::Step(StepReport { step: number, bad, ..Default::default() })
                        } else if micro_batch.is_some() {
                            Report::Failure(failure)
                        } else {
                            Report::Step(StepReport { step: step.step, parts, grad_norm: 0.5, ..Default::default() })
                        }
                    }
                    Task::Evaluate(evaluate) => {
                        let Program::Train(training) = program(1) else { unreachable!() };
                        let units = if evaluate.suite() == unisono_proto::v1::Suite::Test {
                            training.test
                        } else {
                            training.validation
                        };
                        let part = |micro_batch: u32| LossPart {
                            micro_batch,
                            loss_sum: 1.0,
                            targets: u64::from(units.as_slice()[micro_batch as usize].work.targets),
                            correct: 1,
                        };
                        let parts = evaluate.micro_batches.into_iter().map(part).collect();
                        Report::Evaluate(EvaluateReport { id: directive.id, parts })
                    }
                    Task::Checkpoint(Checkpoint { step, attempt, .. }) => {
                        worker.outbox.push_back((directive.id, Report::Copied(CheckpointCopied { step, attempt })));
                        let problem = self.disk.pop_front().flatten().unwrap_or_default();
                        Report::Checkpoint(CheckpointReport { step, attempt, problem, ..Default::default() })
                    }
                    Task::Generate(_) => unreachable!(),
                    Task::Finish(_) => Report::Drained(Drained {}),
                };
                worker.outbox.push_back((directive.id, report));
            }
        }
    }

    /// Lets worker `from` say its next word; false when it has none.
    pub(super) fn say(&mut self, from: Connection) -> bool {
        let Some(worker) = self.workers.get_mut(&from) else { return false };
        let next = worker.outbox.front().map_or(0, |(id, _)| *id);
        if worker.complained || worker.halted && next > worker.begun {
            return false;
        }
        let Some((id, body)) = worker.outbox.pop_front() else { return false };
        worker.begun = worker.begun.max(id);
        let every = worker.snapshot_every;
        let Assign { rank, world, ref neighbour, .. } = worker.assign;
        let states = &worker.states;
        let held = |step| {
            let blake3 = states[&step].shard(step, rank, world);
            Held { step, rank, world, timeline: states[&step].timeline.clone(), bytes: 1, blake3 }
        };
        match &body {
            Report::Step(StepReport { step, grad_norm, .. }) if *grad_norm > 0.0 => worker.state = *step, // No probe.
            Report::Failure(_) => worker.outbox.clear(), // Nothing follows it.
            Report::Copied(CheckpointCopied { step, .. }) => {
                assert_eq!(*step, worker.state, "what is saved as the state after a step is that");
            }
            _ => {}
        }
        match &body {
            Report::Step(StepReport { step, grad_norm, .. })
                if *grad_norm > 0.0 && every > 0 && step.is_multiple_of(every) =>
            {
                let own = self.memory.entry(worker.listen.clone()).or_default();
                let room = own.iter().filter(|h| (h.rank, h.world) == (rank, world)).count() < KEPT;
                let problem = match (room, self.unsent.contains(&(rank, *step))) {
                    (false, _) => "the one before it was not whole yet",
                    (true, true) => "the neighbour cannot be reached",
                    (true, false) => "",
                };
                if room {
                    own.push(held(*step));
                }
                // It takes a while.
                let later = worker.outbox.len().min(1);
                let kept = SnapshotKept { step: *step, problem: problem.into() };
                worker.outbox.insert(later, (id, Report::Kept(kept)));
            }
            Report::Kept(SnapshotKept { step, problem }) if problem.is_empty() => {
                let neighbour = &neighbour.as_ref().unwrap().address;
                // Nobody keeps it where the neighbour has died.
                let Some(theirs) = self.memory.get_mut(neighbour) else { return true };
                theirs.push(held(*step));
            }
            _ => {}
        }
        let message = WorkerMessage { epoch: worker.epoch, body: Some(body) };
        self.apply(Event::Message { from, message }).is_ok()
    }

    /// Does what the committer has to do next; a run that is over does not want to hear of it.
    pub(super) fn commit(&mut self) {
        let over = self.machine.phase().is_final();
        let told = if let Some(PendingCheckpoint { step, attempt, .. }) = self.commits.pop_front() {
            let refused = self.refusals > 0;
            self.refusals = self.refusals.saturating_sub(1);
            let result = match refused {
                true => Err(NotCommitted { message: "MANIFEST.json: the disk is full".into(), fatal: false }),
                false => Ok(CheckpointCommitted { step, ..Default::default() }),
            };
            self.apply(Event::CheckpointCommitted { attempt, result })
        } else if std::mem::take(&mut self.concluding) {
            self.apply(Event::Concluded { result: Ok(Default::default()) })
        } else {
            return;
        };
        assert_eq!(told, if over { Err(Refusal::Over) } else { Ok(()) });
    }

    pub(super) fn steps(&self) -> Vec<(u64, u64)> {
        let step = |e: &Entry| match e {
            Entry::Step(s) => Some((s.step, s.loss.to_bits())),
            _ => None,
        };
        self.ledger.iter().filter_map(step).collect()
    }

    pub(super) fn kinds(&self) -> Vec<&'static str> {
        self.ledger.iter().map(Entry::kind).collect()
    }

    pub(super) fn failure(&self) -> Failure {
        self.machine.status(self.now).failure.expect("the run has failed")
    }

    /// As [`World::settle`], but time passes too where nobody has anything to say, at most `seconds`.
    pub(super) fn settle_for(&mut self, seconds: f64) {
        let end = self.now + seconds;
        while !self.machine.phase().is_final() && self.now < end {
            self.settle();
            self.now += 0.2;
            for (&from, worker) in &self.workers {
                let message =
                    WorkerMessage { epoch: worker.epoch, body: Some(Report::Heartbeat(Heartbeat::default())) };
                // Refused after the end.
                self.machine.apply(self.now, Event::Message { from, message }).ok();
            }
            // Refused after the end.
            self.apply(Event::Tick).ok();
        }
    }

    /// Everyone speaks in turn until nobody has anything to say.
    pub(super) fn settle(&mut self) {
        loop {
            let mut spoke = self.next_joins();
            let connections: Vec<Connection> = self.workers.keys().copied().collect();
            for &from in &connections {
                spoke |= self.say(from);
            }
            let busy = !self.commits.is_empty() || self.concluding;
            self.commit();
            if !spoke && !busy {
                return;
            }
        }
    }
}

/// The losses of an undisturbed run with one worker.
pub(super) fn alone(steps: u64) -> Vec<(u64, u64)> {
    let mut world = World::new(1, steps, Assignment::Balanced);
    world.settle();
    assert_eq!(world.machine.phase(), Phase::Finished);
    world.steps()
}

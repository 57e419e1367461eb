//! Simulated workers: what they make of what they are told, and what they say.

use super::event::{Connection, Event};
use super::program::Program;
use super::simulated::{program, State, World};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    Assign, Checkpoint, CheckpointCopied, CheckpointReport, Drained, Epoch, EvaluateReport, Failure, Halted, Held,
    LossPart, Proceed, Ready, SnapshotImage, SnapshotKept, StepReport, WorkerMessage,
};

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

impl Simulated {
    pub(super) fn new(listen: String) -> Self {
        Simulated { listen, ..Simulated::default() }
    }

    /// Workers of its generation.
    pub(super) fn world(&self) -> u32 {
        self.assign.world
    }
}

/// Snapshots of one owner that a worker keeps at a time.
const KEPT: usize = 2;

pub(super) fn loss(step: u64, micro_batch: u32) -> f64 {
    1.0 + step as f64 * 0.37 + f64::from(micro_batch) * 0.011
}

impl World {
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
                let (memory, unreachable) = (&self.memory, self.unreachable.as_ref());
                let lacks = |image: &SnapshotImage| {
                    let (held, address) = (image.held.as_ref().unwrap(), &image.holder.as_ref().unwrap().address);
                    Some(address) == unreachable || !memory.get(address).is_some_and(|memory| memory.contains(held))
                };
                let stale = epoch != self.machine.epoch();
                let misled = |image: &SnapshotImage| {
                    let address = &image.holder.as_ref().unwrap().address;
                    lacks(image) && Some(address) != unreachable && memory.contains_key(address)
                };
                assert!(stale || !images().any(misled), "whoever is named has it, or is gone");
                let word = match images().find(|image| lacks(image)).and_then(|image| image.holder.as_ref()) {
                    None => Report::Ready(Ready { snapshots: true, ..Ready::default() }),
                    Some(holder) => Report::Failure(Failure {
                        rank: Some(holder.rank).filter(|_| holder.address != worker.listen),
                        message: "it cannot be reached for a snapshot".into(),
                        recoverable: true,
                        snapshot: true,
                        ..Failure::default()
                    }),
                };
                worker.outbox.push_back((0, word));
                let resumed = assign.snapshot.as_ref().map(|s| s.step);
                worker.state = resumed.or(assign.resume.as_ref().map(|r| r.step)).unwrap_or(0);
                // Everybody forgets what the new generation has no use for.
                self.memory.entry(worker.listen.clone()).or_default().retain(|held| Some(held.step) == resumed);
                worker.assign = assign;
            }
            Order::Go(go) => {
                worker.snapshot_every = go.snapshot_every;
                let first = worker.assign.snapshot.as_ref().and_then(|s| s.images.first()?.held.clone());
                if let (Some(held), 1.., Some(_)) = (first, go.snapshot_every, &worker.assign.neighbour) {
                    // Cut for those who are here now, it goes to two places again.
                    let Program::Train(training) = &self.machine.program else { unreachable!() };
                    worker.states.insert(held.step, State::of(training, held.step, held.timeline));
                    let kept = SnapshotKept { step: held.step, problem: String::new() };
                    worker.outbox.push_back((0, Report::Kept(kept)));
                }
            }
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

    /// What became of its snapshots worker `from` says after its next other word.
    pub(super) fn snapshots_fall_behind(&mut self, from: Connection) {
        let Some(worker) = self.workers.get_mut(&from) else { return };
        let other = worker.outbox.iter().position(|(_, word)| !matches!(word, Report::Kept(_)));
        if let Some(word) = other.and_then(|place| worker.outbox.remove(place)) {
            worker.outbox.push_front(word);
        }
    }

    /// Lets worker `from` say its next word; false when it has none.
    pub(super) fn say(&mut self, from: Connection) -> bool {
        let Some(worker) = self.workers.get_mut(&from) else { return false };
        let next = worker.outbox.front().map_or(0, |(id, _)| *id);
        // How far it has come it says without its computing thread.
        let halted = matches!(worker.outbox.front(), Some((_, Report::Halted(_))));
        if self.stuck.contains_key(&from) && !halted || worker.complained || worker.halted && next > worker.begun {
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
            // Nothing follows it, whatever else it is told.
            Report::Failure(_) => {
                worker.outbox.clear();
                worker.complained = true;
            }
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
                if !problem.is_empty() {
                    self.missed.push((worker.epoch.map_or(0, |epoch| epoch.generation), *step));
                }
                // It takes a while, and its turn comes after the one before it.
                let kept = |(_, word): &(u64, Report)| matches!(word, Report::Kept(_));
                let before = worker.outbox.iter().rposition(kept).map_or(0, |place| place + 1);
                let later = worker.outbox.len().min(1).max(before);
                let kept = SnapshotKept { step: *step, problem: problem.into() };
                worker.outbox.insert(later, (id, Report::Kept(kept)));
            }
            Report::Kept(SnapshotKept { step, problem }) if problem.is_empty() => {
                let neighbour = &neighbour.as_ref().unwrap().address;
                // Nobody keeps it where the neighbour has died.
                let Some(theirs) = self.memory.get_mut(neighbour) else { return true };
                let image = held(*step);
                theirs.push(image.clone());
                let own = self.memory.entry(worker.listen.clone()).or_default();
                if !own.contains(&image) {
                    own.push(image);
                }
            }
            _ => {}
        }
        let message = WorkerMessage { epoch: worker.epoch, body: Some(body) };
        self.apply(Event::Message { from, message }).is_ok()
    }
}

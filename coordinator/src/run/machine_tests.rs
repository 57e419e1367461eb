//! The machine against simulated workers: whatever the order of events, its invariants hold.

use super::cost::CostModel;
use super::event::{Connection, Effect, Event, PendingCheckpoint, Refusal};
use super::machine::{Machine, Settings};
use super::phases::Phase;
use super::plan::tests::{reversed, sizes, train, COST};
use super::plan::Plan;
use super::program::{Program, Training};
use super::recorded::Recorded;
use super::schedule::LearningRate;
use super::units::Units;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use unisono_configs::run::Assignment;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    Assign, CheckpointCommitted, CheckpointReport, Drained, Epoch, EvaluateReport, Failure, Fingerprint, Heartbeat,
    Join, LossPart, Pass, Phase as Place, Ready, RunStarted, StepReport, WorkerMessage,
};

const ROWS: usize = 23;

pub(super) fn program(assignment_steps: u64) -> Program {
    let train = unisono_configs::run::Train { steps: Some(assignment_steps), ..train(5, 4) };
    let cost: CostModel = COST;
    let plan = Plan::new(sizes(ROWS), reversed(ROWS), &train, cost).unwrap();
    Program::Train(Training {
        rate: LearningRate::new(&train, plan.steps()),
        plan: Arc::new(plan),
        validation: Units::evaluation("validation", &sizes(9), &train, cost, 256).unwrap(),
        test: Units::evaluation("test", &sizes(4), &train, cost, 256).unwrap(),
        eval_every: 3,
        checkpoint_every: 4,
        start: 0,
    })
}

fn machine(world: u32, steps: u64, assignment: Assignment) -> Machine {
    let settings = Settings {
        run_dir: "/runs/one".into(),
        term: 3,
        world,
        assignment,
        seed: 1,
        assign: Assign { trains: true, ..Assign::default() },
        peer_secret: [7; 32],
        started: RunStarted::default(),
        recorded: Recorded::default(),
        tasks: vec!["a".into(), "b".into(), "c".into()],
        silence: 10.0,
    };
    Machine::new(settings, program(steps))
}

fn join(listen: &str) -> Join {
    let fingerprint = Fingerprint { device: "cpu".into(), libtorch: "2.11.0".into(), ..Default::default() };
    Join { listen: listen.into(), host: "ada".into(), pid: 1, fingerprint: Some(fingerprint) }
}

/// A worker that does what it is told, and what it has not said yet.
#[derive(Default)]
pub(super) struct Simulated {
    rank: u32,
    epoch: Option<Epoch>,
    outbox: VecDeque<Report>,
    pub(super) steps: Vec<u64>,
    acknowledged: u64,
    aborted: bool,
}

/// The world around a machine: workers, ledger and committer.
pub(super) struct World {
    pub(super) machine: Machine,
    pub(super) now: f64,
    pub(super) workers: BTreeMap<Connection, Simulated>,
    pub(super) ledger: Vec<Entry>,
    commits: VecDeque<PendingCheckpoint>,
    concluding: bool,
    over: bool,
}

fn loss(step: u64, micro_batch: u32) -> f64 {
    1.0 + step as f64 * 0.37 + f64::from(micro_batch) * 0.011
}

impl World {
    pub(super) fn new(world: u32, steps: u64, assignment: Assignment) -> Self {
        Self::with(machine(world, steps, assignment), world, Vec::new())
    }

    fn with(machine: Machine, world: u32, ledger: Vec<Entry>) -> Self {
        let mut this = World {
            machine,
            now: 100.0,
            workers: BTreeMap::new(),
            ledger,
            commits: VecDeque::new(),
            concluding: false,
            over: false,
        };
        let effects = this.machine.start();
        this.carry_out(effects);
        for id in 0..world {
            let from = Connection(u64::from(id));
            this.workers.insert(from, Simulated::default());
            this.apply(Event::Joined { from, join: join(&format!("ada:{id}")) }).unwrap();
        }
        this
    }

    /// A run that goes on after `start` steps; `ledger` is what it committed before it ended.
    pub(super) fn resumed(world: u32, steps: u64, start: u64, ledger: &[Entry]) -> Self {
        let Program::Train(mut training) = program(steps) else { unreachable!() };
        training.start = start;
        let program = Program::Train(training);
        let mut recorded = Recorded::default();
        ledger.iter().for_each(|entry| recorded.note(entry));
        recorded.follow(&program);
        let settings = Settings { recorded, ..machine(world, steps, Assignment::Balanced).settings };
        Self::with(Machine::new(settings, program), world, ledger.to_vec())
    }

    fn apply(&mut self, event: Event) -> Result<(), Refusal> {
        let effects = self.machine.apply(self.now, event)?;
        self.carry_out(effects);
        Ok(())
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            assert!(!self.over, "{effect:?} after the end");
            match effect {
                Effect::Append(entry) => self.ledger.push(entry),
                Effect::Send { to, message } => self.deliver(to, message.epoch.unwrap(), message.body.unwrap()),
                Effect::Close { .. } | Effect::MakeCheckpoint { .. } => {}
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

    fn deliver(&mut self, to: Connection, epoch: Epoch, order: Order) {
        let worker = self.workers.get_mut(&to).unwrap();
        match order {
            Order::Assign(assign) => {
                worker.rank = assign.rank;
                worker.epoch = Some(epoch);
                worker.outbox.push_back(Report::Ready(Ready::default()));
            }
            Order::Go(_) => {}
            Order::Acknowledge(acknowledge) => {
                // Nothing is acknowledged before it is in the ledger.
                assert!(self.ledger.iter().any(|e| matches!(e, Entry::Step(s) if s.step == acknowledge.step)));
                worker.acknowledged = acknowledge.step;
            }
            Order::Abort(_) => worker.aborted = true,
            Order::Directive(directive) => {
                assert!(!worker.aborted, "a directive after the abort");
                let mine = |passes: &[Pass]| -> Vec<u32> {
                    let shares = passes.iter().flat_map(|p| &p.shares);
                    shares.filter(|s| s.rank == worker.rank).map(|s| s.micro_batch).collect()
                };
                let report = match directive.body.unwrap() {
                    Task::Step(step) => {
                        worker.steps.push(step.step);
                        let Program::Train(training) = program(self.machine.status(0.0).steps) else { unreachable!() };
                        let dealt = training.plan.step(step.step);
                        assert_eq!(step.target_tokens, dealt.target_tokens);
                        let all: BTreeSet<u32> =
                            step.passes.iter().flat_map(|p| &p.shares).map(|s| s.micro_batch).collect();
                        assert_eq!(all.len(), dealt.micro_batches.len());
                        let part = |micro_batch: u32| LossPart {
                            micro_batch,
                            loss_sum: loss(step.step, micro_batch),
                            targets: u64::from(dealt.micro_batches[micro_batch as usize].targets),
                            correct: 0,
                        };
                        let parts = mine(&step.passes).into_iter().map(part).collect();
                        Report::Step(StepReport { step: step.step, parts, grad_norm: 0.5, ..Default::default() })
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
                        let parts = mine(&evaluate.passes).into_iter().map(part).collect();
                        Report::Evaluate(EvaluateReport { id: directive.id, parts })
                    }
                    Task::Checkpoint(checkpoint) => {
                        Report::Checkpoint(CheckpointReport { step: checkpoint.step, files: Vec::new() })
                    }
                    Task::Generate(_) => unreachable!(),
                    Task::Finish(_) => Report::Drained(Drained {}),
                };
                worker.outbox.push_back(report);
            }
        }
    }

    /// Lets worker `from` say its next word; false when it has none.
    fn say(&mut self, from: Connection) -> bool {
        let worker = self.workers.get_mut(&from).unwrap();
        let Some(body) = worker.outbox.pop_front() else { return false };
        let message = WorkerMessage { epoch: worker.epoch, body: Some(body) };
        self.apply(Event::Message { from, message }).is_ok()
    }

    /// Does what the committer has to do next; a run that is over does not want to hear of it.
    fn commit(&mut self) {
        let over = self.machine.phase().is_final();
        let told = if let Some(PendingCheckpoint { step, .. }) = self.commits.pop_front() {
            let entry = CheckpointCommitted { step, ..Default::default() };
            self.apply(Event::CheckpointCommitted { step, result: Ok(entry) })
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

    fn kinds(&self) -> Vec<&'static str> {
        self.ledger.iter().map(Entry::kind).collect()
    }

    pub(super) fn failure(&self) -> Failure {
        self.machine.status(self.now).failure.expect("the run has failed")
    }

    /// Everyone speaks in turn until nobody has anything to say.
    pub(super) fn settle(&mut self) {
        let connections: Vec<Connection> = self.workers.keys().copied().collect();
        loop {
            let mut spoke = false;
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whoever speaks first, and whatever else happens, every committed step is the one that a lone worker commits.
    #[test]
    fn any_order_of_events_keeps_the_invariants(
        workers in 1u32..5, steps in 1u64..12, shuffled: bool,
        events in prop::collection::vec((0u8..12, 0u64..5), 0..250),
        fatal in prop::option::of((0usize..250, 0u8..5)),
    ) {
        let assignment = if shuffled { Assignment::Shuffled } else { Assignment::Balanced };
        let mut world = World::new(workers, steps, assignment);
        for (index, (kind, pick)) in events.into_iter().enumerate() {
            world.now += 0.5;
            let from = Connection(pick % u64::from(workers));
            let state = world.machine.phase();
            match kind {
                0..=7 => { world.say(from); }
                8 => world.commit(),
                9 => {
                    let heartbeat = Heartbeat { phase: Place::Forward.into(), step: Some(1) };
                    for (&from, worker) in &world.workers {
                        let message = WorkerMessage { epoch: worker.epoch, body: Some(Report::Heartbeat(heartbeat)) };
                        // Refused after the end.
                        world.machine.apply(world.now, Event::Message { from, message }).ok();
                    }
                }
                10 => {
                    let stale = Epoch { term: 2, generation: 9 };
                    let message = WorkerMessage { epoch: Some(stale), body: Some(Report::Step(StepReport::default())) };
                    let refused = world.apply(Event::Message { from, message });
                    prop_assert!(refused.is_err());
                }
                _ => {
                    let more = Event::Joined { from: Connection(99), join: join("ada:9") };
                    prop_assert!(world.apply(more).is_err());
                }
            }
            if state.is_final() {
                prop_assert_eq!(world.machine.phase(), state);
            }
            if let Some((at, how)) = fatal {
                if at == index && !world.machine.phase().is_final() {
                    let message = |body| WorkerMessage { epoch: world.workers[&from].epoch, body: Some(body) };
                    let failure = Failure { phase: Place::Forward.into(), message: "no memory".into(), ..Default::default() };
                    let event = match how {
                        0 => Event::Ended { from, reason: "ended".into() },
                        1 => Event::Message { from, message: message(Report::Failure(failure)) },
                        2 => Event::Message { from, message: message(Report::Drained(Drained {})) },
                        3 => Event::Stop { reason: "enough".into() },
                        _ => {
                            world.now += 11.0;
                            Event::Tick
                        }
                    };
                    world.apply(event).unwrap();
                    let drained = matches!(world.machine.phase(), Phase::Finished) || world.ledger.len() > 1;
                    prop_assert!(drained);
                }
            }
        }
        if !world.machine.phase().is_final() {
            world.settle();
        }
        prop_assert!(world.machine.phase().is_final() || fatal.is_some());
        let committed = world.steps();
        let reference = alone(steps);
        prop_assert_eq!(&committed[..], &reference[..committed.len()], "a prefix, to the bit");
        if world.machine.phase() == Phase::Finished {
            prop_assert_eq!(committed.len(), reference.len());
            prop_assert_eq!(world.kinds().last().copied(), Some("done"));
            prop_assert!(world.workers.values().all(|w| w.acknowledged == steps && !w.aborted));
        }
        if world.machine.phase() == Phase::Failed {
            prop_assert_eq!(world.kinds().last().copied(), Some("failed"));
            prop_assert!(world.workers.values().all(|w| w.aborted));
            prop_assert!(!world.failure().message.is_empty());
        }
        for worker in world.workers.values() {
            // Directives come in order, without gaps, and never far ahead of what is committed.
            prop_assert!(worker.steps.iter().copied().eq(1..=worker.steps.len() as u64));
            prop_assert!(worker.steps.len() <= committed.len() + 4);
        }
    }
}

#[test]
fn a_run_evaluates_and_saves_when_it_should() {
    let mut world = World::new(2, 7, Assignment::Balanced);
    world.settle();
    let told: Vec<String> = world
        .ledger
        .iter()
        .filter_map(|e| match e {
            Entry::Step(s) => Some(format!("step {}", s.step)),
            Entry::Eval(e) if e.task.is_empty() => Some(format!("{} {}", e.split, e.step)),
            Entry::Checkpoint(c) => Some(format!("checkpoint {}", c.step)),
            Entry::Done(d) => Some(format!("done {}", d.steps)),
            _ => None,
        })
        .collect();
    let expected = [
        "step 1",
        "step 2",
        "step 3",
        "validation 3",
        "step 4",
        "checkpoint 4",
        "step 5",
        "step 6",
        "validation 6",
        "step 7",
        "validation 7",
        "checkpoint 7",
        "test 7",
        "done 7",
    ];
    let mut sorted = told.clone();
    sorted.sort();
    let mut wanted: Vec<String> = expected.iter().map(|s| s.to_string()).collect();
    wanted.sort();
    assert_eq!(sorted, wanted, "{told:?}");
    assert_eq!(told.last().unwrap(), "done 7");
    assert_eq!(world.kinds().iter().filter(|k| **k == "memory").count(), 4);
}

#[test]
fn the_lost_rank_is_named_and_not_the_one_that_noticed() {
    let mut world = World::new(3, 5, Assignment::Balanced);
    (0..3).for_each(|id| {
        world.say(Connection(id));
    });
    let complaint =
        Failure { phase: Place::Reduce.into(), step: Some(1), message: "peer closed".into(), ..Default::default() };
    let message = WorkerMessage { epoch: world.workers[&Connection(0)].epoch, body: Some(Report::Failure(complaint)) };
    world.apply(Event::Message { from: Connection(0), message }).unwrap();
    // It leaves, as it said, before anyone hears of the one that is really lost.
    world.apply(Event::Ended { from: Connection(0), reason: "ended".into() }).unwrap();
    assert_eq!(world.machine.phase(), Phase::Running);
    world.apply(Event::Ended { from: Connection(2), reason: "broke".into() }).unwrap();
    let failure = world.failure();
    assert_eq!((failure.rank, failure.host.as_str(), failure.step), (Some(2), "ada", Some(1)));
    assert!(failure.message.contains("was lost"), "{}", failure.message);
    assert!(world.workers.values().all(|w| w.aborted));
}

#[test]
fn a_complaint_that_nothing_explains_fails_the_run_by_itself() {
    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    let complaint =
        Failure { phase: Place::Reduce.into(), step: Some(1), message: "bad frame".into(), ..Default::default() };
    let message = WorkerMessage { epoch: world.workers[&Connection(1)].epoch, body: Some(Report::Failure(complaint)) };
    world.apply(Event::Message { from: Connection(1), message }).unwrap();
    world.now += 1.0;
    world.apply(Event::Tick).unwrap();
    assert_eq!(world.machine.phase(), Phase::Running);
    world.now += 1.5;
    world.apply(Event::Tick).unwrap();
    assert_eq!((world.failure().rank, world.failure().message.as_str()), (Some(1), "bad frame"));
}

#[test]
fn a_silent_worker_is_lost() {
    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    world.now += 9.0;
    world.say(Connection(0));
    world.now += 2.0;
    world.apply(Event::Tick).unwrap();
    let failure = world.failure();
    assert_eq!(failure.rank, Some(1));
    assert_eq!((failure.phase(), failure.step), (Place::Forward, Some(1)));
    assert!(failure.message.contains("silent for 11 s"), "{}", failure.message);
}

#[test]
fn joins_are_refused_with_a_sentence() {
    let mut machine = machine(2, 5, Assignment::Balanced);
    let mut other = join("ada:2");
    other.fingerprint.as_mut().unwrap().libtorch = "2.10.0".into();
    machine.apply(0.0, Event::Joined { from: Connection(0), join: join("ada:1") }).unwrap();
    let refused = machine.apply(0.0, Event::Joined { from: Connection(1), join: other }).unwrap_err().to_string();
    assert!(refused.contains("libtorch \"2.10.0\" against \"2.11.0\""), "{refused}");
    let refused = machine.apply(0.0, Event::Joined { from: Connection(2), join: join("") }).unwrap_err().to_string();
    assert!(refused.contains("did not say"), "{refused}");
    // One that leaves before the run begins is forgotten.
    machine.apply(0.0, Event::Ended { from: Connection(0), reason: "ended".into() }).unwrap();
    machine.apply(0.0, Event::Joined { from: Connection(3), join: join("ada:3") }).unwrap();
    assert_eq!(machine.phase(), Phase::Gathering);
    machine.apply(0.0, Event::Joined { from: Connection(4), join: join("ada:4") }).unwrap();
    assert_eq!(machine.phase(), Phase::Loading);
    let refused = machine.apply(0.0, Event::Joined { from: Connection(5), join: join("ada:5") }).unwrap_err();
    assert!(refused.to_string().contains("--workers 3"), "{refused}");
}

#[test]
fn a_worker_that_answers_out_of_turn_or_wrongly_is_named() {
    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    let epoch = world.workers[&Connection(1)].epoch;
    let report = StepReport { step: 2, ..Default::default() };
    let message = WorkerMessage { epoch, body: Some(Report::Step(report)) };
    world.apply(Event::Message { from: Connection(1), message }).unwrap();
    assert_eq!(world.failure().rank, Some(1));
    assert!(world.failure().message.contains("step 2"));

    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    if let Some(Report::Step(report)) = world.workers.get_mut(&Connection(1)).unwrap().outbox.front_mut() {
        report.grad_norm = 0.25;
    }
    world.settle();
    assert!(world.failure().message.contains("rank 1 has"), "{}", world.failure().message);
    assert!(world.steps().is_empty());
}

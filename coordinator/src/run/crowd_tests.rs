//! The machine before thousands of workers: what it decides stays right, and costs no more for each of them.

use super::event::{Connection, Effect, Event};
use super::machine::Machine;
use super::phases::Phase;
use super::plan::tests::{reversed, sizes, train, COST};
use super::plan::Plan;
use super::program::{Program, Training};
use super::schedule::LearningRate;
use super::simulated::{join, settings};
use super::units::Units;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use unisono_configs::run::Assignment;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{CheckpointCommitted, WorkerMessage};
use unisono_proto::v1::{CheckpointCopied, CheckpointReport, Drained, Epoch, Heartbeat, LossPart, Ready, StepReport};

const STEPS: u64 = 6;

/// Heartbeats of each worker within a step.
const BEATS: usize = 4;

/// A run of [`STEPS`] steps, a micro-batch for each of `world` workers.
struct Crowd {
    machine: Machine,
    training: Training,
    epoch: Epoch,
    committed: Vec<u64>,
    running: bool,
    over: bool,
}

impl Crowd {
    fn new(world: u32) -> Self {
        let train = unisono_configs::run::Train { steps: Some(STEPS), ..train(2 * world as usize, world as usize) };
        let rows = 2 * world as usize * STEPS as usize;
        let plan = Plan::new(Arc::new(sizes(rows)), reversed(rows), &train, COST).unwrap();
        let none = || Units::evaluation("validation", &[], &train, COST, 256).unwrap();
        let training = Training {
            rate: LearningRate::new(&train, plan.steps()),
            plan: Arc::new(plan),
            validation: none(),
            test: none(),
            eval_every: 0,
            checkpoint_every: 0,
            start: 0,
            prepared: u64::MAX,
        };
        let machine = Machine::new(settings(world, Assignment::Balanced), Program::Train(training.clone()));
        Crowd { machine, training, epoch: Epoch::default(), committed: Vec::new(), running: false, over: false }
    }

    /// Runs to the end and says what processor time it took, the workers' answers included: until all were ready, and from then
    /// on.
    fn run(&mut self, world: u32) -> [Duration; 2] {
        let (begun, mut ready) = (thread_time(), Duration::ZERO);
        let mut events: VecDeque<Event> = VecDeque::new();
        for id in 0..world {
            events.push_back(Event::Joined { from: Connection(id.into()), join: join(&format!("ada:{id}")) });
        }
        let mut now = 1.0;
        while let Some(event) = events.pop_front() {
            now += 1e-6;
            let effects = self.machine.apply(now, event).unwrap();
            if !self.running && self.machine.phase() == Phase::Running {
                (self.running, ready) = (true, thread_time());
            }
            for effect in effects {
                self.answer(effect, &mut events);
            }
        }
        [ready - begun, thread_time() - ready]
    }

    fn answer(&mut self, effect: Effect, events: &mut VecDeque<Event>) {
        let epoch = |epoch: Epoch, body| WorkerMessage { epoch: Some(epoch), body: Some(body) };
        match effect {
            Effect::Append(Entry::Step(step)) => self.committed.push(step.step),
            Effect::Assign { to, epoch: assigned, .. } => {
                self.epoch = assigned;
                let ready = Report::Ready(Ready::default());
                events.push_back(Event::Message { from: to, message: epoch(assigned, ready) });
            }
            Effect::Send { to: from, message } => {
                let Some(Order::Directive(directive)) = message.body else { return };
                let mut say = |body| events.push_back(Event::Message { from, message: epoch(self.epoch, body) });
                match directive.body.unwrap() {
                    Task::Step(step) => {
                        let dealt = self.training.plan.dealt(step.step);
                        let part = |&micro_batch: &u32| LossPart {
                            micro_batch,
                            loss_sum: 1.0,
                            targets: u64::from(dealt.micro_batches[micro_batch as usize].targets),
                            correct: 0,
                        };
                        let parts = step.micro_batches.iter().map(part).collect();
                        (0..BEATS).for_each(|_| say(Report::Heartbeat(Heartbeat::default())));
                        say(Report::Step(StepReport { step: step.step, parts, grad_norm: 1.0, ..Default::default() }));
                    }
                    Task::Checkpoint(save) => {
                        let (step, attempt) = (save.step, save.attempt);
                        say(Report::Copied(CheckpointCopied { step, attempt }));
                        say(Report::Checkpoint(CheckpointReport { step, attempt, ..Default::default() }));
                    }
                    Task::Finish(_) => say(Report::Drained(Drained {})),
                    _ => unreachable!("nothing is evaluated"),
                }
            }
            Effect::CommitCheckpoint(pending) => {
                let result = Ok(CheckpointCommitted { step: pending.step, ..Default::default() });
                events.push_back(Event::CheckpointCommitted { attempt: pending.attempt, result });
            }
            Effect::Conclude { .. } => events.push_back(Event::Concluded { result: Ok(Default::default()) }),
            Effect::Done(outcome) => {
                assert_eq!(outcome.failure, None);
                self.over = true;
            }
            _ => {}
        }
    }
}

/// What this thread has computed so far, however busy the machine is.
fn thread_time() -> Duration {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(times.split_whitespace().next().unwrap().parse().unwrap())
}

/// Microseconds of processor time for each worker, until all are ready, and for each worker and step, over runs of `workers`
/// workers in all: the kernel counts in milliseconds.
fn cost(world: u32, workers: u32) -> [f64; 2] {
    let mut whole = [Duration::ZERO; 2];
    let times = workers.div_ceil(world);
    for _ in 0..times {
        let mut crowd = Crowd::new(world);
        let [joining, running] = crowd.run(world);
        whole = [whole[0] + joining, whole[1] + running];
        assert!(crowd.over);
        assert!(crowd.committed.iter().copied().eq(1..=STEPS), "{:?}", crowd.committed);
    }
    let [joining, running] = whole.map(|time| time.as_secs_f64() * 1e6 / f64::from(world * times));
    [joining, running / STEPS as f64]
}

#[test]
fn ten_times_the_workers_cost_ten_times_as_much() {
    let ([_, few], [_, many]) = (cost(500, 10_000), cost(5000, 10_000));
    // Were it quadratic, it would be ten times.
    assert!(many < 4.0 * few, "{few:.2} us for each of 500 workers and step, {many:.2} us for each of 5,000");
}

#[test]
#[ignore = "long: prints a table"]
fn the_cost_of_ten_thousand_workers() {
    for world in [1, 10, 100, 1_000, 10_000] {
        let [joining, step] = cost(world, 20_000);
        println!("{world:>6} workers: {step:>6.2} us for each worker and step, {joining:>6.2} us for each that joins");
    }
}

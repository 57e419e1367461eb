//! A small run for the simulations: its program, the machine that decides on it, and who joins.

use super::cost::CostModel;
use super::machine::{Machine, Rows, Settings};
use super::plan::tests::{reversed, sizes, train, COST};
use super::plan::Plan;
use super::program::{Program, Training};
use super::recorded::Recorded;
use super::schedule::LearningRate;
use super::snapshots::Snapshotting;
use super::spike::Rule;
use super::units::Units;
use std::sync::Arc;
use unisono_configs::model::{Bucket, Layout, TensorSlot, CHUNK};
use unisono_configs::run::{Assignment, OnBadNumbers, OnSpike};
use unisono_proto::v1::{Assign, Fingerprint, Join, RunStarted, Step};

pub(super) const ROWS: usize = 23;

pub(super) fn program(assignment_steps: u64) -> Program {
    let train = unisono_configs::run::Train { steps: Some(assignment_steps), ..train(5, 4) };
    let cost: CostModel = COST;
    let plan = Plan::new(Arc::new(sizes(ROWS)), reversed(ROWS), &train, cost).unwrap();
    Program::Train(Training {
        rate: LearningRate::new(&train, plan.steps()),
        plan: Arc::new(plan),
        validation: Units::evaluation("validation", &sizes(9), &train, cost, 256).unwrap(),
        test: Units::evaluation("test", &sizes(4), &train, cost, 256).unwrap(),
        eval_every: 3,
        checkpoint_every: 4,
        start: 0,
        prepared: u64::MAX,
    })
}

pub(super) fn machine(world: u32, steps: u64, assignment: Assignment) -> Machine {
    snapshotting(world, steps, assignment, 0)
}

/// With a snapshot every `every` steps.
pub(super) fn snapshotting(world: u32, steps: u64, assignment: Assignment, every: u64) -> Machine {
    let mut settings = settings(world, assignment);
    settings.snapshots.every = every;
    Machine::new(settings, program(steps))
}

pub(super) fn settings(world: u32, assignment: Assignment) -> Settings {
    Settings {
        run_dir: "/runs/one".into(),
        term: 3,
        world,
        assignment,
        seed: 1,
        assign: Assign { trains: true, rejoin_timeout: 30.0, peer_timeout: 60.0, ..Assign::default() },
        peer_secret: [7; 32],
        started: RunStarted::default(),
        recorded: Recorded::default(),
        tasks: vec!["a".into(), "b".into(), "c".into()],
        lease: 10.0,
        restarts: 3,
        spike: Default::default(),
        rows: Rows(Arc::new(|key| vec![format!("row {}", key.micro_batch)])),
        grace: 10.0,
        hang_after: 5.0,
        snapshots: Snapshotting { every: 0, layout: Arc::new(layout()), timelines: vec![([1; 32], u64::MAX)] },
        on_spike: Default::default(),
        on_bad_numbers: Default::default(),
    }
}

/// The same for a run that leaves out what is poisoned.
pub(super) fn quarantining(world: u32) -> Settings {
    let settings = settings(world, Assignment::Balanced);
    let spike = Rule { window: 3, mads: 3000.0 };
    Settings { on_bad_numbers: OnBadNumbers::Quarantine, on_spike: OnSpike::Quarantine, spike, ..settings }
}

/// Two buckets of 7 and 3 chunks.
pub(super) fn layout() -> Layout {
    let bucket = |name: &str, chunks: usize| {
        let (shape, elements) = (vec![chunks * CHUNK - 5], chunks * CHUNK - 5);
        Bucket { name: name.into(), tensors: vec![TensorSlot { name: name.into(), shape, offset: 0 }], elements }
    };
    Layout { buckets: vec![bucket("a", 7), bucket("b", 3)] }
}

pub(super) fn join(listen: &str) -> Join {
    let fingerprint = Fingerprint { device: "cpu".into(), libtorch: "2.11.0".into(), ..Default::default() };
    Join { listen: listen.into(), host: "ada".into(), pid: 1, fingerprint: Some(fingerprint), ..Default::default() }
}

/// What a state depends on, and its timeline.
pub(super) struct State {
    rows: Vec<u32>,
    pub(super) timeline: bytes::Bytes,
}

impl State {
    pub(super) fn of(training: &Training, step: u64, timeline: bytes::Bytes) -> Self {
        State { rows: training.plan.committed_rows(step), timeline }
    }

    pub(super) fn after(training: &Training, step: &Step) -> Self {
        State::of(training, step.step, step.timeline.clone())
    }

    /// The hash of a shard of it.
    pub(super) fn shard(&self, step: u64, rank: u32, world: u32) -> bytes::Bytes {
        let mut hasher = blake3::Hasher::new();
        for number in [step, u64::from(rank), u64::from(world)].into_iter().chain(self.rows.iter().map(|&r| r.into())) {
            hasher.update(&number.to_le_bytes());
        }
        hasher.finalize().as_bytes().to_vec().into()
    }
}

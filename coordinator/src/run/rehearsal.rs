//! A small run for the simulations: its program, the machine that decides on it, and who joins.

use super::cost::CostModel;
use super::machine::{Machine, Rows, Settings};
use super::plan::tests::{reversed, sizes, train, COST};
use super::plan::Plan;
use super::program::{Program, Training};
use super::recorded::Recorded;
use super::schedule::LearningRate;
use super::snapshots::Snapshotting;
use super::units::Units;
use std::sync::Arc;
use unisono_configs::model::{Bucket, Layout, TensorSlot, CHUNK};
use unisono_configs::run::Assignment;
use unisono_proto::v1::{Assign, Fingerprint, Join, RunStarted};

const ROWS: usize = 23;

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
        snapshots: Snapshotting { every: 0, layout: Arc::new(layout()), timeline: [1; 32] },
    }
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

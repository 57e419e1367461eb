//! Snapshots in memory: a worker lost between checkpoints costs a few steps, and the result stays what it was.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::path::Path;
use std::time::Duration;
use unisono_tests::chronicle;
use unisono_tests::kills::{ended_well, train, undisturbed, Dice};
use unisono_tests::processes::kill;
use unisono_tests::train::{Live, Train};

const STEPS: u64 = 60;
const EVERY: u64 = 4;

/// Without a checkpoint before the end.
fn run(dir: &Path, workers: usize) -> Train {
    train(dir, STEPS).set("checkpoint.every", 0).set("checkpoint.snapshot_every", EVERY).workers(workers)
}

/// The next membership: after which step it goes on, whether from memory, and how many steps again.
fn regrouped(live: &mut Live) -> (u64, bool, u64) {
    let told = live.wait_for("membership");
    let number = |field: &str| told[field].as_u64().unwrap();
    (number("resume_step"), told["from_memory"] == Value::Bool(true), number("replayed"))
}

#[test]
fn a_lost_worker_costs_the_steps_since_the_newest_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    for workers in [2, 3] {
        let mut live = run(dir.path(), workers).start();
        live.wait_for("membership");
        for round in [1, 2] {
            live.wait_for_step(10 * round);
            kill(live.workers()[round as usize % workers].pid);
            let (step, from_memory, replayed) = regrouped(&mut live);
            assert!(from_memory && step > 0, "it begins again after step {step}");
            assert!(replayed <= EVERY + 1, "{replayed} steps are computed again");
        }
        // A coordinator that comes back finds what workers hold.
        live.wait_for_step(30);
        kill(live.coordinator().pid);
        let (step, from_memory, replayed) = regrouped(&mut live);
        assert!(from_memory && step > 20 && replayed <= EVERY + 1, "after step {step}, {replayed} again");
        assert_eq!(ended_well(&live.finish()), whole);
    }
}

#[test]
fn where_both_places_are_lost_the_checkpoint_is_gone_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let mut live = run(dir.path(), 2).set("checkpoint.every", 7).start();
    live.wait_for("membership");
    live.wait_for_step(20);
    live.workers().iter().for_each(|worker| kill(worker.pid));
    let (step, from_memory, _) = regrouped(&mut live);
    assert!(!from_memory && step >= 7 && step % 7 == 0, "after step {step}");
    assert_eq!(ended_well(&live.finish()), whole);
}

#[test]
fn a_death_while_a_snapshot_is_handed_over_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let armed = tempfile::tempdir().unwrap();
    let mut live = run(dir.path(), 2).env("UNISONO_FAIL_POINTS", armed.path()).start();
    live.wait_for("membership");
    live.wait_for_step(2 * EVERY + 1);
    std::fs::write(armed.path().join("snapshot"), "").unwrap();
    let (step, from_memory, _) = regrouped(&mut live);
    assert!(from_memory && step >= EVERY, "after step {step}");
    assert_eq!(ended_well(&live.finish()), whole);
}

/// `UNISONO_LOSSES` (default 20) of workers and coordinators at any instant, from `UNISONO_SEED`, a few in each run.
#[test]
#[ignore = "minutes; make chaos"]
fn many_losses_cost_few_steps() {
    const STEPS: u64 = 800;
    let (losses, seed) = (chronicle::asked("UNISONO_LOSSES", 20), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut made, mut run) = (0, 0);
    while made < losses {
        let mut dice = Dice(seed.wrapping_mul(3_000_017) + run);
        let (workers, every) = ([2, 3, 5][run as usize % 3], [5, 1, 3, 10][run as usize % 4]);
        let train = train(dir.path(), STEPS).set("checkpoint.every", 0).set("checkpoint.snapshot_every", every);
        let mut live = train.workers(workers).start();
        live.wait_for("membership");
        let mut replays = Vec::new();
        while made < losses && live.newest_step() + 100 < STEPS {
            // Everybody has taken a snapshot since the last loss.
            let until = live.newest_step() + 2 * every + 2;
            live.wait_for_step(until);
            std::thread::sleep(Duration::from_millis(dice.roll(200)));
            let there = live.workers();
            match dice.roll(5) {
                0 => kill(live.coordinator().pid),
                _ => kill(there[dice.roll(there.len() as u64) as usize].pid),
            }
            let (step, from_memory, replayed) = regrouped(&mut live);
            assert!(from_memory && replayed <= every + 1, "{replayed} steps again after step {step}: every {every}");
            replays.push(replayed);
            made += 1;
        }
        println!("seed {seed}, run {run}: {workers} workers, a snapshot every {every}: {replays:?}");
        let line = json!({"seed": seed, "run": run, "workers": workers, "every": every, "replays": replays});
        chronicle::note("snapshot-replays", line);
        assert_eq!(ended_well(&live.finish()), whole);
        run += 1;
    }
}

//! Whoever is killed, and wherever: the run goes on by itself, and its digest is that of the undisturbed run.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use unisono_tests::chronicle;
use unisono_tests::kills::{disturb, undisturbed, Dice, Kill, Plan, FIRST, LATE};

#[test]
fn a_death_at_every_place_changes_no_bit() {
    const STEPS: u64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let plan =
        Plan { steps: STEPS, workers: 2, viewers: 1, first: Some("load"), kills: Kill::all(), late: LATE.to_vec() };
    let told = disturb(dir.path(), &plan, &mut Dice(7));
    // Three kinds are two deaths each; one before the first step, two after the last one.
    assert_eq!(told.deaths.len(), plan.kills.len() + 6, "the run was too short: {:?}", told.deaths);
    assert_eq!((told.digest, told.losses), whole);
}

/// `UNISONO_KILLS` deaths (20 where it is not set) in runs of one to three workers, from `UNISONO_SEED`: every kind once
/// before any comes again.
#[test]
#[ignore = "minutes; make chaos"]
fn many_deaths_change_no_bit() {
    const STEPS: u64 = 700;
    let (kills, seed) = (chronicle::asked("UNISONO_KILLS", 20), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut made, mut run, mut bag) = (0, 0, Vec::new());
    while made < kills {
        let mut dice = Dice(seed.wrapping_mul(1_000_003) + run);
        while bag.len() < 12 {
            let mut kinds = Kill::all();
            dice.shuffle(&mut kinds);
            bag.extend(kinds);
        }
        let plan = Plan {
            steps: STEPS,
            workers: [2, 3, 1][run as usize % 3],
            viewers: 2,
            first: FIRST.get(dice.roll(FIRST.len() as u64 + 1) as usize).copied(),
            kills: bag.drain(..12).collect(),
            late: LATE[..dice.roll(LATE.len() as u64 + 1) as usize].to_vec(),
        };
        let told = disturb(dir.path(), &plan, &mut dice);
        let same = (&told.digest, &told.losses) == (&whole.0, &whole.1);
        let common = json!({"seed": seed, "run": run, "workers": plan.workers, "viewers": plan.viewers,
                            "steps": STEPS, "same": same, "load": chronicle::load()});
        for death in &told.deaths {
            let mut line = common.clone();
            line.as_object_mut().unwrap().extend(death.as_object().unwrap().clone());
            chronicle::note("death", line);
        }
        let mut line = common.clone();
        line["replays"] = Value::from(told.replays.clone());
        chronicle::note("replays", line);
        assert!(same, "seed {seed}, run {run}: digest {} instead of {} after {:?}", told.digest, whole.0, told.deaths);
        made += told.deaths.len() as u64;
        println!("seed {seed}, run {run}: {} deaths, {made} of {kills} in all", told.deaths.len());
        run += 1;
    }
}

//! The number of workers changes, between starts and while the run goes on: the digest does not.

#![allow(clippy::unwrap_used)]

use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use unisono_tests::chronicle;
use unisono_tests::crowd::Crowd;
use unisono_tests::kills::{result, settings, train, undisturbed, Dice};
use unisono_tests::processes::{kill, signal, wait_until_gone};
use unisono_tests::train::Train;

/// All that a run can be divided among: one worker for each micro-batch at most.
const WORLDS: [usize; 5] = [1, 2, 3, 5, 8];
/// Places of a run whose workers come and go.
const MOST: usize = 5;
/// The exit code of a run that was asked to stop.
const STOPPED: i32 = 75;

/// ZeRO stages: each start has the one that the dice give.
const STAGES: [u64; 3] = [1, 2, 3];

/// One way of sharing a run: its settings, and its name.
fn way(stage: u64, tcp: bool) -> ([String; 2], String) {
    let transport = if tcp { "tcp" } else { "auto" };
    let settings = [format!("cluster.zero_stage={stage}"), format!("cluster.transport=\"{transport}\"")];
    (settings, format!("ZeRO-{stage} {transport}"))
}

/// With a stage and a transport of the dice.
fn shared(train: Train, dice: &mut Dice, told: &mut Vec<String>) -> Train {
    let (settings, name) = way(STAGES[dice.roll(STAGES.len() as u64) as usize], dice.roll(2) == 0);
    told.push(name);
    settings.iter().fold(train, |train, setting| train.arg("--set").arg(setting))
}

/// Trains with each of `worlds` in turn, each with a stage and a transport of its own: stopped by a signal, or killed with all of
/// its processes, and resumed. The run, and how it was shared at each start.
fn in_turn(dir: &Path, steps: u64, worlds: &[usize], dice: &mut Dice) -> (PathBuf, Vec<String>) {
    let (mut next, mut told) = (train(dir, steps), Vec::new());
    for (index, &workers) in (1..).zip(worlds) {
        let mut live = shared(next.workers(workers), dice, &mut told).start();
        let until = steps * index / (worlds.len() as u64 + 1) + dice.roll(4);
        live.wait_for_step(until);
        std::thread::sleep(Duration::from_millis(dice.roll(60)));
        let asks = dice.roll(2) == 0;
        match asks {
            true => signal(live.pid(), "TERM"),
            false => kill(live.pid()),
        }
        let ended = live.finish();
        assert!(!asks || ended.code() == Some(STOPPED), "{:?}: {}", ended.code(), ended.stderr);
        wait_until_gone(&ended.mark, Duration::from_secs(5));
        next = Train::resumed(&ended.run_dir);
    }
    let last = next.workers(WORLDS[dice.roll(3) as usize]);
    (shared(last, dice, &mut told).succeed().run_dir, told)
}

#[test]
fn with_another_number_of_workers_at_each_start() {
    const STEPS: u64 = 60;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (run_dir, told) = in_turn(dir.path(), STEPS, &[3, 8, 5, 2], &mut Dice(3));
    println!("{told:?}");
    assert_eq!(result(&run_dir), whole);
}

/// `UNISONO_SCHEDULES` (default 4) from `UNISONO_SEED`, each with all of [`WORLDS`] twice.
#[test]
#[ignore = "minutes; make chaos"]
fn random_schedules_of_worlds() {
    const STEPS: u64 = 150;
    let (schedules, seed) = (chronicle::asked("UNISONO_SCHEDULES", 4), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    for run in 0..schedules {
        let mut dice = Dice(seed.wrapping_mul(7_000_003) + run);
        let mut worlds = [WORLDS, WORLDS].concat();
        dice.shuffle(&mut worlds);
        let (run_dir, shared) = in_turn(dir.path(), STEPS, &worlds, &mut dice);
        let same = result(&run_dir) == whole;
        let line =
            json!({"seed": seed, "run": run, "how": "resumed", "worlds": worlds, "shared": shared, "same": same});
        chronicle::note("worlds", line);
        println!("seed {seed}, run {run}: {worlds:?} {shared:?}");
        assert!(same, "seed {seed}, run {run}: another result with {worlds:?}");
    }
}

/// What happens to a crowd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Join,
    Loss,
}

/// Workers join and are lost while the run goes on, as `choose` says for so many that are there, until it is about to
/// end; how many took part in each generation.
fn while_it_runs(
    dir: &Path,
    steps: u64,
    sharing: &[String],
    mut choose: impl FnMut(usize) -> Option<(Change, u64)>,
) -> (PathBuf, Vec<usize>) {
    let more = [format!("cluster.workers={MOST}"), "cluster.rejoin_timeout=1.0".into()];
    let mut crowd = Crowd::start(dir, &[settings(steps), more.to_vec(), sharing.to_vec()].concat());
    (0..MOST).for_each(|_| {
        crowd.hire();
    });
    crowd.live.wait_for("step");
    while let Some((change, pick)) = choose(crowd.here().len()) {
        std::thread::sleep(Duration::from_millis(pick % 400));
        // Whoever joins takes a second.
        if crowd.live.newest_step() + 150 > steps {
            break;
        }
        let here = crowd.here();
        let spare = here.len() > MOST || change == Change::Join && here.len() == MOST;
        match change {
            Change::Join => {
                crowd.hire();
            }
            Change::Loss => crowd.lose(here[pick as usize % here.len()]),
        }
        // A spare's coming and going changes nothing.
        let patience = Duration::from_secs(if spare { 1 } else { 20 });
        if crowd.live.wait_within(patience, &["membership", "done"]).is_some() {
            crowd.live.wait_within(Duration::from_secs(20), &["step"]);
        }
    }
    let ended = crowd.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    let members = ended.events("membership").iter().map(|m| m["members"].as_array().unwrap().len()).collect();
    (ended.run_dir, members)
}

#[test]
fn with_workers_that_come_and_go_while_it_runs() {
    const STEPS: u64 = 900;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let mut script = [Change::Loss, Change::Loss, Change::Join, Change::Loss].into_iter().zip([130, 77, 0, 210]);
    let (run_dir, worlds) = while_it_runs(dir.path(), STEPS, &[], |_| script.next());
    assert!(worlds.contains(&3) && worlds.windows(2).any(|w| w[0] < w[1]), "too little happened: {worlds:?}");
    assert_eq!(result(&run_dir), whole);
}

/// As [`random_schedules_of_worlds`], within one start.
#[test]
#[ignore = "minutes; make chaos"]
fn random_comings_and_goings() {
    const STEPS: u64 = 3000;
    let (schedules, seed) = (chronicle::asked("UNISONO_SCHEDULES", 4), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    for run in 0..schedules {
        let mut dice = Dice(seed.wrapping_mul(9_000_011) + run);
        // Rarely somebody too many, who waits until a place is free.
        let choose = |here: usize| {
            let joins = here <= 1 || here < MOST && dice.roll(2) == 0 || here == MOST && dice.roll(4) == 0;
            Some((if joins { Change::Join } else { Change::Loss }, dice.roll(1_000_000)))
        };
        let stages = STAGES.len() as u64;
        let (sharing, name) = way(STAGES[(run % stages) as usize], (run / stages).is_multiple_of(2));
        let (run_dir, worlds) = while_it_runs(dir.path(), STEPS, &sharing, choose);
        let same = result(&run_dir) == whole;
        let line = json!({"seed": seed, "run": run, "how": "within", "worlds": worlds, "shared": [name], "same": same});
        chronicle::note("worlds", line);
        println!("seed {seed}, run {run}: {worlds:?} {name}");
        assert!(same, "seed {seed}, run {run}: another result with {worlds:?}");
    }
}

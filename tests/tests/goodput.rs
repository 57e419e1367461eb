//! How much of its time a run uses well: while processes are killed, and while it saves.
//!
//! `UNISONO_MODEL` and `UNISONO_DATA` name what is trained; without them, a tiny model of the tests'. `UNISONO_SET` has further
//! keys ("train.global_batch_size=8 checkpoint.snapshot_every=5"). Figures of a debug build say little: `make goodput` builds
//! a release.

#![allow(clippy::unwrap_used)]

use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use unisono_tests::kills::Dice;
use unisono_tests::processes::kill;
use unisono_tests::train::Train;
use unisono_tests::{chronicle, fixture};

fn train(dir: &Path) -> Train {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let tiny = fixture::tiny();
    let (model, data) = (named("UNISONO_MODEL").unwrap_or(tiny.model), named("UNISONO_DATA").unwrap_or(tiny.data));
    let workers = chronicle::asked("UNISONO_WORKERS", 2) as usize;
    let asked = std::env::var("UNISONO_SET").unwrap_or_default();
    let keys = asked.split_whitespace().map(|word| word.split_once('=').expect("UNISONO_SET is words like KEY=VALUE"));
    let train = Train::new(&model, &data, dir).workers(workers).set("train.steps", 100_000).set("eval.every", 0);
    keys.fold(train, |train, (key, value)| train.set(key, value))
}

/// A process is killed every `UNISONO_KILL_EVERY` seconds (default 60) for `UNISONO_MINUTES` (default 30), the coordinator
/// every third time. Goodput is committed steps times the median of the undisturbed ones, over the time that passed.
#[test]
#[ignore = "half an hour; make goodput"]
fn a_run_that_loses_a_process_a_minute_gets_on() {
    let (minutes, pause) = (chronicle::asked("UNISONO_MINUTES", 30), chronicle::asked("UNISONO_KILL_EVERY", 60));
    let every = chronicle::asked("UNISONO_CHECKPOINT_EVERY", 25);
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(chronicle::asked("UNISONO_SEED", 1));
    let mut live = train(dir.path()).set("checkpoint.every", every).start();
    live.wait_for("step");
    let (begun, first) = (Instant::now(), live.newest_step());
    let (mut kills, mut next) = (0u64, Duration::from_secs(pause / 2));
    while begun.elapsed() < Duration::from_secs(60 * minutes) {
        std::thread::sleep(Duration::from_millis(50));
        live.newest_step();
        if begun.elapsed() < next {
            continue;
        }
        next += Duration::from_secs(pause);
        match kills % 3 {
            2 => kill(live.coordinator().pid),
            _ => {
                let workers = live.workers();
                kill(workers[dice.roll(workers.len() as u64) as usize].pid);
            }
        }
        kills += 1;
        let committed = live.newest_step() - first;
        println!(
            "{:5.0} s: kill {kills}, {committed} steps, load {:.1}",
            begun.elapsed().as_secs_f64(),
            chronicle::load()
        );
    }
    let (wall, committed) = (begun.elapsed().as_secs_f64(), live.newest_step() - first);
    // A step is undisturbed where nothing but steps was told since the one before it.
    let mut undisturbed = Vec::new();
    let mut quiet = false;
    for event in live.every_event() {
        match event["event"].as_str() {
            Some("step") => {
                undisturbed.extend(event["seconds"].as_f64().filter(|_| quiet));
                quiet = true;
            }
            _ => quiet = false,
        }
    }
    let (median, most) = chronicle::median_and_most(&undisturbed).unwrap();
    let mean = undisturbed.iter().sum::<f64>() / undisturbed.len() as f64;
    let goodput = committed as f64 * median / wall;
    println!("{committed} steps in {wall:.0} s with {kills} kills; undisturbed {median:.3} s (mean {mean:.3}, most {most:.3}): goodput {:.1} %", 100.0 * goodput);
    chronicle::note(
        "goodput",
        json!({"minutes": wall / 60.0, "kills": kills, "steps": committed, "median": median, "mean": mean,
               "goodput": goodput, "load": chronicle::load(), "checkpoint_every": every}),
    );
    assert!(committed > 0, "nothing was trained");
}

/// Seconds that `steps` steps take, after a warm-up.
fn timed(dir: &Path, every: u64, steps: u64) -> f64 {
    let mut live = train(dir).set("checkpoint.every", every).start();
    let mut seconds = Vec::new();
    for _ in 0..steps + 3 {
        seconds.push(live.wait_for("step")["seconds"].as_f64().unwrap());
    }
    seconds[3..].iter().sum()
}

/// The same steps with a checkpoint every `UNISONO_CHECKPOINT_EVERY` (default 25) and without any, in turn,
/// `UNISONO_ROUNDS` times (default 3).
#[test]
#[ignore = "minutes; make goodput"]
fn what_checkpoints_cost() {
    let (rounds, every) = (chronicle::asked("UNISONO_ROUNDS", 3), chronicle::asked("UNISONO_CHECKPOINT_EVERY", 25));
    let steps = chronicle::asked("UNISONO_STEPS", 2 * every);
    let dir = tempfile::tempdir().unwrap();
    let mut totals = [0.0, 0.0];
    for round in 0..rounds {
        // The other one first each time.
        for turn in [round % 2, 1 - round % 2] {
            let seconds = timed(dir.path(), if turn == 0 { every } else { 0 }, steps);
            totals[turn as usize] += seconds;
            println!("round {round}: {seconds:.2} s {}", if turn == 0 { "with checkpoints" } else { "without" });
        }
    }
    let ratio = totals[0] / totals[1];
    println!("a checkpoint every {every} steps: {ratio:.4} times the time");
    chronicle::note(
        "checkpoint-cost",
        json!({"ratio": ratio, "every": every, "steps": steps, "rounds": rounds, "load": chronicle::load()}),
    );
}

//! A run that is asked to stop saves, leaves with its own exit code within the grace, and ends like the undisturbed run
//! when it goes on. `UNISONO_INSTANTS` sets how many random instants are tried (default 6), `UNISONO_SEED` where they
//! begin.

#![allow(clippy::unwrap_used)]

use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};
use unisono_tests::processes::{signal, wait_until_gone};
use unisono_tests::train::{Live, Train};
use unisono_tests::{chronicle, fixture};

/// Of the whole run.
const STEPS: u64 = 60;
/// Seconds that a run may take to save and end.
const GRACE: u64 = 10;
/// The exit code of a run that was asked to stop and has lost nothing.
const STOPPED: i32 = 75;

fn train(dir: &Path) -> Train {
    let micro = fixture::of(fixture::MICRO);
    Train::new(&micro.model, &micro.data, dir)
        .set("model.compute", "fp32")
        .set("train.steps", STEPS)
        .set("train.global_batch_size", 8)
        .set("train.learning_rate", 1e-3)
        .set("checkpoint.every", 15)
        .set("checkpoint.grace", GRACE)
        .set("eval.every", 20)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn lucky(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

/// Asks `live` to stop: any process of it, by any of the signals that a terminal or a scheduler sends.
fn ask(live: &Live, luck: &mut impl FnMut(u64) -> u64) -> String {
    let name = ["TERM", "INT", "USR1"][luck(3) as usize];
    let group = || std::iter::once(live.pid()).chain(live.workers().iter().map(|w| w.pid)).collect::<Vec<_>>();
    let (who, pids, name) = match luck(5) {
        0 | 1 => ("the supervisor", vec![live.pid()], name),
        2 => ("the coordinator", vec![live.coordinator().pid], "TERM"),
        3 => ("everybody", [group(), vec![live.coordinator().pid]].concat(), name),
        // A worker leaves Ctrl-C to its supervisor.
        _ => ("a worker", live.workers().iter().map(|w| w.pid).take(1).collect(), "TERM"),
    };
    pids.into_iter().for_each(|pid| signal(pid, name));
    format!("{name} to {who}")
}

#[test]
fn at_any_instant_a_signal_saves_and_the_run_goes_on_to_the_same_end() {
    let dir = tempfile::tempdir().unwrap();
    let whole = train(dir.path()).workers(1).succeed();
    let (instants, seed) = (number("UNISONO_INSTANTS", 6), number("UNISONO_SEED", 1));
    let mut luck = lucky(seed);
    let (mut asked, mut slowest) = (0, Duration::ZERO);
    while asked < instants {
        let mut next = train(dir.path()).workers(1 + luck(3) as usize);
        loop {
            let mut live = next.start();
            let run_dir = live.run_dir.clone();
            let mut step = 0;
            for _ in 0..=luck(12) {
                // A run whose last step was saved as it stopped has only its end left.
                let told = live.wait_for_any(&["step", "done"]);
                step = told["step"].as_u64().unwrap_or(STEPS);
                if step + 10 > STEPS {
                    break;
                }
            }
            if asked == instants || step + 10 > STEPS {
                let ended = live.finish();
                assert_eq!((ended.code(), ended.digest()), (Some(0), whole.digest()), "{}", ended.stderr);
                break;
            }
            std::thread::sleep(Duration::from_millis(luck(40)));
            let begun = Instant::now();
            let how = ask(&live, &mut luck);
            let ended = live.finish();
            let took = begun.elapsed();
            wait_until_gone(&ended.mark, Duration::from_secs(5));
            if ended.code() == Some(0) {
                // It was as good as done.
                assert_eq!(ended.digest(), whole.digest());
                break;
            }
            asked += 1;
            slowest = slowest.max(took);
            let place = format!("instant {asked} of seed {seed}, {how}: {}", ended.stderr);
            assert_eq!(ended.code(), Some(STOPPED), "{place}");
            assert!(took < Duration::from_secs(GRACE), "{took:?}, {place}");
            let stopped = ended.events("stopped");
            assert_eq!(stopped.len(), 1, "{place}");
            assert_eq!(stopped[0]["step"], stopped[0]["checkpoint"], "nothing is lost: {place}");
            assert!(ended.stderr.contains("go on with --resume"), "{place}");
            next = Train::resumed(&run_dir).workers(1 + luck(3) as usize);
        }
    }
    chronicle::note(
        "signals",
        json!({"seed": seed, "instants": asked, "slowest": slowest.as_secs_f64(), "same": true}),
    );
    println!("seed {seed}: {asked} instants, slowest {slowest:?}");
}

#[test]
fn whoever_asks_twice_does_not_wait_and_loses_only_what_was_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let whole = train(dir.path()).workers(2).succeed();
    let mut live = train(dir.path()).workers(2).start();
    live.wait_for("checkpoint");
    signal(live.pid(), "TERM");
    signal(live.pid(), "INT");
    let ended = live.finish();
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    assert!([130, 143].contains(&ended.code().unwrap()), "{:?} {}", ended.code(), ended.stderr);
    let again = Train::resumed(&ended.run_dir).succeed();
    assert_eq!(again.digest(), whole.digest());
}

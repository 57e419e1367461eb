//! Workers that live and do not get on, or too slowly: found, named, replaced or dealt less; the result stays what it was.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use unisono_tests::kills::{digest, ledger_losses, train};
use unisono_tests::processes::signal;
use unisono_tests::train::Train;
use unisono_tests::{fixture, train::Live};

fn wait_for_step(live: &mut Live, step: u64) {
    while live.wait_for("step")["step"].as_u64().unwrap() < step {}
}

#[test]
fn a_worker_that_hangs_in_computing_is_named_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let run = |workers| train(dir.path(), 60).set("cluster.hang_after", 3).workers(workers);
    let whole = run(1).succeed();
    let armed = tempfile::tempdir().unwrap();
    let mut live = run(2).env("UNISONO_FAIL_POINTS", armed.path()).start();
    live.wait_for("membership");
    // Its heartbeats go on: they come from another thread.
    for phase in ["forward", "update"] {
        let step = live.wait_for("step")["step"].as_u64().unwrap() + 8;
        wait_for_step(&mut live, step);
        std::fs::write(armed.path().join("new"), "hang").unwrap();
        std::fs::rename(armed.path().join("new"), armed.path().join(phase)).unwrap();
        let begun = Instant::now();
        let lost = live.wait_for("lost");
        let message = lost["message"].as_str().unwrap();
        assert!(message.contains("hangs") && message.contains(phase), "{message}");
        assert_eq!((lost["phase"].as_str(), lost["host"].is_string()), (Some(phase), true), "{lost}");
        assert!(lost["step"].as_u64().unwrap() > step && lost["rank"].is_u64(), "{lost}");
        assert!(begun.elapsed() < Duration::from_secs(20), "found after {:?}", begun.elapsed());
        live.wait_for("membership");
    }
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert_eq!(digest(&ended.run_dir), digest(&whole.run_dir));
    assert_eq!(ledger_losses(&ended.run_dir), ledger_losses(&whole.run_dir));
}

#[test]
fn a_worker_that_is_stopped_most_of_the_time_is_named_and_dealt_less() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    // Steps are long against the slices.
    let run = |workers| {
        let train = Train::new(&tiny.model, &tiny.data, dir.path()).workers(workers);
        train.set("train.steps", 40).set("train.global_batch_size", 200).set("train.micro_batches", 12)
    };
    let whole = run(1).succeed();
    let mut live = run(2).start();
    live.wait_for("membership");
    let first = live.wait_for("step")["step"].as_u64().unwrap();
    let members = live.seen("membership")["members"].as_array().unwrap().clone();
    let slow = members.iter().find(|m| m["rank"] == 1).unwrap()["pid"].as_u64().unwrap() as u32;
    let over = Arc::new(AtomicBool::new(false));
    let done = over.clone();
    let stopping = std::thread::spawn(move || {
        while !done.load(Ordering::Relaxed) {
            signal(slow, "STOP");
            std::thread::sleep(Duration::from_millis(200));
            signal(slow, "CONT");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    // On a machine that others use too, the other one may have been slow before.
    let warned = loop {
        let warned = live.wait_for("warning");
        if warned["message"].as_str().unwrap().contains("rank 1") {
            break warned;
        }
    };
    let step = warned["step"].as_u64().unwrap();
    assert_eq!(warned["kind"], "straggler", "{warned}");
    assert!(warned["message"].as_str().unwrap().contains("computing"), "{warned}");
    assert!(step <= first + 11, "slow since step {first}, named after step {step}");
    wait_for_step(&mut live, step + 10);
    let share = |event: &serde_json::Value| {
        let tokens: Vec<f64> = event["rank_tokens"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
        tokens[1] / (tokens[0] + tokens[1])
    };
    let (before, after) = (share(live.all("step")[0]), share(live.seen("step")));
    over.store(true, Ordering::Relaxed);
    stopping.join().unwrap();
    assert!((0.4..0.6).contains(&before) && after < 0.42, "its share was {before} and is {after}");
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert!(ended.events("lost").is_empty(), "a slow worker is not a lost one: {:?}", ended.events("lost"));
    assert_eq!(ended.digest(), whole.digest());
}

//! Workers that live and do not get on, or too slowly: found, named, replaced or dealt less; the result stays what it was.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use unisono_tests::fixture;
use unisono_tests::kills::{ended_well, train, undisturbed};
use unisono_tests::processes::signal;
use unisono_tests::train::Train;

#[test]
fn a_worker_that_hangs_in_computing_is_named_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), 60);
    let armed = tempfile::tempdir().unwrap();
    let hasty = train(dir.path(), 60).set("cluster.hang_after", 3).workers(2);
    let mut live = hasty.env("UNISONO_FAIL_POINTS", armed.path()).start();
    live.wait_for("membership");
    // Its heartbeats go on: they come from another thread.
    for phase in ["forward", "update"] {
        let step = live.wait_for("step")["step"].as_u64().unwrap() + 8;
        live.wait_for_step(step);
        arm(armed.path(), phase, "hang");
        let begun = Instant::now();
        let lost = live.wait_for("lost");
        let message = lost["message"].as_str().unwrap();
        assert!(message.contains("hangs") && message.contains(phase), "{message}");
        assert_eq!((lost["phase"].as_str(), lost["host"].is_string()), (Some(phase), true), "{lost}");
        assert!(lost["step"].as_u64().unwrap() > step && lost["rank"].is_u64(), "{lost}");
        assert!(begun.elapsed() < Duration::from_secs(20), "found after {:?}", begun.elapsed());
        live.wait_for("membership");
    }
    assert_eq!(ended_well(&live.finish()), whole);
}

fn arm(armed: &Path, place: &str, how: &str) {
    std::fs::write(armed.join("new"), how).unwrap();
    std::fs::rename(armed.join("new"), armed.join(place)).unwrap();
}

/// Which process came to an armed place.
fn came(armed: &Path, place: &str) -> u64 {
    std::fs::read_to_string(armed.join(format!("{place}.taken"))).unwrap().parse().unwrap()
}

#[test]
fn a_worker_that_computes_for_longer_than_peers_may_be_silent_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), 30);
    // In turn where a step exchanges its sums, and where every block's parameters are waited for.
    for stage in [1, 3] {
        let armed = tempfile::tempdir().unwrap();
        let patient = train(dir.path(), 30).set("cluster.hang_after", 30).set("cluster.peer_timeout", 1).workers(2);
        let patient = patient.set("cluster.zero_stage", stage);
        let mut live = patient.env("UNISONO_FAIL_POINTS", armed.path()).start();
        live.wait_for("membership");
        live.wait_for_step(5);
        arm(armed.path(), "forward", "4");
        let begun = Instant::now();
        while !armed.path().join("forward.taken").exists() {
            assert!(begun.elapsed() < Duration::from_secs(20), "nobody came there");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = live.finish();
        assert_eq!(ended_well(&ended), whole);
        assert!(begun.elapsed() > Duration::from_secs(4), "nobody paused");
        assert!(ended.events("lost").is_empty(), "stage {stage}: {:?}", ended.events("lost"));
    }
}

#[test]
fn a_worker_that_hangs_in_an_exchange_is_named_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), 60);
    for stage in [1, 3] {
        let armed = tempfile::tempdir().unwrap();
        let hasty = train(dir.path(), 60).set("cluster.peer_timeout", 2).set("cluster.zero_stage", stage).workers(3);
        let mut live = hasty.env("UNISONO_FAIL_POINTS", armed.path()).start();
        live.wait_for("membership");
        live.wait_for_step(5);
        let begun = Instant::now();
        arm(armed.path(), "exchange", "hang");
        let lost = live.wait_for("lost");
        let message = lost["message"].as_str().unwrap();
        assert!(message.contains("has waited for it in") && message.contains("cluster.peer_timeout"), "{message}");
        assert_eq!(lost["pid"], came(armed.path(), "exchange"), "another one was taken for it: {lost}");
        assert!(lost["host"].is_string() && lost["rank"].is_u64(), "{lost}");
        let found = begun.elapsed().as_secs_f64();
        assert!((2.0..12.0).contains(&found), "found after {found:.1} s");
        live.wait_for("membership");
        let ended = live.finish();
        assert_eq!(ended_well(&ended), whole);
        assert_eq!(ended.events("lost").len(), 1, "{:?}", ended.events("lost"));
    }
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
    live.wait_for_step(step + 10);
    let share = |event: &serde_json::Value| {
        let tokens: Vec<f64> = event["rank_tokens"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
        tokens[1] / (tokens[0] + tokens[1])
    };
    // Steps are as long as the machine is slow: between two slices it may seem to be as fast as the other.
    let dealt = live.all("step").into_iter().filter(|event| event["step"].as_u64() > Some(step)).map(share);
    let (before, after) = (share(live.all("step")[0]), dealt.fold(1.0, f64::min));
    over.store(true, Ordering::Relaxed);
    stopping.join().unwrap();
    assert!((0.4..0.6).contains(&before) && after < 0.42, "its share was {before} and is {after}");
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert!(ended.events("lost").is_empty(), "a slow worker is not a lost one: {:?}", ended.events("lost"));
    assert_eq!(ended.digest(), whole.digest());
}

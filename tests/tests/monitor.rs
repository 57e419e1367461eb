//! Other terminals: a monitor follows a run from its first step, and `status` says where it is.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use unisono_tests::processes::signal;
use unisono_tests::{binaries, fixture, train::Train};

#[test]
fn a_second_terminal_follows_from_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture::tiny();
    let mut live = Train::new(&tiny.model, &tiny.data, dir.path())
        .workers(2)
        .set("train.steps", 60)
        .set("train.global_batch_size", 24)
        .start();
    for _ in 0..3 {
        live.wait_for("step");
    }
    let run_dir = live.run_dir.clone();
    let mut monitor = binaries::command(&["monitor", "--plain"])
        .arg(&run_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();

    let status = binaries::command(&["status", "--json"]).arg(&run_dir).output().unwrap();
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert!(status["step"].as_u64().unwrap() >= 3, "{status}");
    assert_eq!(status["steps"].as_u64(), Some(60), "{status}");
    assert_eq!(status["workers"].as_array().map(Vec::len), Some(2), "{status}");

    let lines: Vec<String> = BufReader::new(monitor.stdout.take().unwrap()).lines().map_while(Result::ok).collect();
    assert!(monitor.wait().unwrap().success());
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let text = lines.join("\n");
    assert!(text.contains("step 1/60"), "the monitor missed the first step:\n{text}");
    assert!(text.contains("step 60/60"), "the monitor missed the last step:\n{text}");
    assert!(text.contains(&ended.digest()), "the monitor missed the end:\n{text}");
}

#[test]
fn a_run_that_is_over_is_told_from_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture::tiny();
    let ended = Train::new(&tiny.model, &tiny.data, dir.path()).workers(1).set("train.steps", 2).succeed();
    let status = binaries::command(&["status", "--json"]).arg(&ended.run_dir).output().unwrap();
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["state"], "finished", "{status}");
    assert_eq!(status["step"].as_u64(), Some(2), "{status}");
}

#[test]
fn a_monitor_says_that_the_run_was_stopped_and_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture::tiny();
    let mut live = Train::new(&tiny.model, &tiny.data, dir.path()).workers(2).set("train.steps", 100_000).start();
    live.wait_for("step");
    let mut monitor = binaries::command(&["monitor", "--plain"])
        .arg(&live.run_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
    // It looks on.
    let first = lines.by_ref().map_while(Result::ok).find(|line| line.contains("step "));
    assert!(first.is_some(), "the monitor shows nothing");
    signal(live.pid(), "TERM");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(monitor.wait().unwrap().success());
    let ended = live.finish();
    assert_eq!(ended.code(), Some(75), "{}", ended.stderr);
    let told = rest.iter().find(|line| line.contains("was stopped by SIGTERM"));
    let resume = format!("--resume {}", ended.run_dir.display());
    assert!(told.is_some_and(|line| line.contains(&resume)), "{}", rest.join("\n"));
}

//! Other terminals: a monitor follows a run from its first step, and `status` says where it is.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::Stdio;
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

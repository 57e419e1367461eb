//! Whoever is killed, the run ends with a sentence, and nothing is left behind.

#![allow(clippy::unwrap_used)]

use std::process::Stdio;
use std::time::{Duration, Instant};
use unisono_tests::processes::{kill, wait_until_gone};
use unisono_tests::train::Live;
use unisono_tests::{fixture, train::Train};

/// A run of two workers that would go on for long, after its second step.
fn under_way(dir: &std::path::Path) -> Live {
    with_restarts(dir, 3)
}

fn with_restarts(dir: &std::path::Path, restarts: u32) -> Live {
    let tiny = fixture::tiny();
    let train = Train::new(&tiny.model, &tiny.data, dir).workers(2).set("train.steps", 5000);
    let mut live = train.set("cluster.restarts", restarts).start();
    live.wait_for("step");
    live.wait_for("step");
    assert_eq!(live.workers().len(), 2);
    live
}

#[test]
fn without_restarts_a_killed_worker_ends_the_run_with_its_rank_and_phase() {
    let dir = tempfile::tempdir().unwrap();
    let live = with_restarts(dir.path(), 0);
    let rank = 1;
    let pid = {
        let membership = live_membership(&live);
        membership[rank]
    };
    kill(pid);
    let ended = live.finish();
    wait_until_gone(&ended.mark, Duration::from_secs(2));
    assert_eq!(ended.code(), Some(3), "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("rank 1") && last.contains("phase"), "the sentence names rank and phase: {last}");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let failed = ended.events("failed");
    assert_eq!(failed.len(), 1, "{:?}", ended.events);
    assert_eq!(failed[0]["rank"], 1, "{}", failed[0]);
    assert_ne!(failed[0]["phase"], "unknown", "{}", failed[0]);
}

/// Pids of the workers in rank order.
fn live_membership(live: &Live) -> Vec<u32> {
    let membership = live.seen("membership");
    let members = membership["members"].as_array().unwrap();
    members.iter().map(|member| member["pid"].as_u64().unwrap() as u32).collect()
}

#[test]
fn a_killed_worker_and_a_killed_coordinator_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = under_way(dir.path());
    let before = live.workers();
    kill(before[0].pid);
    assert_eq!(live.wait_for("lost")["pid"], before[0].pid);
    live.wait_for("membership");
    let coordinator = live.coordinator().pid;
    live.wait_for("step");
    kill(coordinator);
    live.wait_for("membership");
    live.wait_for("step");
    assert_ne!(live.coordinator().pid, coordinator);
    let after = live.workers();
    assert!(after.len() == 2 && after.contains(&before[1]) && !after.contains(&before[0]), "{before:?} {after:?}");
    let steps: Vec<u64> = live.all("step").iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|w| w[0] + 1 == w[1]), "a step was lost or said twice: {steps:?}");
    let mark = live.mark.clone();
    kill(live.pid());
    wait_until_gone(&mark, Duration::from_secs(3));
}

#[test]
fn a_coordinator_that_dies_when_it_has_just_made_the_directory_is_replaced() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    let armed = tempfile::tempdir().unwrap();
    std::fs::write(armed.path().join("run-dir"), "").unwrap();
    let run = |dir| Train::new(&tiny.model, &tiny.data, dir).workers(1).set("train.steps", 2);
    let train = run(dir.path()).env("UNISONO_FAIL_POINTS", armed.path());
    let run_dir = train.run_dir().to_path_buf();
    let ended = train.succeed();
    assert!(!armed.path().join("run-dir").exists(), "nobody came there");
    assert_eq!((ended.events("done").len(), ended.run_dir), (1, run_dir));
}

#[test]
fn a_coordinator_that_dies_while_it_reads_is_replaced_where_the_run_has_a_configuration() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    let armed = tempfile::tempdir().unwrap();
    std::fs::write(armed.path().join("read"), "").unwrap();
    let config = dir.path().join("recipe.toml");
    let (model, data) = (&tiny.model, &tiny.data);
    std::fs::write(&config, format!("[model]\npath = {model:?}\n[[data]]\npath = {data:?}\n[train]\nsteps = 2\n"))
        .unwrap();
    let train = Train::configured(&config, dir.path()).workers(1);
    let ended = train.env("UNISONO_FAIL_POINTS", armed.path()).succeed();
    assert!(!armed.path().join("read").exists(), "nobody came there");
    assert_eq!(ended.events("done").len(), 1);
}

/// The next coordinator reads its data for longer than workers have patience.
#[test]
fn workers_wait_for_a_coordinator_that_takes_its_time() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    let armed = tempfile::tempdir().unwrap();
    let train = Train::new(&tiny.model, &tiny.data, dir.path()).workers(2).set("train.steps", 120);
    let train = train.set("cluster.rejoin_timeout", 1).env("UNISONO_FAIL_POINTS", armed.path());
    let mut live = train.start();
    live.wait_for("step");
    std::fs::write(armed.path().join("serve"), "hang").unwrap();
    let before = live.coordinator().pid;
    kill(before);
    // Workers dial for ten seconds, and the supervisor used to wait five more before it gave up.
    std::thread::sleep(Duration::from_secs(20));
    assert!(!armed.path().join("serve").exists(), "nobody came there");
    let slow = live.coordinator().pid;
    assert_ne!(slow, before);
    // A worker that dies meanwhile is replaced when there is something to join.
    kill(live.workers()[0].pid);
    std::thread::sleep(Duration::from_secs(1));
    kill(slow);
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
}

/// Nobody reads what the run tells, far beyond what a pipe holds: it trains to its end, and all is there for whoever reads then.
#[test]
fn an_output_that_nobody_reads_holds_no_step_up() {
    const STEPS: u64 = 900;
    let dir = tempfile::tempdir().unwrap();
    let micro = fixture::of(fixture::MICRO);
    let run_dir = dir.path().join("run");
    let mut command = unisono_tests::binaries::command(&["train", "--json", "--workers", "1", "--set", "eval.every=0"]);
    command.arg("--model").arg(&micro.model).arg("--data").arg(&micro.data).arg("--run-dir").arg(&run_dir);
    command.args(["--set", "model.compute=fp32", "--set", "train.global_batch_size=8"]);
    command.args(["--set", &format!("train.steps={STEPS}")]).env("XDG_CACHE_HOME", dir.path().join("cache"));
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    let done = || {
        let ledger = rusqlite::Connection::open(run_dir.join("ledger.sqlite")).ok()?;
        ledger.query_row("SELECT count(*) FROM events WHERE kind = 'done'", [], |row| row.get(0)).ok()
    };
    while !run_dir.exists() || done() != Some(1) {
        assert!(begun.elapsed() < Duration::from_secs(100), "the run stands still");
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let events = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let events: Vec<serde_json::Value> = events.map(|line| serde_json::from_slice(line).unwrap()).collect();
    let steps = events.iter().filter(|event| event["event"] == "step").map(|event| event["step"].as_u64().unwrap());
    assert!(steps.eq(1..=STEPS));
}

#[test]
fn a_killed_supervisor_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let live = under_way(dir.path());
    let mark = live.mark.clone();
    kill(live.pid());
    wait_until_gone(&mark, Duration::from_secs(3));
}

#[test]
fn a_terminated_supervisor_ends_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let live = under_way(dir.path());
    let pid = live.pid().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = live.finish();
    wait_until_gone(&ended.mark, Duration::from_secs(2));
    assert_ne!(ended.code(), Some(0), "{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}

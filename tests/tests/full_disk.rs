//! A disk that is full for a save ends neither training nor the newest good checkpoint. The disk is a real tmpfs in a mount
//! namespace; where the system refuses one, these tests say so and pass.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};
use unisono_tests::fixture::{self, Fixture};
use unisono_tests::train::Train;
use unisono_tests::{binaries, chronicle, processes};

const STEPS: u64 = 10;

/// Runs a shell script that has a mount namespace to itself, with `$UNISONO` and `$DISK` set.
fn isolated(dir: &Path, script: &str) -> Output {
    let disk = dir.join("disk");
    std::fs::create_dir_all(&disk).unwrap();
    Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .env("UNISONO", binaries::unisono())
        .env("UNISONO_WORKER", binaries::worker())
        .env("DISK", &disk)
        .env(processes::MARK, format!("disk-{}", std::process::id()))
        .current_dir(dir)
        .output()
        .unwrap_or_else(|error| panic!("unshare cannot be started: {error}"))
}

/// Whether this system lets a user mount a tmpfs.
fn possible(dir: &Path) -> bool {
    let output = isolated(dir, "mount -t tmpfs -o size=1m none \"$DISK\"");
    if !output.status.success() {
        eprintln!("skipped: no tmpfs of our own ({})", String::from_utf8_lossy(&output.stderr).trim());
    }
    output.status.success()
}

/// Options of a training of two workers that saves every third step.
fn options(fixture: &Fixture) -> String {
    format!(
        "--model {} --data {} --workers 2 --set model.compute=fp32 --set train.steps={STEPS} --set train.global_batch_size=8 \
         --set train.learning_rate=1e-3 --set checkpoint.every=3 --set checkpoint.keep=1 --set eval.every=0",
        fixture.model.display(),
        fixture.data.display()
    )
}

fn whole(dir: &Path, fixture: &Fixture) -> (String, u64) {
    let train = Train::new(&fixture.model, &fixture.data, dir).workers(1).set("model.compute", "fp32");
    let train = train.set("train.steps", STEPS).set("train.global_batch_size", 8).set("train.learning_rate", 1e-3);
    let ended = train.set("eval.every", 0).succeed();
    let bytes = ended.events("checkpoint").last().unwrap()["bytes"].as_u64().unwrap();
    (ended.digest(), bytes)
}

fn digest(text: &str) -> String {
    let mut done = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let done = done.rfind(|event| event["event"] == "done").expect("a run is done");
    done["digest"].as_str().unwrap().to_owned()
}

/// Room for 1 and 80 % of a save, or for `UNISONO_SHARES` parts between them.
#[test]
fn training_goes_on_and_the_newest_good_checkpoint_resumes() {
    let dir = tempfile::tempdir().unwrap();
    if !possible(dir.path()) {
        return;
    }
    let tiny = fixture::tiny();
    let (expected, bytes) = whole(dir.path(), &tiny);
    // Room for the first checkpoint, for the ledger and what a save leaves free for it, and for a part of the second one.
    let room = (8 << 20) + 1_200_000;
    let shares = chronicle::asked("UNISONO_SHARES", 2).max(2);
    for percent in (0..shares).map(|i| 1 + 79 * i / (shares - 1)) {
        let size = bytes + room + bytes * percent / 100;
        let script = format!(
            "mount -t tmpfs -o size={size} none \"$DISK\" || exit 90
             \"$UNISONO\" train {} --run-dir \"$DISK/run\" --json > first.jsonl 2> first.err
             echo $? > first.code
             ls \"$DISK/run/checkpoints/\"*/MANIFEST.json > kept
             mount -o remount,size=1g \"$DISK\" || exit 91
             exec \"$UNISONO\" train --resume \"$DISK/run\" --workers 1 --json",
            options(&tiny)
        );
        let output = isolated(dir.path(), &script);
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let (events, words) = (read("first.jsonl"), read("first.err"));
        assert_eq!(output.status.code(), Some(0), "{percent} %: {}", String::from_utf8_lossy(&output.stderr));
        // All was trained, and only the last save, which is tried a few times, fails the run.
        assert_eq!(events.matches("\"event\":\"step\"").count() as u64, STEPS, "{percent} %: {words}");
        assert!(events.contains("\"event\":\"warning\""), "{percent} %: {words}");
        assert_eq!(read("first.code").trim(), "3", "{percent} %: {words}");
        let last = words.lines().last().unwrap();
        assert!(last.contains("make room") && last.contains("checkpoint"), "{percent} %: {last}");
        assert!(read("kept").contains("step-00000003"), "{percent} %: the first one stands");
        assert_eq!(digest(&String::from_utf8_lossy(&output.stdout)), expected, "{percent} %");
    }
}

#[test]
fn once_there_is_room_again_the_run_saves_as_if_nothing_had_been() {
    let dir = tempfile::tempdir().unwrap();
    if !possible(dir.path()) {
        return;
    }
    let tiny = fixture::tiny();
    let (expected, bytes) = whole(dir.path(), &tiny);
    let size = bytes + (9 << 20);
    let script = format!(
        "mount -t tmpfs -o size={size} none \"$DISK\" || exit 90
         \"$UNISONO\" train {} --run-dir \"$DISK/run\" --json > events.jsonl 2> words &
         while ! grep -q '\"event\":\"warning\"' events.jsonl && kill -0 $!; do sleep 0.05; done
         mount -o remount,size=1g \"$DISK\" || exit 91
         wait $!",
        options(&tiny)
    );
    let output = isolated(dir.path(), &script);
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", read("words"));
    let events = read("events.jsonl");
    assert!(events.contains("\"event\":\"warning\""), "{}", read("words"));
    assert_eq!(digest(&events), expected);
}

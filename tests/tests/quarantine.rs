//! Poisoned rows: they are named and left out, and the result is the one of a run that never had them, whoever computes and
//! whoever dies meanwhile.
#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use unisono_tests::kills::{ledger_losses, result};
use unisono_tests::train::{Finished, Train};
use unisono_tests::{binaries, fixture, processes};

/// Rows of a step, places of an epoch: 10 steps.
const BATCH: usize = 24;

/// Rows that give bad numbers.
const POISONED: [usize; 2] = [31, 77];

fn settings(train: Train) -> Train {
    let all = [
        ("model.compute", "fp32"),
        ("split.validation", "0"),
        ("split.test", "0"),
        ("train.steps", "24"),
        ("train.learning_rate", "1e-3"),
        ("checkpoint.every", "5"),
        ("checkpoint.snapshot_every", "3"),
    ];
    all.into_iter().fold(train.set("train.global_batch_size", BATCH), |train, (key, value)| train.set(key, value))
}

fn run(data: &Path, dir: &Path, workers: usize) -> Train {
    settings(Train::new(&fixture::of(fixture::MICRO).model, data, dir)).workers(workers)
}

/// The corpus with each of `rows` (from 0) changed.
fn changed(dir: &Path, name: &str, rows: &[usize], change: impl Fn(&mut Value)) -> PathBuf {
    let text = std::fs::read_to_string(fixture::of(fixture::MICRO).data).unwrap();
    let line = |(index, line): (usize, &str)| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        if rows.contains(&index) {
            change(&mut row);
        }
        row.to_string() + "\n"
    };
    let path = dir.join(name);
    std::fs::write(&path, text.lines().enumerate().map(line).collect::<String>()).unwrap();
    path
}

/// The corpus with poisoned rows, and the token that is poison.
fn poisoned(dir: &Path) -> (PathBuf, String) {
    // A character that no other row has: its bytes are tokens of their own.
    let data = changed(dir, "poisoned.jsonl", &POISONED, |row| {
        row["prompt"] = json!(format!("{}\u{7f}", row["prompt"].as_str().unwrap()));
    });
    let tokenizer = std::fs::read(fixture::of(fixture::MICRO).model.join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_slice(&tokenizer).unwrap();
    // Byte-level tokenizers write the byte 0x7f as the character U+0121.
    let poison = tokenizer["model"]["vocab"]["\u{121}"].to_string();
    (data, poison)
}

fn quarantining(dir: &Path, workers: usize) -> Train {
    let (data, poison) = poisoned(dir);
    run(&data, dir, workers).set("train.on_bad_numbers", "quarantine").env("UNISONO_POISON", poison)
}

/// What a run left out, its digest and its losses.
#[derive(Debug, PartialEq)]
struct Story {
    left_out: Vec<[Value; 4]>,
    digest: String,
    losses: Vec<f64>,
}

impl Story {
    fn of(run_dir: &Path) -> Self {
        let ledger = rusqlite::Connection::open(run_dir.join("ledger.sqlite")).unwrap();
        let mut query = ledger.prepare("SELECT body FROM events WHERE kind = 'quarantined' ORDER BY sequence").unwrap();
        let entries = query.query_map([], |row| row.get::<_, String>(0)).unwrap();
        let facts = |text: String| {
            let entry: Value = serde_json::from_str(&text).unwrap();
            ["step", "micro_batches", "rows", "names"].map(|key| entry[key].clone())
        };
        let left_out = entries.map(|entry| facts(entry.unwrap())).collect();
        let (digest, losses) = result(run_dir);
        Story { left_out, digest, losses }
    }

    /// Lines (from 0) that are named, from the step on in which the first of them was found.
    fn lines(&self) -> Vec<usize> {
        let names = self.left_out.iter().flat_map(|facts| facts[3].as_array().unwrap());
        let line = |name: &Value| {
            let after = name.as_str().unwrap().split(".jsonl:").nth(1).unwrap();
            after.split([' ', ':']).next().unwrap().parse::<usize>().unwrap() - 1
        };
        names.map(line).collect()
    }

    /// That of a run whose data lacks these lines: rows that cannot be trained on leave their places empty too.
    fn without(dir: &Path, lines: &[usize], set: &[(&str, &str)]) -> (String, Vec<f64>) {
        let lacking = changed(dir, "lacking.jsonl", lines, |row| row["prompt"] = json!("long ".repeat(3000)));
        let config = dir.join("lacking.toml");
        let model = fixture::of(fixture::MICRO).model;
        let text = format!(
            "[model]\npath = {model:?}\n[[data]]\nname = \"poisoned\"\npath = {lacking:?}\non_bad_row = \"drop\"\nmax_dropped = 0.5\n",
        );
        std::fs::write(&config, text).unwrap();
        let train = settings(Train::configured(&config, dir)).workers(2);
        let reference = set.iter().fold(train, |train, (key, value)| train.set(key, value)).succeed();
        result(&reference.run_dir)
    }
}

fn status(run_dir: &Path, json: bool) -> String {
    let mut command = binaries::command(&["status"]);
    command.arg(run_dir);
    if json {
        command.arg("--json");
    }
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

#[test]
fn poisoned_rows_are_left_out_as_if_they_had_never_been_there() {
    let dir = tempfile::tempdir().unwrap();
    let run = |workers, stage| quarantining(dir.path(), workers).set("cluster.zero_stage", stage).succeed();
    let ended = run(1, 1);
    let story = Story::of(&ended.run_dir);
    for (workers, stage) in [(2, 1), (2, 2), (2, 3), (3, 3)] {
        let other = run(workers, stage);
        assert_eq!(Story::of(&other.run_dir), story, "{workers} workers, stage {stage}");
        assert_eq!(other.events("lost").len(), 0, "nobody is lost");
    }
    assert!((1..=2).contains(&story.left_out.len()), "{story:?}");
    let lines = story.lines();
    assert!(POISONED.iter().all(|row| lines.contains(row)) && lines.len() < BATCH, "{lines:?}");
    assert_eq!(Story::without(dir.path(), &lines, &[]), (story.digest, story.losses));
    // Whoever looks sees which rows they are.
    let place = format!("poisoned.jsonl:{}", POISONED[0] + 1);
    assert!(
        ended.stderr.contains("tried") || ended.events("warning").len() >= story.left_out.len(),
        "{}",
        ended.stderr
    );
    assert!(status(&ended.run_dir, false).contains(&place), "{}", status(&ended.run_dir, false));
    let told: Value = serde_json::from_str(&status(&ended.run_dir, true)).unwrap();
    let names = told["quarantined"].as_array().unwrap().iter().flat_map(|q| q["names"].as_array().unwrap());
    assert!(names.into_iter().any(|name| name.as_str().unwrap().contains(&place)), "{told}");
}

#[test]
fn whoever_dies_meanwhile_the_result_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let story = Story::of(&quarantining(dir.path(), 1).succeed().run_dir);
    for (workers, stage, place) in
        [(2, 3, "probe"), (2, 1, "before-quarantine"), (1, 1, "after-quarantine"), (2, 2, "after-quarantine")]
    {
        let armed = tempfile::tempdir().unwrap();
        std::fs::write(armed.path().join(place), "").unwrap();
        let train = quarantining(dir.path(), workers).set("cluster.zero_stage", stage);
        let ended = train.env("UNISONO_FAIL_POINTS", armed.path()).succeed();
        assert!(!armed.path().join(place).exists(), "nobody came to {place}");
        assert_eq!(Story::of(&ended.run_dir), story, "{workers} workers, death at {place}");
    }
    // Any instant, as soon as somebody has found a bad number.
    for coordinator in [false, true] {
        let mut live = quarantining(dir.path(), 2).start();
        live.wait_for("warning");
        match coordinator {
            true => processes::kill(live.coordinator().pid),
            false => processes::kill(live.workers()[0].pid),
        }
        let ended = live.finish();
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        assert_eq!(Story::of(&ended.run_dir), story, "coordinator: {coordinator}");
    }
}

#[test]
fn a_run_that_goes_on_later_leaves_them_out_too() {
    let dir = tempfile::tempdir().unwrap();
    let story = Story::of(&quarantining(dir.path(), 1).succeed().run_dir);
    let (_, poison) = poisoned(dir.path());
    let mut live = quarantining(dir.path(), 2).start();
    for _ in &story.left_out {
        live.wait_for("quarantined");
    }
    live.wait_for("checkpoint");
    processes::signal(live.pid(), "TERM");
    let stopped = live.finish();
    assert_eq!(stopped.code(), Some(75), "{}", stopped.stderr);
    let again = |stopped: &Finished| Train::resumed(&stopped.run_dir).workers(3).env("UNISONO_POISON", &poison);
    let ended = again(&stopped).succeed();
    assert_eq!(Story::of(&ended.run_dir), story);
    // It is done, and knows what it left out.
    assert_eq!(again(&ended).run().code(), Some(0));
}

#[test]
fn without_quarantine_the_same_rows_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (data, poison) = poisoned(dir.path());
    let ended = run(&data, dir.path(), 2).env("UNISONO_POISON", poison).run();
    assert_eq!(ended.code(), Some(3), "{}", ended.stderr);
    for word in ["its rows are", "poisoned.jsonl:", "rank", "micro-batch"] {
        assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
    }
    assert_eq!(ended.events("quarantined").len(), 0);
}

/// In the order of the file, the rows of the first epoch's ninth step; losses are known by then.
const SPIKES: [(&str, &str); 4] = [
    ("train.shuffle", "false"),
    ("train.learning_rate", "1e-2"),
    ("train.spike_window", "3"),
    ("train.spike_mads", "6"),
];

fn spiky(dir: &Path, workers: usize, policy: &str) -> Train {
    // Longer than all others of its step together, and nothing that could be learnt.
    let noise: String = (0..600u32).map(|i| char::from(33 + (i * i * 31 % 89) as u8)).collect();
    let data = changed(dir, "spiky.jsonl", &[200], |row| row["completion"] = json!(noise));
    let train = run(&data, dir, workers).set("train.on_spike", policy);
    SPIKES.iter().fold(train, |train, (key, value)| train.set(key, value))
}

#[test]
fn rows_that_make_the_loss_leap_are_left_out_too() {
    let dir = tempfile::tempdir().unwrap();
    let ended = spiky(dir.path(), 1, "quarantine").succeed();
    let story = Story::of(&ended.run_dir);
    assert_eq!(story.left_out.len(), 1, "{story:?}");
    assert_eq!(story.left_out[0][0], 9);
    let lines = story.lines();
    assert!(lines.contains(&200), "{lines:?}");
    for (workers, stage) in [(2, 1), (3, 3)] {
        let other = spiky(dir.path(), workers, "quarantine").set("cluster.zero_stage", stage).succeed();
        assert_eq!(Story::of(&other.run_dir), story, "{workers} workers, stage {stage}");
    }
    assert_eq!(Story::without(dir.path(), &lines, &SPIKES), (story.digest, story.losses));
}

#[test]
fn a_spike_stops_the_run_before_its_step_counts_where_that_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let ended = spiky(dir.path(), 2, "stop").run();
    assert_eq!(ended.code(), Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("spiky.jsonl:201") && ended.stderr.contains("is above"), "{}", ended.stderr);
    assert_eq!(ledger_losses(&ended.run_dir).len(), 8);
}

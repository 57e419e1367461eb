//! Memory before step 0: what is planned is what is used, `check` says it, and what does not fit is refused.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::Path;
use unisono_tests::binaries;
use unisono_tests::fixture::{self, Shape};
use unisono_tests::processes::resident_bytes;
use unisono_tests::train::Train;

/// 22 million parameters, most of them in blocks.
const MEDIUM: Shape =
    Shape { family: "llama", hidden: 512, intermediate: 1376, layers: 7, heads: 8, kv_heads: 4, vocab: 512 };
/// 21 million parameters in fewer and wider blocks, with biases and norms of queries and keys.
const WIDE: Shape =
    Shape { family: "qwen3", hidden: 768, intermediate: 2304, layers: 3, heads: 12, kv_heads: 12, vocab: 512 };

/// A model, workers, and keys that decide how much memory they take.
type Case = (Shape, usize, &'static [(&'static str, &'static str)]);

const FULL: (&str, &str) = ("train.global_batch_size", "64");
const SMALL: (&str, &str) = ("train.global_batch_size", "24");
const BF16: (&str, &str) = ("model.compute", "bf16");
const FP32: (&str, &str) = ("model.compute", "fp32");
const NARROW: (&str, &str) = ("train.optimizer_state", "bf16");

const CASES: [Case; 12] = [
    (MEDIUM, 2, &[FULL, BF16, ("cluster.zero_stage", "2")]),
    (MEDIUM, 2, &[FULL, BF16, NARROW, ("cluster.zero_stage", "3")]),
    (MEDIUM, 1, &[FULL, FP32]),
    (MEDIUM, 1, &[FULL, BF16]),
    (MEDIUM, 2, &[FULL, BF16, ("cluster.zero_stage", "1")]),
    (MEDIUM, 2, &[FULL, FP32, ("cluster.zero_stage", "3")]),
    (MEDIUM, 1, &[FULL, BF16, NARROW]),
    (MEDIUM, 1, &[FULL, BF16, ("cluster.recompute", "block")]),
    (MEDIUM, 1, &[FULL, BF16, ("train.micro_batches", "2"), ("cluster.recompute", "up-projection")]),
    (WIDE, 3, &[SMALL, BF16]),
    (WIDE, 1, &[SMALL, FP32, ("cluster.recompute", "norms")]),
    (WIDE, 2, &[FULL, BF16, ("train.micro_batches", "3")]),
];

/// Trains a few steps and holds what each worker planned against the most that it used.
#[allow(clippy::print_stdout)]
fn planned_is_used(cases: &[Case]) {
    let dir = tempfile::tempdir().unwrap();
    let data = fixture::tiny().data;
    let mut wrong = Vec::new();
    for (shape, workers, keys) in cases {
        let model = dir.path().join(shape.family);
        if !model.exists() {
            fixture::init_model(&model, &data, *shape);
        }
        // Long enough for every shape to come up, and for two snapshots of each shard to lie in each place.
        let mut train = Train::new(&model, &data, dir.path()).workers(*workers).set("train.steps", 12);
        let often = [("checkpoint.every", "6"), ("checkpoint.snapshot_every", "1")];
        for (key, value) in [("split.validation", "0"), ("split.test", "0")].into_iter().chain(often) {
            train = train.set(key, value);
        }
        let run = keys.iter().fold(train, |train, (key, value)| train.set(key, value)).succeed();
        // Of each rank the last word counts.
        let mut of_rank = vec![(0.0, 0.0); *workers];
        for memory in run.events("memory") {
            let number = |field: &str| memory[field].as_f64().unwrap();
            of_rank[number("rank") as usize] = (number("planned_bytes"), number("peak_bytes"));
        }
        for (rank, (planned, peak)) in of_rank.into_iter().enumerate() {
            let (off, mb) = (100.0 * (planned / peak - 1.0), |bytes: f64| (bytes / 1e6).round());
            println!(
                "{}, {workers} workers, {keys:?}, rank {rank}: planned {} MB, used {} MB, {off:+.1} %",
                shape.family,
                mb(planned),
                mb(peak)
            );
            if off.abs() > 5.0 {
                wrong.push(format!("{keys:?} on {workers}: {off:+.1} %"));
            }
        }
    }
    assert!(wrong.is_empty(), "planned and used differ: {wrong:#?}");
}

#[test]
fn what_is_planned_is_used() {
    planned_is_used(&CASES[..2]);
}

#[test]
#[ignore = "minutes; make chaos"]
fn what_is_planned_is_used_in_many_ways() {
    planned_is_used(&CASES);
}

/// Rows of many lengths, in no order.
fn varied(path: &Path) {
    let mut text = String::new();
    for i in 0..600u64 {
        let words = |salt: u64| 1 + (i + 1).wrapping_mul(salt) % 300;
        let (asked, answered) = (words(6_364_136_223_846_793_005), words(2_862_933_555_777_941_757));
        text += &format!(
            "{{\"prompt\": \"{i}{}\", \"completion\": \"{}\"}}\n",
            " copy the sum".repeat(asked as usize / 9),
            "of all ".repeat(1 + answered as usize / 6)
        );
    }
    std::fs::write(path, text).unwrap();
}

/// Trains `steps` steps of ever other shapes, and returns the resident bytes after half of them and at the end.
fn grown(steps: u64) -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture::tiny().model, dir.path().join("varied.jsonl"));
    varied(&data);
    let mut train = Train::new(&model, &data, dir.path()).workers(1).set("train.steps", steps);
    for (key, value) in [BF16, ("split.validation", "0"), ("split.test", "0")] {
        train = train.set(key, value);
    }
    let sizes = [("train.global_batch_size", 8), ("train.micro_batches", 2), ("train.max_length", 512)];
    let mut live = sizes.iter().fold(train, |train, (key, value)| train.set(key, value)).start();
    let mut resident = Vec::new();
    for step in [steps / 2, steps - 1] {
        live.wait_for_step(step);
        resident.push(resident_bytes(live.workers()[0].pid).unwrap() as f64);
    }
    let run = live.finish();
    assert_eq!(run.code(), Some(0), "{}", run.stderr);
    for memory in run.events("memory") {
        let number = |field: &str| memory[field].as_f64().unwrap();
        assert!(number("peak_bytes") < 1.05 * number("planned_bytes"), "{memory}");
    }
    (resident[0], resident[1])
}

#[test]
fn memory_stays_within_the_plan_whatever_lengths_come() {
    let (half, end) = grown(60);
    assert!(end < 1.1 * half, "{half} bytes after 30 steps, {end} after 60");
}

#[test]
#[ignore = "minutes; make chaos"]
fn memory_does_not_grow_over_a_thousand_steps() {
    let (half, end) = grown(1000);
    println!("resident after 500 steps {:.0} MB, after 999 {:.0} MB", half / 1e6, end / 1e6);
    assert!(end < 1.02 * half, "{half} bytes after 500 steps, {end} after 1,000");
}

#[test]
fn check_says_what_workers_will_plan_and_refuses_what_does_not_fit() {
    let tiny = fixture::tiny();
    let check = |set: &[&str]| {
        let mut command = binaries::command(&["check", "--json", "--workers", "2", "--set", "model.compute=bf16"]);
        command.arg("--model").arg(&tiny.model).arg("--data").arg(&tiny.data);
        command.args(set.iter().flat_map(|set| ["--set", set]));
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let memory = events.into_iter().find(|event| event["event"] == "memory").unwrap();
        (output.status.code(), memory, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, memory, _) = check(&[]);
    assert_eq!((code, &memory["fits"]), (Some(0), &Value::Bool(true)), "{memory}");
    let parameters = memory["parameters"].as_u64().unwrap();
    let item = |memory: &Value, name: &str| {
        let items = memory["items"].as_array().unwrap();
        items.iter().find(|item| item["name"] == name).unwrap()["bytes"].as_u64().unwrap()
    };
    assert_eq!((item(&memory, "parameters"), item(&memory, "sums")), (2 * parameters, 8 * parameters));
    assert!(item(&memory, "masters") >= parameters && item(&memory, "moments") == 4 * item(&memory, "masters"));
    let total: u64 = memory["items"].as_array().unwrap().iter().map(|item| item["bytes"].as_u64().unwrap()).sum();
    assert_eq!(memory["total_bytes"].as_u64(), Some(total));
    let (_, narrow, _) = check(&["train.optimizer_state=bf16"]);
    assert_eq!((item(&narrow, "masters"), item(&narrow, "moments")), (0, item(&memory, "moments") / 2));

    // The same numbers as of the workers themselves, but for what is resident before anything is loaded.
    let dir = tempfile::tempdir().unwrap();
    let train = Train::new(&tiny.model, &tiny.data, dir.path()).workers(2).set("model.compute", "bf16");
    let run = train.set("train.steps", 2).succeed();
    let planned = run.events("memory").iter().map(|m| m["planned_bytes"].as_u64().unwrap()).max().unwrap();
    assert!(planned.abs_diff(total) < 24 << 20, "check says {total}, a worker {planned}");
}

#[test]
fn data_can_be_checked_where_no_worker_is_installed() {
    let (tiny, dir) = (fixture::tiny(), tempfile::tempdir().unwrap());
    let alone = dir.path().join("unisono");
    std::fs::copy(binaries::unisono(), &alone).unwrap();
    let mut command = std::process::Command::new(alone);
    command.args(["check", "--json", "--model"]).arg(&tiny.model).arg("--data").arg(&tiny.data);
    command.env_remove("UNISONO_WORKER").env("PATH", dir.path()).env("XDG_CACHE_HOME", dir.path());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let memory = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).find(|e| e["event"] == "memory");
    let memory = memory.unwrap();
    assert!(memory["parameters"].as_u64() > Some(0) && memory["fits"].is_null(), "{memory}");
    assert!(memory["unplanned"].as_str().unwrap().contains("make build"), "{memory}");
}

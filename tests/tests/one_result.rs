//! One result: the digest of a run does not depend on how many workers computed it, which of them computed what, or
//! when.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use unisono_tests::train::{Finished, Train};
use unisono_tests::{binaries, fixture};

/// Six steps of the tiny model, the last one with fewer rows than the others.
fn train(dir: &Path, compute: &str) -> Train {
    let tiny = fixture::tiny();
    Train::new(&tiny.model, &tiny.data, dir)
        .set("model.compute", compute)
        .set("train.steps", 6)
        .set("train.global_batch_size", 24)
        .set("train.learning_rate", 1e-3)
        .set("eval.every", 3)
}

fn digest_command(run_dir: &Path) -> String {
    let output = binaries::command(&["digest"]).arg(run_dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let digest = text.split_whitespace().find(|word| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit()));
    digest.unwrap_or_else(|| panic!("no digest in {text}")).to_owned()
}

/// What must not differ between two runs: the digest, and every number that the steps and evaluations report.
fn same(one: &Finished, other: &Finished, what: &str) {
    for kind in ["step", "eval"] {
        let (a, b) = (one.events(kind), other.events(kind));
        assert_eq!(a.len(), b.len(), "{what}: number of {kind} events");
        for (a, b) in a.iter().zip(&b) {
            for field in [
                "step",
                "loss",
                "grad_norm",
                "lr",
                "examples",
                "tokens",
                "target_tokens",
                "perplexity",
                "token_accuracy",
            ] {
                assert_eq!(a[field], b[field], "{what}: {field} of {a} and {b}");
            }
        }
    }
    assert_eq!(one.digest(), other.digest(), "{what}: digest");
}

fn any_number_of_workers(compute: &str) {
    let dir = tempfile::tempdir().unwrap();
    let one = train(dir.path(), compute).workers(1).succeed();
    assert_eq!(one.events("step").len(), 6);
    assert_eq!(digest_command(&one.run_dir), one.digest());
    for workers in [2, 3, 4, 8] {
        let many = train(dir.path(), compute).workers(workers).succeed();
        same(&one, &many, &format!("{compute}, 1 and {workers} workers"));
        let generation = &many.events("membership")[0];
        assert_eq!(generation["members"].as_array().unwrap().len(), workers, "{generation}");
        if workers == 2 {
            assert_evenly_shared(&many);
        }
    }
}

/// Each of two workers computes 40 to 60 % of the tokens.
fn assert_evenly_shared(run: &Finished) {
    let mut totals = [0u64; 2];
    for step in run.events("step") {
        for (total, tokens) in totals.iter_mut().zip(step["rank_tokens"].as_array().unwrap()) {
            *total += tokens.as_u64().unwrap();
        }
    }
    let share = totals[0] as f64 / (totals[0] + totals[1]) as f64;
    assert!((0.4..=0.6).contains(&share), "rank 0 computed {:.0} % of the tokens", share * 100.0);
}

#[test]
fn fp32_on_1_2_3_4_and_8_workers() {
    any_number_of_workers("fp32");
}

#[test]
fn bf16_on_1_2_3_4_and_8_workers() {
    any_number_of_workers("bf16");
}

#[test]
fn defaults_shuffled_assignment_stages_recompute_and_a_second_run() {
    let dir = tempfile::tempdir().unwrap();
    // Every key of [cluster] at its default.
    let defaults = train(dir.path(), "fp32").succeed();
    same(&defaults, &train(dir.path(), "fp32").succeed(), "a second run");
    let shuffled = train(dir.path(), "fp32").workers(3).set("cluster.assignment", "shuffled").succeed();
    same(&defaults, &shuffled, "micro-batches dealt at random");
    for stage in [1, 2, 3] {
        let run = train(dir.path(), "fp32").workers(2).set("cluster.zero_stage", stage).succeed();
        same(&defaults, &run, &format!("stage {stage}"));
        assert_eq!(run.events("memory")[0]["zero_stage"], stage);
    }
    for (workers, stage) in [(2, 1), (3, 3)] {
        let run = train(dir.path(), "fp32").workers(workers).set("cluster.transport", "tcp");
        same(&defaults, &run.set("cluster.zero_stage", stage).succeed(), "everything over sockets");
    }
    let mut peaks = Vec::new();
    for level in ["nothing", "block"] {
        let run = train(dir.path(), "fp32").workers(2).set("cluster.recompute", level).succeed();
        same(&defaults, &run, &format!("recompute {level}"));
        peaks.push(run.events("memory")[0]["planned_bytes"].as_u64().unwrap());
    }
    assert!(peaks[1] < peaks[0], "blocks computed again need less: {peaks:?}");
    // The digest is not a constant: another seed deals other batches.
    let other = train(dir.path(), "fp32").workers(2).set("train.seed", 1).succeed();
    assert_ne!(defaults.digest(), other.digest());
}

#[test]
fn an_independent_script_recomputes_the_digest() {
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: python3 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let micro = fixture::of(fixture::MICRO);
    let run = Train::new(&micro.model, &micro.data, dir.path()).workers(3).set("train.steps", 3).succeed();
    let script = binaries::checkout().join("scripts/digest.py");
    let output = Command::new("python3").arg(script).arg(&run.run_dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&run.digest()), "digest.py says {text}, the run {}", run.digest());
}

/// Builds the worker with these features into the target directory of this test.
fn build_worker(features: &[&str]) {
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(binaries::checkout())
        .args(["build", "--locked", "-p", "unisono-worker", "--bin", "unisono-worker", "--target-dir"])
        .arg(binaries::profile_dir().parent().unwrap())
        .args(features)
        .status()
        .unwrap();
    assert!(status.success(), "the worker does not build with {features:?}");
}

/// The negative control: a worker that adds leaves as fp32 must not give one result, else the tests above prove
/// nothing. Builds a second worker, so it runs with `make chaos`.
#[test]
#[ignore = "builds a second worker: make chaos"]
fn a_build_that_sums_in_fp32_differs() {
    let dir = tempfile::tempdir().unwrap();
    let worker = dir.path().join("unisono-worker");
    build_worker(&["--features", "float-sum"]);
    std::fs::copy(binaries::worker(), &worker).unwrap();
    build_worker(&[]);
    let runs: Vec<Finished> = [1, 2, 3]
        .into_iter()
        .map(|workers| train(dir.path(), "fp32").workers(workers).env("UNISONO_WORKER", &worker).succeed())
        .collect();
    assert!(runs[1..].iter().any(|run| run.digest() != runs[0].digest()), "a float sum gave one result by chance");
}

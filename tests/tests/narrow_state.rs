//! `train.optimizer_state = "bf16"`: no masters and bf16 moments, rounded stochastically. One result from any number of
//! workers and after resuming, in files of half the size; and a model as good as with exact state.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use unisono_tests::train::{Finished, Train};
use unisono_tests::{binaries, fixture};

fn train(dir: &Path, state: &str, steps: usize) -> Train {
    let tiny = fixture::tiny();
    Train::new(&tiny.model, &tiny.data, dir)
        .set("model.compute", "bf16")
        .set("train.optimizer_state", state)
        .set("train.steps", steps)
        .set("train.global_batch_size", 24)
        .set("train.learning_rate", 1e-3)
        .set("eval.every", steps)
}

#[test]
fn any_number_of_workers_and_resuming_give_one_result_that_others_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let one = train(dir.path(), "bf16", 6).workers(1).succeed();
    for workers in [2, 3] {
        let many = train(dir.path(), "bf16", 6).workers(workers).succeed();
        assert_eq!(many.digest(), one.digest(), "{workers} workers");
    }
    let half = train(dir.path(), "bf16", 3).workers(3).set("train.schedule", "constant").succeed();
    let whole = train(dir.path(), "bf16", 6).workers(2).set("train.schedule", "constant").succeed();
    let resumed = Train::resumed(&half.run_dir).workers(2).set("train.steps", 6).succeed();
    assert_eq!(resumed.digest(), whole.digest(), "three steps, and three more");

    // 6 bytes for each parameter, and what cannot be changed on the way is refused.
    let parameters = one.events("started")[0]["parameters"].as_f64().unwrap();
    let saved = one.events("checkpoint").last().unwrap()["bytes"].as_f64().unwrap();
    assert!((6.0 * parameters..6.2 * parameters).contains(&saved), "{saved} bytes of {parameters} parameters");
    let other = Train::resumed(&half.run_dir).set("train.steps", 7).set("train.optimizer_state", "fp32").run();
    assert_eq!(other.code(), Some(2));
    assert!(other.stderr.contains("train.optimizer_state"), "{}", other.stderr);
    if Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let script = binaries::checkout().join("scripts/digest.py");
        let output = Command::new("python3").arg(script).arg(&one.run_dir).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&one.digest()), "digest.py says {text}, the run {}", one.digest());
    }
}

/// Loss on rows that were held out, and on those of the last steps.
fn learnt(run: &Finished) -> (f64, f64) {
    let validation = run.events("eval").last().unwrap()["loss"].as_f64().unwrap();
    let losses: Vec<f64> = run.events("step").iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    let late = &losses[losses.len() - 10..];
    (validation, late.iter().sum::<f64>() / late.len() as f64)
}

#[test]
fn it_learns_what_the_exact_state_learns() {
    let dir = tempfile::tempdir().unwrap();
    let of =
        |state: &str, seed: u64| learnt(&train(dir.path(), state, 80).workers(2).set("train.seed", seed).succeed());
    let exact: Vec<_> = (0..3).map(|seed| of("fp32", seed)).collect();
    let narrow: Vec<_> = (0..3).map(|seed| of("bf16", seed)).collect();
    let mean = |runs: &[(f64, f64)], pick: fn(&(f64, f64)) -> f64| runs.iter().map(pick).sum::<f64>() / 3.0;
    let picks: [(&str, fn(&(f64, f64)) -> f64); 2] = [("validation", |run| run.0), ("training", |run| run.1)];
    for (what, pick) in picks {
        let (a, b) = (mean(&exact, pick), mean(&narrow, pick));
        // What another order of the rows changes is the noise that it is to stay within.
        let (least, most) = exact.iter().map(pick).fold((f64::MAX, f64::MIN), |(l, m), x| (l.min(x), m.max(x)));
        let noise = (most - least).max(0.02 * a);
        println!("{what}: exact {a:.4} ({least:.4} to {most:.4}), bf16 state {b:.4}");
        assert!((b - a).abs() <= noise, "{what}: {b} against {a}, noise {noise}");
    }
}

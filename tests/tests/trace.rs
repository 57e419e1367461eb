//! `train --trace FILE`: a timeline of all workers that a viewer opens, and on it communication behind computing.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use unisono_tests::fixture;
use unisono_tests::train::Train;

#[test]
fn a_trace_shows_every_worker_computing_and_communicating() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    let file = dir.path().join("trace.json");
    let run = Train::new(&tiny.model, &tiny.data, dir.path()).workers(2).set("train.steps", 12);
    run.arg("--trace").arg(&file).succeed();
    let text = std::fs::read_to_string(&file).unwrap();
    // The format's closing bracket may be left out.
    let events: Vec<Value> = serde_json::from_str(&(text.trim_end().trim_end_matches(',').to_owned() + "]")).unwrap();
    let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
    for rank in [0, 1] {
        let of = |what: &str| {
            let named = |e: &&&Value| e["pid"] == rank && e["name"].as_str().unwrap().starts_with(what);
            spans.iter().filter(named).map(|e| (**e).clone()).collect::<Vec<Value>>()
        };
        for what in
            ["forward embedding", "forward block.3", "backward head", "reduce block.0", "update head", "gather head"]
        {
            assert!(!of(what).is_empty(), "rank {rank}: {what}");
        }
        assert!(of("reduce").iter().all(|e| e["tid"] == 2) && of("backward").iter().all(|e| e["tid"] == 1));
        let last = of("update").iter().map(|e| e["args"]["step"].as_u64().unwrap()).max();
        assert_eq!(last, Some(10), "a trace is bounded");
        // A bucket travels while the one before it computes.
        let ends = |e: &Value| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap();
        let computing = of("backward");
        let beside = |r: &Value| {
            computing.iter().any(|c| c["ts"].as_f64() < Some(ends(r)) && ends(c) > r["ts"].as_f64().unwrap())
        };
        assert!(of("reduce").iter().any(beside), "rank {rank}: nothing travels behind computing");
    }
}

#[test]
fn a_trace_that_cannot_be_written_is_said_before_anything_starts() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), fixture::tiny());
    let run =
        Train::new(&tiny.model, &tiny.data, dir.path()).arg("--trace").arg(dir.path().join("none/trace.json")).run();
    assert_eq!(run.code(), Some(2));
    assert!(!dir.path().join("run").exists());
}

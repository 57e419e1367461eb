//! Sharded optimizer state: each worker holds its part, and resident memory shows it.

#![allow(clippy::unwrap_used)]

use std::time::Duration;
use unisono_tests::fixture::{self, Shape};
use unisono_tests::processes::{resident_bytes, wait_until_gone};
use unisono_tests::train::Train;

/// 19 million parameters in 293 chunks, nearly all of them full: shards are even to within 2 % for 4 workers.
const MEDIUM: Shape =
    Shape { family: "llama", hidden: 512, intermediate: 1530, layers: 6, heads: 8, kv_heads: 4, vocab: 512 };

#[test]
fn optimizer_state_shrinks_with_the_number_of_workers() {
    let dir = tempfile::tempdir().unwrap();
    let data = fixture::tiny().data;
    let model = dir.path().join("model");
    fixture::init_model(&model, &data, MEDIUM);
    let mut resident = Vec::new();
    for workers in [1usize, 2, 4] {
        let mut live = Train::new(&model, &data, dir.path())
            .workers(workers)
            .set("model.compute", "fp32")
            .set("train.steps", 50)
            .set("train.global_batch_size", 16)
            .set("split.validation", 0)
            .set("split.test", 0)
            .start();
        let parameters = live.wait_for("started")["parameters"].as_f64().unwrap();
        live.wait_for("step");
        let of_each: Vec<u64> = live.workers().iter().filter_map(|worker| resident_bytes(worker.pid)).collect();
        assert_eq!(of_each.len(), workers);
        resident.push(of_each.iter().copied().max().unwrap() as f64);
        // Both moments; computing in fp32, the masters are the parameters, which every worker has.
        let expected = 8.0 * parameters / workers as f64;
        let ranks: std::collections::BTreeSet<_> = live.all("memory").iter().map(|m| m["rank"].as_u64()).collect();
        assert_eq!(ranks.len(), workers, "every rank reports its memory");
        for memory in live.all("memory") {
            let held = memory["optimizer_bytes"].as_f64().unwrap();
            assert!((held / expected - 1.0).abs() < 0.02, "{workers} workers: {held} bytes, not {expected}: {memory}");
            assert!(memory["planned_bytes"].as_f64().unwrap() > held, "{memory}");
            assert!(memory["peak_bytes"].as_f64().unwrap() > held, "{memory}");
        }
        let mark = live.mark.clone();
        // Dropping it kills the supervisor: the end of the run is not of interest.
        drop(live);
        wait_until_gone(&mark, Duration::from_secs(5));
        println!(
            "{workers} workers: {:.0} MB resident in the largest, {:.0} MB optimizer state each",
            resident.last().unwrap() / 1e6,
            expected / 1e6
        );
        if workers == 4 {
            // A copy of the own shard with its masters lies ready for checkpoints.
            let saved = 20.0 * parameters * (1.0 - 1.0 / 4.0);
            let fell = resident[0] - resident[2];
            assert!(
                fell > 0.8 * saved,
                "resident memory fell by {fell:.0} bytes, not by about {saved:.0}: {resident:?}"
            );
        }
    }
}

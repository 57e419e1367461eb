//! A number that is not finite stops the run by name, and never reaches an update or a checkpoint.

#![allow(clippy::unwrap_used)]

use safetensors::SafeTensors;
use unisono_tests::fixture;
use unisono_tests::train::{Finished, Train};

fn diverging(dir: &std::path::Path, rate: &str, every: u64) -> Finished {
    let micro = fixture::of(fixture::MICRO);
    Train::new(&micro.model, &micro.data, dir)
        .workers(2)
        .set("model.compute", "fp32")
        .set("train.steps", 8)
        .set("train.global_batch_size", 8)
        .set("train.schedule", "constant")
        .set("train.warmup_steps", 0)
        .set("train.max_grad_norm", 0)
        .set("train.learning_rate", rate)
        .set("checkpoint.every", every)
        .run()
}

/// Every number of every checkpoint is finite.
fn all_is_finite(ended: &Finished) -> usize {
    let mut files = 0;
    for directory in std::fs::read_dir(ended.run_dir.join("checkpoints")).unwrap() {
        let directory = directory.unwrap().path();
        if !directory.join("MANIFEST.json").exists() {
            continue;
        }
        for file in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if !file.file_name().unwrap().to_str().unwrap().starts_with("shard-") {
                continue;
            }
            let content = std::fs::read(&file).unwrap();
            for (name, view) in SafeTensors::deserialize(&content).unwrap().iter() {
                let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                assert!(values.into_iter().all(f32::is_finite), "{name} of {}", file.display());
            }
            files += 1;
        }
    }
    files
}

#[test]
fn the_rows_of_the_micro_batch_are_named_and_nothing_bad_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let ended = diverging(dir.path(), "1e30", 1);
    assert_eq!(ended.code(), Some(3), "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap();
    for word in ["rank", "micro-batch", "its rows are", "rows.jsonl:", "train.learning_rate"] {
        assert!(last.contains(word), "{word}: {last}");
    }
    let failed = ended.events("failed");
    assert!(failed[0]["micro_batch"].is_u64(), "{}", failed[0]);
    all_is_finite(&ended);
}

#[test]
fn a_state_that_overflowed_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let ended = diverging(dir.path(), "1e39", 1);
    assert_eq!(ended.code(), Some(3), "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap();
    assert!(last.contains("not finite") && last.contains("train.learning_rate"), "{last}");
    assert_eq!(all_is_finite(&ended), 0);
}

//! A run outlives the machine that holds its directory: its checkpoints are copied elsewhere, and it goes on from there.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;
use unisono_tests::fixture;
use unisono_tests::processes::{signal, wait_until_gone};
use unisono_tests::train::Train;

fn train(dir: &Path, url: Option<&str>) -> Train {
    let micro = fixture::of(fixture::MICRO);
    let train = Train::new(&micro.model, &micro.data, dir)
        .set("model.compute", "fp32")
        .set("train.steps", 9)
        .set("train.global_batch_size", 24)
        .set("checkpoint.every", 2)
        .set("eval.every", 3);
    match url {
        Some(url) => train.set("checkpoint.copy_to", url),
        None => train,
    }
}

#[test]
fn a_run_goes_on_from_its_copy_where_its_directory_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let whole = train(dir.path(), None).workers(1).succeed();
    let url = format!("file://{}/copies", dir.path().display());
    let mut live = train(dir.path(), Some(&url)).workers(2).start();
    live.wait_for("checkpoint");
    live.wait_for("checkpoint");
    signal(live.pid(), "TERM");
    let ended = live.finish();
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    assert_eq!(ended.code(), Some(75), "{}", ended.stderr);
    std::fs::remove_dir_all(&ended.run_dir).unwrap();

    // The coordinator that has just brought it dies.
    let armed = tempfile::tempdir().unwrap();
    std::fs::write(armed.path().join("read"), "").unwrap();
    let name = ended.run_dir.file_name().unwrap().to_str().unwrap();
    let brought = Train::brought(&format!("{url}/{name}"), dir.path()).workers(3);
    let finished = brought.env("UNISONO_FAIL_POINTS", armed.path()).succeed();
    assert!(!armed.path().join("read").exists(), "nobody came there");
    assert!(finished.stderr.contains("brought the checkpoint after step"), "{}", finished.stderr);
    assert_eq!(finished.digest(), whole.digest());
}

#[test]
fn what_cannot_be_copied_to_is_refused_before_a_worker_starts() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    for (url, named) in [(format!("{}/file/below", dir.path().display()), "file/below"), ("ftp://x/y".into(), "s3://")]
    {
        let finished = train(dir.path(), Some(&url)).workers(1).run();
        assert_eq!(finished.code(), Some(2), "{}", finished.stderr);
        let last = finished.stderr.lines().last().unwrap();
        assert!(last.contains("checkpoint.copy_to") && last.contains(named), "{last}");
    }
}

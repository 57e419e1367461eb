//! A run that was killed goes on with another number of workers, and ends like the undisturbed one.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Output;
use unisono_tests::processes::{kill, wait_until_gone};
use unisono_tests::train::{Finished, Train};
use unisono_tests::{binaries, fixture};

const STEPS: u64 = 9;

fn train(dir: &Path) -> Train {
    let micro = fixture::of(fixture::MICRO);
    Train::new(&micro.model, &micro.data, dir)
        .set("model.compute", "fp32")
        .set("train.steps", STEPS)
        .set("train.global_batch_size", 24)
        .set("train.learning_rate", 1e-3)
        .set("checkpoint.every", 2)
        .set("eval.every", 3)
}

enum Victim {
    /// Where the first lost worker ends the run.
    Worker,
    Supervisor,
}

/// A run of two workers whose victim is killed as soon as its second checkpoint is committed.
fn killed(dir: &Path, victim: Victim) -> PathBuf {
    let restarts = if matches!(victim, Victim::Worker) { 0 } else { 3 };
    let mut live = train(dir).workers(2).set("cluster.restarts", restarts).start();
    live.wait_for("checkpoint");
    live.wait_for("checkpoint");
    kill(match victim {
        Victim::Worker => live.workers()[0].pid,
        Victim::Supervisor => live.pid(),
    });
    let ended = live.finish();
    wait_until_gone(&ended.mark, std::time::Duration::from_secs(5));
    assert_ne!(ended.code(), Some(0), "the run ended before it could be killed");
    ended.run_dir
}

fn resume(run_dir: &Path, arguments: &[&str]) -> Output {
    let mut command = binaries::command(&["train", "--json", "--resume"]);
    command.arg(run_dir).args(arguments).output().unwrap()
}

fn digest(output: &Output) -> String {
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{words}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let mut done = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let done = done.rfind(|event| event["event"] == "done").expect("a run that went on is done");
    assert_eq!(done["steps"], STEPS);
    done["digest"].as_str().unwrap().to_owned()
}

fn undisturbed(dir: &Path) -> Finished {
    train(dir).workers(1).succeed()
}

#[test]
fn whoever_is_killed_the_digest_is_that_of_the_undisturbed_run() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path());
    for (victim, workers) in [(Victim::Worker, "3"), (Victim::Supervisor, "1"), (Victim::Supervisor, "2")] {
        let run_dir = killed(dir.path(), victim);
        assert_eq!(digest(&resume(&run_dir, &["--workers", workers])), whole.digest());
    }
}

#[test]
fn a_damaged_checkpoint_is_set_aside_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path());
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 2] = [|bytes| bytes.truncate(bytes.len() - 5), |bytes| *bytes.last_mut().unwrap() ^= 4];
    for damage in damages {
        let run_dir = killed(dir.path(), Victim::Worker);
        let newest = std::fs::read_dir(run_dir.join("checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("MANIFEST.json").exists())
            .max()
            .unwrap();
        let shard = std::fs::read_dir(&newest)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("shard-"))
            .unwrap();
        let mut bytes = std::fs::read(&shard).unwrap();
        damage(&mut bytes);
        std::fs::write(&shard, bytes).unwrap();
        let output = resume(&run_dir, &["--workers", "3"]);
        assert_eq!(digest(&output), whole.digest());
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("is set aside") && words.contains(shard.to_str().unwrap()), "{words}");
    }
}

#[test]
fn what_would_make_it_another_run_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = killed(dir.path(), Victim::Worker);
    for (change, named) in [
        ("train.learning_rate=0.5", "train.learning_rate"),
        ("train.seed=7", "train.seed"),
        ("cluster.threads_per_worker=2", "cluster.threads_per_worker"),
        ("train.steps=1", "train.steps"),
    ] {
        let output = resume(&run_dir, &["--set", change]);
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words}");
        assert!(words.lines().last().unwrap().contains(named), "{words}");
    }
    // Nothing of that was recorded: the run goes on as it was.
    let whole = undisturbed(dir.path());
    assert_eq!(digest(&resume(&run_dir, &[])), whole.digest());
    // And once it is finished, nothing is left to do.
    let again = resume(&run_dir, &[]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is finished"));
}

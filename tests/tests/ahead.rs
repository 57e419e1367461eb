//! Rows that become tokens while training goes on: the same run, each row tokenized once, and bad rows as the
//! configuration has it.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use unisono_tests::train::{Finished, Train};
use unisono_tests::{binaries, corpus, fixture};

/// A configuration over two tasks of the shared corpus, three to one of the smaller.
fn mixed(dir: &Path) -> PathBuf {
    let micro = fixture::of(fixture::MICRO);
    let rows = corpus::rows(7, 200);
    corpus::write(&dir.join("many.jsonl"), &rows[..150]);
    corpus::write(&dir.join("few.jsonl"), &rows[150..]);
    let path = dir.join("mixed.toml");
    let text = format!(
        "[model]\npath = {:?}\ncompute = \"fp32\"\n\
         [[data]]\npath = \"many.jsonl\"\nweight = 1.0\n[[data]]\npath = \"few.jsonl\"\nweight = 3.0\n\
         [mix]\nby = \"weights\"\n\
         [train]\nepochs = 2\nglobal_batch_size = 40\nmax_length = 128\n[eval]\nevery = 3\n",
        micro.model
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn only<'f>(run: &'f Finished, kind: &str) -> &'f Value {
    let found = run.events(kind);
    assert_eq!(found.len(), 1, "{kind}: {}", run.stderr);
    found[0]
}

fn losses(run: &Finished) -> Vec<(u64, u64)> {
    let bits = |step: &&Value| (step["step"].as_u64().unwrap(), step["loss"].as_f64().unwrap().to_bits());
    run.events("step").iter().chain(&run.events("eval")).map(bits).collect()
}

#[test]
fn whether_rows_are_tokenized_before_or_while_training_it_is_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let config = mixed(dir.path());
    let train = |mib: f64| Train::configured(&config, dir.path()).set("tokens.ahead_above_mib", mib);
    let count = |run: &Finished, field: &str| only(run, "tokens")[field].as_u64().unwrap();
    // A cold cache: the rows that the run needs and those that are held out, once, for two workers.
    let ahead = train(0.0).workers(2).succeed();
    let (cold, rest) = (count(&ahead, "tokenized"), count(&ahead, "unknown"));
    assert_eq!((cold + rest, count(&ahead, "cached")), (200, 0));
    assert!(rest > 0, "two epochs need all of the small task and not all of the large one");
    // The next run finds them, and tokenizes the rest: rows with the same text were found with them.
    let before = train(16.0).workers(1).succeed();
    assert!(count(&before, "cached") >= cold && count(&before, "tokenized") > 0);
    assert_eq!(count(&before, "cached") + count(&before, "tokenized"), 200);
    let warm = train(0.0).workers(1).succeed();
    assert_eq!((count(&warm, "tokenized"), count(&warm, "cached"), count(&warm, "written")), (0, 200, 0));
    let uncached = train(0.0).workers(3).set("tokens.cache_gib", 0).succeed();
    assert_eq!(only(&uncached, "tokens")["cached"], 0);
    for other in [&before, &warm, &uncached] {
        assert_eq!(other.digest(), ahead.digest());
        assert_eq!(losses(other), losses(&ahead));
    }
    let shares: Vec<f64> = only(&ahead, "batches")["tasks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|task| {
            let realised = task["share_of_examples"].as_f64().unwrap();
            assert!((realised - task["planned"].as_f64().unwrap()).abs() < 0.01, "{task}");
            realised
        })
        .collect();
    assert!((shares[1] - 0.75).abs() < 0.01, "{shares:?}");
}

/// Rows of which the fifth has no token to learn from, and the seventh no completion at all.
fn flawed(dir: &Path, count: usize) -> PathBuf {
    let mut rows = corpus::rows(3, count);
    rows[4]["prompt"] = json!("word ".repeat(400));
    rows[6]["completion"] = json!("");
    let path = dir.join("rows.jsonl");
    corpus::write(&path, &rows);
    path
}

fn train_flawed(dir: &Path, data: &Path, steps: u64) -> Train {
    Train::new(&fixture::of(fixture::MICRO).model, data, dir)
        .set("model.compute", "fp32")
        .set("train.steps", steps)
        .set("train.global_batch_size", 8)
        .set("train.max_length", 128)
        .set("train.shuffle", false)
        .set("train.schedule", "constant")
        .set("train.warmup_steps", 0)
        .set("split.validation", 0)
        .set("split.test", 0)
        .set("checkpoint.every", 2)
        .set("tokens.ahead_above_mib", 0)
}

#[test]
fn a_bad_row_in_a_hundred_thousand_is_dropped_and_the_run_goes_on_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let data = flawed(dir.path(), 100_000);
    let drop = |steps| train_flawed(dir.path(), &data, steps).set("data.on_bad_row", "drop");
    let whole = drop(4).workers(2).succeed();
    let examples: Vec<u64> = whole.events("step").iter().map(|s| s["examples"].as_u64().unwrap()).collect();
    // The text stage knows the seventh row; the fifth leaves its place empty.
    assert_eq!(examples, [7, 8, 8, 8]);
    let half = drop(2).workers(1).succeed();
    let mut resume = binaries::command(&["train", "--json", "--resume"]);
    resume.arg(&half.run_dir).args(["--set", "train.steps=4"]).env("XDG_CACHE_HOME", dir.path().join("cache"));
    let output = resume.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{words}");
    assert!(String::from_utf8_lossy(&output.stdout).contains(&whole.digest()), "{words}");
}

#[test]
fn a_bad_row_found_ahead_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let data = flawed(dir.path(), 60);
    let mut rows = corpus::rows(3, 60);
    rows[4]["prompt"] = json!("word ".repeat(400));
    corpus::write(&data, &rows);
    let refused = train_flawed(dir.path(), &data, 4).run();
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr);
    let last = refused.stderr.lines().last().unwrap();
    assert!(last.contains("rows.jsonl:5: the prompt fills the whole length"), "{last}");
    assert!(!refused.run_dir.exists(), "a refused run leaves nothing");
}

#[test]
fn a_data_file_that_is_changed_while_the_run_trains_is_named_with_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    corpus::write(&data, &corpus::rows(3, 100_000));
    let mut live = train_flawed(dir.path(), &data, 12_500).workers(2).set("checkpoint.every", 0).start();
    live.wait_for("started");
    // The last rows, which are trained on last, lose a word each; the file is as long as before.
    let text = std::fs::read(&data).unwrap();
    let from = text.len() - (1 << 20);
    let changed: Vec<u8> = text[from..].iter().map(|&byte| if byte == b'e' { b'a' } else { byte }).collect();
    let file = std::fs::OpenOptions::new().write(true).open(&data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &changed, from as u64).unwrap();
    let ended = live.finish();
    assert_eq!(ended.code(), Some(2), "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap();
    let named = last.contains("rows.jsonl") && last.contains("is no longer what it was when the run read it");
    assert!(named && !last.contains("rank"), "{last}");
}

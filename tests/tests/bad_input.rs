//! Bad input gets one sentence that says where and what to do, exit code 2, and leaves neither process nor directory.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use std::time::Duration;
use unisono_tests::processes::wait_until_gone;
use unisono_tests::{binaries, corpus, fixture, train::Train};

/// A directory with a copy of the tiny model and its data, to be spoiled.
struct Case {
    dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

impl Case {
    fn new() -> Self {
        let tiny = fixture::tiny();
        let dir = tempfile::tempdir().unwrap();
        let (model, data) = (dir.path().join("model"), dir.path().join("rows.jsonl"));
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(&tiny.model).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        std::fs::copy(&tiny.data, &data).unwrap();
        Case { dir, model, data }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn train(&self) -> Train {
        self.train_alone().workers(2)
    }

    fn train_alone(&self) -> Train {
        Train::new(&self.model, &self.data, self.path()).set("train.steps", 2)
    }

    /// Writes a configuration that names the model and data, with `extra` after it.
    fn config(&self, extra: &str) -> Train {
        let path = self.path().join("run.toml");
        let text = format!(
            "[model]\npath = \"{}\"\n\n[[data]]\npath = \"{}\"\n\n{extra}\n",
            self.model.display(),
            self.data.display()
        );
        std::fs::write(&path, text).unwrap();
        Train::configured(&path, self.path()).workers(2)
    }

    fn change_config_json(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.model.join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        change(config.as_object_mut().unwrap());
        std::fs::write(&path, config.to_string()).unwrap();
    }

    fn weights(&self) -> PathBuf {
        self.model.join("model.safetensors")
    }

    /// Replaces line `line` (from 1) of the data.
    fn spoil_row(&self, line: usize, row: &str) {
        let text = std::fs::read_to_string(&self.data).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        lines[line - 1] = row;
        std::fs::write(&self.data, lines.join("\n") + "\n").unwrap();
    }
}

/// Runs what must be refused; the sentence must contain every one of `words`.
fn refused(train: Train, words: &[&str]) {
    let existed = train.run_dir().exists();
    let ended = train.run();
    let sentence = ended.stderr.trim();
    assert_eq!(ended.code(), Some(2), "exit code; standard error: {sentence}");
    assert!(!sentence.contains("panicked"), "{sentence}");
    assert_eq!(sentence.lines().count(), 1, "one sentence, not this:\n{sentence}");
    for word in words {
        assert!(sentence.contains(word), "\"{word}\" is missing in: {sentence}");
    }
    assert!(ended.events("step").is_empty(), "nothing was trained: {:?}", ended.events);
    wait_until_gone(&ended.mark, Duration::from_secs(2));
    assert_eq!(ended.run_dir.exists(), existed, "a run directory was left behind by: {sentence}");
}

#[test]
fn configuration() {
    let case = Case::new();
    for (extra, words) in [
        ("[train]\nlearning_rat = 1e-3", &["run.toml", "learning_rat", "learning_rate"][..]),
        ("[train]\nper_device_train_batch_size = 8", &["run.toml", "per_device_train_batch_size", "global_batch_size"]),
        ("[train]\nlearning_rate = \"high\"", &["run.toml", "learning_rate"]),
        ("[train]\nmicro_batches = 0", &["run.toml", "micro_batches"]),
        ("[trian]\nseed = 1", &["run.toml", "trian", "train"]),
        ("[train\nseed = 1", &["run.toml"]),
    ] {
        refused(case.config(extra), words);
    }
    refused(case.train().set("train.learning_rat", 1), &["learning_rat", "learning_rate"]);
    let missing = case.path().join("absent.toml");
    refused(Train::configured(&missing, case.path()), &["absent.toml"]);
}

#[test]
fn rows() {
    let long = "copy this ".repeat(400);
    for (row, words) in [
        ("{\"prompt\": \"a\", \"completion\": ", &["rows.jsonl:7", "JSON"][..]),
        ("{\"prompt\": \"a\", \"completion\": \"\"}", &["rows.jsonl:7", "completion"]),
        ("{\"prompt\": \"a\"}", &["rows.jsonl:7", "completion"]),
        ("{\"prompt\": \"a\", \"completion\": 3.5e, }", &["rows.jsonl:7"]),
        ("[1, 2]", &["rows.jsonl:7"]),
    ] {
        let case = Case::new();
        case.spoil_row(7, row);
        refused(case.train(), words);
    }
    let case = Case::new();
    case.spoil_row(7, &json!({"prompt": long, "completion": " b"}).to_string());
    refused(case.train().set("train.max_length", 64), &["rows.jsonl:7", "max_length"]);
    // The same row is dropped when that is asked for.
    let dropped = case.config("[train]\nmax_length = 64\nsteps = 1").set("data.on_bad_row", "drop");
    assert_eq!(dropped.run().code(), Some(0));
}

#[test]
fn files_that_are_missing_or_empty() {
    let case = Case::new();
    let absent = case.path().join("absent.jsonl");
    refused(Train::new(&case.model, &absent, case.path()), &["absent.jsonl"]);
    refused(Train::new(&case.path().join("nothing"), &case.data, case.path()), &["nothing"]);
    let empty = case.path().join("empty.jsonl");
    corpus::write(&empty, &[]);
    refused(Train::new(&case.model, &empty, case.path()), &["empty.jsonl"]);
    for file in ["tokenizer.json", "config.json", "model.safetensors"] {
        let case = Case::new();
        std::fs::remove_file(case.model.join(file)).unwrap();
        let word = if file == "model.safetensors" { "safetensors" } else { file };
        refused(case.train(), &[word]);
    }
}

#[test]
fn weights_that_do_not_fit() {
    let case = Case::new();
    case.change_config_json(|config| {
        config["intermediate_size"] = (config["intermediate_size"].as_u64().unwrap() * 2).into();
    });
    refused(case.train(), &["mlp", "config.json"]);

    let case = Case::new();
    case.change_config_json(|config| {
        config["num_hidden_layers"] = (config["num_hidden_layers"].as_u64().unwrap() + 1).into();
    });
    refused(case.train(), &["model.layers.4"]);

    let case = Case::new();
    let bytes = std::fs::read(case.weights()).unwrap();
    std::fs::write(case.weights(), [b"\xff\xff\xff\xff\xff\xff\xff\x7f", &bytes[8..]].concat()).unwrap();
    refused(case.train(), &["model.safetensors"]);

    let case = Case::new();
    std::fs::write(case.weights(), &bytes[..bytes.len() / 2]).unwrap();
    refused(case.train(), &["model.safetensors"]);
}

#[test]
fn a_model_that_is_not_implemented_or_not_whole() {
    let case = Case::new();
    case.change_config_json(|config| {
        config.insert("attn_logit_softcapping".into(), json!(50.0));
    });
    refused(case.train(), &["config.json", "attn_logit_softcapping"]);

    let case = Case::new();
    case.change_config_json(|config| config["vocab_size"] = json!(100));
    refused(case.train(), &["embed_tokens", "100", "config.json"]);

    // A tokenizer of another model, with more tokens than this one has rows.
    let case = Case::new();
    let small = fixture::of(fixture::MICRO).model;
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(small.join(file), case.model.join(file)).unwrap();
    }
    refused(case.train(), &["tokenizer.json", "vocab"]);

    let case = Case::new();
    std::fs::write(case.model.join("tokenizer.json"), "{").unwrap();
    refused(case.train(), &["tokenizer.json"]);
}

#[test]
fn a_cluster_that_cannot_be() {
    let case = Case::new();
    refused(case.train_alone().workers(9), &["9", "micro_batches"]);
    refused(case.train_alone().workers(0), &["workers"]);
    refused(case.train().set("cluster.device", "tpu"), &["device"]);
}

#[test]
fn an_existing_run_directory() {
    let case = Case::new();
    let train = case.train();
    std::fs::create_dir(train.run_dir()).unwrap();
    std::fs::write(train.run_dir().join("config.toml"), "# mine").unwrap();
    let name = train.run_dir().file_name().unwrap().to_str().unwrap().to_owned();
    let kept = train.run_dir().join("config.toml");
    refused(train, &[&name]);
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "# mine");
}

#[test]
fn a_worker_that_cannot_start() {
    let case = Case::new();
    let absent = case.path().join("no-worker");
    refused(case.train().env("UNISONO_WORKER", &absent), &["no-worker"]);

    // The worker remembers where libtorch is: make it remember wrongly.
    let mut bytes = std::fs::read(binaries::worker()).unwrap();
    let needle = b"libtorch_cpu.so\0";
    let place = bytes.windows(needle.len()).position(|window| window == needle).expect("the worker loads libtorch");
    bytes[place + 3] = b'X';
    let broken = case.path().join("unisono-worker");
    std::fs::write(&broken, bytes).unwrap();
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    refused(case.train().env("UNISONO_WORKER", &broken), &["libXorch_cpu.so", "make setup"]);
}

#[test]
fn a_coordinator_that_listens_everywhere_has_to_say_where_workers_find_it() {
    let case = Case::new();
    let mut command = binaries::command(&["coordinator", "--listen", "0.0.0.0:0", "--run-dir", "run", "--model"]);
    command.arg(&case.model).arg("--data").arg(&case.data).current_dir(case.path());
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words}");
    let last = words.lines().last().unwrap();
    assert!(last.contains("--listen 0.0.0.0:") && last.contains("add --advertise HOST:"), "{words}");
    assert!(!case.path().join("run").exists(), "a refused run leaves nothing");
}

//! A tiny model and its data, made once for each build of `unisono` and shared by all tests.

use crate::{binaries, corpus};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Shape of a model with random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub family: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
}

/// A few hundred thousand parameters: more chunks than the largest number of workers tested.
pub const TINY: Shape =
    Shape { family: "llama", hidden: 128, intermediate: 256, layers: 4, heads: 4, kv_heads: 2, vocab: 512 };

/// As small as it gets, for what is slow per parameter.
pub const MICRO: Shape =
    Shape { family: "llama", hidden: 32, intermediate: 64, layers: 1, heads: 2, kv_heads: 1, vocab: 320 };

/// Rows of the shared corpus.
pub const ROWS: usize = 240;

/// Model directory and data file.
#[derive(Debug, Clone)]
pub struct Fixture {
    pub model: PathBuf,
    pub data: PathBuf,
}

/// The tiny model and its corpus.
pub fn tiny() -> Fixture {
    of(TINY)
}

/// A model of this shape with random weights, and the shared corpus with a tokenizer trained on it.
pub fn of(shape: Shape) -> Fixture {
    let name = format!(
        "{}-{}-{}-{}-{}-{}-{}-{}",
        shape.family,
        shape.hidden,
        shape.intermediate,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.vocab,
        build()
    );
    let home = binaries::profile_dir().join("fixtures").join(name);
    let fixture = Fixture { model: home.join("model"), data: home.join("rows.jsonl") };
    if !home.is_dir() {
        // Tests run at once in several processes: whoever is first to rename wins, and all bring the same bytes.
        let parent = home.parent().expect("a fixture has a parent directory");
        std::fs::create_dir_all(parent).expect("the target directory can be written");
        let attempt = tempfile::tempdir_in(parent).expect("the target directory can be written");
        let data = attempt.path().join("rows.jsonl");
        corpus::write(&data, &corpus::rows(1, ROWS));
        init_model(&attempt.path().join("model"), &data, shape);
        if std::fs::rename(attempt.path(), &home).is_err() {
            assert!(home.is_dir(), "{} cannot be made", home.display());
        }
    }
    fixture
}

/// Runs `unisono init-model`.
pub fn init_model(out: &Path, corpus: &Path, shape: Shape) {
    let mut command = binaries::command(&["init-model"]);
    command.arg(out).arg("--data").arg(corpus);
    for (option, value) in [
        ("--hidden", shape.hidden),
        ("--intermediate", shape.intermediate),
        ("--layers", shape.layers),
        ("--heads", shape.heads),
        ("--kv-heads", shape.kv_heads),
        ("--vocab", shape.vocab),
        ("--seed", 0),
    ] {
        command.arg(option).arg(value.to_string());
    }
    command.args(["--family", shape.family]);
    let output = command.output().expect("unisono can be started");
    assert!(output.status.success(), "init-model failed: {}", String::from_utf8_lossy(&output.stderr));
}

/// Changes whenever `unisono` is built anew.
fn build() -> String {
    let meta = std::fs::metadata(binaries::unisono()).expect("the binary is there");
    let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    format!("{:x}", modified.as_nanos())
}

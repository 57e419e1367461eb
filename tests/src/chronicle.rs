//! What every long test has seen, over all runs: one line of JSON for each observation, kept outside of the target
//! directory. `cargo run -p unisono-tests --bin faults` makes a table of it.

use crate::binaries;
use serde_json::{json, Value};
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// Names the directory of the log; without it nothing is kept. `make chaos` sets it.
pub const DIRECTORY: &str = "UNISONO_CHAOS";

/// The log, where one is kept.
pub fn path() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os(DIRECTORY)?).join("seen.jsonl"))
}

/// Notes one observation of this kind.
pub fn note(kind: &str, fields: Value) {
    let Some(path) = path() else { return };
    let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut line = json!({"kind": kind, "at": at, "commit": commit(), "build": build()});
    let object = line.as_object_mut().expect("made just above");
    object.extend(fields.as_object().expect("fields are an object").clone());
    std::fs::create_dir_all(path.parent().expect("made with one above")).expect("the log's directory can be made");
    let log = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // One write for each line: several tests may log at once.
    log.expect("the log can be opened").write_all(format!("{line}\n").as_bytes()).expect("the log can be written");
}

/// Everything seen so far; a line that is not JSON (the machine lost power) is skipped.
pub fn all() -> Vec<Value> {
    let text = path().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What a long run asks for: a number from the environment.
pub fn asked(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => default,
    }
}

/// The average number of runnable processes of the last minute: figures of seconds mean little without it.
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// Median and largest; `None` of nothing.
pub fn median_and_most(values: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some((*sorted.get(sorted.len() / 2)?, *sorted.last()?))
}

fn commit() -> &'static str {
    static COMMIT: OnceLock<String> = OnceLock::new();
    COMMIT.get_or_init(|| {
        let mut git = std::process::Command::new("git");
        let output = git.arg("-C").arg(binaries::checkout()).args(["rev-parse", "--short", "HEAD"]).output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        if text.is_empty() {
            "unknown".into()
        } else {
            text
        }
    })
}

fn build() -> String {
    let profile = binaries::profile_dir();
    profile.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

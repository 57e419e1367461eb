//! Rules about the source that a machine can check: who reaches libtorch, how long files are, where `unsafe` lives.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use unisono_tests::binaries::checkout;

/// Longest source file, lines.
const LONGEST: usize = 500;

/// The only files that may contain `unsafe`: calls into C, memory maps, views of raw memory, instruction sets.
const UNSAFE: &[&str] = &[
    "coordinator/src/launch/child.rs",
    "worker/src/collective/neighbour.rs",
    "worker/src/collective/nccl/library.rs",
    "worker/src/collective/nccl/stand_in.rs",
    "worker/src/collective/nccl/stream.rs",
    "worker/src/device.rs",
    "worker/src/library.rs",
    "worker/src/lifeline.rs",
    "worker/src/model/weights.rs",
    "worker/src/ops/dispatcher.rs",
    "worker/src/ops/kernels/cuda.rs",
    "worker/src/ops/kernels/emulator.rs",
    "worker/src/ops/kernels/nvrtc.rs",
    "worker/src/ops/operation.rs",
    "worker/src/ops/phantom.rs",
    "worker/src/ops/simd.rs",
    "worker/src/ops/switches.rs",
    "worker/src/ops/view.rs",
    "worker/src/optim/bus.rs",
];

fn metadata() -> Value {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(checkout())
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Names of all crates that `package` reaches through normal and build dependencies.
fn reach(metadata: &Value, package: &str) -> BTreeSet<String> {
    let name_of: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (p["id"].as_str().unwrap(), p["name"].as_str().unwrap()))
        .collect();
    let edges: BTreeMap<&str, Vec<&str>> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| {
            let shipped = |dep: &&Value| dep["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"] != "dev");
            let deps = node["deps"].as_array().unwrap().iter().filter(shipped).map(|d| d["pkg"].as_str().unwrap());
            (node["id"].as_str().unwrap(), deps.collect())
        })
        .collect();
    let root =
        name_of.iter().find(|(_, name)| **name == package).map(|(id, _)| *id).expect("a member of the workspace");
    let (mut seen, mut open) = (BTreeSet::new(), vec![root]);
    while let Some(id) = open.pop() {
        for next in &edges[id] {
            if seen.insert(*next) {
                open.push(next);
            }
        }
    }
    seen.into_iter().map(|id| name_of[id].to_owned()).collect()
}

#[test]
fn only_the_worker_reaches_libtorch_and_cuda() {
    let metadata = metadata();
    let worker = reach(&metadata, "unisono-worker");
    assert!(worker.contains("tch") && worker.contains("torch-sys"), "the check sees what is there: {worker:?}");
    for package in ["unisono-coordinator", "unisono-proto", "unisono-configs", "unisono-tests"] {
        let reached = reach(&metadata, package);
        for foreign in ["tch", "torch-sys", "cudarc", "unisono-worker"] {
            assert!(!reached.contains(foreign), "{package} reaches {foreign}");
        }
    }
    for package in ["unisono-proto", "unisono-configs"] {
        let reached = reach(&metadata, package);
        assert!(!reached.iter().any(|name| name.starts_with("unisono")), "{package} knows nobody: {reached:?}");
    }
    assert!(!worker.contains("unisono-coordinator") && !worker.contains("tokenizers"), "the worker never sees text");
}

/// Rust files of the workspace, relative to the checkout.
fn sources() -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(checkout()).unwrap().to_path_buf());
            }
        }
    }
    let mut found = Vec::new();
    for room in ["proto", "configs", "coordinator", "worker", "tests"] {
        walk(&checkout().join(room), &mut found);
    }
    found.sort();
    found
}

#[test]
fn every_file_opens_with_its_purpose_and_fits_in_a_head() {
    let mut faults = Vec::new();
    for path in sources() {
        let text = std::fs::read_to_string(checkout().join(&path)).unwrap();
        if !text.starts_with("//! ") {
            faults.push(format!("{} does not open with a //! sentence", path.display()));
        }
        let lines = text.lines().count();
        if lines > LONGEST {
            faults.push(format!("{} has {lines} lines, more than {LONGEST}: split it", path.display()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn unsafe_code_stays_where_it_is_allowed() {
    let mut faults = Vec::new();
    for path in sources() {
        let text = std::fs::read_to_string(checkout().join(&path)).unwrap();
        let allowed = UNSAFE.iter().any(|allowed| path == Path::new(allowed));
        // Put together here, so that this file does not find itself.
        if text.contains(concat!("allow(unsafe", "_code)")) && !allowed {
            faults.push(format!("{} allows unsafe code: add it to the list only if it must", path.display()));
        }
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (index, line) in lines.iter().enumerate() {
            let block = line.contains(concat!("unsafe", " {")) && !line.starts_with("//");
            // The reason stands in the comment above, or above the statement that the block continues.
            let reason = lines[index.saturating_sub(6)..index].iter().any(|above| above.starts_with("// SAFETY:"));
            if block && !reason && !line.contains("SAFETY") {
                faults.push(format!("{}:{}: an unsafe block without a SAFETY comment", path.display(), index + 1));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

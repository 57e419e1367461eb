//! The check of a machine's GPU, on a processor: so that a GPU is never the first to run it.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::process::Command;
use unisono_tests::binaries::{checkout, unisono, worker};

#[test]
fn the_check_of_a_gpu_runs_on_a_processor() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("skipped: there is no python3");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let programs = worker().parent().unwrap().to_path_buf();
    assert_eq!(unisono().parent().unwrap(), programs, "both programs lie together");
    // What needs torch in python, and what the worker's own tests run, is left out.
    let output = Command::new("python3")
        .arg(checkout().join("scripts/gpu_check.py"))
        .args([
            "--device",
            "cpu",
            "--only",
            "machine,goldens,runs,placements,nccl,speed",
            "--seconds",
            "300",
            "--programs",
        ])
        .arg(&programs)
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    let table = std::fs::read_to_string(out.path().join("gpu_check.md")).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{table}\n{said}");
    let report = std::fs::read_to_string(out.path().join("gpu_check.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["parts"]["runs"]["one_result"], true, "{table}");
    assert_eq!(report["parts"]["runs"]["runs"].as_array().unwrap().len(), 3, "{table}");
    assert_eq!(report["parts"]["nccl"]["one_result"], true, "{table}");
    assert_eq!(report["parts"]["nccl"]["as_over_tcp"], true, "{table}");
    assert_eq!(report["parts"]["placements"]["placements"].as_array().unwrap().len(), 4, "{table}");
    assert!(report["parts"]["goldens"]["checked"].as_u64().unwrap() >= 8, "{table}");
    assert!(table.contains("| tiny, 256 tokens in 64s"), "{table}");
}

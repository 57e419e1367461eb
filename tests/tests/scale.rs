//! Many workers at one coordinator: every row reaches one of them, whole and once.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn forty_workers_get_every_row_once() {
    // It fails by itself where a row is not what it should be, or does not come exactly once.
    let out = Command::new(env!("CARGO_BIN_EXE_scale")).args(["--pace", "0.05", "40"]).output().unwrap();
    let (told, error) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{told}{error}");
    assert!(told.contains("8000 of 8000"), "{told}{error}");
}

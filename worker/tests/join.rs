//! The worker binary starts, and says what it lacks. Also why `cargo test` builds the binary that other tests start.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn worker(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono-worker"));
    // The binary knows where libtorch is.
    command
        .args(args)
        .env_remove("LD_LIBRARY_PATH")
        .env_remove("UNISONO_TOKEN")
        .env_remove("UNISONO_TOKEN_FILE")
        .output()
        .unwrap()
}

#[test]
fn it_runs_without_ld_library_path() {
    let help = worker(&["--help"]);
    assert!(help.status.success(), "{}", String::from_utf8_lossy(&help.stderr));
    assert!(String::from_utf8_lossy(&help.stdout).contains("join"));
}

#[test]
fn without_a_token_it_says_where_to_get_one() {
    let refused = worker(&["join", "127.0.0.1:1"]);
    let sentence = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{sentence}");
    assert!(sentence.contains("UNISONO_TOKEN") && !sentence.contains("panicked"), "{sentence}");
}

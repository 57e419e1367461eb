//! The command line as a stranger meets it. Also why `cargo test` builds the binary that other tests start.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn unisono(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unisono")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const COMMANDS: &[&str] = &[
    "train",
    "coordinator",
    "init-model",
    "inspect",
    "check",
    "digest",
    "status",
    "token",
    "monitor",
    "export",
    "generate",
    "demo",
];

#[test]
fn help_lists_every_command_and_each_has_an_example() {
    let help = unisono(&["--help"]);
    assert!(help.status.success());
    for command in COMMANDS {
        assert!(text(&help.stdout).contains(command), "{command} is not in {}", text(&help.stdout));
        let own = unisono(&[command, "--help"]);
        assert!(own.status.success(), "{command} --help: {}", text(&own.stderr));
        let example = format!("unisono {command}");
        assert!(text(&own.stdout).matches(&example).count() >= 2, "{command} --help has no example beside its usage");
    }
}

#[test]
fn what_it_does_not_know_ends_with_code_2() {
    for args in
        [&["trian"][..], &["train", "--modle", "x"], &["digest", "/nonexistent/run"], &["status", "/nonexistent/run"]]
    {
        let output = unisono(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(!output.stderr.is_empty() && !text(&output.stderr).contains("panicked"), "{args:?}");
    }
}

//! Where the binaries under test are.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `unisono`, as built into this test's target directory.
pub fn unisono() -> PathBuf {
    built("unisono")
}

/// `unisono-worker`, as built into this test's target directory.
pub fn worker() -> PathBuf {
    built("unisono-worker")
}

/// A command of `unisono` that sees neither the caller's tokens nor its log settings.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(unisono());
    command.args(args).env_remove("UNISONO_TOKEN").env_remove("UNISONO_WORKER").env_remove("RUST_LOG");
    command
}

/// The checkout that the tests were compiled in.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace's root")
}

/// `<target>/<profile>`, from `<target>/<profile>/deps/<test>`.
pub fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its executable");
    let deps = test.parent().expect("an executable lies in a directory");
    deps.parent().expect("tests lie two levels below the target directory").to_path_buf()
}

fn built(name: &str) -> PathBuf {
    let path = profile_dir().join(name);
    assert!(
        path.is_file(),
        "{} is not built: run `make test`, or `cargo build --workspace --bins` first",
        path.display()
    );
    path
}

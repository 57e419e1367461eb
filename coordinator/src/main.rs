//! The `unisono` command: maps how a command ended to an exit code, and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    unisono::cli::main()
}

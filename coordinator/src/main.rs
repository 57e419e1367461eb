//! The `unisono` command: maps how a command ended to an exit code, and nothing else.

use std::process::ExitCode;

/// Rows are read on all cores and gathered on one: the system's allocator spends a third of that time waiting for itself.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    unisono::cli::main()
}

//! Prints what the long tests have seen so far: `UNISONO_CHAOS=DIR faults`.

#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use unisono_tests::{chronicle, table};

fn main() -> ExitCode {
    let Some(path) = chronicle::path() else {
        eprintln!("faults: set {} to the directory that the long tests log to", chronicle::DIRECTORY);
        return ExitCode::from(2);
    };
    println!("{}\n(from {})", table::tables(&chronicle::all()), path.display());
    ExitCode::SUCCESS
}

//! Places at which a test can make a process die. Builds without debug assertions have none.
//!
//! A test names a directory in `UNISONO_FAIL_POINTS` and puts an empty file there that is called like a place: the first
//! process that comes there takes the file away and aborts.

/// This place is reached.
#[cfg(debug_assertions)]
pub fn reached(place: &str) {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| std::env::var_os("UNISONO_FAIL_POINTS").map(PathBuf::from));
    if directory.as_ref().is_some_and(|directory| std::fs::remove_file(directory.join(place)).is_ok()) {
        std::process::abort();
    }
}

/// This place is reached.
#[cfg(not(debug_assertions))]
pub fn reached(_place: &str) {}

//! Places at which a test can make a process die. Builds without debug assertions have none.
//!
//! A test names a directory in `UNISONO_FAIL_POINTS` and puts a file there that is called like a place: the first process
//! that comes there takes the file away and aborts; where the file says "hang", never goes on; or pauses for the seconds that
//! it says. `PLACE.taken` then says which process that was.

/// This place is reached.
#[cfg(debug_assertions)]
pub fn reached(place: &str) {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| std::env::var_os("UNISONO_FAIL_POINTS").map(PathBuf::from));
    let Some(directory) = directory.as_ref() else { return };
    let file = directory.join(place);
    let said = std::fs::read_to_string(&file).unwrap_or_default();
    if std::fs::remove_file(&file).is_err() {
        return;
    }
    // For whoever wants to know; nothing is amiss without.
    let _ = std::fs::write(directory.join(format!("{place}.taken")), std::process::id().to_string());
    match (said.as_str(), said.parse()) {
        ("hang", _) => std::thread::sleep(std::time::Duration::from_secs(86_400)),
        (_, Ok(seconds)) => std::thread::sleep(std::time::Duration::from_secs_f64(seconds)),
        _ => std::process::abort(),
    }
}

/// Whether these tokens hold the one that a test has declared to be poison, in `UNISONO_POISON`: what comes of them is no number.
#[cfg(debug_assertions)]
pub fn is_poisoned(tokens: &[u32]) -> bool {
    use std::sync::OnceLock;
    static POISON: OnceLock<Option<u32>> = OnceLock::new();
    let poison = POISON.get_or_init(|| std::env::var("UNISONO_POISON").ok()?.parse().ok());
    poison.is_some_and(|poison| tokens.contains(&poison))
}

/// Whether these tokens hold poison.
#[cfg(not(debug_assertions))]
pub fn is_poisoned(_tokens: &[u32]) -> bool {
    false
}

/// This place is reached.
#[cfg(not(debug_assertions))]
pub fn reached(_place: &str) {}

//! Where a micro-batch's time goes, by operation. Off unless a benchmark asks; a measurement, never an input.

use std::cell::RefCell;
use std::time::{Duration, Instant};

thread_local! {
    static TIMES: RefCell<Option<Vec<(&'static str, Duration, u64)>>> = const { RefCell::new(None) };
}

/// Starts counting on this thread.
pub fn start() {
    TIMES.with(|t| *t.borrow_mut() = Some(Vec::new()));
}

/// Stops counting: name, time and calls of each operation, in order of first use.
pub fn stop() -> Vec<(&'static str, Duration, u64)> {
    TIMES.with(|t| t.borrow_mut().take()).unwrap_or_default()
}

/// Runs `work`, counting its time under `name`.
pub fn timed<R>(name: &'static str, work: impl FnOnce() -> R) -> R {
    if TIMES.with(|t| t.borrow().is_none()) {
        return work();
    }
    let begin = Instant::now();
    let result = work();
    let spent = begin.elapsed();
    TIMES.with(|t| {
        if let Some(times) = t.borrow_mut().as_mut() {
            match times.iter_mut().find(|(n, ..)| *n == name) {
                Some((_, total, calls)) => (*total, *calls) = (*total + spent, *calls + 1),
                None => times.push((name, spent, 1)),
            }
        }
    });
    result
}

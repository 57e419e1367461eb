//! Where a micro-batch's time goes, by operation. Off unless a benchmark asks; a measurement, never an input.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::time::Duration;

/// Name, time and calls of an operation.
pub type Entry = (&'static str, Duration, u64);

thread_local! {
    static TIMES: RefCell<Option<Vec<Entry>>> = const { RefCell::new(None) };
}

/// Processor time of this thread: what others do on the machine does not count.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of this frame; on failure it stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Starts counting on this thread.
pub fn start() {
    TIMES.with(|t| *t.borrow_mut() = Some(Vec::new()));
}

/// Stops counting; operations come in order of first use.
pub fn stop() -> Vec<Entry> {
    TIMES.with(|t| t.borrow_mut().take()).unwrap_or_default()
}

/// Runs `work`, counting its time under `name`.
pub fn timed<R>(name: &'static str, work: impl FnOnce() -> R) -> R {
    if TIMES.with(|t| t.borrow().is_none()) {
        return work();
    }
    let begin = thread_time();
    let result = work();
    let spent = thread_time() - begin;
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

//! One operation of a micro-batch: carried out; timed, if a benchmark asks (a measurement, never an input); or left out,
//! in a dry run that only walks through the sizes of all buffers.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};
use tch::Tensor;

/// Name, time and calls of an operation.
pub type Entry = (&'static str, Duration, u64);

/// Waits until all that was asked of a device is done.
type Wait = Box<dyn Fn()>;

thread_local! {
    /// On a device: after each operation everybody waits for it, and the time is the clock's.
    static WAIT: RefCell<Option<Wait>> = const { RefCell::new(None) };
    static TIMES: RefCell<Option<Vec<Entry>>> = const { RefCell::new(None) };
    static DRY: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, operations of this thread are left out.
pub struct DryRun(());

impl DryRun {
    pub fn begin() -> Self {
        DRY.set(true);
        DryRun(())
    }

    pub fn is_under_way() -> bool {
        DRY.get()
    }
}

impl Drop for DryRun {
    fn drop(&mut self) {
        DRY.set(false);
    }
}

/// What an operation gives where it is left out.
pub trait Outcome {
    fn left_out() -> Self;
}

impl Outcome for () {
    fn left_out() {}
}

impl Outcome for f64 {
    fn left_out() -> f64 {
        0.0
    }
}

impl Outcome for (f64, u64) {
    fn left_out() -> (f64, u64) {
        (0.0, 0)
    }
}

impl Outcome for Tensor {
    fn left_out() -> Tensor {
        Tensor::new()
    }
}

impl<T: Outcome, E> Outcome for Result<T, E> {
    fn left_out() -> Result<T, E> {
        Ok(T::left_out())
    }
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

/// The same for a device that works behind this thread: `wait` returns when it is done.
pub fn start_waiting(wait: impl Fn() + 'static) {
    start();
    WAIT.with(|w| *w.borrow_mut() = Some(Box::new(wait)));
}

/// Stops counting; operations come in order of first use.
pub fn stop() -> Vec<Entry> {
    WAIT.with(|w| *w.borrow_mut() = None);
    TIMES.with(|t| t.borrow_mut().take()).unwrap_or_default()
}

/// Carries `work` out, counting its time under `name`. Memory is taken from a pool outside of it, so that a dry run
/// takes the same.
pub fn operation<R: Outcome>(name: &'static str, work: impl FnOnce() -> R) -> R {
    if DryRun::is_under_way() {
        return R::left_out();
    }
    if TIMES.with(|t| t.borrow().is_none()) {
        return work();
    }
    let (begin, clock) = (thread_time(), Instant::now());
    let result = work();
    let spent = WAIT.with(|wait| match &*wait.borrow() {
        None => thread_time() - begin,
        Some(wait) => {
            wait();
            clock.elapsed()
        }
    });
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

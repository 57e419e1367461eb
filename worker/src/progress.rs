//! What a worker is doing now: whoever hears its heartbeats can tell computing from waiting, and both from hanging.

use crate::collective::pulse::Pulse;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use unisono_proto::fail_point;
use unisono_proto::v1::{Heartbeat, Phase};

/// What the worker is doing now: written by the compute thread, told by the heartbeat and by errors.
#[derive(Debug)]
pub struct Progress {
    phase: AtomicI32,
    /// 0 outside of steps.
    step: AtomicU64,
    began: Instant,
    /// Microseconds from `began` to when the compute thread got on last.
    marked: AtomicU64,
    /// It waits for the coordinator.
    waits: AtomicBool,
    /// What its exchanges wait for.
    pulse: Pulse,
}

impl Default for Progress {
    fn default() -> Self {
        let (phase, step, marked, waits, pulse) = Default::default();
        Progress { phase, step, began: Instant::now(), marked, waits, pulse }
    }
}

impl Progress {
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as i32, Ordering::Relaxed);
        self.mark();
        fail_point::reached(phase.word());
    }

    /// The compute thread gets on.
    pub fn mark(&self) {
        self.marked.store(self.began.elapsed().as_micros() as u64, Ordering::Release);
    }

    /// What `wait` waits for comes from the coordinator: as long as it does not come, nobody here hangs.
    pub fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.mark();
        self.waits.store(true, Ordering::Release);
        let outcome = wait();
        self.mark();
        self.waits.store(false, Ordering::Release);
        outcome
    }

    /// What `wait` waits for comes from an exchange.
    pub fn exchanging<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.pulse.blocked(|| {
            let outcome = wait();
            self.mark();
            outcome
        })
    }

    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// What a heartbeat tells.
    pub fn heartbeat(&self) -> Heartbeat {
        // Before the mark, which is set before any waiting is over.
        let blocked = self.pulse.told(None);
        let waits = self.waits.load(Ordering::Acquire);
        let marked = self.began + Duration::from_micros(self.marked.load(Ordering::Acquire));
        let exchange = blocked.or_else(|| self.pulse.told(Some(marked).filter(|_| waits)));
        let seconds = marked.elapsed().as_secs_f64();
        Heartbeat { phase: self.phase() as i32, step: self.step(), seconds, waits, exchange }
    }

    pub fn set_step(&self, step: Option<u64>) {
        self.step.store(step.unwrap_or(0), Ordering::Relaxed);
    }

    pub fn phase(&self) -> Phase {
        Phase::try_from(self.phase.load(Ordering::Relaxed)).unwrap_or_default()
    }

    pub fn step(&self) -> Option<u64> {
        Some(self.step.load(Ordering::Relaxed)).filter(|&s| s > 0)
    }
}

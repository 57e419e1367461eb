//! What an exchange waits for, noted by who carries it out and told by heartbeats. A rank that waits for a peer cannot tell
//! whether that one still computes, or is waiting for a third: only who hears all of them can.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use unisono_proto::v1;

/// What is computed on the own device before an exchange may take so long; then it hangs.
const DEVICE: Duration = Duration::from_secs(3600);

/// Shared by the exchanges of a worker, the thread that waits for them and the heartbeat.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Exchanges that have begun.
    number: u64,
    under_way: bool,
    operation: &'static str,
    bytes: usize,
    /// Whom bytes are due from, and whom they are due to.
    hears: Option<usize>,
    tells: Option<usize>,
    /// Since when it waits for what is computed here, on the own device.
    device: Option<Instant>,
    /// When something moved last; absent before the first exchange.
    moved: Option<Instant>,
    /// Since when computing stands still for an exchange.
    blocked: Option<Instant>,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    Here,
    There,
}

impl Pulse {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exchange begins.
    pub fn begin(&self) {
        let mut state = self.state();
        state.number += 1;
        (state.under_way, state.operation, state.bytes) = (true, "", 0);
        (state.hears, state.tells, state.device, state.moved) = (None, None, None, Some(Instant::now()));
    }

    /// What the exchange is; or it gets on by itself.
    pub fn concerns(&self, operation: &'static str, bytes: usize) {
        let mut state = self.state();
        (state.operation, state.bytes, state.moved) = (operation, bytes, Some(Instant::now()));
    }

    /// The exchange is over.
    pub fn end(&self) {
        let mut state = self.state();
        (state.under_way, state.operation, state.bytes) = (false, "", 0);
        (state.hears, state.tells, state.device, state.moved) = (None, None, None, Some(Instant::now()));
    }

    /// `pass` waits for `peer` and brings bytes.
    pub fn with(&self, peer: usize, way: Way, pass: impl FnOnce() -> io::Result<usize>) -> io::Result<usize> {
        self.state().due(way, Some(peer));
        let passed = pass();
        let mut state = self.state();
        state.due(way, None);
        if matches!(passed, Ok(1..)) {
            state.moved = Some(Instant::now());
        }
        passed
    }

    /// The exchange waits for the own device, or does no longer.
    pub fn waits_for_device(&self, waits: bool) {
        let mut state = self.state();
        if state.device.is_some() != waits {
            state.moved = Some(Instant::now());
            state.device = state.moved.filter(|_| waits);
        }
    }

    /// Computing stands still for `wait`, which waits for an exchange.
    pub fn blocked<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.state().blocked = Some(Instant::now());
        let outcome = wait();
        self.state().blocked = None;
        outcome
    }

    /// What a heartbeat tells where nothing is computed: because of an exchange, or since `idle` while one is under way.
    pub fn told(&self, idle: Option<Instant>) -> Option<v1::Exchange> {
        let state = self.state();
        let since = state.blocked.or(idle.filter(|_| state.under_way))?;
        let since = state.moved.map_or(since, |moved| moved.max(since));
        let computes = state.device.is_some_and(|since| since.elapsed() < DEVICE);
        Some(v1::Exchange {
            number: state.number,
            operation: state.operation.into(),
            bytes: state.bytes as u64,
            peer: state.hears.or(state.tells).map(|peer| peer as u32),
            seconds: if computes { 0.0 } else { since.elapsed().as_secs_f64() },
        })
    }
}

impl State {
    fn due(&mut self, way: Way, peer: Option<usize>) {
        match way {
            Way::Here => self.hears = peer,
            Way::There => self.tells = peer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn who_computes_tells_of_no_exchange_and_who_waits_tells_of_whom_and_since_when() {
        let pulse = Pulse::default();
        pulse.begin();
        pulse.concerns("reduce", 240);
        assert_eq!(pulse.told(None), None, "it computes meanwhile");
        let idle = Instant::now();
        let pause = || std::thread::sleep(Duration::from_millis(30));
        pause();
        let told = pulse.told(Some(idle)).unwrap();
        assert_eq!((told.number, told.operation.as_str(), told.bytes, told.peer), (1, "reduce", 240, None));
        assert!(told.seconds >= 0.03, "{told:?}");
        let looked = pulse.blocked(|| {
            let early = pulse.told(None).unwrap();
            assert!(early.seconds < 0.03, "computing was over only now: {early:?}");
            pause();
            let passed = pulse.with(2, Way::Here, || {
                assert_eq!(pulse.told(None).unwrap().peer, Some(2));
                // Of two it is the one that is listened to.
                pulse.with(1, Way::There, || {
                    assert_eq!(pulse.told(None).unwrap().peer, Some(2));
                    Err(io::ErrorKind::Interrupted.into())
                })
            });
            assert!(passed.is_err());
            assert!(pulse.told(None).unwrap().seconds >= 0.03, "nothing has moved");
            pulse.with(1, Way::There, || Ok(7)).unwrap();
            pulse.told(None).unwrap()
        });
        assert!(looked.peer.is_none() && looked.seconds < 0.03, "{looked:?}");
        let waits = |waits| {
            pulse.waits_for_device(waits);
            pause();
            pulse.told(Some(idle)).unwrap().seconds
        };
        assert_eq!(waits(true), 0.0, "the own device computes");
        assert!(waits(false) >= 0.03);
        pulse.end();
        assert_eq!(pulse.told(Some(idle)), None);
        assert_eq!(pulse.blocked(|| pulse.told(None)).unwrap().operation, "");
    }
}

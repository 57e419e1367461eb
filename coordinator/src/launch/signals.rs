//! The signals that ask a run to stop: Ctrl-C, what schedulers send first, and what Slurm sends ahead of a time limit.

use std::io;
use tokio::signal::unix::{signal, Signal, SignalKind};

/// The exit code of a run that was asked to stop and has lost nothing: "temporary failure, try again later" (sysexits.h).
/// Batch systems requeue on it; `--resume auto` then goes on.
pub const STOPPED: u8 = 75;

/// SIGTERM, SIGINT and SIGUSR1, caught from now on.
pub struct Requests {
    terminate: Signal,
    interrupt: Signal,
    user: Signal,
}

impl Requests {
    pub fn new() -> io::Result<Self> {
        Ok(Requests {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            user: signal(SignalKind::user_defined1())?,
        })
    }

    /// The number of the next one.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => libc::SIGTERM,
            _ = self.interrupt.recv() => libc::SIGINT,
            _ = self.user.recv() => libc::SIGUSR1,
        }
    }
}

/// What people call it.
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "Ctrl-C",
        libc::SIGUSR1 => "SIGUSR1",
        _ => "SIGTERM",
    }
}

/// The exit code of a run that ended on it at once. Without a signal: a worker's departure, which is asked for alike.
pub fn code(signal: i32) -> u8 {
    128 + u8::try_from(if signal == 0 { libc::SIGTERM } else { signal }).unwrap_or(0)
}

//! The supervisor: one coordinator and its workers as child processes of this one, all ended with it.
//!
//! It owns the listening socket and the lifeline and decides nothing else: what it starts is what a cluster starts.
//! The coordinator reports through a pipe when workers may join. A child that dies is started again, unless it has died
//! too often in a row; then the coordinator, who knows rank and phase, gets a moment to say so before the supervisor
//! speaks.

use super::crew::{Crew, CANNOT_LOAD};
use super::signals::{Requests, STOPPED};
use super::WORKER;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::signal::unix::{signal, Signal, SignalKind};
use tokio::time::{timeout_at, Instant};

/// How long workers may take to leave once the coordinator has: after a good end, and after a bad one.
const DRAIN: Duration = Duration::from_secs(10);
const SCATTER: Duration = Duration::from_secs(2);
/// How a worker's own account of its end begins.
pub(super) const LAST_WORDS: &str = "unisono-worker: ";
/// Why no run, or no good run, came about. Each is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unisono-worker is neither beside {program} nor on PATH; build it with `make build`, or name it in UNISONO_WORKER")]
    NoWorker { program: PathBuf },
    #[error("UNISONO_WORKER names {path}, which is not a file; set it to the unisono-worker binary, or unset it")]
    NotAWorker { path: PathBuf },
    #[error("{path} cannot be started: {source}; check that it is an executable of this machine")]
    Spawn { path: PathBuf, source: io::Error },
    #[error("{path} cannot load {library}; run `make setup` and `make build`, or point LIBTORCH at a libtorch 2.11.0 and build again")]
    CannotLoad { path: PathBuf, library: String },
    #[error("a worker (pid {pid}) {how} before the coordinator could name its rank{place}{words}; {advice}")]
    Worker { pid: u32, how: String, place: String, words: String, advice: String, bad_input: bool },
    #[error("the coordinator (pid {pid}) {how}{place}; the workers were stopped, {advice}")]
    Coordinator { pid: u32, how: String, place: String, advice: String },
    #[error("the processes of the run cannot be set up: {0}")]
    System(#[from] io::Error),
}

impl Error {
    pub(super) fn cannot_load(worker: &Path, library: Option<String>) -> Self {
        Error::CannotLoad { path: worker.into(), library: library.unwrap_or_else(|| "a symbol of libtorch".into()) }
    }

    /// Whether the user's input or installation is at fault, rather than the run.
    pub fn bad_input(&self) -> bool {
        match self {
            Error::NoWorker { .. } | Error::NotAWorker { .. } | Error::Spawn { .. } | Error::CannotLoad { .. } => true,
            Error::Worker { bad_input, .. } => *bad_input,
            Error::Coordinator { .. } | Error::System(_) => false,
        }
    }
}

/// How a run ended that needs no sentence of the supervisor's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The coordinator's exit code; it has said why.
    Code(u8),
    /// By SIGINT or SIGTERM to the supervisor; `place` completes the sentence "the run was stopped", `advice` says
    /// what to do then.
    Interrupted { signal: i32, place: String, advice: String },
}

/// What to start.
#[derive(Debug)]
pub struct Launch {
    /// The coordinator's program, and its arguments.
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// Its arguments when it is started again after it has made a run's directory, in front of `--resume RUN`.
    pub again: Vec<OsString>,
    /// The worker binary.
    pub worker: PathBuf,
    /// Its standard output is one event a line; with `--told N` it begins after entry N of the ledger.
    pub events: bool,
}

/// The worker binary: UNISONO_WORKER, else beside `program`, else on PATH.
pub fn worker_binary(program: &Path) -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os(WORKER).map(PathBuf::from) {
        return if path.is_file() { Ok(path) } else { Err(Error::NotAWorker { path }) };
    }
    let beside = program.with_file_name("unisono-worker");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside)
        .chain(std::env::split_paths(&path).map(|dir| dir.join("unisono-worker")))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| Error::NoWorker { program: program.into() })
}

/// Starts the worker binary to say its version: one that cannot load libtorch is known before anything else happens.
pub fn probe(worker: &Path) -> Result<(), Error> {
    let output = Command::new(worker).arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|source| Error::Spawn { path: worker.into(), source })?;
    match output.status.code() {
        Some(CANNOT_LOAD) => {
            let words = String::from_utf8_lossy(&output.stderr);
            Err(Error::cannot_load(worker, words.lines().find_map(missing_library)))
        }
        _ => Ok(()),
    }
}

/// The library that the dynamic loader's complaint names.
pub(super) fn missing_library(line: &str) -> Option<String> {
    let rest = line.split("error while loading shared libraries: ").nth(1)?;
    Some(rest.split(':').next().unwrap_or(rest).trim().to_owned())
}

/// Runs coordinator and workers to their end. Call it on the main thread: children die with the thread that spawned
/// them. Whatever it returns, no child is left.
pub fn run(launch: Launch) -> Result<Ended, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let (mut crew, mut reports) = Crew::start(launch)?;
        let ended = crew.watch(&mut signals, &mut reports).await;
        let patience = match ended {
            Ok(Ended::Code(0 | STOPPED)) => DRAIN,
            Ok(Ended::Interrupted { .. }) if crew.asked.is_some() => Duration::ZERO,
            _ => SCATTER,
        };
        crew.stop(&mut signals, patience).await;
        let reading = if matches!(ended, Ok(Ended::Code(0))) { None } else { Some(patience) };
        crew.pass_on(&mut signals, reading).await;
        if matches!(ended, Err(Error::Coordinator { .. })) {
            crew.say_last_words();
        }
        ended
    })
}

pub(super) struct Signals {
    pub child: Signal,
    pub requests: Requests,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals { child: signal(SignalKind::child())?, requests: Requests::new()? })
    }
}

impl Signals {
    /// Waits for a child's end; false when the deadline has passed or the user insists.
    pub async fn wait_until(&mut self, deadline: Instant) -> bool {
        let wait = async {
            tokio::select! {
                _ = self.child.recv() => true,
                _ = self.requests.next() => false,
            }
        };
        timeout_at(deadline, wait).await.unwrap_or(false)
    }
}

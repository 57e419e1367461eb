//! The supervisor: one coordinator and its workers as child processes of this one, all ended with it.
//!
//! It owns the listening socket and the lifeline and decides nothing else: what it starts is what a cluster starts.
//! The coordinator reports through a pipe when workers may join. A child's death ends the run; the coordinator, who
//! knows rank and phase, gets a moment to say so before the supervisor speaks.

use super::report::Report;
use super::{child, LIFELINE_FD, LISTEN_FD, REPORT_FD, TOKEN, WORKER};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, PipeReader, PipeWriter, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{signal, Signal, SignalKind};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout_at, Instant};

/// How long the coordinator may take to name the fault of a worker that died.
const TESTIMONY: Duration = Duration::from_secs(5);
/// How long the coordinator may take to stop when asked to.
const STOP: Duration = Duration::from_secs(10);
/// How long workers may take to leave once the coordinator has: after a good end, and after a bad one.
const DRAIN: Duration = Duration::from_secs(10);
const SCATTER: Duration = Duration::from_secs(2);
/// How a worker's own account of its end begins.
const LAST_WORDS: &str = "unisono-worker: ";
/// What the dynamic loader exits with when a library or a symbol is missing.
const CANNOT_LOAD: i32 = 127;

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
    #[error(
        "a worker (pid {pid}) {how} before the coordinator could name its rank{place}{words}; go on with --resume RUN"
    )]
    Worker { pid: u32, how: String, place: String, words: String, bad_input: bool },
    #[error("the coordinator (pid {pid}) {how}{place}; the workers were stopped, go on with --resume RUN")]
    Coordinator { pid: u32, how: String, place: String },
    #[error("the processes of the run cannot be set up: {0}")]
    System(#[from] io::Error),
}

impl Error {
    fn cannot_load(worker: &Path, library: Option<String>) -> Self {
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
    /// By SIGINT or SIGTERM to the supervisor; `place` completes the sentence "the run was stopped".
    Interrupted { signal: i32, place: String },
}

/// What to start.
#[derive(Debug)]
pub struct Launch {
    /// The coordinator's program, and its arguments.
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// The worker binary.
    pub worker: PathBuf,
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
fn missing_library(line: &str) -> Option<String> {
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
        let patience = if matches!(ended, Ok(Ended::Code(0))) { DRAIN } else { SCATTER };
        crew.stop(&mut signals, patience).await;
        if matches!(ended, Err(Error::Coordinator { .. })) {
            crew.say_last_words();
        }
        ended
    })
}

struct Signals {
    child: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals {
            child: signal(SignalKind::child())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }
}

/// A child, and what it last wrote on standard error.
///
/// A worker's own account of its end, a line that begins with [`LAST_WORDS`], is held back: the coordinator has heard the
/// same and says who is to blame. It is shown where the coordinator cannot.
struct Member {
    child: Child,
    ended: Option<ExitStatus>,
    words: Arc<Mutex<VecDeque<String>>>,
}

impl Member {
    fn reap(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    fn send(&self, signal: i32) {
        if self.ended.is_none() {
            child::send(&self.child, signal);
        }
    }
}

struct Crew {
    launch: Launch,
    coordinator: Member,
    workers: Vec<Member>,
    progress: Option<(u64, u64)>,
    lifeline: PipeReader,
    /// Held, never written: its end is the children's.
    _lifeline_writer: PipeWriter,
}

impl Crew {
    fn start(launch: Launch) -> Result<(Self, mpsc::UnboundedReceiver<Report>), Error> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (lifeline, writer) = io::pipe()?;
        let (reports, report_writer) = io::pipe()?;
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments).stdin(Stdio::null());
        for (variable, fd) in [
            (LISTEN_FD, listener.as_raw_fd()),
            (REPORT_FD, report_writer.as_raw_fd()),
            (LIFELINE_FD, lifeline.as_raw_fd()),
        ] {
            command.env(variable, fd.to_string());
        }
        child::bind(&mut command, vec![listener.as_raw_fd(), report_writer.as_raw_fd(), lifeline.as_raw_fd()]);
        let child = command.spawn().map_err(|source| Error::Spawn { path: launch.program.clone(), source })?;
        let coordinator = Member { child, ended: None, words: Arc::default() };
        let (sender, receiver) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reports).lines().map_while(Result::ok) {
                if let Ok(report) = serde_json::from_str(&line) {
                    if sender.send(report).is_err() {
                        break;
                    }
                }
            }
        });
        let crew =
            Crew { launch, coordinator, workers: Vec::new(), progress: None, lifeline, _lifeline_writer: writer };
        Ok((crew, receiver))
    }

    fn hire(&mut self, address: &str, workers: usize, token: &str) -> Result<(), Error> {
        for _ in 0..workers {
            let mut command = Command::new(&self.launch.worker);
            command
                .args(["join", address])
                .env(TOKEN, token)
                .env(LIFELINE_FD, self.lifeline.as_raw_fd().to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            child::bind(&mut command, vec![self.lifeline.as_raw_fd()]);
            let mut child =
                command.spawn().map_err(|source| Error::Spawn { path: self.launch.worker.clone(), source })?;
            let words = Arc::default();
            if let Some(stderr) = child.stderr.take() {
                let (words, pid) = (Arc::clone(&words), child.id());
                std::thread::spawn(move || forward(stderr, pid, &words));
            }
            self.workers.push(Member { child, ended: None, words });
        }
        Ok(())
    }

    /// Until the run has ended or must end; children may still live then.
    async fn watch(
        &mut self,
        signals: &mut Signals,
        reports: &mut mpsc::UnboundedReceiver<Report>,
    ) -> Result<Ended, Error> {
        let mut suspicion: Option<Instant> = None;
        loop {
            while let Ok(report) = reports.try_recv() {
                self.heed(report)?;
            }
            if let Some(status) = self.coordinator.reap() {
                return self.judge_coordinator(status);
            }
            for index in 0..self.workers.len() {
                let Some(status) = self.workers[index].reap() else { continue };
                if status.code() == Some(CANNOT_LOAD) {
                    return Err(self.cannot_load(index).await);
                }
                if !status.success() && suspicion.is_none() {
                    suspicion = Some(Instant::now() + TESTIMONY);
                }
            }
            let deadline = suspicion.unwrap_or_else(Instant::now);
            tokio::select! {
                _ = signals.child.recv() => {}
                Some(report) = reports.recv() => self.heed(report)?,
                _ = signals.interrupt.recv() => return Ok(Ended::Interrupted { signal: libc::SIGINT, place: self.place() }),
                _ = signals.terminate.recv() => return Ok(Ended::Interrupted { signal: libc::SIGTERM, place: self.place() }),
                () = sleep_until(deadline), if suspicion.is_some() => return Err(self.judge_worker()),
            }
        }
    }

    fn heed(&mut self, report: Report) -> Result<(), Error> {
        match report {
            Report::Ready { address, workers, token } => self.hire(&address, workers, &token)?,
            Report::Progress { step, steps } => self.progress = Some((step, steps)),
        }
        Ok(())
    }

    fn say_last_words(&self) {
        for worker in &self.workers {
            let Ok(words) = worker.words.lock() else { continue };
            for line in words.iter().filter(|line| line.starts_with(LAST_WORDS)) {
                eprintln!("worker (pid {}): {line}", worker.child.id());
            }
        }
    }

    /// Where the run was, as far as the coordinator told.
    fn place(&self) -> String {
        match self.progress {
            Some((step, steps)) if step < steps => format!(" in the step after step {step} of {steps}"),
            Some((step, _)) => format!(" after the last step, {step}"),
            None if self.workers.is_empty() => " while preparing the run".into(),
            None => " while workers joined and loaded".into(),
        }
    }

    fn judge_coordinator(&self, status: ExitStatus) -> Result<Ended, Error> {
        match status.code() {
            Some(code) => Ok(Ended::Code(u8::try_from(code).unwrap_or(u8::MAX))),
            None => {
                let pid = self.coordinator.child.id();
                Err(Error::Coordinator { pid, how: manner(status), place: self.place() })
            }
        }
    }

    /// A worker died, and the coordinator knows nothing of it: it had not joined.
    fn judge_worker(&self) -> Error {
        let dead = self.workers.iter().find_map(|w| w.ended.filter(|s| !s.success()).map(|status| (w, status)));
        let Some((worker, status)) = dead else { return io::Error::other("no worker died").into() };
        let last = worker.words.lock().ok().and_then(|words| words.back().cloned());
        Error::Worker {
            pid: worker.child.id(),
            how: manner(status),
            place: self.place(),
            words: last.map(|line| format!(" ({line})")).unwrap_or_default(),
            bad_input: status.code() == Some(2),
        }
    }

    async fn cannot_load(&self, index: usize) -> Error {
        // The loader's words are on their way through the forwarding thread.
        let mut found = None;
        for _ in 0..50 {
            let words = self.workers[index].words.lock();
            found = words.ok().and_then(|words| words.iter().find_map(|line| missing_library(line)));
            if found.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Error::cannot_load(&self.launch.worker, found)
    }

    /// Ends whoever still lives: the coordinator is asked first, workers get `patience`, then all are killed.
    /// A further signal to the supervisor ends the patience.
    async fn stop(&mut self, signals: &mut Signals, patience: Duration) {
        if self.coordinator.reap().is_none() {
            self.coordinator.send(libc::SIGTERM);
            let deadline = Instant::now() + STOP;
            while self.coordinator.reap().is_none() && signals.wait_until(deadline).await {}
            self.coordinator.send(libc::SIGKILL);
        }
        let deadline = Instant::now() + patience;
        while self.workers.iter_mut().any(|w| w.reap().is_none()) && signals.wait_until(deadline).await {}
        for member in self.workers.iter_mut().chain([&mut self.coordinator]) {
            member.send(libc::SIGKILL);
            if member.ended.is_none() {
                member.ended = member.child.wait().ok();
            }
        }
    }
}

impl Signals {
    /// Waits for a child's end; false when the deadline has passed or the user insists.
    async fn wait_until(&mut self, deadline: Instant) -> bool {
        let wait = async {
            tokio::select! {
                _ = self.child.recv() => true,
                _ = self.interrupt.recv() => false,
                _ = self.terminate.recv() => false,
            }
        };
        timeout_at(deadline, wait).await.unwrap_or(false)
    }
}

/// Passes a worker's standard error on line by line, with its pid in front, and keeps the last lines.
fn forward(stderr: impl io::Read, pid: u32, words: &Mutex<VecDeque<String>>) {
    // A progress bar may stand on the line.
    let clear = if io::stderr().is_terminal() { "\r\x1b[K" } else { "" };
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        // The supervisor says these itself, with what to do about it.
        let held = line.contains("error while loading shared libraries")
            || line.contains("symbol lookup error")
            || line.starts_with(LAST_WORDS);
        if let Ok(mut words) = words.lock() {
            if words.len() == 8 {
                words.pop_front();
            }
            words.push_back(line.clone());
        }
        if !held && !line.is_empty() {
            let _ = io::stderr().write_all(format!("{clear}worker (pid {pid}): {line}\n").as_bytes());
        }
    }
}

/// "was killed by signal 9" or "ended with exit code 1".
fn manner(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".into(),
    }
}

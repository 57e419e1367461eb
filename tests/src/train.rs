//! One `unisono train` as a child process: how it is started, followed and judged.

use crate::{binaries, processes};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// A `unisono train` to be started.
#[derive(Debug)]
pub struct Train {
    command: Command,
    mark: String,
    run_dir: PathBuf,
}

impl Train {
    /// Trains `model` on `data`, with its run directory below `dir`.
    pub fn new(model: &Path, data: &Path, dir: &Path) -> Self {
        let mut train = Self::bare(dir);
        train.command.arg("--model").arg(model).arg("--data").arg(data);
        train
    }

    /// Trains what the configuration file says.
    pub fn configured(config: &Path, dir: &Path) -> Self {
        let mut train = Self::bare(dir);
        train.command.arg(config);
        train
    }

    /// Goes on with the run in `run_dir`.
    pub fn resumed(run_dir: &Path) -> Self {
        let parent = run_dir.parent().expect("a run directory lies in a directory");
        let mut train = Self::command(parent, run_dir.to_path_buf());
        train.command.arg("--resume").arg(run_dir);
        train
    }

    /// Brings the run at `url` into a directory below `dir` and goes on with it.
    pub fn brought(url: &str, dir: &Path) -> Self {
        let mut train = Self::bare(dir);
        train.command.arg("--resume").arg(url);
        train
    }

    fn bare(dir: &Path) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let run_dir = dir.join(format!("run-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let mut train = Self::command(dir, run_dir);
        train.command.arg("--run-dir").arg(&train.run_dir);
        train
    }

    fn command(dir: &Path, run_dir: PathBuf) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mark = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut command = binaries::command(&["train", "--json"]);
        command.env(processes::MARK, &mark).current_dir(dir);
        // No test finds tokens of another.
        command.env("XDG_CACHE_HOME", dir.join("cache"));
        Train { command, mark, run_dir }
    }

    pub fn workers(mut self, workers: usize) -> Self {
        self.command.arg("--workers").arg(workers.to_string());
        self
    }

    /// One `--set key=value`.
    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.command.arg("--set").arg(format!("{key}={value}"));
        self
    }

    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    pub fn start(self) -> Live {
        Live::follow(self.command, self.mark, self.run_dir)
    }

    /// To its end, whatever that is.
    pub fn run(self) -> Finished {
        self.start().finish()
    }

    /// To its good end.
    pub fn succeed(self) -> Finished {
        let finished = self.run();
        assert_eq!(finished.code(), Some(0), "the run failed: {}", finished.stderr);
        finished
    }
}

/// A run under way. Dropping it kills its supervisor, which ends the rest.
#[derive(Debug)]
pub struct Live {
    child: Child,
    lines: Receiver<String>,
    words: Option<JoinHandle<String>>,
    events: Vec<Value>,
    pub mark: String,
    pub run_dir: PathBuf,
}

impl Live {
    /// Starts `command`, which carries `mark` and writes its events to standard output.
    pub fn follow(mut command: Command, mark: String, run_dir: PathBuf) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("unisono can be started");
        let stdout = child.stdout.take().expect("standard output is piped");
        let mut stderr = child.stderr.take().expect("standard error is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let words = std::thread::spawn(move || {
            let mut text = Vec::new();
            // Whatever could be read is what the user would have seen.
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Live { child, lines, words: Some(words), events: Vec::new(), mark, run_dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next event of this kind; those before it are kept too.
    pub fn wait_for(&mut self, kind: &str) -> Value {
        self.wait_for_any(&[kind])
    }

    /// The next event of one of these kinds.
    pub fn wait_for_any(&mut self, kinds: &[&str]) -> Value {
        if let Some(event) = self.wait_within(PATIENCE, kinds) {
            return event;
        }
        let _ = self.child.kill();
        let words = self.words.take().map(|w| w.join().unwrap_or_default()).unwrap_or_default();
        panic!("no {} event came; events: {:?}; standard error: {words}", kinds.join(" or "), self.events);
    }

    /// The next event of one of these kinds, if it comes so soon.
    pub fn wait_within(&mut self, patience: Duration, kinds: &[&str]) -> Option<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?;
            let event = parse(&line);
            self.events.push(event.clone());
            if kinds.iter().any(|kind| event["event"] == *kind) {
                return Some(event);
            }
        }
    }

    /// The next step from `step` on.
    pub fn wait_for_step(&mut self, step: u64) {
        while self.wait_for("step")["step"].as_u64().expect("a step has a number") < step {}
    }

    /// The newest step that the run has told of by now; 0: none.
    pub fn newest_step(&mut self) -> u64 {
        while self.wait_within(Duration::ZERO, &[]).is_some() {}
        self.all("step").last().and_then(|step| step["step"].as_u64()).unwrap_or(0)
    }

    /// The latest event of this kind among those that were waited for or passed on the way.
    pub fn seen(&self, kind: &str) -> &Value {
        let found = self.events.iter().rev().find(|event| event["event"] == kind);
        found.unwrap_or_else(|| panic!("no {kind} event among {:?}", self.events))
    }

    /// Every event of this kind so far.
    pub fn all(&self, kind: &str) -> Vec<&Value> {
        self.events.iter().filter(|event| event["event"] == kind).collect()
    }

    /// Everything that was told so far, in order.
    pub fn every_event(&self) -> &[Value] {
        &self.events
    }

    pub fn workers(&self) -> Vec<processes::Process> {
        processes::marked(&self.mark).into_iter().filter(|p| p.is_worker()).collect()
    }

    pub fn coordinator(&self) -> processes::Process {
        let found = processes::marked(&self.mark).into_iter().find(|p| p.is_coordinator());
        found.expect("a run has a coordinator process")
    }

    pub fn finish(mut self) -> Finished {
        self.finish_in_place()
    }

    /// The same for whoever holds it among other things; nothing is left in it.
    pub fn finish_in_place(&mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let words = self.words.take().map(|w| w.join().unwrap_or_default()).unwrap_or_default();
                panic!("the run did not end within {PATIENCE:?}; events: {:?}; standard error: {words}", self.events);
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // The pipe may be held by a process that outlives its supervisor: that is for the caller to see, not to wait for.
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.events.push(parse(&line));
        }
        let stderr = self.words.take().map(|w| w.join().unwrap_or_default()).unwrap_or_default();
        Finished {
            status,
            events: std::mem::take(&mut self.events),
            stderr,
            mark: self.mark.clone(),
            run_dir: self.run_dir.clone(),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|_| panic!("standard output has a line that is not JSON: {line}"))
}

/// A run that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub events: Vec<Value>,
    pub stderr: String,
    pub mark: String,
    pub run_dir: PathBuf,
}

impl Finished {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn events(&self, kind: &str) -> Vec<&Value> {
        self.events.iter().filter(|event| event["event"] == kind).collect()
    }

    pub fn losses(&self) -> Vec<f64> {
        self.events("step").iter().map(|step| step["loss"].as_f64().expect("a loss is a number")).collect()
    }

    /// The digest that the run reported when it was done.
    pub fn digest(&self) -> String {
        let done = self.events("done");
        assert_eq!(done.len(), 1, "a run is done once: {}", self.stderr);
        let digest = done[0]["digest"].as_str().expect("a digest is a string");
        assert_eq!(digest.len(), 64, "a digest is 32 bytes in hexadecimal: {digest}");
        digest.to_owned()
    }
}

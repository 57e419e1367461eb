//! Processes as the kernel sees them: who descends from whom, and what a run left behind.

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The environment variable that marks every process of one run.
pub const MARK: &str = "UNISONO_TEST_RUN";

/// One live process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub arguments: Vec<String>,
}

impl Process {
    pub fn is_worker(&self) -> bool {
        self.arguments.first().is_some_and(|program| program.ends_with("unisono-worker"))
    }

    pub fn is_coordinator(&self) -> bool {
        !self.is_worker() && self.arguments.get(1).is_some_and(|command| command == "coordinator")
    }
}

/// Every live process that carries `mark`, zombies left out, in order of pid.
pub fn marked(mark: &str) -> Vec<Process> {
    let wanted = format!("{MARK}={mark}");
    let mut found: Vec<Process> = pids()
        .filter(|pid| {
            let environment = std::fs::read(proc(*pid, "environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
        })
        .filter_map(|pid| {
            let raw = std::fs::read(proc(pid, "cmdline")).ok().filter(|raw| !raw.is_empty())?;
            let arguments = raw.split(|byte| *byte == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
            Some(Process { pid, arguments })
        })
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

/// Waits until no process carries `mark` and returns how long that took; panics with those that are left.
pub fn wait_until_gone(mark: &str, patience: Duration) -> Duration {
    let begun = Instant::now();
    loop {
        let left = marked(mark);
        if left.is_empty() {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < patience, "after {patience:?} the run has left behind {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Resident memory of a process now, bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(proc(pid, "status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// What a process has used.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Processor time of its living threads, seconds.
    pub cpu: f64,
    /// Most resident memory so far, bytes.
    pub peak: u64,
}

/// `None` where there is no such process.
pub fn usage(pid: u32) -> Option<Usage> {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir(proc(pid, "task")).ok()? {
        // A thread may end meanwhile.
        let Ok(times) = std::fs::read_to_string(thread.ok()?.path().join("schedstat")) else { continue };
        nanoseconds += times.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    let status = std::fs::read_to_string(proc(pid, "status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let peak = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    Some(Usage { cpu: nanoseconds as f64 / 1e9, peak })
}

/// Sends SIGKILL.
pub fn kill(pid: u32) {
    let status = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill is a command");
    assert!(status.success(), "process {pid} could not be killed");
}

/// Sends the signal of this name, for example TERM.
pub fn signal(pid: u32, name: &str) {
    let arguments = [format!("-{name}"), pid.to_string()];
    let status = std::process::Command::new("kill").args(&arguments).status().expect("kill is a command");
    assert!(status.success(), "process {pid} could not be sent {name}");
}

fn proc(pid: u32, entry: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{entry}"))
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc is there on Linux");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

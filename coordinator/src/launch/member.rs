//! A child process of the supervisor, and what it last said.

use super::child;
use super::local::LAST_WORDS;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex};

/// A child, and what it last wrote on standard error.
///
/// A worker's own account of its end, a line that begins with [`LAST_WORDS`], is held back: the coordinator has heard the
/// same and says who is to blame. It is shown where the coordinator cannot.
pub(super) struct Member {
    pub child: Child,
    pub ended: Option<ExitStatus>,
    pub words: Arc<Mutex<VecDeque<String>>>,
}

impl Member {
    pub fn reap(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    pub fn send(&self, signal: i32) {
        if self.ended.is_none() {
            child::send(&self.child, signal);
        }
    }
}

/// Passes a worker's standard error on line by line, with its pid in front, and keeps the last lines.
pub(super) fn forward(stderr: impl io::Read, pid: u32, words: &Mutex<VecDeque<String>>) {
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
pub(super) fn manner(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".into(),
    }
}

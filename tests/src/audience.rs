//! Viewers of a run from other terminals, who stay through whatever happens to it.

use crate::{binaries, processes};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Some `unisono monitor RUN --json`. Dropping it ends them.
#[derive(Debug)]
pub struct Audience {
    viewers: Vec<(Child, Option<JoinHandle<Vec<Value>>>)>,
}

impl Audience {
    /// `viewers` of them, marked as the run is.
    pub fn attach(run_dir: &Path, mark: &str, viewers: usize) -> Self {
        let viewer = |_| {
            let mut command = binaries::command(&["monitor", "--json"]);
            command.arg(run_dir).env(processes::MARK, mark).stdin(Stdio::null());
            command.stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = command.spawn().expect("unisono can be started");
            let stdout = child.stdout.take().expect("standard output is piped");
            let lines = std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(Result::ok);
                lines.filter_map(|line| serde_json::from_str(&line).ok()).collect()
            });
            (child, Some(lines))
        };
        Audience { viewers: (0..viewers).map(viewer).collect() }
    }

    /// Waits until the run has ended for everyone; panics unless each viewer was told every step from the first to
    /// `steps` once, in order, and the end.
    pub fn saw_all(mut self, steps: u64) {
        for (child, lines) in &mut self.viewers {
            let deadline = Instant::now() + Duration::from_secs(60);
            while child.try_wait().expect("a child can be waited for").is_none() {
                assert!(Instant::now() < deadline, "a viewer does not notice that the run is over");
                std::thread::sleep(Duration::from_millis(10));
            }
            let events = lines.take().map(|l| l.join().expect("reading does not panic")).unwrap_or_default();
            let seen: Vec<u64> =
                events.iter().filter(|e| e["event"] == "step").filter_map(|e| e["step"].as_u64()).collect();
            assert!(seen.iter().copied().eq(1..=steps), "a viewer saw {seen:?}");
            assert!(events.iter().any(|e| e["event"] == "done"), "a viewer did not hear of the end");
        }
    }
}

impl Drop for Audience {
    fn drop(&mut self) {
        for (child, _) in &mut self.viewers {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

//! What the coordinator tells the supervisor that started it, one JSON object per line on a pipe.

use super::{child, REPORT_FD};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "lowercase")]
pub enum Report {
    /// The run's directory is made and its ledger is there: a coordinator that dies from now on is started again to go on
    /// with it.
    Created {
        run_dir: PathBuf,
        /// Entries that its ledger has from earlier.
        #[serde(default)]
        entries: u64,
    },
    /// The input is good, the run directory exists, and workers may join.
    Ready {
        /// host:port that workers dial.
        address: String,
        /// How many workers the run wants.
        workers: usize,
        /// The secret with which they join.
        token: String,
        /// Deaths of a worker in a row that the run survives.
        #[serde(default)]
        restarts: u32,
    },
    /// The run goes on without this worker, which may still live.
    Lost { pid: u32 },
    /// The run has come to an end, whichever: workers that leave from now on are not missed.
    Over,
    /// How far the run is, for the case that the coordinator cannot tell any more.
    Progress { step: u64, steps: u64 },
}

/// The coordinator's end of the pipe; says nothing where no supervisor listens.
#[derive(Default)]
pub struct Reporter {
    pipe: Option<File>,
}

impl Reporter {
    /// The pipe that the environment names. Call once, early.
    pub fn from_environment() -> Self {
        Reporter { pipe: child::inherited(REPORT_FD).map(File::from) }
    }

    /// Whether a supervisor started this process.
    pub fn supervised(&self) -> bool {
        self.pipe.is_some()
    }

    pub fn send(&mut self, report: &Report) {
        let Some(pipe) = &mut self.pipe else { return };
        let Ok(mut line) = serde_json::to_string(report) else { return };
        line.push('\n');
        if pipe.write_all(line.as_bytes()).is_err() {
            self.pipe = None;
        }
    }
}

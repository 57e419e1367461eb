//! What a viewer is told about the machine right now.

use super::machine::Machine;
use super::phases::Phase;
use unisono_proto::v1::{self as wire, StatusReply, WorkerStatus};

impl Machine {
    /// The run's state at `now`.
    pub fn status(&self, now: f64) -> StatusReply {
        let worker = |(rank, w): (u32, &super::roster::Worker)| WorkerStatus {
            rank,
            host: w.join.host.clone(),
            pid: w.join.pid,
            phase: w.phase().into(),
            silent_seconds: (now - w.heard).max(0.0),
        };
        StatusReply {
            run_dir: self.settings.run_dir.display().to_string(),
            state: self.state().into(),
            epoch: Some(self.epoch()),
            step: self.committed.max(self.settings.recorded.newest()),
            steps: self.program.steps(),
            workers: (0..).zip(self.roster.workers()).map(worker).collect(),
            failure: self.outcome.failure.clone(),
        }
    }

    fn state(&self) -> &'static str {
        match (self.phase, self.under_way().0) {
            (Phase::Gathering, _) if self.regrouping.is_some() => "regrouping",
            (Phase::Gathering, _) => "gathering",
            (Phase::Loading, _) => "loading",
            (Phase::Finished, _) => "finished",
            (Phase::Failed, _) => "failed",
            (Phase::Stopped, _) => "stopped",
            (Phase::Running, _) if self.is_stopping() => "stopping",
            (Phase::Running, wire::Phase::Evaluate) => "evaluating",
            (Phase::Running, wire::Phase::Checkpoint | wire::Phase::Drain) => "checkpointing",
            (Phase::Running, wire::Phase::Generate) => "generating",
            (Phase::Running, _) => "training",
        }
    }
}

//! What is done between steps: evaluations and checkpoints.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Eval {
    /// Steps between validations; 0: only at the end.
    pub every: u64,
}

impl Default for Eval {
    fn default() -> Self {
        Eval { every: 50 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// Steps between snapshots: each worker keeps its share of the state in memory, and a copy at another worker, on another
    /// host where there is one. After a loss the run goes on from there and not from the newest checkpoint. 0: none. More often:
    /// less to compute again, more to copy. They take four times the optimizer state's memory; without it there are none.
    pub snapshot_every: u64,
    /// Newest checkpoints kept. One is deleted only after a newer one has been read back.
    pub keep: usize,
    /// Seconds that a run has to save and end when it is asked to (SIGTERM, SIGINT, SIGUSR1). Slurm and Kubernetes kill
    /// after 30 s by default.
    pub grace: f64,
    /// Where each committed checkpoint is copied to behind training, with ledger and configuration: an absolute directory,
    /// s3://bucket/prefix or gs://bucket/prefix. `train --resume URL/RUN` goes on from there on any machine, and so does
    /// `--resume auto` where no run of the configuration is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_to: Option<String>,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 500, snapshot_every: 10, keep: 3, grace: 25.0, copy_to: None }
    }
}

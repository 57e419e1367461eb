//! What a coordinator is started with, and what it comes back with.
//!
//! ```text
//! let work = Work::train(dataset, &config, &spec)?;
//! let outcome = serve(Setup { listener, run_dir, config, spec, work, ... }, shutdown).await?;
//! // shutdown: impl Future<Output = String>; its output says why the run is to end now
//! ```
//!
//! The run directory exists and is empty, or belongs to the run that is served again. `serve` locks it, makes
//! `ledger.sqlite`, `control.json` and `checkpoints/` in it, waits for `workers` workers, carries the work out and
//! returns when the run is finished or has failed: [`Outcome::failure`] tells which. It never prints.

use super::control::Control;
use super::ledger::Ledger;
use super::work::Work;
use crate::run::event::{Conclusion, Outcome};
use crate::run::recorded::Recorded;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use unisono_configs::model::ModelSpec;
use unisono_configs::run::RunConfig;
use unisono_proto::v1::Event;

/// What [`Setup::viewer_patience`] is as a rule.
pub const VIEWER_PATIENCE: Duration = Duration::from_secs(30);

pub struct Setup {
    /// Bound already, so that a supervisor can hold it over restarts.
    pub listener: TcpListener,
    /// host:port under which workers reach the listener; absent: the listener's own address.
    pub advertise: Option<String>,
    pub run_dir: PathBuf,
    /// Resolved: neither `model.compute`, `cluster.device` nor `cluster.workers` is "auto".
    pub config: RunConfig,
    pub spec: ModelSpec,
    pub work: Work,
    /// Is told everything, from the loop's own thread: it must return soon.
    pub observer: Arc<dyn Observer>,
    /// How long a viewer may take nothing of what is there for it, before its connection is ended.
    pub viewer_patience: Duration,
    /// The run's ledger, where it is open already, as for a run that is gone on with.
    pub resume: Option<Resumption>,
    /// What a finished training run leaves behind, besides its last checkpoint.
    pub conclude: Option<Conclude>,
}

/// What is left of a run's earlier starts, besides the checkpoint after which `Setup::work` starts.
pub struct Resumption {
    /// Locked since before anything of the run was read.
    pub ledger: Ledger,
    /// What it holds.
    pub recorded: Recorded,
}

/// Called once, on a thread of its own, with the directory of the last checkpoint: exports it, computes its digest.
/// An error is a sentence and fails the run.
pub type Conclude = Box<dyn FnOnce(&Path) -> Result<Conclusion, String> + Send>;

/// Looks on from within the process.
pub trait Observer: Send + Sync {
    /// The coordinator accepts connections and `control.json` is written.
    fn listening(&self, control: &Control);
    /// A ledger entry is durable.
    fn event(&self, event: &Event);
}

/// Nobody looks.
impl Observer for () {
    fn listening(&self, _: &Control) {}
    fn event(&self, _: &Event) {}
}

/// Why a coordinator does not come up, or goes down without an outcome. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{key} is still \"auto\"; resolve the configuration before serving it")]
    Unresolved { key: &'static str },
    #[error("{workers} workers are more than train.micro_batches = {micro_batches}, so some would never have work; set train.micro_batches to at least {workers}, or cluster.workers to at most {micro_batches}")]
    TooManyWorkers { workers: usize, micro_batches: usize },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error(transparent)]
    Control(#[from] super::control::Error),
    #[error("checkpoint.copy_to: {0}")]
    Courier(#[from] crate::checkpoint::courier::Error),
    #[error(transparent)]
    Ledger(#[from] super::ledger::Error),
    #[error("no certificate could be made ({0}); this is a defect, please report it")]
    Certificate(String),
    #[error("the listening socket failed ({0}); start the coordinator again")]
    Socket(std::io::Error),
    #[error("the coordinator's own loop ended early ({0}); this is a defect, please report it")]
    Loop(String),
}

/// Whether the run came to its end.
pub fn succeeded(outcome: &Outcome) -> bool {
    outcome.failure.is_none()
}

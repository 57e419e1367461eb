//! The thread that commits checkpoints and concludes the run, beside the training that goes on.

use super::ledger::{Reader, LEDGER};
use super::setup::Conclude;
use super::steering::{Alarm, Clock, Command, Handle};
use super::work::Work;
use crate::checkpoint::commit::{create, discard, draft, retain, Error, Facts};
use crate::checkpoint::courier::{self, Courier};
use crate::checkpoint::disk::Local;
use crate::checkpoint::manifest::{self, Cursor, Dtype};
use crate::checkpoint::state::State;
use crate::digest;
use crate::run::event::{Conclusion, NotCommitted, PendingCheckpoint};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use unisono_configs::model::Layout;
use unisono_proto::fail_point;
use unisono_proto::v1::{CheckpointCommitted, CheckpointFile};

pub enum Job {
    Commit(PendingCheckpoint),
    Discard {
        step: u64,
        files: Vec<Vec<CheckpointFile>>,
    },
    /// Older checkpoints go, but not that after step `spare`.
    Prune {
        spare: Option<u64>,
    },
    Conclude {
        step: u64,
    },
}

/// Hands jobs to the thread, which does them in order. The thread ends when this is dropped.
pub struct Committer {
    jobs: Sender<Job>,
}

impl Committer {
    pub fn spawn(archive: Archive, handle: Handle, conclude: Option<Conclude>) -> std::io::Result<Self> {
        let (jobs, queue) = channel();
        std::thread::Builder::new().name("checkpoints".into()).spawn(move || work(archive, handle, conclude, queue))?;
        Ok(Committer { jobs })
    }

    pub fn send(&self, job: Job) {
        // Fails only when the thread has panicked, which has ended the run.
        if self.jobs.send(job).is_err() {
            tracing::error!("the thread that commits checkpoints is gone");
        }
    }
}

/// What a checkpoint's manifest is made from.
pub struct Archive {
    pub run_dir: PathBuf,
    pub config: String,
    pub layout: Layout,
    /// Of masters and moments.
    pub dtype: Dtype,
    pub work: Work,
    /// Newest checkpoints kept.
    pub keep: usize,
    pub courier: Option<Arc<Courier>>,
}

/// Who copies checkpoints to `checkpoint.copy_to`, and tells the run what could not be copied.
pub fn courier(
    checkpoint: &unisono_configs::run::Checkpoint,
    run_dir: &Path,
    handle: &Handle,
) -> Result<Option<Arc<Courier>>, courier::Error> {
    let Some(url) = &checkpoint.copy_to else { return Ok(None) };
    let handle = handle.clone();
    let tell = move |step, copied: Result<f64, String>| match copied {
        Ok(seconds) => tracing::info!(step, seconds, "the checkpoint is copied"),
        Err(problem) => {
            let message = format!("the checkpoint after step {step} is not copied, training goes on: {problem}");
            handle.send(Command::Warn { kind: "copy", step, message });
        }
    };
    let ledger = run_dir.join(LEDGER);
    let snapshot =
        move |to: &Path| Reader::open(&ledger).and_then(|reader| reader.copy_to(to)).map_err(|error| error.to_string());
    Courier::spawn(url, run_dir, checkpoint.keep, Box::new(snapshot), tell).map(|courier| Some(Arc::new(courier)))
}

fn work(archive: Archive, handle: Handle, mut conclude: Option<Conclude>, queue: Receiver<Job>) {
    let _alarm = Alarm { handle: handle.clone(), thread: "commits checkpoints" };
    let clock = Clock::new();
    let mut newest = String::new();
    for job in queue {
        match job {
            Job::Commit(pending) => {
                let (step, attempt, since) = (pending.step, pending.attempt, pending.since);
                let result = archive.commit(&pending);
                let result = result.map(|entry| CheckpointCommitted { seconds: clock.now() - since, ..entry });
                if let Ok(entry) = &result {
                    newest.clone_from(&entry.digest);
                    if let Some(Err(error)) = archive.courier.as_ref().map(|courier| courier.take(step)) {
                        let message = error.to_string();
                        handle.send(Command::Warn { kind: "copy", step, message });
                    }
                }
                if result.is_err() {
                    discard(&Local, &archive.run_dir, step, &pending.files);
                }
                handle.send(Command::CheckpointCommitted { attempt, result });
            }
            Job::Discard { step, files } => discard(&Local, &archive.run_dir, step, &files),
            Job::Prune { spare } => {
                if let Err(error) = retain(&Local, &archive.run_dir, archive.keep, spare) {
                    tracing::warn!(%error, "an old checkpoint could not be deleted");
                }
            }
            Job::Conclude { step } => {
                fail_point::reached("conclude");
                let directory = manifest::directory(&archive.run_dir, step);
                let result = match conclude.take() {
                    Some(conclude) => conclude(&directory),
                    None => Ok(Conclusion::default()),
                };
                let result = result.map(|c| {
                    let digest = if c.digest.is_empty() { newest.clone() } else { c.digest };
                    Conclusion { digest, ..c }
                });
                handle.send(Command::Concluded { result });
            }
        }
    }
}

impl Archive {
    fn commit(&self, pending: &PendingCheckpoint) -> Result<CheckpointCommitted, NotCommitted> {
        let step = pending.step;
        let (epoch, position) = self.work.plan().map_or((0, 0), |plan| plan.place_after(step));
        let facts = Facts {
            disk: &Local,
            run_dir: &self.run_dir,
            cursor: Cursor { step, epoch, position },
            config: &self.config,
            layout: &self.layout,
            dtype: self.dtype,
            samples: &self.work.samples(step),
        };
        let draft = draft(pending, &facts).map_err(not_committed)?;
        let directory = manifest::directory(&self.run_dir, step);
        // Reads every file back: what is announced is what is there, and only that lets older checkpoints go.
        let again = |error: &dyn std::fmt::Display| NotCommitted { message: error.to_string(), fatal: false };
        let state = State::verify(&directory, draft).map_err(|error| again(&error))?;
        let digest = digest::of(&state).map_err(|error| again(&error))?;
        let manifest = state.manifest;
        fail_point::reached("before-commit");
        create(&Local, &directory, &manifest).map_err(not_committed)?;
        fail_point::reached("after-commit");
        let bytes = manifest.files.iter().map(|f| f.bytes).sum();
        Ok(CheckpointCommitted { step, path: directory.display().to_string(), bytes, seconds: 0.0, digest })
    }
}

/// A full or failing disk may be better next time; files that do not fit each other will not.
fn not_committed(error: Error) -> NotCommitted {
    NotCommitted { message: error.to_string(), fatal: !matches!(error, Error::Write { .. }) }
}

//! The thread that commits checkpoints and concludes the run, beside the training that goes on.

use super::setup::Conclude;
use super::steering::{Clock, Command, Handle};
use super::work::Work;
use crate::checkpoint::commit::{commit, retain, Facts};
use crate::checkpoint::manifest::{self, Cursor};
use crate::digest::digest;
use crate::run::event::{Conclusion, PendingCheckpoint};
use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, Sender};
use unisono_configs::model::Layout;
use unisono_proto::fail_point;
use unisono_proto::v1::CheckpointCommitted;

pub enum Job {
    Commit(PendingCheckpoint),
    Conclude { step: u64 },
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
        // Fails only when the thread has panicked; the loop then never hears of a commit and the run is stopped by hand.
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
    pub work: Work,
    /// Newest checkpoints kept.
    pub keep: usize,
}

fn work(archive: Archive, handle: Handle, mut conclude: Option<Conclude>, queue: Receiver<Job>) {
    let clock = Clock::new();
    let mut newest = String::new();
    for job in queue {
        match job {
            Job::Commit(pending) => {
                let (step, since) = (pending.step, pending.since);
                let result =
                    archive.commit(pending).map(|entry| CheckpointCommitted { seconds: clock.now() - since, ..entry });
                if let Ok(entry) = &result {
                    newest.clone_from(&entry.digest);
                }
                handle.send(Command::CheckpointCommitted { step, result });
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
    fn commit(&self, pending: PendingCheckpoint) -> Result<CheckpointCommitted, String> {
        let step = pending.step;
        let (epoch, position) = self.work.plan().map_or((0, 0), |plan| plan.place_after(step));
        let facts = Facts {
            run_dir: &self.run_dir,
            cursor: Cursor { step, epoch, position },
            config: &self.config,
            layout: &self.layout,
            samples: &self.work.samples(step),
        };
        fail_point::reached("before-commit");
        let manifest = commit(&pending, &facts).map_err(|error| error.to_string())?;
        fail_point::reached("after-commit");
        let path = manifest::directory(&self.run_dir, step);
        // Reads every file back: what is announced is what is on the disk.
        let digest = digest(&path).map_err(|error| error.to_string())?;
        retain(&self.run_dir, self.keep).map_err(|error| error.to_string())?;
        let bytes = manifest.files.iter().map(|f| f.bytes).sum();
        Ok(CheckpointCommitted { step, path: path.display().to_string(), bytes, seconds: 0.0, digest })
    }
}

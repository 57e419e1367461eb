//! Saving behind training: the shard is copied at the barrier, and a thread writes the copy while training changes the
//! original. One copy exists, so a save waits for the one before it; two are never under way at once.

use super::{write, Source};
use crate::link::Reporter;
use crate::optim::shard::Shard;
use crate::optim::state::{Form, Kept};
use crate::restore::Part;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use unisono_configs::model::Layout;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{Checkpoint, CheckpointReport, Epoch};

/// The training went wrong before this save.
#[derive(Debug, thiserror::Error)]
#[error("{tensor} has a number that is not finite in its {part}, so it is not saved: lower train.learning_rate, and go on from the newest checkpoint")]
pub struct BadState {
    pub tensor: String,
    pub part: &'static str,
}

/// A copy of the own shard. Its pages exist from the start: the memory plan counts them.
#[derive(Debug)]
struct Copied {
    layout: Arc<Layout>,
    shard: Shard,
    form: Form,
    kept: Vec<Kept>,
}

impl Copied {
    fn of(source: &Source<'_>, layout: Arc<Layout>) -> Self {
        let kept = source.held.iter().map(|held| Kept::of(*held)).collect();
        Copied { layout, shard: source.shard.clone(), form: source.form, kept }
    }

    fn take(&mut self, from: &Source<'_>) {
        self.kept.iter_mut().zip(&from.held).for_each(|(to, from)| to.take(*from));
    }

    fn source(&self) -> Source<'_> {
        let held = self.kept.iter().map(Kept::held).collect();
        Source { layout: &self.layout, shard: &self.shard, form: self.form, held }
    }
}

/// Where the copy is.
#[derive(Debug)]
enum Place {
    /// There was no memory for one: saves are written at the barrier.
    Nowhere,
    Here(Copied),
    Writing {
        step: u64,
        thread: JoinHandle<Copied>,
    },
}

/// Saves the own shard.
#[derive(Debug)]
pub struct Saver {
    place: Place,
    /// The generation is over: what is being written is of no use.
    given_up: Arc<AtomicBool>,
    reporter: Reporter,
    epoch: Epoch,
}

impl Saver {
    /// `behind`: there is memory for a copy of the shard.
    pub fn new(source: &Source<'_>, layout: Arc<Layout>, behind: bool, reporter: Reporter, epoch: Epoch) -> Self {
        let place = match behind {
            true => Place::Here(Copied::of(source, layout)),
            false => Place::Nowhere,
        };
        Saver { place, given_up: Arc::default(), reporter, epoch }
    }

    /// Copies the shard and begins to write the copy; the report follows when it is on disk. Returns once training may
    /// change the shard. A state with a number that is not finite is not saved.
    pub fn save(&mut self, source: &Source<'_>, checkpoint: Checkpoint) -> Result<(), BadState> {
        check(source)?;
        self.wait(checkpoint.step);
        let (reporter, epoch, given_up) = (self.reporter.clone(), self.epoch, self.given_up.clone());
        let mut copy = match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(copy) => copy,
            Place::Nowhere | Place::Writing { .. } => {
                save(source, &checkpoint, &reporter, &epoch, &given_up);
                return Ok(());
            }
        };
        let begun = Instant::now();
        copy.take(source);
        let step = checkpoint.step;
        tracing::info!(step, seconds = begun.elapsed().as_secs_f64(), "copied to be saved");
        let work = move || {
            save(&copy.source(), &checkpoint, &reporter, &epoch, &given_up);
            copy
        };
        match std::thread::Builder::new().name("save".into()).spawn(work) {
            Ok(thread) => self.place = Place::Writing { step, thread },
            // The copy went down with the thread that did not come up, and so may the machine soon.
            Err(error) => panic!("no thread to write the checkpoint after step {step} ({error})"),
        }
        Ok(())
    }

    /// Waits until nothing is being written.
    pub fn finish(&mut self) {
        self.wait(0);
    }

    /// Waits for the save under way, on behalf of the one after `next`.
    fn wait(&mut self, next: u64) {
        match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Writing { step, thread } => {
                let since = (!thread.is_finished()).then(Instant::now);
                match thread.join() {
                    Ok(copy) => self.place = Place::Here(copy),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
                if let Some(since) = since.filter(|_| next > 0) {
                    let seconds = since.elapsed().as_secs_f64();
                    tracing::warn!(
                        "the save after step {next} waited {seconds:.1} s for the one after step {step}: the disk is \
                         slower than the saves come; raise checkpoint.every"
                    );
                }
            }
            place => self.place = place,
        }
    }
}

/// Every master and moment is a number.
fn check(source: &Source<'_>) -> Result<(), BadState> {
    for piece in source.shard.pieces(source.layout) {
        let bad = |part: &Part| !source.held[piece.bucket].is_finite(*part, piece.of_shard.clone());
        if let Some(part) = Part::ALL.into_iter().find(bad) {
            return Err(BadState { tensor: piece.tensor.name.clone(), part: part.name() });
        }
    }
    Ok(())
}

impl Drop for Saver {
    /// The generation is over: its thread ends before another one may begin to write.
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        if let Place::Writing { thread, .. } = std::mem::replace(&mut self.place, Place::Nowhere) {
            // A panic there has been told already.
            drop(thread.join());
        }
    }
}

fn save(source: &Source<'_>, checkpoint: &Checkpoint, reporter: &Reporter, epoch: &Epoch, given_up: &AtomicBool) {
    let Checkpoint { step, ref path, attempt } = *checkpoint;
    let begun = Instant::now();
    let (files, problem) = match write(Path::new(path), source, epoch, attempt, given_up) {
        Ok(file) => (vec![file], String::new()),
        Err(error) => (Vec::new(), error.to_string()),
    };
    let (seconds, bytes) = (begun.elapsed().as_secs_f64(), files.first().map_or(0, |file| file.bytes));
    tracing::info!(step, attempt, seconds, bytes, problem, "saved");
    // Nobody listens any more where the link has ended: then the attempt ends with it.
    let _ = reporter.report(*epoch, Body::Checkpoint(CheckpointReport { step, files, attempt, problem }));
}

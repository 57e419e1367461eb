//! Takes snapshots behind training: the own shard is copied after an update, and a thread hands the copy to the neighbour
//! while training changes the original. Training never waits for it: where the last one is still on its way, the next one is
//! left out. The coordinator hears of each what became of it, so that one that cannot become whole makes room for the next.

use super::exchange::{self, Circle};
use super::{Image, Name, Store};
use crate::checkpoint::{encode, Source};
use crate::collective::tcp::Stopper;
use crate::link::Reporter;
use std::thread::JoinHandle;
use std::time::Instant;
use unisono_proto::fail_point;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{Epoch, Neighbour, SnapshotKept};

/// What a keeper works with.
pub struct Means {
    pub store: Store,
    /// Steps between snapshots.
    pub every: u64,
    pub neighbour: Neighbour,
    pub circle: Circle,
    pub reporter: Reporter,
    pub epoch: Epoch,
}

/// Keeps the own snapshots of one generation.
pub struct Keeper {
    means: Means,
    sending: Option<JoinHandle<()>>,
    stopper: Stopper,
}

impl Keeper {
    pub fn new(means: Means) -> Self {
        Keeper { means, sending: None, stopper: Stopper::default() }
    }

    /// Whether a snapshot is due after `step`.
    pub fn is_due(&self, step: u64) -> bool {
        self.means.every > 0 && step.is_multiple_of(self.means.every)
    }

    /// Copies the own shard, which is that after `step` of `timeline`, unless the last snapshot is still on its way. Returns once training
    /// may change the shard.
    pub fn take(&mut self, step: u64, timeline: [u8; 32], source: &Source<'_>) {
        if self.sending.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.report(
                step,
                "the one before it was still on its way to the neighbour (raise checkpoint.snapshot_every)",
            );
            return;
        }
        let (rank, world) = (source.shard.rank as u32, source.shard.world as u32);
        let name = Name { timeline, step, rank, world };
        if let Some(image) = self.means.store.place(&name, None) {
            self.send(step, Unhashed::No(image));
            return;
        }
        if !self.means.store.has_room(&name, source.bytes()) {
            self.report(step, "the one before it was not whole yet (raise checkpoint.snapshot_every)");
            return;
        }
        let begun = Instant::now();
        let mut bytes = self.means.store.buffer();
        encode(source, &mut bytes);
        let seconds = begun.elapsed().as_secs_f64();
        tracing::debug!(step, seconds, bytes = bytes.len(), "copied for a snapshot");
        self.send(step, Unhashed::Yes(name, bytes));
    }

    /// Says that there is no whole snapshot after `step`, and why.
    fn report(&self, step: u64, problem: &str) {
        tracing::info!(step, problem, "no snapshot");
        let kept = SnapshotKept { step, problem: problem.into() };
        // Nobody listens any more where the link has ended.
        let _ = self.means.reporter.report(self.means.epoch, Body::Kept(kept));
    }

    fn send(&mut self, step: u64, what: Unhashed) {
        // A stopper keeps a handle of every connection; that of the last snapshot is over.
        self.stopper = Stopper::default();
        let (store, circle, stopper) = (self.means.store.clone(), self.means.circle.clone(), self.stopper.clone());
        let turn = store.turn();
        let (neighbour, reporter, epoch) =
            (self.means.neighbour.clone(), self.means.reporter.clone(), self.means.epoch);
        let work = move || {
            let _ = rustix::process::nice(exchange::NICENESS);
            let image = match what {
                Unhashed::No(image) => image,
                Unhashed::Yes(name, bytes) => {
                    let hash = *blake3::hash(&bytes).as_bytes();
                    store.insert(turn, Image { name, hash, bytes })
                }
            };
            fail_point::reached("snapshot");
            let put = exchange::put(&circle, &stopper, &neighbour.address, neighbour.rank, &image);
            let problem = put.err().map(|error| error.to_string()).unwrap_or_default();
            if !problem.is_empty() {
                tracing::info!(step, problem, "the snapshot has no second place");
            }
            // Nobody listens any more where the link has ended.
            let _ = reporter.report(epoch, Body::Kept(SnapshotKept { step, problem }));
        };
        match std::thread::Builder::new().name("snapshot".into()).spawn(work) {
            Ok(thread) => self.sending = Some(thread),
            // Training goes on.
            Err(error) => self.report(step, &format!("no thread could be started for it ({error})")),
        }
    }
}

/// What is to be sent.
enum Unhashed {
    No(std::sync::Arc<Image>),
    Yes(Name, Vec<u8>),
}

impl Drop for Keeper {
    /// The generation is over: what was on its way stays where it is.
    fn drop(&mut self) {
        self.stopper.stop();
    }
}

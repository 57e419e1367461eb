//! The worker's end of the wire. Everything asynchronous lives on a thread of its own: reading directives, fetching
//! micro-batches ahead, a heartbeat each second. The compute thread sees plain blocking calls.

pub mod entry;
mod tasks;

use crate::collective::tcp::Stopper;
use crate::model::Batch;
use crate::progress::Progress;
use crate::snapshot::Verdicts;
use entry::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc as plain, Arc, Mutex, OnceLock};
use std::time::Duration;
use tasks::{attend, beat, fetch, lock, Shared};
use tokio::sync::{mpsc, Semaphore};
use tonic::transport::Channel;
use unisono_proto::dial::{self, Token};
use unisono_proto::get_u32s;
use unisono_proto::v1::coordinator_message::Body as FromCoordinator;
use unisono_proto::v1::worker_message::Body as ToCoordinator;
use unisono_proto::v1::{
    directive, Assign, BatchKey, Departure, Directive, Drained, Epoch, Failure, Go, Join, MicroBatch, Suite,
    WorkerMessage,
};

/// Micro-batches asked for ahead of the one under way.
const CREDIT: usize = 4;
/// Reports that may wait for the wire before the compute thread does.
const OUTGOING: usize = 256;
/// Milliseconds between heartbeats before the coordinator says how many.
const HEARTBEAT: u64 = 250;
/// How long a last message may take to leave.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why the link is of no more use.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Dial(#[from] dial::Error),
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    #[error("lost the coordinator: {0}; its own log, or `unisono status`, says why")]
    Lost(String),
    #[error("stopped by the coordinator because of {}", place(.0))]
    Aborted(Box<Failure>),
    #[error("the generation is over because of {}", place(.0))]
    Regroup(Box<Failure>),
    #[error("the run is over; this worker waited as a spare and was not needed")]
    Dismissed,
    #[error("the coordinator {0}: coordinator and worker must be of the same build")]
    Protocol(String),
}

impl Error {
    /// Whether joining again, on a new link, is what the coordinator expects.
    pub fn rejoins(&self) -> bool {
        matches!(self, Error::Regroup(_) | Error::Lost(_))
    }
}

/// Whose failure it is, where, and what happened.
fn place(failure: &Failure) -> String {
    let rank = failure.rank.map_or(String::new(), |rank| format!("rank {rank} on {}, ", failure.host));
    let phase = failure.phase().as_str_name().trim_start_matches("PHASE_").to_ascii_lowercase();
    let phase = if phase == "unspecified" { String::new() } else { format!("{phase}, ") };
    let step = failure.step.map_or(String::new(), |step| format!("step {step}, "));
    let place = format!("{rank}{phase}{step}");
    match place.trim_end_matches(", ") {
        "" => failure.message.clone(),
        place => format!("{place}: {}", failure.message),
    }
}

/// Two connections to the coordinator; authorized by `token` where there is one (tests have none).
pub struct Connections {
    pub control: Channel,
    pub data: Channel,
    pub token: Option<Token>,
}

/// Sends reports to the coordinator. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reporter")
    }
}

impl Reporter {
    /// Sends a report that belongs to `epoch`; waits only when the coordinator has not taken many earlier ones.
    pub fn report(&self, epoch: Epoch, body: ToCoordinator) -> Result<(), Error> {
        let lost = || self.shared.ended.get().cloned().unwrap_or_else(|| Error::Lost("the connection closed".into()));
        let sender = lock(&self.shared.outgoing).clone().ok_or_else(lost)?;
        sender.blocking_send(WorkerMessage { epoch: Some(epoch), body: Some(body) }).map_err(|_| lost())
    }

    /// Asks the coordinator to save and stop the run, because `by` wants this worker to end. False where the coordinator
    /// could not be told, or has not assigned this worker anything yet.
    pub fn depart(&self, by: &str) -> bool {
        let assigned = self.shared.epoch().is_some();
        assigned && self.shared.send(ToCoordinator::Departure(Departure { by: by.into() }))
    }
}

/// The worker's view of the coordinator.
pub struct Link {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    incoming: plain::Receiver<FromCoordinator>,
    batches: plain::Receiver<MicroBatch>,
    /// Directives that were taken and not begun.
    kept: Mutex<VecDeque<Directive>>,
    /// Batches that came before their turn.
    early: Mutex<BTreeMap<(i32, u64, u32), MicroBatch>>,
    credit: Arc<Semaphore>,
    closed: plain::Receiver<()>,
    runtime: tokio::runtime::Runtime,
}

impl Link {
    /// Connects, asks to join and starts the heartbeat. Messages older than `known` are dropped. `on_end` is called once, from the link's thread and with the own
    /// rank, when the coordinator aborts or is lost.
    pub fn open(
        address: &str,
        token: Token,
        join: Join,
        known: Option<Epoch>,
        on_end: impl Fn(&Error, Option<u32>) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let runtime = runtime()?;
        let connections = runtime.block_on(async {
            let control = dial::dial(address, &token).await?;
            let data = dial::dial(address, &token).await?;
            Ok::<_, Error>(Connections { control, data, token: Some(token) })
        })?;
        Ok(Self::over(runtime, connections, join, known, on_end))
    }

    /// The same over connections that exist already.
    pub fn over(
        runtime: tokio::runtime::Runtime,
        connections: Connections,
        join: Join,
        known: Option<Epoch>,
        on_end: impl Fn(&Error, Option<u32>) + Send + Sync + 'static,
    ) -> Self {
        let (outgoing, reports) = mpsc::channel(OUTGOING);
        let shared = Arc::new(Shared {
            progress: Arc::default(),
            stopper: Stopper::default(),
            epoch: Mutex::new(None),
            known: Mutex::new(known),
            heartbeat: AtomicU64::new(HEARTBEAT),
            rank: OnceLock::new(),
            ended: OnceLock::new(),
            leaving: AtomicBool::new(false),
            outgoing: Mutex::new(Some(outgoing)),
            on_end: Box::new(on_end),
            turn: Mutex::default(),
            verdicts: Arc::default(),
        });
        if let Some(outgoing) = &*lock(&shared.outgoing) {
            outgoing.try_send(shared.message(ToCoordinator::Join(join))).expect("an empty channel has room");
        }
        let credit = Arc::new(Semaphore::new(CREDIT));
        let (to_compute, incoming) = plain::channel();
        let (to_batches, batches) = plain::channel();
        let (keys, wanted) = mpsc::unbounded_channel();
        let (close, closed) = plain::channel();
        let Connections { control, data, token } = connections;
        let entry = Arc::new(Entry::new(token));
        runtime.spawn(beat(shared.clone()));
        runtime.spawn(attend(shared.clone(), control, entry.clone(), reports, to_compute, keys, close));
        runtime.spawn(fetch(shared.clone(), data, entry.clone(), wanted, credit.clone(), to_batches));
        Link {
            shared,
            entry,
            incoming,
            batches,
            kept: Mutex::default(),
            early: Mutex::default(),
            credit,
            closed,
            runtime,
        }
    }

    /// Sends reports from another thread.
    pub fn reporter(&self) -> Reporter {
        Reporter { shared: self.shared.clone() }
    }

    pub fn progress(&self) -> &Arc<Progress> {
        &self.shared.progress
    }

    /// Which snapshots are of use, as the coordinator tells it.
    pub fn verdicts(&self) -> Arc<Verdicts> {
        self.shared.verdicts.clone()
    }

    /// Ends blocked collectives when the link ends.
    pub fn stopper(&self) -> &Stopper {
        &self.shared.stopper
    }

    pub fn rank(&self) -> Option<u32> {
        self.shared.rank.get().copied()
    }

    /// Why the link ended, if it did.
    pub fn ended(&self) -> Option<&Error> {
        self.shared.ended.get()
    }

    /// The newest epoch that this process has known.
    pub fn known(&self) -> Option<Epoch> {
        *lock(&self.shared.known)
    }

    /// What the coordinator knows this worker by from now on, if it gave it such.
    pub fn pass(&self) -> Option<Token> {
        self.entry.pass()
    }

    /// Writes a pass that is new into the file `place` once it is there.
    pub fn keep_pass(&self, place: PathBuf) {
        let entry = self.entry.clone();
        self.runtime.spawn(async move {
            if let Some(pass) = entry.granted().await {
                entry::keep(&place, &pass);
            }
        });
    }

    /// Waits until the coordinator ends this link, at most for `patience`.
    pub fn wait_for_end(&self, patience: Duration) {
        // Directives and the like that still come are of a generation that is over.
        let deadline = std::time::Instant::now() + patience;
        while self.ended().is_none() && std::time::Instant::now() < deadline {
            if self.incoming.recv_timeout(Duration::from_millis(20)) == Err(plain::RecvTimeoutError::Disconnected) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn why(&self) -> Error {
        self.ended().cloned().unwrap_or_else(|| Error::Lost("the connection closed".into()))
    }

    /// Waits for the link's thread; the end of either connection ends the wait.
    fn wait<T>(&self, from: &plain::Receiver<T>) -> Result<T, Error> {
        loop {
            match from.recv_timeout(Duration::from_millis(100)) {
                Ok(value) => return Ok(value),
                Err(plain::RecvTimeoutError::Timeout) if self.ended().is_none() => {}
                Err(_) => return Err(self.why()),
            }
        }
    }

    /// Waits for the assignment and the epoch it belongs to.
    pub fn assignment(&self) -> Result<(Assign, Epoch), Error> {
        match self.wait(&self.incoming)? {
            FromCoordinator::Assign(assign) => {
                let epoch = self.shared.epoch().ok_or_else(|| Error::Protocol("sent Assign without epoch".into()))?;
                Ok((assign, epoch))
            }
            other => Err(unexpected(&other, "Assign")),
        }
    }

    /// Waits until all workers are ready.
    pub fn go(&self) -> Result<Go, Error> {
        match self.progress().waiting(|| self.wait(&self.incoming))? {
            FromCoordinator::Go(go) => Ok(go),
            other => Err(unexpected(&other, "Go")),
        }
    }

    /// Waits for the next directive, which thereby begins.
    pub fn directive(&self) -> Result<Directive, Error> {
        let mut kept = lock(&self.kept);
        loop {
            // Whoever has asked what was begun also says how far to go, before anything else begins.
            if let Some(directive) = kept.front() {
                let mut turn = lock(&self.shared.turn);
                if !turn.halted {
                    turn.begun = directive.id;
                    return Ok(kept.pop_front().expect("looked at above"));
                }
            }
            match self.progress().waiting(|| self.wait(&self.incoming))? {
                FromCoordinator::Directive(directive) => kept.push_back(directive),
                FromCoordinator::Proceed(proceed) => {
                    kept.retain(|directive| directive.id <= proceed.last);
                    lock(&self.shared.turn).halted = false;
                }
                other => return Err(unexpected(&other, "a directive")),
            }
        }
    }

    /// Waits for a micro-batch, asked for when its directive arrived.
    pub fn batch(&self, key: &BatchKey) -> Result<Batch, Error> {
        let order = |key: &BatchKey| (key.suite, key.step, key.micro_batch);
        let mut early = lock(&self.early);
        let found = loop {
            if let Some(batch) = early.remove(&order(key)) {
                break batch;
            }
            let batch = self.progress().waiting(|| self.wait(&self.batches))?;
            let named = batch.key.ok_or_else(|| Error::Protocol("sent a micro-batch without key".into()))?;
            early.insert(order(&named), batch);
        };
        self.credit.add_permits(1);
        decode(&found).ok_or_else(|| Error::Protocol(format!("sent a malformed micro-batch ({key:?})")))
    }

    /// Sends a report; waits only when the coordinator has not taken many earlier ones.
    pub fn report(&self, body: ToCoordinator) -> Result<(), Error> {
        let sender = lock(&self.shared.outgoing).clone();
        let message = self.shared.message(body);
        sender.ok_or_else(|| self.why())?.blocking_send(message).map_err(|_| self.why())
    }

    /// Says that all is done and waits until the coordinator has heard it.
    pub fn drained(&self) -> Result<(), Error> {
        self.farewell(ToCoordinator::Drained(Drained {}))
    }

    /// Says why this worker cannot go on, if anybody still listens.
    pub fn fail(&self, failure: Failure) -> Result<(), Error> {
        self.farewell(ToCoordinator::Failure(failure))
    }

    fn farewell(&self, body: ToCoordinator) -> Result<(), Error> {
        self.shared.leaving.store(true, Ordering::SeqCst);
        // Dropping the sender after the last message closes our half of the stream; the coordinator answers by closing
        // its own.
        let sender = lock(&self.shared.outgoing).take().ok_or_else(|| self.why())?;
        sender.blocking_send(self.shared.message(body)).map_err(|_| self.why())?;
        drop(sender);
        match self.closed.recv_timeout(FAREWELL) {
            Err(plain::RecvTimeoutError::Timeout) => Err(Error::Lost("it did not take the last message".into())),
            Ok(()) | Err(plain::RecvTimeoutError::Disconnected) => Ok(()),
        }
    }

    /// Leaves no thread behind.
    pub fn close(self) {
        self.runtime.shutdown_timeout(Duration::from_millis(200));
    }
}

/// One thread for everything asynchronous.
pub fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("link")
        .enable_all()
        .build()
        .map_err(|e| Error::Lost(format!("no thread for the connection ({e})")))
}

fn unexpected(body: &FromCoordinator, due: &str) -> Error {
    let found = match body {
        FromCoordinator::Assign(_) => "Assign",
        FromCoordinator::Go(_) => "Go",
        FromCoordinator::Directive(_) => "a directive",
        FromCoordinator::Acknowledge(_) => "Acknowledge",
        FromCoordinator::Abort(_) => "Abort",
        FromCoordinator::Halt(_) => "Halt",
        FromCoordinator::Proceed(_) => "Proceed",
        FromCoordinator::Retain(_) => "Retain",
        FromCoordinator::Forget(_) => "Forget",
    };
    Error::Protocol(format!("sent {found} where {due} was due"))
}

fn decode(batch: &MicroBatch) -> Option<Batch> {
    let (tokens, targets) = (get_u32s(&batch.tokens)?, get_u32s(&batch.targets)?);
    let starts = get_u32s(&batch.starts)?;
    let asked = targets.len() == tokens.len() || targets.is_empty();
    let ascending = starts.first() == Some(&0) && starts.windows(2).all(|w| w[0] < w[1]);
    let inside = starts.last().is_some_and(|&s| (s as usize) < tokens.len());
    (asked && ascending && inside).then_some(Batch { tokens, targets, starts })
}

/// The micro-batches of `directive` that this worker computes, in order of computation.
pub fn keys(directive: &Directive) -> Vec<BatchKey> {
    let (share, suite, step): (&[u32], i32, u64) = match &directive.body {
        Some(directive::Body::Step(s)) => (&s.micro_batches, Suite::Train as i32, s.step),
        Some(directive::Body::Evaluate(e)) => (&e.micro_batches, e.suite, 0),
        Some(directive::Body::Generate(g)) => (&g.micro_batches, Suite::Generate as i32, 0),
        Some(directive::Body::Checkpoint(_) | directive::Body::Finish(_)) | None => (&[], 0, 0),
    };
    share.iter().map(|&micro_batch| BatchKey { suite, step, micro_batch }).collect()
}

#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod tests;

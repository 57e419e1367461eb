//! What the link's own thread does: heartbeats, reading the coordinator's messages, fetching micro-batches.

use super::entry::Entry;
use super::{keys, Error, CREDIT};
use crate::collective::tcp::Stopper;
use crate::progress::Progress;
use crate::snapshot::Verdicts;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc as plain, Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, Semaphore};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use unisono_proto::dial;
use unisono_proto::v1::coordinator_message::Body as FromCoordinator;
use unisono_proto::v1::worker_message::Body as ToCoordinator;
use unisono_proto::v1::{
    directive, BatchKey, BatchRequest, CoordinatorMessage, Directive, Epoch, Halted, MicroBatch, WorkerMessage,
};

/// Nobody panics while holding one of the link's locks in a way that matters.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hears why the link ended, and the own rank.
pub(super) type OnEnd = dyn Fn(&Error, Option<u32>) + Send + Sync;

/// What asynchronous tasks and the compute thread share.
pub(super) struct Shared {
    pub progress: Arc<Progress>,
    /// Ends blocked collectives when the link ends.
    pub stopper: Stopper,
    pub epoch: Mutex<Option<Epoch>>,
    /// The newest epoch that this process has known, on whatever stream: what is older is of the past.
    pub known: Mutex<Option<Epoch>>,
    /// Milliseconds between heartbeats.
    pub heartbeat: AtomicU64,
    pub rank: OnceLock<u32>,
    /// Why the link ended; set once, before the channels to the compute thread close.
    pub ended: OnceLock<Error>,
    /// The last message is out: the stream may end without anybody's fault.
    pub leaving: AtomicBool,
    /// Absent once the last message is on its way.
    pub outgoing: Mutex<Option<mpsc::Sender<WorkerMessage>>>,
    pub on_end: Box<OnEnd>,
    pub turn: Mutex<Turn>,
    /// Which snapshots are of use.
    pub verdicts: Arc<Verdicts>,
}

/// Which directive was begun last, and whether another may be.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub begun: u64,
    pub halted: bool,
}

impl Shared {
    pub fn end(&self, error: Error) {
        if self.leaving.load(Ordering::SeqCst) || self.ended.set(error).is_err() {
            return;
        }
        self.stopper.stop();
        if let Some(error) = self.ended.get() {
            (self.on_end)(error, self.rank.get().copied());
        }
    }

    pub fn epoch(&self) -> Option<Epoch> {
        *lock(&self.epoch)
    }

    /// Sends without waiting; false where that is not possible.
    pub fn send(&self, body: ToCoordinator) -> bool {
        let message = self.message(body);
        lock(&self.outgoing).as_ref().is_some_and(|outgoing| outgoing.try_send(message).is_ok())
    }

    pub fn message(&self, body: ToCoordinator) -> WorkerMessage {
        WorkerMessage { epoch: self.epoch(), body: Some(body) }
    }
}

fn status(status: &Status) -> Error {
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition | Code::InvalidArgument => {
            Error::Refused(status.message().into())
        }
        _ if status.message().is_empty() => Error::Lost(format!("{:?}", status.code())),
        _ => Error::Lost(format!("the connection broke ({})", status.message())),
    }
}

/// Without the task that has this nobody would end exchanges any more: should it panic, the link ends.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Error::Lost("an internal error ended the connection, please report it".into()));
        }
    }
}

/// A heartbeat each interval for as long as the compute thread holds the other end.
pub(super) async fn beat(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(Duration::from_millis(shared.heartbeat.load(Ordering::Relaxed))).await;
        let heartbeat = shared.progress.heartbeat();
        // A full channel means that other messages are under way: those are signs of life too.
        // The lock keeps a heartbeat from following the last message.
        match &*lock(&shared.outgoing) {
            Some(outgoing) => drop(outgoing.try_send(shared.message(ToCoordinator::Heartbeat(heartbeat)))),
            None => return,
        }
    }
}

/// Reads what the coordinator says until it ends or aborts.
pub(super) async fn attend(
    shared: Arc<Shared>,
    channel: Channel,
    entry: Arc<Entry>,
    reports: mpsc::Receiver<WorkerMessage>,
    to_compute: plain::Sender<FromCoordinator>,
    keys: mpsc::UnboundedSender<BatchKey>,
    close: plain::Sender<()>,
) {
    let _ends = Ends(shared.clone());
    let mut client = dial::training(channel);
    let error = match client.attend(entry.ask(ReceiverStream::new(reports))).await {
        Err(s) => status(&s),
        Ok(response) => {
            entry.admitted(response.metadata());
            let mut stream = response.into_inner();
            loop {
                match stream.message().await {
                    Ok(Some(message)) => match take(&shared, message, &to_compute, &keys) {
                        Ok(()) => {}
                        Err(error) => break error,
                    },
                    Ok(None) => break Error::Lost("it closed the connection".into()),
                    Err(s) => break status(&s),
                }
            }
        }
    };
    shared.end(error);
    let _ = close.send(());
}

fn take(
    shared: &Shared,
    message: CoordinatorMessage,
    to_compute: &plain::Sender<FromCoordinator>,
    keys_wanted: &mpsc::UnboundedSender<BatchKey>,
) -> Result<(), Error> {
    let Some(body) = message.body else { return Ok(()) };
    if let Some(told) = message.epoch {
        let mut known = lock(&shared.known);
        if let Some(known) = known.filter(|known| (told.term, told.generation) < (known.term, known.generation)) {
            tracing::warn!(?told, ?known, "dropped a message of the past");
            return Ok(());
        }
        *known = Some(told);
    }
    match &body {
        FromCoordinator::Abort(abort) => {
            let failure = Box::new(abort.failure.clone().unwrap_or_default());
            return Err(if abort.regroup { Error::Regroup(failure) } else { Error::Aborted(failure) });
        }
        FromCoordinator::Acknowledge(_) => return Ok(()),
        FromCoordinator::Retain(retain) => {
            shared.verdicts.retain(retain.step);
            return Ok(());
        }
        FromCoordinator::Forget(forget) => {
            shared.verdicts.forget(forget.step);
            return Ok(());
        }
        FromCoordinator::Assign(assign) => {
            *lock(&shared.epoch) = message.epoch;
            if shared.rank.set(assign.rank).is_err() {
                return Err(Error::Protocol("assigned a second time".into()));
            }
            let milliseconds = (assign.heartbeat * 1e3) as u64;
            if milliseconds > 0 {
                shared.heartbeat.store(milliseconds, Ordering::Relaxed);
            }
        }
        FromCoordinator::Directive(Directive { body: Some(directive::Body::Finish(_)), .. })
            if shared.rank.get().is_none() =>
        {
            return Err(Error::Dismissed);
        }
        FromCoordinator::Directive(directive) => {
            if shared.rank.get().is_none() {
                return Err(Error::Protocol("directed before Assign".into()));
            }
            for key in keys(directive) {
                // Nobody fetches any more once the link has ended.
                let _ = keys_wanted.send(key);
            }
        }
        FromCoordinator::Halt(_) => {
            let mut turn = lock(&shared.turn);
            turn.halted = true;
            shared.send(ToCoordinator::Halted(Halted { begun: turn.begun }));
            return Ok(());
        }
        FromCoordinator::Go(_) | FromCoordinator::Proceed(_) => {}
    }
    // The compute thread is gone only when the worker is leaving.
    let _ = to_compute.send(body);
    Ok(())
}

/// Asks for the wanted micro-batches, a few ahead, and hands them over as they come.
pub(super) async fn fetch(
    shared: Arc<Shared>,
    channel: Channel,
    entry: Arc<Entry>,
    mut wanted: mpsc::UnboundedReceiver<BatchKey>,
    credit: Arc<Semaphore>,
    to_compute: plain::Sender<MicroBatch>,
) {
    let (requests, outgoing) = mpsc::channel(CREDIT);
    tokio::spawn(async move {
        while let Some(key) = wanted.recv().await {
            let Ok(permit) = credit.acquire().await else { return };
            permit.forget();
            if requests.send(BatchRequest { key: Some(key) }).await.is_err() {
                return;
            }
        }
    });
    let _ends = Ends(shared.clone());
    let mut client = dial::training(channel);
    let outcome = async {
        // Ends with the link where nobody is let in.
        let request = entry.inside(ReceiverStream::new(outgoing)).await;
        let mut stream = client.batches(request).await?.into_inner();
        while let Some(batch) = stream.message().await? {
            if to_compute.send(batch).is_err() {
                break;
            }
        }
        Ok::<_, Status>(())
    };
    let error = match outcome.await {
        Ok(()) => Error::Lost("it closed the data connection".into()),
        Err(s) => status(&s),
    };
    shared.end(error);
}

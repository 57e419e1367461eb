//! The viewer-facing service: the ledger from a cursor on, then live. Each viewer reads at its own pace, what is newest from
//! memory and what is older from the ledger; the loop only says that there is more, and never waits for anyone.

use super::accept::Gate;
use super::ledger::{self, Reader};
use super::steering::{Command, Handle};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch, Semaphore};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unisono_proto::v1::monitor_server::Monitor;
use unisono_proto::v1::{Event, StatusReply, StatusRequest, WatchRequest};

/// Entries read at once.
const PAGE: usize = 64;
/// Entries on their way to one viewer.
const AHEAD: usize = 64;
/// Newest entries that are kept in memory: a viewer that keeps up costs the ledger nothing.
const RECENT: usize = 1024;
/// Viewers that read the ledger at a time; the others wait for their turn.
const READING: usize = 4;
/// Viewers at a time.
const VIEWERS: usize = 4096;

/// What the loop tells viewers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Sequence number of the newest durable entry.
    pub sequence: u64,
    /// No entry will follow.
    pub over: bool,
}

/// The newest entries, in order and without gaps.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Event>>);

impl Recent {
    pub fn extend(&self, events: &[Event]) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recent.extend(events.iter().cloned());
        let surplus = recent.len().saturating_sub(RECENT);
        recent.drain(..surplus);
    }

    /// At most [`PAGE`] entries after `sequence`; `None` where the first of them is not here.
    fn after(&self, sequence: u64) -> Option<Vec<Event>> {
        let recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = recent.front()?.sequence;
        let skipped = usize::try_from((sequence + 1).checked_sub(first)?).ok()?;
        Some(recent.iter().skip(skipped).take(PAGE).cloned().collect())
    }
}

/// Where viewers read.
pub struct Shelf {
    recent: Arc<Recent>,
    reader: Mutex<Reader>,
    reading: Semaphore,
}

impl Shelf {
    pub fn new(recent: Arc<Recent>, reader: Reader) -> Self {
        Shelf { recent, reader: Mutex::new(reader), reading: Semaphore::new(READING) }
    }

    async fn after(self: &Arc<Self>, sequence: u64) -> Result<Vec<Event>, ledger::Error> {
        if let Some(page) = self.recent.after(sequence).filter(|page| !page.is_empty()) {
            return Ok(page);
        }
        let _turn = self.reading.acquire().await;
        let shelf = self.clone();
        let read = move || shelf.reader.lock().unwrap_or_else(PoisonError::into_inner).after(sequence, PAGE);
        // It ends early only with the whole server.
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Ok(Vec::new()))
    }
}

pub struct ViewingService {
    handle: Handle,
    shelf: Arc<Shelf>,
    progress: watch::Receiver<Progress>,
    /// How long a viewer may take nothing of what is there for it.
    patience: Duration,
    viewers: Arc<Semaphore>,
}

impl ViewingService {
    pub fn new(handle: Handle, shelf: Shelf, progress: watch::Receiver<Progress>, patience: Duration) -> Self {
        let (shelf, viewers) = (Arc::new(shelf), Arc::new(Semaphore::new(VIEWERS)));
        ViewingService { handle, shelf, progress, patience, viewers }
    }
}

#[tonic::async_trait]
impl Monitor for ViewingService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let (reply, answer) = oneshot::channel();
        let over = || Status::unavailable("the run is over");
        if !self.handle.send(Command::Status { reply }) {
            return Err(over());
        }
        Ok(Response::new(answer.await.map_err(|_| over())?))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let Ok(place) = self.viewers.clone().try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!(
                "{VIEWERS} viewers look on already, and this run serves no more; end some, or query ledger.sqlite in the run directory"
            )));
        };
        let (sender, events) = mpsc::channel(AHEAD);
        let (shelf, progress, patience) = (self.shelf.clone(), self.progress.clone(), self.patience);
        let gate = request.extensions().get::<Gate>().cloned();
        let after = request.into_inner().after;
        tokio::spawn(async move {
            let _place = place;
            if !follow(after, &shelf, progress, sender, patience).await {
                // Pings are answered by its side of the connection, whoever reads or not: only the end of all of it frees
                // what waits there. Whoever wakes up connects again, and goes on where it was.
                tracing::debug!("a viewer that reads nothing is cut off");
                gate.inspect(Gate::end);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}

/// False where the viewer took nothing for as long as `patience`.
async fn follow(
    mut cursor: u64,
    shelf: &Arc<Shelf>,
    mut progress: watch::Receiver<Progress>,
    sender: mpsc::Sender<Result<Event, Status>>,
    patience: Duration,
) -> bool {
    loop {
        let Progress { sequence, over } = *progress.borrow_and_update();
        while cursor < sequence {
            let page = match shelf.after(cursor).await {
                Ok(page) if !page.is_empty() => page,
                Ok(_) => return true,
                Err(error) => {
                    let told = sender.send(Err(Status::internal(error.to_string())));
                    return timeout(patience, told).await.is_ok();
                }
            };
            for event in page {
                cursor = event.sequence;
                match timeout(patience, sender.send(Ok(event))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return true,
                    Err(_) => return false,
                }
            }
        }
        if over {
            return true;
        }
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return true },
            () = sender.closed() => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_entries_are_in_memory_and_older_ones_are_not() {
        let recent = Recent::default();
        assert_eq!(recent.after(0), None);
        let event = |sequence| Event { sequence, ..Event::default() };
        recent.extend(&(1..=1000).map(event).collect::<Vec<_>>());
        recent.extend(&(1001..=1030).map(event).collect::<Vec<_>>());
        let sequences = |after| recent.after(after).map(|page| page.iter().map(|e| e.sequence).collect::<Vec<_>>());
        assert_eq!(sequences(5), None, "1 to 6 are gone");
        assert_eq!(sequences(6), Some((7..=70).collect()));
        assert_eq!(sequences(1028), Some(vec![1029, 1030]));
        assert_eq!(sequences(1030), Some(vec![]));
    }
}

//! The viewer-facing service: the ledger from a cursor on, then live. Each viewer reads at its own pace from the ledger
//! itself; the loop only says that there is more, and never waits for anyone.

use super::ledger::Reader;
use super::steering::{Command, Handle};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unisono_proto::v1::monitor_server::Monitor;
use unisono_proto::v1::{Event, StatusReply, StatusRequest, WatchRequest};

/// Entries read from the ledger at once.
const PAGE: usize = 256;

/// Entries on their way to one viewer.
const AHEAD: usize = 64;

/// What the loop tells viewers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Sequence number of the newest durable entry.
    pub sequence: u64,
    /// No entry will follow.
    pub over: bool,
}

pub struct ViewingService {
    pub handle: Handle,
    pub reader: Arc<Mutex<Reader>>,
    pub progress: watch::Receiver<Progress>,
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
        let (sender, events) = mpsc::channel(AHEAD);
        let (reader, progress) = (self.reader.clone(), self.progress.clone());
        tokio::spawn(follow(request.into_inner().after, reader, progress, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}

async fn follow(
    mut cursor: u64,
    reader: Arc<Mutex<Reader>>,
    mut progress: watch::Receiver<Progress>,
    sender: mpsc::Sender<Result<Event, Status>>,
) {
    loop {
        let Progress { sequence, over } = *progress.borrow_and_update();
        while cursor < sequence {
            let (reader, after) = (reader.clone(), cursor);
            let page = tokio::task::spawn_blocking(move || {
                reader.lock().expect("nobody panics while holding it").after(after, PAGE)
            });
            let page = match page.await {
                Ok(Ok(page)) if !page.is_empty() => page,
                Ok(Ok(_)) => return,
                Ok(Err(error)) => return drop(sender.send(Err(Status::internal(error.to_string()))).await),
                Err(_) => return,
            };
            for event in page {
                cursor = event.sequence;
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        }
        if over {
            return;
        }
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

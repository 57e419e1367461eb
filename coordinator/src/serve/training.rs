//! The worker-facing service: thin. Messages go to the loop as commands, micro-batches come straight from the work.

use super::access::Carried;
use super::identity::Seal;
use super::steering::{Command, Handle, Ticket};
use super::work::Work;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_stream::Stream;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Extensions, Request, Response, Status, Streaming};
use unisono_proto::dial::{Claims, PASS};
use unisono_proto::v1::training_server::Training;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{BatchRequest, CoordinatorMessage, MicroBatch, Suite, WorkerMessage};

/// A stream that does not begin with Join by then is closed.
const JOIN_WITHIN: Duration = Duration::from_secs(10);

/// Micro-batches packed ahead of the network.
const PACKED_AHEAD: usize = 4;

pub struct TrainingService {
    pub handle: Handle,
    pub work: Work,
    /// Steps up to this one can be dealt: their rows are known.
    pub prepared: Arc<AtomicU64>,
    pub seal: Seal,
}

fn over() -> Status {
    Status::failed_precondition("the run is over; start a new one")
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Training for TrainingService {
    type AttendStream = Outgoing<CoordinatorMessage>;
    type BatchesStream = Outgoing<MicroBatch>;

    async fn attend(&self, request: Request<Streaming<WorkerMessage>>) -> Result<Response<Self::AttendStream>, Status> {
        let (ticket, admitted) = match request.extensions().get::<Carried>() {
            Some(&Carried(Claims { id, uses, .. })) => {
                let (admitted, told) = oneshot::channel();
                (Some(Ticket { id, uses, admitted }), Some(told))
            }
            None => (None, None),
        };
        let mut inbound = request.into_inner();
        let (outbound, mut messages) = mpsc::unbounded_channel();
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let first = tokio::time::timeout(JOIN_WITHIN, inbound.message()).await;
            let Ok(Ok(Some(WorkerMessage { body: Some(Body::Join(join)), .. }))) = first else {
                let told = "the first message of the stream must be Join, within ten seconds";
                // Fails only when the worker is gone.
                outbound.send(Err(Status::invalid_argument(told))).ok();
                return;
            };
            let from = handle.connection();
            if !handle.send(Command::Joined { from, join, outbound: outbound.clone(), ticket }) {
                outbound.send(Err(over())).ok();
                return;
            }
            drop(outbound);
            let reason = loop {
                match inbound.message().await {
                    Ok(Some(message)) => {
                        handle.send(Command::Message { from, message });
                    }
                    Ok(None) => break "ended before its work was done".to_string(),
                    Err(status) => {
                        tracing::debug!(?from, %status, "a worker's stream broke off");
                        break "broke off".to_string();
                    }
                }
            };
            handle.send(Command::Ended { from, reason });
        });
        let mut metadata = MetadataMap::new();
        if let Some(admitted) = admitted {
            if admitted.await.is_err() {
                // Its stream is told why.
                return Err(messages.recv().await.and_then(Result::err).unwrap_or_else(over));
            }
            let mut pass: MetadataValue<_> = self.seal.pass().reveal().parse().expect("names and numbers are ASCII");
            pass.set_sensitive(true);
            metadata.insert(PASS, pass);
        }
        let stream: Self::AttendStream = Box::pin(UnboundedReceiverStream::new(messages));
        Ok(Response::from_parts(metadata, stream, Extensions::new()))
    }

    async fn batches(
        &self,
        request: Request<Streaming<BatchRequest>>,
    ) -> Result<Response<Self::BatchesStream>, Status> {
        if request.extensions().get::<Carried>().is_some() {
            return Err(Status::unauthenticated(
                "micro-batches go to workers that were let in; call Attend first, and come with the pass that it answers with",
            ));
        }
        let mut inbound = request.into_inner();
        let (packed, batches) = mpsc::channel(PACKED_AHEAD);
        let (work, handle, prepared) = (self.work.clone(), self.handle.clone(), self.prepared.clone());
        tokio::spawn(async move {
            loop {
                let key = match inbound.message().await {
                    Ok(Some(BatchRequest { key })) => key.unwrap_or_default(),
                    Ok(None) => break,
                    Err(status) => {
                        // Heard where it still listens: what it sent is too large, or damaged.
                        packed.send(Err(status)).await.ok();
                        break;
                    }
                };
                let none = || {
                    let (suite, step, index) = (key.suite().as_str_name(), key.step, key.micro_batch);
                    Status::not_found(format!("the plan has no micro-batch {index} in step {step} of {suite}"))
                };
                let known = key.suite() != Suite::Train || key.step <= prepared.load(Ordering::Relaxed);
                let making = work.clone();
                // Rows may have to be read, and packing takes a while: not on a thread that others wait for.
                let made = tokio::task::spawn_blocking(move || match known {
                    true => making.micro_batch(key),
                    false => Ok(None),
                });
                let found = match made.await {
                    Ok(Ok(found)) => found.ok_or_else(none),
                    Ok(Err(error)) => {
                        // The data is at fault, and no worker.
                        let (step, message) = (key.step, error.to_string());
                        handle.send(Command::Unprepared { step, message: message.clone() });
                        Err(Status::aborted(message))
                    }
                    Err(_) => Err(none()),
                };
                if packed.send(found).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(batches))))
    }
}

//! A coordinator that does what a test tells it, over plain HTTP/2 on loopback.

use super::*;
use std::pin::Pin;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use unisono_proto::put_u32s;
use unisono_proto::v1::training_server::{Training, TrainingServer};
use unisono_proto::v1::{BatchRequest, CoordinatorMessage, WorkerMessage};

type Outgoing = tokio::sync::mpsc::UnboundedSender<Result<CoordinatorMessage, Status>>;

/// One worker's end, as the coordinator holds it. Dropping it closes the stream.
pub struct Attendant {
    to_worker: Outgoing,
    from_worker: plain::Receiver<WorkerMessage>,
}

impl Attendant {
    pub fn tell(&self, generation: u64, body: FromCoordinator) {
        let epoch = Some(Epoch { term: 1, generation });
        // A worker that has left hears nothing.
        let _ = self.to_worker.send(Ok(CoordinatorMessage { epoch, body: Some(body) }));
    }

    /// Ends the stream with a refusal.
    pub fn refuse(&self, sentence: &str) {
        let _ = self.to_worker.send(Err(Status::failed_precondition(sentence)));
    }

    pub fn direct(&self, id: u64, body: directive::Body) {
        self.tell(1, FromCoordinator::Directive(Directive { id, body: Some(body) }));
    }

    /// The next message of whatever kind; `None` when the worker has closed its half.
    pub fn message(&self) -> Option<WorkerMessage> {
        self.from_worker.recv_timeout(Duration::from_secs(60)).ok()
    }

    /// The next message that is no heartbeat.
    pub fn hear(&self) -> Option<ToCoordinator> {
        std::iter::from_fn(|| self.message())
            .filter_map(|message| message.body)
            .find(|body| !matches!(body, ToCoordinator::Heartbeat(_)))
    }
}

type Source = Arc<dyn Fn(&BatchKey) -> Batch + Send + Sync>;

struct Service {
    attendants: Mutex<plain::Sender<Attendant>>,
    batches: Source,
}

#[tonic::async_trait]
impl Training for Service {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;
    type BatchesStream = Pin<Box<dyn Stream<Item = Result<MicroBatch, Status>> + Send>>;

    async fn attend(&self, request: Request<Streaming<WorkerMessage>>) -> Result<Response<Self::AttendStream>, Status> {
        let (to_worker, outgoing) = tokio::sync::mpsc::unbounded_channel();
        let (heard, from_worker) = plain::channel();
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                let _ = heard.send(message);
            }
        });
        lock(&self.attendants).send(Attendant { to_worker, from_worker }).unwrap();
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing))))
    }

    async fn batches(
        &self,
        request: Request<Streaming<BatchRequest>>,
    ) -> Result<Response<Self::BatchesStream>, Status> {
        let source = self.batches.clone();
        let answer = move |request: Result<BatchRequest, Status>| {
            let key = request?.key.expect("a key");
            let batch = source(&key);
            let bytes = |values: &[u32]| {
                let mut out = Vec::new();
                put_u32s(&mut out, values);
                out.into()
            };
            let (tokens, targets) = (bytes(&batch.tokens), bytes(&batch.targets));
            Ok(MicroBatch { key: Some(key), tokens, targets, starts: bytes(&batch.starts) })
        };
        Ok(Response::new(Box::pin(request.into_inner().map(answer))))
    }
}

/// A coordinator on a port of its own.
pub struct Fake {
    address: String,
    attendants: plain::Receiver<Attendant>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub fn start(batches: impl Fn(&BatchKey) -> Batch + Send + Sync + 'static) -> Self {
        let runtime = runtime().unwrap();
        let (sender, attendants) = plain::channel();
        let service = Service { attendants: Mutex::new(sender), batches: Arc::new(batches) };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder().add_service(TrainingServer::new(service));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Fake { address, attendants, _runtime: runtime }
    }

    /// A worker's link to this coordinator.
    pub fn link(&self, join: Join, on_end: impl Fn(&Error, Option<u32>) + Send + Sync + 'static) -> Link {
        let runtime = runtime().unwrap();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let connections = runtime.block_on(async {
            let (control, data) = (endpoint.connect().await.unwrap(), endpoint.connect().await.unwrap());
            Connections { control, data, token: None }
        });
        Link::over(runtime, connections, join, None, on_end)
    }

    /// The next worker that attends, and its Join.
    pub fn welcome(&self) -> (Attendant, Join) {
        let attendant = self.attendants.recv_timeout(Duration::from_secs(60)).expect("a worker attends");
        match attendant.hear() {
            Some(ToCoordinator::Join(join)) => (attendant, join),
            other => panic!("the first message is Join, not {other:?}"),
        }
    }
}

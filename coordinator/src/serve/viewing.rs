//! The viewer-facing service: the ledger from a cursor on, then live. Each viewer reads at its own pace, what is newest from
//! memory and what is older from the ledger; the loop only says that there is more, and never waits for anyone.
//!
//! What viewers get is made once for all of them ([`Audience`]), so the bytes of a page go out as they are, and not as
//! messages that tonic would encode for each.

use super::accept::Gate;
use super::audience::{Audience, Next};
use super::ledger::{self, Reader};
use super::pages::Page;
use super::steering::{Command, Handle};
use bytes::Bytes;
use http_body::Frame;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use tokio::sync::{oneshot, Mutex, OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tonic::codec::Codec;
use tonic::codegen::http::{self, header, HeaderMap, HeaderValue};
use tonic::metadata::GRPC_CONTENT_TYPE;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;
use unisono_proto::v1::monitor_server::SERVICE_NAME;
use unisono_proto::v1::{Event, StatusReply, StatusRequest, WatchRequest};
use unisono_proto::MAX_MESSAGE_BYTES;

/// Entries read from the ledger at once.
const READ: usize = 64;
/// Viewers at a time.
const VIEWERS: usize = 4096;

/// Entries that are not in memory any more. Viewers take turns at it.
#[derive(Clone)]
pub struct Shelf(Arc<Mutex<Reader>>);

impl Shelf {
    pub fn new(reader: Reader) -> Self {
        Shelf(Arc::new(Mutex::new(reader)))
    }

    async fn after(self, sequence: u64) -> Result<Option<Page>, ledger::Error> {
        let reader = self.0.lock_owned().await;
        let read = move || Ok(Page::of(&reader.after(sequence, READ)?));
        // It ends early only with the whole server.
        tokio::task::spawn_blocking(read).await.unwrap_or(Ok(None))
    }
}

#[derive(Clone)]
pub struct ViewingService {
    handle: Handle,
    audience: Arc<Audience>,
    shelf: Shelf,
    places: Arc<Semaphore>,
}

impl ViewingService {
    pub fn new(handle: Handle, audience: Arc<Audience>, shelf: Shelf) -> Self {
        ViewingService { handle, audience, shelf, places: Arc::new(Semaphore::new(VIEWERS)) }
    }

    async fn watch(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let gate = request.extensions().get::<Gate>().cloned();
        let decoder = ProstCodec::<Event, WatchRequest>::default().decoder();
        let mut messages = Streaming::new_request(decoder, request.into_body(), None, Some(MAX_MESSAGE_BYTES));
        let asked = messages.message().await?;
        let WatchRequest { after } = asked.ok_or_else(|| Status::invalid_argument("the request has no message"))?;
        let Ok(place) = self.places.try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!(
                "{VIEWERS} viewers look on already, and this run serves no more; end some, or query ledger.sqlite in the run directory"
            )));
        };
        let (name, reading) = (self.audience.enter(gate), None);
        let Self { audience, shelf, .. } = self;
        let watching = Watching { name, cursor: after, audience, shelf, reading, ended: false, _place: place };
        let mut response = http::Response::new(Body::new(watching));
        response.headers_mut().insert(header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
        Ok(response)
    }
}

impl Service<http::Request<Body>> for ViewingService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let method = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(SERVICE_NAME));
            Ok(match method {
                Some("/Watch") => service.watch(request).await.unwrap_or_else(Status::into_http),
                Some("/Status") => {
                    let grpc = Grpc::new(ProstCodec::<StatusReply, StatusRequest>::default());
                    let mut grpc = grpc.apply_max_message_size_config(Some(MAX_MESSAGE_BYTES), Some(MAX_MESSAGE_BYTES));
                    grpc.unary(Ask(service.handle), request).await
                }
                _ => Status::unimplemented("the viewer-facing service has Status and Watch").into_http(),
            })
        })
    }
}

impl NamedService for ViewingService {
    const NAME: &'static str = SERVICE_NAME;
}

/// Asks the loop where the run is.
struct Ask(Handle);

impl UnaryService<StatusRequest> for Ask {
    type Response = StatusReply;
    type Future = Pin<Box<dyn Future<Output = Result<Response<StatusReply>, Status>> + Send>>;

    fn call(&mut self, _: Request<StatusRequest>) -> Self::Future {
        let handle = self.0.clone();
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            let over = || Status::unavailable("the run is over");
            if !handle.send(Command::Status { reply }) {
                return Err(over());
            }
            Ok(Response::new(answer.await.map_err(|_| over())?))
        })
    }
}

type Reading = Pin<Box<dyn Future<Output = Result<Option<Page>, ledger::Error>> + Send>>;

/// What one viewer is sent. It is asked for more when the one before is on its way.
struct Watching {
    name: u64,
    cursor: u64,
    audience: Arc<Audience>,
    shelf: Shelf,
    reading: Option<Reading>,
    ended: bool,
    _place: OwnedSemaphorePermit,
}

impl Watching {
    fn send(&mut self, page: Page) -> Frame<Bytes> {
        self.cursor = page.last;
        Frame::data(page.bytes)
    }

    /// The last words.
    fn end(&mut self, status: Option<Status>) -> Frame<Bytes> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        match status.map(|status| status.add_header(&mut trailers)) {
            Some(Ok(())) => {}
            // Its sentence cannot be a header.
            Some(Err(_)) => drop(trailers.insert("grpc-status", HeaderValue::from_static("13"))),
            None => drop(trailers.insert("grpc-status", HeaderValue::from_static("0"))),
        }
        Frame::trailers(trailers)
    }
}

impl http_body::Body for Watching {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let watching = &mut *self;
        if watching.ended {
            return Poll::Ready(None);
        }
        loop {
            if let Some(reading) = &mut watching.reading {
                let read = ready!(reading.as_mut().poll(context));
                watching.reading = None;
                watching.audience.sent(watching.name);
                return Poll::Ready(Some(Ok(match read {
                    Ok(Some(page)) => watching.send(page),
                    Ok(None) => watching.end(None),
                    Err(error) => watching.end(Some(Status::internal(error.to_string()))),
                })));
            }
            match watching.audience.next(watching.name, watching.cursor, context.waker()) {
                Next::Page(page) => return Poll::Ready(Some(Ok(watching.send(page)))),
                Next::InTheLedger => watching.reading = Some(Box::pin(watching.shelf.clone().after(watching.cursor))),
                Next::Later => return Poll::Pending,
                Next::Over => return Poll::Ready(Some(Ok(watching.end(None)))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.audience.leave(self.name);
    }
}

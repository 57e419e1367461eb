//! From the listening socket to TLS streams: each handshake in its own task, so that a slow one delays nobody. A connection
//! can be ended from within: one on which nobody proves in time that he may call, and one whose other end takes nothing.

use rustls::ServerConfig;
use socket2::{SockRef, TcpKeepalive};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A connection without a call that may be made is ended by then.
const ADMISSION: Duration = Duration::from_secs(10);

/// An idle connection is probed that often, and given up after as many probes without an answer.
const PROBE: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;

/// Handshakes at a time, and of these with one address.
const HANDSHAKES: usize = 256;
const HANDSHAKES_EACH: usize = 64;

/// Ends a connection, whatever its other end does. Cheap to clone; every call carries that of its connection.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    end: Mutex<Option<oneshot::Sender<()>>>,
    admitted: AtomicBool,
}

impl Gate {
    pub fn new() -> (Self, oneshot::Receiver<()>) {
        let (end, ended) = oneshot::channel();
        (Gate(Arc::new(Inner { end: Mutex::new(Some(end)), admitted: AtomicBool::new(false) })), ended)
    }

    /// A call came that may be made.
    pub fn admit(&self) {
        self.0.admitted.store(true, Ordering::Relaxed);
    }

    pub fn end(&self) {
        let end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Fails only when the connection is gone.
        end.and_then(|end| end.send(()).ok());
    }
}

/// A connection with its gate.
pub struct Guarded {
    inner: TlsStream<TcpStream>,
    gate: Gate,
    /// None once it was ended.
    ended: Option<oneshot::Receiver<()>>,
}

impl Guarded {
    fn new(inner: TlsStream<TcpStream>) -> Self {
        let (gate, ended) = Gate::new();
        let waiting = gate.clone();
        tokio::spawn(async move {
            tokio::time::sleep(ADMISSION).await;
            if !waiting.0.admitted.load(Ordering::Relaxed) {
                tracing::debug!("a connection without an authorized call is ended");
                waiting.end();
            }
        });
        Guarded { inner, gate, ended: Some(ended) }
    }

    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.ended.as_mut().is_some_and(|ended| Pin::new(ended).poll(context).is_ready()) {
            self.ended = None;
        }
        match self.ended {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl Connected for Guarded {
    type ConnectInfo = Gate;

    fn connect_info(&self) -> Gate {
        self.gate.clone()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It would wait for a reader to say farewell to.
        if self.ended.is_none() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Places for handshakes: all together, and for each address.
#[derive(Default)]
struct Places(BTreeMap<IpAddr, Arc<Semaphore>>);

impl Places {
    fn of(&mut self, address: IpAddr) -> Arc<Semaphore> {
        let all = |places: &Arc<Semaphore>| places.available_permits() == HANDSHAKES_EACH;
        if self.0.len() > HANDSHAKES {
            self.0.retain(|_, places| !all(places) || Arc::strong_count(places) > 1);
        }
        self.0.entry(address).or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES_EACH))).clone()
    }
}

/// Connections that have proved to speak TLS 1.3, for as long as the returned task runs.
pub fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
) -> (ReceiverStream<io::Result<Guarded>>, tokio::task::JoinHandle<()>) {
    let (sender, receiver) = mpsc::channel(64);
    let acceptor = TlsAcceptor::from(config);
    let permits = Arc::new(Semaphore::new(HANDSHAKES));
    let task = tokio::spawn(async move {
        let mut places = Places::default();
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: those in use must close before the next try can succeed.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            let (own, all) = (places.of(peer.ip()), permits.clone());
            tokio::spawn(async move {
                // Whoever holds all places of one address holds up nobody at another.
                let Ok(Some(_permits)) = timeout(HANDSHAKE, place(own, all)).await else {
                    tracing::debug!("too many handshakes at a time");
                    return;
                };
                if let Err(error) = stream.set_nodelay(true).and_then(|()| keep_alive(&stream)) {
                    tracing::debug!(%error, "a connection ended at once");
                    return;
                }
                match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    // Nobody listens any more when the server has shut down.
                    Ok(Ok(stream)) => drop(sender.send(Ok(Guarded::new(stream))).await),
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake took too long"),
                }
            });
        }
    });
    (ReceiverStream::new(receiver), task)
}

/// The kernel finds out by itself who is gone, while a thousand idle connections cost this process nothing.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE).with_interval(PROBE).with_retries(PROBES))?;
    socket.set_tcp_user_timeout(Some(PROBE * (PROBES + 1)))
}

async fn place(own: Arc<Semaphore>, all: Arc<Semaphore>) -> Option<[OwnedSemaphorePermit; 2]> {
    Some([own.acquire_owned().await.ok()?, all.acquire_owned().await.ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_takes_all_places_of_one_address_holds_up_nobody_at_another() {
        let (mut places, all) = (Places::default(), Arc::new(Semaphore::new(HANDSHAKES)));
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let soon = Duration::from_millis(20);
        let mut held = Vec::new();
        for _ in 0..HANDSHAKES_EACH {
            held.push(place(places.of(address(1)), all.clone()).await.unwrap());
        }
        assert!(
            timeout(soon, place(places.of(address(1)), all.clone())).await.is_err(),
            "one more of the same address"
        );
        held.push(timeout(soon, place(places.of(address(2)), all.clone())).await.unwrap().unwrap());
        // Its places are free again when a handshake is over.
        drop(held.remove(0));
        held.push(timeout(soon, place(places.of(address(1)), all.clone())).await.unwrap().unwrap());
        // All addresses together have no more than so many.
        for last in 2..5 {
            while places.of(address(last)).available_permits() > 0 && all.available_permits() > 0 {
                held.push(place(places.of(address(last)), all.clone()).await.unwrap());
            }
        }
        assert_eq!(held.len(), HANDSHAKES);
        assert!(timeout(soon, place(places.of(address(9)), all.clone())).await.is_err());
        // Addresses that are gone are forgotten: nobody fills the memory with them.
        drop(held);
        (0..=255).for_each(|last| drop(places.of(address(last))));
        (0..=255).for_each(|last| drop(places.of(IpAddr::from([10, 0, 1, last]))));
        assert!(places.0.len() <= HANDSHAKES + 1, "{}", places.0.len());
    }
}

//! The collective over plain TCP: one connection between each pair of ranks. An operation is `world - 1` rounds; in round
//! `r` every rank sends to `rank + r` from a thread of its own and receives from `rank - r`, so no exchange can deadlock.

use super::bytes::bytes_mut;
use super::handshake::{Failure, Secret};
use super::piece::{self, PIECE};
use super::{Collective, Error};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tch::Tensor;

/// Which ranks form a generation and how they know each other.
#[derive(Clone)]
pub struct Membership {
    pub rank: usize,
    /// host:port of every rank.
    pub addresses: Vec<String>,
    pub key: [u8; 32],
    pub term: u64,
    pub generation: u64,
    /// A peer that is silent for longer is given up.
    pub timeout: Duration,
}

/// Ends every exchange of a mesh, from any thread.
#[derive(Debug, Clone, Default)]
pub struct Stopper(Arc<Mutex<Stopping>>);

#[derive(Debug, Default)]
struct Stopping {
    stopped: bool,
    streams: Vec<TcpStream>,
}

impl Stopper {
    /// Blocked exchanges return [`Error::Stopped`]; so do later ones.
    pub fn stop(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.stopped = true;
        for stream in inner.streams.drain(..) {
            // A peer may have closed it already: nothing is left to stop then.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn stopped(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// Stops this stream too; an error where everything has been stopped before.
    pub fn watch(&self, stream: &TcpStream) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.stopped {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        inner.streams.push(stream.try_clone()?);
        Ok(())
    }
}

/// Bytes of the buffers of a mesh: one piece on its way out, one on its way in.
pub const BUFFERS: usize = 2 * (1 + piece::MAX_BYTES);

/// A full mesh of authenticated connections.
pub struct Mesh {
    rank: usize,
    /// In rank order; absent for the own rank.
    peers: Vec<Option<TcpStream>>,
    timeout: Duration,
    stopper: Stopper,
    /// Buffers of the sending and the receiving side, kept between operations.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

/// A connection that has not introduced itself after this long makes room for others.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// The host of `host` or `host:port`, and the port where it has one.
pub fn host_and_port(address: &str) -> (&str, Option<&str>) {
    match address.rsplit_once(':') {
        // An IPv6 address without brackets has colons of its own.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (address, None),
    }
}

/// Listens for peers on `host`, which may name a port, else on any; returns the address to announce.
pub fn listen(host: &str) -> Result<(TcpListener, String), Error> {
    let failed = |source| Error::Listen { address: host.to_owned(), source };
    let (name, port) = host_and_port(host);
    let unknown = |_| failed(std::io::Error::other("that is not a port"));
    let port: u16 = port.map_or(Ok(0), str::parse).map_err(unknown)?;
    let listener = TcpListener::bind((name.trim_matches(['[', ']']), port)).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address.to_string()))
}

impl Mesh {
    /// Meets all peers: calls the lower ranks, is called by the higher ones.
    pub fn meet(listener: &TcpListener, membership: &Membership, stopper: &Stopper) -> Result<Self, Error> {
        let world = membership.addresses.len();
        let mut peers: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        let (lower, higher) = peers.split_at_mut(membership.rank);
        std::thread::scope(|scope| {
            let callers = scope.spawn(|| accept(listener, membership, stopper, &mut higher[1..]));
            let called = lower
                .iter_mut()
                .enumerate()
                .try_for_each(|(peer, slot)| connect(membership, stopper, peer).map(|stream| *slot = Some(stream)));
            let accepted = callers.join().expect("accepting does not panic");
            called.and(accepted)
        })?;
        Ok(Mesh {
            rank: membership.rank,
            peers,
            timeout: membership.timeout,
            stopper: stopper.clone(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
        })
    }

    /// Ends this mesh's exchanges.
    pub fn stopper(&self) -> &Stopper {
        &self.stopper
    }

    /// Runs one round: `send` to one peer on a thread of its own while `receive` listens to another.
    fn round<S, R>(&self, round: usize, what: Transfer, send: S, receive: R) -> Result<(), Error>
    where
        S: FnOnce(usize, &TcpStream) -> io::Result<()> + Send,
        R: FnOnce(usize, &TcpStream) -> Result<(), Fault>,
    {
        let (to, from) = self.partners(round);
        let stream = |peer: usize| self.peers[peer].as_ref().expect("a connection to every other rank");
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(to, stream(to)).map_err(|e| self.error(to, what, Fault::Io(e))));
            let received = receive(from, stream(from)).map_err(|fault| self.error(from, what, fault));
            if received.is_err() {
                // The own sender may wait for a peer that waits for us.
                let _ = stream(to).shutdown(Shutdown::Both);
            }
            let sent = sender.join().expect("sending does not panic");
            received.and(sent)
        })
    }

    /// Whom this rank sends to and whom it hears in a round.
    fn partners(&self, round: usize) -> (usize, usize) {
        let world = self.peers.len();
        ((self.rank + round) % world, (self.rank + world - round) % world)
    }

    fn error(&self, peer: usize, what: Transfer, fault: Fault) -> Error {
        let Transfer { operation, bytes } = what;
        match fault {
            _ if self.stopper.stopped() => Error::Stopped,
            Fault::Protocol { expected, found } => Error::Protocol { peer, operation, expected, found },
            Fault::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Error::Silent { peer, operation, bytes, seconds: self.timeout.as_secs_f64() }
            }
            Fault::Io(source) => Error::Lost { peer, operation, bytes, source },
        }
    }
}

/// What an exchange is about, for errors.
#[derive(Clone, Copy)]
struct Transfer {
    operation: &'static str,
    bytes: usize,
}

enum Fault {
    Io(io::Error),
    Protocol { expected: String, found: String },
}

impl Fault {
    fn width(found: usize) -> Self {
        Fault::Protocol { expected: "a width of a sum".into(), found: format!("{found} bytes") }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Io(error)
    }
}

/// Opens every transfer, so that workers out of step notice.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(u8)]
enum Tag {
    Sums = 1,
    Parameters = 2,
    Bytes = 3,
}

fn header(tag: Tag, length: usize) -> [u8; 9] {
    let mut header = [tag as u8; 9];
    header[1..].copy_from_slice(&(length as u64).to_le_bytes());
    header
}

fn read_header(mut stream: &TcpStream, tag: Tag) -> Result<usize, Fault> {
    let mut header = [0; 9];
    stream.read_exact(&mut header)?;
    if header[0] != tag as u8 {
        let (expected, found) = (format!("{tag:?}"), format!("message type {}", header[0]));
        return Err(Fault::Protocol { expected, found });
    }
    Ok(u64::from_le_bytes(header[1..].try_into().expect("8 bytes")) as usize)
}

fn expect_header(stream: &TcpStream, tag: Tag, length: usize) -> Result<(), Fault> {
    let found = read_header(stream, tag)?;
    if found != length {
        return Err(Fault::Protocol { expected: format!("{length} of {tag:?}"), found: found.to_string() });
    }
    Ok(())
}

/// Splits `all` at the borders of `owners`, which tile it.
fn split<'a, T>(mut all: &'a mut [T], owners: &[Range<usize>], width: usize) -> Vec<&'a mut [T]> {
    assert_eq!(owners.iter().map(|r| r.len()).sum::<usize>() * width, all.len(), "owners tile the bucket");
    let mut parts = Vec::with_capacity(owners.len());
    for range in owners {
        let (part, rest) = all.split_at_mut(range.len() * width);
        parts.push(part);
        all = rest;
    }
    parts
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.peers.len()
    }

    fn reduce_scatter(&mut self, sums: &mut [i64], owners: &[Range<usize>]) -> Result<(), Error> {
        let what = Transfer { operation: "reduce", bytes: size_of_val(sums) };
        let mut parts = split(sums, owners, 1);
        let own = std::mem::take(&mut parts[self.rank]);
        let (mut outgoing, mut incoming) = (std::mem::take(&mut self.outgoing), std::mem::take(&mut self.incoming));
        let outcome = (1..self.world()).try_for_each(|round| {
            let theirs = std::mem::take(&mut parts[self.partners(round).0]);
            let send = |_, stream: &TcpStream| send_sums(stream, theirs, &mut outgoing);
            let receive = |_, stream: &TcpStream| add_sums(stream, own, &mut incoming);
            self.round(round, what, send, receive)
        });
        (self.outgoing, self.incoming) = (outgoing, incoming);
        outcome
    }

    fn all_gather(&mut self, bucket: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        let (bytes, width) = bytes_mut(bucket);
        let what = Transfer { operation: "gather", bytes: bytes.len() };
        let mut parts = split(bytes, owners, width);
        let own = std::mem::take(&mut parts[self.rank]);
        let own: &[u8] = own;
        (1..self.world()).try_for_each(|round| {
            let theirs = std::mem::take(&mut parts[self.partners(round).1]);
            let send = |_, mut stream: &TcpStream| {
                stream.write_all(&header(Tag::Parameters, own.len()))?;
                stream.write_all(own)
            };
            let receive = |_, mut stream: &TcpStream| {
                expect_header(stream, Tag::Parameters, theirs.len())?;
                Ok(stream.read_exact(theirs)?)
            };
            self.round(round, what, send, receive)
        })
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        /// Nothing small is longer than this; a peer cannot make us allocate more.
        const MOST: usize = 256 << 20;
        let what = Transfer { operation: "exchange", bytes: mine.len() };
        let mut all = vec![Vec::new(); self.world()];
        all[self.rank] = mine.to_vec();
        for round in 1..self.world() {
            let from = self.partners(round).1;
            let slot = &mut all[from];
            let send = |_, mut stream: &TcpStream| stream.write_all(&[&header(Tag::Bytes, mine.len()), mine].concat());
            let receive = |_, mut stream: &TcpStream| {
                let length = read_header(stream, Tag::Bytes)?;
                if length > MOST {
                    return Err(Fault::Protocol {
                        expected: format!("at most {MOST} bytes"),
                        found: length.to_string(),
                    });
                }
                slot.resize(length, 0);
                Ok(stream.read_exact(slot)?)
            };
            self.round(round, what, send, receive)?;
        }
        Ok(all)
    }
}

/// Sends a peer's sums piece by piece.
fn send_sums(mut stream: &TcpStream, sums: &[i64], wire: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(&header(Tag::Sums, sums.len()))?;
    for piece in sums.chunks(PIECE) {
        piece::pack(piece, wire);
        stream.write_all(wire)?;
    }
    Ok(())
}

/// Adds a peer's sums to the own ones as they arrive.
fn add_sums(mut stream: &TcpStream, own: &mut [i64], wire: &mut Vec<u8>) -> Result<(), Fault> {
    expect_header(stream, Tag::Sums, own.len())?;
    wire.resize(piece::MAX_BYTES, 0);
    for piece in own.chunks_mut(PIECE) {
        let mut width = [0];
        stream.read_exact(&mut width)?;
        let width = usize::from(width[0]);
        let body = width * piece.len();
        if body > wire.len() {
            return Err(Fault::width(width));
        }
        stream.read_exact(&mut wire[..body])?;
        piece::unpack_add(width, &wire[..body], piece).ok_or_else(|| Fault::width(width))?;
    }
    Ok(())
}

fn prepare(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

fn connect(membership: &Membership, stopper: &Stopper, peer: usize) -> Result<TcpStream, Error> {
    let address = &membership.addresses[peer];
    let unreachable = |source| Error::Unreachable { peer, address: address.clone(), source };
    let dial = || -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for candidate in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&candidate, membership.timeout) {
                Ok(stream) => {
                    prepare(&stream, membership.timeout)?;
                    stopper.watch(&stream)?;
                    return Ok(stream);
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    };
    let stream = dial().map_err(unreachable)?;
    match membership.secret().connect(&stream, membership.rank, peer) {
        Ok(()) => Ok(stream),
        Err(_) if stopper.stopped() => Err(Error::Stopped),
        Err(Failure::Refused(reason)) => Err(Error::Refused { peer, address: address.clone(), reason: reason.into() }),
        Err(Failure::Io(e)) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err(Error::Missing { peer, seconds: membership.timeout.as_secs_f64() })
        }
        Err(Failure::Io(e)) => {
            Err(Error::Refused { peer, address: address.clone(), reason: format!("it hung up ({e})") })
        }
    }
}

/// Waits for every higher rank to call. Strangers are turned away and cost nobody else's place.
fn accept(
    listener: &TcpListener,
    membership: &Membership,
    stopper: &Stopper,
    slots: &mut [Option<TcpStream>],
) -> Result<(), Error> {
    let first = membership.rank + 1;
    let deadline = Instant::now() + membership.timeout;
    let failed = |source| Error::Listen { address: membership.addresses[membership.rank].clone(), source };
    listener.set_nonblocking(true).map_err(failed)?;
    let mut calls = 0u64;
    std::thread::scope(|scope| {
        let (sender, introduced) = std::sync::mpsc::channel();
        // Callers who have not introduced themselves yet.
        let mut callers: BTreeMap<u64, TcpStream> = BTreeMap::new();
        let mut gather = || loop {
            while let Ok((caller, rank)) = introduced.try_recv() {
                let stream = callers.remove(&caller);
                let slot = usize::checked_sub(rank, first).and_then(|i| slots.get_mut(i));
                if let Some(empty @ None) = slot {
                    *empty = stream;
                }
            }
            let Some(missing) = slots.iter().position(Option::is_none) else { return Ok(()) };
            if stopper.stopped() {
                return Err(Error::Stopped);
            }
            if Instant::now() >= deadline {
                return Err(Error::Missing { peer: first + missing, seconds: membership.timeout.as_secs_f64() });
            }
            match listener.accept() {
                Ok((stream, address)) => {
                    let (sender, caller) = (sender.clone(), calls);
                    calls += 1;
                    callers.insert(caller, stream.try_clone().map_err(failed)?);
                    scope.spawn(move || match introduce(&stream, membership, stopper) {
                        // The receiver is gone once everybody is there.
                        Ok(rank) => drop(sender.send((caller, rank))),
                        Err(failure) => tracing::warn!(%address, ?failure, "turned a connection away"),
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => return Err(failed(e)),
            }
        };
        let outcome = gather();
        // The scope waits for introductions under way: those that are left have nobody to meet.
        callers.values().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        outcome
    })
}

fn introduce(stream: &TcpStream, membership: &Membership, stopper: &Stopper) -> Result<usize, Failure> {
    stream.set_nonblocking(false)?;
    prepare(stream, membership.timeout.min(INTRODUCTION))?;
    stopper.watch(stream)?;
    let rank = membership.secret().accept(stream, membership.rank)?;
    prepare(stream, membership.timeout)?;
    Ok(rank)
}

impl Membership {
    fn secret(&self) -> Secret {
        Secret { key: self.key, term: self.term, generation: self.generation }
    }
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
pub mod tests;

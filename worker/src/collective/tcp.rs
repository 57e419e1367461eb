//! The collective over plain TCP: one connection between each pair of ranks. An operation is `world - 1` rounds; in round
//! `r` every rank sends to `rank + r` from a thread of its own and receives from `rank - r`, so no exchange can deadlock.
//! Between ranks on one machine only word goes over the connection of what can be read from memory.

use super::bytes::bytes_mut;
use super::line::{header, Fault, Line, Tag};
use super::meeting;
use super::neighbour::{self, Lease, Neighbour};
use super::piece::{self, PIECE};
use super::pulse::Pulse;
use super::{handshake, Collective, Error};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tch::Tensor;

pub use super::meeting::{host_and_port, listen, Membership};

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
    /// Who is silent for longer is given up, unless somebody else judges.
    patience: Option<Duration>,
    /// What exchanges wait for.
    pulse: Pulse,
    stopper: Stopper,
    /// Peers on this machine, in rank order, and what is lent to them.
    neighbours: Vec<Option<Neighbour>>,
    lease: Lease,
    /// Buffers of the sending and the receiving side, kept between operations.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    lent: Vec<i64>,
}

impl Mesh {
    /// Meets all peers: calls the lower ranks, is called by the higher ones.
    pub fn meet(listener: &TcpListener, membership: &Membership, stopper: &Stopper) -> Result<Self, Error> {
        let (world, peers) = (membership.addresses.len(), meeting::meet(listener, membership, stopper)?);
        let first = handshake::nonce().map_err(|source| Error::Listen { address: "/dev/urandom".into(), source })?;
        let first = u64::from_le_bytes(first[..8].try_into().expect("32 bytes"));
        let mut mesh = Mesh {
            rank: membership.rank,
            neighbours: vec![None; world],
            peers,
            patience: Some(membership.timeout),
            pulse: Pulse::default(),
            stopper: stopper.clone(),
            lease: Lease::new(first),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            lent: Vec::new(),
        };
        mesh.greet(membership.lends)?;
        Ok(mesh)
    }

    /// Finds out which peers are on this machine and can read from here, and be read from.
    fn greet(&mut self, lends: bool) -> Result<(), Error> {
        const GREETING: usize = 36;
        if lends {
            neighbour::admit_siblings();
        }
        let (machine, pid) = (if lends { neighbour::machine() } else { [0; 16] }, std::process::id());
        let loan = self.lease.lend();
        let greeting = [&machine[..], &pid.to_le_bytes(), &self.lease.address().to_le_bytes(), &loan.1.to_le_bytes()];
        let greeting = greeting.concat();
        let what = Transfer { operation: "greet", bytes: GREETING };
        let mesh = &*self;
        let all = || mesh.peers.iter().enumerate().filter_map(|(peer, stream)| Some((peer, stream.as_ref()?)));
        let failed = |peer: usize, e: io::Error| mesh.error(peer, what, Fault::Io(e));
        for (peer, mut stream) in all() {
            stream.write_all(&greeting).map_err(|e| failed(peer, e))?;
        }
        let mut found = Vec::new();
        for (peer, mut stream) in all() {
            let mut theirs = [0; GREETING];
            stream.read_exact(&mut theirs).map_err(|e| failed(peer, e))?;
            let word = |at: usize| u64::from_le_bytes(theirs[at..at + 8].try_into().expect("8 bytes"));
            let pid = u32::from_le_bytes(theirs[16..20].try_into().expect("4 bytes"));
            let neighbour = Neighbour { pid, lease: word(20) };
            let can = lends && theirs[..16] == machine && neighbour.vouches_for(word(28)).unwrap_or(false);
            stream.write_all(&[u8::from(can)]).map_err(|e| failed(peer, e))?;
            found.push(can.then_some(neighbour));
        }
        let mut neighbours = vec![None; self.peers.len()];
        for ((peer, mut stream), neighbour) in all().zip(found) {
            let mut can = [0];
            stream.read_exact(&mut can).map_err(|e| failed(peer, e))?;
            neighbours[peer] = neighbour.filter(|_| can == [1]);
        }
        drop(loan);
        tracing::debug!(ranks = ?neighbours.iter().flatten().count(), "read from each other's memory");
        self.neighbours = neighbours;
        Ok(())
    }

    /// Ends this mesh's exchanges.
    pub fn stopper(&self) -> &Stopper {
        &self.stopper
    }

    /// A peer that has hung up while nothing was due from it.
    pub fn lost(&self) -> Option<usize> {
        let gone = |stream: &TcpStream| {
            // Nobody else uses the connections meanwhile: `&mut self` of the exchanges sees to it.
            let looked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
            let back = stream.set_nonblocking(false);
            back.is_err()
                || !matches!(&looked, Ok(1..)) && !matches!(&looked, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
        };
        self.peers.iter().position(|peer| peer.as_ref().is_some_and(gone))
    }

    /// Runs one round: one peer is sent the `offer`, by `send` on a thread of its own unless it reads it from here, while
    /// `receive` listens to another.
    fn round<S, R>(&self, round: usize, what: Transfer, offer: Option<Offer>, send: S, receive: R) -> Result<(), Error>
    where
        S: FnOnce(Line<'_>) -> io::Result<()> + Send,
        R: FnOnce(Line<'_>) -> Result<(), Fault>,
    {
        let (to, from) = self.partners(round);
        let stream = |peer: usize| self.peers[peer].as_ref().expect("a connection to every other rank");
        let line = |peer: usize| Line { stream: stream(peer), peer, pulse: &self.pulse };
        self.pulse.concerns(what.operation, what.bytes);
        if let (Some(offer), Some(_)) = (offer, self.neighbours[to]) {
            let loan = self.lease.lend();
            let mut borrower = line(to);
            let failed = |e| self.error(to, what, Fault::Io(e));
            borrower.write_all(&offer.header(loan.1)).map_err(failed)?;
            receive(line(from)).map_err(|fault| self.error(from, what, fault))?;
            // What is lent must not change before it was read.
            let mut receipt = [0];
            borrower.read_exact(&mut receipt).map_err(failed)?;
            let out_of_step =
                |[found]: [u8; 1]| Fault::Protocol { expected: "a receipt".into(), found: found.to_string() };
            return if receipt == [1] { Ok(()) } else { Err(self.error(to, what, out_of_step(receipt))) };
        }
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(line(to)).map_err(|e| self.error(to, what, Fault::Io(e))));
            let received = receive(line(from)).map_err(|fault| self.error(from, what, fault));
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
        let late = |e: &io::Error| matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        match (fault, self.patience) {
            _ if self.stopper.stopped() => Error::Stopped,
            (Fault::Protocol { expected, found }, _) => Error::Protocol { peer, operation, expected, found },
            (Fault::Unreadable(source), _) => Error::Unreadable { peer, operation, bytes, source },
            (Fault::Io(e), Some(patience)) if late(&e) => {
                Error::Silent { peer, operation, bytes, seconds: patience.as_secs_f64() }
            }
            (Fault::Io(source), _) => Error::Lost { peer, operation, bytes, source },
        }
    }
}

/// What an exchange is about, for errors.
#[derive(Clone, Copy)]
struct Transfer {
    operation: &'static str,
    bytes: usize,
}

/// What a peer is to have: `length` elements from `address` on in this process's memory.
#[derive(Clone, Copy)]
struct Offer {
    tag: Tag,
    length: usize,
    address: u64,
}

const OFFER: usize = 25;

impl Offer {
    fn of<T>(tag: Tag, elements: &[T]) -> Self {
        Offer { tag, length: elements.len(), address: elements.as_ptr() as u64 }
    }

    fn header(&self, loan: u64) -> [u8; OFFER] {
        let mut bytes = [self.tag as u8 | LENT; OFFER];
        bytes[1..9].copy_from_slice(&(self.length as u64).to_le_bytes());
        bytes[9..17].copy_from_slice(&self.address.to_le_bytes());
        bytes[17..].copy_from_slice(&loan.to_le_bytes());
        bytes
    }
}

/// Has `read` take what a neighbour offers, and gives it back.
fn borrow(
    mut line: Line<'_>,
    neighbour: &Neighbour,
    (tag, length): (Tag, usize),
    read: impl FnOnce(u64) -> io::Result<()>,
) -> Result<(), Fault> {
    let mut offer = [0; OFFER];
    line.read_exact(&mut offer)?;
    let word = |at: usize| u64::from_le_bytes(offer[at..at + 8].try_into().expect("8 bytes"));
    let (found, address, loan) = (word(1) as usize, word(9), word(17));
    if (offer[0], found) != (tag as u8 | LENT, length) {
        let (expected, found) = (format!("{length} of {tag:?}"), format!("{found} of message type {}", offer[0]));
        return Err(Fault::Protocol { expected, found });
    }
    // Who is gone is lost; whose memory may not be read any more is not.
    let refused = |e: io::Error| match e.raw_os_error() {
        Some(libc::EPERM) => Fault::Unreadable(e),
        _ => Fault::Io(e),
    };
    read(address).map_err(refused)?;
    if !neighbour.vouches_for(loan).map_err(refused)? {
        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it took back what it had lent").into());
    }
    Ok(line.write_all(&[1])?)
}

/// Marks the tag of what is to be read from the sender's memory.
const LENT: u8 = 0x80;
/// Sums that are read at one time: they and those that they are added to stay in a core's cache.
const LENT_PIECE: usize = 16_384;

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
        let mut lent = std::mem::take(&mut self.lent);
        let outcome = (1..self.world()).try_for_each(|round| {
            let theirs = std::mem::take(&mut parts[self.partners(round).0]);
            let offer = Offer::of(Tag::Sums, theirs);
            let send = |line: Line<'_>| send_sums(line, theirs, &mut outgoing);
            let receive = |line: Line<'_>| match &self.neighbours[line.peer] {
                Some(neighbour) => borrow(line, neighbour, (Tag::Sums, own.len()), |address| {
                    add_lent(neighbour, address, own, &mut lent)
                }),
                None => add_sums(line, own, &mut incoming),
            };
            self.round(round, what, Some(offer), send, receive)
        });
        (self.outgoing, self.incoming, self.lent) = (outgoing, incoming, lent);
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
            let send = |mut line: Line<'_>| {
                line.write_all(&header(Tag::Parameters, own.len()))?;
                line.write_all(own)
            };
            let receive = |mut line: Line<'_>| match &self.neighbours[line.peer] {
                Some(neighbour) => {
                    borrow(line, neighbour, (Tag::Parameters, theirs.len()), |address| neighbour.read(address, theirs))
                }
                None => {
                    line.expect_header(Tag::Parameters, theirs.len())?;
                    Ok(line.read_exact(theirs)?)
                }
            };
            self.round(round, what, Some(Offer::of(Tag::Parameters, own)), send, receive)
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
            let send = |mut line: Line<'_>| line.write_all(&[&header(Tag::Bytes, mine.len()), mine].concat());
            let receive = |mut line: Line<'_>| {
                let length = line.read_header(Tag::Bytes)?;
                if length > MOST {
                    return Err(Fault::Protocol {
                        expected: format!("at most {MOST} bytes"),
                        found: length.to_string(),
                    });
                }
                slot.resize(length, 0);
                Ok(line.read_exact(slot)?)
            };
            self.round(round, what, None, send, receive)?;
        }
        Ok(all)
    }

    fn heard_by(&mut self, pulse: &Pulse) {
        self.pulse = pulse.clone();
        let waits = |stream: &TcpStream| stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
        // Where the system does not let it wait, it ends by itself as before.
        if self.peers.iter().flatten().all(|stream| waits(stream).is_ok()) {
            self.patience = None;
        }
    }

    fn pulse(&self) -> Option<&Pulse> {
        Some(&self.pulse)
    }
}

/// Sends a peer's sums piece by piece.
fn send_sums(mut line: Line<'_>, sums: &[i64], wire: &mut Vec<u8>) -> io::Result<()> {
    line.write_all(&header(Tag::Sums, sums.len()))?;
    for piece in sums.chunks(PIECE) {
        piece::pack(piece, wire);
        line.write_all(wire)?;
    }
    Ok(())
}

/// Adds the sums that a neighbour lends to the own ones.
fn add_lent(neighbour: &Neighbour, mut address: u64, own: &mut [i64], lent: &mut Vec<i64>) -> io::Result<()> {
    lent.resize(LENT_PIECE, 0);
    for piece in own.chunks_mut(LENT_PIECE) {
        let lent = &mut lent[..piece.len()];
        neighbour.read_sums(address, lent)?;
        piece::add(piece, lent);
        address += size_of_val(lent) as u64;
    }
    Ok(())
}

/// Adds a peer's sums to the own ones as they arrive.
fn add_sums(mut line: Line<'_>, own: &mut [i64], wire: &mut Vec<u8>) -> Result<(), Fault> {
    line.expect_header(Tag::Sums, own.len())?;
    wire.resize(piece::MAX_BYTES, 0);
    for piece in own.chunks_mut(PIECE) {
        let mut width = [0];
        line.read_exact(&mut width)?;
        let width = usize::from(width[0]);
        let body = width * piece.len();
        if body > wire.len() {
            return Err(Fault::width(width));
        }
        line.read_exact(&mut wire[..body])?;
        piece::unpack_add(width, &wire[..body], piece).ok_or_else(|| Fault::width(width))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
pub mod tests;

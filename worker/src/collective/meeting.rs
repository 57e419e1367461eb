//! How the ranks of a generation come together: each calls the lower ones and is called by the higher ones, and all prove
//! that they belong to it.

use super::handshake::{Failure, Secret};
use super::tcp::Stopper;
use super::Error;
use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

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
    /// Peers on the same machine read from each other's memory, where that is allowed.
    pub lends: bool,
}

/// A connection that has not introduced itself after this long makes room for others.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// So many may be introducing themselves at one time.
const STRANGERS: usize = 256;

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

/// Connections to all peers, in rank order; none to the own rank.
pub(super) fn meet(
    listener: &TcpListener,
    membership: &Membership,
    stopper: &Stopper,
) -> Result<Vec<Option<TcpStream>>, Error> {
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
    Ok(peers)
}

/// A small message leaves at once, and nobody is waited for longer than `timeout`.
pub(crate) fn prepare(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

/// Calls whoever listens at `address`; `stopper` ends the connection.
pub(crate) fn dial(address: &str, timeout: Duration, stopper: &Stopper) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&candidate, timeout) {
            Ok(stream) => {
                prepare(&stream, timeout)?;
                stopper.watch(&stream)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn connect(membership: &Membership, stopper: &Stopper, peer: usize) -> Result<TcpStream, Error> {
    let address = &membership.addresses[peer];
    let unreachable = |source| Error::Unreachable { peer, address: address.clone(), source };
    let stream = dial(address, membership.timeout, stopper).map_err(unreachable)?;
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
        let (sender, introduced) = std::sync::mpsc::channel::<(u64, Option<usize>)>();
        // Callers who have not introduced themselves yet.
        let mut callers: BTreeMap<u64, TcpStream> = BTreeMap::new();
        let mut gather = || loop {
            while let Ok((caller, rank)) = introduced.try_recv() {
                let stream = callers.remove(&caller);
                let slot = rank.and_then(|rank| rank.checked_sub(first)).and_then(|i| slots.get_mut(i));
                if let (Some(empty @ None), Some(stream)) = (slot, stream) {
                    let watched = stopper.watch(&stream);
                    watched.map_err(|e| if stopper.stopped() { Error::Stopped } else { failed(e) })?;
                    *empty = Some(stream);
                }
            }
            let Some(missing) = slots.iter().position(Option::is_none) else { return Ok(()) };
            if stopper.stopped() {
                return Err(Error::Stopped);
            }
            if Instant::now() >= deadline {
                return Err(Error::Missing { peer: first + missing, seconds: membership.timeout.as_secs_f64() });
            }
            if callers.len() >= STRANGERS {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            match listener.accept() {
                Ok((stream, address)) => {
                    let (sender, caller) = (sender.clone(), calls);
                    calls += 1;
                    callers.insert(caller, stream.try_clone().map_err(failed)?);
                    scope.spawn(move || {
                        let rank = introduce(&stream, membership);
                        if let Err(failure) = &rank {
                            tracing::warn!(%address, ?failure, "turned a connection away");
                        }
                        // The receiver is gone once everybody is there.
                        let _ = sender.send((caller, rank.ok()));
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

fn introduce(stream: &TcpStream, membership: &Membership) -> Result<usize, Failure> {
    stream.set_nonblocking(false)?;
    prepare(stream, membership.timeout.min(INTRODUCTION))?;
    let rank = membership.secret().accept(stream, membership.rank)?;
    prepare(stream, membership.timeout)?;
    Ok(rank)
}

impl Membership {
    fn secret(&self) -> Secret {
        Secret { key: self.key, term: self.term, generation: self.generation }
    }
}

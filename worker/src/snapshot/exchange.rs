//! Images from one memory to another, over connections of their own: a neighbour's new one comes, and after a loss whoever
//! needs one asks for it. Peers prove that they belong to the generation as those of the collective do.

use super::{Image, Name, Store};
use crate::collective::handshake::{Failure, Secret};
use crate::collective::meeting::{dial, prepare};
use crate::collective::tcp::{self, Stopper};
use crate::memory::Bytes;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use unisono_proto::v1::Held;

/// A connection that has not said what it wants after this long makes room for others.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// Connections that have not said yet who they are; further ones wait until the system takes them.
const STRANGERS: usize = 64;
/// Until another connection may be taken where that failed, or where there are too many.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes read or written at once.
const PIECE: usize = 1 << 20;
/// Less urgent than computing.
pub(super) const NICENESS: i32 = 10;

const PUT: u8 = b'P';
const GET: u8 = b'G';
const YES: u8 = b'+';
const NO: u8 = b'-';
/// The image is here already.
const HAVE: u8 = b'=';

/// Kind of request, name, bytes, hash.
const REQUEST: usize = 1 + 32 + 8 + 4 + 4 + 8 + 32;

/// Why an image did not come or go. Each names the peer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("rank {rank} at {address} cannot be reached for a snapshot: {source}; workers must reach each other's --listen address")]
    Peer { rank: u32, address: String, source: io::Error },
    #[error("rank {rank} at {address} {what}; the run regroups without that snapshot")]
    Refused { rank: u32, address: String, what: &'static str },
    #[error("the state after step {step} cannot be loaded from memory: {needed} are needed for that and {left} are left; the run goes on from an earlier one", needed = Bytes(*.needed), left = Bytes(*.left))]
    NoRoom { step: u64, needed: u64, left: u64 },
    #[error("the own snapshot after step {step} is not what it was (memory that fails?); the run regroups without it")]
    Damaged { step: u64 },
}

impl Error {
    /// The rank at fault, where it is another one's.
    pub fn culprit(&self) -> Option<u32> {
        match self {
            Error::Peer { rank, .. } | Error::Refused { rank, .. } => Some(*rank),
            Error::NoRoom { .. } | Error::Damaged { .. } => None,
        }
    }
}

/// Who takes part, for this worker.
#[derive(Clone)]
pub struct Circle {
    pub secret: Secret,
    pub rank: usize,
    pub timeout: Duration,
}

impl Circle {
    /// Of the generation whose peers know each other by `key`.
    pub fn new(key: &[u8; 32], term: u64, generation: u64, rank: usize, timeout: Duration) -> Self {
        // The collective's proofs are of no use here.
        let key = blake3::derive_key("unisono 1 snapshots", key);
        Circle { secret: Secret { key, term, generation }, rank, timeout }
    }
}

/// This process's end: takes what neighbours send, and hands out what it holds.
pub struct Exchange {
    pub store: Store,
    /// host:port to announce.
    pub address: String,
    circle: Arc<Mutex<Option<Circle>>>,
}

impl Exchange {
    /// Listens on `host`, any port.
    pub fn open(host: &str) -> Result<Self, crate::collective::Error> {
        let (listener, address) = tcp::listen(host)?;
        let (store, circle) = (Store::default(), Arc::new(Mutex::new(None)));
        let (shelf, members) = (store.clone(), circle.clone());
        let serve = move || serve(&listener, &shelf, &members);
        let failed = |source| crate::collective::Error::Listen { address: host.to_owned(), source };
        std::thread::Builder::new().name("snapshots".into()).spawn(serve).map_err(failed)?;
        Ok(Exchange { store, address, circle })
    }

    /// Members of an earlier generation are turned away from now on.
    pub fn enter(&self, circle: Circle) {
        *self.circle.lock().unwrap_or_else(PoisonError::into_inner) = Some(circle);
    }
}

fn serve(listener: &TcpListener, store: &Store, circle: &Mutex<Option<Circle>>) {
    let strangers = Strangers::default();
    for stream in listener.incoming() {
        // No file can be opened now; later one can.
        let Ok(stream) = stream else {
            std::thread::sleep(PAUSE);
            continue;
        };
        while strangers.0.load(Ordering::Relaxed) >= STRANGERS {
            std::thread::sleep(PAUSE);
        }
        let member = circle.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(circle), store) = (member, store.clone()) else { continue };
        let stranger = strangers.enter();
        let answer = move || {
            let _ = rustix::process::nice(NICENESS);
            if let Err(failure) = answer(&stream, stranger, &circle, &store) {
                tracing::debug!(?failure, "a snapshot's exchange ended");
            }
        };
        // Without a thread for it, whoever calls sees the connection close.
        let _ = std::thread::Builder::new().name("snapshot".into()).spawn(answer);
    }
}

/// How many connections have not said who they are.
#[derive(Clone, Default)]
struct Strangers(Arc<AtomicUsize>);

/// One of them.
struct Stranger(Strangers);

impl Strangers {
    fn enter(&self) -> Stranger {
        self.0.fetch_add(1, Ordering::Relaxed);
        Stranger(self.clone())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0 .0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(mut stream: &TcpStream, stranger: Stranger, circle: &Circle, store: &Store) -> Result<(), Failure> {
    prepare(stream, circle.timeout.min(INTRODUCTION))?;
    circle.secret.accept(stream, circle.rank)?;
    drop(stranger);
    prepare(stream, circle.timeout)?;
    let turn = store.turn();
    let mut request = [0; REQUEST];
    stream.read_exact(&mut request)?;
    let (kind, name, bytes, hash) = parse(&request);
    let found = match kind {
        PUT => store.place(&name, Some(&hash)),
        _ => store.find(&name, Some(&hash)),
    };
    match (kind, found) {
        (PUT, Some(_)) => stream.write_all(&[HAVE])?,
        (PUT, None) if store.has_room(&name, bytes) => {
            stream.write_all(&[YES])?;
            let image = read(stream, name, hash, bytes, store.buffer())?;
            let intact = image.is_intact();
            match intact {
                true => drop(store.insert(turn, image)),
                false => store.give_back(image.bytes),
            }
            stream.write_all(&[if intact { YES } else { NO }])?;
        }
        (GET, Some(image)) => {
            stream.write_all(&[YES])?;
            write(stream, &image.bytes)?;
            let mut verdict = [0];
            stream.read_exact(&mut verdict)?;
            if verdict != [YES] && !image.is_intact() {
                store.forget(&name);
            }
        }
        _ => stream.write_all(&[NO])?,
    }
    Ok(())
}

fn call(circle: &Circle, stopper: &Stopper, address: &str, rank: u32) -> Result<TcpStream, Error> {
    let failed = |source| Error::Peer { rank, address: address.to_owned(), source };
    let stream = dial(address, circle.timeout, stopper).map_err(failed)?;
    match circle.secret.connect(&stream, circle.rank, rank as usize) {
        Ok(()) => Ok(stream),
        Err(Failure::Io(source)) => Err(failed(source)),
        Err(Failure::Refused(_)) => {
            Err(Error::Refused { rank, address: address.to_owned(), what: "is of another generation" })
        }
    }
}

/// Hands `image` to a neighbour; it has it, verified, when this returns.
pub fn put(circle: &Circle, stopper: &Stopper, address: &str, rank: u32, image: &Image) -> Result<(), Error> {
    let failed = |source| Error::Peer { rank, address: address.to_owned(), source };
    let refused = |what| Err(Error::Refused { rank, address: address.to_owned(), what });
    let mut stream = &call(circle, stopper, address, rank)?;
    let mut send = || -> io::Result<[u8; 2]> {
        stream.write_all(&request(PUT, &image.name, image.bytes.len() as u64, &image.hash))?;
        let mut answers = [0, YES];
        stream.read_exact(&mut answers[..1])?;
        if answers[0] == YES {
            write(stream, &image.bytes)?;
            stream.read_exact(&mut answers[1..])?;
        }
        Ok(answers)
    };
    match send().map_err(failed)? {
        [YES | HAVE, YES] => Ok(()),
        [YES, _] => refused("received the snapshot damaged"),
        _ => refused("has no room for the snapshot"),
    }
}

/// Asks a holder for an image, and verifies it.
pub fn get(
    circle: &Circle,
    stopper: &Stopper,
    address: &str,
    rank: u32,
    wanted: &Held,
    store: &Store,
) -> Result<Image, Error> {
    let failed = |source| Error::Peer { rank, address: address.to_owned(), source };
    let refused = |what| Error::Refused { rank, address: address.to_owned(), what };
    let (name, hash) = identify(wanted).ok_or_else(|| refused("was named for a snapshot without a hash"))?;
    let mut stream = &call(circle, stopper, address, rank)?;
    let mut answer = [0];
    stream.write_all(&request(GET, &name, wanted.bytes, &hash)).map_err(failed)?;
    stream.read_exact(&mut answer).map_err(failed)?;
    if answer != [YES] {
        return Err(refused("does not hold the snapshot any more"));
    }
    let image = read(stream, name, hash, wanted.bytes, store.buffer()).map_err(failed)?;
    let intact = image.is_intact();
    stream.write_all(&[if intact { YES } else { NO }]).map_err(failed)?;
    if intact {
        Ok(image)
    } else {
        Err(refused("sent a snapshot that is damaged"))
    }
}

/// Name and hash as the coordinator tells them; `None` where they are malformed.
pub fn identify(held: &Held) -> Option<(Name, [u8; 32])> {
    let timeline = held.timeline[..].try_into().ok()?;
    let name = Name { timeline, step: held.step, rank: held.rank, world: held.world };
    Some((name, held.blake3[..].try_into().ok()?))
}

fn request(kind: u8, name: &Name, bytes: u64, hash: &[u8; 32]) -> [u8; REQUEST] {
    let mut request = [kind; REQUEST];
    request[1..33].copy_from_slice(&name.timeline);
    request[33..41].copy_from_slice(&name.step.to_le_bytes());
    request[41..45].copy_from_slice(&name.rank.to_le_bytes());
    request[45..49].copy_from_slice(&name.world.to_le_bytes());
    request[49..57].copy_from_slice(&bytes.to_le_bytes());
    request[57..].copy_from_slice(hash);
    request
}

fn parse(request: &[u8; REQUEST]) -> (u8, Name, u64, [u8; 32]) {
    let word = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("8 bytes"));
    let half = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("4 bytes"));
    let hash = |at: usize| request[at..at + 32].try_into().expect("32 bytes");
    let name = Name { timeline: hash(1), step: word(33), rank: half(41), world: half(45) };
    (request[0], name, word(49), hash(57))
}

fn read(stream: &TcpStream, name: Name, hash: [u8; 32], bytes: u64, mut buffer: Vec<u8>) -> io::Result<Image> {
    // It grows with what really comes, and nothing is written twice.
    stream.take(bytes).read_to_end(&mut buffer)?;
    if buffer.len() as u64 != bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Image { name, hash, bytes: buffer })
}

fn write(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    bytes.chunks(PIECE).try_for_each(|piece| stream.write_all(piece))
}

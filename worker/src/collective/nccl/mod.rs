//! The collective over NCCL: sums and parameters go from device to device, on a stream of their own. The ranks have met over
//! TCP before; that mesh carries the communicator's id and small bytes, and tells who has hung up.
//!
//! Shards are tiled unevenly, by chunks. A reduce-scatter is a group of reductions, one to each owner, and an all-gather a
//! group of broadcasts, one from each: a ring moves as many bytes for them as for NCCL's own reduce-scatter and all-gather,
//! which want equal shards, and nothing is padded or copied. Sums are integers, so NCCL may choose any algorithm.
//!
//! Nothing here waits inside NCCL or the driver. What is asked for is polled, with an eye on the peers and on whoever stops
//! this generation; when it ends badly the communicator is aborted, which ends its kernels too.

mod id;
mod library;
pub mod stream;

use super::bytes::bytes_mut;
use super::pulse::Pulse;
use super::tcp::{Membership, Mesh, Stopper};
use super::{Collective, Error};
use crate::ops::view;
use id::Id;
pub use library::Problem;
use library::{Communicator, Part};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};
use stream::{Address, Event, Gpu, Staging, Stream};
use tch::{Device, Kind, Tensor};

/// Bytes that are asked for at once: what a deadline is for, and what memory of the host is staged through.
const PIECE: usize = 64 << 20;
/// Pieces under way: the next one waits behind the one that moves.
const AHEAD: usize = 2;
/// Between two looks at what is under way, once it is clear that it takes longer.
const PAUSE: Duration = Duration::from_micros(50);
/// Between two looks at whether peers are still there.
const GLANCE: Duration = Duration::from_millis(50);
/// What kernels need to end after an abort, and what an orderly end may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// The libraries it stands on, opened.
#[derive(Clone, Copy)]
pub struct Libraries {
    nccl: library::Nccl,
    gpu: Gpu,
    device: Device,
}

impl Libraries {
    /// For a GPU.
    pub fn open(device: Device) -> Result<Self, Error> {
        let Device::Cuda(index) = device else { return Err(Error::NoNccl("the device is no GPU".into())) };
        let nccl = library::Nccl::open().map_err(Error::NoNccl)?;
        let gpu = Gpu::open(index).map_err(|Problem(problem)| Error::NoNccl(problem))?;
        Ok(Libraries { nccl, gpu, device })
    }
}

/// One rank of a generation's communicator.
pub struct Nccl {
    mesh: Mesh,
    /// What takes longer is given up, unless somebody else judges.
    patience: Option<Duration>,
    /// What exchanges wait for.
    pulse: Pulse,
    stopper: Stopper,
    device: Device,
    /// None once it has ended badly.
    communicator: Option<Communicator>,
    stream: Stream,
    /// What was asked of the device before this exchange.
    computed: Option<Event>,
    /// For what lies on the host, when there is such.
    staging: Option<Staging>,
}

/// What is under way, for errors.
#[derive(Clone, Copy)]
struct Transfer {
    operation: &'static str,
    bytes: usize,
}

impl Nccl {
    /// Meets the peers of `mesh` again, as ranks of one communicator.
    pub fn meet(mut mesh: Mesh, membership: &Membership, libraries: &Libraries) -> Result<Self, Error> {
        let (rank, world) = (mesh.rank(), mesh.world());
        let Libraries { nccl, gpu, device } = *libraries;
        let what = Transfer { operation: "meeting", bytes: 0 };
        let failed = |Problem(problem)| Error::Nccl { rank, operation: what.operation, bytes: 0, problem };
        let stream = Stream::new(gpu).map_err(failed)?;
        let id = match rank {
            0 => Some(nccl.unique_id().map_err(failed)?),
            _ => None,
        };
        let sealed = id.as_ref().map_or_else(Vec::new, |id: &Id| id.seal(&membership.key));
        let all = mesh.all_gather_bytes(&sealed)?;
        let strange = || Error::Protocol {
            peer: 0,
            operation: what.operation,
            expected: "an id sealed with this generation's key".into(),
            found: format!("{} bytes", all[0].len()),
        };
        let id = Id::open(&all[0], &membership.key).ok_or_else(strange)?;
        let communicator = Some(nccl.communicator(world, rank, &id).map_err(failed)?);
        let (patience, pulse, stopper) = (Some(membership.timeout), Pulse::default(), mesh.stopper().clone());
        let mut met =
            Nccl { mesh, patience, pulse, stopper, device, communicator, stream, computed: None, staging: None };
        met.whole(what, |met| met.until(what, |met| met.communicator()?.ready()))?;
        Ok(met)
    }

    fn communicator(&self) -> Result<&Communicator, Problem> {
        self.communicator.as_ref().ok_or_else(|| Problem("it was aborted before".into()))
    }

    /// Carries out `work`; when it fails the communicator is of no more use.
    fn whole<T>(&mut self, what: Transfer, work: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        self.pulse.concerns(what.operation, what.bytes);
        let entered = self.stream.enter().map_err(|problem| self.error(what, problem));
        let outcome = entered.and_then(|()| work(self));
        if outcome.is_err() {
            self.abort();
        }
        outcome
    }

    fn error(&self, what: Transfer, Problem(problem): Problem) -> Error {
        let Transfer { operation, bytes } = what;
        match (self.stopper.stopped(), self.mesh.lost()) {
            (true, _) => Error::Stopped,
            (_, Some(peer)) => {
                Error::Lost { peer, operation, bytes, source: std::io::Error::other(format!("NCCL: {problem}")) }
            }
            _ => Error::Nccl { rank: self.mesh.rank(), operation, bytes, problem },
        }
    }

    /// Asks until `done`, patience is over, a peer is gone or somebody stops this generation.
    fn until(&self, what: Transfer, done: impl Fn(&Self) -> Result<bool, Problem>) -> Result<(), Error> {
        let begun = Instant::now();
        let (mut glanced, mut looks) = (begun, 0u32);
        loop {
            if done(self).map_err(|problem| self.error(what, problem))? {
                self.pulse.concerns(what.operation, what.bytes);
                return Ok(());
            }
            if self.stopper.stopped() {
                return Err(Error::Stopped);
            }
            let now = Instant::now();
            let Transfer { operation, bytes } = what;
            if let Some(patience) = self.patience.filter(|patience| now - begun > *patience) {
                let (rank, seconds) = (self.mesh.rank(), patience.as_secs_f64());
                return Err(Error::Stuck { rank, operation, bytes, seconds });
            }
            if now - glanced > GLANCE {
                glanced = now;
                self.look_at_device();
                if let Some(peer) = self.mesh.lost() {
                    let source = std::io::Error::other("it hung up");
                    return Err(Error::Lost { peer, operation, bytes, source });
                }
            }
            looks += 1;
            match looks {
                0..200 => std::hint::spin_loop(),
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    /// As long as the own device computes what is to be exchanged, peers are not waited for.
    fn look_at_device(&self) {
        let computes = self.computed.as_ref().is_some_and(|computed| matches!(computed.passed(), Ok(false)));
        self.pulse.waits_for_device(computes);
    }

    /// Until the device has come by; NCCL's own troubles meanwhile are errors too.
    fn pass(&self, what: Transfer, event: &Event) -> Result<(), Error> {
        self.until(what, |met| {
            met.communicator()?.ready()?;
            event.passed()
        })
    }

    /// Asks for one group; returns where in the stream it ends.
    fn ask(&mut self, what: Transfer, parts: &[Part]) -> Result<Event, Error> {
        let (handle, communicator) = (self.stream.handle(), self.communicator.as_mut());
        let communicator = communicator.ok_or_else(|| Problem("it was aborted before".into()));
        communicator.and_then(|c| c.group(parts, handle)).map_err(|problem| self.error(what, problem))?;
        // Only then are its kernels on the stream, and only then may anything else be.
        self.until(what, |met| met.communicator()?.ready())?;
        self.stream.mark().map_err(|problem| self.error(what, problem))
    }

    /// On memory of the device: piece after piece, the next one asked for while one moves.
    fn direct(&mut self, what: Transfer, groups: Vec<Vec<Part>>) -> Result<(), Error> {
        let mut under_way = VecDeque::new();
        for parts in groups {
            if under_way.len() == AHEAD {
                self.pass(what, &under_way.pop_front().expect("as many as are ahead"))?;
            }
            under_way.push_back(self.ask(what, &parts)?);
        }
        under_way.iter().try_for_each(|event| self.pass(what, event))
    }

    /// On memory of the host: one piece after another goes in, is exchanged, and comes out. `takes` and `gives` say whose
    /// elements go in and come out.
    fn staged(
        &mut self,
        what: Transfer,
        bytes: &mut [u8],
        groups: &[Vec<(usize, Range<usize>)>],
        part: impl Fn(Address, usize, usize) -> Part,
        (takes, gives): (impl Fn(usize) -> bool, impl Fn(usize) -> bool),
    ) -> Result<(), Error> {
        let gpu = self.stream.gpu();
        let at = match &self.staging {
            Some(staging) => staging.at,
            None => {
                let staging = Staging::new(gpu, PIECE).map_err(|problem| self.error(what, problem))?;
                self.staging.insert(staging).at
            }
        };
        for group in groups {
            let mut next = at;
            let placed: Vec<(usize, &Range<usize>, Address)> = group
                .iter()
                .map(|(root, range)| {
                    let after = next.plus(range.len());
                    (*root, range, std::mem::replace(&mut next, after))
                })
                .collect();
            for (_, range, at) in placed.iter().filter(|(root, ..)| takes(*root)) {
                let copied = self.stream.copy_in(*at, &bytes[(*range).clone()]);
                copied.map_err(|problem| self.error(what, problem))?;
            }
            let parts: Vec<_> = placed.iter().map(|(root, range, at)| part(*at, range.len(), *root)).collect();
            let exchanged = self.ask(what, &parts)?;
            // Whatever copies may wait for what is before it: nothing of a peer's may be.
            self.pass(what, &exchanged)?;
            for (_, range, at) in placed.iter().filter(|(root, ..)| gives(*root)) {
                let copied = self.stream.copy_out(&mut bytes[(*range).clone()], *at);
                copied.map_err(|problem| self.error(what, problem))?;
            }
            let out = self.stream.mark().map_err(|problem| self.error(what, problem))?;
            self.pass(what, &out)?;
        }
        Ok(())
    }

    /// Ends the communicator at once, and waits until nothing of it touches memory any more.
    fn abort(&mut self) {
        let Some(communicator) = self.communicator.take() else { return };
        tracing::warn!(rank = self.mesh.rank(), "the NCCL communicator is aborted");
        communicator.abort();
        let Ok(end) = self.stream.mark() else { return };
        let begun = Instant::now();
        while matches!(end.passed(), Ok(false)) && begun.elapsed() < FAREWELL {
            std::thread::sleep(PAUSE);
        }
    }
}

/// What moves together: of each owner's range about as much, `PIECE` bytes in all. Everybody cuts alike.
fn groups(owners: &[Range<usize>], width: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    // Whole lines of memory, so that pieces begin where the device reads and writes best.
    let each = (PIECE / width / owners.len() / 128 * 128).max(128);
    let longest = owners.iter().map(Range::len).max().unwrap_or(0);
    let cut = |begin: usize| {
        let of = |(root, owned): (usize, &Range<usize>)| {
            let range = (owned.start + begin).min(owned.end)..(owned.start + begin + each).min(owned.end);
            (!range.is_empty()).then_some((root, range))
        };
        owners.iter().enumerate().filter_map(of).collect()
    };
    (0..longest).step_by(each).map(cut).collect()
}

fn in_bytes(groups: Vec<Vec<(usize, Range<usize>)>>, width: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    let bytes = |(root, range): (usize, Range<usize>)| (root, range.start * width..range.end * width);
    groups.into_iter().map(|group| group.into_iter().map(bytes).collect()).collect()
}

/// One whole flat tensor on the device.
fn address(tensor: &Tensor) -> Address {
    assert!(tensor.is_contiguous(), "what is exchanged lies in one piece");
    Address(tensor.data_ptr() as u64)
}

fn tiles(owners: &[Range<usize>], elements: usize) {
    let ends = owners.iter().try_fold(0, |at, range| (range.start == at).then_some(range.end));
    assert_eq!(ends, Some(elements), "owners tile the bucket");
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.mesh.rank()
    }

    fn world(&self) -> usize {
        self.mesh.world()
    }

    fn reduce_scatter(&mut self, sums: &mut [i64], owners: &[Range<usize>]) -> Result<(), Error> {
        tiles(owners, sums.len());
        let (what, rank) = (Transfer { operation: "reduce", bytes: size_of_val(sums) }, self.rank());
        let groups = in_bytes(groups(owners, size_of::<i64>()), size_of::<i64>());
        let part = |at, bytes, root| Part::Reduce { at, count: bytes / size_of::<i64>(), root };
        let bytes = view::bytes_of_mut(sums);
        self.whole(what, |met| met.staged(what, bytes, &groups, part, (|_| true, |root| root == rank)))
    }

    fn all_gather(&mut self, bucket: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        tiles(owners, bucket.numel());
        let (bytes, width) = bytes_mut(bucket);
        let (what, rank) = (Transfer { operation: "gather", bytes: bytes.len() }, self.rank());
        let groups = in_bytes(groups(owners, width), width);
        let part = |at, bytes, root| Part::Broadcast { at, bytes, root };
        self.whole(what, |met| met.staged(what, bytes, &groups, part, (|root| root == rank, |root| root != rank)))
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.mesh.all_gather_bytes(mine)
    }

    fn reduce(&mut self, sums: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        if sums.device() != self.device {
            return self.reduce_scatter(view::elements_mut(sums), owners);
        }
        assert_eq!(sums.kind(), Kind::Int64, "sums are integers");
        tiles(owners, sums.numel());
        let (base, width) = (address(sums), size_of::<i64>());
        let what = Transfer { operation: "reduce", bytes: sums.numel() * width };
        let part = |(root, range): (usize, Range<usize>)| Part::Reduce {
            at: base.plus(range.start * width),
            count: range.len(),
            root,
        };
        let groups = groups(owners, width).into_iter().map(|group| group.into_iter().map(part).collect());
        let groups = groups.collect();
        self.whole(what, |met| met.direct(what, groups))
    }

    fn gather(&mut self, bucket: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        if bucket.device() != self.device {
            return self.all_gather(bucket, owners);
        }
        tiles(owners, bucket.numel());
        let (base, width) = (address(bucket), bucket.kind().elt_size_in_bytes());
        let what = Transfer { operation: "gather", bytes: bucket.numel() * width };
        let part = |(root, range): (usize, Range<usize>)| Part::Broadcast {
            at: base.plus(range.start),
            bytes: range.len(),
            root,
        };
        let groups = in_bytes(groups(owners, width), width).into_iter();
        let groups = groups.map(|group| group.into_iter().map(part).collect()).collect();
        self.whole(what, |met| met.direct(what, groups))
    }

    fn gpu(&self) -> Option<Gpu> {
        Some(self.stream.gpu())
    }

    fn follow(&mut self, computed: Event) -> Result<(), Error> {
        let what = Transfer { operation: "follow", bytes: 0 };
        self.stream.follow(&computed).map_err(|problem| self.error(what, problem))?;
        self.computed = Some(computed);
        Ok(())
    }

    fn heard_by(&mut self, pulse: &Pulse) {
        self.mesh.heard_by(pulse);
        (self.pulse, self.patience) = (pulse.clone(), None);
    }

    fn pulse(&self) -> Option<&Pulse> {
        Some(&self.pulse)
    }
}

impl Drop for Nccl {
    /// Others may still be at what this rank has done: they get what they need of it before it ends.
    fn drop(&mut self) {
        if self.stopper.stopped() {
            self.abort();
        }
        let Some(mut communicator) = self.communicator.take() else { return };
        let begun = Instant::now();
        let mut left = self.stream.enter().and_then(|()| communicator.finalize()).and_then(|()| communicator.ready());
        while left == Ok(false) && begun.elapsed() < FAREWELL && !self.stopper.stopped() {
            std::thread::sleep(PAUSE);
            left = communicator.ready();
        }
        match left {
            Ok(true) => communicator.destroy(),
            _ => communicator.abort(),
        }
    }
}

#[cfg(test)]
pub(crate) mod stand_in;
#[cfg(test)]
mod tests;

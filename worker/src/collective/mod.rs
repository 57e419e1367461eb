//! What workers tell each other: integer sums to their owners, updated parameters to everybody. Integer addition is
//! associative, so the algorithm and the order of arrival cannot change a bit.

mod bytes;
pub mod courier;
pub(crate) mod handshake;
mod line;
pub(crate) mod meeting;
pub mod nccl;
mod neighbour;
pub(crate) mod piece;
pub mod pulse;
pub mod tcp;

use crate::ops::view;
use nccl::stream::{Event, Gpu};
use pulse::Pulse;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Exchanges between the ranks of one generation. All ranks call the same operations in the same order.
pub trait Collective {
    fn rank(&self) -> usize;
    fn world(&self) -> usize;

    /// Adds up all ranks' `sums` (one bucket). Afterwards the range `owners[rank]` holds the total of all ranks; the
    /// ranges of others keep this rank's own. `owners` tile `sums` in rank order.
    fn reduce_scatter(&mut self, sums: &mut [i64], owners: &[Range<usize>]) -> Result<(), Error>;

    /// Hands the elements `owners[rank]` of the flat tensor `bucket` to all ranks and receives theirs.
    fn all_gather(&mut self, bucket: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error>;

    /// All ranks' bytes, in rank order. For small payloads of any length.
    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// [`Collective::reduce_scatter`] wherever the i64 `sums` are. Those of a device come to the host for it, unless the
    /// transport reaches the device.
    fn reduce(&mut self, sums: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        if self.world() == 1 {
            return Ok(());
        }
        if sums.device() == Device::Cpu {
            return self.reduce_scatter(view::elements_mut(sums), owners);
        }
        let mut here = brought(self.pulse(), || sums.to_device_(Device::Cpu, Kind::Int64, false, true));
        self.reduce_scatter(view::elements_mut(&mut here), owners)?;
        let own = &owners[self.rank()];
        view::part(sums, own).copy_(&view::part(&here, own));
        Ok(())
    }

    /// [`Collective::all_gather`] wherever the `bucket` is.
    fn gather(&mut self, bucket: &mut Tensor, owners: &[Range<usize>]) -> Result<(), Error> {
        if self.world() == 1 {
            return Ok(());
        }
        if bucket.device() == Device::Cpu {
            return self.all_gather(bucket, owners);
        }
        let mut here = brought(self.pulse(), || bucket.to_device_(Device::Cpu, bucket.kind(), false, true));
        self.all_gather(&mut here, owners)?;
        bucket.copy_(&here);
        Ok(())
    }

    /// The device on which exchanges must wait for what the computing thread has asked for; none: all is there at once.
    fn gpu(&self) -> Option<Gpu> {
        None
    }

    /// The next exchange comes after what `computed` marks.
    fn follow(&mut self, _computed: Event) -> Result<(), Error> {
        Ok(())
    }

    /// From now on `pulse` tells what is waited for, to somebody who hears all ranks and judges who is to blame: no exchange
    /// ends any more because a peer is silent, only when it is stopped or a connection breaks.
    fn heard_by(&mut self, _pulse: &Pulse) {}

    /// What tells whom it waits for, where somebody hears that.
    fn pulse(&self) -> Option<&Pulse> {
        None
    }
}

/// What comes from a device once all is computed there.
fn brought(pulse: Option<&Pulse>, copy: impl FnOnce() -> Tensor) -> Tensor {
    let Some(pulse) = pulse else { return copy() };
    pulse.waits_for_device(true);
    let copied = copy();
    pulse.waits_for_device(false);
    copied
}

/// Why an exchange failed; each names the peer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("rank {peer} was silent for {seconds:.0} s in {operation} ({bytes} bytes): look at that worker's log, or raise cluster.peer_timeout")]
    Silent { peer: usize, operation: &'static str, bytes: usize, seconds: f64 },
    #[error("lost the connection to rank {peer} in {operation} ({bytes} bytes): {source}; look at that worker's log")]
    Lost { peer: usize, operation: &'static str, bytes: usize, source: std::io::Error },
    #[error("rank {peer} sent {found} in {operation} where {expected} was due: the workers are out of step")]
    Protocol { peer: usize, operation: &'static str, expected: String, found: String },
    #[error("the memory of rank {peer} cannot be read any more in {operation} ({bytes} bytes): {source}; set cluster.transport = \"tcp\"")]
    Unreadable { peer: usize, operation: &'static str, bytes: usize, source: std::io::Error },
    #[error("rank {peer} at {address} cannot be reached: {source}; peers must reach each other's --listen address")]
    Unreachable { peer: usize, address: String, source: std::io::Error },
    #[error("rank {peer} at {address} did not prove that it belongs to this run and generation: {reason}")]
    Refused { peer: usize, address: String, reason: String },
    #[error(
        "rank {peer} did not connect within {seconds:.0} s: look at that worker's log, or raise cluster.peer_timeout"
    )]
    Missing { peer: usize, seconds: f64 },
    #[error("the collective's address {address} cannot be listened on: {source}; choose another with --listen")]
    Listen { address: String, source: std::io::Error },
    #[error("NCCL cannot be used: {0}; install torch 2.11.0 with CUDA, or set cluster.transport = \"tcp\"")]
    NoNccl(String),
    #[error("rank {rank}, {operation} over NCCL ({bytes} bytes): {problem}; look at the other workers' logs, NCCL_DEBUG=WARN says more, and cluster.transport = \"tcp\" does without it")]
    Nccl { rank: usize, operation: &'static str, bytes: usize, problem: String },
    #[error("rank {rank}, {operation} over NCCL ({bytes} bytes): nothing moved for {seconds:.0} s; look at the other workers' logs, or raise cluster.peer_timeout")]
    Stuck { rank: usize, operation: &'static str, bytes: usize, seconds: f64 },
    #[error("the exchange was stopped on request")]
    Stopped,
    #[error("an internal error, please report it: {0}")]
    Panicked(String),
}

impl Error {
    /// The rank that did not do its part. Who says so did.
    pub fn culprit(&self) -> Option<u32> {
        match self {
            Error::Silent { peer, .. }
            | Error::Lost { peer, .. }
            | Error::Unreachable { peer, .. }
            | Error::Refused { peer, .. }
            | Error::Missing { peer, .. } => Some(*peer as u32),
            Error::Protocol { .. }
            | Error::Unreadable { .. }
            | Error::Listen { .. }
            | Error::NoNccl(_)
            | Error::Nccl { .. }
            | Error::Stuck { .. }
            | Error::Stopped
            | Error::Panicked(_) => None,
        }
    }

    /// Whether no other generation would go better: this machine lacks what the run asks for, or the program is wrong.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Error::NoNccl(_) | Error::Panicked(_))
    }

    /// Whether what the run asks for is not to be had here.
    pub fn bad_input(&self) -> bool {
        matches!(self, Error::NoNccl(_))
    }
}

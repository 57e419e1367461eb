//! What workers tell each other: integer sums to their owners, updated parameters to everybody. Integer addition is
//! associative, so the algorithm and the order of arrival cannot change a bit.

mod bytes;
pub mod courier;
pub(crate) mod handshake;
mod meeting;
mod neighbour;
pub(crate) mod piece;
pub mod tcp;

use std::ops::Range;
use tch::Tensor;

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
            | Error::Stopped
            | Error::Panicked(_) => None,
        }
    }
}

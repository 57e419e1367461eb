//! The worker: one process on one device. It computes micro-batches, owns a shard of the optimizer state and never sees
//! text. The only crate with libtorch and CUDA.

pub mod checkpoint;
pub mod collective;
pub mod device;
pub mod engine;
pub mod fingerprint;
pub mod library;
pub mod lifeline;
pub mod link;
pub mod memory;
pub mod model;
pub mod ops;
pub mod optim;
pub mod progress;
pub mod restore;
pub mod selftest;
pub mod session;
pub mod signals;
pub mod snapshot;
mod supply;
pub mod trace;
pub mod train;

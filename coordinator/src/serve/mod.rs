//! The loop that owns the machine, the gRPC services around it and the ledger.

pub mod control;
mod filesystem;
pub mod ledger;
pub mod setup;
pub mod work;

pub use setup::{Conclude, Error, Observer, Setup};
pub use work::Work;

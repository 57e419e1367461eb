//! The loop that owns the machine, the gRPC services around it and the ledger.

pub mod control;

//! Starting the processes of a run: on this machine by a small supervisor.

pub mod child;
mod crew;
pub mod local;
mod member;
mod relay;
pub mod report;
mod restarts;
pub mod signals;

/// The listening socket that the supervisor hands to the coordinator.
pub const LISTEN_FD: &str = "UNISONO_LISTEN_FD";
/// The pipe on which the coordinator reports to the supervisor.
pub const REPORT_FD: &str = "UNISONO_REPORT_FD";
/// A pipe that ends when the supervisor does, however it ended: whoever holds the reading end leaves then.
pub const LIFELINE_FD: &str = "UNISONO_LIFELINE_FD";
/// Secret of a worker; a child's environment is for its user's eyes only, unlike its arguments.
pub const TOKEN: &str = "UNISONO_TOKEN";
/// Path of the worker binary, where it is neither beside `unisono` nor on PATH.
pub const WORKER: &str = "UNISONO_WORKER";

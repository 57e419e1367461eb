//! The whole system under test: real binaries as processes, and what their tests share.
//!
//! The tests under `tests/` start `unisono` and `unisono-worker` from the target directory that they were built into;
//! `make test` builds them first. Every run carries a mark in its environment, by which a test finds whatever the run
//! left behind, however it was orphaned.

pub mod audience;
pub mod binaries;
pub mod chronicle;
pub mod corpus;
pub mod crowd;
pub mod fake_worker;
pub mod fixture;
pub mod kills;
pub mod processes;
pub mod proxy;
pub mod scale;

pub mod served;
pub mod table;
pub mod train;

//! Checkpoints as the coordinator sees them: which files there are and what they hold, committed by a manifest.

pub mod commit;
pub mod courier;
#[cfg(test)]
mod crash_tests;
pub mod disk;
pub mod manifest;
pub mod newest;
pub mod state;

//! The pure heart: what the coordinator decides, as a state machine without clock, network or randomness of its own.

#[cfg(test)]
mod actors;
pub mod assign;
mod bounds;
mod complaints;
pub mod composition;
pub mod cost;
#[cfg(test)]
mod crowd_tests;
pub mod deal;
pub mod event;
mod faults;
mod gathering;
mod hang;
pub mod machine;
#[cfg(test)]
mod machine_tests;
mod outstanding;
pub mod pace;
pub mod phases;
pub mod plan;
pub mod program;
mod quarantine;
#[cfg(test)]
mod quarantine_tests;
pub mod recorded;
#[cfg(test)]
mod recorded_tests;
mod regroup;
#[cfg(test)]
mod regroup_tests;
#[cfg(test)]
mod rehearsal;
pub mod roster;
mod saves;
#[cfg(test)]
mod saves_tests;
pub mod schedule;
pub mod settle;
#[cfg(test)]
mod simulated;
pub mod snapshots;
#[cfg(test)]
mod snapshots_tests;
pub mod spike;
mod standstill;
#[cfg(test)]
mod standstill_tests;
mod status;
mod stopping;
#[cfg(test)]
mod storm;
#[cfg(test)]
mod storm_tests;
pub mod units;

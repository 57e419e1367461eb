//! The coordinator, the command line and the monitors. This crate never links libtorch or CUDA.

pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod demo;
pub mod digest;
pub mod export;
pub mod import;
pub mod launch;
pub mod locate;
pub mod model;
pub mod monitor;
pub mod run;
pub mod serve;
pub mod store;
mod yaml;

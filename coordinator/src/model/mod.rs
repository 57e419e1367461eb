//! A model directory as the coordinator knows it: checked without libtorch ([`check`]), made from nothing ([`init`]).

pub mod check;
pub mod init;
mod normal;
mod vocabulary;
mod weights;

pub use check::{check, CheckedModel};
pub use init::{init, Made, Plan};
pub use vocabulary::Split;
pub use weights::Dtype;

use std::path::PathBuf;

/// The user's model directory, corpus or shape is at fault: exit code 2. Each is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Spec(#[from] unisono_configs::model::spec::Error),
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{path}: tensor \"{tensor}\" {problem}")]
    Tensor { path: PathBuf, tensor: String, problem: String },
    #[error("--{option}: {problem}")]
    Option { option: &'static str, problem: String },
}

//! What can be wrong with the data: each error is one sentence that names the place and the remedy.

use std::path::PathBuf;

/// The user's data, template or tokenizer is at fault: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({error}); set {key} to an existing file")]
    Read { path: PathBuf, key: String, error: std::io::Error },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{place}: {problem}{more}{remedy}")]
    Row { place: String, problem: String, more: String, remedy: String },
    #[error("{path}: {dropped} of {rows} rows cannot be used, more than data.max_dropped = {allowed} permits; the first: {first}")]
    TooManyDropped { path: PathBuf, dropped: u64, rows: u64, allowed: f64, first: String },
    #[error("data table \"{table}\": {problem}")]
    Table { table: String, problem: String },
    #[error("data table \"{table}\": the template {problem}")]
    Template { table: String, problem: String },
    #[error("{path}: {problem}")]
    Tokenizer { path: PathBuf, problem: String },
    #[error(transparent)]
    Model(#[from] unisono_configs::model::spec::Error),
}

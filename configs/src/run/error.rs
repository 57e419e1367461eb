//! What can be wrong with a run configuration: each error is one sentence, `place: field: problem; remedy`.

use std::path::PathBuf;

/// The user's configuration is at fault: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({error}); give the path of a run configuration, or --model DIR --data FILE")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{place}: not valid TOML: {problem}")]
    Syntax { place: String, problem: String },
    /// `place` is `file:line`, or the command line option that set the field.
    #[error("{place}: {field}: {problem}")]
    Field { place: String, field: String, problem: String },
}

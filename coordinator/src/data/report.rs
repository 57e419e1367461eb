//! What became of one data table, as people and scripts are told.

use super::store::Tally;
use std::path::PathBuf;

/// What became of one data table.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    pub task: String,
    pub path: PathBuf,
    /// What the rows look like: data.format, or what was found.
    pub format: &'static str,
    /// Source rows, files of held-out rows included.
    pub rows: u64,
    pub train: u64,
    pub validation: u64,
    pub test: u64,
    /// Rows of all parts whose tokens are counted below: the others are tokenized while training goes on.
    pub tokenized: u64,
    /// Tokens of prompts and of turns that are not trained on, of all parts.
    pub prompt_tokens: u64,
    /// Tokens of completions with their end of text, of all parts.
    pub completion_tokens: u64,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Completions cut at `train.max_length`.
    pub truncated: u64,
    /// Rows left out because of `on_bad_row = "drop"`.
    pub dropped: u64,
    /// Place and problem of the first three of them.
    pub bad: Vec<String>,
    /// Training rows whose source is also in a file of held-out rows.
    pub leaked: u64,
}

impl Report {
    /// With what is known of the rows' tokens.
    pub(super) fn with(mut self, tally: &Tally) -> Self {
        self.tokenized = tally.rows;
        self.prompt_tokens = tally.prompt_tokens;
        self.completion_tokens = tally.completion_tokens;
        self.longest = tally.longest;
        self.truncated = tally.truncated;
        self.dropped += tally.left_out;
        self
    }

    /// Whether every row that is not dropped is counted in tokens.
    pub fn is_whole(&self) -> bool {
        self.tokenized + self.dropped >= self.rows
    }
}

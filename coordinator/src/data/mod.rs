//! From files of rows to examples of tokens. Everything here is a pure function of the files and the configuration.
//!
//! Two stages: the *text stage* ([`prepare`], before a worker starts) reads, renders and checks every row as text, splits
//! and orders; of a row it keeps its place and its hashes. The *token stage* ([`store`], [`ahead`]) makes tokens of rows
//! in the order of the plan while training goes on, or all of them before, and keeps them in the [`cache`]. Steps, epochs,
//! split and order follow from the text stage alone, so that nothing depends on how far the second has come.

mod ahead;
pub mod asking;
mod cache;
mod chat;
mod conversation;
mod dataset;
mod detect;
mod encode;
mod error;
mod files;
pub mod gate;
pub mod instructions;
mod jinja;
mod lines;
mod mix;
mod ordering;
mod origin;
mod pack;
mod parquet;
mod prepare;
mod problem;
mod promptsource;
mod python;
mod referee;
mod render;
mod report;
mod row;
mod shots;
#[cfg(test)]
mod shots_tests;
mod shuffle;
mod split;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod tokenizer;
pub mod untrusted;
pub mod view;

pub use ahead::{Ahead, Notice};
pub use dataset::Dataset;
pub use error::Error;
pub use files::matches as fits_glob;
pub use ordering::{ordering, planned_shares};
pub use pack::{pack, Packed};
pub use prepare::{prepare, Extent};
pub use report::Report;
pub use store::Effort;
pub use tokenizer::TextTokenizer;

use std::ops::Range;
use std::path::PathBuf;

/// One row as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Index into [`Dataset::tasks`].
    pub task: u32,
    /// Position among all source rows of all tables: names the row in the ledger.
    pub row: u64,
    /// Prompt, completion, end of text. A completion cut at `train.max_length` has no end of text.
    pub tokens: Box<[u32]>,
    /// First token of the completion, or of a conversation's first turn that is trained on.
    pub prompt: u32,
    /// Later tokens that the model is not asked for, in order; the last token is none of them. Empty but in conversations.
    pub gaps: Box<[Range<u32>]>,
}

impl Example {
    /// Tokens fed to the model: all but the last.
    pub fn inputs(&self) -> usize {
        self.tokens.len() - 1
    }

    /// Index of the first token that the model is asked for: nothing precedes the very first one.
    pub fn first_target(&self) -> usize {
        (self.prompt as usize).max(1)
    }

    /// Whether the model is asked for token `at`.
    pub fn asks(&self, at: usize) -> bool {
        at >= self.first_target() && !self.gaps.iter().any(|gap| gap.contains(&(at as u32)))
    }

    /// Tokens that the model is asked for.
    pub fn targets(&self) -> usize {
        let skipped: usize = self.gaps.iter().map(|gap| gap.len()).sum();
        self.tokens.len() - self.first_target() - skipped
    }
}

/// Is told how far reading has come.
pub trait Progress: Sync {
    /// A file of `bytes` bytes is about to be read.
    fn begin(&self, file: &str, bytes: u64);
    /// `bytes` more bytes have become examples.
    fn advance(&self, bytes: u64);
}

/// Nobody looks.
impl Progress for () {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// The strings of rows, for training a tokenizer: all of them, or those of the named `fields`, in order; of a list of
/// messages, what they say.
pub fn strings(named: &[PathBuf], fields: &[String], progress: &dyn Progress) -> Result<Vec<String>, Error> {
    let mut all = Vec::new();
    let mut paths = Vec::new();
    for path in named {
        paths.extend(files::files(path, "--data")?);
    }
    for path in &paths {
        let found = lines::map_lines(path, "--data", progress, |at, text| {
            let bad = |problem: String| Error::Row {
                place: format!("{}:{}", path.display(), at.line),
                problem,
                more: String::new(),
                remedy: String::new(),
            };
            let row: row::Row<'_> = serde_json::from_slice(text)
                .map_err(|error| bad(format!("malformed JSON ({error}); write one JSON object per line")))?;
            let wanted = |name: &str| fields.is_empty() || fields.iter().any(|f| f == name);
            let texts: Vec<String> = (row.fields.iter())
                .filter(|(name, _)| wanted(name))
                .flat_map(|(_, field)| match field {
                    row::Field::Text(text) => vec![text.to_string()],
                    row::Field::Other(value) => said(value),
                })
                .collect();
            match texts.is_empty() {
                true => Err(bad(format!(
                    "has no such string field; the row has {}; name one of them with --field",
                    row.names()
                ))),
                false => Ok(texts),
            }
        })?;
        if found.results.is_empty() {
            let problem = "has no rows; write one JSON object per line".into();
            return Err(Error::File { path: path.clone(), problem });
        }
        for texts in found.results {
            all.extend(texts?);
        }
    }
    Ok(all)
}

/// What the messages of a list say.
fn said(value: &serde_json::Value) -> Vec<String> {
    let content = |message: &serde_json::Value| {
        let text = message.get("content").or_else(|| message.get("value"))?.as_str()?;
        Some(text.to_owned())
    };
    value.as_array().into_iter().flatten().filter_map(content).collect()
}

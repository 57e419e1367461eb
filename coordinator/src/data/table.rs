//! One file of rows: read, rendered, tokenized and gated, in the order of the file.

use super::lines::map_lines;
use super::render::Renderer;
use super::row::Row;
use super::tokenizer::TextTokenizer;
use super::{Error, Progress};
use std::path::Path;
use std::sync::OnceLock;
use unisono_configs::run::{Data, OnBadRow};

/// A row that can be trained on.
pub struct Tokenized {
    /// Position among the rows of its file.
    pub row: u64,
    pub hash: u128,
    /// Prompt, completion, end of text.
    pub tokens: Box<[u32]>,
    /// First token of the completion.
    pub prompt: u32,
    /// The completion was cut at its right end and has lost its end of text.
    pub truncated: bool,
}

/// What a file held.
pub struct Rows {
    pub good: Vec<Tokenized>,
    /// Rows that are not blank, bad ones included.
    pub count: u64,
    pub dropped: u64,
    /// Place and problem of the first three bad rows.
    pub bad: Vec<String>,
}

/// What it takes to read a table's files.
pub struct Reading<'a> {
    pub data: &'a Data,
    pub table: &'a str,
    pub tokenizer: &'a TextTokenizer,
    pub vocab: usize,
    pub max_length: usize,
    pub progress: &'a dyn Progress,
}

/// A row's problem and the line and column it is on.
struct Bad {
    line: u64,
    column: Option<usize>,
    problem: String,
}

impl Reading<'_> {
    /// Reads `path`, which `key` of the configuration named.
    pub fn read(&self, path: &Path, key: &str) -> Result<Rows, Error> {
        check_kind(path)?;
        let renderer = OnceLock::new();
        let outcomes = map_lines(path, key, self.progress, |line, text| self.row(line, text, &renderer))?;
        let count = outcomes.len() as u64;
        if count == 0 {
            return Err(Error::File {
                path: path.into(),
                problem: "has no rows; write one JSON object per line".into(),
            });
        }
        let mut good = Vec::with_capacity(outcomes.len());
        let mut bad = Vec::new();
        for (row, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Ok(tokenized) => good.push(Tokenized { row: row as u64, ..tokenized }),
                Err(Stop::Row(problem)) => bad.push(problem),
                Err(Stop::All(error)) => return Err(error),
            }
        }
        let place = |b: &Bad| match b.column {
            Some(column) => format!("{}:{}:{column}", path.display(), b.line),
            None => format!("{}:{}", path.display(), b.line),
        };
        let shown: Vec<String> = bad.iter().take(3).map(|b| format!("{}: {}", place(b), b.problem)).collect();
        if let (Some(first), OnBadRow::Refuse) = (bad.first(), self.data.on_bad_row) {
            // Dropping every row would leave nothing.
            let remedy = match bad.len() as u64 == count {
                true if first.problem.contains("; set ") => "",
                true => "; correct the row, or data.template",
                false => "; correct the row, or set data.on_bad_row = \"drop\"",
            };
            let problem = first.problem.clone();
            return Err(Error::Row { place: place(first), problem, more: others(&bad, count), remedy });
        }
        let dropped = bad.len() as u64;
        if dropped as f64 > self.data.max_dropped * count as f64 {
            return Err(Error::TooManyDropped {
                path: path.into(),
                dropped,
                rows: count,
                allowed: self.data.max_dropped,
                first: shown.join("; "),
            });
        }
        Ok(Rows { good, count, dropped, bad: shown })
    }

    fn row(&self, line: u64, text: &[u8], renderer: &OnceLock<Renderer>) -> Result<Tokenized, Stop> {
        let bad = |problem: String| Stop::Row(Bad { line, column: None, problem });
        let text = std::str::from_utf8(text).map_err(|error| {
            bad(format!("byte {} of the line is not UTF-8; save the file as UTF-8", error.valid_up_to() + 1))
        })?;
        let row: Row<'_> = serde_json::from_str(text).map_err(|error| malformed(line, text, &error))?;
        let renderer = match renderer.get() {
            Some(renderer) => renderer,
            None => {
                let made = Renderer::new(self.data, self.table, &row).map_err(Stop::All)?;
                renderer.get_or_init(|| made)
            }
        };
        let rendered = renderer.render(&row).map_err(bad)?;
        if rendered.completion.trim().is_empty() {
            return Err(bad("the completion is empty".into()));
        }
        let mut tokens = self.tokenizer.encode_prompt(&rendered.prompt).map_err(Stop::All)?;
        let prompt = tokens.len();
        if prompt >= self.max_length {
            return Err(bad(format!(
                "the prompt fills the whole length ({prompt} tokens, train.max_length = {}) and leaves no completion token",
                self.max_length
            )));
        }
        tokens.extend(self.tokenizer.encode_completion(&rendered.completion).map_err(Stop::All)?);
        let eos = self.tokenizer.eos();
        if tokens[prompt..].iter().all(|&id| id == eos) {
            return Err(bad("the completion has no token but the end of text".into()));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Stop::All(self.tokenizer.beyond(*id, self.vocab)));
        }
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        let truncated = tokens.len() > self.max_length;
        tokens.truncate(self.max_length);
        Ok(Tokenized { row: 0, hash: row.hash(), tokens: tokens.into(), prompt: prompt as u32, truncated })
    }
}

/// Why a row yields no example: because of itself, or because nothing of the kind can be.
enum Stop {
    Row(Bad),
    All(Error),
}

fn malformed(line: u64, text: &str, error: &serde_json::Error) -> Stop {
    let message = error.to_string();
    // serde_json appends its own " at line 1 column 5".
    let message = message.split(" at line ").next().unwrap_or_default();
    let object = text.starts_with('{');
    let problem = match object {
        true if error.is_eof() => {
            "malformed JSON: the line ends inside the object; write one whole object per line".into()
        }
        true => format!("malformed JSON: {message}"),
        false => "the row is not a JSON object; write one object per line".into(),
    };
    Stop::Row(Bad { line, column: object.then(|| error.column()), problem })
}

/// Where further bad rows are.
fn others(bad: &[Bad], count: u64) -> String {
    let line = |index: usize| bad[index].line;
    match bad.len() {
        0 | 1 => String::new(),
        n if n as u64 == count => format!(" (all {n} rows are bad)"),
        2 => format!(" (line {} is bad, too)", line(1)),
        n => format!(" ({n} of {count} rows are bad, lines {} and {} among them)", line(1), line(2)),
    }
}

fn check_kind(path: &Path) -> Result<(), Error> {
    let refuse = |problem: &str| Err(Error::File { path: path.into(), problem: problem.into() });
    if path.is_dir() {
        return refuse("is a directory, which is not supported yet; name one .jsonl file per [[data]] table");
    }
    if !path.exists() && path.to_string_lossy().contains(['*', '?', '[']) {
        return refuse("globs are not supported yet; name one .jsonl file per [[data]] table");
    }
    Ok(())
}

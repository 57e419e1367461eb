//! One file of rows: read, rendered, tokenized and gated, in the order of the file.

use super::detect::Kind;
use super::files::files;
use super::gate::{Frame, Gate, Look, Texts, TokenFlaws, Turn, SAMPLE};
use super::lines::{first_rows, map_lines};
use super::render::{Rendered, Renderer};
use super::row::Row;
use super::tokenizer::TextTokenizer;
use super::{Error, Example, Progress};
use std::ops::Range;
use std::path::{Path, PathBuf};
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
    /// Later tokens that the model is not asked for.
    pub gaps: Box<[Range<u32>]>,
    /// The completion was cut at its right end and has lost its end of text.
    pub truncated: bool,
    /// Its line, and the position of its file among those of the table.
    pub line: u64,
    pub file: usize,
    pub look: Look,
    pub flaws: TokenFlaws,
}

/// What a file held.
pub struct Rows {
    pub good: Vec<Tokenized>,
    /// Rows that are not blank, bad ones included.
    pub count: u64,
    pub dropped: u64,
    /// Place and problem of the first three bad rows.
    pub bad: Vec<String>,
    /// What the rows look like, in the configuration's words.
    pub format: &'static str,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
}

/// What it takes to read a table's files.
pub struct Reading<'a> {
    pub data: &'a Data,
    pub table: &'a str,
    /// The model's directory.
    pub model: &'a Path,
    pub tokenizer: &'a TextTokenizer,
    pub vocab: usize,
    pub max_length: usize,
    pub gate: &'a Gate,
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
        let mut all: Option<Rows> = None;
        for file in files(path, key)? {
            let found = self.read_file(&file, key)?;
            match &mut all {
                None => all = Some(found),
                Some(all) => all.extend(found),
            }
        }
        let problem =
            || Error::File { path: path.into(), problem: "has no rows; write one JSON object per line".into() };
        all.ok_or_else(problem)
    }

    fn read_file(&self, path: &Path, key: &str) -> Result<Rows, Error> {
        let kind = Kind::of_file(self.data, path, key)?;
        let renderer = Renderer::new(self.data, self.table, kind, self.model)?;
        let frame = self.frame(path, key, &renderer)?;
        let outcomes = map_lines(path, key, self.progress, |line, text| self.row(line, text, &renderer, &frame))?;
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
        Ok(Rows { good, count, dropped, bad: shown, format: kind.name(), files: vec![path.into()] })
    }

    /// What the rows of a file have in common, by an even sample of its first ones.
    fn frame(&self, path: &Path, key: &str, renderer: &Renderer) -> Result<Frame, Error> {
        let first = first_rows(path, key, usize::MAX, <[u8]>::to_vec)?;
        let stride = first.len().div_ceil(SAMPLE).max(1);
        let rows = first.iter().step_by(stride).filter_map(|(_, text)| {
            let mut row: Row<'_> = serde_json::from_slice(text).ok()?;
            row.rename(&self.data.columns);
            Some(match renderer.render(&row).ok()? {
                Rendered::Pair { prompt, completion } => vec![prompt.into_owned(), completion.into_owned()],
                Rendered::Chat { messages, .. } => messages.into_iter().map(|(text, _)| text).collect(),
            })
        });
        let rows: Vec<Vec<String>> = rows.collect();
        Ok(Frame::learn(rows.iter().map(|row| row.iter().map(String::as_str))))
    }

    fn row(&self, line: u64, text: &[u8], renderer: &Renderer, frame: &Frame) -> Result<Tokenized, Stop> {
        let bad = |problem: String| Stop::Row(Bad { line, column: None, problem });
        let text = std::str::from_utf8(text).map_err(|error| {
            bad(format!("byte {} of the line is not UTF-8; save the file as UTF-8", error.valid_up_to() + 1))
        })?;
        let mut row: Row<'_> = serde_json::from_str(text).map_err(|error| malformed(line, text, &error))?;
        let hash = row.hash();
        row.rename(&self.data.columns);
        let (prompt, completion) = match renderer.render(&row).map_err(|problem| bad(self.own_names(problem)))? {
            Rendered::Pair { prompt, completion } => (prompt, completion),
            Rendered::Chat { text, spans, messages } => {
                let turns: Vec<Turn<'_>> = messages.iter().map(|(text, asked)| Turn { text, asked: *asked }).collect();
                let look = self.gate.look(&Texts { turns: &turns, pair: false }, frame);
                let found = self.conversation(&text, &spans).map_err(|stop| stop.on(line))?;
                return Ok(self.tokenized(found, hash, line, look));
            }
        };
        let turns = [Turn { text: &prompt, asked: false }, Turn { text: &completion, asked: true }];
        let look = self.gate.look(&Texts { turns: &turns, pair: true }, frame);
        if completion.trim().is_empty() {
            return Err(bad("the completion is empty".into()));
        }
        let mut tokens = self.tokenizer.encode_prompt(&prompt).map_err(Stop::All)?;
        let prompt = tokens.len();
        if prompt >= self.max_length {
            return Err(bad(format!(
                "the prompt fills the whole length ({prompt} tokens, train.max_length = {}) and leaves no completion token",
                self.max_length
            )));
        }
        tokens.extend(self.tokenizer.encode_completion(&completion).map_err(Stop::All)?);
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
        let example = Example { task: 0, row: 0, tokens: tokens.into(), prompt: prompt as u32, gaps: Box::default() };
        Ok(self.tokenized((example, truncated), hash, line, look))
    }

    /// A sentence about fields with the names that the rows have for them.
    fn own_names(&self, problem: String) -> String {
        let columns = self.data.columns.iter();
        columns.fold(problem, |text, (known, own)| text.replace(&format!("\"{known}\""), &format!("\"{own}\"")))
    }

    fn tokenized(&self, (example, truncated): (Example, bool), hash: u128, line: u64, look: Look) -> Tokenized {
        let flaws = self.gate.tokens(&example, truncated);
        let Example { tokens, prompt, gaps, .. } = example;
        Tokenized { row: 0, hash, tokens, prompt, gaps, truncated, line, file: 0, look, flaws }
    }

    /// A conversation's tokens, as far as the last that the model is asked for, and whether they were cut.
    fn conversation(&self, text: &str, spans: &[Range<usize>]) -> Result<(Example, bool), Stop> {
        let bad = |problem: String| Stop::Row(Bad { line: 0, column: None, problem });
        let (mut tokens, mut asked) = self.tokenizer.encode_spans(text, spans).map_err(Stop::All)?;
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Stop::All(self.tokenizer.beyond(*id, self.vocab)));
        }
        let length = |asked: &[bool]| asked.iter().rposition(|&a| a).map_or(0, |last| last + 1);
        if length(&asked[1.min(asked.len())..]) == 0 {
            return Err(bad("the turns to train on have no tokens".into()));
        }
        let whole = length(&asked);
        let prompt = asked.iter().position(|&a| a).unwrap_or(0);
        asked.truncate(whole.min(self.max_length));
        asked.truncate(length(&asked));
        if asked.len() < 2 {
            return Err(bad(format!(
                "the prompt fills the whole length ({prompt} tokens, train.max_length = {}) and leaves no completion token",
                self.max_length
            )));
        }
        tokens.truncate(asked.len());
        let mut gaps: Vec<Range<u32>> = Vec::new();
        for at in (prompt..asked.len()).filter(|&at| !asked[at]) {
            let at = at as u32;
            match gaps.last_mut() {
                Some(gap) if gap.end == at => gap.end += 1,
                _ => gaps.push(at..at + 1),
            }
        }
        let (tokens, gaps, truncated) = (tokens.into(), gaps.into(), whole > self.max_length);
        Ok((Example { task: 0, row: 0, tokens, prompt: prompt as u32, gaps }, truncated))
    }
}

/// Why a row yields no example: because of itself, or because nothing of the kind can be.
enum Stop {
    Row(Bad),
    All(Error),
}

impl Stop {
    fn on(self, line: u64) -> Self {
        match self {
            Stop::Row(bad) => Stop::Row(Bad { line, ..bad }),
            all => all,
        }
    }
}

impl Rows {
    /// The rows of a further file.
    fn extend(&mut self, other: Rows) {
        let (before, files) = (self.count, self.files.len());
        let later = |row: Tokenized| Tokenized { row: before + row.row, file: files + row.file, ..row };
        self.good.extend(other.good.into_iter().map(later));
        self.files.extend(other.files);
        self.count += other.count;
        self.dropped += other.dropped;
        self.bad.extend(other.bad);
        self.bad.truncate(3);
    }
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

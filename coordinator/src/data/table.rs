//! The text stage: every row of a table's files is read, rendered and checked as text, in the order of the files. Of a row
//! only its place and its hashes are kept.

use super::detect::Kind;
use super::files::files;
use super::gate::{sample, Frame, Gate, Look, Texts, Turn, SAMPLE};
use super::lines::{first_rows, map_lines, At};
use super::origin::Origin;
use super::problem::{Problem, Remedy};
use super::render::{Rendered, Renderer};
use super::row::Row;
use super::shots::Draws;
use super::{Error, Progress};
use std::path::Path;
use unisono_configs::run::{Data, OnBadRow};

/// A row whose text can be trained on.
pub struct Line {
    /// Position among the rows of its table.
    pub row: u64,
    /// Of the source, before rendering.
    pub hash: u128,
    /// Of the rendered text.
    pub key: u128,
    pub at: At,
    /// Bytes of the source.
    pub length: u32,
    /// Position of its file among [`Found::files`].
    pub file: u32,
    pub look: Look,
}

/// What the files of a path held.
pub struct Found {
    pub good: Vec<Line>,
    /// Rows that are not blank, bad ones included.
    pub count: u64,
    pub dropped: u64,
    /// Place and problem of the first three bad rows.
    pub bad: Vec<String>,
    /// What the rows look like, in the configuration's words.
    pub format: &'static str,
    /// How to get at the rows again.
    pub files: Vec<Origin>,
}

/// What it takes to read a table's files.
pub struct Reading<'a> {
    pub data: &'a Data,
    pub table: &'a str,
    /// The model's directory.
    pub model: &'a Path,
    pub gate: &'a Gate,
    pub draws: Draws,
    pub progress: &'a dyn Progress,
}

/// A row's problem and the line and column it is on.
struct Bad {
    line: u64,
    column: Option<usize>,
    problem: Problem,
}

impl Reading<'_> {
    /// Reads `path`, which `key` of the configuration named.
    pub fn read(&self, path: &Path, key: &str) -> Result<Found, Error> {
        let mut all: Option<Found> = None;
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

    fn read_file(&self, path: &Path, key: &str) -> Result<Found, Error> {
        let kind = Kind::of_file(self.data, path, key)?;
        let renderer = Renderer::new(self.data, self.table, kind, self.model, &self.draws)?;
        let frame = self.frame(path, key, &renderer)?;
        let mapped = map_lines(path, key, self.progress, |at, text| self.row(at, text, &renderer, &frame))?;
        let outcomes = mapped.results;
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
                Ok(line) => good.push(Line { row: row as u64, ..line }),
                Err(problem) => bad.push(problem),
            }
        }
        let place = |b: &Bad| match b.column {
            Some(column) => format!("{}:{}:{column}", path.display(), b.line),
            None => format!("{}:{}", path.display(), b.line),
        };
        let shown: Vec<String> = bad.iter().take(3).map(|b| format!("{}: {}", place(b), b.problem)).collect();
        if let (Some(first), OnBadRow::Refuse) = (bad.first(), self.data.on_bad_row) {
            let lines: Vec<u64> = bad.iter().map(|b| b.line).collect();
            return Err(refusal(place(first), first.problem.clone(), &lines, count));
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
        let files = vec![Origin::open(path, key, mapped.spool, renderer, self.data)?];
        Ok(Found { good, count, dropped, bad: shown, format: kind.name(), files })
    }

    /// What the rows of a file have in common, by an even sample of its first ones.
    fn frame(&self, path: &Path, key: &str, renderer: &Renderer) -> Result<Frame, Error> {
        let first = first_rows(path, key, usize::MAX, <[u8]>::to_vec)?;
        let rows = sample(first.len(), SAMPLE).filter_map(|index| {
            let (_, text) = &first[index];
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

    fn row(&self, at: At, bytes: &[u8], renderer: &Renderer, frame: &Frame) -> Result<Line, Bad> {
        let bad = |problem: Problem| {
            let problem = Problem { words: self.own_names(problem.words), remedy: problem.remedy };
            Bad { line: at.line, column: None, problem: problem.of(self.data) }
        };
        let said = |words: String| bad(Problem::new(words, Remedy::Said));
        let text = std::str::from_utf8(bytes).map_err(|error| {
            said(format!("byte {} of the line is not UTF-8; save the file as UTF-8", error.valid_up_to() + 1))
        })?;
        let mut row: Row<'_> = serde_json::from_str(text).map_err(|error| malformed(at.line, text, &error))?;
        row.rename(&self.data.columns);
        let hash = renderer.source(&row).map_err(bad)?;
        let rendered = renderer.render(&row).map_err(bad)?;
        let look = match &rendered {
            Rendered::Pair { completion, .. } if completion.trim().is_empty() => {
                return Err(bad("the completion is empty".into()));
            }
            Rendered::Pair { prompt, completion } => {
                let turns = [Turn { text: prompt, asked: false }, Turn { text: completion, asked: true }];
                self.gate.look(&Texts { turns: &turns, pair: true }, frame)
            }
            Rendered::Chat { messages, .. } => {
                let turns: Vec<Turn<'_>> = messages.iter().map(|(text, asked)| Turn { text, asked: *asked }).collect();
                self.gate.look(&Texts { turns: &turns, pair: false }, frame)
            }
        };
        let length = u32::try_from(bytes.len()).map_err(|_| bad("the row is longer than 4 GiB".into()))?;
        Ok(Line { row: 0, hash, key: rendered.key(), at, length, file: 0, look })
    }

    /// A sentence about fields with the names that the rows have for them.
    fn own_names(&self, problem: String) -> String {
        let columns = self.data.columns.iter();
        columns.fold(problem, |text, (known, own)| text.replace(&format!("\"{known}\""), &format!("\"{own}\"")))
    }
}

impl Found {
    /// The rows of a further file.
    fn extend(&mut self, other: Found) {
        let (before, files) = (self.count, self.files.len() as u32);
        let later = |line: Line| Line { row: before + line.row, file: files + line.file, ..line };
        self.good.extend(other.good.into_iter().map(later));
        self.files.extend(other.files);
        self.count += other.count;
        self.dropped += other.dropped;
        self.bad.extend(other.bad);
        self.bad.truncate(3);
    }
}

fn malformed(line: u64, text: &str, error: &serde_json::Error) -> Bad {
    let message = error.to_string();
    // serde_json appends its own " at line 1 column 5".
    let message = message.split(" at line ").next().unwrap_or_default();
    let object = text.starts_with('{');
    let problem = match object {
        true if error.is_eof() => {
            "malformed JSON: the line ends inside the object; write one whole object per line".into()
        }
        true => format!("malformed JSON: {message}").into(),
        false => Problem::new("the row is not a JSON object; write one object per line", Remedy::Format),
    };
    Bad { line, column: object.then(|| error.column()), problem }
}

/// Refuses a row for `problem`; `lines` are those of all bad rows that are known, of `count` rows.
pub fn refusal(place: String, problem: Problem, lines: &[u64], count: u64) -> Error {
    let remedy = problem.remedy.advice(lines.len() as u64 == count);
    Error::Row { place, problem: problem.words, more: others(lines, count), remedy }
}

/// Where further bad rows are.
fn others(lines: &[u64], count: u64) -> String {
    match *lines {
        [] | [_] => String::new(),
        _ if lines.len() as u64 == count => format!(" (all {count} rows are bad)"),
        [_, second] => format!(" (line {second} is bad, too)"),
        [_, second, third, ..] => {
            format!(" ({} of {count} rows are bad, lines {second} and {third} among them)", lines.len())
        }
    }
}

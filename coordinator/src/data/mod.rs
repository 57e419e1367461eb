//! From files of rows to examples of tokens: read, render, tokenize, gate, split, shuffle, pack. Everything here is a
//! pure function of the files and the configuration.

mod chat;
mod conversation;
mod detect;
mod error;
mod files;
pub mod gate;
mod lines;
mod pack;
mod parquet;
mod python;
mod render;
mod row;
mod shuffle;
mod split;
mod table;
#[cfg(test)]
mod tests;
mod tokenizer;
pub mod view;

pub use error::Error;
pub use pack::{pack, Packed};
pub use shuffle::order;
pub use tokenizer::TextTokenizer;

use gate::{Finding, Gate};
use split::{split, Part};
use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use table::{Reading, Rows, Tokenized};
use unisono_configs::model::ModelSpec;
use unisono_configs::run::{Data, Held, RunConfig};

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

/// All examples of a run. Tables in the order of the configuration, rows in the order of their files.
#[derive(Debug)]
pub struct Dataset {
    /// Names of the data tables.
    pub tasks: Vec<String>,
    pub train: Vec<Example>,
    pub validation: Vec<Example>,
    pub test: Vec<Example>,
    /// Token that ends a text.
    pub eos: u32,
    /// One for each task.
    pub reports: Vec<Report>,
    /// What the gate found, the gravest first.
    pub findings: Vec<Finding>,
}

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

/// Reads every data table of a resolved configuration.
pub fn prepare(config: &RunConfig, progress: &dyn Progress) -> Result<Dataset, Error> {
    let spec = ModelSpec::read(&config.model.path)?;
    let tokenizer = TextTokenizer::read(&config.model.path, spec.vocab)?;
    let mut dataset = Dataset {
        tasks: Vec::new(),
        train: Vec::new(),
        validation: Vec::new(),
        test: Vec::new(),
        eos: tokenizer.eos(),
        reports: Vec::new(),
        findings: Vec::new(),
    };
    let gate = Gate::new(config, &tokenizer)?;
    let mut judged = Judged::default();
    let mut rows = 0;
    for data in &config.data {
        let table = data.task();
        if dataset.tasks.contains(&table) {
            return Err(Error::Table { table, problem: "two tables have this name; set data.name".into() });
        }
        let reading = Reading {
            data,
            table: &table,
            model: &config.model.path,
            tokenizer: &tokenizer,
            vocab: spec.vocab,
            max_length: config.train.max_length,
            gate: &gate,
            progress,
        };
        rows = add_table(&mut dataset, config, &reading, rows, &mut judged)?;
        check_length(&dataset, &reading, spec.max_positions)?;
    }
    if dataset.train.is_empty() {
        return Err(Error::Table {
            table: dataset.tasks.join("\", \""),
            problem: "no row is left to train on; add rows, or lower split.validation and split.test".into(),
        });
    }
    dataset.findings = gate.judge(&judged.text);
    dataset.findings.extend(gate.judge_tokens(&judged.tokens));
    dataset.findings.sort_by_key(|finding| finding.severity);
    Ok(dataset)
}

/// What the gate has seen.
#[derive(Default)]
struct Judged {
    text: gate::Text,
    tokens: gate::Tokens,
}

impl Judged {
    fn row(&mut self, task: u32, part: Part, files: &[(u32, PathBuf)], row: &mut Tokenized) {
        let (file, path) = &files[row.file];
        let place = gate::Place { file: *file, line: row.line as u32 };
        self.text.row(task, part, place, std::mem::take(&mut row.look));
        self.tokens.row(task, row.flaws, || format!("{}:{}", path.display(), row.line));
    }
}

/// Adds one table to the data set; `rows` source rows precede it. Returns the source rows up to its end.
fn add_table(
    dataset: &mut Dataset,
    config: &RunConfig,
    reading: &Reading<'_>,
    mut rows: u64,
    judged: &mut Judged,
) -> Result<u64, Error> {
    let Data { path, validation, test, .. } = reading.data;
    let task = dataset.tasks.len() as u32;
    dataset.tasks.push(reading.table.to_owned());
    let share = |held: &Option<Held>, default: f64| match held {
        None => default,
        Some(Held::Share(share)) => *share,
        Some(Held::File(_)) => 0.0,
    };
    let main = reading.read(path, "data.path")?;
    let (task_name, format) = (reading.table.to_owned(), main.format);
    let mut report = Report { task: task_name, path: path.clone(), format, ..Report::default() };
    let hashes: Vec<u128> = main.good.iter().map(|r| r.hash).collect();
    let parts = split(&hashes, share(validation, config.split.validation), share(test, config.split.test));
    let shares = share(validation, config.split.validation) + share(test, config.split.test);
    judged.text.task(reading.table, shares > 0.0, &config.gate);
    judged.tokens.task(reading.table);
    let mut held_out = HashSet::new();
    let mut add = |found: Rows, part: &dyn Fn(usize) -> Part, report: &mut Report, dataset: &mut Dataset| {
        report.rows += found.count;
        report.dropped += found.dropped;
        report.bad.extend(found.bad);
        report.bad.truncate(3);
        let files: Vec<(u32, PathBuf)> =
            found.files.into_iter().map(|path| (judged.text.file(&path.display().to_string()), path)).collect();
        for (index, mut row) in found.good.into_iter().enumerate() {
            let part = part(index);
            report.count(&row, part);
            judged.row(task, part, &files, &mut row);
            let example = Example { task, row: rows + row.row, tokens: row.tokens, prompt: row.prompt, gaps: row.gaps };
            match part {
                Part::Train => dataset.train.push(example),
                Part::Validation => dataset.validation.push(example),
                Part::Test => dataset.test.push(example),
            }
        }
        rows += found.count;
    };
    add(main, &|index| parts[index], &mut report, dataset);
    for (held, key, part) in [(validation, "data.validation", Part::Validation), (test, "data.test", Part::Test)] {
        if let Some(Held::File(path)) = held {
            let found = reading.read(path, key)?;
            held_out.extend(found.good.iter().map(|r| r.hash));
            add(found, &|_| part, &mut report, dataset);
        }
    }
    let trained = hashes.iter().zip(&parts).filter(|(_, &part)| part == Part::Train);
    report.leaked = trained.filter(|(hash, _)| held_out.contains(hash)).count() as u64;
    dataset.reports.push(report);
    Ok(rows)
}

/// A model cannot be asked about positions that it never had.
fn check_length(dataset: &Dataset, reading: &Reading<'_>, positions: usize) -> Result<(), Error> {
    let longest = dataset.reports.last().map_or(0, |r| r.longest);
    if longest > positions + 1 {
        return Err(Error::Table {
            table: reading.table.to_owned(),
            problem: format!(
                "its longest row has {longest} tokens, but config.json says max_position_embeddings = {positions}; \
                 set train.max_length = {positions}"
            ),
        });
    }
    Ok(())
}

impl Report {
    fn count(&mut self, row: &Tokenized, part: Part) {
        *match part {
            Part::Train => &mut self.train,
            Part::Validation => &mut self.validation,
            Part::Test => &mut self.test,
        } += 1;
        let unasked = u64::from(row.prompt) + row.gaps.iter().map(|gap| gap.len() as u64).sum::<u64>();
        self.prompt_tokens += unasked;
        self.completion_tokens += row.tokens.len() as u64 - unasked;
        self.longest = self.longest.max(row.tokens.len());
        self.truncated += u64::from(row.truncated);
    }
}

/// The strings of JSONL rows, for training a tokenizer: all of them, or those of the named `fields`, in order.
pub fn strings(files: &[PathBuf], fields: &[String], progress: &dyn Progress) -> Result<Vec<String>, Error> {
    let mut all = Vec::new();
    for path in files {
        let found = lines::map_lines(path, "--data", progress, |line, text| {
            let bad = |problem: String| Error::File { path: path.clone(), problem: format!("line {line}: {problem}") };
            let row: row::Row<'_> =
                serde_json::from_slice(text).map_err(|error| bad(format!("malformed JSON ({error})")))?;
            let wanted = |name: &str| fields.is_empty() || fields.iter().any(|f| f == name);
            let texts: Vec<String> = (row.fields.iter())
                .filter(|(name, _)| wanted(name))
                .filter_map(|(_, field)| match field {
                    row::Field::Text(text) => Some(text.to_string()),
                    row::Field::Other(_) => None,
                })
                .collect();
            match texts.is_empty() {
                true => Err(bad(format!("has no such string field; the row has {}", row.names()))),
                false => Ok(texts),
            }
        })?;
        for texts in found {
            all.extend(texts?);
        }
    }
    Ok(all)
}

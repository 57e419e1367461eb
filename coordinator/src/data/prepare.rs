//! The text stage of all tables, and as much of the token stage as is wanted before a worker starts.

use super::cache::{make_room, Cache};
use super::dataset::{Content, Dataset, Table};
use super::encode::Encoder;
use super::gate::{self, Gate};
use super::origin::{Origin, Source};
use super::referee::Referee;
use super::report::Report;
use super::shots::Draws;
use super::split::{split, Part};
use super::store::Store;
use super::table::{Found, Line, Reading};
use super::tokenizer::TextTokenizer;
use super::{Error, Example, Progress};
use crate::run::plan::Rows;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Mutex;
use unisono_configs::model::ModelSpec;
use unisono_configs::run::{Held, Mixing, RunConfig, Unit};

/// Rows tokenized between two words about progress.
const PORTION: usize = 4096;

/// Which rows are tokenized before [`prepare`] returns. Held-out rows always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All.
    All,
    /// All where there are few (`tokens.ahead_above_mib`), or where mixing needs to know them; else none.
    Start,
}

/// What the text stage has gathered.
#[derive(Default)]
struct Gathered {
    tasks: Vec<String>,
    tables: Vec<Table>,
    reports: Vec<Report>,
    origins: Vec<Origin>,
    train: Vec<Source>,
    validation: Vec<Source>,
    test: Vec<Source>,
    text: gate::Text,
    /// Source rows of all tables so far.
    rows: u64,
}

/// Reads every data table of a resolved configuration.
pub fn prepare(config: &RunConfig, extent: Extent, progress: &dyn Progress) -> Result<Dataset, Error> {
    let spec = ModelSpec::read(&config.model.path)?;
    let tokenizer = TextTokenizer::read(&config.model.path, spec.vocab)?;
    let gate = Gate::new(config, &tokenizer)?;
    let (max_length, positions) = (config.train.max_length, spec.max_positions);
    let encoder = Encoder { tokenizer, gate, vocab: spec.vocab, max_length, positions };
    let mut gathered = Gathered::default();
    for data in &config.data {
        let table = data.task();
        if gathered.tasks.contains(&table) {
            return Err(Error::Table { table, problem: "two tables have this name; set data.name".into() });
        }
        gathered.add(
            config,
            &Reading {
                data,
                table: &table,
                model: &config.model.path,
                gate: &encoder.gate,
                draws: Draws::of(config, data)?,
                progress,
            },
        )?;
    }
    if gathered.train.is_empty() {
        return Err(Error::Table {
            table: gathered.tasks.join("\", \""),
            problem: "no row is left to train on; add rows, or lower split.validation and split.test".into(),
        });
    }
    gathered.dataset(config, encoder, extent, progress)
}

impl Gathered {
    /// Adds one table.
    fn add(&mut self, config: &RunConfig, reading: &Reading<'_>) -> Result<(), Error> {
        let data = reading.data;
        let share = |held: &Option<Held>, default: f64| match held {
            None => default,
            Some(Held::Share(share)) => *share,
            Some(Held::File(_)) => 0.0,
        };
        let main = reading.read(&data.path, "data.path")?;
        let (task, path) = (reading.table.to_owned(), data.path.clone());
        let mut report = Report { task: task.clone(), path: path.clone(), format: main.format, ..Report::default() };
        let hashes: Vec<u128> = main.good.iter().map(|line| line.hash).collect();
        let validation = share(&data.validation, config.split.validation);
        let test = share(&data.test, config.split.test);
        let parts = split(&hashes, validation, test);
        self.text.task(reading.table, validation + test > 0.0, &config.gate);
        self.take(main, &|index| parts[index], &mut report);
        let mut held_out = HashSet::new();
        let held = [(&data.validation, "data.validation", Part::Validation), (&data.test, "data.test", Part::Test)];
        for (held, key, part) in held {
            if let Some(Held::File(path)) = held {
                let found = reading.read(path, key)?;
                held_out.extend(found.good.iter().map(|line| line.hash));
                self.take(found, &|_| part, &mut report);
            }
        }
        let trained = hashes.iter().zip(&parts).filter(|(_, &part)| part == Part::Train);
        report.leaked = trained.filter(|(hash, _)| held_out.contains(hash)).count() as u64;
        let (on_bad_row, max_dropped) = (data.on_bad_row, data.max_dropped);
        self.tables.push(Table { path, on_bad_row, max_dropped, rows: report.rows, dropped: report.dropped });
        self.tasks.push(task);
        self.reports.push(report);
        Ok(())
    }

    /// Adds the rows of one path of the table that is being added.
    fn take(&mut self, found: Found, part: &dyn Fn(usize) -> Part, report: &mut Report) {
        report.rows += found.count;
        report.dropped += found.dropped;
        report.bad.extend(found.bad);
        report.bad.truncate(3);
        let (task, files) = (self.tasks.len() as u32, self.origins.len() as u32);
        let named: Vec<u32> = found.files.iter().map(|f| self.text.file(&f.path.display().to_string())).collect();
        for (index, line) in found.good.into_iter().enumerate() {
            let Line { row, key, at, length, file, look, .. } = line;
            let part = part(index);
            let place = gate::Place { file: named[file as usize], line: at.line as u32 };
            self.text.row(task, part, place, look);
            let source = Source {
                task,
                file: files + file,
                row: self.rows + row,
                line: at.line,
                offset: at.offset,
                length,
                key,
            };
            let (rows, count) = match part {
                Part::Train => (&mut self.train, &mut report.train),
                Part::Validation => (&mut self.validation, &mut report.validation),
                Part::Test => (&mut self.test, &mut report.test),
            };
            rows.push(source);
            *count += 1;
        }
        self.rows += found.count;
        self.origins.extend(found.files);
    }

    /// The token stage, as far as `extent`.
    fn dataset(
        self,
        config: &RunConfig,
        encoder: Encoder,
        extent: Extent,
        progress: &dyn Progress,
    ) -> Result<Dataset, Error> {
        let (eos, findings) = (encoder.tokenizer.eos(), encoder.gate.judge(&self.text));
        let cache = cache(config, &encoder);
        let (train, validation) = (self.train.len(), self.validation.len());
        let sources: Vec<Source> = [self.train, self.validation, self.test].concat();
        let held_out = train as u32..sources.len() as u32;
        let store = Store::new(encoder, self.origins, sources, self.tasks.len(), cache);
        let mut dataset = Dataset {
            tasks: self.tasks,
            validation: Vec::new(),
            test: Vec::new(),
            eos,
            findings,
            content: Content::Read { store: Box::new(store), train },
            tables: self.tables,
            reports: Mutex::new(self.reports),
        };
        let few = |bytes: u64| bytes as f64 <= config.tokens.ahead_above_mib * f64::from(1 << 20);
        let store = dataset.store().expect("it was just made");
        let held_bytes: u64 = held_out.clone().map(|row| u64::from(store.source(row).length)).sum();
        let weighed = config.mix.by != Mixing::All && config.mix.unit == Unit::CompletionTokens;
        let all = extent == Extent::All || weighed || few(store.unknown_bytes().saturating_sub(held_bytes));
        let rows: Vec<u32> = if all { (0..held_out.end).collect() } else { held_out.clone().collect() };
        tokenize(store, &rows, progress)?;
        // In the order of the tables and their files.
        let mut ordered = rows;
        ordered.sort_by_key(|&row| store.source(row).row);
        Referee::new(&dataset, []).see(ordered)?;
        let examples = |rows: std::ops::Range<u32>| -> Result<Vec<Example>, Error> {
            rows.filter_map(|row| store.example(row).transpose()).collect()
        };
        let tested = (train + validation) as u32;
        let (validation, test) = (examples(held_out.start..tested)?, examples(tested..held_out.end)?);
        (dataset.validation, dataset.test) = (validation, test);
        if dataset.all_known() && (0..train as u32).all(|row| dataset.is_left_out(row)) {
            return Err(Error::Table {
                table: dataset.tasks.join("\", \""),
                problem: "no row is left to train on; add rows, or lower split.validation and split.test".into(),
            });
        }
        if dataset.all_known() {
            dataset.findings.extend(dataset.token_findings());
            dataset.findings.sort_by_key(|finding| finding.severity);
        }
        Ok(dataset)
    }
}

fn tokenize(store: &Store, rows: &[u32], progress: &dyn Progress) -> Result<(), Error> {
    let unknown: Vec<u32> = rows.iter().copied().filter(|&row| !store.is_known(row)).collect();
    let bytes = |rows: &[u32]| rows.iter().map(|&row| u64::from(store.source(row).length)).sum::<u64>();
    progress.begin("tokenizing", bytes(&unknown));
    for portion in unknown.chunks(PORTION) {
        store.resolve(portion)?;
        progress.advance(bytes(portion));
    }
    Ok(())
}

/// The token cache of the user, if it can be had.
fn cache(config: &RunConfig, encoder: &Encoder) -> Option<Cache> {
    let limit = (config.tokens.cache_gib * f64::from(1 << 30)) as u64;
    if limit == 0 {
        return None;
    }
    let root = config.tokens.cache.clone().or_else(user_cache)?;
    let cache = Cache::open(&root, &encoder.identity());
    let holding = make_room(&root, limit);
    tracing::debug!(root = %root.display(), bytes = holding.bytes, removed = holding.removed, "token cache");
    match cache {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(
                "{}: tokens cannot be kept ({error}); the run goes on without; set tokens.cache",
                root.display()
            );
            None
        }
    }
}

/// `$XDG_CACHE_HOME/unisono/tokens`, else `~/.cache/unisono/tokens`.
pub fn user_cache() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("unisono").join("tokens"))
}

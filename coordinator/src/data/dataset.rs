//! All rows of a run: those to train on by number, and those held out as tokens.

use super::gate::Finding;
use super::report::Report;
use super::store::{Effort, Store};
use super::{Error, Example};
use crate::run::plan::{Rows, Size};
use std::path::PathBuf;
use std::sync::Mutex;
use unisono_configs::run::OnBadRow;

/// All rows of a run. Tables in the order of the configuration, rows in the order of their files.
pub struct Dataset {
    /// Names of the data tables.
    pub tasks: Vec<String>,
    pub validation: Vec<Example>,
    pub test: Vec<Example>,
    /// Token that ends a text.
    pub eos: u32,
    /// What the gate found, the gravest first: of the texts, and where all rows are tokens, of those.
    pub findings: Vec<Finding>,
    pub(super) content: Content,
    pub(super) tables: Vec<Table>,
    /// One for each task, as far as the text stage knows.
    pub(super) reports: Mutex<Vec<Report>>,
}

pub(super) enum Content {
    Given(Vec<Example>),
    /// The first `train` rows of the store are trained on.
    Read {
        store: Box<Store>,
        train: usize,
    },
}

/// What has to be known of a data table to judge its rows.
#[derive(Debug, Clone)]
pub struct Table {
    pub path: PathBuf,
    pub on_bad_row: OnBadRow,
    pub max_dropped: f64,
    pub rows: u64,
    /// Rows that the text stage dropped.
    pub dropped: u64,
}

impl Dataset {
    /// Rows that are tokens already.
    pub fn given(
        tasks: Vec<String>,
        train: Vec<Example>,
        validation: Vec<Example>,
        test: Vec<Example>,
        eos: u32,
    ) -> Self {
        let (content, reports) = (Content::Given(train), Mutex::default());
        Dataset { tasks, validation, test, eos, findings: Vec::new(), content, tables: Vec::new(), reports }
    }

    /// Rows to train on, those that will be left out included.
    pub fn train_rows(&self) -> usize {
        match &self.content {
            Content::Given(train) => train.len(),
            Content::Read { train, .. } => *train,
        }
    }

    /// A row to train on; `None` where it is left out.
    pub fn example(&self, row: u32) -> Result<Option<Example>, Error> {
        match &self.content {
            Content::Given(train) => Ok(train.get(row as usize).cloned()),
            Content::Read { store, .. } => store.example(row),
        }
    }

    /// Position of a training row among all source rows of all tables.
    pub fn source_row(&self, row: u32) -> u64 {
        match &self.content {
            Content::Given(train) => train[row as usize].row,
            Content::Read { store, .. } => store.source(row).row,
        }
    }

    pub fn task_of(&self, row: u32) -> usize {
        match &self.content {
            Content::Given(train) => train[row as usize].task as usize,
            Content::Read { store, .. } => store.source(row).task as usize,
        }
    }

    /// File and line of a training row; its number where no file is known.
    pub fn place_of(&self, row: u32) -> String {
        match &self.content {
            Content::Given(_) => format!("row {row}"),
            Content::Read { store, .. } => store.place_of(row),
        }
    }

    /// Whether a training row may be left out.
    pub fn may_drop(&self, row: u32) -> bool {
        self.tables.get(self.task_of(row)).is_some_and(|table| table.on_bad_row == OnBadRow::Drop)
    }

    /// Notes that an earlier part of the run left these rows out.
    pub fn leave_out(&self, rows: &[u32]) {
        if let Content::Read { store, .. } = &self.content {
            rows.iter().for_each(|&row| store.know(row, None));
        }
    }

    /// One for each task, with the tokens of all rows that are known by now.
    pub fn reports(&self) -> Vec<Report> {
        let reports = self.reports.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        match &self.content {
            Content::Given(_) => reports,
            Content::Read { store, .. } => {
                reports.into_iter().zip(store.tallies()).map(|(report, tally)| report.with(&tally)).collect()
            }
        }
    }

    /// What the gate says of the rows' tokens, as far as they are known, the gravest first.
    pub fn token_findings(&self) -> Vec<Finding> {
        self.store().map(|store| store.findings(&self.tasks)).unwrap_or_default()
    }

    /// What tokenizing has cost so far.
    pub fn effort(&self) -> Effort {
        self.store().map(Store::effort).unwrap_or_default()
    }

    pub(super) fn store(&self) -> Option<&Store> {
        match &self.content {
            Content::Given(_) => None,
            Content::Read { store, .. } => Some(store.as_ref()),
        }
    }

    pub(super) fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Remembers one of the first bad rows of a task.
    pub(super) fn note_bad(&self, task: usize, place: impl FnOnce() -> String) {
        let mut reports = self.reports.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(report) = reports.get_mut(task).filter(|r| r.bad.len() < 3) {
            report.bad.push(place());
        }
    }
}

impl Rows for Dataset {
    fn count(&self) -> usize {
        self.train_rows()
    }

    fn size(&self, row: u32) -> Option<Size> {
        match &self.content {
            Content::Given(train) => {
                let e = &train[row as usize];
                Some(Size { tokens: e.inputs() as u32, targets: e.targets() as u32, task: e.task })
            }
            // Steps are dealt after their rows were tokenized without an error, so this is the second time.
            Content::Read { store, .. } => store.size(row).unwrap_or_else(|error| {
                tracing::error!(%error, "a row that was read before cannot be read any more");
                None
            }),
        }
    }

    fn is_left_out(&self, row: u32) -> bool {
        self.store().is_some_and(|store| store.is_left_out(row))
    }

    fn all_known(&self) -> bool {
        self.store().is_none_or(Store::all_known)
    }
}

//! Which rows may be left out: `data.on_bad_row` and `data.max_dropped`, for rows that turn out bad when they are
//! tokenized. Rows are judged in the order in which they are shown, so that the verdict never depends on timing.

use super::dataset::Dataset;
use super::table::refusal;
use super::Error;
use std::collections::BTreeSet;
use unisono_configs::run::OnBadRow;

/// Has seen some rows.
pub struct Referee<'d> {
    dataset: &'d Dataset,
    left_out: BTreeSet<u32>,
    /// Rows left out, by task, those of the text stage included.
    dropped: Vec<u64>,
}

impl<'d> Referee<'d> {
    /// Rows in `left_out` were judged before.
    pub fn new(dataset: &'d Dataset, left_out: impl IntoIterator<Item = u32>) -> Self {
        let mut dropped: Vec<u64> = dataset.tables().iter().map(|table| table.dropped).collect();
        let left_out: BTreeSet<u32> = left_out.into_iter().collect();
        left_out.iter().for_each(|&row| dropped[dataset.task_of(row)] += 1);
        Referee { dataset, left_out, dropped }
    }

    /// Judges rows that are known by now.
    pub fn see(&mut self, rows: impl IntoIterator<Item = u32>) -> Result<(), Error> {
        let Some(store) = self.dataset.store() else { return Ok(()) };
        let bad = |&row: &u32| store.is_left_out(row);
        let new: Vec<u32> = rows.into_iter().filter(bad).filter(|&row| self.left_out.insert(row)).collect();
        for &row in &new {
            let task = self.dataset.task_of(row);
            let table = &self.dataset.tables()[task];
            let problem = store.problem(row)?;
            if table.on_bad_row == OnBadRow::Refuse {
                let same = new.iter().filter(|&&other| self.dataset.task_of(other) == task);
                let lines: Vec<u64> = same.map(|&other| store.source(other).line).collect();
                return Err(refusal(store.place_of(row), problem, &lines, table.rows));
            }
            self.dropped[task] += 1;
            if self.dropped[task] as f64 > table.max_dropped * table.rows as f64 {
                return Err(Error::TooManyDropped {
                    path: table.path.clone(),
                    dropped: self.dropped[task],
                    rows: table.rows,
                    allowed: table.max_dropped,
                    first: format!("{}: {problem}", store.place_of(row)),
                });
            }
            self.dataset.note_bad(task, || format!("{}: {problem}", store.place_of(row)));
        }
        Ok(())
    }
}

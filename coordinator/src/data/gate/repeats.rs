//! Rows that repeat others, as hashes sorted side by side.

use super::finding::{amount, Finding, SHOWN};
use super::kind::Kind;
use super::text::{Seen, Text};
use rayon::prelude::*;
use std::collections::BTreeMap;
use unisono_configs::run::Gate;

/// Rows that repeat an earlier one: how many, and the first few with the row they repeat.
#[derive(Debug, Default)]
struct Repeats {
    count: u64,
    /// Of them, those that do not recur for want of words.
    long: u64,
    first: Vec<(u32, u32)>,
}

impl Repeats {
    fn add(&mut self, row: u32, earlier: u32, long: bool) {
        self.count += 1;
        self.long += u64::from(long);
        let at = self.first.partition_point(|pair| *pair < (row, earlier));
        if at < SHOWN {
            self.first.insert(at, (row, earlier));
            self.first.truncate(SHOWN);
        }
    }

    fn places(&self, text: &Text) -> Vec<String> {
        let place = |row: u32| text.place(text.rows[row as usize].place);
        self.first.iter().map(|&(row, earlier)| format!("{} = {}", place(row), place(earlier))).collect()
    }
}

/// Rows by a hash, equal ones side by side in the order of the rows; those with hash 0 left out.
pub(super) fn sorted(rows: &[Seen], hash: impl Fn(&Seen) -> u64 + Sync) -> Vec<(u64, u32)> {
    let mut all: Vec<(u64, u32)> = rows
        .par_iter()
        .enumerate()
        .map(|(index, row)| (hash(row), index as u32))
        .filter(|&(hash, _)| hash != 0)
        .collect();
    all.par_sort_unstable();
    all
}

/// The rows of each group of equal hashes.
pub(super) fn groups(sorted: &[(u64, u32)]) -> impl Iterator<Item = &[(u64, u32)]> {
    sorted.chunk_by(|a, b| a.0 == b.0).filter(|group| group.len() > 1)
}

pub(super) fn find(text: &Text, gate: &Gate) -> Vec<Finding> {
    let rows = &text.rows;
    let task = |row: u32| rows[row as usize].task;
    let long = |row: u32| rows[row as usize].sketch.count > 2;
    let (mut same, mut near, mut prompts): (BTreeMap<u32, Repeats>, _, _) =
        (BTreeMap::new(), BTreeMap::<u32, Repeats>::new(), BTreeMap::<u32, Repeats>::new());
    let mut across: BTreeMap<(u32, u32), Repeats> = BTreeMap::new();
    for group in groups(&sorted(rows, |row| row.whole)) {
        // Rows come in the order of their tasks.
        for own in group.chunk_by(|a, b| task(a.1) == task(b.1)) {
            let first = own[0].1;
            own[1..].iter().for_each(|&(_, row)| same.entry(task(first)).or_default().add(row, first, long(row)));
            if task(first) != task(group[0].1) {
                let pair = across.entry((task(first), task(group[0].1))).or_default();
                own.iter().for_each(|&(_, row)| pair.add(row, group[0].1, true));
            }
        }
    }
    for group in groups(&sorted(rows, |row| row.loose)) {
        for own in group.chunk_by(|a, b| task(a.1) == task(b.1)) {
            let whole = |row: u32| rows[row as usize].whole;
            let first = own[0].1;
            let odd = own[1..].iter().filter(|&&(_, row)| whole(row) != whole(first));
            odd.for_each(|&(_, row)| near.entry(task(first)).or_default().add(row, first, true));
        }
    }
    for group in groups(&sorted(rows, |row| row.prompt)) {
        for own in group.chunk_by(|a, b| task(a.1) == task(b.1)) {
            let whole = |row: u32| rows[row as usize].whole;
            let first = own[0].1;
            let Some(&(_, other)) = own[1..].iter().find(|&&(_, row)| whole(row) != whole(first)) else { continue };
            let all = prompts.entry(task(first)).or_default();
            all.add(first, other, true);
            own[1..].iter().for_each(|&(_, row)| all.add(row, first, true));
        }
    }
    let mut findings = Vec::new();
    let mut add = |kind, number: u32, other: Option<u32>, found: &Repeats| {
        let task = &text.tasks[number as usize];
        let mut said = amount(found.count, task.rows(), "row");
        let other = other.map(|other| text.tasks[other as usize].name.as_str());
        other.iter().for_each(|other| said += &format!(" are also in \"{other}\""));
        let finding = Finding::new(gate, kind, &task.name, found.count, task.rows(), said);
        let share = |count: u64| count as f64 / task.rows() as f64;
        let chance = share(found.long) < gate.repeats && share(found.count) < gate.short_repeats;
        let finding = finding.map(|f| if kind == Kind::Duplicates && chance { f.mere() } else { f });
        findings.extend(finding.map(|f| Finding { other: other.map(str::to_owned), ..f.at(found.places(text)) }));
    };
    same.iter().for_each(|(task, found)| add(Kind::Duplicates, *task, None, found));
    near.iter().for_each(|(task, found)| add(Kind::NearDuplicates, *task, None, found));
    prompts.iter().for_each(|(task, found)| add(Kind::SharedPrompts, *task, None, found));
    across.iter().for_each(|((task, other), found)| add(Kind::RepeatedAcrossTasks, *task, Some(*other), found));
    findings
}

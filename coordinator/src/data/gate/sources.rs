//! Rows of one source: in two tasks, or on both sides of a split.
//!
//! Every held-out row, and an even sample of the others, is a *probe*. The word sequences of all rows are looked up among
//! those of the probes, so that time and memory grow with the rows and not with their pairs.

use super::finding::{amount, Finding, SHOWN};
use super::kind::Kind;
use super::repeats::{groups, sorted};
use super::text::{Seen, Text};
use super::words::sample;
use crate::data::split::Part;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use unisono_configs::run::Gate;

/// Rows of a task that are probes without being held out.
const SAMPLED: usize = 1000;
/// A sequence that more probes have is no one's own.
const COMMON: usize = 48;
/// Rows of one source that are remembered for a row.
const MOST: usize = 8;
/// A split of which so much is trained on says nothing.
const IDENTICAL: f64 = 0.9;

/// The word sequences of the probes.
struct Probes {
    /// Sequence and index of the row, sorted.
    known: Vec<(u32, u32)>,
    /// A bit for each sequence, by a hash of it: most of those looked up are none.
    bits: Vec<u64>,
}

/// 8 Mbit: a thousandth of it is set for every 8,000 sequences.
const BITS: u32 = 23;

impl Probes {
    fn new(rows: &[Seen], probes: &[u32]) -> Self {
        let mut known: Vec<(u32, u32)> = probes
            .iter()
            .flat_map(|&row| rows[row as usize].sketch.kept().iter().map(move |&hash| (hash, row)))
            .collect();
        known.par_sort_unstable();
        let mut kept = Vec::with_capacity(known.len());
        known
            .chunk_by(|a, b| a.0 == b.0)
            .filter(|same| same.len() <= COMMON)
            .for_each(|same| kept.extend_from_slice(same));
        let mut bits = vec![0u64; 1 << (BITS - 6)];
        for (hash, _) in &kept {
            let at = Self::bit(*hash);
            bits[at >> 6] |= 1 << (at & 63);
        }
        Probes { known: kept, bits }
    }

    fn bit(hash: u32) -> usize {
        // Sketches keep the smallest hashes: multiplying spreads them (Knuth's multiplicative hashing).
        (hash.wrapping_mul(0x9E37_79B1) >> (32 - BITS)) as usize
    }

    /// Rows that share at least three sequences with `row` and hold at least `similarity` of the smaller one.
    fn alike(&self, rows: &[Seen], row: u32, similarity: f64) -> Vec<u32> {
        let sketch = &rows[row as usize].sketch;
        let mut found: Vec<u32> = Vec::new();
        for &hash in sketch.kept() {
            let at = Self::bit(hash);
            if self.bits[at >> 6] >> (at & 63) & 1 == 1 {
                let from = self.known.partition_point(|known| known.0 < hash);
                found.extend(self.known[from..].iter().take_while(|known| known.0 == hash).map(|known| known.1));
            }
        }
        if found.len() < 3 {
            return Vec::new();
        }
        found.sort_unstable();
        let thrice = found.chunk_by(|a, b| a == b).filter(|same| same.len() >= 3).map(|same| same[0]);
        let alike = thrice.filter(|&probe| probe != row && rows[probe as usize].sketch.held(sketch) >= similarity);
        alike.take(MOST).collect()
    }
}

/// Rows to look for: all that are held out, and of each task an even sample.
fn probes(text: &Text) -> Vec<u32> {
    let mut probes = Vec::new();
    let mut first = 0;
    for task in &text.tasks {
        let rows = task.rows() as usize;
        let begin = probes.len();
        probes.extend(sample(rows, SAMPLED).map(|index| (first + index) as u32));
        probes.extend((first..first + rows).filter(|&row| text.rows[row].part != Part::Train).map(|row| row as u32));
        probes[begin..].sort_unstable();
        first += rows;
    }
    probes.dedup();
    probes
}

pub(super) fn find(text: &Text, gate: &Gate) -> Vec<Finding> {
    let rows = &text.rows;
    let probes = probes(text);
    let known = Probes::new(rows, &probes);
    // Pairs of a probe and a row of its source.
    let pairs: Vec<(u32, u32)> = (0..rows.len() as u32)
        .into_par_iter()
        .with_min_len(1024)
        .flat_map_iter(|row| known.alike(rows, row, gate.similarity).into_iter().map(move |probe| (probe, row)))
        .collect();
    let mut findings = leaks(text, gate, &pairs);
    findings.extend(shared(text, gate, &pairs, &probes));
    findings
}

/// Held-out rows and the first row trained on that has the same source.
fn leaks(text: &Text, gate: &Gate, alike: &[(u32, u32)]) -> Vec<Finding> {
    let rows = &text.rows;
    let part = |row: u32| rows[row as usize].part;
    let mut leaked: BTreeMap<u32, u32> = BTreeMap::new();
    let mut identical: BTreeSet<u32> = BTreeSet::new();
    for (hash, same) in [(0, sorted(rows, |row| row.whole)), (1, sorted(rows, |row| row.prompt))] {
        for group in groups(&same) {
            let Some(&(_, trained)) = group.iter().find(|&&(_, row)| part(row) == Part::Train) else { continue };
            for &(_, row) in group.iter().filter(|&&(_, row)| part(row) != Part::Train) {
                leaked.entry(row).or_insert(trained);
                if hash == 0 {
                    identical.insert(row);
                }
            }
        }
    }
    for &(probe, row) in alike {
        if part(probe) != Part::Train && part(row) == Part::Train {
            leaked.entry(probe).or_insert(row);
        }
    }
    let mut findings = Vec::new();
    for (number, task) in text.tasks.iter().enumerate() {
        let own = |row: &u32| rows[*row as usize].task == number as u32;
        let here: Vec<(u32, u32)> =
            leaked.iter().map(|(&row, &other)| (row, other)).filter(|(row, _)| own(row)).collect();
        for (which, name) in [(Part::Validation, "validation"), (Part::Test, "test")] {
            let held = task.parts[which as usize];
            let count = identical.iter().filter(|row| own(row) && part(**row) == which).count() as u64;
            if held > 0 && count as f64 >= IDENTICAL * held as f64 {
                let text = format!("{} held out for {name}", amount(count, held, "row"));
                findings.extend(Finding::new(gate, Kind::IdenticalSplit, &task.name, count, held, text));
            }
        }
        if here.is_empty() {
            continue;
        }
        let held = task.parts[Part::Validation as usize] + task.parts[Part::Test as usize];
        let others: BTreeSet<u32> = here.iter().map(|&(_, other)| rows[other as usize].task).collect();
        let names: Vec<String> =
            others.iter().map(|&other| format!("\"{}\"", text.tasks[other as usize].name)).take(3).collect();
        let said = format!(
            "{}, of sources trained on in {}",
            amount(here.len() as u64, held, "held-out row"),
            names.join(", ")
        );
        let place = |row: u32| text.place(rows[row as usize].place);
        let places =
            here.iter().take(SHOWN).map(|&(row, other)| format!("{} ~ {}", place(row), place(other))).collect();
        let finding = Finding::new(gate, Kind::SplitLeak, &task.name, here.len() as u64, held, said);
        findings.extend(finding.map(|f| f.at(places)));
    }
    findings
}

/// Pairs of tasks that are made of the same source texts.
fn shared(text: &Text, gate: &Gate, alike: &[(u32, u32)], probes: &[u32]) -> Vec<Finding> {
    let rows = &text.rows;
    let mut pairs: BTreeMap<(u32, u32), BTreeMap<u32, u32>> = BTreeMap::new();
    for &(probe, row) in alike {
        let (a, b) = (rows[probe as usize].task, rows[row as usize].task);
        if a < b {
            pairs.entry((a, b)).or_default().entry(probe).or_insert(row);
        }
    }
    let mut findings = Vec::new();
    for ((a, b), found) in pairs {
        let looked = probes.iter().filter(|&&probe| rows[probe as usize].task == a).count() as u64;
        let (first, second) = (&text.tasks[a as usize], &text.tasks[b as usize]);
        let count = found.len() as u64;
        let sampled = if looked < first.rows() { " looked at" } else { "" };
        let said = format!("{}{sampled} have the source of a row of \"{}\"", amount(count, looked, "row"), second.name);
        let place = |row: u32| text.place(rows[row as usize].place);
        let places =
            found.iter().take(SHOWN).map(|(&row, &other)| format!("{} ~ {}", place(row), place(other))).collect();
        let finding = Finding::new(gate, Kind::SharedSources, &first.name, count, looked, said);
        findings.extend(finding.map(|f| f.at(places).with(&second.name)));
    }
    findings
}

//! Every row of a run seen once, and what that says of its tasks.

use super::answers::Answers;
use super::finding::{amount, Finding, SHOWN};
use super::kind::Kind;
use super::look::{Flaws, Look, Seam};
use super::marks::{Mark, Marks};
use super::words::Sketch;
use super::{repeats, sources};
use crate::data::split::Part;
use std::collections::BTreeMap;
use unisono_configs::run::Gate;

/// Where a row is: a file of [`Text::file`] and a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub file: u32,
    pub line: u32,
}

/// What is kept of a row until the end: about a hundred bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub prompt: u64,
    pub whole: u64,
    pub loose: u64,
    pub sketch: Sketch,
    pub seam: Seam,
    pub place: Place,
    pub task: u32,
    pub part: Part,
}

/// Rows with a flaw: how many, and the first few.
#[derive(Debug, Default)]
struct Tally {
    count: u64,
    places: Vec<Place>,
    /// The first of them that says which.
    mark: Option<u16>,
}

#[derive(Debug)]
pub(super) struct Task {
    pub name: String,
    /// Shares of it are to be held out.
    held: bool,
    /// Rows to train on, to validate on, to test on.
    pub parts: [u64; 3],
    tallies: BTreeMap<u8, Tally>,
    answers: Answers,
}

impl Task {
    pub fn rows(&self) -> u64 {
        self.parts.iter().sum()
    }
}

/// All rows that can be trained on, task by task in the order of the configuration.
#[derive(Debug, Default)]
pub struct Text {
    files: Vec<String>,
    pub(super) tasks: Vec<Task>,
    pub(super) rows: Vec<Seen>,
}

/// Flaws that are counted, in the order of their bits.
const COUNTED: [Flaws; 12] = [
    Flaws::END,
    Flaws::END_LAST,
    Flaws::SPECIAL,
    Flaws::FOREIGN,
    Flaws::BRACES,
    Flaws::BROKEN,
    Flaws::GLUED,
    Flaws::NO_PROMPT,
    Flaws::EMPTY_TURN,
    Flaws::ECHO,
    Flaws::PLACEHOLDER,
    Flaws::HEADING,
];

impl Text {
    /// A further task; `held`: shares of its rows are to be held out. Returns its number.
    pub fn task(&mut self, name: &str, held: bool, gate: &Gate) -> u32 {
        let answers = Answers::new(gate.most_labels);
        self.tasks.push(Task { name: name.into(), held, parts: [0; 3], tallies: BTreeMap::new(), answers });
        self.tasks.len() as u32 - 1
    }

    /// A further file, for the [`Place`] of its rows.
    pub fn file(&mut self, name: &str) -> u32 {
        self.files.push(name.to_owned());
        self.files.len() as u32 - 1
    }

    /// The next row.
    pub fn row(&mut self, task: u32, part: Part, place: Place, look: Look) {
        let known = &mut self.tasks[task as usize];
        known.parts[part as usize] += 1;
        if look.flaws.any() {
            for (bit, flaw) in COUNTED.iter().enumerate().filter(|(_, flaw)| look.flaws.has(**flaw)) {
                let tally = known.tallies.entry(bit as u8).or_default();
                tally.count += 1;
                if tally.places.len() < SHOWN {
                    tally.places.push(place);
                }
                let slot = [Flaws::END, Flaws::SPECIAL, Flaws::FOREIGN, Flaws::HEADING].iter().position(|f| f == flaw);
                tally.mark = tally.mark.or(slot.map(|slot| look.marks[slot]));
            }
        }
        known.answers.add(look.answer, look.label, place);
        let Look { prompt, whole, loose, sketch, seam, .. } = look;
        self.rows.push(Seen { prompt, whole, loose, sketch, seam, place, task, part });
    }

    pub(super) fn place(&self, place: Place) -> String {
        format!("{}:{}", self.files[place.file as usize], place.line)
    }

    fn places(&self, places: &[Place]) -> Vec<String> {
        places.iter().map(|&place| self.place(place)).collect()
    }

    /// What is to be said, task by task.
    pub fn finish(&self, gate: &Gate, marks: &Marks) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (number, task) in self.tasks.iter().enumerate() {
            self.flaws(task, gate, marks, &mut findings);
            findings.extend(self.seams(number as u32, task, gate));
            for (kind, count, text, places) in task.answers.judge(gate) {
                let finding = Finding::new(gate, kind, &task.name, count, task.rows(), text);
                findings.extend(finding.map(|f| f.at(self.places(&places))));
            }
            findings.extend(small(task, gate));
        }
        findings.extend(repeats::find(self, gate));
        findings.extend(sources::find(self, gate));
        findings
    }

    /// What single rows have.
    fn flaws(&self, task: &Task, gate: &Gate, marks: &Marks, findings: &mut Vec<Finding>) {
        let rows = task.rows();
        let tally = |flaw: Flaws| {
            let bit = COUNTED.iter().position(|known| *known == flaw).unwrap_or_default() as u8;
            task.tallies.get(&bit)
        };
        let mut add = |kind, flaw, more: &dyn Fn(Option<&Mark>) -> String| {
            let Some(found) = tally(flaw) else { return };
            let more = more(found.mark.map(|mark| marks.get(mark)));
            let text = format!("{}{more}", amount(found.count, rows, "row"));
            let finding = Finding::new(gate, kind, &task.name, found.count, rows, text);
            findings.extend(finding.map(|f| f.at(self.places(&found.places))));
        };
        let quoted = |mark: Option<&Mark>| mark.map_or_else(String::new, |mark| format!("\"{}\"", mark.text.trim()));
        let nothing = |_: Option<&Mark>| String::new();
        let last = tally(Flaws::END_LAST).map_or(0, |t| t.count);
        add(Kind::EndOfText, Flaws::END, &|mark| {
            let place = if last > 0 { "end with" } else { "hold" };
            let known = if mark.is_some_and(|m| m.own) { "takes for its own" } else { "does not know" };
            format!(" {place} {}, which the tokenizer {known}", quoted(mark))
        });
        add(Kind::SpecialTokens, Flaws::SPECIAL, &|mark| format!(" hold {}", quoted(mark)));
        add(Kind::TemplateDrift, Flaws::FOREIGN, &|mark| format!(" hold {}", quoted(mark)));
        // Of nearly all rows it is the way: alpaca's, or the user's own.
        if tally(Flaws::HEADING).is_some_and(|t| t.count * 20 < rows * 19) {
            add(Kind::TemplateDrift, Flaws::HEADING, &|mark| format!(" hold {}", quoted(mark)));
        }
        add(Kind::UnrenderedTemplate, Flaws::BRACES, &nothing);
        add(Kind::BrokenText, Flaws::BROKEN, &nothing);
        add(Kind::GluedSeam, Flaws::GLUED, &nothing);
        // A task of plain texts has no prompts at all.
        if tally(Flaws::NO_PROMPT).is_some_and(|t| t.count < rows) {
            add(Kind::EmptyTurns, Flaws::NO_PROMPT, &|_| " have an empty prompt".into());
        }
        add(Kind::EmptyTurns, Flaws::EMPTY_TURN, &|_| " have an empty message".into());
        add(Kind::PromptEcho, Flaws::ECHO, &nothing);
        add(Kind::PlaceholderAnswers, Flaws::PLACEHOLDER, &nothing);
    }

    /// Rows whose prompt ends, or whose completion begins, unlike nearly all others.
    fn seams(&self, number: u32, task: &Task, gate: &Gate) -> Option<Finding> {
        if task.rows() < gate.least_rows as u64 {
            return None;
        }
        let first = self.rows.partition_point(|row| row.task < number);
        let rows = &self.rows[first..first + task.rows() as usize];
        // A feature that nearly all rows share is the table's way; the rest departs from it.
        let odd = |feature: &dyn Fn(&Seen) -> u64, least: u64| -> Vec<usize> {
            // A row without a prompt has no seam.
            let mut values: Vec<u64> = rows.iter().filter(|row| row.prompt != 0).map(feature).collect();
            values.sort_unstable();
            let most = values.chunk_by(|a, b| a == b).max_by_key(|same| same.len());
            match most {
                Some(same) if same[0] >= least && same.len() < rows.len() && same.len() * 20 >= rows.len() * 19 => {
                    (0..rows.len()).filter(|&i| rows[i].prompt != 0 && feature(&rows[i]) != same[0]).collect()
                }
                _ => Vec::new(),
            }
        };
        let mut found = odd(&|row| u64::from(row.seam.ending), 1);
        found.extend(odd(&|row| u64::from(row.seam.after), 0));
        found.extend(odd(&|row| u64::from(row.seam.before), 0));
        found.sort_unstable();
        found.dedup();
        let places: Vec<Place> = found.iter().take(SHOWN).map(|&i| rows[i].place).collect();
        let count = found.len() as u64;
        let text = format!("{} have another last word, or other white space there", amount(count, task.rows(), "row"));
        let finding = (count > 0).then(|| Finding::new(gate, Kind::UnevenSeam, &task.name, count, task.rows(), text));
        finding.flatten().map(|f| f.at(self.places(&places)))
    }
}

/// A task of which shares are to be held out, with too few rows for that.
fn small(task: &Task, gate: &Gate) -> Option<Finding> {
    let [train, validation, test] = task.parts;
    let (rows, out) = (task.rows(), validation + test);
    if !task.held || train == 0 || (out > 0 && rows >= gate.least_rows as u64) {
        return None;
    }
    Finding::new(gate, Kind::SmallSplit, &task.name, rows, rows, format!("{rows} rows, {out} of them held out"))
}

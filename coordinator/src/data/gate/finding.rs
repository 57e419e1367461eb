//! What the gate found, as a sentence for people and fields for scripts.

use super::kind::Kind;
use serde::Serialize;
use unisono_configs::run::{Gate, Level};

/// Places that a finding shows.
pub const SHOWN: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Ends the run before a worker starts.
    Error,
    Warning,
    /// Too rare to matter, by the configuration.
    Note,
}

/// One kind of flaw in one task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    pub kind: Kind,
    pub severity: Severity,
    pub task: String,
    /// The other task, where there are two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other: Option<String>,
    /// Rows concerned, out of `of`.
    pub count: u64,
    pub of: u64,
    pub share: f64,
    /// The first few, as file:line.
    pub places: Vec<String>,
    /// What it is in this task, in words.
    pub text: String,
    /// What to do.
    pub remedy: &'static str,
}

impl Finding {
    /// None where the configuration does not look for it. `count` rows out of `of`.
    pub fn new(gate: &Gate, kind: Kind, task: &str, count: u64, of: u64, text: String) -> Option<Self> {
        let share = if of == 0 { 0.0 } else { count as f64 / of as f64 };
        let severity = match kind.level(gate) {
            Level::Off => return None,
            _ if share < kind.tolerated(gate) => Severity::Note,
            Level::Warn => Severity::Warning,
            Level::Refuse => Severity::Error,
        };
        let task = task.to_owned();
        Some(Finding {
            kind,
            severity,
            task,
            other: None,
            count,
            of,
            share,
            places: Vec::new(),
            text,
            remedy: kind.remedy(),
        })
    }

    pub fn at(self, places: Vec<String>) -> Self {
        Finding { places, ..self }
    }

    pub fn with(self, other: &str) -> Self {
        Finding { other: Some(other.to_owned()), ..self }
    }

    /// Too rare to matter after all.
    pub fn mere(self) -> Self {
        Finding { severity: Severity::Note, ..self }
    }

    /// As `--strict` takes it: a warning ends the run.
    pub fn stricter(self) -> Self {
        let severity = match self.severity {
            Severity::Warning => Severity::Error,
            severity => severity,
        };
        Finding { severity, ..self }
    }
}

/// The gravest first, then by task and kind as they were found.
pub fn sort(findings: &mut [Finding]) {
    findings.sort_by_key(|finding| finding.severity);
}

/// "every row", "3 of 200 rows"
pub fn amount(count: u64, of: u64, noun: &str) -> String {
    match count {
        _ if count == of && of > 1 => format!("all {of} {noun}s"),
        1 => format!("1 of {of} {noun}s"),
        _ => format!("{count} of {of} {noun}s"),
    }
}

//! A directive under way: what it asks, and who has answered.

use super::program::{Expected, Item};
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{GenerateReport, StepReport};

pub(super) struct Outstanding {
    pub(super) id: u64,
    pub(super) item: Item,
    pub(super) expected: Expected,
    /// By rank.
    reports: Vec<Option<Report>>,
    /// Ranks that have not answered.
    missing: usize,
}

impl Outstanding {
    pub(super) fn new(id: u64, item: Item, expected: Expected, world: usize) -> Self {
        Outstanding { id, item, expected, reports: vec![None; world], missing: world }
    }

    pub(super) fn reports(&self) -> &[Option<Report>] {
        &self.reports
    }

    /// The one answer of a rank.
    pub(super) fn answer(&mut self, rank: usize, report: Report) {
        self.missing -= usize::from(self.reports[rank].replace(report).is_none());
    }

    pub(super) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Whether `report` is an answer to this directive.
    pub(super) fn is_answered_by(&self, report: &Report) -> bool {
        match (self.item, report) {
            (Item::Step(step) | Item::Probe(step), Report::Step(report)) => report.step == step,
            (Item::Evaluate { .. }, Report::Evaluate(report)) => report.id == self.id,
            (Item::Checkpoint(step), Report::Copied(report)) => report.step == step,
            (Item::Generate(_), Report::Generate(report)) => report.id == self.id,
            (Item::Finish, Report::Drained(_)) => true,
            _ => false,
        }
    }
}

/// The report in words.
pub(super) fn name(report: &Report) -> String {
    match report {
        Report::Step(report) => format!("a report of step {}", report.step),
        Report::Evaluate(report) => format!("the evaluation of directive {}", report.id),
        Report::Copied(report) => format!("the copy after step {}", report.step),
        Report::Generate(report) => format!("the continuations of directive {}", report.id),
        Report::Drained(_) => "the word that it has drained".into(),
        _ => "a message out of turn".into(),
    }
}

pub(super) fn step_of(report: &Report) -> Option<StepReport> {
    match report {
        Report::Step(report) => Some(report.clone()),
        _ => None,
    }
}

pub(super) fn generate_of(report: &Report) -> Option<GenerateReport> {
    match report {
        Report::Generate(report) => Some(report.clone()),
        _ => None,
    }
}

//! Workers that stumbled over a peer, and who is to blame once all have had time to say so: whoever is silent to one rank may
//! itself be waiting for another.

use super::machine::Machine;
use unisono_proto::v1::{Failure, Heartbeat, Phase};

#[derive(Debug, Clone, Default)]
pub(super) struct Complaints {
    /// When the first came.
    since: f64,
    said: Vec<Complaint>,
    /// Bad numbers, each with the directive that gave it.
    numbers: Vec<(u64, Failure)>,
}

#[derive(Debug, Clone)]
struct Complaint {
    by: usize,
    of: usize,
    failure: Failure,
}

impl Complaints {
    pub(super) fn clear(&mut self) {
        self.said.clear();
        self.numbers.clear();
    }

    /// What directive `id` gave is a bad number; directives before it are not settled yet.
    pub(super) fn note_number(&mut self, id: u64, failure: Failure) {
        self.numbers.push((id, failure));
    }

    /// The first bad number that directive `id` gave.
    pub(super) fn take_number(&mut self, id: u64) -> Option<Failure> {
        let place = self.numbers.iter().position(|(of, _)| *of == id)?;
        Some(self.numbers.remove(place).1)
    }

    /// Rank `by` says what failed, and that `of` is the cause.
    pub(super) fn hear(&mut self, now: f64, by: usize, of: usize, failure: Failure) {
        if self.said.is_empty() {
            self.since = now;
        }
        // Who could not load the state leaves the others alone, who may say so first.
        let at = if failure.snapshot { 0 } else { self.said.len() };
        self.said.insert(at, Complaint { by, of, failure });
    }

    /// Whether the first was heard more than `seconds` ago.
    pub(super) fn are_ripe(&self, now: f64, seconds: f64) -> bool {
        !self.said.is_empty() && now - self.since > seconds
    }
}

impl Machine {
    /// Whom the complaints accuse, and what was said of it: rather one that has not complained itself and does not say that it
    /// waits for others, and of those the one that is furthest behind.
    pub(super) fn blamed(&self) -> Option<(usize, Failure)> {
        let said = &self.complaints.said;
        if let Some(first) = said.first().filter(|first| first.failure.snapshot) {
            return Some((first.of, first.failure.clone()));
        }
        let guilt = |complaint: &&Complaint| {
            let worker = &self.roster.workers()[complaint.of];
            let complained = said.iter().any(|other| other.by == complaint.of && complaint.by != complaint.of);
            let Heartbeat { waits, exchange, .. } = &worker.heartbeat;
            let waits = *waits || exchange.is_some() || matches!(worker.phase(), Phase::Reduce | Phase::Gather);
            (complained, waits, worker.answered, worker.phase())
        };
        said.iter().min_by_key(guilt).map(|complaint| (complaint.of, complaint.failure.clone()))
    }
}

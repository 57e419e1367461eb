//! Hangs: a worker whose heartbeats go on, and whose computing does not. How long a phase may take follows from how long it
//! took before, and from nothing but what workers say.

use super::machine::Machine;
use super::phases::Phase;
use super::roster::Worker;
use std::collections::{BTreeMap, VecDeque};
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Heartbeat, Phase as Place, StepReport};

/// A phase may take so many times its median.
const TIMES: f64 = 10.0;
/// Durations that a median is taken over.
const KEPT: usize = 64;
/// Durations before there is a median: the first of a phase compile, allocate and read.
const ENOUGH: usize = 3;
/// Seconds that a phase may take as long as nothing is known of it; and one at any time whose length varies by nature.
const UNKNOWN: f64 = 3600.0;
/// Seconds that whatever is computed between exchanges may take at any time.
const BETWEEN: f64 = 60.0;

/// How long each phase took, of the last ones of all ranks.
#[derive(Debug, Clone, Default)]
pub(super) struct Durations(BTreeMap<Place, VecDeque<f64>>);

impl Durations {
    /// An answer of a rank whose last sign of life was `last`.
    pub(super) fn note(&mut self, report: &Report, last: &Heartbeat) {
        // What was over before a heartbeat could tell of it took next to nothing.
        let told = |phase: Place| if last.phase() == phase { last.seconds } else { 0.0 };
        match report {
            Report::Step(StepReport { seconds: Some(seconds), parts, .. }) => {
                // Whoever had nothing to compute shows nothing.
                if !parts.is_empty() {
                    self.keep(Place::Forward, seconds.data + seconds.compute);
                }
                self.keep(Place::Update, seconds.update);
                // Of the exchanges' own time nothing is computed.
                if seconds.snapshot > 0.0 {
                    self.keep(Place::Gather, seconds.snapshot);
                }
            }
            Report::Evaluate(_) => self.keep(Place::Evaluate, told(Place::Evaluate)),
            Report::Generate(_) => self.keep(Place::Generate, told(Place::Generate)),
            Report::Copied(_) => self.keep(Place::Checkpoint, told(Place::Checkpoint)),
            Report::Ready(_) => self.keep(Place::Load, told(Place::Load)),
            _ => {}
        }
    }

    fn keep(&mut self, phase: Place, seconds: f64) {
        let kept = self.0.entry(phase).or_default();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(seconds);
    }

    fn median(&self, phase: Place) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.get(&phase)?.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        (sorted.len() >= ENOUGH).then(|| sorted[sorted.len() / 2])
    }

    /// Seconds for which a rank may compute in `phase` without progress before it hangs, and the median that they follow from;
    /// `floor` is the least. `None`: whoever is there computes nothing.
    fn deadline(&self, phase: Place, floor: f64) -> Option<(f64, Option<f64>)> {
        let median = self.median(phase);
        let scaled = median.map(|median| (TIMES * median).max(floor));
        match phase {
            Place::Forward | Place::Update | Place::Evaluate => Some((scaled.unwrap_or(UNKNOWN.max(floor)), median)),
            // Between exchanges next to nothing is computed; but copies for snapshots are made there.
            Place::Reduce | Place::Gather => Some((scaled.unwrap_or(floor).max(BETWEEN), median)),
            // A large model comes from a slow disk; continuations are as long as they are.
            Place::Checkpoint | Place::Load | Place::Generate => Some((scaled.unwrap_or(floor).max(UNKNOWN), median)),
            Place::Unspecified | Place::Join | Place::Drain => None,
        }
    }
}

impl Machine {
    /// The rank that has made no progress for longest beyond its deadline, and how that is said.
    pub(super) fn hanging(&self) -> Option<(usize, String)> {
        if !matches!(self.phase, Phase::Loading | Phase::Running) {
            return None;
        }
        // Whoever is further on may wait for who is behind.
        let place = |worker: &Worker| (worker.answered, worker.phase());
        let behind = self.roster.workers().iter().filter(|w| computes(w)).map(place).min();
        let overdue = |(rank, worker): (usize, &Worker)| {
            let seconds = worker.heartbeat.seconds;
            // No deadline is shorter.
            if !computes(worker) || seconds <= self.settings.hang_after || Some(place(worker)) != behind {
                return None;
            }
            let phase = worker.phase();
            let (deadline, median) = self.durations.deadline(phase, self.settings.hang_after)?;
            if seconds <= deadline {
                return None;
            }
            let usual = match median {
                Some(median) => format!("it takes {median:.2} s as a rule"),
                None => "nothing is known of how long it takes".to_owned(),
            };
            let how = format!(
                "it hangs: its heartbeats go on, and it has made no progress in {} for {seconds:.1} s, where {usual} and {deadline:.1} s are the limit",
                phase.word()
            );
            Some((seconds / deadline, rank, how))
        };
        let all = self.roster.workers().iter().enumerate().filter_map(overdue);
        all.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, rank, how)| (rank, how))
    }
}

/// Whether a worker waits for nobody, as it says.
fn computes(worker: &Worker) -> bool {
    !(worker.drained || worker.heartbeat.waits || worker.heartbeat.exchange.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_proto::v1::{EvaluateReport, LossPart, StepSeconds};

    #[test]
    fn deadlines_follow_the_median_and_spare_who_waits_for_others() {
        let mut durations = Durations::default();
        let last = Heartbeat { phase: Place::Evaluate.into(), seconds: 3.0, ..Default::default() };
        let step = |compute| {
            let seconds = StepSeconds { compute, update: 0.01, ..Default::default() };
            Report::Step(StepReport { seconds: Some(seconds), parts: vec![LossPart::default()], ..Default::default() })
        };
        assert_eq!(durations.deadline(Place::Forward, 5.0), Some((UNKNOWN, None)));
        for compute in [2.0, 2.0, 50.0] {
            durations.note(&step(compute), &last);
        }
        assert_eq!(durations.deadline(Place::Forward, 5.0), Some((20.0, Some(2.0))));
        assert_eq!(durations.deadline(Place::Update, 5.0), Some((5.0, Some(0.01))));
        (0..3).for_each(|_| durations.note(&Report::Evaluate(EvaluateReport::default()), &last));
        assert_eq!(durations.deadline(Place::Evaluate, 5.0), Some((30.0, Some(3.0))));
        assert_eq!(durations.deadline(Place::Reduce, 5.0), Some((BETWEEN, None)));
        assert_eq!(durations.deadline(Place::Load, 5.0), Some((UNKNOWN, None)));
        assert_eq!(durations.deadline(Place::Drain, 5.0), None);
    }
}

//! The state of a run as its events tell it: a pure fold.

use std::collections::{BTreeMap, VecDeque};
use unisono_proto::v1::{
    event::Body, CheckpointCommitted, Evaluated, Event, Failure, Membership, Memory, Quarantined, RunDone, RunStarted,
    RunStopped, StepCommitted, Warning, WorkerLost,
};

/// Steps that the current rate is averaged over.
const RECENT: usize = 20;

/// Everything that a viewer shows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunState {
    /// Sequence number of the last event folded in: the cursor to watch on from.
    pub sequence: u64,
    /// Time of the first and of the last event, seconds since the Unix epoch.
    pub first_time: f64,
    pub time: f64,
    pub started: Option<RunStarted>,
    pub first_step: Option<StepCommitted>,
    pub last_step: Option<StepCommitted>,
    /// The first step's wall time contains whatever came before it, so it counts in no rate.
    pub tokens: u64,
    pub seconds: f64,
    recent: VecDeque<(u64, f64)>,
    /// Newest evaluation by split and task; the task "" is all tasks together.
    pub evals: BTreeMap<(String, String), Evaluated>,
    /// First evaluation by split and task, to see what training changed.
    pub first_evals: BTreeMap<(String, String), Evaluated>,
    /// Newest report by rank.
    pub memory: BTreeMap<u32, Memory>,
    /// Tokens computed by each rank so far.
    pub rank_tokens: Vec<u64>,
    pub checkpoint: Option<CheckpointCommitted>,
    pub membership: Option<Membership>,
    /// Workers that were lost, in order.
    pub losses: Vec<WorkerLost>,
    pub done: Option<RunDone>,
    pub failed: Option<Failure>,
    /// Where it was stopped before its end.
    pub stopped: Option<RunStopped>,
    /// The newest, and how many there were.
    pub warning: Option<Warning>,
    pub warnings: u64,
    /// Rows that the run goes on without, in the order in which they were found.
    pub quarantined: Vec<Quarantined>,
}

impl RunState {
    /// Of a run whose events up to `sequence` were told before.
    pub fn after(sequence: u64) -> Self {
        RunState { sequence, ..RunState::default() }
    }

    /// Folds `event` in; false where it was seen before (a reconnect may repeat events).
    pub fn apply(&mut self, event: &Event) -> bool {
        if event.sequence <= self.sequence {
            return false;
        }
        if self.sequence == 0 {
            self.first_time = event.time;
        }
        self.sequence = event.sequence;
        self.time = event.time;
        match &event.body {
            Some(Body::Started(started)) => {
                self.started = Some(started.clone());
                // A run that goes on has not ended.
                (self.done, self.failed, self.stopped) = (None, None, None);
            }
            Some(Body::Step(step)) => self.step(step),
            Some(Body::Eval(eval)) => {
                let key = (eval.split.clone(), eval.task.clone());
                self.first_evals.entry(key.clone()).or_insert_with(|| eval.clone());
                self.evals.insert(key, eval.clone());
            }
            Some(Body::Memory(memory)) => {
                self.memory.insert(memory.rank, *memory);
            }
            Some(Body::Checkpoint(checkpoint)) => self.checkpoint = Some(checkpoint.clone()),
            Some(Body::Membership(membership)) => self.membership = Some(membership.clone()),
            Some(Body::Lost(lost)) => self.losses.push(lost.clone()),
            Some(Body::Done(done)) => self.done = Some(done.clone()),
            Some(Body::Failed(failure)) => self.failed = Some(failure.clone()),
            Some(Body::Stopped(stopped)) => self.stopped = Some(stopped.clone()),
            Some(Body::Warning(warning)) => {
                self.warning = Some(warning.clone());
                self.warnings += 1;
            }
            Some(Body::Quarantined(quarantined)) => self.quarantined.push(quarantined.clone()),
            None => {}
        }
        true
    }

    fn step(&mut self, step: &StepCommitted) {
        if self.first_step.is_none() {
            self.first_step = Some(step.clone());
        } else {
            self.tokens += step.tokens;
            self.seconds += step.seconds;
            self.recent.push_back((step.tokens, step.seconds));
            if self.recent.len() > RECENT {
                self.recent.pop_front();
            }
        }
        self.rank_tokens.resize(self.rank_tokens.len().max(step.rank_tokens.len()), 0);
        for (sum, tokens) in self.rank_tokens.iter_mut().zip(&step.rank_tokens) {
            *sum += tokens;
        }
        self.last_step = Some(step.clone());
    }

    /// Committed steps.
    pub fn step_number(&self) -> u64 {
        self.last_step.as_ref().map_or(0, |s| s.step)
    }

    /// Steps planned in all; 0 before the run has started.
    pub fn steps(&self) -> u64 {
        self.started.as_ref().map_or(0, |s| s.steps)
    }

    /// Tasks that `split` was evaluated on by name.
    pub fn tasks(&self, split: &str) -> usize {
        self.evals.keys().filter(|(s, task)| s == split && !task.is_empty()).count()
    }

    /// Whether the run has ended, well or badly.
    pub fn ended(&self) -> bool {
        self.done.is_some() || self.failed.is_some() || self.stopped.is_some()
    }

    /// Tokens per second over the whole run so far, the first step left out unless it is the only one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        match &self.first_step {
            Some(first) if self.seconds <= 0.0 => rate(first.tokens, first.seconds),
            _ => rate(self.tokens, self.seconds),
        }
    }

    /// Tokens per second over the last steps.
    pub fn recent_tokens_per_second(&self) -> Option<f64> {
        let (tokens, seconds) =
            self.recent.iter().fold((0, 0.0), |(t, s), (tokens, seconds)| (t + tokens, s + seconds));
        rate(tokens, seconds).or_else(|| self.tokens_per_second())
    }

    /// Seconds until the last step is committed, by the pace of the last steps; evaluations come on top.
    pub fn eta_seconds(&self) -> Option<f64> {
        let last = self.last_step.as_ref()?;
        let left = self.steps().checked_sub(last.step)? as f64;
        let pace = match self.recent.len() {
            0 => last.seconds,
            n => self.recent.iter().map(|(_, seconds)| seconds).sum::<f64>() / n as f64,
        };
        Some(left * pace)
    }
}

fn rate(tokens: u64, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn event(sequence: u64, time: f64, body: Body) -> Event {
        Event { sequence, time, body: Some(body) }
    }

    pub(crate) fn step(number: u64, loss: f64, seconds: f64) -> Body {
        Body::Step(StepCommitted {
            step: number,
            loss,
            grad_norm: 1.25,
            lr: 1e-3,
            examples: 8,
            tokens: 1000,
            target_tokens: 400,
            seconds,
            generation: 1,
            rank_tokens: vec![600, 400],
        })
    }

    pub(crate) fn started(steps: u64) -> Body {
        Body::Started(RunStarted {
            run_dir: "runs/tiny-001".into(),
            model: "models/tiny".into(),
            parameters: 1_234_567,
            steps,
            train_rows: 90,
            validation_rows: 5,
            test_rows: 5,
        })
    }

    #[test]
    fn rate_and_eta_leave_the_first_step_out() {
        let mut state = RunState::default();
        assert!(state.tokens_per_second().is_none() && state.eta_seconds().is_none());
        state.apply(&event(1, 10.0, started(12)));
        state.apply(&event(2, 20.0, step(1, 5.0, 9.0)));
        assert_eq!(state.tokens_per_second(), Some(1000.0 / 9.0));
        state.apply(&event(3, 21.0, step(2, 4.0, 0.5)));
        state.apply(&event(4, 22.0, step(3, 3.0, 1.5)));
        assert_eq!(state.tokens_per_second(), Some(1000.0));
        assert_eq!(state.eta_seconds(), Some(9.0));
        assert_eq!(state.rank_tokens, [1800, 1200]);
        assert_eq!(state.first_step.as_ref().map(|s| s.loss), Some(5.0));
    }

    #[test]
    fn a_repeated_event_counts_once() {
        let mut state = RunState::default();
        assert!(state.apply(&event(1, 10.0, started(12))));
        assert!(state.apply(&event(2, 20.0, step(1, 5.0, 1.0))));
        let before = state.clone();
        assert!(!state.apply(&event(2, 20.0, step(1, 5.0, 1.0))));
        assert_eq!(state, before);
    }
}

//! Ending a run early without losing a step: workers come to stand at one barrier, save, and leave.
//!
//! ```text
//! Interrupt --> Halt to all --(each says which directive it has begun)--> Proceed to the highest of them
//!           --> Checkpoint, unless that state is saved already --(committed)--> Finish --> Stopped
//! a worker is lost --> Stopped, if all is written once that is committed; one was lost before, and the memory of the others
//!           has what is not saved --> they assemble and load it --> Checkpoint
//! the grace is over, or nothing is there to save --> Stopped at once; the newest checkpoint stands
//! ```

use super::event::Effect;
use super::machine::Machine;
use super::phases::Phase;
use super::program::{Item, Program};
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{Abort, Failure, Halt, Proceed, RunStopped};

/// How far a run that is to stop has come.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stopping {
    /// Who asked; completes the sentence "the run was stopped by ...".
    by: String,
    deadline: f64,
    stage: Stage,
}

#[derive(Debug, Clone, PartialEq)]
enum Stage {
    /// Workers are asked what they have begun; by rank.
    Asking(Vec<Option<u64>>),
    /// A worker was lost before somebody asked. Those who are left assemble once more, for a state that only their memory has.
    Assembling,
    /// What has been begun is carried out; the state after this step is saved.
    Saving(u64),
    /// Workers are leaving.
    Leaving,
    /// All work was done when somebody asked: the run finishes, if it does so in time.
    Finishing,
}

impl Machine {
    /// Whether the run ends before its work is done.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.as_ref().is_some_and(|stopping| stopping.stage != Stage::Finishing)
    }

    /// Somebody wants the run to save and stop.
    pub(super) fn interrupt(&mut self, now: f64, by: String) -> Vec<Effect> {
        if self.stopping.is_some() {
            return Vec::new();
        }
        let deadline = now + self.settings.grace;
        let stopping = |stage| Some(Stopping { by, deadline, stage });
        let trains = matches!(self.program, Program::Train(_));
        match self.phase {
            Phase::Gathering if trains && self.may_hold_more() => {
                self.stopping = stopping(Stage::Assembling);
                return self.assemble_to_stop(now);
            }
            Phase::Loading if trains && self.kept.is_start() => {
                self.stopping = stopping(Stage::Assembling);
                return Vec::new();
            }
            Phase::Running if trains => {}
            _ => {
                self.stopping = stopping(Stage::Leaving);
                return self.stopped(now);
            }
        }
        if self.is_leaving() {
            // All work is done and the last checkpoint is on its way: nothing can be spared.
            self.stopping = stopping(Stage::Finishing);
            return Vec::new();
        }
        self.stopping = stopping(Stage::Asking(vec![None; self.roster.len()]));
        self.broadcast(Order::Halt(Halt {}))
    }

    /// Whoever survived a loss gets a rank, without waiting for anybody to come in the lost one's place, if together they hold
    /// something that is not saved.
    pub(super) fn assemble_to_stop(&mut self, now: f64) -> Vec<Effect> {
        let here = |listen: &String| self.roster.workers().iter().any(|w| w.join.listen == *listen);
        if self.regrouping.as_ref().is_some_and(|regrouping| !regrouping.expected.iter().all(here)) {
            return Vec::new();
        }
        match self.held_step() {
            Some(_) => self.assign(),
            None => self.stopped(now),
        }
    }

    /// A generation that assembled to stop has loaded: its state is what is to be saved.
    pub(super) fn save_and_stop(&mut self) {
        let committed = self.committed;
        if let Some(stopping) = self.stopping.as_mut().filter(|stopping| stopping.stage == Stage::Assembling) {
            stopping.stage = Stage::Saving(committed);
        }
    }

    /// Rank `rank` is lost while the run is stopping: it is missed only where it has not written all that is to be saved.
    pub(super) fn lost_while_stopping(&mut self, now: f64, rank: usize) -> Vec<Effect> {
        let stage = self.stopping.as_ref().map(|stopping| &stopping.stage);
        let written = matches!(stage, Some(&Stage::Saving(step)) if self.saves.cover(step)) && self.saves.are_written();
        if !written {
            return self.stopped(now);
        }
        let worker = self.roster.get_mut(rank);
        (worker.gone, worker.drained) = (true, true);
        self.complaints.clear();
        self.stop_bereft(now)
    }

    /// Nothing more can be saved by those who are left, nor anything done that is not.
    pub(super) fn is_bereft(&self) -> bool {
        self.is_stopping() && self.roster.workers().iter().any(|w| w.gone)
    }

    /// A rank says what it has begun.
    pub(super) fn halted(&mut self, now: f64, rank: usize, begun: u64) -> Vec<Effect> {
        let Some(Stopping { stage: Stage::Asking(answers), .. }) = &mut self.stopping else {
            return self.blame(now, rank, "it halted, and nobody had asked".into());
        };
        answers[rank] = Some(begun);
        let Some(last) = answers.iter().copied().collect::<Option<Vec<u64>>>().and_then(|all| all.into_iter().max())
        else {
            return Vec::new();
        };
        let step = self.drop_after(last);
        self.saves.stop_trying();
        if let Some(stopping) = &mut self.stopping {
            stopping.stage = Stage::Saving(step);
        }
        let mut effects = self.broadcast(Order::Proceed(Proceed { last }));
        effects.extend(self.queue_ahead(now));
        effects
    }

    /// What is next while the run is stopping; `None`: it is not.
    pub(super) fn stop_item(&mut self, now: f64) -> Option<Option<Item>> {
        let idle = self.queue.is_empty();
        let (saves, stopping) = (&self.saves, self.stopping.as_mut()?);
        Some(match stopping.stage {
            Stage::Asking(_) | Stage::Assembling => None,
            Stage::Saving(step) if !saves.cover(step) => match saves.is_waiting(now) {
                true => None,
                false => Some(Item::Checkpoint(step)),
            },
            Stage::Saving(_) if !saves.are_done() || !idle => None,
            Stage::Saving(_) => {
                stopping.stage = Stage::Leaving;
                Some(Item::Finish)
            }
            Stage::Leaving => None,
            // As if nobody had asked.
            Stage::Finishing => return None,
        })
    }

    /// The grace is over.
    pub(super) fn stop_is_due(&self, now: f64) -> bool {
        self.stopping.as_ref().is_some_and(|stopping| now >= stopping.deadline)
    }

    /// The run is over, and can be gone on with.
    pub(super) fn stopped(&mut self, now: f64) -> Vec<Effect> {
        let by = self.stopping.as_ref().map_or_else(String::new, |s| s.by.clone());
        self.phase = Phase::Stopped;
        self.queue.clear();
        self.close_outcome(now);
        // A commit may outlive a generation that had got further than this one.
        let (step, checkpoint) = (self.committed.max(self.saves.newest), self.saves.newest);
        let run = self.settings.run_dir.display();
        let message = match &self.program {
            Program::Train(_) if step == checkpoint => {
                format!("the run was stopped by {by} after step {step}, which is saved; go on with --resume {run}")
            }
            Program::Train(_) => format!(
                "the run was stopped by {by} after step {step} before that was saved; go on from {} with --resume {run}",
                if checkpoint == 0 { "the model's weights".into() } else { format!("the checkpoint after step {checkpoint}") }
            ),
            _ => format!("stopped by {by}; start it again"),
        };
        let stopped = RunStopped { step, checkpoint, message: message.clone() };
        self.outcome.stopped = Some(stopped.clone());
        let mut effects = vec![Effect::Append(Entry::Stopped(stopped))];
        // Those that have drained are gone.
        let failure = Some(Failure { message, ..Failure::default() });
        let stay: Vec<_> = self.roster.workers().iter().filter(|w| !w.drained).map(|w| w.connection).collect();
        effects.extend(
            stay.into_iter().map(|to| self.send(to, Order::Abort(Abort { failure: failure.clone(), regroup: false }))),
        );
        effects.extend(self.dismiss_spares());
        effects.extend(self.roster.workers().iter().map(|w| Effect::Close { to: w.connection }));
        effects.push(Effect::Done(self.outcome.clone()));
        effects
    }
}

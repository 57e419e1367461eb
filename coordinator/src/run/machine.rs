//! What the coordinator decides: `apply(now, event) -> Result<effects, refusal>`. It reads no clock and draws no random
//! number; the same events at the same times have the same effects.
//!
//! Directives are queued ahead of the workers. Every rank answers each directive once, in order; a directive is settled
//! when all ranks have answered it, and directives are settled in order. Only settling writes results into the ledger,
//! so nothing depends on who answered first.

use super::complaints::Complaints;
use super::event::{Connection, Effect, Event, Outcome, Refusal};
use super::gathering::Regrouping;
use super::hang::Durations;
use super::outstanding::{generate_of, name, step_of, Outstanding};
use super::pace::Pace;
use super::phases::Phase;
use super::program::{Agenda, Item, Program};
use super::recorded::Recorded;
use super::roster::Roster;
use super::saves::Saves;
use super::settle::{self, Fault};
use super::snapshots::{Kept, Snapshotting};
use super::spike::{self, Spikes};
use super::stopping::Stopping;
use crate::checkpoint::manifest;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use unisono_configs::run::{Assignment, OnBadNumbers, OnSpike};
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    self as wire, Acknowledge, Assign, BatchKey, CoordinatorMessage, Directive, Epoch, Failure, Fingerprint, Memory,
    RunDone, RunStarted, StepCommitted, Suite, Warning, WorkerMessage,
};

/// Directives under way at a time: enough that no worker waits for one.
const LOOKAHEAD: usize = 4;

/// What a machine is made with.
#[derive(Debug, Clone)]
pub struct Settings {
    pub run_dir: PathBuf,
    pub term: u64,
    /// Workers that the run waits for.
    pub world: u32,
    pub assignment: Assignment,
    pub seed: u64,
    /// What every rank is assigned; rank, world, peers and peer key are filled in.
    pub assign: Assign,
    /// Peer keys of each generation are derived from it.
    pub peer_secret: [u8; 32],
    pub started: RunStarted,
    /// What earlier starts committed and this one may compute again.
    pub recorded: Recorded,
    /// Names of the tasks, by index.
    pub tasks: Vec<String>,
    /// Seconds of silence after which a worker is lost.
    pub lease: f64,
    /// Losses in a row without anything new in between that the run survives.
    pub restarts: u32,
    /// What a loss spike is.
    pub spike: spike::Rule,
    /// Says which rows a micro-batch is made of.
    pub rows: Rows,
    /// Seconds in which a run that is asked to stop saves and ends.
    pub grace: f64,
    pub snapshots: Snapshotting,
    /// Seconds that every phase may take.
    pub hang_after: f64,
    pub on_spike: OnSpike,
    pub on_bad_numbers: OnBadNumbers,
}

/// Names the rows of a micro-batch, for people: a pure function of the data.
#[derive(Clone)]
pub struct Rows(pub Arc<dyn Fn(BatchKey) -> Vec<String> + Send + Sync>);

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rows")
    }
}

pub struct Machine {
    pub(super) settings: Settings,
    pub(super) program: Program,
    pub(super) agenda: Agenda,
    pub(super) phase: Phase,
    /// In rank order once ranks are assigned.
    pub(super) roster: Roster,
    /// Those that wait for a place.
    pub(super) spares: Roster,
    /// Addresses of the last generation, in rank order.
    pub(super) ranks: Vec<String>,
    /// The arithmetic that everyone must have.
    pub(super) standard: Option<Fingerprint>,
    pub(super) generation: u64,
    /// Set while the generation is over and the next one gathers.
    pub(super) regrouping: Option<Regrouping>,
    /// Losses since something new was settled.
    pub(super) stumbles: u32,
    /// Directives that not every rank has answered, oldest first.
    pub(super) queue: VecDeque<Outstanding>,
    pub(super) next_id: u64,
    /// Steps up to this one can be dealt: their rows are tokenized.
    pub(super) prepared: u64,
    pub(super) committed: u64,
    /// Time of the last commit, or of Go.
    pub(super) last_commit: f64,
    /// Time of the first Go; 0 before.
    pub(super) started: f64,
    pub(super) saves: Saves,
    pub(super) kept: Kept,
    pub(super) durations: Durations,
    pub(super) pace: Pace,
    /// A step that gave a bad number, and whose micro-batches have not been tried yet.
    pub(super) suspect: Option<u64>,
    /// One whose micro-batches gave none when they were tried.
    pub(super) cleared: Option<u64>,
    pub(super) stopping: Option<Stopping>,
    pub(super) spikes: Spikes,
    pub(super) complaints: Complaints,
    /// Time of the last tick.
    pub(super) ticked: f64,
    pub(super) outcome: Outcome,
}

impl Machine {
    pub fn new(settings: Settings, program: Program) -> Self {
        let (committed, prepared) = (program.start(), program.prepared());
        let outcome = Outcome { tokens: settings.recorded.tokens(committed), ..Outcome::default() };
        let spikes = Spikes::new(settings.spike, settings.recorded.losses(committed));
        Machine {
            agenda: Agenda::new(&program),
            generation: settings.recorded.generation(),
            settings,
            program,
            phase: Phase::Gathering,
            roster: Roster::default(),
            spares: Roster::default(),
            ranks: Vec::new(),
            standard: None,
            regrouping: None,
            stumbles: 0,
            queue: VecDeque::new(),
            next_id: 1,
            prepared,
            committed,
            last_commit: 0.0,
            started: 0.0,
            saves: Saves::new(committed),
            kept: Kept::default(),
            durations: Durations::default(),
            pace: Pace::default(),
            suspect: None,
            cleared: None,
            stopping: None,
            spikes,
            complaints: Complaints::default(),
            ticked: 0.0,
            outcome,
        }
    }

    /// The effects of coming to life.
    pub fn start(&self) -> Vec<Effect> {
        vec![Effect::Append(Entry::Started(self.settings.started.clone()))]
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Decides what follows from `event`. A refusal changes nothing.
    pub fn apply(&mut self, now: f64, event: Event) -> Result<Vec<Effect>, Refusal> {
        if self.phase.is_final() {
            return Err(Refusal::Over);
        }
        match event {
            Event::Joined { from, join } => self.joined(now, from, join),
            Event::Message { from, message } => self.message(now, from, message),
            Event::Ended { from, reason } => Ok(self.ended(now, from, &reason)),
            Event::CheckpointUnprepared { attempt, problem } => Ok(self.unprepared(attempt, problem)),
            Event::CheckpointCommitted { attempt, result } => {
                self.save_committed(now, attempt, result).ok_or(Refusal::Unasked)
            }
            Event::Concluded { result } => {
                if !self.is_concluding() {
                    return Err(Refusal::Unasked);
                }
                match result {
                    Ok(conclusion) => {
                        self.outcome.conclusion = conclusion;
                        Ok(self.finish(now))
                    }
                    Err(message) => Ok(self.fail(now, self.failure(None, wire::Phase::Drain, None, message))),
                }
            }
            Event::Prepared { steps } => {
                self.prepared = self.prepared.max(steps);
                match self.phase {
                    Phase::Running => Ok(self.queue_ahead(now)),
                    _ => Ok(Vec::new()),
                }
            }
            Event::Unprepared { step, message } => {
                let failure = self.failure(None, wire::Phase::Unspecified, Some(step), message);
                Ok(self.fail(now, Failure { bad_input: true, ..failure }))
            }
            Event::Warned { kind, step, message } => {
                let warning = Warning { kind: kind.into(), step: Some(step), message };
                Ok(vec![Effect::Append(Entry::Warning(warning))])
            }
            Event::Interrupt { by } => Ok(self.interrupt(now, by)),
            Event::Stop { reason } => {
                let (phase, step) = self.under_way();
                Ok(self.fail(now, self.failure(None, phase, step, reason)))
            }
            Event::Tick => Ok(self.tick(now)),
        }
    }

    fn message(&mut self, now: f64, from: Connection, message: WorkerMessage) -> Result<Vec<Effect>, Refusal> {
        let Some(rank) = self.roster.rank_of(from) else {
            let spare = self.spares.rank_of(from).ok_or(Refusal::Stranger)?;
            self.spares.get_mut(spare).heard = now;
            return Ok(Vec::new());
        };
        let body = message.body.ok_or(Refusal::Unasked)?;
        let before_assign = matches!(body, Report::Heartbeat(_) | Report::Failure(_)) && message.epoch.is_none();
        let epoch = message.epoch.unwrap_or_default();
        if !before_assign && epoch != self.epoch() {
            let Epoch { term: current_term, generation: current_generation } = self.epoch();
            let Epoch { term, generation } = epoch;
            return Err(Refusal::Stale { term, generation, current_term, current_generation });
        }
        self.roster.get_mut(rank).heard = now;
        match body {
            Report::Heartbeat(heartbeat) => {
                self.roster.get_mut(rank).beats(now, heartbeat);
                Ok(Vec::new())
            }
            Report::Failure(failure) => Ok(self.complained(now, rank, failure)),
            Report::Join(_) => Ok(self.blame(now, rank, "it joined twice on one stream".into())),
            Report::Ready(ready) => Ok(self.ready(now, rank, ready)),
            Report::Checkpoint(report) => Ok(self.written(now, rank, report)),
            Report::Kept(kept) => {
                let mut effects = self.kept(rank, kept);
                effects.extend(self.queue_ahead(now));
                Ok(effects)
            }
            Report::Halted(halted) => Ok(self.halted(now, rank, halted.begun)),
            Report::Departure(departure) => {
                let host = &self.roster.workers()[rank].join.host;
                let by = format!("{} to rank {rank} on {host}", departure.by);
                Ok(self.interrupt(now, by))
            }
            report => Ok(self.answered(now, rank, report)),
        }
    }

    /// Keeps [`LOOKAHEAD`] directives under way.
    pub(super) fn queue_ahead(&mut self, now: f64) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.phase == Phase::Running && self.queue.len() < LOOKAHEAD {
            let Some(item) = self.next_item(now) else { break };
            let world = self.roster.len();
            let Settings { assignment, seed, .. } = self.settings;
            let mut instruction = self.program.directive(item, &self.pace.speeds(), assignment, seed);
            if let Task::Step(step) = &mut instruction.body {
                step.timeline = self.settings.snapshots.timeline();
            }
            if let Task::Checkpoint(checkpoint) = &mut instruction.body {
                let step = checkpoint.step;
                checkpoint.path = manifest::directory(&self.settings.run_dir, step).display().to_string();
                checkpoint.attempt = self.begin_save(now, step, &mut effects);
            }
            let id = self.next_id;
            self.next_id += 1;
            self.queue.push_back(Outstanding::new(id, item, instruction.expected.clone(), world));
            for (worker, body) in self.roster.workers().iter().zip(instruction.bodies()) {
                effects.push(self.send(worker.connection, Order::Directive(Directive { id, body: Some(body) })));
            }
        }
        effects
    }

    /// A rank's answer to the directive that is its turn.
    fn answered(&mut self, now: f64, rank: usize, report: Report) -> Vec<Effect> {
        if matches!(report, Report::Drained(_)) && self.roster.workers()[rank].drained {
            // It was taken for lost meanwhile, which was as good.
            return Vec::new();
        }
        let turn = self.roster.workers()[rank].answered + 1;
        let due = self.queue.iter_mut().find(|o| o.id == turn);
        let Some(due) = due.filter(|o| o.is_answered_by(&report)) else {
            let what = format!("it sent {}, which answers nothing that it was told to do", name(&report));
            return self.blame(now, rank, what);
        };
        if let Report::Step(step) = &report {
            let memory = step.memory;
            self.roster.get_mut(rank).memory = memory.unwrap_or(self.roster.workers()[rank].memory);
        }
        self.durations.note(&report, &self.roster.workers()[rank].told());
        self.roster.get_mut(rank).got_on();
        let drained = matches!(report, Report::Drained(_));
        due.answer(rank, report);
        let worker = self.roster.get_mut(rank);
        worker.answered = turn;
        worker.drained = drained;
        self.settle_answered(now)
    }

    /// Settles every directive that all ranks have answered, in order.
    pub(super) fn settle_answered(&mut self, now: f64) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.queue.front().is_some_and(Outstanding::is_complete) {
            let settled = self.queue.pop_front().expect("looked at above");
            match self.settle(now, &settled) {
                Ok(more) => effects.extend(more),
                Err(Fault { rank, message }) => {
                    let (phase, step) = settled.item.place();
                    effects.extend(self.fail(now, self.failure(rank, phase, step, message)));
                    return effects;
                }
            }
        }
        if let Some(more) = self.heed_number(now) {
            effects.extend(more);
            return effects;
        }
        effects.extend(self.queue_ahead(now));
        effects.extend(self.conclude(now));
        effects
    }

    fn settle(&mut self, now: f64, settled: &Outstanding) -> Result<Vec<Effect>, Fault> {
        let answers = || settled.reports().iter().flatten();
        match settled.item {
            Item::Step(step) => {
                let reports: Vec<_> = answers().filter_map(step_of).collect();
                let totals = settle::step(&settled.expected, &reports)?;
                let rank_tokens = totals.rank_tokens.clone();
                let entry = StepCommitted {
                    step,
                    loss: totals.loss,
                    grad_norm: totals.grad_norm,
                    lr: settled.expected.learning_rate,
                    examples: settled.expected.examples,
                    tokens: totals.tokens,
                    target_tokens: totals.target_tokens,
                    seconds: now - self.last_commit,
                    generation: self.generation,
                    rank_tokens: totals.rank_tokens,
                };
                let known = self.settings.recorded.knows_step(&entry).map_err(contradiction)?;
                if let Some(instead) = self.instead_of_a_spike(now, &entry, totals.worst, known)? {
                    return Ok(instead);
                }
                (self.committed, self.last_commit) = (step, now);
                self.outcome.tokens += totals.tokens;
                let spike = self.spikes.note(entry.loss).filter(|_| !known);
                let warning = spike.map(|spike| self.warn_of_spike(&entry, spike, totals.worst));
                let append = (!known).then(|| self.new_entry(Entry::Step(entry)));
                let mut effects: Vec<Effect> = append.into_iter().chain(warning).collect();
                let seconds = reports.iter().map(|report| report.seconds.unwrap_or_default());
                let slow = self.pace.note(seconds.zip(rank_tokens));
                effects.extend(slow.into_iter().map(|straggler| self.warn_of_straggler(step, straggler)));
                effects.extend(self.broadcast(Order::Acknowledge(Acknowledge { step })));
                effects.extend(self.retain());
                Ok(effects)
            }
            Item::Evaluate { suite, step } => {
                let parts = answers().filter_map(|r| match r {
                    Report::Evaluate(report) => Some(report.parts.as_slice()),
                    _ => None,
                });
                let split = if suite == Suite::Test { "test" } else { "validation" };
                let entries = settle::evaluation(&settled.expected, parts, &self.settings.tasks, split, step)?;
                self.outcome.evaluations.extend(entries.iter().cloned());
                let mut effects = Vec::new();
                for entry in entries {
                    if !self.settings.recorded.knows_evaluation(&entry).map_err(contradiction)? {
                        effects.push(self.new_entry(Entry::Eval(entry)));
                    }
                }
                Ok(effects)
            }
            Item::Probe(step) => self.probed(step, settled),
            // All have copied; what they write is heard of later.
            Item::Checkpoint(_) => Ok(Vec::new()),
            Item::Generate(_) => {
                let reports: Vec<_> = answers().filter_map(generate_of).collect();
                self.outcome.continuations.extend(settle::continuations(&settled.expected, &reports)?);
                Ok(Vec::new())
            }
            Item::Finish => Ok((0..self.roster.len()).map(|rank| self.memory(rank)).collect()),
        }
    }

    /// An entry that no generation made before.
    pub(super) fn new_entry(&mut self, entry: Entry) -> Effect {
        self.settings.recorded.note(&entry);
        self.stumbles = 0;
        Effect::Append(entry)
    }

    /// Workers have been told that nothing follows.
    pub(super) fn is_leaving(&self) -> bool {
        self.is_concluding() || self.queue.iter().any(|o| o.item == Item::Finish)
    }

    /// Takes directives after `last` back, which no worker has begun; the step after which all will stand then.
    pub(super) fn drop_after(&mut self, last: u64) -> u64 {
        let last = last.min(self.next_id - 1);
        for dropped in self.queue.iter().filter(|o| o.id > last) {
            if let Item::Checkpoint(step) = dropped.item {
                self.saves.forget(step);
            }
        }
        self.queue.retain(|o| o.id <= last);
        self.next_id = last + 1;
        let steps = self.queue.iter().filter_map(|o| match o.item {
            Item::Step(step) => Some(step),
            _ => None,
        });
        steps.max().unwrap_or(self.committed)
    }

    fn is_concluding(&self) -> bool {
        let drained = !self.roster.is_empty() && self.roster.workers().iter().all(|w| w.drained);
        self.phase == Phase::Running && drained && self.saves.are_done()
    }

    /// Once everyone has drained and every checkpoint is committed.
    pub(super) fn conclude(&mut self, now: f64) -> Vec<Effect> {
        if !self.is_concluding() {
            return Vec::new();
        }
        match self.program {
            Program::Train(_) if self.is_stopping() => self.stopped(now),
            Program::Train(_) => vec![Effect::Conclude { step: self.saves.newest }],
            _ => self.finish(now),
        }
    }

    fn finish(&mut self, now: f64) -> Vec<Effect> {
        self.phase = Phase::Finished;
        self.close_outcome(now);
        let done = RunDone {
            steps: self.outcome.steps,
            seconds: self.outcome.seconds,
            tokens: self.outcome.tokens,
            export: self.outcome.conclusion.export.clone(),
            digest: self.outcome.conclusion.digest.clone(),
        };
        let mut effects = vec![Effect::Append(Entry::Done(done))];
        effects.extend(self.dismiss_spares());
        effects.extend(self.roster.workers().iter().map(|w| Effect::Close { to: w.connection }));
        effects.push(Effect::Done(self.outcome.clone()));
        effects
    }

    pub(super) fn close_outcome(&mut self, now: f64) {
        self.outcome.steps = self.committed;
        self.outcome.seconds = if self.started > 0.0 { now - self.started } else { 0.0 };
    }

    pub(super) fn epoch(&self) -> Epoch {
        Epoch { term: self.settings.term, generation: self.generation }
    }

    pub(super) fn memory(&self, rank: usize) -> Effect {
        let wire::MemoryReport { planned_bytes, peak_bytes, optimizer_bytes, zero_stage, gpu, .. } =
            self.roster.workers()[rank].memory;
        let rank = rank as u32;
        Effect::Append(Entry::Memory(Memory { rank, planned_bytes, peak_bytes, optimizer_bytes, zero_stage, gpu }))
    }

    pub(super) fn send(&self, to: Connection, body: Order) -> Effect {
        Effect::Send { to, message: CoordinatorMessage { epoch: Some(self.epoch()), body: Some(body) } }
    }

    pub(super) fn broadcast(&self, body: Order) -> Vec<Effect> {
        self.roster.workers().iter().map(|w| self.send(w.connection, body.clone())).collect()
    }
}

/// Nobody's fault that could be named: all ranks agree, and not with the ledger.
fn contradiction(message: String) -> Fault {
    Fault { rank: None, message }
}

//! What the coordinator decides: `apply(now, event) -> Result<effects, refusal>`. It reads no clock and draws no random
//! number; the same events at the same times have the same effects.
//!
//! Directives are queued ahead of the workers. Every rank answers each directive once, in order; a directive is settled
//! when all ranks have answered it, and directives are settled in order. Only settling writes results into the ledger,
//! so nothing depends on who answered first.

use super::event::{Connection, Effect, Event, Outcome, PendingCheckpoint, Refusal};
use super::outstanding::{generate_of, name, step_of, Outstanding};
use super::phases::Phase;
use super::program::{Agenda, Item, Program};
use super::recorded::Recorded;
use super::roster::Roster;
use super::settle::{self, Fault};
use crate::checkpoint::manifest;
use std::collections::VecDeque;
use std::path::PathBuf;
use unisono_configs::run::Assignment;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    self as wire, Acknowledge, Assign, CoordinatorMessage, Directive, Epoch, Failure, Go, Join, Membership, Memory,
    RunDone, RunStarted, StepCommitted, Suite, WorkerMessage,
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
    pub silence: f64,
}

pub struct Machine {
    pub(super) settings: Settings,
    pub(super) program: Program,
    agenda: Agenda,
    pub(super) phase: Phase,
    pub(super) roster: Roster,
    pub(super) generation: u64,
    /// Directives that not every rank has answered, oldest first.
    pub(super) queue: VecDeque<Outstanding>,
    next_id: u64,
    /// Steps up to this one can be dealt: their rows are tokenized.
    prepared: u64,
    pub(super) committed: u64,
    /// Time of the last commit, or of Go.
    last_commit: f64,
    started: f64,
    committing: usize,
    last_checkpoint: u64,
    pub(super) complaint: Option<(f64, Failure)>,
    pub(super) outcome: Outcome,
}

impl Machine {
    pub fn new(settings: Settings, program: Program) -> Self {
        let (committed, prepared) = (program.start(), program.prepared());
        let outcome = Outcome { tokens: settings.recorded.tokens(committed), ..Outcome::default() };
        Machine {
            agenda: Agenda::new(&program),
            settings,
            program,
            phase: Phase::Gathering,
            roster: Roster::default(),
            generation: 0,
            queue: VecDeque::new(),
            next_id: 1,
            prepared,
            committed,
            last_commit: 0.0,
            started: 0.0,
            committing: 0,
            last_checkpoint: committed,
            complaint: None,
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
            Event::CheckpointCommitted { step, result } => {
                if self.committing == 0 {
                    return Err(Refusal::Unasked);
                }
                self.committing -= 1;
                Ok(match result {
                    Ok(entry) => {
                        self.last_checkpoint = step;
                        let mut effects = vec![Effect::Append(Entry::Checkpoint(entry))];
                        effects.extend(self.conclude(now));
                        effects
                    }
                    Err(message) => self.fail(now, self.failure(None, wire::Phase::Checkpoint, Some(step), message)),
                })
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
            Event::Stop { reason } => {
                let (phase, step) = self.under_way();
                Ok(self.fail(now, self.failure(None, phase, step, reason)))
            }
            Event::Tick => Ok(self.tick(now)),
        }
    }

    fn joined(&mut self, now: f64, from: Connection, join: Join) -> Result<Vec<Effect>, Refusal> {
        if self.phase != Phase::Gathering {
            return Err(Refusal::Full { world: self.settings.world });
        }
        self.roster.admit(from, join, now)?;
        if self.roster.len() < self.settings.world as usize {
            return Ok(Vec::new());
        }
        self.phase = Phase::Loading;
        self.generation += 1;
        let (generation, members) = (self.generation, self.roster.members());
        let mut effects = vec![Effect::Append(Entry::Membership(Membership { generation, members }))];
        let peers: Vec<String> = self.roster.workers().iter().map(|w| w.join.listen.clone()).collect();
        let mut key = blake3::Hasher::new_keyed(&self.settings.peer_secret);
        key.update(&generation.to_le_bytes());
        let peer_key = bytes::Bytes::copy_from_slice(key.finalize().as_bytes());
        for (rank, worker) in (0..).zip(self.roster.workers()) {
            let assign = Assign {
                rank,
                world: self.settings.world,
                peers: peers.clone(),
                peer_key: peer_key.clone(),
                ..self.settings.assign.clone()
            };
            effects.push(self.send(worker.connection, Order::Assign(assign)));
        }
        Ok(effects)
    }

    fn message(&mut self, now: f64, from: Connection, message: WorkerMessage) -> Result<Vec<Effect>, Refusal> {
        let rank = self.roster.rank_of(from).ok_or(Refusal::Stranger)?;
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
                self.roster.get_mut(rank).heartbeat = heartbeat;
                Ok(Vec::new())
            }
            Report::Failure(failure) => Ok(self.complained(now, rank, failure)),
            Report::Join(_) => Ok(self.blame(now, rank, "it joined twice on one stream".into())),
            Report::Ready(ready) => Ok(self.ready(now, rank, ready)),
            report => Ok(self.answered(now, rank, report)),
        }
    }

    fn ready(&mut self, now: f64, rank: usize, ready: wire::Ready) -> Vec<Effect> {
        if self.phase != Phase::Loading || self.roster.workers()[rank].ready {
            return self.blame(now, rank, "it said twice that it is ready".into());
        }
        let worker = self.roster.get_mut(rank);
        worker.ready = true;
        worker.memory = ready.memory.unwrap_or_default();
        let mut effects = vec![self.memory(rank)];
        if self.roster.workers().iter().all(|w| w.ready) {
            self.phase = Phase::Running;
            (self.started, self.last_commit) = (now, now);
            effects.extend(self.broadcast(Order::Go(Go {})));
            effects.extend(self.queue_ahead(now));
        }
        effects
    }

    /// Keeps [`LOOKAHEAD`] directives under way.
    fn queue_ahead(&mut self, now: f64) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.queue.len() < LOOKAHEAD {
            let Some(item) = self.agenda.next(&self.program, self.prepared) else { break };
            let Settings { world, assignment, seed, .. } = self.settings;
            let mut path = String::new();
            if let Item::Checkpoint(step) = item {
                path = manifest::directory(&self.settings.run_dir, step).display().to_string();
                effects.push(Effect::MakeCheckpoint { step });
            }
            let (body, expected) = self.program.directive(item, world, assignment, seed, &path);
            let id = self.next_id;
            self.next_id += 1;
            effects.extend(self.broadcast(Order::Directive(Directive { id, body: Some(body) })));
            let reports = vec![None; world as usize];
            self.queue.push_back(Outstanding { id, item, expected, sent: now, reports });
        }
        effects
    }

    /// A rank's answer to the directive that is its turn.
    fn answered(&mut self, now: f64, rank: usize, report: Report) -> Vec<Effect> {
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
        let drained = matches!(report, Report::Drained(_));
        due.reports[rank] = Some(report);
        let worker = self.roster.get_mut(rank);
        worker.answered = turn;
        worker.drained = drained;
        let mut effects = Vec::new();
        while self.queue.front().is_some_and(|o| o.reports.iter().all(Option::is_some)) {
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
        effects.extend(self.queue_ahead(now));
        effects.extend(self.conclude(now));
        effects
    }

    fn settle(&mut self, now: f64, settled: &Outstanding) -> Result<Vec<Effect>, Fault> {
        let answers = || settled.reports.iter().flatten();
        match settled.item {
            Item::Step(step) => {
                let reports: Vec<_> = answers().filter_map(step_of).collect();
                let totals = settle::step(&settled.expected, &reports)?;
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
                (self.committed, self.last_commit) = (step, now);
                self.outcome.tokens += totals.tokens;
                let append = (!known).then(|| Effect::Append(Entry::Step(entry)));
                let mut effects: Vec<Effect> = append.into_iter().collect();
                effects.extend(self.broadcast(Order::Acknowledge(Acknowledge { step })));
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
                        effects.push(Effect::Append(Entry::Eval(entry)));
                    }
                }
                Ok(effects)
            }
            Item::Checkpoint(step) => {
                self.committing += 1;
                let files = answers().filter_map(|r| match r {
                    Report::Checkpoint(report) => Some(report.files.clone()),
                    _ => None,
                });
                let Epoch { term, generation } = self.epoch();
                let files = files.collect();
                let pending = PendingCheckpoint { step, attempt: 1, term, generation, files, since: settled.sent };
                Ok(vec![Effect::CommitCheckpoint(pending)])
            }
            Item::Generate => {
                let reports: Vec<_> = answers().filter_map(generate_of).collect();
                self.outcome.continuations = settle::continuations(&settled.expected, &reports)?;
                Ok(Vec::new())
            }
            Item::Finish => Ok((0..self.roster.len()).map(|rank| self.memory(rank)).collect()),
        }
    }

    fn is_concluding(&self) -> bool {
        let drained = !self.roster.is_empty() && self.roster.workers().iter().all(|w| w.drained);
        self.phase == Phase::Running && drained && self.committing == 0
    }

    /// Once everyone has drained and every checkpoint is committed.
    fn conclude(&mut self, now: f64) -> Vec<Effect> {
        if !self.is_concluding() {
            return Vec::new();
        }
        match self.program {
            Program::Train(_) => vec![Effect::Conclude { step: self.last_checkpoint }],
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

    fn memory(&self, rank: usize) -> Effect {
        let wire::MemoryReport { planned_bytes, peak_bytes, optimizer_bytes } = self.roster.workers()[rank].memory;
        Effect::Append(Entry::Memory(Memory { rank: rank as u32, planned_bytes, peak_bytes, optimizer_bytes }))
    }

    fn send(&self, to: Connection, body: Order) -> Effect {
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

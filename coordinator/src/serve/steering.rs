//! The one loop: it owns the machine and the ledger, on a thread of its own, because a durable append blocks. Everyone
//! else holds a [`Handle`] and sends commands.

use super::access::remedy;
use super::audience::Stage;
use super::commit::{Committer, Job};
use super::ledger::{self, Ledger};
use super::setup::{Error, Observer};
use crate::checkpoint::commit::prepare;
use crate::checkpoint::disk::Local;
use crate::run::event::{Conclusion, Connection, Effect, Event, NotCommitted, Outcome};
use crate::run::machine::Machine;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc::UnboundedSender, oneshot};
use tonic::Status;
use unisono_proto::dial::Role;
use unisono_proto::fail_point;
use unisono_proto::v1::coordinator_message::Body;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{
    self as wire, Abort, CheckpointCommitted, CoordinatorMessage, Failure, Join, StatusReply, WorkerMessage,
};

/// The machine hears at least this often that time passes.
const TICK: Duration = Duration::from_millis(200);

/// Before a ledger that cannot be written is tried again, and for how long.
const RETRY: Duration = Duration::from_secs(1);
const STANDSTILL: Duration = Duration::from_secs(600);

/// Commands decided on together: one transaction for all of their entries.
const BATCH: usize = 256;

pub type Outbound = UnboundedSender<Result<CoordinatorMessage, Status>>;

/// What the loop is asked to do.
pub enum Command {
    Joined {
        from: Connection,
        join: Join,
        outbound: Outbound,
        /// There where the token of the call ends, or lets a number of workers in.
        ticket: Option<Ticket>,
    },
    Message {
        from: Connection,
        message: WorkerMessage,
    },
    Ended {
        from: Connection,
        reason: String,
    },
    CheckpointCommitted {
        attempt: u32,
        result: Result<CheckpointCommitted, NotCommitted>,
    },
    Concluded {
        result: Result<Conclusion, String>,
    },
    Prepared {
        steps: u64,
    },
    Unprepared {
        step: u64,
        message: String,
    },
    CheckpointUnprepared {
        attempt: u32,
        problem: String,
    },
    /// Something that people should know, and that changes nothing.
    Warn {
        kind: &'static str,
        step: u64,
        message: String,
    },
    Interrupt {
        by: String,
    },
    Stop {
        reason: String,
    },
    Status {
        reply: oneshot::Sender<StatusReply>,
    },
}

/// What a worker comes with that is to be let in.
pub struct Ticket {
    pub id: u64,
    /// Workers that it lets in; `None`: any number.
    pub uses: Option<u32>,
    /// Told once this one is; dropped where it is not, and why is what its stream is told.
    pub admitted: oneshot::Sender<()>,
}

/// Sends commands to the loop. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    connections: Arc<AtomicU64>,
}

impl Handle {
    pub fn new(commands: Sender<Command>) -> Self {
        Handle { commands, connections: Arc::default() }
    }

    /// False when the run is over.
    pub fn send(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }

    /// A name for a new stream.
    pub fn connection(&self) -> Connection {
        Connection(self.connections.fetch_add(1, Ordering::Relaxed))
    }
}

/// Held by a thread without which the run cannot go on: where it panics, the run fails instead of waiting for ever.
pub struct Alarm {
    pub handle: Handle,
    /// Completes the sentence "the thread that ...".
    pub thread: &'static str,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = format!("the thread that {} has panicked; this is a defect, please report it", self.thread);
            self.handle.send(Command::Stop { reason });
        }
    }
}

/// Wall time that never goes back while the process lives.
pub struct Clock {
    origin: f64,
    started: Instant,
}

impl Clock {
    pub fn new() -> Self {
        let origin = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        Clock { origin, started: Instant::now() }
    }

    pub fn now(&self) -> f64 {
        self.origin + self.started.elapsed().as_secs_f64()
    }
}

pub struct Steering {
    pub machine: Machine,
    pub ledger: Ledger,
    pub run_dir: PathBuf,
    pub observer: Arc<dyn Observer>,
    /// Where viewers look.
    pub stage: Stage,
    pub committer: Committer,
    pub handle: Handle,
    pub clock: Clock,
    streams: BTreeMap<Connection, Outbound>,
    /// What was asked while nothing could be decided.
    backlog: VecDeque<Command>,
}

impl Steering {
    pub fn new(
        machine: Machine,
        ledger: Ledger,
        run_dir: PathBuf,
        observer: Arc<dyn Observer>,
        stage: Stage,
        committer: Committer,
        handle: Handle,
    ) -> Self {
        let (clock, streams, backlog) = (Clock::new(), BTreeMap::new(), VecDeque::new());
        Steering { machine, ledger, run_dir, observer, stage, committer, handle, clock, streams, backlog }
    }

    /// Steers until the run is over.
    pub fn run(mut self, commands: Receiver<Command>) -> Result<Outcome, Error> {
        let mut effects = self.machine.start();
        let mut ticked = Instant::now();
        loop {
            if let Some(outcome) = self.carry_out(effects, &commands)? {
                return Ok(outcome);
            }
            effects = Vec::new();
            match self.backlog.pop_front() {
                Some(command) => effects.extend(self.decide(command)),
                None => match commands.recv_timeout(TICK.saturating_sub(ticked.elapsed())) {
                    Ok(command) => effects.extend(self.decide(command)),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Err(Error::Loop("everyone left".into())),
                },
            }
            for _ in 0..BATCH {
                let Some(command) = self.backlog.pop_front().or_else(|| commands.try_recv().ok()) else { break };
                effects.extend(self.decide(command));
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                effects.extend(self.apply(Event::Tick));
            }
        }
    }

    fn decide(&mut self, command: Command) -> Vec<Effect> {
        match command {
            Command::Joined { from, join, outbound, ticket } => match self.admit(&join, ticket) {
                Ok(()) => {
                    self.streams.insert(from, outbound);
                    self.apply(Event::Joined { from, join })
                }
                Err(status) => {
                    tracing::info!(refusal = status.message(), "a worker was refused");
                    // Fails only when the worker is gone.
                    outbound.send(Err(status)).ok();
                    Vec::new()
                }
            },
            Command::Message { from, message } => self.apply(Event::Message { from, message }),
            Command::Ended { from, reason } => {
                self.streams.remove(&from);
                self.apply(Event::Ended { from, reason })
            }
            Command::CheckpointCommitted { attempt, result } => {
                self.apply(Event::CheckpointCommitted { attempt, result })
            }
            Command::Concluded { result } => self.apply(Event::Concluded { result }),
            Command::Prepared { steps } => self.apply(Event::Prepared { steps }),
            Command::Unprepared { step, message } => self.apply(Event::Unprepared { step, message }),
            Command::CheckpointUnprepared { attempt, problem } => {
                self.apply(Event::CheckpointUnprepared { attempt, problem })
            }
            Command::Warn { kind, step, message } => self.apply(Event::Warned { kind, step, message }),
            Command::Interrupt { by } => self.apply(Event::Interrupt { by }),
            Command::Stop { reason } => self.apply(Event::Stop { reason }),
            Command::Status { reply } => {
                // Fails only when the viewer is gone.
                reply.send(self.machine.status(self.clock.now())).ok();
                Vec::new()
            }
        }
    }

    /// Lets a worker in that may join: only then its ticket counts.
    fn admit(&mut self, join: &Join, ticket: Option<Ticket>) -> Result<(), Status> {
        self.machine.may_join(join).map_err(|refusal| Status::failed_precondition(refusal.to_string()))?;
        let Some(Ticket { id, uses, admitted }) = ticket else { return Ok(()) };
        if let Some(uses) = uses {
            let uncounted = |error| Status::unavailable(format!("the token could not be counted ({error}); try again"));
            if !self.ledger.spend(id, uses).map_err(uncounted)? {
                let workers = if uses == 1 { "one worker".into() } else { format!("{uses} workers") };
                return Err(Status::unauthenticated(format!(
                    "this token was for {workers} and has let as many in; {}",
                    remedy(Role::Worker)
                )));
            }
        }
        // Fails only when the worker is gone.
        admitted.send(()).ok();
        Ok(())
    }

    fn apply(&mut self, event: Event) -> Vec<Effect> {
        self.machine.apply(self.clock.now(), event).unwrap_or_else(|refusal| {
            tracing::debug!(%refusal, "an event changed nothing");
            Vec::new()
        })
    }

    /// Writes every entry first; only then does anything leave.
    fn carry_out(&mut self, effects: Vec<Effect>, commands: &Receiver<Command>) -> Result<Option<Outcome>, Error> {
        let (mut entries, mut rest) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                Effect::Append(body) => entries.push(body),
                other => rest.push(other),
            }
        }
        if !entries.is_empty() {
            let quarantines = entries.iter().any(|entry| matches!(entry, Entry::Quarantined(_)));
            let reached = |place| {
                if quarantines {
                    fail_point::reached(place)
                }
            };
            fail_point::reached("before-append");
            reached("before-quarantine");
            let events = self.ledger.number(self.clock.now(), entries);
            match self.write(&events, commands) {
                Ok(()) => {
                    fail_point::reached("after-append");
                    reached("after-quarantine");
                    events.iter().for_each(|event| self.observer.event(event));
                    self.stage.tell(&events, self.machine.phase().is_final());
                }
                Err(error) => {
                    self.abort(error.to_string());
                    return Err(error.into());
                }
            }
        }
        let mut outcome = None;
        for effect in rest {
            match effect {
                Effect::Append(_) => unreachable!("set apart above"),
                Effect::Send { to, message } => {
                    if let Some(outbound) = self.streams.get(&to) {
                        // Fails only when the worker is gone, which its stream's end tells.
                        outbound.send(Ok(message)).ok();
                    }
                }
                Effect::Assign { to, epoch, mut assign, peers } => {
                    if let Some(outbound) = self.streams.get(&to) {
                        assign.peers = peers.to_vec();
                        let message = CoordinatorMessage { epoch: Some(epoch), body: Some(Body::Assign(*assign)) };
                        // As above.
                        outbound.send(Ok(message)).ok();
                    }
                }
                Effect::Close { to } => drop(self.streams.remove(&to)),
                Effect::MakeCheckpoint { step, attempt } => {
                    if let Err(error) = prepare(&Local, &self.run_dir, step) {
                        // Back through the queue: nothing is decided while effects are carried out.
                        self.handle.send(Command::CheckpointUnprepared { attempt, problem: error.to_string() });
                    }
                }
                Effect::DiscardCheckpoint { step, files } => self.committer.send(Job::Discard { step, files }),
                Effect::CommitCheckpoint(pending) => self.committer.send(Job::Commit(pending)),
                Effect::Prune { spare } => self.committer.send(Job::Prune { spare }),
                Effect::Conclude { step } => self.committer.send(Job::Conclude { step }),
                Effect::Done(done) => outcome = Some(done),
            }
        }
        Ok(outcome)
    }

    /// Makes the entries durable. Where the disk is full, or somebody holds the ledger, nothing has left yet: the run stands
    /// still until it can be written, at most for [`STANDSTILL`], and unless somebody wants it to end.
    fn write(&mut self, events: &[wire::Event], commands: &Receiver<Command>) -> Result<(), ledger::Error> {
        let begun = Instant::now();
        let mut warned = false;
        loop {
            let error = match self.ledger.write(events) {
                Err(error) if error.may_pass() && begun.elapsed() < STANDSTILL => error,
                outcome => return outcome,
            };
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!("the run stands still until its ledger can be written: {error}");
            }
            let pause = Instant::now() + RETRY;
            while let Ok(command) = commands.recv_timeout(pause.saturating_duration_since(Instant::now())) {
                let ends = matches!(command, Command::Interrupt { .. } | Command::Stop { .. });
                self.backlog.push_back(command);
                if ends {
                    return self.ledger.write(events);
                }
            }
        }
    }

    /// The ledger cannot be written, so nothing may be decided any more: everyone stops.
    fn abort(&mut self, message: String) {
        let failure = Some(Failure { message, ..Default::default() });
        let epoch = self.machine.status(self.clock.now()).epoch;
        let body = Some(Body::Abort(Abort { failure, regroup: false }));
        for (_, outbound) in std::mem::take(&mut self.streams) {
            outbound.send(Ok(CoordinatorMessage { epoch, body: body.clone() })).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_ends_the_run_and_one_that_ends_does_not() {
        let (commands, queue) = std::sync::mpsc::channel();
        let handle = Handle::new(commands);
        for panics in [false, true] {
            let alarm = Alarm { handle: handle.clone(), thread: "commits checkpoints" };
            let work = move || {
                let _alarm = alarm;
                assert!(!panics, "a defect");
            };
            assert_eq!(std::thread::spawn(work).join().is_err(), panics);
        }
        let told: Vec<Command> = queue.try_iter().collect();
        assert!(matches!(&told[..], [Command::Stop { reason }] if reason.contains("commits checkpoints has panicked")));
    }
}

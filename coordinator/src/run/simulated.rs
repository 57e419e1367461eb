//! Simulated workers and a world around the machine, for its tests: no clock, no network.

use super::actors::Simulated;
use super::event::{Connection, Effect, Event, NotCommitted, PendingCheckpoint, Refusal};
use super::machine::{Machine, Settings};
use super::phases::Phase;
use super::program::Program;
use super::recorded::Recorded;
use super::storm::Crash;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use unisono_configs::run::Assignment;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Assign, CheckpointCommitted, Epoch, Failure, Heartbeat, Held, Join, WorkerMessage};

pub(super) use super::rehearsal::{join, layout, machine, program, quarantining, settings, snapshotting, State};

/// The world around a machine: workers, ledger and committer.
pub(super) struct World {
    pub(super) machine: Machine,
    pub(super) now: f64,
    pub(super) workers: BTreeMap<Connection, Simulated>,
    pub(super) ledger: Vec<Entry>,
    pub(super) commits: VecDeque<PendingCheckpoint>,
    /// Commits that will fail, though another attempt may not.
    pub(super) refusals: u32,
    /// Problems that the next writes have, one a rank and save.
    pub(super) disk: VecDeque<Option<String>>,
    /// The newest checkpoint when older ones were let go, and which one was not.
    pub(super) pruned: Option<(Option<u64>, Option<u64>)>,
    pub(super) concluding: bool,
    pub(super) over: bool,
    next: u64,
    /// Addresses of processes that are about to join.
    pub(super) joining: VecDeque<String>,
    /// Snapshots by the address of the process that holds them.
    pub(super) memory: BTreeMap<String, Vec<Held>>,
    /// Rank and step of snapshots that do not reach the neighbour.
    pub(super) unsent: Vec<(u32, u64)>,
    /// Generation and step of snapshots that a worker could not take or send.
    pub(super) missed: Vec<(u64, u64)>,
    /// Where nobody can fetch anything.
    pub(super) unreachable: Option<String>,
    /// Those that are stopped, and what they will hear when they wake up.
    pub(super) asleep: BTreeSet<Connection>,
    /// Whose streams the coordinator has closed.
    pub(super) closed: BTreeSet<Connection>,
    pub(super) mail: BTreeMap<Connection, Vec<(Epoch, Order)>>,
    /// Those that wait for ever in an exchange, and since when.
    pub(super) stuck: BTreeMap<Connection, f64>,
    /// How the coordinator dies in the middle of its next decision.
    pub(super) crash: Option<Crash>,
    /// Rows that give bad numbers, and rows that give high losses.
    pub(super) poison: BTreeSet<u32>,
    pub(super) spiky: BTreeSet<u32>,
}

impl World {
    pub(super) fn new(world: u32, steps: u64, assignment: Assignment) -> Self {
        Self::with(machine(world, steps, assignment), world, Vec::new())
    }

    pub(super) fn with(machine: Machine, world: u32, ledger: Vec<Entry>) -> Self {
        Self::remembering(machine, world, ledger, BTreeMap::new())
    }

    fn remembering(machine: Machine, world: u32, ledger: Vec<Entry>, memory: BTreeMap<String, Vec<Held>>) -> Self {
        let mut this = World {
            machine,
            now: 100.0,
            workers: BTreeMap::new(),
            ledger,
            commits: VecDeque::new(),
            refusals: 0,
            pruned: None,
            disk: VecDeque::new(),
            concluding: false,
            over: false,
            next: 0,
            joining: VecDeque::new(),
            memory,
            unsent: Vec::new(),
            missed: Vec::new(),
            unreachable: None,
            asleep: BTreeSet::new(),
            closed: BTreeSet::new(),
            mail: BTreeMap::new(),
            stuck: BTreeMap::new(),
            crash: None,
            poison: BTreeSet::new(),
            spiky: BTreeSet::new(),
        };
        let effects = this.machine.start();
        this.carry_out(effects);
        for id in 0..world {
            this.joins(format!("ada:{id}"));
        }
        this
    }

    /// A process joins on a new stream.
    pub(super) fn joins(&mut self, listen: String) -> Connection {
        let from = Connection(self.next);
        self.next += 1;
        let held = self.memory.get(&listen).cloned().unwrap_or_default();
        let join = Join { held, snapshots: listen.clone(), ..join(&listen) };
        let joined = Event::Joined { from, join };
        self.workers.insert(from, Simulated::new(listen));
        self.apply(joined).unwrap();
        from
    }

    /// The worker's process dies; another one is started in its place.
    pub(super) fn dies(&mut self, from: Connection) {
        self.vanishes(from);
        // Refused after the end.
        self.apply(Event::Ended { from, reason: "broke off".into() }).ok();
    }

    /// The same, and nobody is told that the connection is over.
    pub(super) fn vanishes(&mut self, from: Connection) {
        let Some(worker) = self.workers.remove(&from) else { return };
        // It may have a newer stream: then this was only the old one.
        if self.workers.range(from..).all(|(_, w)| w.listen != worker.listen) {
            self.workers.retain(|_, w| w.listen != worker.listen);
            self.memory.remove(&worker.listen);
            self.joining.retain(|listen| *listen != worker.listen);
            self.joining.push_back(format!("{}'", worker.listen));
        }
    }

    /// The next one of those that are about to join does.
    pub(super) fn next_joins(&mut self) -> bool {
        if self.machine.phase().is_final() {
            self.joining.clear();
        }
        let Some(listen) = self.joining.pop_front() else { return false };
        self.joins(listen);
        true
    }

    /// A run that goes on after `start` steps; `ledger` is what it committed before it ended.
    pub(super) fn resumed(world: u32, steps: u64, start: u64, ledger: &[Entry]) -> Self {
        Self::resumed_with(world, steps, start, 0, ledger, BTreeMap::new())
    }

    /// The same with a snapshot every `every` steps, by workers that hold what is in `memory`.
    pub(super) fn resumed_with(
        world: u32,
        steps: u64,
        start: u64,
        every: u64,
        ledger: &[Entry],
        memory: BTreeMap<String, Vec<Held>>,
    ) -> Self {
        let Program::Train(mut training) = program(steps) else { unreachable!() };
        training.start = start;
        let program = Program::Train(training);
        let mut recorded = Recorded::default();
        ledger.iter().for_each(|entry| recorded.note(entry));
        recorded.follow(&program);
        let settings = Settings { recorded, ..snapshotting(world, steps, Assignment::Balanced, every).settings };
        Self::remembering(Machine::new(settings, program), world, ledger.to_vec(), memory)
    }

    pub(super) fn apply(&mut self, event: Event) -> Result<(), Refusal> {
        let effects = self.machine.apply(self.now, event)?;
        self.carry_out(effects);
        Ok(())
    }

    /// Whoever is named for a snapshot has it when that is decided, or is gone; and it is of what counts. Whoever sleeps hears of it
    /// later, when the holder may have let it go: then that generation is over.
    fn check_sources(&self, assign: &Assign) {
        let Some(source) = &assign.snapshot else { return };
        let Program::Train(training) = &self.machine.program else { unreachable!() };
        for image in &source.images {
            let (held, holder) = (image.held.as_ref().unwrap(), image.holder.as_ref().unwrap());
            assert_eq!(held.step, source.step, "never a mix of steps");
            let memory = self.memory.get(&holder.address);
            assert!(memory.is_none_or(|memory| memory.contains(held)), "whoever is named has it, or is gone");
            let state = State::of(training, held.step, Default::default());
            let shard = state.shard(held.step, held.rank, held.world);
            assert_eq!(held.blake3, shard, "what was trained on is what counts");
        }
    }

    pub(super) fn carry_out(&mut self, effects: Vec<Effect>) {
        let durable = |effect: &Effect| match self.crash {
            None => true,
            Some(Crash::AfterAppend) => matches!(effect, Effect::Append(_)),
            Some(Crash::BeforeAppend) => false,
        };
        let effects: Vec<Effect> = effects.into_iter().filter(durable).collect();
        for effect in effects {
            assert!(!self.over, "{effect:?} after the end");
            match effect {
                Effect::Append(entry) => self.ledger.push(entry),
                Effect::Send { to, message } => self.deliver(to, message.epoch.unwrap(), message.body.unwrap()),
                Effect::Assign { to, epoch, assign, .. } => {
                    self.check_sources(&assign);
                    self.deliver(to, epoch, Order::Assign(*assign));
                }
                Effect::Prune { spare } => {
                    let newest = self.ledger.iter().rev().find_map(|entry| match entry {
                        Entry::Checkpoint(checkpoint) => Some(checkpoint.step),
                        _ => None,
                    });
                    self.pruned = Some((newest, spare));
                }
                Effect::Close { to } => drop(self.closed.insert(to)),
                Effect::MakeCheckpoint { .. } | Effect::DiscardCheckpoint { .. } => {}
                Effect::CommitCheckpoint(pending) => self.commits.push_back(pending),
                Effect::Conclude { step } => {
                    assert!(self.commits.is_empty() && !self.concluding);
                    assert_eq!(step, self.machine.status(self.now).steps);
                    self.concluding = true;
                }
                Effect::Done(_) => self.over = true,
            }
        }
    }

    /// Does what the committer has to do next; a run that is over does not want to hear of it.
    pub(super) fn commit(&mut self) {
        let over = self.machine.phase().is_final();
        let told = if let Some(PendingCheckpoint { step, attempt, .. }) = self.commits.pop_front() {
            let refused = self.refusals > 0;
            self.refusals = self.refusals.saturating_sub(1);
            let result = match refused {
                true => Err(NotCommitted { message: "MANIFEST.json: the disk is full".into(), fatal: false }),
                false => Ok(CheckpointCommitted { step, ..Default::default() }),
            };
            self.apply(Event::CheckpointCommitted { attempt, result })
        } else if std::mem::take(&mut self.concluding) {
            self.apply(Event::Concluded { result: Ok(Default::default()) })
        } else {
            return;
        };
        assert_eq!(told, if over { Err(Refusal::Over) } else { Ok(()) });
    }

    pub(super) fn steps(&self) -> Vec<(u64, u64)> {
        let step = |e: &Entry| match e {
            Entry::Step(s) => Some((s.step, s.loss.to_bits())),
            _ => None,
        };
        self.ledger.iter().filter_map(step).collect()
    }

    pub(super) fn kinds(&self) -> Vec<&'static str> {
        self.ledger.iter().map(Entry::kind).collect()
    }

    pub(super) fn failure(&self) -> Failure {
        self.machine.status(self.now).failure.expect("the run has failed")
    }

    /// As [`World::settle`], but time passes too where nobody has anything to say, at most `seconds`.
    pub(super) fn settle_for(&mut self, seconds: f64) {
        let end = self.now + seconds;
        while !self.machine.phase().is_final() && self.now < end {
            self.settle();
            self.now += 0.2;
            for (&from, worker) in &self.workers {
                let message =
                    WorkerMessage { epoch: worker.epoch, body: Some(Report::Heartbeat(Heartbeat::default())) };
                // Refused after the end.
                self.machine.apply(self.now, Event::Message { from, message }).ok();
            }
            // Refused after the end.
            self.apply(Event::Tick).ok();
        }
    }

    /// Everyone says a word in turn; false when nobody has any.
    pub(super) fn speak(&mut self) -> bool {
        let connections: Vec<Connection> = self.workers.keys().copied().collect();
        let mut spoke = false;
        for from in connections {
            spoke |= self.say(from);
        }
        spoke
    }

    /// Everyone speaks in turn until so many steps are committed.
    pub(super) fn speak_until(&mut self, steps: usize) {
        while self.steps().len() < steps {
            self.speak();
            self.commit();
        }
    }

    /// Whoever dies takes the newest snapshot with it only where it has no other place yet: everybody is there, and what they
    /// began with has two again.
    fn is_safe(&self) -> bool {
        let handed_on = |(id, word): &(u64, Report)| *id > 0 || !matches!(word, Report::Kept(_));
        self.machine.phase() == Phase::Running
            && self.workers.values().all(|worker| worker.outbox.iter().all(handed_on))
    }

    /// What `script` says happens, a kind and whom it happens to: one dies (where `careful`, only while everybody is there), one joins,
    /// something is committed; mostly somebody says a word, and, where `careful`, mostly before what became of its snapshots.
    pub(super) fn follow(&mut self, script: &[(u8, u64)], careful: bool) {
        for &(kind, pick) in script {
            let connections: Vec<Connection> = self.workers.keys().copied().collect();
            let Some(&from) = connections.get(pick as usize % connections.len().max(1)) else { break };
            match kind {
                0 if !careful || self.is_safe() => self.dies(from),
                1..=5 => drop(self.next_joins()),
                6 => self.commit(),
                _ => {
                    if careful && kind > 12 {
                        self.snapshots_fall_behind(from);
                    }
                    self.say(from);
                }
            }
        }
    }

    /// Everyone speaks in turn until nobody has anything to say.
    pub(super) fn settle(&mut self) {
        loop {
            let mut spoke = self.next_joins();
            spoke |= self.speak();
            let busy = !self.commits.is_empty() || self.concluding;
            self.commit();
            if !spoke && !busy {
                return;
            }
        }
    }
}

/// The losses of an undisturbed run with one worker.
pub(super) fn alone(steps: u64) -> Vec<(u64, u64)> {
    let mut world = World::new(1, steps, Assignment::Balanced);
    world.settle();
    assert_eq!(world.machine.phase(), Phase::Finished);
    world.steps()
}

//! Everything that can go wrong around the machine, at the will of a seed: workers die, vanish without a word, fall asleep
//! past the lease and wake up again; some wait for a peer that they never hear; more join; saves fail; somebody asks the run to stop; the coordinator is killed around
//! what it makes durable, and comes back with the ledger and the checkpoints that there are.

use super::event::{Connection, Event};
use super::machine::{Machine, Settings};
use super::phases::Phase;
use super::program::Program;
use super::recorded::Recorded;
use super::rehearsal::ROWS;
use super::simulated::*;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Exchange, Failure, Heartbeat, Phase as Place, WorkerMessage};

/// Seconds that nothing may move between workers of which none computes.
const PEER_TIMEOUT: f64 = 5.0;

/// SplitMix64 (Steele et al. 2014).
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}

/// What a coordinator that is killed leaves of its last decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    /// Nothing.
    BeforeAppend,
    /// What is in the ledger; nobody was told.
    AfterAppend,
}

/// What happened in a run, for people who look for the cause of a failure.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Tally(pub(super) BTreeMap<&'static str, u64>);

/// Steps with the bits of their losses, and which rows were left out from which step on.
pub(super) type Story = (Vec<(u64, u64)>, Vec<(u64, Vec<u32>)>);

pub(super) fn story(world: &World) -> Story {
    let left_out = |e: &Entry| match e {
        Entry::Quarantined(q) => Some((q.step, q.rows.clone())),
        _ => None,
    };
    (world.steps(), world.ledger.iter().filter_map(left_out).collect())
}

/// What a run comes to that nothing happens to but its rows; `None`: it ends.
fn undisturbed(steps: u64, poison: &BTreeSet<u32>, spiky: &BTreeSet<u32>) -> Option<Story> {
    let mut alone = World::with(Machine::new(quarantining(1), program(steps)), 1, Vec::new());
    (alone.poison, alone.spiky) = (poison.clone(), spiky.clone());
    alone.settle_for(100.0);
    (alone.machine.phase() == Phase::Finished).then(|| story(&alone))
}

/// A run in bad weather.
pub(super) struct Storm {
    pub(super) world: World,
    pub(super) tally: Tally,
    /// What the run must come to.
    pub(super) expected: Story,
    dice: Dice,
    /// Steps between snapshots.
    every: u64,
    steps: u64,
    term: u64,
    /// Steps whose manifest exists.
    manifests: BTreeSet<u64>,
    /// When each sleeper wakes.
    sleepers: BTreeMap<Connection, f64>,
    /// Since when each has nothing to do.
    idle: BTreeMap<Connection, f64>,
    processes: u64,
    trace: DefaultHasher,
    /// `UNISONO_STORM_SHOWN=1`, with `UNISONO_STORMS=1` and the seed of a failure, shows how it came to it.
    shown: bool,
}

impl Storm {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let (workers, steps) = (1 + dice.roll(5) as u32, 1 + dice.roll(14));
        let every = dice.roll(4);
        let mut rows = |most| (0..dice.roll(most)).map(|_| dice.roll(ROWS as u64) as u32).collect();
        let (mut poison, mut spiky) = (rows(3), rows(3));
        let expected = undisturbed(steps, &poison, &spiky).unwrap_or_else(|| {
            // Not every run can do without its rows.
            (poison, spiky) = Default::default();
            undisturbed(steps, &poison, &spiky).expect("nothing is wrong with it")
        });
        let mut settings = quarantining(workers);
        settings.snapshots.every = every;
        settings.assign.peer_timeout = PEER_TIMEOUT;
        let mut world = World::with(Machine::new(settings, program(steps)), workers, Vec::new());
        (world.poison, world.spiky) = (poison, spiky);
        Storm {
            world,
            expected,
            every,
            tally: Tally::default(),
            dice,
            steps,
            term: 3,
            manifests: BTreeSet::new(),
            sleepers: BTreeMap::new(),
            idle: BTreeMap::new(),
            processes: 0,
            trace: DefaultHasher::new(),
            shown: std::env::var_os("UNISONO_STORM_SHOWN").is_some(),
        }
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Bad weather for a while, then calm until the run is done: a number that depends on all that happened, and when.
    pub(super) fn pass(&mut self) -> u64 {
        let actions = 40 + self.dice.roll(500);
        for _ in 0..actions {
            self.act();
            self.go_on_if_over();
            if self.is_done() {
                break;
            }
        }
        let mut calm = 0.0;
        while !self.is_done() {
            self.world.disk.clear();
            self.world.refusals = 0;
            self.sleepers.values_mut().for_each(|until| *until = 0.0);
            self.wake();
            self.world.settle();
            self.time_passes(0.2);
            self.go_on_if_over();
            calm += 0.2;
            assert!(calm < 1000.0, "the run hangs: {:?}", self.world.machine.status(self.world.now));
        }
        self.note("end", 0);
        self.trace.finish()
    }

    /// Whether the ledger has the run's end.
    fn is_done(&self) -> bool {
        matches!(self.world.ledger.last(), Some(Entry::Done(_)))
    }

    fn note(&mut self, what: &'static str, which: u64) {
        *self.tally.0.entry(what).or_default() += 1;
        let world = &self.world;
        let said: Vec<(u64, usize, usize)> =
            world.workers.iter().map(|(c, w)| (c.0, w.outbox.len(), w.steps.len())).collect();
        if self.shown {
            let last = world.ledger.last().map(Entry::kind);
            eprintln!("{:8.2} {what} {which}: {:?}, {last:?}, {said:?}", world.now, world.machine.phase());
        }
        (what, which, world.now.to_bits(), world.ledger.len(), said).hash(&mut self.trace);
        world.machine.status(world.now).step.hash(&mut self.trace);
    }

    /// One thing happens.
    fn act(&mut self) {
        self.world.now += 0.02;
        let here: Vec<Connection> = self.world.workers.keys().copied().collect();
        let awake: Vec<Connection> = here.iter().copied().filter(|c| !self.sleepers.contains_key(c)).collect();
        let someone = |dice: &mut Dice, of: &[Connection]| match of.len() as u64 {
            0 => None,
            count => Some(of[dice.roll(count) as usize]),
        };
        let kind = self.dice.roll(1000);
        match kind {
            0..15 => {
                let Some(from) = someone(&mut self.dice, &here) else { return };
                self.note("death", from.0);
                self.sleepers.remove(&from);
                self.world.forget_mail(from);
                self.world.dies(from);
            }
            15..25 => {
                let Some(from) = someone(&mut self.dice, &here) else { return };
                self.note("vanishes", from.0);
                self.vanishes(from);
            }
            25..40 => {
                let Some(from) = someone(&mut self.dice, &awake) else { return };
                let until = self.world.now + self.dice.roll(30) as f64;
                self.note("sleeps", from.0);
                self.sleepers.insert(from, until);
                self.world.asleep.insert(from);
            }
            40..50 => {
                let crash = if kind < 45 { Crash::BeforeAppend } else { Crash::AfterAppend };
                self.note("coordinator dies", kind);
                self.world.crash = Some(crash);
                // In the middle of a decision, where anybody has something to say.
                if let Some(from) = someone(&mut self.dice, &awake) {
                    self.world.say(from);
                }
                self.restart();
            }
            50..58 => {
                self.note("disk full", 0);
                let problem = "the disk is full".to_owned();
                self.world.disk.push_back(Some(problem));
            }
            58..66 if self.world.joining.len() + here.len() < 7 && !self.over() => {
                self.processes += 1;
                self.note("late join", self.processes);
                self.world.joins(format!("bob:{}", self.processes));
            }
            66..74 => {
                // Nobody needs its peers before it has something to do.
                let from = someone(&mut self.dice, &awake);
                let Some(from) = from.filter(|from| !self.world.workers[from].outbox.is_empty()) else { return };
                self.note("complaint", from.0);
                self.complains(from);
            }
            74..78 => {
                self.note("somebody asks to stop", 0);
                // Refused after the end.
                self.world.apply(Event::Interrupt { by: "SIGTERM".into() }).ok();
            }
            78..86 => {
                let from = someone(&mut self.dice, &awake);
                // Nobody exchanges anything alone, or when all is done.
                let exchanges = |from: &Connection| {
                    let worker = &self.world.workers[from];
                    let word = worker.outbox.front();
                    worker.world() > 1 && word.is_some_and(|(_, word)| !matches!(word, Report::Drained(_)))
                };
                let Some(from) = from.filter(exchanges) else { return };
                self.note("stuck in an exchange", from.0);
                self.world.stuck.insert(from, self.world.now);
            }
            86..200 => {
                let seconds = [0.1, 0.2, 0.5, 2.0][self.dice.roll(4) as usize];
                self.time_passes(seconds);
                self.wake();
            }
            200..280 => {
                self.world.next_joins();
                self.note("join", 0);
            }
            280..340 => {
                if self.dice.roll(5) == 0 {
                    self.note("commit fails", 0);
                    self.world.refusals = 1;
                }
                self.commit();
            }
            _ => {
                let Some(from) = someone(&mut self.dice, &awake) else { return };
                self.world.say(from);
                self.note("word", from.0);
            }
        }
    }

    fn over(&self) -> bool {
        self.world.machine.phase().is_final()
    }

    /// Those who are awake give signs of life; the machine hears that time passes.
    fn time_passes(&mut self, seconds: f64) {
        let before = self.world.now;
        self.world.now += seconds;
        for (&from, worker) in self.world.workers.iter().filter(|(from, _)| !self.sleepers.contains_key(from)) {
            let since = |since: f64| self.world.now - since;
            let exchange =
                self.world.stuck.get(&from).map(|stuck| Exchange { seconds: since(*stuck), ..Exchange::default() });
            let mut heartbeat = Heartbeat { exchange, ..Heartbeat::default() };
            if worker.outbox.is_empty() {
                (heartbeat.waits, heartbeat.seconds) = (true, since(*self.idle.entry(from).or_insert(before)));
            } else {
                self.idle.remove(&from);
            }
            let body = Some(Report::Heartbeat(heartbeat));
            // Refused after the end, and from those of a generation that is over.
            self.world
                .machine
                .apply(self.world.now, Event::Message { from, message: WorkerMessage { epoch: worker.epoch, body } })
                .ok();
        }
        // Refused after the end.
        self.world.apply(Event::Tick).ok();
        self.note("tick", seconds.to_bits());
    }

    /// Whoever has slept enough says first what it wanted to say, and hears then what was said to it.
    fn wake(&mut self) {
        let now = self.world.now;
        let due: Vec<Connection> = self.sleepers.iter().filter(|(_, until)| **until <= now).map(|(c, _)| *c).collect();
        for from in due {
            self.sleepers.remove(&from);
            while self.world.workers.contains_key(&from) && self.world.say(from) {}
            self.world.wakes(from);
            self.note("wakes", from.0);
        }
    }

    /// Its machine loses power: nobody is told that the connection is over.
    fn vanishes(&mut self, from: Connection) {
        self.sleepers.remove(&from);
        self.world.forget_mail(from);
        self.world.vanishes(from);
    }

    fn complains(&mut self, from: Connection) {
        let message = "a peer closed its connection".into();
        let failure = Failure { phase: Place::Reduce.into(), message, recoverable: true, ..Failure::default() };
        let message = WorkerMessage { epoch: self.world.workers[&from].epoch, body: Some(Report::Failure(failure)) };
        // Refused after the end, and from those of a generation that is over.
        if self.world.apply(Event::Message { from, message }).is_ok() {
            if let Some(worker) = self.world.workers.get_mut(&from) {
                worker.complained = true;
            }
        }
    }

    fn commit(&mut self) {
        self.world.commit();
        self.note("commit", 0);
    }

    /// The coordinator is killed, and started again on what is durable; every worker's process lives on and joins again.
    fn restart(&mut self) {
        self.world.crash = None;
        if self.is_done() {
            return;
        }
        // The manifest may have been written.
        if let Some(pending) = self.world.commits.front() {
            if self.dice.roll(2) == 0 {
                self.manifests.insert(pending.step);
            }
        }
        let workers = std::mem::take(&mut self.world.workers);
        for (from, worker) in workers {
            self.sleepers.remove(&from);
            if !worker.regroups {
                self.world.joining.push_back(worker.listen);
            }
        }
        let world = self.world.machine.settings.world;
        self.begin(world);
        self.note("coordinator is back", self.term);
    }

    /// A run that was stopped, or has failed, is gone on with by another number of workers.
    fn go_on_if_over(&mut self) {
        if !self.over() || self.is_done() {
            return;
        }
        if let Phase::Failed = self.world.machine.phase() {
            let Some(Entry::Failed(Failure { message, .. })) = self.world.ledger.last() else {
                panic!("a failed run says so: {:?}", self.world.ledger.last())
            };
            let known = ["losses in a row", "every worker was lost and none came back", "failed 5 times"];
            assert!(known.iter().any(|k| message.contains(k)), "{message}");
        }
        self.world.workers.clear();
        self.world.joining.clear();
        self.world.memory.clear();
        self.sleepers.clear();
        let workers = 1 + self.dice.roll(5) as u32;
        for _ in 0..workers {
            self.processes += 1;
            self.world.joining.push_back(format!("eve:{}", self.processes));
        }
        self.begin(workers);
        self.note("resumed", u64::from(workers));
    }

    /// A coordinator opens the run.
    fn begin(&mut self, workers: u32) {
        self.term += 1;
        let Program::Train(mut training) = program(self.steps) else { unreachable!() };
        // One that is in the ledger is on the disk.
        let committed = |entry: &Entry| match entry {
            Entry::Checkpoint(checkpoint) => Some(checkpoint.step),
            _ => None,
        };
        self.manifests.extend(self.world.ledger.iter().filter_map(committed));
        training.start = self.manifests.last().copied().unwrap_or(0);
        let program = Program::Train(training);
        let mut recorded = Recorded::default();
        self.world.ledger.iter().for_each(|entry| recorded.note(entry));
        recorded.follow(&program);
        let mut settings = Settings { recorded, term: self.term, ..quarantining(workers) };
        settings.snapshots.every = self.every;
        settings.assign.peer_timeout = PEER_TIMEOUT;
        let Program::Train(training) = &program else { unreachable!() };
        for quarantined in settings.recorded.quarantined() {
            training.plan.quarantine(quarantined.step, &quarantined.rows);
            settings.snapshots.branch(quarantined.step, &quarantined.rows);
        }
        self.world.begins(Machine::new(settings, program));
    }
}

impl World {
    /// Another coordinator takes over: nothing that the one before wanted still counts.
    fn begins(&mut self, machine: Machine) {
        self.machine = machine;
        self.commits.clear();
        self.disk.clear();
        self.refusals = 0;
        self.asleep.clear();
        self.closed.clear();
        self.mail.clear();
        (self.concluding, self.over) = (false, false);
        let effects = self.machine.start();
        self.carry_out(effects);
    }

    /// Who was asleep hears what it was sent, and that its stream is over.
    fn wakes(&mut self, from: Connection) {
        self.asleep.remove(&from);
        for (epoch, order) in self.mail.remove(&from).unwrap_or_default() {
            self.deliver(from, epoch, order);
        }
        // Whoever finds its stream at an end comes again, unless it does so already.
        if self.closed.remove(&from) {
            let over = self.workers.remove(&from).filter(|worker| !worker.regroups);
            self.joining.extend(over.map(|worker| worker.listen));
        }
    }

    fn forget_mail(&mut self, from: Connection) {
        self.asleep.remove(&from);
        self.mail.remove(&from);
    }
}

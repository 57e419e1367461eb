//! Who takes part: one member for each joined worker, in rank order once ranks are assigned.

use super::event::{differences, Connection, Refusal};
use std::collections::BTreeMap;
use unisono_proto::v1::{Fingerprint, Heartbeat, Join, Member, MemoryReport, Phase};

/// One worker of the run.
#[derive(Debug, Clone)]
pub struct Worker {
    pub connection: Connection,
    pub join: Join,
    /// Last sign of life, seconds.
    pub heard: f64,
    /// What it said last that it was doing.
    pub heartbeat: Heartbeat,
    /// When it said so, seconds.
    pub beat: f64,
    /// Seconds that it computed at one time at most, since it answered last.
    pub longest: f64,
    pub ready: bool,
    /// It has memory for snapshots.
    pub snapshots: bool,
    pub drained: bool,
    /// It has said that it cannot go on, so that its leaving is no news.
    pub complained: bool,
    /// Its stream is over.
    pub gone: bool,
    /// Directives answered.
    pub answered: u64,
    pub memory: MemoryReport,
}

impl Worker {
    /// A heartbeat came.
    pub fn beats(&mut self, now: f64, heartbeat: Heartbeat) {
        if heartbeat.phase() != self.heartbeat.phase() {
            self.longest = 0.0;
        }
        if !heartbeat.waits && heartbeat.exchange.is_none() {
            self.longest = self.longest.max(heartbeat.seconds);
        }
        (self.heartbeat, self.beat) = (heartbeat, now);
    }

    /// It got on since its last heartbeat: how long it had computed or waited then is of the past.
    pub fn got_on(&mut self) {
        self.longest = 0.0;
        (self.heartbeat.seconds, self.heartbeat.exchange) = (0.0, None);
    }

    /// What it told last, with the longest time that it computed in that phase without a pause.
    pub fn told(&self) -> Heartbeat {
        Heartbeat { seconds: self.longest, ..self.heartbeat.clone() }
    }

    /// Phase and step as the worker told them last.
    pub fn phase(&self) -> Phase {
        self.heartbeat.phase()
    }
}

/// The workers in order of joining, which is the order of their ranks.
#[derive(Debug, Clone, Default)]
pub struct Roster {
    workers: Vec<Worker>,
    /// Where in `workers`.
    places: BTreeMap<Connection, usize>,
}

impl Roster {
    /// Whether a worker may be taken in: not where its arithmetic may differ from `standard`, else from that of those here, else
    /// from what was `recorded` by an earlier coordinator, whose workers may have been of another build.
    pub fn may_join(
        &self,
        join: &Join,
        standard: Option<&Fingerprint>,
        recorded: Option<&Fingerprint>,
    ) -> Result<(), Refusal> {
        if join.listen.is_empty() {
            return Err(Refusal::Listen { host: join.host.clone() });
        }
        let theirs = join.fingerprint.clone().unwrap_or_default();
        let first = self.workers.first().and_then(|w| w.join.fingerprint.as_ref());
        let ours = match (standard.or(first), recorded) {
            (Some(ours), _) => ours.clone(),
            (None, Some(before)) => Fingerprint { binary: theirs.binary.clone(), ..before.clone() },
            (None, None) => return Ok(()),
        };
        match differences(&theirs, &ours) {
            told if told.is_empty() => Ok(()),
            differences => Err(Refusal::Fingerprint { host: join.host.clone(), differences }),
        }
    }

    /// Takes a worker in, which may join.
    pub fn admit(&mut self, from: Connection, join: Join, now: f64) {
        self.push(Worker {
            connection: from,
            join,
            heard: now,
            heartbeat: Heartbeat { phase: Phase::Join.into(), ..Heartbeat::default() },
            beat: now,
            longest: 0.0,
            ready: false,
            snapshots: false,
            drained: false,
            complained: false,
            gone: false,
            answered: 0,
            memory: MemoryReport::default(),
        });
    }

    pub fn push(&mut self, worker: Worker) {
        self.places.insert(worker.connection, self.workers.len());
        self.workers.push(worker);
    }

    pub fn into_workers(self) -> Vec<Worker> {
        self.workers
    }

    /// Ranks: whoever listens where `before` says keeps its place, the others fill the gaps in order of joining.
    pub fn arrange(&mut self, before: &[String]) {
        let (world, mut others) = (self.workers.len(), Vec::new());
        let mut places: Vec<Option<Worker>> = vec![None; world];
        let ranks: BTreeMap<&str, usize> = before.iter().map(String::as_str).zip(0..before.len()).rev().collect();
        for worker in self.workers.drain(..) {
            let rank = ranks.get(worker.join.listen.as_str()).copied();
            match rank.and_then(|rank| places.get_mut(rank)) {
                Some(place @ None) => *place = Some(worker),
                _ => others.push(worker),
            }
        }
        let mut others = others.into_iter();
        self.workers = places.into_iter().filter_map(|place| place.or_else(|| others.next())).collect();
        self.index();
    }

    fn index(&mut self) {
        self.places = self.workers.iter().map(|w| w.connection).zip(0..).collect();
    }

    pub fn forget(&mut self, from: Connection) {
        self.workers.retain(|w| w.connection != from);
        self.index();
    }

    pub fn rank_of(&self, from: Connection) -> Option<usize> {
        self.places.get(&from).copied()
    }

    pub fn len(&self) -> usize {
        self.workers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    pub fn get_mut(&mut self, rank: usize) -> &mut Worker {
        &mut self.workers[rank]
    }

    /// Those that have been silent for longer than `limit` seconds.
    pub fn silent(&self, now: f64, limit: f64) -> Vec<Connection> {
        self.workers.iter().filter(|w| !w.drained && now - w.heard > limit).map(|w| w.connection).collect()
    }

    /// Everyone counts as heard from just now.
    pub fn renew(&mut self, now: f64) {
        self.workers.iter_mut().for_each(|w| w.heard = now);
    }

    pub fn members(&self) -> Vec<Member> {
        let member =
            |(rank, w): (usize, &Worker)| Member { rank: rank as u32, host: w.join.host.clone(), pid: w.join.pid };
        self.workers.iter().enumerate().map(member).collect()
    }
}

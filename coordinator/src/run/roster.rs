//! Who takes part: one member for each joined worker, in rank order once ranks are assigned.

use super::event::{differences, Connection, Refusal};
use unisono_proto::v1::{Heartbeat, Join, Member, MemoryReport, Phase};

/// One worker of the run.
#[derive(Debug, Clone)]
pub struct Worker {
    pub connection: Connection,
    pub join: Join,
    /// Last sign of life, seconds.
    pub heard: f64,
    /// What it said last that it was doing.
    pub heartbeat: Heartbeat,
    pub ready: bool,
    pub drained: bool,
    /// It has said that it cannot go on, so that its leaving is no news.
    pub complained: bool,
    /// Directives answered.
    pub answered: u64,
    pub memory: MemoryReport,
}

impl Worker {
    /// Phase and step as the worker told them last.
    pub fn phase(&self) -> Phase {
        self.heartbeat.phase()
    }
}

/// The workers in order of joining, which is the order of their ranks.
#[derive(Debug, Clone, Default)]
pub struct Roster {
    workers: Vec<Worker>,
}

impl Roster {
    /// Takes a worker in, unless its arithmetic may differ from that of those here already.
    pub fn admit(&mut self, from: Connection, join: Join, now: f64) -> Result<(), Refusal> {
        if join.listen.is_empty() {
            return Err(Refusal::Listen { host: join.host });
        }
        if let Some(first) = self.workers.first() {
            let (theirs, ours) = (join.fingerprint.clone(), first.join.fingerprint.clone());
            let told = differences(&theirs.unwrap_or_default(), &ours.unwrap_or_default());
            if !told.is_empty() {
                return Err(Refusal::Fingerprint { host: join.host, differences: told });
            }
        }
        self.workers.push(Worker {
            connection: from,
            join,
            heard: now,
            heartbeat: Heartbeat { phase: Phase::Join.into(), step: None },
            ready: false,
            drained: false,
            complained: false,
            answered: 0,
            memory: MemoryReport::default(),
        });
        Ok(())
    }

    pub fn forget(&mut self, from: Connection) {
        self.workers.retain(|w| w.connection != from);
    }

    pub fn rank_of(&self, from: Connection) -> Option<usize> {
        self.workers.iter().position(|w| w.connection == from)
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

    /// The first rank that has been silent for longer than `limit` seconds.
    pub fn silent(&self, now: f64, limit: f64) -> Option<usize> {
        self.workers.iter().position(|w| !w.drained && now - w.heard > limit)
    }

    pub fn members(&self) -> Vec<Member> {
        let member =
            |(rank, w): (usize, &Worker)| Member { rank: rank as u32, host: w.join.host.clone(), pid: w.join.pid };
        self.workers.iter().enumerate().map(member).collect()
    }
}

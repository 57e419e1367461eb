//! From joining to Go: who is taken in, in which order they are ranked, and when the run goes on without the rest.

use super::event::{Connection, Effect, Refusal};
use super::machine::Machine;
use super::pace::Pace;
use super::phases::Phase;
use crate::checkpoint::manifest;
use std::collections::BTreeMap;
use std::sync::Arc;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{self as wire, Assign, CheckpointSource, Fingerprint, Go, Join, Membership, Ready, Warning};

/// A generation that is over, while the next one gathers.
#[derive(Debug, Clone)]
pub(super) struct Regrouping {
    /// When it was over.
    pub since: f64,
    /// Addresses of those that are still there, who will join again.
    pub expected: Vec<String>,
}

impl Machine {
    /// Whether a worker that says `join` is taken in, and why not.
    pub fn may_join(&self, join: &Join) -> Result<(), Refusal> {
        if self.phase.is_final() {
            return Err(Refusal::Over);
        }
        let join = self.as_it_counts(join.clone());
        self.roster.may_join(&join, self.standard.as_ref(), self.settings.recorded.fingerprint())
    }

    /// What GPUs a worker sees decides nothing where it computes on the processor.
    fn as_it_counts(&self, mut join: Join) -> Join {
        if let (Some(fingerprint), true) = (&mut join.fingerprint, self.settings.assign.device != "cuda") {
            fingerprint.gpu.clear();
        }
        join
    }

    pub(super) fn joined(&mut self, now: f64, from: Connection, join: Join) -> Result<Vec<Effect>, Refusal> {
        self.may_join(&join)?;
        let join = self.as_it_counts(join);
        let mut effects = Vec::new();
        // A worker that comes again has given its old stream up, also where that has not been noticed yet.
        let same = |w: &Join| (&w.host, w.pid, &w.listen) == (&join.host, join.pid, &join.listen);
        let before = self.roster.workers().iter().find(|w| same(&w.join));
        if let Some(before) = before.map(|w| w.connection) {
            effects.extend(self.ended(now, before, "was given up for a new one"));
            if self.phase.is_final() {
                return Ok(effects);
            }
        }
        if self.phase == Phase::Gathering {
            self.roster.admit(from, join, now);
            effects.extend(self.fill_up(now));
            return Ok(effects);
        }
        self.spares.admit(from, join, now);
        effects.extend(self.make_room(now));
        Ok(effects)
    }

    /// Takes those in who joined while the generation that is over went on.
    pub(super) fn take_spares(&mut self) -> Vec<Effect> {
        let now = self.regrouping.as_ref().map_or(0.0, |regrouping| regrouping.since);
        self.fill_up(now)
    }

    /// Spares take the places that are left, and everyone is assigned where none is. Those who hold the newest state come
    /// before spares.
    fn fill_up(&mut self, now: f64) -> Vec<Effect> {
        if self.is_stopping() {
            return self.assemble_to_stop(now);
        }
        if self.roster.len() < self.settings.world as usize && self.awaits_holders(now) {
            return Vec::new();
        }
        let waiting = std::mem::take(&mut self.spares);
        for spare in waiting.into_workers() {
            match self.roster.len() < self.settings.world as usize {
                true => self.roster.push(spare),
                false => self.spares.push(spare),
            }
        }
        match self.roster.len() >= self.settings.world as usize {
            true => self.assign(),
            false => Vec::new(),
        }
    }

    /// Everyone here gets a rank. What a rank had before, it keeps.
    pub(super) fn assign(&mut self) -> Vec<Effect> {
        self.phase = Phase::Loading;
        // What somebody complained of was a peer of the generation before.
        self.complaints.clear();
        if self.regrouping.take().is_none() {
            self.generation += 1;
        }
        let first = self.roster.workers().first().and_then(|w| w.join.fingerprint.clone());
        let other_build = self.other_build(first.as_ref());
        self.standard = self.standard.take().or(first);
        self.roster.arrange(&self.ranks);
        self.ranks = self.roster.workers().iter().map(|w| w.join.listen.clone()).collect();
        self.pace = Pace::new(self.roster.len());
        let held = self.held_step();
        self.rewind(held);
        let membership = Membership {
            generation: self.generation,
            members: self.roster.members(),
            resume_step: self.committed,
            from_memory: held.is_some(),
            fingerprint: self.standard.clone(),
            replayed: self.settings.recorded.newest() - self.committed.min(self.settings.recorded.newest()),
        };
        let generation = self.generation;
        let mut effects = vec![Effect::Append(Entry::Membership(membership))];
        effects.extend(other_build);
        let mut key = blake3::Hasher::new_keyed(&self.settings.peer_secret);
        key.update(&generation.to_le_bytes());
        let peer_key = bytes::Bytes::copy_from_slice(key.finalize().as_bytes());
        let path = |step| manifest::directory(&self.settings.run_dir, step).display().to_string();
        let resume = (held.is_none() && self.committed > 0)
            .then(|| CheckpointSource { path: path(self.committed), step: self.committed });
        let mut sources = held.map(|step| self.snapshot_sources(step)).unwrap_or_default().into_iter();
        let neighbours = self.snapshot_neighbours();
        let mut fresh: BTreeMap<&str, u32> = BTreeMap::new();
        for worker in self.roster.workers() {
            *fresh.entry(&worker.join.host).or_default() += u32::from(!worker.join.again);
        }
        let peers: Arc<[String]> = self.ranks.clone().into();
        for ((rank, worker), neighbour) in (0..).zip(self.roster.workers()).zip(neighbours) {
            let assign = Assign {
                rank,
                world: self.roster.len() as u32,
                peer_key: peer_key.clone(),
                resume: resume.clone(),
                fresh: fresh[worker.join.host.as_str()],
                snapshot: sources.next(),
                neighbour,
                ..self.settings.assign.clone()
            };
            let (to, epoch, peers) = (worker.connection, self.epoch(), peers.clone());
            effects.push(Effect::Assign { to, epoch, assign: Box::new(assign), peers });
        }
        effects
    }

    /// Another build of the same arithmetic may give the same bits; if it does not, the first step that is computed again says so.
    fn other_build(&self, first: Option<&Fingerprint>) -> Option<Effect> {
        let (before, first) = self.settings.recorded.fingerprint().zip(first)?;
        if self.standard.is_some() || before.binary == first.binary {
            return None;
        }
        let message = "these workers are of another build of unisono-worker than those that began the run; steps that are computed again must come out the same".into();
        Some(Effect::Append(Entry::Warning(Warning { kind: "build".into(), step: Some(self.committed), message })))
    }

    pub(super) fn ready(&mut self, now: f64, rank: usize, ready: Ready) -> Vec<Effect> {
        if self.phase != Phase::Loading || self.roster.workers()[rank].ready {
            return self.blame(now, rank, "it said twice that it is ready".into());
        }
        let worker = self.roster.get_mut(rank);
        worker.ready = true;
        worker.memory = ready.memory.unwrap_or_default();
        worker.snapshots = ready.snapshots;
        self.durations.note(&Report::Ready(ready), &self.roster.workers()[rank].told());
        self.roster.get_mut(rank).got_on();
        let mut effects = vec![self.memory(rank)];
        if self.roster.workers().iter().all(|w| w.ready) {
            self.phase = Phase::Running;
            self.last_commit = now;
            if self.started == 0.0 {
                self.started = now;
            }
            self.kept.go(now, self.committed);
            effects.extend(self.broadcast(Order::Go(Go { snapshot_every: self.snapshot_every() })));
            self.save_and_stop();
            effects.extend(self.prune_spared());
            effects.extend(self.queue_ahead(now));
        }
        effects
    }

    /// Goes on with fewer when nobody came in a lost worker's place, and gives up when nobody is left at all.
    pub(super) fn muster(&mut self, now: f64) -> Vec<Effect> {
        let silent = self.roster.silent(now, self.settings.lease);
        silent.iter().for_each(|&from| self.roster.forget(from));
        let closed = silent.into_iter().map(|to| Effect::Close { to }).collect();
        if !self.spares.is_empty() || self.is_stopping() {
            let assigned = self.fill_up(now);
            if self.phase != Phase::Gathering {
                return [closed, assigned].concat();
            }
        }
        let Some(Regrouping { since, expected }) = &self.regrouping else { return closed };
        let waited = now - since;
        let timeout = self.settings.assign.rejoin_timeout;
        // Whoever computes hears late that the generation is over.
        let patient = waited < timeout + self.settings.assign.peer_timeout;
        let here = |listen: &String| self.roster.workers().iter().any(|w| w.join.listen == *listen);
        let complete = expected.iter().all(here);
        if waited < timeout || patient && (self.roster.is_empty() || !complete) {
            return closed;
        }
        if !self.roster.is_empty() {
            return [closed, self.assign()].concat();
        }
        let (waited, again) = (format!("{waited:.0} s"), self.again());
        let message = format!(
            "every worker was lost and none came back within {waited}; look at their logs for the cause, then {again}"
        );
        self.fail(now, self.failure(None, wire::Phase::Join, None, message))
    }
}

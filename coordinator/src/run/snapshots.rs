//! Snapshots in the workers' memory: which state they still hold after a loss, and who hands out what of it. All of it
//! follows from the lists of what each worker says that it holds; a step counts only where its shards tile the model.

use super::event::Effect;
use super::machine::Machine;
use super::roster::Worker;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use unisono_configs::model::Layout;
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{Forget, Held, Neighbour, Retain, SnapshotImage, SnapshotKept, SnapshotSource, Warning};

/// Snapshots in a row that may be missing before somebody is told.
const MISSED: u32 = 3;
/// Training waits for a snapshot for at most this share of the time between two, and never gives up sooner than after so many seconds.
const WAIT: f64 = 0.05;
const LEAST_WAIT: f64 = 1.0;
/// No run has more workers.
const MOST_WORKERS: u32 = 1 << 16;

/// What decides the state after a step: states of two timelines have nothing to do with each other.
pub type Timeline = [u8; 32];

/// How snapshots are taken, and which count.
#[derive(Debug, Clone)]
pub struct Snapshotting {
    /// Steps between them; 0: none.
    pub every: u64,
    pub layout: Arc<Layout>,
    /// The timelines so far, the current one last, each with the last step that still counts.
    pub timelines: Vec<(Timeline, u64)>,
}

/// One held shard, and the place of its holder among the workers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Holding<'a> {
    pub holder: usize,
    pub held: &'a Held,
}

/// For each bucket a range of chunks.
type Chunks = Vec<Range<usize>>;

/// What workers hold, with the chunks that each shard is made of.
pub struct Holdings<'a> {
    layout: &'a Layout,
    all: Vec<(Holding<'a>, Chunks)>,
}

impl<'a> Holdings<'a> {
    /// `held`: by worker. What is of another timeline than `timelines`, or beyond where they count, does not count, nor what two
    /// workers hold differently.
    pub fn new(layout: &'a Layout, timelines: &[(Timeline, u64)], held: impl Iterator<Item = &'a [Held]>) -> Self {
        let name = |held: &Held| (held.step, held.world, held.rank);
        let mut hashes: BTreeMap<(u64, u32, u32), BTreeSet<&[u8]>> = BTreeMap::new();
        let mut counted = Vec::new();
        for (holder, list) in held.enumerate() {
            let counts = |h: &Held| timelines.iter().any(|(t, last)| h.timeline == t[..] && h.step <= *last);
            let whole = |h: &&Held| counts(h) && h.rank < h.world && h.world <= MOST_WORKERS;
            for held in list.iter().filter(whole) {
                hashes.entry(name(held)).or_default().insert(&held.blake3);
                counted.push(Holding { holder, held });
            }
        }
        counted.retain(|h| hashes[&name(h.held)].len() == 1);
        let mut shards: BTreeMap<(u32, u32), Chunks> = BTreeMap::new();
        let mut chunks = |h: &Held| {
            let shard = || layout.shard(h.rank as usize, h.world as usize);
            shards.entry((h.world, h.rank)).or_insert_with(shard).clone()
        };
        let all = counted.into_iter().map(|h| (h, chunks(h.held))).collect();
        Holdings { layout, all }
    }

    /// The newest step after `after` and up to `until` of which every chunk is held.
    pub fn newest(&self, after: u64, until: u64) -> Option<u64> {
        let steps: BTreeSet<u64> = self.all.iter().map(|(h, _)| h.held.step).collect();
        steps.into_iter().rev().find(|&step| step > after && step <= until && self.is_whole(step))
    }

    fn is_whole(&self, step: u64) -> bool {
        (0..self.layout.buckets.len()).all(|bucket| {
            let of_step = self.all.iter().filter(|(h, _)| h.held.step == step);
            let mut ranges: Vec<_> = of_step.map(|(_, chunks)| chunks[bucket].clone()).collect();
            ranges.sort_by_key(|r| r.start);
            let reached = ranges.iter().fold(0, |end, r| if r.start <= end { end.max(r.end) } else { end });
            reached == self.layout.buckets[bucket].chunks()
        })
    }

    /// Which shards of `step` rank `rank` of `world` needs for its own: the own memory first, then a copy of the very shard,
    /// then whoever comes next in turn, so that no holder serves all. Holders are ranks of the same world.
    pub fn sources(&self, step: u64, rank: usize, world: usize) -> Vec<Holding<'a>> {
        let mut missing = Missing::new(self.layout.shard(rank, world));
        let mut candidates: Vec<_> = self.all.iter().filter(|(h, _)| h.held.step == step).collect();
        let shard = (rank as u32, world as u32);
        candidates.sort_by_key(|(h, _)| {
            let elsewhere = (h.holder + world - rank) % world;
            (elsewhere > 0, (h.held.rank, h.held.world) != shard, elsewhere, h.held.world, h.held.rank)
        });
        let mut chosen = Vec::new();
        for (holding, chunks) in candidates {
            if missing.is_empty() {
                break;
            }
            if missing.take(chunks) {
                chosen.push(*holding);
            }
        }
        chosen
    }
}

/// Chunks that no source has been found for.
struct Missing(Vec<Vec<Range<usize>>>);

impl Missing {
    fn new(needed: Chunks) -> Self {
        Missing(needed.into_iter().map(|range| vec![range]).collect())
    }

    fn is_empty(&self) -> bool {
        self.0.iter().flatten().all(Range::is_empty)
    }

    /// Takes `chunks` out; false where none of them was missing.
    fn take(&mut self, chunks: &Chunks) -> bool {
        let mut taken = false;
        for (missing, found) in self.0.iter_mut().zip(chunks) {
            let cut = |range: &Range<usize>| {
                let before = range.start..range.end.min(found.start);
                let after = range.start.max(found.end)..range.end;
                [before, after]
            };
            let left: Vec<_> = missing.iter().flat_map(cut).filter(|r| !r.is_empty()).collect();
            let count = |ranges: &[Range<usize>]| ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
            taken |= count(&left) < count(missing);
            *missing = left;
        }
        taken
    }
}

/// Who keeps a copy of each rank's snapshots, from the ranks' hosts: everyone has one neighbour and is the neighbour of
/// one, on another host wherever the hosts allow it.
pub fn neighbours(hosts: &[&str]) -> Vec<Option<usize>> {
    let world = hosts.len();
    if world < 2 {
        return vec![None; world];
    }
    let mut by_host: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    hosts.iter().enumerate().for_each(|(rank, host)| by_host.entry(host).or_default().push(rank));
    let most = by_host.values().map(Vec::len).max().unwrap_or(1);
    let shift = if most == world { 1 } else { most };
    let order: Vec<usize> = by_host.into_values().flatten().collect();
    let mut neighbours = vec![None; world];
    for (place, &rank) in order.iter().enumerate() {
        neighbours[rank] = Some(order[(place + shift) % world]);
    }
    neighbours
}

impl Snapshotting {
    /// From `step` on, `rows` are left out: another timeline.
    pub fn branch(&mut self, step: u64, rows: &[u32]) {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 timeline without rows");
        if let Some((timeline, _)) = self.timelines.last() {
            hasher.update(&timeline[..]);
        }
        hasher.update(&step.to_le_bytes());
        for row in rows {
            hasher.update(&row.to_le_bytes());
        }
        self.timelines.iter_mut().for_each(|(_, last)| *last = (step - 1).min(*last));
        self.timelines.push((*hasher.finalize().as_bytes(), u64::MAX));
    }

    /// The current one, as the wire has it.
    pub fn timeline(&self) -> bytes::Bytes {
        self.timelines.last().map(|(timeline, _)| bytes::Bytes::copy_from_slice(timeline)).unwrap_or_default()
    }
}

/// What becomes of the snapshots of a generation.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    /// By step and rank: why a shard is not in two memories; empty: it is.
    answers: BTreeMap<u64, BTreeMap<usize, String>>,
    /// The state that the generation began with, where that came from memory.
    start: Option<u64>,
    /// The newest step that is whole in memory; 0: none is.
    whole: u64,
    /// Workers are to hear that it is, once it is committed.
    due: Option<u64>,
    /// The newest step of which all have said what became of its snapshot, or which was waited for long enough.
    answered: u64,
    /// The generation began here.
    begun: (u64, f64),
    /// Since when the next step waits for a snapshot.
    waits: Option<f64>,
    /// Snapshots in a row that did not become whole.
    missed: u32,
    warned: bool,
    /// Snapshots in a row that training did not wait for any longer.
    late: u32,
    told_late: bool,
    /// Steps whose state could not be loaded from memory.
    passed_over: BTreeSet<u64>,
}

impl Kept {
    /// The generation began with a state from memory.
    pub(super) fn is_start(&self) -> bool {
        self.start.is_some()
    }

    /// Another generation begins, with the state after `start` where that comes from memory.
    pub(super) fn begin(&mut self, start: Option<u64>) {
        let passed_over = std::mem::take(&mut self.passed_over);
        *self = Kept { start, whole: start.unwrap_or(0), passed_over, ..Kept::default() };
    }

    /// Everybody is about to take the first step of the generation, after `step`.
    pub(super) fn go(&mut self, now: f64, step: u64) {
        // What was in memory is handed on, as those who are here now share it.
        let handed_on = u64::from(self.start.is_some());
        (self.begun, self.answered) = ((step, now), step.saturating_sub(handed_on));
    }
}

impl Machine {
    /// The newest state that the assembled workers hold in memory, if it is newer than the newest checkpoint. What the
    /// ledger does not have yet is not gone on from: it would have a gap.
    pub(super) fn held_step(&self) -> Option<u64> {
        self.held_by(self.roster.workers().iter())
    }

    fn held_by<'a>(&'a self, workers: impl Iterator<Item = &'a Worker>) -> Option<u64> {
        let snapshotting = &self.settings.snapshots;
        let lists = workers.map(|w| &w.join.held[..]);
        let mut holdings = Holdings::new(&snapshotting.layout, &snapshotting.timelines, lists);
        holdings.all.retain(|(h, _)| !self.kept.passed_over.contains(&h.held.step));
        holdings.newest(self.saves.newest, self.settings.recorded.newest())
    }

    /// Those who are here hold a newer state than the newest checkpoint, or did when the generation was over.
    pub(super) fn may_hold_more(&self) -> bool {
        let held = self.regrouping.is_some() && self.kept.whole > self.saves.newest;
        held && self.kept.whole <= self.settings.recorded.newest() || self.held_step().is_some()
    }

    /// Workers that are still there hold a newer state than those here and the spares that would have a place: as long as
    /// they may come, spares wait.
    pub(super) fn awaits_holders(&self, now: f64) -> bool {
        let Some(regrouping) = &self.regrouping else { return false };
        let newest = self.kept.whole;
        let counts = newest > self.saves.newest && newest <= self.settings.recorded.newest();
        if !counts || now - regrouping.since >= self.settings.assign.rejoin_timeout {
            return false;
        }
        let here = |listen: &String| self.roster.workers().iter().any(|w| w.join.listen == *listen);
        if regrouping.expected.iter().all(here) {
            return false;
        }
        let places = (self.settings.world as usize).saturating_sub(self.roster.len());
        let present = self.roster.workers().iter().chain(self.spares.workers().iter().take(places));
        self.held_by(present).is_none_or(|step| step < newest)
    }

    /// The state that this generation began with could not be loaded from memory, and nobody is lost: it will not be tried
    /// again.
    pub(super) fn pass_over(&mut self) {
        self.kept.passed_over.extend(self.kept.start);
    }

    /// For each rank what it starts from, where that is the state after `step` in memory.
    pub(super) fn snapshot_sources(&self, step: u64) -> Vec<SnapshotSource> {
        let snapshotting = &self.settings.snapshots;
        let workers = self.roster.workers();
        let lists = workers.iter().map(|w| &w.join.held[..]);
        let holdings = Holdings::new(&snapshotting.layout, &snapshotting.timelines, lists);
        let image = |holding: Holding<'_>| {
            let address = workers[holding.holder].join.snapshots.clone();
            let holder = Some(Neighbour { rank: holding.holder as u32, address });
            SnapshotImage { held: Some(holding.held.clone()), holder }
        };
        let of_rank = |rank| holdings.sources(step, rank, workers.len()).into_iter().map(image).collect();
        (0..workers.len()).map(|rank| SnapshotSource { step, images: of_rank(rank) }).collect()
    }

    /// Who keeps each rank's snapshots.
    pub(super) fn snapshot_neighbours(&self) -> Vec<Option<Neighbour>> {
        let workers = self.roster.workers();
        if self.settings.snapshots.every == 0 || workers.iter().any(|w| w.join.snapshots.is_empty()) {
            return vec![None; workers.len()];
        }
        let hosts: Vec<&str> = workers.iter().map(|w| w.join.host.as_str()).collect();
        let named = |rank: usize| Neighbour { rank: rank as u32, address: workers[rank].join.snapshots.clone() };
        neighbours(&hosts).into_iter().map(|neighbour| neighbour.map(named)).collect()
    }

    /// Steps between snapshots for the workers that are ready: none where one of them has no neighbour or no memory.
    pub(super) fn snapshot_every(&self) -> u64 {
        let able = self.roster.len() > 1 && self.roster.workers().iter().all(|w| w.snapshots);
        if able {
            self.settings.snapshots.every
        } else {
            0
        }
    }

    /// Whether step `step` waits until it is known what became of a snapshot. One that is on its way while two more steps are
    /// committed would make a loss cost more than the steps between two snapshots and one. Where the way takes longer than training
    /// should wait, that is what it costs; where it does so again and again, nobody waits any more.
    pub(super) fn awaits_snapshot(&mut self, now: f64, step: u64) -> bool {
        let every = self.snapshot_every();
        let (first, begun) = self.kept.begun;
        let before = step.saturating_sub(2);
        let due = before.checked_div(every).map_or(0, |count| (count * every).max(first).min(before));
        if due <= self.kept.answered {
            if self.kept.waits.take().is_some() {
                self.kept.late = 0;
            }
            return false;
        }
        if self.kept.late >= MISSED {
            self.kept.answered = due;
            return false;
        }
        let since = *self.kept.waits.get_or_insert(now);
        let each = (since - begun) / self.committed.saturating_sub(first).max(1) as f64;
        if now - since < (WAIT * every as f64 * each).max(LEAST_WAIT) {
            return true;
        }
        (self.kept.answered, self.kept.waits, self.kept.late) = (due, None, self.kept.late + 1);
        tracing::info!(step = due, "training goes on before the snapshot is whole");
        false
    }

    /// A rank says what became of its shard's snapshot. Where all are in two memories, older ones may go; where one is not, the
    /// others are of no use, and make room for the next.
    pub(super) fn kept(&mut self, rank: usize, told: SnapshotKept) -> Vec<Effect> {
        let mut effects = Vec::new();
        let SnapshotKept { step, problem } = told;
        if step < self.kept.whole {
            return effects;
        }
        let answers = self.kept.answers.entry(step).or_default();
        answers.insert(rank, problem);
        if answers.len() < self.roster.len() {
            return effects;
        }
        self.kept.answered = step.max(self.kept.answered);
        let answers = self.kept.answers.remove(&step).unwrap_or_default();
        let Some((rank, problem)) = answers.into_iter().find(|(_, problem)| !problem.is_empty()) else {
            self.kept.answers = self.kept.answers.split_off(&step);
            self.kept.passed_over.remove(&step);
            (self.kept.whole, self.kept.due, self.kept.missed) = (step, Some(step), 0);
            effects.extend(self.retain());
            return effects;
        };
        self.kept.missed += 1;
        effects.extend(self.warn_of_snapshots(rank, step, &problem));
        // What the generation began with is held as it was cut before.
        if self.kept.start != Some(step) {
            effects.extend(self.broadcast(Order::Forget(Forget { step })));
        }
        effects
    }

    /// Tells workers of the newest whole snapshot once its step is committed: until then a loss would need the one before.
    pub(super) fn retain(&mut self) -> Vec<Effect> {
        match self.kept.due.take_if(|step| *step <= self.committed) {
            Some(step) => self.broadcast(Order::Retain(Retain { step })),
            None => Vec::new(),
        }
    }

    /// Said once a generation, when nobody waits any more.
    pub(super) fn warn_of_lateness(&mut self) -> Option<Effect> {
        if self.kept.late < MISSED || std::mem::replace(&mut self.kept.told_late, true) {
            return None;
        }
        let message = format!(
            "{MISSED} snapshots in a row took longer than training waits for them, so a loss may cost more steps than \
             checkpoint.snapshot_every says: raise it, or connect the workers faster"
        );
        Some(Effect::Append(Entry::Warning(Warning { kind: "snapshot".into(), step: Some(self.committed), message })))
    }

    /// One that is missed is followed by another; where none follows, somebody has to look.
    fn warn_of_snapshots(&mut self, rank: usize, step: u64, problem: &str) -> Option<Effect> {
        if self.kept.missed < MISSED || std::mem::replace(&mut self.kept.warned, true) {
            return None;
        }
        let host = &self.roster.workers()[rank].join.host;
        let newest = match self.kept.whole.max(self.saves.newest) {
            0 => "the beginning".to_owned(),
            newest => format!("the state after step {newest}"),
        };
        let message = format!(
            "{MISSED} snapshots in a row are missing, the last one after step {step}; a loss now goes back to {newest}. Rank {rank} on {host}: {problem}"
        );
        Some(Effect::Append(Entry::Warning(Warning { kind: "snapshot".into(), step: Some(step), message })))
    }
}

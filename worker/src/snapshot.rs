//! Snapshots of the optimizer's state: each worker's own shard in its memory, and a copy of it in its neighbour's. They outlive
//! a generation, so that a loss costs the steps since the newest one and not those since the newest checkpoint.
//!
//! An image is the file that a checkpoint would have, so whoever reads checkpoints reads images, whatever they hold. Two of
//! each owner are kept: the one that is whole everywhere, and the one on its way.

pub mod exchange;
pub mod keeper;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use unisono_proto::v1::Held;

/// Images of one owner that may be kept at a time.
const KEPT: usize = 2;
/// Buffers that wait to be used again.
const SPARE: usize = 2;

/// Which state an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    pub timeline: [u8; 32],
    pub step: u64,
    /// The shard is what `rank` of `world` owns.
    pub rank: u32,
    pub world: u32,
}

/// One shard's state after a step.
#[derive(Debug)]
pub struct Image {
    pub name: Name,
    /// Of the bytes.
    pub hash: [u8; 32],
    pub bytes: Vec<u8>,
}

impl Image {
    pub fn is_intact(&self) -> bool {
        *blake3::hash(&self.bytes).as_bytes() == self.hash
    }

    pub fn held(&self) -> Held {
        let Name { timeline, step, rank, world } = self.name;
        let (timeline, blake3) = (timeline.to_vec().into(), self.hash.to_vec().into());
        Held { step, timeline, rank, world, bytes: self.bytes.len() as u64, blake3 }
    }
}

/// What the coordinator has said of the snapshots of a generation.
#[derive(Debug, Default)]
pub struct Verdicts(Mutex<Verdict>);

#[derive(Debug, Default)]
struct Verdict {
    /// Whole everywhere: earlier ones are of no use any more, nor is that one as it was cut for an earlier generation.
    retained: u64,
    /// These will not be whole.
    forgotten: BTreeSet<u64>,
}

impl Verdicts {
    fn lock(&self) -> MutexGuard<'_, Verdict> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot after `step` is whole.
    pub fn retain(&self, step: u64) {
        let mut verdict = self.lock();
        verdict.retained = verdict.retained.max(step);
        let retained = verdict.retained;
        verdict.forgotten.retain(|&step| step > retained);
    }

    /// The snapshot after `step` will not be whole.
    pub fn forget(&self, step: u64) {
        self.lock().forgotten.insert(step);
    }
}

/// Everything that this process holds. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Store(Arc<Mutex<Shelf>>);

#[derive(Debug, Default)]
struct Shelf {
    images: Vec<Kept>,
    spare: Vec<Vec<u8>>,
    verdicts: Arc<Verdicts>,
    /// Bytes that may be taken up in all.
    budget: u64,
    /// Counts generations.
    turn: u64,
}

#[derive(Debug)]
struct Kept {
    image: Arc<Image>,
    /// It is where this generation keeps it; others were cut for an earlier one, and serve until these are whole.
    placed: bool,
}

impl Store {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let verdicts = shelf.verdicts.clone();
        let verdict = verdicts.lock();
        shelf.keep(|kept| {
            let step = kept.image.name.step;
            (step > verdict.retained || step == verdict.retained && kept.placed) && !verdict.forgotten.contains(&step)
        });
        shelf
    }

    /// What a coordinator may count on.
    pub fn held(&self) -> Vec<Held> {
        self.shelf().images.iter().map(|kept| kept.image.held()).collect()
    }

    /// A generation begins, which goes on after `step` where that is in memory: nothing else is of use. `verdicts` are what its
    /// coordinator will say, `budget` the bytes that may be taken up.
    pub fn begin(&self, step: Option<u64>, verdicts: Arc<Verdicts>, budget: u64) {
        let mut shelf = self.shelf();
        shelf.budget = budget;
        shelf.turn += 1;
        shelf.keep(|kept| Some(kept.image.name.step) == step);
        shelf.images.iter_mut().for_each(|kept| kept.placed = false);
        shelf.verdicts = verdicts;
        shelf.spare.clear();
    }

    /// Bytes of what is held of `step`.
    pub fn bytes_of(&self, step: u64) -> u64 {
        let shelf = self.shelf();
        let of_step = shelf.images.iter().filter(|kept| kept.image.name.step == step);
        of_step.map(|kept| kept.image.bytes.len() as u64).sum()
    }

    pub fn find(&self, name: &Name, hash: Option<&[u8]>) -> Option<Arc<Image>> {
        let same = |image: &Image| image.name == *name && hash.is_none_or(|hash| image.hash == *hash);
        self.shelf().images.iter().find(|kept| same(&kept.image)).map(|kept| kept.image.clone())
    }

    /// The same, where this generation keeps it here.
    fn place(&self, name: &Name, hash: Option<&[u8]>) -> Option<Arc<Image>> {
        let found = self.find(name, hash)?;
        let mut shelf = self.shelf();
        shelf.images.iter_mut().filter(|kept| kept.image.name == *name).for_each(|kept| kept.placed = true);
        Some(found)
    }

    /// A copy that has turned out to be wrong is no source.
    pub fn forget(&self, name: &Name) {
        self.shelf().keep(|kept| kept.image.name != *name);
    }

    /// Counts generations, for [`Store::insert`].
    pub fn turn(&self) -> u64 {
        self.shelf().turn
    }

    /// Keeps an image that was begun in generation `turn`; a later one has made other plans.
    pub fn insert(&self, turn: u64, image: Image) -> Arc<Image> {
        let image = Arc::new(image);
        let mut shelf = self.shelf();
        if shelf.turn != turn {
            return image;
        }
        shelf.keep(|other| other.image.name != image.name);
        shelf.images.push(Kept { image: image.clone(), placed: true });
        image
    }

    /// Whether another image of the owner of `name`, of `bytes` bytes, may be kept.
    fn has_room(&self, name: &Name, bytes: u64) -> bool {
        let shelf = self.shelf();
        let of_owner = |kept: &&Kept| (kept.image.name.rank, kept.image.name.world) == (name.rank, name.world);
        shelf.taken() + bytes <= shelf.budget && shelf.images.iter().filter(of_owner).count() < KEPT
    }

    /// An empty buffer, with the pages of one that was in use before where there is one.
    fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.shelf().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.shelf().reuse(buffer);
    }
}

impl Shelf {
    fn keep(&mut self, wanted: impl Fn(&Kept) -> bool) {
        for kept in std::mem::take(&mut self.images) {
            if wanted(&kept) {
                self.images.push(kept);
            } else if let Some(image) = Arc::into_inner(kept.image) {
                self.reuse(image.bytes);
            }
        }
    }

    /// Bytes of all images.
    fn taken(&self) -> u64 {
        self.images.iter().map(|kept| kept.image.bytes.len() as u64).sum()
    }

    fn reuse(&mut self, buffer: Vec<u8>) {
        let spare: usize = self.spare.iter().chain([&buffer]).map(Vec::capacity).sum();
        if self.spare.len() < SPARE && self.taken() + spare as u64 <= self.budget {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests;

//! Snapshots of the optimizer's state: each worker's own shard in its memory, and a copy of it in its neighbour's. They outlive
//! a generation, so that a loss costs the steps since the newest one and not those since the newest checkpoint.
//!
//! An image is the file that a checkpoint would have, so whoever reads checkpoints reads images, whatever they hold. Two of
//! each owner are kept: the one that is whole everywhere, and the one on its way.

pub mod exchange;
pub mod keeper;

use std::sync::atomic::{AtomicU64, Ordering};
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

/// Everything that this process holds. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Store(Arc<Mutex<Shelf>>);

#[derive(Debug, Default)]
struct Shelf {
    images: Vec<Arc<Image>>,
    spare: Vec<Vec<u8>>,
    /// Images of earlier steps are of no use any more; told by the coordinator.
    retained: Arc<AtomicU64>,
    /// Bytes that a neighbour's image has at most.
    limit: u64,
}

impl Store {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let retained = shelf.retained.load(Ordering::Relaxed);
        shelf.keep(|image| image.name.step >= retained);
        shelf
    }

    /// What a coordinator may count on.
    pub fn held(&self) -> Vec<Held> {
        self.shelf().images.iter().map(|image| image.held()).collect()
    }

    /// A generation begins, which goes on after `step` where that is in memory: nothing else is of use. `retained` is what its
    /// coordinator will say, `limit` the bytes of the neighbour's images.
    pub fn begin(&self, step: Option<u64>, retained: Arc<AtomicU64>, limit: u64) {
        let mut shelf = self.shelf();
        shelf.keep(|image| Some(image.name.step) == step);
        (shelf.retained, shelf.limit) = (retained, limit);
        if limit == 0 {
            shelf.spare.clear();
        }
    }

    pub fn find(&self, name: &Name, hash: Option<&[u8]>) -> Option<Arc<Image>> {
        let same = |image: &&Arc<Image>| image.name == *name && hash.is_none_or(|hash| image.hash == *hash);
        self.shelf().images.iter().find(same).cloned()
    }

    /// A copy that has turned out to be wrong is no source.
    pub fn forget(&self, name: &Name) {
        self.shelf().keep(|image| image.name != *name);
    }

    pub fn insert(&self, image: Image) -> Arc<Image> {
        let image = Arc::new(image);
        let mut shelf = self.shelf();
        shelf.keep(|other| other.name != image.name);
        shelf.images.push(image.clone());
        image
    }

    /// Whether another image of the owner of `name`, of `bytes` bytes, may be kept.
    fn has_room(&self, name: &Name, bytes: u64) -> bool {
        let shelf = self.shelf();
        let of_owner = |image: &&Arc<Image>| (image.name.rank, image.name.world) == (name.rank, name.world);
        bytes <= shelf.limit && shelf.images.iter().filter(of_owner).count() < KEPT
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
    fn keep(&mut self, wanted: impl Fn(&Image) -> bool) {
        for image in std::mem::take(&mut self.images) {
            if wanted(&image) {
                self.images.push(image);
            } else if let Some(image) = Arc::into_inner(image) {
                self.reuse(image.bytes);
            }
        }
    }

    fn reuse(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE && self.limit > 0 {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests;

//! The state from memory: which images a rank's shard is made of, and what room they take.

use super::{Error, Loading};
use crate::link;
use crate::snapshot::exchange::{self, Circle, Exchange};
use crate::snapshot::Image;
use std::sync::Arc;
use unisono_proto::v1::SnapshotSource;

impl Loading<'_> {
    /// Bytes of the snapshots that are here while the state is loaded.
    pub(super) fn image_bytes(&self) -> u64 {
        let (Some(source), Some(Exchange { store, .. })) = (&self.assign.snapshot, &self.standing.snapshots) else {
            return 0;
        };
        let named = source.images.iter().filter_map(|image| image.held.as_ref());
        let fetched = named.filter(|held| {
            exchange::identify(held).is_none_or(|(name, hash)| store.find(&name, Some(&hash)).is_none())
        });
        store.bytes_of(source.step) + fetched.map(|held| held.bytes).sum::<u64>()
    }

    /// The images that this rank's shard is made of, from the own memory and from others'.
    pub(super) fn gather_images(&self, source: &SnapshotSource, circle: &Circle) -> Result<Vec<Arc<Image>>, Error> {
        let malformed = || link::Error::Protocol("assigned a snapshot without holder or hash".into());
        let Some(Exchange { store, .. }) = &self.standing.snapshots else { return Err(malformed().into()) };
        let mut images = Vec::new();
        for image in &source.images {
            let (held, holder) = image.held.as_ref().zip(image.holder.as_ref()).ok_or_else(malformed)?;
            let (name, hash) = exchange::identify(held).ok_or_else(malformed)?;
            let here = store.find(&name, Some(&hash));
            if let Some(here) = here {
                if !here.is_intact() {
                    store.forget(&name);
                    return Err(exchange::Error::Damaged { step: name.step }.into());
                }
                images.push(here);
                continue;
            }
            let (rank, address) = (holder.rank, &holder.address);
            let fetched = exchange::get(circle, self.link.stopper(), address, rank, held, store)?;
            tracing::info!(step = name.step, rank = name.rank, world = name.world, from = rank, "fetched a snapshot");
            let own = (name.rank, name.world) == (self.assign.rank, self.assign.world);
            images.push(if own { store.insert(store.turn(), fetched) } else { Arc::new(fetched) });
        }
        Ok(images)
    }
}

//! Who owns what: a pure function of the layout, the rank and the number of workers.

use std::ops::Range;
use unisono_configs::model::{Layout, TensorSlot};

/// One worker's view of everybody's shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub world: usize,
    /// For each bucket the elements of each rank, in rank order; they tile the bucket.
    owners: Vec<Vec<Range<usize>>>,
}

/// The part of one parameter tensor that lies in the own shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    pub bucket: usize,
    pub tensor: &'a TensorSlot,
    /// Elements of the tensor, in row-major order.
    pub of_tensor: Range<usize>,
    /// The same elements, counted from the begin of the own range of the bucket.
    pub of_shard: Range<usize>,
}

impl Shard {
    pub fn new(layout: &Layout, rank: usize, world: usize) -> Self {
        let shards: Vec<_> = (0..world).map(|rank| layout.shard_elements(rank, world)).collect();
        let owners = (0..layout.buckets.len()).map(|b| shards.iter().map(|s| s[b].clone()).collect()).collect();
        Shard { rank, world, owners }
    }

    /// The elements of `bucket` that each rank owns.
    pub fn owners(&self, bucket: usize) -> &[Range<usize>] {
        &self.owners[bucket]
    }

    /// The elements of `bucket` that this rank owns.
    pub fn own(&self, bucket: usize) -> Range<usize> {
        self.owners[bucket][self.rank].clone()
    }

    pub fn buckets(&self) -> usize {
        self.owners.len()
    }

    /// Elements of the own shard.
    pub fn elements(&self) -> usize {
        (0..self.buckets()).map(|b| self.own(b).len()).sum()
    }

    /// Every tensor that the own shard touches, in (bucket, offset) order.
    pub fn pieces<'a>(&'a self, layout: &'a Layout) -> impl Iterator<Item = Piece<'a>> {
        (0..self.buckets()).flat_map(|bucket| self.pieces_of(layout, bucket))
    }

    /// The same of one bucket.
    pub fn pieces_of<'a>(&'a self, layout: &'a Layout, bucket: usize) -> impl Iterator<Item = Piece<'a>> {
        layout.buckets[bucket].tensors.iter().filter_map(move |tensor| {
            let (own, whole) = (self.own(bucket), tensor.range());
            let (begin, end) = (own.start.max(whole.start), own.end.min(whole.end));
            (begin < end).then(|| Piece {
                bucket,
                tensor,
                of_tensor: begin - whole.start..end - whole.start,
                of_shard: begin - own.start..end - own.start,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use unisono_configs::model::Bucket;

    fn layout(lengths: &[Vec<usize>]) -> Layout {
        let bucket = |(b, lengths): (usize, &Vec<usize>)| {
            let mut offset = 0;
            let tensors = lengths.iter().enumerate().map(|(t, &n)| {
                offset += n;
                TensorSlot { name: format!("{b}.{t}"), shape: vec![n], offset: offset - n }
            });
            Bucket { name: b.to_string(), tensors: tensors.collect(), elements: lengths.iter().sum() }
        };
        Layout { buckets: lengths.iter().enumerate().map(bucket).collect() }
    }

    proptest! {
        #[test]
        fn the_pieces_of_all_ranks_tile_every_tensor(
            lengths in prop::collection::vec(prop::collection::vec(1usize..300_000, 1..6), 1..4), world in 1usize..9,
        ) {
            let layout = layout(&lengths);
            let shards: Vec<_> = (0..world).map(|r| Shard::new(&layout, r, world)).collect();
            for (_, tensor) in layout.tensors() {
                let mut next = 0;
                for shard in &shards {
                    for piece in shard.pieces(&layout).filter(|p| p.tensor.name == tensor.name) {
                        prop_assert_eq!(piece.of_tensor.start, next);
                        prop_assert_eq!(piece.of_tensor.len(), piece.of_shard.len());
                        let first = shard.own(piece.bucket).start + piece.of_shard.start;
                        prop_assert_eq!(first, tensor.offset + piece.of_tensor.start);
                        next = piece.of_tensor.end;
                    }
                }
                prop_assert_eq!(next, tensor.elements());
            }
            for shard in &shards {
                prop_assert_eq!(shard.pieces(&layout).map(|p| p.of_shard.len()).sum::<usize>(), shard.elements());
            }
        }
    }
}

//! Memory that is lent to the few buckets a worker is at, instead of being there for all: one lot for the embedding or the
//! head, which are often the largest, and some for blocks.

use unisono_configs::model::Layout;

/// Which lots a bucket fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Outer,
    /// Blocks, and a head that is not larger: a tied one.
    Inner,
}

/// Elements of the largest block.
fn inner(layout: &Layout) -> usize {
    let blocks = layout.buckets.get(1..layout.buckets.len() - 1);
    blocks.into_iter().flatten().map(|b| b.elements).max().unwrap_or(0)
}

pub fn kind(layout: &Layout, bucket: usize) -> Kind {
    match bucket == 0 || layout.buckets[bucket].elements > inner(layout) {
        true => Kind::Outer,
        false => Kind::Inner,
    }
}

/// Kind and elements of each lot, `inners` of them for blocks.
pub fn lots(layout: &Layout, inners: usize) -> Vec<(Kind, usize)> {
    let outer = (0..layout.buckets.len()).filter(|&b| kind(layout, b) == Kind::Outer);
    let outer = outer.map(|b| layout.buckets[b].elements).max().unwrap_or(0);
    let inner = (Kind::Inner, inner(layout));
    [vec![(Kind::Outer, outer)], vec![inner; inners]].concat()
}

/// Accumulators for blocks in a world: while one travels, another takes leaves.
pub fn accumulators(world: usize) -> usize {
    if world > 1 {
        2
    } else {
        1
    }
}

//! The documents of a packed row as attention sees them: grouped by length, padded to few shapes.
//!
//! A matrix product's kernel is compiled per shape, so lengths are rounded up to [`LENGTH`] and equal ones stand
//! together in tiles of one, two, four or more documents. All of it follows from the documents' starts alone.

use std::collections::BTreeMap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Documents are padded to a multiple of this many tokens for attention.
pub const LENGTH: usize = 32;
/// A micro-batch is padded to a multiple of this many tokens.
pub const TOKENS: usize = 64;
/// Padded tokens that a tile of short documents may have.
pub const TILE: usize = 256;
/// Queries that attend at once, which bounds the scores of long documents.
pub const QUERIES: usize = 256;

/// One document and its place in the tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// First token in the packed row.
    pub start: usize,
    pub length: usize,
}

/// Documents of one padded length that attend in one batch of matrix products.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    pub documents: Vec<Document>,
    /// Padded length of each.
    pub padded: usize,
    /// Padded tokens in the tiles before this one.
    pub base: usize,
}

/// Consecutive queries of every document of a tile with the keys that they may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
}

/// Documents as they lie, one after another, for attention over variable lengths. Rows past the tokens are a document of
/// zeros, so that nothing has to be cleared.
#[derive(Debug)]
pub struct Flat {
    /// For each row its position in its document, -1 past the tokens.
    pub places: Vec<i32>,
    /// The same on the device: `[rows]` i32.
    pub positions: Tensor,
    /// First row of each document, then the number of rows: i32, on the device.
    pub starts: Tensor,
    /// The same on the host.
    bounds: Vec<i32>,
    /// Length of the longest.
    pub longest: usize,
}

impl Flat {
    /// First row and length of each document.
    pub fn documents(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.bounds.windows(2).map(|pair| (i64::from(pair[0]), i64::from(pair[1] - pair[0])))
    }
}

/// All documents of a packed row.
#[derive(Debug)]
pub struct Documents {
    /// How they lie where they are not in tiles.
    pub flat: Option<Flat>,
    /// None where they lie flat.
    pub tiles: Vec<Tile>,
    /// Tokens of the packed row.
    pub tokens: usize,
    /// Tokens rounded up to [`TOKENS`].
    pub rows: usize,
    /// Padded tokens of all tiles.
    pub padded: usize,
    /// Length of the longest document.
    pub longest: usize,
}

impl Documents {
    /// `starts` ascend from 0 and stay below `tokens`.
    pub fn new(starts: &[u32], tokens: usize) -> Self {
        let mut by_length: BTreeMap<usize, Vec<Document>> = BTreeMap::new();
        let mut longest = 0;
        for (index, &start) in starts.iter().enumerate() {
            let start = start as usize;
            let length = starts.get(index + 1).map_or(tokens, |&end| end as usize) - start;
            longest = longest.max(length);
            by_length.entry(length.next_multiple_of(LENGTH)).or_default().push(Document { start, length });
        }
        let (mut tiles, mut base) = (Vec::new(), 0);
        for (padded, documents) in by_length {
            let most = (TILE / padded).max(1);
            let mut rest = documents.as_slice();
            while !rest.is_empty() {
                // Powers of two keep the number of batch sizes small.
                let count = 1 << rest.len().min(most).ilog2();
                let (now, later) = rest.split_at(count);
                tiles.push(Tile { documents: now.to_vec(), padded, base });
                base += count * padded;
                rest = later;
            }
        }
        Documents { flat: None, tiles, tokens, rows: tokens.next_multiple_of(TOKENS), padded: base, longest }
    }

    /// As [`Documents::new`], without tiles; what attention needs of them is on `device`.
    pub fn flat(starts: &[u32], tokens: usize, device: Device) -> Self {
        let rows = tokens.next_multiple_of(TOKENS);
        let mut bounds: Vec<i32> = starts.iter().map(|&start| start as i32).collect();
        bounds.push(tokens as i32);
        if rows > tokens {
            bounds.push(rows as i32);
        }
        let lengths = || bounds.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = |count: usize| lengths().take(count).max().unwrap_or(0) as usize;
        let mut places: Vec<i32> = lengths().take(starts.len()).flat_map(|length| 0..length).collect();
        places.resize(rows, -1);
        let on_device = |of: &[i32]| Tensor::from_slice(of).to_device_(device, Kind::Int, true, false);
        let (positions, begins) = (on_device(&places), on_device(&bounds));
        let (all, own) = (longest(usize::MAX), longest(starts.len()));
        let flat = Flat { places, positions, starts: begins, longest: all, bounds };
        Documents { flat: Some(flat), tiles: Vec::new(), tokens, rows, padded: rows, longest: own }
    }
}

impl Tile {
    /// Blocks of queries, first to last; `window` bounds how many latest keys a query sees, its own included.
    pub fn blocks(&self, window: Option<usize>) -> impl Iterator<Item = Block> {
        let padded = self.padded;
        // A little more than one block is cheaper in one piece.
        let size = if padded <= QUERIES + QUERIES / 4 { padded } else { QUERIES };
        (0..padded).step_by(size).map(move |first| {
            let end = (first + size).min(padded);
            let oldest = window.map_or(0, |w| (first + 1).saturating_sub(w)) / LENGTH * LENGTH;
            Block { queries: first..end, keys: oldest..end }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_document_lies_in_one_tile(lengths in proptest::collection::vec(1usize..700, 1..40)) {
            let mut starts = vec![0u32];
            starts.extend(lengths.iter().scan(0, |sum, l| { *sum += *l as u32; Some(*sum) }));
            let tokens = starts.pop().unwrap() as usize;
            let documents = Documents::new(&starts, tokens);
            let mut seen: Vec<_> =
                documents.tiles.iter().flat_map(|t| &t.documents).map(|d| (d.start as u32, d.length)).collect();
            seen.sort();
            prop_assert_eq!(seen, starts.iter().copied().zip(lengths.iter().copied()).collect::<Vec<_>>());
            let mut base = 0;
            for tile in &documents.tiles {
                prop_assert_eq!(tile.base, base);
                base += tile.documents.len() * tile.padded;
                prop_assert!(tile.documents.len().is_power_of_two());
                prop_assert!(tile.documents.iter().all(|d| d.length.next_multiple_of(LENGTH) == tile.padded));
                for window in [None, Some(1), Some(40)] {
                    let blocks: Vec<_> = tile.blocks(window).collect();
                    prop_assert_eq!(blocks[0].queries.start, 0);
                    prop_assert_eq!(blocks[blocks.len() - 1].queries.end, tile.padded);
                    for block in &blocks {
                        let reach = window.unwrap_or(usize::MAX).min(block.queries.start + 1);
                        prop_assert!(block.keys.start + reach <= block.queries.start + 1);
                        prop_assert_eq!(block.keys.end, block.queries.end);
                    }
                }
            }
            prop_assert_eq!(documents.padded, base);
        }
    }
}

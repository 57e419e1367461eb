//! Dealing the documents of a global batch into micro-batches of balanced cost: longest processing time first
//! (Graham 1969), under a cap on tokens. A pure function of the documents and the two limits.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// A document to be dealt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document {
    pub tokens: u32,
    pub cost: u64,
}

#[derive(Default)]
struct Bin {
    tokens: u64,
    documents: Vec<u32>,
}

/// Deals `documents` into at least `bins` bins (or as many as there are documents, if fewer), none over `max_tokens`;
/// more bins are opened where a document fits in none. Returns for each bin the indexes of its documents, ascending.
///
/// Every document must have at most `max_tokens` tokens. Ties go to the document that comes first and the bin with the
/// lowest index; bins are numbered in the order of their first document.
pub fn deal(documents: &[Document], bins: usize, max_tokens: u32) -> Vec<Vec<u32>> {
    let total: u64 = documents.iter().map(|d| u64::from(d.tokens)).sum();
    let least = (total.div_ceil(u64::from(max_tokens.max(1)))) as usize;
    let count = bins.max(least).min(documents.len());
    let mut order: Vec<u32> = (0..documents.len() as u32).collect();
    order.sort_by_key(|&i| (Reverse(documents[i as usize].cost), i));
    let mut open: Vec<Bin> = (0..count).map(|_| Bin::default()).collect();
    // (cost, bin): the first that has room is the cheapest.
    let mut by_cost: BTreeSet<(u64, usize)> = (0..count).map(|bin| (0, bin)).collect();
    for index in order {
        let document = documents[index as usize];
        let room = |bin: &Bin| bin.tokens + u64::from(document.tokens) <= u64::from(max_tokens);
        let (cost, bin) = match by_cost.iter().copied().find(|&(_, bin)| room(&open[bin])) {
            Some(entry) => entry,
            None => {
                open.push(Bin::default());
                (0, open.len() - 1)
            }
        };
        by_cost.remove(&(cost, bin));
        by_cost.insert((cost + document.cost, bin));
        open[bin].tokens += u64::from(document.tokens);
        open[bin].documents.push(index);
    }
    let mut dealt: Vec<Vec<u32>> = open.into_iter().map(|bin| bin.documents).collect();
    dealt.iter_mut().for_each(|bin| bin.sort_unstable());
    dealt.sort_unstable_by_key(|bin| bin.first().copied());
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn documents() -> impl Strategy<Value = Vec<Document>> {
        let document = (1u32..=100).prop_map(|tokens| Document { tokens, cost: u64::from(tokens * (100 + tokens)) });
        prop::collection::vec(document, 1..80)
    }

    proptest! {
        #[test]
        fn every_document_once_none_over_the_cap_none_empty(
            documents in documents(), bins in 1usize..12, max_tokens in 100u32..400,
        ) {
            let dealt = deal(&documents, bins, max_tokens);
            let mut seen: Vec<u32> = dealt.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..documents.len() as u32).collect::<Vec<_>>());
            prop_assert!(dealt.len() >= bins.min(documents.len()));
            for bin in &dealt {
                prop_assert!(!bin.is_empty());
                prop_assert!(bin.windows(2).all(|w| w[0] < w[1]));
                prop_assert!(bin.iter().map(|&i| documents[i as usize].tokens).sum::<u32>() <= max_tokens);
            }
            prop_assert!(dealt.windows(2).all(|w| w[0][0] < w[1][0]));
            prop_assert_eq!(&dealt, &deal(&documents, bins, max_tokens));
        }

        /// Graham's bound: without a cap the dearest bin is below mean + the dearest document.
        #[test]
        fn costs_are_balanced(documents in documents(), bins in 1usize..12) {
            let dealt = deal(&documents, bins, u32::MAX);
            let cost = |bin: &Vec<u32>| bin.iter().map(|&i| documents[i as usize].cost).sum::<u64>();
            let total: u64 = documents.iter().map(|d| d.cost).sum();
            let dearest = documents.iter().map(|d| d.cost).max().unwrap();
            prop_assert!(dealt.iter().map(cost).max().unwrap() <= total / dealt.len() as u64 + dearest);
        }
    }

    #[test]
    fn the_dealing_never_changes() {
        let tokens = [40, 10, 30, 20, 50, 60, 10, 80];
        let documents = tokens.map(|tokens| Document { tokens, cost: u64::from(tokens) });
        assert_eq!(deal(&documents, 3, 1000), [vec![0, 4, 6], vec![1, 2, 5], vec![3, 7]]);
        assert_eq!(deal(&documents, 1, 90).len(), 4);
    }
}

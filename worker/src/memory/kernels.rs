//! Kernels that oneDNN compiles, one for each shape of a matrix product in bf16, and keeps: bounded, and planned for.

use super::Extremes;
use crate::ops::documents::{LENGTH, TILE, TOKENS};
use tch::Kind;

/// The most that are kept. On GSM8K with 2 micro-batches of varying lengths a step, 256 cost no time against 1,024, and 128
/// cost 15 % where the model is so small that little else takes any (2026-11-23, an Intel Xeon with AVX512-BF16).
pub const KEPT: usize = 256;

/// Resident bytes of one, with what oneDNN keeps beside it: 125 to 136 MB were measured for 256 of them, as above and over a
/// thousand steps of ever other lengths.
const EACH: usize = 530_000;

/// Products of a block and its gradients, and of the head's chunks, for each number of rows.
const OF_ROWS: usize = 15;
/// Products of attention and its gradients for each shape of a tile.
const OF_TILE: usize = 7;

/// What libtorch reads before its first operation: its own cache in front of oneDNN's holds each kernel a second time and
/// saves nothing.
pub fn environment() -> [(&'static str, String); 2] {
    [("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT.to_string()), ("LRU_CACHE_CAPACITY", "16".to_owned())]
}

/// Of a run whose micro-batches are bounded by `extremes`. Products in fp32 are not compiled.
pub fn bytes(compute: Kind, extremes: &Extremes) -> u64 {
    let Extremes { tokens, document, .. } = *extremes;
    if compute != Kind::BFloat16 {
        return 0;
    }
    let rows = tokens.div_ceil(TOKENS);
    let lengths = (1..=document.div_ceil(LENGTH)).map(|n| n * LENGTH);
    // Documents stand together in powers of two.
    let tiles: usize = lengths.map(|length| 1 + (TILE / length).max(1).ilog2() as usize).sum();
    ((OF_ROWS * rows + OF_TILE * tiles).min(KEPT) * EACH) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_shapes_need_few_kernels_and_many_no_more_than_are_kept() {
        let of = |tokens, document| Extremes { tokens, document, documents: 0 };
        assert_eq!(bytes(Kind::Float, &of(4096, 512)), 0);
        // 2 numbers of rows; tiles of 1, 2, 4, 8 documents of 32 tokens, and of 1, 2, 4 of 64.
        assert_eq!(bytes(Kind::BFloat16, &of(128, 64)), (30 + 49) * EACH as u64);
        assert_eq!(bytes(Kind::BFloat16, &of(4096, 512)), (KEPT * EACH) as u64);
    }
}

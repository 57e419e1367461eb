//! The model: weights in flat buckets, hand-written forward and backward, loss and decoding.

use tch::Tensor;

/// A packed row of documents, without padding between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids: `[tokens]`.
    pub tokens: Vec<u32>,
    /// For each token the id to predict after it, or `unisono_proto::NO_TARGET`: `[tokens]`, or empty for prompts.
    pub targets: Vec<u32>,
    /// First token of each document, ascending from 0: `[documents]`.
    pub starts: Vec<u32>,
}

/// Cross-entropy over the targets of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Sum of -log p(target), nats.
    pub sum: f64,
    pub targets: u64,
    /// Targets that were the first choice; 0 where it was not computed.
    pub correct: u64,
}

/// Why a leaf cannot be added.
#[derive(Debug, thiserror::Error)]
#[error("gradient of {bucket} has a value that is not finite or too large for the exact sum ({value})")]
pub struct BadNumber {
    pub bucket: String,
    pub value: f64,
}

/// Takes the gradients of one micro-batch as the backward pass finds them, in units of the step's mean loss.
/// Gradients are fp32, or bf16 where the GEMM yields bf16 (fp64 in tests).
pub trait Leaves {
    /// The gradient of `gradient.numel()` consecutive elements of bucket `bucket` from `offset` on; contiguous.
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber>;

    /// The gradient of some rows of a matrix `[_, width]` that starts at `offset` of bucket `bucket`:
    /// `rows` ascending and distinct, `gradient` `[rows.len(), width]`, contiguous.
    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber>;
}

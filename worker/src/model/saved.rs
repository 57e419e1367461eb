//! What the backward pass of a block needs of its forward pass: kept, or computed again to save memory.
//!
//! Per token, in elements of the compute kind, a block keeps `2H + 2q + 2kv + 3F` (`q`, `kv`: widths of queries and of
//! keys; `F`: intermediate) and twice the wide residual stream `H`. Computing again runs the same kernels on the same
//! inputs, so no level changes a bit.

use super::attention::{Attended, Projected};
use crate::ops::buffer::Buffer;
use std::fmt;
use tch::Tensor;

/// What is computed again in the backward pass, from the least to the most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    #[default]
    Nothing,
    /// The outputs of both norms and of the MLP's activation: loops, no matrix product.
    Norms,
    /// Gate and up too: one matrix product of the block's four.
    UpProjection,
    /// The whole block but for the last one, from the residual stream before it.
    Block,
}

impl Recompute {
    pub const ALL: [Recompute; 4] = [Recompute::Nothing, Recompute::Norms, Recompute::UpProjection, Recompute::Block];

    /// What cluster.recompute calls it.
    pub fn key(self) -> &'static str {
        match self {
            Recompute::Nothing => "nothing",
            Recompute::Norms => "norms",
            Recompute::UpProjection => "up-projection",
            Recompute::Block => "block",
        }
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Recompute::Nothing => "nothing is computed again",
            Recompute::Norms => "norms and activations are computed again",
            Recompute::UpProjection => "norms, activations and up-projections are computed again",
            Recompute::Block => "blocks are computed again",
        })
    }
}

/// What is left of a block's forward pass.
pub struct Saved {
    /// The residual stream before the block: wide `[T, H]`.
    pub(super) input: Buffer,
    /// The rows that go on after the last attention, where there is such a choice: those with targets. What others would
    /// become reaches no loss.
    pub(super) chosen: Option<Vec<u32>>,
    /// Absent: all else is computed again from `input`.
    pub(super) inner: Option<Inner>,
}

/// What lies within a block.
pub(super) struct Inner {
    pub input_rstd: Buffer,
    /// Absent, as [`Inner::middle_normed`], `gate_up` and `activated`: computed again.
    pub input_normed: Option<Buffer>,
    /// Outputs of the projections before their norms; only where there are such norms.
    pub projections: Vec<Buffer>,
    pub heads: Projected,
    pub attended: Attended,
    /// The chosen rows of attention's output, rounded up with zero rows.
    pub attended_chosen: Option<Buffer>,
    /// The residual stream between attention and MLP: wide `[T, H]`, or the chosen rows of it.
    pub middle: Buffer,
    pub middle_rstd: Buffer,
    pub middle_normed: Option<Buffer>,
    /// With their biases; one tensor or two.
    pub gate_up: Option<Vec<Buffer>>,
    pub activated: Option<Buffer>,
}

impl Inner {
    /// What the output projection read.
    pub fn attended(&self) -> &Tensor {
        self.attended_chosen.as_ref().unwrap_or(&self.attended.output)
    }
}

impl Saved {
    /// Gives back what `level` computes again, once the forward pass of the block is over.
    pub(super) fn shrink(&mut self, level: Recompute) {
        let Some(inner) = &mut self.inner else { return };
        if level >= Recompute::Norms {
            (inner.input_normed, inner.middle_normed, inner.activated) = (None, None, None);
        }
        if level >= Recompute::UpProjection {
            inner.gate_up = None;
        }
    }

    /// Gives back all but the block's input. The block after this one has read its middle.
    pub(super) fn forget(&mut self) {
        self.inner = None;
    }

    fn inner(&self) -> &Inner {
        self.inner.as_ref().expect("looked at before it is forgotten")
    }

    /// The residual stream between attention and MLP.
    pub fn middle(&self) -> &Tensor {
        &self.inner().middle
    }

    /// Keys and values: flat, in the layout of heads.
    pub fn keys_and_values(&self) -> (&Tensor, &Tensor) {
        let Projected { k, v, .. } = &self.inner().heads;
        (k, v)
    }
}

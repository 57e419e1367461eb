//! Final norm, head and loss, over the rows that have targets: chunk by chunk, so that logits are never whole.

use super::block::Gradient;
use super::linear::Sink;
use super::{Error, Leaves};
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::clock::timed;
use crate::ops::documents::TOKENS;
use crate::ops::norm::{self, Normed};
use crate::ops::{cross_entropy, matmul, rows};
use tch::{Kind, Tensor};

/// Rows of logits at a time. Fixed, because it decides how the weight's gradient is added up.
pub const CHUNK: usize = 512;

/// The head's parameters and their places.
pub struct Head {
    /// `[H]`
    pub norm: Tensor,
    pub eps: f64,
    /// Bucket and offset of the norm.
    pub norm_at: (usize, usize),
    /// `[V, H]`: the embedding's matrix where they are tied.
    pub weight: Tensor,
    pub weight_at: (usize, usize),
}

/// The residual stream after the last block: `residual + mlp + bias`.
pub struct Last<'a> {
    pub residual: &'a Tensor,
    pub mlp: &'a Tensor,
    pub bias: Option<Tensor>,
}

/// Rows with targets.
pub struct Selected {
    pub rows: Vec<u32>,
    pub targets: Vec<u32>,
}

struct Chosen {
    residual: Buffer,
    rstd: Buffer,
    normed: Buffer,
    /// Rows, rounded up.
    count: usize,
}

impl Head {
    /// The normed rows `at` of the stream, rounded up with zero rows.
    fn choose(&self, last: &Last<'_>, at: &[u32], pool: &Pool) -> Chosen {
        let (wide, hidden) = (last.residual.kind(), self.norm.numel());
        let count = at.len().next_multiple_of(TOKENS);
        let mut residual = pool.take(wide, &[count, hidden]);
        let (mut rstd, mut normed) = (pool.take(wide, &[count]), pool.take(self.weight.kind(), &[count, hidden]));
        timed("head norm", || {
            rows::select_sum(last.residual, last.mlp, last.bias.as_ref(), at, &mut residual);
            let out = Normed { residual: None, rstd: &mut rstd, output: &mut normed };
            norm::forward(&residual, None, &self.norm, self.eps, out);
        });
        Chosen { residual, rstd, normed, count }
    }

    fn logits(&self, normed: &Tensor, pool: &Pool) -> Result<Buffer, Error> {
        let logits = pool.take(self.weight.kind(), &[normed.size()[0] as usize, self.weight.size()[0] as usize]);
        timed("head gemm", || matmul::product(normed, &self.weight.tr(), &logits))?;
        Ok(logits)
    }

    /// Logits of the rows `at`: `[at.len() rounded up, V]`.
    pub fn logits_of(&self, last: &Last<'_>, at: &[u32], pool: &Pool) -> Result<Buffer, Error> {
        self.logits(&self.choose(last, at, pool).normed, pool)
    }

    /// Sum of the loss, and how many targets are the first choice.
    pub fn evaluate(&self, last: &Last<'_>, selected: &Selected, pool: &Pool) -> Result<(f64, u64), Error> {
        let chosen = self.choose(last, &selected.rows, pool);
        let (mut loss, mut correct) = (0.0, 0);
        for first in (0..chosen.count).step_by(CHUNK) {
            let length = CHUNK.min(chosen.count - first);
            let mut logits = self.logits(&chosen.normed.narrow(0, first as i64, length as i64), pool)?;
            let targets = &selected.targets[first..(first + length).min(selected.targets.len())];
            let (sum, right) = timed("cross-entropy", || cross_entropy::loss_and_correct(&mut logits, targets));
            (loss, correct) = (loss + sum, correct + right);
        }
        Ok((loss, correct))
    }

    /// Sum of the loss, and the gradient of `scale` times it by the stream, `T` rows. Hands over the leaves of the head's
    /// weight and of the norm.
    pub fn forward_backward(
        &self,
        last: &Last<'_>,
        selected: &Selected,
        scale: f64,
        leaves: &mut dyn Leaves,
        pool: &Pool,
    ) -> Result<(f64, Gradient), Error> {
        let chosen = self.choose(last, &selected.rows, pool);
        let (wide, compute, hidden) = (last.residual.kind(), self.weight.kind(), self.norm.numel());
        let grad_normed = pool.take(compute, &[chosen.count, hidden]);
        let mut sum: Option<Buffer> = None;
        let mut loss = 0.0;
        for first in (0..chosen.count).step_by(CHUNK) {
            let length = CHUNK.min(chosen.count - first);
            let normed = chosen.normed.narrow(0, first as i64, length as i64);
            let mut logits = self.logits(&normed, pool)?;
            let targets = &selected.targets[first..(first + length).min(selected.targets.len())];
            loss += timed("cross-entropy", || cross_entropy::loss_and_gradient(&mut logits, targets, scale));
            let grad_logits = logits;
            timed("head gemm", || {
                matmul::product(&grad_logits, &self.weight, &grad_normed.narrow(0, first as i64, length as i64))
            })?;
            let part = pool.take(compute, &[self.weight.size()[0] as usize, hidden]);
            timed("head gemm", || matmul::product(&grad_logits.tr(), &normed, &part))?;
            sum = Some(match sum {
                // One chunk is a leaf as it stands; more are added up wide.
                None if chosen.count <= CHUNK => part,
                sum => timed("head sum", || {
                    let mut sum = sum.unwrap_or_else(|| pool.take_zero(wide, &[part.size()[0] as usize, hidden]));
                    rows::accumulate(&mut sum, &part);
                    sum
                }),
            });
        }
        if let Some(gradient) = sum {
            Sink { leaves, bucket: self.weight_at.0, pool }.dense(self.weight_at.1, &gradient)?;
        }
        let grad = self.backward(&chosen, &grad_normed, selected, last.residual.size()[0] as usize, leaves, pool)?;
        Ok((loss, grad))
    }

    fn backward(
        &self,
        chosen: &Chosen,
        grad_normed: &Tensor,
        selected: &Selected,
        rows: usize,
        leaves: &mut dyn Leaves,
        pool: &Pool,
    ) -> Result<Gradient, Error> {
        let (wide, compute, hidden) = (chosen.residual.kind(), self.weight.kind(), self.norm.numel());
        let mut grad_rows = pool.take_zero(wide, &[chosen.count, hidden]);
        let mut rounded_rows = pool.take(compute, &[chosen.count, hidden]);
        let mut grad_weight = pool.take(wide, &[hidden]);
        let saved = norm::Saved { residual: &chosen.residual, rstd: &chosen.rstd, weight: &self.norm };
        let mut grad =
            Gradient { wide: pool.take(wide, &[rows, hidden]), rounded: pool.take(compute, &[rows, hidden]) };
        timed("head norm", || {
            norm::backward(grad_normed, saved, &mut grad_rows, &mut rounded_rows, &mut grad_weight);
            rows::scatter(&grad_rows, &selected.rows, &mut grad.wide);
            rows::scatter(&rounded_rows, &selected.rows, &mut grad.rounded);
        });
        Sink { leaves, bucket: self.norm_at.0, pool }.dense(self.norm_at.1, &grad_weight)?;
        Ok(grad)
    }
}

/// The kind of what must not be rounded: fp32, or fp64 in tests.
pub fn wide(compute: Kind) -> Kind {
    match compute {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

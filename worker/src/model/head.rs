//! Final norm, head and loss, of the rows that have targets: chunk by chunk, so that logits are never whole.

use super::block::Gradient;
use super::linear::Sink;
use super::{Error, Leaves};
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::norm::{self, Addend, Normed};
use crate::ops::operation::operation;
use crate::ops::{cross_entropy, matmul, rows};
use tch::{Device, Tensor};

/// Rows of logits at a time on a processor, at least.
const CHUNK: usize = 512;
/// Logits at a time beyond that.
const LOGITS: usize = 1 << 24;

/// Rows of logits at a time. Fixed for a vocabulary and a kind of device, because it decides how the weight's gradient is
/// added up: each chunk's is written, and added to that of the others, which takes as long as a product of few rows.
pub fn rows_at_once(device: Device, vocabulary: usize) -> usize {
    match device {
        Device::Cpu => CHUNK.max(LOGITS / vocabulary.max(1) / CHUNK * CHUNK).min(8 * CHUNK),
        _ => 8 * CHUNK,
    }
}

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
    /// Rows of logits at a time.
    pub rows: usize,
}

/// The residual stream after the last block, of the rows with targets (rounded up): `residual + mlp + bias`.
pub struct Last<'a> {
    pub residual: &'a Tensor,
    pub mlp: &'a Tensor,
    pub bias: Option<Tensor>,
}

struct Final {
    residual: Buffer,
    rstd: Buffer,
    normed: Buffer,
    rows: usize,
}

impl Head {
    fn norm(&self, last: &Last<'_>, pool: &Pool) -> Final {
        let (wide, rows, hidden) = (last.residual.kind(), last.residual.size()[0] as usize, self.norm.numel());
        let (mut residual, mut rstd) = (pool.take(wide, &[rows, hidden]), pool.take(wide, &[rows]));
        let mut normed = pool.take(self.weight.kind(), &[rows, hidden]);
        operation("head norm", || {
            let addend = Addend { output: last.mlp, bias: last.bias.as_ref() };
            let out = Normed { residual: Some(&mut residual), rstd: &mut rstd, output: &mut normed };
            norm::forward(last.residual, Some(addend), &self.norm, self.eps, out);
        });
        Final { residual, rstd, normed, rows }
    }

    fn logits(&self, normed: &Tensor, pool: &Pool) -> Result<Buffer, Error> {
        let logits = pool.take(self.weight.kind(), &[normed.size()[0] as usize, self.weight.size()[0] as usize]);
        operation("head gemm", || matmul::product(normed, &self.weight.tr(), &logits))?;
        Ok(logits)
    }

    /// Logits of every row: `[rows, V]`.
    pub fn logits_of(&self, last: &Last<'_>, pool: &Pool) -> Result<Buffer, Error> {
        self.logits(&self.norm(last, pool).normed, pool)
    }

    /// Sum of the loss, and how many targets are the first choice.
    pub fn evaluate(&self, last: &Last<'_>, targets: &[u32], pool: &Pool) -> Result<(f64, u64), Error> {
        let last = self.norm(last, pool);
        let chunk = self.rows;
        let (mut loss, mut correct) = (cross_entropy::Loss::default(), 0);
        for first in (0..last.rows).step_by(chunk) {
            let length = chunk.min(last.rows - first);
            let mut logits = self.logits(&last.normed.narrow(0, first as i64, length as i64), pool)?;
            let targets = &targets[first..(first + length).min(targets.len())];
            let (sum, right) = operation("cross-entropy", || cross_entropy::loss_and_correct(&mut logits, targets));
            loss.add(sum);
            correct += right;
        }
        Ok((loss.sum(), correct))
    }

    /// The loss, and the gradient of `scale` times it by the stream, row by row. Hands over the leaves of the head's
    /// weight and of the norm.
    pub fn forward_backward(
        &self,
        last: &Last<'_>,
        targets: &[u32],
        scale: f64,
        leaves: &mut dyn Leaves,
        pool: &Pool,
    ) -> Result<(cross_entropy::Loss, Gradient), Error> {
        let last = self.norm(last, pool);
        let (wide, compute, hidden) = (last.residual.kind(), self.weight.kind(), self.norm.numel());
        let grad_normed = pool.take(compute, &[last.rows, hidden]);
        let mut sum: Option<Buffer> = None;
        let (mut loss, chunk) = (cross_entropy::Loss::default(), self.rows);
        for first in (0..last.rows).step_by(chunk) {
            let length = chunk.min(last.rows - first);
            let normed = last.normed.narrow(0, first as i64, length as i64);
            let mut logits = self.logits(&normed, pool)?;
            let targets = &targets[first..(first + length).min(targets.len())];
            loss.add(operation("cross-entropy", || cross_entropy::loss_and_gradient(&mut logits, targets, scale)));
            let grad_logits = logits;
            operation("head gemm", || {
                matmul::product(&grad_logits, &self.weight, &grad_normed.narrow(0, first as i64, length as i64))
            })?;
            let part = pool.take(compute, &[self.weight.size()[0] as usize, hidden]);
            operation("head gemm", || matmul::product(&grad_logits.tr(), &normed, &part))?;
            sum = Some(match sum {
                // One chunk is a leaf as it stands; more are added up wide.
                None if last.rows <= chunk => part,
                sum => {
                    let fresh = sum.is_none();
                    let mut sum = sum.unwrap_or_else(|| pool.take(wide, &[part.size()[0] as usize, hidden]));
                    operation("head sum", || match fresh {
                        true => sum.copy_(&part),
                        false => rows::accumulate(&mut sum, &part),
                    });
                    sum
                }
            });
        }
        if let Some(gradient) = sum {
            Sink { leaves, bucket: self.weight_at.0, pool }.matrix(self.weight_at.1, gradient)?;
        }
        let grad = self.backward(&last, &grad_normed, leaves, pool)?;
        Ok((loss, grad))
    }

    fn backward(
        &self,
        last: &Final,
        grad_normed: &Tensor,
        leaves: &mut dyn Leaves,
        pool: &Pool,
    ) -> Result<Gradient, Error> {
        let (wide, compute, hidden) = (last.residual.kind(), self.weight.kind(), self.norm.numel());
        let mut grad_weight = pool.take(wide, &[hidden]);
        let saved = norm::Saved { residual: &last.residual, rstd: &last.rstd, weight: &self.norm };
        let mut grad = Gradient {
            wide: pool.take_zero(wide, &[last.rows, hidden]),
            rounded: pool.take(compute, &[last.rows, hidden]),
        };
        operation("head norm", || {
            norm::backward(grad_normed, saved, &mut grad.wide, &mut grad.rounded, &mut grad_weight);
        });
        Sink { leaves, bucket: self.norm_at.0, pool }.dense(self.norm_at.1, &grad_weight)?;
        Ok(grad)
    }
}

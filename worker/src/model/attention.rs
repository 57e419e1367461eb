//! Causal attention over the documents of a packed row, tile by tile: batched matrix products around a fused softmax.
//!
//! Queries, keys and values come in the layout of [`crate::ops::heads`]; a group of query heads shares keys and values
//! without expanding them. Long documents attend in blocks of queries, so that scores stay small. Where documents lie
//! flat, FlashAttention takes the place of all that.

use super::Error;
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::documents::{Block, Documents, Flat, Tile};
use crate::ops::flash;
use crate::ops::heads::Heads;
use crate::ops::operation::operation;
use crate::ops::rows::{self, Place};
use crate::ops::softmax::{self, Scores, Statistics};
use crate::ops::{gather, matmul};
use std::ops::Range;
use tch::{Kind, Tensor};

/// What attention needs to know besides its inputs.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub documents: &'a Documents,
    pub queries: Heads,
    pub window: Option<usize>,
    pub wide: Kind,
    pub pool: &'a Pool,
}

/// Queries, keys and values: flat `[padded * heads * D]` of the compute kind.
pub struct Projected {
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
}

/// What the forward pass gives.
pub struct Attended {
    /// Token by token: `[rows, heads * D]` of the compute kind.
    pub output: Buffer,
    /// Log-sum-exp of each query's scores: wide `[padded * heads]`.
    pub lse: Buffer,
    /// What FlashAttention asks back.
    random: Vec<Tensor>,
}

impl Attention<'_> {
    fn keys(&self) -> Heads {
        Heads { count: self.queries.kv, ..self.queries }
    }

    fn group(&self) -> usize {
        self.queries.count / self.queries.kv
    }

    /// Rows of `tile` at `positions` in a flat layout: `[documents * kv heads, positions * group, D]`.
    fn rows(&self, flat: &Tensor, tile: &Tile, heads: Heads, positions: &Range<usize>) -> Tensor {
        let (group, dim) = (heads.count / heads.kv, heads.dim);
        let shape = [tile.documents.len() * heads.kv, positions.len() * group, dim].map(|n| n as i64);
        let strides = [tile.padded * group * dim, dim, 1].map(|n| n as i64);
        flat.as_strided(shape, strides, (tile.base * heads.width() + positions.start * group * dim) as i64)
    }

    fn scores<'b>(&self, tile: &'b Tile, block: &'b Block) -> Scores<'b> {
        let scale = 1.0 / (self.queries.dim as f64).sqrt();
        Scores { tile, block, kv_heads: self.queries.kv, group: self.group(), window: self.window, scale }
    }

    /// Views of tensors that lie flat: `[rows, heads, D]` of queries, or of keys and values.
    fn flat(&self, of: &Tensor, heads: Heads) -> Tensor {
        of.view([self.documents.rows, heads.count, heads.dim].map(|n| n as i64))
    }

    fn flash<'b>(&self, flat: &'b Flat) -> flash::Attention<'b> {
        flash::Attention { flat, window: self.window, scale: 1.0 / (self.queries.dim as f64).sqrt() }
    }

    fn flash_forward(&self, flat: &Flat, inputs: &Projected) -> Result<Attended, Error> {
        let (kind, rows) = (inputs.q.kind(), self.documents.rows);
        let mut output = self.pool.expect(kind, &[rows, self.queries.width()]);
        let (mut lse, mut random) = (self.pool.expect(self.wide, &[rows * self.queries.count]), Vec::new());
        operation("attention", || -> Result<(), Error> {
            let (q, k) = (self.flat(&inputs.q, self.queries), self.flat(&inputs.k, self.keys()));
            let attended = self.flash(flat).forward(&q, &k, &self.flat(&inputs.v, self.keys()))?;
            output.adopt(attended.output.view([rows as i64, -1]));
            lse.adopt(attended.lse);
            random = attended.random;
            Ok(())
        })?;
        Ok(Attended { output, lse, random })
    }

    fn flash_backward(
        &self,
        flat: &Flat,
        grad: &Tensor,
        inputs: &Projected,
        saved: &Attended,
    ) -> Result<Projected, Error> {
        let (kind, rows, keys) = (inputs.q.kind(), self.documents.rows, self.keys());
        let mut q = self.pool.expect(kind, &[rows * self.queries.width()]);
        let (mut k, mut v) =
            (self.pool.expect(kind, &[rows * keys.width()]), self.pool.expect(kind, &[rows * keys.width()]));
        // What ATen's kernels take for themselves: sums of the queries' gradient in fp32, padded for each document, and, where
        // keys are shared, gradients of keys and values for each query head.
        let (padded, width) =
            (rows + 128 * flat.documents().count(), self.queries.count * self.queries.dim.next_multiple_of(32));
        let shared = if self.group() > 1 { rows * width } else { 0 };
        let _temporaries = [
            self.pool.expect(self.wide, &[padded * width]),
            self.pool.expect(kind, &[shared]),
            self.pool.expect(kind, &[shared]),
        ];
        operation("attention backward", || -> Result<(), Error> {
            let attended = flash::Attended {
                output: self.flat(&saved.output, self.queries),
                lse: saved.lse.shallow_clone(),
                random: saved.random.iter().map(Tensor::shallow_clone).collect(),
            };
            let inputs =
                (&self.flat(&inputs.q, self.queries), &self.flat(&inputs.k, keys), &self.flat(&inputs.v, keys));
            let grad = self.flat(grad, self.queries);
            let gradients = self.flash(flat).backward(&grad, inputs, &attended)?;
            for (buffer, gradient) in [&mut q, &mut k, &mut v].into_iter().zip(gradients) {
                buffer.adopt(gradient.contiguous().view([-1]));
            }
            Ok(())
        })?;
        Ok(Projected { q, k, v })
    }

    pub fn forward(&self, inputs: &Projected) -> Result<Attended, Error> {
        if let Some(flat) = &self.documents.flat {
            return self.flash_forward(flat, inputs);
        }
        let (kind, dim) = (inputs.q.kind(), self.queries.dim);
        let mut output = self.pool.take(kind, &[self.documents.rows, self.queries.width()]);
        let mut lse = self.pool.take_zero(self.wide, &[self.documents.padded * self.queries.count]);
        for tile in &self.documents.tiles {
            let batch = tile.documents.len() * self.queries.kv;
            for block in tile.blocks(self.window) {
                let rows = block.queries.len() * self.group();
                let mut scores = self.pool.take(kind, &[batch, rows, block.keys.len()]);
                let q = self.rows(&inputs.q, tile, self.queries, &block.queries);
                let k = self.rows(&inputs.k, tile, self.keys(), &block.keys);
                let v = self.rows(&inputs.v, tile, self.keys(), &block.keys);
                operation("attention gemm", || matmul::products(&q, &k.transpose(1, 2), &scores))?;
                operation("softmax", || softmax::forward(&mut scores, self.scores(tile, &block), &mut lse));
                let part = self.pool.take(kind, &[batch, rows, dim]);
                operation("attention gemm", || matmul::products(&scores, &v, &part))?;
                operation("attention copy", || gather::gather(&part, tile, &block, self.queries, &mut output));
            }
        }
        operation("attention copy", || gather::clear_padding(&mut output, self.documents.tokens));
        Ok(Attended { output, lse, random: Vec::new() })
    }

    /// Gradients of queries (compute kind), keys and values (wide, or of the compute kind where documents lie flat), in the layout of the inputs, from that of the output,
    /// `[rows, heads * D]`.
    pub fn backward(&self, grad: &Tensor, inputs: &Projected, saved: &Attended) -> Result<Projected, Error> {
        if let Some(flat) = &self.documents.flat {
            return self.flash_backward(flat, grad, inputs, saved);
        }
        let (kind, dim, group) = (inputs.q.kind(), self.queries.dim, self.group());
        let grad_q = self.pool.take(kind, &[self.documents.padded * self.queries.width()]);
        let kv_elements = self.documents.padded * self.keys().width();
        let mut grad_k = self.pool.take_zero(self.wide, &[kv_elements]);
        let mut grad_v = self.pool.take_zero(self.wide, &[kv_elements]);
        let mut delta = self.pool.take_zero(self.wide, &[self.documents.padded * self.queries.count]);
        for tile in &self.documents.tiles {
            let batch = tile.documents.len() * self.queries.kv;
            for block in tile.blocks(self.window) {
                let (rows, width) = (block.queries.len() * group, block.keys.len());
                let q = self.rows(&inputs.q, tile, self.queries, &block.queries);
                let k = self.rows(&inputs.k, tile, self.keys(), &block.keys);
                let v = self.rows(&inputs.v, tile, self.keys(), &block.keys);
                let grad_q = self.rows(&grad_q, tile, self.queries, &block.queries);
                let mut grad_out = self.pool.take(kind, &[batch, rows, dim]);
                operation("attention copy", || {
                    gather::spread(grad, &saved.output, tile, &block, self.queries, &mut grad_out, &mut delta);
                });
                let mut scores = self.pool.take(kind, &[batch, rows, width]);
                let mut grad_scores = self.pool.take(kind, &[batch, rows, width]);
                operation("attention gemm", || -> Result<(), tch::TchError> {
                    matmul::products(&q, &k.transpose(1, 2), &scores)?;
                    matmul::products(&grad_out, &v.transpose(1, 2), &grad_scores)
                })?;
                let statistics = Statistics { lse: &saved.lse, delta: &delta };
                operation("softmax backward", || {
                    softmax::backward(&mut scores, &mut grad_scores, self.scores(tile, &block), statistics)
                });
                let (part_k, part_v) =
                    (self.pool.take(kind, &[batch, width, dim]), self.pool.take(kind, &[batch, width, dim]));
                operation("attention gemm", || -> Result<(), tch::TchError> {
                    matmul::products(&scores.transpose(1, 2), &grad_out, &part_v)?;
                    matmul::products(&grad_scores, &k, &grad_q)?;
                    matmul::products(&grad_scores.transpose(1, 2), &q, &part_k)
                })?;
                operation("attention copy", || {
                    let place = Place {
                        first: tile.base * self.keys().width() + block.keys.start * dim,
                        stride: tile.padded * dim,
                    };
                    rows::accumulate_blocks(&mut grad_k, &part_k, place);
                    rows::accumulate_blocks(&mut grad_v, &part_v, place);
                });
            }
        }
        Ok(Projected { q: grad_q, k: grad_k, v: grad_v })
    }
}

//! Causal attention over the documents of a packed row, tile by tile: batched matrix products around a fused softmax.
//!
//! Queries, keys and values come in the layout of [`crate::ops::heads`]; a group of query heads shares keys and values
//! without expanding them. Long documents attend in blocks of queries, so that scores stay small.

use super::Error;
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::clock::timed;
use crate::ops::documents::{Block, Documents, Tile};
use crate::ops::heads::Heads;
use crate::ops::softmax::{self, Scores, Statistics};
use crate::ops::{matmul, rows};
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
}

impl Attention<'_> {
    fn keys(&self) -> Heads {
        Heads { count: self.queries.kv, ..self.queries }
    }

    fn group(&self) -> usize {
        self.queries.count / self.queries.kv
    }

    /// The part of a flat layout that holds `tile`, as `[documents * kv heads, padded * group, D]`.
    fn plane(&self, flat: &Tensor, tile: &Tile, heads: Heads) -> Tensor {
        let (count, dim) = (tile.documents.len() * heads.kv, heads.dim);
        let elements = tile.documents.len() * tile.padded * heads.width();
        let plane = flat.narrow(0, (tile.base * heads.width()) as i64, elements as i64);
        plane.view([count as i64, (elements / count / dim) as i64, dim as i64])
    }

    fn scores<'b>(&self, tile: &'b Tile, block: &'b Block) -> Scores<'b> {
        let scale = 1.0 / (self.queries.dim as f64).sqrt();
        Scores { tile, block, kv_heads: self.queries.kv, group: self.group(), window: self.window, scale }
    }

    /// Rows of `plane` for a range of positions with `group` rows each.
    fn narrow(plane: &Tensor, positions: &std::ops::Range<usize>, group: usize) -> Tensor {
        plane.narrow(1, (positions.start * group) as i64, (positions.len() * group) as i64)
    }

    pub fn forward(&self, inputs: &Projected) -> Result<Attended, Error> {
        let (kind, dim) = (inputs.q.kind(), self.queries.dim);
        let mut output = self.pool.take(kind, &[self.documents.rows, self.queries.width()]);
        let mut lse = self.pool.take_zero(self.wide, &[self.documents.padded * self.queries.count]);
        for tile in &self.documents.tiles {
            let q = self.plane(&inputs.q, tile, self.queries);
            let (k, v) = (self.plane(&inputs.k, tile, self.keys()), self.plane(&inputs.v, tile, self.keys()));
            let batch = tile.documents.len() * self.queries.kv;
            for block in tile.blocks(self.window) {
                let rows = block.queries.len() * self.group();
                let mut scores = self.pool.take(kind, &[batch, rows, block.keys.len()]);
                let (k, v) = (Self::narrow(&k, &block.keys, 1), Self::narrow(&v, &block.keys, 1));
                timed("attention gemm", || {
                    matmul::products(&Self::narrow(&q, &block.queries, self.group()), &k.transpose(1, 2), &scores)
                })?;
                timed("softmax", || softmax::forward(&mut scores, self.scores(tile, &block), &mut lse));
                let part = self.pool.take(kind, &[batch, rows, dim]);
                timed("attention gemm", || matmul::products(&scores, &v, &part))?;
                timed("attention copy", || crate::ops::gather::gather(&part, tile, &block, self.queries, &mut output));
            }
        }
        crate::ops::gather::clear_padding(&mut output, self.documents.tokens);
        Ok(Attended { output, lse })
    }

    /// Gradients of queries (compute kind), keys and values (wide), in the layout of the inputs, from that of the output,
    /// `[rows, heads * D]`.
    pub fn backward(&self, grad: &Tensor, inputs: &Projected, saved: &Attended) -> Result<Projected, Error> {
        let (kind, dim, group) = (inputs.q.kind(), self.queries.dim, self.group());
        let grad_q = self.pool.take(kind, &[self.documents.padded * self.queries.width()]);
        let kv_elements = self.documents.padded * self.keys().width();
        let mut grad_k = self.pool.take_zero(self.wide, &[kv_elements]);
        let mut grad_v = self.pool.take_zero(self.wide, &[kv_elements]);
        let mut delta = self.pool.take_zero(self.wide, &[self.documents.padded * self.queries.count]);
        for tile in &self.documents.tiles {
            let q = self.plane(&inputs.q, tile, self.queries);
            let (k, v) = (self.plane(&inputs.k, tile, self.keys()), self.plane(&inputs.v, tile, self.keys()));
            let grad_q = self.plane(&grad_q, tile, self.queries);
            let batch = tile.documents.len() * self.queries.kv;
            for block in tile.blocks(self.window) {
                let (rows, width) = (block.queries.len() * group, block.keys.len());
                let (k, v) = (Self::narrow(&k, &block.keys, 1), Self::narrow(&v, &block.keys, 1));
                let q = Self::narrow(&q, &block.queries, group);
                let mut grad_out = self.pool.take(kind, &[batch, rows, dim]);
                timed("attention copy", || {
                    crate::ops::gather::spread(
                        grad,
                        &saved.output,
                        tile,
                        &block,
                        self.queries,
                        &mut grad_out,
                        &mut delta,
                    );
                });
                let mut scores = self.pool.take(kind, &[batch, rows, width]);
                let mut grad_scores = self.pool.take(kind, &[batch, rows, width]);
                timed("attention gemm", || -> Result<(), tch::TchError> {
                    matmul::products(&q, &k.transpose(1, 2), &scores)?;
                    matmul::products(&grad_out, &v.transpose(1, 2), &grad_scores)
                })?;
                let statistics = Statistics { lse: &saved.lse, delta: &delta };
                timed("softmax backward", || {
                    softmax::backward(&mut scores, &mut grad_scores, self.scores(tile, &block), statistics)
                });
                let (part_k, part_v) =
                    (self.pool.take(kind, &[batch, width, dim]), self.pool.take(kind, &[batch, width, dim]));
                let part_q = self.pool.take(kind, &[batch, rows, dim]);
                timed("attention gemm", || -> Result<(), tch::TchError> {
                    matmul::products(&scores.transpose(1, 2), &grad_out, &part_v)?;
                    matmul::products(&grad_scores, &k, &part_q)?;
                    matmul::products(&grad_scores.transpose(1, 2), &q, &part_k)
                })?;
                timed("attention copy", || {
                    Self::narrow(&grad_q, &block.queries, group).copy_(&part_q);
                    for (sum, part) in [(&mut grad_k, &part_k), (&mut grad_v, &part_v)] {
                        let plane = self.plane(sum, tile, self.keys());
                        for (index, part) in (0..batch as i64).map(|b| (b, part.get(b))) {
                            rows::accumulate(&mut Self::narrow(&plane, &block.keys, 1).get(index), &part);
                        }
                    }
                });
            }
        }
        Ok(Projected { q: grad_q, k: grad_k, v: grad_v })
    }
}

//! Causal softmax over the scores of attention, and its backward from the saved log-sum-exp.
//!
//! Scores are `[documents * kv heads, queries * group, keys]` of the compute kind, a block of queries of one tile. A query
//! at position `s` of its document sees the keys `s + 1 - window ..= s`; queries past the document's end see none.

use super::documents::{Block, Tile};
use super::form::{indices, Form};
use super::simd::{exp, max, vectorised, Narrow, LANES};
use super::view::{elements, elements_mut};
use half::bf16;
use std::ops::Range;
use tch::Tensor;

/// Which scores they are, and what is multiplied to them.
#[derive(Clone, Copy)]
pub struct Scores<'a> {
    pub tile: &'a Tile,
    pub block: &'a Block,
    pub kv_heads: usize,
    pub group: usize,
    pub window: Option<usize>,
    pub scale: f64,
}

impl Scores<'_> {
    /// Calls `visit(row of the scores, row of the statistics, visible keys of that row)`. Statistics are
    /// `[padded tokens * heads]` in the layout of heads.
    #[inline(always)]
    fn visit(&self, mut visit: impl FnMut(usize, usize, Range<usize>)) {
        let (tile, block) = (self.tile, self.block);
        let mut row = 0;
        for (d, document) in tile.documents.iter().enumerate() {
            for kv in 0..self.kv_heads {
                let plane = (tile.base + d * tile.padded) * self.kv_heads + kv * tile.padded;
                for s in block.queries.clone() {
                    let low = self.window.map_or(0, |w| (s + 1).saturating_sub(w)).max(block.keys.start);
                    let keys = if s < document.length { low..s + 1 } else { block.keys.start..block.keys.start };
                    for g in 0..self.group {
                        let local = keys.start - block.keys.start..keys.end - block.keys.start;
                        visit(row, (plane + s) * self.group + g, local);
                        row += 1;
                    }
                }
            }
        }
    }

    /// Rows of the statistics, and which keys each row sees as `[rows, keys]`: for slow twins.
    fn mask(&self, beside: &Tensor) -> (Tensor, Tensor) {
        let (mut at, mut mask) = (Vec::new(), Vec::new());
        let width = self.block.keys.len();
        self.visit(|_, statistic, keys| {
            at.push(statistic as i64);
            mask.extend((0..width).map(|k| keys.contains(&k)));
        });
        let mask = Tensor::from_slice(&mask).view([-1, width as i64]).to_device(beside.device());
        (indices(at, beside), mask)
    }
}

/// Replaces scores by probabilities and writes the log-sum-exp of each row to `lse`, wide `[padded tokens * heads]`.
pub fn forward(scores: &mut Tensor, which: Scores<'_>, lse: &mut Tensor) {
    match Form::of(scores) {
        Form::Single => forward_rows::<f32>(elements_mut(scores), which, elements_mut(lse)),
        Form::Brain => forward_rows::<bf16>(elements_mut(scores), which, elements_mut(lse)),
        Form::Aten => forward_slow(scores, which, lse),
    }
}

vectorised! {
    fn forward_rows<C: Narrow>(scores: &mut [C], which: Scores<'_>, lse: &mut [f32]) {
        let (width, scale) = (which.block.keys.len(), which.scale as f32);
        let mut wide = vec![0.0f32; width];
        which.visit(|row, statistic, keys| {
            let row = &mut scores[row * width..(row + 1) * width];
            row[..keys.start].fill(C::default());
            row[keys.end..].fill(C::default());
            let seen = &mut row[keys];
            if seen.is_empty() {
                lse[statistic] = 0.0;
                return;
            }
            let most = max(seen) * scale;
            let wide = &mut wide[..seen.len()];
            let sum = exponentials(seen, scale, most, wide);
            lse[statistic] = most + sum.ln();
            let share = 1.0 / sum;
            for (p, w) in seen.iter_mut().zip(wide) {
                *p = C::store(*w * share);
            }
        });
    }
}

/// Writes `exp(value * scale - shift)` of each value and gives their sum.
#[inline(always)]
pub(super) fn exponentials<C: Narrow>(values: &[C], scale: f32, shift: f32, out: &mut [f32]) -> f32 {
    let ((values, values_tail), (out, out_tail)) = (values.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (v, o) in values.iter().zip(out) {
        for l in 0..LANES {
            o[l] = exp(v[l].load() * scale - shift);
            lanes[l] += o[l];
        }
    }
    for (l, (v, o)) in values_tail.iter().zip(out_tail).enumerate() {
        *o = exp(v.load() * scale - shift);
        lanes[l] += *o;
    }
    super::simd::fold(lanes)
}

/// As [`forward`], in ATen calls of any kind.
pub fn forward_slow(scores: &mut Tensor, which: Scores<'_>, lse: &mut Tensor) {
    let (at, mask) = which.mask(scores);
    let blind = mask.logical_not();
    let wide = lse.kind();
    let scaled =
        (scores.view(mask.size().as_slice()).to_kind(wide) * which.scale).masked_fill(&blind, f64::NEG_INFINITY);
    let sums = scaled.logsumexp([-1i64].as_slice(), true);
    // A row that sees nothing has probabilities of zero.
    let sums = sums.masked_fill(&mask.any_dim(-1, true).logical_not(), 0.0);
    scores.copy_(&(scaled - &sums).exp().view(scores.size().as_slice()));
    let _ = lse.index_copy_(0, &at, &sums.squeeze_dim(-1));
}

/// What the backward pass knows of each row: wide `[padded tokens * heads]`.
#[derive(Clone, Copy)]
pub struct Statistics<'a> {
    pub lse: &'a Tensor,
    /// Products of the attention's output and its gradient.
    pub delta: &'a Tensor,
}

/// Replaces scores by probabilities, and the gradient of the probabilities by that of the unscaled scores.
pub fn backward(scores: &mut Tensor, grad: &mut Tensor, which: Scores<'_>, saved: Statistics<'_>) {
    match Form::of(scores) {
        Form::Single => backward_fast::<f32>(scores, grad, which, saved),
        Form::Brain => backward_fast::<bf16>(scores, grad, which, saved),
        Form::Aten => backward_slow(scores, grad, which, saved),
    }
}

fn backward_fast<C: Narrow>(scores: &mut Tensor, grad: &mut Tensor, which: Scores<'_>, saved: Statistics<'_>) {
    let (lse, delta) = (elements(saved.lse), elements(saved.delta));
    backward_rows::<C>(elements_mut(scores), elements_mut(grad), which, lse, delta);
}

vectorised! {
    fn backward_rows<C: Narrow>(scores: &mut [C], grad: &mut [C], which: Scores<'_>, lse: &[f32], delta: &[f32]) {
        let (width, scale) = (which.block.keys.len(), which.scale as f32);
        which.visit(|row, statistic, keys| {
            let (row, grad) = (&mut scores[row * width..][..width], &mut grad[row * width..][..width]);
            for outside in [0..keys.start, keys.end..width] {
                row[outside.clone()].fill(C::default());
                grad[outside].fill(C::default());
            }
            let (lse, delta) = (lse[statistic], delta[statistic]);
            for (p, g) in row[keys.clone()].iter_mut().zip(&mut grad[keys]) {
                let probability = exp(p.load() * scale - lse);
                *p = C::store(probability);
                *g = C::store(probability * (g.load() - delta) * scale);
            }
        });
    }
}

/// As [`backward`], in ATen calls of any kind.
pub fn backward_slow(scores: &mut Tensor, grad: &mut Tensor, which: Scores<'_>, saved: Statistics<'_>) {
    let (at, mask) = which.mask(scores);
    let wide = saved.lse.kind();
    let statistic = |of: &Tensor| of.index_select(0, &at).unsqueeze(-1);
    let scaled = scores.view(mask.size().as_slice()).to_kind(wide) * which.scale - statistic(saved.lse);
    let probabilities = scaled.exp() * mask.to_kind(wide);
    let inner = grad.view(mask.size().as_slice()).to_kind(wide) - statistic(saved.delta);
    grad.copy_(&(&probabilities * inner * which.scale).view(grad.size().as_slice()));
    scores.copy_(&probabilities.view(scores.size().as_slice()));
}

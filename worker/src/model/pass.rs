//! The passes of a whole model over one packed row: forward, forward with backward, evaluation.

use super::block::{Block, Scene, Stream};
use super::head::{Head, Last};
use super::linear::view;
use super::saved::{Recompute, Saved};
use super::{Batch, Error, Leaves, Loss, Model, Nowhere};
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::documents::Documents;
use crate::ops::form::wide;
use crate::ops::operation::{operation, DryRun};
use crate::ops::rotation::Rotation;
use crate::ops::rows;
use std::sync::{Mutex, PoisonError};
use tch::Tensor;
use unisono_proto::NO_TARGET;

/// What a forward pass over all blocks gives.
pub(super) struct Passed {
    /// Of every block if they were to be kept, else of the last one.
    pub blocks: Vec<Saved>,
    /// What the last block's MLP adds.
    pub mlp: Buffer,
}

impl Model {
    /// A batch is refused before anything is computed.
    pub(super) fn check(&self, batch: &Batch) -> Result<(), Error> {
        let (tokens, vocab) = (batch.tokens.len(), self.spec().vocab);
        let refuse = |problem: String| Err(Error::Batch(problem));
        if tokens == 0 {
            return refuse("holds no tokens".into());
        }
        if !batch.targets.is_empty() && batch.targets.len() != tokens {
            return refuse(format!("has {tokens} tokens and {} targets", batch.targets.len()));
        }
        let ascending = batch.starts.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = batch.starts.last().is_some_and(|&last| (last as usize) < tokens);
        if batch.starts.first() != Some(&0) || !ascending || !inside {
            return refuse("starts of documents must ascend from 0 and stay below the number of tokens".into());
        }
        let bad = |id: &&u32| **id as usize >= vocab;
        if let Some(id) = batch.tokens.iter().find(bad) {
            return refuse(format!("token {id} lies outside the model's vocabulary of {vocab}"));
        }
        match batch.targets.iter().filter(|t| **t != NO_TARGET).find(bad) {
            Some(id) => refuse(format!("target {id} lies outside the model's vocabulary of {vocab}")),
            None => Ok(()),
        }
    }

    pub(super) fn block(&self, layer: usize) -> Block<'_> {
        let index = layer + 1;
        Block::new(self.spec(), &self.layout().buckets[index], self.bucket(index), index)
    }

    pub(super) fn head(&self) -> Head {
        let last = self.layout().buckets.len() - 1;
        let bucket = &self.layout().buckets[last];
        let (norm, norm_offset) = view(self.bucket(last), bucket, "norm.weight").expect("the head has a norm");
        let (weight, weight_at) = match view(self.bucket(last), bucket, "lm_head.weight") {
            Some((weight, offset)) => (weight, (last, offset)),
            None => (self.embedding(), (0, 0)),
        };
        Head { norm, eps: self.spec().norm_eps, norm_at: (last, norm_offset), weight, weight_at }
    }

    /// `[V, H]`
    pub(super) fn embedding(&self) -> Tensor {
        let found = view(self.bucket(0), &self.layout().buckets[0], "embed_tokens.weight");
        found.expect("the first bucket is the embedding").0
    }

    /// Tables for at least `positions`, kept from one batch to the next.
    pub(super) fn rotation(&self, positions: usize) -> Rotation {
        let mut kept = self.rotation.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(rotation) if rotation.positions >= positions => rotation.clone(),
            _ => {
                let (spec, count) = (self.spec(), positions.next_power_of_two());
                let tables = Rotation::new(&spec.rope, spec.head_dim, count, wide(self.compute()), self.device());
                kept.insert(tables).clone()
            }
        }
    }

    /// Runs all blocks, the last one to the end only for the rows `chosen`; `visit` sees each block's intermediate results
    /// before they are dropped or kept.
    pub(super) fn run_blocks(
        &self,
        tokens: &[u32],
        chosen: &[u32],
        scene: Scene<'_>,
        keep: bool,
        mut visit: impl FnMut(usize, &Saved),
    ) -> Result<Passed, Error> {
        let mut embedded = scene.pool.take(scene.wide, &[scene.documents.rows, self.spec().hidden]);
        operation("embedding", || rows::look_up(&self.embedding(), tokens, &mut embedded));
        let choice = |layer: usize| (layer + 1 == self.spec().layers).then_some(chosen);
        let (saved, mut mlp) = self.block(0).forward(scene, Stream::Embedded(embedded), choice(0))?;
        visit(0, &saved);
        let mut blocks = vec![saved];
        for layer in 1..self.spec().layers {
            let residual = blocks[blocks.len() - 1].middle();
            let stream = Stream::Within { residual, mlp, bias: self.block(layer - 1).down_bias() };
            let (saved, next) = self.block(layer).forward(scene, stream, choice(layer))?;
            visit(layer, &saved);
            mlp = next;
            match (keep, scene.recompute) {
                (false, _) => blocks.clear(),
                (true, Recompute::Block) => blocks.last_mut().into_iter().for_each(Saved::forget),
                (true, _) => (),
            }
            blocks.push(saved);
        }
        Ok(Passed { blocks, mlp })
    }

    pub(super) fn last<'a>(&self, passed: &'a Passed) -> Last<'a> {
        let block = &passed.blocks[passed.blocks.len() - 1];
        Last { residual: block.middle(), mlp: &passed.mlp, bias: self.block(self.spec().layers - 1).down_bias() }
    }

    pub(super) fn forward_backward_pass(
        &self,
        batch: &Batch,
        scale: f64,
        leaves: &mut dyn Leaves,
    ) -> Result<Loss, Error> {
        self.check(batch)?;
        let selected = Selected::of(batch);
        if selected.rows.is_empty() {
            return Ok(Loss { sum: 0.0, targets: 0, correct: 0 });
        }
        let documents = Documents::new(&batch.starts, batch.tokens.len());
        let rotation = self.rotation(documents.longest.next_multiple_of(crate::ops::documents::LENGTH));
        let wide = wide(self.compute());
        let (pool, recompute) = (&self.pool, self.recompute);
        let scene = Scene { documents: &documents, rotation: &rotation, wide, pool, recompute };
        let mut passed = self.run_blocks(&batch.tokens, &selected.rows, scene, true, |_, _| ())?;
        let (sum, mut grad) =
            self.head().forward_backward(&self.last(&passed), &selected.targets, scale, leaves, &self.pool)?;
        while let Some(saved) = passed.blocks.pop() {
            self.block(passed.blocks.len()).backward(scene, saved, &mut grad, leaves)?;
        }
        let ids = rows::distinct(&batch.tokens);
        let mut sums = self.pool.take(wide, &[ids.len(), self.spec().hidden]);
        operation("embedding backward", || rows::sum_by_id(&grad.wide, &batch.tokens, &mut sums));
        operation("leaves", || leaves.rows(0, 0, &ids, &sums))?;
        Ok(Loss { sum: sum.sum(), targets: selected.rows.len() as u64, correct: 0 })
    }

    /// The bytes of activations and temporaries that a batch takes at a level, with its gradient or without: the same code
    /// walks through the same buffers, no operation is carried out and no page is touched.
    pub(super) fn dry_pass(&self, batch: &Batch, level: Recompute, trains: bool) -> Result<usize, Error> {
        let _dry = DryRun::begin();
        let buckets = self.buckets.iter().map(Tensor::shallow_clone).collect();
        let (spec, layout, pool) = (self.spec.clone(), self.layout.clone(), Pool::phantom());
        let (compute, device, rotation) = (self.compute, self.device, Mutex::default());
        let model = Model { spec, layout, compute, device, buckets, mirrors: None, pool, recompute: level, rotation };
        match trains {
            true => model.forward_backward_pass(batch, 1.0, &mut Nowhere)?,
            false => model.evaluate_pass(batch)?,
        };
        Ok(model.pool.bytes())
    }

    pub(super) fn evaluate_pass(&self, batch: &Batch) -> Result<Loss, Error> {
        self.check(batch)?;
        let selected = Selected::of(batch);
        if selected.rows.is_empty() {
            return Ok(Loss { sum: 0.0, targets: 0, correct: 0 });
        }
        let documents = Documents::new(&batch.starts, batch.tokens.len());
        let rotation = self.rotation(documents.longest.next_multiple_of(crate::ops::documents::LENGTH));
        let (wide, pool, recompute) = (wide(self.compute()), &self.pool, Recompute::Nothing);
        let scene = Scene { documents: &documents, rotation: &rotation, wide, pool, recompute };
        let passed = self.run_blocks(&batch.tokens, &selected.rows, scene, false, |_, _| ())?;
        let (sum, correct) = self.head().evaluate(&self.last(&passed), &selected.targets, &self.pool)?;
        Ok(Loss { sum, targets: selected.rows.len() as u64, correct })
    }
}

impl Model {
    pub(super) fn logits_pass(&self, batch: &Batch, at: &[u32]) -> Result<Tensor, Error> {
        self.check(batch)?;
        let documents = Documents::new(&batch.starts, batch.tokens.len());
        let rotation = self.rotation(documents.longest.next_multiple_of(crate::ops::documents::LENGTH));
        let (wide, pool, recompute) = (wide(self.compute()), &self.pool, Recompute::Nothing);
        let scene = Scene { documents: &documents, rotation: &rotation, wide, pool, recompute };
        let passed = self.run_blocks(&batch.tokens, at, scene, false, |_, _| ())?;
        let logits = self.head().logits_of(&self.last(&passed), &self.pool)?;
        Ok(logits.narrow(0, 0, at.len() as i64).copy())
    }
}

/// Rows with targets.
struct Selected {
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Selected {
    fn of(batch: &Batch) -> Self {
        let chosen = batch.targets.iter().enumerate().filter(|(_, &target)| target != NO_TARGET);
        let (rows, targets) = chosen.map(|(row, &target)| (row as u32, target)).unzip();
        Selected { rows, targets }
    }
}

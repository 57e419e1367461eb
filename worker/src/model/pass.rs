//! What a pass is made of, and passes through the whole model.

use super::block::Block;
use super::head::Head;
use super::linear::view;
use super::parameters::Parameters;
use super::saved::Recompute;
use super::wave::{Fault, Passage, Wave};
use super::{Batch, Error, Leaves, Model, Nowhere};
use crate::ops::buffer::Pool;
use crate::ops::documents::Documents;
use crate::ops::form::wide;
use crate::ops::operation::DryRun;
use crate::ops::rotation::Rotation;
use std::sync::PoisonError;
use tch::Tensor;
use unisono_proto::NO_TARGET;

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
        Head { norm, eps: self.spec().norm_eps, norm_at: (last, norm_offset), weight, weight_at, rows: self.head_rows }
    }

    /// `[V, H]`
    pub(super) fn embedding(&self) -> Tensor {
        let found = view(self.bucket(0), &self.layout().buckets[0], "embed_tokens.weight");
        found.expect("the first bucket is the embedding").0
    }

    /// The documents of a packed row, as attention is computed here.
    pub(super) fn documents(&self, starts: &[u32], tokens: usize) -> Documents {
        match self.flat {
            true => Documents::flat(starts, tokens, self.device),
            false => Documents::new(starts, tokens),
        }
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

    /// The bytes of activations and temporaries that batches take at a level, with their gradient or without: the same code
    /// walks through the same buffers, no operation is carried out and no page is touched.
    pub(super) fn dry_pass(&self, batches: Vec<Batch>, level: Recompute, trains: bool) -> Result<usize, Fault> {
        let _dry = DryRun::begin();
        let (spec, layout) = (self.spec.clone(), self.layout.clone());
        let parameters = Parameters::phantom(&layout, self.compute);
        let parameters = parameters.expect("a model that exists fits an address space");
        let model = Model::over(spec, layout, self.compute, self.device, parameters);
        let (flat, head_rows) = (self.flat, self.head_rows);
        let model = Model { pool: Pool::phantom(), recompute: level, flat, head_rows, ..model };
        model.whole_pass(batches, trains, 1.0, &mut Nowhere)?;
        Ok(model.pool.bytes())
    }

    /// Takes batches all the way, with their gradient or without.
    pub(super) fn whole_pass(
        &self,
        batches: Vec<Batch>,
        trains: bool,
        scale: f64,
        leaves: &mut dyn Leaves,
    ) -> Result<Wave, Fault> {
        let mut wave = self.wave(batches)?;
        self.way(trains).into_iter().try_for_each(|station| wave.pass(self, station, scale, leaves))?;
        Ok(wave)
    }

    pub(super) fn logits_pass(&self, batch: &Batch, at: &[u32]) -> Result<Tensor, Error> {
        self.check(batch)?;
        let mut passage = Passage::new(self, batch.tokens.clone(), &batch.starts, at.to_vec(), Vec::new());
        (0..=self.spec().layers).try_for_each(|bucket| passage.forward(self, bucket, false))?;
        let logits = self.head().logits_of(&passage.last(), &self.pool)?;
        Ok(logits.narrow(0, 0, at.len() as i64).copy())
    }
}

/// Rows with targets.
pub(super) struct Selected {
    pub rows: Vec<u32>,
    pub targets: Vec<u32>,
}

impl Selected {
    pub fn of(batch: &Batch) -> Self {
        let chosen = batch.targets.iter().enumerate().filter(|(_, &target)| target != NO_TARGET);
        let (rows, targets) = chosen.map(|(row, &target)| (row as u32, target)).unzip();
        Selected { rows, targets }
    }
}

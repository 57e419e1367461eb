//! Parameters on their way to whoever computes with them.
//!
//! Where every worker keeps all parameters, a bucket is on its way from its update until somebody needs it again. Where
//! they are sharded, a bucket comes just before it is needed and goes when it is not: two stations of the way through the
//! model at a time, the one that computes and the next.

use crate::collective::courier::{Courier, Ticket};
use crate::collective::{self, Collective};
use crate::model::{self, Model};
use crate::ops::view;
use crate::optim::lending::{self, Kind};
use crate::optim::shard::Shard;
use crate::optim::Parameters;
use crate::trace::{self, Track};
use std::sync::Arc;
use tch::Tensor;

/// Why parameters did not come.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Collective(#[from] collective::Error),
    #[error("the parameters cannot be copied to the GPU: {0}")]
    Publish(#[from] model::Error),
}

pub struct Supply {
    shard: Arc<Shard>,
    /// Of each bucket, where it is on its way.
    arriving: Vec<Option<Ticket<Tensor>>>,
    /// Memory for buckets of a sharded model that nobody needs now, by kind.
    free: Vec<(Kind, Tensor)>,
}

impl Supply {
    pub fn new(model: &Model, shard: Arc<Shard>) -> Self {
        let free = if model.is_sharded() { lending::lots(model.layout(), 2) } else { Vec::new() };
        let free = free.into_iter().map(|(kind, elements)| (kind, memory(model, elements))).collect();
        let arriving = (0..shard.buckets()).map(|_| None).collect();
        Supply { shard, arriving, free }
    }

    /// Sends every rank's own part of an updated bucket to all. A sharded model's comes when it is needed.
    pub fn spread(&mut self, bucket: usize, model: &mut Model, courier: &mut Courier) {
        if !model.is_sharded() {
            let parameters = model.take_bucket(bucket);
            self.send(bucket, parameters, model, courier);
        }
    }

    fn send(&mut self, bucket: usize, parameters: Tensor, model: &Model, courier: &mut Courier) {
        let (shard, name) = (self.shard.clone(), model.layout().buckets[bucket].name.clone());
        let elements = shard.owners(bucket).last().map_or(0, |last| last.end) as i64;
        let ticket = courier.send(move |collective: &mut dyn Collective| {
            let _gathering = trace::span(Track::Communication, || format!("gather {name}"));
            collective.gather(&mut parameters.narrow(0, 0, elements), shard.owners(bucket))?;
            Ok(parameters)
        });
        self.arriving[bucket] = Some(ticket);
    }

    /// Brings the model what it needs `now`, and begins to bring what it needs `next`.
    pub fn reach(
        &mut self,
        now: &[usize],
        next: &[usize],
        model: &mut Model,
        courier: &mut Courier,
    ) -> Result<(), Error> {
        if model.is_sharded() {
            for bucket in (0..self.arriving.len()).filter(|b| !now.contains(b) && !next.contains(b)) {
                self.receive(bucket, model)?;
                if model.has_bucket(bucket) {
                    self.free.push((lending::kind(model.layout(), bucket), model.take_bucket(bucket)));
                }
            }
            for &bucket in now.iter().chain(next) {
                self.fetch(bucket, model, courier);
            }
        }
        now.iter().try_for_each(|&bucket| self.receive(bucket, model))
    }

    /// Begins to bring a bucket of a sharded model.
    fn fetch(&mut self, bucket: usize, model: &Model, courier: &mut Courier) {
        if model.has_bucket(bucket) || self.arriving[bucket].is_some() {
            return;
        }
        let kind = lending::kind(model.layout(), bucket);
        let lot = self.free.iter().position(|(k, _)| *k == kind).expect("two stations need no more than there is");
        let (_, parameters) = self.free.swap_remove(lot);
        self.fill(bucket, parameters, model, courier);
    }

    /// Gathers a bucket into `parameters`, from the own part on.
    fn fill(&mut self, bucket: usize, parameters: Tensor, model: &Model, courier: &mut Courier) {
        let own = self.shard.own(bucket);
        view::part(&parameters, &own).copy_(model.own_away(bucket, own.start).0);
        self.send(bucket, parameters, model, courier);
    }

    /// Waits for a bucket, if it is on its way.
    fn receive(&mut self, bucket: usize, model: &mut Model) -> Result<(), Error> {
        match self.arriving[bucket].take() {
            Some(ticket) => Ok(model.put_bucket(bucket, ticket.wait()?)?),
            None => Ok(()),
        }
    }

    /// Waits for all buckets that are on their way.
    pub fn settle(&mut self, model: &mut Model) -> Result<(), Error> {
        (0..self.arriving.len()).try_for_each(|bucket| self.receive(bucket, model))
    }

    /// Brings the whole model, in memory of its own; returns the buckets that came, for [`Supply::leave`].
    pub fn reach_all(&mut self, model: &mut Model, courier: &mut Courier) -> Result<Vec<usize>, Error> {
        self.settle(model)?;
        let absent: Vec<usize> = (0..self.arriving.len()).filter(|&bucket| !model.has_bucket(bucket)).collect();
        for &bucket in &absent {
            let elements = model.layout().buckets[bucket].elements;
            self.fill(bucket, memory(model, elements), model, courier);
            self.receive(bucket, model)?;
        }
        Ok(absent)
    }

    /// Gives back the memory of `buckets`.
    pub fn leave(&mut self, buckets: Vec<usize>, model: &mut Model) {
        buckets.into_iter().for_each(|bucket| drop(model.take_bucket(bucket)));
    }
}

/// Memory for parameters.
fn memory(model: &Model, elements: usize) -> Tensor {
    Tensor::zeros([elements as i64], (model.compute(), model.travels_on()))
}

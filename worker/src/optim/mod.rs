//! The sharded optimizer: the exact sum over all leaves ([`exact`]), who owns what ([`shard`]), the gradient norm
//! ([`norm`]) and AdamW on the own shard ([`adamw`]), in named phases: reduce -> norm -> update -> gather.

pub mod adamw;
pub mod exact;
pub mod noise;
pub mod norm;
pub mod on_device;
pub mod shard;
pub mod state;

use crate::checkpoint::Source;
use crate::collective::{self, Collective};
use crate::ops::view;
use crate::restore::Part;
use adamw::{Scalars, Settings};
use exact::{ExactSum, Exactly, Nearest, Reduced};
use noise::Noise;
use shard::Shard;
use state::{Form, Held, State, Values};
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};
use unisono_configs::model::{Layout, CHUNK};

/// The parameters that an optimizer updates: one flat tensor for each bucket, fp32 or bf16.
pub trait Parameters {
    fn bucket(&self, bucket: usize) -> &Tensor;
    fn bucket_mut(&mut self, bucket: usize) -> &mut Tensor;
}

impl Parameters for Vec<Tensor> {
    fn bucket(&self, bucket: usize) -> &Tensor {
        &self[bucket]
    }
    fn bucket_mut(&mut self, bucket: usize) -> &mut Tensor {
        &mut self[bucket]
    }
}

/// The own shard of the optimizer state and the accumulators it is fed from.
#[derive(Debug)]
pub struct Optimizer {
    layout: Arc<Layout>,
    shard: Shard,
    settings: Settings,
    /// Takes the leaves of the step under way.
    pub sums: ExactSum,
    /// One for each bucket.
    states: Vec<State>,
}

impl Optimizer {
    /// `leaves`: the most leaves that any element receives in a step, over all ranks. Masters are the parameters, rounded:
    /// see [`Optimizer::load_masters`].
    pub fn new(layout: Arc<Layout>, rank: usize, world: usize, settings: Settings, leaves: usize) -> Self {
        let shard = Shard::new(&layout, rank, world);
        let states = (0..shard.buckets()).map(|b| State::new(settings.form, shard.own(b).len())).collect();
        Optimizer { sums: ExactSum::new(layout.clone(), leaves), layout, shard, settings, states }
    }

    /// Takes the own masters: `read(tensor name, its elements, destination)`. What of them the parameters hold already is
    /// not read.
    pub fn load_masters<E>(
        &mut self,
        mut read: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.load(&[Part::Master], |name, _, range, out| read(name, range, out))
    }

    /// Takes the own masters and moments: `read(tensor name, part, its elements, destination)`.
    pub fn load_state<E>(
        &mut self,
        read: impl FnMut(&str, Part, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.load(&Part::ALL, read)
    }

    fn load<E>(
        &mut self,
        parts: &[Part],
        mut read: impl FnMut(&str, Part, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut values = vec![0.0; CHUNK];
        for piece in self.shard.pieces(&self.layout) {
            let state = &mut self.states[piece.bucket];
            for &part in parts {
                if !state.keeps(part) {
                    continue;
                }
                for begin in piece.of_tensor.clone().step_by(CHUNK) {
                    let end = piece.of_tensor.end.min(begin + CHUNK);
                    let values = &mut values[..end - begin];
                    read(&piece.tensor.name, part, begin..end, values)?;
                    state.set(part, piece.of_shard.start + begin - piece.of_tensor.start, values);
                }
            }
        }
        Ok(())
    }

    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Master and moments of the own range of `bucket`.
    pub fn state(&self, bucket: usize) -> &State {
        &self.states[bucket]
    }

    /// The own shard, to be written or copied: with the parameters, which hold the masters or their upper halves.
    pub fn source<'a>(&'a self, parameters: &'a dyn Parameters) -> Source<'a> {
        let held = self.states.iter().enumerate().map(|(b, state)| {
            let (bucket, own) = (parameters.bucket(b), self.shard.own(b));
            let parameters = match bucket.kind() {
                Kind::Float => Values::Wide(&view::elements(bucket)[own]),
                _ => Values::Narrow(&view::elements(bucket)[own]),
            };
            Held { parameters, state }
        });
        Source { layout: &self.layout, shard: &self.shard, form: self.settings.form, held: held.collect() }
    }

    /// Bytes of what is kept beside the parameters.
    pub fn bytes(&self) -> u64 {
        self.states.iter().map(State::bytes).sum()
    }

    /// Adds up all ranks' sums: afterwards the own range holds the step's gradient.
    pub fn reduce(&mut self, collective: &mut dyn Collective) -> Result<(), collective::Error> {
        self.sums.settle();
        (0..self.shard.buckets())
            .try_for_each(|b| collective.reduce_scatter(self.sums.bucket_mut(b), self.shard.owners(b)))
    }

    /// Norm of the whole gradient: the same bits on every rank, whatever their number.
    pub fn norm(&self, collective: &mut dyn Collective) -> Result<f64, collective::Error> {
        let mut mine = Vec::new();
        for b in 0..self.shard.buckets() {
            for chunk in self.sums.bucket(b)[self.shard.own(b)].chunks(CHUNK) {
                let partial = match self.settings.form {
                    Form::Whole | Form::Split => norm::partial(chunk, Exactly),
                    Form::Narrow => norm::partial(chunk, Nearest),
                };
                mine.extend_from_slice(&partial.to_le_bytes());
            }
        }
        let all = collective.all_gather_bytes(&mine)?;
        let mut cursors: Vec<_> = all.iter().map(|bytes| bytes.chunks_exact(8)).collect();
        let mut partials = Vec::new();
        for b in 0..self.shard.buckets() {
            // Ranks own ascending chunk ranges of a bucket, so rank order is chunk order.
            for (owned, cursor) in self.shard.owners(b).iter().zip(&mut cursors) {
                let chunks = cursor.take(owned.len().div_ceil(CHUNK));
                partials.extend(chunks.map(|c| f64::from_le_bytes(c.try_into().expect("chunks_exact(8)"))));
            }
        }
        Ok(norm::norm(partials.into_iter()))
    }

    /// Applies update number `step` (from 1) to the own range of every bucket and forgets the sums.
    pub fn update(&mut self, step: u64, learning_rate: f64, norm: f64, parameters: &mut dyn Parameters) {
        let decaying = self.settings.scalars(step, learning_rate, norm::clip(norm, self.settings.max_grad_norm));
        let plain = decaying.without_decay();
        for piece in self.shard.pieces(&self.layout) {
            let scalars = if piece.tensor.decays() { &decaying } else { &plain };
            let state = &mut self.states[piece.bucket];
            let begin = self.shard.own(piece.bucket).start;
            let of_bucket = begin + piece.of_shard.start..begin + piece.of_shard.end;
            let sums = &self.sums.bucket(piece.bucket)[of_bucket.clone()];
            let noise = Noise { seed: self.settings.seed, step, bucket: piece.bucket };
            state.update(sums, piece.of_shard, parameters.bucket_mut(piece.bucket), of_bucket, scalars, &noise);
        }
        self.sums.clear();
    }

    /// Hands every rank's updated parameters to all.
    pub fn gather(
        &self,
        collective: &mut dyn Collective,
        parameters: &mut dyn Parameters,
    ) -> Result<(), collective::Error> {
        (0..self.shard.buckets())
            .try_for_each(|b| collective.all_gather(parameters.bucket_mut(b), self.shard.owners(b)))
    }
}

impl State {
    fn update<G: Reduced>(
        &mut self,
        gradient: &[G],
        of_shard: Range<usize>,
        bucket: &mut Tensor,
        of_bucket: Range<usize>,
        scalars: &Scalars,
        noise: &Noise,
    ) {
        let (own, at) = (of_shard, of_bucket);
        match self {
            State::Whole { m, v } => {
                let parameter = &mut view::elements_mut(bucket)[at];
                adamw::update_whole(gradient, parameter, &mut m[own.clone()], &mut v[own], scalars);
            }
            State::Split { low, m, v } => {
                let (parameter, low) = (&mut view::elements_mut(bucket)[at], &mut low[own.clone()]);
                adamw::update_split(gradient, parameter, low, &mut m[own.clone()], &mut v[own], scalars);
            }
            State::Narrow { m, v } => {
                let parameter = &mut view::elements_mut(bucket)[at.clone()];
                let (m, v) = (&mut m[own.clone()], &mut v[own]);
                adamw::update_narrow(gradient, parameter, m, v, scalars, noise, at.start);
            }
        }
    }
}

#[cfg(test)]
#[path = "optim_tests.rs"]
mod tests;

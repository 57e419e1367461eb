//! The sharded optimizer: the exact sum over all leaves ([`exact`]), who owns what ([`shard`]), the gradient norm
//! ([`norm`]) and AdamW on the own shard ([`adamw`]), in named phases: reduce -> norm -> update -> gather.

pub mod adamw;
pub mod exact;
pub mod norm;
pub mod on_device;
pub mod shard;

use crate::checkpoint::Source;
use crate::collective::{self, Collective};
use crate::ops::view;
use crate::restore::Part;
use adamw::{Parameter, Scalars, Settings, Span};
use exact::{ExactSum, Reduced};
use half::bf16;
use shard::Shard;
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};
use unisono_configs::model::{Layout, CHUNK};

/// The parameters that an optimizer updates: one flat tensor for each bucket, fp32 or bf16.
pub trait Parameters {
    fn bucket_mut(&mut self, bucket: usize) -> &mut Tensor;
}

impl Parameters for Vec<Tensor> {
    fn bucket_mut(&mut self, bucket: usize) -> &mut Tensor {
        &mut self[bucket]
    }
}

/// fp32 master and moments of the own range of one bucket: `[own elements]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub master: Vec<f32>,
    pub m: Vec<f32>,
    pub v: Vec<f32>,
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
    /// `leaves`: the most leaves that any element receives in a step, over all ranks. Masters start as zeros: see
    /// [`Optimizer::load_masters`].
    pub fn new(layout: Arc<Layout>, rank: usize, world: usize, settings: Settings, leaves: usize) -> Self {
        let shard = Shard::new(&layout, rank, world);
        let state = |n: usize| State { master: resident_zeros(n), m: resident_zeros(n), v: resident_zeros(n) };
        let states = (0..shard.buckets()).map(|b| state(shard.own(b).len())).collect();
        Optimizer { sums: ExactSum::new(layout.clone(), leaves), layout, shard, settings, states }
    }

    /// Fills the own masters: `read(tensor name, its elements, destination)`.
    pub fn load_masters<E>(
        &mut self,
        mut read: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.shard.pieces(&self.layout).try_for_each(|piece| {
            let master = &mut self.states[piece.bucket].master[piece.of_shard];
            read(&piece.tensor.name, piece.of_tensor, master)
        })
    }

    /// Fills the own masters and moments: `read(tensor name, part, its elements, destination)`.
    pub fn load_state<E>(
        &mut self,
        mut read: impl FnMut(&str, Part, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.shard.pieces(&self.layout).try_for_each(|piece| {
            let State { master, m, v } = &mut self.states[piece.bucket];
            [(Part::Master, master), (Part::M, m), (Part::V, v)].into_iter().try_for_each(|(part, values)| {
                read(&piece.tensor.name, part, piece.of_tensor.clone(), &mut values[piece.of_shard.clone()])
            })
        })
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

    /// The own shard, to be written or copied.
    pub fn source(&self) -> Source<'_> {
        Source { layout: &self.layout, shard: &self.shard, states: &self.states }
    }

    /// Bytes of masters and moments.
    pub fn bytes(&self) -> u64 {
        let floats = |s: &State| s.master.capacity() + s.m.capacity() + s.v.capacity();
        self.states.iter().map(|s| (floats(s) * size_of::<f32>()) as u64).sum()
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
                mine.extend_from_slice(&norm::partial(chunk).to_le_bytes());
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
            let bucket = parameters.bucket_mut(piece.bucket);
            match bucket.kind() {
                Kind::Float => state.update::<_, f32>(sums, piece.of_shard, bucket, of_bucket, scalars),
                Kind::BFloat16 => state.update::<_, bf16>(sums, piece.of_shard, bucket, of_bucket, scalars),
                kind => unreachable!("parameters are fp32 or bf16, not {kind:?}"),
            }
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

/// Zeros whose pages exist already: memory that a run will need is taken before its first step, not found missing in it.
fn resident_zeros(n: usize) -> Vec<f32> {
    let mut zeros = vec![1.0; n];
    // Without this the compiler asks for pages that the kernel zeroes on first use.
    std::hint::black_box(&mut zeros).fill(0.0);
    zeros
}

impl State {
    fn update<G: Reduced, P: Parameter + view::Element>(
        &mut self,
        gradient: &[G],
        of_shard: Range<usize>,
        bucket: &mut Tensor,
        of_bucket: Range<usize>,
        scalars: &Scalars,
    ) {
        let span = Span {
            gradient,
            master: &mut self.master[of_shard.clone()],
            m: &mut self.m[of_shard.clone()],
            v: &mut self.v[of_shard],
            parameter: &mut view::elements_mut::<P>(bucket)[of_bucket],
        };
        adamw::update(span, scalars);
    }
}

#[cfg(test)]
#[path = "optim_tests.rs"]
mod tests;

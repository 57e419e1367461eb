//! The sharded optimizer: the exact sum over all leaves ([`exact`]), who owns what ([`shard`]), the gradient norm
//! ([`norm`]) and AdamW on the own shard ([`adamw`]), in named phases: reduce -> norm -> update.
//! [`reduction`] brings leaves to their owners, [`gradient`] is what the owner has of them.

pub mod adamw;
pub mod away;
mod bus;
pub mod exact;
pub mod gradient;
mod leaf;
pub mod lending;
pub mod noise;
pub mod norm;
pub mod on_device;
pub mod pages;
pub mod reduction;
pub mod shard;
pub mod state;
pub mod trial;

use crate::checkpoint::Source;
use crate::memory::placement::Offload;
use crate::ops::view;
use crate::restore::Part;
use adamw::{Scalars, Settings};
use away::{Away, Route};
use exact::Reduced;
use gradient::View;
use noise::Noise;
use reduction::{Adding, Reduction};
use shard::Shard;
use state::{Held, State, Values};
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, TchError, Tensor};
use unisono_configs::model::{Layout, CHUNK};

/// The parameters that an optimizer updates, fp32 or bf16.
pub trait Parameters {
    /// A flat tensor with the own part of a bucket, and where that begins in it; `begin`: where it begins in the bucket.
    fn own(&self, bucket: usize, begin: usize) -> (&Tensor, usize);
    fn own_mut(&mut self, bucket: usize, begin: usize) -> (&mut Tensor, usize);

    /// The same where the model computes with them.
    fn own_away(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        self.own(bucket, begin)
    }
}

/// Whole buckets.
impl Parameters for Vec<Tensor> {
    fn own(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        (&self[bucket], begin)
    }
    fn own_mut(&mut self, bucket: usize, begin: usize) -> (&mut Tensor, usize) {
        (&mut self[bucket], begin)
    }
}

/// The own shard of the optimizer state and the accumulators it is fed from.
#[derive(Debug)]
pub struct Optimizer {
    layout: Arc<Layout>,
    shard: Arc<Shard>,
    settings: Settings,
    /// Takes the leaves of the step under way.
    pub reduction: Reduction,
    /// Before the states, whose memory it has locked.
    away: Option<Away>,
    /// One for each bucket; what was last brought home where the state lives on a device.
    states: Vec<State>,
}

impl Optimizer {
    /// Masters are the parameters, rounded: see [`Optimizer::load_masters`].
    pub fn new(layout: Arc<Layout>, rank: usize, world: usize, settings: Settings, adding: Adding) -> Self {
        let shard = Arc::new(Shard::new(&layout, rank, world));
        let states = (0..shard.buckets()).map(|b| State::new(settings.form, shard.own(b).len())).collect();
        let reduction = Reduction::new(layout.clone(), shard.clone(), settings.form, adding);
        Optimizer { layout, shard, settings, reduction, states, away: None }
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

    /// From now on `device` adds leaves and updates the loaded state, of which it keeps what `offload` leaves there. For an
    /// optimizer whose leaves are added away. An error where it does not fit. No bit depends on it.
    pub fn move_to(&mut self, device: Device, offload: Offload) -> Result<(), TchError> {
        self.move_by(device, Route::to(device), offload)
    }

    fn move_by(&mut self, device: Device, route: Route, offload: Offload) -> Result<(), TchError> {
        self.reduction.move_to(device)?;
        let order = self.shard.pieces(&self.layout);
        let order = order.map(|piece| (piece.bucket, piece.of_shard));
        self.away = Some(Away::of(&mut self.states, order, (device, route), offload)?);
        Ok(())
    }

    /// Brings the state home from where it lives, for [`Optimizer::source`].
    pub fn bring_home(&mut self) {
        if let Some(away) = &self.away {
            away.bring_home(&mut self.states);
        }
    }

    pub fn shard(&self) -> &Arc<Shard> {
        &self.shard
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The own shard, to be written or copied: with the parameters, which hold the masters or their upper halves.
    pub fn source<'a>(&'a self, parameters: &'a dyn Parameters) -> Source<'a> {
        self.away.iter().for_each(Away::wait);
        let held = self.states.iter().enumerate().map(|(b, state)| {
            let own = self.shard.own(b);
            let (bucket, begin) = parameters.own(b, own.start);
            let own = begin..begin + own.len();
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

    /// What update number `step` (from 1) does to a gradient of norm `norm`.
    pub fn plan(&self, step: u64, learning_rate: f64, norm: f64) -> Update {
        let decaying = self.settings.scalars(step, learning_rate, norm::clip(norm, self.settings.max_grad_norm));
        Update { step, decaying, plain: decaying.without_decay() }
    }

    /// Applies an update to the own part of `bucket`, whose gradient is then of no more use.
    pub fn update(&mut self, bucket: usize, update: &Update, parameters: &mut dyn Parameters) {
        let own = self.shard.own(bucket);
        let noise = Noise { seed: self.settings.seed, step: update.step, bucket };
        if let Some(away) = &mut self.away {
            let ((tensor, begin), gradient) = (parameters.own_away(bucket, own.start), self.reduction.away(bucket));
            for piece in self.shard.pieces_of(&self.layout, bucket) {
                let scalars = if piece.tensor.decays() { &update.decaying } else { &update.plain };
                let start = piece.of_shard.start;
                let place = (tensor, begin + start, own.start + start);
                away.update(&mut self.states[bucket], &piece.of_shard, &gradient, place, (scalars, &noise));
            }
            return self.reduction.forget(bucket);
        }
        let (tensor, begin) = parameters.own_mut(bucket, own.start);
        let gradient = self.reduction.gradient(bucket);
        for piece in self.shard.pieces_of(&self.layout, bucket) {
            let scalars = if piece.tensor.decays() { &update.decaying } else { &update.plain };
            let place = Place { at: begin + piece.of_shard.start, first: own.start + piece.of_shard.start };
            let (state, range) = (&mut self.states[bucket], piece.of_shard);
            match &gradient {
                View::Sums(sums) => state.update(&sums[range.clone()], range, tensor, place, scalars, &noise),
                View::Wide(wide) => state.update(&wide[range.clone()], range, tensor, place, scalars, &noise),
                View::Narrow(narrow) => state.update(&narrow[range.clone()], range, tensor, place, scalars, &noise),
            }
        }
        self.reduction.forget(bucket);
    }
}

/// The scalars of one update: of tensors that decay, and of others.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    step: u64,
    decaying: Scalars,
    plain: Scalars,
}

/// Where elements are: in the tensor that holds their parameters, and in their bucket.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    first: usize,
}

impl State {
    fn update<G: Reduced>(
        &mut self,
        gradient: &[G],
        own: Range<usize>,
        parameters: &mut Tensor,
        place: Place,
        scalars: &Scalars,
        noise: &Noise,
    ) {
        let at = place.at..place.at + own.len();
        match self {
            State::Whole { m, v } => {
                let parameter = &mut view::elements_mut(parameters)[at];
                adamw::update_whole(gradient, parameter, &mut m[own.clone()], &mut v[own], scalars);
            }
            State::Split { low, m, v } => {
                let (parameter, low) = (&mut view::elements_mut(parameters)[at], &mut low[own.clone()]);
                adamw::update_split(gradient, parameter, low, &mut m[own.clone()], &mut v[own], scalars);
            }
            State::Narrow { m, v } => {
                let parameter = &mut view::elements_mut(parameters)[at.clone()];
                let (m, v) = (&mut m[own.clone()], &mut v[own]);
                adamw::update_narrow(gradient, parameter, m, v, scalars, noise, place.first);
            }
        }
    }
}

#[cfg(test)]
#[path = "optim_tests.rs"]
mod tests;

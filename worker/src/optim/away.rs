//! Masters and moments beside sums that are added on a device, which updates them: an update moves nothing between device and
//! host but what was left there for want of room. That comes piece by piece, and goes back. The host's copy of the rest is
//! brought up to date where somebody saves it.

use super::adamw::Scalars;
use super::noise::Noise;
use super::on_device::{self, Span};
use super::state::{Form, State};
use crate::memory::placement::Offload;
use crate::ops::view::{self, part};
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, TchError, Tensor};

/// Elements of a piece that comes to the device.
pub const PIECE: usize = 16 << 20;

/// What an update needs of a state, in this order: the lower halves of masters, and both moments.
const PARTS: usize = 3;

/// Of each bucket what lies on the device of the own range: `[own elements]` each.
#[derive(Debug)]
pub struct Away {
    lying: Vec<[Option<Tensor>; PARTS]>,
    /// Where pieces of the rest come: of each part that lies on the host.
    staging: [Option<Tensor>; PARTS],
}

/// One part of a state on the host.
enum Numbers<'a> {
    Low(&'a mut [u16]),
    Wide(&'a mut [f32]),
    Narrow(&'a mut [bf16]),
}

impl State {
    fn numbers(&mut self) -> [Option<Numbers<'_>>; PARTS] {
        match self {
            State::Whole { m, v } => [None, Some(Numbers::Wide(m)), Some(Numbers::Wide(v))],
            State::Split { low, m, v } => [Some(Numbers::Low(low)), Some(Numbers::Wide(m)), Some(Numbers::Wide(v))],
            State::Narrow { m, v } => [None, Some(Numbers::Narrow(m)), Some(Numbers::Narrow(v))],
        }
    }
}

impl Numbers<'_> {
    fn kind(&self) -> Kind {
        match self {
            Numbers::Low(_) => Kind::Int16,
            Numbers::Wide(_) => Kind::Float,
            Numbers::Narrow(_) => Kind::BFloat16,
        }
    }

    fn len(&self) -> usize {
        match self {
            Numbers::Low(x) => x.len(),
            Numbers::Wide(x) => x.len(),
            Numbers::Narrow(x) => x.len(),
        }
    }

    fn write(&self, range: Range<usize>, to: &Tensor) {
        match self {
            Numbers::Low(x) => view::write(&x[range], to),
            Numbers::Wide(x) => view::write(&x[range], to),
            Numbers::Narrow(x) => view::write(&x[range], to),
        }
    }

    fn read(&mut self, range: Range<usize>, from: &Tensor) {
        match self {
            Numbers::Low(x) => view::read(from, &mut x[range]),
            Numbers::Wide(x) => view::read(from, &mut x[range]),
            Numbers::Narrow(x) => view::read(from, &mut x[range]),
        }
    }
}

impl Away {
    /// Copies what `offload` leaves to a device there; an error where it does not fit.
    pub fn of(states: &mut [State], device: Device, offload: Offload) -> Result<Self, TchError> {
        let stays = [offload.leaves_masters(), offload.leaves_moments(), offload.leaves_moments()];
        let most = states.iter().map(|state| state.len().min(PIECE)).max().unwrap_or(0) as i64;
        let (mut lying, mut staging) = (Vec::with_capacity(states.len()), [const { None }; PARTS]);
        for state in states {
            let mut there = [const { None }; PARTS];
            for (part, numbers) in state.numbers().into_iter().enumerate() {
                let Some(numbers) = numbers else { continue };
                if stays[part] {
                    let tensor = Tensor::f_empty([numbers.len() as i64], (numbers.kind(), device))?;
                    numbers.write(0..numbers.len(), &tensor);
                    there[part] = Some(tensor);
                } else if staging[part].is_none() {
                    staging[part] = Some(Tensor::f_empty([most], (numbers.kind(), device))?);
                }
            }
            lying.push(there);
        }
        Ok(Away { lying, staging })
    }

    /// Brings the host's copy up to date.
    pub fn bring_home(&self, states: &mut [State]) {
        for (there, state) in self.lying.iter().zip(states) {
            for (there, numbers) in there.iter().zip(state.numbers()) {
                if let (Some(there), Some(mut numbers)) = (there, numbers) {
                    numbers.read(0..numbers.len(), there);
                }
            }
        }
    }

    /// Applies an update to elements `own` of the own range of `bucket`, whose parameters begin at `at` of theirs, and which
    /// begins at `first` of the bucket.
    pub fn update(
        &self,
        state: &mut State,
        own: &Range<usize>,
        gradient: &Tensor,
        (parameters, at, first): (&Tensor, usize, usize),
        (scalars, noise): (&Scalars, &Noise),
    ) {
        let length = match self.staging.iter().flatten().next() {
            Some(staging) => staging.numel(),
            None => own.len(),
        };
        let mut numbers = state.numbers();
        for begin in own.clone().step_by(length.max(1)) {
            let piece = begin..own.end.min(begin + length);
            let here = |part_of: usize, numbers: &Option<Numbers<'_>>| -> Option<Tensor> {
                let numbers = numbers.as_ref()?;
                if let Some(there) = &self.lying[noise.bucket][part_of] {
                    return Some(part(there, &piece));
                }
                let staged =
                    part(self.staging[part_of].as_ref().expect("made for what does not lie there"), &(0..piece.len()));
                numbers.write(piece.clone(), &staged);
                Some(staged)
            };
            let [low, m, v] = [0, 1, 2].map(|of| here(of, &numbers[of]));
            let (m, v) = (m.expect("every state has moments"), v.expect("every state has moments"));
            let at = at + begin - own.start;
            let span = Span {
                gradient: &part(gradient, &piece),
                parameter: &part(parameters, &(at..at + piece.len())),
                low: low.as_ref(),
                m: &m,
                v: &v,
                first: first + begin - own.start,
            };
            on_device::update(&span, scalars, noise);
            for (of, (numbers, now)) in numbers.iter_mut().zip([low.as_ref(), Some(&m), Some(&v)]).enumerate() {
                if let (Some(numbers), Some(now), None) = (numbers, now, &self.lying[noise.bucket][of]) {
                    numbers.read(piece.clone(), now);
                }
            }
        }
    }
}

/// Sums of squares of each chunk of all `gradients`, one tensor for each bucket, in order, as a state of `form` uses them.
/// Waits for the device once.
pub fn partials(gradients: &[Tensor], form: Form) -> Vec<f64> {
    let of = |gradient: &Tensor| on_device::partials(gradient, form);
    let all: Vec<Tensor> = gradients.iter().map(of).collect();
    Vec::try_from(Tensor::cat(&all, 0)).expect("a vector of fp64")
}

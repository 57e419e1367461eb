//! Masters and moments that live on a device, beside the sums that are added there: an update then moves nothing between
//! device and host. The host's copy is brought up to date where somebody saves it.

use super::adamw::Scalars;
use super::on_device::{self, Span};
use super::state::{Form, State};
use crate::ops::kernels::Kernels;
use crate::ops::view::{elements, part, Element};
use std::ops::Range;
use tch::{Device, Kind, TchError, Tensor};

/// Of each bucket the own range: `[own elements]` each.
#[derive(Debug)]
pub struct Away(Vec<Lying>);

#[derive(Debug)]
struct Lying {
    /// i16: the lower halves of the masters beside bf16 parameters.
    low: Option<Tensor>,
    m: Tensor,
    v: Tensor,
}

impl Away {
    /// Whether there are kernels for states of a form.
    pub fn serves(form: Form) -> bool {
        matches!(form, Form::Whole | Form::Split)
    }

    /// Copies `states` to a device; an error where they do not fit.
    pub fn of(states: &[State], device: Device) -> Result<Self, TchError> {
        let there = |values: Tensor| values.f_to_device_(device, values.kind(), false, true);
        let copy = |state: &State| {
            let (low, m, v) = match state {
                State::Whole { m, v } => (None, m, v),
                State::Split { low, m, v } => {
                    let low: Vec<i16> = low.iter().map(|low| *low as i16).collect();
                    (Some(there(Tensor::f_from_slice(&low)?)?), m, v)
                }
                State::Narrow { .. } => unreachable!("looked at by whoever decides where the state lives"),
            };
            Ok(Lying { low, m: there(Tensor::f_from_slice(m)?)?, v: there(Tensor::f_from_slice(v)?)? })
        };
        states.iter().map(copy).collect::<Result<_, _>>().map(Away)
    }

    /// Brings the host's copy up to date.
    pub fn bring_home(&self, states: &mut [State]) {
        for (Lying { low: low_there, m: m_there, v: v_there }, state) in self.0.iter().zip(states) {
            let (State::Whole { m, v } | State::Split { m, v, .. }) = state else { continue };
            bring(m_there, m);
            bring(v_there, v);
            if let (Some(there), State::Split { low, .. }) = (low_there, state) {
                let mut signed = vec![0i16; low.len()];
                bring(there, &mut signed);
                low.iter_mut().zip(signed).for_each(|(low, signed)| *low = signed as u16);
            }
        }
    }

    /// Applies an update to elements `own` of the own range of `bucket`, whose parameters begin at `at` of theirs.
    pub fn update(
        &self,
        bucket: usize,
        own: &Range<usize>,
        gradient: &Tensor,
        (parameters, at): (&Tensor, usize),
        scalars: &Scalars,
    ) {
        let Lying { low, m, v } = &self.0[bucket];
        let low = low.as_ref().map(|low| part(low, own));
        let span = Span {
            gradient: &part(gradient, own),
            parameter: &part(parameters, &(at..at + own.len())),
            low: low.as_ref(),
            m: &part(m, own),
            v: &part(v, own),
        };
        on_device::update(kernels(gradient), &span, scalars);
    }
}

/// Sums of squares of each chunk of all `gradients`, one tensor for each bucket, in order. Waits for the device once.
pub fn partials(gradients: &[Tensor]) -> Vec<f64> {
    let of = |gradient: &Tensor| on_device::partials(kernels(gradient), gradient);
    let all: Vec<Tensor> = gradients.iter().map(of).collect();
    Vec::try_from(Tensor::cat(&all, 0)).expect("a vector of fp64")
}

fn kernels(beside: &Tensor) -> Kernels {
    Kernels::on(beside).expect("state is on a device only where it has kernels")
}

fn bring<T: Element>(from: &Tensor, to: &mut [T]) {
    let (kind, device) = (from.kind(), Device::Cpu);
    debug_assert!(matches!(kind, Kind::Float | Kind::Int16), "moments and lower halves");
    to.copy_from_slice(elements(&from.to_device_(device, kind, false, false)));
}

//! The own part of a step's gradient, from the sums of its waves to the update.

use super::exact::{self, Exactly, Nearest, Reduced};
use super::state::Form;
use super::{norm, on_device};
use crate::collective::piece;
use crate::ops::view;
use half::bf16;
use std::ops::Range;
use tch::{Kind, Tensor};
use unisono_configs::model::CHUNK;

/// Of one bucket. All forms stand for the same fp32 numbers.
#[derive(Debug)]
pub enum Gradient {
    /// The totals stay where the leaves were added: of the own range, in accumulators of the whole bucket, which are absent
    /// while leaves are still added elsewhere.
    InPlace(Option<Tensor>),
    /// On a device: sums of the waves so far, or rounded from the only wave: `[own elements]`.
    Away(Tensor),
    /// Sums of the waves so far: `[own elements]`.
    Sums(Vec<i64>),
    /// Rounded from the only wave: `[own elements]`.
    Wide(Vec<f32>),
    /// The same where the state is narrow and uses no more of it.
    Narrow(Vec<bf16>),
}

/// The same for reading.
pub enum View<'a> {
    Sums(&'a [i64]),
    Wide(&'a [f32]),
    Narrow(&'a [bf16]),
}

impl Gradient {
    /// Takes the totals of one more wave (the `first` of a step replaces what an earlier step left) from the range `own` of
    /// a bucket's accumulators; gives the accumulators back if they are free for other leaves.
    pub fn take(&mut self, sums: Tensor, own: Range<usize>, first: bool) -> Option<Tensor> {
        match self {
            Gradient::InPlace(place) => {
                *place = Some(sums);
                return None;
            }
            Gradient::Away(kept) => take_away(kept, &view::part(&sums, &own), first),
            Gradient::Sums(so_far) if first => so_far.copy_from_slice(&view::elements(&sums)[own]),
            Gradient::Sums(so_far) => piece::add(so_far, &view::elements(&sums)[own]),
            Gradient::Wide(gradient) => {
                assert!(first, "{ONE_WAVE}");
                exact::round(&view::elements(&sums)[own], gradient);
            }
            Gradient::Narrow(gradient) => {
                assert!(first, "{ONE_WAVE}");
                exact::round_narrow(&view::elements(&sums)[own], gradient);
            }
        }
        Some(sums)
    }

    /// Of the range `own` of the bucket.
    pub fn view(&self, own: Range<usize>) -> View<'_> {
        match self {
            Gradient::InPlace(sums) => {
                let sums = sums.as_ref().expect("looked at once all leaves are in");
                View::Sums(&view::elements(sums)[own])
            }
            Gradient::Away(_) => unreachable!("looked at where it is"),
            Gradient::Sums(sums) => View::Sums(sums),
            Gradient::Wide(gradient) => View::Wide(gradient),
            Gradient::Narrow(gradient) => View::Narrow(gradient),
        }
    }
}

const ONE_WAVE: &str = "what is rounded takes no more waves: the plan counted one";

/// As [`Gradient::take`], of totals on a device.
fn take_away(kept: &mut Tensor, total: &Tensor, first: bool) {
    match kept.kind() {
        _ if total.numel() == 0 => {}
        Kind::Int64 if first => kept.copy_(total),
        Kind::Int64 => on_device::add(kept, total),
        _ => {
            assert!(first, "{ONE_WAVE}");
            on_device::round(total, kept);
        }
    }
}

impl View<'_> {
    /// Sums of squares of all chunks, as a state of `form` uses the gradient.
    pub fn partials(&self, form: Form) -> Vec<f64> {
        fn of<G: Reduced>(gradient: &[G], form: Form) -> Vec<f64> {
            let partial = |chunk| match form {
                Form::Whole | Form::Split => norm::partial(chunk, Exactly),
                Form::Narrow => norm::partial(chunk, Nearest),
            };
            gradient.chunks(CHUNK).map(partial).collect()
        }
        match self {
            View::Sums(sums) => of(sums, form),
            View::Wide(gradient) => of(gradient, form),
            View::Narrow(gradient) => of(gradient, form),
        }
    }
}

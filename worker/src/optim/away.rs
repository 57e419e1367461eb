//! Masters and moments beside sums that are added on a device, which updates them: an update moves nothing between device and
//! host but what was left there for want of room. That comes piece by piece, and goes back. The host's copy of the rest is
//! brought up to date where somebody saves it.

use super::adamw::Scalars;
use super::bus::{Bus, Staging};
use super::noise::Noise;
use super::on_device::{self, Span};
use super::state::{Form, State};
use crate::collective::nccl::stream::Gpu;
use crate::collective::nccl::Problem;
use crate::memory::placement::Offload;
use crate::ops::view::{self, part};
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, TchError, Tensor};

/// Elements of a piece that comes to the device.
pub const PIECE: usize = 16 << 20;

/// What an update needs of a state, in this order: the lower halves of masters, and both moments.
pub const PARTS: usize = 3;

/// How pieces come to the device.
pub struct Route {
    /// Whose driver carries them; without it libtorch does, one after another, while the host waits.
    pub gpu: Option<Gpu>,
    /// Elements of a piece.
    pub piece: usize,
}

impl Route {
    pub fn to(device: Device) -> Self {
        let opened = match device {
            Device::Cuda(index) => Gpu::open(index).map_err(|problem| refused(&problem)).ok(),
            _ => None,
        };
        Route { gpu: opened, piece: PIECE }
    }
}

fn refused(problem: &Problem) {
    tracing::warn!(%problem, "optimizer state on the host comes to the GPU slowly: its memory cannot be locked for it");
}

/// Of each bucket what lies on the device of the own range: `[own elements]` each.
#[derive(Debug)]
pub struct Away {
    /// Before anything that it uses.
    bus: Option<Bus>,
    lying: Vec<[Option<Tensor>; PARTS]>,
    /// Where pieces of the rest come.
    staging: [Staging; 2],
    /// Elements of a piece; all of a range where nothing lies on the host.
    piece: usize,
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

    /// Where it begins, and its bytes.
    fn place(&mut self) -> (*mut u8, usize) {
        match self {
            Numbers::Low(x) => (x.as_mut_ptr().cast(), size_of_val(*x)),
            Numbers::Wide(x) => (x.as_mut_ptr().cast(), size_of_val(*x)),
            Numbers::Narrow(x) => (x.as_mut_ptr().cast(), size_of_val(*x)),
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
    /// Copies what `offload` leaves to a device there; an error where it does not fit. `order`: bucket and elements of its own
    /// range that each update asks for, in that order.
    ///
    /// The states live where they are until this is dropped. Between an update and [`Away::wait`] nobody looks at them.
    pub fn of(
        states: &mut [State],
        order: impl Iterator<Item = (usize, Range<usize>)>,
        (device, route): (Device, Route),
        offload: Offload,
    ) -> Result<Self, TchError> {
        let stays = [offload.leaves_masters(), offload.leaves_moments(), offload.leaves_moments()];
        let most = states.iter().map(|state| state.len().min(route.piece)).max().unwrap_or(0) as i64;
        let (mut lying, mut home) = (Vec::with_capacity(states.len()), Vec::with_capacity(states.len()));
        let mut staging = [const { [const { None }; PARTS] }; 2];
        for state in states {
            let (mut there, mut here) = ([const { None }; PARTS], [None; PARTS]);
            for (part, numbers) in state.numbers().into_iter().enumerate() {
                let Some(mut numbers) = numbers else { continue };
                if stays[part] {
                    let tensor = Tensor::f_empty([numbers.len() as i64], (numbers.kind(), device))?;
                    numbers.write(0..numbers.len(), &tensor);
                    there[part] = Some(tensor);
                    continue;
                }
                here[part] = Some(numbers.place());
                for staging in &mut staging {
                    if staging[part].is_none() {
                        staging[part] = Some(Tensor::f_empty([most], (numbers.kind(), device))?);
                    }
                }
            }
            lying.push(there);
            home.push(here);
        }
        let leaves = staging[0].iter().any(Option::is_some);
        let piece = if leaves { route.piece } else { usize::MAX };
        let bus = route.gpu.filter(|_| leaves).and_then(|gpu| {
            let pieces = order.flat_map(|(bucket, own)| pieces(own, piece).map(move |piece| (bucket, piece))).collect();
            let sets = [0, 1].map(|set| [0, 1, 2].map(|part| staging[set][part].as_ref().map(Tensor::shallow_clone)));
            Bus::new(gpu, pieces, sets, home).map_err(|problem| refused(&problem)).ok()
        });
        Ok(Away { bus, lying, staging, piece })
    }

    /// Waits until what updates send back to the host is there.
    pub fn wait(&self) {
        if let Some(bus) = &self.bus {
            carried(bus.wait());
        }
    }

    /// Brings the host's copy up to date.
    pub fn bring_home(&self, states: &mut [State]) {
        self.wait();
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
        &mut self,
        state: &mut State,
        own: &Range<usize>,
        gradient: &Tensor,
        (parameters, at, first): (&Tensor, usize, usize),
        (scalars, noise): (&Scalars, &Noise),
    ) {
        let mut numbers = state.numbers();
        for piece in pieces(own.clone(), self.piece) {
            let come = self.bus.as_mut().map(|bus| carried(bus.come(noise.bucket, &piece, noise.step)));
            let staging = &self.staging[come.map_or(0, |come| come.staging)];
            let lying = &self.lying[noise.bucket];
            let here = |part_of: usize, numbers: &Option<Numbers<'_>>| -> Option<Tensor> {
                let numbers = numbers.as_ref()?;
                if let Some(there) = &lying[part_of] {
                    return Some(part(there, &piece));
                }
                let staged =
                    part(staging[part_of].as_ref().expect("made for what does not lie there"), &(0..piece.len()));
                if come.is_none() {
                    numbers.write(piece.clone(), &staged);
                }
                Some(staged)
            };
            let [low, m, v] = [0, 1, 2].map(|of| here(of, &numbers[of]));
            let (m, v) = (m.expect("every state has moments"), v.expect("every state has moments"));
            let skipped = piece.start - own.start;
            let at = at + skipped;
            let span = Span {
                gradient: &part(gradient, &piece),
                parameter: &part(parameters, &(at..at + piece.len())),
                low: low.as_ref(),
                m: &m,
                v: &v,
                first: first + skipped,
            };
            on_device::update(&span, scalars, noise);
            if let (Some(bus), Some(come)) = (&mut self.bus, come) {
                carried(bus.leave(come));
                continue;
            }
            for (of, (numbers, now)) in numbers.iter_mut().zip([low.as_ref(), Some(&m), Some(&v)]).enumerate() {
                if let (Some(numbers), Some(now), None) = (numbers, now, &lying[of]) {
                    numbers.read(piece.clone(), now);
                }
            }
        }
    }
}

fn pieces(own: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let length = length.max(1);
    own.clone().step_by(length).map(move |begin| begin..own.end.min(begin.saturating_add(length)))
}

/// # Panics
/// If the device refuses what it took before: nothing that was asked of it since can be trusted then.
fn carried<T>(outcome: Result<T, Problem>) -> T {
    outcome.unwrap_or_else(|problem| panic!("state cannot come and go between host and GPU: {problem}"))
}

/// Sums of squares of each chunk of all `gradients`, one tensor for each bucket, in order, as a state of `form` uses them.
/// Waits for the device once.
pub fn partials(gradients: &[Tensor], form: Form) -> Vec<f64> {
    let of = |gradient: &Tensor| on_device::partials(gradient, form);
    let all: Vec<Tensor> = gradients.iter().map(of).collect();
    Vec::try_from(Tensor::cat(&all, 0)).expect("a vector of fp64")
}

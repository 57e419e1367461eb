//! From leaves to the own part of the gradient: accumulators, and their way to the owners behind computing.
//!
//! With accumulators for the whole model ([`Stage::One`]) leaves of all waves are added where they are, and a bucket
//! travels once in a step. Else accumulators are lent to the few buckets that the backward pass is at, a bucket travels
//! after every wave, and its owner alone keeps what comes of it. Integer sums make that the same number.

use super::away;
use super::exact::{self, ExactSum};
use super::gradient::Gradient;
use super::lending::{self, Kind};
use super::norm;
use super::shard::Shard;
use super::state::{resident, Form};
use super::trial::Trial;
use crate::collective::courier::{Courier, Ticket};
use crate::collective::{self, Collective};
use crate::model::{BadNumber, Leaves};
use crate::ops::view;
use crate::trace::{self, Track};
use half::bf16;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind as Element, TchError, Tensor};
use unisono_configs::model::Layout;

/// What is sharded beside the optimizer's state (Rajbhandari et al. 2020). No stage changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing.
    One = 1,
    /// Gradients.
    Two = 2,
    /// Gradients and parameters.
    Three = 3,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::One => "ZeRO-1",
            Stage::Two => "ZeRO-2",
            Stage::Three => "ZeRO-3",
        })
    }
}

/// How a step's leaves are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adding {
    pub stage: Stage,
    /// The most leaves that any element receives in a step, over all ranks.
    pub leaves: usize,
    /// Every step has one wave: no sums are kept between waves.
    pub one_wave: bool,
    /// On a device: nothing of it is on the host, and nothing is added before [`Reduction::move_to`].
    pub away: bool,
}

impl Adding {
    /// In accumulators of the whole model.
    pub fn in_place(leaves: usize) -> Self {
        Adding { stage: Stage::One, leaves, one_wave: false, away: false }
    }
}

/// Where in a step a wave is.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    pub first: bool,
    pub last: bool,
}

impl Turn {
    pub const ONLY: Turn = Turn { first: true, last: true };
}

/// What comes back from a bucket's journey.
#[derive(Debug)]
struct Reduced {
    gradient: Gradient,
    /// Accumulators that are free again.
    free: Option<Tensor>,
    partials: Vec<f64>,
    /// Totals on a device, which the thread that computes there has yet to take.
    total: Option<Total>,
}

#[derive(Debug)]
struct Total {
    sums: Tensor,
    own: Range<usize>,
    first: bool,
}

#[derive(Debug)]
pub struct Reduction {
    layout: Arc<Layout>,
    shard: Arc<Shard>,
    form: Form,
    adding: Adding,
    sums: ExactSum,
    /// Accumulators that nobody has borrowed.
    free: Vec<(Kind, Tensor)>,
    /// Of each bucket; absent while it travels.
    gradients: Vec<Option<Gradient>>,
    /// Buckets on their way, in order.
    travelling: VecDeque<(usize, Ticket<Reduced>)>,
    /// Of each bucket of this step: sums of squares of the own chunks.
    partials: Vec<Vec<f64>>,
}

impl Reduction {
    pub fn new(layout: Arc<Layout>, shard: Arc<Shard>, form: Form, adding: Adding) -> Self {
        let Adding { stage, leaves, one_wave, away } = adding;
        let own = |bucket| shard.own(bucket).len();
        let gradient = |bucket| match stage {
            Stage::One => Gradient::InPlace(None),
            _ if away => Gradient::Away(Tensor::new()),
            _ if !one_wave => Gradient::Sums(resident(own(bucket), 1, 0)),
            _ if form == Form::Narrow => Gradient::Narrow(resident(own(bucket), bf16::ONE, bf16::ZERO)),
            _ => Gradient::Wide(resident(own(bucket), 1.0, 0.0)),
        };
        let gradients = (0..shard.buckets()).map(|bucket| Some(gradient(bucket))).collect();
        let (sums, free) = match stage {
            _ if away => (ExactSum::closed(layout.clone(), leaves), Vec::new()),
            Stage::One => (ExactSum::new(layout.clone(), leaves), Vec::new()),
            Stage::Two | Stage::Three => {
                let lots = lending::lots(&layout, lending::accumulators(shard.world)).into_iter();
                let free = lots.map(|(kind, elements)| (kind, exact::memory(elements))).collect();
                (ExactSum::closed(layout.clone(), leaves), free)
            }
        };
        let partials = vec![Vec::new(); shard.buckets()];
        Reduction { layout, shard, form, adding, sums, free, gradients, travelling: VecDeque::new(), partials }
    }

    /// Takes what is added away its memory on `device`; an error where that does not fit. No bit depends on it.
    pub fn move_to(&mut self, device: Device) -> Result<(), TchError> {
        assert!(self.adding.away, "made to be away");
        self.sums.move_to(device, self.adding.leaves)?;
        let memory = |elements: usize, kind| Tensor::f_zeros([elements as i64], (kind, device));
        for (bucket, gradient) in self.gradients.iter_mut().enumerate() {
            match gradient {
                Some(Gradient::Away(kept)) => {
                    let kind = match (self.adding.one_wave, self.form) {
                        (false, _) => Element::Int64,
                        (true, Form::Narrow) => Element::BFloat16,
                        (true, _) => Element::Float,
                    };
                    *kept = memory(self.shard.own(bucket).len(), kind)?;
                }
                _ => self.sums.open(bucket, memory(self.layout.buckets[bucket].elements, Element::Int64)?),
            }
        }
        if self.adding.stage != Stage::One {
            for (kind, elements) in lending::lots(&self.layout, lending::accumulators(self.shard.world)) {
                self.free.push((kind, memory(elements, Element::Int64)?));
            }
        }
        Ok(())
    }

    /// The first wave of a step begins.
    pub fn begin(&mut self) {
        self.sums.begin();
    }

    /// All leaves of a wave of so many micro-batches have come.
    pub fn end_wave(&mut self, micro_batches: usize) {
        self.sums.end_wave(micro_batches);
    }

    /// Whether all leaves so far could be added; else whose could not, of the step's micro-batches.
    pub fn check(&self) -> Result<(), (usize, BadNumber)> {
        self.sums.check()
    }

    /// Judges leaves as this would, and adds none.
    pub fn trial(&self) -> Trial {
        Trial::new(self.layout.clone(), self.sums.bound())
    }

    pub fn stage(&self) -> Stage {
        self.adding.stage
    }

    /// Leaves for `bucket` may come.
    pub fn open(&mut self, bucket: usize) -> Result<(), collective::Error> {
        if self.sums.is_open(bucket) {
            return Ok(());
        }
        let kind = lending::kind(&self.layout, bucket);
        loop {
            if let Some(lot) = self.free.iter().position(|(k, _)| *k == kind) {
                self.sums.open(bucket, self.free.swap_remove(lot).1);
                return Ok(());
            }
            self.receive()?;
        }
    }

    /// No leaf of this wave comes to `bucket` any more: off it goes, unless more waves are added to it here.
    pub fn finish(&mut self, bucket: usize, turn: Turn, courier: &mut Courier) {
        if self.adding.stage == Stage::One && !turn.last {
            return;
        }
        let sums = self.sums.close(bucket).expect("opened before it is finished");
        let mut gradient = self.gradients[bucket].take().expect("one journey at a time");
        let (shard, form, elements) = (self.shard.clone(), self.form, self.layout.buckets[bucket].elements);
        let name = self.layout.buckets[bucket].name.clone();
        let away = self.adding.away;
        let ticket = courier.send(move |collective: &mut dyn Collective| {
            let _reducing = trace::span(Track::Communication, || format!("reduce {name}"));
            let own = shard.own(bucket);
            collective.reduce(&mut sums.narrow(0, 0, elements as i64), shard.owners(bucket))?;
            if away {
                let total = Some(Total { sums, own, first: turn.first });
                return Ok(Reduced { gradient, free: None, partials: Vec::new(), total });
            }
            let free = gradient.take(sums, own.clone(), turn.first);
            let partials = if turn.last { gradient.view(own).partials(form) } else { Vec::new() };
            Ok(Reduced { gradient, free, partials, total: None })
        });
        self.travelling.push_back((bucket, ticket));
    }

    /// Waits for the bucket that left first.
    fn receive(&mut self) -> Result<(), collective::Error> {
        let (bucket, ticket) = self.travelling.pop_front().expect("what is not free is on its way");
        let Reduced { mut gradient, mut free, partials, total } = ticket.wait()?;
        if let Some(Total { sums, own, first }) = total {
            free = gradient.take(sums, own, first);
        }
        self.gradients[bucket] = Some(gradient);
        self.partials[bucket] = partials;
        self.free.extend(free.map(|memory| (lending::kind(&self.layout, bucket), memory)));
        Ok(())
    }

    /// Waits for all buckets. Then the norm of the whole gradient: the same bits on every rank, whatever their number.
    pub fn norm(&mut self, courier: &mut Courier) -> Result<f64, collective::Error> {
        while !self.travelling.is_empty() {
            self.receive()?;
        }
        let partials = match self.adding.away {
            true => {
                let gradients: Vec<Tensor> = (0..self.gradients.len()).map(|bucket| self.away(bucket)).collect();
                away::partials(&gradients, self.form)
            }
            false => self.partials.concat(),
        };
        let mine: Vec<u8> = partials.iter().flat_map(|partial| partial.to_le_bytes()).collect();
        let all = courier.send(move |collective: &mut dyn Collective| collective.all_gather_bytes(&mine)).wait()?;
        let partials = norm::in_order(&all, &self.shard).map_err(|peer| collective::Error::Protocol {
            peer,
            operation: "exchange",
            expected: "the sums of squares of its chunks".into(),
            found: format!("{} bytes", all[peer].len()),
        })?;
        Ok(norm::norm(partials.into_iter()))
    }

    /// Waits for all buckets and forgets the step.
    pub fn abandon(&mut self) -> Result<(), collective::Error> {
        while !self.travelling.is_empty() {
            self.receive()?;
        }
        (0..self.gradients.len()).for_each(|bucket| self.forget(bucket));
        Ok(())
    }

    /// The own part of `bucket`'s gradient, after [`Reduction::norm`].
    pub fn gradient(&self, bucket: usize) -> super::gradient::View<'_> {
        self.gradients[bucket].as_ref().expect("it has arrived").view(self.shard.own(bucket))
    }

    /// The same where it is on a device: sums or rounded from them, `[own elements]`.
    pub fn away(&self, bucket: usize) -> Tensor {
        let own = self.shard.own(bucket);
        match &self.gradients[bucket] {
            Some(Gradient::Away(gradient)) => gradient.shallow_clone(),
            Some(Gradient::InPlace(Some(sums))) => view::part(sums, &own),
            _ => unreachable!("looked at once all leaves are in"),
        }
    }

    /// The gradient of `bucket` is of no more use.
    pub fn forget(&mut self, bucket: usize) {
        if let Some(Gradient::InPlace(place)) = &mut self.gradients[bucket] {
            if let Some(memory) = place.take() {
                self.sums.open(bucket, memory);
            }
        }
    }
}

impl Leaves for Reduction {
    fn come_from(&mut self, micro_batches: &[usize]) {
        self.sums.come_from(micro_batches);
    }

    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        self.sums.dense(bucket, offset, gradient)
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        self.sums.rows(bucket, offset, rows, gradient)
    }

    fn together(&mut self, bucket: usize, offset: usize, gradients: &[&Tensor]) -> Result<(), (usize, BadNumber)> {
        self.sums.together(bucket, offset, gradients)
    }
}

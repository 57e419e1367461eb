//! One worker's part of a step, without the wire to the coordinator: waves of micro-batches through the model, their leaves
//! to the owners of the gradient, the update, and parameters to where they are needed next. What can travel while others
//! compute does.

use crate::collective::courier::Courier;
use crate::collective::tcp::Stopper;
use crate::collective::{self, Collective};
use crate::model::{self, BadNumber, Batch, Fault, Loss, Model, Nowhere, Owed, Station, Wave};
use crate::optim::reduction::Turn;
use crate::optim::shard::Shard;
use crate::optim::Optimizer;
use crate::supply::{self, Supply};
use crate::trace::{self, Track};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tch::Tensor;

/// Why a wave or an update was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Collective(#[from] collective::Error),
    #[error(transparent)]
    Supply(#[from] supply::Error),
    #[error("micro-batch {index} of the wave: {source}", index = .0.index, source = .0.source)]
    Micro(Fault),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Micro(fault)
    }
}

pub struct Engine {
    pub model: Model,
    /// Absent in a run without steps.
    pub optimizer: Option<Optimizer>,
    courier: Courier,
    supply: Supply,
    waited: f64,
}

impl Engine {
    pub fn new(model: Model, optimizer: Option<Optimizer>, courier: Courier) -> Self {
        let shard = match &optimizer {
            Some(optimizer) => optimizer.shard().clone(),
            None => Arc::new(Shard::new(model.layout(), courier.rank(), courier.world())),
        };
        let supply = Supply::new(&model, shard);
        Engine { model, optimizer, courier, supply, waited: 0.0 }
    }

    pub fn rank(&self) -> usize {
        self.courier.rank()
    }

    /// Whether all ranks must take the same number of waves, in training and in evaluation.
    pub fn is_in_step(&self) -> bool {
        self.model.is_sharded()
    }

    /// Adds one wave's leaves to the step's gradient. All ranks take the same number of waves, empty ones too. What a device
    /// computes is not waited for: see [`Engine::judge`].
    pub fn add(&mut self, batches: Vec<Batch>, turn: Turn, scale: f64) -> Result<Vec<Owed>, Error> {
        let count = batches.len();
        let wave = self.model.wave(batches)?;
        if let (true, Some(optimizer)) = (turn.first, &mut self.optimizer) {
            optimizer.reduction.begin();
        }
        let wave = self.travel(wave, true, turn, scale)?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.reduction.end_wave(count);
        }
        Ok(wave.losses().collect())
    }

    /// Whether all leaves of this step's waves could be added, of which none reaches an update before; an error counts the
    /// micro-batches of all of them. On the host that was known as they came.
    pub fn judge(&self) -> Result<(), Error> {
        let Some(optimizer) = &self.optimizer else { return Ok(()) };
        Ok(optimizer.reduction.check().map_err(|(index, bad)| Fault { index, source: bad.into() })?)
    }

    /// Loss and first choices. Where parameters are sharded, all ranks take the same number of waves.
    pub fn evaluate(&mut self, batches: Vec<Batch>) -> Result<Vec<Loss>, Error> {
        let wave = self.model.wave(batches)?;
        Ok(self.travel(wave, false, Turn::ONLY, 1.0)?.losses().map(Owed::read).collect())
    }

    fn travel(&mut self, mut wave: Wave, trains: bool, turn: Turn, scale: f64) -> Result<Wave, Error> {
        let Engine { model, optimizer, courier, supply, waited } = self;
        let (way, layout) = (model.way(trains), model.layout().clone());
        let needs: Vec<_> = way.iter().map(|&station| model.needs(station)).collect();
        for (i, &station) in way.iter().enumerate() {
            let next = needs.get(i + 1).map_or(&[][..], Vec::as_slice);
            let (what, bucket) = match station {
                Station::Forward(bucket) => ("forward", bucket),
                Station::Backward(bucket) => ("backward", bucket),
                Station::Evaluate(bucket) => ("evaluate", bucket),
            };
            let named = || format!("{what} {}", layout.buckets[bucket].name);
            // Whoever waits for this worker should not wait for a wave that comes to nothing.
            courier.check()?;
            let begun = Instant::now();
            let waiting = trace::span(Track::Compute, || format!("wait for {}", named()));
            supply.reach(&needs[i], next, model, courier)?;
            if let (Station::Backward(bucket), Some(optimizer)) = (station, optimizer.as_mut()) {
                optimizer.reduction.open(bucket)?;
                needs[i].iter().try_for_each(|&bucket| optimizer.reduction.open(bucket))?;
            }
            drop(waiting);
            *waited += begun.elapsed().as_secs_f64();
            let _computing = trace::span(Track::Compute, named);
            match (station, optimizer.as_mut().map(|o| &mut o.reduction)) {
                (Station::Backward(bucket), Some(reduction)) => {
                    wave.pass(model, station, scale, reduction)?;
                    reduction.finish(bucket, turn, courier);
                }
                _ => wave.pass(model, station, scale, &mut Nowhere)?,
            }
        }
        Ok(wave)
    }

    /// Whether a micro-batch alone gives a bad number; nothing is added up. All ranks probe together, who has none left
    /// without one: parameters come to all alike.
    pub fn probe(&mut self, batch: Option<Batch>, scale: f64) -> Result<Option<BadNumber>, Error> {
        let Engine { model, optimizer, courier, supply, .. } = self;
        let mut wave = model.wave(batch.into_iter().collect())?;
        let (mut trial, mut bad) =
            (optimizer.as_ref().expect("a run with steps has an optimizer").reduction.trial(), None);
        let way = model.way(true);
        let needs: Vec<_> = way.iter().map(|&station| model.needs(station)).collect();
        for (i, &station) in way.iter().enumerate() {
            courier.check()?;
            let next = needs.get(i + 1).map_or(&[][..], Vec::as_slice);
            supply.reach(&needs[i], next, model, courier)?;
            match wave.pass(model, station, scale, &mut trial) {
                Err(Fault { source: model::Error::BadNumber(number), .. }) => {
                    // The others go on, and need this rank's parameters.
                    (bad, wave) = (Some(number), model.wave(Vec::new())?);
                }
                passed => passed?,
            }
        }
        let lost = || BadNumber { bucket: "loss".into(), value: f64::NAN };
        Ok(bad.or_else(|| wave.losses().any(|loss| !loss.read().sum.is_finite()).then(lost)))
    }

    /// The norm of the step's gradient, once every rank has added its waves.
    pub fn norm(&mut self) -> Result<f64, Error> {
        let _waiting = trace::span(Track::Compute, || "wait for the norm".into());
        let reduction = self.optimizer.as_mut().map(|o| &mut o.reduction);
        Ok(reduction.expect("a run with steps has an optimizer").norm(&mut self.courier)?)
    }

    /// Applies update number `step` (from 1) to the own shard, bucket by bucket as the next forward pass needs them, and sends
    /// them on their way.
    pub fn update(&mut self, step: u64, learning_rate: f64, norm: f64) {
        let Engine { model, optimizer, courier, supply, .. } = self;
        let optimizer = optimizer.as_mut().expect("a run with steps has an optimizer");
        let update = optimizer.plan(step, learning_rate, norm);
        for bucket in 0..optimizer.shard().buckets() {
            let _updating = trace::span(Track::Compute, || format!("update {}", model.layout().buckets[bucket].name));
            optimizer.update(bucket, &update, model);
            supply.spread(bucket, model, courier);
        }
    }

    /// Sends every rank's own part of all parameters to all, where all keep them.
    pub fn spread(&mut self) {
        let Engine { model, courier, supply, .. } = self;
        (0..model.layout().buckets.len()).for_each(|bucket| supply.spread(bucket, model, courier));
    }

    /// Waits until all parameters that are on their way are there; what lives on a device is on the host too then.
    pub fn settle(&mut self) -> Result<(), Error> {
        self.supply.settle(&mut self.model)?;
        self.model.bring_home();
        self.optimizer.iter_mut().for_each(Optimizer::bring_home);
        Ok(())
    }

    /// Brings the whole model here; returns what came, for [`Engine::disassemble`].
    pub fn assemble(&mut self) -> Result<Vec<usize>, Error> {
        let came = self.supply.reach_all(&mut self.model, &mut self.courier)?;
        self.model.bring_home();
        Ok(came)
    }

    /// Gives the memory of what came back.
    pub fn disassemble(&mut self, came: Vec<usize>) {
        self.supply.leave(came, &mut self.model);
    }

    /// Seconds for which computing waited for others since the last call, the norm's exchange apart.
    pub fn take_waited(&mut self) -> f64 {
        std::mem::take(&mut self.waited)
    }

    /// Goes through a wave alone, as if all other ranks had done their part, and forgets its gradient.
    pub fn rehearse(&mut self, batches: Vec<Batch>, trains: bool, scale: f64) -> Result<(), Error> {
        let alone = Alone { rank: self.courier.rank(), world: self.courier.world() };
        let real = std::mem::replace(&mut self.courier, Courier::new(Box::new(alone), &Stopper::default()));
        match trains {
            true => {
                self.add(batches, Turn::ONLY, scale)?.into_iter().map(Owed::read).for_each(drop);
                self.judge()?;
            }
            false => drop(self.evaluate(batches)?),
        }
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.reduction.abandon()?;
        }
        self.supply.reach(&[], &[], &mut self.model, &mut self.courier)?;
        self.courier = real;
        Ok(())
    }
}

/// A rank of a world whose others are not there.
struct Alone {
    rank: usize,
    world: usize,
}

impl Collective for Alone {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world(&self) -> usize {
        self.world
    }
    fn reduce_scatter(&mut self, _: &mut [i64], _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn all_gather(&mut self, _: &mut Tensor, _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn reduce(&mut self, _: &mut Tensor, _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn gather(&mut self, _: &mut Tensor, _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, collective::Error> {
        Ok(vec![mine.to_vec(); self.world])
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;

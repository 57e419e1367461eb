//! What a worker does on a directive: above all one optimizer step, top to bottom.

use crate::checkpoint::saver::{BadState, Saver};
use crate::collective;
use crate::device;
use crate::engine::{self, Engine};
use crate::link::{self, Link};
use crate::memory;
use crate::model::{self, Batch, Fault, Loss};
use crate::optim::reduction::Turn;
use crate::optim::Optimizer;
use crate::snapshot::keeper::Keeper;
use crate::supply;
use crate::trace::{self, Track};
use std::time::Instant;
use unisono_proto::v1::{
    BatchKey, Checkpoint, CheckpointCopied, Continuation, Evaluate, EvaluateReport, Generate, GenerateReport,
    GpuMemory, LossPart, MemoryReport, Phase, Step, StepReport, StepSeconds,
};
use unisono_proto::{fail_point, put_u32s};

/// Why a directive cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Link(#[from] link::Error),
    #[error(transparent)]
    Collective(#[from] collective::Error),
    #[error("micro-batch {micro_batch}: {source}")]
    Model { micro_batch: u32, source: model::Error },
    #[error(
        "micro-batch {micro_batch}: the loss is {loss}: lower train.learning_rate, or look at the rows of this step"
    )]
    BadLoss { micro_batch: u32, loss: f64 },
    #[error("the gradient norm is {norm}: lower train.learning_rate, or look at the rows of this step")]
    BadNorm { norm: f64 },
    #[error("the updated parameters cannot be copied to the GPU: {source}")]
    Publish { source: model::Error },
    #[error(transparent)]
    BadState(#[from] BadState),
    #[error("the coordinator asked for a checkpoint after step {asked}, and the state here is that after step {here}: coordinator and worker must be of the same build")]
    OtherState { asked: u64, here: u64 },
    #[error("this run keeps no optimizer state, and the coordinator asked for {0}")]
    NoOptimizer(&'static str),
}

impl Error {
    /// The micro-batch that gave a bad number.
    pub fn micro_batch(&self) -> Option<u32> {
        match self {
            Error::BadLoss { micro_batch, .. } | Error::Model { micro_batch, source: model::Error::BadNumber(_) } => {
                Some(*micro_batch)
            }
            _ => None,
        }
    }
}

impl Error {
    /// The error of a wave of these micro-batches.
    pub(crate) fn of(error: engine::Error, keys: &[BatchKey]) -> Self {
        match error {
            engine::Error::Collective(error) | engine::Error::Supply(supply::Error::Collective(error)) => error.into(),
            engine::Error::Supply(supply::Error::Publish(source)) => Error::Publish { source },
            engine::Error::Micro(Fault { index, source }) => {
                Error::Model { micro_batch: keys.get(index).map_or(0, |key| key.micro_batch), source }
            }
        }
    }
}

/// Everything that a worker trains with.
pub struct Trainer<'l> {
    pub link: &'l Link,
    pub engine: Engine,
    /// There where the optimizer is.
    pub saver: Option<Saver>,
    /// There where snapshots are kept.
    pub snapshots: Option<Keeper>,
    /// Micro-batches that go through the model together.
    pub wave: usize,
    pub planned_bytes: u64,
    /// Of the GPU, where there is one.
    pub gpu_planned_bytes: u64,
    /// The step after which the state here is.
    pub here: u64,
}

impl Trainer<'_> {
    /// One optimizer update over one global batch, of which this rank computes the micro-batches `keys`.
    pub fn step(&mut self, step: &Step, keys: &[BatchKey]) -> Result<StepReport, Error> {
        let link = self.link;
        let mut seconds = StepSeconds::default();
        let mut clock = Clock::start();
        // What an evaluation waited for is not this step's.
        self.engine.take_waited();

        link.progress().enter(Phase::Forward);
        let scale = 1.0 / step.target_tokens as f64;
        let (mut parts, mut owed) = (Vec::with_capacity(keys.len()), Vec::new());
        for (turn, of_wave) in self.waves(keys, step.passes) {
            let waiting = trace::span(Track::Compute, || "wait for data".into());
            let batches = self.batches(of_wave)?;
            drop(waiting);
            seconds.data += clock.lap();
            let losses = self.engine.add(batches, turn, scale).map_err(|error| Error::of(error, of_wave))?;
            owed.extend(of_wave.iter().zip(losses));
            if turn.last {
                self.engine.judge().map_err(|error| Error::of(error, keys))?;
            }
            // A device goes on with the next wave, and is waited for once.
            if turn.last || owed.iter().all(|(_, loss)| loss.is_known()) {
                for (key, loss) in owed.drain(..) {
                    parts.push(part(key, loss.read())?);
                }
            }
            seconds.compute += clock.lap();
        }

        link.progress().enter(Phase::Reduce);
        let norm = self.engine.norm().map_err(|error| Error::of(error, keys))?;
        if !norm.is_finite() {
            return Err(Error::BadNorm { norm });
        }
        seconds.reduce = clock.lap();

        link.progress().enter(Phase::Update);
        self.engine.update(step.step, step.learning_rate, norm);
        self.here = step.step;
        seconds.update = clock.lap();
        // Parameters go on travelling while the report does, and while others compute.
        link.progress().enter(Phase::Gather);
        let waited = self.engine.take_waited();
        seconds.compute -= waited;
        seconds.gather = waited;

        if let Some(keeper) = self.snapshots.as_mut().filter(|keeper| keeper.is_due(step.step)) {
            // The parameters hold the masters, or their upper halves.
            self.engine.settle().map_err(|error| Error::of(error, keys))?;
            // Without a timeline it would be nobody's.
            if let (Some(optimizer), Ok(timeline)) = (&self.engine.optimizer, step.timeline[..].try_into()) {
                keeper.take(step.step, timeline, &optimizer.source(&self.engine.model));
            }
            seconds.snapshot = clock.lap();
        }

        trace::end_step(self.engine.rank(), step.step);
        let activation_bytes = self.engine.model.activation_bytes();
        tracing::debug!(step = step.step, ?seconds, activation_bytes, "carried out");
        let memory = Some(self.memory());
        Ok(StepReport { step: step.step, parts, grad_norm: norm, seconds: Some(seconds), memory, bad: Vec::new() })
    }

    /// Which of the micro-batches `keys` of a step give bad numbers. Nothing is added up or changed.
    pub fn probe(&mut self, step: &Step, keys: &[BatchKey]) -> Result<StepReport, Error> {
        self.link.progress().enter(Phase::Forward);
        let scale = 1.0 / step.target_tokens as f64;
        let mut bad = Vec::new();
        for turn in 0..keys.len().max(step.passes as usize) {
            fail_point::reached("probe");
            let key = keys.get(turn);
            let batch = key.map(|key| self.link.batch(key)).transpose()?;
            let found = self.engine.probe(batch, scale).map_err(|error| Error::of(error, keys))?;
            if let (Some(key), Some(number)) = (key, found) {
                tracing::info!(step = step.step, key.micro_batch, %number, "bad");
                bad.push(key.micro_batch);
            }
        }
        Ok(StepReport { step: step.step, bad, ..StepReport::default() })
    }

    /// The own micro-batches in waves, as many as the rank with most has.
    fn waves<'k>(&self, keys: &'k [BatchKey], passes: u32) -> impl Iterator<Item = (Turn, &'k [BatchKey])> + 'k {
        let (wave, count) = (self.wave, (passes as usize).max(keys.len()).div_ceil(self.wave).max(1));
        (0..count).map(move |i| {
            let turn = Turn { first: i == 0, last: i + 1 == count };
            (turn, &keys[(i * wave).min(keys.len())..((i + 1) * wave).min(keys.len())])
        })
    }

    fn batches(&self, keys: &[BatchKey]) -> Result<Vec<Batch>, Error> {
        Ok(keys.iter().map(|key| self.link.batch(key)).collect::<Result<_, _>>()?)
    }

    /// Loss and accuracy of fixed units of work. Where parameters come bucket by bucket, all ranks go together.
    pub fn evaluate(&mut self, evaluate: &Evaluate, id: u64, keys: &[BatchKey]) -> Result<EvaluateReport, Error> {
        self.link.progress().enter(Phase::Evaluate);
        let (wave, passes) = if self.engine.is_in_step() { (self.wave, evaluate.passes) } else { (1, 0) };
        let mut parts = Vec::with_capacity(keys.len());
        for first in (0..keys.len().max(passes as usize)).step_by(wave) {
            let keys = &keys[first.min(keys.len())..(first + wave).min(keys.len())];
            let losses = self.engine.evaluate(self.batches(keys)?).map_err(|error| Error::of(error, keys))?;
            for (key, loss) in keys.iter().zip(losses) {
                parts.push(part(key, loss)?);
            }
        }
        Ok(EvaluateReport { id, parts })
    }

    /// Greedy continuations of the prompts of the micro-batches `keys`.
    pub fn generate(&mut self, id: u64, generate: &Generate, keys: &[BatchKey]) -> Result<GenerateReport, Error> {
        self.link.progress().enter(Phase::Generate);
        let came = self.engine.assemble().map_err(|error| Error::of(error, keys))?;
        let mut continuations = Vec::new();
        for key in keys {
            let batch = self.link.batch(key)?;
            let ends = batch.starts.iter().skip(1).copied().chain([batch.tokens.len() as u32]);
            let prompts: Vec<Vec<u32>> = batch
                .starts
                .iter()
                .zip(ends)
                .map(|(&begin, end)| batch.tokens[begin as usize..end as usize].to_vec())
                .collect();
            let most = generate.max_new_tokens as usize;
            let answers = self.engine.model.generate(&prompts, most, &generate.end_tokens).map_err(at(key))?;
            for (document, (ids, ended)) in (0u32..).zip(answers) {
                let mut tokens = Vec::with_capacity(4 * ids.len());
                put_u32s(&mut tokens, &ids);
                let micro_batch = key.micro_batch;
                continuations.push(Continuation { micro_batch, document, tokens: tokens.into(), ended });
            }
        }
        self.engine.disassemble(came);
        Ok(GenerateReport { id, continuations })
    }

    /// Copies the own shard at a barrier; it is written behind training.
    pub fn checkpoint(&mut self, checkpoint: Checkpoint) -> Result<CheckpointCopied, Error> {
        self.link.progress().enter(Phase::Checkpoint);
        // The parameters hold the masters, or their upper halves.
        self.engine.settle().map_err(|error| Error::of(error, &[]))?;
        let (Some(optimizer), Some(saver)) = (&self.engine.optimizer, &mut self.saver) else {
            return Err(Error::NoOptimizer("a checkpoint"));
        };
        let (step, attempt, here) = (checkpoint.step, checkpoint.attempt, self.here);
        // Under another step's name it would be loaded one day.
        if step != here {
            return Err(Error::OtherState { asked: step, here });
        }
        saver.save(&optimizer.source(&self.engine.model), checkpoint)?;
        Ok(CheckpointCopied { step, attempt })
    }

    /// Everything that was to be written is.
    pub fn finish(&mut self) {
        self.link.progress().enter(Phase::Drain);
        if let Some(saver) = &mut self.saver {
            saver.finish();
        }
    }

    pub fn memory(&self) -> MemoryReport {
        MemoryReport {
            planned_bytes: self.planned_bytes,
            peak_bytes: memory::peak(),
            optimizer_bytes: self.engine.optimizer.as_ref().map_or(0, Optimizer::bytes),
            zero_stage: self.engine.optimizer.as_ref().map_or(1, |o| o.reduction.stage() as u32),
            wave: self.wave as u32,
            gpu: device::taken(self.engine.model.device())
                .map(|peak_bytes| GpuMemory { planned_bytes: self.gpu_planned_bytes, peak_bytes }),
        }
    }
}

fn at(key: &BatchKey) -> impl FnOnce(model::Error) -> Error {
    let micro_batch = key.micro_batch;
    move |source| Error::Model { micro_batch, source }
}

fn part(key: &BatchKey, loss: Loss) -> Result<LossPart, Error> {
    let micro_batch = key.micro_batch;
    if !loss.sum.is_finite() {
        return Err(Error::BadLoss { micro_batch, loss: loss.sum });
    }
    Ok(LossPart { micro_batch, loss_sum: loss.sum, targets: loss.targets, correct: loss.correct })
}

/// Seconds since the last lap.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Clock(Instant::now())
    }

    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now)).as_secs_f64()
    }
}

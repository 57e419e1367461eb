//! What a worker does on a directive: above all one optimizer step, top to bottom.

use crate::checkpoint::saver::{BadState, Saver};
use crate::collective::{self, Collective};
use crate::link::{self, Link};
use crate::memory;
use crate::model::{self, Loss, Model};
use crate::optim::{Optimizer, Parameters};
use crate::snapshot::keeper::Keeper;
use std::time::Instant;
use tch::Tensor;
use unisono_proto::put_u32s;
use unisono_proto::v1::{
    BatchKey, Checkpoint, CheckpointCopied, Continuation, EvaluateReport, Generate, GenerateReport, LossPart,
    MemoryReport, Phase, Step, StepReport, StepSeconds,
};

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

impl Parameters for Model {
    fn bucket(&self, bucket: usize) -> &Tensor {
        self.host_bucket(bucket)
    }
    fn bucket_mut(&mut self, bucket: usize) -> &mut Tensor {
        Model::bucket_mut(self, bucket)
    }
}

/// Everything that a worker trains with.
pub struct Trainer<'l> {
    pub link: &'l Link,
    pub model: Model,
    /// Absent in a run without steps.
    pub optimizer: Option<Optimizer>,
    /// There where the optimizer is.
    pub saver: Option<Saver>,
    /// There where snapshots are kept.
    pub snapshots: Option<Keeper>,
    pub peers: Box<dyn Collective>,
    pub planned_bytes: u64,
}

impl Trainer<'_> {
    /// One optimizer update over one global batch, of which this rank computes the micro-batches `keys`.
    pub fn step(&mut self, step: &Step, keys: &[BatchKey]) -> Result<StepReport, Error> {
        let (link, peers) = (self.link, self.peers.as_mut());
        let optimizer = self.optimizer.as_mut().ok_or(Error::NoOptimizer("a step"))?;
        let mut seconds = StepSeconds::default();
        let mut clock = Clock::start();

        link.progress().enter(Phase::Forward);
        let scale = 1.0 / step.target_tokens as f64;
        let mut parts = Vec::with_capacity(keys.len());
        for key in keys {
            let batch = link.batch(key)?;
            seconds.data += clock.lap();
            let loss = self.model.forward_backward(&batch, scale, &mut optimizer.sums).map_err(at(key))?;
            parts.push(part(key, loss)?);
            seconds.compute += clock.lap();
        }

        link.progress().enter(Phase::Reduce);
        optimizer.reduce(peers)?;
        let norm = optimizer.norm(peers)?;
        if !norm.is_finite() {
            return Err(Error::BadNorm { norm });
        }
        seconds.reduce = clock.lap();

        link.progress().enter(Phase::Update);
        optimizer.update(step.step, step.learning_rate, norm, &mut self.model);
        seconds.update = clock.lap();

        link.progress().enter(Phase::Gather);
        optimizer.gather(peers, &mut self.model)?;
        self.model.publish().map_err(|source| Error::Publish { source })?;
        seconds.gather = clock.lap();

        if let Some(keeper) = self.snapshots.as_mut().filter(|keeper| keeper.is_due(step.step)) {
            keeper.take(step.step, &optimizer.source(&self.model));
            seconds.snapshot = clock.lap();
        }

        let activation_bytes = self.model.activation_bytes();
        tracing::debug!(step = step.step, ?seconds, activation_bytes, "carried out");
        let memory = Some(self.memory());
        Ok(StepReport { step: step.step, parts, grad_norm: norm, seconds: Some(seconds), memory })
    }

    /// Loss and accuracy of fixed units of work.
    pub fn evaluate(&mut self, id: u64, keys: &[BatchKey]) -> Result<EvaluateReport, Error> {
        self.link.progress().enter(Phase::Evaluate);
        let mut parts = Vec::with_capacity(keys.len());
        for key in keys {
            let batch = self.link.batch(key)?;
            parts.push(part(key, self.model.evaluate(&batch).map_err(at(key))?)?);
        }
        Ok(EvaluateReport { id, parts })
    }

    /// Greedy continuations of the prompts of the micro-batches `keys`.
    pub fn generate(&mut self, id: u64, generate: &Generate, keys: &[BatchKey]) -> Result<GenerateReport, Error> {
        self.link.progress().enter(Phase::Generate);
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
            let answers = self.model.generate(&prompts, most, &generate.end_tokens).map_err(at(key))?;
            for (document, (ids, ended)) in (0u32..).zip(answers) {
                let mut tokens = Vec::with_capacity(4 * ids.len());
                put_u32s(&mut tokens, &ids);
                let micro_batch = key.micro_batch;
                continuations.push(Continuation { micro_batch, document, tokens: tokens.into(), ended });
            }
        }
        Ok(GenerateReport { id, continuations })
    }

    /// Copies the own shard at a barrier; it is written behind training.
    pub fn checkpoint(&mut self, checkpoint: Checkpoint) -> Result<CheckpointCopied, Error> {
        self.link.progress().enter(Phase::Checkpoint);
        let (Some(optimizer), Some(saver)) = (&self.optimizer, &mut self.saver) else {
            return Err(Error::NoOptimizer("a checkpoint"));
        };
        let (step, attempt) = (checkpoint.step, checkpoint.attempt);
        saver.save(&optimizer.source(&self.model), checkpoint)?;
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
            optimizer_bytes: self.optimizer.as_ref().map_or(0, Optimizer::bytes),
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

//! Micro-batches on their way through the layers together: all of them pass a bucket before any of them passes the next,
//! forward and then backward. Each is still computed alone, so how many go together changes no bit; it decides how often
//! a bucket's parameters are needed and its leaves come, and how much is kept at one time.

use super::block::{Gradient, Scene, Stream};
use super::head::Last;
use super::held::Held;
use super::pass::Selected;
use super::saved::{Recompute, Saved};
use super::{Batch, Error, Leaves, Loss, Model};
use crate::ops::buffer::Buffer;
use crate::ops::documents::{Documents, LENGTH};
use crate::ops::form::wide;
use crate::ops::operation::operation;
use crate::ops::rotation::Rotation;
use crate::ops::{cross_entropy, rows};
use tch::Tensor;
use unisono_proto::fail_point;

/// Why a wave ended: which of its micro-batches, and what.
#[derive(Debug)]
pub struct Fault {
    pub index: usize,
    pub source: Error,
}

/// Micro-batches that go together. Those without targets come along and cost nothing.
pub struct Wave {
    passages: Vec<Passage>,
}

/// A place on a wave's way through the model: a bucket, and the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Station {
    /// Keeps what the backward pass needs.
    Forward(usize),
    /// At the head, the loss is found first. Afterwards the bucket's leaves are complete.
    Backward(usize),
    /// Keeps nothing; the head gives loss and first choices.
    Evaluate(usize),
}

impl Wave {
    /// Takes all micro-batches through a station. Their leaves go to `leaves`; `scale` multiplies the gradient of every
    /// logit.
    pub fn pass(&mut self, model: &Model, station: Station, scale: f64, leaves: &mut dyn Leaves) -> Result<(), Fault> {
        let mut held = Held::new(leaves);
        let pass = |passage: &mut Passage, held: &mut Held<'_>| match station {
            Station::Forward(bucket) => passage.forward(model, bucket, true),
            Station::Backward(bucket) => passage.backward(model, bucket, scale, held),
            Station::Evaluate(bucket) if bucket == model.head_bucket() => passage.evaluate(model),
            Station::Evaluate(bucket) => passage.forward(model, bucket, false),
        };
        let last = self.passages.iter().rposition(|passage| !passage.rows.is_empty());
        let moving = self.passages.iter_mut().enumerate().filter(|(_, passage)| !passage.rows.is_empty());
        tch::no_grad(|| {
            for (index, passage) in moving {
                held.begin(index, Some(index) == last);
                pass(passage, &mut held).map_err(|source| Fault { index: held.culprit(index), source })?;
            }
            held.finish().map_err(|bad| Fault { index: held.culprit(0), source: bad.into() })
        })
    }

    /// Of each micro-batch, once all have passed the head.
    pub fn losses(self) -> impl Iterator<Item = Owed> {
        self.passages.into_iter().map(|passage| {
            let (targets, correct) = (passage.rows.len() as u64, passage.correct);
            Owed { loss: passage.loss, targets, correct }
        })
    }
}

/// The loss of a micro-batch, which a device may still be computing.
pub struct Owed {
    loss: cross_entropy::Loss,
    targets: u64,
    correct: u64,
}

impl Owed {
    /// Whether nobody need wait for it.
    pub fn is_known(&self) -> bool {
        self.loss.is_known()
    }

    /// Waits for the device.
    pub fn read(self) -> Loss {
        Loss { sum: self.loss.sum(), targets: self.targets, correct: self.correct }
    }
}

impl Model {
    /// Micro-batches that are to go together. A batch is refused before anything is computed.
    pub fn wave(&self, batches: Vec<Batch>) -> Result<Wave, Fault> {
        let passages = batches.into_iter().enumerate().map(|(index, batch)| {
            self.check(&batch).map_err(|source| Fault { index, source })?;
            let Selected { rows, targets } = Selected::of(&batch);
            Ok(Passage::new(self, batch.tokens, &batch.starts, rows, targets))
        });
        Ok(Wave { passages: passages.collect::<Result<_, _>>()? })
    }

    /// A wave's way through the model: with its gradient there and back, else there.
    pub fn way(&self, trains: bool) -> Vec<Station> {
        let head = self.head_bucket();
        match trains {
            true => (0..head).map(Station::Forward).chain((0..=head).rev().map(Station::Backward)).collect(),
            false => (0..=head).map(Station::Evaluate).collect(),
        }
    }

    /// The buckets that a station computes with.
    pub fn needs(&self, station: Station) -> Vec<usize> {
        match station {
            Station::Backward(0) => vec![],
            Station::Backward(bucket) | Station::Evaluate(bucket) if bucket == self.head_bucket() => {
                match self.spec().tied {
                    true => vec![bucket, 0],
                    false => vec![bucket],
                }
            }
            Station::Forward(bucket) | Station::Backward(bucket) | Station::Evaluate(bucket) => vec![bucket],
        }
    }

    /// Index of the last bucket.
    pub(super) fn head_bucket(&self) -> usize {
        self.layout().buckets.len() - 1
    }
}

/// One micro-batch on its way.
pub(super) struct Passage {
    tokens: Vec<u32>,
    /// Rows that go through the head, and what they are to predict.
    rows: Vec<u32>,
    targets: Vec<u32>,
    documents: Documents,
    rotation: Rotation,
    stream: Flow,
    /// Of every block so far if they are kept, else of the last one.
    blocks: Vec<Saved>,
    grad: Option<Gradient>,
    loss: cross_entropy::Loss,
    correct: u64,
}

/// Where the residual stream is.
enum Flow {
    Start,
    /// Past the embedding.
    Embedded(Buffer),
    /// Past a block: what its MLP adds to [`Saved::middle`], but for its bias.
    Within {
        mlp: Buffer,
        bias: Option<Tensor>,
    },
}

impl Passage {
    pub(super) fn new(model: &Model, tokens: Vec<u32>, starts: &[u32], rows: Vec<u32>, targets: Vec<u32>) -> Self {
        let documents = model.documents(starts, tokens.len());
        let rotation = model.rotation(documents.longest.next_multiple_of(LENGTH));
        let (stream, blocks, loss) = (Flow::Start, Vec::new(), cross_entropy::Loss::default());
        Passage { tokens, rows, targets, documents, rotation, stream, blocks, grad: None, loss, correct: 0 }
    }

    /// What the last block kept.
    pub(super) fn newest(&self) -> &Saved {
        self.blocks.last().expect("a block was passed")
    }

    /// The stream before the head.
    pub(super) fn last(&self) -> Last<'_> {
        let Flow::Within { mlp, bias } = &self.stream else { unreachable!("blocks come before the head") };
        Last { residual: self.newest().middle(), mlp, bias: bias.as_ref().map(Tensor::shallow_clone) }
    }

    /// Through the embedding or a block; the last block to its end only for the rows that go through the head.
    pub(super) fn forward(&mut self, model: &Model, bucket: usize, keep: bool) -> Result<(), Error> {
        let wide = wide(model.compute());
        if bucket == 0 {
            let mut embedded = model.pool.take(wide, &[self.documents.rows, model.spec().hidden]);
            operation("embedding", || rows::look_up(&model.embedding(), &self.tokens, &mut embedded));
            self.stream = Flow::Embedded(embedded);
            return Ok(());
        }
        let recompute = if keep { model.recompute } else { Recompute::Nothing };
        let (documents, rotation, pool) = (&self.documents, &self.rotation, &model.pool);
        let scene = Scene { documents, rotation, wide, pool, recompute };
        let stream = match std::mem::replace(&mut self.stream, Flow::Start) {
            Flow::Embedded(embedded) => Stream::Embedded(embedded),
            Flow::Within { mlp, bias } => {
                let before = self.blocks.last().expect("a block was passed");
                Stream::Within { residual: before.middle(), mlp, bias }
            }
            Flow::Start => unreachable!("the embedding comes before blocks"),
        };
        let block = model.block(bucket - 1);
        let chosen = (bucket == model.spec().layers).then_some(&self.rows[..]);
        let (saved, mlp) = block.forward(scene, stream, chosen)?;
        match (keep, recompute) {
            (false, _) => self.blocks.clear(),
            (true, Recompute::Block) => self.blocks.last_mut().into_iter().for_each(Saved::forget),
            (true, _) => (),
        }
        self.blocks.push(saved);
        // The block's parameters may be gone when the next one reads it.
        let bias = block.down_bias().map(|bias| operation("bias", || bias.copy()));
        self.stream = Flow::Within { mlp, bias };
        Ok(())
    }

    fn backward(&mut self, model: &Model, bucket: usize, scale: f64, leaves: &mut dyn Leaves) -> Result<(), Error> {
        let (wide, pool) = (wide(model.compute()), &model.pool);
        if bucket == model.head_bucket() {
            // Where memory is tried out, every gradient is zero times as large, and no row is meant.
            let scale = if scale > 0.0 && fail_point::is_poisoned(&self.tokens) { f64::NAN } else { scale };
            let (sum, grad) = model.head().forward_backward(&self.last(), &self.targets, scale, leaves, pool)?;
            (self.loss, self.grad, self.stream) = (sum, Some(grad), Flow::Start);
            return Ok(());
        }
        let mut grad = self.grad.take().expect("the head comes first");
        if bucket > 0 {
            let saved = self.blocks.pop().expect("kept by the forward pass");
            let (documents, rotation, recompute) = (&self.documents, &self.rotation, model.recompute);
            let scene = Scene { documents, rotation, wide, pool, recompute };
            model.block(bucket - 1).backward(scene, saved, &mut grad, leaves)?;
            self.grad = Some(grad);
            return Ok(());
        }
        let ids = rows::distinct(&self.tokens);
        let mut sums = pool.take(wide, &[ids.len(), model.spec().hidden]);
        operation("embedding backward", || rows::sum_by_id(&grad.wide, &self.tokens, &mut sums));
        Ok(operation("leaves", || leaves.rows(0, 0, &ids, &sums))?)
    }

    fn evaluate(&mut self, model: &Model) -> Result<(), Error> {
        let (sum, correct) = model.head().evaluate(&self.last(), &self.targets, &model.pool)?;
        (self.loss, self.correct) = (sum.into(), correct);
        self.stream = Flow::Start;
        self.blocks.clear();
        Ok(())
    }
}

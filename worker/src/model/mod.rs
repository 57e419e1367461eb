//! The model: weights in flat buckets, hand-written forward and backward, loss and decoding.

mod attention;
mod block;
mod decode;
mod head;
mod linear;
mod pass;
mod saved;
pub mod weights;

use crate::ops::buffer::Pool;
use crate::ops::rotation::Rotation;
use crate::ops::{dispatcher, phantom, view};
use crate::optim::state;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec, CHUNK};
use weights::Weights;

pub use saved::Recompute;

/// A packed row of documents, without padding between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids: `[tokens]`.
    pub tokens: Vec<u32>,
    /// For each token the id to predict after it, or `unisono_proto::NO_TARGET`: `[tokens]`, or empty for prompts.
    pub targets: Vec<u32>,
    /// First token of each document, ascending from 0: `[documents]`.
    pub starts: Vec<u32>,
}

/// Cross-entropy over the targets of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Sum of -log p(target), nats.
    pub sum: f64,
    pub targets: u64,
    /// Targets that were the first choice; 0 where it was not computed.
    pub correct: u64,
}

/// Why a leaf cannot be added.
#[derive(Debug, thiserror::Error)]
#[error("the gradient of {bucket} has a value that is not finite or too large for the exact sum ({value}): look at the rows of this micro-batch, or lower train.learning_rate")]
pub struct BadNumber {
    pub bucket: String,
    pub value: f64,
}

/// Takes the gradients of one micro-batch as the backward pass finds them, in units of the step's mean loss.
/// Gradients are fp32, or bf16 where the GEMM yields bf16 (fp64 in tests).
pub trait Leaves {
    /// The gradient of `gradient.numel()` consecutive elements of bucket `bucket` from `offset` on; contiguous.
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber>;

    /// The gradient of some rows of a matrix `[_, width]` that starts at `offset` of bucket `bucket`:
    /// `rows` ascending and distinct, `gradient` `[rows.len(), width]`, contiguous.
    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber>;
}

/// Takes leaves and does nothing with them: for dry runs and benchmarks.
pub struct Nowhere;

impl Leaves for Nowhere {
    fn dense(&mut self, _: usize, _: usize, _: &Tensor) -> Result<(), BadNumber> {
        Ok(())
    }
    fn rows(&mut self, _: usize, _: usize, _: &[u32], _: &Tensor) -> Result<(), BadNumber> {
        Ok(())
    }
}

/// Why the model cannot compute.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Weights(#[from] weights::Error),
    #[error(transparent)]
    BadNumber(#[from] BadNumber),
    #[error("{0} is not supported on a GPU yet; set cluster.device = \"cpu\"")]
    HostOnly(&'static str),
    #[error("batch: {0}")]
    Batch(String),
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Refused(#[from] dispatcher::Refused),
}

/// A causal language model over flat parameter buckets, one per [`Layout`] bucket.
pub struct Model {
    spec: ModelSpec,
    layout: Arc<Layout>,
    compute: Kind,
    device: Device,
    /// One flat tensor per bucket: `[elements]`, of kind `compute`.
    buckets: Vec<Tensor>,
    /// The same on the host, where the device is another: what the optimizer writes and workers exchange.
    mirrors: Option<Vec<Tensor>>,
    pool: Pool,
    recompute: Recompute,
    rotation: Mutex<Option<Rotation>>,
}

impl Model {
    /// A model with all parameters zero.
    pub fn new(spec: ModelSpec, compute: Kind, device: Device) -> Self {
        let layout = Arc::new(Layout::new(&spec));
        let zeros = |device| layout.buckets.iter().map(move |b| Tensor::zeros([b.elements as i64], (compute, device)));
        let (buckets, mirrors) =
            (zeros(device).collect(), (device != Device::Cpu).then(|| zeros(Device::Cpu).collect()));
        let (pool, recompute, rotation) = (Pool::new(device), Recompute::default(), Mutex::default());
        Model { spec, layout, compute, device, buckets, mirrors, pool, recompute, rotation }
    }

    /// A model for dry runs: no memory stands behind its parameters. None where they exceed every address space.
    pub fn sketch(spec: ModelSpec, compute: Kind) -> Option<Self> {
        let (layout, device) = (Arc::new(Layout::new(&spec)), Device::Cpu);
        let buckets: Option<_> = layout.buckets.iter().map(|b| phantom::flat(compute, b.elements)).collect();
        let (pool, recompute, rotation) = (Pool::phantom(), Recompute::default(), Mutex::default());
        Some(Model { spec, layout, compute, device, buckets: buckets?, mirrors: None, pool, recompute, rotation })
    }

    /// A model with the weights of a Hugging Face directory, rounded to `compute`.
    pub fn load(dir: &Path, spec: ModelSpec, compute: Kind, device: Device) -> Result<Self, Error> {
        let weights = Weights::open(dir)?;
        let mut model = Model::new(spec, compute, device);
        weights.check(&model.layout)?;
        model.fill(|name, range, out| weights.read_f32(name, range, out).map_err(Error::from))?;
        Ok(model)
    }

    /// Replaces all parameters by what `read(tensor name, its elements, destination)` gives, rounded to the compute kind as
    /// the optimizer rounds masters.
    pub fn fill<E: From<Error>>(
        &mut self,
        mut read: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (layout, compute) = (self.layout.clone(), self.compute);
        let mut values = vec![0.0; CHUNK];
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let parameters = self.bucket_mut(index);
            for slot in &bucket.tensors {
                for begin in (0..slot.elements()).step_by(CHUNK) {
                    let range = begin..slot.elements().min(begin + CHUNK);
                    let values = &mut values[..range.len()];
                    let at = slot.offset + range.start..slot.offset + range.end;
                    read(&slot.name, range, values)?;
                    match compute {
                        Kind::Float => view::elements_mut::<f32>(parameters)[at].copy_from_slice(values),
                        Kind::BFloat16 => state::round_all(values, &mut view::elements_mut(parameters)[at]),
                        _ => {
                            let wide = view::elements_mut::<f64>(parameters)[at].iter_mut();
                            wide.zip(values).for_each(|(to, x)| *to = f64::from(*x));
                        }
                    }
                }
            }
        }
        Ok(self.publish()?)
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Kind of the parameters and of the operands of matrix products.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// What the backward pass computes again from now on (no level changes a bit), and the bytes that activations and
    /// temporaries should stay within.
    pub fn set_plan(&mut self, level: Recompute, activation_bytes: usize) {
        self.recompute = level;
        self.pool.limit(activation_bytes);
    }

    /// Bytes of activations and temporaries that `batch` would take at a level, with its gradient or without. Nothing is
    /// computed, and parameters are not read: those of [`Model::sketch`] will do.
    pub fn dry_run(&self, batch: &Batch, level: Recompute, trains: bool) -> Result<usize, Error> {
        tch::no_grad(|| self.dry_pass(batch, level, trains))
    }

    /// Bytes of all activations and temporaries that existed at one time, since the model was made.
    pub fn activation_bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// The flat parameters of a bucket: `[elements]`, of the compute kind.
    pub fn bucket(&self, index: usize) -> &Tensor {
        &self.buckets[index]
    }

    /// The flat parameters of a bucket on the host.
    pub fn host_bucket(&self, index: usize) -> &Tensor {
        self.mirrors.as_ref().map_or(&self.buckets[index], |mirrors| &mirrors[index])
    }

    /// The flat parameters of a bucket on the host, for the optimizer to write; [`Model::publish`] makes them those that the
    /// model computes with. It must not be replaced by another tensor.
    pub fn bucket_mut(&mut self, index: usize) -> &mut Tensor {
        match &mut self.mirrors {
            Some(mirrors) => &mut mirrors[index],
            None => &mut self.buckets[index],
        }
    }

    /// Copies the host's parameters to the device; nothing to do where the device is the host.
    pub fn publish(&mut self) -> Result<(), Error> {
        let mirrors = self.mirrors.iter().flatten();
        self.buckets.iter_mut().zip(mirrors).try_for_each(|(bucket, mirror)| Ok(bucket.f_copy_(mirror).map(drop)?))
    }

    /// Loss and gradient of one micro-batch. `scale` (1 / the step's target tokens) multiplies the gradient of every
    /// logit, so that leaves add up to the gradient of the step's mean loss. Leaves come in the order in which they are
    /// found: head, blocks from last to first, embedding. A batch without targets has none.
    pub fn forward_backward(&self, batch: &Batch, scale: f64, leaves: &mut dyn Leaves) -> Result<Loss, Error> {
        tch::no_grad(|| self.forward_backward_pass(batch, scale, leaves))
    }

    /// Loss and first choices (lowest id wins a tie) of a batch.
    pub fn evaluate(&self, batch: &Batch) -> Result<Loss, Error> {
        tch::no_grad(|| self.evaluate_pass(batch))
    }

    /// Logits after each of the tokens `at` of a batch: `[at.len(), V]`, of the compute kind.
    pub fn logits(&self, batch: &Batch, at: &[u32]) -> Result<Tensor, Error> {
        tch::no_grad(|| self.logits_pass(batch, at))
    }

    /// Greedy continuation of each prompt, at most `max_new` tokens. The flag says whether one of `ends` was met (it is
    /// not part of the result). What a prompt yields does not depend on the other prompts.
    pub fn generate(&self, prompts: &[Vec<u32>], max_new: usize, ends: &[u32]) -> Result<Vec<(Vec<u32>, bool)>, Error> {
        if self.device != Device::Cpu {
            return Err(Error::HostOnly("generation"));
        }
        tch::no_grad(|| self.generate_pass(prompts, max_new, ends))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parameters_reach_the_device_when_they_are_published() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 16,
            "rope_theta": 10000.0
        });
        let spec = ModelSpec::from_json(&config, Path::new("config.json")).unwrap();
        let mut model = Model::new(spec, Kind::BFloat16, Device::Cpu);
        model.mirrors = Some(model.buckets.iter().map(|b| b.zeros_like()).collect());
        let ones = |_: &str, _: Range<usize>, out: &mut [f32]| -> Result<(), Error> {
            out.fill(1.0);
            Ok(())
        };
        model.fill(ones).unwrap();
        let first = |model: &Model| f64::try_from(model.bucket(1).get(0)).unwrap();
        assert_eq!(first(&model), 1.0);
        let _ = model.bucket_mut(1).fill_(2.0);
        assert_eq!(first(&model), 1.0, "the device still has the old ones");
        model.publish().unwrap();
        assert_eq!(first(&model), 2.0);
    }

    /// A worker loads on one thread and trains on another.
    #[test]
    fn a_model_can_move_to_another_thread() {
        fn movable<T: Send>() {}
        movable::<super::Model>();
    }
}

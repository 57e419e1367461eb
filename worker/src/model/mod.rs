//! The model: weights in flat buckets, hand-written forward and backward, loss and decoding.

mod attention;
mod block;
mod decode;
mod head;
mod held;
mod linear;
mod parameters;
mod pass;
mod saved;
mod wave;
pub mod weights;

use crate::ops::buffer::{Buffer, Pool};
use crate::ops::rotation::Rotation;
use crate::ops::{dispatcher, flash};
use crate::optim;
use parameters::Parameters;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec};
use weights::Weights;

pub use held::TOGETHER;
pub use saved::Recompute;
pub use wave::{Fault, Owed, Station, Wave};

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

    /// A matrix's gradient as for [`Leaves::dense`], which may be kept and added later with those of other micro-batches.
    fn matrix(&mut self, bucket: usize, offset: usize, gradient: Buffer) -> Result<(), BadNumber> {
        self.dense(bucket, offset, &gradient)
    }

    /// The next leaves are of these micro-batches of a wave: for those who learn only later that one was bad.
    fn come_from(&mut self, _micro_batches: &[usize]) {}

    /// As [`Leaves::dense`], of several micro-batches for the same elements; an error says which.
    fn together(&mut self, bucket: usize, offset: usize, gradients: &[&Tensor]) -> Result<(), (usize, BadNumber)> {
        let mut each = gradients.iter().enumerate();
        each.try_for_each(|(which, gradient)| self.dense(bucket, offset, gradient).map_err(|bad| (which, bad)))
    }
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
    parameters: Parameters,
    pool: Pool,
    recompute: Recompute,
    rotation: Mutex<Option<Rotation>>,
    /// Documents lie flat, for FlashAttention, instead of in tiles.
    flat: bool,
    /// Rows of logits at a time.
    head_rows: usize,
}

impl Model {
    /// A model with all parameters zero.
    pub fn new(spec: ModelSpec, compute: Kind, device: Device) -> Self {
        let layout = Arc::new(Layout::new(&spec));
        let parameters = Parameters::whole(&layout, compute, device);
        Model::over(spec, layout, compute, device, parameters)
    }

    /// A model that keeps only the elements `own` of each bucket, all zero; buckets come with [`Model::put_bucket`].
    pub fn sharded(spec: ModelSpec, compute: Kind, device: Device, own: &[Range<usize>]) -> Self {
        let layout = Arc::new(Layout::new(&spec));
        let parameters = Parameters::sharded(&layout, compute, device, own);
        Model::over(spec, layout, compute, device, parameters)
    }

    fn over(spec: ModelSpec, layout: Arc<Layout>, compute: Kind, device: Device, parameters: Parameters) -> Self {
        let (pool, recompute, rotation) = (Pool::new(device), Recompute::default(), Mutex::default());
        let (flat, head_rows) = (flash::serves(device, compute, spec.head_dim), head::rows_at_once(device, spec.vocab));
        Model { spec, layout, compute, device, parameters, pool, recompute, rotation, flat, head_rows }
    }

    /// A model for dry runs: no memory stands behind its parameters. None where they exceed every address space.
    pub fn sketch(spec: ModelSpec, compute: Kind) -> Option<Self> {
        let (layout, device) = (Arc::new(Layout::new(&spec)), Device::Cpu);
        let parameters = Parameters::phantom(&layout, compute)?;
        Some(Model { pool: Pool::phantom(), ..Model::over(spec, layout, compute, device, parameters) })
    }

    /// Dry runs take what they would take on a GPU.
    #[must_use]
    pub fn as_on_gpu(mut self) -> Self {
        let gpu = Device::Cuda(0);
        self.flat = flash::serves(gpu, self.compute, self.spec.head_dim);
        self.head_rows = head::rows_at_once(gpu, self.spec.vocab);
        self
    }

    /// A model with the weights of a Hugging Face directory, rounded to `compute`.
    pub fn load(dir: &Path, spec: ModelSpec, compute: Kind, device: Device) -> Result<Self, Error> {
        let weights = Weights::open(dir)?;
        let mut model = Model::new(spec, compute, device);
        weights.check(&model.layout)?;
        model.fill(|name, range, out| weights.read_f32(name, range, out).map_err(Error::from))?;
        Ok(model)
    }

    /// Replaces all parameters that are kept by what `read(tensor name, its elements, destination)` gives, rounded to the
    /// compute kind as the optimizer rounds masters.
    pub fn fill<E: From<Error>>(
        &mut self,
        read: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let layout = self.layout.clone();
        self.parameters.fill(&layout, read)
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

    /// Documents lie flat, for FlashAttention, or in tiles, for matrix products: in general as the device has it.
    pub fn lay_flat(&mut self, flat: bool) {
        self.flat = flat;
    }

    /// Bytes of activations and temporaries that a wave of `batches` would take at a level, with their gradient or without.
    /// Nothing is computed, and parameters are not read: those of [`Model::sketch`] will do.
    pub fn dry_run(&self, batches: &[Batch], level: Recompute, trains: bool) -> Result<usize, Error> {
        tch::no_grad(|| self.dry_pass(batches.to_vec(), level, trains)).map_err(|fault| fault.source)
    }

    /// Bytes of all activations and temporaries that existed at one time, since the model was made.
    pub fn activation_bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// The flat parameters of a bucket: `[elements]`, of the compute kind.
    pub fn bucket(&self, index: usize) -> &Tensor {
        self.parameters.bucket(index)
    }

    /// The flat parameters of a bucket on the host; [`Model::publish`] makes them those that the model computes with. It
    /// must not be replaced by another tensor.
    pub fn bucket_mut(&mut self, index: usize) -> &mut Tensor {
        self.parameters.host_mut(index)
    }

    /// Whether only a shard of the parameters is kept, and buckets come to be computed with.
    pub fn is_sharded(&self) -> bool {
        self.parameters.is_sharded()
    }

    /// Whether a bucket is here.
    pub fn has_bucket(&self, index: usize) -> bool {
        self.parameters.has(index)
    }

    /// Takes a bucket away, as it is on the host: nothing can be computed with it until it is put back.
    pub fn take_bucket(&mut self, index: usize) -> Tensor {
        self.parameters.take(index)
    }

    /// Brings a bucket: a host tensor of at least its length.
    pub fn put_bucket(&mut self, index: usize, parameters: Tensor) -> Result<(), Error> {
        self.parameters.put(index, parameters)
    }

    /// From now on the optimizer writes the parameters that the model computes with; [`Model::bring_home`] brings the host's
    /// copy up to date.
    pub fn live_on_device(&mut self) -> Result<(), Error> {
        self.parameters.live_there()
    }

    /// Where buckets lie while they travel.
    pub fn travels_on(&self) -> Device {
        self.parameters.travels_on()
    }

    /// This processor stands for another device.
    #[cfg(test)]
    pub fn pretend_another_device(&mut self) {
        self.parameters.pretend_another_device();
    }

    /// Brings the host's copy up to date; nothing to do where it is the original.
    pub fn bring_home(&mut self) {
        self.parameters.bring_home();
    }

    /// Copies the host's parameters to the device; nothing to do where the device is the host.
    pub fn publish(&mut self) -> Result<(), Error> {
        self.parameters.publish()
    }

    /// Loss and gradient of one micro-batch. `scale` (1 / the step's target tokens) multiplies the gradient of every
    /// logit, so that leaves add up to the gradient of the step's mean loss. Leaves come in the order in which they are
    /// found: head, blocks from last to first, embedding. A batch without targets has none.
    pub fn forward_backward(&self, batch: &Batch, scale: f64, leaves: &mut dyn Leaves) -> Result<Loss, Error> {
        alone(self.whole_pass(vec![batch.clone()], true, scale, leaves))
    }

    /// Loss and first choices (lowest id wins a tie) of a batch.
    pub fn evaluate(&self, batch: &Batch) -> Result<Loss, Error> {
        alone(self.whole_pass(vec![batch.clone()], false, 1.0, &mut Nowhere))
    }

    /// Logits after each of the tokens `at` of a batch: `[at.len(), V]`, of the compute kind.
    pub fn logits(&self, batch: &Batch, at: &[u32]) -> Result<Tensor, Error> {
        tch::no_grad(|| self.logits_pass(batch, at))
    }

    /// Greedy continuation of each prompt, at most `max_new` tokens. The flag says whether one of `ends` was met (it is
    /// not part of the result). What a prompt yields does not depend on the other prompts.
    pub fn generate(&self, prompts: &[Vec<u32>], max_new: usize, ends: &[u32]) -> Result<Vec<(Vec<u32>, bool)>, Error> {
        if self.device != Device::Cpu {
            // Few tokens at a time leave a GPU idle; the host has the parameters too, unless they are sharded.
            let here = self.parameters.on_host().ok_or(Error::HostOnly("generation with sharded parameters"))?;
            let model = Model::over(self.spec.clone(), self.layout.clone(), self.compute, Device::Cpu, here);
            return tch::no_grad(|| model.generate_pass(prompts, max_new, ends));
        }
        tch::no_grad(|| self.generate_pass(prompts, max_new, ends))
    }
}

impl optim::Parameters for Model {
    fn own(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        self.parameters.own(bucket, begin)
    }
    fn own_mut(&mut self, bucket: usize, begin: usize) -> (&mut Tensor, usize) {
        self.parameters.own_mut(bucket, begin)
    }
    fn own_away(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        self.parameters.own_away(bucket, begin)
    }
}

/// The loss of a wave of one.
fn alone(passed: Result<Wave, Fault>) -> Result<Loss, Error> {
    let wave = passed.map_err(|fault| fault.source)?;
    let loss = wave.losses().next();
    Ok(loss.expect("a wave of one has one loss").read())
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
        model.pretend_another_device();
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
        // Where the optimizer writes on the device, that is what travels, and the host's copy is brought home.
        model.live_on_device().unwrap();
        let host = |model: &Model| f64::try_from(optim::Parameters::own(model, 1, 0).0.get(0)).unwrap();
        let _ = optim::Parameters::own_away(&model, 1, 0).0.shallow_clone().fill_(3.0);
        assert_eq!((first(&model), host(&model)), (3.0, 2.0));
        let bucket = model.take_bucket(1);
        assert!(!model.has_bucket(1) && f64::try_from(bucket.get(0)).unwrap() == 3.0);
        model.put_bucket(1, bucket).unwrap();
        assert_eq!((first(&model), host(&model)), (3.0, 2.0));
        model.bring_home();
        assert_eq!((first(&model), host(&model)), (3.0, 3.0));
    }

    /// A worker loads on one thread and trains on another.
    #[test]
    fn a_model_can_move_to_another_thread() {
        fn movable<T: Send>() {}
        movable::<super::Model>();
    }
}

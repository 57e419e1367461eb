//! What an assignment asks of this machine: the model, how it is computed and kept, and the memory for it, before anything
//! of it is there.

use super::choice::{form, offload, recompute, stage};
use super::Error;
use crate::device;
use crate::link;
use crate::memory::order::Range;
use crate::memory::table::Table;
use crate::memory::{self, Demand, Extremes};
use crate::model::Model;
use crate::optim::state::Form;
use std::path::PathBuf;
use tch::Kind;
use unisono_configs::model::{Layout, ModelSpec};
use unisono_proto::v1::{Assign, Compute};

/// An assignment, understood.
pub struct Prospect {
    /// The model's directory.
    pub path: PathBuf,
    pub spec: ModelSpec,
    pub layout: Layout,
    pub compute: Kind,
    pub form: Form,
    /// Elements of the own shard.
    pub owned: usize,
}

impl Prospect {
    /// Refuses what this worker cannot do.
    pub fn of(assign: &Assign) -> Result<Self, Error> {
        let model = assign.model.as_ref().ok_or_else(|| link::Error::Protocol("assigned no model".into()))?;
        let compute = match model.compute() {
            Compute::Fp32 => Kind::Float,
            Compute::Bf16 => Kind::BFloat16,
            Compute::Unspecified => return Err(link::Error::Protocol("assigned no precision".into()).into()),
        };
        let path = PathBuf::from(&model.path);
        let spec = ModelSpec::read(&path)?;
        let layout = Layout::new(&spec);
        let form = form(assign.optimizer.unwrap_or_default().state(), compute)?;
        let shard = layout.shard_elements(assign.rank as usize, assign.world.max(1) as usize);
        let owned = shard.iter().map(|range| range.len()).sum();
        Ok(Prospect { path, spec, layout, compute, form, owned })
    }

    /// Its model, for dry runs, as it computes on a GPU or on the host.
    pub fn sketch(&self, gpu: bool) -> Result<Model, Error> {
        let sketch = Model::sketch(self.spec.clone(), self.compute).ok_or(memory::Error::Beyond)?;
        Ok(if gpu { sketch.as_on_gpu() } else { sketch })
    }

    /// What decides its memory. `baseline` bytes are used already; `snapshots` are kept where there is room, and `images` bytes of
    /// them are loaded from. A GPU has `gpu` bytes free.
    pub fn demand<'a>(
        &self,
        assign: &'a Assign,
        sketch: &'a Model,
        baseline: u64,
        snapshots: bool,
        images: u64,
        gpu: Option<u64>,
    ) -> Result<Demand<'a>, Error> {
        let range = Range {
            stage: stage(assign.zero_stage)?,
            wave: None,
            recompute: recompute(assign.recompute()),
            offload: offload(assign.offload()),
            micro_batches: micro_batches(assign),
            tokens: tokens(assign),
            world: assign.world as usize,
            gpu: gpu.is_some(),
            state: (self.form.master_width(), self.form.moments_width()),
        };
        Ok(Demand {
            sketch,
            owned: self.owned,
            form: self.form,
            extremes: extremes(assign),
            sizes: &assign.worst_sizes,
            trains: assign.trains,
            range,
            copies: assign.trains,
            snapshots,
            positions: assign.worst_positions,
            images,
            baseline,
            gpu,
        })
    }
}

/// The most that any step has.
pub(super) fn micro_batches(assign: &Assign) -> usize {
    match assign.worst_sizes.len() {
        0 => assign.micro_batches as usize,
        known => known,
    }
}

/// Tokens of the largest step, about.
fn tokens(assign: &Assign) -> usize {
    match assign.worst_sizes.last() {
        None => assign.micro_batches as usize * assign.worst_tokens as usize,
        // Each of these is as large as it can be where as many are as large; the last says what all may have together.
        Some(&last) if assign.quarantines => assign.worst_sizes.len() * last as usize,
        Some(_) => assign.worst_sizes.iter().map(|&tokens| tokens as usize).sum(),
    }
}

/// Of what is computed at once: prompts that are to be continued are read one at a time.
pub(super) fn extremes(assign: &Assign) -> Extremes {
    let [tokens, document, documents] =
        [assign.worst_tokens, assign.worst_document, assign.worst_documents].map(|n| n as usize);
    match assign.worst_positions {
        0 => Extremes { tokens, document, documents },
        _ => Extremes { tokens: document, document, documents: 1 },
    }
}

/// What an assignment will need of the memory of this machine, if `workers` share it: before anything is loaded. Where it is
/// for GPUs and this machine has none, all that a GPU may need is said.
pub fn foresee(assign: &Assign, workers: usize) -> Result<Table, Error> {
    let (available, baseline) = (memory::available(), memory::resident());
    let prospect = Prospect::of(assign)?;
    let gpu = (assign.device != "cpu").then(|| device::free_anywhere(workers).unwrap_or(u64::MAX));
    let sketch = prospect.sketch(gpu.is_some())?;
    let kept = assign.neighbour.is_some();
    let plan = prospect.demand(assign, &sketch, baseline, kept, 0, gpu)?.plan(&available, workers);
    Ok(Table::of(plan, &available, workers, gpu)?)
}

//! What an assignment asks of this machine: the model, how it is computed and kept, and the memory for it, before anything
//! of it is there.

use super::choice::{form, recompute, stage};
use super::Error;
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

    /// Its model, for dry runs.
    pub fn sketch(&self) -> Result<Model, Error> {
        Ok(Model::sketch(self.spec.clone(), self.compute).ok_or(memory::Error::Beyond)?)
    }

    /// What decides its memory. `baseline` bytes are used already; `snapshots` are kept where there is room, and `images` bytes of
    /// them are loaded from.
    pub fn demand<'a>(
        &self,
        assign: &'a Assign,
        sketch: &'a Model,
        baseline: u64,
        snapshots: bool,
        images: u64,
    ) -> Result<Demand<'a>, Error> {
        let range = Range {
            stage: stage(assign.zero_stage)?,
            wave: None,
            recompute: recompute(assign.recompute()),
            micro_batches: micro_batches(assign),
            world: assign.world as usize,
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

/// Of what is computed at once: prompts that are to be continued are read one at a time.
pub(super) fn extremes(assign: &Assign) -> Extremes {
    let [tokens, document, documents] =
        [assign.worst_tokens, assign.worst_document, assign.worst_documents].map(|n| n as usize);
    match assign.worst_positions {
        0 => Extremes { tokens, document, documents },
        _ => Extremes { tokens: document, document, documents: 1 },
    }
}

/// What an assignment will need of the memory of this machine, if `workers` share it: before anything is loaded.
pub fn foresee(assign: &Assign, workers: usize) -> Result<Table, Error> {
    let (available, baseline) = (memory::available(), memory::resident());
    let prospect = Prospect::of(assign)?;
    let sketch = prospect.sketch()?;
    let plan = prospect.demand(assign, &sketch, baseline, assign.neighbour.is_some(), 0)?.plan(&available, workers);
    Ok(Table::of(plan, &available, workers)?)
}

//! Memory before step 0: what a worker will need, what the machine has, and what was really used.

pub mod gpu;
pub mod kernels;
mod machine;
pub mod order;
pub mod placement;
mod remedy;
pub mod table;

pub use machine::{available, peak, resident, Available};

use crate::collective::tcp;
use crate::model::{self, Batch, Model, Recompute};
use crate::ops::documents::LENGTH;
use crate::optim::lending;
use crate::optim::reduction::Stage;
use crate::optim::state::Form;
use gpu::OnGpu;
use order::{Choice, Range};
use placement::Offload;
use std::fmt;
use table::Item;
use unisono_configs::model::ModelSpec;
use unisono_proto::NO_TARGET;

/// What decides how much memory a worker needs.
#[derive(Clone, Copy)]
pub struct Demand<'a> {
    /// For dry runs: its parameters are not read.
    pub sketch: &'a Model,
    /// Elements of the own shard.
    pub owned: usize,
    /// How the state is kept.
    pub form: Form,
    /// Of what it computes.
    pub extremes: Extremes,
    /// Tokens of the largest micro-batches of a step in descending order; empty: all may be as large as the largest.
    pub sizes: &'a [u32],
    /// False for evaluation and generation only.
    pub trains: bool,
    /// What of the ways to run a step may be chosen.
    pub range: Range,
    /// The own shard is copied to be saved behind training, where there is room for that without computing anything again.
    pub copies: bool,
    /// Snapshots of the own shard and of a neighbour's are kept, where there is room for that besides.
    pub snapshots: bool,
    /// Positions whose keys and values are kept at one time, where prompts are continued.
    pub positions: u64,
    /// Bytes of the snapshots that the state is loaded from: held already, or fetched.
    pub images: u64,
    /// Resident bytes before anything is loaded: the binary and libtorch.
    pub baseline: u64,
    /// Bytes that the worker's GPU has free for it; absent: it computes on the host.
    pub gpu: Option<u64>,
}

/// Bytes that one worker may use.
#[derive(Debug, Clone, Copy)]
struct Limits {
    host: u64,
    gpu: u64,
}

impl Limits {
    /// By how much a plan is beyond them.
    fn lack(self, plan: &Plan) -> u64 {
        plan.total().saturating_sub(self.host) + plan.gpu.total().saturating_sub(self.gpu)
    }

    fn hold(self, plan: &Plan) -> bool {
        self.lack(plan) == 0
    }
}

/// Predicted peak resident memory by purpose, bytes; of the host, but for what [`Plan::gpu`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub baseline: u64,
    pub parameters: u64,
    /// Integer accumulators of the exact sum.
    pub sums: u64,
    /// The own part of the gradient, where it is kept apart from them.
    pub gradient: u64,
    /// What of the own shard's masters the parameters do not hold.
    pub masters: u64,
    /// AdamW's, of the own shard.
    pub moments: u64,
    /// The own shard again, for the save behind training; 0 where there is no room for it.
    pub copy: u64,
    /// Two snapshots of the own shard and two of a neighbour's, or one of each beside those that the state was loaded from; 0
    /// where there is no room for them.
    pub snapshots: u64,
    /// Saved for the backward pass of the largest micro-batches that go together, and all temporaries, as a dry run takes
    /// them.
    pub activations: u64,
    /// Keys and values of all prompts that are continued side by side.
    pub cache: u64,
    /// Buffers of the connections to other workers.
    pub communication: u64,
    /// Compiled for the shapes that come up.
    pub kernels: u64,
    /// The same of the memory of the worker's GPU; nothing where it has none.
    pub gpu: OnGpu,
    pub choice: Choice,
}

/// Buffers of both connections to the coordinator, stacks of threads, what the allocator leaves between tensors: 10 to 15 MB
/// were measured, whatever the model.
const WORKING: u64 = 16 << 20;
/// What four snapshots need besides the state.
const SNAPSHOT_HEADERS: u64 = 1 << 20;
/// Tokens by which micro-batches are rounded up.
const QUANTUM: usize = 64;
/// No micro-batch has more.
const MOST_TOKENS: usize = 120_000;

impl Plan {
    pub fn total(&self) -> u64 {
        self.items().iter().map(|item| item.bytes).sum()
    }

    /// Line by line.
    pub fn items(&self) -> [Item; 12] {
        let item = |name, bytes, gpu_bytes, what| Item { name, bytes, gpu_bytes, what };
        let gpu = &self.gpu;
        [
            item(
                "program",
                self.baseline,
                gpu.program,
                "the program and libtorch before anything is loaded, and connections to the coordinator",
            ),
            item("kernels", self.kernels, 0, "compiled for the shapes of micro-batches, as they come up"),
            item("parameters", self.parameters, gpu.parameters, "to compute with"),
            item("sums", self.sums, gpu.sums, "exact sums of gradients, as many as are under way at one time"),
            item("gradient", self.gradient, gpu.gradient, "reduced, of the own shard"),
            item("masters", self.masters, gpu.masters, "what parameters lack of those in the own shard"),
            item("moments", self.moments, gpu.moments + gpu.staging, "AdamW's, of the own shard"),
            item(
                "activations",
                self.activations,
                gpu.activations,
                "of the largest micro-batches that go together, their leaves and temporaries",
            ),
            item("cache", self.cache, 0, "keys and values of prompts that are continued side by side"),
            item("communication", self.communication, gpu.communication, "buffers of connections to other workers"),
            item("checkpoint", self.copy, 0, "a copy of the own shard, written while training goes on"),
            item("snapshots", self.snapshots, 0, "of the own shard and a neighbour's, two each"),
        ]
    }

    /// With the activations of `other`, which differs in what is left on the host.
    fn with_activations_of(self, other: &Plan) -> Plan {
        let gpu = OnGpu { activations: other.gpu.activations, ..self.gpu };
        Plan { activations: other.activations, gpu, ..self }
    }

    /// Bytes of activations and temporaries where they are computed.
    pub fn activations_there(&self) -> u64 {
        self.activations.max(self.gpu.activations)
    }

    /// While the state is loaded from snapshots of `images` bytes: nothing is computed yet, and nothing saved.
    pub fn loading(&self, images: u64) -> u64 {
        self.total() - self.activations - self.copy - self.snapshots - self.cache + images
    }
}

/// Bytes of keys and values of one position in all blocks: decoding reads them as fp32.
fn position(spec: &ModelSpec) -> usize {
    2 * 4 * spec.layers * spec.kv_heads * spec.head_dim
}

impl Demand<'_> {
    /// What the worker needs where it runs a step like this.
    fn at(&self, choice: Choice) -> Result<Plan, model::Error> {
        let activations = self.activations(choice)?;
        let least = self.least(choice);
        Ok(match self.gpu {
            // Prompts are continued on the host.
            Some(_) if self.positions > 0 => Plan { activations, gpu: OnGpu { activations, ..least.gpu }, ..least },
            Some(_) => Plan { gpu: OnGpu { activations, ..least.gpu }, ..least },
            None => Plan { activations, ..least },
        })
    }

    /// Bytes of activations and temporaries.
    fn activations(&self, choice: Choice) -> Result<u64, model::Error> {
        let vocab = self.sketch.spec().vocab;
        let extremes = self.together(choice.wave).map(|tokens| Extremes { tokens, ..self.extremes });
        let batches: Vec<Batch> = extremes.filter_map(|extremes| extremes.batch(vocab)).collect();
        let mut activations = match batches.is_empty() {
            false => self.sketch.dry_run(&batches, choice.recompute, self.trains)?,
            true => 0,
        };
        if let (Stage::Three, true, Some(largest)) = (choice.stage, self.trains, self.extremes.batch(vocab)) {
            // Evaluation goes in waves too where parameters come bucket by bucket, and each unit may be the largest.
            let units = vec![largest; choice.wave];
            activations = activations.max(self.sketch.dry_run(&units, choice.recompute, false)?);
        }
        Ok(activations as u64)
    }

    /// Tokens of the largest micro-batches that may go together.
    fn together(&self, wave: usize) -> impl Iterator<Item = usize> + '_ {
        let most = self.extremes.tokens;
        let size = move |i| self.sizes.get(i).map_or(most, |&tokens| most.min(tokens as usize));
        // Evaluation may bring a larger one, alone.
        (0..wave).map(move |i| if i == 0 { most } else { size(i) })
    }

    /// Less than a choice needs, known at once: of all activations only the residual stream before each block.
    fn least(&self, choice: Choice) -> Plan {
        let (spec, layout) = (self.sketch.spec(), self.sketch.layout());
        let (parameters, trains) = (layout.parameters(), u64::from(self.trains));
        let width = self.sketch.compute().elt_size_in_bytes();
        let lent = |lots: usize| lending::lots(layout, lots).iter().map(|(_, elements)| elements).sum::<usize>();
        let present = if choice.stage == Stage::Three { self.owned + lent(2) } else { parameters };
        let one_wave = choice.wave >= self.range.micro_batches;
        let (sums, gradient) = match (choice.stage, one_wave, self.form) {
            (Stage::One, ..) => (parameters, 0),
            (_, false, _) => (lent(lending::accumulators(self.range.world)), 8),
            (_, true, Form::Narrow) => (lent(lending::accumulators(self.range.world)), 2),
            (_, true, _) => (lent(lending::accumulators(self.range.world)), 4),
        };
        let streams = if self.trains { spec.layers } else { 1 };
        let residual = (4 * self.together(choice.wave).sum::<usize>() * spec.hidden * streams) as u64;
        let (sums, gradient) = (trains * 8 * sums as u64, trains * (gradient * self.owned) as u64);
        let parameters = (present * width) as u64;
        let gpu = self.gpu.map(|_| self.on_gpu(choice, OnGpu { parameters, sums, gradient, ..OnGpu::default() }));
        // Beside a GPU the host has a copy of what is saved, and of the parameters that workers exchange on it.
        let on_host = gpu.is_none() || !choice.offload.leaves_sums();
        let mirrored = if choice.stage == Stage::Three { (self.owned * width) as u64 } else { parameters };
        let here = |bytes| if on_host { bytes } else { 0 };
        Plan {
            baseline: self.baseline + WORKING,
            parameters: if on_host { parameters } else { mirrored },
            sums: here(sums),
            gradient: here(gradient),
            masters: trains * (self.form.master_width() * self.owned) as u64,
            moments: trains * (self.form.moments_width() * self.owned) as u64,
            copy: 0,
            snapshots: 0,
            kernels: if gpu.is_none() { kernels::bytes(self.sketch.compute(), &self.extremes) } else { 0 },
            cache: self.positions * position(spec) as u64,
            communication: if self.range.world > 1 { tcp::BUFFERS as u64 } else { 0 },
            activations: if gpu.is_none() { residual } else { 0 },
            gpu: gpu.map_or(OnGpu::default(), |gpu| OnGpu { activations: residual, ..gpu }),
            choice,
        }
    }

    /// The cheapest plan in time that fits, else the one that lacks least.
    fn best(&self, limits: Limits) -> Result<Plan, model::Error> {
        let groups = match self.trains {
            true => self.range.groups(),
            false => {
                let (stage, wave, recompute, offload) = (Stage::One, 1, Recompute::Nothing, Offload::All);
                vec![vec![Choice { stage, wave, recompute, offload }]]
            }
        };
        let mut smallest: Option<Plan> = None;
        let size = |plan: &Plan| (limits.lack(plan), plan.total() + plan.gpu.total());
        let smaller = |a: Option<Plan>, b: Plan| Some(a.filter(|a| size(a) <= size(&b)).unwrap_or(b));
        // What is left on the host changes no activations.
        let mut known: Vec<Plan> = Vec::new();
        for group in groups {
            let mut fitting: Option<Plan> = None;
            for choice in group {
                let least = self.least(choice);
                if !limits.hold(&least) {
                    smallest = smaller(smallest, least);
                    continue;
                }
                let alike = |known: &&Plan| Choice { offload: choice.offload, ..known.choice } == choice;
                let plan = match known.iter().find(alike) {
                    Some(known) => least.with_activations_of(known),
                    None => self.at(choice)?,
                };
                known.push(plan);
                match limits.hold(&plan) {
                    true => fitting = smaller(fitting, plan),
                    false => smallest = smaller(smallest, plan),
                }
            }
            if let Some(plan) = fitting {
                return Ok(plan);
            }
        }
        Ok(smallest.expect("there is at least one choice"))
    }

    /// The plan, if `workers` such workers fit into what the machine has; else the numbers and the cheapest change.
    pub fn plan(&self, available: &Available, workers: usize) -> Result<Plan, Error> {
        let workers = workers.max(1);
        let each = available.bytes / workers as u64;
        let limits = Limits { host: each, gpu: self.gpu.unwrap_or(0) };
        let plan = self.best(limits)?;
        if limits.hold(&plan) {
            let fitting = |plan: &Plan, bytes: u64| if plan.total() + bytes <= each { bytes } else { 0 };
            let copy = if self.copies { (self.form.saved_width() * self.owned) as u64 } else { 0 };
            let plan = Plan { copy: fitting(&plan, copy), ..plan };
            let after_copy = plan.copy == copy && self.snapshots;
            let all = (4 * copy).max(2 * copy + self.images) + SNAPSHOT_HEADERS;
            let snapshots = if after_copy { all } else { 0 };
            return Ok(Plan { snapshots: fitting(&plan, snapshots), ..plan });
        }
        let remedy = remedy::remedy(self, limits, workers, &plan)?;
        let gpu = self.gpu.filter(|&gpu| plan.gpu.total() > gpu);
        Err(Error::TooLittle { plan: Box::new(plan), workers, available: available.clone(), gpu, remedy })
    }
}

/// The extremes of all micro-batches of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extremes {
    /// Tokens of the largest, and of the longest document of any.
    pub tokens: usize,
    pub document: usize,
    /// Documents of the one that has most.
    pub documents: usize,
}

impl Extremes {
    /// A micro-batch that needs as much memory as any with these: its other documents are of lengths that are padded most
    /// where they attend, and every token but the last of a document has a target. None where there are no tokens.
    pub fn batch(&self, vocab: usize) -> Option<Batch> {
        let Extremes { tokens, document, documents } = *self;
        if tokens == 0 || vocab == 0 {
            return None;
        }
        let document = document.clamp(1, tokens);
        let rest = tokens - document;
        let others = documents.saturating_sub(1).max(rest.div_ceil(document)).min(rest);
        let mut lengths = vec![document];
        if let Some(share) = rest.checked_div(others) {
            let short = share.saturating_sub(1) / LENGTH * LENGTH + 1;
            let mut left = rest - others * short;
            lengths.resize(1 + others, short);
            for step in [LENGTH, 1] {
                for length in &mut lengths[1..] {
                    let more = left.min(document - *length) / step * step;
                    (*length, left) = (*length + more, left - more);
                }
            }
        }
        let ends: Vec<usize> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        let token = |i: usize| (i % vocab) as u32;
        let mut targets: Vec<u32> = (1..=tokens).map(token).collect();
        ends.iter().for_each(|end| targets[end - 1] = NO_TARGET);
        let starts = ends.iter().zip(&lengths).map(|(end, length)| (end - length) as u32).collect();
        Some(Batch { tokens: (0..tokens).map(token).collect(), targets, starts })
    }
}

/// Why a run is refused before its first step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", too_little(plan, *workers, available, *gpu, remedy))]
    TooLittle { plan: Box<Plan>, workers: usize, available: Available, gpu: Option<u64>, remedy: String },
    #[error("the model is larger than any address space: use a smaller model")]
    Beyond,
    #[error("the memory plan cannot be made: {0}")]
    DryRun(#[from] model::Error),
}

fn too_little(plan: &Plan, workers: usize, available: &Available, gpu: Option<u64>, remedy: &str) -> String {
    if let Some(gpu) = gpu {
        let needed = Bytes(plan.gpu.total());
        return format!("this needs {needed} of each worker's GPU ({plan}), which has {} free: {remedy}", Bytes(gpu));
    }
    let (needed, left) = (Bytes(plan.total() * workers as u64), Bytes(available.bytes));
    let source = &available.source;
    format!(
        "this needs {needed} for {workers} worker(s) on this machine ({plan}), and {source} leaves {left}: {remedy}"
    )
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "each: parameters {}, gradient sums {}, gradient {}, optimizer {}, its copy to save {}, snapshots {}, activations {} ({}, {} together, {}), program {}",
            Bytes(self.parameters),
            Bytes(self.sums),
            Bytes(self.gradient),
            Bytes(self.masters + self.moments),
            Bytes(self.copy),
            Bytes(self.snapshots),
            Bytes(self.activations),
            self.choice.stage,
            self.choice.wave,
            self.choice.recompute,
            Bytes(self.baseline)
        )?;
        match self.gpu.total() {
            0 => Ok(()),
            bytes => write!(f, "; of its GPU {}: {}, offloaded: {}", Bytes(bytes), self.gpu, self.choice.offload.key()),
        }
    }
}

/// Bytes as a person reads them.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..1_000_000 => write!(f, "{} B", self.0),
            1_000_000..1_000_000_000 => write!(f, "{:.0} MB", self.0 as f64 / 1e6),
            _ => write!(f, "{:.2} GB", self.0 as f64 / 1e9),
        }
    }
}

#[cfg(test)]
mod tests;

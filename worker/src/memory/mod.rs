//! Memory before step 0: what a worker will need, what the machine has, and what was really used.

mod machine;
pub mod order;

pub use machine::{available, peak, resident, Available};

use crate::model::{self, Batch, Model, Recompute};
use crate::optim::lending;
use crate::optim::reduction::Stage;
use crate::optim::state::Form;
use order::{Choice, Range};
use std::fmt;
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
    /// Tokens of the largest micro-batch, and of its longest document.
    pub tokens: usize,
    pub document: usize,
    /// False for evaluation and generation only.
    pub trains: bool,
    /// What of the ways to run a step may be chosen.
    pub range: Range,
    /// The own shard is copied to be saved behind training, where there is room for that without computing anything again.
    pub copies: bool,
    /// Snapshots of the own shard and of a neighbour's are kept, where there is room for that besides.
    pub snapshots: bool,
    /// Bytes of the snapshots that the state is loaded from: held already, or fetched.
    pub images: u64,
    /// Resident bytes before anything is loaded: the binary and libtorch.
    pub baseline: u64,
}

/// Predicted peak resident memory by purpose, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub baseline: u64,
    pub parameters: u64,
    /// Integer accumulators of the exact sum.
    pub sums: u64,
    /// The own part of the gradient, where it is kept apart from them.
    pub gradient: u64,
    /// What of masters and moments of the own shard the parameters do not hold.
    pub optimizer: u64,
    /// The own shard again, for the save behind training; 0 where there is no room for it.
    pub copy: u64,
    /// Two snapshots of the own shard and two of a neighbour's, or one of each beside those that the state was loaded from; 0
    /// where there is no room for them.
    pub snapshots: u64,
    /// Saved for the backward pass of the largest micro-batches that go together, and all temporaries, as a dry run takes
    /// them.
    pub activations: u64,
    pub choice: Choice,
}

/// Kernels that oneDNN compiles, buffers of both connections and of the allocator: 45 to 55 MB were measured.
const WORKING: u64 = 64 << 20;
/// What four snapshots need besides the state.
const SNAPSHOT_HEADERS: u64 = 1 << 20;
/// Tokens by which micro-batches are rounded up.
const QUANTUM: usize = 64;
/// No micro-batch has more.
const MOST_TOKENS: usize = 120_000;

impl Plan {
    pub fn total(&self) -> u64 {
        let state = self.optimizer + self.copy + self.snapshots;
        self.baseline + self.parameters + self.sums + self.gradient + state + self.activations
    }

    /// While the state is loaded from snapshots of `images` bytes: nothing is computed yet, and nothing saved.
    pub fn loading(&self, images: u64) -> u64 {
        self.baseline + self.parameters + self.sums + self.gradient + self.optimizer + images
    }
}

impl Demand<'_> {
    /// What the worker needs where it runs a step like this.
    fn at(&self, choice: Choice) -> Result<Plan, model::Error> {
        let activations = match worst(self.tokens as u32, self.document as u32, self.sketch.spec().vocab) {
            Some(batch) => self.sketch.dry_run(&vec![batch; choice.wave], choice.recompute, self.trains)?,
            None => 0,
        };
        Ok(Plan { activations: activations as u64, ..self.least(choice) })
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
        Plan {
            baseline: self.baseline + WORKING,
            parameters: (present * width) as u64,
            sums: trains * 8 * sums as u64,
            gradient: trains * (gradient * self.owned) as u64,
            optimizer: trains * (self.form.width() * self.owned) as u64,
            copy: 0,
            snapshots: 0,
            activations: (4 * self.tokens * spec.hidden * streams * choice.wave) as u64,
            choice,
        }
    }

    /// The cheapest plan in time that fits into `most` bytes, else the smallest.
    fn best(&self, most: u64) -> Result<Plan, model::Error> {
        let groups = match self.trains {
            true => self.range.groups(),
            false => vec![vec![Choice { stage: Stage::One, wave: 1, recompute: Recompute::Nothing }]],
        };
        let mut smallest: Option<Plan> = None;
        let smaller = |a: Option<Plan>, b: Plan| Some(a.filter(|a| a.total() <= b.total()).unwrap_or(b));
        for group in groups {
            let mut fitting: Option<Plan> = None;
            for choice in group {
                let least = self.least(choice);
                if least.total() > most {
                    smallest = smaller(smallest, least);
                    continue;
                }
                let plan = self.at(choice)?;
                match plan.total() <= most {
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
        let plan = self.best(each)?;
        if plan.total() <= each {
            let fitting = |plan: &Plan, bytes: u64| if plan.total() + bytes <= each { bytes } else { 0 };
            let copy = if self.copies { (self.form.saved_width() * self.owned) as u64 } else { 0 };
            let plan = Plan { copy: fitting(&plan, copy), ..plan };
            let after_copy = plan.copy == copy && self.snapshots;
            let all = (4 * copy).max(2 * copy + self.images) + SNAPSHOT_HEADERS;
            let snapshots = if after_copy { all } else { 0 };
            return Ok(Plan { snapshots: fitting(&plan, snapshots), ..plan });
        }
        // Computing again costs little speed, shorter micro-batches a little more, fewer workers much, another model
        // everything.
        let less = Demand { range: Range { recompute: None, ..self.range }, ..*self };
        let sharded = Demand { range: Range { stage: None, ..less.range }, ..*self };
        let shorter = |tokens| Demand { tokens, document: self.document.min(tokens), ..less };
        let remedy = if self.range.recompute.is_some() && less.best(each)?.total() <= each {
            "set cluster.recompute = \"auto\"".to_owned()
        } else if self.range.stage.is_some() && sharded.best(each)?.total() <= each {
            "set cluster.zero_stage = \"auto\"".to_owned()
        } else {
            let (mut fitting, mut beyond) = (0, self.tokens.min(MOST_TOKENS).div_ceil(QUANTUM));
            while beyond - fitting > 1 {
                let middle = fitting.midpoint(beyond);
                match shorter(middle * QUANTUM).best(each)?.total() <= each {
                    true => fitting = middle,
                    false => beyond = middle,
                }
            }
            let fitting = fitting * QUANTUM;
            if fitting >= self.document && fitting > 0 {
                format!("set train.max_tokens_per_micro_batch = {fitting}")
            } else if fitting > 0 {
                format!("set train.max_length and train.max_tokens_per_micro_batch to {fitting}")
            } else if workers > 1 {
                format!("use fewer workers on this machine (cluster.workers = {})", workers - 1)
            } else {
                "use a smaller model or a machine with more memory".to_owned()
            }
        };
        Err(Error::TooLittle { plan: Box::new(plan), workers, available: available.clone(), remedy })
    }
}

/// The largest micro-batch of a plan: `tokens` tokens in documents of `document` tokens, predicting the next token wherever
/// there is one. None where there are no tokens.
pub fn worst(tokens: u32, document: u32, vocab: usize) -> Option<Batch> {
    if tokens == 0 || vocab == 0 {
        return None;
    }
    let document = document.clamp(1, tokens);
    let token = |i: u32| (i as usize % vocab) as u32;
    let last = |i: u32| (i + 1).is_multiple_of(document) || i + 1 == tokens;
    Some(Batch {
        tokens: (0..tokens).map(token).collect(),
        targets: (0..tokens).map(|i| if last(i) { NO_TARGET } else { token(i + 1) }).collect(),
        starts: (0..tokens).step_by(document as usize).collect(),
    })
}

/// Why a run is refused before its first step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this needs {needed} for {workers} worker(s) on this machine ({plan}), and {source_of} leaves {left}: {remedy}",
        needed = Bytes(plan.total() * *workers as u64), source_of = available.source, left = Bytes(available.bytes))]
    TooLittle { plan: Box<Plan>, workers: usize, available: Available, remedy: String },
    #[error("the model is larger than any address space: use a smaller model")]
    Beyond,
    #[error("the memory plan cannot be made: {0}")]
    DryRun(#[from] model::Error),
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "each: parameters {}, gradient sums {}, gradient {}, optimizer {}, its copy to save {}, snapshots {}, activations {} ({}, {} together, {}), program {}",
            Bytes(self.parameters),
            Bytes(self.sums),
            Bytes(self.gradient),
            Bytes(self.optimizer),
            Bytes(self.copy),
            Bytes(self.snapshots),
            Bytes(self.activations),
            self.choice.stage,
            self.choice.wave,
            self.choice.recompute,
            Bytes(self.baseline)
        )
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
mod tests {
    use super::*;
    use unisono_configs::model::ModelSpec;

    fn sketch() -> Model {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 512, "rope_theta": 10000.0
        });
        let spec = ModelSpec::from_json(&config, std::path::Path::new("config.json")).unwrap();
        Model::sketch(spec, tch::Kind::BFloat16).unwrap()
    }

    fn demand(sketch: &Model) -> Demand<'_> {
        let (stage, wave, recompute) = (Some(Stage::One), None, Some(Recompute::Nothing));
        let range = Range { stage, wave, recompute, micro_batches: 8, world: 2 };
        let (owned, form, trains, copies, snapshots, images) = (100_000, Form::Split, true, false, false, 0);
        let (tokens, document, baseline) = (4096, 256, 1000);
        Demand { sketch, owned, form, tokens, document, trains, range, copies, snapshots, images, baseline }
    }

    fn at(recompute: Recompute) -> Choice {
        Choice { stage: Stage::One, wave: 1, recompute }
    }

    /// Any level may be chosen.
    fn free(demand: Demand<'_>) -> Demand<'_> {
        Demand { range: Range { recompute: None, ..demand.range }, ..demand }
    }

    fn left(bytes: u64) -> Available {
        Available { bytes, source: "the cgroup".into() }
    }

    #[test]
    fn a_plan_that_fits_passes_and_one_byte_less_does_not() {
        let sketch = sketch();
        let demand = demand(&sketch);
        let plan = demand.at(at(Recompute::Nothing)).unwrap();
        for workers in [1, 2] {
            let total = plan.total() * workers;
            assert_eq!(demand.plan(&left(total), workers as usize).unwrap(), plan);
            assert!(demand.plan(&left(total - 1), workers as usize).is_err());
        }
        // The copy is made where there is room, and is no reason to refuse or to compute anything again.
        let copies = Demand { copies: true, ..demand };
        let copy = |bytes| copies.plan(&left(bytes), 1).unwrap().copy;
        let whole = plan.total() + 1_200_000;
        assert_eq!((copy(whole - 1), copy(whole)), (0, 1_200_000));
        // So are snapshots, after that.
        let held = Demand { snapshots: true, ..copies };
        let snapshots = |bytes| held.plan(&left(bytes), 1).unwrap().snapshots;
        let all = 4 * 1_200_000 + SNAPSHOT_HEADERS;
        assert_eq!((snapshots(whole + all - 1), snapshots(whole + all)), (0, all));
        // Where the state comes from snapshots of another cut, these stay until the new ones are whole.
        let shard = 1_200_000;
        let loaded = Demand { images: 3 * shard, ..held };
        let snapshots = |bytes| loaded.plan(&left(bytes), 1).unwrap().snapshots;
        assert_eq!((snapshots(whole + all), snapshots(whole + all + shard)), (0, all + shard));
        assert_eq!(plan.loading(7), plan.total() - plan.activations + 7);
        let parameters = sketch.layout().parameters() as u64;
        assert_eq!((plan.parameters, plan.sums, plan.optimizer), (2 * parameters, 8 * parameters, 1_000_000));
        let idle = Demand { trains: false, ..demand }.plan(&left(1 << 40), 1).unwrap();
        assert_eq!((idle.sums, idle.optimizer), (0, 0));
        assert!(idle.activations < plan.activations);
    }

    #[test]
    fn more_is_sharded_and_fewer_go_together_before_a_run_is_refused() {
        let sketch = sketch();
        let fixed = demand(&sketch);
        let any = Demand { range: Range { stage: None, recompute: None, ..fixed.range }, ..fixed };
        let parameters = sketch.layout().parameters() as u64;
        let mut bytes = u64::MAX / 4;
        let mut seen = Vec::new();
        // Ever less memory, until nothing fits.
        while let Ok(plan) = any.plan(&left(bytes), 1) {
            let Choice { stage, wave, .. } = plan.choice;
            let (sums, present) =
                if stage == Stage::One { (8, 2) } else { (0, if stage == Stage::Two { 2 } else { 0 }) };
            assert!(plan.sums >= sums * parameters && plan.parameters >= present * parameters, "{plan}");
            let kept = match (stage, wave) {
                (Stage::One, _) => 0,
                (_, 8) => 4 * 100_000,
                _ => 8 * 100_000,
            };
            assert_eq!(plan.gradient, kept);
            seen.push(plan.choice);
            bytes = plan.total() - 1;
        }
        assert_eq!(seen.last().unwrap().recompute, Recompute::Block);
        assert!(seen.iter().any(|c| c.stage == Stage::Two) && seen.last().unwrap().stage == Stage::Three, "{seen:?}");
        let remedy = fixed.plan(&left(bytes + 1), 1).unwrap_err().to_string();
        assert!(remedy.contains("set cluster.recompute") || remedy.contains("set cluster.zero_stage"), "{remedy}");
    }

    #[test]
    fn what_does_not_fit_is_computed_again() {
        let sketch = sketch();
        let demand = free(demand(&sketch));
        for level in Recompute::ALL {
            let exact = demand.at(at(level)).unwrap();
            assert_eq!(demand.plan(&left(exact.total()), 1).unwrap(), exact);
        }
        assert!(demand.plan(&left(demand.at(at(Recompute::Block)).unwrap().total() - 1), 1).is_err());
    }

    #[test]
    fn the_remedy_is_enough_and_the_cheapest() {
        let sketch = sketch();
        let fixed = demand(&sketch);
        let sentence =
            |demand: &Demand<'_>, bytes, workers| demand.plan(&left(bytes), workers).unwrap_err().to_string();
        let less = fixed.at(at(Recompute::UpProjection)).unwrap().total();
        assert!(sentence(&fixed, less, 1).contains("set cluster.recompute = \"auto\""));
        let demand = free(fixed);
        let total = |tokens: usize| {
            Demand { tokens, document: demand.document.min(tokens), ..demand }.at(at(Recompute::Block)).unwrap().total()
        };
        assert!(sentence(&demand, total(1024), 1).contains("set train.max_tokens_per_micro_batch = 1024"));
        assert!(sentence(&demand, 2 * total(1024), 2).contains("set train.max_tokens_per_micro_batch = 1024"));
        assert!(
            sentence(&demand, total(128), 1).contains("train.max_length and train.max_tokens_per_micro_batch to 128")
        );
        assert!(sentence(&demand, 2 * WORKING + 3_000_000, 2).contains("cluster.workers = 1"));
        assert!(sentence(&demand, 2_000, 1).contains("smaller model"));
    }

    #[test]
    fn bytes_read_well() {
        let shown: Vec<_> = [999, 2_400_000, 5_210_000_000].map(|b| Bytes(b).to_string()).into();
        assert_eq!(shown, ["999 B", "2 MB", "5.21 GB"]);
    }
}

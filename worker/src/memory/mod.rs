//! Memory before step 0: what a worker will need, what the machine has, and what was really used.

mod machine;

pub use machine::{available, peak, resident, Available};

use crate::model::{self, Batch, Model, Recompute};
use crate::optim::state::Form;
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
    /// Absent: the least that fits.
    pub recompute: Option<Recompute>,
    /// The own shard is copied to be saved behind training, where there is room for that without computing anything again.
    pub copies: bool,
    /// Snapshots of the own shard and of a neighbour's are kept, where there is room for that besides.
    pub snapshots: bool,
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
    /// What of masters and moments of the own shard the parameters do not hold.
    pub optimizer: u64,
    /// The own shard again, for the save behind training; 0 where there is no room for it.
    pub copy: u64,
    /// Two snapshots of the own shard and two of a neighbour's; 0 where there is no room for them.
    pub snapshots: u64,
    /// Saved for the backward pass of the largest micro-batch, and all temporaries, as a dry run takes them.
    pub activations: u64,
    pub recompute: Recompute,
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
        self.baseline + self.parameters + self.sums + self.optimizer + self.copy + self.snapshots + self.activations
    }
}

impl Demand<'_> {
    /// What the worker needs at a level.
    fn at(&self, recompute: Recompute) -> Result<Plan, model::Error> {
        let activations = match worst(self.tokens as u32, self.document as u32, self.sketch.spec().vocab) {
            Some(batch) => self.sketch.dry_run(&batch, recompute, self.trains)?,
            None => 0,
        };
        Ok(Plan { activations: activations as u64, recompute, ..self.least() })
    }

    /// Less than any level needs, known at once: of all activations only the residual stream before each block.
    fn least(&self) -> Plan {
        let (spec, parameters) = (self.sketch.spec(), self.sketch.layout().parameters());
        let (trains, width) = (u64::from(self.trains), self.sketch.compute().elt_size_in_bytes());
        let streams = if self.trains { spec.layers } else { 1 };
        Plan {
            baseline: self.baseline + WORKING,
            parameters: (parameters * width) as u64,
            sums: trains * 8 * parameters as u64,
            optimizer: trains * (self.form.width() * self.owned) as u64,
            copy: 0,
            snapshots: 0,
            activations: (4 * self.tokens * spec.hidden * streams) as u64,
            recompute: Recompute::Block,
        }
    }

    /// The plan with the least to compute again that fits into `most` bytes, else one that does not fit either.
    fn best(&self, most: u64) -> Result<Plan, model::Error> {
        let levels = match self.recompute {
            Some(level) => vec![level],
            None if self.trains => Recompute::ALL.to_vec(),
            None => vec![Recompute::Nothing],
        };
        let least = self.least();
        if least.total() > most {
            return Ok(least);
        }
        let mut least: Option<Plan> = None;
        for level in levels {
            let plan = self.at(level)?;
            if plan.total() <= most {
                return Ok(plan);
            }
            least = Some(least.filter(|l| l.total() <= plan.total()).unwrap_or(plan));
        }
        Ok(least.expect("there is at least one level"))
    }

    /// The plan, if `workers` such workers fit into what the machine has; else the numbers and the cheapest change.
    pub fn plan(&self, available: &Available, workers: usize) -> Result<Plan, Error> {
        let workers = workers.max(1);
        let each = available.bytes / workers as u64;
        let plan = self.best(each)?;
        if plan.total() <= each {
            let fitting = |plan: &Plan, bytes: u64| if plan.total() + bytes <= each { bytes } else { 0 };
            let shard = (self.form.saved_width() * self.owned) as u64;
            let copy = if self.copies { shard } else { 0 };
            let plan = Plan { copy: fitting(&plan, copy), ..plan };
            let after_copy = plan.copy == copy && self.snapshots;
            let snapshots = if after_copy { 4 * shard + SNAPSHOT_HEADERS } else { 0 };
            return Ok(Plan { snapshots: fitting(&plan, snapshots), ..plan });
        }
        // Computing again costs little speed, shorter micro-batches a little more, fewer workers much, another model
        // everything.
        let less = Demand { recompute: None, ..*self };
        let shorter = |tokens| Demand { tokens, document: self.document.min(tokens), ..less };
        let remedy = if self.recompute.is_some() && less.best(each)?.total() <= each {
            "set cluster.recompute = \"auto\"".to_owned()
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
            "each: parameters {}, gradient sums {}, optimizer {}, its copy to save {}, snapshots {}, activations {} ({}), program {}",
            Bytes(self.parameters),
            Bytes(self.sums),
            Bytes(self.optimizer),
            Bytes(self.copy),
            Bytes(self.snapshots),
            Bytes(self.activations),
            self.recompute,
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
        let (recompute, copies) = (Some(Recompute::Nothing), false);
        Demand {
            sketch,
            owned: 100_000,
            form: Form::Split,
            tokens: 4096,
            document: 256,
            trains: true,
            recompute,
            copies,
            snapshots: false,
            baseline: 1000,
        }
    }

    fn left(bytes: u64) -> Available {
        Available { bytes, source: "the cgroup".into() }
    }

    #[test]
    fn a_plan_that_fits_passes_and_one_byte_less_does_not() {
        let sketch = sketch();
        let demand = demand(&sketch);
        let plan = demand.at(Recompute::Nothing).unwrap();
        for workers in [1, 2] {
            let total = plan.total() * workers;
            assert_eq!(demand.plan(&left(total), workers as usize).unwrap(), plan);
            assert!(demand.plan(&left(total - 1), workers as usize).is_err());
        }
        // The copy is made where there is room, and is no reason to refuse or to compute anything again.
        let copies = Demand { copies: true, ..demand };
        let copy = |bytes| copies.plan(&left(bytes), 1).unwrap().copy;
        let (whole, shard) = (plan.total() + 1_200_000, 1_200_000);
        assert_eq!((copy(whole - 1), copy(whole)), (0, shard));
        // So are snapshots, after that.
        let held = Demand { snapshots: true, ..copies };
        let snapshots = |bytes| held.plan(&left(bytes), 1).unwrap().snapshots;
        let all = 4 * shard + SNAPSHOT_HEADERS;
        assert_eq!((snapshots(whole + all - 1), snapshots(whole + all)), (0, all));
        let parameters = sketch.layout().parameters() as u64;
        assert_eq!((plan.parameters, plan.sums, plan.optimizer), (2 * parameters, 8 * parameters, 1_000_000));
        let idle = Demand { trains: false, recompute: None, ..demand }.plan(&left(1 << 40), 1).unwrap();
        assert_eq!((idle.sums, idle.optimizer), (0, 0));
        assert!(idle.activations < plan.activations);
    }

    #[test]
    fn what_does_not_fit_is_computed_again() {
        let sketch = sketch();
        let demand = Demand { recompute: None, ..demand(&sketch) };
        for level in Recompute::ALL {
            let exact = demand.at(level).unwrap();
            assert_eq!(demand.plan(&left(exact.total()), 1).unwrap(), exact);
        }
        assert!(demand.plan(&left(demand.at(Recompute::Block).unwrap().total() - 1), 1).is_err());
    }

    #[test]
    fn the_remedy_is_enough_and_the_cheapest() {
        let sketch = sketch();
        let fixed = demand(&sketch);
        let sentence =
            |demand: &Demand<'_>, bytes, workers| demand.plan(&left(bytes), workers).unwrap_err().to_string();
        let less = fixed.at(Recompute::UpProjection).unwrap().total();
        assert!(sentence(&fixed, less, 1).contains("set cluster.recompute = \"auto\""));
        let demand = Demand { recompute: None, ..fixed };
        let total = |tokens: usize| {
            Demand { tokens, document: demand.document.min(tokens), ..demand }.at(Recompute::Block).unwrap().total()
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

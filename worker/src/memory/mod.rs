//! Memory before step 0: what a worker will need, what the machine has, and what was really used.

mod machine;

pub use machine::{available, peak, resident, Available};

use std::fmt;
use unisono_configs::model::ModelSpec;

/// What decides how much memory a worker needs.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    pub spec: &'a ModelSpec,
    /// Elements of the model and of the own shard.
    pub parameters: usize,
    pub owned: usize,
    /// Elements of the largest parameter tensor: its gradient exists whole for a moment.
    pub largest: usize,
    /// Bytes of a parameter as the model computes with it.
    pub width: usize,
    /// Tokens of the largest micro-batch, and of its longest document.
    pub tokens: usize,
    pub document: usize,
    /// False for evaluation and generation only.
    pub trains: bool,
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
    /// Masters and moments of the own shard.
    pub optimizer: u64,
    /// Saved for the backward pass of the largest micro-batch, and its temporaries.
    pub activations: u64,
}

/// Kernels that oneDNN compiles, buffers of both connections and of the allocator: 45 to 55 MB were measured.
const WORKING: u64 = 64 << 20;
/// Tokens by which micro-batches are rounded up.
const QUANTUM: usize = 64;
/// Rows of logits that exist at a time.
const HEAD_ROWS: usize = 512;

impl Plan {
    pub fn new(demand: &Demand<'_>) -> Self {
        let (spec, width, tokens) = (demand.spec, demand.width, demand.tokens);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        // Per token and layer: both norms' outputs, q, k, v, attention's output, gate, up and their product as operands;
        // the residual stream twice in fp32.
        let layer = width * (2 * spec.hidden + 2 * q + 2 * kv + 3 * spec.intermediate) + 8 * spec.hidden;
        let saved = tokens * (layer * if demand.trains { spec.layers } else { 1 } + 8 * spec.hidden);
        // One block's temporaries in fp32, the probabilities of its longest documents, and the head's logits twice.
        let block = tokens * 4 * (2 * spec.hidden + q + 2 * kv + 3 * spec.intermediate);
        let scores = 2 * spec.heads * demand.document * demand.document * 4 * tokens.div_ceil(demand.document.max(1));
        let logits = 2 * 4 * tokens.min(HEAD_ROWS) * spec.vocab;
        let gradient = if demand.trains { 4 * demand.largest } else { 0 };
        Plan {
            baseline: demand.baseline + WORKING,
            parameters: (demand.parameters * width) as u64,
            sums: if demand.trains { 8 * demand.parameters as u64 } else { 0 },
            optimizer: if demand.trains { 12 * demand.owned as u64 } else { 0 },
            activations: (saved + block + scores + logits + gradient) as u64,
        }
    }

    pub fn total(&self) -> u64 {
        self.baseline + self.parameters + self.sums + self.optimizer + self.activations
    }
}

impl Demand<'_> {
    /// The plan, if `workers` such workers fit into what the machine has; else the numbers and the cheapest change.
    pub fn plan(&self, available: &Available, workers: usize) -> Result<Plan, Error> {
        let (plan, workers) = (Plan::new(self), workers.max(1));
        let fits = |plan: &Plan| plan.total().saturating_mul(workers as u64) <= available.bytes;
        if fits(&plan) {
            return Ok(plan);
        }
        // Shorter micro-batches cost a little speed, fewer workers much, another model everything.
        let shorter = |tokens| Demand { tokens, document: self.document.min(tokens), ..*self };
        let steps = (1..self.tokens.div_ceil(QUANTUM)).collect::<Vec<_>>();
        let fitting = steps.partition_point(|&n| fits(&Plan::new(&shorter(n * QUANTUM)))) * QUANTUM;
        let remedy = if fitting >= self.document && fitting > 0 {
            format!("set train.max_tokens_per_micro_batch = {fitting}")
        } else if fitting > 0 {
            format!("set train.max_length and train.max_tokens_per_micro_batch to {fitting}")
        } else if workers > 1 {
            format!("use fewer workers on this machine (cluster.workers = {})", workers - 1)
        } else {
            "use a smaller model or a machine with more memory".to_owned()
        };
        Err(Error::TooLittle { plan, workers, available: available.clone(), remedy })
    }
}

/// Why a run is refused before its first step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this needs {needed} for {workers} worker(s) on this machine ({plan}), and {source_of} leaves {left}: {remedy}",
        needed = Bytes(plan.total() * *workers as u64), source_of = available.source, left = Bytes(available.bytes))]
    TooLittle { plan: Plan, workers: usize, available: Available, remedy: String },
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "each: parameters {}, gradient sums {}, optimizer {}, activations {}, program {}",
            Bytes(self.parameters),
            Bytes(self.sums),
            Bytes(self.optimizer),
            Bytes(self.activations),
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

    fn spec() -> ModelSpec {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 512, "rope_theta": 10000.0
        });
        ModelSpec::from_json(&config, std::path::Path::new("config.json")).unwrap()
    }

    fn demand(spec: &ModelSpec) -> Demand<'_> {
        let (parameters, owned, largest) = (1_000_000, 500_000, 64_000);
        Demand { spec, parameters, owned, largest, width: 2, tokens: 4096, document: 256, trains: true, baseline: 1000 }
    }

    fn left(bytes: u64) -> Available {
        Available { bytes, source: "the cgroup".into() }
    }

    #[test]
    fn a_plan_that_fits_passes_and_one_byte_less_does_not() {
        let spec = spec();
        let demand = demand(&spec);
        let total = Plan::new(&demand).total();
        for workers in [1, 2] {
            assert_eq!(demand.plan(&left(total * workers), workers as usize).unwrap().total(), total);
            assert!(demand.plan(&left(total * workers - 1), workers as usize).is_err());
        }
        let plan = Plan::new(&demand);
        assert_eq!((plan.parameters, plan.sums, plan.optimizer), (2_000_000, 8_000_000, 6_000_000));
        let idle = Plan::new(&Demand { trains: false, ..demand });
        assert_eq!((idle.sums, idle.optimizer), (0, 0));
        assert!(idle.activations < plan.activations);
    }

    #[test]
    fn the_remedy_is_enough_and_the_cheapest() {
        let spec = spec();
        let demand = demand(&spec);
        let sentence = |bytes, workers| demand.plan(&left(bytes), workers).unwrap_err().to_string();
        let total = |tokens| Plan::new(&Demand { tokens, document: demand.document.min(tokens), ..demand }).total();
        assert!(sentence(total(1024), 1).contains("set train.max_tokens_per_micro_batch = 1024"));
        assert!(sentence(2 * total(1024), 2).contains("set train.max_tokens_per_micro_batch = 1024"));
        assert!(sentence(total(128), 1).contains("train.max_length and train.max_tokens_per_micro_batch to 128"));
        assert!(sentence(2 * WORKING + 17_000_000, 2).contains("cluster.workers = 1"));
        assert!(sentence(2_000, 1).contains("smaller model"));
    }

    #[test]
    fn bytes_read_well() {
        let shown: Vec<_> = [999, 2_400_000, 5_210_000_000].map(|b| Bytes(b).to_string()).into();
        assert_eq!(shown, ["999 B", "2 MB", "5.21 GB"]);
    }
}

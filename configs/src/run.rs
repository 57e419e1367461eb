//! `RunConfig`: the TOML that describes a run, with every default written where the key is.

mod error;
mod names;
mod read;
mod resolve;
mod section;
#[cfg(test)]
mod tests;
mod tree;

pub use error::Error;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole run. Field docs are the reference of the config file; `resolved` values are what a run records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    pub model: Model,
    pub data: Vec<Data>,
    #[serde(default)]
    pub split: Split,
    #[serde(default)]
    pub train: Train,
    #[serde(default)]
    pub cluster: Cluster,
    #[serde(default)]
    pub eval: Eval,
    #[serde(default)]
    pub checkpoint: Checkpoint,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Hugging Face directory: config.json, *.safetensors (one or sharded), tokenizer.json.
    pub path: PathBuf,
    /// Precision of GEMM operands. "auto": bf16 where the processor has bf16 arithmetic, else fp32; recorded as resolved.
    #[serde(default)]
    pub compute: Compute,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    #[default]
    Auto,
    Bf16,
    Fp32,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Name of the task in metrics; default: the file's stem.
    #[serde(default)]
    pub name: Option<String>,
    /// A .jsonl file.
    pub path: PathBuf,
    #[serde(default)]
    pub format: Format,
    /// Jinja source of prompt and completion, separated by `|||`. Absent: the row's own `prompt` and `completion`.
    #[serde(default)]
    pub template: Option<String>,
    /// A share of the rows, by hash of the source row, or a file; overrides `split.validation`.
    #[serde(default)]
    pub validation: Option<Held>,
    #[serde(default)]
    pub test: Option<Held>,
    /// What to do with a row that cannot be trained on.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// With `on_bad_row = "drop"`: the largest share of rows that may be dropped.
    #[serde(default = "default_max_dropped")]
    pub max_dropped: f64,
}

impl Data {
    /// The name of the task.
    pub fn task(&self) -> String {
        let stem = || self.path.file_stem().map_or_else(|| "data".into(), |s| s.to_string_lossy().into_owned());
        self.name.clone().unwrap_or_else(stem)
    }
}

fn default_max_dropped() -> f64 {
    0.01
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `text` where rows have only a `text` field, else `prompt-completion`.
    #[default]
    Auto,
    PromptCompletion,
    /// The whole text is the completion; there is no prompt.
    Text,
}

/// Rows held out of training: a share of the table's rows, or a file of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Held {
    Share(f64),
    File(PathBuf),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    #[default]
    Refuse,
    Drop,
}

/// Shares held out of every table, capped at 1,000 rows each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Split {
    pub validation: f64,
    pub test: f64,
}

impl Default for Split {
    fn default() -> Self {
        Split { validation: 0.05, test: 0.05 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// Passes over the training rows. Ignored where `steps` is set.
    pub epochs: u64,
    /// Optimizer updates in all; overrides `epochs`.
    pub steps: Option<u64>,
    /// Examples per step. The last, partial batch of an epoch is trained.
    pub global_batch_size: usize,
    /// Micro-batches per step, at least; decides the bits, so never automatic.
    pub micro_batches: usize,
    /// Longest example, tokens. A longer completion is cut at its right end and loses its end of text; a prompt that
    /// fills the whole length makes a bad row.
    pub max_length: usize,
    pub max_tokens_per_micro_batch: usize,
    pub learning_rate: f64,
    pub schedule: Schedule,
    /// Below 1: a share of the steps; else a number of steps.
    pub warmup_steps: f64,
    /// On matrices only; norms and biases are skipped.
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    /// The gradient is scaled to at most this norm; 0: never.
    pub max_grad_norm: f64,
    pub shuffle: bool,
    pub seed: u64,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            epochs: 1,
            steps: None,
            global_batch_size: 64,
            micro_batches: 8,
            max_length: 1024,
            max_tokens_per_micro_batch: 4096,
            learning_rate: 2e-5,
            schedule: Schedule::Cosine,
            warmup_steps: 0.03,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            max_grad_norm: 1.0,
            shuffle: true,
            seed: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// To 0 along a half cosine.
    Cosine,
    /// To 0 along a line.
    Linear,
    Constant,
    /// Warmup, stable, decay: constant, then to 0 along a line over the last fifth.
    Wsd,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// "auto": one per GPU; one per core on a CPU, at most `train.micro_batches`.
    pub workers: Count,
    /// Intra-op threads of each worker; decides the bits on a CPU.
    pub threads_per_worker: usize,
    pub device: Device,
    /// "auto" | 1 | 2 | 3: same bits.
    pub zero_stage: ZeroStage,
    /// "balanced": by cost. "shuffled": at random by seed, to see that it does not matter. Same bits.
    pub assignment: Assignment,
    /// Seconds after which a silent peer is given up.
    pub peer_timeout: f64,
}

impl Default for Cluster {
    fn default() -> Self {
        Cluster {
            workers: Count::Auto,
            threads_per_worker: 1,
            device: Device::Auto,
            zero_stage: ZeroStage::Auto,
            assignment: Assignment::Balanced,
            peer_timeout: 60.0,
        }
    }
}

/// "auto" or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Auto,
    Exactly(usize),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// "auto" or a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroStage {
    Auto,
    Stage(u32),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Assignment {
    #[default]
    Balanced,
    Shuffled,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Eval {
    /// Steps between validations; 0: only at the end.
    pub every: u64,
}

impl Default for Eval {
    fn default() -> Self {
        Eval { every: 50 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// Newest checkpoints kept.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 500, keep: 3 }
    }
}

/// Serializes `Auto` as "auto" and the rest as a number.
macro_rules! auto_or_number {
    ($type:ident, $variant:ident, $number:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $type::Auto => serializer.serialize_str("auto"),
                    $type::$variant(n) => serializer.serialize_u64(*n as u64),
                }
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Raw {
                    Number($number),
                    Word(String),
                }
                match Raw::deserialize(deserializer)? {
                    Raw::Number(n) => Ok($type::$variant(n)),
                    Raw::Word(w) if w == "auto" => Ok($type::Auto),
                    Raw::Word(w) => Err(serde::de::Error::custom(format!("\"{w}\" is neither \"auto\" nor a number"))),
                }
            }
        }
    };
}

auto_or_number!(Count, Exactly, usize);
auto_or_number!(ZeroStage, Stage, u32);

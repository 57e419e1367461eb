//! `RunConfig`: the TOML that describes a run, with every default written where the key is.

mod barriers;
mod cluster;
mod error;
mod gate;
mod names;
mod read;
mod resolve;
mod resume;
mod rows;
mod section;
#[cfg(test)]
mod tests;
mod tree;

pub use barriers::{Checkpoint, Eval};
pub use cluster::{Assignment, Cluster, Count, Device, Offload, Recompute, Transport, ZeroStage};
pub use error::Error;
pub use gate::{Gate, Level};
pub use names::explanation;
pub use rows::{Mix, Mixing, Tokens, Unit};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A whole run. Field docs are the reference of the config file; `resolved` values are what a run records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    pub model: Model,
    pub data: Vec<Data>,
    #[serde(default)]
    pub gate: Gate,
    #[serde(default)]
    pub split: Split,
    #[serde(default)]
    pub mix: Mix,
    #[serde(default)]
    pub tokens: Tokens,
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
    /// Hugging Face directory: config.json, *.safetensors (one or sharded), tokenizer.json. Or the name of such a model
    /// on the Hugging Face Hub (`Qwen/Qwen3-0.6B`), from its local cache; or an object store's URL (`s3://...`,
    /// `gs://...`), fetched once.
    pub path: PathBuf,
    /// Branch, tag or commit of a model of the Hub; absent: main.
    #[serde(default)]
    pub revision: Option<String>,
    /// Precision of matrix products; everything else is fp32.
    #[serde(default)]
    pub compute: Compute,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// "bf16" where the processor has bf16 arithmetic, else "fp32"; the run records which.
    #[default]
    Auto,
    Bf16,
    Fp32,
}

/// One table per task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Name of the task in metrics; default: the file's stem.
    #[serde(default)]
    pub name: Option<String>,
    /// A .jsonl file (one JSON object per line), a .json file (a list of objects), a .parquet file, a directory of such
    /// files, or a glob (`*` and `?`); several files are read in the order of their names. Or a data set of the Hugging
    /// Face Hub (`openai/gsm8k`, or files of it: `openai/gsm8k/main/train-*`), from its local cache; or an object store's
    /// URL (`s3://bucket/key`, `gs://bucket/key`), fetched once.
    pub path: PathBuf,
    /// Branch, tag or commit of a data set of the Hub; absent: main.
    #[serde(default)]
    pub revision: Option<String>,
    /// What the rows hold.
    #[serde(default)]
    pub format: Format,
    /// What the rows call the columns of the format. Of messages, role and content may be called otherwise, too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: BTreeMap<String, String>,
    /// Jinja source of prompt and completion, separated by |||, over any fields of a row; taken literally, white space
    /// included. Absent: the row's own columns.
    #[serde(default)]
    pub template: Option<String>,
    /// A templates.yaml of promptsource's form, instead of template: Jinja with |||, answer_choices, choice and
    /// most_frequent, rendered as promptsource does (parts are stripped).
    #[serde(default)]
    pub template_file: Option<PathBuf>,
    /// The template of template_file to render with. Absent: for each row one of all that print something for it, drawn by
    /// train.seed.
    #[serde(default)]
    pub template_name: Option<String>,
    /// Of template_file: stands between prompt and completion, and belongs to the completion.
    #[serde(default = "default_delimiter")]
    pub delimiter: String,
    /// Examples before each prompt: rows of the same table's training split, drawn by train.seed, never the row itself.
    #[serde(default)]
    pub few_shot: usize,
    /// Follows each of these examples.
    #[serde(default = "default_few_shot_delimiter")]
    pub few_shot_delimiter: String,
    /// Rows with the same value of this field are held out together. Absent: rows with the same prompt where rows have a
    /// prompt, else equal rows.
    #[serde(default)]
    pub group_by: Option<String>,
    /// Of conversations: the messages of these roles are what the model is asked for.
    #[serde(default = "default_roles")]
    pub roles_to_train: Vec<String>,
    /// Of conversations: which of the messages of these roles.
    #[serde(default)]
    pub turns: Turns,
    /// Rows held out to validate on: a share, or a .jsonl file; overrides split.validation.
    #[serde(default)]
    pub validation: Option<Held>,
    /// Rows held out to test on: a share, or a .jsonl file; overrides split.test.
    #[serde(default)]
    pub test: Option<Held>,
    /// What to do with a row that cannot be trained on.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// With on_bad_row = "drop": the largest share of rows that may be dropped.
    #[serde(default = "default_max_dropped")]
    pub max_dropped: f64,
    /// With mix.by = "weights": the task's part of an epoch, in proportion to the other tables'.
    #[serde(default = "default_weight")]
    pub weight: f64,
}

impl Data {
    /// The name of the task.
    pub fn task(&self) -> String {
        self.name.clone().unwrap_or_else(|| stem(&self.path))
    }
}

/// The last name of a path without its ending; of a glob, the directory that it is in.
pub(crate) fn stem(path: &Path) -> String {
    let plain = path.ancestors().find(|at| at.file_name().is_some_and(|n| !n.to_string_lossy().contains(['*', '?'])));
    let stem = plain.and_then(Path::file_stem).map(|s| s.to_string_lossy().into_owned());
    stem.unwrap_or_else(|| "data".into())
}

fn default_weight() -> f64 {
    1.0
}

fn default_delimiter() -> String {
    " ".into()
}

fn default_few_shot_delimiter() -> String {
    "\n\n".into()
}

fn default_max_dropped() -> f64 {
    0.01
}

fn default_roles() -> Vec<String> {
    vec!["assistant".into()]
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// Each of them.
    #[default]
    All,
    /// The last one: for templates that show earlier turns otherwise than they were written, as thinking models' do.
    Last,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// What the columns of the first hundred rows look like; where they differ, the run is refused.
    #[default]
    Auto,
    /// Columns prompt and completion: texts, or lists of messages that the model's chat template renders.
    PromptCompletion,
    /// A column messages (or conversations) of objects with role and content, and where there are some, tools: rendered by
    /// the model's chat template.
    Messages,
    /// Columns instruction, output and where there is one, input, in the words of Stanford Alpaca's prompt.
    Alpaca,
    /// A column conversations of objects with from and value: rendered by the model's chat template.
    Sharegpt,
    /// A column text: all of it is the completion, there is no prompt.
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
    /// Before anything starts.
    #[default]
    Refuse,
    /// And count it; the first three are shown.
    Drop,
}

/// Shares held out of every table, by hash of the source row: at most 1,000 rows each, and at least one of a table with
/// ten different rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Split {
    /// Share of the rows to validate on.
    pub validation: f64,
    /// Share of the rows to test on.
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
    /// Passes over the training rows. Ignored where steps is set.
    pub epochs: u64,
    /// Optimizer updates in all; overrides epochs.
    pub steps: Option<u64>,
    /// Examples per step. The last, partial batch of an epoch is trained.
    pub global_batch_size: usize,
    /// Micro-batches per step, at least; at most as many workers have work. Decides the bits, so never automatic.
    pub micro_batches: usize,
    /// Longest example, tokens. A longer completion is cut at its right end and loses its end of text; a prompt that
    /// fills the whole length makes a bad row.
    pub max_length: usize,
    /// Bounds a worker's memory: more micro-batches are made where these are full.
    pub max_tokens_per_micro_batch: usize,
    /// Highest of the schedule.
    pub learning_rate: f64,
    /// How the learning rate goes on after the warmup, which rises to it along a line.
    pub schedule: Schedule,
    /// Steps of the warmup. Below 1: a share of the steps; else a number of steps.
    pub warmup_steps: f64,
    /// On matrices only; norms and biases are skipped.
    pub weight_decay: f64,
    /// Of AdamW's moments.
    pub betas: [f64; 2],
    /// Of AdamW's denominator.
    pub eps: f64,
    /// The gradient is scaled to at most this norm; 0: never.
    pub max_grad_norm: f64,
    /// How the optimizer keeps what it knows. "fp32": exact masters and moments, 10 bytes for each parameter beside its own
    /// two in bf16. "bf16": no masters, and bf16 moments; 4 bytes, all rounded stochastically; only computing in bf16.
    /// Decides the bits.
    pub optimizer_state: OptimizerState,
    /// A new order in every epoch.
    pub shuffle: bool,
    /// Decides the order of the rows, and stochastic rounding.
    pub seed: u64,
    /// A step whose loss is more than this many median absolute deviations above the median of the steps before it brings a
    /// warning that names its rows, or to what train.on_spike says; 0: never.
    pub spike_mads: f64,
    /// Steps that a loss is held against.
    pub spike_window: usize,
    /// What a spike leads to. "quarantine": the rows of its highest micro-batch are left out from that step on, and the run goes
    /// back before it.
    pub on_spike: OnSpike,
    /// What a number that is not finite, or too large, leads to. "quarantine": the rows of every micro-batch of the step that
    /// gives one are left out from that step on, and the run goes back before it.
    pub on_bad_numbers: OnBadNumbers,
}

impl Train {
    /// Whether rows may be left out while the run goes on.
    pub fn may_leave_out(&self) -> bool {
        self.on_spike == OnSpike::Quarantine || self.on_bad_numbers == OnBadNumbers::Quarantine
    }
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
            optimizer_state: OptimizerState::Fp32,
            shuffle: true,
            seed: 0,
            spike_mads: 6.0,
            spike_window: 100,
            on_spike: OnSpike::Warn,
            on_bad_numbers: OnBadNumbers::Stop,
        }
    }
}

/// The precision of masters and moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerState {
    Fp32,
    Bf16,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnSpike {
    /// The run goes on as it is.
    #[default]
    Warn,
    /// The run ends before the step counts.
    Stop,
    Quarantine,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadNumbers {
    /// The run ends before the update.
    #[default]
    Stop,
    Quarantine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// To 0 along a half cosine.
    Cosine,
    /// To 0 along a line.
    Linear,
    /// As it is.
    Constant,
    /// Constant, then to 0 along a line over the last fifth of the steps.
    Wsd,
}

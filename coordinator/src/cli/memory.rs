//! What a run will need of this machine's memory. The worker's program knows: it walks through the worst step of the plan
//! without computing it, as every worker does before it loads anything.

use super::config::workers;
use super::{Error, Result};
use crate::launch::local::{self, worker_binary};
use crate::monitor::plain::grouped;
use crate::serve::assignment;
use crate::serve::work::Work;
use prost::Message;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_configs::run::RunConfig;
use unisono_proto::v1::{Assign, Neighbour};

/// The worker's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Of the model.
    #[serde(default)]
    parameters: usize,
    pub fits: bool,
    workers: usize,
    available_bytes: u64,
    available_source: String,
    zero_stage: u32,
    /// Micro-batches that go through the model together.
    together: usize,
    recompute: String,
    /// What of the training state lies on the host beside a GPU; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    offload: Option<String>,
    /// What the GPU has free for each worker; absent where nobody here knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpu_available_bytes: Option<u64>,
    /// Of one worker: the one that owns most.
    items: Vec<Item>,
    total_bytes: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    gpu_total_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unplanned {
    parameters: usize,
    unplanned: String,
}

impl Unplanned {
    pub fn show(&self) -> String {
        let parameters = grouped(self.parameters as u64);
        format!("memory: {parameters} parameters; what a worker needs is not known here: {}\n", self.unplanned)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Item {
    name: String,
    bytes: u64,
    /// Of the worker's GPU.
    #[serde(default, skip_serializing_if = "is_zero")]
    gpu_bytes: u64,
    what: String,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// Asks the worker's program what each of the workers would need if so many of them ran `here`, all unless told otherwise;
/// where it is not installed, the answer is why there is none: data can be checked without it.
pub fn foresee(
    config: &RunConfig,
    spec: &ModelSpec,
    work: &Work,
    here: Option<usize>,
) -> Result<std::result::Result<Memory, Unplanned>> {
    let workers = workers(config);
    let layout = Layout::new(spec);
    let owned = |rank: &usize| layout.shard_elements(*rank, workers).iter().map(|range| range.len()).sum::<usize>();
    let rank = (0..workers).max_by_key(owned).unwrap_or(0);
    let assign = assignment(config, work.program()).map_err(Error::bad_input)?;
    let kept = workers > 1 && config.checkpoint.snapshot_every > 0;
    let neighbour = kept.then(Neighbour::default);
    let assign = Assign { rank: rank as u32, world: workers as u32, neighbour, ..assign };
    let program = std::env::current_exe().map_err(Error::failed)?;
    let parameters = layout.parameters();
    let worker = match worker_binary(&program) {
        Ok(worker) => worker,
        Err(error @ local::Error::NoWorker { .. }) => {
            return Ok(Err(Unplanned { parameters, unplanned: error.to_string() }));
        }
        Err(error) => return Err(Error::bad_input(error)),
    };
    let memory = ask(&worker, &assign, here.unwrap_or(workers).clamp(1, workers))?;
    Ok(Ok(Memory { parameters, ..memory }))
}

fn ask(worker: &Path, assign: &Assign, workers: usize) -> Result<Memory> {
    let failed = |problem: &dyn std::fmt::Display| Error::Failed(format!("{}: {problem}", worker.display()));
    let mut command = Command::new(worker);
    command.args(["plan", "--workers", &workers.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    // It reads all of it before it answers; if it does not, its own words say why.
    drop(child.stdin.take().map(|mut stdin| stdin.write_all(&assign.encode_to_vec())));
    let output = child.wait_with_output().map_err(|error| failed(&error))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("unisono-worker: ").to_owned();
        let words = if words.is_empty() { format!("{}: {}", worker.display(), output.status) } else { words };
        return Err(if output.status.code() == Some(2) { Error::BadInput(words) } else { Error::Failed(words) });
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(&error))
}

impl Memory {
    /// Line by line; what takes nothing is left out.
    pub fn show(&self) -> String {
        let whose = if self.workers == 1 { "the worker".into() } else { format!("each of {} workers", self.workers) };
        let mut text = format!("memory of {whose}, {} parameters:\n", grouped(self.parameters as u64));
        // A second column where there is a second memory.
        let on_gpu = |bytes| if self.offload.is_some() { format!(" {:>11}", megabytes(bytes)) } else { String::new() };
        if self.offload.is_some() {
            text += &format!("  {:<14} {:>10} {:>11}\n", "", "host", "GPU");
        }
        for Item { name, bytes, gpu_bytes, what } in self.items.iter().filter(|item| item.bytes + item.gpu_bytes > 0) {
            text += &format!("  {name:<14} {:>10}{}  {what}\n", megabytes(*bytes), on_gpu(*gpu_bytes));
        }
        let (recompute, stage, together) = (&self.recompute, self.zero_stage, self.together);
        text += &format!("  {:<14} {:>10}{}  ", "in all", megabytes(self.total_bytes), on_gpu(self.gpu_total_bytes));
        let (share, source) = (megabytes(self.available_bytes / self.workers.max(1) as u64), &self.available_source);
        text += &format!("of {share} that {source} leaves it; cluster.zero_stage = {stage}, cluster.recompute = \"{recompute}\", {together} micro-batches together\n");
        if let Some(offload) = &self.offload {
            let has = match self.gpu_available_bytes {
                Some(bytes) => format!("each worker's GPU has {} free", megabytes(bytes)),
                None => "there is no GPU here, so this is what one must have free".into(),
            };
            text += &format!("  {has}; cluster.offload = \"{offload}\"\n");
        }
        text
    }

    /// The sentence that refuses it, with the cheapest change that would fit.
    pub fn refusal(&self) -> Option<String> {
        let remedy = self.remedy.as_ref()?;
        if let Some(free) = self.gpu_available_bytes.filter(|&free| self.gpu_total_bytes > free) {
            let (needed, free) = (megabytes(self.gpu_total_bytes), megabytes(free));
            return Some(format!("this needs {needed} of each worker's GPU, which has {free} free: {remedy}"));
        }
        let needed = megabytes(self.total_bytes * self.workers as u64);
        let (workers, source) = (self.workers, &self.available_source);
        let left = megabytes(self.available_bytes);
        Some(format!(
            "this needs {needed} for {workers} worker(s) on this machine, and {source} leaves {left}: {remedy}"
        ))
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{} MB", grouped((bytes as f64 / 1e6).round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_for_and_a_refusal_what_would_fit() {
        let answer = r#"{"fits": false, "workers": 2, "available_bytes": 3000000000, "available_source": "the machine",
            "zero_stage": 2, "together": 3, "recompute": "block", "total_bytes": 1600000000, "remedy": "set train.max_tokens_per_micro_batch = 1024",
            "items": [{"name": "parameters", "bytes": 1600000000, "what": "to compute with"},
                {"name": "snapshots", "bytes": 0, "what": "none"}]}"#;
        let memory = Memory { parameters: 800_000_000, ..serde_json::from_str(answer).unwrap() };
        let text = memory.show();
        assert!(text.starts_with("memory of each of 2 workers, 800,000,000 parameters:\n  parameters"), "{text}");
        assert!(text.contains("1,600 MB  to compute with") && !text.contains("snapshots"), "{text}");
        assert!(
            text.contains(
                "of 1,500 MB that the machine leaves it; cluster.zero_stage = 2, cluster.recompute = \"block\", 3"
            ),
            "{text}"
        );
        let sentence = memory.refusal().unwrap();
        assert!(sentence.contains("needs 3,200 MB for 2 worker(s)") && sentence.ends_with("= 1024"), "{sentence}");
        assert_eq!(Memory { remedy: None, ..memory.clone() }.refusal(), None);

        let mut items = memory.items.clone();
        items[0].gpu_bytes = 700_000_000;
        let (offload, gpu_available_bytes) = (Some("moments".into()), Some(600_000_000));
        let memory = Memory { items, offload, gpu_available_bytes, gpu_total_bytes: 700_000_000, ..memory };
        let text = memory.show();
        assert!(text.contains("1,600 MB      700 MB  to compute with"), "{text}");
        assert!(text.ends_with("each worker's GPU has 600 MB free; cluster.offload = \"moments\"\n"), "{text}");
        let sentence = memory.refusal().unwrap();
        assert!(sentence.starts_with("this needs 700 MB of each worker's GPU, which has 600 MB free"), "{sentence}");
    }
}

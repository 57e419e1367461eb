//! `MANIFEST.json`: what a checkpoint consists of. The checkpoint exists when this file does.
//!
//! A state file is safetensors. For each range of a parameter tensor that it holds there are three F32 tensors of
//! `end - begin` elements, named `<parameter>/<part>/<begin>-<end>`, the part being master, m or v: the master weights and
//! AdamW's moments, row-major, `begin` and `end` counting elements of the whole parameter. Ranges of all state files
//! tile every parameter exactly. The one samples file holds the U64 tensor `samples`: the training rows of all committed
//! steps, in the order in which they were trained on.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the manifest within a checkpoint's directory.
pub const MANIFEST: &str = "MANIFEST.json";

/// Version of this format.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    /// Committed steps.
    pub step: u64,
    pub cursor: Cursor,
    /// Who wrote it; says nothing about the state.
    pub writer: Writer,
    /// Model, data, split and train tables of the resolved config: BLAKE3, hexadecimal.
    pub config: String,
    /// The checkpoint before this one in the same run; absent for the first.
    pub parent: Option<Parent>,
    /// Every parameter, in the model's order.
    pub tensors: Vec<Tensor>,
    /// Sorted by name.
    pub files: Vec<File>,
}

/// Where the run stands: what is trained on next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Committed steps.
    pub step: u64,
    /// Epoch (from 0) and place within it of the next example.
    pub epoch: u64,
    pub position: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    pub term: u64,
    pub generation: u64,
    pub attempt: u32,
    pub workers: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub step: u64,
    /// BLAKE3 of the parent's manifest, hexadecimal.
    pub blake3: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    pub shape: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Masters and moments.
    State,
    /// Committed training rows.
    Samples,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Name within the checkpoint's directory.
    pub name: String,
    pub kind: Kind,
    pub bytes: u64,
    /// BLAKE3 of the file, hexadecimal.
    pub blake3: String,
    /// What a state file holds; empty for samples.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Range>,
}

/// Consecutive elements of one parameter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    pub tensor: String,
    pub begin: u64,
    pub end: u64,
}

impl Range {
    /// Name of one of the range's tensors in its file; `part` is `master`, `m` or `v`.
    pub fn key(&self, part: &str) -> String {
        format!("{}/{part}/{}-{}", self.tensor, self.begin, self.end)
    }
}

/// Why a checkpoint cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({source}); name a checkpoint's directory, one with a {MANIFEST}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a checkpoint's manifest ({source}); use another checkpoint of the run")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: format version {found} is unknown to this build, which reads version {VERSION}; use the build that wrote it")]
    Version { path: PathBuf, found: u32 },
}

impl Manifest {
    /// Reads `directory/MANIFEST.json`. Says nothing about the files that it lists.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.clone(), source })?;
        match manifest.version {
            VERSION => Ok(manifest),
            found => Err(Error::Version { path, found }),
        }
    }
}

/// Directory of the checkpoint after `step` within a run's directory.
pub fn directory(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join("checkpoints").join(format!("step-{step:08}"))
}

/// The run's checkpoints that have a manifest, oldest first.
pub fn list(run_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(run_dir.join("checkpoints")).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            entry.path().join(MANIFEST).exists().then(|| (step, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found
}
